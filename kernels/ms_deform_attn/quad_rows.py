"""The two TPU kernels of "quad rows": one table row per bilinear sample, forward and backward.

A bilinear sample reads 4 neighbouring pixels. The table of a map holds these side by side for every
cell between 4 pixels: 4 corners of 32 channels fill the 128 lanes of a vector register, so a sample
is one load of one row. Rows are addressed from scalar memory, one after another; the vector work
(corner weights, sums, gradients) hides behind the row traffic.

  a map of 2 x 3 pixels      its 3 x 4 cells             row 5 of the table = cell (1, 1)
  with a border of zeros     (numbers: table rows)
                                                   lanes  0..31    32..63   64..95   96..127
   0   0   0   0   0     +----+----+----+----+         +--------+--------+--------+--------+
   0   a   b   c   0     |  0 |  1 |  2 |  3 |         |   a    |   b    |   d    |   e    |
   0   d   e   f   0     |  4 |  5 |  6 |  7 |         | 32 ch. | 32 ch. | 32 ch. | 32 ch. |
   0   0   0   0   0     |  8 |  9 | 10 | 11 |         +--------+--------+--------+--------+
                         +----+----+----+----+          (y, x)  (y, x+1) (y+1, x) (y+1,x+1)

The code relies on properties of the static schedule (v5e; a bundle is one issue cycle):
  * A scalar load forms its address `immediate + register` free of charge only if the array lies at
    a fixed place and the immediate is a static slice. So the kernels copy indices themselves to a
    scratch array [sample, buffer, block]; Pallas' blocks would cost one scalar addition each.
  * Rows pass through a scratch array. Joining them in registers saves a store, but the scheduler
    then loads indices early and spills them.
  * Forward, the next block's rows are loaded in the same loop body as the last block's sums.
  * Backward, a row of the table and its gradient are neighbours, so one address and one load serve
    both. A row's read-modify-write takes about 10 cycles, so all rows of a group of points are read
    before the first is written; `_merged_weights` makes that right for equal rows. Separate loops
    spread weights over lanes and sum over channels, by transposes.

Letters: A images times heads, G groups of 32 channels of a head, K samples (levels times points) of
a query, Q queries (padded to whole tiles), R rows of a table.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from oneformer_jax.kernels.tpu_kernels import (
    LANES,
    ROW_BYTES,
    SUBLANES,
    fetch_indices,
    fill_with_zeros,
    index_scratch,
    launch,
    load_ahead,
    loop,
)

CHANNELS = LANES // 4  # of one corner
MAX_SAMPLES = CHANNELS  # a query's weights take one lane per sample and corner
MAX_TILE = 512  # queries of a grid step
MAX_TILE_SAMPLES = 12 * MAX_TILE  # bounds the scratch of the backward kernel
GROUP = 4  # points of one level whose rows are read before any is written
# Per loop body of the backward kernel: long bodies amortise the ends of their schedule.
UPDATED_BLOCKS = 4  # divides 128 / 8
DENSE_PARTS = 4  # of 128 queries
VMEM_RESERVE = 10 * 2**20  # for blocks, scratch and the compiler
# Cores may share the heads; a head's tiles add to one table, in order.
ORDER = ("parallel", "arbitrary")

# Corner c of a row is pixel (y + CORNERS[c][0], x + CORNERS[c][1]) of cell (y, x).
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def tile_size(queries: int, samples: int) -> int:
    """Queries of one grid step: the largest of the tiles that pad least."""
    most = max(LANES, min(MAX_TILE, MAX_TILE_SAMPLES // samples))
    sizes = range(LANES, most + 1, LANES)
    return min(sizes, key=lambda size: (-(-queries // size) * size, -size))


def scalar_order(cells: jax.Array, tile: int) -> jax.Array:
    """Reorders indices for the scalar core: [A, K, Q] -> [A, tiles, K * 8, 128].

    Block j of a tile holds the queries j, j + tile/8, j + 2 * tile/8..., which makes it a reshape.
    """
    batch, samples, queries = cells.shape
    x = cells.reshape(batch, samples, queries // tile, SUBLANES, tile // SUBLANES)
    x = jnp.pad(x, ((0, 0),) * 4 + ((0, LANES - tile // SUBLANES),))
    return jnp.swapaxes(x, 1, 2).reshape(batch, queries // tile, samples * SUBLANES, LANES)


def forward(
    order: jax.Array,
    points: jax.Array,
    table: jax.Array,
    *,
    tile: int,
    vmem_bytes: int,
    interpret,
) -> jax.Array:
    """Sums weighted table rows.

    Args:
      order: int32 [A, Q / tile, K * 8, 128], the `scalar_order` of table rows [A, K, Q], level
        by level.
      points: float32 [A, 3, K, Q]: fraction along x, fraction along y, attention weight.
      table: float32 [A * G, R, 128]; R is a multiple of 8.
      tile: queries of a grid step; divides Q.
      vmem_bytes: vector memory of the kernel.
      interpret: as of `pl.pallas_call`.

    Returns:
      float32 [A * G, 32, Q].
    """
    batch, _, samples, queries = points.shape
    groups = table.shape[0] // batch
    # If two tables fit, the next head's is fetched while this one's is in use.
    once = 2 * table.shape[1] * ROW_BYTES > vmem_bytes - VMEM_RESERVE
    mode = {"pipeline_mode": pl.Buffered(1)} if once else {}
    rows = pltpu.VMEM((samples * _block(samples), LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_forward_kernel, groups=groups, unroll=not interpret),
        name="ms_deform_attn_forward",
        grid=(batch * groups, queries // tile),
        in_specs=[
            pl.BlockSpec(memory_space=pl.ANY),
            _points_spec(samples, tile, groups),
            pl.BlockSpec((None, *table.shape[1:]), lambda n, t: (n, 0, 0), **mode),
        ],
        out_specs=pl.BlockSpec((None, CHANNELS, tile), lambda n, t: (n, 0, t)),
        out_shape=jax.ShapeDtypeStruct((batch * groups, CHANNELS, queries), jnp.float32),
        scratch_shapes=[
            *index_scratch(samples * SUBLANES),
            pltpu.VMEM((tile, LANES), jnp.float32),
            pltpu.VMEM((tile, LANES), jnp.float32),
            rows,
            rows,
        ],
        **launch(ORDER, vmem_bytes, interpret),
    )(order, points, table)


def backward(
    order: jax.Array,
    cells: jax.Array,
    points: jax.Array,
    table: jax.Array,
    gradient: jax.Array,
    *,
    levels: int,
    tile: int,
    vmem_bytes: int,
    interpret,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `forward` in points and table.

    Args:
      order: the `scalar_order` of 2 * cells, twice `forward`'s.
      cells: int32 [A, K, Q], the rows that `order` holds.
      gradient: float32 [A * G, 32, Q], of the output.
      levels: samples of different levels never have the same row.

    Returns:
      float32 [A * G, 3, K, Q] of each channel group, and float32 [A * G, R, 128].
    """
    batch, samples, queries = cells.shape
    groups = table.shape[0] // batch
    rows = pltpu.VMEM((samples * tile, LANES), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_backward_kernel, levels=levels, groups=groups, unroll=not interpret),
        name="ms_deform_attn_backward",
        grid=(batch * groups, queries // tile),
        in_specs=[
            anywhere,
            pl.BlockSpec((None, samples, tile), lambda n, t: (n // groups, 0, t)),
            _points_spec(samples, tile, groups),
            pl.BlockSpec((None, CHANNELS, tile), lambda n, t: (n, 0, t)),
            anywhere,
        ],
        out_specs=[_points_spec(samples, tile, 1), anywhere],
        out_shape=[
            jax.ShapeDtypeStruct((batch * groups, 3, samples, queries), jnp.float32),
            jax.ShapeDtypeStruct(table.shape, jnp.float32),
        ],
        scratch_shapes=[
            *index_scratch(samples * SUBLANES),
            pltpu.VMEM((len(CORNERS), samples, tile), jnp.float32),
            pltpu.VMEM((len(CORNERS), samples, tile), jnp.float32),
            rows,
            rows,
            pltpu.SemaphoreType.DMA,
            pltpu.VMEM((2 * table.shape[1], LANES), jnp.float32),
        ],
        **launch(ORDER, vmem_bytes, interpret),
    )(order, cells, points, gradient, table)


def _block(samples: int) -> int:
    """Queries whose rows are loaded together; bounds the code of the loop body."""
    return 2 * SUBLANES if samples <= 16 else SUBLANES


def _points_spec(samples: int, tile: int, groups: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 3, samples, tile), lambda n, t: (n // groups, 0, 0, t))


def _forward_kernel(
    index_hbm,
    points_ref,
    table,
    out_ref,
    indices,
    arrived,
    weights_ref,
    sums_ref,
    *buffers,
    groups: int,
    unroll: bool,
):
    _, samples, tile = points_ref.shape
    block = _block(samples)
    stride = tile // SUBLANES
    await_indices, slot = fetch_indices(
        index_hbm, indices, arrived, part=pl.program_id(0) // groups, tile_axis=1
    )
    weights_ref[...] = _to_lanes(_corner_weights(points_ref[0], points_ref[1], points_ref[2])).T
    await_indices()

    def load_rows(i, rows_ref):
        def load(q):
            j, u = i * (block // SUBLANES) + q // SUBLANES, q % SUBLANES
            for k in range(samples):
                row = indices.at[k * SUBLANES + u][slot, j]
                rows_ref[pl.ds(k * block + q, 1), :] = table[pl.ds(row, 1), :]

        loop(block, load, block if unroll else 1)

    def add_rows(i, rows_ref):
        for v in range(block // SUBLANES):
            queries = pl.ds(i * (block // SUBLANES) + v, SUBLANES, stride)
            weights = weights_ref[queries, :]
            total = jnp.zeros((SUBLANES, LANES), jnp.float32)
            for k in range(samples):
                rows = rows_ref[pl.ds(k * block + v * SUBLANES, SUBLANES), :]
                total += rows * _broadcast_sample(weights, k)
            sums_ref[queries, :] = total

    load_ahead(tile // block, load_rows, add_rows, buffers)
    corners = _from_lanes(sums_ref[...].T)
    out_ref[...] = sum(corners[1:], corners[0])


def _backward_kernel(
    index_hbm,
    cells_ref,
    points_ref,
    gradient_ref,
    table,
    d_points_ref,
    d_table,
    indices,
    arrived,
    weights_ref,
    products_ref,
    added_ref,
    loaded_ref,
    moved,
    pair,
    *,
    levels: int,
    groups: int,
    unroll: bool,
):
    _, samples, tile = points_ref.shape
    points = samples // levels
    blocks = tile // SUBLANES
    # Row 2 r of `pair` is row r of the table, row 2 r + 1 its gradient.
    head, t = pl.program_id(0), pl.program_id(1)
    await_indices, slot = fetch_indices(
        index_hbm, indices, arrived, part=pl.program_id(0) // groups, tile_axis=1
    )

    @pl.when(t == 0)
    def _():
        fill_with_zeros(pair)
        _copy_every_other(table.at[head], pair, 0, True, moved, unroll)

    await_indices()

    def make_additions(i):
        """Forms the addend of each sample's row of the gradient: weights times output gradients."""
        queries = pl.ds(_aligned(i * LANES), LANES)
        corner_weights = _corner_weights(*(points_ref[n, :, queries] for n in range(3)))
        merged = _merged_weights(cells_ref[:, queries], corner_weights, points)
        for c, weights in enumerate(merged):
            weights_ref[c, :, queries] = weights
        gradient = gradient_ref[:, queries]
        for k in range(samples):
            products = [gradient * weights_ref[c, k : k + 1, queries] for c in range(len(CORNERS))]
            rows = pl.ds(_aligned(k * tile + i * LANES), LANES)
            added_ref[rows, :] = jnp.concatenate(products, axis=0).T

    def update_rows(i):
        def update(n):
            j, u = i * UPDATED_BLOCKS + n // SUBLANES, n % SUBLANES
            query = u * blocks + j
            for first in range(0, points, GROUP):
                # Levels have different rows.
                group = [
                    level * points + p
                    for p in range(first, min(first + GROUP, points))
                    for level in range(levels)
                ]
                rows = [indices.at[k * SUBLANES + u][slot, j] for k in group]
                sums = []
                for k, row in zip(group, rows, strict=True):
                    both = pair[pl.ds(row, 2), :]
                    loaded_ref[pl.ds(k * tile + query, 1), :] = both[:1]
                    sums.append(both[1:])
                for k, row, total in zip(group, rows, sums, strict=True):
                    pair[pl.ds(row + 1, 1), :] = total + added_ref[pl.ds(k * tile + query, 1), :]

        count = UPDATED_BLOCKS * SUBLANES
        loop(count, update, count if unroll else 1)

    def multiply(i):
        """Forms the gradients of corner weights, products of rows and output gradients, and points.

        As in `make_additions`, arithmetic of all samples runs beside the transposes.
        """
        queries = pl.ds(_aligned(i * LANES), LANES)
        gradient = gradient_ref[:, queries]
        for k in range(samples):
            rows = loaded_ref[pl.ds(_aligned(k * tile + i * LANES), LANES), :]
            for c, corner in enumerate(_from_lanes(rows.T)):
                products_ref[c, k : k + 1, queries] = jnp.sum(
                    corner * gradient, axis=0, keepdims=True
                )
        fraction_x, fraction_y, weight = (points_ref[n, :, queries] for n in range(3))
        # The products as a bilinear patch: along x at its upper and lower edge, then along y.
        corners = (products_ref[c, :, queries] for c in range(len(CORNERS)))
        upper_left, upper_right, lower_left, lower_right = corners
        upper_slope, lower_slope = upper_right - upper_left, lower_right - lower_left
        upper = upper_left + fraction_x * upper_slope
        lower = lower_left + fraction_x * lower_slope
        slope = upper_slope + fraction_y * (lower_slope - upper_slope)
        d_points_ref[0, :, queries] = weight * slope
        d_points_ref[1, :, queries] = weight * (lower - upper)
        d_points_ref[2, :, queries] = upper + fraction_y * (lower - upper)

    parts = tile // LANES
    loop(parts, make_additions, math.gcd(parts, DENSE_PARTS) if unroll else 1)
    loop(blocks // UPDATED_BLOCKS, update_rows, 1)
    loop(parts, multiply, math.gcd(parts, DENSE_PARTS) if unroll else 1)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        _copy_every_other(d_table.at[head], pair, 1, False, moved, unroll)


def _copy_every_other(rows, pair, first: int, into_pair: bool, done, at_once: bool):
    """Copies the array `rows` to or from the rows first, first + 2, first + 4... of `pair`.

    The interpreters cannot copy a part of a reshaped array; they copy row by row.
    """

    def copy(rows, part):
        copy = pltpu.make_async_copy(*((rows, part) if into_pair else (part, rows)), done)
        copy.start()
        copy.wait()

    if at_once:
        copy(rows, pair.reshape(rows.shape[0], 2, LANES).at[:, first])
    else:

        def copy_row(i):
            copy(rows.at[pl.ds(i, 1)], pair.at[pl.ds(2 * i + first, 1)])

        loop(rows.shape[0], copy_row, 1)


def _aligned(row):
    """Promises the compiler that a row is a multiple of 128."""
    return row if isinstance(row, int) else pl.multiple_of(row, LANES)


def _corner_weights(fraction_x, fraction_y, weight):
    """Shares of the corners times the weight: 4 arrays [K, T], in the order of CORNERS."""
    return [
        (fraction_y if dy else 1 - fraction_y) * (fraction_x if dx else 1 - fraction_x) * weight
        for dy, dx in CORNERS
    ]


def _merged_weights(cells, corner_weights, points: int):
    """Adds to each sample's weights those of earlier samples of its group with the same row.

    Only the last write of a group to a row remains, so it must hold the whole sum.
    """
    samples = cells.shape[0]

    def shifted(x, lag):
        return jnp.concatenate([jnp.zeros((lag, x.shape[1]), x.dtype), x[: samples - lag]], axis=0)

    merged = list(corner_weights)
    for lag in range(1, min(points, GROUP)):
        same = cells == shifted(cells, lag)  # false for samples of different levels
        if points > GROUP:
            place = lax.broadcasted_iota(jnp.int32, cells.shape, 0) % points % GROUP
            same &= place >= lag
        for c, weights in enumerate(corner_weights):
            merged[c] += jnp.where(same, shifted(weights, lag), 0.0)
    return merged


def _to_lanes(corners):
    """4 arrays [K, T] -> [128, T]: row 32 * corner + k, to become lanes when transposed."""
    samples, tile = corners[0].shape
    if samples == CHANNELS:
        return jnp.concatenate(corners, axis=0)
    padding = jnp.zeros((CHANNELS - samples, tile), jnp.float32)
    return jnp.concatenate([x for corner in corners for x in (corner, padding)], axis=0)


def _from_lanes(x):
    """[128, T] -> 4 arrays [32, T], one per corner."""
    return [x[c * CHANNELS : (c + 1) * CHANNELS] for c in range(len(CORNERS))]


def _broadcast_sample(weights, k: int):
    """Spreads the weights of sample k, at lanes 32 * corner + k of [8, 128], over each corner."""
    lane = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    return jnp.take_along_axis(
        weights, (lane & ~(CHANNELS - 1)) + k, axis=1, mode="promise_in_bounds"
    )
