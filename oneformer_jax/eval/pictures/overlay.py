"""Pictures of segmentations, drawn over their images.

Sizes of text and lines follow the image. A label lies where the largest box of its shape fits into
the segment, in white on a dark plate, legible on light and dark images.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from oneformer_jax.eval.pictures import sheets
from oneformer_jax.types import Metadata

# Shares of the geometric mean of the picture's sides, with lower bounds in pixels.
_FONT_SHARE, _MIN_FONT = 0.032, 9
_LINE_SHARE = 0.003
# A label may shrink to this share of the usual font before it leaves its segment.
_SHRINK = 0.7
# A label larger than this many times its segment's area is left out.
_DWARF = 4
# Most pixels of an enlarged picture.
_ENLARGED = 1 << 22
_PLATE = (18, 18, 22)


@dataclasses.dataclass(frozen=True, eq=False)
class _Region:
    mask: np.ndarray  # bool [H, W]
    color: tuple[int, int, int]
    text: str
    isthing: bool


class Drawable(Protocol):
    """The part of `segmentation.Segmentation` that is drawn; see there for the fields."""

    @property
    def task(self) -> str: ...
    @property
    def metadata(self) -> Metadata: ...
    @property
    def scores(self) -> np.ndarray | Any: ...
    @property
    def labels(self) -> np.ndarray | Any: ...
    @property
    def size(self) -> tuple[int, int]: ...
    def each_mask(self) -> Iterator[np.ndarray]: ...


def draw(
    image: np.ndarray,
    segmentation: Drawable,
    *,
    alpha: float = 0.5,
    labels: bool = True,
    min_score: float = 0.5,
    min_size: int = 0,
    max_pixels: int = 1 << 24,
    numbers: Sequence[int] | None = None,
    steady: bool = False,
) -> np.ndarray:
    """Draws a segmentation over its image.

    Args:
      image: uint8 [H, W, 3] RGB of the segmentation's size.
      segmentation: the segments to draw; unassigned pixels are left alone.
      alpha: opacity of the segments, 0..1.
      labels: write class names into the segments, and the scores of instances (except the certain
        ones of ground truth).
      min_score: instances below this score are left out.
      min_size: enlarge images with a shorter side by a whole factor, for fine text and outlines,
        unless the picture becomes large. 0 keeps the size.
      max_pixels: limit of the picture's pixels; larger images are shrunk.
      numbers: for each segment, in the order of `masks`, the number of its object among those of
        its class, from 0. It chooses the shade, and things show it in the place of their score.
      steady: labels keep their places in the frames of a video, as far as that goes.

    Returns:
      uint8 [H, W, 3] RGB, or of the other size.

    Raises:
      ValueError: the image is not uint8 [H, W, 3] of the segmentation's size.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.shape != (*segmentation.size, 3):
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}; the segmentation needs "
            f"uint8 {[*segmentation.size, 3]}"
        )
    size = _drawn_size(image.shape[:2], min_size, max_pixels)
    larger = size[0] > image.shape[1] or size[1] > image.shape[0]
    if size != image.shape[1::-1]:
        method = cv2.INTER_CUBIC if larger else cv2.INTER_AREA
        image = cv2.resize(image, size, interpolation=method)
    regions = _regions(segmentation, min_score, size, numbers)
    # Large segments first, or they would cover small ones.
    regions.sort(key=lambda r: -np.count_nonzero(r.mask))
    picture = image.copy()
    for region in regions:
        _tint(picture, region, alpha)
    _draw_outlines(picture, regions)
    return _draw_labels(picture, regions, steady) if labels else picture


