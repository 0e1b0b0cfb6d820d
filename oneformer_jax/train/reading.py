"""Checking and reading a checkpoint: its digests, its arrays, and whether they are the model's."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from oneformer_jax import files
from oneformer_jax.train import seals, stores
from oneformer_jax.train.descriptions import CheckpointError
from oneformer_jax.train.runtime import folders

POSITION_FILE = "position/metadata"  # as Orbax's JSON handler names it


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that cannot be read."""


def any_process(flag: bool) -> bool:
    """Tells whether `flag` is set on any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


@contextlib.contextmanager
def reporting_damage(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise while reading into one clear error."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: {reason(error)}\nRemove or rename that folder to go on "
            "from the checkpoint before it."
        ) from error


def describe(tree: Any) -> dict[str, str]:
    """{"params/backbone/norm/scale": "float32[96]"} of the arrays in `tree`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }


def seal(path: pathlib.Path, described: Mapping[str, str]) -> None:
    """Reads back what was written to `path`, and writes its digests.

    Raises:
      Exception: something is missing, or cannot be read.
    """
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
                "Checkpoint %s has no digests, being of an earlier version: damage to its data "
                "would go unnoticed",
                path,
            )


def _check_same_tree(path: pathlib.Path, saved: Any, target: Any) -> None:
    """CheckpointError that lists the arrays in which the checkpoint and `target` differ."""
    theirs, ours = describe(saved), describe(target)
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
        + files.first_few(lines, separator="\n")
        + f"\n{way_out}"
    )


def with_halted(state: dict[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an earlier version, which has no leaf "halted": no such state was ever saved."""
    if "halted" in state or "halted" not in target:
        return state
    halted = jax.make_array_from_callback(
        (), target["halted"].sharding, lambda _: np.zeros((), np.bool_)
    )
    return state | {"halted": halted}


def read_state(path: str | os.PathLike[str], target: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the checkpoint folder `path`, also beside the run that owns it; see `restore`.

    With several processes all must call it; each checks its share of the files.
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
    if any_process(damage is not None):  # nobody may wait for those that cannot read it
        raise damage or DamagedCheckpoint(f"checkpoint {path}: another process could not read it")
    _check_same_tree(path, saved, wanted)
    with reporting_damage(path):
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        state = ocp.PyTreeCheckpointer().restore(
            folders.literal(path / "state"),
            args=ocp.args.PyTreeRestore(wanted, restore_args=arguments),
        )
    return with_halted(state, target)
