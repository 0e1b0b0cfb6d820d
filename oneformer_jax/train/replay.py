"""Bad numbers: what a step leaves behind whose loss or gradient is not finite, and its replay.

workdir/nonfinite/<step>/
  report.json             step, terms, records and image ids of the batch
  batch.<process>.npz     this process's part of the batch
  state/                  the state before that step (train.on_nonfinite = "stop" only)
"""

from __future__ import annotations

import io
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict

from oneformer_jax import config_rules, files, remote
from oneformer_jax.files import first_few
from oneformer_jax.train import descriptions, observe, reading, settings, sharding, stores
from oneformer_jax.train import state as states
from oneformer_jax.train.descriptions import CheckpointError
from oneformer_jax.train.observe import NonFiniteLoss
from oneformer_jax.train.runtime import folders
from oneformer_jax.types import Metadata

FOLDER = "nonfinite"
MAX_IN_A_ROW = 10  # skipped steps after which a run stops all the same
MAX_WRITTEN = 3  # batches of skipped steps that one start writes

ImageIds = Callable[[Sequence[int]], Sequence[str]]


class _Report(msgspec.Struct):
    """The content of report.json, which has the values of `terms` as text."""

    step: int
    terms: dict[str, str]
    records: list[int] | None
    images: list[str]


