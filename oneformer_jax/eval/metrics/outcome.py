"""Describes a model's mistakes in one image; each metric's `update` returns it."""

from __future__ import annotations

import collections
import typing

import numpy as np

NOTHING = -1  # in place of a class: nothing is there
CONFIDENT = 0.5  # instances of a lower score are neither right nor wrong here


class Outcome(typing.NamedTuple):
    """The outcome of one image.

    Attributes:
      score: percent, of this image alone; None if it has nothing to score.
      mistakes: (true class, predicted class, amount), the gravest first. `NOTHING` as the predicted
        class is a segment that was missed, as the true one a segment that was invented. The amount
        is a number of segments or, for a semantic map, percent of the image's pixels.
    """

    score: float | None
    mistakes: list[tuple[int, int, float]]


def of_segments(
    true: np.ndarray,
    predicted: np.ndarray,
    iou: np.ndarray,
    missed: np.ndarray,
    wrong: np.ndarray,
    score: float | None,
) -> Outcome:
    """Pairs missed and wrong segments that lie on each other: their classes were confused.

    Args:
      true, predicted: int [G] and [P], classes of the segments.
      iou: float [G, P].
      missed, wrong: bool [G] and [P], segments without a match.
      score: of the image, in percent.
    """
    wrong = wrong.copy()
    pairs = []
    for g in np.flatnonzero(missed):
        overlaps = np.where(wrong, iou[g], 0.0)
        p = int(overlaps.argmax()) if len(overlaps) else 0
        if len(overlaps) and overlaps[p] > 0.5:
            wrong[p] = False
            pairs.append((int(true[g]), int(predicted[p])))
        else:
            pairs.append((int(true[g]), NOTHING))
    pairs += [(NOTHING, int(c)) for c in predicted[wrong]]
    ranked = sorted(collections.Counter(pairs).items(), key=lambda item: (-item[1], item[0]))
    return Outcome(score, [(t, p, float(number)) for (t, p), number in ranked])


def of_instances(
    true: np.ndarray,
    crowd: np.ndarray,
    predicted: np.ndarray,
    scores: np.ndarray,
    iou: np.ndarray,
) -> Outcome:
    """Matches the confident detections, best first, at IoU 0.5; the score is their F1.

    Args:
      true, crowd: int and bool [G], classes of the instances.
      predicted, scores: int and float [P], all detections.
      iou: float [G, P]; of a crowd: the share of the detection that lies on it, which excuses it.
    """
    confident = scores >= CONFIDENT
    predicted, iou = predicted[confident], iou[:, confident]
    missed, wrong = ~crowd, np.ones(len(predicted), bool)
    right = 0
    for p in np.argsort(-scores[confident], kind="stable"):
        same = np.where(true == predicted[p], iou[:, p], 0.0)
        free = np.where(missed, same, 0.0)
        if len(free) and free.max() > 0.5:
            missed[free.argmax()] = False
            wrong[p] = False
            right += 1
        elif (same[crowd] > 0.5).any():
            wrong[p] = False
    whole = 2 * right + int(missed.sum()) + int(wrong.sum())
    score = 200.0 * right / whole if whole else None
    return of_segments(true, predicted, iou, missed, wrong, score)


def of_pixels(true: np.ndarray, predicted: np.ndarray, pixels: np.ndarray) -> Outcome:
    """Scores a semantic map by the mean IoU of the image's classes.

    Args:
      true, predicted, pixels: int [N], distinct pairs of classes and their pixels.
    """
    total = int(pixels.sum())
    if not total:
        return Outcome(None, [])
    classes, place = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    rows, columns = place[: len(true)], place[len(true) :]
    hit = rows == columns
    hits = np.bincount(rows[hit], pixels[hit], minlength=len(classes))
    union = np.bincount(rows, pixels, len(classes)) + np.bincount(columns, pixels, len(classes))
    score = 100 * float((hits / (union - hits)).mean())
    order = [i for i in np.argsort(-pixels, kind="stable") if not hit[i]]
    return Outcome(
        score, [(int(true[i]), int(predicted[i]), 100 * int(pixels[i]) / total) for i in order[:5]]
    )
