"""The two TPU kernels of "quad rows": one table row per bilinear sample, forward and backward.

A bilinear sample reads 4 neighbouring pixels. The table of a map holds, for every cell between 4
pixels, those pixels side by side: 4 corners of 32 channels fill the 128 lanes of a vector register,
so a sample is one load of one row. Rows are addressed from scalar memory, one after another; all
else (corner weights, sums, gradients) is vector work that hides behind the row traffic.

What the static schedule taught, and the code below relies on (v5e; a bundle is one issue cycle):
  * A scalar load takes `immediate + register` as its address for nothing only if the array lies at
    a fixed place and the immediate is a static slice. So indices are copied to a scratch array
    [sample, buffer, block] by hand; Pallas' own blocks would cost one more scalar addition each.
  * Rows pass through a scratch array. Putting them together in registers saves a store, but the
    scheduler then loads indices early and spills them.
  * The next block's rows are loaded in the same loop body as the last block's sums.
  * In the backward kernel a table and its gradient lie in one array, so that one address serves
    both. A row's read-modify-write takes about 10 cycles, so the rows of a group of points are all
    read before the first one is written; `_merged_weights` makes that right for equal rows.

Letters: A images times heads, G groups of 32 channels of a head, K samples (levels times points) of
a query, Q queries (padded to whole tiles), R rows of a table.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHANNELS = 32  # of one corner
LANES = 4 * CHANNELS
SUBLANES = 8  # queries of a block: the rows of a vector register
MAX_SAMPLES = CHANNELS  # a query's weights take one lane per sample and corner
ROW_BYTES = 4 * LANES
TILE_STEP = 128
MAX_TILE = 1024  # queries; a block's index within a tile takes one of 128 lanes
GROUP = 4  # points of one level whose rows are read before any is written
VMEM_RESERVE = 5 * 2**20  # blocks, scratch and the compiler's own, beside the tables

# Corner c of a row is pixel (y + CORNERS[c][0], x + CORNERS[c][1]) of cell (y, x).
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def tile_size(queries: int) -> int:
    """Queries of one grid step: the tile that pads least, of those the largest."""
    sizes = range(TILE_STEP, MAX_TILE + 1, TILE_STEP)
    return min(sizes, key=lambda size: (-(-queries // size) * size, -size))


def forward(
    cells: jax.Array,
    points: jax.Array,
    tables: Sequence[jax.Array],
    *,
    tile: int,
    vmem_bytes: int,
    interpret,
) -> jax.Array:
    """Weighted sums of table rows.

    Args:
      cells: int32 [A, K, Q], the row in its level's table, level by level.
      points: float32 [A, 3, K, Q]: fraction along x, fraction along y, attention weight.
      tables: float32 [A * G, R, 128] per level; each level has K / levels points.
      tile: queries of a grid step; divides Q.
      vmem_bytes: what the kernel may take.
      interpret: as of `pl.pallas_call`.

    Returns:
      float32 [A * G, 32, Q].
    """
    batch, samples, queries = cells.shape
    groups = tables[0].shape[0] // batch
    table_bytes = sum(table.shape[1] for table in tables) * ROW_BYTES
    once = 2 * table_bytes > vmem_bytes - VMEM_RESERVE  # else the next head is fetched meanwhile
    mode = {"pipeline_mode": pl.Buffered(1)} if once else {}
    rows = pltpu.VMEM((samples * _block(samples), LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(
            _forward_kernel, levels=len(tables), groups=groups, unroll=not interpret
        ),
        name="ms_deform_attn_forward",
        grid=(batch * groups, queries // tile),
        in_specs=[
            pl.BlockSpec(memory_space=pl.ANY),
            _points_spec(samples, tile, groups),
            *(pl.BlockSpec((None, *t.shape[1:]), lambda n, t: (n, 0, 0), **mode) for t in tables),
        ],
        out_specs=pl.BlockSpec((None, CHANNELS, tile), lambda n, t: (n, 0, t)),
        out_shape=jax.ShapeDtypeStruct((batch * groups, CHANNELS, queries), jnp.float32),
        scratch_shapes=[
            *_index_scratch(samples),
            pltpu.VMEM((tile, LANES), jnp.float32),
            pltpu.VMEM((tile, LANES), jnp.float32),
            rows,
            rows,
        ],
        compiler_params=_compiler_params(vmem_bytes, interpret),
        interpret=interpret,
    )(_scalar_order(cells, tile), points, *tables)


def backward(
    cells: jax.Array,
    points: jax.Array,
    tables: Sequence[jax.Array],
    gradient: jax.Array,
    *,
    tile: int,
    vmem_bytes: int,
    interpret,
) -> tuple[jax.Array, list[jax.Array]]:
    """Gradients of `forward` in points and tables.

    Args:
      cells, points, tables, tile, vmem_bytes, interpret: as of `forward`.
      gradient: float32 [A * G, 32, Q], of the output.

    Returns:
      float32 [A * G, 3, K, Q] for each channel group by itself, and float32 [A * G, R, 128] per
      table.
    """
    batch, samples, queries = cells.shape
    groups = tables[0].shape[0] // batch
    per_query = pltpu.VMEM((tile, LANES), jnp.float32)
    rows = pltpu.VMEM((samples * _block(samples), LANES), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    d_points, *d_tables = pl.pallas_call(
        functools.partial(
            _backward_kernel, levels=len(tables), groups=groups, unroll=not interpret
        ),
        name="ms_deform_attn_backward",
        grid=(batch * groups, queries // tile),
        in_specs=[
            anywhere,
            pl.BlockSpec((None, samples, tile), lambda n, t: (n // groups, 0, t)),
            _points_spec(samples, tile, groups),
            pl.BlockSpec((None, CHANNELS, tile), lambda n, t: (n, 0, t)),
            *(anywhere for _ in tables),
        ],
        out_specs=[_points_spec(samples, tile, 1), *(anywhere for _ in tables)],
        out_shape=[
            jax.ShapeDtypeStruct((batch * groups, 3, samples, queries), jnp.float32),
            *(jax.ShapeDtypeStruct(table.shape, jnp.float32) for table in tables),
        ],
        scratch_shapes=[
            *_index_scratch(samples),
            *(per_query, per_query, per_query),
            *(rows, rows, rows, rows),
            pltpu.SemaphoreType.DMA((len(tables),)),
            *(pltpu.VMEM((2 * table.shape[1], LANES), jnp.float32) for table in tables),
        ],
        compiler_params=_compiler_params(vmem_bytes, interpret),
        interpret=interpret,
    )(_scalar_order(cells, tile), cells, points, gradient, *tables)
    return d_points, d_tables


def _block(samples: int) -> int:
    """Queries whose rows are loaded in one go; bounds the code of the loop body."""
    return 2 * SUBLANES if samples <= 16 else SUBLANES


def _points_spec(samples: int, tile: int, groups: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 3, samples, tile), lambda n, t: (n // groups, 0, 0, t))


def _index_scratch(samples: int):
    """Two buffers of a tile's indices [sample and sublane, buffer, block], and their semaphores."""
    return (
        pltpu.SMEM((samples * SUBLANES, 2, LANES), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    )


def _compiler_params(vmem_bytes: int, interpret) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        # Heads may go to different cores; a head's tiles add to one table, in order.
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=None if interpret else vmem_bytes,
    )


