"""The two TPU kernels of point sampling: a map lies in vector memory, and points address its rows.

All channels of a point share one address, so 128 channels of a map lie in vector memory, one pixel
a row. A point reads (or increases) two neighbouring pixels of one row of the map and the two below
them: two loads of two rows each, at an address from scalar memory. Pixels that a point does not
touch have weight 0, so no border is needed. bfloat16 pixels lie in pairs: a row of 32-bit words
holds an even pixel and the next one, and two such rows hold any two neighbours.

The code relies on properties of the static schedule (v5e; a bundle is one issue cycle), besides
those in `ms_deform_attn`:
  * Forward, stores are the limit, one a bundle: rows pass through scratch memory two at a time.
  * Backward, a read-modify-write takes about 10 cycles, so all rows of a step's points are read
    before any is written. If points of a step share pixels, as XLA finds out before, the points of
    its group of steps are done one by one. Loads and stores do not overlap: the 4 and 4 rows of a
    point take 4 bundles. Larger steps take as long, and share pixels more often.

Letters: A images, P points, T tiles, R pixels of the map, D channels (a multiple of 128).
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
    SUBLANES,
    fetch_indices,
    fill_with_zeros,
    index_scratch,
    launch,
    load_ahead,
    loop,
)

ROWS = 4  # that a point reads from the table: two and the two below them
GROUP = 32  # points of one loop body
STEP = 8  # points whose rows are read before any is written
MAX_TILE = 8 * LANES  # points of a grid step
VMEM_RESERVE = 10 * 2**20  # for blocks, scratch and the compiler
# Cores may share the maps; the points of a map add to one table, in order.
ORDER = ("parallel", "parallel", "arbitrary")


def tile_size(points: int) -> int:
    """Points of one grid step: few steps and little padding; a step costs as much as 128 points."""
    sizes = range(LANES, MAX_TILE + 1, LANES)
    return min(sizes, key=lambda size: -(-points // size) * (size + LANES))


def forward(
    index: jax.Array,
    weights: jax.Array,
    table: jax.Array,
    *,
    points: int,
    width: int,
    tile: int,
    vmem_bytes: int,
    interpret,
) -> jax.Array:
    """Sums weighted 2 x 2 pixels.

    Args:
      index: int32 [A, T * tile]. Float32: pixel i of the pixels i, i + 1, i + width, i + width + 1.
        bfloat16: pair i of the 8 pixels of the pairs i, i + 1, i + width / 2, i + width / 2 + 1.
        All of them are pixels of the map.
      weights: float32 [A, 4 or 8, T * tile], of these pixels.
      table: float32 or bfloat16 [A, R, D]; R is even.
      points: P, in T tiles.
      width: pixels of a row of the map; even for bfloat16.
      tile: points of a grid step.
      vmem_bytes: vector memory of the kernel.
      interpret: as in `pl.pallas_call`.

    Returns:
      float32 [A, P, D].
    """
    _, pixels, depth = table.shape
    # If two maps fit, the next one is fetched while this one is in use.
    once = 2 * pixels * LANES * table.dtype.itemsize > vmem_bytes - VMEM_RESERVE
    mode = {"pipeline_mode": pl.Buffered(1)} if once else {}
    packed = table.dtype == jnp.bfloat16
    rows = pltpu.VMEM((ROWS * GROUP, LANES), jnp.uint32 if packed else jnp.float32)
    return pl.pallas_call(
        functools.partial(
            _forward_kernel,
            width=width // 2 if packed else width,
            unroll=not interpret,
        ),
        name="point_sampling_forward",
        grid=(len(index), depth // LANES, index.shape[1] // tile),
        in_specs=[
            pl.BlockSpec(memory_space=pl.ANY),
            _weights_spec(weights.shape[1], tile),
            pl.BlockSpec((1, pixels, LANES), lambda a, d, t: (a, 0, d), **mode),
        ],
        out_specs=_points_spec(tile),
        out_shape=jax.ShapeDtypeStruct((len(index), points, depth), jnp.float32),
        scratch_shapes=[
            *index_scratch(GROUP),
            pltpu.VMEM((tile, LANES), jnp.float32),
            rows,
            rows,
        ],
        **launch(ORDER, vmem_bytes, interpret),
    )(_scalar_order(index, tile), weights, table)


def backward(
    index: jax.Array,
    weights: jax.Array,
    gradient: jax.Array,
    *,
    dtype,
    pixels: int,
    width: int,
    tile: int,
    vmem_bytes: int,
    interpret,
) -> jax.Array:
    """Returns the gradient of `forward` in the table: `dtype` [A, R, D], summed in float32.

    Args:
      index, weights: as `forward` takes them for float32.
      gradient: float32 [A, P, D], of the output.
      dtype: float32 or bfloat16.
      pixels: R, a multiple of 16.
      width, tile, vmem_bytes, interpret: as of `forward`.
    """
    _, points, depth = gradient.shape
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    indices = _scalar_order(index, tile)
    shared = _share_pixels(indices, width)[:, :, None].astype(jnp.int32)
    rounded = [] if dtype == jnp.float32 else [pltpu.VMEM((2, chunk_size(pixels), LANES), dtype)]
    return pl.pallas_call(
        functools.partial(_backward_kernel, points=points, width=width, unroll=not interpret),
        name="point_sampling_backward",
        grid=(len(index), depth // LANES, index.shape[1] // tile),
        in_specs=[anywhere, _weights_spec(weights.shape[1], tile), _points_spec(tile)],
        out_specs=anywhere,
        out_shape=jax.ShapeDtypeStruct((len(index), pixels, depth), dtype),
        scratch_shapes=[
            *index_scratch(GROUP + 1),
            pltpu.VMEM((tile, LANES), jnp.float32),
            pltpu.VMEM((ROWS * tile, LANES), jnp.float32),
            pltpu.VMEM((pixels, LANES), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            *rounded,
        ],
        **launch(ORDER, vmem_bytes, interpret),
    )(jnp.concatenate([indices, shared], axis=2), weights, gradient)


def chunk_size(pixels: int) -> int:
    """Rows that are rounded and written at a time: a multiple of 16 that divides `pixels`."""
    return 16 * math.gcd(pixels // 16, 64)


def _weights_spec(count: int, tile: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, count, tile), lambda a, d, t: (a, 0, t))


def _points_spec(tile: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, tile, LANES), lambda a, d, t: (a, t, d))


def _scalar_order(index: jax.Array, tile: int) -> jax.Array:
    """Reorders indices for the scalar core: [A, P] -> [A, T, 32, 128].

    Row q holds the points q of all groups of a tile.
    """
    groups = tile // GROUP
    x = jnp.swapaxes(index.reshape(index.shape[0], -1, groups, GROUP), 2, 3)
    return jnp.pad(x, ((0, 0),) * 3 + ((0, LANES - groups),))


def _share_pixels(indices: jax.Array, width: int) -> jax.Array:
    """Tells which groups have a step with shared pixels: [A, T, 32, 128] -> bool [A, T, 128].

    The upper pair of a point and either pair of another one overlap if they are one pixel apart.
    """
    steps = indices.reshape(*indices.shape[:2], -1, STEP, LANES)
    distance = jnp.abs(steps[:, :, :, :, None] - steps[:, :, :, None])
    near = (distance <= 1) | (jnp.abs(distance - width) <= 1)
    rank = jnp.arange(STEP)
    return jnp.any(near & (rank[:, None] > rank)[..., None], axis=(2, 3, 4))


def _forward_kernel(
    index_hbm, weights_ref, table, out_ref, indices, arrived, lanes_ref, *buffers, width, unroll
):
    tile = out_ref.shape[0]
    if table.dtype == jnp.bfloat16:
        table = table.bitcast(jnp.uint32)
    table = table.at[0]
    await_indices, slot = fetch_indices(
        index_hbm, indices, arrived, part=pl.program_id(0), tile_axis=2
    )
    lanes_ref[...] = _to_lanes(weights_ref[...])
    await_indices()

    def load_rows(i, rows_ref):
        def load(q):
            first = indices.at[q][slot, i]
            for k, offset in enumerate((0, width)):
                rows_ref[pl.ds(ROWS * q + 2 * k, 2), :] = table[pl.ds(first + offset, 2), :]

        loop(GROUP, load, GROUP if unroll else 1)

    def add_rows(i, rows_ref):
        for first in range(0, GROUP, SUBLANES):
            points = pl.ds(pl.multiple_of(i * GROUP + first, SUBLANES), SUBLANES)
            weights = lanes_ref[points, :]
            total = jnp.zeros((SUBLANES, LANES), jnp.float32)
            for c in range(ROWS):
                pixels = _unpacked(rows_ref[pl.ds(ROWS * first + c, SUBLANES, ROWS), :])
                for k, pixel in enumerate(pixels):
                    total += pixel * _broadcast_lane(weights, len(pixels) * c + k)
            out_ref[points, :] = total

    load_ahead(tile // GROUP, load_rows, add_rows, buffers)


def _backward_kernel(
    index_hbm,
    weights_ref,
    gradient_ref,
    d_table,
    indices,
    arrived,
    lanes_ref,
    added_ref,
    sums,
    moved,
    *rounded,
    points: int,
    width: int,
    unroll: bool,
):
    tile = gradient_ref.shape[0]
    image, part, t = (pl.program_id(axis) for axis in range(3))
    await_indices, slot = fetch_indices(
        index_hbm, indices, arrived, part=pl.program_id(0), tile_axis=2
    )

    @pl.when(t == 0)
    def _():
        fill_with_zeros(sums)

    lanes_ref[...] = _to_lanes(weights_ref[...])

    def make_additions(j):
        """Forms the addends of each point's 4 pixels: weights times the output's gradient."""
        rows = pl.ds(pl.multiple_of(j * SUBLANES, SUBLANES), SUBLANES)
        point = t * tile + j * SUBLANES + lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        # Values beyond the last point are arbitrary.
        gradient = jnp.where(point < points, gradient_ref[rows, :], 0.0)
        weights = lanes_ref[rows, :]
        first = pl.multiple_of(j * ROWS * SUBLANES, SUBLANES)
        for c in range(ROWS):
            added_ref[pl.ds(first + c, SUBLANES, ROWS), :] = gradient * _broadcast_lane(weights, c)

    blocks = 2 * GROUP // SUBLANES

    loop(tile // SUBLANES, make_additions, blocks if unroll else 1)
    await_indices()

    def pairs(i, q):
        """Returns the two pairs of pixels of a point, and the place of their addends."""
        first = indices.at[q][slot, i]
        added = ROWS * (i * GROUP + q)
        for k, offset in enumerate((0, width)):
            yield pl.ds(first + offset, 2), pl.ds(added + 2 * k, 2)

    def update(i, _):
        shared = indices.at[GROUP][slot, i]

        @pl.when(shared == 0)
        def _():
            for first in range(0, GROUP, STEP):
                places = [pair for q in range(first, first + STEP) for pair in pairs(i, q)]
                before = [sums[pixels, :] for pixels, _ in places]
                for (pixels, rows), value in zip(places, before, strict=True):
                    sums[pixels, :] = value + added_ref[rows, :]

        @pl.when(shared != 0)
        def _():
            def one(q, _):
                first = indices[q, slot, i]
                added = ROWS * (i * GROUP + q)
                for k, offset in enumerate((0, width)):
                    pixels = pl.ds(first + offset, 2)
                    sums[pixels, :] = sums[pixels, :] + added_ref[pl.ds(added + 2 * k, 2), :]

            lax.fori_loop(0, GROUP, one, None)

    lax.fori_loop(0, tile // GROUP, update, None)

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        lanes = pl.ds(pl.multiple_of(part * LANES, LANES), LANES)
        if not rounded:
            copy = pltpu.make_async_copy(sums, d_table.at[image, :, lanes], moved.at[0])
            copy.start()
            copy.wait()
            return
        buffers = rounded[0]
        chunk = buffers.shape[1]
        count = sums.shape[0] // chunk

        def write(n):
            rows = pl.ds(pl.multiple_of(n * chunk, chunk), chunk)
            slot = n % 2
            return pltpu.make_async_copy(
                buffers.at[slot], d_table.at[image, rows, lanes], moved.at[slot]
            )

        def round_and_write(n, _):
            @pl.when(n >= 2)
            def _():
                write(n - 2).wait()

            rows = pl.ds(pl.multiple_of(n * chunk, chunk), chunk)
            buffers[n % 2] = sums[rows, :].astype(buffers.dtype)
            write(n).start()

        lax.fori_loop(0, count, round_and_write, None)
        for n in range(max(count - 2, 0), count):
            write(n).wait()


def _unpacked(x):
    """Unpacks rows of pairs of bfloat16 into two of float32; keeps rows of float32."""
    if x.dtype == jnp.float32:
        return [x]
    halves = x << 16, x & jnp.uint32(0xFFFF0000)
    return [lax.bitcast_convert_type(half, jnp.float32) for half in halves]


def _to_lanes(weights):
    """Brings [N, T] into [T, 128]: a point's weights in the first lanes of its row."""
    rest = jnp.zeros((LANES - weights.shape[0], weights.shape[1]), jnp.float32)
    return jnp.concatenate([weights, rest], axis=0).T


def _broadcast_lane(x, lane: int):
    """Spreads one lane of [8, 128] over all lanes."""
    return jnp.take_along_axis(
        x, jnp.full(x.shape, lane, jnp.int32), axis=1, mode="promise_in_bounds"
    )
