"""The metrics of Cityscapes, as defined by its official scripts (cityscapesScripts).

The scripts read label images, and the panoptic annotation has the same facts: void pixels are the
labels that the evaluation ignores, non-crowd thing segments are instances, and a crowd segment is
the group region of its class (a label id below 1000 in the scripts).
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from oneformer_jax.eval.metrics.ap import checked_instances
from oneformer_jax.eval.metrics.iou import MeanIoU
from oneformer_jax.eval.metrics.outcome import Outcome, of_instances
from oneformer_jax.eval.metrics.truth import (
    Record,
    check_mergeable,
    check_new_images,
    mean,
    ratio,
    read_segments,
    segment_map,
)

if typing.TYPE_CHECKING:
    from oneformer_jax.eval.segmentation import Segmentation


# Thresholds: a match needs a higher IoU.
OVERLAPS = np.arange(0.5, 1.0, 0.05)
# Smaller true instances need not be found.
MIN_PIXELS = 100

CATEGORIES = {
    "flat": ("road", "sidewalk"),
    "construction": ("building", "wall", "fence"),
    "object": ("pole", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
}
# Mean pixels of an instance in the training set, the weights of iIoU.
MEAN_PIXELS = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}

# Attributes of `CityscapesAP` that grow with the images, without their "_".
_TABLES = ("true", "detected", "pairs", "scores")


class CityscapesAP:
    """Average precision of instance masks by the definition of Cityscapes.

    It differs from COCO's. An instance may have any number of detections; all but the one with the
    best score are wrong. A detection that matches nothing is left out if more of it than the
    overlap threshold lies on void, on group regions of its class or on instances of its class with
    fewer than `MIN_PIXELS` pixels. The area under the curve is integrated over the distinct scores,
    without interpolation of the precision. AP is the mean over ten thresholds.

    The state holds numbers only: the pixels of instances, detections, and intersecting pairs.

    Args:
      is_thing: K flags.
      thing_labels: the labels of the segmentations are positions among the things.
    """

    def __init__(self, is_thing: Sequence[bool] | np.ndarray, *, thing_labels: bool = False):
        self.is_thing = np.array(is_thing, bool)
        self._thing_labels = thing_labels
        self._image_ids: dict[str, None] = {}
        self._true = np.zeros((0, 3), np.int64)  # class, pixels, 1 for a group
        self._detected = np.zeros((0, 3), np.int64)  # class, pixels, pixels on void
        # Rows of the two above that intersect and have the same class, and the pixels in common.
        self._pairs = np.zeros((0, 3), np.int64)
        self._scores = np.zeros(0, np.float64)

    def update(self, segmentation: Segmentation, record: Record) -> Outcome:
        """Adds one image: `masks` bool [N, H, W], `scores` float [N], `labels` int [N].

        Raises:
          ValueError: sizes differ, a label is out of range or names a stuff class, a score is not
            finite, or the image was already added.
        """
        labels, scores = checked_instances(segmentation, record, self.is_thing, self._thing_labels)
        truth = read_segments(record, len(self.is_thing))
        numbers = segment_map(record, truth)
        pixels = np.bincount(numbers.ravel(), minlength=len(truth.ids) + 1)
        # The scripts read pictures, so a segment without a pixel does not exist.
        things = np.flatnonzero(self.is_thing[truth.classes] & (pixels[1:] > 0))
        row = np.full(len(truth.ids) + 1, -1)
        row[things + 1] = np.arange(len(things))

        crowd, sizes = truth.crowd[things], pixels[1:][things]
        detected: list[tuple[int, ...]] = []
        kept: list[float] = []
        pairs: list[tuple[int, ...]] = []
        shares = [np.zeros((len(things), 0))]
        for mask, label, score in zip(segmentation.masks, labels, scores, strict=True):
            under = _pixels_under(mask, numbers, len(row))
            if not under.any():
                continue
            for number in np.flatnonzero(under[1:]) + 1:
                if truth.classes[number - 1] == label:
                    pairs.append((row[number], len(detected), under[number]))
            detected.append((label, under.sum(), under[0]))
            kept.append(score)
            on = under[1:][things]
            union = np.where(crowd, 0, sizes - on) + under.sum()
            shares.append((on / union)[:, None])
        other = CityscapesAP(self.is_thing)
        other._image_ids = {str(record["image_id"]): None}
        other._true = np.stack([truth.classes[things], sizes, crowd], axis=-1).astype(np.int64)
        other._detected = np.array(detected, np.int64).reshape(-1, 3)
        other._pairs = np.array(pairs, np.int64).reshape(-1, 3)
        other._scores = np.array(kept, np.float64)
        self.merge(other)
        found = (other._detected[:, 0], other._scores, np.concatenate(shares, axis=1))
        return of_instances(truth.classes[things], crowd, *found)

    @property
    def images(self) -> int:
        """Number of images seen."""
        return len(self._image_ids)

    def merge(self, other: CityscapesAP) -> None:
        """Adds the images that `other` has seen; ValueError if both have seen one."""
        check_mergeable("CityscapesAP", self.is_thing, other.is_thing)
        check_new_images(self._image_ids.keys(), other._image_ids.keys())
        self._image_ids |= other._image_ids
        offset = np.array([len(self._true), len(self._detected), 0])
        self._true = np.concatenate([self._true, other._true])
        self._detected = np.concatenate([self._detected, other._detected])
        self._pairs = np.concatenate([self._pairs, other._pairs + offset])
        self._scores = np.concatenate([self._scores, other._scores])

    def state(self) -> dict[str, np.ndarray]:
        """Returns the state as flat arrays whose lengths grow with instances and detections."""
        return {
            "is_thing": self.is_thing,
            "image_ids": np.array(list(self._image_ids), np.str_),
            **{name: getattr(self, f"_{name}") for name in _TABLES},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> CityscapesAP:
        metric = cls(state["is_thing"])
        metric._image_ids = dict.fromkeys(map(str, state["image_ids"]))
        for name in _TABLES:
            setattr(metric, f"_{name}", np.array(state[name]))
        return metric

    def _average_precisions(self) -> np.ndarray:
        """float64 [K, 10], 0..1: AP of each class at each overlap; NaN without an instance."""
        found = np.full((len(self.is_thing), len(OVERLAPS)), np.nan)
        true_class, true_pixels, group = self._true.T
        detected_class, detected_pixels, void = self._detected.T
        true, detected, pixels = self._pairs.T
        iou = pixels / (true_pixels[true] + detected_pixels[detected] - pixels)
        small = true_pixels < MIN_PIXELS
        wanted = (group == 0) & ~small
        # A small group counts twice, as in the scripts.
        ignored = void + np.bincount(
            detected, pixels * (group[true] + small[true]), minlength=len(detected_class)
        )
        for c in np.flatnonzero(self.is_thing):
            instances = (true_class == c) & wanted
            if not instances.any():
                continue
            for t, overlap in enumerate(OVERLAPS):
                # Classes never share a pair, so a pair's class is that of its instance.
                match = (iou > overlap) & (true_class[true] == c)
                to_wanted = match & wanted[true]
                scores = self._scores[detected[to_wanted]]
                # The first match of an instance in this order is right, the others are wrong.
                order = np.lexsort((-scores, true[to_wanted]))
                _, best = np.unique(true[to_wanted][order], return_index=True)
                right = np.zeros(len(scores), bool)
                right[order[best]] = True
                alone = detected_class == c
                alone[detected[match]] = False
                alone &= ~(ignored / detected_pixels > overlap)
                found[c, t] = _area_under_curve(
                    np.concatenate([scores, self._scores[alone]]),
                    np.concatenate([right, np.zeros(int(alone.sum()), bool)]),
                    int(instances.sum()),
                )
        return found

    def per_class(self) -> dict[str, np.ndarray]:
        """Computes AP and AP50 in percent, float64 [K]; NaN: stuff, or none of `MIN_PIXELS`."""
        found = 100 * self._average_precisions()
        return {"instance/AP": found.mean(axis=1), "instance/AP50": found[:, 0]}

    def compute(self) -> dict[str, float]:
        """Returns `instance/AP` and `AP50` in percent: means over the classes with an instance."""
        return {name: mean(v[~np.isnan(v)]) for name, v in self.per_class().items()}

    def undefined(self) -> dict[str, str]:
        """Reasons for the NaNs of `compute()`."""
        reason = f"the ground truth has no instance of {MIN_PIXELS} pixels or more (groups aside)"
        return {name: reason for name, value in self.compute().items() if np.isnan(value)}

    def counts(self) -> dict[str, int]:
        groups = int(self._true[:, 2].sum())
        return {
            "instance/images": self.images,
            "instance/ground_truth": len(self._true) - groups,
            "instance/crowds": groups,
            "instance/detections": len(self._detected),
        }


def _pixels_under(mask: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: pixels of each number in `numbers` int [H, W] under a mask bool [H, W]."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return np.zeros(count, np.int64)
    lines = slice(rows[0], rows[-1] + 1)
    columns = np.flatnonzero(mask[lines].any(axis=0))
    box = lines, slice(columns[0], columns[-1] + 1)
    return np.bincount(numbers[box][mask[box]], minlength=count)


def _area_under_curve(scores: np.ndarray, right: np.ndarray, instances: int) -> float:
    """Area under the curve of precision over recall at the distinct scores.

    The curve ends at recall 0 with precision 1, and each point is as wide as half the way between
    its neighbours.
    """
    order = np.argsort(scores)
    starts = np.unique(scores[order], return_index=True)[1]
    # True positives, and all detections, at or above each distinct score.
    positives = right[order][::-1].cumsum()[::-1][starts]
    detections = len(scores) - starts
    precision = np.append(positives / detections, 1.0)
    recall = np.append(positives / instances, 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:]) / 2)


class CityscapesIoU(MeanIoU):
    """IoU of the classes and categories of Cityscapes, and their instance-level variants.

    iIoU weights the pixels of each instance by the mean size of its class over the size of the
    instance, so that near and far instances count alike. Its false positives are plain pixels,
    because a semantic map has no instances. Groups do not count.

    Args:
      class_names: K names, those of Cityscapes.
      is_thing: K flags.
    """

    def __init__(self, class_names: Sequence[str], is_thing: Sequence[bool] | np.ndarray):
        super().__init__(len(class_names))
        self.class_names = tuple(class_names)
        self.is_thing = np.array(is_thing, bool)
        known = [name for names in CATEGORIES.values() for name in names]
        things = [n for n, thing in zip(class_names, is_thing, strict=True) if thing]
        strange = sorted(set(class_names) - set(known)) or sorted(set(things) - set(MEAN_PIXELS))
        if strange:
            raise ValueError(
                f"the class {strange[0]!r} is none of Cityscapes (or no thing there); score other "
                "classes with eval.protocol=coco"
            )
        # bool [7, K]
        self._members = np.array(
            [[c in names for c in class_names] for names in CATEGORIES.values()]
        )
        self._weights = np.array([MEAN_PIXELS.get(c, 0.0) for c in class_names])
        # Weighted pixels of the instances of a class: found, all, and found as its category.
        self.weighted = np.zeros((3, len(class_names)), np.float64)

    def update(self, segmentation: Segmentation, record: Record) -> Outcome:
        """Adds one image, as `MeanIoU.update`."""
        truth = read_segments(record, self.num_classes)
        pixels = self._pixels(segmentation.class_map, truth, record)
        outcome = self._add_segments(truth.classes, pixels)
        size = pixels.sum(axis=1)
        instances = self.is_thing[truth.classes] & ~truth.crowd & (size > 0)
        classes, pixels, size = truth.classes[instances], pixels[instances], size[instances]
        category = self._members[:, classes].argmax(axis=0)
        found = (
            np.take_along_axis(pixels, classes[:, None], axis=1)[:, 0],
            size,
            (pixels * self._members[category]).sum(axis=1),
        )
        for total, part in zip(self.weighted, found, strict=True):
            np.add.at(total, classes, part * self._weights[classes] / size)
        return outcome

    def merge(self, other: Self) -> None:
        """Adds the images that `other` has seen."""
        ours, theirs = (np.array(metric.class_names) for metric in (self, other))
        check_mergeable("CityscapesIoU", ours, theirs)
        super().merge(other)
        self.weighted += other.weighted

    def state(self) -> dict[str, np.ndarray]:
        return {
            **super().state(),
            "class_names": np.array(self.class_names, np.str_),
            "is_thing": self.is_thing,
            "weighted": self.weighted,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> CityscapesIoU:
        metric = cls([str(name) for name in state["class_names"]], state["is_thing"])
        metric._load(state)
        metric.weighted = np.array(state["weighted"])
        return metric

    def per_class(self) -> dict[str, np.ndarray]:
        """As `MeanIoU.per_class`, with iIoU; NaN for stuff, or a thing that does not occur."""
        hits, _, predicted = self.totals()
        iou = ratio(self.weighted[0], self.weighted[1] + predicted - hits, self.is_thing)
        return {**super().per_class(), "semantic/iIoU": 100 * iou}

    def per_category(self) -> dict[str, np.ndarray]:
        """Computes IoU and iIoU of `CATEGORIES` in percent, float64 [7]; NaN as in `per_class`."""
        members = self._members.astype(np.int64)
        table = np.zeros((self.num_classes, self.num_classes), np.int64)
        classes, predicted, pixels = self.pairs()
        table[classes, predicted] = pixels
        table = members @ table @ members.T
        hit, true = np.diagonal(table), table.sum(axis=1)
        false = table.sum(axis=0) - hit
        _, whole, found = self.weighted @ members.T
        # Only a category of things alone has instances.
        stuff = np.asarray(self._members[:, ~self.is_thing].any(axis=1))
        things = self._members.any(axis=1) & ~stuff
        return {
            "IoU": 100 * ratio(hit, true + false),
            "iIoU": 100 * ratio(found, whole + false, things),
        }

    def compute(self) -> dict[str, float]:
        """As `MeanIoU.compute`, with `semantic/iIoU`, `IoU_category` and `iIoU_category`."""
        categories = self.per_category()
        columns = (self.per_class()["semantic/iIoU"], categories["IoU"], categories["iIoU"])
        values = [mean(column[~np.isnan(column)]) for column in columns]
        return super().compute() | dict(zip(self._more_names, values, strict=True))

    _more_names = ("semantic/iIoU", "semantic/IoU_category", "semantic/iIoU_category")

    def undefined(self) -> dict[str, str]:
        """Reasons for the NaNs of `compute()`."""
        reasons = super().undefined()
        for name in self._more_names:
            if np.isnan(self.compute()[name]):
                reasons[name] = "no thing class occurs in the ground truth or the predictions"
        return reasons
