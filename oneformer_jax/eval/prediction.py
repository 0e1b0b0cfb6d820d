"""The model's answer for one image, from which results are made without running it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from oneformer_jax.eval.postprocess import PostprocessConfig, segment_images
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.rules import Number, require
from oneformer_jax.types import Metadata


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Logits of one image for some tasks: see `Segmenter.predict`.

    Attributes:
      image: uint8 [H, W, 3].
      logits: task -> class logits float32 [1, Q, K+1], mask logits float32 [1, Q, h, w].
      image_size: int32 [1, 2], height and width of the resized image within the padded input.
      padded_size: height and width of that input.
      postprocess: thresholds.
      metadata: the K classes.
    """

    image: np.ndarray
    logits: Mapping[str, tuple[jax.Array, jax.Array]]
    image_size: np.ndarray
    padded_size: tuple[int, int]
    postprocess: PostprocessConfig
    metadata: Metadata

    def segmentation(self, task: str, threshold: float | None = None) -> Segmentation:
        """Makes the result of a task, equal to that of the Segmenter with this `threshold`.

        The semantic task has no scores: there the threshold does nothing.
        """
        (found,) = segment_images(
            *self.logits[task],
            self.image_size,
            np.array([self.image.shape[:2]]),
            self.padded_size,
            task=task,
            config=with_threshold(self.postprocess, threshold),
            metadata=self.metadata,
            images=[self.image],
        )
        return ranked(found, threshold)


def with_threshold(config: PostprocessConfig, threshold: float | None) -> PostprocessConfig:
    """Replaces the panoptic task's threshold, unless `threshold` is None.

    Raises:
      ValueError: it is no number from 0 to 1.
    """
    if threshold is None:
        return config
    require("", {"threshold": threshold}, {"threshold": Number(0, 1)})
    return dataclasses.replace(config, object_mask_threshold=threshold)


def ranked(found: Segmentation, threshold: float | None) -> Segmentation:
    """Sorts instances by falling score, and leaves out those that are not above the threshold."""
    if found.task != "instance":
        return found
    order = np.argsort(-found.instances.scores, kind="stable")
    if threshold is not None:
        order = order[found.instances.scores[order] > threshold]
    return dataclasses.replace(found, instances=found.instances.take(order), threshold=threshold)
