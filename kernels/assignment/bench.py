"""Times every implementation of the assignment at the sizes of the recipes.

    python -m kernels.assignment.bench                     # on the device that is here
    python -m kernels.assignment.bench --target=v5e        # compile for one that is not

On a device: the median time for all problems of a training step, against SciPy on the host, which
solves them one after the other (without the way to the host and back). Ahead of time: static issue
cycles (TPU), or registers and spills (GPU), and memory. The steps that problems take are counted on
whatever device is here. Nothing here is a measurement of a device that is not there.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from kernels.assignment import IMPLEMENTATIONS, gpu_aot, linear_sum_assignment, tpu_aot, xla
from kernels.assignment.cases import KINDS, PUBLISHED, Case
from kernels.assignment.pallas_tpu import MAX_BLOCK
from kernels.gpu_aot import TARGETS as GPU_TARGETS
from kernels.records import keep, median_milliseconds, show
from kernels.tpu_aot import TARGETS as TPU_TARGETS


def valid_columns(case: Case, count: int) -> np.ndarray:
    """The first `count` columns of each problem."""
    return np.broadcast_to(np.arange(case.columns) < count, (case.problems, case.columns))


def solve_with_scipy(costs: np.ndarray, valid: np.ndarray) -> None:
    for cost, columns in zip(costs, valid, strict=True):
        optimize.linear_sum_assignment(cost[:, columns])


def count_steps(case: Case, kind: str, count: int) -> int:
    """Steps until the last problem of the case is solved, with `count` valid columns each."""
    problems, rows, columns = case.sizes
    if count > rows:
        raise ValueError(f"bench: {count} valid columns of {case.name} have no room in {rows} rows")
    order = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (problems, columns))
    costs = case.costs(kind).swapaxes(1, 2)
    steps = jax.jit(xla.assign_and_count)(costs, order, jnp.full(problems, count, jnp.int32))[1]
    return int(steps)


def measure(
    case: Case, implementation: str, kinds: Sequence[str], counts: Sequence[int], repeats: int
) -> list[dict]:
    """One record per kind and number of valid columns; `implementation` may be "scipy", too.

    Where the implementation refuses, {"error"} stands in place of figures.
    """
    device = jax.devices()[0]
    records = []
    for kind in kinds:
        for count in counts:
            record = {
                "problems": case.problems,
                "rows": case.rows,
                "columns": case.columns,
                "valid": count,
                "costs": kind,
                "implementation": implementation,
                "device": "host" if implementation == "scipy" else device.device_kind,
            }
            records.append(record)
            arguments = case.costs(kind), valid_columns(case, count)
            if implementation == "scipy":
                record["milliseconds"] = median_milliseconds(
                    functools.partial(solve_with_scipy, *arguments), repeats
                )
                continue
            arguments = jax.device_put(arguments, device)
            try:
                start = time.perf_counter()
                compiled = (
                    jax.jit(linear_sum_assignment, static_argnames="implementation")
                    .lower(*arguments, implementation=implementation)
                    .compile()
                )
                record["compile_seconds"] = time.perf_counter() - start
            except NotImplementedError as error:
                record["error"] = str(error)
                continue
            record["milliseconds"] = median_milliseconds(
                lambda: jax.block_until_ready(compiled(*arguments)),  # noqa: B023
                repeats,
            )
            record["temporary_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return records


def predict(record: dict, case: Case, kinds: Sequence[str], counts: Sequence[int]) -> list[dict]:
    """A record of `tpu_aot` with the steps that the problems take, and their time at that."""
    clock = TPU_TARGETS[record["target"]].clock
    record = dict(record)
    record["temporary_megabytes"] = record.pop("temporary_bytes") / 1e6
    rows = []
    for kind in kinds:
        for count in counts:
            steps = count_steps(case, kind, count)
            cycles = record["other_cycles"] + steps * record["step_cycles"]
            ends = {"valid": count, "costs": kind, "steps": steps}
            rows.append({**record, **ends, "milliseconds": 1e3 * cycles / clock})
    return rows


def compile_for_gpu(target: str, cases: Sequence[Case], implementations: Sequence[str]):
    """Registers, spills and memory, flat; needs the CUDA packages of jax."""
    for case in cases:
        for implementation in implementations:
            found = gpu_aot.report(case, implementation, target=target)["solve"]
            kernels = found["kernels"]
            yield {
                "target": target,
                "sizes": list(case.sizes),
                "implementation": implementation,
                "kernels": len(kernels),
                "registers": max(k["registers"] for k in kernels),
                "spill_bytes": sum(k["spill_bytes"] for k in kernels),
                "temporary_megabytes": found["temp_bytes"] / 1e6,
                "compile_seconds": found["compile_seconds"],
            }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.assignment.bench")
    parser.add_argument("--target", choices=[*TPU_TARGETS, *GPU_TARGETS])
    parser.add_argument("--sizes", nargs="+", metavar="QxM", help="default: all of cases.py")
    parser.add_argument("--problems", type=int, default=20, help="of each call")
    parser.add_argument("--valid", nargs="+", type=int, default=[20, 100], help="columns")
    parser.add_argument("--costs", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--implementations", nargs="+", choices=(*IMPLEMENTATIONS, "scipy"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path, help="also write the records here")
    parser.add_argument(
        "--record", action="store_true", help="make a TPU target's cycles those the tests expect"
    )
    options = parser.parse_args(arguments)
    if options.record and options.target not in TPU_TARGETS:
        parser.error("--record needs a --target that is a TPU")
    known = {f"{case.rows}x{case.columns}": case for case in PUBLISHED}
    unknown = [name for name in options.sizes or () if name not in known]
    if unknown:
        parser.error(f"--sizes {' '.join(unknown)}: use any of {' '.join(known)}")
    cases = [known[name].with_problems(options.problems) for name in options.sizes or known]
    if options.target in TPU_TARGETS and not 1 <= options.problems <= MAX_BLOCK:
        parser.error(f"--problems {options.problems}: cycles are of one block, 1 to {MAX_BLOCK}")
    most = min(min(case.rows, case.columns) for case in cases)
    if not all(0 <= count <= most for count in options.valid):
        parser.error(f"--valid {' '.join(map(str, options.valid))}: use 0 to {most}")

    try:
        if options.target in TPU_TARGETS:
            found = list(tpu_aot.run(options.target, cases))
            if options.record:
                keep(tpu_aot.RECORDED, found, ("libtpu", "target", "sizes"))
            records = [
                row
                for case, record in zip(cases, found, strict=True)
                for row in predict(record, case, options.costs, options.valid)
            ]
        elif options.target:
            names = options.implementations or ("pallas_gpu", "xla")
            records = list(compile_for_gpu(options.target, cases, names))
        else:
            records = [
                record
                for case in cases
                for name in options.implementations or (*IMPLEMENTATIONS, "scipy")
                for record in measure(case, name, options.costs, options.valid, options.repeats)
            ]
    except (ImportError, RuntimeError, NotImplementedError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    show(records, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
