"""A folder of images and a folder of semantic maps: one grey or palette PNG per image."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oneformer_jax.files import first_few
from oneformer_jax.input_pipeline import datasets, images
from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.files import found_in, read_file, read_text, require
from oneformer_jax.input_pipeline.records import (
    RecordError,
    SegmentTable,
    checked_index,
    decode_image,
    decode_labels,
    evenly_spread,
    make_record,
    read_image_size,
)

_LAYOUT = (
    "a semantic dataset is a folder of images, a folder of PNGs of the same names whose pixels are "
    "class values, and a text file of classes, a line each: VALUE NAME, as in '3 traffic light'"
)
_MAX_VALUE = 65_535
_MAX_CLASSES = 65_535
_LOOKED_AT = 16  # maps that are read when a folder is opened
_HINT = "every image needs its map: restore the file or remove the image"


def read_classes(path: str | os.PathLike, ignore_labels: Sequence[int] = (255,)) -> DatasetInfo:
    """Reads a class table from a text file: the pixel value of a class, then its name, a line each.

    Empty lines and lines that begin with "#" are skipped. All classes are stuff: a semantic map
    does not tell objects apart. The pixel values are the table's `category_ids`.

    Args:
      path: the file.
      ignore_labels: values of unlabelled pixels; negative ones stand for none.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not "VALUE NAME", a value or name used twice, no class, more than
        65,535 of them, or a class with an ignored value.
    """
    path = Path(path)
    require(path, "list of classes", _LAYOUT)
    values, names = [], []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"\s*([0-9]{1,9})\s+(\S.*)", line)
        if not match or int(match[1]) > _MAX_VALUE:
            raise ValueError(f"{path}, line {number}: {line!r} is not VALUE NAME; {_LAYOUT}")
        values.append(int(match[1]))
        names.append(match[2].strip())
    if len(values) > _MAX_CLASSES:
        raise ValueError(f"{path}: {len(values):,} classes; at most {_MAX_CLASSES:,} are possible")
    for ignored in ignore_labels:
        if ignored in values:
            raise ValueError(
                f"{path}: class {names[values.index(ignored)]!r} has the value {ignored} of "
                "unlabelled pixels; set the option ignore_label to another value (-1: none)"
            )
    return DatasetInfo(
        dataset=path.resolve().parent.name,
        class_names=tuple(names),
        is_thing=(False,) * len(names),
        colors=datasets.palette(max(len(names), 1))[: len(names)],
        category_ids=tuple(values),
        ignore_label=next(iter(ignore_labels), -1),
    )


class SemanticFolderSource:
    """Reads images and their semantic maps as records with one segment per class.

    The map of images_dir/A/B.jpg is labels_dir/A/B.png. Records are ordered by path. Both folders
    may be the same: a file that is another one's map is not an image.

    Args:
      images_dir: folder of images, subfolders included; hidden files are left out.
      labels_dir: folder of the maps.
      info: class table; `category_ids` are the pixel values.
      label_suffix: end of a map's name, in place of the image's ".jpg".
      ignore_labels: values of unlabelled pixels; None is the table's own.

    Attributes:
      info: class table.
      max_pixels: limit of the pixels of an image or map.

    Raises:
      FileNotFoundError: a folder is missing.
      ValueError: no images, none with a map, two with the same map, images that are their own maps,
        or masks of 0 and 255 with the classes 0 and 1.
    """

    max_pixels = images.MAX_PIXELS

    def __init__(
        self,
        images_dir: str | os.PathLike,
        labels_dir: str | os.PathLike,
        info: DatasetInfo,
        label_suffix: str = ".png",
        ignore_labels: Sequence[int] | None = None,
    ):
        self._images_dir, self._labels_dir = Path(images_dir), Path(labels_dir)
        self.info = info
        self._suffix = label_suffix
        require(self._images_dir, "folder of images", _LAYOUT, folder=True)
        require(self._labels_dir, "folder of maps", _LAYOUT, folder=True)
        self._names = self._list_names()
        self._ignored = (info.ignore_label,) if ignore_labels is None else tuple(ignore_labels)
        # Pixel value -> class + 1; 0 is void, K + 1 stands for unlisted values.
        self._unknown = info.num_classes + 1
        self._numbers = np.full(_MAX_VALUE + 1, self._unknown, np.min_scalar_type(self._unknown))
        self._numbers[list(info.category_ids)] = np.arange(1, info.num_classes + 1)
        self._numbers[[value for value in self._ignored if 0 <= value <= _MAX_VALUE]] = 0
        self._refuse_scaled_masks()

    def _list_names(self) -> list[str]:
        """Paths of the images below their folder, checked; see the class's docstring."""
        names = images.walk_images(self._images_dir)
        if not names:
            raise ValueError(
                f"{self._images_dir} has no {', '.join(images.ENDINGS)}; "
                f"{found_in(self._images_dir)}"
            )
        # Compared as text: asking some file systems about each of many files would take minutes.
        here, there = os.path.realpath(self._images_dir), os.path.realpath(self._labels_dir)
        files = {name: f"{here}/{name}" for name in names}
        maps = {name: f"{there}/{os.path.splitext(name)[0]}{self._suffix}" for name in names}
        of_others = {maps[name] for name in names if maps[name] != files[name]}
        names = [name for name in names if files[name] not in of_others]
        own = [name for name in names if maps[name] == files[name]]
        if own:
            raise ValueError(
                f"{self._images_dir}: {first_few(own)} would be both image and map; keep maps in a "
                "folder of their own (option train_labels), or set the option label_suffix"
            )
        shared = collections.Counter(maps[name] for name in names)
        twice = [name for name in names if shared[maps[name]] > 1]
        if twice:
            raise ValueError(
                f"{self._images_dir}: the images {first_few(twice)} differ in their ending only "
                "and would share a map; rename them or remove the copies"
            )
        if not any(os.path.isfile(maps[name]) for name in names):
            raise ValueError(
                f"no image of {self._images_dir} has a map: that of {names[0]} would be "
                f"{self._label_path(names[0])}; {found_in(self._labels_dir)}. If the names end "
                "differently, set the option label_suffix"
            )
        return names

    def _refuse_scaled_masks(self) -> None:
        """Raises ValueError for masks of 0 and 255 if 255 is ignored and the classes are 0 and 1.

        Training would see one class alone, and score 100.
        """
        if set(self.info.category_ids) != {0, 1} or 255 not in self._ignored:
            return
        found = set()
        for index in evenly_spread(len(self), _LOOKED_AT):
            path = self._label_path(self._names[index])
            try:
                labels = decode_labels(read_file(path), str(path), self.max_pixels)
            except RecordError:  # raised again when the record is read
                continue
            found |= set(np.unique(labels).tolist())
        if found == {0, 255}:
            name = self.info.class_names[self.info.category_ids.index(1)]
            raise ValueError(
                f"the maps in {self._labels_dir} hold 0 and 255 only, no 1, and 255 is the value "
                f"of unlabelled pixels (option ignore_label): the class {name!r} would never "
                f"occur. If 255 is this class, write '255 {name}' into the list of classes and set "
                "the option ignore_label=-1"
            )

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"SemanticFolderSource({str(self._images_dir)!r}, {len(self)} records)"

    def name_of(self, index: int) -> str:
        """Returns the path of image `index` below the folder of images."""
        return self._names[index]

    def image_size(self, index: int) -> tuple[int, int]:
        """Reads height and width in the head of the file of image `index`, or a RecordError."""
        path = self._images_dir / self._names[index]
        return read_image_size(read_file(path, _HINT), str(path), self.max_pixels)

    def classes_of(self, index: int) -> np.ndarray:
        """Returns the classes in the map of image `index`, ascending, int [G], or a RecordError."""
        return self._numbered(self._label_path(self._names[index]))[1]

    def __getitem__(self, index: int) -> dict:
        """Record `index`, whose segment ids are class + 1; RecordError if it is broken."""
        record = self.compact(index)
        return {**record, "panoptic": record["panoptic"].astype(np.int32)}

    def compact(self, index: int) -> dict:
        """As `source[index]`, but a compact record (see `records`)."""
        name = self._names[checked_index(index, len(self))]
        image_path, label_path = self._images_dir / name, self._label_path(name)
        image = decode_image(read_file(image_path, _HINT), str(image_path), self.max_pixels)
        numbers, present, pixels = self._numbered(label_path)
        table = SegmentTable.from_lists(present + 1, present, np.zeros(len(present)), pixels)
        return make_record(
            image,
            numbers,
            table,
            image_id=os.path.splitext(name)[0],
            file_name=name,
            where=f"{image_path} with {label_path}",
        )

    def _numbered(self, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads a map as class + 1, 0 where void; its classes, and the pixels of each."""
        labels = decode_labels(read_file(path, _HINT), str(path), self.max_pixels)
        if labels.ndim != 2:
            raise RecordError(
                f"{path}: a semantic map must be a grey or palette PNG whose pixels are class "
                f"values; this one is RGB with {labels.shape[2]} channels: convert its colours to "
                "values"
            )
        numbers = self._numbers.take(labels)
        pixels = np.bincount(numbers.reshape(-1), minlength=self._unknown + 1)
        if pixels[self._unknown]:
            values = np.unique(labels[numbers == self._unknown])
            ignored = first_few(v for v in self._ignored if v >= 0)
            raise RecordError(
                f"{path}: {pixels[self._unknown]} pixels have values that are no class "
                f"({first_few(values)}); add them to the list of classes, or name them in the "
                f"option ignore_label, which is {ignored or 'empty'}"
            )
        present = np.flatnonzero(pixels[1 : self._unknown])
        if self._unknown > _MAX_CLASSES:
            numbers = numbers.astype(np.uint16)
        return numbers, present, pixels[present + 1]

    def _label_path(self, name: str) -> Path:
        return self._labels_dir / (os.path.splitext(name)[0] + self._suffix)
