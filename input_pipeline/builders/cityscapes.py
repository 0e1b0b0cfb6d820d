"""Cityscapes (fine annotations) as downloaded from cityscapes-dataset.com."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from oneformer_jax.input_pipeline import datasets
from oneformer_jax.input_pipeline.builders import official, raw
from oneformer_jax.input_pipeline.records import RecordError, SegmentTable, decode_labels

_FOLDERS = {"train": "train", "validation": "val"}
_KNOWN_LABELS = range(34)  # labels of the annotation tool; -1, a licence plate, is not drawn
_INSTANCE = 1000  # ids of at least 1000 are label * 1000 + number of the instance


class CityscapesPanoptic(official.OfficialBuilder):
    """Panoptic Cityscapes, derived from the instanceIds PNGs as createPanopticImgs does."""

    DATASET = "cityscapes"
    CLASSES = datasets.CITYSCAPES
    EXPECTED: ClassVar[dict[str, int]] = {"train": 2_975, "validation": 500}
    RECORDS_PER_SHARD = 64
    FOLDER = "cityscapes"
    LAYOUT = """\
  DIR/
    leftImg8bit/{train,val}/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
    gtFine/{train,val}/CITY/CITY_SEQUENCE_FRAME_gtFine_instanceIds.png"""

    @classmethod
    def required(cls, split: str) -> tuple[tuple[str, ...], ...]:
        folder = _FOLDERS[split]
        return ((f"leftImg8bit/{folder}",), (f"gtFine/{folder}",))

    @classmethod
    def open_split(cls, root: Path, split: str) -> raw.LabelMapSplit:
        endings = {
            "image": ("leftImg8bit", "_leftImg8bit.png"),
            "instanceIds": ("gtFine", "_gtFine_instanceIds.png"),
        }
        files = {
            kind: {
                name: path
                for city in sorted((root / folder / _FOLDERS[split]).iterdir())
                if city.is_dir()
                for name, path in raw.list_files(city, ending).items()
            }
            for kind, (folder, ending) in endings.items()
        }
        return raw.LabelMapSplit(files, _convert, cls.CLASSES)


def _convert(maps: Mapping[str, bytes], name: str) -> tuple[np.ndarray, SegmentTable]:
    where = f"{name}_gtFine_instanceIds.png"
    return panoptic_map(decode_labels(maps["instanceIds"], where), where)


def panoptic_map(instance_ids: np.ndarray, where: str) -> tuple[np.ndarray, SegmentTable]:
    """Derives panoptic map and segments from an instanceIds map, as createPanopticImgs does.

    A pixel is a label id (stuff, and groups of things) or 1000 * label id + number. Segments keep
    that value as their id. Label ids outside the evaluation become void, including instances of
    caravan and trailer. A thing without a number is a group: crowd.

    Args:
      instance_ids: uint16 (or uint8) [H, W].
      where: name of the map in messages.

    Returns:
      int32 [H, W], and the segments in order of their ids.

    Raises:
      RecordError: another kind of image, or an unknown label id.
    """
    if instance_ids.ndim != 2 or instance_ids.dtype not in (np.uint8, np.uint16):
        raise RecordError(
            f"{where}: a map of {instance_ids.dtype} {instance_ids.shape}; instanceIds are one "
            "16-bit channel (labelIds, color and other PNGs cannot be used)"
        )
    counts = np.bincount(instance_ids.ravel())
    ids = np.flatnonzero(counts)
    labels = np.where(ids >= _INSTANCE, ids // _INSTANCE, ids)
    unknown = labels[~np.isin(labels, _KNOWN_LABELS)]
    if len(unknown):
        raise RecordError(f"{where}: label id {unknown[0]}; Cityscapes has 0 to 33")
    classes = datasets.CITYSCAPES.contiguous_ids()
    categories = np.array([classes.get(label, -1) for label in labels.tolist()])
    kept = categories >= 0
    is_thing = np.array(datasets.CITYSCAPES.is_thing)[categories]
    segments = SegmentTable.from_lists(
        ids[kept], categories[kept], (is_thing & (ids < _INSTANCE))[kept], counts[ids][kept]
    )
    lookup = np.zeros(len(counts), np.int32)
    lookup[segments.ids] = segments.ids
    return lookup[instance_ids], segments
