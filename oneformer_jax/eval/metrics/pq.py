"""Panoptic quality (arXiv 1801.00868) as a mergeable state; see the package for its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from oneformer_jax.eval.metrics.outcome import Outcome, of_segments
from oneformer_jax.eval.metrics.truth import (
    Record,
    check_classes,
    check_mergeable,
    check_size,
    count_pairs,
    mean,
    ratio,
    read_segments,
    runs,
    segment_numbers,
)
from oneformer_jax.eval.segmentation import Segmentation

# Attributes of `PanopticQuality` that add up over images.
_SUMS = ("iou_sum", "tp", "fp", "fn", "images")


class PanopticQuality:
    """Panoptic quality (Kirillov et al., arXiv 1801.00868) as `panopticapi` computes it.

    A predicted and a true segment match if they have the same class, IoU > 0.5, and the true one
    is no crowd. In the union, the true segment has its annotated area, or its pixels if these are
    more; the predicted one counts without its void pixels. An unmatched prediction is ignored if
    more than half of it lies on void and on the last crowd segment of its class. The means exclude
    classes without any true positive, false positive or false negative.
    """

    def __init__(self, is_thing: Sequence[bool] | np.ndarray):
        self.is_thing = np.array(is_thing, bool)
        classes = len(self.is_thing)
        self.iou_sum = np.zeros(classes, np.float64)
        self.tp = np.zeros(classes, np.int64)
        self.fp = np.zeros(classes, np.int64)
        self.fn = np.zeros(classes, np.int64)
        self.images = 0

    def update(self, segmentation: Segmentation, record: Record) -> Outcome:
        """Adds one image; the outcome's score is its PQ with all classes as one.

        Args:
          segmentation: `segments` int [H, W] (0 = nothing) and `segments_info` (`id`,
            `category_id`, both as in `Segmentation`).
          record: the ground truth.

        Raises:
          ValueError: sizes differ, a class id is out of range, or a segment map disagrees with its
            list of segments.
        """
        num_classes = len(self.is_thing)
        where = f"prediction for image {record['image_id']}"
        truth = read_segments(record, num_classes)
        check_size(segmentation.segments.shape, record)
        info = segmentation.segments_info
        classes = np.array([s["category_id"] for s in info], np.int64)
        check_classes(classes, num_classes, where)

        # pairs[g, p]: pixels of true segment g (0 = void) under predicted segment p (0 = nothing).
        true_ids, predicted_ids, lengths = runs(record["panoptic"], segmentation.segments)
        pairs = count_pairs(
            segment_numbers(true_ids, truth.ids, truth.where),
            segment_numbers(predicted_ids, np.array([s["id"] for s in info], np.int64), where),
            lengths,
            (len(truth.ids) + 1, len(info) + 1),
        )
        areas = pairs.sum(axis=0)[1:]
        if (areas == 0).any():
            raise ValueError(f"{where}: segment {info[int(areas.argmin())]['id']} has no pixel")
        on_void = pairs[0, 1:]
        overlap = pairs[1:, 1:]

        pixels = pairs.sum(axis=1)[1:]
        if (truth.areas < pixels).any():
            g = int((truth.areas < pixels).argmax())
            logging.log_first_n(
                logging.WARNING,
                "%s: segment %d has area %d but %d pixels. PQ uses the pixels wherever an area is "
                "too small; correct the annotation",
                1,
                truth.where,
                truth.ids[g],
                truth.areas[g],
                pixels[g],
            )
        true_areas = np.maximum(truth.areas, pixels)
        union = true_areas[:, None] + (areas - on_void)[None] - overlap
        candidate = (overlap > 0) & (truth.classes[:, None] == classes[None])
        candidate &= ~truth.crowd[:, None]
        iou = np.divide(overlap, union, out=np.full(union.shape, np.inf), where=union > 0)
        matched = candidate & (iou > 0.5)
        truth_of_match, _ = np.nonzero(matched)
        match_classes = truth.classes[truth_of_match]

        missed = ~matched.any(axis=1) & ~truth.crowd
        forgiven = on_void.copy()
        last_crowd = {int(truth.classes[g]): g for g in np.flatnonzero(truth.crowd)}
        for p, c in enumerate(classes):
            if int(c) in last_crowd:
                forgiven[p] += overlap[last_crowd[int(c)], p]
        wrong = ~matched.any(axis=0) & ~(forgiven / areas > 0.5)

        self.tp += np.bincount(match_classes, minlength=num_classes)
        self.iou_sum += np.bincount(match_classes, weights=iou[matched], minlength=num_classes)
        self.fn += np.bincount(truth.classes[missed], minlength=num_classes)
        self.fp += np.bincount(classes[wrong], minlength=num_classes)
        self.images += 1
        weight = len(match_classes) + (missed.sum() + wrong.sum()) / 2
        score = float(100 * iou[matched].sum() / weight) if weight else None
        apart = np.where(overlap > 0, iou, 0.0)  # an empty union is no overlap
        return of_segments(truth.classes, classes, apart, missed, wrong, score)

    def merge(self, other: PanopticQuality) -> None:
        """Adds the images that `other` has seen."""
        check_mergeable("PanopticQuality", self.is_thing, other.is_thing)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def state(self) -> dict[str, np.ndarray]:
        """Packs the state in arrays of fixed size: four of [K], a scalar, and class kinds [K]."""
        return {"is_thing": self.is_thing} | {n: np.array(getattr(self, n)) for n in _SUMS}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> PanopticQuality:
        metric = cls(state["is_thing"])
        for name in _SUMS:
            setattr(metric, name, np.array(state[name]))
        metric.images = int(state["images"])
        return metric

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns PQ, SQ and RQ in percent, and their counts, float64 [K]; NaN: class unseen."""
        weight = self.tp + 0.5 * self.fp + 0.5 * self.fn
        found = {
            "PQ": 100 * ratio(self.iou_sum, weight),
            "SQ": 100 * ratio(self.iou_sum, np.maximum(self.tp, 1), weight > 0),
            "RQ": 100 * ratio(self.tp, weight),
        }
        found |= {name: getattr(self, name).astype(np.float64) for name in ("tp", "fp", "fn")}
        return {f"panoptic/{name}": column for name, column in found.items()}

    def _groups(self) -> dict[str, np.ndarray]:
        """Suffix of the metric names -> bool [K], the classes of the mean."""
        seen = (self.tp + self.fp + self.fn) > 0
        return {"": seen, "_things": seen & self.is_thing, "_stuff": seen & ~self.is_thing}

    def compute(self) -> dict[str, float]:
        """Returns `panoptic/PQ`, `SQ`, `RQ`, each also with `_things` and `_stuff`, in percent."""
        table = self.per_class()
        return {
            f"panoptic/{name}{suffix}": mean(table[f"panoptic/{name}"][members])
            for suffix, members in self._groups().items()
            for name in ("PQ", "SQ", "RQ")
        }

    def undefined(self) -> dict[str, str]:
        """Reasons for the NaNs of `compute()`."""
        kinds = {"": "class", "_things": "thing class", "_stuff": "stuff class"}
        return {
            f"panoptic/{name}{suffix}": (
                f"no {kinds[suffix]} occurs in the ground truth or the predictions"
            )
            for suffix, members in self._groups().items()
            if not members.any()
            for name in ("PQ", "SQ", "RQ")
        }

    def counts(self) -> dict[str, int]:
        found = {"panoptic/images": self.images, "panoptic/classes": int(self._groups()[""].sum())}
        return found | {f"panoptic/{n}": int(getattr(self, n).sum()) for n in ("tp", "fp", "fn")}
