"""Files from the web and from buckets, kept in the user's folder of caches.

cache/weights/<digest of the address>.lock
cache/weights/<digest of the address>/
  NAME              the file, whole
  NAME.json         its `_Record`
  NAME.part         what has come of it so far, and NAME.part.json; the next try goes on from there
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import pathlib
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import filelock
import fsspec
import msgspec
import requests
from absl import logging
from tqdm.auto import tqdm

from oneformer_jax import files, remote
from oneformer_jax.files import FileError
from oneformer_jax.weights.pickle_reader import quoted

MOST_BYTES = 64 << 30  # the largest published model has about 6 GiB
ATTEMPTS = 4  # in a row that bring nothing new
TIMEOUT = (10, 60)  # seconds until a connection stands, and between two pieces
_PIECE = 1 << 16  # bytes; those of a piece that breaks off are lost
_BUSY = (408, 425, 429, 500, 502, 503, 504)
pause: Callable[[float], None] = time.sleep


class _Record(msgspec.Struct):
    """Describes a file of the cache.

    Attributes:
      address: where it is from, without what may be secret.
      tag: changes when the content there does; "" if the server gives none.
      size: in bytes.
      sha256: of a whole file, in hexadecimal.
    """

    address: str
    tag: str
    size: int
    sha256: str = ""


class _Passing(Exception):
    """A fault that may have passed at the next try; the message completes "ADDRESS: "."""


class _Away(_Passing):
    """The client has tried often enough by itself."""


class _Unfit(_Passing):
    """The server does not go on with what has come, which is useless therefore."""


class _Stream(NamedTuple):
    """The content of a remote file from the byte `start` on.

    Attributes:
      start: its first byte: the one asked for, or 0.
      size: bytes of the whole file, None if unknown.
      tag: see `_Record`.
      sha256: of the whole file, as the server tells it, or "".
      pieces: the bytes.
    """

    start: int
    size: int | None
    tag: str
    sha256: str
    pieces: Iterator[bytes]


class _Source(NamedTuple):
    """An address and how it is read.

    Attributes:
      address: for messages, without what may be secret.
      open: (start, tag of that start) -> a stream of the rest if that is still the content, else of
        the whole; None if the content still is that of the tag and `start` is -1.
    """

    address: str
    open: Callable[[int, str], contextlib.AbstractContextManager[_Stream | None]]


def offline() -> bool:
    """Tells whether HF_HUB_OFFLINE forbids the network, as it does for the hub's own client."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def shown(address: str) -> str:
    """Returns an address without user, password, query and fragment, which may be secret."""
    scheme, _, rest = address.partition("://")
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    more = "?..." if "?" in rest.partition("#")[0] else ""
    return quoted(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{more}", 300)


def from_web(address: str) -> pathlib.Path:
    """Fetches a file by http(s); `#sha256=HEX` at the end of the address is compared.

    Raises:
      FileError: an address that is not safe or not there, no network, or other content.
    """
    where = shown(address)
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as error:
        raise FileError(f"{where} is no web address: {error}") from None
    if "@" in parts.netloc:
        raise FileError(
            f"{where}: an address with a password ends up in logs; leave it out, and put it into "
            "~/.netrc, which is read"
        )
    pinned = ""
    if parts.fragment:
        match = re.fullmatch("sha256=([0-9a-fA-F]{64})", parts.fragment)
        if match is None:
            raise FileError(
                f"{where}: after # only sha256= and its 64 hexadecimal digits may stand"
            )
        pinned = match[1].lower()
    address = urllib.parse.urldefrag(address).url
    session = _Session(bool(pinned))
    if reason := session.unsafe(address):
        raise FileError(f"{where} {reason}")
    source = _Source(where, lambda start, tag: _open_web(session, address, start, tag))
    return _kept(address, source, pinned)


def from_bucket(address: str) -> pathlib.Path:
    """Fetches a file of a bucket, whose URL `remote.path_of` has taken.

    Raises:
      FileError: the file cannot be read.
    """
    source = _Source(shown(address), lambda start, tag: _open_bucket(address, start, tag))
    return _kept(address, source, "")


# ------------------------------------------------------------------ the cache


def _kept(address: str, source: _Source, pinned: str) -> pathlib.Path:
    """The file of an address in the cache, fetched if need be; one process does it at a time."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(address).path.rstrip("/").rpartition("/")[2])
    name = re.sub(r"[^\w.=+-]", "_", name, flags=re.ASCII).lstrip(".")[-100:]
    if not name:
        raise FileError(f"{source.address} names no file")
    digest = hashlib.sha256(address.encode()).hexdigest()[:24]
    target = files.user_cache() / "weights" / digest / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.parent.with_suffix(".lock")):
            return _current(target, source, pinned)
    except OSError as error:
        reason = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"fails ({error})"
        raise FileError(
            f"{source.address}: the cache {target.parent} {reason}; free some space, or set "
            "XDG_CACHE_HOME to another folder. The same command goes on from what has come"
        ) from error


def _current(target: pathlib.Path, source: _Source, pinned: str) -> pathlib.Path:
    record = _recorded(target)
    if record is not None and pinned == record.sha256:
        return target
    if offline():
        if record is not None and not pinned:
            return target
        raise FileError(
            f"{source.address} is not in the cache, and HF_HUB_OFFLINE forbids the network"
        )
    return _fetch(target, source, pinned, record)


def _recorded(path: pathlib.Path) -> _Record | None:
    """The record of a file of the cache, if the file has the size that it tells."""
    try:
        record = files.read_json(_record_of(path), _Record)
        return record if path.stat().st_size == record.size else None
    except (FileError, OSError):
        return None


def _record_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.json")


def _write_record(path: pathlib.Path, record: _Record) -> None:
    files.write_atomically(_record_of(path), msgspec.json.encode(record))


def _fetch(
    target: pathlib.Path, source: _Source, pinned: str, kept: _Record | None
) -> pathlib.Path:
    """Fetches a file, or finds that the kept one is still the same."""
    if kept is not None and not kept.tag and not pinned:
        logging.info("%s: the server tells no versions; the file of the cache is used", target)
        return target
    part = target.with_name(f"{target.name}.part")
    failures = before = 0
    while True:
        start, tag = _begun(part)
        failures = 0 if start > before else failures  # a new byte came
        before = max(start, before)
        if kept is not None and not pinned and not start:
            start, tag = -1, kept.tag
        try:
            with source.open(start, tag) as stream:
                if stream is None:
                    return target
                size, digest = _receive(part, stream, source.address, pinned)
                tag = stream.tag
            break
        except _Passing as error:
            failures += 1
            if isinstance(error, _Unfit):
                part.unlink(missing_ok=True)
            if kept is not None and not pinned:
                logging.warning("%s: %s; the file of the cache is used", source.address, error)
                return target
            if isinstance(error, _Away):
                raise FileError(f"{source.address}: {error}") from error
            if failures >= ATTEMPTS:
                raise FileError(
                    f"{source.address}: {error}; tried {ATTEMPTS} times. The same command goes on "
                    "from what has come"
                ) from None
            logging.warning("%s: %s; trying again", source.address, error)
            pause(2.0 ** (failures - 1))
    _record_of(target).unlink(missing_ok=True)  # it never tells of other content, even in a crash
    part.replace(target)
    _write_record(target, _Record(source.address, tag, size, digest))
    _record_of(part).unlink(missing_ok=True)
    logging.info(
        "%s has %s bytes, SHA-256 %s; kept as %s", source.address, f"{size:,}", digest, target
    )
    return target


def _begun(part: pathlib.Path) -> tuple[int, str]:
    """Bytes that have come, and the tag of their content; (0, "") if nothing can go on there."""
    try:
        tag = files.read_json(_record_of(part), _Record).tag
        # Only with a tag a server can tell whether the rest belongs to what is here.
        return (part.stat().st_size, tag) if tag else (0, "")
    except (FileError, OSError):
        return 0, ""


def _receive(part: pathlib.Path, stream: _Stream, address: str, pinned: str) -> tuple[int, str]:
    """Writes a stream to what has come so far; gives size and SHA-256 of the whole."""
    _check_size(stream, address, part.parent)
    digest = hashlib.sha256()
    with open(part, "r+b" if stream.start else "wb") as file:
        while file.tell() < stream.start:
            digest.update(file.read(min(_PIECE, stream.start - file.tell())))
        _write_record(part, _Record(address, stream.tag, stream.size or 0))
        bar = tqdm(
            desc=address.rpartition("/")[2],
            total=stream.size,
            initial=stream.start,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
        )
        with bar:
            for piece in stream.pieces:
                file.write(piece)
                digest.update(piece)
                bar.update(len(piece))
                if file.tell() > (stream.size or MOST_BYTES):
                    raise FileError(
                        f"{address} sends more than {stream.size or MOST_BYTES:,} bytes"
                    )
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())  # on the disk before it gets its name
    if stream.size is not None and size < stream.size:
        raise _Passing(f"the connection broke after {size:,} of {stream.size:,} bytes")
    for wanted, who in ((pinned, "#sha256= of the address"), (stream.sha256, "the server")):
        if wanted and wanted != digest.hexdigest():
            part.unlink()
            raise FileError(
                f"{address} has SHA-256 {digest.hexdigest()}, but {who} says {wanted}; it is not "
                "kept. Fetch it again, or from another place"
            )
    return size, digest.hexdigest()


def _check_size(stream: _Stream, address: str, folder: pathlib.Path) -> None:
    size = stream.size or 0
    if size > MOST_BYTES:
        raise FileError(f"{address} has {size:,} bytes; at most {MOST_BYTES:,} are fetched")
    free = shutil.disk_usage(folder).free
    if size - stream.start > free:
        raise FileError(
            f"{address} has {size:,} bytes, but the cache {folder} has {free:,} free; free some "
            "space, or set XDG_CACHE_HOME to another folder"
        )


# ------------------------------------------------------------------ http(s)


class _Session(requests.Session):
    """A session whose redirects lead to safe places only."""

    def __init__(self, pinned: bool):
        """`pinned`: whether the content will be compared with a SHA-256 of the user's."""
        super().__init__()
        self._pinned = pinned
        self.headers.update({"Accept-Encoding": "identity", "User-Agent": "oneformer-jax"})

    def unsafe(self, address: str) -> str:
        """Says why content from this address could be anybody's; "" if it could not."""
        parts = urllib.parse.urlsplit(address)
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if parts.scheme == "https" or (parts.scheme == "http" and (local or self._pinned)):
            return ""
        if parts.scheme == "http":
            return (
                "is not encrypted, so anybody on the way may change it: use https, or add #sha256="
            )
        return "is no web address"

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Gives the address that a response leads to; FileError for one that is not safe."""
        target = super().get_redirect_target(resp)
        if target is None:
            return None
        address = urllib.parse.urljoin(resp.url, target)
        reason = self.unsafe(address)
        if resp.url.startswith("https:") and not address.startswith("https:"):
            reason = "is not encrypted"
        if reason:
            raise FileError(f"{shown(resp.url)} leads to {shown(address)}, which {reason}")
        return target


@contextlib.contextmanager
def _open_web(session: _Session, address: str, start: int, tag: str) -> Iterator[_Stream | None]:
    headers = {}
    if start > 0:
        headers = {"Range": f"bytes={start}-", "If-Range": tag}
    elif start < 0:
        headers = {"If-None-Match" if _is_etag(tag) else "If-Modified-Since": tag}
    where = shown(address)
    try:
        with session.get(address, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 304 and start < 0:
                yield None
                return
            _check_answer(response, where)
            yield _stream(response, max(start, 0), tag)
    except requests.exceptions.SSLError:
        raise FileError(f"{where}: the certificate of the server is not valid") from None
    except requests.Timeout:
        raise _Passing("there was no answer in time") from None
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        raise _Passing("there was no connection, or it broke") from None
    except FileError:
        raise
    except (requests.RequestException, ValueError) as error:  # its text may have the whole address
        raise FileError(f"{where} cannot be fetched ({type(error).__name__})") from None


def _check_answer(response: requests.Response, where: str) -> None:
    code = response.status_code
    if code in _BUSY:
        raise _Passing(f"the server is busy (HTTP {code})")
    if code in (401, 403):
        raise FileError(
            f"{where}: the server wants a login (HTTP {code}); ~/.netrc is read. Where terms must "
            "be accepted first, fetch the file with a browser and give its path"
        )
    if code in (404, 410):
        raise FileError(f"{where}: there is no such file on the server (HTTP {code})")
    if code not in (200, 206, 416):
        raise FileError(f"{where}: the server answers HTTP {code}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise FileError(f"{where} is a web page, not a file of weights; give the link to the file")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FileError(f"{where}: the server sends the file compressed, unasked")


def _stream(response: requests.Response, start: int, tag: str) -> _Stream:
    """The content of an answer of status 200, 206 or 416."""
    headers = response.headers
    found = headers.get("ETag") or headers.get("Last-Modified") or ""
    if found.startswith("W/"):  # the same meaning, perhaps not the same bytes
        found = headers.get("Last-Modified") or ""
    length = headers.get("Content-Length", "")
    size = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
    digest = _told_digest(response)
    if response.status_code == 416:  # nothing is beyond what has come
        if headers.get("Content-Range") != f"bytes */{start}":
            raise _Unfit("the server does not send the rest of the file")
        return _Stream(start, start, tag, digest, iter(()))
    if response.status_code == 206:
        match = re.fullmatch(
            r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", headers.get("Content-Range", "")
        )
        if match is None or int(match[1]) != start or (found and found != tag):
            raise _Unfit("the server sends another part of the file than was asked for")
        size = int(match[2])
    else:
        start = 0
    return _Stream(start, size, found, digest, response.iter_content(_PIECE))


def _is_etag(tag: str) -> bool:
    return tag.startswith('"')


def _told_digest(response: requests.Response) -> str:
    """SHA-256 of the whole file, as the headers of an answer tell it, or ""."""
    for answer in (response, *response.history):
        # The hub tells of the file that it leads to; other headers speak of the answer itself.
        linked = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", linked):
            return linked
    for name, pattern in (
        ("Repr-Digest", r"sha-256=:([\w+/=]{44}):"),
        ("Digest", r"(?i:sha-256)=([\w+/=]{44})"),
        ("x-amz-checksum-sha256", r"^([\w+/=]{44})$"),
    ):
        if match := re.search(pattern, response.headers.get(name, ""), re.ASCII):
            with contextlib.suppress(ValueError):
                return base64.b64decode(match[1], validate=True).hex()
    return ""


# ------------------------------------------------------------------ buckets


@contextlib.contextmanager
def _open_bucket(address: str, start: int, tag: str) -> Iterator[_Stream | None]:
    where = shown(address)
    try:
        system, path = fsspec.core.url_to_fs(address)
        info = system.info(path)
        found = str(system.ukey(path))
    except FileNotFoundError:
        raise FileError(f"{where}: there is no such file in the bucket") from None
    except Exception as error:  # each kind of bucket has its own kinds, and tries again by itself
        raise _Away(remote.explain(address, error)) from error
    if info.get("type") != "file":
        raise FileError(f"{where} is a folder; give a file in it")
    if start < 0 and found == tag:
        yield None
        return
    start = start if found == tag else 0

    def pieces() -> Iterator[bytes]:
        try:
            with system.open(path, "rb") as file:
                file.seek(start)
                while piece := file.read(_PIECE):
                    yield piece
        except Exception as error:
            raise _Passing(f"reading broke off: {remote.explain(address, error)}") from error

    yield _Stream(start, info.get("size"), found, "", pieces())
