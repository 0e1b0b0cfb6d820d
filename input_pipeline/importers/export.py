"""Findings of an importer, its faults, and the COCO layout that is made of them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from oneformer_jax import files
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.annotations import faults, run_lengths
from oneformer_jax.input_pipeline.annotations.faults import Fault
from oneformer_jax.input_pipeline.annotations.run_lengths import SegmentationError
from oneformer_jax.input_pipeline.files import read_text
from oneformer_jax.progress import logged, progress_log

# Names of splits in the exports -> ours.
SPLITS = {
    "train": "train", "training": "train", "default": "train", "": "train",
    "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test",
}  # fmt: skip
# Pixels by which a point may lie outside: tools place points on the outer edge.
SLACK = 1.0
# Longer names of classes are refused by the reader of training, see `annotations.schemas`.
_LONGEST_NAME = 500
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # bytes of a file's name, as Python keeps them
_BOXES = ("box", "rectangle", "oriented_rectangle", "rectanglelabels")
_SHOWN = 3


@dataclasses.dataclass
class Picture:
    """An image of the export.

    Attributes:
      path: the file.
      name: its path in the new folder of images, with "/".
      size: (height, width), upright.
      split: "train" or "val".
      annotations: (label, COCO's annotation without ids) of each instance.
    """

    path: Path
    name: str
    size: tuple[int, int]
    split: str
    annotations: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)


class Export:
    """Collects the images and instances of an export; `write` makes the new folder.

    Attributes:
      source: folder of the export, an absolute path.
      classes: names of the classes in their order, if the export lists them.
    """

    def __init__(self, source: Path, form: str):
        self.source, self._form = source, form
        self.classes: list[str] | None = None
        self._pictures: dict[str, Picture] = {}
        self._log = progress_log(None, "images examined")
        self._labels: dict[str, str] = {}  # label -> where it was first seen
        self._faults: list[Fault] = []
        self._dropped: dict[str, list[str]] = collections.defaultdict(list)

    def fault(self, kind: str, message: str) -> None:
        """Notes a fault; `message` is a line that names the place, the value and the way out."""
        self._faults.append(Fault(kind, " ".join(message.splitlines())))

    def drop(self, what: str, where: object) -> None:
        """Notes that something of the export is left out."""
        self._dropped[what].append(_NOT_UTF8.sub("?", str(where)))

    def refuse_kind(self, kind: str, text: str, known: Iterable[str]) -> None:
        """Notes the fault of a shape of a kind that is none of the `known`; `text` names it."""
        way_out = f"only {', '.join(known)} are read"
        if kind in _BOXES:
            way_out = "a box is no mask: outline the object, or remove it"
        self.fault(f"shape of the kind {kind}", f"{text}; {way_out}")

    def list_classes(self, names: Sequence[str], where: object) -> None:
        """Takes the list of classes; another one must be equal."""
        names = [name.strip() for name in names]
        if self.classes is not None and names != self.classes:
            self.fault(
                "lists of classes that differ",
                f"{where} lists the classes {files.first_few(names)}, another list of the export "
                f"{files.first_few(self.classes)}; make them equal",
            )
        self.classes = names

    def inside(self, folder: Path, name: str) -> Path | None:
        """Joins a path of the export's files to a folder; None if it leads out of the export."""
        path = Path(os.path.normpath(folder / name.replace("\\", "/")))
        return path if path.is_relative_to(self.source) else None

    def find(self, folder: Path, name: str, where: object) -> Path | None:
        """As `inside`, with a fault instead of None alone."""
        path = self.inside(folder, name)
        if path is None:
            self.fault(
                "path outside of the export",
                f"{where}: the path {name!r} leads out of {self.source}; copy the file into it",
            )
        return path

    def picture(
        self,
        path: Path,
        where: object,
        *,
        split: str = "train",
        stated: tuple[int, int] | None = None,
    ) -> Picture | None:
        """Adds an image; None after a fault.

        Args:
          path: the image file, in the source.
          where: the place that names it.
          split: "train" or "val".
          stated: (height, width) in the export, for comparison.
        """
        if not os.path.isfile(path):  # neither is a name that no system takes
            self.fault(
                "image that is missing",
                f"{where}: its image {path} is missing; restore the image or remove its annotation",
            )
            return None
        try:
            size = images.read_size(images.read_file(path), str(path))
        except images.ImageError as error:
            self.fault("image that cannot be read", str(error))
            return None
        if stated and tuple(stated) != size:
            self.fault(
                "size that differs from the image's",
                f"{where} is for an image of {stated[0]} x {stated[1]} pixels (height x width), "
                f"but {path} has {size[0]} x {size[1]} (upright): is it another version of it?",
            )
            return None
        parts = path.relative_to(self.source).parts
        # The names of folders of images say nothing.
        inside = [part for part in parts[:-1] if part not in ("images", "data")]
        name = "/".join([*inside, parts[-1]])
        if _NOT_UTF8.search(name):
            self.fault("name that is not UTF-8", f"the image name {name!r} is not UTF-8; rename it")
            return None
        if earlier := self._pictures.get(name.casefold()):
            why = "two files may not have one name in the new folder; rename one"
            if earlier.path == path:
                why = "each image may have one annotation"
            self.fault(
                "image that occurs twice",
                f"{where}: the image {name} occurs already, from {earlier.path}; {why}",
            )
            return None
        found = self._pictures[name.casefold()] = Picture(path, name, size, split)
        self._log(len(self._pictures))
        return found

    def polygon(
        self, picture: Picture, points: Iterable[Sequence[float]], where: object
    ) -> list[float] | None:
        """Makes COCO's polygon of points (x, y) in pixels; None after a fault."""
        array = np.array(list(points), np.float64).reshape(-1, 2)
        height, width = picture.size
        if not np.isfinite(array).all():
            self.fault("point that is no number", f"{where}: a point is not a finite number")
            return None
        beyond = np.maximum(-array, array - [width, height]).max(1)
        if (beyond > SLACK).any():
            x, y = array[beyond.argmax()]
            self.fault(
                "point outside of the image",
                f"{where}: the point ({x:g}, {y:g}) lies outside of {picture.name} of {width} x "
                f"{height} pixels (width x height); correct it in the tool",
            )
            return None
        return np.clip(array, 0, [width, height]).ravel().tolist()

    def ellipse(
        self,
        picture: Picture,
        center: tuple[float, float],
        radii: tuple[float, float],
        degrees: float,
        where: object,
    ) -> np.ndarray | None:
        """Draws an ellipse (x, y), turned clockwise, as bool [H, W]; None after a fault.

        Its centre lies in the image; the rest may reach beyond.
        """
        if not all(map(math.isfinite, (*radii, degrees))) or min(radii) <= 0:
            self.fault(
                "ellipse without an area",
                f"{where}: its radii are {radii[0]:g} and {radii[1]:g}, its angle {degrees:g}",
            )
            return None
        if self.polygon(picture, [center], where) is None:
            return None
        # ((x cos + y sin) / a)^2 + ((y cos - x sin) / b)^2 <= 1: in a row, between two roots.
        a, b = np.clip(radii, 1e-6, 1e6)  # beyond, the pixels stay the same
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        rows, columns = np.ogrid[: picture.size[0], : picture.size[1]]
        x, y = columns + 0.5 - center[0], rows + 0.5 - center[1]
        square = (cos / a) ** 2 + (sin / b) ** 2
        middle = y * cos * sin * (1 / b**2 - 1 / a**2) / square
        with np.errstate(invalid="ignore"):  # no root above and below the ellipse: NaN
            half = np.sqrt(square - (y / (a * b)) ** 2) / square
        return (x >= middle - half) & (x <= middle + half)

    def instance(
        self,
        picture: Picture,
        label: str,
        parts: Sequence[list[float] | np.ndarray | None],
        where: object,
    ) -> None:
        """Adds an instance, the union of its parts: polygons, or masks bool [H, W]."""
        label = label.strip()
        if not label:
            self.fault("instance without a class", f"{where} has no label; give it one")
            return
        self._labels.setdefault(label, str(where))
        if any(part is None for part in parts):  # a fault that was told
            return
        segmentation: Any = [part for part in parts if isinstance(part, list)]
        masks = [part for part in parts if isinstance(part, np.ndarray)]
        size = picture.size
        try:
            runs = run_lengths.runs_of(segmentation, size) if segmentation else None
        except SegmentationError as error:
            self.fault(error.kind, f"{where} {error}")
            return
        if masks:
            if runs is not None:
                masks.append(run_lengths.mask_of(runs, size))
            code = coco_mask.encode(np.asfortranarray(np.logical_or.reduce(masks), np.uint8))
            segmentation = {"size": list(size), "counts": code["counts"].decode()}
        else:
            code = {"size": size, "counts": run_lengths.compress(runs, size)}
        area = int(coco_mask.area(code))
        if not area:
            self.fault("instance without a pixel", f"{where}: {label!r} covers no pixel; remove it")
            return
        annotation = {
            "iscrowd": 0,
            "area": area,
            "bbox": coco_mask.toBbox(code).tolist(),
            "segmentation": segmentation,
        }
        picture.annotations.append((label, annotation))

    # -------------------------------------------------------------------- the new folder

    def write(self, data_dir: Path) -> str:
        """Writes images/, instances_train.json and instances_val.json; returns a report.

        Raises:
          FaultsError: the export has faults.
          ValueError: it has no instance, or no image for training.
        """
        names = self._class_names()
        if self._faults:
            subject = f"the {self._form} export {self.source}"
            way_out = "Correct the export; nothing was written."
            raise faults.error(subject, self._faults, way_out)
        pictures = sorted(self._pictures.values(), key=lambda picture: picture.name)
        if not any(picture.annotations for picture in pictures):
            dropped = "; ".join(self._dropped_lines())
            raise ValueError(
                f"{self.source} has no instance that the format {self._form!r} knows: is it an "
                f"export of another kind?" + (f" Left out: {dropped}" if dropped else "")
            )
        splits = {picture.split for picture in pictures}
        if "train" not in splits:
            raise ValueError(
                f"all {len(pictures):,} images of {self.source} are for validation, none for "
                "training; give the export a split train"
            )
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        with files.replacing(data_dir) as folder:
            for picture in logged(pictures, len(pictures), "images copied"):
                target = folder / "images" / picture.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture.path, target)
            for split in ("train", "val"):
                chosen = [picture for picture in pictures if picture.split == split]
                if split not in splits:
                    continue
                content = _coco(chosen, names)
                text = json.dumps(content, allow_nan=False, ensure_ascii=False)
                files.write_atomically(folder / f"instances_{split}.json", text)
                bare = sum(not picture.annotations for picture in chosen)
                lines.append(
                    f"  {split}: {len(chosen):,} images, {len(content['annotations']):,} instances"
                    + (f" ({bare:,} images have none)" if bare else "")
                )
        given = "" if "val" in splits else " --config.dataset.options.validation_share=0.2"
        used = {label for picture in pictures for label, _ in picture.annotations}
        unused = [name for name in names if name not in used]
        lines.insert(0, f"{data_dir} holds {len(names):,} classes: {files.first_few(names, 10)}")
        if unused:
            lines.append(f"  classes without an instance: {files.first_few(unused)}")
        lines += [f"  left out: {line}" for line in self._dropped_lines()]
        lines.append(
            "Look at it: python main.py --config=custom:small,data=instances --mode=inspect "
            f"--config.dataset.data_dir={shlex.quote(str(data_dir))}{given}"
        )
        return "\n".join(lines)

    def _dropped_lines(self) -> list[str]:
        return [
            f"{len(places):,} {what} ({files.first_few(dict.fromkeys(places), _SHOWN)})"
            for what, places in self._dropped.items()
        ]

    def _class_names(self) -> list[str]:
        """Lists the classes, those of the list or the labels by name; notes faults of the names."""
        names = sorted(self._labels) if self.classes is None else self.classes
        for label, where in self._labels.items():
            if label not in names:
                self.fault(
                    "class that the list lacks",
                    f"{where}: the label {label!r} is not in the export's list of classes"
                    f"{files.did_you_mean(label, names)}; correct one of them",
                )
        by_look: dict[str, list[str]] = collections.defaultdict(list)
        for name in names:
            by_look[" ".join(name.replace("_", " ").split()).casefold()].append(name)
        for alike in by_look.values():
            if len(alike) > 1:
                self.fault(
                    "classes of nearly one name",
                    f"the classes {files.first_few(map(repr, alike))} look alike; give one class "
                    "one spelling, and two classes distinct names",
                )
        for name in names:
            if not name or len(name) > _LONGEST_NAME or not name.isprintable():
                self.fault(
                    "name of a class that cannot be used",
                    f"the classes have a name that is empty, longer than {_LONGEST_NAME} "
                    f"characters, or has some that cannot be printed: {name!r:.60}; rename it",
                )
        return names


