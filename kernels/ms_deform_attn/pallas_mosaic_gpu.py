"""Quad-row kernels in Pallas:Mosaic GPU, for Hopper and newer ("mosaic" of pallas_gpu.py).

A quad row holds the 2 x 2 pixels of a sampling point, so a point needs one index and one row of
memory. Mosaic GPU loads rows by scalar indices only, so each of the four warps of a block reads one
corner, a lane per channel:

    warp 0: value[y, x]      warp 1: value[y, x+1]
    warp 2: value[y+1, x]    warp 3: value[y+1, x+1]

The corner of a thread never changes, so its share of a point is one number. No shuffles are needed
until the four warps' sums meet in shared memory, once per block.

Needs jax 0.11 or 0.12; jax 0.10 has no kernel that adds into a `Ref`, as the gradient must. The
kernels have been compiled for sm_90a and sm_100a, and run in the interpreter, but never on a GPU.

Letters: M queries of all images and heads, K points of a query, R quad rows, D head width. Blocks
work on 8 queries or rows and on 32 channels a warp; M, K, R and D are padded to whole blocks.
"""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 32
PER_BLOCK = 8  # queries, or rows in `segment_sum`
MAX_POINTS_PER_STEP = 16  # of a query, unrolled together; more costs registers and compile time
SEGMENT_STEP = 4  # points of a row that `segment_sum` reads at a time

# A [4, D] array: a warp per corner, a lane per channel (mod 32). Its two reductions leave a [4]
# array that every lane of a warp holds, and a [D] array that every warp holds.
_QUAD = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
_CORNERS = _QUAD.reduce(1)
_CHANNELS = _QUAD.reduce(0)

# jax 0.11 neither has nor needs `store` and this argument of `atomic_add`.
_HAS_STORE = hasattr(plgpu, "store")
_ATOMIC_OPTIONS = (
    {"optimized": False} if "optimized" in inspect.signature(plgpu.atomic_add).parameters else {}
)


