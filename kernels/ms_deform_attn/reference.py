"""Plain-JAX multi-scale deformable attention by gathering ("xla"), in two forms: the reference.

Letters: B batch, Q queries, S all pixels of all levels, N heads, L levels, P points, D head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.kernels.recompute import recompute

SpatialShapes = tuple[tuple[int, int], ...]


def split_levels(value: jax.Array, spatial_shapes: SpatialShapes) -> list[jax.Array]:
    """Cuts [B, S, N, D] into one [B, h*w, N, D] array per level."""
    ends, total = [], 0
    for h, w in spatial_shapes[:-1]:
        total += h * w
        ends.append(total)
    return jnp.split(value, ends, axis=1)


def cell_coordinates(
    locations: jax.Array, weights: jax.Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns the sampling points of one level into (cell, fraction, weight).

    Pixel i of an axis of n pixels has its centre at (i + 0.5) / n. A point in the cell between the
    pixels i and i + 1 has `cell` i, in -1..n-1, and `fraction` in [0, 1). A point that touches no
    pixel, or whose location is NaN, gets cell 0 and weight 0: it adds nothing, has no gradient, and
    never reads outside the map.

    Args:
      locations: float32 [..., 2], (x, y) in 0..1 over the map.
      weights: float32 [...].
      shape: (h, w) of the level, or two arrays that broadcast against `weights`.

    Returns:
      cell int32 [..., 2], fraction float32 [..., 2] (both x, y), weight float32 [...].
    """
    h, w = shape
    size = jnp.stack([jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32)], axis=-1)
    pixel = locations * size - 0.5
    inside = jnp.all((pixel > -1) & (pixel < size), axis=-1)  # False for NaN
    # The inner selection keeps NaN and infinity out of the gradient, too.
    pixel = jnp.where(inside[..., None], pixel, 0.0)
    floor = jnp.floor(pixel)
    return floor.astype(jnp.int32), pixel - floor, jnp.where(inside, weights, 0.0)


def corners(
    locations: jax.Array, weights: jax.Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Finds the pixels that the points of one level read, and the share of each in the result.

    Args:
      locations: float32 [..., P, 2].
      weights: float32 [..., P].
      shape: (h, w) of the level, or two arrays that broadcast against `weights`.

    Returns:
      index int32 [..., 4 * P] in 0..h*w-1 for all locations, and factor float32 [..., 4 * P], 0 for
      corners outside the map.
    """
    h, w = shape
    cell, fraction, weights = cell_coordinates(locations, weights, shape)
    indices, factors = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = cell[..., 0] + dx, cell[..., 1] + dy
            share_x = fraction[..., 0] if dx else 1 - fraction[..., 0]
            share_y = fraction[..., 1] if dy else 1 - fraction[..., 1]
            inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            indices.append(jnp.clip(y, 0, h - 1) * w + jnp.clip(x, 0, w - 1))
            factors.append(jnp.where(inside, weights * share_x * share_y, 0.0))
    return jnp.concatenate(indices, axis=-1), jnp.concatenate(factors, axis=-1)


def ms_deform_attn_gather(
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
) -> jax.Array:
    """As `api.ms_deform_attn`, without its checks. Reads 4 rows per point.

    Accelerators fuse the reads with the sum and never store the rows.
    """
    out = jnp.zeros((*sampling_locations.shape[:3], value.shape[-1]), jnp.float32)
    for level, rows in enumerate(split_levels(value, spatial_shapes)):
        # The backward pass reads the rows of a level again: they are 4 * P times the output's size.
        out += recompute(functools.partial(_gather_level, spatial_shapes[level]))(
            rows,
            sampling_locations[:, :, :, level],
            attention_weights[:, :, :, level].astype(jnp.float32),
        )
    return out.reshape(*out.shape[:2], -1).astype(value.dtype)


def _gather_level(
    shape: tuple[int, int], rows: jax.Array, locations: jax.Array, weights: jax.Array
) -> jax.Array:
    """(h, w), [B, h*w, N, D], [B, Q, N, P, 2], [B, Q, N, P] -> float32 [B, Q, N, D]."""
    index, factor = corners(locations, weights, shape)
    # Cast before the gather, so that its transpose scatters in float32: bfloat16 would lose sums of
    # many small contributions to one pixel.
    rows = rows.astype(jnp.float32)
    take = jax.vmap(  # over images, then heads
        jax.vmap(lambda r, i: r.at[i].get(mode="promise_in_bounds"), in_axes=1, out_axes=1)
    )
    return jnp.sum(take(rows, index) * factor[..., None], axis=3)


# Gathered rows of a chunk. Writing and reading them takes a seventh of the time if they stay in a
# processor's cache.
CHUNK_BYTES = 4 << 20


def ms_deform_attn_chunks(
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
) -> jax.Array:
    """As `ms_deform_attn_gather`, a few queries at a time: the form for processors.

    While rows stay in the cache, copying whole rows and multiplying a batch of small matrices is
    several times faster than XLA's loop over the elements of a fused gather.
    """
    batch, queries, heads, levels, points, _ = sampling_locations.shape
    width = value.shape[-1]
    chunk = max(1, CHUNK_BYTES // (4 * batch * heads * levels * 4 * points * width))
    steps = -(-queries // chunk)
    chunk = -(-queries // steps)
    # Of each level, against [..., L, P].
    height, columns = np.array(spatial_shapes)[:, :, None].swapaxes(0, 1)
    first = np.cumsum(height * columns, axis=0) - height * columns
    head = np.arange(heads)[:, None, None]

    def cut(x):  # [B, Q, ...] -> [steps, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, steps * chunk - queries), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, steps, chunk, *x.shape[2:]), 1, 0)

    def read(table, index):
        return table.at[index].get(mode="promise_in_bounds")

    # An axis of one image would make the gradient copy the rows once more.
    images = () if batch == 1 else (batch,)
    read = read if batch == 1 else jax.vmap(read)

    @jax.checkpoint  # the backward pass reads the rows again
    def attend(table, part):
        index, factor = part
        rows = read(table, index.reshape(*images, -1))
        # Without the barrier XLA fuses the copies into the sum, element by element.
        rows = jax.lax.optimization_barrier(rows.reshape(*index.shape, width))
        return jnp.einsum("bqnkd,bqnk->bqnd", rows, factor, precision=jax.lax.Precision.HIGHEST)

    @jax.checkpoint  # and finds them again
    def attend_all(value, locations, weights):
        table = value.astype(jnp.float32).reshape(*images, -1, width)  # [B, S * N, D]
        index, factor = corners(locations, weights, (height, columns))
        index = ((first + index) * heads + head).astype(jnp.int32)
        parts = [cut(x.reshape(*x.shape[:3], -1)) for x in (index, factor)]
        return jax.lax.map(functools.partial(attend, table), parts)

    out = attend_all(value, sampling_locations, attention_weights.astype(jnp.float32))
    out = jnp.moveaxis(out, 0, 1)
    out = out.reshape(batch, steps * chunk, heads * width)[:, :queries]
    return out.astype(value.dtype)
