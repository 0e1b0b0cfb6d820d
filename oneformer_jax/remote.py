"""Folders and objects of a bucket, named by URLs: gs:// (Google Cloud Storage) and s3://.

`path_of` gives a URL as etils' path, which has the methods of pathlib's and works through fsspec. A
bucket has no folders: a folder exists while an object lies in it, so nobody makes one.
There is no renaming either, but an object appears with all of its content or not at all.

A leaf: it imports nothing of this package, so every room may use it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Iterator
from typing import Any

# Scheme -> module of fsspec's file system, extra of this package.
_SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Patterns and escapes would mean other objects to the libraries.
_URL = re.compile(
    r"(?P<scheme>\w+)://(?P<bucket>[a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?P<key>/(?s:.*))?"
)
_KEY = re.compile(r"[\w.,=+@~ /-]*")


class RemoteError(OSError):
    """A bucket, or an object in it, that cannot be used; the message has the way out."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tells whether `path` is a URL and not a path of this machine."""
    return re.match(r"[A-Za-z][\w+.-]*://", os.fspath(path)) is not None


def path_of(text: str | os.PathLike[str]) -> pathlib.Path:
    """Gives a local path as it is, and a URL as a path with the same methods.

    Raises:
      RemoteError: a URL of another scheme, with characters that the libraries misread, or whose
        library is not installed.
    """
    text = os.fspath(text)
    if not is_remote(text):
        return pathlib.Path(text)
    match = _URL.fullmatch(text)
    if match is None or match["scheme"] not in _SCHEMES:
        known = " or ".join(f"{scheme}://BUCKET/FOLDER" for scheme in _SCHEMES)
        shown = text if text.isprintable() else repr(text)
        raise RemoteError(f"{shown} is no URL that this program reads; use {known}, or a folder")
    key = match["key"] or ""
    if not _KEY.fullmatch(key) or any(part in (".", "..") for part in key.split("/")):
        raise RemoteError(
            f"{text!r} has characters that stand for something else in a bucket; use letters, "
            "digits, and . _ - = + @ ~ , between the slashes"
        )
    module, extra = _SCHEMES[match["scheme"]]
    if importlib.util.find_spec(module) is None:
        raise RemoteError(f'{text} needs {module}: pip install "oneformer-jax[{extra}]"')
    _prepare_libraries()
    from etils import epath

    return epath.Path(text)


def require_local(path: str | os.PathLike[str], what: str) -> None:
    """Raises a RemoteError for a URL; `what` names the path, as in "--output of this mode"."""
    if is_remote(path):
        raise RemoteError(f"{what} cannot be in a bucket ({path}); use a folder, and copy it there")


