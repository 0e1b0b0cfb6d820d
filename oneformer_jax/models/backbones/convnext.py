"""ConvNeXt (arXiv 2201.03545) as OneFormer uses it: four maps, each with a norm of its own.

Letters: B batch, H W the map of a stage, C its channels. Attribute paths are the official parameter
names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from oneformer_jax.models.backbones.common import (
    DEPTHS,
    DROP_PATH,
    StagedConfig,
    check_image,
    drop_path_rates,
    linear,
    linear_init,
    random_items,
    stages,
)
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import Key, drop_path, gelu, split_key
from oneformer_jax.models.stack import Stack, run
from oneformer_jax.rules import Integer, Number, Rule


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig(StagedConfig):
    """Size of a ConvNeXt.

    Attributes:
      depths: number of blocks in each of the four stages.
      dims: channels of each stage.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
      layer_scale_init: initial value of every block's `gamma`.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "depths": DEPTHS,
        "dims": stages(Integer(1, 16_384)),
        "drop_path_rate": DROP_PATH,
        "layer_scale_init": Number(0, 1000),
    }

    dims: tuple[int, ...]
    drop_path_rate: float = 0.4
    layer_scale_init: float = 1.0

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of res2 to res5."""
        return self.dims


PUBLISHED = {
    "convnext_large": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "convnext_xlarge": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048)),
}


class ConvNeXt(nnx.Module):
    """The backbone: an image to four normalised maps."""

    def __init__(
        self,
        config: ConvNeXtConfig,
        *,
        rngs: ParamKeys,
        execution: Execution = Execution(),
    ):
        self.dtype = dtype = execution.compute_dtype
        options = dict(rngs=rngs, dtype=dtype)
        dims = config.dims
        # In the stem the norm follows the convolution, between stages it precedes it.
        self.downsample_layers = nnx.List(
            [nnx.List([_patches(3, dims[0], 4, **options), _layer_norm(dims[0], **options)])]
            + [
                nnx.List([_layer_norm(i, **options), _patches(i, o, 2, **options)])
                for i, o in itertools.pairwise(dims)
            ]
        )
        self.rates = tuple(drop_path_rates(config))
        self.stages = nnx.List(
            Stack(
                (ConvNeXtBlock(dim, config.layer_scale_init, **options) for _ in range(depth)),
                remat=execution.remat,
                scan=execution.scan_layers,
            )
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        for stage, dim in enumerate(dims):
            setattr(self, f"norm{stage}", _layer_norm(dim, **options))

    def __call__(
        self, image: jax.Array, key: Key = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Extracts features, see `oneformer_jax.models.backbones`, of an image of at least 32 x 32.

        The maps of the stride s are [B, H // s, W // s, C]: what is left of sides that are no
        multiples of it is not seen, as in the official model.
        """
        check_image(image)
        if min(image.shape[1:3]) < 32:
            raise ValueError(f"a ConvNeXt's image must be at least 32 x 32, got {image.shape[1:3]}")

        def step(x, item, block):
            return block(x, *item), None

        x = image.astype(self.dtype)
        outputs = []
        for stage, stage_key in enumerate(split_key(key, 4)):
            for layer in self.downsample_layers[stage]:
                x = layer(x)
            items = random_items(stage_key, self.rates[stage])
            x, _ = run(step, x, self.stages[stage], items=items)
            outputs.append(getattr(self, f"norm{stage}")(x))
        return tuple(outputs)


class ConvNeXtBlock(nnx.Module):
    """x + gamma * mlp(norm(depthwise(x))), the MLP with the exact GELU and four times the width."""

    def __init__(self, dim: int, scale: float, *, rngs: ParamKeys, dtype):
        self.dtype = dtype
        self.dwconv = nnx.Conv(
            dim,
            dim,
            (7, 7),
            padding=3,
            feature_group_count=dim,
            kernel_init=linear_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = _layer_norm(dim, rngs=rngs, dtype=dtype)
        self.pwconv1 = linear(dim, 4 * dim, rngs=rngs, dtype=dtype)
        self.pwconv2 = linear(4 * dim, dim, rngs=rngs, dtype=dtype)
        self.gamma = nnx.Param(jnp.full((dim,), scale, jnp.float32))

    def __call__(self, x: jax.Array, key: Key, rate: float | jax.Array) -> jax.Array:
        """[B, H, W, C] to the same; `rate` is the stochastic depth, with a `key`."""
        y = self.pwconv1(self.norm(self.dwconv(x)))
        y = self.pwconv2(gelu(y))
        y = y * self.gamma[...].astype(self.dtype)
        return x + drop_path(y, rate, key)


def _patches(inputs: int, outputs: int, size: int, *, rngs: ParamKeys, dtype) -> nnx.Conv:
    """A convolution whose stride is its size, without padding."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=size,
        padding="VALID",
        kernel_init=linear_init,
        dtype=dtype,
        rngs=rngs,
    )


def _layer_norm(dim: int, *, rngs: ParamKeys, dtype) -> nnx.LayerNorm:
    return nnx.LayerNorm(dim, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=rngs)
