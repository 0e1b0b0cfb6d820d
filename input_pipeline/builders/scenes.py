"""Renders the synthetic panoptic scenes of the embedded default dataset.

A scene shows two or three textured stuff regions and up to five shapes that may occlude one
another. Some scenes have a crowd (many small shapes of one class in one segment), void pixels, or
no thing. The range of hues of a class overlaps its neighbours', so a model must learn shape and
texture too. The masks are exact; only the image is anti-aliased.

A scene is a pure function of (seed, split, index, size).
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Callable

import cv2
import numpy as np

from oneformer_jax.input_pipeline import datasets

INFO = datasets.SYNTHETIC
# Each split of a seed has its own random stream.
_SPLIT_STREAMS = {"train": 0, "validation": 1}

# Lengths below are in pixels of a 128 x 128 scene and grow with it.
_REFERENCE_SIZE = 128
_CROWD_PROBABILITY = 0.09  # of the scenes that have things
_VOID_PROBABILITY = 0.15
_THING_COUNT_PROBABILITIES = (0.08, 0.14, 0.22, 0.25, 0.19, 0.12)
_RADIUS_RANGE = (10.0, 27.0)
# A new thing may hide at most this share of the visible part of an earlier one.
_MAX_HIDDEN = 0.45
# A segment with fewer visible pixels is unrecognisable and becomes void.
_MIN_VISIBLE_AREA = 40


@dataclasses.dataclass(frozen=True)
class Scene:
    """A rendered scene of S x S pixels.

    Attributes:
      image: uint8 [S, S, 3], RGB.
      panoptic: int32 [S, S], arbitrary segment ids of 1 to 24 bits, 0 where void.
      segments: dicts with id, category (contiguous class id of `datasets.SYNTHETIC`), iscrowd
        and area (visible pixels).
    """

    image: np.ndarray
    panoptic: np.ndarray
    segments: list[dict]


def render_scene(seed: int, split: str, index: int, size: int = _REFERENCE_SIZE) -> Scene:
    """Renders scene `index` of a split.

    Args:
      seed: of the whole dataset.
      split: "train" or "validation"; their scenes are drawn from separate random streams.
      index: non-negative number of the scene in its split.
      size: height and width in pixels, at least 32.

    Returns:
      The scene; equal arguments give equal scenes.
    """
    if size < 32:
        raise ValueError(f"synthetic scenes need a size of at least 32 pixels, not {size}")
    rng = np.random.default_rng((seed, _SPLIT_STREAMS[split], index))
    canvas = _Canvas(rng, size)
    canvas.paint_stuff()
    count = int(rng.choice(len(_THING_COUNT_PROBABILITIES), p=_THING_COUNT_PROBABILITIES))
    if count and rng.random() < _CROWD_PROBABILITY:
        canvas.paint_crowd()
        count = min(count, 3)
    # Large shapes first, or they would cover small ones.
    for radius in sorted(rng.uniform(*_RADIUS_RANGE, count), reverse=True):
        canvas.paint_thing(radius)
    if rng.random() < _VOID_PROBABILITY:
        canvas.paint_void()
    return canvas.finish()


# ---------------------------------------------------------------------------- colours, textures


def _rgb(hue_degrees: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue_degrees / 360 % 1, saturation, value), np.float32)


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Blends two RGB colours by `weight` [S, S] (0 = first) into float32 [S, S, 3]."""
    return cv2.merge([a + (b - a) * weight for a, b in zip(first, second, strict=True)])


def _rgb_weight(weight: np.ndarray) -> np.ndarray:
    """Repeats a weight [S, S] for the three channels: faster than broadcasting `[..., None]`."""
    return cv2.merge([weight, weight, weight])


