"""COCO average precision of instance masks, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import itertools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from oneformer_jax.eval.metrics.instance_json import InstanceAnnotations, Masks, encode
from oneformer_jax.eval.metrics.outcome import CONFIDENT, Outcome, of_instances
from oneformer_jax.eval.metrics.truth import (
    Record,
    check_classes,
    check_mergeable,
    check_new_images,
    check_size,
    mean,
    read_segments,
    segment_map,
)

if typing.TYPE_CHECKING:
    from oneformer_jax.eval.segmentation import Segmentation


# COCOeval's first statistics, in its order, and the kind of ground truth that each needs.
_STATISTICS = {
    "instance/AP": "",
    "instance/AP50": "",
    "instance/AP75": "",
    "instance/APs": " with an area of at most 32^2 pixels",
    "instance/APm": " with an area of 32^2 to 96^2 pixels",
    "instance/APl": " with an area of at least 96^2 pixels",
}


class _Image(typing.NamedTuple):
    size: tuple[int, int]
    truth: Masks
    detected: Masks


def _pack(masks: Sequence[Masks], prefix: str) -> dict[str, np.ndarray]:
    counts = [code for m in masks for code in m.counts]
    return {
        f"{prefix}_number": np.array([len(m.classes) for m in masks], np.int64),
        f"{prefix}_classes": np.concatenate([np.zeros(0, np.int64), *(m.classes for m in masks)]),
        f"{prefix}_values": np.concatenate([np.zeros(0), *(m.values for m in masks)]),
        f"{prefix}_crowd": np.concatenate([np.zeros(0, bool), *(m.crowd for m in masks)]),
        f"{prefix}_code_length": np.array([len(code) for code in counts], np.int64),
        f"{prefix}_codes": np.frombuffer(b"".join(counts), np.uint8),
    }


def _unpack(state: Mapping[str, np.ndarray], prefix: str) -> list[Masks]:
    def split(name: str, lengths: str) -> list[np.ndarray]:
        return np.split(state[f"{prefix}_{name}"], np.cumsum(state[f"{prefix}_{lengths}"]))[:-1]

    codes = iter([code.tobytes() for code in split("codes", "code_length")])
    columns = (split(name, "number") for name in ("classes", "values", "crowd"))
    return [
        Masks(classes, values, crowd, list(itertools.islice(codes, len(classes))))
        for classes, values, crowd in zip(*columns, strict=True)
    ]


def checked_instances(
    segmentation: Segmentation, record: Record, is_thing: np.ndarray, thing_labels: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Checks the instances of a segmentation; returns class ids int64 [N] and scores float64 [N].

    With `thing_labels` the labels of `segmentation` are positions among the things.

    Raises:
      ValueError: sizes differ, a label is out of range or names a stuff class, or a score is not
        finite.
    """
    where = f"prediction for image {record['image_id']}"
    labels = np.asarray(segmentation.labels, np.int64)
    scores = np.asarray(segmentation.scores, np.float64)
    check_size(segmentation.masks.shape[1:], record)
    if not len(segmentation.masks) == len(labels) == len(scores):
        raise ValueError(
            f"{where}: {len(segmentation.masks)} masks, {len(labels)} labels and {len(scores)} "
            "scores"
        )
    if thing_labels:
        things = np.flatnonzero(is_thing)
        check_classes(labels, len(things), where)
        labels = things[labels]
    check_classes(labels, len(is_thing), where)
    if not is_thing[labels].all():
        stuff = labels[~is_thing[labels]][0]
        raise ValueError(f"{where}: class {stuff} is stuff; instances must be things")
    if not np.isfinite(scores).all():
        raise ValueError(f"{where}: a score is not finite; check the weights of the model")
    return labels, scores


