"""Schemas of COCO's JSON files, and the decoding of a file by them.

A file is decoded in two steps: its lists as undecoded entries, then each entry by its own schema.
So a wrong value is the fault of its entry, named by its path (`$.annotations[3].area`), and a file
of hundreds of megabytes never becomes objects all at once. Unused keys are not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw

from oneformer_jax.files import first_few, read_bytes
from oneformer_jax.input_pipeline.annotations.faults import Fault, FaultsError

T = TypeVar("T")

MAX_BYTES = 16 << 30  # of an annotation file; COCO's have 450 MB
# Ids in a panoptic PNG are read as R + 256 G + 65536 B.
MAX_SEGMENT_ID = (1 << 24) - 1
WRONG_VALUE = "value of a wrong type or out of range"

Flag = Literal[0, 1] | bool
Text = Annotated[str, Meta(max_length=500, pattern="^[^\\x00]*$")]
Identifier = int | Text
CategoryId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Side = Annotated[int, Meta(ge=1, le=1_000_000)]
Area = Annotated[float, Meta(ge=0, le=1e12)]
Name = Annotated[str, Meta(min_length=1, max_length=1000, pattern="^[^\\x00]*$")]
ISTHING = (
    "a COCO-panoptic category has isthing, 0 or 1; instance JSON files, which have none, are read "
    'by dataset.name="coco_instances"'
)


class IdOfCategory(msgspec.Struct):
    """A category of which only the id is read."""

    id: CategoryId


class Category(msgspec.Struct, kw_only=True):
    """A category of an instance file: a thing."""

    id: CategoryId
    name: Text | int
    color: list[Annotated[int, Meta(ge=0, le=255)]] | None = None


class PanopticCategory(Category, kw_only=True):
    isthing: Flag


class Image(msgspec.Struct, gc=False):
    id: Identifier
    file_name: Name | None = None
    height: Side | None = None
    width: Side | None = None


class Segment(msgspec.Struct, gc=False):
    id: Annotated[int, Meta(ge=1, le=MAX_SEGMENT_ID)]
    category_id: CategoryId
    iscrowd: Flag | None = 0
    area: Area | None = None


class PanopticAnnotation(msgspec.Struct):
    image_id: Identifier
    file_name: Name
    segments_info: list[Segment]


class OpenPanopticAnnotation(msgspec.Struct):
    """An annotation whose segments are decoded one by one, because one of them is wrong."""

    image_id: Identifier
    file_name: Name
    segments_info: list[Raw]


class RunLengths(msgspec.Struct):
    size: tuple[int, int]
    counts: str | list[Annotated[int, Meta(ge=-(1 << 53), le=1 << 53)]]


Polygons = list[list[float]]
Segmentation = Polygons | RunLengths


class InstanceAnnotation(msgspec.Struct):
    """An annotation whose segmentation `segmentation_of` decodes later."""

    image_id: Identifier
    category_id: CategoryId
    segmentation: Raw
    id: Identifier | None = None
    iscrowd: Flag | None = 0
    area: Area | None = None


class CocoFile(msgspec.Struct):
    """The lists of a file, their entries undecoded."""

    images: list[Raw]
    annotations: list[Raw]
    categories: list[Raw]


class _CategoriesOnly(msgspec.Struct):
    categories: list[Raw]


_SEGMENTATION = msgspec.json.Decoder(Segmentation | None)
_PAIRS = msgspec.json.Decoder(list[list[tuple[float, float]]])
# Python writes NaN and Infinity, which JSON lacks; texts are skipped.
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")  # of msgspec's path
_NOT_JSON = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\b(?:NaN|Infinity)\b')


def open_file(path: str | os.PathLike[str], layout: str, schema: type[T] = CocoFile) -> T:
    """Reads an annotation file as its undecoded lists.

    Args:
      path: the file.
      layout: the expected content, for the message.
      schema: a struct of lists.

    Raises:
      ValueError: no regular file, not JSON, or without one of the lists.
    """
    data = read_bytes(path, limit=MAX_BYTES, error=ValueError)
    if data.startswith(b"\xef\xbb\xbf"):  # some editors put a mark before the text
        data = data[3:]
    try:
        try:
            return msgspec.json.decode(data, type=schema)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            mended = _NOT_JSON.sub(_as_text, data)
            if mended == data:
                raise
            return msgspec.json.decode(mended, type=schema)
    except msgspec.ValidationError as error:
        keys = _keys(data)
        has = f" (it has {first_few(keys)})" if keys else ""
        raise ValueError(f"{path}: {_plain(error)}{has}; {layout}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); is it truncated?") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for an annotation file") from None


def _as_text(match: re.Match[bytes]) -> bytes:
    found = match[0]
    # No valid text begins with a NUL.
    return found if found.startswith(b'"') else b'"\\u0000' + found + b', which JSON does not have"'


def keys_of(entries: list[Raw]) -> list[str]:
    """Keys of the first entry of a list, which tell the kind of the file; [] for an empty list."""
    return _keys(entries[0]) if entries else []


def _keys(data: bytes | Raw) -> list[str]:
    try:
        return list(msgspec.json.decode(data, type=dict[str, Raw]))
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return []


def _plain(error: Exception) -> str:
    """Shortens msgspec's message and removes its typographic marks."""
    return str(error).replace("`", "").replace("Object missing required field", "it lacks")


