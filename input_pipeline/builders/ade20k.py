"""ADE20K (SceneParse150 and its instances) as downloaded from sceneparsing.csail.mit.edu."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from oneformer_jax.input_pipeline import datasets
from oneformer_jax.input_pipeline.builders import official, raw
from oneformer_jax.input_pipeline.records import RecordError, SegmentTable, decode_labels

_FOLDERS = {"train": "training", "validation": "validation"}
# Category c of the instance annotation, 1 to 100, is thing c - 1 of the table.
_THINGS = np.flatnonzero(datasets.ADE20K.is_thing)


class Ade20kPanoptic(official.OfficialBuilder):
    """Panoptic ADE20K, derived from the semantic and instance maps as the official script does.

    The two annotations disagree in places, and the semantic one defines the semantic scores, so
    records carry it too.
    """

    DATASET = "ade20k"
    CLASSES = datasets.ADE20K
    EXPECTED: ClassVar[dict[str, int]] = {"train": 20_210, "validation": 2_000}
    RECORDS_PER_SHARD = 1000
    SEMANTIC = True
    FOLDER = "ADEChallengeData2016"
    LAYOUT = """\
  DIR/ (ADEChallengeData2016, or the folder that holds it)
    images/{training,validation}/ADE_*.jpg               ADEChallengeData2016.zip
    annotations/{training,validation}/ADE_*.png          ADEChallengeData2016.zip
    annotations_instance/{training,validation}/ADE_*.png annotations_instance.tar"""

    @classmethod
    def required(cls, split: str) -> tuple[tuple[str, ...], ...]:
        folder = _FOLDERS[split]
        kinds = ("images", "annotations", "annotations_instance")
        return tuple((f"{kind}/{folder}",) for kind in kinds)

    @classmethod
    def open_split(cls, root: Path, split: str) -> raw.LabelMapSplit:
        folder = _FOLDERS[split]
        files = {
            "image": raw.list_files(root / "images" / folder, ".jpg"),
            "annotations": raw.list_files(root / "annotations" / folder, ".png"),
            "annotations_instance": raw.list_files(root / "annotations_instance" / folder, ".png"),
        }
        return raw.LabelMapSplit(files, _convert, cls.CLASSES, semantic="annotations")


def _convert(maps: Mapping[str, bytes], name: str) -> tuple[np.ndarray, SegmentTable]:
    decoded = {kind: decode_labels(data, f"{kind}/{name}.png") for kind, data in maps.items()}
    return panoptic_map(decoded["annotations"], decoded["annotations_instance"], f"{name}.png")


def panoptic_map(
    semantic: np.ndarray, instance: np.ndarray, where: str
) -> tuple[np.ndarray, SegmentTable]:
    """Derives panoptic map and segments from the two raw maps, by the official rules.

    Stuff comes from the semantic map, things from the instance map, which covers it. The area of
    stuff is counted *before* that, so it can exceed the visible pixels, and a stuff segment without
    visible pixels stays listed. Things of the semantic map alone become void. No segment is crowd.

    Args:
      semantic: uint8 [H, W], class + 1, 0 is unlabelled.
      instance: uint8 [H, W, 3]: category 1 to 100, number of the instance (0: none), unused.
      where: name of the maps in messages.

    Returns:
      int32 [H, W] and the segments, stuff first; ids are 1, 2, ... in that order.

    Raises:
      RecordError: other kinds of images, different sizes, an unknown category, or an instance with
        two categories.
    """
    if semantic.ndim != 2 or semantic.dtype != np.uint8:
        raise RecordError(
            f"annotations/{where}: a map of {semantic.dtype} "
            f"{semantic.shape}, not one 8-bit channel"
        )
    if instance.ndim != 3 or instance.dtype != np.uint8:
        raise RecordError(
            f"annotations_instance/{where}: a map of {instance.dtype} "
            f"{instance.shape}, not 8-bit RGB"
        )
    if semantic.shape != instance.shape[:2]:
        raise RecordError(
            f"{where}: the map in annotations has {semantic.shape} pixels, the one in "
            f"annotations_instance {instance.shape[:2]}"
        )
    num_classes = datasets.ADE20K.num_classes
    stuff_areas = np.bincount(semantic.ravel(), minlength=num_classes + 1)[1:]
    if len(stuff_areas) > num_classes:
        raise RecordError(f"annotations/{where}: class {len(stuff_areas)}; ADE20K has 1 to 150")
    stuff_areas[_THINGS] = 0
    stuff = np.flatnonzero(stuff_areas)

    # Pixels of every (number, category).
    pairs = instance[..., 1].astype(np.uint16) * 256 + instance[..., 0]
    pair_areas = np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)
    numbers, instance_categories = np.nonzero(pair_areas)
    listed = numbers > 0
    numbers, instance_categories = numbers[listed], instance_categories[listed]
    twice = numbers[:-1][np.diff(numbers) == 0]
    if len(twice):
        raise RecordError(
            f"annotations_instance/{where}: instance {twice[0]} has more than one category"
        )
    outside = (instance_categories < 1) | (instance_categories > len(_THINGS))
    if outside.any():
        raise RecordError(
            f"annotations_instance/{where}: instance {numbers[outside][0]} has category "
            f"{instance_categories[outside][0]}; ADE20K has 1 to {len(_THINGS)}"
        )

    count = len(stuff) + len(numbers)
    segments = SegmentTable.from_lists(
        np.arange(1, count + 1),
        [*stuff, *_THINGS[instance_categories - 1]],
        np.zeros(count),
        [*stuff_areas[stuff], *pair_areas[numbers, instance_categories]],
    )
    of_class = np.zeros(256, np.int32)
    of_class[stuff + 1] = np.arange(1, len(stuff) + 1)
    of_number = np.zeros(256, np.int32)
    of_number[numbers] = np.arange(len(stuff) + 1, count + 1)
    things = of_number[instance[..., 1]]
    return np.where(things > 0, things, of_class[semantic]), segments
