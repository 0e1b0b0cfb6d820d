"""COCO 2017 panoptic as downloaded from cocodataset.org."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import msgspec

from oneformer_jax.input_pipeline import datasets
from oneformer_jax.input_pipeline.annotations import schemas
from oneformer_jax.input_pipeline.builders import official, raw
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource
from oneformer_jax.input_pipeline.files import sha256

_FOLDERS = {"train": "train2017", "validation": "val2017"}


class CocoPanoptic(official.OfficialBuilder):
    """COCO 2017 with panoptic annotations.

    The original instance annotation, if present, tells which images have things, as in the official
    training filter.
    """

    DATASET = "coco"
    CLASSES = datasets.COCO
    EXPECTED: ClassVar[dict[str, int]] = {"train": 118_287, "validation": 5_000}
    RECORDS_PER_SHARD = 1000
    FOLDER = "coco"
    LAYOUT = """\
  DIR/
    {train,val}2017/*.jpg                          train2017.zip, val2017.zip
    annotations/panoptic_{train,val}2017.json      panoptic_annotations_trainval2017.zip
    annotations/panoptic_{train,val}2017/*.png     the zips inside of it (or DIR/panoptic_*2017/)
    annotations/instances_{train,val}2017.json     annotations_trainval2017.zip, optional"""

    @classmethod
    def required(cls, split: str) -> tuple[tuple[str, ...], ...]:
        year = _FOLDERS[split]
        return ((year,), (f"annotations/panoptic_{year}.json",), _panoptic_folders(year))

    @classmethod
    def open_split(cls, root: Path, split: str) -> raw.PanopticJsonSplit:
        year = _FOLDERS[split]
        images, json_path = root / year, root / f"annotations/panoptic_{year}.json"
        pngs = next(
            path for path in (root / name for name in _panoptic_folders(year)) if path.is_dir()
        )
        reader = CocoFolderSource(images, pngs, json_path, cls.CLASSES)
        fingerprint, with_instances, notes = sha256(json_path), None, ()
        instance_path = root / f"annotations/instances_{year}.json"
        if instance_path.is_file():
            fingerprint += sha256(instance_path)
            with_instances = images_with_instances(instance_path)
        else:
            notes = (
                f"there is no {instance_path}: data.require_things uses the panoptic annotation",
            )
        return raw.PanopticJsonSplit(
            reader,
            (images, pngs),
            fingerprint,
            with_instances=with_instances,
            notes=notes,
        )


def _panoptic_folders(year: str) -> tuple[str, ...]:
    return (f"annotations/panoptic_{year}", f"panoptic_{year}")


class _Instance(msgspec.Struct, gc=False):
    image_id: schemas.Identifier
    iscrowd: schemas.Flag


class _InstanceFile(msgspec.Struct):
    annotations: list[_Instance]


def images_with_instances(path: Path) -> set[str]:
    """Ids of the images with a non-crowd instance in an instances_*.json, or a ValueError."""
    content = schemas.open_file(path, "it must be an instance JSON of COCO", _InstanceFile)
    return {str(a.image_id) for a in content.annotations if not a.iscrowd}
