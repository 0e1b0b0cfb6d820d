"""Initial parameters: drawn on the host, each from a stream of its own.

A program that draws a thousand arrays takes a minute to compile; NumPy draws them in a second or
two. The numbers depend on the seed and on the order of the parameters alone, so every process and
every mesh starts from the same model. Distributions follow the official model, whose linear layers
keep PyTorch's defaults unless a block says otherwise.

An initialiser is called as flax calls it, `init(draw, shape, dtype)`, with a `Draw` for the key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from flax.nnx import Rngs
else:
    Rngs = object

Initializer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Draw:
    """The random numbers of one parameter.

    Attributes:
      seed: of the model, or None for a model without numbers: what is drawn is then a traced zero.
      count: position of the parameter among those that are drawn.
    """

    seed: int | None
    count: int

    def normal(self, shape: Sequence[int], dtype: Any = jnp.float32) -> np.ndarray | jax.Array:
        """Returns standard normal numbers."""
        if self.seed is None:
            return jnp.zeros(shape, dtype)
        return self._generator().standard_normal(shape, np.float32).astype(dtype)

    def uniform(
        self, shape: Sequence[int], bound: float, dtype: Any = jnp.float32
    ) -> np.ndarray | jax.Array:
        """Returns uniform numbers in [-bound, bound)."""
        if self.seed is None:
            return jnp.zeros(shape, dtype)
        numbers = self._generator().random(shape, np.float32)
        numbers *= 2 * bound
        numbers -= bound
        return numbers.astype(dtype, copy=False)

    def _generator(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, self.count], "u8")))


class ParamKeys(Rngs):
    """Gives every parameter of a model its `Draw`; stands for `nnx.Rngs` in the constructors."""

    def __init__(self, seed: int | None = None):
        """Starts at the first parameter; without a seed the model is to be traced, not built."""
        self._seed, self._count = seed, 0

    def params(self) -> Draw:
        """Returns the draw of the next parameter."""
        self._count += 1
        return Draw(self._seed, self._count - 1)


def constant(value: float) -> Initializer:
    """Returns an initialiser with one value for all elements."""

    def init(draw: Draw, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        return (jnp if draw.seed is None else np).full(shape, value, dtype)

    return init


def normal(deviation: float = 1.0) -> Initializer:
    """Returns an initialiser that draws from a normal distribution around zero."""

    def init(draw: Draw, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        return draw.normal(shape, dtype) * np.asarray(deviation, dtype)

    return init


def uniform(bound: float) -> Initializer:
    """Returns an initialiser that draws uniformly from [-bound, bound)."""
    return lambda draw, shape, dtype=jnp.float32: draw.uniform(shape, bound, dtype)


def variance_scaling(scale: float, mode: str, distribution: str) -> Initializer:
    """Returns an initialiser of variance scale / n.

    Args:
      scale: of the variance.
      mode: n is the "fan_in", the "fan_out" or their mean, "fan_avg"; of kernels [..., in, out].
      distribution: "normal" or "uniform".
    """

    def init(draw: Draw, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        field = math.prod(shape[:-2])
        fan_in, fan_out = field * shape[-2], field * shape[-1]
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        deviation = math.sqrt(scale / fan)
        if distribution == "uniform":
            return draw.uniform(shape, math.sqrt(3) * deviation, dtype)
        return normal(deviation)(draw, shape, dtype)

    return init


zeros = constant(0.0)
xavier = variance_scaling(1.0, "fan_avg", "uniform")
# Xavier on PyTorch's packed [3D, D] projection, seen from one of its three parts.
packed_xavier = variance_scaling(0.5, "fan_avg", "uniform")
# detectron2's c2_xavier_fill: uniform in ±sqrt(3 / fan in).
c2_xavier = variance_scaling(1.0, "fan_in", "uniform")
# PyTorch's default for the weights of Linear and Conv: uniform in ±1/sqrt(fan in).
torch_kernel = variance_scaling(1 / 3, "fan_in", "uniform")
