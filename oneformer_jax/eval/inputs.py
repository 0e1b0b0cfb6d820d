"""Turns what people have (paths, PIL images, arrays) into the images that a `Segmenter` takes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from oneformer_jax import remote
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.images import ImageError

_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def read_image(path: str | os.PathLike[str], max_pixels: int = images.MAX_PIXELS) -> np.ndarray:
    """Reads an image file as uint8 [H, W, 3], RGB, upright, as in training (see `images`).

    Raises:
      ImageError: no such file, another format, damaged, or more than `max_pixels`.
    """
    if not remote.is_remote(path) and not os.path.exists(path):
        raise ImageError(f"{path}: there is no such image file")
    return images.decode_image(images.read_file(path), str(path), max_pixels=max_pixels)


def as_image(image: Any, max_pixels: int = images.MAX_PIXELS) -> np.ndarray:
    """Converts a path, a PIL image or an array into uint8 [H, W, 3], RGB, by the rules of `images`.

    Args:
      image: one of
        * a path of an image file;
        * a PIL image of any mode but 32 bits; its EXIF orientation is applied;
        * an array [H, W], or [H, W, C] with C of 1 (grey), 3 (RGB) or 4 (alpha is dropped): uint8;
          bool; uint16, scaled by its range as 16-bit files are; or floats from 0 to 1.
      max_pixels: limit of the pixels of files and PIL images.

    Raises:
      ImageError: a file or a PIL image that cannot be read.
      ValueError: another type, shape or range.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, max_pixels)
    if isinstance(image, Image.Image):
        return _from_pil(image, max_pixels)
    if isinstance(image, (list, tuple, dict, bytes)) or not hasattr(image, "__array__"):
        raise ValueError(
            f"an image is a path, a PIL image or an array, not {type(image).__name__}; several "
            "images are given as one flat list"
        )
    return _from_array(np.asarray(image))


def _from_pil(picture: Image.Image, max_pixels: int) -> np.ndarray:
    where = f"the PIL image {getattr(picture, 'filename', '') or picture.mode}"
    if picture.width * picture.height > max_pixels:
        raise ImageError(
            f"{where}: {picture.height} x {picture.width} pixels (height x width) are more than "
            f"{max_pixels:,}; make it smaller"
        )
    if picture.mode == "F":
        raise ImageError(f"{where}: floating-point values have no known range; use 8 or 16 bits")
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in _DEEP:
            return _from_array(_unsigned(np.asarray(picture), where))
        return np.array(picture.convert("RGB"))
    except ImageError:
        raise
    except Exception as error:  # it is decoded only now, and Pillow raises many types
        raise ImageError(f"{where} cannot be decoded: {error}") from error


def _unsigned(samples: np.ndarray, where: str) -> np.ndarray:
    if samples.size and (samples.min() < 0 or samples.max() > 65_535):
        raise ImageError(
            f"{where}: values from {samples.min()} to {samples.max()} have no known range; use 8 "
            "or 16 bits"
        )
    return samples.astype(np.uint16)


def _from_array(array: np.ndarray) -> np.ndarray:
    given = f"image is {array.dtype} {list(array.shape)}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; move its channels to the last axis: image.transpose(1, 2, 0)"
        elif array.ndim == 4:
            hint = "; give several images as a list"
        raise ValueError(f"{given}; expected [H, W], or [H, W, C] with 1, 3 or 4 channels{hint}")
    if not array.size:
        raise ValueError(f"{given}; it has no pixels")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = images.eight_bits(array)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise ValueError(
                f"{given} with values from {low:g} to {high:g}; floats must be from 0 to 1: scale "
                "them, or use uint8"
            )
        array = np.rint(np.asarray(array, np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{given}; expected uint8, uint16, bool, or floats from 0 to 1")
    if array.ndim == 2 or array.shape[2] == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return array if array.shape[2] == 3 else np.ascontiguousarray(array[..., :3])
