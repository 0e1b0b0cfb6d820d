"""A folder of images and a folder of semantic maps: one grey or palette PNG per image."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from input_pipeline import datasets
from input_pipeline.datasets import DatasetInfo
from input_pipeline.files import found_in
from input_pipeline.records import (
    RecordError,
    SegmentTable,
    checked_index,
    decode_image,
    make_record,
    read_image_size,
)

_IMAGES = (".jpg", ".jpeg", ".png")
_LAYOUT = (
    "a semantic dataset is a folder of images, a folder of PNGs of the same names whose pixels are "
    "class values, and a text file of classes, a line each: VALUE NAME, as in '3 traffic light'"
)


def read_classes(path: str | os.PathLike, ignore_label: int = 255) -> DatasetInfo:
    """Class table from a text file: the pixel value of a class, then its name, a line each.

    Empty lines and lines that begin with "#" are passed over. All classes are stuff: a semantic map
    does not tell objects apart. The pixel values are the table's `category_ids`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not "VALUE NAME", a value or name used twice, no class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no list of classes {path}: {_LAYOUT}; {found_in(path)}")
    values, names = [], []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"\s*(\d+)\s+(\S.*)", line)
        if not match or int(match[1]) > 65_535:
            raise ValueError(f"{path}, line {number}: {line!r} is not VALUE NAME; {_LAYOUT}")
        values.append(int(match[1]))
        names.append(match[2].strip())
    if ignore_label in values:
        raise ValueError(
            f"{path}: class {names[values.index(ignore_label)]!r} has the value {ignore_label} of "
            "unlabelled pixels; set the option ignore_label to another one (-1: there are none)"
        )
    return DatasetInfo(
        dataset=path.resolve().parent.name,
        class_names=tuple(names),
        is_thing=(False,) * len(names),
        colors=datasets.palette(max(len(names), 1))[: len(names)],
        category_ids=tuple(values),
        ignore_label=ignore_label,
    )


class SemanticFolderSource:
    """Reads images and their semantic maps as records with one segment per class.

    The map of images_dir/A/B.jpg is labels_dir/A/B.png. Records come in order of the path.

    Args:
      images_dir: folder of JPEGs and PNGs, subfolders included.
      labels_dir: folder of the maps.
      info: class table; `category_ids` are the pixel values, `ignore_label` that of void pixels.
      label_suffix: end of a map's name in the place of the image's ".jpg".

    Raises:
      FileNotFoundError: a folder is missing.
      ValueError: no images, or none that has a map.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike,
        labels_dir: str | os.PathLike,
        info: DatasetInfo,
        label_suffix: str = ".png",
    ):
        self._images_dir, self._labels_dir = Path(images_dir), Path(labels_dir)
        self.info = info
        self._suffix = label_suffix
        for kind, folder in (("images", self._images_dir), ("maps", self._labels_dir)):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no folder of {kind} {folder}: {_LAYOUT}; {found_in(folder)}"
                )
        self._names = sorted(
            path.relative_to(self._images_dir).as_posix()
            for path in self._images_dir.rglob("*")
            if path.suffix.lower() in _IMAGES
        )
        if not self._names:
            raise ValueError(
                f"{self._images_dir} has no {', '.join(_IMAGES)}; {found_in(self._images_dir)}"
            )
        if not any(self._label_path(name).is_file() for name in self._names):
            raise ValueError(
                f"no image of {self._images_dir} has a map: that of {self._names[0]} would be "
                f"{self._label_path(self._names[0])}; {found_in(self._labels_dir)}. Where the "
                "names end otherwise, set the option label_suffix"
            )
        # Pixel value -> class + 1; void is 0, and one more stands for values that nobody listed.
        self._unknown = info.num_classes + 1
        self._numbers = np.full(
            1 << 16, self._unknown, np.uint8 if self._unknown < 256 else np.uint16
        )
        self._numbers[list(info.category_ids)] = np.arange(1, info.num_classes + 1)
        if 0 <= info.ignore_label < len(self._numbers):
            self._numbers[info.ignore_label] = 0

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"SemanticFolderSource({str(self._images_dir)!r}, {len(self)} records)"

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, read from the head of its file.

        Raises:
          RecordError: the file is not an image.
        """
        path = self._images_dir / self._names[index]
        return read_image_size(_read(path), str(path))

    def __getitem__(self, index: int) -> dict:
        """Record `index`; its segments are the classes with pixels, their ids class + 1.

        Raises:
          RecordError: the record is broken.
          IndexError: no such index.
        """
        record = self.compact(index)
        return {**record, "panoptic": record["panoptic"].astype(np.int32)}

    def compact(self, index: int) -> dict:
        """As `source[index]`, but a compact record (see `records`)."""
        name = self._names[checked_index(index, len(self))]
        image_path, label_path = self._images_dir / name, self._label_path(name)
        image = decode_image(_read(image_path), str(image_path))
        labels = _decode_labels(_read(label_path), str(label_path))
        numbers = self._numbers.take(labels)
        pixels = np.bincount(numbers.reshape(-1), minlength=self._unknown + 1)
        if pixels[self._unknown]:
            values = np.unique(labels[numbers == self._unknown])
            shown = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
            raise RecordError(
                f"{label_path}: {pixels[self._unknown]} pixels have values that are no class "
                f"({shown}); add them to the list of classes, or paint them "
                f"{self.info.ignore_label} (ignore_label)"
            )
        present = np.flatnonzero(pixels[1 : self._unknown])
        table = SegmentTable.from_lists(
            present + 1, present, np.zeros(len(present)), pixels[present + 1]
        )
        return make_record(
            image,
            numbers,
            table,
            image_id=os.path.splitext(name)[0],
            file_name=name,
            where=f"{image_path} with {label_path}",
        )

    def _label_path(self, name: str) -> Path:
        return self._labels_dir / (os.path.splitext(name)[0] + self._suffix)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"{path}: cannot be read ({error.strerror}); every image needs its map: restore the "
            "file or take the image away"
        ) from error


def _decode_labels(data: bytes, where: str) -> np.ndarray:
    """Pixel values of a grey or palette PNG, uint8 or uint16 [H, W]."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
            labels = np.asarray(picture)  # of a palette picture the indices, not the colours
    except Exception as error:  # PIL raises many types for broken files
        raise RecordError(
            f"{where}: cannot be decoded, the file is truncated or not an image ({error}); restore "
            "the file or take the image away"
        ) from error
    if mode not in ("L", "P", "1", "I;16", "I") or labels.ndim != 2:
        raise RecordError(
            f"{where}: a semantic map must be a grey or palette PNG whose pixels are class values; "
            f"this one is {mode} with {1 if labels.ndim == 2 else labels.shape[2]} channels: "
            "convert its colours to values"
        )
    if labels.dtype == np.int32:
        if labels.min() < 0 or labels.max() > 65_535:
            raise RecordError(f"{where}: class values must be between 0 and 65535")
        labels = labels.astype(np.uint16)
    return labels.astype(np.uint8) if labels.dtype == bool else labels
