"""Plain-JAX point sampling ("xla"): four gathers, and four scatters for the gradient.

Letters: B images, P points, D channels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cells(NamedTuple):
    """Cells between four pixels, with the points that lie in them.

    Attributes:
      row, column: of the upper left pixel, int32 [...], in -1..size-1.
      down, right: distance from it, float32 [...], in [0, 1).
      inside: bool [...], True if the point is finite and touches the map; else the rest is 0.
    """

    row: jax.Array
    column: jax.Array
    down: jax.Array
    right: jax.Array
    inside: jax.Array


def find_cells(points: jax.Array, height: int, width: int) -> Cells:
    """Finds the cells of points float32 [..., 2] of a map.

    A point is (x, y): 0 is the left or upper edge of the map, 1 the right or lower one, so pixel i
    of an axis of n pixels has its centre at (i + 0.5) / n.
    """
    x = points[..., 0] * width - 0.5
    y = points[..., 1] * height - 0.5
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN
    x, y = jnp.where(inside, x, 0.0), jnp.where(inside, y, 0.0)
    left, top = jnp.floor(x), jnp.floor(y)
    return Cells(top.astype(jnp.int32), left.astype(jnp.int32), y - top, x - left, inside)


def corners(points: jax.Array, height: int, width: int) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the four pixels around each point, and the share of each in the bilinear value.

    Args:
      points, height, width: as of `find_cells`.

    Returns:
      Four pairs (index int32 [...], share float32 [...]). The index is always one of the map,
      flattened by rows; the share is 0 for a pixel outside the map.
    """
    cells = find_cells(points, height, width)
    found = []
    for dx, share_x in enumerate((1 - cells.right, cells.right)):
        for dy, share_y in enumerate((1 - cells.down, cells.down)):
            row, column = cells.row + dy, cells.column + dx
            valid = cells.inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
            found.append((index, jnp.where(valid, share_x * share_y, 0.0)))
    return found


def take(table: jax.Array, index: jax.Array) -> jax.Array:
    """Reads table[b, index[b]] for every b: table [B, S, ...], index int32 [B, ...] in bounds."""
    # With vmap the batch stays a batch dimension of the gather, which sharding can split.
    return jax.vmap(lambda t, i: t.at[i].get(mode="promise_in_bounds"))(table, index)


def forward(features: jax.Array, points: jax.Array) -> jax.Array:
    """Returns float32 [B, P, D]; rows are gathered in the dtype of the features."""
    batch, height, width, depth = features.shape
    rows = features.reshape(batch, height * width, depth)
    return sum(
        take(rows, index).astype(jnp.float32) * share[..., None]
        for index, share in corners(points, height, width)
    )


def backward(points: jax.Array, gradient: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Computes the gradient of `forward` in the features, summed in float32, in their dtype."""
    batch, height, width, depth = like.shape
    out = jnp.zeros((batch, height * width, depth), jnp.float32)
    for index, share in corners(points, height, width):
        out = jax.vmap(lambda o, i, g: o.at[i].add(g, mode="promise_in_bounds"))(
            out, index, gradient * share[..., None]
        )
    return out.reshape(like.shape).astype(like.dtype)
