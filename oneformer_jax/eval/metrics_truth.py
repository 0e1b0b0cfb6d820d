"""The ground truth of one image as the metrics read it, and the checks they share."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

# Keys: panoptic, segments, image_id (see metrics.py).
Record = Mapping[str, Any]

# Segment ids are colours of an 8-bit RGB picture.
_MAX_SEGMENT_ID = 256**3 - 1


class Truth(typing.NamedTuple):
    """Ground truth with dense segment numbers.

    Attributes:
      index: int32 [H, W]; 0 is void, i + 1 is segment i of the record.
      classes, crowd, areas: int64, bool, int64 [G]; `areas` are those of the annotation file.
      pixels: int64 [G + 1], pixel counts; the first is void.
    """

    index: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    pixels: np.ndarray


def dense_segments(
    segment_map: np.ndarray, ids: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Dense numbers (0 = void, i + 1 = ids[i]) of a segment map, and the pixels of each number.

    Raises ValueError for a repeated id, an id out of range, and a pixel whose id is not listed.
    """
    if segment_map.ndim != 2:
        raise ValueError(f"{where}: the segment map has shape {segment_map.shape}, not [H, W]")
    if len(np.unique(ids)) != len(ids):
        raise ValueError(f"{where}: a segment id is listed more than once: {sorted(ids.tolist())}")
    everything = np.concatenate([ids, [segment_map.min(), segment_map.max()]])
    if everything.min() < 0 or everything.max() > _MAX_SEGMENT_ID or (ids == 0).any():
        raise ValueError(
            f"{where}: segment ids must be in 1..{_MAX_SEGMENT_ID} (0 is void), found "
            f"{everything.min()}..{everything.max()}"
        )
    # A lookup table is ten times faster than np.unique with its inverse; its untouched pages
    # cost no memory, however large the ids are.
    table = np.zeros(int(everything.max()) + 1, np.int32)
    table[ids] = np.arange(1, len(ids) + 1)
    index = table[segment_map]
    pixels = np.bincount(index.ravel(), minlength=len(ids) + 1)
    if pixels[0] != np.count_nonzero(segment_map == 0):
        unlisted = np.unique(segment_map[(index == 0) & (segment_map != 0)])
        raise ValueError(
            f"{where}: the segment map has ids that the list of segments lacks: "
            f"{unlisted[:10].tolist()}"
        )
    return index, pixels


def read_truth(record: Record, num_classes: int) -> Truth:
    segments = record["segments"]
    where = f"ground truth of image {record['image_id']}"
    classes = np.array([s["category"] for s in segments], np.int64)
    check_classes(classes, num_classes, where)
    index, pixels = dense_segments(
        record["panoptic"], np.array([s["id"] for s in segments], np.int64), where
    )
    return Truth(
        index=index,
        classes=classes,
        crowd=np.array([s["iscrowd"] for s in segments], bool),
        areas=np.array([s["area"] for s in segments], np.int64),
        pixels=pixels,
    )


def check_classes(classes: np.ndarray, num_classes: int, where: str) -> None:
    bad = classes[(classes < 0) | (classes >= num_classes)]
    if bad.size:
        raise ValueError(
            f"{where}: class id {bad[0]} is not in 0..{num_classes - 1}; the metadata of the model "
            "and the dataset must name the same classes"
        )


def check_size(predicted: tuple[int, ...], truth: tuple[int, ...], record: Record) -> None:
    if predicted != truth:
        raise ValueError(
            f"image {record['image_id']}: the prediction has size {predicted}, the ground truth "
            f"{truth}; predictions are scored at the original size of the image"
        )


def check_mergeable(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    if not np.array_equal(ours, theirs):
        raise ValueError(f"cannot merge two {name} states made for different classes")


def semantic_truth(record: Record, num_classes: int, ignore_label: int = 255) -> np.ndarray:
    """Semantic map of a panoptic ground truth, int32 [H, W].

    As in the conversion that the official evaluation on COCO uses, every segment, crowd or not,
    takes the class of its segment; void pixels become `ignore_label`.
    """
    truth = read_truth(record, num_classes)
    return np.append(ignore_label, truth.classes).astype(np.int32)[truth.index]


def mean(values: np.ndarray) -> float:
    """Mean of a possibly empty array; NaN where it is empty."""
    return float(values.mean()) if values.size else float("nan")
