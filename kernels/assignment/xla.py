"""The assignment in plain JAX ("xla")."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from oneformer_jax.kernels.assignment import lockstep


def assign(cost: jax.Array, order: jax.Array, count: jax.Array) -> jax.Array:
    """Gives each row a column at the least total cost.

    Args:
      cost: float32 [P, R, C], -1e30 to 1e30 or infinite.
      order: int32 [P, R], the order in which rows enter; only the first `count` do.
      count: int32 [P], at most the number of columns of finite cost.

    Returns:
      int32 [P, C], the place in `order` of each column's row, -1 for columns without one.
    """
    return assign_and_count(cost, order, count)[0]


def assign_and_count(
    cost: jax.Array, order: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `assign`; also returns the number of steps, int32."""
    _, rows, columns = cost.shape
    cost = jnp.take_along_axis(cost, order[:, :, None], axis=1)

    def fetch(row):
        row = row.astype(jnp.int32)
        return jnp.take_along_axis(cost, row[:, :, None], axis=1)[:, 0]

    owner, steps = lockstep.solve(fetch, count.astype(jnp.float32)[:, None], columns, rows)
    return owner.astype(jnp.int32), steps
