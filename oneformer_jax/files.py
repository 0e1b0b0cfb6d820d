"""Files of every room: bounded reading, JSON by a schema, atomic writing, lists of names in words.

A URL of a bucket (see `remote`) names a file like a path does.

A leaf: every room may use it, also the loader's workers.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import pathlib
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

import msgspec

from oneformer_jax import remote

T = TypeVar("T")
# Neither waits for the writer of a pipe, nor reads text; Windows has other flags than POSIX.
_PATIENT = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
# Names that `replacing` gives.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")

# Descriptions of models, datasets and checkpoints are kilobytes; the index of a model in hundreds
# of shards is under a megabyte. A text of this size becomes at most about 500 MB of objects.
JSON_LIMIT = 16 << 20


class FileError(ValueError):
    """A file that cannot be used; the message names it, says why, and the way out."""


def open_regular(path: str | os.PathLike[str], *, error: type[Exception] = FileError) -> BinaryIO:
    """Opens a regular file for reading.

    A pipe or a device, which may never end, is refused before anything waits for it.

    Raises:
      error: it is missing, not a regular file, or cannot be read; the message names it.
    """
    if remote.is_remote(path):
        with _reading_remotely(path, error):
            return remote.path_of(path).open("rb")
    try:
        handle = os.open(path, os.O_RDONLY | _PATIENT)
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror})") from cause
    except ValueError:  # it has a zero
        raise error(f"{os.fspath(path)!r} is no name of a file") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(f"{path} is not a regular file")
    return open(handle, "rb")


@contextlib.contextmanager
def _reading_remotely(path: str | os.PathLike[str], error: type[Exception]) -> Iterator[None]:
    """Turns the errors of reading an object into `error`."""
    try:
        with remote.reporting(path):
            yield
    except remote.RemoteError as cause:
        if isinstance(cause.__cause__, FileNotFoundError):
            raise error(f"{path} is missing") from None
        raise error(str(cause)) from cause


def read_bytes(
    path: str | os.PathLike[str], *, limit: int, error: type[Exception] = FileError
) -> bytes:
    """Reads a regular file of at most `limit` bytes; see `open_regular`.

    Raises:
      error: it is missing, not a regular file, cannot be read, or is larger; the message names it.
    """
    if remote.is_remote(path):
        with _reading_remotely(path, error):
            data = remote.read(remote.path_of(path), limit)
    else:
        with open_regular(path, error=error) as file:
            try:
                # No more than its size: Python sets aside all of the memory that is asked for.
                size = min(limit, os.fstat(file.fileno()).st_size) + 1
                data = file.read(size)
                if len(data) == size <= limit:  # it has grown, or does not tell its size
                    data += file.read(limit + 1 - size)
            except OSError as cause:
                raise error(f"{path} cannot be read ({cause.strerror})") from cause
    if len(data) > limit:
        raise error(f"{path} has more than {limit:,} bytes, the most that such a file may have")
    return data


def read_json(
    path: str | os.PathLike[str],
    schema: type[T] = dict[str, Any],  # type: ignore[assignment]
    *,
    limit: int = JSON_LIMIT,
    error: type[Exception] = FileError,
) -> T:
    """Reads a JSON file whose content must be of the type `schema`.

    Args:
      path: of the file.
      schema: what `msgspec` can decode: a Struct, dict[str, int], ...
      limit: the most bytes that the file may have.
      error: what is raised.

    Raises:
      error: see `read_bytes`; or the content is not JSON or not of that type, in which case the
        message has the place, as in `$.layers[3].width`.
    """
    return parse_json(read_bytes(path, limit=limit, error=error), schema, path, error=error)


def parse_json(
    data: bytes | str,
    schema: type[T] = dict[str, Any],  # type: ignore[assignment]
    where: str | os.PathLike[str] = "the text",
    *,
    error: type[Exception] = FileError,
) -> T:
    """Decodes JSON that must be of the type `schema`; `where` names it in the `error`.

    NaN and Infinity, which JSON does not have, are refused.
    """
    try:
        return msgspec.json.decode(data, type=schema)
    except msgspec.ValidationError as cause:
        raise error(f"{where} holds an unexpected value: {cause}") from None
    except (msgspec.DecodeError, ValueError) as cause:
        raise error(f"{where} is damaged ({cause}); restore or fetch it again") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply for a file of this kind") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a temporary name beside `path`; what lies there becomes `path` if the block ends well.

    A file's content is on the disk before it gets its name: after a power cut `path` is old or new,
    never half. A block that raises leaves `path` as it was and no temporary file. The folder of
    `path` must exist, and it is none of a bucket.
    """
    remote.require_local(path, "this output")
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str], older_than: float = 60.0) -> list[str]:
    """Removes the files that `replacing` left directly in `folder` when its process was killed.

    Younger files, by `older_than` seconds, may belong to a process that writes just now. A folder
    that is missing, or in a bucket, has none. Returns the paths of the removed files.
    """
    removed: list[str] = []
    if remote.is_remote(folder):
        return removed
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    if time.time() - entry.stat().st_mtime >= older_than:
                        os.unlink(entry.path)
                        removed.append(entry.path)
    return removed


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file (text as UTF-8) with all of its content, or not at all: see `replacing`."""
    content = content.encode() if isinstance(content, str) else content
    if remote.is_remote(path):
        return remote.write(remote.path_of(path), content)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder and those above it, if they are missing; a bucket needs none."""
    if not remote.is_remote(path):
        os.makedirs(path, exist_ok=True)


def user_cache() -> pathlib.Path:
    """Gives this program's folder among the user's caches; it need not exist yet."""
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return caches.expanduser() / "oneformer_jax"


def first_few(items: Iterable[Any], shown: int = 5, separator: str = ", ") -> str:
    """Lists the first items and how many more there are: "a, b and 3 more"."""
    texts = [str(item) for item in items]
    more = len(texts) - shown
    text = separator.join(texts[:shown])
    if more <= 0:
        return text
    return f"{text}{' ' if separator.strip() == ',' else separator}and {more:,} more"


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Lists the known words of the most similar spelling, nearest first, `count` at most."""
    return difflib.get_close_matches(str(word), list(known), count, cutoff)


def did_you_mean(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """Suggests the nearest known words: " (did you mean 'a' or 'b'?)", or "" if none is near."""
    near = nearest(word, known, count, cutoff)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
