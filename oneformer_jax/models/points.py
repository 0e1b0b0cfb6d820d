"""Random points for the mask losses: drawing them, reading maps at them, choosing among them.

A point is a float32 pair (x, y) in [0, 1)², relative to the width and height of the map it reads.
Every reading is bilinear with zeros outside the map and `align_corners=False`: the pixel
coordinate is `p * size - 0.5` (PyTorch's `grid_sample` at `2 p - 1`). No gradient flows to points.

Drawing is a pure function of (key, purpose, prediction, slot), so any other program can draw the
very same points.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
from jax import lax


class Purpose(enum.IntEnum):
    """What a set of points is drawn for; sets of different purposes are independent."""

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
    """Uniform points, float32 [B, P, 2], of one prediction and one target slot.

    Sets that all slots (or all predictions) share are drawn with slot (prediction) 0.
    """
    for data in (int(purpose), prediction, slot):
        key = jax.random.fold_in(key, data)
    return jax.random.uniform(key, (batch, count, 2), jnp.float32)


def _corners(points: jax.Array, height: int, width: int) -> list[tuple[jax.Array, jax.Array]]:
    """The four (flat index, weight) pairs around points [..., 2]; the weight is 0 outside."""
    x = points[..., 0] * width - 0.5
    y = points[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    corners = []
    for column, x_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, y_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            column_index = jnp.clip(column, 0, width - 1).astype(jnp.int32)
            row_index = jnp.clip(row, 0, height - 1).astype(jnp.int32)
            weight = jnp.where(inside, x_weight * y_weight, 0.0)
            corners.append((row_index * width + column_index, weight))
    return corners


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[b, index[b]] for every image b: table [B, S, ...], index int32 [B, ...]."""
    # vmap keeps the batch a batch dimension of the gather, which sharding can split.
    return jax.vmap(lambda t, i: t.at[i].get(mode="promise_in_bounds"))(table, index)


@jax.custom_vjp
def read_features(features: jax.Array, points: jax.Array) -> jax.Array:
    """Feature vectors at points: [B, h, w, D] at [B, P, 2] -> float32 [B, P, D].

    Rows are gathered in the dtype of the features; sums, also those of the gradient, are float32.
    """
    batch, height, width, depth = features.shape
    rows = features.reshape(batch, height * width, depth)
    return sum(
        _take(rows, index).astype(jnp.float32) * weight[..., None]
        for index, weight in _corners(points, height, width)
    )


def _read_features_forward(features, points):
    # The empty slice tells the backward pass the shape and dtype without keeping the features.
    return read_features(features, points), (points, features[..., :0])


def _read_features_backward(residuals, gradient):
    points, like = residuals
    batch, height, width, _ = like.shape
    out = jnp.zeros((batch, height * width, gradient.shape[-1]), jnp.float32)
    for index, weight in _corners(points, height, width):
        out = jax.vmap(lambda o, i, g: o.at[i].add(g, mode="promise_in_bounds"))(
            out, index, gradient * weight[..., None]
        )
    return out.reshape(batch, height, width, -1).astype(like.dtype), jnp.zeros_like(points)


read_features.defvjp(_read_features_forward, _read_features_backward)


def read_maps(maps: jax.Array, points: jax.Array) -> jax.Array:
    """Values of each map at its own points: float32 [B, C, h, w] at [B, C, P, 2] -> [B, C, P]."""
    batch, count, height, width = maps.shape
    flat = maps.reshape(batch, count, height * width)
    return sum(
        jax.vmap(_take)(flat, index) * weight for index, weight in _corners(points, height, width)
    )


def read_targets(segment_map: jax.Array, points: jax.Array, slots: jax.Array) -> jax.Array:
    """Bilinear values of binary masks that are never formed, read from the id map.

    Args:
      segment_map: uint8 [B, H, W]; i + 1 marks the pixels of slot i.
      points: float32 [B, 1, P, 2] shared by all slots, or [B, C, P, 2] with each slot's own.
      slots: int32 [C], the slots to read.

    Returns:
      float32 [B, C, P] in [0, 1].
    """
    batch, height, width = segment_map.shape
    flat = segment_map.reshape(batch, height * width)
    ids = (slots + 1).astype(jnp.int32)[:, None]
    values = sum(
        jnp.where(_take(flat, index).astype(jnp.int32) == ids, weight, 0.0)
        for index, weight in _corners(points, height, width)
    )
    # Without the barrier XLA reads the map again in every loop and sum that takes the values: slow
    # to run, and on TPUs minutes to compile.
    return lax.optimization_barrier(values)


def choose_uncertain(logits: jax.Array, points: jax.Array, count: int) -> jax.Array:
    """The `count` points with the smallest |logit|: [..., C], [..., C, 2] -> [..., count, 2]."""
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

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle[..., None], axis=-1) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, jnp.iinfo(jnp.int32).max))
    _, threshold = lax.fori_loop(0, 31, halve, bounds)
    kept = bits <= threshold[..., None]
    return kept, count / jnp.sum(kept, axis=-1).astype(jnp.float32)
