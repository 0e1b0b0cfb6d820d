"""Checkpoints of a run, and the files that say what its working directory holds.

workdir/
  config.json      the whole configuration of the last start
  model.json       OneFormerConfig.to_dict(): what is needed to build the model again
  metadata.json    classes of the data set
  checkpoints/<step>/
    state/         {step, params, stats, opt[, ema]} as Orbax writes pytrees
    position/      where the input stands, and other small JSON values
    metrics/       scores of an evaluation at that step, if there was one
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from oneformer_jax.types import Metadata

CONFIG_FILE, MODEL_FILE, METADATA_FILE = "config.json", "model.json", "metadata.json"
CHECKPOINT_FOLDER = "checkpoints"
_SHOWN_DIFFERENCES = 5
# Orbax writes into a folder with this in its name and renames it when all is there.
_TEMPORARY = ".orbax-checkpoint-tmp"
_PARTS = ("_CHECKPOINT_METADATA", "state", "position")


class CheckpointError(ValueError):
    """A checkpoint or a working directory that cannot be used as asked."""


# ------------------------------------------------------------------ the working directory


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` (or a JSON text) to `path`, indented; readers see the old or the new file."""
    path = epath.Path(path)
    text = json.dumps(json.loads(value) if isinstance(value, str) else value, indent=1)
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(text + "\n")
    temporary.replace(path)


def read_json(path: epath.PathLike, *, expected: str) -> Any:
    """Parses a JSON file; CheckpointError names the file and says what was `expected` there."""
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; expected {expected}") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); expected {expected}. Restore the file, or start the "
            "training command again in this workdir once the file is removed: it is written anew"
        ) from None