def _coco(pictures: Sequence[Picture], names: Sequence[str]) -> dict[str, Any]:
    """Makes the content of a COCO instance JSON; ids count from 1."""
    ids = {name: number for number, name in enumerate(names, 1)}
    numbers = itertools.count(1)
    return {
        "images": [
            {
                "id": image_id,
                "file_name": picture.name,
                "height": picture.size[0],
                "width": picture.size[1],
            }
            for image_id, picture in enumerate(pictures, 1)
        ],
        "annotations": [
            {"id": next(numbers), "image_id": image_id, "category_id": ids[label], **annotation}
            for image_id, picture in enumerate(pictures, 1)
            for label, annotation in picture.annotations
        ],
        "categories": [{"id": id_, "name": name} for name, id_ in ids.items()],
    }


def read_lines(path: Path) -> list[str]:
    """Reads a text file's lines without blank ones; FileError if it is no text in UTF-8."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def split_of(export: Export, name: str, where: object) -> str | None:
    """Returns our name of a split, or None: the test split is dropped, others are faults."""
    split = SPLITS.get(name.strip().lower())
    if split == "test":
        export.drop("entries of the test split", where)
        return None
    if split is None:
        known = ", ".join(filter(None, SPLITS))
        text = f"{where}: the split {name!r} is none of {known}; rename it"
        export.fault("split of an unknown name", text)
    return split
