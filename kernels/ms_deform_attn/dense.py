"""Multi-scale deformable attention as dense matrix products ("xla_dense").

Bilinear sampling is linear in the map: a query's output is a row of an attention matrix over all
pixels of a level times the values of that level. A point at x gives pixel i the share
hat(x - i) = max(0, 1 - |x - i|) along each axis, so the matrix is

    A[q, (i, j)] = sum over points of weight * hat(y - i) * hat(x - j),

exact, with neither a gather nor (in the gradient) a scatter. A holds Q * S numbers per head, so
this is for small maps, and there it is much faster wherever scattering is slow: on CPUs and TPUs.

Letters: B batch, Q queries, S all pixels of all levels, N heads, L levels, P points, D head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels.ms_deform_attn.reference import SpatialShapes, corner_coordinates, split_levels


def ms_deform_attn_dense(
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
) -> jax.Array:
    """As `api.ms_deform_attn`, whose checks have been passed. Forms [B, N, Q, h, w] per level."""
    batch, queries, heads = sampling_locations.shape[:3]
    out = jnp.zeros((batch, heads, queries, value.shape[-1]), jnp.float32)
    # Heads before queries, so that every product is a batch of plain matrix products.
    locations = jnp.moveaxis(sampling_locations, 2, 1)  # [B, N, Q, L, P, 2]
    weights = jnp.moveaxis(attention_weights, 2, 1).astype(jnp.float32)
    for level, rows in enumerate(split_levels(value, spatial_shapes)):
        out += _dense_level(
            rows, locations[:, :, :, level], weights[:, :, :, level], spatial_shapes[level]
        )
    return jnp.moveaxis(out, 1, 2).reshape(batch, queries, -1).astype(value.dtype)


# Rematerialised, because A is the largest array by far and costs P / D of its product to rebuild.
@functools.partial(jax.checkpoint, static_argnums=3)
def _dense_level(
    rows: jax.Array, locations: jax.Array, weights: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """[B, h*w, N, D], [B, N, Q, P, 2], [B, N, Q, P] -> float32 [B, N, Q, D]."""
    h, w = shape
    cell, fraction, weights = corner_coordinates(locations, weights, shape)
    along_x = _hat(cell[..., 0], fraction[..., 0], w)  # [B, N, Q, P, w]
    along_y = _hat(cell[..., 1], fraction[..., 1], h) * weights[..., None]  # [B, N, Q, P, h]
    # The full precision matters on devices that multiply float32 matrices in fewer bits.
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    matrix = dot("bnqpy,bnqpx->bnqyx", along_y, along_x)
    matrix = matrix.reshape(*matrix.shape[:3], h * w)
    return dot("bnqs,bsnd->bnqd", matrix, rows.astype(jnp.float32))


def _hat(cell: jax.Array, fraction: jax.Array, size: int) -> jax.Array:
    """Shares of the pixels 0..size-1 of an axis: [...] -> float32 [..., size].

    Written by cell rather than as max(0, 1 - |t|), whose derivative at a pixel's centre would be
    another one-sided choice than that of the gathering version.
    """
    pixel = jnp.arange(size, dtype=jnp.int32)
    below = jnp.where(pixel == cell[..., None], 1 - fraction[..., None], 0.0)
    return jnp.where(pixel == cell[..., None] + 1, fraction[..., None], below)
