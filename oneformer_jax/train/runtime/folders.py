"""Folders of checkpoints: their paths, their completeness, and the remains of interrupted saves."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from oneformer_jax import files, remote

CHECKPOINT_FOLDER = "checkpoints"
# Orbax writes into a folder with this in its name and renames it when all files are complete.
TEMPORARY = ".orbax-checkpoint-tmp"
UNVERIFIED = ".unverified"  # complete, but not yet read back
DELETED = ".deleted"  # being removed
_LEFT_OVER = re.compile(
    "[0-9]+(" + "|".join(map(re.escape, (TEMPORARY, UNVERIFIED, DELETED))) + ")"
)
PARTS = ("_CHECKPOINT_METADATA", "state", "position")

# Orbax and etils read these as buckets: as the first folder of a path, or as ".../gs:/...".
_BUCKETS = ("gs", "s3", "az", "hf")


class FolderError(ValueError):
    """A path that cannot be a run's folder."""


def locate(path: str | os.PathLike) -> pathlib.Path:
    """Gives the absolute path of a working directory or of a folder in it; "~" is expanded.

    Raises:
      FolderError: a path that TensorStore or Orbax misreads, or a bucket that Orbax cannot use.
      RemoteError: a URL that `remote.path_of` refuses.
    """
    text = os.fspath(path)
    if remote.is_remote(text):
        if not text.startswith("gs://"):
            raise FolderError(
                f"workdir {text} cannot hold checkpoints: Orbax writes them to gs:// only; use "
                "that, or a folder that all hosts see, such as a mounted bucket"
            )
        return remote.path_of(text)
    found = pathlib.Path(os.path.abspath(os.path.expanduser(text)))
    reason = _not_carried(found)
    if reason:
        raise FolderError(
            f"workdir {str(found)!r} cannot hold checkpoints: its path {reason}; rename that "
            "folder, or use another --workdir"
        )
    return found


def _not_carried(path: pathlib.Path) -> str:
    """Says why TensorStore or Orbax would misread the path; "" if they would not."""
    text = str(path)
    if "\0" in text:
        return "has a NUL character"
    if "\\" in text:
        return "has a backslash, which TensorStore reads as a slash"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8, which TensorStore needs"
    if len(path.parts) > 1 and path.parts[1] in _BUCKETS:
        return f"begins with /{path.parts[1]}, which Orbax reads as a bucket"
    if any(part.endswith("gs:") for part in path.parts):
        return "has a folder that ends in 'gs:', which Orbax reads as a bucket"
    return ""


class _LiteralPath(type(epath.Path("/"))):
    """A path of Orbax whose own characters are literal in `glob`.

    Orbax finds the processes' files by a pattern over the full path: below "runs/run[1]" it would
    find nothing, and commit a checkpoint without its index.
    """

    def glob(self, pattern: str) -> Iterator[_LiteralPath]:
        *folders, last = pattern.split("/")
        folder = self.joinpath(*folders)
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return iter([folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, last)])


def literal(path: pathlib.Path) -> epath.Path:
    """Gives the path in the form for Orbax, see `_LiteralPath`; a URL has no patterns."""
    return path if remote.is_remote(path) else _LiteralPath(path)


def is_step(name: str) -> bool:
    """Tells whether a folder of this name is a checkpoint."""
    return re.fullmatch("0|[1-9][0-9]{0,17}", name) is not None


def is_complete(folder: pathlib.Path) -> bool:
    """Tells whether this is the folder of a complete checkpoint."""
    if not is_step(folder.name):
        return False
    if remote.is_remote(folder):
        return {*PARTS} <= {*remote.names(folder)} and not _marker(folder).exists()
    # In a copy of a bucket the marker is a file.
    return all((folder / part).exists() for part in PARTS) and not _marker(folder).is_file()


def finished_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; none if it is missing."""
    return sorted(int(path.name) for path in _paths_in(directory) if is_complete(path))


def _paths_in(directory: pathlib.Path) -> list[pathlib.Path]:
    return [directory / name for name in remote.names(directory)]


# ------------------------------------------------------------------ saving and removing

# A folder of this machine is written under another name and renamed. A bucket cannot rename: there
# an object beside the folder, "<step>.unverified", says that the folder is no checkpoint (yet, or
# any more).


def _marker(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(folder.name + UNVERIFIED)


def begin(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Names the folder to write the checkpoint of `step` into, which nobody takes for one yet."""
    folder = directory / str(step)
    if not remote.is_remote(folder):
        return _marker(folder)
    if jax.process_index() == 0:
        files.write_atomically(_marker(folder), "")
        with remote.reporting(folder):
            remote.remove(folder)  # an interrupted save that could not be removed
    return folder


def commit(written: pathlib.Path, step: int) -> None:
    """Makes what was written after `begin` the checkpoint of `step`."""
    if remote.is_remote(written):
        remote.remove(_marker(written))
    else:
        rename(written, str(step))


def sweep(directory: pathlib.Path) -> None:
    """Removes the remains of an interrupted save, copy or removal."""
    for path in _paths_in(directory):
        if _LEFT_OVER.match(path.name):
            logging.warning("Removing %s, left by an interrupted save.", path)
            _remove_left_over(path)
    for path in _paths_in(directory):  # without what a marker in a bucket took with it
        if is_step(path.name) and not is_complete(path):
            name = f"{path.name}.incomplete"
            logging.warning("Checkpoint %s is incomplete; renamed to %s.", path, name)
            rename(path, name)
        elif not remote.is_remote(path) and path.is_dir():
            sweep_files(path)


def sweep_files(folder: pathlib.Path, older_than: float = 0.0) -> None:
    """Removes the temporary files that a killed `files.replacing` left in a folder.

    Args:
      folder: need not exist.
      older_than: seconds; another process may still write younger ones.
    """
    for path in files.remove_leftovers(folder, older_than):
        logging.warning("Removed %s, left by a write that was interrupted.", path)


def rename(folder: pathlib.Path, name: str) -> None:
    """Renames `folder`, replacing a folder of that name."""
    aside = folder.parent / name
    if remote.is_remote(folder):
        remote.remove(aside)
        return remote.move(folder, aside)
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def remove(folder: pathlib.Path) -> None:
    """Removes a checkpoint, after renaming or marking it: a half-removed one is no checkpoint."""
    if remote.is_remote(folder):
        files.write_atomically(_marker(folder), "")
        return _remove_left_over(_marker(folder))
    gone = folder.with_name(folder.name + DELETED)
    folder.rename(gone)
    shutil.rmtree(gone)


def remove_unfinished(directory: pathlib.Path) -> None:
    """Removes the files of a failed save, which also frees their space."""
    with contextlib.suppress(OSError):  # the next start removes the rest
        for path in _paths_in(directory):
            if UNVERIFIED in path.name:
                _remove_left_over(path, ignore_errors=True)


def _remove_left_over(path: pathlib.Path, ignore_errors: bool = False) -> None:
    """Removes a folder that is no checkpoint; of a marker its folder first."""
    marked = path.with_name(path.name.removesuffix(UNVERIFIED))
    if remote.is_remote(path):
        if marked != path:
            remote.remove(marked)
        remote.remove(path)
    elif path.is_file():  # in a copy of a bucket
        shutil.rmtree(marked, ignore_errors=True)
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors)
