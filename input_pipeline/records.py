"""Records: one annotated image each, decoded and checked.

A record is a dict with
  image: uint8 [H, W, 3], RGB;
  panoptic: int32 [H, W], segment ids, 0 where void;
  segments: list of dicts with id (int), category (contiguous class id), iscrowd (bool) and area
    (int, as the annotation says);
  image_id: str;
  file_name: str;
  semantic: int32 [H, W], class ids, VOID where unlabelled; only if the semantic annotation differs
    from that of the segments (ADE20K).
Training reads *compact* records: they have ids that are small enough for a uint8 map (uint16 above
255 segments), and no `semantic`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from oneformer_jax.files import first_few
from oneformer_jax.input_pipeline import images

# Ids are read as R + 256 G + 65536 B, so they have 24 bits.
_ID_LIMIT = 1 << 24
_MAX_SEGMENTS = 65_535
# Unlabelled pixels of a map of class ids, whatever value the files use.
VOID = -1
# Without PNG's filters, maps of few values are a third smaller and decode seven times as fast.
_DENSE_PNG = [
    cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_COMPRESSION, 9
]  # fmt: skip


class RecordError(ValueError):
    """One record is broken (a file is missing or truncated, ids or sizes disagree).

    The rest of the dataset is usable, so a loader may skip the record. The message names the file;
    `kind` is a phrase that errors of one cause share.
    """

    def __init__(self, message: str, kind: str = "image or map that cannot be used"):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class SegmentTable:
    """The annotated segments of one image, an entry each; crowd is 0 or 1."""

    ids: np.ndarray
    categories: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray

    @classmethod
    def from_lists(
        cls,
        ids: Sequence[int],
        categories: Sequence[int],
        crowd: Sequence[int],
        areas: Sequence[int],
    ) -> SegmentTable:
        return cls(*(np.asarray(values, np.int64) for values in (ids, categories, crowd, areas)))

    @classmethod
    def from_dicts(cls, segments: Sequence[Mapping[str, Any]]) -> SegmentTable:
        """Returns the table of a record's `segments`."""
        return cls.from_lists(
            *([s[key] for s in segments] for key in ("id", "category", "iscrowd", "area"))
        )

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, num_classes: int, where: str) -> None:
        """Raises RecordError for an id or category that is out of range or an id used twice."""
        unique, counts = np.unique(self.ids, return_counts=True)
        if (counts > 1).any():
            raise RecordError(
                f"{where}: segment id {unique[counts > 1][0]} is listed twice; every segment of an "
                "image needs an id of its own"
            )
        outside = unique[(unique <= 0) | (unique >= _ID_LIMIT)]
        if len(outside):
            raise RecordError(
                f"{where}: segment id {outside[0]} is out of range; ids are 1 to {_ID_LIMIT - 1} "
                "(0 is void)"
            )
        unknown = (self.categories < 0) | (self.categories >= num_classes)
        if unknown.any():
            raise RecordError(
                f"{where}: segment {self.ids[unknown][0]} has class {self.categories[unknown][0]}, "
                f"but the dataset has {num_classes} classes"
            )
        if len(self) > _MAX_SEGMENTS:
            raise RecordError(
                f"{where}: {len(self)} segments; an image can have at most {_MAX_SEGMENTS}"
            )

    def has_things(self, is_thing: Sequence[bool]) -> bool:
        """Tells whether one is a thing and no crowd; `is_thing` is by class."""
        return any(is_thing[k] for k in self.categories[self.crowd == 0].tolist())

    def numbered(self) -> SegmentTable:
        """Returns the same segments with the ids 1, 2, ..., for a compact record."""
        return dataclasses.replace(self, ids=np.arange(1, len(self) + 1))

    def to_dicts(self) -> list[dict]:
        columns = (self.ids, self.categories, self.crowd.astype(bool), self.areas)
        return [
            {"id": id_, "category": category, "iscrowd": crowd, "area": area}
            for id_, category, crowd, area in zip(*(c.tolist() for c in columns), strict=True)
        ]


