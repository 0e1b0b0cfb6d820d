"""PyTorch's files, read and written without PyTorch.

Three forms are read: the zip archive (PyTorch 1.6 and newer), the stream before it, and a plain
pickle of NumPy arrays (Detectron2's `.pkl`). Their pickles go through `pickle_reader.py`, which
makes inert records, and `torch_forms.py`, which turns the known ones into tensors; this module
finds the bytes, and writes.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from oneformer_jax.files import FileError, open_regular
from oneformer_jax.weights import FORMS, pickle_reader
from oneformer_jax.weights.pickle_reader import Damaged, Refused, quoted
from oneformer_jax.weights.tensors import Kind, stored
from oneformer_jax.weights.torch_forms import Forms, Storage, allowed

# First object of the stream format, and its version.
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
# First bytes of a pickle: its protocol or, before protocol 2, what makes a dict, an ordered dict, a
# list or the number above.
_PICKLES = (b"\x80", b"(", b"}", b"c", b"]", b"L")
_ZIP = b"PK\x03\x04"
# Bytes of an archive's table of contents: room for 100,000 tensors.
_MAX_CONTENTS = 8 << 20


def load(path: str | os.PathLike[str]) -> Any:
    """Reads the object in a file of PyTorch or a pickle: containers, numbers, texts, `Tensor`s.

    Tensors are read when they are asked for. NumPy arrays are tensors too.

    Raises:
      FileError: not such a file, a truncated or damaged one, or one that asks for more than
        numbers; the message names the file and, of a pickle, the opcode or name that is refused.
    """
    file = open_regular(path)
    try:
        start = file.read(len(_ZIP))
        if start == _ZIP:
            return _load_zip(path, file)
        if not start.startswith(_PICKLES):
            what = "neither a PyTorch file nor a pickle" if start else "empty"
            raise FileError(f"{path} is {what}; accepted are {FORMS}")
        return _load_stream(path, file)
    except Refused as error:
        raise FileError(f"{path} is not loaded: {error}") from error
    except (Damaged, zipfile.BadZipFile) as error:
        raise FileError(f"{path} is truncated or damaged ({error}); fetch it again") from error


def _read_pickle(data: bytes | mmap.mmap, start: int) -> tuple[Any, int]:
    return pickle_reader.read(data, start, allowed)


# ------------------------------------------------------------------ zip archives


class _Archive:
    """A zip archive whose members are stored as they are, as PyTorch writes it."""

    def __init__(self, file: BinaryIO):
        guarded = _Guarded(file)
        try:
            contents = zipfile.ZipFile(guarded).infolist()
        except zipfile.BadZipFile:
            raise
        except (ValueError, OSError, NotImplementedError, struct.error) as error:
            raise Damaged(f"its table of contents: {quoted(str(error))}") from None
        self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.size = len(self._view)
        self._checked: set[str] = set()
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in contents:
            name = quoted(member.filename)
            if member.filename in self.members:
                raise Refused(f"its archive has two members {name}")
            if member.flag_bits & 1:
                raise Refused(f"its member {name} is encrypted")
            if member.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"its member {name} is compressed, which PyTorch never does")
            size, begin = member.file_size, member.header_offset
            if size != member.compress_size or not 0 <= begin <= begin + size <= self.size:
                raise Damaged(f"{name} would have {size:,} bytes of the file's {self.size:,}")
            self.members[member.filename] = member

    def read(self, name: str) -> memoryview:
        """Returns the bytes of a member; they are compared with their checksum the first time."""
        member, header = self.members[name], struct.Struct("<4s22xHH")
        begin = member.header_offset
        if begin + header.size > self.size:
            raise Damaged(f"{quoted(name)} begins behind the end")
        mark, *lengths = header.unpack_from(self._view, begin)
        begin += header.size
        encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
        called = bytes(self._view[begin : begin + lengths[0]])
        if mark != _ZIP or called != member.orig_filename.encode(encoding, "replace"):
            raise Damaged(f"{quoted(name)} does not begin where the table of contents says")
        begin += sum(lengths)
        data = self._view[begin : begin + member.file_size]
        if name not in self._checked:
            if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
                raise Damaged(f"{quoted(name)} does not have its checksum")
            self._checked.add(name)
        return data


class _Guarded:
    """A file whose table of contents zipfile reads at once, and makes an object of each line."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size if 0 <= size <= _MAX_CONTENTS else _MAX_CONTENTS + 1)
        if len(data) > _MAX_CONTENTS:
            raise Refused(f"its archive has a table of contents of more than {_MAX_CONTENTS:,} B")
        return data


