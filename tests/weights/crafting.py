"""Makes pickles opcode by opcode, and PyTorch's containers around them: honest and hostile ones."""

from __future__ import annotations

import io
import pathlib
import struct
import zipfile
from collections.abc import Iterable, Mapping

MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(data)) + data


def binary(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def many(*values: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def numbers(*values: int) -> bytes:
    return many(*map(integer, values))


def listed(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + b"e"


def mapping(pairs: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> bytes:
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return b"}(" + b"".join(text(key) + value for key, value in items) + b"u"


def call(function: bytes, *args: bytes) -> bytes:
    return function + many(*args) + b"R"


def whole(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def model(body: bytes, key: str = "w") -> bytes:
    """A pickle of {"model": {key: body}}."""
    return whole(mapping({"model": mapping({key: body})}))


# ------------------------------------------------------------------ PyTorch and NumPy


def storage(count: int, key: str = "0", kind: str = "FloatStorage", *more: bytes) -> bytes:
    parts = (text("storage"), name("torch", kind), text(key), text("cpu"), integer(count), *more)
    return many(*parts) + b"Q"


def tensor(stored: bytes, shape: bytes, strides: bytes, offset: bytes = b"K\x00") -> bytes:
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, stored, offset, shape, strides, b"\x89", hooks)


def vector(count: int, key: str = "0") -> bytes:
    return tensor(storage(count, key), numbers(count), numbers(1))


def dtype(code: bytes = text("f4"), state: bytes | None = None) -> bytes:
    made = call(name("numpy", "dtype"), code, b"\x89", b"\x88")
    return made if state is None else made + state + b"b"


def dtype_state(
    order: str = "<",
    parts: bytes = b"N",
    names: bytes = b"N",
    fields: bytes = b"N",
    size: int = -1,
    align: int = -1,
    flags: int = 0,
) -> bytes:
    rest = (integer(size), integer(align), integer(flags))
    return many(integer(3), text(order), parts, names, fields, *rest)


def array(data: bytes, shape: bytes, kind: bytes, *, function: str = "_reconstruct") -> bytes:
    shell = call(
        name("numpy.core.multiarray", function), name("numpy", "ndarray"), numbers(0), binary(b"b")
    )
    return shell + many(integer(1), shape, kind, b"\x89", data) + b"b"


# ------------------------------------------------------------------ containers


def archive(
    path: pathlib.Path, pickled: bytes, members: Mapping[str, bytes] | None = None, **options
) -> pathlib.Path:
    """A zip archive; `members` are those beside data.pkl, "data/0" by default."""
    members = {"data/0": bytes(range(16))} if members is None else members
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", pickled)
        for member, data in members.items():
            file.writestr(f"archive/{member}", data)
    return path


def stream(
    path: pathlib.Path,
    pickled: bytes,
    keys: bytes | None = None,
    data: bytes = struct.pack("<q", 4) + bytes(range(16)),
    version: int = 1001,
) -> pathlib.Path:
    """The format before the archive: five pickles and the storages."""
    keys = whole(listed(text("0"))) if keys is None else keys
    parts = (whole(MAGIC), whole(integer(version)), whole(b"}"), pickled, keys, data)
    path.write_bytes(b"".join(parts))
    return path


def safetensors(path: pathlib.Path, header: bytes, data: bytes = b"", length: int | None = None):
    out = io.BytesIO()
    out.write(struct.pack("<Q", len(header) if length is None else length) + header + data)
    path.write_bytes(out.getvalue())
    return path
