"""InternImage (arXiv 2211.05778) in the form of its size H, as OneFormer uses it.

Letters: B batch, H W the map of a stage, C its channels, G groups, P points, D channels of a group.
Attribute paths are the official parameter names, but for the layers that the official code wraps in
a Sequential: a norm has its own name here, without the index inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax.kernels.ms_deform_attn import ms_deform_attn
from oneformer_jax.kernels.recompute import recompute
from oneformer_jax.models import initial
from oneformer_jax.models.backbones.common import (
    DEPTHS,
    DROP_PATH,
    HEADS,
    MLP_RATIO,
    MOST_BLOCKS,
    Mlp,
    WideningBackbone,
    WideningConfig,
    halving_conv,
    random_items,
    torch_conv,
)
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import (
    Key,
    drop_path,
    gelu,
    layer_norm,
    linear,
    split_key,
)
from oneformer_jax.models.stack import Stack, run
from oneformer_jax.rules import Integer, Odd, Rule, Tuple

EPSILON = 1e-6  # of the norms
POINTS = 9


@dataclasses.dataclass(frozen=True)
class InternImageConfig(WideningConfig):
    """Size of an InternImage with norms after its branches and scaled centres, as the size H.

    Attributes:
      depths: number of blocks in each of the four stages.
      embed_dim: channels of the first stage, even; each later stage has twice as many.
      groups: of each stage's deformable convolutions.
      norm_after: blocks of the third stage, from 0, that a norm of the running map follows.
      dw_kernel_size: edge of the depthwise convolution that precedes offsets and weights, odd.
      mlp_ratio: hidden width of a block's MLP over its channels.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "depths": DEPTHS,
        "embed_dim": Integer(2, 2048, multiple=2),
        "groups": HEADS,
        "norm_after": Tuple(Integer(0, MOST_BLOCKS - 1), 0, MOST_BLOCKS, "ascending"),
        "dw_kernel_size": Odd(1, 63),
        "mlp_ratio": MLP_RATIO,
        "drop_path_rate": DROP_PATH,
    }

    groups: tuple[int, ...]
    norm_after: tuple[int, ...] = ()
    dw_kernel_size: int = 5
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        self.require_divisible("groups")
        self.require(
            all(block < self.depths[2] for block in self.norm_after),
            "norm_after",
            f"lie in 0 to {self.depths[2] - 1}, the blocks of the third stage",
        )


PUBLISHED = {
    "internimage_huge": InternImageConfig(
        embed_dim=320,
        depths=(6, 6, 32, 6),
        groups=(10, 20, 40, 80),
        norm_after=(5, 11, 17, 23, 29),
    )
}


class InternImage(WideningBackbone):
    """The backbone: an image to four normalised maps."""

    STAGES = "levels"

    def __init__(
        self, config: InternImageConfig, *, rngs: ParamKeys, execution: Execution = Execution()
    ):
        super().__init__(config, Stem, Level, rngs=rngs, execution=execution)


