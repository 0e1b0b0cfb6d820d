"""The segmentation of one image: a prediction or the ground truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from oneformer_jax.types import VOID, Metadata, task_id

# None in the segmentations of the other tasks: whoever reads a field knows the task.
Array = np.ndarray | Any


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """One image's result at its original size; the fields of the other two tasks are None.

    Attributes:
      task: "panoptic", "instance" or "semantic".
      metadata: names, colours and ids of the classes.
      segments: panoptic, int32 [H, W]; 0 is unassigned, segment ids count from 1.
      segments_info: panoptic, one dict per segment in order of id: id (int), category_id
        (contiguous class id), isthing (bool), score (class probability; the highest of merged
        stuff), area (pixels).
      class_map: semantic, int32 [H, W] class ids (`types.VOID` only in ground truth).
      masks: instance, bool [N, H, W], highest class probability first; masks may overlap.
      scores: instance, float32 [N], class probability times mean mask probability.
      labels: instance, int32 [N] class ids.
      image: uint8 [H, W, 3] RGB, or None if it was not kept.
    """

    task: str
    metadata: Metadata
    segments: Array = None
    segments_info: list[dict[str, Any]] | Any = None
    class_map: Array = None
    masks: Array = None
    scores: Array = None
    labels: Array = None
    image: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        found = {"panoptic": self.segments, "semantic": self.class_map, "instance": self.masks}
        height, width = found[self.task].shape[-2:]
        return int(height), int(width)

    def overlay(self, image: np.ndarray | None = None, **options: Any) -> np.ndarray:
        """Draws the result over `image` (default: the segmented image), uint8 [H, W, 3].

        `options` are those of `pictures.overlay.draw`.
        """
        from oneformer_jax.eval.pictures import overlay

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
            masks=masks,
            scores=np.ones(len(things), np.float32),
            labels=np.array([s["category"] for s in things], np.int32),
        )
