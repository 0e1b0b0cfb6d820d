"""Checks of the working directory: one run at a time, writable, with room for a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from oneformer_jax import files, remote
from oneformer_jax.train.runtime import folders, lease, preemption
from oneformer_jax.types import Metadata

LOCK_FILE = "LOCK"


class WorkdirError(ValueError):
    """The working directory cannot be used."""


@contextlib.contextmanager
def hold(workdir: str | os.PathLike) -> Iterator[None]:
    """Makes the folder and keeps other training runs out of it; the first process does it for all.

    The lock is the kernel's, so it ends with the process; that of a bucket is a `lease.Lease`.

    Raises:
      WorkdirError: another run holds it, or it cannot be written.
      FolderError, RemoteError: see `folders.locate` and `remote.check`.
    """
    folder = folders.locate(workdir)
    if jax.process_index() != 0:
        yield
        return
    if remote.is_remote(folder):
        with _holding_in_bucket(folder):
            yield
        return
    import fcntl  # not on Windows, where prediction must work

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise WorkdirError(
            f"workdir {folder} cannot be written: {error.strerror}; use another --workdir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(folder, file.read()) from None
        except OSError as error:  # a file system without locks
            logging.warning(
                "%s cannot be locked (%s): make sure that no second run uses it", folder, error
            )
        file.truncate(0)
        file.write(json.dumps(lease.owner()))
        file.flush()
        yield
        file.truncate(0)


@contextlib.contextmanager
def _holding_in_bucket(folder: pathlib.Path) -> Iterator[None]:
    remote.check(folder, writing=True)

    def lost() -> None:
        logging.error(
            "Another run has taken over workdir %s, since this one showed no sign of life for more "
            "than %.0f s: ending at once",
            *(folder, lease.EXPIRES),
        )
        preemption.end_process(1)

    try:
        held = lease.Lease(folder, LOCK_FILE, lost)
    except lease.Held as error:
        raise _in_use(folder, error.text) from None
    try:
        yield
    finally:
        held.release()


def _in_use(folder: pathlib.Path, text: str) -> WorkdirError:
    return WorkdirError(
        f"workdir {folder} is in use by another run ({_owner(text)}); wait for it, stop it, or use "
        "another --workdir"
    )


def _owner(text: str) -> str:
    try:
        found = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f"process {found['process']} on {found['host']} since {since}"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return "which has just started"


def check_room(workdir: str | os.PathLike, state: Any) -> None:
    """Raises WorkdirError without room for one checkpoint of `state` (arrays or their shapes).

    A bucket has no limit.
    """
    if remote.is_remote(workdir):
        return
    need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(folders.locate(workdir)).free
    if free < need:
        raise WorkdirError(
            f"workdir {workdir} has {free / 2**30:.2f} GiB free, but one checkpoint takes about "
            f"{need / 2**30:.2f} GiB: free some space, or use another --workdir"
        )


def is_full(error: BaseException) -> bool:
    """Tells whether `error` or one of its causes means that a disk is full."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    words = ("No space left", "Disk quota exceeded", "File too large")
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in full or any(word in str(cause) for word in words):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


# ------------------------------------------------------------------ differences of two JSON files


def differing_keys(theirs: Any, ours: Any, name: str = "") -> Iterator[str]:
    """Yields the leaves in which two JSONs differ: "backbone.depth (there 50, here 101)"."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys((*theirs, *ours)):
            inner = f"{name}.{key}" if name else str(key)
            yield from differing_keys(theirs.get(key), ours.get(key), inner)
    elif theirs != ours:
        yield f"{name} (there {_short(theirs)}, here {_short(ours)})"


def differing_classes(theirs: Metadata, ours: Metadata) -> str:
    """Describes the differences of two datasets' classes in names, kinds and order, or "".

    The name of a dataset, its colours and its ids in files are not part of a model.
    """
    there, here = theirs.classes(), ours.classes()
    if len(there) != len(here):
        return f"class_names (there {len(there)} of them, here {len(here)})"
    texts = (
        f"class_names[{number}] (there {old}, here {new})"
        for number, (old, new) in enumerate(zip(there, here, strict=True))
        if old != new
    )
    return files.first_few(texts)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
