"""Multi-scale deformable attention as dense matrix products, the other half of "xla".

Bilinear sampling is linear in the map: a query's output is a row of an attention matrix over all
pixels of a level times the values of that level. A point at x gives pixel i the share
hat(x - i) = max(0, 1 - |x - i|) along each axis, so the matrix is

    A[q, (i, j)] = sum over points of weight * hat(y - i) * hat(x - j),

exact. Neither the forward pass nor the gradient of the values gathers or scatters rows, which is
slow on CPUs and TPUs. A holds Q * S numbers per head, so this is for small maps.

Letters: B batch, Q queries, S all pixels of all levels, N heads, L levels, P points, D head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from oneformer_jax.kernels.ms_deform_attn.reference import (
    SpatialShapes,
    cell_coordinates,
    corners,
    split_levels,
)


def ms_deform_attn_dense(
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
) -> jax.Array:
    """As `api.ms_deform_attn`, without its checks. Forms [B, N, Q, h, w] per level."""
    batch, queries, heads = sampling_locations.shape[:3]
    # Heads before queries, so that every product is a batch of plain matrix products.
    locations = jnp.moveaxis(sampling_locations, 2, 1)  # [B, N, Q, L, P, 2]
    weights = jnp.moveaxis(attention_weights, 2, 1).astype(jnp.float32)
    out = jnp.zeros((batch, queries, heads, value.shape[-1]), jnp.float32)
    for level, rows in enumerate(split_levels(value, spatial_shapes)):
        matrix = sampling_matrix(
            locations[:, :, :, level], weights[:, :, :, level], spatial_shapes[level]
        )
        out += jnp.einsum(
            "bnqs,bsnd->bqnd",
            matrix,
            rows.astype(jnp.float32),
            # Some devices multiply float32 matrices in fewer bits by default.
            precision=jax.lax.Precision.HIGHEST,
        )
    return out.reshape(batch, queries, -1).astype(value.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sampling_matrix(locations: jax.Array, weights: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns the matrix A of one level.

    Args:
      locations: float32 [..., P, 2], (x, y) in 0..1.
      weights: float32 [..., P].
      shape: (h, w) of the level.

    Returns:
      float32 [..., h * w].
    """
    h, w = shape
    cell, fraction, weights = cell_coordinates(locations, weights, shape)
    along_x = _hat(cell[..., 0], fraction[..., 0], w)  # [..., P, w]
    along_y = _hat(cell[..., 1], fraction[..., 1], h) * weights[..., None]  # [..., P, h]
    # Without the barrier XLA recomputes the hats for each pixel of the matrix.
    along_x, along_y = jax.lax.optimization_barrier((along_x, along_y))
    # A sum of outer products: [h, P] x [P, w] per query is too small for a matrix unit or BLAS.
    matrix = sum(
        along_y[..., point, :, None] * along_x[..., point, None, :]
        for point in range(weights.shape[-1])
    )
    return matrix.reshape(*matrix.shape[:-2], h * w)


def _matrix_forward(locations, weights, shape):
    return sampling_matrix(locations, weights, shape), (locations, weights)


def _matrix_backward(shape, residuals, gradient):
    # The gradient of a point needs only the 4 numbers of the pixels it touches; differentiating the
    # sum of outer products would reduce over the whole matrix P times.
    index, _ = corners(*residuals, shape)
    _, pull_back = jax.vjp(lambda *points: corners(*points, shape)[1], *residuals)
    return pull_back(jnp.take_along_axis(gradient, index, axis=-1, mode="promise_in_bounds"))


sampling_matrix.defvjp(_matrix_forward, _matrix_backward)


def _hat(cell: jax.Array, fraction: jax.Array, size: int) -> jax.Array:
    """Shares of the pixels 0..size-1 of an axis: [...] -> float32 [..., size]."""
    pixel = jnp.arange(size, dtype=jnp.int32)
    below = jnp.where(pixel == cell[..., None], 1 - fraction[..., None], 0.0)
    return jnp.where(pixel == cell[..., None] + 1, fraction[..., None], below)
