"""The assignment on NVIDIA GPUs ("pallas_gpu"), in Pallas:Triton: a program for each problem.

A program is one warp if its columns fit into a warp's registers: reductions are then shuffles,
without a barrier. State stays in registers, costs are read from the cache. Upstream calls
Pallas:Triton deprecated since jax 0.11; jax 0.10 to 0.12 compile this kernel. It has run in the
interpreter only, never on a GPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from oneformer_jax.kernels import dispatch
from oneformer_jax.kernels.assignment import lockstep

COLUMNS_OF_WARP = 256  # 8 a thread, in about 12 arrays
MAX_COLUMNS = 2048  # of 8 warps
_WARP = 32


def assign(
    cost: jax.Array,
    order: jax.Array,
    count: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `oneformer_jax.kernels.assignment.xla.assign`.

    Args:
      interpret: run the kernel in Pallas's interpreter, on any device.

    Raises:
      NotImplementedError: the device is no NVIDIA GPU of 8.0 or newer, or there are too many
        columns.
    """
    if not interpret:
        dispatch.nvidia_capability("linear_sum_assignment", dispatch.compute_capability())
    problems, rows, columns = cost.shape
    width = max(_WARP, pl.next_power_of_2(columns))
    if width > MAX_COLUMNS:
        raise NotImplementedError(
            f"linear_sum_assignment: 'pallas_gpu' takes up to {MAX_COLUMNS} columns to choose "
            f"from, not {columns} (cost {cost.shape}); use 'xla'"
        )

    def kernel(cost_ref, order_ref, count_ref, owner_ref):
        problem = pl.program_id(0)
        column = jnp.arange(width)

        def fetch(row):
            place = jnp.max(row).astype(jnp.int32)
            costs = plt.load(
                cost_ref.at[problem, order_ref[problem, place], column],
                mask=column < columns,
                other=lockstep.INFINITY,
            )
            return costs[None, :]

        count = jnp.full((1, 1), count_ref[problem], jnp.float32)
        owner, _ = lockstep.solve(fetch, count, width, rows)
        plt.store(owner_ref.at[problem, column], owner[0].astype(jnp.int32), mask=column < columns)

    return pl.pallas_call(
        kernel,
        grid=(problems,),
        out_shape=jax.ShapeDtypeStruct((problems, columns), jnp.int32),
        compiler_params=plt.CompilerParams(
            num_warps=max(1, width // COLUMNS_OF_WARP), num_stages=1
        ),
        interpret=interpret,
        name="linear_sum_assignment",
    )(cost, order, count.astype(jnp.float32))
