"""Folders of checkpoints: their paths, their completeness, and the remains of interrupted saves."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from absl import logging
from etils import epath

from oneformer_jax import files

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
      FolderError: a URL, or a path that TensorStore or Orbax misreads.
    """
    text = os.fspath(path)
    if "://" in text:
        raise FolderError(
            f"workdir {text} is a URL; use a folder that all hosts see, such as a network file "
            "system or a mounted bucket"
        )
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
    """Gives the path in the form for Orbax, see `_LiteralPath`."""
    return _LiteralPath(path)


def is_step(name: str) -> bool:
    """Tells whether a folder of this name is a checkpoint."""
    return re.fullmatch("0|[1-9][0-9]{0,17}", name) is not None


def is_complete(folder: pathlib.Path) -> bool:
    """Tells whether this is the folder of a complete checkpoint."""
    return is_step(folder.name) and all((folder / part).exists() for part in PARTS)


def finished_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    return sorted(int(folder.name) for folder in directory.iterdir() if is_complete(folder))


def sweep(directory: pathlib.Path) -> None:
    """Removes the remains of an interrupted save, copy or removal."""
    for path in directory.iterdir():
        if _LEFT_OVER.match(path.name):
            logging.warning("Removing %s, left by an interrupted save.", path)
            shutil.rmtree(path)
        elif is_step(path.name) and not is_complete(path):
            name = f"{path.name}.incomplete"
            logging.warning("Checkpoint %s is incomplete; renamed to %s.", path, name)
            rename(path, name)
        elif path.is_dir():
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
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def remove(folder: pathlib.Path) -> None:
    """Removes a checkpoint, after renaming it: a half-removed one is no checkpoint."""
    gone = folder.with_name(folder.name + DELETED)
    folder.rename(gone)
    shutil.rmtree(gone)


def remove_unfinished(directory: pathlib.Path) -> None:
    """Removes the files of a failed save, which also frees their space."""
    for path in directory.iterdir():
        if UNVERIFIED in path.name:
            shutil.rmtree(path, ignore_errors=True)
