"""Gathering kernels in Pallas:Triton, for Ampere and newer ("triton" of pallas_gpu.py).

A block takes some queries of one image and head, and reads each of their corners with a gather by
pointers: 16 bytes a thread, neighbouring threads along the channels. It reads the value map itself,
so no table is built. Points outside, including NaN, are masked out of every access.

Upstream calls Pallas:Triton deprecated since jax 0.11; jax 0.10, 0.11 and 0.12 all compile these
kernels for sm_90a, and 0.12 for sm_80, sm_89 and sm_100a too. They have run in interpret mode, but
never on a GPU.

Letters: B batch, Q queries, S pixels, N heads, L levels, P points, D head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from oneformer_jax.kernels.ms_deform_attn.reference import SpatialShapes

# Size of a block's [queries, channels] array: 16 bytes of bfloat16 for each thread of 4 warps. The
# gradient keeps more arrays, in float32.
FORWARD_TILE = 1024
BACKWARD_TILE = 512
_COMPILER = plt.CompilerParams(num_warps=4, num_stages=1)


def forward(
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    locations: jax.Array,
    weights: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """Maps [B, S, N, D], [B, Q, N, L, P, 2], [B, Q, N, L, P] to [B, Q, N, D]."""
    batch, queries, heads, _, points = weights.shape
    width = value.shape[-1]

    def kernel(value_ref, locations_ref, weights_ref, out_ref):
        tile = _Tile(queries, width, FORWARD_TILE)
        total = jnp.zeros((tile.block, tile.channels), jnp.float32)
        start = 0
        for level, (h, w) in enumerate(spatial_shapes):

            def point_loop(p, total, level=level, h=h, w=w, start=start):
                x, y, weight = tile.points(locations_ref, weights_ref, level, p, h, w)
                for corner in _corners(x, y, h, w):
                    rows = tile.rows(value_ref, start + corner.pixel, corner.inside)
                    total += rows * (weight * corner.share)[:, None]
                return total

            total = lax.fori_loop(0, points, point_loop, total)
            start += h * w
        plt.store(tile.of_query(out_ref), total.astype(out_ref.dtype), mask=tile.mask)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(queries, _queries_per_block(width, FORWARD_TILE)), batch, heads),
        out_shape=jax.ShapeDtypeStruct((batch, queries, heads, width), value.dtype),
        compiler_params=_COMPILER,
        interpret=interpret,
        name="ms_deform_attn_forward",
    )(value, locations, weights)


def backward(
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    locations: jax.Array,
    weights: jax.Array,
    gradient: jax.Array,
    *,
    scatter: bool,
    interpret: bool,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Gradients of sum(forward(value, ...) * gradient).

    Args:
      value, spatial_shapes, locations, weights, interpret: as for `forward`.
      gradient: [B, Q, N, D].
      scatter: also form the gradient in `value`, by atomic adds, whose order changes between runs.

    Returns:
      In `value` (or None), `locations` and `weights`, all float32.
    """
    batch, queries, heads, _, points = weights.shape
    width = value.shape[-1]

    def kernel(value_ref, locations_ref, weights_ref, gradient_ref, *refs):
        # An aliased buffer is both an input and an output.
        d_value_ref, d_locations_ref, d_weights_ref = refs[1:] if scatter else (None, *refs)
        tile = _Tile(queries, width, BACKWARD_TILE)
        channels = plt.load(tile.of_query(gradient_ref), mask=tile.mask, other=0.0)
        channels = channels.astype(jnp.float32)
        start = 0
        for level, (h, w) in enumerate(spatial_shapes):

            def point_loop(p, carry, level=level, h=h, w=w, start=start):
                x, y, weight = tile.points(locations_ref, weights_ref, level, p, h, w)
                d_x = d_y = d_weight = jnp.zeros((tile.block,), jnp.float32)
                for corner in _corners(x, y, h, w):
                    pixel = start + corner.pixel
                    rows = tile.rows(value_ref, pixel, corner.inside)
                    product = jnp.sum(rows * channels, axis=1)
                    d_x += product * weight * corner.slope_x
                    d_y += product * weight * corner.slope_y
                    d_weight += product * corner.share
                    if scatter:
                        part = channels * (weight * corner.share)[:, None]
                        tile.add_rows(d_value_ref, pixel, corner.inside, part, interpret)
                for ref, x_or_y, d in (
                    (d_locations_ref, 0, d_x * w),
                    (d_locations_ref, 1, d_y * h),
                ):
                    plt.store(tile.of_point(ref, level, p, x_or_y), d, mask=tile.valid)
                plt.store(tile.of_point(d_weights_ref, level, p), d_weight, mask=tile.valid)
                return carry

            lax.fori_loop(0, points, point_loop, None)
            start += h * w

    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (value, locations, weights)]
    call = functools.partial(
        pl.pallas_call,
        kernel,
        grid=(pl.cdiv(queries, _queries_per_block(width, BACKWARD_TILE)), batch, heads),
        compiler_params=_COMPILER,
        interpret=interpret,
        name="ms_deform_attn_backward",
    )
    arguments = (value, locations, weights, gradient)
    if not scatter:
        return None, *call(out_shape=shapes[1:])(*arguments)
    zeros = jnp.zeros(value.shape, jnp.float32)
    return tuple(call(out_shape=shapes, input_output_aliases={4: 0})(*arguments, zeros))


