"""Helpers of the TPU kernels: memory, settings, and tables whose rows are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from oneformer_jax.kernels import dispatch

LANES = 128
SUBLANES = 8
ROW_BYTES = 4 * LANES  # of a row of a table in vector memory
INTERPRETED_VMEM = 64 << 20  # of v5p and v7x


def round_up(number: int, multiple: int) -> int:
    """Returns the least multiple that is not below the number."""
    return -(-number // multiple) * multiple


def vector_memory(operation: str, given: int | None, interpret: Any) -> int:
    """Returns the bytes of vector memory to plan for: those given, or of the chip compiled for.

    Raises:
      NotImplementedError: it is no TPU.
    """
    if given is not None:
        return given
    if interpret:
        return INTERPRETED_VMEM
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError as error:
        raise NotImplementedError(
            f"{operation}: 'pallas_tpu' runs on TPUs, and this program is for "
            f"{dispatch.device_kind()!r}; use 'xla'"
        ) from error


def launch(order: Sequence[str], vmem_bytes: int, interpret: Any) -> dict[str, Any]:
    """Returns arguments of `pl.pallas_call`.

    Args:
      order: "parallel" or "arbitrary" for each axis of the grid: cores may share its steps or not.
      vmem_bytes: vector memory of the kernel.
      interpret: as in `pl.pallas_call`.
    """
    limit = None if interpret else vmem_bytes
    parameters = pltpu.CompilerParams(dimension_semantics=tuple(order), vmem_limit_bytes=limit)
    return {"compiler_params": parameters, "interpret": interpret}


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


def fill_with_zeros(ref, step: int = 8 * SUBLANES):
    """Zeroes an array of rows, a multiple of 8, so many at a time."""
    whole, rest = divmod(ref.shape[0], step)

    def fill(i, _):
        rows = pl.ds(pl.multiple_of(i * step, step), step)
        ref[rows, :] = jnp.zeros((step, ref.shape[1]), ref.dtype)

    if whole:
        lax.fori_loop(0, whole, fill, None)
    if rest:
        ref[pl.ds(whole * step, rest), :] = jnp.zeros((rest, ref.shape[1]), ref.dtype)


def loop(count: int, body: Callable[[Any], None], unroll: int):
    """Calls body(0), body(1)... in a loop of `unroll` calls, which divides count.

    With unroll = count there is no loop, and body gets Python numbers.
    """
    if unroll == count > 1:
        for i in range(count):
            body(i)
    else:

        def bodies(i, _):
            for j in range(unroll):
                body(i * unroll + j)

        lax.fori_loop(0, count // unroll, bodies, None)


def load_ahead(count: int, load: Callable, add: Callable, buffers: Sequence[Any]):
    """Calls load(i, buffer) and then add(i, buffer) for all blocks i, an even number of them.

    One block is added while the next is loaded into the other of two buffers.
    """
    one, other = buffers
    load(0, one)

    def body(i, carry):
        load(2 * i + 1, other)
        add(2 * i, one)
        load(jnp.minimum(2 * i + 2, count - 1), one)
        add(2 * i + 1, other)
        return carry

    lax.fori_loop(0, count // 2, body, 0)
