"""Checkpoints of a run, and the files that say what its working directory holds.

workdir/
  config.json      the whole configuration of the last start
  model.json       OneFormerConfig.to_dict(): what is needed to build the model again
  metadata.json    classes of the data set
  checkpoints/<step>/
    state/         {step, params, stats, opt[, ema]} as Orbax writes pytrees
    position/      where the input stands, and other small JSON values
    scores.json    of an evaluation at that step, once there was one
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

from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import folders
from oneformer_jax.train.workdir import differing_classes, differing_keys, first_few, is_full
from oneformer_jax.types import Metadata

CONFIG_FILE, MODEL_FILE, METADATA_FILE = "config.json", "model.json", "metadata.json"
CHECKPOINT_FOLDER = "checkpoints"
SCORES_FILE = "scores.json"


class CheckpointError(ValueError):
    """A checkpoint or a working directory that cannot be used as asked."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that cannot be read."""


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
    follows it; the model and the classes may not, but the folder, ids and colours of the dataset
    may. With several hosts the first one writes.

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
        if name == MODEL_FILE:
            differing = first_few(
                list(differing_keys(_with_defaults(theirs), json.loads(json.dumps(ours))))
            )
        else:
            differing = differing_classes(_metadata_of(theirs, workdir / name), metadata)
        if differing:
            what = "another model" if name == MODEL_FILE else "a model of other classes"
            raise CheckpointError(
                f"workdir {workdir} holds {what}: {name} differs in {differing}; use another "
                "--workdir, or the settings of that one"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, ours in files.items():
            if not (workdir / name).exists():
                write_json(workdir / name, ours)
        write_json(workdir / CONFIG_FILE, config_json)


def _with_defaults(model: Mapping) -> Mapping:
    """The fields of a model, those that its version did not have yet at their defaults."""
    try:
        return json.loads(json.dumps(OneFormerConfig.from_dict(dict(model)).to_dict()))
    except (KeyError, TypeError, ValueError):  # of another kind; the comparison tells
        return model


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
            folders.sweep(self.directory)
        _wait_for_all("the checkpoint folder is ready")
        self._best_metric = best_metric
        self._keep, self._keep_best = keep, keep_best
        self._scores: dict[int, Mapping[str, float]] = {}
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=self),
        )
        for step in self.all_steps():
            path = self.directory / str(step) / SCORES_FILE
            if path.exists():
                self._scores[step] = read_json(path, expected="scores of an evaluation")

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax asks which checkpoints stay: the last and the best ones."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = self._ranking()[: self._keep_best]
        return [step in steps[-self._keep :] or step in best for step in steps]

    def _ranking(self) -> list[int]:
        """Steps with a score by `best_metric`, the best first; of equal ones the later."""
        found = {step: scores.get(self._best_metric) for step, scores in self._scores.items()}
        good = {step: s for step, s in found.items() if s is not None and not math.isnan(s)}
        return sorted(good, key=lambda step: (good[step], step), reverse=True)

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> bool:
        """Starts saving; returns once the arrays are copied, so that the step may donate them.

        An earlier save that is still writing is waited for, and its failure is raised here.

        Args:
          step: number of the checkpoint.
          state: pytree of arrays.
          position: small JSON values: where the input stands.

        Returns:
          False if this step is saved already (a run that ends on a saving step), True otherwise.

        Raises:
          CheckpointError: there is a later checkpoint, or an earlier save failed.
        """
        latest = self.latest_step()
        if latest == step:
            return False
        if latest is not None and latest > step:
            raise CheckpointError(
                f"cannot save step {step}: {self.directory} already holds step {latest}; "
                "remove the later checkpoints, or use another --workdir"
            )
        with self._reporting_failure():
            return self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(dict(position))
                ),
            )

    def record(self, step: int, scores: Mapping[str, float | None]) -> None:
        """Notes the scores of the checkpoint of `step`, for keep-best; None is "not defined"."""
        self.wait_until_finished()
        self._scores[step] = {name: float(v) for name, v in scores.items() if v is not None}
        folder = self.directory / str(step)
        if jax.process_index() == 0 and folder.exists():
            write_json(folder / SCORES_FILE, self._scores[step])

    @contextlib.contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        """Turns what Orbax raises while writing into one clear error."""
        try:
            yield
        except Exception as error:
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            good = folders.finished_steps(self.directory)
            last = f"the last good one is step {good[-1]}" if good else "there is none yet"
            hint = "its disk is full; free some space" if is_full(error) else "see to that folder"
            raise CheckpointError(
                f"a checkpoint could not be written into {self.directory}: {reason}. Of this run "
                f"{last}; {hint} and start the same command again"
            ) from error

    def wait_until_finished(self) -> None:
        """Blocks until the save under way is on disk; CheckpointError if that failed."""
        with self._reporting_failure():
            self._manager.wait_until_finished()

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints, ascending; one that is being written counts."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the last checkpoint, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the best checkpoint by `best_metric`, or None if none has that score."""
        kept = self.all_steps()
        return next((step for step in self._ranking() if step in kept), None)

    def restore_newest(self, target: Any) -> tuple[int, Any, dict[str, Any]]:
        """`restore` of the newest checkpoint that can be read: (step, state, position).

        Newer ones that are damaged are renamed to "<step>.damaged", with an error in the log. With
        several processes all take the same one.

        Raises:
          CheckpointError: there is none, none can be read, or it is of another model.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.all_steps()):
            state = position = None
            try:
                state, position = self.restore(step, target)
            except DamagedCheckpoint as error:
                damaged[step] = error
            if _any_process(step in damaged):
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
        _wait_for_all("a damaged checkpoint is set aside")
        self._scores.pop(step, None)
        self._manager.reload()

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
                    state=_restore_onto(target), position=ocp.args.JsonRestore()
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


def _any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"oneformer_jax: {what}")


@contextlib.contextmanager
def _reporting_damage(path: epath.Path):
    """Turns whatever Orbax and TensorStore raise while reading into one clear error."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise DamagedCheckpoint(
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
        + first_few(lines, "\n")
        + f"\n{way_out}"
    )


def _restore_onto(target: Any) -> ocp.args.PyTreeRestore:
    args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=args)


def read_state(path: epath.Path, target: Any) -> Any:
    """The state of the checkpoint folder `path`, beside the run that owns it; see `restore`."""
    _check_same_tree(path, _saved_tree(path), target)
    with _reporting_damage(path):
        return ocp.PyTreeCheckpointer().restore(path / "state", args=_restore_onto(target))


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


def _metadata_of(found: Mapping, path: epath.Path) -> Metadata:
    try:
        return Metadata.from_json(json.dumps(found))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


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
    metadata = _metadata_of(found, workdir / METADATA_FILE)
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
        if not folders.is_complete(path):
            missing = [part for part in folders.PARTS if not (path / part).exists()]
            raise CheckpointError(f"checkpoint {path} is incomplete: it lacks {', '.join(missing)}")
        return path.parent.parent, path
    if not (path / MODEL_FILE).exists():
        raise CheckpointError(f"{path} has no {MODEL_FILE}; {expected}")
    folder = path / CHECKPOINT_FOLDER
    steps = folders.finished_steps(folder) if folder.exists() else []
    if not steps:
        raise CheckpointError(f"{path} holds no finished checkpoint yet; {expected}")
    return path, folder / str(steps[-1])


def _integer_keys(tree: Any) -> Any:
    """Orbax stores the integer keys of nnx lists as text; attribute names are never digits."""
    if not isinstance(tree, Mapping):
        return tree
    return {int(k) if k.isdigit() else k: _integer_keys(v) for k, v in tree.items()}