# As in `images`: (data, where, max_pixels) -> pixels or (height, width), or a RecordError.
decode_image = functools.partial(images.decode_image, error=RecordError)
decode_labels = functools.partial(images.decode_samples, error=RecordError)
read_image_size = functools.partial(images.read_size, error=RecordError)


def encode_panoptic(panoptic: np.ndarray) -> bytes:
    """Encodes segment ids, int [H, W] below 2**24, as a COCO panoptic PNG (R + 256 G + 65536 B)."""
    rgba = np.ascontiguousarray(panoptic, "<u4").view(np.uint8).reshape(*panoptic.shape, 4)
    bgr = cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGR)
    return cv2.imencode(".png", bgr)[1].tobytes()


def decode_panoptic(
    data: bytes,
    segments: SegmentTable,
    where: str,
    max_pixels: int = images.MAX_PIXELS,
    *,
    unlisted_is_void: bool = False,
) -> np.ndarray:
    """Decodes a COCO panoptic PNG, id = R + 256 G + 65536 B, into the map of a compact record.

    Returns:
      uint8 or uint16 [H, W]: see `number_segments`.

    Raises:
      RecordError: truncated, damaged, not an 8-bit RGB image, too large, or an id that `segments`
        lacks.
    """
    pixels = decode_labels(data, where, max_pixels, palette=True)
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise RecordError(
            f"{where}: a panoptic PNG must be 8-bit RGB with id = R + 256 G + 65536 B, this one is "
            f"{pixels.dtype} with {1 if pixels.ndim == 2 else pixels.shape[2]} channel(s); convert "
            "it (a grey map of small ids goes into R, with G = B = 0)"
        )
    # The added fourth channel is all ones: the mask removes it.
    ids = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA).view("<i4")[..., 0] & (_ID_LIMIT - 1)
    return number_segments(ids, segments, where, unlisted_is_void=unlisted_is_void)


def number_segments(
    panoptic: np.ndarray, segments: SegmentTable, where: str, *, unlisted_is_void: bool = False
) -> np.ndarray:
    """Maps every pixel of an id map to its position in `segments` + 1, 0 where void.

    Args:
      panoptic: int [H, W] ids below 2**24.
      segments: a checked table.
      where: name of the map in messages.
      unlisted_is_void: treat ids that the table lacks as void instead of raising.

    Returns:
      uint8 [H, W], or uint16 for more than 255 segments.

    Raises:
      RecordError: the map holds an id that is neither 0 nor in the table.
    """
    # Ten times as fast as np.unique; only the touched pages of the table take memory.
    table = np.zeros(_ID_LIMIT, np.uint8 if len(segments) < 256 else np.uint16)
    table[segments.ids] = np.arange(1, len(segments) + 1)
    numbers = table.take(panoptic, mode="clip")
    if not unlisted_is_void and np.count_nonzero(numbers) != np.count_nonzero(panoptic):
        unknown = np.unique(panoptic[(numbers == 0) & (panoptic != 0)])
        raise RecordError(
            f"{where}: the panoptic PNG has {len(unknown)} segment id(s) that the JSON lacks "
            f"({first_few(unknown)}); add them to segments_info or paint them 0 (void)"
        )
    return numbers


def count_pixels(numbers: np.ndarray, segments: SegmentTable) -> np.ndarray:
    """Counts the segments' pixels, int64 [n], in a uint8 or uint16 map of table positions + 1."""
    if numbers.dtype == np.uint8 and numbers.size < 1 << 24:  # float32 counts are exact, and fast
        counts = cv2.calcHist([numbers], [0], None, [256], [0, 256]).reshape(-1)
        return counts[1 : len(segments) + 1].astype(np.int64)
    return np.bincount(numbers.reshape(-1), minlength=len(segments) + 1)[1:]


