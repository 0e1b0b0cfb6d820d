"""The ground truth of one image, and the checks that the metrics share."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

# Keys: panoptic, segments, image_id (see the package).
Record = Mapping[str, Any]

# Segment ids are the colours of an 8-bit RGB picture.
_MAX_SEGMENT_ID = 256**3 - 1


class Segments(typing.NamedTuple):
    """The list of segments of a record.

    Attributes:
      ids, classes, areas: int64 [G]; `areas` are those of the annotation file.
      crowd: bool [G].
      where: name of the record in messages.
    """

    ids: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    where: str


def read_segments(record: Record, num_classes: int) -> Segments:
    """Reads the segments of a record; ValueError for a class id out of range."""
    segments = record["segments"]
    where = f"ground truth of image {record['image_id']}"
    classes = np.array([s["category"] for s in segments], np.int64)
    check_classes(classes, num_classes, where)
    return Segments(
        ids=np.array([s["id"] for s in segments], np.int64),
        classes=classes,
        crowd=np.array([s["iscrowd"] for s in segments], bool),
        areas=np.array([s["area"] for s in segments], np.int64),
        where=where,
    )


def segment_numbers(segment_ids: np.ndarray, ids: np.ndarray, where: str) -> np.ndarray:
    """Maps segment ids of any shape to dense numbers (0 = void, i + 1 = ids[i]), int32.

    Raises ValueError for a repeated id, an id out of range, or one that `ids` lacks.
    """
    if len(np.unique(ids)) != len(ids):
        raise ValueError(f"{where}: a segment id is listed more than once: {sorted(ids.tolist())}")
    everything = np.concatenate([ids, [segment_ids.min(), segment_ids.max()]])
    if everything.min() < 0 or everything.max() > _MAX_SEGMENT_ID or (ids == 0).any():
        raise ValueError(
            f"{where}: segment ids must be in 1..{_MAX_SEGMENT_ID} (0 is void), found "
            f"{everything.min()}..{everything.max()}"
        )
    if not len(ids):
        ids = np.zeros(1, np.int64)  # lets every pixel be void
    order = np.argsort(ids)
    known = ids[order].astype(segment_ids.dtype)
    place = np.minimum(np.searchsorted(known, segment_ids), len(known) - 1)
    listed = (known[place] == segment_ids) & (segment_ids != 0)
    numbers = np.where(listed, order[place] + 1, 0).astype(np.int32)
    unlisted = ~listed & (segment_ids != 0)
    if unlisted.any():
        raise ValueError(
            f"{where}: the segment map has ids that the list of segments lacks: "
            f"{np.unique(segment_ids[unlisted])[:10].tolist()}"
        )
    return numbers


def runs(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits two maps of one size into runs of equal pairs of values, row by row.

    Segments are far larger than a pixel, so an image has some thousand runs, and work on each costs
    little beside the one comparison of neighbouring pixels.

    Args:
      truth, predicted: int [H, W].

    Returns:
      The values of both maps in each of R runs, and the pixels of the runs, int64 [R].
    """
    truth, predicted = truth.ravel(), predicted.ravel()
    changes = (truth[1:] != truth[:-1]) | (predicted[1:] != predicted[:-1])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    return truth[starts], predicted[starts], np.diff(starts, append=truth.size)


def segment_map(record: Record, truth: Segments) -> np.ndarray:
    """Returns int32 [H, W]: the dense numbers of a record's segments, see `segment_numbers`."""
    panoptic = record["panoptic"]
    ids, _, lengths = runs(panoptic, panoptic)
    numbers = segment_numbers(ids, truth.ids, truth.where)
    return np.repeat(numbers, lengths).reshape(panoptic.shape)


def count_pairs(
    rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Returns int64 table of `shape`: the sum of `weights` for each pair of a row and a column."""
    codes = rows.astype(np.int64) * shape[1] + columns
    # bincount adds in float64, which is exact for any image.
    counts = np.bincount(codes, weights, minlength=shape[0] * shape[1])
    return counts.astype(np.int64).reshape(shape)


def check_classes(classes: np.ndarray, num_classes: int, where: str) -> None:
    bad = classes[(classes < 0) | (classes >= num_classes)]
    if bad.size:
        raise ValueError(
            f"{where}: class id {bad[0]} is not in 0..{num_classes - 1}; the metadata of the model "
            "and the dataset must name the same classes"
        )


def check_size(predicted: tuple[int, ...], record: Record) -> None:
    """Raises ValueError unless a prediction has the size of the record's segment map."""
    truth = record["panoptic"].shape
    if len(truth) != 2:
        raise ValueError(
            f"ground truth of image {record['image_id']}: the segment map has shape {truth}, not "
            "[H, W]"
        )
    if predicted != truth:
        raise ValueError(
            f"image {record['image_id']}: the prediction has size {predicted}, the ground truth "
            f"{truth}; predict at the original size of the image"
        )


def check_mergeable(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    if not np.array_equal(ours, theirs):
        raise ValueError(f"cannot merge two {name} states of different classes")


def check_new_images(ours: Set[str], theirs: Set[str]) -> None:
    """Raises ValueError if two sets of image ids overlap."""
    twice = sorted(ours & theirs)
    if twice:
        raise ValueError(
            f"image {twice[0]} was scored twice; every image of the dataset needs its own "
            "image_id, and belongs to one process only"
        )


def ratio(part: np.ndarray, whole: np.ndarray, where: np.ndarray | bool = True) -> np.ndarray:
    """Divides part / whole, [N]; NaN where `whole` is 0 or `where` False."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=where & (whole > 0))


def mean(values: np.ndarray) -> float:
    """Returns the mean of an array; NaN if it is empty."""
    return float(values.mean()) if values.size else float("nan")
