"""Shared parts of the backbones: the base of their configs, layers, and stochastic depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from oneformer_jax import rules
from oneformer_jax.models import initial
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import Key
from oneformer_jax.rules import Integer, Number, Rule, Tuple

STRIDES = (4, 8, 16, 32)


def stages(rule: Rule) -> Tuple:
    """The rule of a field with a value for each of the four stages."""
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
class StagedConfig:
    """Base of a backbone's config: sequences become tuples, and every field has a rule.

    The bounds are above every model that exists, and low enough that a description from a
    stranger's file can't ask for one that takes hours to build.

    Attributes:
      depths: number of blocks in each of the four stages.
    """

    RULES: ClassVar[Mapping[str, Rule]]  # of every field

    depths: tuple[int, ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):  # as JSON and config overrides have it
                value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
                object.__setattr__(self, field.name, value)
        rules.require(f"{type(self).__name__}: ", vars(self), self.RULES)

    def require(self, ok: bool, field: str, rule: str) -> None:
        """ValueError that names the field and the rule, unless `ok`."""
        if not ok:
            rules.refuse(f"{type(self).__name__}: ", vars(self), {field: rule})

    def require_divisible(self, parts: str) -> None:
        """ValueError unless each stage's channels divide into the heads or groups of `parts`."""
        heads = getattr(self, parts)
        ok = all(c % n == 0 for c, n in zip(self.channels, heads, strict=True))
        self.require(ok, "embed_dim", f"divide, doubled at each stage, by {parts} {heads}")


def check_image(image: jax.Array) -> None:
    """ValueError unless `image` is [B, H, W, 3]."""
    if image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(f"a backbone's image must be [B, H, W, 3], got shape {image.shape}")


def linear(
    inputs: int, outputs: int, *, use_bias: bool = True, rngs: ParamKeys, dtype
) -> nnx.Linear:
    """A linear layer of a transformer: `linear_init` and zero bias."""
    return nnx.Linear(
        inputs, outputs, use_bias=use_bias, dtype=dtype, kernel_init=linear_init, rngs=rngs
    )


class Mlp(nnx.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, width: int, hidden: int, *, rngs: ParamKeys, dtype):
        self.fc1 = linear(width, hidden, rngs=rngs, dtype=dtype)
        self.fc2 = linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


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
    """A square convolution with PyTorch's default initialisation of kernel and bias."""
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
    """3 x 3 with stride 2 and padding 1: sides n become ceil(n / 2). Options of `torch_conv`."""
    return torch_conv(inputs, outputs, 3, strides=2, padding=1, **options)


def drop_path_rates(config: Any) -> list[tuple[float, ...]]:
    """For each stage the stochastic depth of its blocks: linear from 0 to `drop_path_rate`."""
    rates = np.linspace(0, config.drop_path_rate, sum(config.depths)).tolist()
    ends = np.cumsum(config.depths)
    return [tuple(rates[e - n : e]) for e, n in zip(ends, config.depths, strict=True)]


def random_items(key: Key, rates: tuple[float, ...]) -> tuple[jax.Array | None, np.ndarray]:
    """Items of `stack.run` for blocks with stochastic depth: their keys, if any, and rates."""
    keys = None if key is None else jax.random.split(key, len(rates))
    return keys, np.asarray(rates, np.float32)
