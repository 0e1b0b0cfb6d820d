"""Digests of a checkpoint's files, to notice damage.

`SHA256SUMS` in the folder of every checkpoint lists all of its files in the form of coreutils:
`sha256sum -c SHA256SUMS` checks them too. Its last line is the digest of the lines above. Scores
come later, and have their own digest.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pathlib
import re
import stat
from collections.abc import Mapping

import msgspec

from oneformer_jax import files, remote

SEAL_FILE = "SHA256SUMS"
SCORES_FILE = "scores.json"
_LIMIT = 64 << 20  # bytes: hundreds of thousands of files
_LINE = re.compile(r"([0-9a-f]{64})  ([\w./-]+)", re.ASCII)
_LAST = re.compile(r"# lines above: ([0-9a-f]{64})")
_THREADS = 4


class SealError(ValueError):
    """A checkpoint's files have changed since they were written."""


def _list(folder: pathlib.Path) -> list[str]:
    """Names of the files below `folder`, except the seal and the scores.

    Raises:
      SealError: one is a pipe, a device or a link to a folder; reading it might never end.
    """
    names = []
    if remote.is_remote(folder):
        return sorted(remote.sizes(folder).keys() - {SEAL_FILE, SCORES_FILE})
    for place, folders, found in os.walk(folder):
        for name in (*folders, *found):
            path = pathlib.Path(place, name)
            kind = path.stat() if path.exists() else path.lstat()
            if name in folders and not path.is_symlink():
                continue
            if not stat.S_ISREG(kind.st_mode):
                raise SealError(f"{path.relative_to(folder)} is not a regular file")
            names.append(path.relative_to(folder).as_posix())
    return sorted(set(names) - {SEAL_FILE, SCORES_FILE})


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: pathlib.Path, names: list[str]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda n: _digest(folder / n), names), strict=True))


def write(folder: pathlib.Path) -> None:
    """Writes the digests of all files in `folder`."""
    found = _digests(folder, _list(folder))
    text = "".join(f"{digest}  {name}\n" for name, digest in found.items())
    last = f"# lines above: {hashlib.sha256(text.encode()).hexdigest()}\n"
    files.write_atomically(folder / SEAL_FILE, text + last)


def _read(path: pathlib.Path) -> dict[str, str]:
    data = files.read_bytes(path, limit=_LIMIT, error=SealError)
    body, _, last = data.rstrip(b"\n").rpartition(b"\n")
    match = _LAST.fullmatch(last.decode("ascii", "replace"))
    if not match or match[1] != hashlib.sha256(body + b"\n").hexdigest() or data[-1:] != b"\n":
        raise SealError(f"{SEAL_FILE}, the list of digests, is damaged")
    lines = [_LINE.fullmatch(line) for line in body.decode("ascii", "replace").splitlines()]
    if not all(lines):
        raise SealError(f"{SEAL_FILE} has a line without digest and name")
    return {line[2]: line[1] for line in lines}


def check(folder: pathlib.Path, part: int = 0, parts: int = 1) -> bool:
    """Compares the files in `folder` with its seal.

    Args:
      folder: folder of a checkpoint.
      part, parts: number of this process, and of all, which share the files.

    Returns:
      False without a seal to compare with: an earlier version wrote the checkpoint.

    Raises:
      SealError: a file is missing, new or changed; the message names it.
    """
    there = _list(folder)
    if not (folder / SEAL_FILE).exists():
        return False
    expected = _read(folder / SEAL_FILE)
    for names, reason in (
        (expected.keys() - set(there), "missing"),
        (set(there) - expected.keys(), "not among the files that were written"),
    ):
        if names:
            raise SealError(f"{files.first_few(sorted(names))} is {reason}")
    found = _digests(folder, there[part::parts])
    changed = [name for name, digest in found.items() if digest != expected[name]]
    if changed:
        raise SealError(f"{files.first_few(changed)} is not as it was written (SHA-256)")
    return True


# ------------------------------------------------------------------ scores


class _Scores(msgspec.Struct, forbid_unknown_fields=True):
    scores: dict[str, float]
    sha256: str


def _digest_of(scores: Mapping[str, float]) -> str:
    return hashlib.sha256(msgspec.json.encode(scores, order="sorted")).hexdigest()


def write_scores(folder: pathlib.Path, scores: Mapping[str, float]) -> None:
    """Writes the scores of a checkpoint, with their digest."""
    found = _Scores(dict(scores), _digest_of(scores))
    files.write_atomically(folder / SCORES_FILE, msgspec.json.format(msgspec.json.encode(found)))


def read_scores(folder: pathlib.Path) -> dict[str, float] | None:
    """Reads the scores of a checkpoint; None if it has none yet, SealError if damaged."""
    path = folder / SCORES_FILE
    if not path.exists():
        return None
    data = files.read_bytes(path, limit=files.JSON_LIMIT, error=SealError)
    try:
        found = files.parse_json(data, _Scores, path)
    except files.FileError:  # an earlier version wrote the scores alone
        return files.parse_json(data, dict[str, float], path, error=SealError)
    if found.sha256 != _digest_of(found.scores):
        raise SealError(f"{path} is damaged: its scores are not those that were written")
    return found.scores
