"""Helpers of TPU kernels that read rows of a table one by one, at indices from scalar memory."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8


def index_scratch(rows: int):
    """Returns two buffers of a tile's indices, int32 [rows, buffer, 128], and their semaphores.

    A scalar load forms its address `immediate + register` free of charge only if the array lies at
    a fixed place and the immediate is a static slice, which Pallas' own blocks do not offer.
    """
    return pltpu.SMEM((rows, 2, LANES), jnp.int32), pltpu.SemaphoreType.DMA((2,))


def fetch_indices(index_hbm, indices, arrived, *, part, tile_axis: int):
    """Starts to copy the next tile's indices; returns the wait for this tile's, and their slot.

    The first tile of a part starts its own copy, so several cores may share the parts.

    Args:
      index_hbm: int32 [parts, tiles, rows, 128].
      indices, arrived: as of `index_scratch`.
      part: the index of this grid step's part.
      tile_axis: the axis of the tiles, the grid's last.
    """
    t = pl.program_id(tile_axis)
    slot = lax.rem(t, 2)

    def copy(t, slot):
        return pltpu.make_async_copy(index_hbm.at[part, t], indices.at[:, slot], arrived.at[slot])

    @pl.when(t == 0)
    def _():
        copy(t, slot).start()

    @pl.when(t + 1 < pl.num_programs(tile_axis))
    def _():
        copy(t + 1, 1 - slot).start()

    return copy(t, slot).wait, slot


def fill_with_zeros(ref):
    """Zeroes an array of rows, a multiple of 8."""
    step = 8 * SUBLANES
    whole, rest = divmod(ref.shape[0], step)

    def fill(i, _):
        ref[pl.ds(pl.multiple_of(i * step, step), step), :] = jnp.zeros((step, LANES), ref.dtype)

    if whole:
        lax.fori_loop(0, whole, fill, None)
    if rest:
        ref[pl.ds(whole * step, rest), :] = jnp.zeros((rest, LANES), ref.dtype)