def _load_zip(path: str | os.PathLike[str], file: BinaryIO) -> Any:
    archive = _Archive(file)
    pickles = [name for name in archive.members if re.search(r"(^|/)data\.pkl$", name)]
    if len(pickles) != 1:
        raise FileError(
            f"{path} is a zip archive, but not one of PyTorch: it has {len(pickles) or 'no'} "
            f"data.pkl; accepted are {FORMS}"
        )
    folder = pickles[0].removesuffix("data.pkl")
    order = b"little"
    if (name := f"{folder}byteorder") in archive.members:
        order = bytes(archive.read(name)[:10])
        if order not in (b"little", b"big"):
            raise Damaged("its byte order is neither little nor big")

    def storage(key: str, kind: Kind, count: int) -> Storage:
        name, size = f"{folder}data/{key}", count * kind.stored.itemsize
        if name not in archive.members:
            raise Damaged(f"there is no {quoted(name)}")
        if (found := archive.members[name].file_size) < size:
            raise Damaged(f"{quoted(name)} has {found:,} bytes, too few for its tensor")

        def read() -> np.ndarray:
            try:
                data = archive.read(name)[:size]
            except Damaged as error:
                raise FileError(f"{path} is damaged: {error}; fetch it again") from error
            return stored(data, kind, big_endian=order == b"big")

        return Storage(kind, count, read)

    record, _ = _read_pickle(bytes(archive.read(pickles[0])), 0)
    return Forms(storage, archive.size).convert(record)


# ------------------------------------------------------------------ streams and plain pickles


def _load_stream(path: str | os.PathLike[str], file: BinaryIO) -> Any:
    """PyTorch's format before 1.6, or a plain pickle, whichever the first object says."""
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = len(data)
    first, at = _read_pickle(data, 0)
    if first != _STREAM_MAGIC:
        return Forms(None, size).convert(first)
    version, at = _read_pickle(data, at)
    if version != _STREAM_VERSION:
        raise FileError(
            f"{path} has version {quoted(version)} of PyTorch's old format, not 1001; save it with "
            "a newer PyTorch"
        )
    _, at = _read_pickle(data, at)  # the machine that wrote it; numbers are little-endian always
    record, at = _read_pickle(data, at)
    wanted: dict[str, tuple[Kind, int]] = {}
    places: dict[str, int] = {}

    def storage(key: str, kind: Kind, count: int) -> Storage:
        wanted[key] = (kind, count)

        def read() -> np.ndarray:
            start = places[key]
            return stored(memoryview(data)[start : start + count * kind.stored.itemsize], kind)

        return Storage(kind, count, read)

    found = Forms(storage, size).convert(record)
    keys, at = _read_pickle(data, at)
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys):
        raise Damaged("its list of storages is none")
    for key in keys:
        if key not in wanted or key in places:
            raise Damaged(f"storage {quoted(key)} occurs twice or belongs to no tensor")
        kind, count = wanted[key]
        if at + 8 > size:
            raise Damaged("it ends before its storages")
        (found_count,) = struct.unpack_from("<q", data, at)
        if found_count != count:
            raise Damaged(f"storage {quoted(key)} has {found_count:,} elements, not {count:,}")
        places[key], at = at + 8, at + 8 + count * kind.stored.itemsize
        if at > size:
            raise Damaged(f"it ends within storage {quoted(key)}")
    if missing := [key for key in wanted if key not in places]:
        raise Damaged(f"storage {quoted(missing[0])} is missing")
    return found


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
            with archive.open(
                f"archive/data/{index}", "w", force_zip64=values.nbytes >= 1 << 31
            ) as f:
                f.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _put_text(out: BinaryIO, text: str) -> None:
    data = text.encode()
    out.write(b"X" + struct.pack("<I", len(data)) + data)


def _put_int(out: BinaryIO, number: int) -> None:
    if not 0 <= number < 2**31:
        raise ValueError(f"a size of {number} does not fit PyTorch's format")
    out.write(b"J" + struct.pack("<i", number))