def _scalar_order(cells: jax.Array, tile: int) -> jax.Array:
    """Indices as the scalar core reads them: [A, K, Q] -> [A, tiles, K * 8, 128].

    Block j of a tile holds the queries j, j + tile/8, j + 2 * tile/8... so that this is a reshape.
    """
    batch, samples, queries = cells.shape
    x = cells.reshape(batch, samples, queries // tile, SUBLANES, tile // SUBLANES)
    x = jnp.pad(x, ((0, 0),) * 4 + ((0, LANES - tile // SUBLANES),))
    return jnp.swapaxes(x, 1, 2).reshape(batch, queries // tile, samples * SUBLANES, LANES)


def _forward_kernel(
    index_hbm, points_ref, *refs, levels: int, groups: int, unroll: bool
):
    tables, (out_ref, indices, arrived, weights_ref, sums_ref, *buffers) = (
        refs[:levels],
        refs[levels:],
    )
    _, samples, tile = points_ref.shape
    points = samples // levels
    block = _block(samples)
    stride = tile // SUBLANES
    await_indices, slot = _fetch_indices(index_hbm, indices, arrived, groups)
    weights_ref[...] = _to_lanes(_corner_weights(points_ref[0], points_ref[1], points_ref[2])).T
    await_indices()

    def load_rows(i, rows_ref):
        def load(q):
            j, u = i * (block // SUBLANES) + q // SUBLANES, q % SUBLANES
            for k in range(samples):
                row = indices.at[k * SUBLANES + u][slot, j]
                rows_ref[pl.ds(k * block + q, 1), :] = tables[k // points][pl.ds(row, 1), :]

        _for_each(block, load, unroll)

    def add_rows(i, rows_ref):
        for v in range(block // SUBLANES):
            queries = pl.ds(i * (block // SUBLANES) + v, SUBLANES, stride)
            weights = weights_ref[queries, :]
            total = jnp.zeros((SUBLANES, LANES), jnp.float32)
            for k in range(samples):
                rows = rows_ref[pl.ds(k * block + v * SUBLANES, SUBLANES), :]
                total += rows * _broadcast_sample(weights, k)
            sums_ref[queries, :] = total

    blocks = tile // block
    load_rows(0, buffers[0])

    def body(i, carry):
        load_rows(2 * i + 1, buffers[1])
        add_rows(2 * i, buffers[0])
        load_rows(jnp.minimum(2 * i + 2, blocks - 1), buffers[0])
        add_rows(2 * i + 1, buffers[1])
        return carry

    lax.fori_loop(0, blocks // 2, body, 0)
    corners = _from_lanes(sums_ref[...].T)
    out_ref[...] = sum(corners[1:], corners[0])


def _backward_kernel(
    index_hbm,
    cells_ref,
    points_ref,
    gradient_ref,
    *refs,
    levels: int,
    groups: int,
    unroll: bool,
):
    tables, d_points_ref, d_tables = refs[:levels], refs[levels], refs[levels + 1 : 2 * levels + 1]
    indices, arrived, weights_ref, gradients_ref, products_ref, *refs = refs[2 * levels + 1 :]
    added, loaded, moved, pairs = refs[:2], refs[2:4], refs[4], refs[5:]
    _, samples, tile = points_ref.shape
    points = samples // levels
    block = _block(samples)
    stride = tile // SUBLANES
    head, t = pl.program_id(0), pl.program_id(1)
    await_indices, slot = _fetch_indices(index_hbm, indices, arrived, groups)

    @pl.when(t == 0)
    def _():
        copies = [
            pltpu.make_async_copy(
                table.at[head], pair.at[pl.ds(0, pair.shape[0] // 2)], moved.at[level]
            )
            for level, (table, pair) in enumerate(zip(tables, pairs, strict=True))
        ]
        for copy in copies:
            copy.start()
        for pair in pairs:
            _fill_with_zeros(pair, pair.shape[0] // 2)
        for copy in copies:
            copy.wait()

    fraction_x, fraction_y, weight = points_ref[0], points_ref[1], points_ref[2]
    corner_weights = _corner_weights(fraction_x, fraction_y, weight)
    merged = _merged_weights(cells_ref[...], corner_weights, points)
    weights_ref[...] = _to_lanes(merged).T
    gradients_ref[...] = jnp.concatenate([gradient_ref[...]] * len(CORNERS), axis=0).T
    await_indices()

    def make_additions(i, added_ref):
        """What each sample adds to its row of the table's gradient."""
        for v in range(block // SUBLANES):
            queries = pl.ds(i * (block // SUBLANES) + v, SUBLANES, stride)
            weights, gradients = weights_ref[queries, :], gradients_ref[queries, :]
            for k in range(samples):
                added_ref[pl.ds(k * block + v * SUBLANES, SUBLANES), :] = (
                    gradients * _broadcast_sample(weights, k)
                )

    def update_rows(i, added_ref, loaded_ref):
        def update(q):
            j, u = i * (block // SUBLANES) + q // SUBLANES, q % SUBLANES
            for first in range(0, points, GROUP):
                for level, pair in enumerate(pairs):
                    last = min(first + GROUP, points)
                    ks = range(level * points + first, level * points + last)
                    rows = [indices.at[k * SUBLANES + u][slot, j] for k in ks]
                    _update_group(pair, rows, [k * block + q for k in ks], added_ref, loaded_ref)

        _for_each(block, update, unroll)

    def multiply(i, loaded_ref):
        """The inner products of rows and output gradients: the gradient of the corner weights."""
        for v in range(block // SUBLANES):
            queries = pl.ds(i * (block // SUBLANES) + v, SUBLANES, stride)
            gradients = gradients_ref[queries, :]
            products_ref[queries, :] = _sum_channels(
                [
                    gradients * loaded_ref[pl.ds(k * block + v * SUBLANES, SUBLANES), :]
                    for k in range(samples)
                ]
            )

    blocks = tile // block
    make_additions(0, added[0])

    def body(i, carry):
        make_additions(2 * i + 1, added[1])
        update_rows(2 * i, added[0], loaded[0])
        # Nothing yet the first time: what this writes is overwritten at the end of the body.
        multiply(jnp.maximum(2 * i - 1, 0), loaded[1])
        make_additions(jnp.minimum(2 * i + 2, blocks - 1), added[0])
        update_rows(2 * i + 1, added[1], loaded[1])
        multiply(2 * i, loaded[0])
        return carry

    lax.fori_loop(0, blocks // 2, body, 0)
    multiply(blocks - 1, loaded[1])

    products = [p[:samples] for p in _from_lanes(products_ref[...].T)]
    d_points_ref[0] = weight * (
        (1 - fraction_y) * (products[1] - products[0]) + fraction_y * (products[3] - products[2])
    )
    d_points_ref[1] = weight * (
        (1 - fraction_x) * (products[2] - products[0]) + fraction_x * (products[3] - products[1])
    )
    unit = _corner_weights(fraction_x, fraction_y, jnp.ones_like(weight))
    d_points_ref[2] = sum(u * p for u, p in zip(unit, products, strict=True))

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        copies = [
            pltpu.make_async_copy(
                pair.at[pl.ds(pair.shape[0] // 2, pair.shape[0] // 2)],
                d_table.at[head],
                moved.at[level],
            )
            for level, (d_table, pair) in enumerate(zip(d_tables, pairs, strict=True))
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()


def _for_each(count: int, body, unroll: bool):
    """body(0), body(1)...; as a loop when interpreted, where unrolled code only compiles longer."""
    if unroll:
        for i in range(count):
            body(i)
    else:
        lax.fori_loop(0, count, lambda i, _: body(i), None)


def _update_group(pair, rows, samples, added_ref, loaded_ref):
    """Reads the table's rows, and adds to the same rows of the gradient below it.

    All are read before one is written, so of equal rows only the last one's sum remains.
    """
    below = pair.shape[0] // 2
    sums = [pair[pl.ds(row + below, 1), :] for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        loaded_ref[pl.ds(sample, 1), :] = pair[pl.ds(row, 1), :]
    for row, sample, total in zip(rows, samples, sums, strict=True):
        pair[pl.ds(row + below, 1), :] = total + added_ref[pl.ds(sample, 1), :]


def _fetch_indices(index_hbm, indices, arrived, groups: int):
    """Starts to copy the next tile's indices; returns what waits for this tile's, and their slot.

    The first tile of a head starts its own copy, so heads can be given to several cores.
    """
    head, t = pl.program_id(0) // groups, pl.program_id(1)
    slot = lax.rem(t, 2)

    def copy(t, slot):
        return pltpu.make_async_copy(index_hbm.at[head, t], indices.at[:, slot], arrived.at[slot])

    @pl.when(t == 0)
    def _():
        copy(t, slot).start()

    @pl.when(t + 1 < pl.num_programs(1))
    def _():
        copy(t + 1, 1 - slot).start()

    return copy(t, slot).wait, slot


def _fill_with_zeros(ref, start: int):
    """Zeroes the rows from `start` (a multiple of 8) to the end."""
    step = 8 * SUBLANES
    whole, rest = divmod(ref.shape[0] - start, step)

    def fill(i, carry):
        first = pl.multiple_of(start + i * step, SUBLANES)
        ref[pl.ds(first, step), :] = jnp.zeros((step, LANES), jnp.float32)
        return carry

    if whole:
        lax.fori_loop(0, whole, fill, 0)
    if rest:
        ref[pl.ds(start + whole * step, rest), :] = jnp.zeros((rest, LANES), jnp.float32)


def _corner_weights(fraction_x, fraction_y, weight):
    """Share of each corner, times the weight: 4 arrays [K, T], in the order of CORNERS."""
    return [
        (fraction_y if dy else 1 - fraction_y) * (fraction_x if dx else 1 - fraction_x) * weight
        for dy, dx in CORNERS
    ]


def _merged_weights(cells, corner_weights, points: int):
    """Adds to each sample's weights those of earlier samples of its group that have its row.

    Only the last write to a row remains of a group, and by this it holds the whole sum.
    """
    samples = cells.shape[0]
    merged = [[] for _ in CORNERS]
    for k in range(samples):
        first = k - (k % points) % GROUP
        same = [cells[j : j + 1] == cells[k : k + 1] for j in range(first, k)]
        for out, weights in zip(merged, corner_weights, strict=True):
            total = weights[k : k + 1]
            for j, equal in zip(range(first, k), same, strict=True):
                total += jnp.where(equal, weights[j : j + 1], 0.0)
            out.append(total)
    return [jnp.concatenate(rows, axis=0) for rows in merged]


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
    """[8, 128] weights at lanes 32 * corner + sample -> that of sample k on all lanes of a corner."""
    lane = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    return jnp.take_along_axis(
        weights, (lane & ~(CHANNELS - 1)) + k, axis=1, mode="promise_in_bounds"
    )


def _sum_channels(products):
    """Sums each array over the 32 lanes of a corner: K of [8, 128] -> [8, 128], sample k at lane k.

    Pairs of arrays are folded into one, 5 times: 2 (K - 1) lane rotations and exact in float32.
    """
    lane = lax.broadcasted_iota(jnp.int32, products[0].shape, 1)
    step = 1
    while step < CHANNELS:
        folded = []
        for i in range(0, len(products), 2):
            even = products[i]
            even += pltpu.roll(even, LANES - step, 1)
            if i + 1 < len(products):
                odd = products[i + 1]
                odd += pltpu.roll(odd, step, 1)
                even = jnp.where((lane & step) == 0, even, odd)
            folded.append(even)
        products, step = folded, 2 * step
    (result,) = products
    return result
