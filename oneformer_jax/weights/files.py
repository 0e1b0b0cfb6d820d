"""Files of tensors by name, whatever their format: what `convert.py` reads and writes.

A file is a PyTorch or Detectron2 checkpoint (`.pth`, `.pt`, `.bin`, `.pkl`), a `.safetensors` file,
or a Hugging Face folder (`config.json` beside `model.safetensors` or `pytorch_model.bin`, whole or
in shards with an index).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import safetensors
import safetensors.numpy

from oneformer_jax.files import (
    FileError,
    first_few,
    open_regular,
    parse_json,
    read_json,
    replacing,
)
from oneformer_jax.weights import torch_pickle
from oneformer_jax.weights.pickle_reader import quoted
from oneformer_jax.weights.tensors import KINDS, Tensor, shape_problem, tensors_problem

# Where a checkpoint keeps its state dict; the first that is there is taken.
_STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")
# Key and metadata entry under which our own description of the model travels along.
OWN_KEY = "oneformer_jax"
CONFIG = "config.json"
# Of a folder the first that is there is read: safetensors before pickles, whole before shards.
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# Bytes of a description of a model: with names and colours of 10,000 classes it has one million.
DESCRIPTION_LIMIT = 4 << 20
_MAX_HEADER = 16 << 20  # of a safetensors file: room for 100,000 tensors
_MAX_SHARDS = 1000
# By the names of safetensors, in the order of `KINDS`.
_SAFETENSORS_NAMES = "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL"
_SAFETENSORS_KINDS = dict(zip(_SAFETENSORS_NAMES.split(), KINDS.values(), strict=True))


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The tensors of a file or folder.

    Attributes:
      path: as it was given.
      tensors: by name, in the order of the file; values are read one by one.
      config: the folder's config.json, or None.
      own: what `save_official` or `save_hugging_face` were given as `own`, or None.
    """

    path: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    own: Mapping[str, Any] | None = None


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Tells whether `open_tensors` is for this path: a file, or a folder with one of its files."""
    path = pathlib.Path(path).expanduser()
    if path.exists() and not path.is_dir():
        return True
    return any((path / name).exists() for name in WEIGHTS)


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a file or folder of tensors; only names and shapes are read.

    Raises:
      FileError: there is nothing like that, or it is damaged.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileError(f"{path} does not exist; expected a file of weights or a folder of them")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return TensorFile(str(path), open_safetensors(path))
    tensors, own = _open_pickle(path)
    return TensorFile(str(path), tensors, own=own)


class _Index(msgspec.Struct):
    """`*.index.json` of a Hugging Face folder: the shard of each tensor."""

    weight_map: dict[str, str]


def _open_folder(path: pathlib.Path) -> TensorFile:
    name = next((name for name in WEIGHTS if (path / name).exists()), None)
    if name is None:
        raise FileError(
            f"{path} holds none of {', '.join(WEIGHTS)}; expected a Hugging Face "
            "folder, or a workdir of this program (model.json and checkpoints)"
        )
    config: dict[str, Any] = read_json(_within(path, CONFIG), limit=DESCRIPTION_LIMIT)
    if name.endswith(".json"):
        tensors = _open_shards(path, _within(path, name))
    else:
        tensors = _open_shard(_within(path, name))
    own = path / f"{OWN_KEY}.json"
    described = (
        read_json(_within(path, own.name), limit=DESCRIPTION_LIMIT) if own.exists() else None
    )
    return TensorFile(str(path), tensors, config, described)


def _within(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A file of a folder, which lies there or, by a link, in the cache of the hub."""
    path = folder / name
    target, home = path.resolve(), folder.resolve()
    # models--OWNER--NAME/snapshots/REVISION/FILE is a link to models--OWNER--NAME/blobs/DIGEST.
    blobs = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if home not in target.parents and not blobs:
        raise FileError(f"{path} is a link out of the folder, to {target}; copy that file there")
    return path


def read_index(index: pathlib.Path) -> dict[str, list[str]]:
    """Reads an index: the tensors of each shard, by the name of a file beside the index.

    Raises:
      FileError: it is missing or damaged, or names what is no file of its own folder.
    """
    shards: dict[str, list[str]] = {}
    for tensor, shard in read_json(index, _Index).weight_map.items():
        shards.setdefault(shard, []).append(tensor)
    if len(shards) > _MAX_SHARDS:
        raise FileError(f"{index} names {len(shards):,} files, more than {_MAX_SHARDS:,}")
    for shard in shards:
        plain = shard.isprintable() and len(shard) < 256 and "\\" not in shard
        if not plain or shard != os.path.basename(shard) or shard in ("", ".", ".."):
            raise FileError(
                f"{index} names the file {quoted(shard)}; it may name files of its own folder only"
            )
    return shards


