"""Writers of a run to Weights & Biases and to MLflow, the extras `wandb` and `mlflow`.

Both libraries take servers and accounts from their own variables: `WANDB_MODE=offline` and
`MLFLOW_TRACKING_URI=file:FOLDER` keep all on this machine. The ids of the runs are in
WORKDIR/trackers.json, so that a start that resumes goes on in the same ones.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from oneformer_jax import files, remote, rules
from oneformer_jax.train.dashboards import tag_of
from oneformer_jax.train.descriptions import read_json, write_json
from oneformer_jax.train.tensorboard import QuietWriter

LIBRARIES = ("wandb", "mlflow")
_IDS = "trackers.json"
_MOST = 100  # parameters of a request to MLflow


def check(wanted: Mapping[str, str]) -> None:
    """Raises ValueError if a library is missing; `wanted` is its name -> a project, "" if none."""
    for library in LIBRARIES:
        if wanted[library] and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"log.{library}={wanted[library]!r} needs a package that is missing: "
                f'pip install "oneformer-jax[{library}]"'
            )


def make(workdir: str | os.PathLike[str], wanted: Mapping[str, str]) -> list[QuietWriter]:
    """Makes the wanted writers; see `check`.

    Raises:
      ValueError: a server or account refuses the run, with the library's message.
    """
    folder = remote.path_of(workdir)
    path, ids = folder / _IDS, {}
    if path.exists():
        ids = read_json(path, dict[str, str], expected="the ids of this run's trackers")
    kinds = {"wandb": WandbWriter, "mlflow": MlflowWriter}
    made: list[QuietWriter] = []
    for library in LIBRARIES:
        if wanted[library]:
            try:
                writer = kinds[library](folder, wanted[library], ids.get(library))
            except Exception as error:  # those of the network have many types
                for other in made:
                    other.close()
                reason = " ".join(str(error).split())
                raise ValueError(f"log.{library}={wanted[library]!r}: {reason}") from error
            made.append(writer)
            ids[library] = writer.id
    if made:
        files.make_folder(folder)
        write_json(path, ids)
    return made


def _scalars(scalars: Mapping[str, Any]) -> dict[str, float]:
    found = {tag_of(n): float(np.asarray(v)) for n, v in scalars.items() if v is not None}
    return {name: value for name, value in found.items() if np.isfinite(value)}


class WandbWriter(QuietWriter):
    """Writes to a run of a Weights & Biases project; the library sends in the background."""

    def __init__(self, workdir: pathlib.Path, project: str, run_id: str | None):
        import wandb

        self._image = wandb.Image
        place = None if remote.is_remote(workdir) else str(workdir)
        if place:
            files.make_folder(place)
        self._run = wandb.init(
            project=project,
            id=run_id or uuid.uuid4().hex[:8],
            resume="allow",
            dir=place,
            name=workdir.name,
        )
        self.id = self._run.id
        # A resumed run repeats steps, which wandb's own counter would drop.
        self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step, scalars):
        self._run.log({**_scalars(scalars), "step": int(step)})

    def write_images(self, step, images):
        shown = {name: [self._image(image) for image in batch] for name, batch in images.items()}
        self._run.log({**shown, "step": int(step)})

    def write_texts(self, step, texts):
        self._run.config.update(dict(texts), allow_val_change=True)

    def write_hparams(self, hparams):
        self._run.config.update(rules.flattened(hparams), allow_val_change=True)

    def close(self):
        self._run.finish()


class MlflowWriter(QuietWriter):
    """Writes to a run of an MLflow experiment; a request that fails is a warning."""

    def __init__(self, workdir: pathlib.Path, experiment: str, run_id: str | None):
        import mlflow

        self._client = mlflow.MlflowClient()
        self._entities, self._error = mlflow.entities, mlflow.MlflowException
        if run_id is None:
            found = self._client.get_experiment_by_name(experiment)
            place = found.experiment_id if found else self._client.create_experiment(experiment)
            run_id = self._client.create_run(place, run_name=workdir.name).info.run_id
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.id = run_id

    def _send(self, method: str, *arguments: Any, **named: Any) -> None:
        try:
            getattr(self._client, method)(self.id, *arguments, **named)
        except (self._error, OSError) as error:  # a server that is away must not end a training
            logging.warning("MLflow took no %s: %s", method, " ".join(str(error).split())[:300])

    def write_scalars(self, step, scalars):
        now = int(1000 * time.time())
        metrics = [
            self._entities.Metric(name, value, now, int(step))
            for name, value in _scalars(scalars).items()
        ]
        self._send("log_batch", metrics=metrics)

    def write_images(self, step, images):
        for name, batch in images.items():
            for number, image in enumerate(batch):
                self._send("log_image", image, key=f"{name}_{number}", step=int(step))

    def write_texts(self, step, texts):
        for name, text in texts.items():
            self._send("log_text", text, f"{name}.txt")

    def write_hparams(self, hparams):
        settings = rules.flattened(hparams).items()
        found = [self._entities.Param(name, str(value)[:500]) for name, value in settings]
        for first in range(0, len(found), _MOST):
            self._send("log_batch", params=found[first : first + _MOST])

    def close(self):
        self._send("set_terminated")