def quad_sum(
    index: jax.Array, factor: jax.Array, table: jax.Array, *, interpret: bool
) -> jax.Array:
    """Sums factor[m, c, k] * table[index[m, k], c] over points k and corners c: out[m].

    Args:
      index: int32 [M, K], rows of `table`.
      factor: float32 [M, 4, K].
      table: float32 or bfloat16 [R, 4, D].
      interpret: run in the interpreter.

    Returns:
      [M, D] in the dtype of `table`, summed in float32.
    """
    out_shape = index.shape[0], table.shape[-1]
    index, factor, step = _pad_points(index, factor)
    table = _pad(table, 2, LANES)
    queries, points = index.shape
    width = table.shape[-1]

    def body(index_ref, factor_ref, table_ref, out_ref, sums_ref):
        first = lax.axis_index("block") * PER_BLOCK

        def query_loop(j, carry):
            m = first + j

            def point_loop(i, total):
                for k in range(step):
                    k = i * step + k
                    row = _load(table_ref.at[index_ref[m, k]], _QUAD).astype(jnp.float32)
                    total += row * _spread(_load(factor_ref.at[m, :, k], _CORNERS), width, 0)
                return total

            zero = plgpu.layout_cast(jnp.zeros((4, width), jnp.float32), _QUAD)
            _store(sums_ref.at[:, j], lax.fori_loop(0, points // step, point_loop, zero))
            return carry

        lax.fori_loop(0, PER_BLOCK, query_loop, None)
        plgpu.commit_smem()
        flat = plgpu.Layout.WG_STRIDED((PER_BLOCK, width), 2)
        top, bottom = (
            _load(sums_ref.at[c], flat) + _load(sums_ref.at[c + 1], flat) for c in (0, 2)
        )
        out = (top + bottom).astype(out_ref.dtype)
        _store(out_ref.at[pl.ds(first, PER_BLOCK)], out)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((queries, width), table.dtype),
        scratch_types=[plgpu.SMEM((4, PER_BLOCK, width), jnp.float32)],
        kernel_name="ms_deform_attn_forward",
        **_launch(queries, interpret),
    )(index, factor, table)
    return out[: out_shape[0], : out_shape[1]]


def quad_sum_gradients(
    index: jax.Array,
    factor: jax.Array,
    table: jax.Array,
    gradient: jax.Array,
    *,
    scatter: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of sum(quad_sum(index, factor, table) * gradient).

    Args:
      index, factor, table, interpret: as for `quad_sum`.
      gradient: [M, D] in the dtype of `table`.
      scatter: also form the gradient in `table`, by atomic adds, whose order changes between runs.

    Returns:
      In `factor`, float32 [M, 4, K]; in `table`, float32 [R, 4, D], or None.
    """
    factor_shape, table_shape = factor.shape, table.shape
    index, factor, step = _pad_points(index, factor)
    table = _pad(table, 2, LANES)
    gradient = _pad(_pad(gradient, 0, PER_BLOCK), 1, LANES)
    queries, points = index.shape
    width = table.shape[-1]

    def body(index_ref, factor_ref, table_ref, gradient_ref, *refs):
        d_table_ref, d_factor_ref = refs if scatter else (None, *refs)
        first = lax.axis_index("block") * PER_BLOCK

        def query_loop(j, carry):
            m = first + j
            channels = _load(gradient_ref.at[m], _CHANNELS).astype(jnp.float32)
            channels = _spread(channels, width, 1)

            def point_loop(i, carry):
                steps = [i * step + k for k in range(step)]
                rows = [index_ref[m, k] for k in steps]
                # Loads come before the first store, as the compiler cannot move them across it.
                # Adding 0 rounds the products. Otherwise the compiler fuses them with the first
                # step of the sum over lanes, and lanes would store different results.
                products = [
                    _load(table_ref.at[r], _QUAD).astype(jnp.float32) * channels + 0.0 for r in rows
                ]
                products = [jnp.sum(product, axis=1) for product in products]
                if scatter:
                    shares = [_load(factor_ref.at[m, :, k], _CORNERS) for k in steps]
                for k, product in zip(steps, products, strict=True):
                    _store(d_factor_ref.at[m, :, k], product)
                if scatter:
                    for row, share in zip(rows, shares, strict=True):
                        part = _spread(share, width, 0) * channels
                        _atomic_add(d_table_ref.at[row], part, interpret)
                return carry

            return lax.fori_loop(0, points // step, point_loop, carry)

        lax.fori_loop(0, PER_BLOCK, query_loop, None)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(factor.shape, jnp.float32),
        kernel_name="ms_deform_attn_backward",
        **_launch(queries, interpret),
    )
    arguments = (index, factor, table, gradient)
    if scatter:
        d_table = jax.new_ref(jnp.zeros(table.shape, jnp.float32))
        d_factor = kernel(*arguments, d_table)
        d_table = d_table[..., : table_shape[2]]
    else:
        d_factor, d_table = kernel(*arguments), None
    return d_factor[: factor_shape[0], :, : factor_shape[2]], d_table


def segment_sum(
    query: jax.Array, factor: jax.Array, starts: jax.Array, gradient: jax.Array, *, interpret: bool
) -> jax.Array:
    """Forms the gradient in `table`: one block adds the points of a row in order.

    Args:
      query: int32 [T], the query of each point, points sorted by the row that they read.
      factor: float32 [T, 4], the shares of its corners.
      starts: int32 [R + 1], the start of each row's points.
      gradient: float32 or bfloat16 [M, D].
      interpret: as for `quad_sum`.

    Returns:
      float32 [R, 4, D].
    """
    out_shape = starts.shape[0] - 1, gradient.shape[-1]
    gradient = _pad(gradient, 1, LANES)
    rows, width = -(-out_shape[0] // PER_BLOCK) * PER_BLOCK, gradient.shape[-1]
    starts = jnp.pad(starts, (0, rows + 1 - starts.shape[0]), mode="edge")  # rows without points

    def body(query_ref, factor_ref, starts_ref, gradient_ref, out_ref):
        first = lax.axis_index("block") * PER_BLOCK

        def row_loop(j, carry):
            start, end = starts_ref[first + j], starts_ref[first + j + 1]

            def point_loop(i, total):
                for t in range(SEGMENT_STEP):
                    t = start + i * SEGMENT_STEP + t
                    valid = (t < end).astype(jnp.float32)
                    t = jnp.minimum(t, end - 1)  # beyond the end: the last point, times 0
                    channels = _load(gradient_ref.at[query_ref[t]], _CHANNELS).astype(jnp.float32)
                    share = _load(factor_ref.at[t], _CORNERS) * valid
                    total += _spread(channels, width, 1) * _spread(share, width, 0)
                return total

            zero = plgpu.layout_cast(jnp.zeros((4, width), jnp.float32), _QUAD)
            steps = (end - start + SEGMENT_STEP - 1) // SEGMENT_STEP
            _store(out_ref.at[first + j], lax.fori_loop(0, steps, point_loop, zero))
            return carry

        lax.fori_loop(0, PER_BLOCK, row_loop, None)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, 4, width), jnp.float32),
        kernel_name="ms_deform_attn_segment_sum",
        **_launch(rows, interpret),
    )(query, factor, starts, gradient)
    return out[: out_shape[0], :, : out_shape[1]]


def _pad(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Pads the end of an axis with zeros, up to a multiple."""
    pads = [(0, 0)] * array.ndim
    pads[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, pads) if pads[axis][1] else array


def _pad_points(index, factor) -> tuple[jax.Array, jax.Array, int]:
    """Pads index and factor along M and K with weightless points; also returns points per step."""
    points = index.shape[1]
    step = -(-points // -(-points // MAX_POINTS_PER_STEP))
    index = _pad(_pad(index, 0, PER_BLOCK), 1, step)
    factor = _pad(_pad(factor, 0, PER_BLOCK), 2, step)
    return index, factor, step


def _launch(items: int, interpret: bool) -> dict:
    """Arguments of `plgpu.kernel` for a block per `PER_BLOCK` items."""
    return dict(
        grid=(items // PER_BLOCK,),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        # The barriers guard memory that a kernel both reads and writes. That is `sums_ref` alone,
        # which `commit_smem` guards.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )


def _load(ref, layout) -> jax.Array:
    # "optimized" would refuse rows of a few bytes per thread, which this algorithm reads.
    return plgpu.load(ref, layout=layout, optimized=False)


def _store(ref, array):
    if _HAS_STORE:
        plgpu.store(ref, array, optimized=False)
    else:
        ref[...] = array


def _atomic_add(ref, array, interpret):
    if interpret:  # the interpreter of jax 0.12 fails on `atomic_add`; it runs block by block
        ref[...] += array
    else:
        plgpu.atomic_add(ref, array, **_ATOMIC_OPTIONS)


def _spread(array, width, axis) -> jax.Array:
    """Spreads [4] (axis 0) or [D] (axis 1) to [4, D]; no data moves between threads."""
    return plgpu.layout_cast(lax.broadcast_in_dim(array, (4, width), (axis,)), _QUAD)
