"""The assignment as `oneformer_jax.kernels.calibrate` tries it: by what its solutions cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.kernels.assignment import IMPLEMENTATIONS, api
from oneformer_jax.kernels.choice import Call
from oneformer_jax.kernels.trial import Trial

# What a solution costs beside, for each column that has no row, or another one's, or none in range.
PENALTY = 1e6


class Assignment(Trial):
    """Arrays: costs and valid columns of `linear_sum_assignment`."""

    implementations = IMPLEMENTATIONS

    def function(self, call: Call, candidate: str) -> Callable[..., jax.Array]:
        return functools.partial(api.solve, api.load(candidate))

    def inputs(self, call: Call, rng: np.random.Generator) -> list[np.ndarray]:
        """Distances between points of a plane, as in a trained model; a fifth to all is valid."""
        problems, rows, columns = call.arrays[0][0]
        places = [rng.random((problems, n, 2)) for n in (rows, columns)]
        costs = 10 * np.linalg.norm(places[0][:, :, None] - places[1][:, None], axis=-1)
        least = -(-min(rows, columns) // 5)
        count = rng.integers(least, min(rows, columns) + 1, (problems, 1))
        return [costs.astype(np.float32), np.arange(columns) < count]

    def compared(self, out: jax.Array, arrays: Sequence[jax.Array]) -> jax.Array:
        """Returns the costs of the problems: among equal ones, the choice of rows is free."""
        cost, valid = arrays
        chosen = valid & (out >= 0) & (out < cost.shape[1])
        rows = jnp.where(chosen, out, 0)
        picked = jnp.take_along_axis(cost, rows[:, None, :], axis=1)[:, 0]
        taken = jax.nn.one_hot(jnp.where(chosen, out, -1), cost.shape[1]).sum(axis=1)
        faults = jnp.sum(valid & ~chosen, axis=1) + jnp.sum(jnp.maximum(taken - 1, 0), axis=1)
        return jnp.sum(jnp.where(chosen, picked, 0), axis=1) + PENALTY * faults


TRIAL = Assignment()
