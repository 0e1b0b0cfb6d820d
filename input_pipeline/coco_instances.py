"""COCO instance JSON: things only, one annotation per object, polygons or run-length codes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from input_pipeline import datasets, images
from input_pipeline.coco_format import check_categories
from input_pipeline.datasets import DatasetInfo
from input_pipeline.files import found_in, read_file
from input_pipeline.records import (
    RecordError,
    SegmentTable,
    checked_index,
    decode_image,
    make_record,
    read_image_size,
)

_LAYOUT = (
    "a COCO instance dataset is a folder of images and a JSON with "
    '"images", "annotations" (each with image_id, category_id and segmentation) and "categories"'
)


def load_instance_json(path: str | os.PathLike) -> dict:
    """Reads a COCO instance JSON and checks its layout.

    Raises:
      FileNotFoundError: no such file; says what lies there instead.
      ValueError: not JSON, or not in the layout of COCO instances.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no instance JSON {path}: {_LAYOUT}; {found_in(path)}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); is it truncated?") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found or 'nothing'}; {_LAYOUT}")
    if not content["images"]:
        raise ValueError(f"{path} lists no images: the dataset is empty")
    for number, annotation in enumerate(content["annotations"]):
        if "segments_info" in annotation:
            raise ValueError(
                f"{path} looks like a panoptic JSON, which has one annotation per image: use "
                'dataset.name="coco_folder"'
            )
        missing = [k for k in ("image_id", "category_id", "segmentation") if k not in annotation]
        if missing:
            raise ValueError(f"{path}: annotation {number} lacks {', '.join(missing)}; {_LAYOUT}")
    return content


def instance_info(name: str, categories: Sequence[Mapping[str, Any]]) -> DatasetInfo:
    """The class table of an instance JSON: its categories in their order, all of them things."""
    return datasets.from_coco_categories(name, [{**c, "isthing": 1} for c in categories])


