"""Segmentations of COCO: polygons and run-length codes, checked before anything is drawn.

A mask is kept as the lengths of its runs down the columns, int64, alternating between background
and foreground, background first. `pycocotools`, which draws the polygons, trusts its input: a short
code reads uninitialised memory, and a far point uses up all memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from oneformer_jax.input_pipeline.annotations.schemas import RunLengths, Segmentation

# pycocotools walks along an outline in steps of a fifth of a pixel; this length takes 300 MB.
MAX_OUTLINE = 4_000_000
_MAX_CHARACTERS = 7  # of one number in a compressed code: 32 bits and a sign
FEW_POINTS = "polygon without three points"
FAR_OUTSIDE = "polygon far outside of the image"
NO_SEGMENTATION = "annotation without a segmentation"
WRONG_LENGTH = "run-length code that does not fit the image"
DAMAGED = "damaged run-length code"


class SegmentationError(ValueError):
    """A segmentation that describes no mask; `kind` is the kind of its `Fault`."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def runs_of(segmentation: Segmentation, shape: tuple[int, int]) -> np.ndarray:
    """Returns the run lengths of a segmentation in an image of `shape` (height, width).

    Returns:
      int64 [R], positive except the first, whose sum is height x width.

    Raises:
      SegmentationError: polygons or code do not fit an image of this shape.
    """
    if isinstance(segmentation, RunLengths):
        return _code_runs(segmentation, shape)
    check_polygons(segmentation, shape)
    codes = coco_mask.frPyObjects(segmentation, *shape)
    return _tidy(_decompress(coco_mask.merge(codes)["counts"]))


def mask_of(runs: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Draws run lengths as bool [H, W]."""
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(shape[::-1]).T


def area_of(runs: np.ndarray) -> int:
    """Returns the number of foreground pixels."""
    return int(runs[1::2].sum())


def compress(runs: np.ndarray, shape: tuple[int, int]) -> bytes:
    """Encodes run lengths as COCO's compressed text."""
    code = {"size": list(shape), "counts": runs.tolist()}
    return coco_mask.frPyObjects(code, *shape)["counts"]


def check_polygons(polygons: Sequence[Sequence[float]], shape: tuple[int, int]) -> None:
    """Raises SegmentationError unless the polygons can be drawn into an image of `shape`."""
    check_points(polygons)
    reach = max(shape)
    outline = 0.0
    for polygon in polygons:
        points = np.array(polygon).reshape(-1, 2)
        if points.min() < -reach or points.max() > 2 * reach:
            raise SegmentationError(*far_outside(points.min(), points.max(), 0, shape))
        outline += np.abs(points - np.roll(points, 1, 0)).max(1).sum()
    if outline > MAX_OUTLINE:
        raise SegmentationError(*far_outside(0, 0, outline, shape))


def check_points(polygons: Sequence[Sequence[float]]) -> None:
    """Raises SegmentationError unless all polygons, at least one, have three points or more."""
    if not polygons:
        raise SegmentationError(
            NO_SEGMENTATION,
            "has no segmentation; a box alone is no mask: outline the object or remove the "
            "annotation",
        )
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise SegmentationError(
                FEW_POINTS,
                f"has a polygon of {len(polygon)} numbers; it must be a list [x1, y1, x2, y2, "
                "...] of at least three points",
            )


def far_outside(
    least: float, most: float, outline: float, shape: tuple[int, int]
) -> tuple[str, str]:
    """Returns the kind and message for polygons too far outside an image, or too long, to draw."""
    image = f"its image of {shape[0]} x {shape[1]} pixels (height x width)"
    if outline > MAX_OUTLINE:
        text = f"has an outline of {outline:g} pixels in {image}; at most {MAX_OUTLINE:,} are drawn"
    else:
        text = (
            f"has a polygon from {least:g} to {most:g}, far outside of {image}; does it belong to "
            "another image, or have another unit?"
        )
    return FAR_OUTSIDE, text


def _code_runs(code: RunLengths, shape: tuple[int, int]) -> np.ndarray:
    if tuple(code.size) != tuple(shape):
        raise SegmentationError(
            WRONG_LENGTH,
            f"has a run-length code of size {list(code.size)}, the image {list(shape)} (height, "
            "width)",
        )
    if isinstance(code.counts, str):
        runs = _decompress(code.counts.encode("utf-8"))
    else:
        runs = np.array(code.counts, np.int64)
    if len(runs) and runs.min() < 0:
        raise SegmentationError(DAMAGED, f"has a run-length code with a run of {runs.min()}")
    # float64, because the sum of damaged numbers may exceed int64.
    if runs.sum(dtype=np.float64) != shape[0] * shape[1]:
        raise SegmentationError(
            WRONG_LENGTH,
            f"has a run-length code of {runs.sum(dtype=np.float64):,.0f} pixels, the image has "
            f"{shape[0] * shape[1]:,} ({shape[0]} x {shape[1]}, height x width)",
        )
    return _tidy(runs)


def _decompress(text: bytes) -> np.ndarray:
    """Decodes the numbers of COCO's compressed code, int64; they may still be negative.

    A number is written in characters of 6 bits, the low ones first: 5 bits of its value and a
    continuation bit. From the fourth on, numbers are differences to the last but one.
    """
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(characters):
        return characters
    if characters.min() < 0 or characters.max() > 63:
        raise SegmentationError(
            DAMAGED, "has a compressed run-length code with a strange character"
        )
    last = characters & 32 == 0
    if not last[-1]:
        raise SegmentationError(DAMAGED, "has a compressed run-length code that breaks off")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_CHARACTERS:
        raise SegmentationError(DAMAGED, "has a compressed run-length code with an endless number")
    shifts = 5 * (np.arange(len(characters)) - np.repeat(starts, lengths))
    values = np.add.reduceat((characters & 31) << shifts, starts)
    negative = characters[ends] & 16 != 0
    values -= np.where(negative, np.int64(1) << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _tidy(runs: np.ndarray) -> np.ndarray:
    """Joins the runs around empty ones, which break pycocotools' intersections."""
    values = np.arange(len(runs)) % 2
    kept = runs > 0
    runs, values = runs[kept], values[kept]
    if not len(runs):
        return np.zeros(1, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    joined = np.add.reduceat(runs, starts)
    return np.concatenate([[0], joined]) if values[0] else joined
