"""The segmentation of one image: a prediction or the ground truth."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from oneformer_jax import files
from oneformer_jax.types import VOID, Metadata, task_id

# None in the segmentations of the other tasks: whoever reads a field knows the task.
Array = np.ndarray | Any


class Instances(NamedTuple):
    """The instances of one image, highest class probability first; masks may overlap.

    Attributes:
      masks: bool [N, H, W].
      scores: float32 [N], class probability times mean mask probability.
      labels: int32 [N] class ids.
    """

    masks: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def take(self, positions: np.ndarray | Sequence[int]) -> Instances:
        """Returns the instances at these positions, in their order."""
        chosen = np.asarray(positions, int)
        return Instances(*(values[chosen] for values in self))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """One image's result at its original size; the fields of the other two tasks are None.

    `masks`, `labels`, `names`, `scores`, `areas` and `boxes` describe the segments of every task in
    one order: of a panoptic result by falling score, of a semantic one by falling area, of
    instances as they are in `instances` (a `Segmenter` sorts them by falling score).

    Attributes:
      task: "panoptic", "instance" or "semantic".
      metadata: names, colours and ids of the classes.
      segments: panoptic, int32 [H, W]; 0 is unassigned, segment ids count from 1.
      segments_info: panoptic, one dict per segment in order of id: id (int), category_id
        (contiguous class id), isthing (bool), score (class probability; the highest of merged
        stuff), area (pixels).
      class_map: semantic, int32 [H, W] class ids (`types.VOID` only in ground truth).
      instances: instance, their masks, scores and labels.
      image: uint8 [H, W, 3] RGB, or None if it was not kept.
      threshold: the score that all instances are above, if one was asked for; pictures then show
        all of them, else those of at least 0.5.
    """

    task: str
    metadata: Metadata
    segments: Array = None
    segments_info: list[dict[str, Any]] | Any = None
    class_map: Array = None
    instances: Instances | Any = None
    image: np.ndarray | None = None
    threshold: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        maps = {"panoptic": self.segments, "semantic": self.class_map}
        found = self.instances.masks if self.task == "instance" else maps[self.task]
        height, width = found.shape[-2:]
        return int(height), int(width)

    @functools.cached_property
    def ranked_infos(self) -> list[dict[str, Any]]:
        """The dicts of `segments_info` in the order of `masks`, by falling score."""
        return sorted(self.segments_info, key=lambda info: -info["score"])

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Class ids of the segments, int32 [N]."""
        if self.task == "instance":
            return self.instances.labels
        if self.task == "panoptic":
            return np.array([info["category_id"] for info in self.ranked_infos], np.int32)
        inside = self.class_map[self.class_map != VOID]
        counts = np.bincount(inside, minlength=self.metadata.num_classes)
        return np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].astype(np.int32)

    @property
    def names(self) -> list[str]:
        """Names of the segments' classes."""
        return [self.metadata.class_names[label] for label in self.labels]

    @functools.cached_property
    def scores(self) -> np.ndarray | None:
        """Scores of the segments, float32 [N]; None for the semantic task, which has none."""
        if self.task == "instance":
            return self.instances.scores
        if self.task == "panoptic":
            return np.array([info["score"] for info in self.ranked_infos], np.float32)
        return None

    @functools.cached_property
    def masks(self) -> np.ndarray:
        """Masks of the segments, bool [N, H, W]."""
        if self.task == "instance":
            return self.instances.masks
        masks = np.zeros((len(self), *self.size), bool)
        for row, mask in zip(masks, self.each_mask(), strict=True):
            row[:] = mask
        return masks

    def each_mask(self) -> Iterator[np.ndarray]:
        """Gives `masks` one at a time, bool [H, W]: all of them may take gigabytes."""
        if self.task == "instance":
            return iter(self.instances.masks)
        if self.task == "panoptic":
            ids, values = [info["id"] for info in self.ranked_infos], self.segments
        else:
            ids, values = self.labels.tolist(), self.class_map
        return (values == one for one in ids)

    @functools.cached_property
    def areas(self) -> np.ndarray:
        """Pixels of the segments, int64 [N]."""
        return np.array([np.count_nonzero(mask) for mask in self.each_mask()], np.int64)

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """Bounding boxes of the segments, int32 [N, 4].

        Left, top, right and bottom in pixels, the last two beyond the box; zeros without pixels.
        """
        return np.array([bounding_box(mask) for mask in self.each_mask()], np.int32).reshape(-1, 4)

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.labels)

    def __repr__(self) -> str:
        height, width = self.size
        scores = [None] * len(self) if self.scores is None else self.scores
        texts = (
            name if score is None else f"{name} {score:.2f}"
            for name, score in zip(self.names, scores, strict=True)
        )
        listing = files.first_few(texts) or "no segments"
        return f"Segmentation({self.task}, {height} x {width}: {listing})"

    def _repr_png_(self) -> bytes | None:
        """The overlay, which notebooks show; None without an image."""
        if self.image is None:
            return None
        buffer = io.BytesIO()
        Image.fromarray(self.overlay(min_size=480)).save(buffer, format="PNG")
        return buffer.getvalue()

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """Lists the segments in COCO's result format, masks run-length encoded.

        Each dict has `image_id`, `category_id` (the dataset's own), `segmentation`, `bbox` (left,
        top, width, height), `area` and, but for the semantic task, `score`. `json.dump` takes them.
        """
        from pycocotools import mask as coco_mask

        found = []
        columns = (self.each_mask(), self.labels, self.boxes.tolist(), self.areas.tolist())
        for number, (mask, label, box, area) in enumerate(zip(*columns, strict=True)):
            encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            left, top, right, bottom = box
            entry = {
                "image_id": image_id,
                "category_id": self.metadata.category_ids[label],
                "segmentation": {
                    "size": encoded["size"],
                    "counts": encoded["counts"].decode("ascii"),
                },
                "bbox": [left, top, right - left, bottom - top],
                "area": area,
            }
            if self.scores is not None:
                entry["score"] = round(float(self.scores[number]), 6)
            found.append(entry)
        return found

    def to_supervision(self) -> Any:
        """Returns the segments as `supervision.Detections`; class names are in its `data`.

        Raises:
          ValueError: the package is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise ValueError(
                'to_supervision() needs a package: pip install "oneformer-jax[supervision]"'
            ) from None
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def save(
        self, folder: str | os.PathLike[str], name: str = "image", **options: Any
    ) -> list[pathlib.Path]:
        """Writes overlay, maps and COCO's JSON into `folder`: see `write.write_prediction`."""
        from oneformer_jax.eval import write

        return write.write_prediction(folder, name, self, **options)

    def overlay(self, image: np.ndarray | None = None, **options: Any) -> np.ndarray:
        """Draws the result over `image` (default: the segmented image), uint8 [H, W, 3].

        `options` are those of `pictures.overlay.draw`.
        """
        from oneformer_jax.eval.pictures import overlay

        if self.threshold is not None:
            options.setdefault("min_score", self.threshold)
        image = self.image if image is None else image
        if image is None:
            raise ValueError("this Segmentation holds no image: call overlay(image)")
        return overlay.draw(image, self, **options)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], metadata: Metadata, task: str) -> Segmentation:
        """Makes the ground truth of a record (image, panoptic, segments) for `task`.

        Crowd segments belong to the panoptic and semantic truth, but are not instances. The
        semantic truth is the record's `semantic`, if it has one.
        """
        task_id(task)
        panoptic = np.asarray(record["panoptic"])
        segments = record["segments"]
        common: dict[str, Any] = dict(task=task, metadata=metadata, image=record.get("image"))
        if task == "panoptic":
            infos = [
                dict(
                    id=int(s["id"]),
                    category_id=int(s["category"]),
                    isthing=metadata.is_thing[s["category"]],
                    score=1.0,
                    area=int(np.count_nonzero(panoptic == s["id"])),
                )
                for s in segments
            ]
            return cls(**common, segments=panoptic.astype(np.int32), segments_info=infos)
        if task == "semantic" and "semantic" in record:
            return cls(**common, class_map=record["semantic"].astype(np.int32))
        if task == "semantic":
            classes = np.full(panoptic.shape, VOID, np.int32)
            for s in segments:
                classes[panoptic == s["id"]] = s["category"]
            return cls(**common, class_map=classes)
        things = [
            s for s in segments if metadata.is_thing[s["category"]] and not s.get("iscrowd", False)
        ]
        masks = np.zeros((len(things), *panoptic.shape), bool)
        for mask, s in zip(masks, things, strict=True):
            np.equal(panoptic, s["id"], out=mask)
        return cls(
            **common,
            instances=Instances(
                masks,
                np.ones(len(things), np.float32),
                np.array([s["category"] for s in things], np.int32),
            ),
        )


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the mask's pixels, the last two beyond; zeros without any."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
