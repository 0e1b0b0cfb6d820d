"""Mean intersection over union as a mergeable state; see the package for its methods."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Self

import numpy as np

from oneformer_jax.eval.metrics.outcome import Outcome, of_pixels
from oneformer_jax.eval.metrics.truth import (
    Record,
    Segments,
    check_classes,
    check_mergeable,
    check_size,
    count_pairs,
    ratio,
    read_segments,
    runs,
    segment_numbers,
)
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.types import VOID

# True classes, predicted classes and the pixels of these pairs, int64 [N] each.
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


class MeanIoU:
    """Semantic IoU from the pixels of each class, with the conventions of Detectron2 v0.6.

    Void pixels of the ground truth are ignored. The mean IoU is over the classes that occur in the
    ground truth or are predicted on its other pixels. So a class with predictions alone counts as 0
    (newer Detectron2 leaves it out). The mean accuracy is over the classes of the ground truth.

    Args:
      num_classes: K.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.images = 0
        # True class * K + predicted class -> pixels. A table would take 34 GB with K = 65,535.
        self._pairs: collections.Counter[int] = collections.Counter()

    def update(self, segmentation: Segmentation, record: Record) -> Outcome:
        """Adds one image: compares `segmentation.class_map` int [H, W] with the record.

        Raises:
          ValueError: sizes differ or a class id is out of range.
        """
        if "semantic" not in record:
            truth = read_segments(record, self.num_classes)
            pixels = self._pixels(segmentation.class_map, truth, record)
            return self._add_segments(truth.classes, pixels)
        check_size(segmentation.class_map.shape, record)
        check_size(record["semantic"].shape, record)
        true, predicted, lengths = runs(record["semantic"], segmentation.class_map)
        scored = true != VOID
        true, predicted, lengths = true[scored], predicted[scored], lengths[scored]
        check_classes(true, self.num_classes, f"semantic map of image {record['image_id']}")
        check_classes(predicted, self.num_classes, f"prediction for image {record['image_id']}")
        return self._add(true, predicted, lengths)

    def _add_segments(self, classes: np.ndarray, pixels: np.ndarray) -> Outcome:
        """Adds an image: the pixels of true segments of `classes` [G], int64 [G, K]."""
        rows, columns = np.nonzero(pixels)
        return self._add(classes[rows], columns, pixels[rows, columns])

    def _add(self, true: np.ndarray, predicted: np.ndarray, pixels: np.ndarray) -> Outcome:
        """Adds an image: pairs of classes, int [N] with repetitions, and their pixels."""
        codes, place = np.unique(
            true.astype(np.int64) * self.num_classes + predicted, return_inverse=True
        )
        pixels = np.bincount(place, pixels, len(codes)).astype(np.int64)
        self._add_pairs(codes, pixels)
        self.images += 1
        return of_pixels(*np.divmod(codes, self.num_classes), pixels)

    def _add_pairs(self, codes: np.ndarray, pixels: np.ndarray) -> None:
        self._pairs.update(dict(zip(codes.tolist(), pixels.tolist(), strict=True)))

    def pairs(self) -> Pairs:
        """Returns the confusion counts of all images, each pair of classes once."""
        codes = np.array(sorted(self._pairs), np.int64)
        pixels = np.array([self._pairs[code] for code in codes.tolist()], np.int64)
        return (*np.divmod(codes, self.num_classes), pixels)

    def totals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts the pixels of each class, int64 [K]: hits, those of the truth, those predicted.

        Void pixels count in none of them.
        """
        true, predicted, pixels = self.pairs()
        hits, whole, found = np.zeros((3, self.num_classes), np.int64)
        np.add.at(hits, true, np.where(true == predicted, pixels, 0))
        np.add.at(whole, true, pixels)
        np.add.at(found, predicted, pixels)
        return hits, whole, found

    def _pixels(self, class_map: np.ndarray, truth: Segments, record: Record) -> np.ndarray:
        """int64 [G, K]: the pixels of each true segment that are predicted as each class."""
        check_size(class_map.shape, record)
        true_ids, predicted, lengths = runs(record["panoptic"], class_map)
        numbers = segment_numbers(true_ids, truth.ids, truth.where)
        scored = numbers > 0
        predicted = predicted[scored]
        check_classes(predicted, self.num_classes, f"prediction for image {record['image_id']}")
        shape = (len(truth.ids), self.num_classes)
        return count_pairs(numbers[scored] - 1, predicted, lengths[scored], shape)

    def merge(self, other: Self) -> None:
        """Adds the images that `other` has seen."""
        check_mergeable("MeanIoU", *(np.array(m.num_classes) for m in (self, other)))
        self.images += other.images
        self._pairs.update(other._pairs)

    def state(self) -> dict[str, np.ndarray]:
        """Returns pairs of classes, their pixels, and the numbers of images and of classes."""
        return {
            "num_classes": np.array(self.num_classes, np.int64),
            "images": np.array(self.images, np.int64),
            "pairs": np.array(list(self._pairs), np.int64),
            "pair_pixels": np.array(list(self._pairs.values()), np.int64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> MeanIoU:
        metric = cls(int(state["num_classes"]))
        metric._load(state)
        return metric

    def _load(self, state: Mapping[str, np.ndarray]) -> None:
        self.images = int(state["images"])
        self._add_pairs(state["pairs"], state["pair_pixels"])

    def per_class(self) -> dict[str, np.ndarray]:
        """Computes IoU and accuracy in percent, float64 [K]; NaN for a class without pixels."""
        hits, true, predicted = self.totals()
        return {
            "semantic/IoU": 100 * ratio(hits, true + predicted - hits),
            "semantic/ACC": 100 * ratio(hits, true),
        }

    def compute(self) -> dict[str, float]:
        """Computes `semantic/mIoU`, `fwIoU` (by true pixels), `mACC` and `pACC`, in percent."""
        table = self.per_class()
        iou, accuracy = table["semantic/IoU"], table["semantic/ACC"]
        hits, true, _ = self.totals()
        pixels = true.sum()
        if pixels == 0:
            return dict.fromkeys(self._names, float("nan"))
        present = true > 0
        values = (
            np.nanmean(iou),
            (iou[present] * true[present]).sum() / pixels,
            np.nanmean(accuracy),
            100 * hits.sum() / pixels,
        )
        return dict(zip(self._names, map(float, values), strict=True))

    _names = ("semantic/mIoU", "semantic/fwIoU", "semantic/mACC", "semantic/pACC")

    def undefined(self) -> dict[str, str]:
        """Reasons for the NaNs of `compute()`."""
        if self._pairs:
            return {}
        return dict.fromkeys(self._names, "no pixel of the ground truth has a class")

    def counts(self) -> dict[str, int]:
        true = self.totals()[1]
        return {
            "semantic/images": self.images,
            "semantic/classes": int((true > 0).sum()),
            "semantic/pixels": int(true.sum()),
        }
