"""The COCO-panoptic folder format: its JSON, and a source that reads the folder directly."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oneformer_jax.input_pipeline import datasets, images
from oneformer_jax.input_pipeline.annotations import schemas
from oneformer_jax.input_pipeline.annotations.faults import Fault, first_message
from oneformer_jax.input_pipeline.annotations.panoptic import (
    LAYOUT,
    NO_AREA,
    PanopticFile,
    read_panoptic,
)
from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.files import read_file, require
from oneformer_jax.input_pipeline.records import (
    RecordError,
    SegmentTable,
    checked_index,
    count_pixels,
    decode_image,
    decode_panoptic,
    evenly_spread,
    keep_visible,
    make_record,
    read_image_size,
    with_ids,
)

NO_PIXEL = "segment without a pixel"
WRONG_AREA = "area that is not the number of pixels"


class Annotation(NamedTuple):
    """The map of an image and its visible segments.

    Attributes:
      numbers: uint8 [H, W], or uint16 above 255 segments: positions in `segments` + 1, 0 is void.
      segments: those with a pixel; their areas count the pixels.
      remarks: segments without a pixel and areas that were corrected.
    """

    numbers: np.ndarray
    segments: SegmentTable
    remarks: list[Fault]


def coco_folder_info(name: str, json_path: str | os.PathLike) -> DatasetInfo:
    """Returns the class table of a COCO-panoptic JSON.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a JSON, or wrong categories.
    """
    require(Path(json_path), "panoptic JSON", LAYOUT)
    categories = schemas.read_categories(json_path, LAYOUT, schemas.PanopticCategory)
    return datasets.from_coco_categories(name, categories)


def check_categories(path: Path, categories: list[dict], info: DatasetInfo) -> None:
    """Raises ValueError unless all categories of a JSON stand in the class table."""
    own = datasets.from_coco_categories(path.stem, categories)
    index = info.contiguous_ids()
    for category, name, thing in zip(own.category_ids, own.class_names, own.is_thing, strict=True):
        k = index.get(category)
        if k is None:
            raise ValueError(
                f"{path}: category {category} ({name}) is not in the class table of "
                f"{info.dataset!r}; all splits must share the categories of the training JSON"
            )
        if (info.class_names[k], info.is_thing[k]) != (name, thing):
            raise ValueError(
                f"{path}: category {category} is {name!r} (isthing {int(thing)}), but in the class "
                f"table of {info.dataset!r} it is {info.class_names[k]!r} (isthing "
                f"{int(info.is_thing[k])}); all splits must share one list of categories"
            )


class CocoFolderSource:
    """Reads a COCO-panoptic-format folder directly, without preparation.

    Areas are counted in the PNG, not read from the JSON; segments without a pixel are left out.
    The JSON is kept as flat arrays, so a source of 100,000 images is a small pickle.

    Args:
      images_dir: folder of the images.
      panoptic_dir: folder of the panoptic PNGs.
      json_path: the COCO-panoptic JSON.
      info: class table; default: the categories of the JSON (`datasets.from_coco_categories`).
      content: the result of `read_panoptic` for the JSON, if its categories need not be compared
        with `info`.
      skip_broken: treat segments with faults as void; without it their image is broken.

    Attributes:
      faults: everything that is wrong in the JSON.

    Raises:
      FileNotFoundError: a folder or the JSON is missing.
      ValueError: see `read_panoptic`; or categories that `info` lacks.
    """

    max_pixels = images.MAX_PIXELS  # the most pixels of an image or map

    def __init__(
        self,
        images_dir: str | os.PathLike,
        panoptic_dir: str | os.PathLike,
        json_path: str | os.PathLike,
        info: DatasetInfo | None = None,
        content: PanopticFile | None = None,
        *,
        skip_broken: bool = False,
    ):
        self._images_dir, self._panoptic_dir = Path(images_dir), Path(panoptic_dir)
        self._json_path, self.skip_broken = Path(json_path), skip_broken
        require(self._json_path, "panoptic JSON", LAYOUT)
        require(self._images_dir, "folder of images", LAYOUT, folder=True)
        require(self._panoptic_dir, "folder of panoptic PNGs", LAYOUT, folder=True)
        given, content = content, content or read_panoptic(json_path)
        if info is None:
            info = datasets.from_coco_categories(self._json_path.stem, content.categories)
        elif given is None:
            check_categories(self._json_path, content.categories, info)
        self.info = info
        self._contiguous = info.contiguous_ids()
        self._content = content.without_categories(info.category_ids)

    @property
    def faults(self) -> list[Fault]:
        return self._content.faults

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the whole JSON, a sentence each."""
        notes = []
        if self._content.unannotated:
            notes.append(
                f"{self._json_path}: {self._content.unannotated:,} images have no annotation and "
                "are not read"
            )
        _, categories, crowd, _ = self._content.segments.T
        things = [c for c, t in zip(self.info.category_ids, self.info.is_thing, strict=True) if t]
        crowd = crowd[np.isin(categories, things)]
        if len(crowd) and crowd.all():
            notes.append(
                f"{self._json_path}: all {len(crowd):,} segments of things have iscrowd 1, which "
                "marks groups that training ignores; set it to 0 for instances"
            )
        return tuple(notes)

    def __len__(self) -> int:
        return len(self._content.image_ids)

    def __repr__(self) -> str:
        return f"CocoFolderSource({str(self._json_path)!r}, {len(self)} records)"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_content": self._content.for_reading()}

    def image_path(self, index: int) -> Path:
        """Returns the path of image `index`; RecordError if its annotation is broken."""
        self._check_annotation(index)
        return self._images_dir / self._content.image_names[index]

    def panoptic_path(self, index: int) -> Path:
        """Finds the panoptic PNG of image `index`; RecordError if its annotation is broken."""
        self._check_annotation(index)
        return self._panoptic_dir / self._content.panoptic_names[index]

    def image_id(self, index: int) -> str:
        """Returns the id of image `index` in the JSON, as text; "" if its annotation is broken."""
        return self._content.image_ids[index]

    def name_of(self, index: int) -> str:
        """Returns the file name of image `index` in the JSON; "" if its annotation is broken."""
        return self._content.image_names[index]

    def left_out(self, index: int) -> list[Fault]:
        """Faults of the segments of image `index`, which become void with `skip_broken`."""
        return self._content.left_out.get(index, [])

    def _check_annotation(self, index: int) -> None:
        fault = self._content.broken.get(index)
        if fault:
            raise RecordError(fault.message, fault.kind)

    def has_things(self, index: int) -> bool:
        """Tells from the JSON whether image `index` has a segment of a thing that is no crowd."""
        _, categories, crowd, _ = self._content.rows(index).T
        return any(self.info.is_thing[self._contiguous[c]] for c in categories[crowd == 0].tolist())

    def classes_of(self, index: int) -> np.ndarray:
        """Lists the classes of image `index`'s segments, int [G], -1 if unknown; reads no file."""
        categories = self._content.rows(index)[:, 1].tolist()
        return np.array([self._contiguous.get(category, -1) for category in categories], np.int64)

    def image_size(self, index: int) -> tuple[int, int]:
        """Reads height and width in the head of the file of image `index`, or a RecordError.

        The JSON may disagree with the file.
        """
        path = self.image_path(index)
        return read_image_size(self._read(path), str(path), self.max_pixels)

    def __getitem__(self, index: int) -> dict:
        """Record `index`, in the order of the JSON's annotations; RecordError if it is broken."""
        return self.examine(index)[0]

    def compact(self, index: int) -> dict:
        """As `source[index]`, but a compact record (see `records`)."""
        index = checked_index(index, len(self))
        image = self._image(index)
        annotation = self.annotation(index)
        return self._record(index, image, annotation.numbers, annotation.segments.numbered())

    def examine(self, index: int) -> tuple[dict, list[Fault]]:
        """Returns record `index`, and the remarks on its annotation (`Annotation.remarks`)."""
        index = checked_index(index, len(self))
        image = self._image(index)
        numbers, segments, remarks = self.annotation(index)
        return self._record(index, image, with_ids(numbers, segments), segments), remarks

    def annotation(self, index: int, *, skip_broken: bool | None = None) -> Annotation:
        """Returns the segments of image `index` with contiguous classes, and their map.

        Args:
          index: of the image.
          skip_broken: replaces the source's own.

        Raises:
          RecordError: the annotation or the PNG is broken.
        """
        index = checked_index(index, len(self))
        path = self.panoptic_path(index)
        left_out = self.left_out(index)
        if left_out and not (self.skip_broken if skip_broken is None else skip_broken):
            raise RecordError(first_message(left_out), left_out[0].kind)
        ids, categories, crowd, areas = self._content.rows(index).T
        classes = [self._contiguous[category] for category in categories.tolist()]
        segments = SegmentTable.from_lists(ids, classes, crowd, areas)
        where = f"{self._json_path}, annotation of {path.name}"
        segments.check(self.info.num_classes, where)
        # A segment that is left out may have lost its id, so an unlisted id may belong to it.
        numbers = decode_panoptic(
            self._read(path),
            segments,
            str(path),
            self.max_pixels,
            unlisted_is_void=bool(left_out),
        )
        pixels = count_pixels(numbers, segments)
        remarks = [
            Fault(NO_PIXEL, f"{where}: segment {segments.ids[i]} has no pixel; it is no truth")
            for i in np.flatnonzero(pixels == 0)
        ]
        for i in np.flatnonzero((pixels > 0) & (areas != pixels)):
            stated = "no area" if areas[i] == NO_AREA else f"the area {areas[i]}"
            remarks.append(
                Fault(
                    WRONG_AREA,
                    f"{where}: segment {segments.ids[i]} has {stated}, but {pixels[i]} pixels, "
                    "which are used",
                )
            )
        return Annotation(*keep_visible(numbers, segments, pixels), remarks)

    def sample_remarks(self, count: int = 16) -> list[Fault]:
        """Remarks on the annotations of `count` images, evenly spread."""
        remarks = []
        for index in evenly_spread(len(self), count):
            with contextlib.suppress(RecordError):
                remarks += self.annotation(index).remarks
        return remarks

    def _image(self, index: int) -> np.ndarray:
        path = self.image_path(index)
        return decode_image(self._read(path), str(path), self.max_pixels)

    def _record(
        self, index: int, image: np.ndarray, panoptic: np.ndarray, segments: SegmentTable
    ) -> dict:
        return make_record(
            image,
            panoptic,
            segments,
            image_id=self.image_id(index),
            file_name=self._content.image_names[index],
            where=f"{self.image_path(index)} with {self.panoptic_path(index)}",
        )

    def _read(self, path: Path) -> bytes:
        hint = f"{self._json_path} lists it: restore the file or remove it from the JSON"
        return read_file(path, hint)
