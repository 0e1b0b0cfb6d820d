"""DiNAT (Dilated Neighborhood Attention Transformer, arXiv 2209.15001) as OneFormer uses it.

Letters: B batch, H W the map of a stage, C its channels, N heads, D head width. Attribute paths are
the official parameter names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax.kernels.neighborhood_attention import neighborhood_attention
from oneformer_jax.kernels.neighborhood_attention.shapes import DILATIONS
from oneformer_jax.models.backbones.common import (
    DEPTHS,
    DROP_PATH,
    HEADS,
    MLP_RATIO,
    MOST_BLOCKS,
    Mlp,
    NormalizedBackbone,
    WideningConfig,
    halving_conv,
    linear,
    linear_init,
    random_items,
    stages,
)
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import Key, drop_path, layer_norm, split_key
from oneformer_jax.models.stack import Stack, run
from oneformer_jax.rules import Integer, Odd, Rule, Tuple


@dataclasses.dataclass(frozen=True)
class DinatConfig(WideningConfig):
    """Size of a DiNAT.

    Attributes:
      depths: number of blocks in each of the four stages.
      embed_dim: channels of the first stage, even; each later stage has twice as many.
      num_heads: attention heads of each stage.
      kernel_size: edge of a pixel's neighbourhood, odd.
      dilations: for each stage, the dilation of each of its blocks.
      mlp_ratio: hidden width of a block's MLP over its channels.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "depths": DEPTHS,
        "embed_dim": Integer(2, 2048, multiple=2),
        "num_heads": HEADS,
        "kernel_size": Odd(3, 63),
        "dilations": stages(Tuple(Integer(1, 1024), 1, MOST_BLOCKS)),
        "mlp_ratio": MLP_RATIO,
        "drop_path_rate": DROP_PATH,
    }

    num_heads: tuple[int, ...]
    kernel_size: int
    dilations: tuple[tuple[int, ...], ...]
    mlp_ratio: float = 2.0
    drop_path_rate: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        self.require_divisible("num_heads")
        self.require(
            tuple(len(stage) for stage in self.dilations) == self.depths,
            "dilations",
            f"hold an integer for each block, in each stage as depths {self.depths} says",
        )


_LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48))
PUBLISHED = {
    "dinat_large": DinatConfig(**_LARGE, kernel_size=11, dilations=DILATIONS["base"]),
    "dinat_large_wide": DinatConfig(**_LARGE, kernel_size=11, dilations=DILATIONS["wide"]),
    "dinat_large_7x7": DinatConfig(**_LARGE, kernel_size=7, dilations=DILATIONS["7x7"]),
}


class DiNAT(NormalizedBackbone):
    """The backbone: an image to four normalised maps."""

    STAGES = "levels"

    def __init__(self, config: DinatConfig, *, rngs: ParamKeys, execution: Execution = Execution()):
        super().__init__(config, ConvTokenizer, Level, rngs=rngs, execution=execution)


class ConvTokenizer(nnx.Module):
    """Two convolutions of stride 2 with nothing between them, and a norm."""

    def __init__(self, width: int, *, rngs: ParamKeys, dtype):
        self.proj = nnx.List(
            [
                halving_conv(3, width // 2, rngs=rngs, dtype=dtype),
                halving_conv(width // 2, width, rngs=rngs, dtype=dtype),
            ]
        )
        self.norm = layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, image: jax.Array) -> jax.Array:
        first, second = self.proj
        return self.norm(second(first(image)))


class Level(nnx.Module):
    """Blocks of one resolution and the way to the next."""

    def __init__(
        self,
        config: DinatConfig,
        stage: int,
        rates: tuple[float, ...],
        *,
        rngs: ParamKeys,
        execution: Execution,
    ):
        width, dtype = config.channels[stage], execution.compute_dtype
        self.rates = rates
        blocks = (
            DinatBlock(
                width,
                config.num_heads[stage],
                kernel_size=config.kernel_size,
                dilation=dilation,
                mlp_ratio=config.mlp_ratio,
                rngs=rngs,
                dtype=dtype,
                implementation=execution.kernels.neighborhood,
            )
            for dilation in config.dilations[stage]
        )
        self.blocks = Stack(blocks, remat=execution.remat, scan=execution.scan_layers)
        self.downsample = None if stage == 3 else ConvDownsampler(width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, key: Key) -> jax.Array:
        """The blocks on [B, H, W, C], without the down-sampling."""

        def step(x, item, block):
            return block(x, *item), None

        x, _ = run(step, x, self.blocks, items=random_items(key, self.rates))
        return x


class DinatBlock(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        kernel_size: int,
        dilation: int,
        mlp_ratio: float,
        rngs: ParamKeys,
        dtype,
        implementation: str,
    ):
        self.norm1 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.attn = NeighborhoodAttention(
            width,
            num_heads,
            kernel_size,
            dilation,
            rngs=rngs,
            dtype=dtype,
            implementation=implementation,
        )
        self.norm2 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.mlp = Mlp(width, int(width * mlp_ratio), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, key: Key, rate: float | jax.Array) -> jax.Array:
        """[B, H, W, C] to the same; `rate` is the stochastic depth, with a `key`."""
        attention_key, mlp_key = split_key(key, 2)
        x = x + drop_path(self.attn(self.norm1(x)), rate, attention_key)
        return x + drop_path(self.mlp(self.norm2(x)), rate, mlp_key)


class NeighborhoodAttention(nnx.Module):
    """Multi-head attention to the pixels around each pixel, with a bias by relative position."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        *,
        rngs: ParamKeys,
        dtype,
        implementation: str,
    ):
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.implementation = implementation
        table = (num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
        self.rpb = nnx.Param(linear_init(rngs.params(), table))
        self.qkv = linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.proj = linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same; a map smaller than the neighbourhood is padded to it."""
        batch, height, width, channels = x.shape
        edge = self.kernel_size * self.dilation
        padded = max(height, edge), max(width, edge)
        qkv = self.qkv(x)
        if padded != (height, width):
            # Officially zeros join the map before the projection, and so become its bias.
            down, right = padded[0] - height, padded[1] - width
            inside = np.zeros((*padded, 1), bool)
            inside[:height, :width] = True
            qkv = jnp.pad(qkv, ((0, 0), (0, down), (0, right), (0, 0)))
            qkv = jnp.where(inside, qkv, self.qkv.bias[...].astype(qkv.dtype))
        qkv = qkv.reshape(batch, *padded, 3, self.num_heads, channels // self.num_heads)
        out = neighborhood_attention(
            *jnp.moveaxis(qkv, 3, 0),
            self.rpb[...],
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            implementation=self.implementation,
        )
        return self.proj(out[:, :height, :width].reshape(x.shape))


class ConvDownsampler(nnx.Module):
    """Halves the resolution and doubles the channels: convolution, then norm."""

    def __init__(self, width: int, *, rngs: ParamKeys, dtype):
        self.reduction = halving_conv(width, 2 * width, use_bias=False, rngs=rngs, dtype=dtype)
        self.norm = layer_norm(2 * width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.reduction(x))
