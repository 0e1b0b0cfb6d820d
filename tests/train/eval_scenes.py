"""Evaluation batches with a known answer: in a scene every class of `tiny` has one segment."""

import numpy as np

from tests import tiny

SIDE, INPUT = 128, 64  # original and test-time size
# Things of COCO's three size ranges, in multiples of the 8 original pixels of a mask logit.
_BOXES = {3: (0, 0, 128, 128), 4: (104, 0, 128, 128), 0: (0, 0, 104, 96)}
_BOXES |= {1: (0, 96, 40, 128), 2: (40, 96, 64, 120)}


def class_map(number: int) -> np.ndarray:
    """int [SIDE, SIDE] of class ids: the scene, mirrored in its two ways by turns."""
    result = np.zeros((SIDE, SIDE), np.int64)
    for category, (top, left, bottom, right) in _BOXES.items():
        result[top:bottom, left:right] = category
    return result[:: (-1) ** number, :: (-1) ** (number // 2)]


def record(number: int) -> dict:
    classes = class_map(number)
    segments = [
        dict(id=c + 1, category=c, iscrowd=False, area=int((classes == c).sum()))
        for c in range(tiny.CLASSES)
    ]
    return dict(
        image=image(classes),
        panoptic=(classes + 1).astype(np.int32),
        segments=segments,
        image_id=f"scene {number}",
        file_name=f"{number}.png",
    )


def image(classes: np.ndarray) -> np.ndarray:
    """Red says the class: 40 times its id."""
    return np.stack([40 * classes, 255 - 30 * classes, 0 * classes + 90], -1).astype(np.uint8)


def batches(limit: int = 0, count: int = 3, size: int = 2) -> list[dict]:
    """One pass over the first `limit` (0: all) of `count` scenes; the last batch is filled up."""
    count = min(limit or count, count)
    found = []
    for first in range(0, count, size):
        records = [record(i) if i < count else None for i in range(first, first + size)]
        valid = np.array([r is not None for r in records])
        images = np.zeros((size, INPUT, INPUT, 3), np.uint8)
        for row in np.flatnonzero(valid):
            images[row] = records[row]["image"][::2, ::2]
        found.append(
            dict(
                image=images,
                image_size=np.full((size, 2), INPUT, np.int32),
                original_size=np.where(valid[:, None], SIDE, INPUT).astype(np.int32).repeat(2, 1),
                valid=valid,
                index=np.where(valid, first + np.arange(size), -1).astype(np.int32),
                records=records,
            )
        )
    return found
