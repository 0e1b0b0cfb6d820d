"""Checks and reads a checkpoint: its digests, its arrays, and that they are the model's."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from oneformer_jax import files
from oneformer_jax.train import seals, stores
from oneformer_jax.train.descriptions import CheckpointError
from oneformer_jax.train.runtime import folders

T = TypeVar("T")
POSITION_FILE = "position/metadata"  # the name of Orbax's JSON handler


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that cannot be read."""


def any_process(flag: bool) -> bool:
    """Tells whether `flag` is set on any process; all must call it."""
    if jax.process_count() == 1:
        return flag
    with jax.transfer_guard("allow"):  # those of process_allgather
        return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def reason(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


@contextlib.contextmanager
def reporting_damage(path: pathlib.Path) -> Iterator[None]:
    """Turns any error of Orbax and TensorStore while reading into one DamagedCheckpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: {reason(error)}\nRemove or rename that folder to go on "
            "from the checkpoint before it."
        ) from error


def checked(value: Any, schema: type[T], what: str) -> T:
    """Converts a part of a checkpoint's position; a CheckpointError names `what` is wrong."""
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{what} are damaged ({error}); remove that checkpoint") from None


def describe(tree: Any) -> dict[str, str]:
    """Describes the arrays in `tree`: {"params/backbone/norm/scale": "float32[96]"}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }


def seal(path: pathlib.Path, described: Mapping[str, str]) -> None:
    """Reads back the checkpoint at `path`, raising any error, and writes its digests."""
    store = path / "state"
    found = stores.describe(store)
    if describe(found) != dict(described):
        raise CheckpointError(f"{store} does not hold the arrays that were written")
    stores.check_chunks(store, found)
    stores.unpack(store, found)
    files.read_json(path / POSITION_FILE)
    seals.write(path)


def check_seal(path: pathlib.Path, part: int = 0, parts: int = 1) -> None:
    with reporting_damage(path):
        if not seals.check(path, part, parts):
            logging.warning(
                "Checkpoint %s is of an earlier version without digests: damage to its data would "
                "go unnoticed",
                path,
            )


def _check_same_tree(path: pathlib.Path, saved: Any, target: Any) -> None:
    """Raises CheckpointError, with the arrays in which the checkpoint and `target` differ."""
    theirs, ours = describe(saved), describe(target)
    names = [n for n in dict.fromkeys((*ours, *theirs)) if theirs.get(n) != ours.get(n)]
    if not names:
        return
    # The model's arrays first: if they differ, so do the optimizer's.
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
        + files.first_few(lines, separator="\n")
        + f"\n{way_out}"
    )


def with_halted(state: dict[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the leaf "halted" to a state of an earlier version; no halted state was ever saved."""
    if "halted" in state or "halted" not in target:
        return state
    halted = jax.make_array_from_callback(
        (), target["halted"].sharding, lambda _: np.zeros((), np.bool_)
    )
    return state | {"halted": halted}


def read_state(path: str | os.PathLike[str], target: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the state of the checkpoint folder `path`, also beside its run; see `restore`.

    All processes must call it; each checks its share of the files.
    """
    path = folders.locate(path)
    wanted = dict(target)
    share = (jax.process_index(), jax.process_count())
    damage: DamagedCheckpoint | None = None
    saved = None
    try:
        check_seal(path, *share)
        with reporting_damage(path):
            saved = stores.describe(path / "state")
            if "halted" not in saved:  # of an earlier version
                wanted.pop("halted", None)
            if describe(saved) == describe(wanted):
                stores.check_chunks(path / "state", saved, *share)
    except DamagedCheckpoint as error:
        damage = error
    if any_process(damage is not None):  # or the others would wait for this process
        raise damage or DamagedCheckpoint(f"checkpoint {path}: another process could not read it")
    _check_same_tree(path, saved, wanted)
    with reporting_damage(path):
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        # Its default would want Orbax's own mark of the end, which a copy into a bucket lacks.
        checkpointer = ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(),
            temporary_path_class=ocp.path.atomicity.AtomicRenameTemporaryPath,
        )
        state = checkpointer.restore(
            folders.literal(path / "state"),
            args=ocp.args.PyTreeRestore(wanted, restore_args=arguments),
        )
    return with_halted(state, target)
