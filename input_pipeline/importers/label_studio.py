"""Label Studio: the export "JSON", a list of tasks, and a folder of their images.

Polygons, brush masks and ellipses are instances. The JSON names images by address; the file of the
same name is taken from the folder, without the eight characters that an upload puts before it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
import numpy as np

from oneformer_jax import files
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.files import TEXT_LIMIT
from oneformer_jax.input_pipeline.importers.export import Export, Picture

_DROPPED = (
    "keypointlabels", "keypoint", "choices", "rating", "textarea", "relation", "number", "datetime",
    "taxonomy", "pairwise", "vectorlabels",
)  # fmt: skip
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")
_ALPHA = 4  # a pixel has four values, of which the last is the mask

Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]


class _Region(msgspec.Struct):
    type: str
    value: dict[str, Any] = {}
    original_width: int | None = None
    original_height: int | None = None
    image_rotation: float = 0


class _Annotation(msgspec.Struct):
    result: list[_Region]
    was_cancelled: bool = False


class _Task(msgspec.Struct):
    id: int
    data: dict[str, Any]
    annotations: list[_Annotation]
    predictions: list[Any] = []


class _Polygon(msgspec.Struct):
    points: list[tuple[float, float]]


class _Ellipse(msgspec.Struct):
    x: float
    y: float
    radiusX: float
    radiusY: float
    rotation: float = 0


class _Brush(msgspec.Struct):
    rle: list[Byte]
    format: str = "rle"


def read(export: Export) -> None:
    """Reads the one JSON in the export's folder."""
    found = sorted(path for path in export.source.glob("*.json") if not path.name.startswith("."))
    if len(found) != 1:
        raise files.FileError(
            f"{export.source} must hold the one JSON of the export beside its images; it holds "
            f"{files.first_few(path.name for path in found) or 'none'}"
        )
    tasks = files.read_json(found[0], list[_Task], limit=TEXT_LIMIT)
    by_name: dict[str, list[str]] = {}
    for name in images.walk_images(export.source):
        by_name.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    for task in tasks:
        _read_task(export, task, by_name, found[0])


def _read_task(export: Export, task: _Task, by_name: dict[str, list[str]], path: Path) -> None:
    where = f"{path}, task {task.id}"
    if task.predictions:
        export.drop("predictions", f"task {task.id}")
    annotations = [entry for entry in task.annotations if not entry.was_cancelled]
    if not annotations:
        export.drop("tasks that are not annotated", f"task {task.id}")
        return
    if len(annotations) > 1:
        export.fault(
            "task with several annotations",
            f"{where} has {len(annotations)} annotations; keep the one that counts",
        )
        return
    image = _image_of(export, task, by_name, where)
    regions = annotations[0].result
    stated = {
        (region.original_height, region.original_width)
        for region in regions
        if region.original_height and region.original_width
    }
    picture = image and export.picture(image, where, stated=min(stated, default=None))
    if not picture:
        return
    if len(stated) > 1:
        export.fault("sizes that differ", f"{where}: its regions are for images of several sizes")
        return
    for number, region in enumerate(regions):
        _read_region(export, picture, region, f"{where}, region {number}")


def _image_of(
    export: Export, task: _Task, by_name: dict[str, list[str]], where: str
) -> Path | None:
    """Finds the file of a task's image by the end of its address."""
    texts = [text for text in task.data.values() if isinstance(text, str)]
    addresses = [text for text in texts if text.lower().split("?")[0].endswith(images.ENDINGS)]
    addresses += [text for text in texts if "?d=" in text and text not in addresses]
    if len(addresses) != 1:
        export.fault(
            "task without one image",
            f"{where}: its data has {len(addresses)} addresses of images instead of one",
        )
        return None
    try:
        parts = urlsplit(addresses[0], allow_fragments=False)
    except ValueError as error:
        text = f"{where}: the address {addresses[0]!r:.200} of its image is none: {error}"
        export.fault("address that cannot be read", text)
        return None
    address = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
    name = address.replace("\\", "/").rsplit("/", 1)[-1]
    there = by_name.get(name) or by_name.get(_UPLOAD.sub("", name, count=1), [])
    if len(there) != 1:
        export.fault(
            "image that is missing" if not there else "image of which there are two",
            f"{where}: the folder {export.source} has {len(there)} files for the image {name!r}; "
            "there must be one",
        )
        return None
    return export.find(export.source, there[0], where)


