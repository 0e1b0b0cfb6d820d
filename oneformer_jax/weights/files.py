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
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from oneformer_jax.weights import torch_pickle
from oneformer_jax.weights.torch_pickle import FileError, Tensor

# Where a checkpoint keeps its state dict; the first that is there is taken.
_STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")
# Key and metadata entry under which our own description of the model travels along.
OWN_KEY = "oneformer_jax"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = tuple(f"{name}.index.json" for name in _SINGLE)


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
    """Whether `open_tensors` is for this path: a file, or a folder with one of its files."""
    path = pathlib.Path(path).expanduser()
    return path.is_file() or any((path / name).exists() for name in (*_SINGLE, *_INDEX))


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
        return TensorFile(str(path), _open_safetensors(path))
    tensors, own = _open_pickle(path)
    return TensorFile(str(path), tensors, own=own)


def _open_folder(path: pathlib.Path) -> TensorFile:
    files = {name: path / name for name in (*_SINGLE, *_INDEX) if (path / name).exists()}
    if not files:
        raise FileError(
            f"{path} holds none of {', '.join((*_SINGLE, *_INDEX))}; expected a Hugging Face "
            "folder, or a workdir of this program (model.json and checkpoints)"
        )
    config = _read_json(path / "config.json")
    tensors: dict[str, Tensor] = {}
    # A file of all tensors before shards, safetensors before pickles.
    name = min(files, key=(*_SINGLE, *_INDEX).index)
    if name in _SINGLE:
        shards = [files[name]]
    else:
        names = _read_json(files[name]).get("weight_map")
        if not isinstance(names, dict):
            raise FileError(f"{files[name]} has no weight_map")
        shards = [path / shard for shard in sorted(set(names.values()))]
        if missing := [shard.name for shard in shards if not shard.exists()]:
            raise FileError(f"{path} lacks {', '.join(missing)}, which {name} names")
    for shard in shards:
        pickled = shard.suffix != ".safetensors"
        tensors |= _open_pickle(shard)[0] if pickled else _open_safetensors(shard)
    own = path / f"{OWN_KEY}.json"
    return TensorFile(str(path), tensors, config, _read_json(own) if own.exists() else None)


def _read_json(path: pathlib.Path) -> Any:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileError(f"{path} is missing") from None
    except ValueError as error:
        raise FileError(f"{path} is damaged ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise FileError(f"{path} holds {type(found).__name__}, not an object")
    return found


def _open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    def damaged(error: Exception) -> FileError:
        return FileError(f"{path} is truncated or damaged ({error}); fetch it again")

    try:
        file = safetensors.safe_open(path, "numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        kinds = {name: part.get_dtype() for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise damaged(error) from error

    def tensor(name: str) -> Tensor:
        def read() -> np.ndarray:
            try:
                return file.get_tensor(name)
            except safetensors.SafetensorError as error:
                raise damaged(error) from error

        return Tensor(shapes[name], _SAFETENSORS_DTYPES.get(kinds[name], np.void), read)

    return {name: tensor(name) for name in slices}


_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _open_pickle(path: pathlib.Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """Tensors and own description of a pickled checkpoint."""
    found = torch_pickle.load(path)
    if not isinstance(found, Mapping):
        raise FileError(f"{path} holds a {type(found).__name__}, not a dict of tensors")
    own = found.get(OWN_KEY)
    for key in _STATE_DICT_KEYS:
        if isinstance(found.get(key), Mapping):
            found = found[key]
            break
    tensors = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            tensors[str(name)] = Tensor(value.shape, value.dtype, lambda value=value: value)
    if not tensors:
        keys = ", ".join(map(str, list(found)[:5]))
        raise FileError(f"{path} holds no tensors (its keys are {keys or 'none'})")
    try:
        return tensors, json.loads(own) if isinstance(own, str) else None
    except ValueError as error:
        raise FileError(f"{path}: the text under {OWN_KEY!r} is damaged ({error})") from None


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
    """A name beside `path` that takes its place once the block has ended well."""
    path = pathlib.Path(path).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
