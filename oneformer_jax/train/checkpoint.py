"""Checkpoints of a run, and the description of its working directory.

workdir/
  config.json, model.json, metadata.json: see `descriptions`
  checkpoints/<step>/
    state/         {step, halted, params, stats, opt[, ema]}, pytrees of Orbax: see `stores`
    position/      the position of the input, and other small JSON values
    SHA256SUMS     digests of the files: see `seals`
    scores.json    the scores of an evaluation at that step, if any

A checkpoint gets its name after it was read back; only then are older ones removed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from oneformer_jax import config_rules, files, remote
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import descriptions, reading, seals, stores
from oneformer_jax.train.descriptions import CheckpointError
from oneformer_jax.train.reading import DamagedCheckpoint
from oneformer_jax.train.runtime import folders
from oneformer_jax.train.runtime.distributed import wait_for_all
from oneformer_jax.train.runtime.folders import CHECKPOINT_FOLDER
from oneformer_jax.train.runtime.workdir import is_full
from oneformer_jax.types import Metadata

# ------------------------------------------------------------------ saving and resuming


class Checkpoints:
    """The checkpoints of a training run: saved in the background, the last and the best are kept.

    On several hosts every process makes one and calls the same methods in the same order. A start
    removes the temporary folders of interrupted saves and renames incomplete ones to
    "<step>.incomplete". So only the run that owns a workdir may open it this way;
    `load_for_inference` reads beside a run.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        keep: int = 3,
        keep_best: int = 1,
        best_metric: str | None = None,
    ):
        """Opens (and creates) `workdir`/checkpoints.

        Args:
          workdir: the run's folder.
          keep: number of last checkpoints that stay.
          keep_best: number of best ones that also stay; those without `best_metric` do not compete.
          best_metric: name of a score, such as "panoptic/PQ"; higher is better. None: no best.
        """
        config_rules.require({"train.keep": keep, "train.keep_best": keep_best})
        self.directory = folders.locate(workdir) / CHECKPOINT_FOLDER
        if jax.process_index() == 0:
            files.make_folder(self.directory)
            folders.sweep(self.directory)
            folders.sweep_files(self.directory.parent)
            for folder in (
                () if remote.is_remote(workdir) else self.directory.parent.glob("eval/*/")
            ):
                folders.sweep_files(folder, older_than=60)
        wait_for_all("the checkpoint folder is ready")
        self._best_metric = best_metric
        self._keep, self._keep_best = keep, keep_best
        self._steps = folders.finished_steps(self.directory)
        self._scores: dict[int, Mapping[str, float]] = {}
        self._unreadable_scores: set[int] = set()
        for step in self._steps:
            try:
                scores = seals.read_scores(self.directory / str(step))
            except seals.SealError as error:
                logging.warning("%s. Step %d is kept, but cannot be the best.", error, step)
                self._unreadable_scores.add(step)
            else:
                self._scores |= {} if scores is None else {step: scores}
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._finishing: concurrent.futures.Future | None = None

    def _staying(self) -> list[int]:
        """Steps of the checkpoints that stay: the last and the best ones."""
        stay = {*self._steps[-self._keep :], *self._ranking()[: self._keep_best]}
        return [step for step in self._steps if step in stay | self._unreadable_scores]

    def _ranking(self) -> list[int]:
        """Steps with a score by `best_metric`, best first, the later of equal ones first."""
        found = {step: scores.get(self._best_metric) for step, scores in self._scores.items()}
        good = {step: s for step, s in found.items() if s is not None}
        return sorted(good, key=lambda step: (good[step], step), reverse=True)

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> bool:
        """Starts saving; returns once the arrays are copied, so that the step may donate them.

        A background thread writes the checkpoint, reads it back, seals it, and removes old ones.
        A call first waits for an earlier save, and raises its failure.

        Args:
          step: number of the checkpoint.
          state: pytree of arrays.
          position: small JSON values: the position of the input.

        Returns:
          False if this step is saved already (a run that ends on a saving step), True otherwise.

        Raises:
          CheckpointError: a later checkpoint exists, or an earlier save failed.
        """
        self.wait_until_finished()
        latest = self.latest_step()
        if latest == step:
            return False
        if latest is not None and latest > step:
            raise CheckpointError(
                f"cannot save step {step}: {self.directory} already holds step {latest}; "
                "remove the later checkpoints, or use another --workdir"
            )
        with self._reporting_failure(), jax.transfer_guard("allow"):  # those of Orbax
            written = folders.begin(self.directory, step)
            self._checkpointer.save(
                folders.literal(written),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(dict(position))
                ),
                force=True,
            )
        before, self._steps = self._steps, [*self._steps, step]
        self._steps = self._staying()
        removed = [old for old in before if old not in self._steps]
        described = reading.describe(state)
        self._finishing = self._background.submit(self._finish, step, written, described, removed)
        return True

    def _finish(
        self, step: int, written: pathlib.Path, described: Mapping[str, str], removed: list[int]
    ) -> None:
        """Waits for the save, reads it back, names it, and removes the old ones."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                reading.seal(written, described)
                folders.commit(written, step)
                for old in removed:
                    folders.remove(self.directory / str(old))
        finally:
            wait_for_all("a save is finished")

    def record(self, step: int, scores: Mapping[str, float | None]) -> None:
        """Stores the scores of the checkpoint of `step`, for keep-best; None is "not defined"."""
        self.wait_until_finished()
        defined = {name: float(v) for name, v in scores.items() if v is not None}
        self._scores[step] = {name: v for name, v in defined.items() if not math.isnan(v)}
        self._unreadable_scores.discard(step)
        folder = self.directory / str(step)
        if jax.process_index() == 0 and folder.exists():
            seals.write_scores(folder, self._scores[step])

    @contextlib.contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        """Turns any error while writing into one CheckpointError."""
        try:
            yield
        except Exception as error:
            if jax.process_index() == 0:  # half-written files take room, too
                folders.remove_unfinished(self.directory)
            good = self._steps[:-1]
            with contextlib.suppress(OSError):  # a bucket may be out of reach
                good = folders.finished_steps(self.directory)
            self._steps = good
            last = f"the last good one is step {good[-1]}" if good else "there is none yet"
            why, hint = reading.reason(error), "see to that folder"
            if remote.is_remote(self.directory):
                why, hint = remote.explain(self.directory, error), "see to that bucket"
            if is_full(error):
                why, hint = "the disk is full", "free some space"
            raise CheckpointError(
                f"a checkpoint could not be written into {self.directory}: {why}. Of this run "
                f"{last}; {hint} and start the same command again"
            ) from error

    def wait_until_finished(self) -> None:
        """Blocks until the current save is sealed; CheckpointError if it failed."""
        finishing = self._finishing
        if finishing is None:
            return
        try:
            with self._reporting_failure():
                finishing.result()
        finally:  # not earlier: a thread that handles a signal may wait, too
            if self._finishing is finishing:
                self._finishing = None

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, including one that is being written."""
        return list(self._steps)

    def latest_step(self) -> int | None:
        """Returns the step of the last checkpoint, or None."""
        return self._steps[-1] if self._steps else None

    def scores_of(self, step: int) -> Mapping[str, float] | None:
        """Returns the scores recorded for the checkpoint of `step`, or None."""
        return self._scores.get(step)

    def position_of(self, step: int) -> dict[str, Any]:
        """Reads the position of a checkpoint; empty if it is damaged, which `restore` tells."""
        with contextlib.suppress(DamagedCheckpoint):
            return self._read_position(step)
        return {}

    def _read_position(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step)
        with reading.reporting_damage(path):
            return files.read_json(path / reading.POSITION_FILE)

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint by `best_metric`, or None."""
        return next((step for step in self._ranking() if step in self._steps), None)

    def restore_newest(self, target: Any) -> tuple[int, Any, dict[str, Any]]:
        """Restores the newest readable checkpoint: (step, state, position).

        Damaged newer ones are renamed to "<step>.damaged", with an error in the log. All processes
        take the same one.

        Raises:
          CheckpointError: none exists, none can be read, or it is of another model.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.all_steps()):
            state = position = None
            try:
                state, position = self.restore(step, target)
            except DamagedCheckpoint as error:
                damaged[step] = error
            if reading.any_process(step in damaged):
                damaged.setdefault(step, DamagedCheckpoint("another process could not read it"))
                continue
            for bad, error in damaged.items():
                logging.error("%s\nGoing on from step %d instead.", error, step)
                self._set_aside(bad)
            return step, state, position
        raise next(iter(damaged.values()), CheckpointError(f"{self.directory} is empty"))

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            folders.rename(self.directory / str(step), f"{step}.damaged")
        wait_for_all("a damaged checkpoint is set aside")
        self._steps.remove(step)
        self._scores.pop(step, None)

    def restore(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices.

        Args:
          step: one of `all_steps()`.
          target: tree of jax.ShapeDtypeStruct from `sharding.with_shardings`; the mesh may differ
            from the one that saved.

        Returns:
          (state, position).

        Raises:
          CheckpointError: no such step, a damaged checkpoint, or one of another model.
        """
        self.wait_until_finished()
        path = self.directory / str(step)
        if step not in self._steps:
            raise CheckpointError(
                f"there is no checkpoint {path}; this workdir holds steps {self.all_steps()}"
            )
        return reading.read_state(path, target), self._read_position(step)

    def close(self) -> None:
        """Waits for the current save and ends the background threads."""
        try:
            self.wait_until_finished()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


# ------------------------------------------------------------------ inference


class Trained(NamedTuple):
    """A trained model, read from disk.

    Attributes:
      model: `OneFormerConfig.to_dict()`.
      params, stats: nested dicts of numpy arrays, in the form of nnx.to_pure_dict.
      metadata: classes of the data set.
      settings: the training configuration (config.json).
      step: step of the checkpoint.
    """

    model: dict[str, Any]
    params: dict[str, Any]
    stats: dict[str, Any]
    metadata: Metadata
    settings: dict[str, Any]
    step: int


def load_for_inference(
    path: str | os.PathLike[str], *, checkpoint: str | int = "latest", use_ema: bool = True
) -> Trained:
    """Reads a model for inference, without the optimizer's state.

    Args:
      path: a workdir or workdir/checkpoints/<step>.
      checkpoint: of a workdir: see `find_checkpoint`.
      use_ema: take the averaged parameters if the run kept them.

    Raises:
      CheckpointError: `path` is neither, or the checkpoint is damaged.
    """
    workdir, folder = find_checkpoint(path, checkpoint)
    model = descriptions.read_model(workdir)
    settings = descriptions.read_config(workdir)
    metadata = descriptions.read_metadata(workdir)
    store = folder / "state"
    reading.check_seal(folder)
    with reading.reporting_damage(folder):
        tree = stores.describe(store)
    source = "ema" if use_ema and "ema" in tree else "params"
    if not {source, "stats"} <= tree.keys():
        raise CheckpointError(f"{folder} holds {sorted(tree)}; expected params and stats")
    wanted = {part: tree[part] for part in (source, "stats")}
    with reading.reporting_damage(folder):
        stores.check_sizes(store, wanted)
        stores.check_chunks(store, wanted)
        arrays = stores.read(store, wanted)
    params, stats = _integer_keys(arrays[source]), _integer_keys(arrays["stats"])
    return Trained(model, params, stats, metadata, settings, int(folder.name))


def read_architecture(path: str | os.PathLike[str]) -> OneFormerConfig:
    """Reads the architecture of a model without its parameters; see `load_for_inference`."""
    workdir, _ = find_checkpoint(path)
    return OneFormerConfig.from_dict(descriptions.read_model(workdir))


def write_converted(workdir: str | os.PathLike[str], trained: Trained) -> None:
    """Writes a new workdir with one checkpoint, for prediction and evaluation.

    It has no optimizer state: training starts from it with config.init.checkpoint.

    Raises:
      CheckpointError: `workdir` exists and is not empty.
    """
    workdir = folders.locate(workdir)
    remote.check(workdir, writing=True)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise CheckpointError(f"{workdir} exists and is not an empty folder; use another")
    settings = json.dumps(trained.settings)
    descriptions.claim_workdir(workdir, trained.model, settings, trained.metadata)
    state = {"step": np.int32(trained.step), "params": trained.params, "stats": trained.stats}
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(trained.step, state, {"step": trained.step})


def find_checkpoint(
    path: str | os.PathLike[str], checkpoint: str | int = "latest"
) -> tuple[pathlib.Path, pathlib.Path]:
    """Finds a checkpoint, and returns its workdir and its folder; no array is read.

    Args:
      path: a workdir, or workdir/checkpoints/<step>, which leaves no choice.
      checkpoint: a step, "latest", "best" (by the run's `eval.best_metric`), or "auto": the best
        if there are scores, else the latest.

    Raises:
      CheckpointError: `path` is neither, or has no such checkpoint.
    """
    path = folders.locate(path)
    remote.check(path)
    expected = (
        f"expected a workdir ({descriptions.MODEL_FILE} and {CHECKPOINT_FOLDER}/<step>) or one of "
        f"its {CHECKPOINT_FOLDER}/<step>"
    )
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {expected}")
    if path.parent.name == CHECKPOINT_FOLDER and folders.is_step(path.name):
        if not folders.is_complete(path):
            missing = [part for part in folders.PARTS if not (path / part).exists()]
            why = f"it lacks {', '.join(missing)}" if missing else "it is marked as unfinished"
            raise CheckpointError(f"checkpoint {path} is incomplete: {why}")
        return path.parent.parent, path
    if not (path / descriptions.MODEL_FILE).exists():
        raise CheckpointError(f"{path} has no {descriptions.MODEL_FILE}; {expected}")
    folder = path / CHECKPOINT_FOLDER
    steps = folders.finished_steps(folder)
    if not steps:
        raise CheckpointError(f"{path} holds no finished checkpoint yet; {expected}")
    if str(checkpoint) in map(str, steps):
        return path, folder / str(checkpoint)
    if checkpoint in ("best", "auto"):
        best = _best(path, steps)
        if best is None and checkpoint == "best":
            raise CheckpointError(
                f"no checkpoint of {path} has scores yet, so none is the best; take the latest, or "
                "evaluate the run"
            )
        return path, folder / str(steps[-1] if best is None else best)
    if checkpoint != "latest":
        raise CheckpointError(
            f"{path} has no checkpoint {checkpoint}; there are {', '.join(map(str, steps))}, and "
            "the words latest and best"
        )
    return path, folder / str(steps[-1])


def _best(workdir: pathlib.Path, steps: Sequence[int]) -> int | None:
    """The step with the highest score by the run's metric, the later of equal ones, if any."""
    metric = str(descriptions.read_config(workdir)["eval"].get("best_metric"))  # or of any kind
    found = []
    for step in steps:
        with contextlib.suppress(seals.SealError):  # unreadable scores do not compete
            scores = seals.read_scores(workdir / CHECKPOINT_FOLDER / str(step)) or {}
            if metric in scores:
                found.append((scores[metric], step))
    return max(found)[1] if found else None


def _integer_keys(tree: Any) -> Any:
    """Orbax stores the integer keys of nnx lists as text; attribute names are never digits."""
    if not isinstance(tree, Mapping):
        return tree
    return {int(k) if folders.is_step(k) else k: _integer_keys(v) for k, v in tree.items()}