def _open_shards(path: pathlib.Path, index: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of all shards of an index, each from the shard that the index names."""
    shards = read_index(index)
    if missing := [shard for shard in sorted(shards) if not (path / shard).exists()]:
        raise FileError(f"{path} lacks {first_few(missing)}, which {index.name} names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(shards):
        found = _open_shard(_within(path, shard))
        if absent := [quoted(name) for name in shards[shard] if name not in found]:
            raise FileError(f"{path / shard} lacks {first_few(absent)}, which {index.name} names")
        if twice := [name for name in found if name in tensors]:
            raise FileError(f"{path / shard} has {first_few(twice)}, as another shard has")
        tensors |= found
    return tensors


def _open_shard(path: pathlib.Path) -> dict[str, Tensor]:
    return open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)[0]


def _checked(path: pathlib.Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if problem := tensors_problem(tensors, path.stat().st_size):
        raise FileError(f"{path} is not loaded: {problem}")
    return tensors


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    def damaged(error: Exception) -> FileError:
        return FileError(
            f"{path} is truncated or damaged ({quoted(str(error), 200)}); fetch it again"
        )

    with open_regular(path) as raw:
        # The library compares lengths, offsets and shapes; a header of 100 MB is too long for us.
        start = raw.read(8)
    if len(start) == 8 and (length := struct.unpack("<Q", start)[0]) > _MAX_HEADER:
        raise FileError(
            f"{path} is truncated or damaged (a header of {length:,} bytes); fetch it again"
        )
    try:
        file = safetensors.safe_open(path, "numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        types = {name: part.get_dtype() for name, part in slices.items()}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise damaged(error) from error
    for name, shape in shapes.items():
        if problem := shape_problem(shape):
            raise FileError(f"{path} is not loaded: {quoted(name)} has {problem}")
        if types[name] not in _SAFETENSORS_KINDS:
            raise FileError(
                f"{path} is not loaded: {quoted(name)} has the number type {quoted(types[name])}; "
                f"known are {', '.join(_SAFETENSORS_KINDS)}"
            )

    def tensor(name: str) -> Tensor:
        kind = _SAFETENSORS_KINDS[types[name]]

        def read() -> np.ndarray:
            if kind is KINDS["bfloat16"]:
                import jax.numpy  # noqa: F401, it makes bfloat16 known to NumPy
            try:
                return file.get_tensor(name).astype(kind.dtype, copy=False)
            except (safetensors.SafetensorError, ValueError, TypeError) as error:
                raise damaged(error) from error

        return Tensor(shapes[name], kind.dtype, read)

    return _checked(path, {name: tensor(name) for name in slices})


def _open_pickle(path: pathlib.Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """Tensors and own description of a pickled checkpoint."""
    found = torch_pickle.load(path)
    if not isinstance(found, dict):
        raise FileError(f"{path} holds a {type(found).__name__}, not a dict of tensors")
    own = found.get(OWN_KEY)
    for key in _STATE_DICT_KEYS:
        if isinstance(found.get(key), dict):
            found = found[key]
            break
    tensors = {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        keys = first_few((quoted(key) for key in found), 5)
        raise FileError(f"{path} holds no tensors (its keys are {keys or 'none'})")
    _checked(path, tensors)
    if not isinstance(own, str):
        return tensors, None
    where = f"{path}: the text under {OWN_KEY!r}"
    if len(own) > DESCRIPTION_LIMIT:
        raise FileError(f"{where} has more than {DESCRIPTION_LIMIT:,} characters")
    return tensors, parse_json(own, dict[str, Any], where)


# ------------------------------------------------------------------ writing


def save_official(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], own: Mapping[str, Any]
) -> None:
    """Writes an official checkpoint, `{"model": state dict}`, whole or not at all.

    Args:
      path: of the `.pth` file.
      tensors: the state dict by the official names.
      own: JSON values kept beside the state dict.
    """
    # Without these versions Detectron2 takes the names for those of an older model and renames them
    # (spec 2.3).
    versions = {"": 1, "sem_seg_head": 2, "sem_seg_head.predictor": 2}
    with _replacing(path) as temporary:
        torch_pickle.save(temporary, tensors, versions=versions, extra={OWN_KEY: json.dumps(own)})


def save_hugging_face(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    own: Mapping[str, Any],
) -> None:
    """Writes a Hugging Face folder: config.json, model.safetensors and oneformer_jax.json.

    Args:
      path: of the folder, made if needed; it must be empty or not there.
      tensors: by the names of `transformers`.
      config: `OneFormerConfig` of `transformers` as JSON values.
      own: JSON values kept beside it.

    Raises:
      FileError: the folder has files in it.
    """
    path = pathlib.Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileError(f"{path} is there already and not an empty folder; use another name")
    with _replacing(path) as temporary:
        temporary.mkdir(parents=True)
        contiguous = {name: np.asarray(values, order="C") for name, values in tensors.items()}
        safetensors.numpy.save_file(
            contiguous, temporary / "model.safetensors", metadata={"format": "pt"}
        )
        for name, value in (("config.json", config), (f"{OWN_KEY}.json", own)):
            (temporary / name).write_text(json.dumps(value, indent=2) + "\n")
        if path.exists():
            path.rmdir()


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """`oneformer_jax.files.replacing`, which also makes the folder of `path`."""
    path = pathlib.Path(path).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        yield temporary
