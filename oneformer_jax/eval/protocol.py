"""The evaluation protocols of the official repository: the metrics of each dataset."""

from __future__ import annotations

import dataclasses

from oneformer_jax import config_rules
from oneformer_jax.eval.metrics.ap import CocoAP
from oneformer_jax.eval.metrics.cityscapes import CityscapesAP, CityscapesIoU
from oneformer_jax.eval.metrics.instance_json import InstanceAnnotations
from oneformer_jax.eval.metrics.iou import MeanIoU
from oneformer_jax.eval.metrics.pq import PanopticQuality
from oneformer_jax.types import TASKS, Metadata, task_id

Metric = PanopticQuality | MeanIoU | CocoAP | CityscapesAP | CityscapesIoU

PROTOCOLS = ("coco", "ade20k", "cityscapes", "mapillary")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The metrics of a dataset's outputs.

    PQ is panopticapi's everywhere, mIoU Detectron2's. "coco" (and "ade20k") score instances with
    pycocotools, "cityscapes" scores instances and semantic maps as the Cityscapes scripts do,
    "mapillary" scores no instances.

    Attributes:
      name: one of `PROTOCOLS`.
      instance_ids: the labels of instances during scoring: "contiguous" class ids, or "thing":
        positions among the things, as in the official evaluation of ADE20K. The scores are equal.
      annotations: an original instance file as ground truth of AP instead of the panoptic one.
    """

    name: str = "coco"
    instance_ids: str = "contiguous"
    annotations: InstanceAnnotations | None = None

    def __post_init__(self) -> None:
        config_rules.require({"eval.protocol": self.name, "eval.instance_ids": self.instance_ids})
        if self.annotations is not None and self.name not in ("coco", "ade20k"):
            raise ValueError(
                f"eval.instance_json is set, but the protocol {self.name} does not score instances "
                "against such a file; leave it empty, or set eval.protocol=coco"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks with a metric."""
        return tuple(t for t in TASKS if (self.name, t) != ("mapillary", "instance"))

    def make_metric(self, task: str, metadata: Metadata) -> Metric:
        """Makes an empty state of a task's metric; ValueError for a task without one."""
        task_id(task)
        if task not in self.tasks:
            raise ValueError(
                f"the official evaluation of {self.name} has no metric for the task {task!r}; "
                f"leave it out of eval.tasks, or set eval.protocol=coco"
            )
        if task == "panoptic":
            return PanopticQuality(metadata.is_thing)
        thing_labels = self.instance_ids == "thing"
        if self.name == "cityscapes":
            if task == "instance":
                return CityscapesAP(metadata.is_thing, thing_labels=thing_labels)
            return CityscapesIoU(metadata.class_names, metadata.is_thing)
        if task == "instance":
            return CocoAP(
                metadata.is_thing, thing_labels=thing_labels, annotations=self.annotations
            )
        return MeanIoU(metadata.num_classes)


def choose_protocol(
    metadata: Metadata,
    *,
    dataset: str = "",
    name: str = "auto",
    instance_ids: str = "auto",
    instance_json: str = "",
) -> Protocol:
    """Chooses the protocol of an evaluation.

    Args:
      metadata: the classes.
      dataset: the config's `dataset.name`, which decides if `name` is "auto": the official
        datasets have their own protocols, all others are scored as COCO.
      name: one of `PROTOCOLS`, or "auto".
      instance_ids: "contiguous", "thing", or "auto": "thing" for ade20k only.
      instance_json: a COCO instance file whose instances are the ground truth of AP, or "".

    Raises:
      FileNotFoundError: no such file.
      ValueError: unknown names, or a file that does not fit.
    """
    if name == "auto":
        name = dataset if dataset in PROTOCOLS else "coco"
    if instance_ids == "auto":
        instance_ids = "thing" if name == "ade20k" else "contiguous"
    annotations = InstanceAnnotations(instance_json, metadata) if instance_json else None
    return Protocol(name, instance_ids, annotations)