def _read_region(export: Export, picture: Picture, region: _Region, where: str) -> None:
    if region.type in _DROPPED:
        export.drop(f"regions of the kind {region.type}", where)
        return
    if region.type not in _READERS:
        export.refuse_kind(region.type, f"{where} is of {region.type}", _READERS)
        return
    labels = region.value.get(region.type)
    if not (isinstance(labels, list) and len(labels) == 1 and isinstance(labels[0], str)):
        export.fault("region without one label", f"{where} has the labels {labels!r:.60}, not one")
        return
    if region.image_rotation:
        export.fault(
            "image that was turned",
            f"{where}: its image was turned by {region.image_rotation:g} degrees in the tool",
        )
        return
    try:
        part = _READERS[region.type](export, picture, region.value, where)
    except (msgspec.ValidationError, ValueError) as error:
        export.fault("region that cannot be read", f"{where} cannot be read: {error}")
        return
    export.instance(picture, labels[0], [part], where)


def _polygon(export: Export, picture: Picture, value: dict, where: str) -> list[float] | None:
    points = np.array(msgspec.convert(value, _Polygon).points).reshape(-1, 2)
    return export.polygon(picture, points / 100 * picture.size[::-1], where)


def _ellipse(export: Export, picture: Picture, value: dict, where: str) -> np.ndarray | None:
    found = msgspec.convert(value, _Ellipse)
    height, width = picture.size
    center = (found.x / 100 * width, found.y / 100 * height)
    radii = (found.radiusX / 100 * width, found.radiusY / 100 * height)
    return export.ellipse(picture, center, radii, found.rotation, where)


def _brush(export: Export, picture: Picture, value: dict, where: str) -> np.ndarray:
    found = msgspec.convert(value, _Brush)
    if found.format != "rle":
        raise ValueError(f"its format is {found.format!r}, not 'rle'")
    height, width = picture.size
    samples = decode_brush(bytes(found.rle), height * width * _ALPHA)
    return samples.reshape(height, width, _ALPHA)[..., -1] > 0


_READERS = {"polygonlabels": _polygon, "brushlabels": _brush, "ellipselabels": _ellipse}


def decode_brush(data: bytes, count: int) -> np.ndarray:
    """Decodes the run lengths of a brush.

    They are bits: the number of values in 32, the bits of a value less 1 in 5, the bits of four
    kinds of lengths less 1 in 4 each. Then come runs: 1 bit that is set for one value repeated, 2
    for the kind of its length, the length less 1, and the value, or all values.

    Args:
      data: the bytes.
      count: the number of values that there must be.

    Returns:
      uint8 [count].

    Raises:
      ValueError: other content.
    """
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    position = 0

    def take(length: int) -> int:
        nonlocal position
        if position + length > len(bits):
            raise ValueError("its run-length code ends too early")
        chosen = bits[position : position + length]
        position += length
        return int("".join(map(str, chosen.tolist())), 2)

    stated, width = take(32), take(5) + 1
    if stated != count or width != 8:
        raise ValueError(
            f"its run-length code has {stated:,} values of {width} bits; {count:,} of 8 are needed"
        )
    lengths = [take(4) + 1 for _ in range(4)]
    values = np.zeros(count, np.uint8)
    done = 0
    while done < count:
        repeated = take(1)
        run = take(lengths[take(2)]) + 1
        if done + run > count:
            raise ValueError("a run of its code reaches beyond the image")
        if repeated:
            values[done : done + run] = take(8)
        else:
            if position + 8 * run > len(bits):
                raise ValueError("its run-length code ends too early")
            values[done : done + run] = np.packbits(bits[position : position + 8 * run])
            position += 8 * run
        done += run
    return values
