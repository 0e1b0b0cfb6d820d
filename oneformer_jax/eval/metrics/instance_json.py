"""Original instance annotations (COCO's instances_*.json) as the ground truth of AP."""

from __future__ import annotations

import os
import pathlib
import typing

import numpy as np
from absl import logging
from pycocotools import mask as coco_mask

from oneformer_jax.input_pipeline.annotations import faults, run_lengths
from oneformer_jax.input_pipeline.annotations.instances import InstanceFile, read_instances
from oneformer_jax.input_pipeline.annotations.run_lengths import SegmentationError
from oneformer_jax.types import Metadata


class Masks(typing.NamedTuple):
    """The masks of one image.

    Attributes:
      classes: int64 [N], contiguous class ids.
      values: float64 [N], the scores of detections or the annotated areas of the ground truth.
      crowd: bool [N], False for detections.
      counts: N compressed run-length codes.
    """

    classes: np.ndarray
    values: np.ndarray
    crowd: np.ndarray
    counts: list[bytes]


class InstanceAnnotations:
    """Reads a COCO instance file once and gives the masks of one image at a time.

    Its category ids are the dataset's own (`metadata.category_ids`) or, as for ADE20K's 100
    instance classes, positions among the things; its list of categories tells which. A missing area
    is counted in pixels; an annotation without a pixel is ignored.

    Args:
      path: a JSON with "images", "annotations" and "categories".
      metadata: the classes of the model.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of JSON, faults in it, crowds alone, or categories that are not
        things of `metadata`.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Metadata):
        self.path = pathlib.Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(
                f"eval.instance_json={path}: there is no such file; leave it empty to derive the "
                "instances from the panoptic annotation"
            )
        content = read_instances(self.path, names=False)
        if content.faults:
            raise faults.error(
                f"eval.instance_json={self.path}",
                content.faults,
                "Scores against a part of the truth would mislead: correct the file.",
            )
        notes = content.crowds_note("set it to 0 in the file for instances")
        for line in (*notes, *faults.summary(content.remarks, shown=3)):
            logging.warning("%s", line)
        self._content = content
        self._classes = _class_of_category(self.path, content, metadata)
        self._positions = {image_id: i for i, image_id in enumerate(content.image_ids)}
        for i, name in enumerate(content.image_names):  # a panoptic file may use it as the id
            self._positions.setdefault(pathlib.PurePath(name).stem, i)

    def masks(self, image_id: str, size: tuple[int, int]) -> Masks:
        """Reads the instances of an image; ValueError if the file lacks it or has another size."""
        position = self._positions.get(image_id)
        if position is None:
            raise ValueError(
                f"{self.path} has no image {image_id}; eval.instance_json must belong to the "
                "evaluated split"
            )
        content = self._content
        height, width = content.image_sizes[position].tolist()
        if (height, width) not in ((0, 0), size):
            raise ValueError(
                f"{self.path}: image {image_id} has {height} x {width} pixels (height x width), "
                f"its panoptic annotation {size[0]} x {size[1]}"
            )
        rows = content.rows(position)
        try:
            runs = [content.runs(row, size) for row in range(rows.start, rows.stop)]
        except SegmentationError as error:  # only if the file lacks the size
            raise ValueError(f"{error} (image {image_id})") from None
        pixels = np.array([run_lengths.area_of(r) for r in runs], np.float64)
        seen = np.flatnonzero(pixels)
        areas = content.areas[rows]
        return Masks(
            classes=np.array(
                [self._classes[c] for c in content.category_ids[rows][seen].tolist()], np.int64
            ),
            values=np.where(np.isnan(areas), pixels, areas)[seen],
            crowd=content.crowd[rows][seen],
            counts=[run_lengths.compress(runs[i], size) for i in seen],
        )


def _class_of_category(
    path: pathlib.Path, content: InstanceFile, metadata: Metadata
) -> dict[int, int]:
    """Maps category ids of the file to contiguous class ids."""
    found = {category["id"] for category in content.categories}
    things = [c for c, thing in enumerate(metadata.is_thing) if thing]
    by_dataset = {metadata.category_ids[c]: c for c in things}
    by_position = dict(enumerate(things))
    if found <= by_dataset.keys():
        return by_dataset
    if found == by_position.keys():
        return by_position
    strange = sorted(found - by_dataset.keys())[:10]
    raise ValueError(
        f"{path}: the categories {strange} are no things of {metadata.dataset}; they must have the "
        f"dataset's own category ids, or be 0..{len(things) - 1} in the order of its things"
    )


def encode(mask: np.ndarray) -> bytes:
    """Encodes bool [H, W] as a compressed run-length code."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
