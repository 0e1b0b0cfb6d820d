"""Chooses the kernels of a run's programs, and writes what the device has shown to its workdir."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from oneformer_jax import remote
from oneformer_jax.kernels.calibrate import as_text
from oneformer_jax.models import execution, functional
from oneformer_jax.train import descriptions, settings, sharding
from oneformer_jax.train import state as states
from oneformer_jax.train.runtime.distributed import wait_for_all

FILE = "kernels.json"


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
        report=functools.partial(report, remote.path_of(workdir) / FILE),
        wait=lambda: wait_for_all("kernels"),
    )


def table(config: ConfigDict, num_classes: int, text_table: np.ndarray) -> str:
    """Measures the kernels of a config on this machine's device; returns their table.

    The calls are those of the training step, and of prediction at the largest padded size.

    Args:
      config: see `configs/common.py`.
      num_classes: of the dataset.
      text_table: int32 [K+3, T], the distinct texts.
    """
    config = settings.checked(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batches(config.data.batch_size, config.optim.accumulate, mesh)
    rows: list[Mapping[str, Any]] = []
    training = states.make_training(config, num_classes, text_table, mesh)

    def choose(program: Any, *arguments: Any, gradients: bool = False) -> None:
        calibrate = execution.chooser(
            dataclasses.replace(training.execution.kernels, calibrate=True),
            mesh,
            gradients=gradients,
            log=logging.debug,
            report=lambda _, found: rows.extend(found),
        )
        calibrate(program, *arguments)

    batch, key = states.abstract_batch(config, mesh), states.abstract_key(mesh)
    choose(training.step, training.state, batch, key, gradients=True)
    graph = functional.abstract(training.model, training.execution, training=False).graph
    programs = functional.programs(graph, mesh)
    model = (functional.inference_params(training.state["params"]), training.state["stats"])
    *images, tokens = states.abstract_eval_batch(config, mesh)
    choose(programs.encode.jitted, *model, *images)
    features = jax.eval_shape(programs.encode.jitted, *model, *images)
    choose(programs.decode.jitted, *model, features, tokens)
    kind = jax.local_devices()[0].device_kind
    return as_text(rows) if rows else f"{kind}: nothing to choose, plain JAX (xla) runs everywhere"


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
