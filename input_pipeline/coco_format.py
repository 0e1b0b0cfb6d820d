"""The COCO-panoptic folder format: its JSON, and a source that reads the folder directly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from input_pipeline import datasets, images
from input_pipeline.datasets import DatasetInfo
from input_pipeline.files import found_in, read_file
from input_pipeline.records import (
    RecordError,
    SegmentTable,
    checked_index,
    decode_image,
    decode_panoptic,
    decode_panoptic_compact,
    make_record,
    read_image_size,
)

_LAYOUT = (
    "a COCO-panoptic dataset is a folder of images, a folder of panoptic PNGs and a JSON with "
    '"images", "annotations" (each with image_id, file_name and segments_info) and "categories"'
)


def load_coco_json(path: str | os.PathLike) -> dict:
    """Reads a COCO-panoptic JSON and checks its layout.

    Raises:
      FileNotFoundError: no such file; says what lies there instead.
      ValueError: not JSON, or not in the COCO-panoptic layout.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no panoptic JSON {path}: {_LAYOUT}; {found_in(path)}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); is it truncated?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; {_LAYOUT}")
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)} (it has {', '.join(content) or 'nothing'}); "
            + _LAYOUT
        )
    for number, annotation in enumerate(content["annotations"]):
        missing = [
            key for key in ("image_id", "file_name", "segments_info") if key not in annotation
        ]
        if missing:
            hint = (
                " (this looks like an instance JSON, which has one annotation per object: "
                'dataset.name="coco_instances" reads those)'
                if "segmentation" in annotation
                else ""
            )
            raise ValueError(
                f"{path}: annotation {number} lacks {', '.join(missing)}{hint}; {_LAYOUT}"
            )
    return content


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

    The JSON is kept as flat arrays, so that a source of 100,000 images is a small pickle.

    Args:
      images_dir: folder of the images.
      panoptic_dir: folder of the panoptic PNGs.
      json_path: the COCO-panoptic JSON.
      info: class table; default: the categories of the JSON (`datasets.from_coco_categories`).
      content: what `load_coco_json` gave for the JSON, where it was read before or changed.

    Raises:
      FileNotFoundError: a folder or the JSON is missing.
      ValueError: the JSON has another layout, no annotation, or categories that `info` lacks.
    """

    max_pixels = images.MAX_PIXELS  # the most pixels of an image or map

    def __init__(
        self,
        images_dir: str | os.PathLike,
        panoptic_dir: str | os.PathLike,
        json_path: str | os.PathLike,
        info: DatasetInfo | None = None,
        content: dict | None = None,
    ):
        self._images_dir, self._panoptic_dir = Path(images_dir), Path(panoptic_dir)
        self._json_path = Path(json_path)
        if content is None:
            content = load_coco_json(json_path)
        for kind, folder in (("images", self._images_dir), ("panoptic PNGs", self._panoptic_dir)):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no folder of {kind} {folder}: {_LAYOUT}; {found_in(folder)}"
                )
        if info is None:
            info = datasets.from_coco_categories(self._json_path.stem, content["categories"])
        else:
            check_categories(self._json_path, content["categories"], info)
        self.info = info
        self._contiguous = info.contiguous_ids()

        annotations = content["annotations"]
        if not annotations:
            raise ValueError(f"{json_path} has no annotations: the dataset is empty")
        image_names = {image["id"]: image.get("file_name", "") for image in content["images"]}
        self._image_ids = [str(annotation["image_id"]) for annotation in annotations]
        self._image_names = [image_names.get(a["image_id"], "") for a in annotations]
        self._panoptic_names = [annotation["file_name"] for annotation in annotations]
        segments = [segment for a in annotations for segment in a["segments_info"]]
        self._offsets = np.cumsum([0] + [len(a["segments_info"]) for a in annotations])
        try:
            # Rows: id, category id, iscrowd, area.
            self._segments = np.array(
                [(s["id"], s["category_id"], s.get("iscrowd", 0), s["area"]) for s in segments],
                np.int64,
            ).reshape(-1, 4)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{json_path}: every entry of segments_info needs the numbers id, category_id and "
                f"area; one has not ({error!r})"
            ) from error

    def __len__(self) -> int:
        return len(self._image_ids)

    def __repr__(self) -> str:
        return f"CocoFolderSource({str(self._json_path)!r}, {len(self)} records)"

    def image_path(self, index: int) -> Path:
        """Path of image `index`; RecordError if the JSON's list of images lacks it."""
        if not self._image_names[index]:
            raise RecordError(
                f'{self._json_path}: the "images" list has no file_name for image_id '
                f"{self._image_ids[index]}, which annotation {index} refers to"
            )
        return self._images_dir / self._image_names[index]

    def panoptic_path(self, index: int) -> Path:
        """Path of the panoptic PNG of image `index`."""
        return self._panoptic_dir / self._panoptic_names[index]

    def image_id(self, index: int) -> str:
        """Id of image `index` in the JSON, as text."""
        return self._image_ids[index]

    def _rows(self, index: int) -> np.ndarray:
        return self._segments[self._offsets[index] : self._offsets[index + 1]]

    def segments(self, index: int) -> SegmentTable:
        """The segments of image `index` with contiguous classes.

        Raises:
          RecordError: a category that the class table lacks, a repeated id, an id out of range.
        """
        where = f"{self._json_path}, annotation of {self._panoptic_names[index]}"
        ids, categories, crowd, areas = self._rows(index).T
        classes = [self._contiguous.get(category, -1) for category in categories.tolist()]
        if -1 in classes:
            position = classes.index(-1)
            raise RecordError(
                f"{where}: segment {ids[position]} has category_id {categories[position]}, which "
                'is not in "categories"; correct it or add the category'
            )
        table = SegmentTable.from_lists(ids, classes, crowd, areas)
        table.check(self.info.num_classes, where)
        return table

    def has_things(self, index: int) -> bool:
        """Whether image `index` has a segment of a thing that is no crowd; reads no file."""
        _, categories, crowd, _ = self._rows(index).T
        classes = [self._contiguous.get(category) for category in categories[crowd == 0].tolist()]
        return any(k is not None and self.info.is_thing[k] for k in classes)

    def classes_of(self, index: int) -> np.ndarray:
        """The classes of the segments of image `index`, int [G], -1 if unknown; reads no file."""
        categories = self._rows(index)[:, 1].tolist()
        return np.array([self._contiguous.get(category, -1) for category in categories], np.int64)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, read from the head of its file.

        Not from the JSON, which may disagree with the file.

        Raises:
          RecordError: the file is missing or not an image.
        """
        path = self.image_path(index)
        return read_image_size(self._read(path), str(path), self.max_pixels)

    def __getitem__(self, index: int) -> dict:
        """Record `index`, in the order of the JSON's annotations.

        Raises:
          RecordError: the record is broken.
          IndexError: no such index.
        """
        return self._record(index, compact=False)

    def compact(self, index: int) -> dict:
        """As `source[index]`, but a compact record (see `records`)."""
        return self._record(index, compact=True)

    def _record(self, index: int, *, compact: bool) -> dict:
        index = checked_index(index, len(self))
        image_path = self.image_path(index)
        panoptic_path = self.panoptic_path(index)
        segments = self.segments(index)
        decode = decode_panoptic_compact if compact else decode_panoptic
        return make_record(
            decode_image(self._read(image_path), str(image_path), self.max_pixels),
            decode(self._read(panoptic_path), segments, str(panoptic_path), self.max_pixels),
            segments.numbered() if compact else segments,
            image_id=self._image_ids[index],
            file_name=self._image_names[index],
            where=f"{image_path} with {panoptic_path}",
        )

    def _read(self, path: Path) -> bytes:
        hint = f"{self._json_path} lists it: restore the file or take it out of the JSON"
        return read_file(path, hint)
