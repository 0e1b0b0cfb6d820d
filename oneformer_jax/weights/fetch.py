"""Names of weights that users give: a local path, a model of the hub, an address."""

from __future__ import annotations

import os
import pathlib
import re

from oneformer_jax import remote
from oneformer_jax.files import FileError, did_you_mean
from oneformer_jax.weights import FORMS
from oneformer_jax.weights.pickle_reader import quoted

_HUB_NAME = re.compile(
    r"(?:hf://)?([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}?)(?:@([\w./-]{1,255}))?", re.A
)
_ENDINGS = (".pth", ".pt", ".pkl", ".bin", ".safetensors", ".json")


def local_path(name: str | os.PathLike[str]) -> pathlib.Path:
    """Gives the local path of weights; what is elsewhere is fetched first, or found in its cache.

    Of a model of the hub only config.json, oneformer_jax.json and the weights come, safetensors
    before pickles. What has come is as hostile as any file: `weights.files` reads it.

    Args:
      name: a file or folder that is there, which goes before all else; OWNER/NAME or
        OWNER/NAME@REVISION on the hub (hf:// before it where a local folder is called OWNER);
        https://, perhaps with #sha256=HEX; gs:// or s3://.

    Raises:
      FileError: it is none of these, or cannot be fetched; one line that says why.
    """
    text = os.fspath(name)
    if not isinstance(name, str) and remote.is_remote(text):
        return remote.path_of(text)  # what an earlier call gave
    expanded = os.path.expanduser(text)
    path = pathlib.Path(expanded)
    if os.path.lexists(expanded) or not isinstance(name, str):
        if path.is_dir() and path.parent.name != "checkpoints" and not _has_marks(path):
            raise FileError(
                f"the folder {quoted(text, 300)} holds no weights; accepted are {FORMS}"
            )
        return path
    scheme, found, _ = text.partition("://")
    if found and scheme != "hf":
        from oneformer_jax.weights import download

        if scheme in ("http", "https"):
            return download.from_web(text)
        if scheme in ("gs", "s3"):
            try:
                place = remote.path_of(text)
            except remote.RemoteError as error:
                raise FileError(f"{error}") from error
            # A workdir is read where it is.
            return download.from_bucket(text) if text.endswith(_ENDINGS) else place
        raise FileError(f"{download.shown(text)} is of no known kind; accepted are {FORMS}")
    match = _HUB_NAME.fullmatch(text)
    owner = text.split("/")[0]
    here = owner in (".", "..", "~") or (os.path.isdir(owner) and not found)
    if match is None or here or text.endswith(_ENDINGS):
        hint = f" (hf://{match[0]} is that of the hub)" if match and here else ""
        shown = quoted(text, 300)
        raise FileError(f"{shown} does not exist{_similar(path)}{hint}; accepted are {FORMS}")
    from oneformer_jax.weights import hub

    try:
        return hub.fetch(match[1], match[2])
    except hub.NotOnHub as error:
        raise FileError(f"{error}. It is no local path either; accepted are {FORMS}") from error


def _has_marks(folder: pathlib.Path) -> bool:
    """Tells whether a folder has a file of a workdir or a Hugging Face folder, or part of one."""
    marks = ("model.json", "checkpoints", "config.json", "model.safetensors*", "pytorch_model.bin*")
    return any(any(folder.glob(mark)) for mark in marks)


def shown(name: str) -> str:
    """Returns a name for messages: of an address, without what may be secret."""
    from oneformer_jax.weights import download

    return download.shown(name) if "://" in name else name


def _similar(path: pathlib.Path) -> str:
    """Suggests the names in the folder of a path that is missing."""
    try:
        return did_you_mean(path.name, os.listdir(path.parent))
    except (OSError, ValueError):
        return ""
