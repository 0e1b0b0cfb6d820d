"""PyTorch's files, read and written without PyTorch.

Three forms are read: the zip archive (PyTorch 1.6 and newer), the stream before it, and a plain
pickle of NumPy arrays (Detectron2's `.pkl`). Reading never runs code from the file: a pickle may
name the few classes and functions listed here, nothing else.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

# First object of the stream format, and its version.
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_SCALAR_TYPES = (
    *("float64", "double", "float32", "float", "float16", "half", "bfloat16"),
    *("int64", "long", "int32", "int", "int16", "short", "int8", "uint8", "bool"),
)


class FileError(ValueError):
    """A file of tensors that cannot be used; the message names it and says why."""


class Tensor:
    """A tensor of a file, read when it is asked for.

    Attributes:
      shape: of the tensor.
      dtype: NumPy's, bfloat16 included.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._read = read

    def read(self) -> np.ndarray:
        """The values; FileError if they are damaged."""
        return self._read()


class _Forbidden(Exception):
    """A pickle that asks for more than tensors."""


class _Storage:
    """Where the numbers of one or several tensors lie."""

    def __init__(self, dtype: np.dtype, count: int, read: Callable[[], np.ndarray]):
        self.dtype, self.count, self.read = dtype, count, read


def _rebuild_tensor(storage, offset, shape, strides, *unused) -> Tensor:
    shape, strides = tuple(shape), tuple(strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without a storage")
    needed = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    sizes = (offset, *shape, *strides)
    if any(not isinstance(n, int) or n < 0 for n in sizes):
        raise pickle.UnpicklingError(f"a tensor with the sizes {sizes}")
    if 0 not in shape and needed > storage.count:
        raise pickle.UnpicklingError(f"a tensor of {needed} elements in {storage.count}")

    def read() -> np.ndarray:
        values = storage.read()[offset:]
        item = storage.dtype.itemsize
        return np.lib.stride_tricks.as_strided(
            values, shape, [s * item for s in strides], writeable=False
        )

    return Tensor(shape, storage.dtype, read)


def _rebuild_parameter(data, *unused) -> Any:
    return data


class _Settings(dict):
    """Stands for the settings of a training program, which nobody reads."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """NumPy pickles hold their bytes this way under old protocols."""
    return text.encode("latin1" if encoding == "bytes" else encoding)


def _array_shell(*unused) -> np.ndarray:
    """An empty array, which its pickled state fills."""
    return np.ndarray((0,), np.uint8)


def _numpy_scalar(dtype: np.dtype, value: bytes | str) -> Any:
    data = value.encode("latin1") if isinstance(value, str) else value
    return np.frombuffer(data, _plain(dtype), 1)[0]


def _array_of_buffer(buffer, dtype, shape, order) -> np.ndarray:
    return np.frombuffer(buffer, _plain(dtype)).reshape(shape, order=order)


def _plain(dtype: np.dtype) -> np.dtype:
    if dtype.hasobject:
        raise pickle.UnpicklingError("an array of objects instead of numbers")
    return dtype


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "Counter"): collections.Counter,
    ("argparse", "Namespace"): _Settings,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "int"): int,
    ("builtins", "float"): float,
    ("builtins", "complex"): complex,
    ("builtins", "bytes"): bytes,
    ("builtins", "bytearray"): bytearray,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): str,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("yacs.config", "CfgNode"): _Settings,
} | {
    (f"numpy.{core}.{module}", name): value
    for core in ("core", "_core")
    for module, name, value in (
        ("multiarray", "_reconstruct", _array_shell),
        ("multiarray", "scalar", _numpy_scalar),
        ("numeric", "_frombuffer", _array_of_buffer),
    )
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_ALLOWED` and PyTorch's storages and number types, and no others."""

    def __init__(self, file: BinaryIO, load_storage: Callable[..., _Storage] | None, **options):
        super().__init__(file, **options)
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (found := _ALLOWED.get((module, name))) is not None:
            return found
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        if module == "torch" and name in _SCALAR_TYPES:
            return name
        raise _Forbidden(
            f"it names {module}.{name}, which a file of weights has no need of; loading it might "
            "run code. If you trust the file, load it where it was made and save its state dict "
            "alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if self._load_storage is None or not isinstance(pid, tuple) or pid[:1] != ("storage",):
            raise pickle.UnpicklingError("a reference outside the file")
        _, dtype, key, _, count, *_ = pid
        if not isinstance(dtype, np.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage of unknown type")
        return self._load_storage(dtype, str(key), count)


def load(path: str | os.PathLike[str]) -> Any:
    """The object in a file of PyTorch or a pickle, its tensors as `Tensor` or NumPy arrays.

    Raises:
      FileError: not such a file, a truncated or damaged one, or one that names what is forbidden.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04" or zipfile.is_zipfile(path):
            return _load_zip(path)
        if start[:1] != b"\x80":
            raise FileError(f"{path} is neither a PyTorch file nor a pickle")
        return _load_stream(path)
    except FileError:
        raise
    except zipfile.BadZipFile as error:
        raise FileError(f"{path} is truncated or damaged ({error}); fetch it again") from error
    except _Forbidden as error:
        raise FileError(f"{path} is not loaded: {error}") from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise FileError(
            f"{path} is truncated or damaged ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _load_zip(path: str | os.PathLike[str]) -> Any:
    archive = zipfile.ZipFile(path)  # open as long as one of its tensors is
    pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise FileError(f"{path} is a zip archive, but not one of PyTorch (it has no data.pkl)")
    folder = pickles[0].removesuffix("data.pkl")
    order = "<"
    if f"{folder}byteorder" in archive.namelist():
        order = {b"little": "<", b"big": ">"}[archive.read(f"{folder}byteorder")]

    def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
        name = f"{folder}data/{key}"
        size = archive.getinfo(name).file_size
        if size < count * dtype.itemsize:
            raise pickle.UnpicklingError(f"{name} has {size} bytes, too few for its tensor")

        def read() -> np.ndarray:
            try:
                data = archive.read(name)  # checks the CRC
            except (zipfile.BadZipFile, EOFError) as error:
                raise FileError(f"{path} is damaged: {name} ({error}); fetch it again") from error
            return np.frombuffer(data, dtype.newbyteorder(order), count).astype(dtype, copy=False)

        return _Storage(dtype, count, read)

    return _Unpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _load_stream(path: str | os.PathLike[str]) -> Any:
    """PyTorch's format before 1.6, or a plain pickle, whichever the first object says."""
    with open(path, "rb") as file:
        first = _Unpickler(file, None, encoding="latin1").load()
        if first != _STREAM_MAGIC:
            return first
        if (version := _Unpickler(file, None).load()) != _STREAM_VERSION:
            raise FileError(f"{path} has version {version} of PyTorch's old format, not 1001")
        system = _Unpickler(file, None).load()
        order = "<" if system.get("little_endian", True) else ">"
        counts: dict[str, tuple[np.dtype, int]] = {}
        offsets: dict[str, int] = {}

        def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
            counts[key] = (dtype, count)

            def read() -> np.ndarray:
                with open(path, "rb") as again:
                    again.seek(offsets[key])
                    values = np.fromfile(again, dtype.newbyteorder(order), count)
                return values.astype(dtype, copy=False)

            return _Storage(dtype, count, read)

        result = _Unpickler(file, storage).load()
        keys = _Unpickler(file, None).load()
        size = os.path.getsize(path)
        for key in keys:
            dtype, count = counts[key]
            (found,) = struct.unpack("<q", file.read(8))
            if found != count:
                raise FileError(f"{path} is damaged: a storage of {found} elements, not {count}")
            offsets[key] = file.tell()
            file.seek(count * dtype.itemsize, os.SEEK_CUR)
            if file.tell() > size:
                raise FileError(f"{path} is truncated; fetch it again")
        return result


# ------------------------------------------------------------------ writing


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    *,
    versions: Mapping[str, int],
    extra: Mapping[str, str],
) -> None:
    """Writes {"model": state dict} as `torch.save` does, in PyTorch's zip format.

    Args:
      path: a file that is overwritten.
      tensors: the state dict, float32 or int64.
      versions: version of a module by its dotted name, as `_metadata` of a state dict has it.
      extra: texts beside "model".
    """
    names = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}
    out = io.BytesIO()
    out.write(b"\x80\x02}(")
    _put_text(out, "model")
    out.write(b"ccollections\nOrderedDict\n)R(")
    for index, (name, values) in enumerate(tensors.items()):
        _put_text(out, name)
        strides = [int(np.prod(values.shape[axis + 1 :])) for axis in range(values.ndim)]
        out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        _put_text(out, "storage")
        out.write(f"ctorch\n{names[values.dtype]}\n".encode())
        _put_text(out, str(index))
        _put_text(out, "cpu")
        _put_int(out, values.size)
        out.write(b"tQ")
        _put_int(out, 0)
        for numbers in (values.shape, strides):
            out.write(b"(")
            for number in numbers:
                _put_int(out, number)
            out.write(b"t")
        out.write(b"\x89ccollections\nOrderedDict\n)RtR")
    out.write(b"u}")  # the items; then the attributes of the ordered dict
    _put_text(out, "_metadata")
    out.write(b"ccollections\nOrderedDict\n)R(")
    for module, version in versions.items():
        _put_text(out, module)
        out.write(b"}")
        _put_text(out, "version")
        _put_int(out, version)
        out.write(b"s")
    out.write(b"usb")
    for name, text in extra.items():
        _put_text(out, name)
        _put_text(out, text)
    out.write(b"u.")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", out.getvalue())
        archive.writestr("archive/byteorder", "little")
        for index, values in enumerate(tensors.values()):
            little = values.astype(values.dtype.newbyteorder("<"), copy=False)
            with archive.open(f"archive/data/{index}", "w", force_zip64=values.nbytes >> 31) as f:
                f.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _put_text(out: BinaryIO, text: str) -> None:
    data = text.encode()
    out.write(b"X" + struct.pack("<I", len(data)) + data)


def _put_int(out: BinaryIO, number: int) -> None:
    if not 0 <= number < 2**31:
        raise ValueError(f"a size of {number} does not fit PyTorch's format")
    out.write(b"J" + struct.pack("<i", number))
