"""COCO instance JSON: things only, one annotation per object, polygons or run-length codes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oneformer_jax.input_pipeline import datasets, images
from oneformer_jax.input_pipeline.annotations import run_lengths, schemas
from oneformer_jax.input_pipeline.annotations.faults import Fault, first_message
from oneformer_jax.input_pipeline.annotations.instances import LAYOUT, NO_PIXEL, read_instances
from oneformer_jax.input_pipeline.annotations.run_lengths import SegmentationError
from oneformer_jax.input_pipeline.coco_format import check_categories
from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.files import read_file, require
from oneformer_jax.input_pipeline.records import (
    RecordError,
    SegmentTable,
    checked_index,
    count_pixels,
    decode_image,
    keep_visible,
    make_record,
    read_image_size,
)

HIDDEN = "annotation that others hide completely"


def instance_info(name: str, categories: Sequence[Mapping[str, Any]]) -> DatasetInfo:
    """Returns the class table of an instance JSON: its categories in their order, all things."""
    return datasets.from_coco_categories(name, [{**c, "isthing": 1} for c in categories])


def instance_file_info(name: str, json_path: str | os.PathLike) -> DatasetInfo:
    """Returns the class table of an instance JSON, read from the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a JSON, or wrong categories.
    """
    require(Path(json_path), "instance JSON", LAYOUT)
    return instance_info(name, schemas.read_categories(json_path, LAYOUT, schemas.Category))


class CocoInstanceSource:
    """Reads images and an instance JSON as records whose segments are the instances.

    A record's map holds one instance per pixel. Where annotations overlap, the smaller one is on
    top; crowds are below all others. An instance without a visible pixel is left out, and `area`
    counts the visible pixels. Pixels of no instance are void. Every image of the JSON is a record,
    also without annotations.

    Args:
      images_dir: folder of the images.
      json_path: the instance JSON.
      info: class table; default: the categories of the JSON (`instance_info`).
      skip_broken: leave out annotations with faults; without it their image is broken.
      crowd_as_instances: read iscrowd 1 as 0.

    Attributes:
      faults: everything that is wrong in the JSON.
      remarks: annotations of the JSON that cover no pixel, or repeat another one.
      notes: remarks on the whole JSON, a sentence each.

    Raises:
      FileNotFoundError: the folder or the JSON is missing.
      ValueError: see `read_instances`; categories that `info` lacks; crowds alone.
    """

    max_pixels = images.MAX_PIXELS  # the most pixels of an image or map

    def __init__(
        self,
        images_dir: str | os.PathLike,
        json_path: str | os.PathLike,
        info: DatasetInfo | None = None,
        *,
        skip_broken: bool = False,
        crowd_as_instances: bool = False,
    ):
        self._images_dir, self._json_path = Path(images_dir), Path(json_path)
        self.skip_broken = skip_broken
        require(self._json_path, "instance JSON", LAYOUT)
        require(self._images_dir, "folder of images", LAYOUT, folder=True)
        content = read_instances(json_path)
        if info is None:
            info = instance_info(self._json_path.stem, content.categories)
        else:
            things = [{**category, "isthing": 1} for category in content.categories]
            check_categories(self._json_path, things, info)
        self.info = info
        self._contiguous = info.contiguous_ids()
        self.faults, self.remarks = content.faults, content.remarks
        self.notes: tuple[str, ...] = ()
        if crowd_as_instances:
            content = dataclasses.replace(content, crowd=np.zeros_like(content.crowd))
        else:
            self.notes = content.crowds_note(
                "--config.dataset.options.crowd_as_instances=True reads them as instances"
            )
        self._content = content.for_reading()

    def __len__(self) -> int:
        return len(self._content.image_ids)

    def __repr__(self) -> str:
        return f"CocoInstanceSource({str(self._json_path)!r}, {len(self)} records)"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "faults": [], "remarks": []}  # loader processes need none

    def name_of(self, index: int) -> str:
        """Returns the file name of image `index` in the JSON, which may be empty."""
        return self._content.image_names[index]

    def has_things(self, index: int) -> bool:
        """Tells from the JSON whether image `index` has a non-crowd instance with a pixel."""
        rows = self._content.rows(index)
        return bool((~self._content.crowd[rows] & ~self._content.empty[rows]).any())

    def classes_of(self, index: int) -> np.ndarray:
        """Lists the classes of image `index`'s instances, int [G], -1 if unknown; reads no file."""
        categories = self._content.category_ids[self._content.rows(index)].tolist()
        return np.array([self._contiguous.get(category, -1) for category in categories], np.int64)

    def image_size(self, index: int) -> tuple[int, int]:
        """Reads height and width in the head of the file of image `index`, or a RecordError."""
        path = self._image_path(index)
        return read_image_size(self._read(path), str(path), self.max_pixels)

    def __getitem__(self, index: int) -> dict:
        """Record `index`, in the order of the JSON's images; RecordError if it is broken."""
        return self.examine(index)[0]

    def examine(self, index: int) -> tuple[dict, list[Fault]]:
        """Reads record `index`, and finds a fault for each annotation without a visible pixel."""
        record, remarks = self._record(index)
        return {**record, "panoptic": record["panoptic"].astype(np.int32)}, remarks

    def compact(self, index: int) -> dict:
        """As `source[index]`, but a compact record (see `records`)."""
        return self._record(index)[0]

    def _record(self, index: int) -> tuple[dict, list[Fault]]:
        index = checked_index(index, len(self))
        content = self._content
        path = self._image_path(index)
        faults = list(content.faults_of_image.get(index, ()))
        if faults and not self.skip_broken:
            raise RecordError(first_message(faults), faults[0].kind)
        image = decode_image(self._read(path), str(path), self.max_pixels)
        shape, listed = image.shape[:2], tuple(content.image_sizes[index].tolist())
        if listed != (0, 0) and listed != shape:
            raise RecordError(
                f"{path}: the image has {shape[0]} x {shape[1]} pixels (height x width), but "
                f"{self._json_path} says {listed[0]} x {listed[1]}; its polygons would not fit",
                "size that differs from the JSON's",
            )
        masks, kept = [], []
        rows = content.rows(index)
        for row in range(rows.start, rows.stop):
            try:
                masks.append(run_lengths.mask_of(content.runs(row, shape), shape))
                kept.append(row)
            except SegmentationError as error:  # only if the JSON lacks the size
                if not self.skip_broken:
                    raise RecordError(str(error), error.kind) from None
        table = SegmentTable.from_lists(
            range(1, len(kept) + 1),
            [self._contiguous[c] for c in content.category_ids[kept].tolist()],
            content.crowd[kept],
            np.zeros(len(kept)),
        )
        table.check(self.info.num_classes, str(path))
        numbers = _paint(masks, table.crowd, shape)
        pixels = count_pixels(numbers, table)
        remarks = [
            Fault(
                HIDDEN if masks[i].any() else NO_PIXEL,
                f"{self._json_path}: annotation {content.ids[kept[i]]} of image "
                f"{content.image_ids[index]} has no visible pixel; it is not part of the truth",
            )
            for i in np.flatnonzero(pixels == 0)
            if not (content.empty[kept[i]] or content.double[kept[i]])  # known from the JSON
        ]
        numbers, table = keep_visible(numbers, table, pixels)
        record = make_record(
            image,
            numbers,
            table.numbered(),
            image_id=content.image_ids[index],
            file_name=content.image_names[index],
            where=str(path),
        )
        return record, remarks

    def _image_path(self, index: int) -> Path:
        name = self._content.image_names[index]
        if not name:
            fault = self._content.faults_of_image[index][0]
            raise RecordError(fault.message, fault.kind)
        return self._images_dir / name

    def _read(self, path: Path) -> bytes:
        hint = f"{self._json_path} lists it: restore the file or remove it from the JSON"
        return read_file(path, hint)


def _paint(masks: Sequence[np.ndarray], crowd: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Paints masks 1, 2, ... over each other: crowds first, then from largest to smallest."""
    areas = np.array([mask.sum() for mask in masks])
    panoptic = np.zeros(shape, np.uint8 if len(masks) < 256 else np.uint16)
    for i in np.lexsort((-areas, crowd == 0)) if len(masks) else ():
        panoptic[masks[i]] = i + 1
    return panoptic
