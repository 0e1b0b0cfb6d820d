"""Compiles the assignment for a GPU that is not there, and reports what it takes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import gpu_aot
from kernels.assignment import api, pallas_gpu, xla
from kernels.assignment.cases import Case


def report(case: Case, implementation: str, *, target: str = "h200") -> dict:
    """Compiles `linear_sum_assignment` for a GPU and reports registers, spills and memory.

    Args:
      case: the sizes.
      implementation: "pallas_gpu" or "xla".
      target: one of `kernels.gpu_aot.TARGETS`.

    Returns:
      {"target", "device_kind", "compute_capability", "jax", "solve"}, the last as of
      `kernels.gpu_aot.serve`. Our kernel is called `linear_sum_assignment`.

    Raises:
      ValueError: an unknown target.
      RuntimeError: the CUDA packages are missing, or the compiler failed; its output is the text.
    """
    request = {
        "sizes": case.sizes,
        "implementation": implementation,
        "compute_capability": gpu_aot.compute_capability(target),
    }
    return gpu_aot.run(__spec__.name, target, request)


def _compile(request: dict, compile_: Callable) -> dict:
    """In the process of its own: what `report` returns."""
    problems, rows, columns = request["sizes"]

    def solve(cost, valid):
        def kernel(*arguments):
            return pallas_gpu.assign(*arguments, compute_capability=request["compute_capability"])

        assign = kernel if request["implementation"] == "pallas_gpu" else xla.assign
        return api.solve(assign, cost, valid)

    arguments = (
        jax.ShapeDtypeStruct((problems, rows, columns), jnp.float32),
        jax.ShapeDtypeStruct((problems, columns), jnp.bool_),
    )
    return {"solve": compile_("solve", solve, arguments)}


if __name__ == "__main__":
    gpu_aot.serve(_compile)
