"""Reads pickles into inert records: it interprets the opcodes that honest files of weights use.

Nothing is imported, called, or looked up by name. A class or function of the file becomes a
`Global` (two texts), a call of it a `Made`, a reference outside the pickle an `Outside`; sets and
dicts keep their members in lists, so that nothing is hashed or compared either. What the records
mean is decided elsewhere (`torch_forms.py`). Lengths are compared with the bytes that are there
before anything is allocated, and the number of opcodes is bounded, which bounds time and memory.
"""

from __future__ import annotations

import codecs
import mmap
import re
import struct
from collections.abc import Callable
from typing import Any, NoReturn

# A whole training state of the largest published model (weights, moments, averages) has 300,000.
MAX_OPCODES = 2_000_000
# Longer byte strings stay views of the file. Python 2 wrote text and bytes alike: up to this
# length they are read as text.
SHORT = 1024
_MAX_NAME = 200  # bytes of a module's or a class's name
_MAX_NUMBER = 160  # bytes of a number, as digits or in binary


class Damaged(Exception):
    """A pickle that no pickler wrote; the message says where."""


class Refused(Exception):
    """A pickle that asks for more than numbers; the message names the opcode and what it wants."""


class Global:
    """Two texts that would name a class or function."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Made:
    """Something that calling `function` with `args` would make, and what is put into it later.

    Attributes:
      function: what would be called.
      args: a tuple.
      state: what BUILD would set, or `NOTHING`.
      pairs: keys and values that SETITEM would add.
    """

    __slots__ = ("args", "function", "pairs", "state")

    def __init__(self, function: Global, args: tuple):
        self.function, self.args = function, args
        self.state: Any = NOTHING
        self.pairs: list[tuple[Any, Any]] = []


class Outside:
    """A persistent id: it stands for something outside of the pickle, such as a storage."""

    __slots__ = ("id",)

    def __init__(self, identity: Any):
        self.id = identity


class Dict:
    """The pairs of a dict, in order; a key may occur again and then replaces the earlier one."""

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []


class Set:
    """The members of a set, in the order of the file."""

    __slots__ = ("members",)

    def __init__(self, members: list[Any]):
        self.members = members


class _Nothing:
    __slots__ = ()


NOTHING = _Nothing()


def quoted(value: Any, limit: int = 100) -> str:
    """Shows a value of a file in messages: a text is escaped where it does not print, and cut."""
    # The text of a container could be longer than memory.
    text = str(value) if isinstance(value, str | int) else f"a {type(value).__name__}"
    cut = text[:limit]
    return (cut if cut.isprintable() else ascii(cut)) + ("..." if len(text) > limit else "")


def read(
    data: bytes | mmap.mmap, start: int, allowed: Callable[[str, str], bool]
) -> tuple[Any, int]:
    """Reads one pickle of the protocols 0 to 5.

    Args:
      data: the bytes; long byte strings of the result are views of them.
      start: where the pickle begins.
      allowed: tells whether a file may name this module and class.

    Returns:
      (value, end). The value consists of the records of this module and None, bool, int, float,
      str, bytes, bytearray, memoryview, list and tuple; `end` is the offset behind the pickle.

    Raises:
      Damaged: it is truncated or malformed, or larger than `MAX_OPCODES`.
      Refused: an opcode or a name that files of weights have no need of.
    """
    return _Reader(data, start, allowed).read()


class _Stop(Exception):
    pass


class _Reader:
    """The machine: a stack of values, the positions of marks in it, and the memo."""

    def __init__(self, data: bytes | mmap.mmap, start: int, allowed: Callable[[str, str], bool]):
        self._data, self._view, self._end = data, memoryview(data), len(data)
        self._at, self._allowed = start, allowed
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._floor = 0  # the last mark: no opcode but those that use it reaches below
        self._memo: dict[int, Any] = {}
        self._names: dict[tuple[str, str], Global] = {}

    def read(self) -> tuple[Any, int]:
        handlers = {ord(code): getattr(self, name) for code, name in _HANDLERS.items()}
        for code, (name, form) in _NUMBERED.items():
            handlers[ord(code)] = self._numbered(getattr(self, name), form)
        for code, make in _NEW.items():
            handlers[ord(code)] = lambda make=make: self._push(make())
        data, end = self._data, self._end
        for _ in range(MAX_OPCODES):
            at = self._at
            if at >= end:
                raise Damaged("it ends in the middle of a pickle")
            handler = handlers.get(data[at])
            if handler is None:
                self._unknown(data[at], at)
            self._at = at + 1
            try:
                handler()
            except _Stop:
                return self._result(), self._at
            except Refused as error:
                raise Refused(f"{error} (opcode {_name(data[at])} at byte {at:,})") from None
            except Damaged as error:
                raise Damaged(f"{error}, at byte {at:,}") from None
        raise Refused(f"its pickle has more than {MAX_OPCODES:,} opcodes")

    def _numbered(self, handler: Callable[[Any], None], form: str) -> Callable[[], None]:
        """A handler that takes the number which follows its opcode."""
        return lambda: handler(self._number(form))

    def _unknown(self, code: int, at: int) -> NoReturn:
        name = _name(code)
        if not name:
            raise Damaged(f"0x{code:02x} at byte {at:,} is no opcode of a pickle")
        raise Refused(
            f"it uses the opcode {name} at byte {at:,}, which a file of weights has no need of"
        )

    def _result(self) -> Any:
        if len(self._stack) != 1 or self._marks:
            raise Damaged("a pickle that ends with several values")
        return self._stack[0]

    # ---- bytes of the file

    def _take(self, count: int) -> memoryview:
        at = self._at
        if not 0 <= count <= self._end - at:
            raise Damaged(f"{count:,} bytes are announced and {self._end - at:,} are left")
        self._at = at + count
        return self._view[at : at + count]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self, limit: int | None = None) -> bytes:
        last = self._end if limit is None else min(self._end, self._at + limit + 1)
        end = self._data.find(b"\n", self._at, last)
        if end < 0:
            raise Damaged("a line without an end" if limit is None else "a line that is too long")
        line = bytes(self._view[self._at : end])
        self._at = end + 1
        return line

    # ---- the stack

    def _pop(self) -> Any:
        if len(self._stack) <= self._floor:
            raise Damaged("a value is used that is not there")
        return self._stack.pop()

    def _top(self, kinds: type | tuple[type, ...], what: str) -> Any:
        if len(self._stack) <= self._floor:
            raise Damaged("a value is used that is not there")
        if not isinstance(self._stack[-1], kinds):
            raise Refused(f"it changes something that is not {what}")
        return self._stack[-1]

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise Damaged("a mark is used that is not there")
        start = self._marks.pop()
        self._floor = self._marks[-1] if self._marks else 0
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._floor = len(self._stack)
        self._marks.append(self._floor)

    def stop(self) -> None:
        raise _Stop

    def proto(self) -> None:
        if (version := self._number("B")) > 5:
            raise Damaged(f"protocol {version} of pickle is not known")

    def frame(self) -> None:
        self._number("<Q")  # a hint about reading, of no meaning for the content

    # ---- numbers and constants

    def int_line(self) -> None:
        line = self._line(_MAX_NUMBER)
        if line in (b"00", b"01"):
            return self._push(line == b"01")
        return self._push(_digits(line))

    def long_line(self) -> None:
        self._push(_digits(self._line(_MAX_NUMBER).removesuffix(b"L")))

    def float_line(self) -> None:
        try:
            self._push(float(self._line(_MAX_NUMBER)))
        except ValueError:
            raise Damaged("a text that is no number") from None

    def _long(self, size: int) -> None:
        data = self._take(size)
        if size > _MAX_NUMBER:
            raise Refused(f"it has an integer of {size:,} bytes")
        self._push(int.from_bytes(data, "little", signed=True))

    # ---- text and bytes

    def _text(self, size: int) -> None:
        try:
            self._push(str(self._take(size), "utf-8"))
        except UnicodeDecodeError:
            raise Damaged("a text that is not UTF-8") from None

    def text_line(self) -> None:
        try:
            self._push(str(self._line(), "raw-unicode-escape"))
        except UnicodeDecodeError:
            raise Damaged("a text with a wrong escape") from None

    def _bytes(self, size: int) -> None:
        data = self._take(size)
        self._push(bytes(data) if size <= SHORT else data)

    def _old_string(self, data: memoryview | bytes) -> None:
        self._push(str(data, "latin1") if len(data) <= SHORT else data)

    def _string(self, size: int) -> None:
        self._old_string(self._take(size))

    def string_line(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise Damaged("a string without its quotes")
        try:
            self._old_string(codecs.escape_decode(line[1:-1])[0])
        except ValueError:
            raise Damaged("a string with a wrong escape") from None

    # ---- containers

    def tuple_of_mark(self) -> None:
        self._push(tuple(self._since_mark()))

    def tuple1(self) -> None:
        self._push((self._pop(),))

    def tuple2(self) -> None:
        second = self._pop()
        self._push((self._pop(), second))

    def tuple3(self) -> None:
        third, second = self._pop(), self._pop()
        self._push((self._pop(), second, third))

    def list_of_mark(self) -> None:
        self._push(self._since_mark())

    def append(self) -> None:
        value = self._pop()
        self._top(list, "a list").append(value)

    def appends(self) -> None:
        values = self._since_mark()
        self._top(list, "a list").extend(values)

    def dict_of_mark(self) -> None:
        found = Dict()
        found.pairs = _pairs(self._since_mark())
        self._push(found)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._top((Dict, Made), "a dict").pairs.append((key, value))

    def set_items(self) -> None:
        pairs = _pairs(self._since_mark())
        self._top((Dict, Made), "a dict").pairs.extend(pairs)

    def add_items(self) -> None:
        values = self._since_mark()
        self._top(Set, "a set").members.extend(values)

    def frozen_set(self) -> None:
        self._push(Set(self._since_mark()))

    # ---- the memo

    def _remember(self, index: int) -> None:
        if len(self._stack) <= self._floor:
            raise Damaged("a value is used that is not there")
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise Damaged(f"value {index} is used and was never kept")
        self._push(self._memo[index])

    def memoize(self) -> None:
        self._remember(len(self._memo))

    def put_line(self) -> None:
        self._remember(_digits(self._line(_MAX_NUMBER)))

    def get_line(self) -> None:
        self._recall(_digits(self._line(_MAX_NUMBER)))

    # ---- names and what is made by them

    def _global(self, module: str, name: str) -> None:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        found = self._names.get((module, name))
        if found is None:
            if not self._allowed(module, name):
                raise Refused(
                    f"it names {quoted(f'{module}.{name}')}, which a file of weights has no need "
                    "of; loading it elsewhere might run code. If you trust the file, load it where "
                    "it was made and save its state dict alone"
                )
            found = self._names[module, name] = Global(module, name)
        self._push(found)

    def global_lines(self) -> None:
        module, name = self._line(_MAX_NAME), self._line(_MAX_NAME)
        self._global(str(module, "utf-8", "replace"), str(name, "utf-8", "replace"))

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        for text in (module, name):
            if not isinstance(text, str) or len(text) > _MAX_NAME:
                raise Damaged("a name that is no short text")
        self._global(module, name)

    def reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if not isinstance(function, Global):
            raise Refused("it calls something that is not a name")
        if not isinstance(args, tuple):
            raise Damaged(f"arguments of {function} that are no tuple")
        self._push(Made(function, args))

    def build(self) -> None:
        state = self._pop()
        target = self._top(Made, "an object of the file")
        if target.state is not NOTHING:
            raise Refused(f"it sets the state of a {target.function} twice")
        target.state = state

    def outside(self) -> None:
        self._push(Outside(self._pop()))


def _digits(line: bytes) -> int:
    if not re.fullmatch(rb"-?[0-9]+", line):
        raise Damaged("a text that is no whole number")
    return int(line)


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    if len(values) % 2:
        raise Damaged("a key without its value")
    return list(zip(values[::2], values[1::2], strict=True))


def _name(code: int) -> str:
    """The name of an opcode, "" if there is none."""
    import pickletools

    found = pickletools.code2op.get(chr(code))  # type: ignore[attr-defined]
    return found.name if found else ""


# Opcode -> method. The others (POP, DUP, INST, OBJ, EXT1, NEWOBJ_EX, buffers outside...) are
# refused: no honest file of weights has them.
_HANDLERS = {
    "(": "mark",
    ".": "stop",
    "\x80": "proto",
    "\x95": "frame",
    "I": "int_line",
    "L": "long_line",
    "F": "float_line",
    "V": "text_line",
    "S": "string_line",
    "t": "tuple_of_mark",
    "\x85": "tuple1",
    "\x86": "tuple2",
    "\x87": "tuple3",
    "l": "list_of_mark",
    "a": "append",
    "e": "appends",
    "d": "dict_of_mark",
    "s": "set_item",
    "u": "set_items",
    "\x90": "add_items",
    "\x91": "frozen_set",
    "\x94": "memoize",
    "p": "put_line",
    "g": "get_line",
    "c": "global_lines",
    "\x93": "stack_global",
    "R": "reduce",
    "\x81": "reduce",  # NEWOBJ: what it would make is the same
    "b": "build",
    "Q": "outside",
}
# Opcode -> method of the number that follows, and its form.
_NUMBERED = {
    "J": ("_push", "<i"),
    "K": ("_push", "B"),
    "M": ("_push", "<H"),
    "G": ("_push", ">d"),
    "\x8a": ("_long", "B"),
    "\x8b": ("_long", "<i"),
    "\x8c": ("_text", "B"),
    "X": ("_text", "<I"),
    "\x8d": ("_text", "<Q"),
    "C": ("_bytes", "B"),
    "B": ("_bytes", "<I"),
    "\x8e": ("_bytes", "<Q"),
    "\x96": ("_bytes", "<Q"),  # a bytearray, which nobody changes here
    "U": ("_string", "B"),
    "T": ("_string", "<i"),
    "q": ("_remember", "B"),
    "r": ("_remember", "<I"),
    "h": ("_recall", "B"),
    "j": ("_recall", "<I"),
}
# Opcode -> what makes the value that it pushes.
_NEW: dict[str, Callable[[], Any]] = {
    "N": lambda: None,
    "\x88": lambda: True,
    "\x89": lambda: False,
    ")": tuple,
    "]": list,
    "}": Dict,
    "\x8f": lambda: Set([]),
}
