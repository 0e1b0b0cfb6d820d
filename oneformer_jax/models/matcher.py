"""Matching of queries to targets: the cost matrix and the minimum-cost assignment.

All predictions of a step are matched in one call. Assignments of equal cost are found by SciPy,
called once per device shard, or inside the compiled program, by one of the implementations of
`oneformer_jax.kernels.assignment`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from scipy import optimize

from oneformer_jax import config_rules
from oneformer_jax.kernels.assignment import linear_sum_assignment

BATCH_AXES = ("data", "fsdp")

# What a NaN costs, as in the official matcher; other costs are clipped to +-COST_LIMIT so that
# every assignment problem has a finite solution.
NAN_COST = 100.0
COST_LIMIT = 1e5


@dataclasses.dataclass(frozen=True)
class MatcherConfig:
    """Weights of the matching cost.

    Attributes:
      class_cost: weight of minus the probability of the target's class.
      mask_cost: weight of the mean binary cross entropy over points.
      dice_cost: weight of the dice loss.
    """

    class_cost: float = 2.0
    mask_cost: float = 5.0
    dice_cost: float = 5.0

    def __post_init__(self):
        config_rules.require_fields("matcher", self)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes of `mesh` over which a batch of images is sharded."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def matching_cost(
    class_logits: jax.Array,
    mask_logits: jax.Array,
    classes: jax.Array,
    targets: jax.Array,
    config: MatcherConfig,
) -> jax.Array:
    """Returns cost of giving query q to target m, without gradient.

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
    cost: jax.Array,
    valid: jax.Array,
    *,
    assignment: str = "scipy",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the minimum-cost one-to-one assignment of queries to the valid target slots.

    Entries that are not finite are repaired first (NaN costs 100, the rest is clipped to +-1e5):
    a diverging run reports them instead of stopping. With more valid slots than queries, as many
    slots as there are queries are matched.

    Args:
      cost: float32 [N, B, Q, M].
      valid: bool [B, M].
      assignment: who solves it, see `execution.Kernels`.
      mesh: the mesh over whose axes "data" and "fsdp" the batch is sharded; each shard is then
        solved where it lies. None solves all in one go.

    Returns:
      indices: int32 [N, B, M], the query matched to each slot; 0 for slots that are not matched.
      matched: bool [N, B, M].
      nonfinite: int32 scalar, how many entries of valid columns were not finite.
    """
    config_rules.require({"kernels.assignment": assignment})
    cost = lax.stop_gradient(cost.astype(jnp.float32))
    nonfinite = jnp.sum(~jnp.isfinite(cost) & valid[:, None, :], dtype=jnp.int32)
    cost = jnp.clip(jnp.where(jnp.isnan(cost), NAN_COST, cost), -COST_LIMIT, COST_LIMIT)
    if assignment == "scipy":
        solve = _assign_on_host
    else:
        solve = functools.partial(_assign_on_device, implementation=assignment)
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
    """Returns the time that SciPy has taken in this process, added up over its devices."""
    return _HOST_CLOCK.seconds


def _solve_with_scipy(cost: np.ndarray, valid: np.ndarray) -> np.ndarray:
    start = time.perf_counter()
    # Only NumPy and SciPy in here: running JAX inside a callback can hang the device.
    cost, valid = np.asarray(cost), np.asarray(valid)
    query_of = np.full((*cost.shape[:2], cost.shape[-1]), -1, np.int32)
    for image, flags in enumerate(valid):
        slots = np.flatnonzero(flags)
        for prediction in range(len(cost)):
            queries, columns = optimize.linear_sum_assignment(cost[prediction, image][:, slots])
            query_of[prediction, image, slots[columns]] = queries
    _HOST_CLOCK.add(time.perf_counter() - start)
    return query_of


def _assign_on_device(cost: jax.Array, valid: jax.Array, implementation: str) -> jax.Array:
    """Query of each slot, int32 [N, B, M], -1 if none; solved by the compiled program."""
    predictions, images, _, slots = cost.shape
    query_of = linear_sum_assignment(
        cost.reshape(-1, *cost.shape[2:]),
        jnp.broadcast_to(valid, (predictions, images, slots)).reshape(-1, slots),
        implementation=implementation,
    )
    return query_of.reshape(predictions, images, slots)
