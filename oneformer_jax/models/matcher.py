"""Matching of queries to targets: the cost matrix and the minimum-cost assignment.

All predictions of a step are matched in one call. Two backends find assignments of equal cost:
"host" calls SciPy once per device shard, "device" solves inside the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from scipy.optimize import linear_sum_assignment

BACKENDS = ("host", "device")
BATCH_AXES = ("data", "fsdp")

# What a NaN costs, as in the official matcher; other costs are clipped to +-COST_LIMIT so that
# every assignment problem has a finite solution.
NAN_COST = 100.0
COST_LIMIT = 1e5


@dataclasses.dataclass(frozen=True)
class MatcherConfig:
    """Weights of the matching cost, and where the assignment is solved.

    Attributes:
      class_cost: weight of minus the probability of the target's class.
      mask_cost: weight of the mean binary cross entropy over points.
      dice_cost: weight of the dice loss.
      backend: "host" (SciPy in a callback) or "device".
    """

    class_cost: float = 2.0
    mask_cost: float = 5.0
    dice_cost: float = 5.0
    backend: str = "host"

    def __post_init__(self):
        _check_backend(self.backend)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"matcher.backend is {backend!r}; use one of {', '.join(BACKENDS)}")


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of `mesh` over which a batch of images is sharded."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def matching_cost(
    class_logits: jax.Array,
    mask_logits: jax.Array,
    classes: jax.Array,
    targets: jax.Array,
    config: MatcherConfig,
) -> jax.Array:
    """Cost of giving query q to target m, without gradient.

    Args:
      class_logits: float [B, Q, K+1].
      mask_logits: float32 [B, Q, P] at the points of the image.
      classes: int32 [B, M].
      targets: float32 [B, M, P], the masks' values at the same points.
      config: the weights.

    Returns:
      float32 [B, Q, M]; the columns of invalid slots mean nothing.
    """
    class_logits, mask_logits, targets = map(
        lax.stop_gradient, (class_logits.astype(jnp.float32), mask_logits, targets)
    )
    probabilities = jax.nn.softmax(class_logits, axis=-1)
    class_cost = -jax.vmap(lambda p, c: p[:, c])(probabilities, classes)

    def product(x):
        # Assignments compare sums over thousands of points: reduced precision would reorder them.
        return jnp.einsum("bqp,bmp->bqm", x, targets, precision=lax.Precision.HIGHEST)

    # softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
    softplus = jnp.sum(jax.nn.softplus(mask_logits), axis=-1)[..., None]
    mask_cost = (softplus - product(mask_logits)) / mask_logits.shape[-1]

    probabilities = jax.nn.sigmoid(mask_logits)
    area = jnp.sum(probabilities, axis=-1)[:, :, None] + jnp.sum(targets, axis=-1)[:, None, :]
    dice_cost = 1 - (2 * product(probabilities) + 1) / (area + 1)

    return (
        config.class_cost * class_cost + config.mask_cost * mask_cost + config.dice_cost * dice_cost
    )


def match(
    cost: jax.Array, valid: jax.Array, *, backend: str = "host", mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Minimum-cost one-to-one assignment of queries to the valid target slots.

    Entries that are not finite are repaired first (NaN costs 100, the rest is clipped to +-1e5):
    a diverging run reports them instead of stopping. With more valid slots than queries, as many
    slots as there are queries are matched.

    Args:
      cost: float32 [N, B, Q, M].
      valid: bool [B, M].
      backend: "host" or "device".
      mesh: the mesh over whose axes "data" and "fsdp" the batch is sharded; each shard is then
        solved where it lies. None solves all in one go.

    Returns:
      indices: int32 [N, B, M], the query matched to each slot; 0 for slots that are not matched.
      matched: bool [N, B, M].
      nonfinite: int32 scalar, how many entries of valid columns were not finite.
    """
    _check_backend(backend)
    cost = lax.stop_gradient(cost.astype(jnp.float32))
    nonfinite = jnp.sum(~jnp.isfinite(cost) & valid[:, None, :], dtype=jnp.int32)
    cost = jnp.clip(jnp.where(jnp.isnan(cost), NAN_COST, cost), -COST_LIMIT, COST_LIMIT)
    solve = _assign_on_host if backend == "host" else _assign_on_device
    if mesh is not None:
        axes = batch_axes(mesh)
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if cost.shape[1] % shards:
            raise ValueError(
                f"matching: a batch of {cost.shape[1]} images cannot be split over {shards} "
                f"devices (mesh axes {', '.join(axes)}); make the batch a multiple of {shards}"
            )
        solve = jax.shard_map(
            solve,
            mesh=mesh,
            in_specs=(PartitionSpec(None, axes), PartitionSpec(axes)),
            out_specs=PartitionSpec(None, axes),
            check_vma=False,
        )
    query = solve(cost, valid)
    return jnp.maximum(query, 0), query >= 0, nonfinite


