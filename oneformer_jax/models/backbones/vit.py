"""Plain vision transformers: DINOv2 (arXiv 2304.07193), with registers, and DINOv3 (2508.10104).

Their one map becomes four by the simple pyramid of ViTDet (arXiv 2203.16527).

Letters: B batch, T tokens (class token, registers, then the patches by rows), C channels, N heads,
D head width, h w the grid of patches. Attribute paths are the official parameter names, but for the
parts of packed projections: `attn.q`, `attn.k`, `attn.v` and `mlp.w1`, `mlp.w2`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax.kernels import dispatch
from oneformer_jax.models import initial
from oneformer_jax.models.attention import attend
from oneformer_jax.models.backbones.common import (
    DROP_PATH,
    Mlp,
    RuledConfig,
    check_image,
    linear,
    linear_init,
    pad_to_multiple,
    partition_windows,
    random_items,
    torch_conv,
)
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import Key, drop_path, gelu, layer_norm, split_key
from oneformer_jax.models.stack import Stack, run
from oneformer_jax.rules import Flag, Integer, Number, Rule, Word

# More tokens than the first number are attended in chunks of the keys of about the second: an
# accelerator never forms a float32 [T, T] of many, and a processor's chunk stays in its cache (at
# 1029 tokens, 12 heads of 64: 26 ms of its time against 71 ms, `jax.nn.dot_product_attention` 106).
CHUNKS = {"cpu": (256, 128)}
ACCELERATOR_CHUNKS = (2048, 1024)


@dataclasses.dataclass(frozen=True)
class ViTConfig(RuledConfig):
    """Size and kind of a vision transformer; the defaults are those of DINOv2 without registers.

    Attributes:
      embed_dim: channels C of the tokens; res2 to res5 have C/4, C/2, C and C.
      depth: number of blocks.
      num_heads: attention heads of a block.
      mlp_dim: hidden width of a block's MLP, of each of the two products where it is gated.
      patch_size: edge of a patch, in pixels.
      positions: side of the square grid of learned positions; 0: rotary positions (DINOv3).
      position_offset: patches that are added to a grid before learned positions are interpolated to
        it. The official DINOv2 without registers adds 0.1; `transformers` adds none.
      antialias: whether that interpolation has an antialiasing filter: with registers.
      rope_base: base of the periods of rotary positions.
      registers: tokens beside the class token without a place in the image ("storage tokens").
      gated: SwiGLU instead of an MLP with GELU.
      qkv_bias: whether queries and values have a bias.
      key_bias: whether keys have one, too; DINOv3 masks it out.
      norm_epsilon: of the norms.
      layer_scale_init: initial factor on the output of each branch.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
      maps: "last": the pyramid is made of the last block's tokens; "depths": res2 to res5 come from
        the blocks at a quarter, half, three quarters and the whole of the depth.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "embed_dim": Integer(4, 8192, multiple=4),
        "depth": Integer(1, 200),
        "num_heads": Integer(1, 1024),
        "mlp_dim": Integer(1, 65_536),
        "patch_size": Integer(4, 64),
        "positions": Integer(0, 256),
        "position_offset": Number(0, 1),
        "antialias": Flag(),
        "rope_base": Number(1, 10_000, above=True),
        "registers": Integer(0, 1024),
        "gated": Flag(),
        "qkv_bias": Flag(),
        "key_bias": Flag(),
        "norm_epsilon": Number(0, 1, above=True),
        "layer_scale_init": Number(0, 1000),
        "drop_path_rate": DROP_PATH,
        "maps": Word(("last", "depths")),
    }

    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int = 14
    positions: int = 37
    position_offset: float = 0.1
    antialias: bool = False
    rope_base: float = 100.0
    registers: int = 0
    gated: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    norm_epsilon: float = 1e-6
    layer_scale_init: float = 1.0
    drop_path_rate: float = 0.0
    maps: str = "last"

    def __post_init__(self):
        super().__post_init__()
        parts = self.num_heads * (1 if self.positions else 4)  # two axes, sine and cosine
        kind = "" if self.positions else " times 4, for rotary positions"
        self.require(
            self.embed_dim % parts == 0,
            "embed_dim",
            f"be a multiple of num_heads = {self.num_heads}{kind}",
        )

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of res2 to res5."""
        width = self.embed_dim
        return width // 4, width // 2, width, width


_SIZES: dict[str, dict[str, Any]] = {
    "small": dict(embed_dim=384, depth=12, num_heads=6, mlp_dim=1536, drop_path_rate=0.1),
    "base": dict(embed_dim=768, depth=12, num_heads=12, mlp_dim=3072, drop_path_rate=0.1),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, mlp_dim=4096, drop_path_rate=0.3),
}
_GATED = dict(gated=True, drop_path_rate=0.3)
_DINOV2: dict[str, dict[str, Any]] = {
    **_SIZES,
    "giant": dict(embed_dim=1536, depth=40, num_heads=24, mlp_dim=4096, **_GATED),
}
_REGISTERS = dict(registers=4, position_offset=0.0, antialias=True)
_DINOV3: dict[str, dict[str, Any]] = {
    **_SIZES,
    "small_plus": _SIZES["small"] | {"gated": True},
    "huge_plus": dict(embed_dim=1280, depth=32, num_heads=20, mlp_dim=5120, **_GATED),
    "7b": dict(
        embed_dim=4096, depth=40, num_heads=32, mlp_dim=8192, qkv_bias=False, **_GATED
    ),
}  # fmt: skip
_ROTARY = dict(patch_size=16, positions=0, registers=4, key_bias=False, norm_epsilon=1e-5)
PUBLISHED = {
    **{f"dinov2_{size}": ViTConfig(**fields) for size, fields in _DINOV2.items()},
    **{f"dinov2_{size}_registers": ViTConfig(**x, **_REGISTERS) for size, x in _DINOV2.items()},
    **{f"dinov3_{size}": ViTConfig(**fields, **_ROTARY) for size, fields in _DINOV3.items()},
}


class ViT(nnx.Module):
    """The backbone: an image to four maps."""

    def __init__(self, config: ViTConfig, *, rngs: ParamKeys, execution: Execution = Execution()):
        self.config = config
        self.dtype = dtype = execution.compute_dtype
        width, how = config.embed_dim, dict(rngs=rngs, dtype=dtype)

        def tokens(count: int) -> nnx.Param:
            return nnx.Param(linear_init(rngs.params(), (1, count, width)))

        self.patch_embed = PatchEmbed(width, config.patch_size, **how)
        self.cls_token = tokens(1)
        if config.positions:
            self.pos_embed = tokens(1 + config.positions**2)
        if config.registers:
            self.register_tokens = tokens(config.registers)
        blocks = (Block(config, **how) for _ in range(config.depth))
        self.blocks = Stack(blocks, remat=execution.remat, scan=execution.scan_layers)
        self.norm = layer_norm(width, epsilon=config.norm_epsilon, **how)
        self.pyramid = Pyramid(width, **how)

    def __call__(
        self, image: jax.Array, key: Key = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Extracts features, see `oneformer_jax.models.backbones`, of an image of any size.

        It is zero padded to whole patches. The maps of the stride s are [B, ceil(H / s),
        ceil(W / s), C].
        """
        depths, grid = self.tokens(image, key)
        size = image.shape[1:3]
        sixteenth = tuple(-(-n // 16) for n in size)
        maps = []
        for x in depths:
            x = x[:, -grid[0] * grid[1] :].reshape(len(x), *grid, -1)
            for axis in (0, 1) if self.config.patch_size != 16 else ():
                matrix = resample_matrix(grid[axis], sixteenth[axis], self.config.patch_size / 16)
                x = _along(x, matrix, axis + 1)
            maps.append(x)
        maps = self.pyramid(maps if len(maps) == 4 else maps * 4)
        return tuple(
            x[:, : -(-size[0] // s), : -(-size[1] // s)]
            for x, s in zip(maps, (4, 8, 16, 32), strict=True)
        )

    def tokens(self, image: jax.Array, key: Key = None) -> tuple[list[jax.Array], tuple[int, int]]:
        """Runs the transformer.

        Returns:
          The normalised tokens [B, T, C] of the last block, or with maps="depths" of four blocks;
          and the grid (h, w) of the patches, which are the last h * w tokens.
        """
        check_image(image)
        config = self.config
        x = self.patch_embed(image.astype(self.dtype))
        batch, *grid, width = x.shape
        x = x.reshape(batch, -1, width)
        first = self.cls_token[...]
        if config.positions:
            positions = interpolate_positions(
                self.pos_embed[0, 1:], tuple(grid), config.position_offset, config.antialias
            )
            first = first + self.pos_embed[:, :1]
            x = x + positions.astype(self.dtype)
        parts = [first] + ([self.register_tokens[...]] if config.registers else [])
        prefix = jnp.concatenate(parts, axis=1).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(prefix, (batch, *prefix.shape[1:])), x], axis=1)
        turn = None
        if not config.positions:
            head = width // config.num_heads
            turn = rotary_table(grid, head, config.rope_base, prefix.shape[1])
        whole = config.maps == "last"

        def step(x, item, block):
            x = block(x, turn, *item)
            return x, None if whole else x

        rates = tuple(np.linspace(0, config.drop_path_rate, config.depth).tolist())
        x, outputs = run(step, x, self.blocks, items=random_items(key, rates))
        ends = [-(-config.depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
        chosen = [x] if whole else [outputs[end] for end in ends]
        return [self.norm(x) for x in chosen], tuple(grid)


class PatchEmbed(nnx.Module):
    """Patches to tokens, the image zero padded to whole patches: a convolution as a product."""

    def __init__(self, width: int, patch: int, *, rngs: ParamKeys, dtype: Any):
        self.patch = patch
        self.proj = torch_conv(3, width, patch, strides=patch, padding=0, rngs=rngs, dtype=dtype)

    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, 3] to [B, h, w, C]."""
        image = pad_to_multiple(image, self.patch)
        batch, height, width, _ = image.shape
        x = partition_windows(image, self.patch)
        x = x.reshape(batch, height // self.patch, width // self.patch, -1)
        kernel = self.proj.kernel[...]
        kernel = kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype)
        return x @ kernel + self.proj.bias[...].astype(x.dtype)


class Block(nnx.Module):
    """x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x))."""

    def __init__(self, config: ViTConfig, *, rngs: ParamKeys, dtype: Any):
        width, how = config.embed_dim, dict(rngs=rngs, dtype=dtype)
        self.norm1 = layer_norm(width, epsilon=config.norm_epsilon, **how)
        self.attn = Attention(config, **how)
        self.ls1 = LayerScale(width, config.layer_scale_init, rngs=rngs)
        self.norm2 = layer_norm(width, epsilon=config.norm_epsilon, **how)
        mlp = SwiGlu if config.gated else Mlp
        self.mlp = mlp(width, config.mlp_dim, **how)
        self.ls2 = LayerScale(width, config.layer_scale_init, rngs=rngs)

    def __call__(
        self, x: jax.Array, turn: jax.Array | None, key: Key, rate: float | jax.Array
    ) -> jax.Array:
        """[B, T, C] with `rotary_table` or None; `rate` is the stochastic depth, with a `key`."""
        attention_key, mlp_key = split_key(key, 2)
        x = x + drop_path(self.ls1(self.attn(self.norm1(x), turn)), rate, attention_key)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), rate, mlp_key)


class LayerScale(nnx.Module):
    """Multiplies each channel by a learned factor."""

    def __init__(self, width: int, value: float, *, rngs: ParamKeys):
        self.gamma = nnx.Param(initial.constant(value)(rngs.params(), (width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...].astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention among all tokens, without a float32 [T, T] where these are many."""

    def __init__(self, config: ViTConfig, *, rngs: ParamKeys, dtype: Any):
        self.num_heads = config.num_heads
        width, how = config.embed_dim, dict(rngs=rngs, dtype=dtype)
        self.q = linear(width, width, use_bias=config.qkv_bias, **how)
        self.k = linear(width, width, use_bias=config.qkv_bias and config.key_bias, **how)
        self.v = linear(width, width, use_bias=config.qkv_bias, **how)
        self.proj = linear(width, width, **how)

    def __call__(self, x: jax.Array, turn: jax.Array | None) -> jax.Array:
        """[B, T, C] with `rotary_table` float32 [2, T, 1, D / 2], or None, to [B, T, C]."""
        q, k, v = (
            part(x).reshape(*x.shape[:2], self.num_heads, -1) for part in (self.q, self.k, self.v)
        )
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        tokens = x.shape[1]
        whole, most = CHUNKS.get(dispatch.platform(), ACCELERATOR_CHUNKS)
        chunk = tokens if tokens <= whole else -(-tokens // -(-tokens // most))
        out = attend(q * q.shape[-1] ** -0.5, k, v, None, None, None, None, 0.0, chunk)
        return self.proj(out.reshape(x.shape))


class SwiGlu(nnx.Module):
    """w3(silu(w1(x)) * w2(x))."""

    def __init__(self, width: int, hidden: int, *, rngs: ParamKeys, dtype: Any):
        self.w1 = linear(width, hidden, rngs=rngs, dtype=dtype)
        self.w2 = linear(width, hidden, rngs=rngs, dtype=dtype)
        self.w3 = linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w3(jax.nn.silu(self.w1(x)) * self.w2(x))


class Pyramid(nnx.Module):
    """Maps of stride 16 to the strides 4, 8, 16 and 32, by deconvolutions and a maximum.

    The projections to one width that follow in ViTDet are the pixel decoder's here.
    """

    def __init__(self, width: int, *, rngs: ParamKeys, dtype: Any):
        how = dict(rngs=rngs, dtype=dtype)
        self.quarter1 = Doubling(width, width // 2, **how)
        self.norm = layer_norm(width // 2, epsilon=1e-6, **how)
        self.quarter2 = Doubling(width // 2, width // 4, **how)
        self.eighth = Doubling(width, width // 2, **how)

    def __call__(self, maps: list[jax.Array]) -> tuple[jax.Array, ...]:
        """Makes [B, 4h, 4w, C/4], [B, 2h, 2w, C/2], [B, h, w, C], [B, ceil(h/2), ceil(w/2), C].

        Args:
          maps: four of [B, h, w, C], one for each result; they may be the same.
        """
        fine = self.quarter2(gelu(self.norm(self.quarter1(maps[0]))))
        return fine, self.eighth(maps[1]), maps[2], halved(maps[3])


class Doubling(nnx.Module):
    """Doubles both sides of a map: a deconvolution of 2 x 2 with stride 2, as a product."""

    def __init__(self, inputs: int, outputs: int, *, rngs: ParamKeys, dtype: Any):
        self.proj = nnx.Linear(
            inputs, 4 * outputs, dtype=dtype, kernel_init=initial.torch_kernel, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] to [B, 2h, 2w, outputs]."""
        batch, height, width, _ = x.shape
        x = self.proj(x).reshape(batch, height, width, 2, 2, -1)
        return x.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width, -1)


def halved(x: jax.Array) -> jax.Array:
    """Takes the maximum of 2 x 2: [B, h, w, C] to [B, ceil(h / 2), ceil(w / 2), C]."""
    down, right = (size % 2 for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0)), mode="edge")
    batch, height, width, _ = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, -1).max((2, 4))


# ------------------------------------------------------------------------------- positions


def rotary_table(grid: tuple[int, int], width: int, base: float, prefix: int) -> jax.Array:
    """Makes cosines and sines of rotary positions: float32 [2, prefix + h * w, 1, width / 2].

    A patch's centre has coordinates between -1 and 1 along each side, whatever the image's size.
    The first quarter of a head's channels turns with the row, the second with the column; the
    channels half a head later are their partners. Tokens of the prefix are not turned.
    """
    period = base ** (np.arange(width // 4) / (width // 4))

    def angles(size: int) -> np.ndarray:
        centre = (np.arange(size) + 0.5) / size * 2 - 1
        return 2 * np.pi * centre[:, None] / period

    rows, columns = angles(grid[0]), angles(grid[1])
    shape = (*grid, width // 4)
    angle = np.concatenate(
        [np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)], -1
    ).reshape(-1, width // 2)
    angle = np.concatenate([np.zeros((prefix, width // 2)), angle])[:, None]
    return jnp.asarray(np.stack([np.cos(angle), np.sin(angle)]), jnp.float32)


def rotate(x: jax.Array, turn: jax.Array) -> jax.Array:
    """Turns [B, T, N, D] by `rotary_table`, in float32 inside."""
    cosine, sine = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def interpolate_positions(
    table: jax.Array, grid: tuple[int, int], offset: float, antialias: bool
) -> jax.Array:
    """Interpolates learned positions [P * P, C] bicubically to [h * w, C], as PyTorch does."""
    side = int(len(table) ** 0.5)
    if grid == (side, side):
        return table
    x = table.reshape(side, side, -1)
    for axis in (0, 1):
        x = _along(x, cubic_matrix(side, grid[axis], offset, antialias), axis)
    return x.reshape(grid[0] * grid[1], -1)


def _along(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
    """Applies a matrix [new, old] along an axis; positions keep float32, also on a TPU."""
    precision = "highest" if x.dtype == jnp.float32 else None
    x = jnp.moveaxis(x, axis, -2)
    return jnp.moveaxis(jnp.matmul(jnp.asarray(matrix, x.dtype), x, precision=precision), -2, axis)


@functools.cache
def cubic_matrix(old: int, new: int, offset: float, antialias: bool) -> np.ndarray:
    """Weights of PyTorch's bicubic interpolation along one axis: float64 [new, old].

    Args:
      old: samples of the source.
      new: samples of the result.
      offset: samples added to the result where the step is computed; see `ViTConfig`.
      antialias: whether the filter widens where there are fewer samples; it is another cubic one.
    """
    step = old / (new + offset)
    stretch = max(step, 1.0) if antialias else 1.0
    matrix = np.zeros((new, old))
    for row, centre in enumerate(step * (np.arange(new) + 0.5) - 0.5):
        if antialias:
            first = max(int(centre - 2 * stretch + 1), 0)
            last = min(int(centre + 2 * stretch + 1), old)
            taps = np.arange(first, last)
        else:
            taps = int(np.floor(centre)) + np.arange(-1, 3)
        weights = _cubic(np.abs(taps - centre) / stretch, -0.5 if antialias else -0.75)
        np.add.at(matrix[row], taps.clip(0, old - 1), weights / weights.sum())
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel at distances x >= 0."""
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.cache
def resample_matrix(old: int, new: int, ratio: float) -> np.ndarray:
    """Weights of a linear interpolation to samples `1 / ratio` as far apart: float64 [new, old]."""
    place = ((np.arange(new) + 0.5) / ratio - 0.5).clip(0, old - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(old)), 0)