class CocoInstanceSource:
    """Reads images and an instance JSON as records whose segments are the instances.

    A record's map holds one instance per pixel. Where annotations overlap, the smaller one is on
    top and crowds are below all others; an instance that is covered wholly keeps no pixel. `area`
    is what is left visible. Pixels of no instance are void. All images of the JSON are records,
    also those without annotations.

    Args:
      images_dir: folder of the images.
      json_path: the instance JSON.
      info: class table; default: the categories of the JSON (`instance_info`).

    Raises:
      FileNotFoundError: the folder or the JSON is missing.
      ValueError: the JSON has another layout, or categories that `info` lacks.
    """

    max_pixels = images.MAX_PIXELS  # the most pixels of an image or map

    def __init__(
        self,
        images_dir: str | os.PathLike,
        json_path: str | os.PathLike,
        info: DatasetInfo | None = None,
    ):
        self._images_dir, self._json_path = Path(images_dir), Path(json_path)
        content = load_instance_json(json_path)
        if not self._images_dir.is_dir():
            raise FileNotFoundError(
                f"no folder of images {self._images_dir}: {_LAYOUT}; {found_in(self._images_dir)}"
            )
        if info is None:
            info = instance_info(self._json_path.stem, content["categories"])
        else:
            things = [{**category, "isthing": 1} for category in content["categories"]]
            check_categories(self._json_path, things, info)
        self.info = info
        self._contiguous = info.contiguous_ids()

        listed = content["images"]
        position = {image["id"]: i for i, image in enumerate(listed)}
        grouped: list[list[dict]] = [[] for _ in listed]
        for annotation in content["annotations"]:
            if annotation["image_id"] not in position:
                raise ValueError(
                    f'{json_path}: the "images" list has no image_id {annotation["image_id"]!r}, '
                    "to which an annotation refers"
                )
            grouped[position[annotation["image_id"]]].append(annotation)
        self._images = [
            (str(image["id"]), image.get("file_name", ""), image.get("height"), image.get("width"))
            for image in listed
        ]
        keys = ("id", "category_id", "iscrowd", "segmentation")
        # As text: a small pickle, and the numbers stay as they were written.
        self._annotations = [
            json.dumps([{k: a[k] for k in keys if k in a} for a in group]).encode()
            for group in grouped
        ]
        self._has_things = np.array([any(not a.get("iscrowd") for a in g) for g in grouped])

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        return f"CocoInstanceSource({str(self._json_path)!r}, {len(self)} records)"

    def has_things(self, index: int) -> bool:
        """Whether image `index` has an instance that is no crowd; reads no file."""
        return bool(self._has_things[index])

    def classes_of(self, index: int) -> np.ndarray:
        """The classes of the instances of image `index`, int [G], -1 if unknown; reads no file."""
        annotations = json.loads(self._annotations[index])
        return np.array([self._contiguous.get(a["category_id"], -1) for a in annotations], np.int64)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, read from the head of its file.

        Raises:
          RecordError: the file is missing or not an image.
        """
        path = self._image_path(index)
        return read_image_size(self._read(path), str(path), self.max_pixels)

    def __getitem__(self, index: int) -> dict:
        """Record `index`, in the order of the JSON's images.

        Raises:
          RecordError: the record is broken.
          IndexError: no such index.
        """
        record = self.compact(index)
        return {**record, "panoptic": record["panoptic"].astype(np.int32)}

    def compact(self, index: int) -> dict:
        """As `source[index]`, but a compact record (see `records`)."""
        index = checked_index(index, len(self))
        path = self._image_path(index)
        image = decode_image(self._read(path), str(path), self.max_pixels)
        image_id, file_name, *listed = self._images[index]
        shape = image.shape[:2]
        if None not in listed and tuple(listed) != shape:
            raise RecordError(
                f"{path}: the image has {shape[0]} x {shape[1]} pixels (height x width), but "
                f"{self._json_path} says {listed[0]} x {listed[1]}; its polygons would not fit"
            )
        annotations = json.loads(self._annotations[index])
        numbers = list(range(1, len(annotations) + 1))
        table = SegmentTable.from_lists(
            numbers,
            [self._class(a, path) for a in annotations],
            [int(bool(a.get("iscrowd"))) for a in annotations],
            numbers,  # replaced by the visible areas below
        )
        table.check(self.info.num_classes, str(path))
        masks = [_mask(a, shape, f"{self._json_path}, {file_name}") for a in annotations]
        panoptic = _paint(masks, table.crowd, shape)
        table.areas[:] = np.bincount(panoptic.reshape(-1), minlength=len(table) + 1)[1:]
        return make_record(
            image, panoptic, table, image_id=image_id, file_name=file_name, where=str(path)
        )

    def _class(self, annotation: dict, path: Path) -> int:
        category = annotation["category_id"]
        if category not in self._contiguous:
            raise RecordError(
                f"{self._json_path}, {path.name}: an annotation has category_id {category}, which "
                'is not in "categories"; correct it or add the category'
            )
        return self._contiguous[category]

    def _image_path(self, index: int) -> Path:
        image_id, name, *_ = self._images[index]
        if not name:
            raise RecordError(f"{self._json_path}: image {image_id} has no file_name")
        return self._images_dir / name

    def _read(self, path: Path) -> bytes:
        hint = f"{self._json_path} lists it: restore the file or take it out of the JSON"
        return read_file(path, hint)


def _mask(annotation: Mapping[str, Any], shape: tuple[int, int], where: str) -> np.ndarray:
    """The pixels of an annotation, bool [H, W], as pycocotools rasterises them."""
    where = f"{where}: annotation {annotation.get('id', '')}".rstrip()
    code = annotation["segmentation"]
    if isinstance(code, list):
        if not code:
            raise RecordError(
                f"{where} has no segmentation; a box alone is no mask: outline the object or take "
                "the annotation out of the JSON"
            )
        for polygon in code:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise RecordError(
                    f"{where} has a polygon that is not a list [x1, y1, x2, y2, ...] of at least "
                    "three points"
                )
        rle = coco_mask.merge(coco_mask.frPyObjects(code, *shape))
    else:
        if not isinstance(code, dict) or tuple(code.get("size", ())) != shape:
            raise RecordError(
                f"{where} has a run-length code of size {code.get('size') if code else None}, the "
                f"image {list(shape)} (height, width)"
            )
        rle = coco_mask.frPyObjects(code, *shape) if isinstance(code["counts"], list) else code
    return coco_mask.decode(rle).astype(bool)


def _paint(masks: Sequence[np.ndarray], crowd: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Masks 1, 2, ... over each other: crowds below, then the larger before the smaller ones."""
    areas = np.array([mask.sum() for mask in masks])
    panoptic = np.zeros(shape, np.uint8 if len(masks) < 256 else np.uint16)
    for i in np.lexsort((-areas, crowd == 0)) if len(masks) else ():
        panoptic[masks[i]] = i + 1
    return panoptic