def claim_workdir(
    workdir: epath.PathLike, model: Mapping, config_json: str, metadata: Metadata
) -> None:
    """Writes config.json, model.json and metadata.json, or checks them if a run was here before.

    The configuration may change between starts (more steps, another learning rate), and config.json
    follows it; the model and the classes may not. With several hosts the first one writes.

    Args:
      workdir: created if needed.
      model: `OneFormerConfig.to_dict()`.
      config_json: the whole configuration as JSON text.
      metadata: classes of the data set.

    Raises:
      CheckpointError: the workdir holds another model or other classes.
    """
    workdir = _absolute(workdir)
    files = {MODEL_FILE: dict(model), METADATA_FILE: json.loads(metadata.to_json())}
    for name, ours in files.items():
        if not (workdir / name).exists():
            continue
        theirs = read_json(workdir / name, expected="what an earlier start wrote")
        differing = list(_differing_keys(theirs, json.loads(json.dumps(ours))))
        if differing:
            what = "another model" if name == MODEL_FILE else "a model of other classes"
            raise CheckpointError(
                f"workdir {workdir} holds {what}: {name} differs in "
                f"{_first(differing)}; use another --workdir, or the settings of that one"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, ours in files.items():
            if not (workdir / name).exists():
                write_json(workdir / name, ours)
        write_json(workdir / CONFIG_FILE, config_json)


def _differing_keys(theirs: Any, ours: Any, name: str = "") -> Iterator[str]:
    """Texts like "backbone.depth (there 50, here 101)" for the leaves in which two JSONs differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys((*theirs, *ours)):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differing_keys(theirs.get(key), ours.get(key), inner)
    elif theirs != ours:
        yield f"{name} (there {_short(theirs)}, here {_short(ours)})"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _first(texts: list[str], separator: str = ", ") -> str:
    more = len(texts) - _SHOWN_DIFFERENCES
    shown = separator.join(texts[:_SHOWN_DIFFERENCES])
    return f"{shown}{separator}and {more} more" if more > 0 else shown


# ------------------------------------------------------------------ saving and resuming


class Checkpoints:
    """The checkpoints of a training run: saved in the background, the last and the best are kept.

    On several hosts every process makes one and calls the same methods in the same order. Folders
    that an interrupted save or copy left half written are not seen: a start removes the temporary
    folders of interrupted saves and renames incomplete ones to "<step>.incomplete". So only the run
    that owns a workdir may open it this way; `load_for_inference` reads beside a run.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        keep: int = 3,
        keep_best: int = 1,
        best_metric: str | None = None,
    ):
        """Opens (and creates) `workdir`/checkpoints.

        Args:
          workdir: of the run.
          keep: how many of the last checkpoints stay.
          keep_best: how many of the best stay besides; those without `best_metric` do not compete.
          best_metric: name of a score, such as "panoptic/PQ"; higher is better. None: no best.
        """
        if keep < 1:
            raise ValueError(f"train.keep is {keep}; at least the last one must stay")
        if keep_best < 0:
            raise ValueError(f"train.keep_best is {keep_best}; use 0 or more")
        self.directory = _absolute(workdir) / CHECKPOINT_FOLDER
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            _sweep(self.directory)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("oneformer_jax: checkpoint folder is ready")
        self._best_metric = best_metric
        policies = [checkpoint_managers.LatestN(keep)]
        if best_metric is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self._score, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=None if best_metric is None else self._score,
                keep_checkpoints_without_metrics=False,
            ),
        )

    def _score(self, metrics: Mapping[str, float]) -> float:
        score = metrics.get(self._best_metric, math.nan)
        return -math.inf if math.isnan(score) else score

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        metrics: Mapping[str, float | None] | None = None,
    ) -> bool:
        """Starts saving; returns once the arrays are copied, so that the step may donate them.

        An earlier save that is still writing is waited for, and its failure is raised here.

        Args:
          step: number of the checkpoint.
          state: pytree of arrays.
          position: small JSON values: where the input stands.
          metrics: scores of an evaluation at this step, for keep-best; None is "not defined".

        Returns:
          False if this step is saved already (a run that ends on a saving step), True otherwise.

        Raises:
          CheckpointError: there is a later checkpoint.
        """
        latest = self.latest_step()
        if latest == step:
            return False
        if latest is not None and latest > step:
            raise CheckpointError(
                f"cannot save step {step}: {self.directory} already holds step {latest}; "
                "remove the later checkpoints, or use another --workdir"
            )
        if metrics is not None:
            metrics = {name: float(v) for name, v in metrics.items() if v is not None}
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(dict(position))
            ),
            metrics=metrics,
        )

    def wait_until_finished(self) -> None:
        """Blocks until the save under way is on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints, ascending; one that is being written counts."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the last checkpoint, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the best checkpoint by `best_metric`, or None if none has that score."""
        if self._best_metric is None:
            return None
        self.wait_until_finished()
        scores = {step: self._manager.metrics(step) for step in self.all_steps()}
        scores = {step: self._score(found) for step, found in scores.items() if found}
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        return None if best is None or scores[best] == -math.inf else best

    def restore(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices.

        Args:
          step: one of `all_steps()`.
          target: tree of jax.ShapeDtypeStruct with shardings, as sharding.with_shardings makes it;
            the mesh may differ from the one that saved.

        Returns:
          (state, position).

        Raises:
          CheckpointError: no such step, a damaged checkpoint, or one of another model.
        """
        self.wait_until_finished()
        path = self.directory / str(step)
        if step not in self.all_steps():
            raise CheckpointError(
                f"there is no checkpoint {path}; this workdir holds steps {self.all_steps()}"
            )
        _check_same_tree(path, _saved_tree(path), target)
        with _reporting_damage(path):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
                    ),
                    position=ocp.args.JsonRestore(),
                ),
            )
        return restored.state, restored.position

    def close(self) -> None:
        """Waits for the save under way and ends the background threads."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax wants absolute paths."""
    return epath.Path(path).expanduser().resolve()


def _is_complete(folder: epath.Path) -> bool:
    return folder.name.isdigit() and all((folder / part).exists() for part in _PARTS)


def _sweep(directory: epath.Path) -> None:
    """Clears away what an interrupted save or copy left; Orbax would count a bare "<step>"."""
    for folder in directory.iterdir():
        if _TEMPORARY in folder.name:
            logging.warning("Removing %s, left by a save that was interrupted.", folder)
            folder.rmtree()
        elif folder.name.isdigit() and not _is_complete(folder):
            aside = folder.parent / f"{folder.name}.incomplete"
            logging.warning("Checkpoint %s is incomplete; renamed to %s.", folder, aside.name)
            if aside.exists():
                aside.rmtree()
            folder.rename(aside)


@contextlib.contextmanager
def _reporting_damage(path: epath.Path):
    """Turns whatever Orbax and TensorStore raise while reading into one clear error."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} is damaged: {reason}\nRemove or rename that folder to go on from "
            "the checkpoint before it."
        ) from error


def _saved_tree(path: epath.Path) -> dict:
    """What `path`/state holds: nested dict with text keys and leaves that have shape and dtype."""
    with _reporting_damage(path):
        return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


def _describe(tree: Any) -> dict[str, str]:
    """{"params/backbone/norm/scale": "float32[96]"} of the arrays in `tree`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }


