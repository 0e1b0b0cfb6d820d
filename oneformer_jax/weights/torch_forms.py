"""Interprets the records of a pickle: tensors, NumPy arrays, plain containers and numbers.

Each form that PyTorch, NumPy and Python's own containers give their pickles is known here, with
its arguments; all others are refused. Nothing of the file is called. The bytes of a tensor are
counted before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from oneformer_jax.weights.pickle_reader import (
    NOTHING,
    SHORT,
    Damaged,
    Dict,
    Global,
    Made,
    Outside,
    Refused,
    Set,
    quoted,
)
from oneformer_jax.weights.tensors import (
    KINDS,
    MAX_RANK,
    Kind,
    Tensor,
    decode,
    shape_problem,
    stored,
)

MAX_DEPTH = 60  # containers within containers
# A list or text that many objects share is copied by each of them: bytes that all copies may take
# beyond those of the file, and what a member counts for.
_COPIES, _MEMBER = 64 << 20, 64

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_SCALAR_TYPES = (
    *("float64", "double", "float32", "float", "float16", "half", "bfloat16"),
    *("int64", "long", "int32", "int", "int16", "short", "int8", "uint8", "bool"),
)
_NUMPY_KINDS = {
    **{f"{kind.stored.kind}{kind.stored.itemsize}": kind for kind in KINDS.values()},
    "b1": KINDS["bool"],
}
_NUMPY = {
    ("multiarray", "_reconstruct"),
    ("multiarray", "scalar"),
    ("numeric", "_frombuffer"),
}
_SETTINGS = {
    ("argparse", "Namespace"),
    ("yacs.config", "CfgNode"),
    ("detectron2.config.config", "CfgNode"),
}


class Storage:
    """Location of the numbers of one or several tensors.

    Attributes:
      kind: their type.
      count: how many there are; the file has so many.
      read: gives them as the file has them, a view: [count].
    """

    __slots__ = ("count", "kind", "read")

    def __init__(self, kind: Kind, count: int, read: Callable[[], np.ndarray]):
        self.kind, self.count, self.read = kind, count, read


def allowed(module: str, name: str) -> bool:
    """Tells whether a file of weights may name this."""
    if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
        return True
    if module == "torch" and name in _SCALAR_TYPES:
        return True
    return _short(module, name) in _FORMS or (module, name) in _BARE


def _short(module: str, name: str) -> tuple[str, str]:
    """The key of `_FORMS`: NumPy 1 and 2 keep the same functions in two places."""
    for core in ("numpy.core.", "numpy._core."):
        if module.startswith(core) and (module.removeprefix(core), name) in _NUMPY:
            return "numpy", name
    return ("settings", "") if (module, name) in _SETTINGS else (module, name)


class Forms:
    """Turns the records of one pickle into values.

    Args:
      storage: gives the storage of a key, of a type and a number of elements, after having checked
        that the file has it; None where a pickle has no storages.
      size: of the file in bytes.
    """

    def __init__(self, storage: Callable[[str, Kind, int], Storage] | None, size: int):
        self._get_storage = storage
        self._left = 8 * size + _COPIES
        self._storages: dict[str, Storage] = {}
        # By identity: what occurs in many places is converted once, so that no pickle grows by it.
        self._done: dict[int, Any] = {}

    def convert(self, value: Any, depth: int = 0) -> Any:
        """Converts to None, numbers, texts, bytes, `Tensor`s and containers of these.

        NumPy arrays become tensors, and their scalars numbers. Settings become None: nobody reads
        them.

        Raises:
          Damaged: values that do not fit together.
          Refused: an unknown form.
        """
        if value is None or isinstance(value, bool | int | float | str | bytes | memoryview):
            return value
        found = self._done.get(id(value), NOTHING)
        if found is _UNDER_WAY:
            raise Refused("it holds a container that contains itself")
        if found is not NOTHING:
            return found
        if depth > MAX_DEPTH:
            raise Refused(f"it is nested deeper than {MAX_DEPTH} containers")
        self._done[id(value)] = _UNDER_WAY
        found = self._done[id(value)] = self._convert(value, depth + 1)
        return found

    def _convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, list | tuple):
            return type(value)([self.convert(one, depth) for one in value])
        if isinstance(value, Dict):
            return self._dict(value.pairs, depth)
        if isinstance(value, Set):
            return self._set(value.members, depth)
        if isinstance(value, Global):
            if value.module == "torch" and value.name in _SCALAR_TYPES:
                return value.name
            raise Refused(f"it holds {value} where a value is expected")
        if isinstance(value, Outside):
            return _storage_values(self._storage(value))
        form = _FORMS.get(_short(value.function.module, value.function.name))
        if form is None:
            raise Refused(f"it makes a {value.function}, which is no value of a file of weights")
        try:
            return form(self, value, depth)
        except Damaged as error:
            raise Damaged(f"{value.function}: {error}") from None

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise Refused("it copies its parts so often that they would fill the memory")

    # ---- containers

    def _dict(self, pairs: list[tuple[Any, Any]], depth: int) -> dict[Any, Any]:
        return {self._key(key, depth): self.convert(value, depth) for key, value in pairs}

    def _key(self, value: Any, depth: int) -> Any:
        key = self.convert(value, depth)
        parts = key if isinstance(key, tuple) else (key,)
        if any(not isinstance(x, str | int | float | bytes | None) for x in parts):
            raise Refused("it holds a set or dict with a key that is no text or number")
        return key

    def _set(self, members: list[Any], depth: int) -> set[Any]:
        return {self._key(member, depth) for member in members}

    def _ordered(self, made: Made, depth: int) -> dict[Any, Any]:
        """collections.OrderedDict, dict, Counter; the attributes (`_metadata`) are not read."""
        pairs: list[tuple[Any, Any]] = []
        if made.args:
            (first,) = _arguments(made, 1, 1)
            if isinstance(first, Dict):
                self._spend(_MEMBER * len(first.pairs))
                pairs += first.pairs
            elif isinstance(first, list):  # as Python 2 wrote it
                self._spend(_MEMBER * len(first))
                if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in first):
                    raise Damaged("a list of something else than pairs")
                pairs += map(tuple, first)
            else:
                raise Refused(f"it makes a {made.function} of something else than pairs")
        return self._dict(pairs + made.pairs, depth)

    def _default_dict(self, made: Made, depth: int) -> dict[Any, Any]:
        if made.args:
            (factory,) = _arguments(made, 1, 1)
            if factory is not None and not isinstance(factory, Global):
                raise Refused(f"it makes a {made.function} with a default that is no class")
        return self._dict(made.pairs, depth)

    def _of_list(self, made: Made, depth: int) -> Any:
        """set, frozenset and list of a list."""
        values: Any = []
        if made.args:
            (values,) = _arguments(made, 1, 1)
            if not isinstance(values, list | tuple):
                raise Refused(f"it makes a {made.function} of something else than a list")
        self._spend(_MEMBER * len(values))
        if made.function.name == "list":
            return [self.convert(value, depth) for value in values]
        return self._set(list(values), depth)

    def _settings(self, made: Made, depth: int) -> None:
        return None

    def _reconstructed(self, made: Made, depth: int) -> None:
        """An object under the protocols 0 and 1: of the class that comes first."""
        first = made.args[0] if made.args else None
        if not isinstance(first, Global) or (first.module, first.name) not in _SETTINGS:
            name = first if isinstance(first, Global) else "an unknown class"
            raise Refused(f"it makes an object of {name}")

    # ---- numbers and bytes

    def _number(self, made: Made, depth: int) -> Any:
        kinds = {"int": int, "float": int | float, "complex": int | float}[made.function.name]
        args = _arguments(made, 0, 2 if made.function.name == "complex" else 1)
        if any(isinstance(x, bool) or not isinstance(x, kinds) for x in args):
            raise Refused(f"it makes a {made.function} of something else than a number")
        try:
            return {"int": int, "float": float, "complex": complex}[made.function.name](*args)
        except OverflowError:
            raise Damaged("a number that is too large") from None

    def _byte_string(self, made: Made, depth: int) -> bytes | memoryview:
        """bytes, bytearray and _codecs.encode: of nothing, of bytes, or of a text in latin1."""
        if not made.args:
            return b""
        first, *encoding = _arguments(made, 1, 2)
        if encoding and encoding[0] not in ("latin1", "latin-1", "bytes"):
            raise Refused(f"{made.function} of something else than latin1")
        if isinstance(first, str):
            self._spend(len(first))
            return _latin1(first)
        if encoding or not isinstance(first, bytes | memoryview | Made):
            raise Refused(f"{made.function} of something else than bytes or text")
        return self._bytes(first, depth)

    def _bytes(self, value: Any, depth: int) -> bytes | memoryview:
        """Bytes as the protocols have them: plain, a text of Python 2, or made from a text."""
        if isinstance(value, str) and len(value) <= SHORT:
            return _latin1(value)
        if isinstance(value, Made) and str(value.function) in _BYTES:
            value = self.convert(value, depth)
        if not isinstance(value, bytes | memoryview):
            raise Damaged("bytes are expected")
        return value

    def _size(self, made: Made, depth: int) -> tuple[int, ...]:
        return _whole_numbers(made, "a size")

    def _device(self, made: Made, depth: int) -> str:
        name, *index = _arguments(made, 1, 2)
        if not isinstance(name, str) or any(type(x) is not int for x in index):
            raise Damaged("a device without a name")
        return ":".join([quoted(name), *map(str, index)])

    # ---- PyTorch

    def _storage(self, reference: Any) -> Storage:
        if not isinstance(reference, Outside):
            raise Damaged("a tensor without a storage")
        found = reference.id
        if self._get_storage is None:
            raise Refused("it refers to something outside of it (opcode BINPERSID)")
        if not isinstance(found, tuple) or not found or found[0] != "storage":
            what = quoted(found[0]) if isinstance(found, tuple) and found else "something"
            raise Refused(
                f"it refers to a {what} outside of it (opcode BINPERSID), which is no storage of "
                "numbers; save the state dict alone, not the whole module"
            )
        if len(found) not in (5, 6):
            raise Damaged(f"a storage of {len(found)} parts")
        _, kind, key, _, count, *view = found
        if not isinstance(kind, Global) or kind.name not in _STORAGES:
            raise Refused("it has a storage whose type is none of numbers")
        if not isinstance(key, str) or len(key) > 64 or type(count) is not int or count < 0:
            raise Damaged("a storage without a key or a size")
        if view and view[0] is not None:
            raise Refused(
                "it has a storage that is a part of another, as the first versions of PyTorch "
                "wrote; load and save it with a newer PyTorch"
            )
        number_type = KINDS[_STORAGES[kind.name]]
        known = self._storages.get(key)
        if known is None:
            known = self._storages[key] = self._get_storage(key, number_type, count)
        if known.kind is not number_type or known.count != count:
            raise Damaged(f"storage {quoted(key)} is given twice with different types or sizes")
        return known

    def _tensor(self, made: Made, depth: int) -> Tensor:
        args = _arguments(made, 4, 7)
        storage, offset = self._storage(args[0]), args[1]
        shape, strides = _whole_numbers(args[2], "a shape"), _whole_numbers(args[3], "strides")
        if len(shape) != len(strides):
            raise Damaged(f"a tensor of {len(shape)} axes with {len(strides)} strides")
        if type(offset) is not int or offset < 0:
            raise Damaged("a tensor whose offset is no natural number")
        if problem := shape_problem(shape):
            raise Damaged(f"a tensor with {problem}")
        count = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if count and last >= storage.count:
            raise Damaged(f"a tensor that ends at element {last:,} of {storage.count:,}")
        if count > storage.count:
            raise Refused(
                f"it has a tensor of {count:,} elements that repeats {storage.count:,}; save a "
                "contiguous copy of it"
            )

        def read() -> np.ndarray:
            if not count:
                return np.zeros(shape, storage.kind.dtype)
            # First the view, then the numbers: many tensors may be small parts of one storage.
            found = storage.read()[offset:]
            item = found.itemsize
            steps = [s * item if n > 1 else 0 for n, s in zip(shape, strides, strict=True)]
            found = np.lib.stride_tricks.as_strided(found, shape, steps, writeable=False)
            return decode(found, storage.kind)

        return Tensor(shape, storage.kind.dtype, read)

    def _parameter(self, made: Made, depth: int) -> Any:
        return self.convert(_arguments(made, 1, 4)[0], depth)

    # ---- NumPy

    def _array(self, made: Made, depth: int) -> Tensor:
        """`_reconstruct` makes an empty shell, and the state fills it."""
        state = made.state
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise Refused("it has a NumPy array without its data")
        shape, dtype, fortran, data = state[-4:]
        if not isinstance(fortran, bool | int):
            raise Damaged("an array of unknown order")
        return self._numbers(data, dtype, shape, "F" if fortran else "C", depth)

    def _array_of_buffer(self, made: Made, depth: int) -> Tensor:
        data, dtype, shape, order = _arguments(made, 4, 4)
        if order not in ("C", "F"):
            raise Damaged("an array of unknown order")
        return self._numbers(data, dtype, shape, order, depth)

    def _scalar(self, made: Made, depth: int) -> bool | int | float:
        dtype, data = _arguments(made, 2, 2)
        return self._numbers(data, dtype, (), "C", depth).read().item()

    def _numbers(
        self, data: Any, dtype: Any, shape: Any, order: Literal["C", "F"], depth: int
    ) -> Tensor:
        kind, big_endian = _number_type(dtype)
        shape = _whole_numbers((shape,) if type(shape) is int else shape, "a shape")
        if problem := shape_problem(shape):
            raise Damaged(f"an array with {problem}")
        if isinstance(data, list):
            raise Refused("it has a NumPy array of objects instead of numbers")
        data = self._bytes(data, depth)
        if len(data) != math.prod(shape) * kind.stored.itemsize:
            raise Damaged(f"an array of the shape {list(shape)} with {len(data):,} bytes")

        def read() -> np.ndarray:
            found = stored(data, kind, big_endian=big_endian)
            return decode(found, kind).reshape(shape, order=order)

        return Tensor(shape, kind.dtype, read)

    def _dtype(self, made: Made, depth: int) -> str:
        return _number_type(made)[0].dtype.name


_UNDER_WAY = object()
_BYTES = ("_codecs.encode", "builtins.bytes", "builtins.bytearray")

# What a file may make, and how that is read.
_FORMS: dict[tuple[str, str], Callable[[Forms, Made, int], Any]] = {
    ("collections", "OrderedDict"): Forms._ordered,
    ("collections", "Counter"): Forms._ordered,
    ("builtins", "dict"): Forms._ordered,
    ("collections", "defaultdict"): Forms._default_dict,
    ("builtins", "set"): Forms._of_list,
    ("builtins", "frozenset"): Forms._of_list,
    ("builtins", "list"): Forms._of_list,
    ("builtins", "int"): Forms._number,
    ("builtins", "float"): Forms._number,
    ("builtins", "complex"): Forms._number,
    ("builtins", "bytes"): Forms._byte_string,
    ("builtins", "bytearray"): Forms._byte_string,
    ("_codecs", "encode"): Forms._byte_string,
    ("settings", ""): Forms._settings,
    ("copyreg", "_reconstructor"): Forms._reconstructed,
    ("torch", "Size"): Forms._size,
    ("torch", "device"): Forms._device,
    ("torch._utils", "_rebuild_tensor_v2"): Forms._tensor,
    ("torch._utils", "_rebuild_tensor"): Forms._tensor,
    ("torch._utils", "_rebuild_parameter"): Forms._parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): Forms._parameter,
    ("torch.nn.parameter", "Parameter"): Forms._parameter,
    ("numpy", "dtype"): Forms._dtype,
    ("numpy", "_reconstruct"): Forms._array,
    ("numpy", "scalar"): Forms._scalar,
    ("numpy", "_frombuffer"): Forms._array_of_buffer,
}
# Classes that are named as an argument and never made.
_BARE = {("numpy", "ndarray")} | {
    ("builtins", name) for name in ("object", "str", "bool", "long", "tuple")
}


def _storage_values(storage: Storage) -> Tensor:
    return Tensor(
        (storage.count,), storage.kind.dtype, lambda: decode(storage.read(), storage.kind)
    )


def _arguments(made: Made, least: int, most: int) -> tuple[Any, ...]:
    if not least <= len(made.args) <= most:
        raise Damaged(f"{len(made.args)} arguments")
    return made.args


def _whole_numbers(value: Any, what: str) -> tuple[int, ...]:
    """A tuple of integers, or the torch.Size of one."""
    if isinstance(value, Made) and str(value.function) == "torch.Size":
        (value,) = _arguments(value, 1, 1)
    if not isinstance(value, tuple) or len(value) > MAX_RANK:
        raise Damaged(f"{what} that is no tuple, or of more than {MAX_RANK} axes")
    if any(type(n) is not int or n < 0 for n in value):
        raise Damaged(f"{what} with something that is no natural number")
    return value


def _latin1(text: str) -> bytes:
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise Damaged("a text that holds no bytes") from None


def _number_type(made: Any) -> tuple[Kind, bool]:
    """(type, whether its bytes are big-endian) of a numpy.dtype."""
    if not isinstance(made, Made) or str(made.function) != "numpy.dtype":
        raise Damaged("an array without a number type")
    code = _arguments(made, 1, 3)[0]
    order, kind = "|", _NUMPY_KINDS.get(code.lstrip("<>|=") if isinstance(code, str) else "")
    if kind is None:
        raise Refused(f"it has a NumPy array of the type {quoted(code)}, which is none of numbers")
    if isinstance(code, str) and code[0] in "<>":
        order = code[0]
    if made.state is not NOTHING:
        # version, byte order, sub-array, names, fields, item size, alignment, flags, metadata
        state = made.state if isinstance(made.state, tuple) else ()
        plain = (None, None, None, -1, -1)
        rest = state[7:]
        if not 7 <= len(state) <= 9 or state[2:7] != plain or any(x not in (0, None) for x in rest):
            raise Refused("it has a NumPy type with parts, which is none of numbers")
        if state[1] not in ("<", ">", "|", "="):
            raise Damaged("an array of unknown byte order")
        order = state[1]
    return kind, order == ">"