def _drawn_size(shape: tuple[int, int], min_size: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the picture of an image of `shape`; see `overlay`."""
    height, width = shape
    factor = -(-min_size // max(1, min(shape)))
    factor = min(factor, math.isqrt(min(max_pixels, _ENLARGED) // max(1, height * width)))
    if factor >= 1:
        return width * factor, height * factor
    if height * width <= max_pixels:
        return width, height
    shrink = math.sqrt(max_pixels / (height * width))
    # If an image is one pixel thin, only its long side shrinks.
    width = max(1, min(int(width * shrink), max_pixels))
    return width, max(1, min(int(height * shrink), max_pixels // width))


def resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a mask, bool [H, W], to `size`, (width, height)."""
    if mask.shape == size[::-1]:
        return mask
    larger = size[0] > mask.shape[1]
    method = cv2.INTER_LINEAR if larger else cv2.INTER_AREA
    return cv2.resize(mask.astype(np.float32), size, interpolation=method) >= 0.5


def _regions(
    segmentation: Drawable,
    min_score: float,
    size: tuple[int, int],
    numbers: Sequence[int] | None = None,
) -> list[_Region]:
    """The segments, with their masks resized to `size`, (width, height)."""
    metadata = segmentation.metadata
    scores = segmentation.scores.tolist() if segmentation.task == "instance" else None
    found = zip(segmentation.each_mask(), segmentation.labels.tolist(), strict=True)
    regions = []
    seen: dict[int, int] = {}
    for position, (whole, label) in enumerate(found):
        score = None if scores is None else scores[position]
        if score is not None and score < min_score:
            continue
        mask = resized(whole, size)
        if not mask.any():
            continue
        name = metadata.class_names[label]
        if numbers is not None:
            number = numbers[position]
            text = f"{name} {number + 1}" if metadata.is_thing[label] else name
        else:
            number = seen[label] = seen.get(label, -1) + 1
            text = name if score in (None, 1.0) else f"{name} {score:.0%}"
        color = shade(metadata.colors[label], number)
        regions.append(_Region(mask, color, text, metadata.is_thing[label]))
    return regions


def shade(color: Sequence[int], number: int) -> tuple[int, int, int]:
    """Picks the colour of the `number`-th instance of a class: `color`, then shades around it."""
    red, green, blue = color
    shades = _shades((int(red), int(green), int(blue)))
    return shades[number % len(shades)]


@functools.lru_cache(maxsize=1024)
def _shades(color: tuple[int, int, int], count: int = 24) -> tuple[tuple[int, int, int], ...]:
    """Lists `color`, then repeatedly the neighbour in hue farthest from all so far.

    Distances are in CIELAB, where they match the eye's.
    """
    hue, saturation, _ = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    candidates = [
        colorsys.hsv_to_rgb((hue + turn) % 1.0, s, v)
        for turn in (-0.1, -0.05, 0.0, 0.05, 0.1)
        for s in (max(0.35, saturation - 0.4), max(0.6, saturation))
        for v in (0.45, 0.65, 0.85, 1.0)
    ]
    colors = np.round(np.array([[c / 255 for c in color], *candidates]) * 255)
    lab = cv2.cvtColor((colors / 255).astype(np.float32)[None], cv2.COLOR_RGB2LAB)[0]
    chosen, distance = [0], np.full(len(colors), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return tuple((int(r), int(g), int(b)) for r, g, b in colors[chosen])


def _tint(picture: np.ndarray, region: _Region, alpha: float) -> None:
    """Mixes a region's colour into it, in place."""
    mask = region.mask.astype(np.uint8)
    left, top, width, height = cv2.boundingRect(mask)
    part = np.s_[top : top + height, left : left + width]
    mixed = np.rint((1 - alpha) * np.arange(256)[:, None] + alpha * np.array(region.color))
    cv2.copyTo(cv2.LUT(picture[part], mixed.astype(np.uint8)[None]), mask[part], picture[part])


def _draw_outlines(picture: np.ndarray, regions: Sequence[_Region]) -> None:
    """Draws a light line in the segment's tint over a wider dark one, in place."""
    width = max(1, round(_LINE_SHARE * sheets.scale(picture.shape)))
    dark = picture.copy()
    outlines = []
    # Masks are continued beyond the picture, so no line runs along its edge.
    pad = 2 * width + 2
    for region in regions:
        contours, _ = cv2.findContours(
            np.pad(region.mask, pad, mode="edge").astype(np.uint8),
            cv2.RETR_CCOMP,
            cv2.CHAIN_APPROX_NONE,
            offset=(-pad, -pad),
        )
        outlines.append(contours)
        cv2.polylines(dark, contours, True, _PLATE, width + min(width, 2), cv2.LINE_AA)
    cv2.addWeighted(dark, 0.5, picture, 0.5, 0, dst=picture)
    for region, contours in zip(regions, outlines, strict=True):
        tint = tuple(round(c + 0.6 * (255 - c)) for c in region.color)
        cv2.polylines(picture, contours, True, tint, width, cv2.LINE_AA)


def _draw_labels(picture: np.ndarray, regions: Sequence[_Region], steady: bool) -> np.ndarray:
    base = max(_MIN_FONT, round(_FONT_SHARE * sheets.scale(picture.shape)))
    taken = np.zeros(picture.shape[:2], bool)
    plates = []
    # The smallest have the fewest places, so they choose first.
    for region in sorted(regions, key=lambda r: np.count_nonzero(r.mask)):
        plate = _place(region, taken, base, steady=steady)
        if plate is not None:
            x, y, width, height, _ = plate
            taken[y : y + height, x : x + width] = True
            plates.append((region, plate))
    result = Image.fromarray(picture)
    layer = Image.new("RGBA", result.size)
    draw = ImageDraw.Draw(layer)
    for region, (x, y, width, height, size) in plates:
        draw.rounded_rectangle(
            (x, y, x + width - 1, y + height - 1),
            radius=height // 5,
            fill=(*_PLATE, 190),
            outline=(*region.color, 255),
            width=max(1, size // 14),
        )
        middle = (x + width / 2, y + height / 2)
        font = ImageFont.load_default(size)
        draw.text(middle, region.text, font=font, anchor="mm", fill=(255, 255, 255, 255))
    result.paste(layer, mask=layer.getchannel("A"))
    return np.asarray(result)


def _plate_size(text: str, size: int) -> tuple[int, int]:
    """Width and height of a label in a font of `size` pixels."""
    pad = max(2, size // 4)
    return round(ImageFont.load_default(size).getlength(text)) + 2 * pad, round(1.2 * size) + pad


def _place(
    region: _Region, taken: np.ndarray, base: int, *, steady: bool = False
) -> tuple[int, ...] | None:
    """Finds (x, y, width, height, font size) of a region's label, or None without a place.

    The place is the widest, which jumps as the region changes. The `steady` one is the nearest to
    the region's centre that is wide enough.
    """
    rows, columns = np.flatnonzero(region.mask.any(1)), np.flatnonzero(region.mask.any(0))
    top, left = rows[0], columns[0]
    cut = np.s_[top : rows[-1] + 1, left : columns[-1] + 1]
    free = region.mask[cut] & ~taken[cut]
    width, height = _plate_size(region.text, base)
    # Squeeze x so that the plate becomes a square: the chessboard distance to the border is then
    # half the height of the largest plate that fits around a pixel.
    squeezed = (max(1, round(free.shape[1] * height / width)), free.shape[0])
    room = cv2.resize(free.astype(np.uint8), squeezed, interpolation=cv2.INTER_AREA)
    room = cv2.distanceTransform(np.pad(room, 1), cv2.DIST_C, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(room.argmax(), room.shape)
    if steady and 2 * room[y, x] >= height:
        rows_in, columns_in = np.nonzero(2 * room >= height)
        inside_y, inside_x = np.nonzero(room)
        distance = np.hypot(rows_in - inside_y.mean(), columns_in - inside_x.mean())
        y, x = rows_in[distance.argmin()], columns_in[distance.argmin()]
    center_x = left + (x + 0.5) * free.shape[1] / squeezed[0]
    center_y = top + y + 0.5
    fits = 2 * room[y, x] / height
    inside = fits >= _SHRINK
    if not inside and not region.isthing:
        return None
    size = max(_MIN_FONT, math.floor(base * min(1.0, max(fits, _SHRINK))))
    width, height = _plate_size(region.text, size)
    limit_y, limit_x = taken.shape
    # Labels that dwarf their segments would bury a crowd of small things.
    dwarfs = width * height > _DWARF * np.count_nonzero(region.mask)
    if dwarfs or width > limit_x or height > limit_y:
        return None
    # A small thing's label covers it or, if others are in the way, lies above or below it.
    for y in (center_y - height / 2, top - height, rows[-1] + 1):
        x = round(min(max(center_x - width / 2, 0), limit_x - width))
        y = round(min(max(y, 0), limit_y - height))
        if not taken[y : y + height, x : x + width].any():
            return int(x), int(y), width, height, size
    return None
