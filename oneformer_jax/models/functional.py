"""Applies the model to plain nested dicts of parameters: features and predictions come out.

A function that is compiled closes over the structure of the model (`abstract(config).graph`), takes
parameters and statistics as plain dicts, and merges the three while it is traced. The task enters
only `decode`: what `encode` makes of an image serves every task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax.compilation import Program
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.oneformer import OneFormer, OneFormerConfig, normalize_images
from oneformer_jax.types import Features, Predictions

# Top-level parts of the model. The text branch, and all that only losses need:
TEXT_PARTS = ("text_encoder", "text_projector", "prompt_ctx", "logit_scale")
TRAINING_PARTS = (*TEXT_PARTS, "query_class")
# What `encode` reads; `decode` reads the rest.
ENCODER_PARTS = ("backbone", "pixel_decoder")


class Split(NamedTuple):
    """A model taken apart; `merge` puts it together.

    Attributes:
      graph: the structure, hashable, without any array.
      params: nested dict of the trained parameters.
      stats: nested dict of what else the modules hold (statistics of batch norm).
    """

    graph: nnx.GraphDef
    params: dict[str, Any]
    stats: dict[str, Any]


def split(model: OneFormer) -> Split:
    """Takes a module apart into its structure and plain dicts."""
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    return Split(graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats))


def abstract(
    config: OneFormerConfig, execution: Execution = Execution(), *, training: bool
) -> Split:
    """Returns the model of `config` with `jax.ShapeDtypeStruct` for arrays; computes no parameter.

    Args:
      config: the architecture.
      execution: how the model is run; it changes neither names nor shapes of the arrays.
      training: whether the model has the parts that only losses need (the text branch).
    """
    how = dict(execution=execution, training=training)
    return split(nnx.eval_shape(lambda: OneFormer(config, rngs=ParamKeys(), **how)))


def init(config: OneFormerConfig, seed: int | None, *, training: bool) -> Split:
    """Draws a new model of `config` on the host; see `abstract` and `ParamKeys`."""
    return split(OneFormer(config, rngs=ParamKeys(seed), training=training))


def merge(graph: nnx.GraphDef, params: Mapping[str, Any], stats: Mapping[str, Any]) -> OneFormer:
    """Returns the module of a structure, its parameters and its statistics."""
    return nnx.merge(graph, params, stats)


def inference_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out the parts that only losses need: those of `abstract(training=False)` stay."""
    return {name: value for name, value in params.items() if name not in TRAINING_PARTS}


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Tells a model that is traced in it over which mesh the batch is split, over all of its axes.

    The compiler partitions everything but the Pallas kernels: these, and `layers.once_per_shard`,
    ask for the mesh. None, and a mesh of one device, split nothing.
    """
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def encode(
    graph: nnx.GraphDef,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    image: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> Features:
    """Runs the backbone and the pixel decoder: all that does not depend on the task.

    Args:
      graph: of `abstract(config, training=False)`.
      params: nested dict; parts that only losses need may be present and are not read.
      stats: nested dict.
      image: float32 [B, H, W, 3], normalised (`normalize_images`); H and W multiples of 32.
      mesh: mesh over whose axes the batch is split.
    """
    with on_mesh(mesh):
        return merge(graph, inference_params(params), stats).encode(image)


def decode(
    graph: nnx.GraphDef,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    features: Features,
    task_tokens: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> Predictions:
    """Predicts masks and classes for the task of each image.

    Args:
      graph, params, stats, mesh: as for `encode`.
      features: of `encode`.
      task_tokens: int32 [B, 77], rows of `types.TASK_TOKENS`.
    """
    with on_mesh(mesh):
        return merge(graph, inference_params(params), stats).decode(features, task_tokens)


class Programs(NamedTuple):
    """The two programs of prediction, compiled on demand for each padded size of the images.

    One task or several, alone or in an evaluation: everything runs these two, so that the results
    do not depend on what was asked for together.

    Attributes:
      encode: (params, stats, image uint8 [B, H, W, 3], image_size int [B, 2]) -> Features.
      decode: (params, stats, features, task_tokens int32 [77]) -> class logits float32
        [B, Q, K+1] and mask logits float32 [B, Q, h, w] of the final prediction.
    """

    encode: Program
    decode: Program


def programs(
    graph: nnx.GraphDef,
    mesh: Mesh | None = None,
    *,
    prepare: Callable[..., Any] | None = None,
) -> Programs:
    """Returns the programs of prediction with a model.

    Args:
      graph: of `abstract(config, training=False)`.
      mesh: devices over all of whose axes the batch is split; each keeps the results of its own
        images. None is the default device.
      prepare: see `execution.chooser`.
    """
    kept = {} if mesh is None else {"out_shardings": NamedSharding(mesh, P(mesh.axis_names))}

    def whole(params):
        # Sharded ones are gathered: left to itself, XLA would send feature maps about.
        if mesh is None:
            return params
        return jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))

    def encode_images(params, stats, image, image_size) -> Features:
        image = normalize_images(image, image_size)
        return encode(graph, whole(params), stats, image, mesh=mesh)

    def decode_task(params, stats, features, task_tokens) -> tuple[jax.Array, jax.Array]:
        batch = len(features.mask_features)
        tokens = jnp.broadcast_to(task_tokens, (batch, *task_tokens.shape))
        predictions = decode(graph, whole(params), stats, features, tokens, mesh=mesh)
        return predictions.class_logits[-1], predictions.mask_logits()

    how: dict[str, Any] = dict(looks_at=slice(2, 3), prepare=prepare)  # at the images, features
    return Programs(
        Program(jax.jit(encode_images, **kept), "the encoding of images", **how),
        Program(jax.jit(decode_task, **kept), "the prediction from features", **how),
    )
