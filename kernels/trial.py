"""An operation as `calibrate` tries it: candidates, inputs, the reference, and what is compared."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.kernels.choice import Call

# Errors that pass, relative to the largest entry of an array: those of the tests.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}


class Trial(abc.ABC):
    """One operation; the module `kernels.NAME.trial` has its instance, `TRIAL`.

    Attributes:
      implementations: those of its api, "xla" first.
      differentiated: positions of the arguments that have gradients.
      rounded: whether its products of float32 arrays are rounded as JAX's are by default.
    """

    implementations: Sequence[str]
    differentiated: Sequence[int] = ()
    rounded: bool = False

    def candidates(self, call: Call, device: jax.Device) -> list[str]:
        """Names what may run on a device, "xla" first: implementations, or their forms by "/"."""
        kernels = f"pallas_{device.platform}"
        return ["xla", *(name for name in self.implementations if name == kernels)]

    @abc.abstractmethod
    def function(self, call: Call, candidate: str) -> Callable[..., jax.Array]:
        """Returns a candidate as a function of the call's arrays."""

    def reference(self, call: Call) -> Callable[..., jax.Array]:
        """Returns plain JAX, to be run on float32 arrays."""
        return self.function(call, "xla")

    def inputs(self, call: Call, rng: np.random.Generator) -> list[np.ndarray]:
        """Draws the arrays of a call; normally distributed by default."""
        return [rng.standard_normal(shape, np.float32) for shape, _ in call.arrays]

    def compared(self, out: jax.Array, arrays: Sequence[jax.Array]) -> jax.Array:
        """Returns what must be equal among candidates, by default their output."""
        del arrays
        return out

    def tolerance(self, call: Call, platform: str) -> float:
        """Returns the largest error that passes, relative to the largest entry of an array."""
        rounded = self.rounded and platform != "cpu"
        half = rounded or any(dtype == "bfloat16" for _, dtype in call.arrays)
        return TOLERANCES["bfloat16" if half else "float32"]

    # -------------------------------------------------------------- of all operations alike

    def with_gradients(self, call: Call, candidate: str | None) -> Callable[..., Any]:
        """Makes the function (output's gradient, *arrays) -> [output, *gradients].

        Args:
          call: the call.
          candidate: its name; None is the reference.
        """
        return with_gradients(self._named(call, candidate), self.differentiated)

    def forward(self, call: Call, candidate: str | None) -> Callable[..., Any]:
        """As `with_gradients`, of the output alone."""
        return with_gradients(self._named(call, candidate), ())

    def _named(self, call: Call, candidate: str | None) -> Callable[..., jax.Array]:
        return self.reference(call) if candidate is None else self.function(call, candidate)

    def abstract_inputs(self, call: Call) -> list[Any]:
        """Returns the arguments of `with_gradients` without numbers."""
        out = jax.eval_shape(self.function(call, "xla"), *call.abstract)
        gradient = jax.ShapeDtypeStruct(out.shape, out.dtype) if self.differentiated else None
        return [gradient, *call.abstract]

    def drawn_inputs(self, call: Call, seed: int = 0) -> list[Any]:
        """Draws the arguments of `with_gradients`, NumPy arrays in the call's dtypes."""
        rng = np.random.default_rng(seed)
        arrays = [
            np.asarray(x, jnp.dtype(dtype))
            for x, (_, dtype) in zip(self.inputs(call, rng), call.arrays, strict=True)
        ]
        gradient = self.abstract_inputs(call)[0]
        if gradient is not None:
            gradient = rng.standard_normal(gradient.shape, np.float32).astype(gradient.dtype)
        return [gradient, *arrays]


def with_gradients(run: Callable[..., jax.Array], positions: Sequence[int]) -> Callable[..., Any]:
    """Makes the function (output's gradient, *arrays) -> [output, *gradients] of a function.

    Args:
      run: a function of arrays.
      positions: those of its arguments that have gradients; without any, the first may be None.
    """

    def both(gradient: jax.Array | None, *arrays: jax.Array) -> list[jax.Array]:
        if not positions:
            return [run(*arrays)]

        def of(*chosen: jax.Array) -> jax.Array:
            every = list(arrays)
            for position, array in zip(positions, chosen, strict=True):
                every[position] = array
            return run(*every)

        out, pull_back = jax.vjp(of, *(arrays[i] for i in positions))
        return [out, *pull_back(gradient.astype(out.dtype))]

    return both
