"""Reads and writes the files of a dataset; no write is left half-done."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from oneformer_jax.files import FileError, first_few, read_bytes
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.records import RecordError

TEXT_LIMIT = 1 << 30  # bytes of a text, or of a labelling tool's file
_SHOWN_NAMES = 8


def found_in(path: Path) -> str:
    """Lists what lies at or near `path`, for error messages."""
    folder = path
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"{folder} holds {first_few(names, _SHOWN_NAMES) or 'nothing'}"


def require(path: Path, what: str, layout: str, *, folder: bool = False) -> None:
    """Raises FileNotFoundError for a missing file or folder; says what lies there instead."""
    if not (path.is_dir() if folder else path.is_file()):
        raise FileNotFoundError(f"no {what} {path}: {layout}; {found_in(path)}")


def read_file(path: Path, hint: str = "restore the file") -> bytes:
    """Reads an image file that belongs to a record; `hint` names the way out.

    Raises:
      RecordError: it is missing, cannot be read, is no regular file, or is too large for an image.
    """
    try:
        return images.read_file(path)
    except images.ImageError as error:
        reason = str(error).removeprefix(str(path)).strip()
        raise RecordError(f"{path}: cannot be read ({reason}); {hint}") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text in UTF-8, with or without a byte order mark; FileError if it is none."""
    try:
        return read_bytes(path, limit=TEXT_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not a text in UTF-8 ({error}); store it anew") from None


def sha256(path: str | os.PathLike) -> str:
    """Returns SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until the content of a file is on the disk, safe from a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class WriteError(OSError):
    """Records cannot be written; the message names the folder and the way out."""


@contextlib.contextmanager
def writing(folder: Path, failure: type[Exception] = OSError) -> Iterator[None]:
    """Turns a `failure` to write below `folder` into a WriteError.

    Args:
      folder: an existing folder.
      failure: OSError, or RuntimeError, which ArrayRecord raises when the disk is full.
    """
    try:
        yield
    except WriteError:
        raise
    except failure as error:
        free = shutil.disk_usage(folder).free / 1e9
        raise WriteError(
            f"cannot write to {folder} ({error}); {free:.1f} GB are free there. Make room, or "
            "choose another folder. The same command resumes the writing"
        ) from error


@contextlib.contextmanager
def exclusive(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lets one process at a time prepare below `folder`; others call `waiting`, then wait."""
    import fcntl  # not on Windows, where prediction must work

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".prepare.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, also when the process dies