def keep_visible(
    numbers: np.ndarray, segments: SegmentTable, pixels: np.ndarray
) -> tuple[np.ndarray, SegmentTable]:
    """Leaves out segments without a pixel, and makes the pixels their areas.

    Args:
      numbers: uint8 or uint16 [H, W] of table positions + 1, 0 is void.
      segments: the table.
      pixels: the result of `count_pixels` for them.

    Returns:
      The map of positions in the remaining table, and that table.
    """
    seen = pixels > 0
    table = SegmentTable(
        segments.ids[seen], segments.categories[seen], segments.crowd[seen], pixels[seen]
    )
    if seen.all():
        return numbers, table
    positions = np.concatenate([[0], np.where(seen, np.cumsum(seen), 0)])
    dtype = np.uint8 if len(table) < 256 else np.uint16
    return positions.astype(dtype)[numbers], table


def encode_dense(panoptic: np.ndarray, segments: SegmentTable) -> bytes:
    """Encodes segment ids, int [H, W], as a one-channel PNG of table positions + 1.

    8 bits deep, or 16 for more than 255 segments. It decodes many times as fast as the RGB form.

    Raises:
      RecordError: an id that is neither 0 nor in the table.
    """
    numbers = number_segments(panoptic, segments, "the map to be encoded")
    return cv2.imencode(".png", numbers, _DENSE_PNG)[1].tobytes()


def with_ids(numbers: np.ndarray, segments: SegmentTable) -> np.ndarray:
    """Returns int32 [H, W] of segment ids from a map of table positions + 1."""
    return np.concatenate([[0], segments.ids]).astype(np.int32)[numbers]


def decode_dense(
    data: bytes, segments: SegmentTable, where: str, max_pixels: int = images.MAX_PIXELS
) -> np.ndarray:
    """Decodes the result of `encode_dense`: uint8 or uint16 [H, W]; RecordError if damaged."""
    numbers = decode_labels(data, where, max_pixels)
    if numbers.ndim != 2 or int(numbers.max()) > len(segments):
        raise RecordError(f"{where}: the map refers to a segment that its table lacks")
    return numbers


def evenly_spread(total: int, count: int) -> list[int]:
    """Returns `count` of the positions 0 .. total - 1, ascending; all of them if there are less."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist()


def checked_index(index: int, length: int) -> int:
    """Returns `index` as an int; IndexError unless it is in 0 .. length - 1."""
    index = int(index)
    if not 0 <= index < length:
        raise IndexError(f"record {index} of a source with {length} records")
    return index


def turned_hint(image: tuple[int, ...], other: tuple[int, ...]) -> str:
    """Explains an annotation whose (height, width) is that of the turned image; else ""."""
    if image != other[::-1]:
        return ""
    return (
        ". One is the other turned: the image's EXIF orientation is applied, but the annotation "
        "was made without it; turn the map too, or save the image without the orientation"
    )


def make_record(
    image: np.ndarray,
    panoptic: np.ndarray,
    segments: SegmentTable,
    *,
    image_id: str,
    file_name: str,
    where: str,
) -> dict:
    """Joins the parts into a record.

    Args:
      image: uint8 [H, W, 3].
      panoptic: [H, W], ids of `segments` and 0; int32, or the smaller type of a compact record.
      segments: a checked table.
      image_id: id of the image in the dataset.
      file_name: name of the image file.
      where: name of the record in messages.

    Raises:
      RecordError: image and map differ in size.
    """
    if image.shape[:2] != panoptic.shape:
        raise RecordError(
            f"{where}: the image has {image.shape[0]} x {image.shape[1]} pixels (height x width), "
            f"its panoptic PNG {panoptic.shape[0]} x {panoptic.shape[1]}; they must be equal"
            + turned_hint(image.shape[:2], panoptic.shape)
        )
    return {
        "image": image,
        "panoptic": panoptic,
        "segments": segments.to_dicts(),
        "image_id": image_id,
        "file_name": file_name,
    }
