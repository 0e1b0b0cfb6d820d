"""The assignment on TPUs ("pallas_tpu"): all in vector memory, up to 40 problems in lockstep.

A problem takes a sublane, its columns lie along the lanes. A step waits for three reductions over
lanes, and for a row's number to move from the vector unit to the scalar one, which alone can
address the row's costs. Problems in lockstep share these waits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from oneformer_jax.kernels import tpu_kernels
from oneformer_jax.kernels.assignment import lockstep
from oneformer_jax.kernels.tpu_kernels import LANES, SUBLANES, round_up

# Bounds the code of a step. Each problem beyond 20 adds 12 cycles to a step.
MAX_BLOCK = 40
VMEM_RESERVE = 2 << 20  # for the state and the compiler


def assign(
    cost: jax.Array,
    order: jax.Array,
    count: jax.Array,
    *,
    interpret=False,
    vmem_bytes: int | None = None,
) -> jax.Array:
    """As `oneformer_jax.kernels.assignment.xla.assign`.

    Args:
      interpret: True or `pltpu.InterpretParams()` runs the kernel on any device, slowly.
      vmem_bytes: vector memory to plan for; by default that of the chip compiled for.

    Raises:
      NotImplementedError: the device is no TPU, or 8 problems exceed its memory.
    """
    vmem_bytes = tpu_kernels.vector_memory("linear_sum_assignment", vmem_bytes, interpret)
    problems, rows, columns = cost.shape
    width = round_up(columns, LANES)
    block = block_size(problems, rows, columns, vmem_bytes)
    padding = (0, -problems % block)
    cost = jnp.pad(
        cost,
        (padding, (0, -rows % SUBLANES), (0, width - columns)),
        constant_values=lockstep.INFINITY,
    )
    cost = cost.reshape(*cost.shape[:2], width // LANES, LANES).swapaxes(1, 2)
    order = jnp.pad(order, (padding, (0, 0)))
    count = jnp.pad(count.astype(jnp.float32), padding)
    count = jnp.broadcast_to(count[:, None], (count.shape[0], LANES))
    owner = pl.pallas_call(
        functools.partial(_kernel, rows=rows),
        name="linear_sum_assignment",
        grid=(count.shape[0] // block,),
        in_specs=[
            pl.BlockSpec((block, rows), lambda i: (i, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((block, LANES), lambda i: (i, 0)),
            pl.BlockSpec((block, *cost.shape[1:]), lambda i: (i, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((block, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((count.shape[0], width), jnp.int32),
        scratch_shapes=[pltpu.VMEM((block, width), jnp.float32)],
        **tpu_kernels.launch(["parallel"], vmem_bytes, interpret),  # v4 and v5p have two cores
    )(order, count, cost)
    return owner[:problems, :columns]


def block_size(problems: int, rows: int, columns: int, vmem_bytes: int) -> int:
    """Problems in lockstep: as few blocks as memory allows, of about equal size.

    Raises:
      NotImplementedError: the problems of one register's sublanes do not fit.
    """
    # Twice, because the next block's costs are fetched meanwhile.
    each = 2 * 4 * round_up(rows, SUBLANES) * round_up(columns, LANES)
    fits = (vmem_bytes - VMEM_RESERVE) // each
    most = min(MAX_BLOCK, fits)
    if problems <= most:
        return problems
    most = most // SUBLANES * SUBLANES
    if not most:
        raise NotImplementedError(
            f"linear_sum_assignment: 'pallas_tpu' needs {min(problems, SUBLANES) * each} bytes for "
            f"{min(problems, SUBLANES)} problems of {rows} by {columns} costs, but "
            f"{max(vmem_bytes - VMEM_RESERVE, 0)} of {vmem_bytes} bytes of vector memory are free; "
            "use 'xla'"
        )
    return round_up(-(-problems // -(-problems // most)), SUBLANES)


def _kernel(order_ref, count_ref, cost_ref, owner_ref, rows_ref, *, rows: int):
    problems, width = owner_ref.shape

    def fetch(row):
        row = row.astype(jnp.int32)
        for p in range(problems):
            at = order_ref[p, row[p, 0]]
            for t in range(width // LANES):
                lanes = pl.ds(t * LANES, LANES)
                rows_ref[pl.ds(p, 1), lanes] = cost_ref[p, t, pl.ds(at, 1), :]
        return rows_ref[...]

    owner, _ = lockstep.solve(fetch, count_ref[...], width, rows)
    owner_ref[...] = owner.astype(jnp.int32)