def _clouds(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in 0..1, float32 [size, size], with `cells` random knots per side."""
    knots = rng.random((cells, cells), np.float32)
    return np.clip(cv2.resize(knots, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column coordinates in reference pixels, float32 [size, 1] and [1, size]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (_REFERENCE_SIZE / size)
    return axis[:, None], axis[None, :]


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    y, _ = _grid(size)
    hue = rng.uniform(196, 220)
    deep, pale = _rgb(hue, rng.uniform(0.45, 0.6), 0.92), _rgb(hue, 0.16, 0.98)
    texture = _mix(deep, pale, np.broadcast_to(y / _REFERENCE_SIZE, (size, size)))
    cover = np.clip((_clouds(rng, size, 6) - rng.uniform(0.5, 0.65)) * 3.5, 0, 0.85)
    return texture + (0.99 - texture) * _rgb_weight(cover)


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    hue, value = rng.uniform(85, 128), rng.uniform(0.5, 0.68)
    blades = cv2.blur(rng.random((size, size), np.float32), (1, max(3, 7 * size // 128)))
    weight = np.clip(0.5 + (blades - 0.5) * 2.4, 0, 1) * 0.75 + _clouds(rng, size, 5) * 0.25
    return _mix(_rgb(hue + 12, 0.75, value * 0.62), _rgb(hue, 0.62, value * 1.2), weight)


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    hue, value = rng.uniform(188, 222), rng.uniform(0.5, 0.66)
    length, height = rng.uniform(20, 36), rng.uniform(1.2, 2.4)
    waves = np.sin(
        2
        * np.pi
        * (y + height * np.sin(2 * np.pi * (x / length + rng.random())))
        / rng.uniform(8, 12)
    )
    crest = np.clip((waves - 0.55) * 2.2, 0, 1) * (0.45 + 0.55 * _clouds(rng, size, 8))
    base = _mix(_rgb(hue, 0.8, value * 0.85), _rgb(hue, 0.72, value * 1.1), _clouds(rng, size, 4))
    return base + (_rgb(hue, 0.2, 0.97) - base) * _rgb_weight(0.75 * crest)


def _brick_wall(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    hue, value = rng.uniform(4, 24), rng.uniform(0.55, 0.75)
    height = rng.uniform(8, 12)
    width = height * rng.uniform(1.8, 2.3)
    row = np.floor(y / height)
    shifted = x + (row % 2) * width / 2 + rng.uniform(0, width)
    column = np.floor(shifted / width)
    tint = rng.random(4096, np.float32)[((row * 61 + column) % 4096).astype(np.int32)]
    bricks = _mix(_rgb(hue, 0.62, value * 0.82), _rgb(hue + 6, 0.5, value * 1.1), tint)
    joint = (y % height < 1.5) | (shifted % width < 1.5)
    bricks[joint] = _rgb(35, 0.12, 0.82)
    return bricks


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    hue, value = rng.uniform(34, 48), rng.uniform(0.82, 0.96)
    ripples = 0.5 + 0.5 * np.sin(
        2 * np.pi * (x * rng.uniform(-0.35, 0.35) + y) / rng.uniform(14, 22)
        + 5 * _clouds(rng, size, 4)
    )
    grains = rng.random((size, size), np.float32)
    weight = 0.45 * ripples + 0.3 * grains + 0.25 * _clouds(rng, size, 5)
    return _mix(_rgb(hue - 4, 0.48, value * 0.8), _rgb(hue, 0.32, value), weight)


def _road(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    value = rng.uniform(0.32, 0.48)
    angle = rng.uniform(-0.35, 0.35)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    grains = rng.random((size, size), np.float32)
    texture = _mix(_rgb(230, 0.1, value * 0.82), _rgb(230, 0.06, value * 1.15), grains)
    lane = (across + rng.uniform(0, 30)) % rng.uniform(26, 34) < 3
    texture[lane & ((along + rng.uniform(0, 20)) % 20 < 12)] = _rgb(50, rng.uniform(0, 0.3), 0.95)
    return texture


_TEXTURES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "sky": _sky,
    "grass": _grass,
    "water": _water,
    "brick wall": _brick_wall,
    "sand": _sand,
    "road": _road,
}

# Stuff at the top, in the middle and at the bottom of a scene; repeats are more likely.
_TOPS = ("sky", "sky", "sky", "brick wall")
_MIDDLES = ("grass", "water", "brick wall", "sand")
_BOTTOMS = ("grass", "water", "sand", "road")


# -------------------------------------------------------------------------------------- shapes


def _polar(radii: np.ndarray) -> np.ndarray:
    angle = np.arange(len(radii)) * (2 * np.pi / len(radii)) - np.pi / 2
    return np.stack([radii * np.cos(angle), radii * np.sin(angle)], -1)


def _cross_outline() -> np.ndarray:
    a, b = 0.34, 0.95
    return np.array(
        [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a),
         (-b, -a), (-a, -a)]
    )  # fmt: skip


def _heart_outline() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16.5, -(y + 2.5) / 15.5], -1)


# Class name -> (outlines of about unit radius, hue in degrees, half width of the hue range, largest
# turn in degrees). A second outline is a hole.
_SHAPES: dict[str, tuple[tuple[np.ndarray, ...], float, float, float]] = {
    "circle": ((_polar(np.ones(48)),), 2, 18, 180),
    "square": ((_polar(np.full(4, 1.15)),), 225, 24, 180),
    "triangle": ((_polar(np.full(3, 1.15)),), 28, 16, 180),
    "star": ((_polar(np.where(np.arange(10) % 2, 0.48, 1.12)),), 52, 14, 180),
    "cross": ((_cross_outline(),), 275, 26, 180),
    "ring": ((_polar(np.ones(48)), _polar(np.full(48, 0.52))), 172, 26, 180),
    "heart": ((_heart_outline(),), 328, 22, 35),
}
_SUBPIXEL_BITS = 4


def _outlines(name: str, center: np.ndarray, radius: float, angle: float) -> list[np.ndarray]:
    """The outlines of a shape in fixed-point pixels, int32 [P, 1, 2] (x, y) each."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [
        np.round((center + radius * points @ turn) * 2**_SUBPIXEL_BITS)
        .astype(np.int32)
        .reshape(-1, 1, 2)
        for points in _SHAPES[name][0]
    ]


