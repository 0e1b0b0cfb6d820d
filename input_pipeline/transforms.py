"""Augmentation, as in the official dataset mappers.

A training transform is a function `(rng, record, config) -> record`: it reads `image` (uint8
[H, W, 3] RGB) and `panoptic` (int32 [H, W] segment ids, 0 = void), draws only from `rng`, leaves
its input unchanged and keeps the other keys. They form two chains:

- "unified" (ADE20K, Cityscapes, Mapillary Vistas): short edge to a random size, random crop,
  colour jitter as in SSD, horizontal flip, padding (official `oneformer_unified` mapper);
- "lsj" (COCO): horizontal flip, large-scale jitter, fixed-size crop, padding (official
  `coco_unified_lsj` mapper).

"none" only pads. Every chain returns images of exactly `crop_size`. Images are padded with 128 on
the right and at the bottom before normalisation, id maps with 0 (void).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from oneformer_jax import config_rules, rules
from oneformer_jax.input_pipeline.resize import resize_ids, resize_image, shortest_edge_size

Record = Mapping[str, Any]

PAD_VALUE = 128  # of training images; test-time padding is 0
_CROP_SIZE = rules.Tuple(rules.Integer(1, 65_536), 2, 2, note=", (height, width)")
_NUM_SCALES = 16  # sizes of the short edge between the ends of `AugmentConfig.scale`


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images; ValueError names the config key of a bad value.

    Attributes:
      kind: "unified", "lsj" or "none" (see the module's docstring).
      crop_size: (height, width) of every training image, in pixels.
      short_edge: unified: base of the short edge, in pixels.
      scale: unified: smallest and largest multiple of the base; the short edge is one of 16 evenly
        spaced sizes between them, rounded down.
      max_size: unified: cap of the long edge, in pixels.
      color: unified: jitter the colours.
      brightness: largest brightness offset, in grey levels.
      contrast: range of the contrast factor.
      saturation: range of the saturation factor.
      hue: largest hue offset, in OpenCV's steps of 2 degrees.
      lsj_scale: lsj: range of the scale of the box of `crop_size` that the image is fitted into.
      flip_prob: unified and lsj: probability of a horizontal flip.
    """

    kind: str = "lsj"
    crop_size: tuple[int, int] = (1024, 1024)
    short_edge: int = 640
    scale: tuple[float, float] = (0.5, 2.0)
    max_size: int = 2560
    color: bool = True
    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18
    lsj_scale: tuple[float, float] = (0.1, 2.0)
    flip_prob: float = 0.5

    def __post_init__(self) -> None:
        config_rules.require_fields("data.augment", self, but=("crop_size",))
        # Multiples of 32 are what a model needs: see `loader.LoaderConfig`.
        rules.require("data.", {"crop_size": self.crop_size}, {"crop_size": _CROP_SIZE})

    def short_edges(self) -> tuple[int, ...]:
        """Returns the 16 sizes of the short edge from which "unified" draws, in pixels."""
        low, high = self.scale
        # The small addend keeps 0.7 * 640 at 448 whatever the rounding of the product.
        return tuple(int(s * self.short_edge + 1e-6) for s in np.linspace(low, high, _NUM_SCALES))


def _with(record: Record, image: np.ndarray, panoptic: np.ndarray) -> dict[str, Any]:
    return {**record, "image": image, "panoptic": panoptic}


def random_shortest_edge(
    rng: np.random.Generator, record: Record, config: AugmentConfig
) -> dict[str, Any]:
    """Scales the short edge to a random one of `config.short_edges()`."""
    short_edge = config.short_edges()[rng.integers(_NUM_SCALES)]
    size = shortest_edge_size(record["panoptic"].shape, short_edge, config.max_size)
    return _with(record, resize_image(record["image"], size), resize_ids(record["panoptic"], size))


def random_crop(rng: np.random.Generator, record: Record, config: AugmentConfig) -> dict[str, Any]:
    """Cuts a uniformly placed window of at most `crop_size` (smaller sides are kept whole)."""
    image, panoptic = record["image"], record["panoptic"]
    height, width = (min(c, s) for c, s in zip(config.crop_size, panoptic.shape, strict=True))
    top = int(rng.integers(panoptic.shape[0] - height + 1))
    left = int(rng.integers(panoptic.shape[1] - width + 1))
    window = np.s_[top : top + height, left : left + width]
    return _with(record, image[window], panoptic[window])


def _affine_table(alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    """uint8 [256]: every grey level times alpha plus beta, clipped and truncated."""
    levels = np.arange(256, dtype=np.float32) * alpha + beta
    return np.clip(levels, 0, 255).astype(np.uint8)


def _hsv_table(channel: int, table: np.ndarray) -> np.ndarray:
    """uint8 [1, 256, 3] lookup table that changes one channel of an HSV image."""
    tables = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    tables[0, :, channel] = table
    return tables


def _change_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, _hsv_table(channel, table)), cv2.COLOR_HSV2RGB)


def _random_contrast(rng: np.random.Generator, image: np.ndarray, c: AugmentConfig) -> np.ndarray:
    if rng.integers(2):
        return cv2.LUT(image, _affine_table(alpha=rng.uniform(*c.contrast)))
    return image


