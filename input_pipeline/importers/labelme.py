"""Labelme: a JSON per image, anywhere in the folder, that names its image by a relative path.

Polygons, masks and circles are instances; shapes of one label and group are one instance. If there
is a labels.txt, it is the list of classes.
"""

from __future__ import annotations

import base64
import collections
import math
from pathlib import Path

import msgspec
import numpy as np

from oneformer_jax import files
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.files import TEXT_LIMIT
from oneformer_jax.input_pipeline.importers.export import (
    Export,
    Picture,
    read_lines,
)

_LINES = ("point", "points", "line", "linestrip")
_READ = ("polygon", "mask", "circle")
_NO_CLASS = ("__ignore__", "_background_")  # of labelme's own lists


class _Shape(msgspec.Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str = "polygon"
    group_id: int | None = None
    mask: str | None = None


class _File(msgspec.Struct):
    shapes: list[_Shape]
    imagePath: str
    imageHeight: int | None = None
    imageWidth: int | None = None


def read(export: Export) -> None:
    """Reads all JSON files of the export's folder."""
    labels = export.source / "labels.txt"
    if labels.is_file():
        names = [name for name in read_lines(labels) if name not in _NO_CLASS]
        export.list_classes(names, labels)
    used = set()
    for name in images.walk_images(export.source, (".json",)):
        path = export.source / name
        try:
            content = files.read_json(path, _File, limit=TEXT_LIMIT)
        except files.FileError as error:
            export.fault("JSON that is not labelme's", str(error))
            continue
        stated = None
        if content.imageHeight and content.imageWidth:
            stated = (content.imageHeight, content.imageWidth)
        image = export.find(path.parent, content.imagePath, path)
        picture = image and export.picture(image, path, stated=stated)
        if picture:
            used.add(picture.path)
            _read_shapes(export, picture, content.shapes, path)
    for name in images.walk_images(export.source):
        if export.source / name not in used:
            export.drop("images without a JSON", name)


def _read_shapes(export: Export, picture: Picture, shapes: list[_Shape], path: Path) -> None:
    groups = collections.defaultdict(list)
    for number, shape in enumerate(shapes):
        where = f"{path}, shape {number} ({shape.label!r:.60})"
        if shape.shape_type in _LINES or shape.label in _NO_CLASS:
            kind = shape.label if shape.label in _NO_CLASS else shape.shape_type
            export.drop(f"shapes of the kind {kind}", path)
            continue
        key = number if shape.group_id is None else f"group {shape.group_id}"
        groups[shape.label, key].append((_part(export, picture, shape, where), where))
    for (label, _), parts in groups.items():
        export.instance(picture, label, [part for part, _ in parts], parts[0][1])


def _part(
    export: Export, picture: Picture, shape: _Shape, where: str
) -> list[float] | np.ndarray | None:
    what = f"{where} is a {shape.shape_type} of {len(shape.points)} points"
    if shape.shape_type not in _READ:
        export.refuse_kind(shape.shape_type, what, _READ)
        return None
    if shape.shape_type == "polygon":
        return export.polygon(picture, shape.points, where)
    if len(shape.points) != 2:
        export.fault("shape that has not two points", f"{what}; it needs two: draw it anew")
        return None
    if shape.shape_type == "mask":
        return _mask(export, picture, shape, where)
    radius = math.dist(*shape.points)
    return export.ellipse(picture, shape.points[0], (radius, radius), 0.0, where)


def _mask(export: Export, picture: Picture, shape: _Shape, where: str) -> np.ndarray | None:
    """Places the PNG of a mask, whose two points are its first and last pixel."""
    box = np.array(shape.points)
    if not export.polygon(picture, box, where):
        return None
    (left, top), (right, bottom) = np.clip(np.rint(box), 0, None).astype(int)
    right, bottom = min(right, picture.size[1] - 1), min(bottom, picture.size[0] - 1)
    try:
        data = base64.b64decode(shape.mask or "", validate=True)
        samples = images.decode_samples(data, f"{where}: its mask")
    except images.ImageError as error:
        export.fault("mask that cannot be decoded", str(error))
        return None
    except ValueError as error:  # of base64
        export.fault("mask that cannot be decoded", f"{where}: its mask cannot be decoded: {error}")
        return None
    if samples.shape != (bottom - top + 1, right - left + 1):
        export.fault(
            "mask of another size than its box",
            f"{where}: its mask has the shape {list(samples.shape)}, its box "
            f"{[int(bottom - top + 1), int(right - left + 1)]}",
        )
        return None
    mask = np.zeros(picture.size, bool)
    mask[top : bottom + 1, left : right + 1] = samples > 0
    return mask