class CocoAP:
    """COCO average precision of masks, on the instances of a panoptic or an instance annotation.

    By default the ground truth equals the official conversion of COCO panoptic annotations to
    instances: each thing segment is one instance, keeps its crowd flag, and belongs to a size range
    by its annotated area. COCOeval takes the best 100 detections of each image and class. Masks are
    kept run-length encoded, so memory grows with the outlines, not the pixels.

    Args:
      is_thing: K flags.
      thing_labels: the labels of the segmentations are positions among the things, not contiguous
        class ids.
      annotations: an original instance file, to use as ground truth.
    """

    def __init__(
        self,
        is_thing: Sequence[bool] | np.ndarray,
        *,
        thing_labels: bool = False,
        annotations: InstanceAnnotations | None = None,
    ):
        self.is_thing = np.array(is_thing, bool)
        self._thing_labels = thing_labels
        self._annotations = annotations
        self._images: dict[str, _Image] = {}
        self._result: tuple[dict[str, float], np.ndarray] | None = None

    def update(self, segmentation: Segmentation, record: Record) -> Outcome:
        """Adds one image.

        Args:
          segmentation: `masks` bool [N, H, W], `scores` float [N], `labels` int [N].
          record: the ground truth; with `annotations` only its `image_id` and size are read.

        Raises:
          ValueError: sizes differ, a label is out of range or names a stuff class, a score is not
            finite, or the image was already added.
        """
        image_id = str(record["image_id"])
        labels, scores = checked_instances(segmentation, record, self.is_thing, self._thing_labels)
        size = record["panoptic"].shape
        if self._annotations is None:
            truth = self._thing_segments(record)
        else:
            truth = self._annotations.masks(image_id, size)
        detected = Masks(
            classes=labels,
            values=scores,
            crowd=np.zeros(len(labels), bool),
            counts=[encode(mask) for mask in segmentation.masks],
        )
        self._add({image_id: _Image(size, truth, detected)})
        sure = np.flatnonzero(scores >= CONFIDENT)
        iou = np.zeros((len(truth.classes), len(labels)))
        if len(sure) and len(truth.classes):
            found = [{"size": [*size], "counts": detected.counts[p]} for p in sure]
            wanted = [{"size": [*size], "counts": counts} for counts in truth.counts]
            iou[:, sure] = coco_mask.iou(found, wanted, truth.crowd.astype(np.uint8)).T
        return of_instances(truth.classes, truth.crowd, labels, scores, iou)

    def _thing_segments(self, record: Record) -> Masks:
        truth = read_segments(record, len(self.is_thing))
        numbers = segment_map(record, truth)
        things = np.flatnonzero(self.is_thing[truth.classes])
        return Masks(
            classes=truth.classes[things],
            values=truth.areas[things].astype(np.float64),
            crowd=truth.crowd[things],
            counts=[encode(numbers == g + 1) for g in things],
        )

    @property
    def images(self) -> int:
        """Number of images seen."""
        return len(self._images)

    def _add(self, images: Mapping[str, _Image]) -> None:
        check_new_images(self._images.keys(), images.keys())
        self._images.update(images)
        self._result = None

    def merge(self, other: CocoAP) -> None:
        """Adds the images that `other` has seen; ValueError if both have seen one."""
        check_mergeable("CocoAP", self.is_thing, other.is_thing)
        self._add(other._images)

    def state(self) -> dict[str, np.ndarray]:
        """Packs the state in flat arrays whose lengths grow with images, instances and outlines."""
        images = list(self._images.values())
        return {
            "is_thing": self.is_thing,
            "image_ids": np.array(list(self._images), np.str_),
            "sizes": np.array([i.size for i in images], np.int64).reshape(-1, 2),
            **_pack([i.truth for i in images], "truth"),
            **_pack([i.detected for i in images], "detected"),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> CocoAP:
        metric = cls(state["is_thing"])
        columns = (state["image_ids"], state["sizes"], _unpack(state, "truth"))
        for image_id, size, truth, detected in zip(
            *columns, _unpack(state, "detected"), strict=True
        ):
            height, width = map(int, size)
            metric._images[str(image_id)] = _Image((height, width), truth, detected)
        return metric

    def _coco(self, field: str) -> COCO:
        """The ground truth ("truth") or the detections ("detected") in pycocotools' form."""
        # COCOeval breaks ties between scores by the order of the images, which must not depend on
        # their spread over hosts. Shorter ids first is the numeric order of COCO's ids.
        ordered = sorted(self._images.items(), key=lambda item: (len(item[0]), item[0]))
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, (_, image) in enumerate(ordered, start=1):
            height, width = image.size
            images.append({"id": number, "height": height, "width": width})
            masks: Masks = getattr(image, field)
            for c, value, crowd, counts in zip(*masks, strict=True):
                code = {"size": [height, width], "counts": counts}
                annotations.append(
                    {
                        # COCOeval reads id 0 as "no match".
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": int(c),
                        "segmentation": code,
                        "iscrowd": int(crowd),
                    }
                )
                if field == "truth":
                    annotations[-1]["area"] = float(value)
                else:
                    annotations[-1]["area"] = float(coco_mask.area(code))
                    annotations[-1]["score"] = float(value)
        coco = COCO()
        coco.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": int(c)} for c in np.flatnonzero(self.is_thing)],
        }
        coco.createIndex()
        return coco

    def _evaluate(self) -> tuple[dict[str, float], np.ndarray]:
        """The statistics, and AP of each class [K], in percent; NaN without ground truth."""
        if self._result is None:
            # An empty list of categories would mean "all" to COCOeval.
            statistics = np.full(len(_STATISTICS), np.nan)
            per_class = np.full(len(self.is_thing), np.nan)
            if self.is_thing.any() and self._images:
                with contextlib.redirect_stdout(io.StringIO()):
                    run = COCOeval(self._coco("truth"), self._coco("detected"), "segm")
                    run.evaluate()
                    run.accumulate()
                    run.summarize()
                # [IoU, recall, class, all areas, 100 detections]; -1 marks "no ground truth".
                precision = run.eval["precision"][:, :, :, 0, -1]
                for column, c in enumerate(run.params.catIds):
                    per_class[c] = 100 * mean(precision[:, :, column][precision[:, :, column] > -1])
                found = run.stats[: len(_STATISTICS)]
                statistics = np.where(found > -1, 100 * found, np.nan)
            self._result = dict(zip(_STATISTICS, statistics.tolist(), strict=True)), per_class
        return self._result

    def compute(self) -> dict[str, float]:
        """Returns `instance/AP`, `AP50`, `AP75`, `APs`, `APm` and `APl` in percent."""
        return dict(self._evaluate()[0])

    def undefined(self) -> dict[str, str]:
        """Reasons for the NaNs of `compute()`."""
        values = self._evaluate()[0]
        return {
            name: f"the ground truth has no instance{needed} (crowds aside)"
            for name, needed in _STATISTICS.items()
            if np.isnan(values[name])
        }

    def per_class(self) -> dict[str, np.ndarray]:
        """Computes `instance/AP` in percent, float64 [K]; NaN: stuff, or no true instance."""
        return {"instance/AP": self._evaluate()[1].copy()}

    def counts(self) -> dict[str, int]:
        images = self._images.values()
        return {
            "instance/images": self.images,
            "instance/ground_truth": sum(int((~i.truth.crowd).sum()) for i in images),
            "instance/crowds": sum(int(i.truth.crowd.sum()) for i in images),
            "instance/detections": sum(len(i.detected.classes) for i in images),
        }
