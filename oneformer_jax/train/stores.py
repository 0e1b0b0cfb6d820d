"""The array store of a checkpoint, whose files may be a stranger's: described, checked, read.

workdir/checkpoints/<step>/state/
  _METADATA        JSON: the names of the arrays
  manifest.ocdbt   key-value store (OCDBT) whose nodes and values lie in d/ and ocdbt.process_*/d/;
                   each node has a CRC-32C, and TensorStore follows no path out of this folder
  key NAME/.zarray JSON: shape, type and chunks of an array
  key NAME/0.0     one chunk of it, by zstandard

Only these forms are accepted, although Orbax and TensorStore could open others (drivers,
compressors, formats). A size is used only after the bytes on the disk allow for it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import tensorstore as ts

from oneformer_jax import files, remote

TREE_FILE = "_METADATA"
_TYPES = {
    "bfloat16": np.dtype(jnp.bfloat16),
    "|b1": np.dtype(bool),
    **{text: np.dtype(text) for text in ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8")},
    **{text: np.dtype(text) for text in ("<f2", "<f4", "<f8")},
}
_MAX_NAMES = 1 << 18
_MAX_DEPTH = 64
_MAX_CHUNKS = 1 << 20  # of one array
_ZARRAY_LIMIT = 1 << 16  # bytes
# Weights hardly shrink when compressed: a store above this ratio of its size on the disk, and above
# this size, is a bomb.
_MAX_RATIO, _SMALL = 64, 1 << 30
_AHEAD, _AHEAD_BYTES = 128, 256 << 20  # reads that are under way together
_THREADS = 16
_ZSTD_MAGIC, _ZSTD_BLOCK = b"\x28\xb5\x2f\xfd", 128 << 10


class StoreError(ValueError):
    """A store that is damaged, or that another program wrote."""


# ------------------------------------------------------------------ names


class _Key(msgspec.Struct):
    key: Annotated[str, msgspec.Meta(max_length=256)]
    key_type: Literal[1, 2]  # a position in a sequence, a key of a dict


class _Value(msgspec.Struct):
    value_type: Literal["jax.Array", "np.ndarray", "scalar", "None", "Dict", "List", "Tuple"]
    skip_deserialize: bool


class _Entry(msgspec.Struct):
    key_metadata: Annotated[list[_Key], msgspec.Meta(min_length=1, max_length=_MAX_DEPTH)]
    value_metadata: _Value


class _Tree(msgspec.Struct):
    tree_metadata: Annotated[dict[str, _Entry], msgspec.Meta(max_length=_MAX_NAMES)]
    use_ocdbt: Literal[True]
    use_zarr3: Literal[False] = False


def _paths(store: pathlib.Path) -> dict[tuple[str, ...], bool]:
    """Paths of the arrays (True) and of the empty dicts (False) in the saved tree."""
    tree = files.read_json(store / TREE_FILE, _Tree, error=StoreError)
    found: dict[tuple[str, ...], bool] = {}
    for entry in tree.tree_metadata.values():
        path, value = tuple(key.key for key in entry.key_metadata), entry.value_metadata
        if path in found:
            raise StoreError(f"{store / TREE_FILE} names {_name(path)} twice")
        if not value.skip_deserialize or value.value_type == "Dict":  # else None, or an empty tuple
            found[path] = not value.skip_deserialize
    return found


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path)


def _named(tree: Tree) -> list[tuple[str, Any]]:
    """Lists the leaves of a nested dict with their names in the store."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


# ------------------------------------------------------------------ arrays


class _Compressor(msgspec.Struct, forbid_unknown_fields=True):
    id: Literal["zstd"]
    level: int


_Length = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
_Shape = Annotated[list[_Length], msgspec.Meta(max_length=16)]