def _random_saturation(rng: np.random.Generator, image: np.ndarray, c: AugmentConfig) -> np.ndarray:
    if rng.integers(2):
        return _change_hsv(image, 1, _affine_table(alpha=rng.uniform(*c.saturation)))
    return image


def _random_hue(rng: np.random.Generator, image: np.ndarray, c: AugmentConfig) -> np.ndarray:
    if rng.integers(2):
        offset = int(rng.integers(-c.hue, c.hue, endpoint=True))
        # 8-bit hue lies in 0..179, two degrees a step.
        return _change_hsv(image, 0, ((np.arange(256) + offset) % 180).astype(np.uint8))
    return image


def random_color(rng: np.random.Generator, record: Record, config: AugmentConfig) -> dict[str, Any]:
    """Jitters the colours as SSD does (Detectron2's ColorAugSSDTransform); keeps the id map.

    Brightness comes first, then contrast, saturation, hue or, as often, saturation, hue, contrast.
    Each of the four acts with probability one half. On uint8 each is a table of 256 levels per
    channel, which gives exactly the values of the arithmetic.
    """
    image = np.ascontiguousarray(record["image"])
    if rng.integers(2):
        offset = rng.uniform(-config.brightness, config.brightness)
        image = cv2.LUT(image, _affine_table(beta=offset))
    steps = [_random_contrast, _random_saturation, _random_hue]
    if not rng.integers(2):
        steps = [_random_saturation, _random_hue, _random_contrast]
    for step in steps:
        image = step(rng, image, config)
    return _with(record, image, record["panoptic"])


def random_flip(rng: np.random.Generator, record: Record, config: AugmentConfig) -> dict[str, Any]:
    """Mirrors image and ids left to right with probability `flip_prob`."""
    if rng.random() >= config.flip_prob:
        return dict(record)
    image = np.ascontiguousarray(record["image"])
    panoptic = np.ascontiguousarray(record["panoptic"])
    return _with(record, cv2.flip(image, 1), cv2.flip(panoptic, 1))


def large_scale_jitter(
    rng: np.random.Generator, record: Record, config: AugmentConfig
) -> dict[str, Any]:
    """Fits the image, aspect kept, into a box of `crop_size` times a uniform random scale.

    Sides are rounded to the nearest integer, halves to even (Detectron2's ResizeScale).
    """
    scale = rng.uniform(*config.lsj_scale)
    shape = record["panoptic"].shape
    factor = min(c * scale / s for c, s in zip(config.crop_size, shape, strict=True))
    size = tuple(max(round(s * factor), 1) for s in shape)
    return _with(record, resize_image(record["image"], size), resize_ids(record["panoptic"], size))


def fixed_size_crop(
    rng: np.random.Generator, record: Record, config: AugmentConfig
) -> dict[str, Any]:
    """Cuts a random window of `crop_size`; pads an image that is smaller.

    As in Detectron2's FixedSizeCrop, offset = round(excess * u) with the same u for both axes.
    """
    fraction = rng.random()
    top, left = (
        round(max(s - c, 0) * fraction)
        for s, c in zip(record["panoptic"].shape, config.crop_size, strict=True)
    )
    window = np.s_[top : top + config.crop_size[0], left : left + config.crop_size[1]]
    return pad(rng, _with(record, record["image"][window], record["panoptic"][window]), config)


def pad(rng: np.random.Generator, record: Record, config: AugmentConfig) -> dict[str, Any]:
    """Pads to `crop_size` on the right and at the bottom: image 128, ids 0."""
    del rng
    shape = record["panoptic"].shape
    if shape[0] > config.crop_size[0] or shape[1] > config.crop_size[1]:
        raise ValueError(
            f"{record.get('file_name', 'image')}: {shape[0]} x {shape[1]} pixels do not fit into "
            f"data.crop_size {tuple(config.crop_size)}; enlarge it, or choose a data.augment.kind "
            'that crops ("unified" or "lsj")'
        )
    return _with(
        record,
        pad_image(record["image"], config.crop_size, PAD_VALUE),
        pad_image(record["panoptic"], config.crop_size, 0),
    )


def pad_image(image: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    """Pads [H, W] or [H, W, C] on the right and at the bottom to (height, width) with `value`."""
    height, width = image.shape[:2]
    if (height, width) == tuple(size):
        return np.ascontiguousarray(image)
    padded = np.full((*size, *image.shape[2:]), value, image.dtype)
    padded[:height, :width] = image
    return padded


_Transform = Callable[[np.random.Generator, Record, AugmentConfig], dict[str, Any]]


def chain(config: AugmentConfig) -> tuple[_Transform, ...]:
    """Returns the transforms of `config.kind`, in the order of the official mapper."""
    if config.kind == "lsj":
        return (random_flip, large_scale_jitter, fixed_size_crop)
    if config.kind == "none":
        return (pad,)
    color = (random_color,) if config.color else ()
    return (random_shortest_edge, random_crop, *color, random_flip, pad)


def augment(rng: np.random.Generator, record: Record, config: AugmentConfig) -> dict[str, Any]:
    """Applies the chain of `config.kind`; image and id map of the result have `crop_size`."""
    for transform in chain(config):
        record = transform(rng, record, config)
    return dict(record)