def _check_same_tree(path: epath.Path, saved: Any, target: Any) -> None:
    """CheckpointError that lists the arrays in which the checkpoint and `target` differ."""
    theirs, ours = _describe(saved), _describe(target)
    names = [n for n in dict.fromkeys((*ours, *theirs)) if theirs.get(n) != ours.get(n)]
    if not names:
        return
    # The model's arrays first: when they differ, so do the optimizer's.
    names.sort(key=lambda name: not name.startswith(("params/", "stats/")))
    lines = [f"  {n}: there {theirs.get(n, 'none')}, here {ours.get(n, 'none')}" for n in names]
    if names[0].startswith(("params/", "stats/")):
        reason = "is of another model"
        way_out = "Use the model settings in that workdir's config.json, or another --workdir."
    else:
        reason = "has the parameters of this model, but other training state"
        way_out = (
            "Was optim.ema_decay turned on or off? Set it as it was, or use another --workdir."
        )
    raise CheckpointError(
        f"checkpoint {path} {reason}; {len(names)} arrays differ:\n"
        + _first(lines, "\n")
        + f"\n{way_out}"
    )


# ------------------------------------------------------------------ inference


class Trained(NamedTuple):
    """A trained model as read from disk.

    Attributes:
      model: `OneFormerConfig.to_dict()`.
      params, stats: nested dicts of numpy arrays, as nnx.to_pure_dict gives them.
      metadata: classes of the data set.
      settings: the training configuration (config.json).
      step: of the checkpoint.
    """

    model: dict[str, Any]
    params: dict[str, Any]
    stats: dict[str, Any]
    metadata: Metadata
    settings: dict[str, Any]
    step: int


def load_for_inference(path: epath.PathLike, *, use_ema: bool = True) -> Trained:
    """Reads what inference needs; the optimizer's state is neither read nor known.

    Args:
      path: a workdir (its last checkpoint is taken) or workdir/checkpoints/<step>.
      use_ema: take the averaged parameters where the run kept them.

    Raises:
      CheckpointError: no such thing at `path`, or a damaged one.
    """
    workdir, checkpoint = _find_checkpoint(_absolute(path))
    model = read_json(workdir / MODEL_FILE, expected="the model's settings")
    settings = read_json(workdir / CONFIG_FILE, expected="the run's configuration")
    found = read_json(workdir / METADATA_FILE, expected="the classes of the data set")
    try:
        metadata = Metadata.from_json(json.dumps(found))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{workdir / METADATA_FILE} is damaged: {error!r}") from error

    tree = _saved_tree(checkpoint)
    source = "ema" if use_ema and "ema" in tree else "params"
    if not {source, "stats"} <= set(tree):
        raise CheckpointError(f"{checkpoint} holds {sorted(tree)}; expected params and stats")
    item = {part: tree[part] for part in (source, "stats")}
    with _reporting_damage(checkpoint):
        restored = ocp.PyTreeCheckpointer().restore(
            checkpoint / "state",
            args=ocp.args.PyTreeRestore(
                item,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
                partial_restore=True,
            ),
        )
    params, stats = _integer_keys(restored[source]), _integer_keys(restored["stats"])
    return Trained(model, params, stats, metadata, settings, int(checkpoint.name))


def write_converted(workdir: epath.PathLike, trained: Trained) -> None:
    """Writes a new workdir with one checkpoint, for prediction and evaluation.

    It has no optimizer state: training starts from it with config.init.checkpoint.

    Raises:
      CheckpointError: there is something at `workdir`.
    """
    workdir = _absolute(workdir)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise CheckpointError(f"{workdir} is there already and not an empty folder; use another")
    settings = json.dumps(trained.settings)
    claim_workdir(workdir, trained.model, settings, trained.metadata)
    state = {"step": np.int32(trained.step), "params": trained.params, "stats": trained.stats}
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(trained.step, state, {"step": trained.step})


def _find_checkpoint(path: epath.Path) -> tuple[epath.Path, epath.Path]:
    """(workdir, checkpoint folder) of a path given by the user."""
    expected = (
        f"expected a workdir ({MODEL_FILE} and {CHECKPOINT_FOLDER}/<step>) or one of its "
        f"{CHECKPOINT_FOLDER}/<step>"
    )
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {expected}")
    if path.parent.name == CHECKPOINT_FOLDER and path.name.isdigit():
        if not _is_complete(path):
            missing = [part for part in _PARTS if not (path / part).exists()]
            raise CheckpointError(f"checkpoint {path} is incomplete: it lacks {', '.join(missing)}")
        return path.parent.parent, path
    if not (path / MODEL_FILE).exists():
        raise CheckpointError(f"{path} has no {MODEL_FILE}; {expected}")
    folder = path / CHECKPOINT_FOLDER
    steps = [f for f in folder.iterdir() if _is_complete(f)] if folder.exists() else []
    if not steps:
        raise CheckpointError(f"{path} holds no finished checkpoint yet; {expected}")
    return path, max(steps, key=lambda f: int(f.name))


def _integer_keys(tree: Any) -> Any:
    """Orbax stores the integer keys of nnx lists as text; attribute names are never digits."""
    if not isinstance(tree, Mapping):
        return tree
    return {int(k) if k.isdigit() else k: _integer_keys(v) for k, v in tree.items()}
