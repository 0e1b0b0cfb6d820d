"""Reads the communication and the largest arrays of a compiled program from its text.

Understands the HLO text of XLA's CPU, GPU and TPU compilers, with both ways of naming the source.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16}
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
HOST = "host transfer"
SLICES = "between slices"
# Operations whose results have no memory of their own.
_ALIASES = re.compile(
    r"parameter|tuple|get-tuple-element|bitcast|while|conditional|call|optimization-barrier"
    r"|.*-(start|update|done)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a compiled program, as one device holds it."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * _bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """Bytes with a TPU's padding: the two minor dimensions are multiples of the tile."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\((\d+(?:,\d+)*)\)", rest)
        if not tile or not self.dims or not order:
            return self.bytes
        minor_first = [int(axis) for axis in order.split(",")]
        sizes = [self.dims[axis] for axis in minor_first]
        for place, size in enumerate(int(n) for n in reversed(tile[1].split(","))):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // size) * size
        return math.prod(sizes) * _bits(self.dtype) // 8

    @property
    def in_main_memory(self) -> bool:
        """True unless it is in a TPU's vector or scalar memory, or on the host."""
        return not re.search(r"S\([1-9]\)", self.layout)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication of a compiled program.

    Attributes:
      kind: "all-reduce", "all-gather", ..., "host transfer" or, over the network that joins TPU
        slices, "between slices".
      shapes: its results on one device; between slices, the arrays that a device sends.
      group: number of devices that take part together.
      times: number of runs in a step (more than one within loops).
      source: file and line that made it, or "".
      name: the compiler's name of the operation, such as "jit(train_step)/jvp()/dot_general";
        between slices its purpose: "ALL_REDUCE", "ALL_GATHER".
    """

    kind: str
    shapes: tuple[Shape, ...]
    group: int
    times: int
    source: str
    name: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends per step, at least, with ring algorithms.

        Transfers to and from the host both count; those between slices count once.
        """
        size = sum(shape.bytes for shape in self.shapes)
        share = (self.group - 1) / self.group
        factor = {
            "all-reduce": 2 * share,
            "all-gather": share,
            "reduce-scatter": self.group - 1,  # the result is one part of the operand
            "all-to-all": share,
            "ragged-all-to-all": share,
        }.get(self.kind, 1.0)
        return size * factor * self.times

    @property
    def elements(self) -> int:
        """Elements of the whole largest array that takes part."""
        size = max(math.prod(shape.dims) for shape in self.shapes)
        return size * self.group if self.kind == "reduce-scatter" else size


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Arrays of one shape from one source line.

    Attributes:
      bytes: size of one of them on one device, with padding.
      count: number of instructions that make one.
      shape: text such as "f32[1,150,65536]".
      source: file and line, or "".
      name: the compiler's name of the operation.
    """

    bytes: int
    count: int
    shape: str
    source: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
    type: str
    opcode: str
    line: str

    def attribute(self, pattern: str) -> str:
        match = re.search(pattern, self.line)
        return match[1] if match else ""


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d), layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _instruction(line: str) -> _Instruction | None:
    _, equals, rest = line.partition(" = ")
    if not equals:
        return None
    if rest.startswith("("):
        depth = end = 0
        while end == 0 or depth > 0:
            depth += (rest[end] == "(") - (rest[end] == ")")
            end += 1
        kind, rest = rest[:end], rest[end:]
    else:
        kind, _, rest = rest.partition(" ")
    opcode, paren, _ = rest.strip().partition("(")
    return _Instruction(kind, opcode, line) if paren else None


class Program:
    """The parsed text of a compiled program."""

    def __init__(self, text: str, num_devices: int):
        """`text` is `compiled.as_text()`; `num_devices` take part."""
        self._devices = num_devices
        self._computations: dict[str, list[_Instruction]] = {}
        self._tables: dict[str, dict[int, str]] = {}
        self._entry = ""
        self._parse(text)
        self._times: dict[str, int] = {}
        self._fused: set[str] = set()
        self._walk(self._entry, 1, fused=False)

    def _parse(self, text: str) -> None:
        current = table = None
        for line in text.splitlines():
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables.setdefault(line, {})
            elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
                table[int(row[1])] = row[2]
            elif header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                table = None
                current = self._computations.setdefault(header[2], [])
                if header[1]:
                    self._entry = header[2]
            elif current is not None and (instruction := _instruction(line)):
                current.append(instruction)
        if not self._entry:
            raise ValueError("this is not the text of a compiled program: it has no ENTRY")

    def _walk(self, name: str, times: int, *, fused: bool) -> None:
        """Counts the runs of each computation, from the entry on."""
        if name not in self._computations or self._times.get(name, 0) >= times:
            return
        self._times[name] = times
        if fused:
            self._fused.add(name)
        for instruction in self._computations[name]:
            if instruction.opcode == "while":
                condition = instruction.attribute(r"condition=%?([\w.\-]+)")
                trips = instruction.attribute(r'"?known_trip_count"?:\{"?n"?:"?(\d+)')
                count = int(trips) if trips else self._trips(condition)
                self._walk(instruction.attribute(r"body=%?([\w.\-]+)"), times * count, fused=fused)
            elif instruction.opcode == "conditional":
                branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
                names = re.findall(r"%?([\w.\-]+)", branches) or [
                    instruction.attribute(rf"{side}_computation=%?([\w.\-]+)")
                    for side in ("true", "false")
                ]
                for branch in names:
                    self._walk(branch, times, fused=fused)
            elif instruction.opcode in ("call", "async-start", "fusion", "custom-call"):
                called = instruction.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
                inner = fused or instruction.opcode == "fusion"
                self._walk(called, times, fused=inner)

    def _trips(self, condition: str) -> int:
        """Iterations of a loop that counts from 0 to a constant; 1 for other loops."""
        instructions = self._computations.get(condition, [])
        constants = [
            int(match[1])
            for i in instructions
            if i.opcode == "constant" and (match := re.search(r"constant\((\d+)\)", i.line))
        ]
        less = any("direction=LT" in i.line for i in instructions)
        return max(constants[0], 1) if less and len(constants) == 1 else 1

    def _source(self, instruction: _Instruction) -> str:
        """ "file:line" of the innermost frame in this repository, else of the innermost."""
        if frame := instruction.attribute(r"stack_frame_id=(\d+)"):
            places = list(self._frames(int(frame)))
            return next((p for p in places if _is_ours(p)), places[0] if places else "")
        if file := instruction.attribute(r'source_file="([^"]*)"'):
            line = instruction.attribute(r"source_line=(\d+)")
            return _relative(f"{file}:{line}")
        # A fusion without a source takes that of its last instruction.
        called = instruction.attribute(r" calls=%?([\w.\-]+)")
        inside = reversed(self._computations.get(called, []) if called else [])
        return next((place for i in inside if (place := self._source(i))), "")

    def _frames(self, frame: int) -> Iterator[str]:
        """Yields the sources of a stack frame and its callers, innermost first."""
        for _ in range(100):
            row = self._tables.get("StackFrames", {}).get(frame, "")
            location = re.search(r"file_location_id=(\d+)", row)
            place = location and self._tables["FileLocations"].get(int(location[1]), "")
            if not place:
                return
            file = int(re.search(r"file_name_id=(\d+)", place)[1])
            line = re.search(r"\bline=(\d+)", place)[1]
            path = self._tables["FileNames"][file].strip('"')
            yield _relative(f"{path}:{line}")
            parent = re.search(r"parent_frame_id=(\d+)", row)
            # The parent's number is one more than its row; 1 means no parent.
            frame = int(parent[1]) - 1 if parent else 0

    def _reached(self) -> Iterator[tuple[str, _Instruction, int]]:
        for name, times in self._times.items():
            for instruction in self._computations[name]:
                yield name, instruction, times

    def collectives(self) -> list[Collective]:
        """Returns all communication of a step, transfers to and from the host included."""
        found: dict[object, Collective] = {}
        for number, (computation, instruction, times) in enumerate(self._reached()):
            kind = instruction.opcode.removesuffix("-start")
            shapes = _shapes(instruction.type)
            group, purpose = 2, ""
            if kind in _COLLECTIVES:
                group = self._group(instruction.line)
                if instruction.opcode.endswith("-start") and kind != "all-reduce":
                    # (operands, results[, contexts]): keep the results.
                    arrays = [s for s in shapes if s.dims or s.dtype not in ("u32", "s32")]
                    shapes = tuple(arrays[len(arrays) // 2 :])
                if kind == "all-reduce" and "all-reduce-scatter" in computation:
                    # A TPU's reduce-scatter is an all-reduce of which each device keeps its part.
                    kind = "reduce-scatter"
                    shapes = tuple(
                        dataclasses.replace(s, dims=(-(-math.prod(s.dims) // group),))
                        for s in shapes
                    )
            elif kind in ("send", "recv") and "is_host_transfer=true" in instruction.line:
                # The network between slices is reached through the host.
                purpose = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
                if purpose and kind == "recv":
                    continue
                kind, shapes = SLICES if purpose else HOST, shapes[:1]
            else:
                continue
            # Pieces of one communication share its channel.
            channel = instruction.attribute(r"channel_id=(\d+)")
            key = (kind, channel) if channel else number
            name = purpose or instruction.attribute(r'op_name="([^"]*)"')
            if group > 1 and shapes and key not in found:
                source = self._source(instruction)
                found[key] = Collective(kind, shapes, group, times, source, name)
        return list(found.values())

    def _group(self, line: str) -> int:
        """Devices of one group of a collective."""
        if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
            return match[1].count(",") + 1
        if match := re.search(r"replica_groups=\[(\d+(?:,\d+)*)\]<=", line):
            return int(match[1].split(",")[-1])
        if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
            sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
            return math.prod(int(part) if part else sizes[name] for name, part in axes)
        return 2 if "source_target_pairs" in line else self._devices

    def largest_buffers(self, count: int) -> list[Buffer]:
        """Returns the largest arrays in main memory, with one entry for a shape and source line.

        They need not all live at the same time.
        """
        found: dict[tuple[str, str], Buffer] = {}
        for computation, instruction, _ in self._reached():
            if computation in self._fused or _ALIASES.fullmatch(instruction.opcode):
                continue
            for shape in _shapes(instruction.type):
                if not shape.in_main_memory or shape.padded_bytes == 0:
                    continue
                source = self._source(instruction)
                old = found.get((str(shape), source))
                found[str(shape), source] = Buffer(
                    max(shape.padded_bytes, old.bytes if old else 0),
                    1 + (old.count if old else 0),
                    str(shape),
                    source,
                    old.name if old else instruction.attribute(r'op_name="([^"]*)"'),
                )
        return sorted(found.values(), key=lambda b: -b.bytes)[:count]


def _relative(place: str) -> str:
    path, _, line = place.rpartition(":")
    try:
        return f"{pathlib.Path(path).relative_to(ROOT)}:{line}"
    except ValueError:
        return f"{path.rpartition('site-packages/')[2]}:{line}"


def _is_ours(place: str) -> bool:
    return place.startswith(("oneformer_jax/", "kernels/"))


def sent_by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Sums up by kind: {kind: (runs in a step, bytes that one device sends)}, largest first."""
    total: dict[str, tuple[int, float]] = {}
    for collective in collectives:
        count, sent = total.get(collective.kind, (0, 0.0))
        total[collective.kind] = (count + collective.times, sent + collective.sent)
    return dict(sorted(total.items(), key=lambda item: -item[1][1]))
