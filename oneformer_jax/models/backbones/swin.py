"""Swin Transformer (arXiv 2103.14030) as OneFormer uses it, after Detectron2's Mask2Former port.

Letters: B batch, H W the map of a stage, C its channels, G windows, S tokens of a window, N heads,
D head width. Attribute paths are the official parameter names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax.models.attention import attend
from oneformer_jax.models.backbones.common import (
    DEPTHS,
    DROP_PATH,
    HEADS,
    MLP_RATIO,
    Mlp,
    NormalizedBackbone,
    WideningConfig,
    linear,
    linear_init,
    pad_to_multiple,
    partition_windows,
    random_items,
    torch_conv,
)
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import Key, drop_path, layer_norm, split_key
from oneformer_jax.models.stack import Stack, run
from oneformer_jax.rules import Integer, Rule

PATCH = 4
MASK_VALUE = -100.0


@dataclasses.dataclass(frozen=True)
class SwinConfig(WideningConfig):
    """Size of a Swin Transformer.

    Attributes:
      depths: number of blocks in each of the four stages.
      embed_dim: channels of the first stage; each later stage has twice as many.
      num_heads: attention heads of each stage.
      window_size: edge of an attention window, in tokens.
      mlp_ratio: hidden width of a block's MLP over its channels.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "depths": DEPTHS,
        "embed_dim": Integer(1, 2048),
        "num_heads": HEADS,
        "window_size": Integer(2, 64),  # its table of positions has window_size ** 4 entries
        "mlp_ratio": MLP_RATIO,
        "drop_path_rate": DROP_PATH,
    }

    num_heads: tuple[int, ...]
    window_size: int
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        self.require_divisible("num_heads")


PUBLISHED = {
    "swin_tiny": SwinConfig(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7
    ),
    # As pre-trained at 384 pixels.
    "swin_large": SwinConfig(
        embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12
    ),
}


class Swin(NormalizedBackbone):
    """The backbone: an image to four normalised maps."""

    STAGES = "layers"

    def __init__(self, config: SwinConfig, *, rngs: ParamKeys, execution: Execution = Execution()):
        super().__init__(config, PatchEmbed, Stage, rngs=rngs, execution=execution)


class PatchEmbed(nnx.Module):
    """Patches of 4 x 4 pixels to tokens, the image zero padded to whole patches."""

    def __init__(self, width: int, *, rngs: ParamKeys, dtype):
        self.proj = torch_conv(3, width, PATCH, strides=PATCH, padding=0, rngs=rngs, dtype=dtype)
        self.norm = layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.norm(self.proj(pad_to_multiple(image, PATCH)))


class Stage(nnx.Module):
    """Blocks of one resolution, every other one with shifted windows, and the way to the next."""

    def __init__(
        self,
        config: SwinConfig,
        stage: int,
        rates: tuple[float, ...],
        *,
        rngs: ParamKeys,
        execution: Execution,
    ):
        width, dtype = config.channels[stage], execution.compute_dtype
        self.window_size = config.window_size
        self.rates = rates
        blocks = (
            SwinBlock(
                width,
                config.num_heads[stage],
                window_size=config.window_size,
                shift=config.window_size // 2 if i % 2 else 0,
                mlp_ratio=config.mlp_ratio,
                rngs=rngs,
                dtype=dtype,
            )
            for i in range(len(rates))
        )
        self.blocks = Stack(blocks, remat=execution.remat, scan=execution.scan_layers)
        self.downsample = None if stage == 3 else PatchMerging(width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, key: Key) -> jax.Array:
        """The blocks on [B, H, W, C], without the down-sampling."""
        regions = jnp.asarray(shift_regions(*x.shape[1:3], self.window_size))

        def step(x, item, block):
            return block(x, regions if block.shift else None, *item), None

        x, _ = run(step, x, self.blocks, items=random_items(key, self.rates))
        return x


