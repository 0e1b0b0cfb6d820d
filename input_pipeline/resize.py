"""Resizing of images and id maps; that of the test is the same in evaluation and prediction."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image


def shortest_edge_size(
    size: tuple[int, int], short_edge: float, max_size: float
) -> tuple[int, int]:
    """Scales the short side to `short_edge`, the long one to `max_size` at most: (height, width).

    The arithmetic is that of Detectron2's ResizeShortestEdge: sides are int(v + 0.5).
    """
    height, width = size
    scale = short_edge / min(height, width)
    if height < width:
        new_height, new_width = float(short_edge), scale * width
    else:
        new_height, new_width = scale * height, float(short_edge)
    longest = max(new_height, new_width)
    if longest > max_size:
        new_height, new_width = (v * (max_size / longest) for v in (new_height, new_width))
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def resize_for_test(image: np.ndarray, short_edge: int, max_size: int) -> np.ndarray:
    """Resizes as at the test: PIL bilinear on uint8, sides as `shortest_edge_size` says.

    Always PIL, so that published scores are compared on the very pixels of the official evaluation.

    Args:
      image: uint8 [H, W, 3].
      short_edge: length of the short side, in pixels.
      max_size: cap of the long side, in pixels.

    Returns:
      uint8 [h, w, 3].
    """
    return _resize_pil(image, shortest_edge_size(image.shape[:2], short_edge, max_size))


def resize_to_fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes as at the test, keeping the aspect, to the largest size within (height, width).

    Returns:
      uint8 [h, w, 3] with h or w that of `size`; `image` itself where it fits already.
    """
    scale = min(limit / side for limit, side in zip(size, image.shape[:2], strict=True))
    height, width = (
        min(limit, max(1, int(side * scale + 0.5)))
        for limit, side in zip(size, image.shape[:2], strict=True)
    )
    if (height, width) == image.shape[:2]:
        return image
    return _resize_pil(image, (height, width))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes bilinearly with antialiasing, to the result of PIL but for one grey level.

    OpenCV is used where no side shrinks: there antialiasing plays no part, and it is many times
    faster.

    Args:
      image: uint8 [H, W, 3].
      size: (height, width) of the result.

    Returns:
      uint8 [height, width, 3].
    """
    height, width = size
    if (height, width) == image.shape[:2]:
        return image
    if height >= image.shape[0] and width >= image.shape[1]:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return _resize_pil(image, size)


def resize_ids(panoptic: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an int32 [H, W] id map to (height, width) by nearest neighbours, equal to PIL."""
    height, width = size
    if (height, width) == panoptic.shape:
        return panoptic
    # INTER_NEAREST is half a pixel off; INTER_NEAREST_EXACT reads the pixel under the centre.
    return cv2.resize(panoptic, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _resize_pil(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
