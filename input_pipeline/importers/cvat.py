"""CVAT: the format "CVAT for images 1.1", an annotations.xml and a folder of images.

Polygons, masks and ellipses are instances. XML is read by expat as a stream; a document type, which
could define entities that expand without end, is refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from xml.parsers import expat

import numpy as np

from oneformer_jax import files
from oneformer_jax.input_pipeline.files import TEXT_LIMIT
from oneformer_jax.input_pipeline.importers.export import (
    Export,
    Picture,
    split_of,
)

XML = "annotations.xml"
_DROPPED = ("points", "polyline", "cuboid", "tag", "skeleton")
_READ = ("polygon", "mask", "ellipse")
_DEPTH = 20  # of elements; CVAT's have 8
_LONGEST = 1000  # characters of a label


class _XmlError(Exception):
    """Describes what is wrong with the XML."""


def read(export: Export) -> None:
    """Reads the annotations.xml of the export's folder."""
    path = export.source / XML
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: export as 'CVAT for images 1.1', with images, and unpack it"
        )
    reader = _Reader(export, path)
    parser = expat.ParserCreate()
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.doctype
    parser.buffer_text = True
    try:
        parser.Parse(files.read_bytes(path, limit=TEXT_LIMIT), True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # also of its encoding
        raise files.FileError(f"{path} is not valid XML ({error}); export it again") from None
    except _XmlError as error:
        raise files.FileError(f"{path}, line {parser.CurrentLineNumber}: {error}") from None
    if reader.root != "annotations":
        raise files.FileError(f"{path} is no export of CVAT: its root is {reader.root!r}")
    if reader.labels:
        export.list_classes(reader.labels, path)


class _Reader:
    """Takes the elements as they come."""

    def __init__(self, export: Export, path: Path):
        self._export, self._path = export, path
        self._open: list[str] = []  # names of the open elements
        self._text = ""
        self._picture: Picture | None = None
        self.root: str | None = None
        self.labels: list[str] = []

    def doctype(self, *_: object) -> None:
        raise _XmlError("it has a document type, which CVAT does not write; export it again")

    def start(self, name: str, values: dict[str, str]) -> None:
        self.root = self.root or name
        if len(self._open) >= _DEPTH:
            raise _XmlError("it is nested too deeply for an export of CVAT")
        parent = self._open[-1] if self._open else ""
        self._open.append(name)
        self._text = ""
        if name == "image" and parent == "annotations":
            self._start_image(values)
        elif name == "track":
            raise _XmlError(
                "it has tracks of a video: export as 'CVAT for images 1.1' instead of for video"
            )
        elif parent == "image":
            self._shape(name, values)

    def text(self, text: str) -> None:
        if len(self._text) < _LONGEST:
            self._text += text

    def end(self, name: str) -> None:
        self._open.pop()
        if name == "image":
            self._picture = None
        elif name == "name" and self._open[-2:] == ["labels", "label"]:
            self.labels.append(self._text.strip())
        elif name == "parent" and self._open[-2:] == ["labels", "label"] and self._text.strip():
            del self.labels[-1:]  # the name before is that of a skeleton's point
        elif name == "attribute" and self._open[-2:-1] == ["image"]:
            self._export.drop("attributes of shapes", self._path.name)

    def _start_image(self, values: dict[str, str]) -> None:
        export = self._export
        name, subset = values.get("name", ""), values.get("subset", "")
        where = f"{self._path}, image {name!r}"
        split = split_of(export, subset, f"{where}, subset")
        if split is None:
            return
        try:
            stated = (int(values["height"]), int(values["width"]))
        except (KeyError, ValueError):
            raise _XmlError(f"image {name!r} has no whole height and width") from None
        folders = dict.fromkeys(
            export.source / folder for folder in (f"images/{subset}", "images", "")
        )
        paths = [path for folder in folders if (path := export.inside(folder, name))]
        if not paths:
            export.find(export.source, name, where)
        there = [path for path in paths if os.path.isfile(path)]
        if len({path.resolve() for path in there}) > 1:
            export.fault(
                "image of which there are two",
                f"{where}: it may be {files.first_few(there)}; remove one",
            )
        elif paths:
            self._picture = export.picture((there or paths)[0], where, split=split, stated=stated)

    def _shape(self, kind: str, values: dict[str, str]) -> None:
        export, picture = self._export, self._picture
        if picture is None:  # a fault, or a split that is not read
            return
        label = values.get("label", "")
        where = f"{self._path}, image {picture.name!r}, {kind} {label!r}"
        if kind in _DROPPED:
            export.drop(f"shapes of the kind {kind}", picture.name)
        elif kind in _READ:
            try:
                part = getattr(self, f"_{kind}")(picture, values, where)
            except (KeyError, ValueError, OverflowError) as error:
                export.fault("shape that cannot be read", f"{where} cannot be read: {error!r}")
            else:
                export.instance(picture, label, [part], where)
        else:
            export.refuse_kind(kind, f"{where} is a {kind}", _READ)

    def _polygon(self, picture: Picture, values: dict[str, str], where: str) -> list[float] | None:
        points = [pair.split(",") for pair in values["points"].split(";")]
        return self._export.polygon(picture, [(float(x), float(y)) for x, y in points], where)

    def _ellipse(self, picture: Picture, values: dict[str, str], where: str) -> np.ndarray | None:
        x, y, rx, ry = (float(values[key]) for key in ("cx", "cy", "rx", "ry"))
        angle = float(values.get("rotation", 0))
        return self._export.ellipse(picture, (x, y), (rx, ry), angle, where)

    def _mask(self, picture: Picture, values: dict[str, str], where: str) -> np.ndarray | None:
        """Draws runs over the rows of a box, background first."""
        left, top, width, height = (int(values[key]) for key in ("left", "top", "width", "height"))
        runs = np.array([int(run) for run in values["rle"].split(",")], np.int64)
        rows, columns = picture.size
        if min(left, top) < 0 or left + width > columns or top + height > rows:
            self._export.fault(
                "mask outside of the image",
                f"{where}: its box of {width} x {height} at ({left}, {top}) reaches out of "
                f"{columns} x {rows} pixels (width x height)",
            )
            return None
        if min(width, height) < 1 or runs.min() < 0 or runs.sum(dtype=float) != width * height:
            raise ValueError(f"its runs are no mask of {width} x {height} pixels")
        mask = np.zeros(picture.size, bool)
        values_ = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        mask[top : top + height, left : left + width] = values_.reshape(height, width)
        return mask
