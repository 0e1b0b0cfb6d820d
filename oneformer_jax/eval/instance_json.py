"""Original instance annotations (COCO's instances_*.json) as the ground truth of AP."""

from __future__ import annotations

import json
import os
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

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


_ANNOTATION_KEYS = ("image_id", "category_id", "area", "segmentation")


class InstanceAnnotations:
    """Reads a COCO instance file once and gives the masks of one image at a time.

    Its categories may be numbered as the dataset numbers its classes (`metadata.category_ids`) or
    by their position among the things, as ADE20K's 100 instance classes are; its list of categories
    tells which.

    Args:
      path: a JSON with "images", "annotations" and "categories".
      metadata: the classes of the model.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a JSON, or categories that are not things of `metadata`.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Metadata):
        self.path = pathlib.Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(
                f"eval.instance_json={path}: there is no such file; leave it empty to derive the "
                "instances from the panoptic annotation"
            )
        try:
            content = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); is it truncated?") from error
        keys = ("images", "annotations", "categories")
        missing = [k for k in keys if k not in content] if isinstance(content, Mapping) else keys
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}; eval.instance_json must be a COCO "
                "instance file"
            )
        classes = _class_of_category(self.path, content["categories"], metadata)
        self._images: dict[str, tuple[int, int, list[Any]]] = {}
        by_id = {}
        for image in content["images"]:
            entry = (int(image["height"]), int(image["width"]), [])
            by_id[image["id"]] = self._images[str(image["id"])] = entry
        for image in content["images"]:  # a panoptic file may call an image by its file
            stem = pathlib.PurePath(image.get("file_name", "")).stem
            self._images.setdefault(stem, by_id[image["id"]])
        for annotation in content["annotations"]:
            number = annotation.get("id")
            absent = [
                k
                for k in ("image_id", "category_id", "area", "segmentation")
                if k not in annotation
            ]
            if absent:
                hint = "; a panoptic file?" if "segments_info" in annotation else ""
                raise ValueError(f"{path}: annotation {number} lacks {', '.join(absent)}{hint}")
            if annotation["image_id"] not in by_id or annotation["category_id"] not in classes:
                raise ValueError(
                    f"{path}: annotation {number} is of image {annotation['image_id']} and "
                    f"category {annotation['category_id']}, one of which the file does not list"
                )
            by_id[annotation["image_id"]][2].append(
                (
                    classes[annotation["category_id"]],
                    annotation["area"],
                    annotation.get("iscrowd", 0),
                    annotation["segmentation"],
                    number,
                )
            )

    def masks(self, image_id: str, size: tuple[int, int]) -> Masks:
        """The instances of an image; ValueError if the file lacks it or has it in another size."""
        if image_id not in self._images:
            raise ValueError(
                f"{self.path} has no image {image_id}; eval.instance_json must belong to the "
                "evaluated split"
            )
        height, width, rows = self._images[image_id]
        if (height, width) != size:
            raise ValueError(
                f"{self.path}: image {image_id} has {height} x {width} pixels (height x width), "
                f"its panoptic annotation {size[0]} x {size[1]}"
            )
        codes = []
        for *_, segmentation, number in rows:
            try:
                codes.append(_run_lengths(segmentation, height, width))
            except (AttributeError, TypeError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{self.path}: annotation {number} of image {image_id} has no readable "
                    f"segmentation ({error})"
                ) from error
        return Masks(
            classes=np.array([row[0] for row in rows], np.int64),
            values=np.array([row[1] for row in rows], np.float64),
            crowd=np.array([row[2] for row in rows], bool),
            counts=codes,
        )


def _class_of_category(path: pathlib.Path, categories: list[Any], metadata: Metadata) -> dict:
    """Category id of the file -> contiguous class id."""
    found = {category["id"] for category in categories}
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


def _run_lengths(segmentation: Any, height: int, width: int) -> bytes:
    """Compressed run-length code of a COCO segmentation: polygons, counts, or compressed counts."""
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        if not isinstance(counts, list):
            if list(segmentation["size"]) != [height, width]:
                raise ValueError(f"its mask has the size {segmentation['size']}")
            return counts.encode("ascii")
        if sum(counts) != height * width:
            raise ValueError(f"its run lengths are of {sum(counts)} pixels")
        return coco_mask.frPyObjects(segmentation, height, width)["counts"]
    if not segmentation or any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        raise ValueError("it is neither run lengths nor polygons of at least three points")
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))["counts"]


def encode(mask: np.ndarray) -> bytes:
    """Compressed run-length code of bool [H, W]."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