class _Array(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of .zarray, and their accepted values."""

    zarr_format: Literal[2]
    shape: _Shape
    chunks: _Shape
    dtype: Literal[tuple(_TYPES)]
    compressor: _Compressor | None
    fill_value: None = None
    filters: None = None
    order: Literal["C"] = "C"
    dimension_separator: Literal["."] = "."


Tree = dict[str, Any]  # nested by names; leaves are jax.ShapeDtypeStruct or arrays


def _open(store: pathlib.Path) -> ts.KvStore:
    spec = {"driver": "ocdbt", "base": remote.tensorstore_spec(store)}
    if remote.is_remote(store):  # small neighbours come with one request
        spec |= {
            "experimental_read_coalescing_threshold_bytes": 1 << 20,
            "experimental_read_coalescing_merged_bytes": 64 << 20,
            "experimental_read_coalescing_interval": "5ms",
        }
    # One cache for all arrays, or each would read the index again.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 100 << 20}})
    return ts.KvStore.open(spec, context=context).result()


def describe(store: pathlib.Path) -> Tree:
    """Reads the names, shapes and types of the arrays.

    Args:
      store: the folder `state` of a checkpoint.

    Returns:
      Nested dict with text keys and leaves jax.ShapeDtypeStruct.

    Raises:
      StoreError: a file is missing, damaged, or in another form.
    """
    keys = _open(store)
    paths = _paths(store)
    reads = {p: keys.read(f"{_name(p)}/.zarray") for p, is_array in paths.items() if is_array}
    tree: Tree = {}
    for path, is_array in paths.items():
        leaf: Any = {}
        if is_array:
            array = _zarray(reads[path].result(), f"{store}: {_name(path)}/.zarray")
            leaf = jax.ShapeDtypeStruct(tuple(array.shape), _TYPES[array.dtype])
        parent = tree
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
            if not isinstance(parent, dict):
                raise StoreError(f"{store / TREE_FILE}: {_name(path)} lies in an array")
        if parent.setdefault(path[-1], leaf) is not leaf:
            raise StoreError(f"{store / TREE_FILE}: {_name(path)} is an array and holds arrays")
    return tree


def _zarray(read: ts.KvStore.ReadResult, where: str) -> _Array:
    if read.state != "value":
        raise StoreError(f"{where} is missing")
    return parse_zarray(read.value, where)


def parse_zarray(text: bytes, where: str) -> _Array:
    """Reads the description of an array; StoreError, with `where`, for another form."""
    if len(text) > _ZARRAY_LIMIT:
        raise StoreError(f"{where} has {len(text):,} bytes; it may have {_ZARRAY_LIMIT:,}")
    array = files.parse_json(text, _Array, where, error=StoreError)
    pairs = list(zip(array.shape, array.chunks, strict=False))
    if len(array.shape) != len(array.chunks) or any(not 1 <= c <= max(n, 1) for n, c in pairs):
        raise StoreError(f"{where} says shape {array.shape} in chunks of {array.chunks}")
    if math.prod(-(-n // c) for n, c in pairs) > _MAX_CHUNKS:
        raise StoreError(f"{where} says more than {_MAX_CHUNKS:,} chunks: {array.shape}")
    return array


def check_sizes(store: pathlib.Path, tree: Tree) -> None:
    """Raises StoreError if the arrays of `tree` are far too large for their files."""
    claimed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    if remote.is_remote(store):
        there = sum(remote.sizes(store).values())
    else:
        there = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    if claimed > max(_SMALL, _MAX_RATIO * there):
        raise StoreError(f"{store} says arrays of {claimed:,} bytes, but its files have {there:,}")


def check_chunks(store: pathlib.Path, tree: Tree, part: int = 0, parts: int = 1) -> None:
    """Checks that every chunk exists and unpacks to the size of its array's chunks.

    Args:
      store: the folder `state` of a checkpoint.
      tree: the result of `describe`, or a part of it.
      part, parts: number of this process, and of all, which share the arrays.

    Raises:
      StoreError: names the array.
    """
    keys = _open(store)
    mine = dict(_named(tree)[part::parts])

    def chunks() -> Iterator[tuple[Any, int, Any]]:
        described = ((name, 0, (keys.read, f"{name}/.zarray")) for name in mine)
        for name, read in _read_ahead(described):
            where, leaf = f"{store}: {name}", mine[name]
            array = _zarray(read, f"{where}/.zarray")
            if (tuple(array.shape), _TYPES[array.dtype]) != (leaf.shape, leaf.dtype):
                raise StoreError(f"{where} has changed since it was described")
            size = math.prod(array.chunks) * leaf.dtype.itemsize
            grid = [range(-(-n // c)) for n, c in zip(array.shape, array.chunks, strict=True)]
            for position in itertools.product(*grid):
                key = ".".join(map(str, position)) or "0"
                chunk = (where, key, size, array.compressor is not None)
                yield chunk, size, (keys.read, f"{name}/{key}")

    for (where, key, size, compressed), read in _read_ahead(chunks()):
        if read.state != "value":
            raise StoreError(f"{where} lacks its chunk {key}")
        reason = _wrong_size(read.value, size, compressed)
        if reason:
            raise StoreError(f"{where}, chunk {key}, {reason}")


def _read_ahead(reads: Iterable[tuple[Any, int, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yields (name, result) of reads in order, while later ones are under way.

    A bucket is far away: one read after the other would take minutes.

    Args:
      reads: name, size in bytes, (function that starts the read, its arguments).
    """
    started: collections.deque[tuple[Any, int, Any]] = collections.deque()
    under_way = 0
    for name, size, (start, *arguments) in reads:
        while started and (under_way + size > _AHEAD_BYTES or len(started) >= _AHEAD):
            first, first_size, future = started.popleft()
            under_way -= first_size
            yield first, future.result()
        started.append((name, size, start(*arguments)))
        under_way += size
    for name, _, future in started:
        yield name, future.result()


def _wrong_size(chunk: bytes, size: int, compressed: bool) -> str:
    """Says why `chunk` cannot unpack to `size` bytes, without unpacking it; "" if it can."""
    if not compressed:
        return "" if len(chunk) == size else f"has {len(chunk):,} bytes instead of {size:,}"
    try:
        stated, most = _frame_sizes(chunk)
    except IndexError:
        return "is cut short"
    if stated != size:
        return f"is no single zstandard frame of {size:,} bytes"
    # Blocks may be smaller than their limits, so the sum of limits tells only large excesses.
    if most > 16 * size + 8 * _ZSTD_BLOCK:
        return f"unpacks to up to {most:,} bytes instead of {size:,}"
    return ""


def _frame_sizes(chunk: bytes) -> tuple[int, int]:
    """Sizes of a zstandard frame's content (RFC 8878): the header's, and an upper limit.

    The first is -1 unless `chunk` is exactly one frame with its size.
    """
    if chunk[:4] != _ZSTD_MAGIC:
        return -1, 0
    flags = chunk[4]
    single, checksum = flags >> 5 & 1, flags >> 2 & 1
    start = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    stated = int.from_bytes(chunk[start : start + width], "little") + (256 if width == 2 else 0)
    place, last, most = start + width, False, 0
    while not last:
        header = chunk[place] | chunk[place + 1] << 8 | chunk[place + 2] << 16
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        most += length if kind < 2 else _ZSTD_BLOCK  # raw, or one byte repeated
        place += 3 + (1 if kind == 1 else length)
    whole = width > 0 and place + 4 * checksum == len(chunk)
    return (stated if whole else -1), most


def _arrays(store: pathlib.Path, tree: Tree) -> Iterator[np.ndarray]:
    """Yields the arrays in the places of the leaves of `tree`, in their order."""
    keys = _open(store)
    spec = {"driver": "zarr", "recheck_cached_data": "open"}

    def array(name: str) -> np.ndarray:
        found = ts.open(spec, kvstore=keys / f"{name}/", open=True)
        return found.result().read().result()

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        reads = (
            (name, math.prod(leaf.shape) * leaf.dtype.itemsize, (pool.submit, array, name))
            for name, leaf in _named(tree)
        )
        yield from (found for _, found in _read_ahead(reads))


def unpack(store: pathlib.Path, tree: Tree) -> None:
    """Unpacks the arrays of `tree`; raises TensorStore's error if one fails."""
    for _ in _arrays(store, tree):
        pass


def read(store: pathlib.Path, tree: Tree) -> Tree:
    """Reads the arrays of `tree` (from `describe`, or a part of it) as NumPy arrays."""
    return jax.tree.unflatten(jax.tree.structure(tree), list(_arrays(store, tree)))