def wrong_value(path: object, place: str, error: Exception, entry: Raw) -> Fault:
    """Makes the fault of an entry that its schema refuses.

    Args:
      path: the file.
      place: path of the entry in the file, such as "$.annotations[3]".
      error: msgspec's; its own path begins at the entry.
      entry: the entry, for its id and its wrong value.
    """
    what, _, inside = _plain(error).partition(" - at $")
    try:
        value = whole = msgspec.json.decode(entry)
        for key, number in _STEP.findall(inside):
            value = value[key] if key else value[int(number)]
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError):
        return Fault(WRONG_VALUE, f"{path}: {what} - at {place}{inside}")
    found = "" if what.startswith("it lacks") else f", it is {_shortened(value)}"
    id_ = whole.get("id") if isinstance(whole, dict) and inside else None
    label = f" (id {_shortened(id_)})" if id_ is not None else ""
    return Fault(WRONG_VALUE, f"{path}: {what} - at {place}{inside}{found}{label}")


def _shortened(value: object, length: int = 40) -> str:
    if isinstance(value, str) and value.startswith("\0"):  # see `_as_text`
        return value[1:]
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def decode_list(
    path: object, key: str, entries: Iterable[Raw], schema: type[T], faults: list[Fault]
) -> list[T | None]:
    """Decodes the entries of a list; a wrong one becomes None and a fault."""
    decode = msgspec.json.Decoder(schema).decode
    found: list[T | None] = []
    for number, entry in enumerate(entries):
        try:
            found.append(decode(entry))
        except msgspec.DecodeError as error:
            faults.append(wrong_value(path, f"$.{key}[{number}]", error, entry))
            found.append(None)
    return found


def categories_of(path: object, entries: list[Raw], schema: type) -> list[dict]:
    """Returns the categories as dicts.

    Args:
      path: the file.
      entries: its list.
      schema: `PanopticCategory`, `Category` or `IdOfCategory`.

    Raises:
      ValueError: no category, a wrong one, or two with one id or name.
    """
    faults: list[Fault] = []
    found = decode_list(path, "categories", entries, schema, faults)
    if faults:
        shown = first_few((fault.message for fault in faults), 3, "; ")
        hint = f" ({ISTHING})" if "lacks isthing" in shown else ""
        raise FaultsError(f"{shown}{hint}. The classes come from this list: correct it", faults)
    if not found:
        raise ValueError(f"{path}: the list of categories is empty, so there are no classes")
    twice = doubled(str(category.id) for category in found)
    if schema is not IdOfCategory:
        twice += doubled(str(category.name) for category in found)
    if twice:
        raise ValueError(
            f"{path}: {first_few(twice)} occurs more than once in categories; each class needs an "
            "id and a name of its own"
        )
    return [_as_dict(category) for category in found]


def _as_dict(category: IdOfCategory | Category) -> dict:
    values = msgspec.structs.asdict(category)
    if "name" in values:
        values["name"] = str(values["name"])
    if "isthing" in values:
        values["isthing"] = int(values["isthing"])
    if not values.get("color"):
        values.pop("color", None)
    return values


def read_categories(path: str | os.PathLike[str], layout: str, schema: type) -> list[dict]:
    """Reads the categories alone, fast: see `open_file` and `categories_of`."""
    return categories_of(path, open_file(path, layout, _CategoriesOnly).categories, schema)


def segmentation_of(text: Raw | bytearray) -> Segmentation | None:
    """Decodes polygons, also as pairs of coordinates, or a run-length code; or a DecodeError."""
    try:
        return _SEGMENTATION.decode(text)
    except msgspec.ValidationError:
        try:
            pairs = _PAIRS.decode(text)
        except msgspec.ValidationError:
            pairs = None
        if pairs is None:
            raise
        return [[value for point in polygon for value in point] for polygon in pairs]


def doubled(values: Iterable[str]) -> list[str]:
    """Returns the values that occur more than once, in order, each once."""
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for value in values:
        if value in seen:
            twice[value] = None
        seen.add(value)
    return list(twice)


def check_images(path: object, images: Collection[Image]) -> list[Fault]:
    """Makes faults of ambiguous image ids and file names: those that occur twice."""
    return [
        Fault(
            f"{what} of two images",
            f"{path}: the {what} {value} occurs more than once in images; data sets were joined "
            "without new ids",
        )
        for what, values in (
            ("id", (str(image.id) for image in images)),
            ("file_name", (image.file_name for image in images if image.file_name)),
        )
        for value in doubled(values)
    ]
