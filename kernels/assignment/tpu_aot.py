"""Compiles the TPU kernel for TPUs that are not there, and counts its cycles."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator, Sequence

from kernels import tpu_aot
from kernels.assignment.cases import Case

# What `bench --target=... --record` measured; a test holds the kernel to it.
RECORDED = pathlib.Path(__file__).with_name("tpu_cycles.json")


def run(target: str, cases: Sequence[Case], *, memory: bool = True) -> Iterator[dict]:
    """Compiles `linear_sum_assignment` for each case, in a process of its own.

    Args:
      target: a key of `kernels.tpu_aot.TARGETS`.
      cases: the sizes.
      memory: whether to report the temporary memory, in more time.

    Yields:
      {"libtpu", "target"} and what `report` returns, per case.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      RuntimeError: the compiler refused; with its message.
    """
    return tpu_aot.run(__spec__.name, target, [case.sizes for case in cases], memory=memory)


def report(target: str, sizes: tuple[int, int, int], dump: pathlib.Path) -> dict:
    """What the compiler says of costs of these sizes.

    Returns:
      {"sizes", "step_cycles", "other_cycles", "temporary_bytes", "compile_seconds"}: issue cycles
      of one step of all problems, of all else in the kernel, and the temporary memory and the
      time to compile of the whole operation. Cycles are right for problems of one block only: the
      loop over blocks has trips that only move memory, and they count as if they solved, too. Of
      more columns than rows, for which there are two kernels, they are those of one of them.
    """
    import jax
    import jax.numpy as jnp

    from kernels.assignment import linear_sum_assignment

    problems, _, columns = sizes
    arguments = (
        jax.ShapeDtypeStruct(tuple(sizes), jnp.float32),
        jax.ShapeDtypeStruct((problems, columns), jnp.bool_),
    )
    start = time.perf_counter()
    compiled = tpu_aot.compile_for(
        target, lambda *x: linear_sum_assignment(*x, implementation="pallas_tpu"), arguments
    )
    seconds = time.perf_counter() - start
    text = tpu_aot.schedules(dump, "linear_sum_assignment")[0]
    none, one = (tpu_aot.issue_cycles(text, steps=steps) for steps in (0, 1))
    return {
        "sizes": list(sizes),
        "step_cycles": round(one - none),
        "other_cycles": round(none),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }


if __name__ == "__main__":
    tpu_aot.serve(report)