class _Canvas:
    """The scene while it is painted, back to front."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng = rng
        self.size = size
        self.scale = size / _REFERENCE_SIZE
        self.image = np.zeros((size, size, 3), np.float32)
        self.labels = np.zeros((size, size), np.uint8)  # 0 = void, i + 1 = kinds[i]
        self.kinds: list[tuple[int, bool]] = []  # (contiguous class, crowd)

    def _add(self, name: str, mask: np.ndarray, crowd: bool = False) -> None:
        self.kinds.append((INFO.class_names.index(name), crowd))
        self.labels[mask] = len(self.kinds)

    def _boundary(self, low: float, high: float, straight: bool) -> np.ndarray:
        """Draws a random line through the scene: position of the border per column, float32 [S]."""
        rng, axis = self.rng, np.linspace(0, 1, self.size, dtype=np.float32)
        height = 0.0 if straight else rng.uniform(0.01, 0.05)
        wave = np.sin(2 * np.pi * (axis * rng.uniform(0.6, 2.2) + rng.random()))
        slope = rng.uniform(-0.12, 0.12) * (axis - 0.5)
        return (rng.uniform(low, high) + slope + height * wave) * self.size

    def paint_stuff(self) -> None:
        rng, position = self.rng, np.arange(self.size, dtype=np.float32)
        top = str(rng.choice(_TOPS))
        names = [top, str(rng.choice([n for n in _BOTTOMS if n != top]))]
        layout = rng.choice(3, p=(0.4, 0.35, 0.25))
        if layout == 1:  # three bands
            names.insert(1, str(rng.choice([n for n in _MIDDLES if n not in names])))
            below = [self._boundary(0.2, 0.38, names[1] == "brick wall")]
            below.append(self._boundary(0.55, 0.75, False))
            regions = [position[:, None] >= border[None, :] for border in below]
        else:
            below = position[:, None] >= self._boundary(0.3, 0.65, top == "brick wall")[None, :]
            regions = [below]
            if layout == 2:  # the ground is split into left and right
                names.append(str(rng.choice([n for n in _BOTTOMS if n not in names])))
                right = position[None, :] >= self._boundary(0.3, 0.7, False)[:, None]
                regions.append(below & right)
        everywhere = np.ones((self.size, self.size), bool)
        for name, mask in zip(names, [everywhere, *regions], strict=True):
            cv2.copyTo(_TEXTURES[name](rng, self.size), mask.view(np.uint8), self.image)
            self._add(name, mask)

    def _paint_shape(self, outlines: list[np.ndarray], hue: float) -> np.ndarray:
        """Draws one shape with shadow, shading and outline; returns its mask, bool [S, S]."""
        rng, scale, size = self.rng, self.scale, self.size
        alpha = np.zeros((size, size), np.uint8)
        cv2.fillPoly(alpha, outlines, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        rim = np.zeros_like(alpha)
        thickness = max(1, round(1.6 * scale))
        cv2.polylines(rim, outlines, True, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
        mask = alpha >= 128

        # Only the box around the shape and its shadow changes.
        x, y, width, height = cv2.boundingRect(np.concatenate(outlines) >> _SUBPIXEL_BITS)
        margin = round(7 * scale)
        x0, x1 = max(x - margin, 0), min(x + width + margin, size)
        y0, y1 = max(y - margin, 0), min(y + height + margin, size)
        box = np.s_[y0:y1, x0:x1]
        image, opacity, edge = self.image[box], alpha[box] / np.float32(255), rim[box]

        shift = np.float32([[1, 0, 2 * scale], [0, 1, 3 * scale]])
        shadow = cv2.warpAffine(opacity, shift, opacity.shape[::-1])
        shadow = cv2.blur(shadow, (2 * round(2 * scale) + 1,) * 2)
        image *= _rgb_weight(1 - 0.35 * shadow)

        saturation, value = rng.uniform(0.6, 0.92), rng.uniform(0.72, 0.98)
        light = rng.uniform(0, 2 * np.pi)
        rows, columns = np.ogrid[y0:y1, x0:x1]
        along = np.cos(light) * (columns - x - width / 2) + np.sin(light) * (rows - y - height / 2)
        shade = np.clip(0.5 + along / max(width, height), 0, 1).astype(np.float32)
        color = _mix(
            _rgb(hue, min(1, saturation * 1.08), value * 0.78), _rgb(hue, saturation * 0.85, value),
            shade,
        )  # fmt: skip
        rim_color = _rgb(hue, min(1, saturation * 1.1), value * 0.45)
        color += (rim_color - color) * _rgb_weight(edge * np.float32(0.8 / 255))
        image += (color - image) * _rgb_weight(opacity)
        return mask

    def _hue(self, name: str) -> float:
        _, hue, spread, _ = _SHAPES[name]
        return hue + self.rng.uniform(-spread, spread)

    def _angle(self, name: str) -> float:
        return float(np.deg2rad(self.rng.uniform(-1, 1) * _SHAPES[name][3]))

    def _thing_name(self) -> str:
        return str(self.rng.choice(tuple(_SHAPES)))

    def _hides_too_much(self, outlines: list[np.ndarray]) -> bool:
        hidden = np.zeros((self.size, self.size), np.uint8)
        cv2.fillPoly(hidden, outlines, 1, cv2.LINE_8, _SUBPIXEL_BITS)
        after = np.bincount(self.labels[hidden == 1], minlength=len(self.kinds) + 1)
        before = np.bincount(self.labels.ravel(), minlength=len(self.kinds) + 1)
        return any(
            after[i + 1] > _MAX_HIDDEN * before[i + 1]
            for i, (category, _) in enumerate(self.kinds)
            if INFO.is_thing[category]
        )

    def paint_thing(self, radius: float) -> None:
        """Paints a shape of `radius` reference pixels, unless eight places are all too crowded."""
        name = self._thing_name()
        for _ in range(8):
            center = self.rng.uniform(0.1, 0.9, 2) * self.size
            outlines = _outlines(name, center, radius * self.scale, self._angle(name))
            if not self._hides_too_much(outlines):
                self._add(name, self._paint_shape(outlines, self._hue(name)))
                return

    def paint_crowd(self) -> None:
        """Paints a group of small shapes of one class as one segment marked iscrowd."""
        rng, name = self.rng, self._thing_name()
        columns, rows = int(rng.integers(4, 7)), int(rng.integers(2, 4))
        pitch = rng.uniform(9, 11)
        half = np.array([columns - 1, rows - 1]) * pitch / 2
        middle = rng.uniform(half + 5, _REFERENCE_SIZE - half - 5)
        mask = np.zeros((self.size, self.size), bool)
        for row in range(rows):
            for column in range(columns):
                center = middle - half + np.array([column, row]) * pitch + rng.uniform(-2, 2, 2)
                radius = rng.uniform(4.5, 6.5) * self.scale
                outlines = _outlines(name, center * self.scale, radius, self._angle(name))
                mask |= self._paint_shape(outlines, self._hue(name))
        self._add(name, mask, crowd=True)

    def paint_void(self) -> None:
        """Paints an unlabelled dark strip along an edge, or an unlabelled blob."""
        rng, size = self.rng, self.size
        y, x = _grid(size)
        if rng.random() < 0.5:
            width = rng.uniform(7, 15)
            distance = (y, _REFERENCE_SIZE - y, x, _REFERENCE_SIZE - x)[rng.integers(4)]
            mask = np.broadcast_to(distance < width, (size, size))
        else:
            center, radius = rng.uniform(16, 112, 2), rng.uniform(9, 18)
            angle = np.arctan2(y - center[0], x - center[1])
            lobes = 1 + 0.18 * np.sin(angle * rng.integers(3, 6) + rng.uniform(0, 2 * np.pi))
            mask = np.hypot(y - center[0], x - center[1]) < radius * lobes
        stripes = 0.1 + 0.08 * ((x + y) % 8 < 4)
        self.image[mask] = 0.12 * self.image[mask] + stripes[mask][:, None]
        self.labels[mask] = 0

    def finish(self) -> Scene:
        """Adds exposure and sensor noise; gives visible segments arbitrary 24-bit ids."""
        rng = self.rng
        noise = rng.standard_normal(self.labels.shape, np.float32) * rng.uniform(1, 5)
        image = self.image * (255 * rng.uniform(0.85, 1.08)) + _rgb_weight(noise)
        areas = np.bincount(self.labels.ravel(), minlength=len(self.kinds) + 1)
        ids = (1 + rng.choice(2**24 - 1, len(self.kinds), replace=False)).tolist()
        table, segments = np.zeros(256, np.int32), []
        for label, ((category, crowd), segment_id) in enumerate(
            zip(self.kinds, ids, strict=True), start=1
        ):
            if areas[label] >= _MIN_VISIBLE_AREA * self.scale**2:
                table[label] = segment_id
                segments.append(
                    {
                        "id": segment_id,
                        "category": category,
                        "iscrowd": crowd,
                        "area": int(areas[label]),
                    }
                )
        image = np.clip(image, 0, 255, out=image).astype(np.uint8)
        return Scene(image, table[self.labels], segments)
