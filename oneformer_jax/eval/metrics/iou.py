"""Mean intersection over union as a mergeable state; see the package for its methods."""

from __future__ import annotations

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

    Attributes:
      hits: int64 [K], pixels of a class that are predicted as this class.
      true: int64 [K], pixels of a class.
      predicted: int64 [K], non-void pixels predicted as a class.
    """

    def __init__(self, num_classes: int):
        # A table of all pairs would take 34 GB with K = 65,535.
        self.hits, self.true, self.predicted = np.zeros((3, num_classes), np.int64)
        self.images = 0
        self._pairs: dict[int, int] = {}  # true class * K + predicted class -> pixels

    def update(self, segmentation: Segmentation, record: Record) -> Outcome:
        """Adds one image: compares `segmentation.class_map` int [H, W] with the record.

        Raises:
          ValueError: sizes differ or a class id is out of range.
        """
        num_classes = len(self.true)
        if "semantic" not in record:
            truth = read_segments(record, num_classes)
            pixels = self._pixels(segmentation.class_map, truth, record)
            self._add(truth.classes, pixels)
            return self._confuse_segments(truth.classes, pixels)
        check_size(segmentation.class_map.shape, record)
        check_size(record["semantic"].shape, record)
        true, predicted, lengths = runs(record["semantic"], segmentation.class_map)
        scored = true != VOID
        true, predicted, lengths = true[scored], predicted[scored], lengths[scored]
        check_classes(true, num_classes, f"semantic map of image {record['image_id']}")
        check_classes(predicted, num_classes, f"prediction for image {record['image_id']}")
        hit = true == predicted
        np.add.at(self.hits, true[hit], lengths[hit])
        np.add.at(self.true, true, lengths)
        np.add.at(self.predicted, predicted, lengths)
        self.images += 1
        return self._confuse(true, predicted, lengths)

    def _confuse_segments(self, classes: np.ndarray, pixels: np.ndarray) -> Outcome:
        rows, columns = np.nonzero(pixels)
        return self._confuse(classes[rows], columns, pixels[rows, columns])

    def _confuse(self, true: np.ndarray, predicted: np.ndarray, pixels: np.ndarray) -> Outcome:
        """Adds the pairs of an image's classes, int [N] with repetitions, and their pixels."""
        codes, place = np.unique(
            true.astype(np.int64) * len(self.true) + predicted, return_inverse=True
        )
        pixels = np.bincount(place, pixels, len(codes)).astype(np.int64)
        self._add_pairs(codes, pixels)
        return of_pixels(*np.divmod(codes, len(self.true)), pixels)

    def _add_pairs(self, codes: np.ndarray, pixels: np.ndarray) -> None:
        for code, number in zip(codes.tolist(), pixels.tolist(), strict=True):
            self._pairs[code] = self._pairs.get(code, 0) + number

    def pairs(self) -> Pairs:
        """Returns the confusion counts of all images, each pair of classes once."""
        codes = np.array(sorted(self._pairs), np.int64)
        pixels = np.array([self._pairs[code] for code in codes.tolist()], np.int64)
        return (*np.divmod(codes, len(self.true)), pixels)

    def _pixels(self, class_map: np.ndarray, truth: Segments, record: Record) -> np.ndarray:
        """int64 [G, K]: the pixels of each true segment that are predicted as each class."""
        num_classes = len(self.true)
        check_size(class_map.shape, record)
        true_ids, predicted, lengths = runs(record["panoptic"], class_map)
        numbers = segment_numbers(true_ids, truth.ids, truth.where)
        scored = numbers > 0
        predicted = predicted[scored]
        check_classes(predicted, num_classes, f"prediction for image {record['image_id']}")
        shape = (len(truth.ids), num_classes)
        return count_pairs(numbers[scored] - 1, predicted, lengths[scored], shape)

    def _add(self, classes: np.ndarray, pixels: np.ndarray) -> None:
        """Adds int64 [G, K] pixels of true segments of `classes` [G]."""
        np.add.at(self.hits, classes, pixels[np.arange(len(classes)), classes])
        np.add.at(self.true, classes, pixels.sum(axis=1))
        self.predicted += pixels.sum(axis=0)
        self.images += 1

    def merge(self, other: Self) -> None:
        """Adds the images that `other` has seen."""
        check_mergeable("MeanIoU", *(np.array([len(m.true)]) for m in (self, other)))
        self.hits += other.hits
        self.true += other.true
        self.predicted += other.predicted
        self.images += other.images
        self._add_pairs(np.array(list(other._pairs)), np.array(list(other._pairs.values())))

    def state(self) -> dict[str, np.ndarray]:
        """Returns the attributes, pairs of classes and the number of images as a scalar."""
        return {
            "hits": self.hits,
            "true": self.true,
            "predicted": self.predicted,
            "images": np.array(self.images, np.int64),
            "pairs": np.array(list(self._pairs), np.int64),
            "pair_pixels": np.array(list(self._pairs.values()), np.int64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> MeanIoU:
        metric = cls(len(state["true"]))
        metric._load(state)
        return metric

    def _load(self, state: Mapping[str, np.ndarray]) -> None:
        for name in ("hits", "true", "predicted"):
            setattr(self, name, np.array(state[name]))
        self.images = int(state["images"])
        self._add_pairs(state["pairs"], state["pair_pixels"])

    def per_class(self) -> dict[str, np.ndarray]:
        """Computes IoU and accuracy in percent, float64 [K]; NaN for a class without pixels."""
        union = self.true + self.predicted - self.hits
        nan = np.full(len(self.true), np.nan)
        true = self.true > 0
        return {
            "semantic/IoU": 100 * np.divide(self.hits, union, out=nan.copy(), where=union > 0),
            "semantic/ACC": 100 * np.divide(self.hits, self.true, out=nan.copy(), where=true),
        }

    def compute(self) -> dict[str, float]:
        """Computes `semantic/mIoU`, `fwIoU` (by true pixels), `mACC` and `pACC`, in percent."""
        table = self.per_class()
        iou, accuracy = table["semantic/IoU"], table["semantic/ACC"]
        true, pixels = self.true, self.true.sum()
        if pixels == 0:
            return dict.fromkeys(self._names, float("nan"))
        present = true > 0
        values = (
            np.nanmean(iou),
            (iou[present] * true[present]).sum() / pixels,
            np.nanmean(accuracy),
            100 * self.hits.sum() / pixels,
        )
        return dict(zip(self._names, map(float, values), strict=True))

    _names = ("semantic/mIoU", "semantic/fwIoU", "semantic/mACC", "semantic/pACC")

    def undefined(self) -> dict[str, str]:
        """Reasons for the NaNs of `compute()`."""
        if self.true.any():
            return {}
        return dict.fromkeys(self._names, "no pixel of the ground truth has a class")

    def counts(self) -> dict[str, int]:
        return {
            "semantic/images": self.images,
            "semantic/classes": int((self.true > 0).sum()),
            "semantic/pixels": int(self.true.sum()),
        }