class Stem(nnx.Module):
    """Two convolutions of stride 2, each with a norm, and a GELU between them."""

    def __init__(self, width: int, *, rngs: ParamKeys, dtype):
        self.conv1 = halving_conv(3, width // 2, rngs=rngs, dtype=dtype)
        self.norm1 = _norm(width // 2, rngs=rngs, dtype=dtype)
        self.conv2 = halving_conv(width // 2, width, rngs=rngs, dtype=dtype)
        self.norm2 = _norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, image: jax.Array) -> jax.Array:
        x = gelu(self.norm1(self.conv1(image)))
        return self.norm2(self.conv2(x))


class Level(nnx.Module):
    """Blocks of one resolution, the norm of their result, and the way to the next."""

    def __init__(
        self,
        config: InternImageConfig,
        stage: int,
        rates: tuple[float, ...],
        *,
        rngs: ParamKeys,
        execution: Execution,
    ):
        width, dtype = config.channels[stage], execution.compute_dtype
        self.rates = rates
        self.norm_after = config.norm_after if stage == 2 else ()
        blocks = (
            InternImageBlock(
                width,
                config.groups[stage],
                dw_kernel_size=config.dw_kernel_size,
                mlp_ratio=config.mlp_ratio,
                implementation=execution.kernels.deform_attn,
                rngs=rngs,
                dtype=dtype,
            )
            for _ in rates
        )
        self.blocks = Stack(blocks, remat=execution.remat, scan=execution.scan_layers)
        self.norm = _norm(width, rngs=rngs, dtype=dtype)
        self.post_norms = nnx.List(_norm(width, rngs=rngs, dtype=dtype) for _ in self.norm_after)
        self.downsample = None if stage == 3 else Downsample(width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, key: Key) -> jax.Array:
        """The blocks and the norm on [B, H, W, C], without the down-sampling."""

        def step(x, item, block):
            random, post_norm = item
            x = block(x, *random)
            if post_norm is not None:
                applies, weights = post_norm
                norm = nnx.merge(nnx.graphdef(self.norm), weights)
                x = jax.lax.cond(applies, norm, lambda x: x, x)
            return x, None

        items = (random_items(key, self.rates), self._post_norms_by_block())
        x, _ = run(step, x, self.blocks, items=items)
        return self.norm(x)

    def _post_norms_by_block(self) -> tuple[np.ndarray, nnx.State] | None:
        """Finds the parameters of the norm that follows each block; None if there is none.

        As values rather than as structure, so that all blocks are one loop with one body.
        """
        if not self.norm_after:
            return None
        norms = dict(zip(self.norm_after, map(nnx.state, self.post_norms), strict=True))
        unused = jax.tree.map(jnp.zeros_like, nnx.state(self.norm))
        blocks = range(len(self.rates))
        weights = jax.tree.map(lambda *x: jnp.stack(x), *(norms.get(i, unused) for i in blocks))
        return np.isin(blocks, self.norm_after), weights


class InternImageBlock(nnx.Module):
    """x + res_post_norm1(dcn(norm1(x))), then x + res_post_norm2(mlp(norm2(x)))."""

    def __init__(
        self,
        width: int,
        groups: int,
        *,
        dw_kernel_size: int,
        mlp_ratio: float,
        implementation: str,
        rngs: ParamKeys,
        dtype,
    ):
        self.norm1 = _norm(width, rngs=rngs, dtype=dtype)
        self.dcn = DCNv3(
            width, groups, dw_kernel_size, implementation=implementation, rngs=rngs, dtype=dtype
        )
        self.res_post_norm1 = _norm(width, rngs=rngs, dtype=dtype)
        self.norm2 = _norm(width, rngs=rngs, dtype=dtype)
        self.mlp = Mlp(width, int(width * mlp_ratio), rngs=rngs, dtype=dtype)
        self.res_post_norm2 = _norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, key: Key, rate: float | jax.Array) -> jax.Array:
        """[B, H, W, C] to the same; `rate` is the stochastic depth, with a `key`."""
        dcn_key, mlp_key = split_key(key, 2)
        y = self.res_post_norm1(self.dcn(self.norm1(x)))
        x = x + drop_path(y, rate, dcn_key)
        y = self.res_post_norm2(self.mlp(self.norm2(x)))
        return x + drop_path(y, rate, mlp_key)


class DCNv3(nnx.Module):
    """Deformable 3 x 3 convolution whose offsets and weights are read off the map itself.

    Each group of channels reads the nine pixels around a pixel, moved by learned offsets, and sums
    them with learned shares; then it mixes in the pixel's own value.
    """

    def __init__(
        self,
        width: int,
        groups: int,
        dw_kernel_size: int,
        *,
        implementation: str,
        rngs: ParamKeys,
        dtype,
    ):
        self.groups = groups
        self.implementation = implementation
        self.dw_conv = torch_conv(
            width,
            width,
            dw_kernel_size,
            strides=1,
            padding=dw_kernel_size // 2,
            groups=width,
            rngs=rngs,
            dtype=dtype,
        )
        self.dw_norm = _norm(width, rngs=rngs, dtype=dtype)
        # float32: they are coordinates and shares.
        options = dict(kernel_init=initial.zeros, bias_init=initial.zeros, rngs=rngs)
        self.offset = linear(width, groups * POINTS * 2, **options)
        self.mask = linear(width, groups * POINTS, **options)
        options = dict(kernel_init=initial.xavier, bias_init=initial.zeros, rngs=rngs, dtype=dtype)
        self.input_proj = linear(width, width, **options)
        self.output_proj = linear(width, width, **options)
        self.center_feature_scale_proj_weight = nnx.Param(jnp.zeros((groups, width)))
        self.center_feature_scale_proj_bias = nnx.Param(jnp.zeros(groups))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        batch, height, width, _ = x.shape
        value = self.input_proj(x).reshape(batch, height * width, self.groups, -1)
        y = gelu(self.dw_norm(self.dw_conv(x)))
        y = y.reshape(batch, height * width, -1).astype(jnp.float32)
        offsets = self.offset(y).reshape(batch, height * width, self.groups, POINTS, 2)
        shares = self.mask(y).reshape(batch, height * width, self.groups, POINTS)
        shares = jax.nn.softmax(shares)
        out = sample(value, offsets, shares, (height, width), implementation=self.implementation)
        scale = y @ self.center_feature_scale_proj_weight[...].T
        scale = jax.nn.sigmoid(scale + self.center_feature_scale_proj_bias[...])[..., None]
        out = (out * (1 - scale) + value * scale).astype(value.dtype)
        return self.output_proj(out.reshape(x.shape))


class Downsample(nnx.Module):
    """Halves the resolution and doubles the channels: convolution, then norm."""

    def __init__(self, width: int, *, rngs: ParamKeys, dtype):
        self.conv = halving_conv(width, 2 * width, use_bias=False, rngs=rngs, dtype=dtype)
        self.norm = _norm(2 * width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


def sample(
    value: jax.Array,
    offsets: jax.Array,
    shares: jax.Array,
    shape: tuple[int, int],
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Sums of bilinear samples around each pixel; outside of the map is zero.

    It is deformable attention to one map. A few groups are done at a time, since each sample reads
    four rows: 36 times the memory of the map for all groups at once.

    Args:
      value: [B, H * W, G, D].
      offsets: float32 [B, H * W, G, 9, 2], (x, y) in pixels from the places of a 3 x 3 kernel, its
        columns one after another: (-1, -1), (-1, 0), (-1, 1), (0, -1) and so on.
      shares: float32 [B, H * W, G, 9].
      shape: (H, W).
      implementation: see `oneformer_jax.kernels.ms_deform_attn`.

    Returns:
      [B, H * W, G, D] in the type of `value`.
    """
    height, width = shape
    batch, pixels, groups, channels = value.shape
    row, column = np.divmod(np.arange(pixels, dtype=np.float32), width)
    right, down = np.divmod(np.arange(POINTS, dtype=np.float32), 3)
    x = column[:, None] + right - 1
    y = row[:, None] + down - 1
    places = np.stack([x, y], axis=-1)[:, None]  # [H * W, 1, 9, 2]
    locations = (places + offsets + 0.5) / np.array([width, height], np.float32)
    most = max(1, groups // POINTS)
    group = max(g for g in range(1, most + 1) if groups % g == 0)

    def split(x):  # [B, H * W, G, ...] to [steps, B, H * W, group, ...]
        return jnp.moveaxis(x.reshape(batch, pixels, -1, group, *x.shape[3:]), 2, 0)

    @recompute
    def step(value, locations, shares):
        return ms_deform_attn(
            value,
            (shape,),
            locations[:, :, :, None],
            shares[:, :, :, None],
            implementation=implementation,
        )

    out = jax.lax.map(lambda x: step(*x), (split(value), split(locations), split(shares)))
    return jnp.moveaxis(out, 0, 2).reshape(batch, pixels, groups, channels)


def _norm(width: int, *, rngs: ParamKeys, dtype) -> nnx.LayerNorm:
    return layer_norm(width, epsilon=EPSILON, rngs=rngs, dtype=dtype)
