"""OneFormer in JAX: one model for panoptic, instance and semantic segmentation.

    import oneformer_jax
    segmenter = oneformer_jax.load("runs/synthetic")
    segmentation = segmenter(image, task="panoptic")  # image: uint8 [H, W, 3], RGB
    segmentation.overlay()

The names load when they are first used, so that importing the package does not start JAX.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oneformer_jax.eval.postprocess import Segmentation
    from oneformer_jax.eval.predict import Segmenter
    from oneformer_jax.models.oneformer import OneFormer, OneFormerConfig
    from oneformer_jax.types import TASKS

__all__ = ["TASKS", "OneFormer", "OneFormerConfig", "Segmentation", "Segmenter", "load"]


def load(path: str | os.PathLike[str], **overrides: Any) -> Segmenter:
    """A `Segmenter` from a trained workdir or from one of its checkpoints.

    Args:
      path: a workdir (its newest checkpoint is taken) or a folder `workdir/checkpoints/<step>`.
      **overrides: `short_edge`, `max_size` and fields of `PostprocessConfig` (such as
        `object_mask_threshold`) that replace the run's own; `mesh`, the devices to run on.

    Raises:
      ValueError: no trained model at `path`, a damaged one, or an unknown override.
    """
    from oneformer_jax.eval.predict import Segmenter
    from oneformer_jax.models.oneformer import OneFormerConfig
    from oneformer_jax.train.checkpoint import load_for_inference

    trained = load_for_inference(path)
    return Segmenter.from_settings(
        OneFormerConfig.from_dict(trained.model),
        trained.params,
        trained.stats,
        trained.metadata,
        trained.settings["eval"],
        **overrides,
    )


def __getattr__(name: str) -> Any:
    if name in ("OneFormer", "OneFormerConfig"):
        from oneformer_jax.models import oneformer as module
    elif name == "Segmentation":
        from oneformer_jax.eval import postprocess as module
    elif name == "Segmenter":
        from oneformer_jax.eval import predict as module
    elif name == "TASKS":
        from oneformer_jax import types as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
