"""The one door to the assignment: checks, choice of implementation, sharding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from oneformer_jax.kernels import choice, dispatch

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")

# Costs beyond are taken as this: sums of them along a path stay finite.
COST_LIMIT = 1e30


def load(implementation: str) -> Callable[..., jax.Array]:
    """Returns the function `assign` of an implementation."""
    return dispatch.load("assignment", implementation, "assign")


def linear_sum_assignment(
    cost: jax.Array,
    valid: jax.Array,
    *,
    implementation: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Gives each valid column a row of its own, at the least total cost of each problem.

    The costs equal those of `scipy.optimize.linear_sum_assignment` on the valid columns; among
    assignments of equal cost the choice may be another one, but is always the same. Where a problem
    has more valid columns than rows, every row is given away and some columns stay without one.
    Nothing is differentiated: the gradient stops at the costs.

    Letters: B problems, Q rows, M columns.

    Args:
      cost: float32 [B, Q, M]. NaN counts as 1e30, and what is beyond +-1e30 as that; columns that
        are not valid may hold anything.
      valid: bool [B, M].
      implementation: "xla" (plain JAX, any device), "pallas_tpu", "pallas_gpu", or "auto" (see
        `oneformer_jax.kernels.choice`). A named one is never replaced by another one.
      mesh: the mesh over all of whose axes the problems are split. Each device then solves its own,
        without communication. Under a sharded `jit` the kernels need the mesh, here or set by
        `jax.set_mesh`; "xla" too, or else its problems may be gathered on every device. Axes that
        are already manual, as within a `shard_map` of the caller, are left alone.

    Returns:
      int32 [B, M], the row of each column, -1 for columns without one.

    Raises:
      ValueError: shapes that do not fit together, a wrong dtype, an unknown implementation, or a
        batch that the mesh does not divide.
      NotImplementedError: the named implementation does not take this case; says which limit.
    """
    _check(cost, valid)
    implementation = choice.choose(
        "assignment", implementation, IMPLEMENTATIONS, (cost, valid), mesh=mesh
    )
    if 0 in cost.shape:
        return jnp.full(valid.shape, -1, jnp.int32)
    run = dispatch.merge_mapped_axes(functools.partial(solve, load(implementation)))
    if mesh is not None or implementation != "xla":
        run = dispatch.split_batch("linear_sum_assignment", "cost", run, 2, mesh, cost.shape[0])
    return run(lax.stop_gradient(cost), valid)


def _check(cost, valid) -> None:
    dispatch.check_array("linear_sum_assignment", "cost", cost, "[B, Q, M]", jnp.float32)
    dispatch.check_array("linear_sum_assignment", "valid", valid, "[B, M]", jnp.bool_)
    if valid.shape != (cost.shape[0], cost.shape[2]):
        raise ValueError(
            f"linear_sum_assignment: valid must be {(cost.shape[0], cost.shape[2])} for cost "
            f"{cost.shape}, got {valid.shape}"
        )


def solve(assign: Callable, cost: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns `linear_sum_assignment` of checked arguments."""
    cost = jnp.clip(jnp.where(jnp.isnan(cost), COST_LIMIT, cost), -COST_LIMIT, COST_LIMIT)
    rows, columns = cost.shape[1:]
    fits = jnp.sum(valid, axis=1, keepdims=True) <= rows
    # The solvers place what enters in what is there to choose from: columns in rows, if they fit.
    entering = valid & fits
    rank = jnp.where(entering, jnp.cumsum(entering, axis=1, dtype=jnp.int32) - 1, columns)
    places = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), rank.shape)
    order = jnp.maximum(_find(places, rank), 0)
    owner = assign(jnp.swapaxes(cost, 1, 2), order, jnp.sum(entering, axis=1, dtype=jnp.int32))
    row_of = _find(rank, owner)
    if columns <= rows:
        return row_of
    # Else rows in columns, in the order of their numbers.
    order = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), cost.shape[:2])
    count = jnp.where(fits[:, 0], 0, rows)
    other = assign(jnp.where(valid[:, None, :], cost, jnp.inf), order, count)
    return jnp.where(fits, row_of, other)


def _find(wanted: jax.Array, values: jax.Array) -> jax.Array:
    """Finds each of `wanted` [B, K] in `values` [B, N]; int32 [B, K], -1 if nowhere."""
    found = values[:, None, :] == wanted[:, :, None]
    return jnp.max(jnp.where(found, lax.broadcasted_iota(jnp.int32, found.shape, 2), -1), axis=2)