def _assign_on_host(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """Query of each slot, int32 [N, B, M], -1 if none; one host call for all problems."""
    shape = jax.ShapeDtypeStruct((*cost.shape[:2], cost.shape[-1]), jnp.int32)
    return jax.pure_callback(_solve_with_scipy, shape, cost, valid)


class _HostClock:
    """Seconds spent in the host solver by this process; callbacks of several devices overlap."""

    def __init__(self):
        self._lock = threading.Lock()
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        with self._lock:
            self.seconds += seconds


_HOST_CLOCK = _HostClock()


def host_seconds() -> float:
    """Time that the "host" backend has taken in this process, added up over its devices."""
    return _HOST_CLOCK.seconds


def _solve_with_scipy(cost: np.ndarray, valid: np.ndarray) -> np.ndarray:
    start = time.perf_counter()
    # Only NumPy and SciPy in here: running JAX inside a callback can hang the device.
    cost, valid = np.asarray(cost), np.asarray(valid)
    query_of = np.full((*cost.shape[:2], cost.shape[-1]), -1, np.int32)
    for image, flags in enumerate(valid):
        slots = np.flatnonzero(flags)
        for prediction in range(len(cost)):
            queries, columns = linear_sum_assignment(cost[prediction, image][:, slots])
            query_of[prediction, image, slots[columns]] = queries
    _HOST_CLOCK.add(time.perf_counter() - start)
    return query_of


def _assign_on_device(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """Query of each slot, int32 [N, B, M], -1 if none; solved by the compiled program."""
    return jax.vmap(jax.vmap(_solve_one), in_axes=(0, None))(cost, valid)


def _solve_one(cost: jax.Array, valid: jax.Array) -> jax.Array:
    queries, slots = cost.shape
    fits = jnp.sum(valid) <= queries
    query_of, _ = _shortest_augmenting_paths(cost.T, valid & fits)
    if slots <= queries:
        return query_of
    # More slots than queries: now every query is placed and slots may stay free.
    reachable = jnp.where(valid, cost, jnp.inf)
    _, other = _shortest_augmenting_paths(reachable, jnp.broadcast_to(~fits, (queries,)))
    return jnp.where(fits, query_of, other)


def _shortest_augmenting_paths(cost: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Assigns a column to every active row at the least total cost.

    Rows enter one by one; Dijkstra's algorithm on the reduced costs finds the cheapest chain of
    reassignments that ends in a free column (Jonker and Volgenant 1987, Crouse 2016).

    Args:
      cost: float32 [R, C]; each active row must find a free column of finite cost.
      active: bool [R].

    Returns:
      column_of int32 [R] and row_of int32 [C], -1 where there is none.
    """
    rows, columns = cost.shape

    def insert(row, state):
        # The row's price is implied: the reduced cost of an assigned pair is zero.
        price, column_of, row_of = state

        def search_on(search):
            return search[3] < 0

        def search_step(search):
            distance, via, done, _ = search
            column = jnp.argmin(jnp.where(done, jnp.inf, distance)).astype(jnp.int32)
            owner = row_of[column]
            reduced = cost[owner] - price
            through = distance[column] + reduced - reduced[column]
            done = done.at[column].set(True)
            better = ~done & (through < distance) & (owner >= 0)
            return (
                jnp.where(better, through, distance),
                jnp.where(better, owner, via),
                done,
                jnp.where(owner < 0, column, -1),
            )

        distance, via, done, end = lax.while_loop(
            search_on,
            search_step,
            (
                cost[row] - price,
                jnp.full((columns,), row, jnp.int32),
                jnp.zeros((columns,), bool),
                jnp.where(active[row], jnp.int32(-1), jnp.int32(0)),
            ),
        )
        price = price + jnp.where(
            done & active[row], jnp.minimum(distance - distance[end], 0.0), 0.0
        )

        def walk_step(walk):
            column, column_of, row_of = walk
            owner = via[column]
            following = column_of[owner]
            return following, column_of.at[owner].set(column), row_of.at[column].set(owner)

        start = jnp.where(active[row], end, -1)
        _, column_of, row_of = lax.while_loop(
            lambda walk: walk[0] >= 0, walk_step, (start, column_of, row_of)
        )
        return price, column_of, row_of

    state = (
        jnp.zeros((columns,), cost.dtype),
        jnp.full((rows,), -1, jnp.int32),
        jnp.full((columns,), -1, jnp.int32),
    )
    _, column_of, row_of = lax.fori_loop(0, rows, insert, state)
    return column_of, row_of