def segment_sum(
    query: jax.Array, factor: jax.Array, starts: jax.Array, gradient: jax.Array, *, interpret: bool
) -> jax.Array:
    """Sums over sorted points: one thread group adds the points of a row in order.

    Args:
      query: int32 [T], the query of each point, points sorted by the row that they read.
      factor: float32 [T, 4], the shares of the 4 corners of its row.
      starts: int32 [R + 1], the start of each row's points.
      gradient: float32 or bfloat16 [M, D].
      interpret: run in interpret mode.

    Returns:
      float32 [R, 4, D]: the sum over a row's points t of factor[t, c] * gradient[query[t]].
    """
    rows, width = starts.shape[0] - 1, gradient.shape[-1]
    block = _queries_per_block(width, BACKWARD_TILE)

    def kernel(query_ref, factor_ref, starts_ref, gradient_ref, out_ref):
        row = pl.program_id(0) * block + jnp.arange(block)
        channel = jnp.arange(_channels(width))
        mask = (row < rows)[:, None] & (channel < width)[None, :]
        start = plt.load(starts_ref.at[row], mask=row < rows, other=0)
        count = plt.load(starts_ref.at[row + 1], mask=row < rows, other=0) - start

        def point_loop(i, totals):
            valid = i < count
            q = plt.load(query_ref.at[start + i], mask=valid, other=0)
            both = valid[:, None] & (channel < width)[None, :]
            channels = plt.load(gradient_ref.at[q[:, None], channel[None, :]], mask=both, other=0.0)
            channels = channels.astype(jnp.float32)
            shares = (
                plt.load(factor_ref.at[start + i, c], mask=valid, other=0.0) for c in range(4)
            )
            return tuple(
                total + share[:, None] * channels
                for total, share in zip(totals, shares, strict=True)
            )

        zero = jnp.zeros((block, channel.shape[0]), jnp.float32)
        totals = lax.fori_loop(0, jnp.max(count), point_loop, (zero,) * 4)
        for c, total in enumerate(totals):
            plt.store(out_ref.at[row[:, None], c, channel[None, :]], total, mask=mask)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, block),),
        out_shape=jax.ShapeDtypeStruct((rows, 4, width), jnp.float32),
        compiler_params=_COMPILER,
        interpret=interpret,
        name="ms_deform_attn_segment_sum",
    )(query, factor, starts, gradient)


def _channels(width: int) -> int:
    """Channels of a tile: Triton's tiles have sizes of powers of two."""
    return pl.next_power_of_2(width)


def _queries_per_block(width: int, tile: int) -> int:
    return tile // _channels(width)


class _Tile:
    """The queries and channels of a block, and its accesses to arrays of images and heads."""

    def __init__(self, queries: int, width: int, tile: int):
        self.block, self.channels = _queries_per_block(width, tile), _channels(width)
        self.image, self.head = pl.program_id(1), pl.program_id(2)
        self.query = pl.program_id(0) * self.block + jnp.arange(self.block)
        self.valid = self.query < queries
        self.channel = jnp.arange(self.channels)
        self.in_width = jnp.broadcast_to(
            (self.channel < width)[None, :], (self.block, self.channels)
        )
        self.mask = self.valid[:, None] & self.in_width

    def of_query(self, ref):
        return ref.at[self.image, self.query[:, None], self.head, self.channel[None, :]]

    def of_point(self, ref, *index):
        return ref.at[self.image, self.query, self.head, *index]

    def points(self, locations_ref, weights_ref, level, p, h, w):
        """Returns pixel coordinates and weights, float32 [block].

        Points outside and NaN get (-2, -2), where no corner is inside the map.
        """
        x, y = (
            plt.load(self.of_point(locations_ref, level, p, i), mask=self.valid, other=-1.0) * size
            - 0.5
            for i, size in enumerate((w, h))
        )
        weight = plt.load(self.of_point(weights_ref, level, p), mask=self.valid, other=0.0)
        inside = (x > -1) & (x < w) & (y > -1) & (y < h)
        x, y = jnp.where(inside, x, -2.0), jnp.where(inside, y, -2.0)
        return x, y, weight.astype(jnp.float32)

    def rows(self, value_ref, pixel, inside) -> jax.Array:
        rows = plt.load(
            value_ref.at[self.image, pixel[:, None], self.head, self.channel[None, :]],
            mask=inside[:, None] & self.mask,
            other=0.0,
        )
        return rows.astype(jnp.float32)

    def add_rows(self, ref, pixel, inside, rows, interpret):
        mask = inside[:, None] & self.mask
        if not interpret:
            target = (self.image, pixel[:, None], self.head, self.channel[None, :])
            plt.atomic_add(ref, target, rows, mask=mask)
            return

        # Interpret mode ignores the mask of an atomic and counts equal indices once.
        def query_loop(i, carry):
            ref[self.image, pixel[i], self.head, :] += jnp.where(mask[i], rows[i], 0.0)[
                : ref.shape[-1]
            ]
            return carry

        lax.fori_loop(0, self.block, query_loop, None)


class _Corner:
    """One of the 4 pixels around each point: its number in the map, its share and the slopes."""

    def __init__(self, column, row, share_x, share_y, sign_x, sign_y, h, w):
        self.inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
        self.pixel = jnp.where(self.inside, row * w + column, 0)
        self.share = share_x * share_y
        self.slope_x, self.slope_y = sign_x * share_y, sign_y * share_x


def _corners(x: jax.Array, y: jax.Array, h: int, w: int) -> list[_Corner]:
    left, top = jnp.floor(x), jnp.floor(y)
    columns, rows = left.astype(jnp.int32), top.astype(jnp.int32)
    along_x = ((columns, 1 - (x - left), -1.0), (columns + 1, x - left, 1.0))
    along_y = ((rows, 1 - (y - top), -1.0), (rows + 1, y - top, 1.0))
    return [
        _Corner(column, row, share_x, share_y, sign_x, sign_y, h, w)
        for row, share_y, sign_y in along_y
        for column, share_x, sign_x in along_x
    ]
