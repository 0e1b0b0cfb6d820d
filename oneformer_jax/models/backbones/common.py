"""Shared parts of the backbones: the base of their configs, layers, and stochastic depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax import rules
from oneformer_jax.models import initial
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import Key, gelu, layer_norm, split_key
from oneformer_jax.rules import Integer, Number, Rule, Tuple


def stages(rule: Rule) -> Tuple:
    """Returns the rule of a field with a value for each of the four stages."""
    return Tuple(rule, 4, 4)


MOST_BLOCKS = 200  # of a stage
DEPTHS = stages(Integer(1, MOST_BLOCKS))
HEADS = stages(Integer(1, 1024))
MLP_RATIO = Number(1, 64)
DROP_PATH = Number(0, 1, below=True)

# Of the linear layers of a transformer. The official trunc_normal_ of deviation 0.02 cuts at the
# values ±2, a hundred deviations away.
linear_init: Callable = initial.normal(0.02)


@dataclasses.dataclass(frozen=True)
class RuledConfig:
    """Base of a backbone's config: sequences become tuples, and every field has a rule.

    The bounds are above every model that exists, and low enough that a description from a
    stranger's file can't ask for one that takes hours to build.
    """

    RULES: ClassVar[Mapping[str, Rule]]  # of every field

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):  # as JSON and config overrides have it
                value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
                object.__setattr__(self, field.name, value)
        rules.require(f"{type(self).__name__}: ", vars(self), self.RULES)

    def require(self, ok: bool, field: str, rule: str) -> None:
        """Raises a ValueError that names the field and the rule, unless `ok`."""
        if not ok:
            rules.refuse(f"{type(self).__name__}: ", vars(self), {field: rule})


@dataclasses.dataclass(frozen=True)
class StagedConfig(RuledConfig):
    """Base of the config of a backbone of four stages.

    Attributes:
      depths: number of blocks in each of the four stages.
    """

    depths: tuple[int, ...]

    def require_divisible(self, parts: str) -> None:
        """Raises a ValueError unless each stage's channels divide into its heads or groups."""
        heads = getattr(self, parts)
        ok = all(c % n == 0 for c, n in zip(self.channels, heads, strict=True))
        self.require(ok, "embed_dim", f"divide, doubled at each stage, by {parts} {heads}")


@dataclasses.dataclass(frozen=True)
class WideningConfig(StagedConfig):
    """Base of the config of a backbone whose channels double from stage to stage.

    Attributes:
      depths: number of blocks in each of the four stages.
      embed_dim: channels of the first stage.
    """

    embed_dim: int

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of res2 to res5."""
        first = self.embed_dim
        return first, 2 * first, 4 * first, 8 * first


class WideningBackbone(nnx.Module):
    """Base of the backbones of a patch embedding and four stages: an image to four maps.

    A stage is a module from a map and a key to a map, with `downsample`, the way to the next stage
    or None. Subclasses name the list of stages as the official parameters do.
    """

    STAGES: ClassVar[str]

    def __init__(
        self, config: Any, embedding: Any, stage: Any, *, rngs: ParamKeys, execution: Execution
    ):
        self.dtype = execution.compute_dtype
        self.patch_embed = embedding(config.embed_dim, rngs=rngs, dtype=self.dtype)
        stages = (
            stage(config, index, rates, rngs=rngs, execution=execution)
            for index, rates in enumerate(drop_path_rates(config))
        )
        setattr(self, self.STAGES, nnx.List(stages))

    def __call__(
        self, image: jax.Array, key: Key = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Extracts features, see `oneformer_jax.models.backbones`, of an image of any size.

        Maps are padded where they must be; those of the stride s are [B, ceil(H / s),
        ceil(W / s), C].
        """
        check_image(image)
        x = self.patch_embed(image.astype(self.dtype))
        outputs = []
        stages = getattr(self, self.STAGES)
        for index, stage_key in enumerate(split_key(key, 4)):
            stage = stages[index]
            x = stage(x, stage_key)
            outputs.append(self.output(index, x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(outputs)

    def output(self, stage: int, x: jax.Array) -> jax.Array:
        """Returns the map that a stage hands out, [B, h, w, C], from the one it hands on."""
        return x


class NormalizedBackbone(WideningBackbone):
    """A widening backbone with a norm for what each stage hands out."""

    def __init__(
        self, config: Any, embedding: Any, stage: Any, *, rngs: ParamKeys, execution: Execution
    ):
        super().__init__(config, embedding, stage, rngs=rngs, execution=execution)
        for index, width in enumerate(config.channels):
            setattr(self, f"norm{index}", layer_norm(width, rngs=rngs, dtype=self.dtype))

    def output(self, stage: int, x: jax.Array) -> jax.Array:
        return getattr(self, f"norm{stage}")(x)


def check_image(image: jax.Array) -> None:
    """Raises a ValueError unless `image` is [B, H, W, 3]."""
    if image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(f"a backbone's image must be [B, H, W, 3], got shape {image.shape}")


def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Pads [B, H, W, C] with zeros below and to the right, up to multiples of `multiple`."""
    down, right = (-size % multiple for size in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0))) if down or right else x


def partition_windows(x: jax.Array, size: int) -> jax.Array:
    """Cuts [B, H, W, C], H and W multiples of `size`, into [B, G, size * size, C], by rows."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size, channels)


def linear(
    inputs: int, outputs: int, *, use_bias: bool = True, rngs: ParamKeys, dtype
) -> nnx.Linear:
    """Returns a linear layer of a transformer: `linear_init` and zero bias."""
    return nnx.Linear(
        inputs, outputs, use_bias=use_bias, dtype=dtype, kernel_init=linear_init, rngs=rngs
    )


class Mlp(nnx.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, width: int, hidden: int, *, rngs: ParamKeys, dtype):
        self.fc1 = linear(width, hidden, rngs=rngs, dtype=dtype)
        self.fc2 = linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x)))


def torch_conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    strides: int,
    padding: int,
    groups: int = 1,
    use_bias: bool = True,
    rngs: ParamKeys,
    dtype,
) -> nnx.Conv:
    """Returns a square convolution with PyTorch's default initialisation of kernel and bias."""
    bound = (size * size * inputs // groups) ** -0.5
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=strides,
        padding=padding,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=initial.torch_kernel,
        bias_init=initial.uniform(bound),
        rngs=rngs,
    )


def halving_conv(inputs: int, outputs: int, **options: Any) -> nnx.Conv:
    """Makes a 3 x 3 `torch_conv` of stride 2 and padding 1: sides n become ceil(n / 2)."""
    return torch_conv(inputs, outputs, 3, strides=2, padding=1, **options)


def drop_path_rates(config: Any) -> list[tuple[float, ...]]:
    """Lists the blocks' stochastic depths by stage: linear from 0 to `drop_path_rate`."""
    rates = np.linspace(0, config.drop_path_rate, sum(config.depths)).tolist()
    ends = np.cumsum(config.depths)
    return [tuple(rates[e - n : e]) for e, n in zip(ends, config.depths, strict=True)]


def random_items(key: Key, rates: tuple[float, ...]) -> tuple[jax.Array | None, np.ndarray]:
    """Items of `stack.run` for blocks with stochastic depth: their keys, if any, and rates."""
    keys = None if key is None else jax.random.split(key, len(rates))
    return keys, np.asarray(rates, np.float32)