class SwinBlock(nnx.Module):
    """x + attention(norm1(x)) within windows, then x + mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        window_size: int,
        shift: int,
        mlp_ratio: float,
        rngs: ParamKeys,
        dtype,
    ):
        self.window_size = window_size
        self.shift = shift
        self.norm1 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.attn = WindowAttention(width, num_heads, window_size, rngs=rngs, dtype=dtype)
        self.norm2 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.mlp = Mlp(width, int(width * mlp_ratio), rngs=rngs, dtype=dtype)

    def __call__(
        self, x: jax.Array, regions: jax.Array | None, key: Key, rate: float | jax.Array
    ) -> jax.Array:
        """[B, H, W, C] with `shift_regions` int32 [G, S] (None without shift) to [B, H, W, C].

        `rate` is the stochastic depth, with a `key`.
        """
        _, height, width, _ = x.shape
        attention_key, mlp_key = split_key(key, 2)
        # The padding comes after the norm and is attended to: zeros, which the projection's bias
        # turns into keys and values. The shift is kept on maps smaller than a window.
        y = pad_to_multiple(self.norm1(x), self.window_size)
        padded = y.shape[1:3]
        y = jnp.roll(y, (-self.shift, -self.shift), (1, 2)) if self.shift else y
        y = self.attn(partition_windows(y, self.window_size), regions)
        y = merge_windows(y, self.window_size, padded)
        y = jnp.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y
        y = y[:, :height, :width]
        x = x + drop_path(y, rate, attention_key)
        return x + drop_path(self.mlp(self.norm2(x)), rate, mlp_key)


class WindowAttention(nnx.Module):
    """Multi-head attention among the tokens of a window, with a bias by relative position."""

    def __init__(self, width: int, num_heads: int, window_size: int, *, rngs: ParamKeys, dtype):
        self.num_heads = num_heads
        self.window_size = window_size
        table = ((2 * window_size - 1) ** 2, num_heads)
        self.relative_position_bias_table = nnx.Param(linear_init(rngs.params(), table))
        self.qkv = linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.proj = linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, regions: jax.Array | None) -> jax.Array:
        """[B, G, S, C] with int32 [G, S] or None; tokens of different regions are kept apart."""
        batch, windows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch * windows, tokens, 3, self.num_heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        bias = self.relative_position_bias_table[...][relative_position_index(self.window_size)]
        bias = jnp.moveaxis(bias, -1, 0)[None]  # [1, N, S, S], with regions [G, N, S, S]
        if regions is not None:
            same = regions[:, None, :, None] == regions[:, None, None, :]
            bias = bias + jnp.where(same, 0.0, MASK_VALUE)
        q = q * q.shape[-1] ** -0.5
        out = attend(q, k, v, None, bias, None, None, 0.0, tokens)
        return self.proj(out.reshape(x.shape))


class PatchMerging(nnx.Module):
    """Halves the resolution and doubles the channels: 2 x 2 neighbours, norm, linear layer."""

    def __init__(self, width: int, *, rngs: ParamKeys, dtype):
        self.norm = layer_norm(4 * width, rngs=rngs, dtype=dtype)
        self.reduction = linear(4 * width, 2 * width, use_bias=False, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = pad_to_multiple(x, 2)
        # (row, column) offsets in the official order: down before right.
        parts = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(jnp.concatenate(parts, axis=-1)))


def merge_windows(x: jax.Array, size: int, shape: tuple[int, int]) -> jax.Array:
    """Returns the inverse of `partition_windows` for a map of `shape`."""
    height, width = shape
    batch, _, _, channels = x.shape
    x = x.reshape(batch, height // size, width // size, size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, height, width, channels)


def relative_position_index(size: int) -> np.ndarray:
    """Finds the row of the bias table for query i and key j of a window: int32 [S, S]."""
    row, column = np.divmod(np.arange(size * size, dtype=np.int32), size)
    down = row[:, None] - row[None, :] + size - 1
    right = column[:, None] - column[None, :] + size - 1
    return down * (2 * size - 1) + right


def shift_regions(height: int, width: int, size: int) -> np.ndarray:
    """Returns the region of each token in the windows of a shifted map: int32 [G, S].

    Rolling the padded map brings tokens of opposite borders into one window; only tokens of the
    same region may attend to each other.
    """

    def regions_along(length: int) -> np.ndarray:
        padded = -(-length // size) * size
        position = np.arange(padded, dtype=np.int32)
        return (position >= padded - size).astype(np.int32) + (position >= padded - size // 2)

    region = 3 * regions_along(height)[:, None] + regions_along(width)[None, :]
    rows, columns = region.shape
    region = region.reshape(rows // size, size, columns // size, size).swapaxes(1, 2)
    return region.reshape(-1, size * size).astype(np.int32)
