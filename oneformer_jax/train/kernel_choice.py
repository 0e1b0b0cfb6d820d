"""Chooses the kernels of a run's programs, and writes what the device has shown to its workdir."""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from oneformer_jax.models import execution
from oneformer_jax.train import descriptions
from oneformer_jax.train.runtime.distributed import wait_for_all

FILE = "kernels.json"
_NUMBER = itertools.count()  # of the meetings of all processes


def chooser(
    kernels: execution.Kernels,
    mesh: jax.sharding.Mesh,
    workdir: str | os.PathLike[str],
    *,
    gradients: bool = False,
) -> Callable[..., None] | None:
    """Makes `execution.chooser` of a run.

    Args:
      kernels: the implementations.
      mesh: devices of the programs.
      workdir: the folder in which kernels.json is written or extended.
      gradients: whether the programs take gradients.
    """
    return execution.chooser(
        kernels,
        mesh,
        gradients=gradients,
        log=logging.info,
        report=functools.partial(report, pathlib.Path(workdir) / FILE),
        wait=lambda: wait_for_all(f"kernels, {next(_NUMBER)}"),
    )


def report(
    path: pathlib.Path, environment: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the lines of a table into a file, beside those of other calls on such a device."""
    try:
        before = descriptions.read_json(path, expected="the table of kernels")
        kept = before["table"] if before["environment"] == environment else []
        calls = [(row["operation"], row["call"], row["gradients"]) for row in rows]
        kept = [r for r in kept if (r["operation"], r["call"], r["gradients"]) not in calls]
    except (descriptions.CheckpointError, LookupError, TypeError):  # it is made afresh
        kept = []
    descriptions.write_json(path, {"environment": dict(environment), "table": [*kept, *rows]})