class Watch:
    """Looks at the metrics of each step, one step late, so that the device need not wait for it.

    On several hosts every process makes one; all see the same metrics.
    """

    def __init__(self, workdir: str, mode: str, image_ids: ImageIds | None = None):
        """Args:
        workdir: of the run.
        mode: "stop" or "skip", see `configs/common.py`.
        image_ids: positions in the data source -> image ids.
        """
        config_rules.require({"train.on_nonfinite": mode})
        self._workdir = workdir
        self._skip = mode == "skip"
        self._image_ids = image_ids
        self._unchecked: tuple[int, Any, Mapping[str, Any]] | None = None
        self._in_a_row = self._written = 0

    def add(self, step: int, metrics: Any, batch: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step that was just given to the device, and its batch."""
        self._unchecked = (step, metrics, batch)

    def check(self, state: Any) -> None:
        """Looks at what `add` was given last.

        Args:
          state: the training state now; in mode "stop" it is the last good one if a step was bad.

        Raises:
          NonFiniteLoss: in mode "stop", or after `MAX_IN_A_ROW` skipped steps. What is needed for a
            replay is then written.
        """
        if self._unchecked is None:
            return
        (step, metrics, batch), self._unchecked = self._unchecked, None
        try:
            observe.check_finite(metrics, step, batch.get("index"), self._image_ids)
            self._in_a_row = 0
        except NonFiniteLoss as error:
            self._in_a_row += 1
            if not self._skip:
                write(self._workdir, error, batch, {**state, "halted": np.zeros((), np.bool_)})
                logging.error(
                    "The last good state and the batch are in %s/%s/%d; --mode=replay runs that "
                    "step again",
                    *(self._workdir, FOLDER, step),
                )
                raise
            if self._in_a_row > MAX_IN_A_ROW:
                raise
            logging.warning(
                "Left out the update of step %d: %s not finite; images %s",
                *(step, ", ".join(error.terms), first_few(error.images or error.records or [], 16)),
            )
            if self._written < MAX_WRITTEN:
                write(self._workdir, error, batch)
                self._written += 1


def write(
    workdir: str, error: NonFiniteLoss, batch: Mapping[str, Any], state: Any = None
) -> pathlib.Path:
    """Writes what a replay of the step needs; every process must call it. Returns the folder."""
    folder = folders.locate(workdir) / FOLDER / str(error.step)
    files.make_folder(folder)
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray(value) for name, value in batch.items()})
    files.write_atomically(folder / f"batch.{jax.process_index()}.npz", content.getvalue())
    if jax.process_index() == 0:
        terms = {name: repr(value) for name, value in error.terms.items()}
        report = _Report(error.step, terms, error.records, error.images)
        descriptions.write_json(folder / "report.json", msgspec.to_builtins(report))
    if state is not None:
        # Orbax fetches the arrays without `jax.device_get`.
        with jax.transfer_guard("allow"), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folders.literal(folder / "state"), state, force=True)
    return folder


def replay(
    config: ConfigDict,
    workdir: str,
    *,
    metadata: Metadata,
    text_table: np.ndarray,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> str:
    """Runs a recorded step again and says which terms are not finite, and where that began.

    Without a recorded state (mode "skip") the newest checkpoint before that step is taken, so that
    the numbers may differ.

    Args:
      step: which one; None is the last that was recorded.

    Returns:
      A text for the screen.

    Raises:
      CheckpointError: nothing was recorded.
    """
    config = settings.checked(config)
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    folder = find_record(workdir, step)
    report = files.read_json(folder / "report.json", _Report, error=CheckpointError)
    batch = _read_batch(folder / f"batch.{jax.process_index()}.npz")
    training = states.make_training(config, metadata.num_classes, text_table, mesh)
    state, origin = _state_before(workdir, folder, training.state, report.step)
    key = jax.random.split(jax.random.key(config.seed))[1]
    key = sharding.put_key(key, mesh)
    batch = sharding.put_batch(batch, mesh)

    # The same function, but no memory is given away: with NaN checks on it may run a second time.
    step_function = training.step.__wrapped__
    images = first_few(report.images or report.records or [], 16)
    lines = [f"step {report.step}, images {images}", f"state: {origin}"]
    _, metrics = jax.jit(step_function)(state, batch, key)
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [f"{name} = {value}" for name, value in values.items() if not np.isfinite(value)]
    lines.append("not finite: " + (", ".join(bad) or "nothing; all terms are finite this time"))
    if bad:
        lines.append(_where(step_function, state, batch, key))
    return "\n".join(lines)


def find_record(workdir: str, step: int | None = None) -> pathlib.Path:
    """Finds the folder of a recorded step, of the last one for None.

    Raises:
      CheckpointError: nothing was recorded, or not that step.
    """
    remote.check(workdir)
    parent = folders.locate(workdir) / FOLDER
    if not parent.parent.exists():
        raise CheckpointError(f"{parent.parent} does not exist; expected the workdir of a run")
    steps = []
    if parent.exists():
        found = (f for f in parent.iterdir() if folders.is_step(f.name))
        steps = sorted(int(f.name) for f in found if (f / "report.json").exists())
    if not steps:
        raise CheckpointError(f"{parent} holds no recorded step: this run has had no bad numbers")
    if step is not None and step not in steps:
        raise CheckpointError(f"{parent} holds no step {step}, but {steps}")
    return parent / str(steps[-1] if step is None else step)


def _read_batch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a recorded batch; CheckpointError if it is missing or damaged."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing: replay with as many processes as the run had")
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays if name != "index"}
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged ({error}); replay another step") from error


def _state_before(workdir: str, folder: pathlib.Path, target: Any, step: int) -> tuple[Any, str]:
    if (folder / "state").exists():
        with reading.reporting_damage(folder):
            saved = stores.describe(folder / "state")
            wanted = {name: tree for name, tree in target.items() if name in saved}
            with ocp.StandardCheckpointer() as checkpointer:
                state = checkpointer.restore(folders.literal(folder / "state"), wanted)
        return reading.with_halted(state, target), f"before step {step}, as recorded"
    path = folders.locate(workdir) / folders.CHECKPOINT_FOLDER
    earlier = [n for n in folders.finished_steps(path) if n < step]
    if not earlier:
        raise CheckpointError(
            f"{path} holds no checkpoint from before step {step} to replay it with"
        )
    state = reading.read_state(path / str(earlier[-1]), target)
    return {**state, "step": np.int32(step - 1)}, f"of the checkpoint of step {earlier[-1]}"


def _where(function: Any, state: Any, batch: Any, key: Any) -> str:
    """Runs `function` with JAX's NaN checks, which stop at the first operation that makes one."""
    before = jax.config.jax_debug_nans
    jax.config.update("jax_debug_nans", True)
    jax.clear_caches()  # a program that was compiled without the checks would run without them
    try:
        jax.block_until_ready(jax.jit(function)(state, batch, key))
    except FloatingPointError as error:
        place = _our_frame(error)
        reason = re.sub(r"\s+", " ", str(error).split("\n")[0])
        return f"first made in {place}: {reason}" if place else f"first made: {reason}"
    finally:
        jax.config.update("jax_debug_nans", before)
    return "no single operation made a NaN: an infinite value came first"


def _our_frame(error: BaseException) -> str:
    """ "oneformer_jax/models/losses.py:140" of the innermost frame in the model, or ""."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if match := re.search(r"(oneformer_jax/models|kernels)/.*", file):
            place = f"{match[0]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