@functools.cache
def _prepare_libraries() -> None:
    """Sets what the libraries read when they are first used."""
    # With TensorFlow installed etils would take its file system, which no test here has seen.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Asks for the kind of each bucket, with a right that a job need not have.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # They tell of each file that they open, and show the traceback of an error that they raise.
    for name in ("gcsfs", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import fsspec.config

    for name in ("gcs", "gs", "s3"):  # others write there, too
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def _file_system(path: str | os.PathLike[str]) -> Any:
    _prepare_libraries()
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


def bucket_and_key(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Splits a URL into the name of its bucket and the name of the object or folder in it."""
    bucket, _, key = os.fspath(path).partition("://")[2].partition("/")
    return bucket, key


@contextlib.contextmanager
def reporting(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of the libraries into a RemoteError of one line, which names `path`."""
    try:
        yield
    except RemoteError:
        raise
    except Exception as error:
        raise RemoteError(f"{os.fspath(path)}: {explain(path, error)}") from error


def explain(path: str | os.PathLike[str], error: Exception) -> str:
    """Says what is wrong and the way out, from the many types and texts of the libraries."""
    scheme = os.fspath(path).partition("://")[0]
    login = {
        "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS "
        "to a key file",
        "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    }[scheme]
    text = " ".join(str(error).split()) or type(error).__name__
    short = text if len(text) <= 200 else text[:200] + "..."
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError) or re.search("NoSuchBucket|NOT_FOUND", text):
        bucket = bucket_and_key(path)[0]
        return f"there is no bucket {bucket!r}; make it, or mend its name"
    if "Credentials" in kind or re.search(
        r"\b401\b|Anonymous caller|Invalid Credentials|Unauthorized|DefaultCredentials", text
    ):
        return f"there are no valid credentials ({short}); {login}"
    if isinstance(error, PermissionError) or re.search(
        r"\b403\b|Forbidden|PERMISSION_DENIED|Access ?Denied", text
    ):
        return f"permission is denied ({short}); ask its owner for the right to read and write"
    return f"the bucket cannot be reached ({kind}: {short}); start the same command again"


def check(path: str | os.PathLike[str], *, writing: bool = False) -> None:
    """Raises a RemoteError unless the bucket of a URL exists and can be read (and written).

    Does nothing for a local path. Two or three requests.
    """
    if not is_remote(path):
        return
    found = path_of(path)
    bucket, key = bucket_and_key(found)
    with reporting(found):
        system = _file_system(found)
        if os.fspath(found).startswith("gs:"):
            system.call("GET", "b/{}/o", bucket, prefix=key, maxResults=1, json_out=True)
        else:
            system.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        if writing:
            probe = f"{os.fspath(found)}/.probe.{uuid.uuid4().hex[:8]}"
            system.pipe_file(probe, b"")
            system.rm_file(probe)


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """Lists all objects below a folder: name relative to it -> bytes. Empty if it is missing."""
    prefix = len("/".join(bucket_and_key(folder))) + 1
    try:
        found = _file_system(folder).find(os.fspath(folder), detail=True)
    except FileNotFoundError:
        return {}
    return {
        name[prefix:]: int(entry["size"])
        for name, entry in found.items()
        if entry["type"] == "file" and len(name) > prefix
    }


def names(folder: pathlib.Path) -> list[str]:
    """Lists the names directly in a folder. Empty if it is missing."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def read(path: str | os.PathLike[str], limit: int) -> bytes:
    """Reads an object, or `limit` + 1 bytes of a larger one; FileNotFoundError if it is missing."""
    system = _file_system(path)
    if system.info(os.fspath(path))["size"] == 0:  # no part of it can be asked for
        return b""
    return system.cat_file(os.fspath(path), start=0, end=limit + 1)


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes an object with all of its content, or not at all; RemoteError if that fails."""
    with reporting(path):
        _file_system(path).pipe_file(os.fspath(path), content)


def upload(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies all files below a folder of this machine into a folder of a bucket."""
    for file in sorted(pathlib.Path(folder).rglob("*")):
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            write(f"{os.fspath(target)}/{name}", file.read_bytes())


def remove(path: pathlib.Path) -> None:
    """Removes an object and all below it; nothing if there is none."""
    system = _file_system(path)
    below = [f"{os.fspath(path)}/{name}" for name in sizes(path)]
    if below:
        system.rm(below)
    with contextlib.suppress(FileNotFoundError):
        system.rm_file(os.fspath(path))


def move(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Copies all objects below a folder, within the bucket, then removes them."""
    system = _file_system(folder)
    for name in sizes(folder):
        system.copy(f"{os.fspath(folder)}/{name}", f"{os.fspath(target)}/{name}")
    remove(folder)


def tensorstore_spec(path: str | os.PathLike[str]) -> dict[str, str]:
    """Describes a folder, local or not, as a key-value store of TensorStore."""
    if not is_remote(path):
        return {"driver": "file", "path": f"{os.fspath(path)}/"}
    bucket, key = bucket_and_key(path)
    driver = {"gs": "gcs", "s3": "s3"}[os.fspath(path).partition("://")[0]]
    return {"driver": driver, "bucket": bucket, "path": f"{key}/"}


class Growing(io.RawIOBase):
    """An object that grows, as a file to write into: `store` replaces it by all that was written.

    An object cannot be appended to. `flush` does nothing, since libraries call it for each line.
    """

    def __init__(self, path: str | os.PathLike[str], append: bool = False):
        """Args:
        path: of the object.
        append: begin with what it holds.
        """
        self._path = path_of(path)
        held = append and self._path.exists()
        self._content = bytearray(self._path.read_bytes() if held else b"")
        self._stored = len(self._content) if held else -1

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._content += data
        return len(data)

    def __len__(self) -> int:
        return len(self._content)

    def store(self) -> None:
        """Writes the object, if it has grown."""
        if self._stored != len(self._content):
            write(self._path, bytes(self._content))
            self._stored = len(self._content)

    def close(self) -> None:
        if not self.closed:
            self.store()
        super().close()
