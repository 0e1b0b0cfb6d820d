"""A tensor of a file, the number types that files may hold, and the checks that all formats share.

Imports NumPy alone, so that a reader can be tried on a hostile file in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from oneformer_jax.weights.pickle_reader import quoted

MAX_RANK = 16
MAX_NAME = 500  # characters of a tensor's name; real ones have under 120
# A tensor may be a view of another's storage, and a storage of few numbers may be shown as many.
# What all tensors together may hold: this many times the size of the file, and a little more.
_SHARING, _LITTLE = 8, 64 << 20


class Kind(NamedTuple):
    """A number type as files have it.

    Attributes:
      stored: NumPy type of the bytes, little-endian.
      dtype: of the array that is read; bfloat16, which NumPy lacks, becomes float32 exactly.
    """

    stored: np.dtype
    dtype: np.dtype


def _kind(stored: str, dtype: Any = None) -> Kind:
    return Kind(np.dtype(stored), np.dtype(dtype or np.dtype(stored).newbyteorder("=")))


# By PyTorch's names. Everything else is refused.
KINDS = {
    "float64": _kind("<f8"),
    "float32": _kind("<f4"),
    "float16": _kind("<f2"),
    "bfloat16": _kind("<u2", np.float32),
    "int64": _kind("<i8"),
    "int32": _kind("<i4"),
    "int16": _kind("<i2"),
    "int8": _kind("|i1"),
    "uint64": _kind("<u8"),
    "uint32": _kind("<u4"),
    "uint16": _kind("<u2"),
    "uint8": _kind("|u1"),
    "bool": _kind("|u1", np.bool_),
}


def stored(data: Any, kind: Kind, *, big_endian: bool = False) -> np.ndarray:
    """Bytes as numbers in the way of the file, a view: [count]; their length must be a multiple."""
    return np.frombuffer(data, kind.stored.newbyteorder(">") if big_endian else kind.stored)


def decode(numbers: np.ndarray, kind: Kind) -> np.ndarray:
    """Decodes numbers of `stored`, of any shape; a view where the file has NumPy's own form."""
    if kind is KINDS["bfloat16"]:
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    if kind is KINDS["bool"]:
        return numbers != 0
    return numbers.astype(kind.dtype, copy=False)


class Tensor:
    """A tensor of a file, read when it is asked for.

    Attributes:
      shape: of the tensor.
      dtype: NumPy's, of the array that `read` gives.
    """

    __slots__ = ("_read", "dtype", "shape")

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._read = read

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Returns the values; FileError if they are damaged."""
        return self._read()


def shape_problem(shape: Sequence[Any]) -> str:
    """Returns why no tensor has this shape, or ""."""
    if len(shape) > MAX_RANK:
        return f"{len(shape)} axes, more than {MAX_RANK}"
    if any(type(n) is not int or n < 0 for n in shape):
        return "an axis that is no natural number"
    if math.prod(max(n, 1) for n in shape) >= 1 << 48:
        return f"the impossible shape {list(shape)}"
    return ""


def tensors_problem(tensors: dict[str, Tensor], size: int) -> str:
    """Returns why these are not the tensors of a file of `size` bytes, or ""."""
    for name in tensors:
        if len(name) > MAX_NAME or not name.isprintable():
            return (
                f"a tensor is named {quoted(name)}; names are printable text of at most "
                f"{MAX_NAME} characters"
            )
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _SHARING * size + _LITTLE:
        return f"its tensors would take {total:,} bytes, and the file has {size:,}"
    return ""
