"""Random points for the mask losses: drawing them, reading maps at them, choosing among them.

A point is a float32 pair (x, y) in [0, 1)², relative to the width and height of the map it reads.
Every reading is bilinear with zeros outside the map and `align_corners=False`: the pixel
coordinate is `p * size - 0.5` (PyTorch's `grid_sample` at `2 p - 1`). No gradient flows to points.
Feature vectors are read by `oneformer_jax.kernels.point_sampling`.

Drawing is a pure function of (key, purpose, prediction, slot), so any other program can draw the
very same points.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from oneformer_jax.kernels.point_sampling import corners, find_cells, take


class Purpose(enum.IntEnum):
    """Purpose of a set of points; sets of different purposes are independent."""

    MATCHING = 0
    CANDIDATES = 1
    FRESH = 2


def draw_points(
    key: jax.Array,
    purpose: Purpose,
    prediction: int | jax.Array,
    slot: int | jax.Array,
    batch: int,
    count: int,
) -> jax.Array:
    """Returns uniform points, float32 [B, P, 2], of one prediction and one target slot.

    Sets that all slots (or all predictions) share are drawn with slot (prediction) 0.
    """
    for data in (int(purpose), prediction, slot):
        key = jax.random.fold_in(key, data)
    return jax.random.uniform(key, (batch, count, 2), jnp.float32)


def read_maps(maps: jax.Array, points: jax.Array) -> jax.Array:
    """Values of each map at its own points: float32 [B, C, h, w] at [B, C, P, 2] -> [B, C, P]."""
    batch, count, height, width = maps.shape
    flat = maps.reshape(batch, count, height * width)
    values: Any = sum(
        jax.vmap(take)(flat, index) * share for index, share in corners(points, height, width)
    )
    return values


def pack_targets(segment_map: jax.Array) -> jax.Array:
    """Packs the ids around every place between four pixels in one word, for one gather to read.

    Args:
      segment_map: uint8 [B, H, W]; i + 1 marks the pixels of slot i.

    Returns:
      uint32 [B, H + 1, W + 1]. The lowest byte is the pixel at the upper left, then come those at
      the upper right, lower left and lower right; 0 outside of the map.
    """
    ids = jnp.pad(segment_map.astype(jnp.uint32), ((0, 0), (1, 1), (1, 1)))
    upper = ids[:, :-1, :-1] | ids[:, :-1, 1:] << 8
    return upper | ids[:, 1:, :-1] << 16 | ids[:, 1:, 1:] << 24


def read_targets(packed: jax.Array, points: jax.Array, slots: jax.Array) -> jax.Array:
    """Reads bilinear values of binary masks, which are never formed, from the id map.

    Args:
      packed: uint32 [B, H + 1, W + 1] from `pack_targets`.
      points: float32 [B, 1, P, 2] shared by all slots, or [B, C, P, 2] with each slot's own.
      slots: int32 [C], the slots to read.

    Returns:
      float32 [B, C, P] in [0, 1].
    """
    batch, height, width = packed.shape
    cells = find_cells(points, height - 1, width - 1)
    words = take(packed.reshape(batch, -1), (cells.row + 1) * width + cells.column + 1)
    ids = (slots + 1).astype(jnp.uint32)[:, None]
    shares = (
        share_y * share_x
        for share_y in (1 - cells.down, cells.down)
        for share_x in (1 - cells.right, cells.right)
    )
    values = sum(
        jnp.where((words >> 8 * corner & 0xFF == ids) & cells.inside, share, 0.0)
        for corner, share in enumerate(shares)
    )
    # Without the barrier XLA reads the map again in every loop and sum that takes the values: slow
    # to run, and on TPUs minutes to compile.
    return lax.optimization_barrier(values)


def choose_uncertain(logits: jax.Array, points: jax.Array, count: int) -> jax.Array:
    """Chooses the `count` points of smallest |logit|: [..., C], [..., C, 2] to [..., count, 2]."""
    _, index = lax.top_k(-jnp.abs(lax.stop_gradient(logits)), count)
    return jnp.take_along_axis(points, index[..., None], axis=-2)


def keep_uncertain(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Marks the `count` smallest |logit| of each row without sorting or gathering.

    The bits of non-negative floats, read as integers, are in the order of the floats, so the
    threshold is found exactly by 31 halvings of the range of int32.

    Args:
      logits: float32 [..., C].
      count: how many to keep, 0..C.

    Returns:
      kept: bool [..., C]; exactly `count` per row, or more where candidates tie at the threshold.
      weight: float32 [...], count / number kept: 1 without ties, so that the kept candidates of a
        row always weigh `count` together.
    """
    shape = logits.shape[:-1]
    if count == 0:
        return jnp.zeros(logits.shape, bool), jnp.ones(shape, jnp.float32)
    bits = lax.bitcast_convert_type(jnp.abs(lax.stop_gradient(logits)), jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle[..., None], axis=-1) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, jnp.iinfo(jnp.int32).max))
    _, threshold = lax.fori_loop(0, 31, halve, bounds)
    kept = bits <= threshold[..., None]
    return kept, count / jnp.sum(kept, axis=-1).astype(jnp.float32)
