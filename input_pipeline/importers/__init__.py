"""Importers of labelling tools' exports: each writes the COCO layout that configs/custom.py reads.

An importer drops what is no mask (points, lines, tags) and says so. What it cannot read for sure is
a fault; faults are reported together, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from oneformer_jax import remote
from oneformer_jax.input_pipeline.importers import cvat, label_studio, labelme, mask_folders, yolo
from oneformer_jax.input_pipeline.importers.export import Export

# Name of a format -> its importer.
FORMATS: dict[str, Callable[[Export], None]] = {
    "labelme": labelme.read,
    "cvat": cvat.read,
    "yolo": yolo.read,
    "label_studio": label_studio.read,
    "mask_folders": mask_folders.read,
}


def import_export(
    form: str, source: str | os.PathLike[str], data_dir: str | os.PathLike[str]
) -> str:
    """Imports the folder `source` of a labelling tool into a new folder of images and COCO JSONs.

    Args:
      form: one of `FORMATS`.
      source: folder of the export.
      data_dir: folder that is made; it must not exist, or be empty.

    Returns:
      A report for people: what was written, what was dropped, and the next command.

    Raises:
      ValueError: an unknown format, or faults of the export.
      OSError: `source` is missing, `data_dir` exists or cannot be written, or one is in a bucket.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; use one of {', '.join(FORMATS)}")
    remote.require_local(source, "the folder of an export")
    remote.require_local(data_dir, "the new folder of an import")
    source, data_dir = (Path(os.path.abspath(Path(p).expanduser())) for p in (source, data_dir))
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: there is no such folder; unpack the export first")
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise FileExistsError(f"{data_dir} exists already; name a new folder by --data_dir")
    export = Export(source, form)
    FORMATS[form](export)
    return export.write(data_dir)
