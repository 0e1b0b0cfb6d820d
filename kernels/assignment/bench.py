"""The problems of a training step, for `kernels.bench`; SciPy on the host is the rival.

SciPy solves the problems in sequence; its time excludes the transfers to the host and back.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from oneformer_jax.kernels.assignment import xla
from oneformer_jax.kernels.assignment.shapes import KINDS, PUBLISHED, Case
from oneformer_jax.kernels.bench import tpu
from oneformer_jax.kernels.bench.operation import Operation

VALID = (20, 100)  # segments of an image


def _cases() -> dict[str, Case]:
    return {
        f"{case.rows}x{case.columns}-{kind}-{valid}": dataclasses.replace(
            case, kind=kind, valid=valid
        )
        for case in PUBLISHED
        for kind in KINDS
        for valid in VALID
    }


def solve_with_scipy(costs: np.ndarray, valid: np.ndarray) -> None:
    """Solves costs [problems, rows, columns], one problem after the other."""
    for cost, columns in zip(costs, valid, strict=True):
        optimize.linear_sum_assignment(cost[:, columns])


@functools.cache
def count_steps(case: Case) -> int:
    """Steps until the last problem of the case is solved, counted on this machine's device."""
    problems, rows, columns = case.sizes
    if case.valid > rows:
        raise ValueError(f"bench: {case.valid} valid columns of {case.name} exceed {rows} rows")
    order = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (problems, columns))
    costs = case.costs().swapaxes(1, 2)
    count = jnp.full(problems, case.valid, jnp.int32)
    return int(jax.jit(xla.assign_and_count)(costs, order, count)[1])


class Assignment(Operation[Case]):
    """Arrays: costs and valid columns of `linear_sum_assignment`; a batch is two images."""

    def labels(self, case: Case, dtype: str) -> dict[str, Any]:
        return {"sizes": list(case.sizes), "costs": case.kind, "valid": case.valid}

    def arguments(self, case: Case, batch: int, dtype: str) -> list[jax.ShapeDtypeStruct]:
        problems, rows, columns = case.sizes
        return [
            jax.ShapeDtypeStruct((batch * problems, rows, columns), jnp.float32),
            jax.ShapeDtypeStruct((batch * problems, columns), jnp.bool_),
        ]

    def inputs(self, case: Case, batch: int, dtype: str) -> list[Any]:
        costs = np.concatenate([case.costs(seed) for seed in range(batch)])
        valid = np.arange(case.columns) < case.valid
        return [None, costs, np.broadcast_to(valid, (len(costs), case.columns))]

    def count(self, target: str, case: Case, program: str, dump: pathlib.Path) -> dict[str, Any]:
        """Returns issue cycles of one step of all problems, and of the rest of the kernel.

        They hold only for problems of one block: trips of the loop over blocks that only move
        memory count as if they solved, too. Of the two kernels for more columns than rows, one is
        counted.
        """
        texts = tpu.schedules(dump, "linear_sum_assignment")
        if not texts:
            return {}
        none, one = (tpu.issue_cycles(texts[0], steps=steps) for steps in (0, 1))
        return {"step_cycles": round(one - none), "other_cycles": round(none)}

    def predict(self, record: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
        """Returns one line; of a kernel, with the steps of the case's problems and their time."""
        (row,) = super().predict(record, case)
        if "step_cycles" not in record:
            return [row]
        steps = count_steps(case)
        cycles = record["other_cycles"] + steps * record["step_cycles"]
        milliseconds = 1e3 * cycles / tpu.TARGETS[record["target"]].clock
        return [{**row, "steps": steps, "milliseconds": milliseconds}]


OPERATION = Assignment(
    name="assignment",
    rivals={"scipy": solve_with_scipy},
    # by rows, columns, kind of costs and valid columns: "150x100-places-20"
    cases=_cases(),
    dtypes=("float32",),
    key=("sizes",),
)
