"""Hostile pickles and archives: a maker for each, and what the refusal must say."""

from __future__ import annotations

import os
import pathlib
import struct
import zipfile
from collections.abc import Callable

from tests.weights import crafting as c

# name -> (makes the file in a folder and gives its path, regex of the message)
ATTACKS: dict[str, tuple[Callable[[pathlib.Path], pathlib.Path], str]] = {}


def attack(message: str):
    def add(maker):
        ATTACKS[maker.__name__] = (maker, message)
        return maker

    return add


def pickled(label: str, body: bytes, message: str) -> None:
    """An attack that is one pickle, as a plain one."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / "model.pkl"
        path.write_bytes(body)
        return path

    ATTACKS[label] = (make, message)


def zipped(label: str, body: bytes, message: str, **options) -> None:
    ATTACKS[label] = (lambda folder: c.archive(folder / "model.pth", body, **options), message)


def streamed(label: str, body: bytes, message: str, **options) -> None:
    ATTACKS[label] = (lambda folder: c.stream(folder / "model.pth", body, **options), message)


EIGHT = c.binary(bytes(32))
SHAPE = c.numbers(8)

# ------------------------------------------------------------------ NumPy's objects

for label, kind, message in (
    ("a dtype forged into objects", c.dtype(c.text("O8"), c.dtype_state("|", flags=63)), "type O8"),
    ("a dtype with forged flags", c.dtype(state=c.dtype_state(flags=63)), "type with parts"),
    ("a dtype of far size", c.dtype(state=c.dtype_state(size=1 << 30, align=1)), "with parts"),
    (
        "a dtype with a sub-array",
        c.dtype(state=c.dtype_state(parts=c.many(c.dtype(), c.numbers(1 << 20)))),
        "with parts",
    ),
    (
        "a dtype with fields at far offsets",
        c.dtype(
            c.text("V8"),
            c.dtype_state(
                names=c.many(c.text("a")),
                fields=c.mapping({"a": c.many(c.dtype(), c.integer(1 << 40))}),
                size=8,
            ),
        ),
        "type V8",
    ),
    ("a dtype of texts", c.dtype(c.text("U100000000")), "type U100000000"),
    ("a dtype of records", c.dtype(c.text("f4,(1000,1000)f8")), "none of numbers"),
    ("a dtype whose name is a list", c.dtype(b"]"), "the type a list"),
    ("a dtype that is a class", c.name("numpy", "ndarray"), "without a number type"),
    ("a dtype with its state set twice", c.dtype(state=c.dtype_state()) + b"}b", "twice"),
):
    pickled(label, c.model(c.array(EIGHT, SHAPE, kind)), message)

MULTIARRAY = "numpy.core.multiarray"
for label, body, message in (
    (
        "an array without data",
        c.call(c.name("numpy", "ndarray"), c.numbers(1000), c.text("f4")),
        "makes a numpy.ndarray",
    ),
    (
        "a shell that nothing fills",
        c.call(
            c.name(MULTIARRAY, "_reconstruct"),
            c.name("numpy", "ndarray"),
            c.numbers(1000),
            c.text("f4"),
        ),
        "without its data",
    ),
    ("an array of too few bytes", c.array(c.binary(bytes(31)), SHAPE, c.dtype()), "31 bytes"),
    ("an array of objects", c.array(c.listed(b"N", b"N"), c.numbers(2), c.dtype()), "objects"),
    ("an array of a huge shape", c.array(EIGHT, c.numbers(1 << 62, 4), c.dtype()), "impossible"),
    ("an array of negative shape", c.array(EIGHT, c.numbers(-8), c.dtype()), "no natural number"),
    ("an array of many axes", c.array(EIGHT, c.numbers(*[1] * 1000), c.dtype()), "16 axes"),
    (
        "an empty array of a huge shape",
        c.array(c.binary(b""), c.numbers(0, 1 << 62, 1 << 62), c.dtype()),
        "impossible",
    ),
    (
        "a number of too few bytes",
        c.call(c.name(MULTIARRAY, "scalar"), c.dtype(), c.binary(b"12")),
        "with 2 bytes",
    ),
    (
        "a buffer of too few bytes",
        c.call(
            c.name("numpy._core.numeric", "_frombuffer"),
            EIGHT,
            c.dtype(),
            c.numbers(9),
            c.text("C"),
        ),
        "32 bytes",
    ),
    (
        "memory by a number",
        c.call(c.name("builtins", "bytearray"), c.integer(1 << 40)),
        "bytearray",
    ),
    ("bytes by a number", c.call(c.name("builtins", "bytes"), c.integer(1 << 40)), "bytes of some"),
    (
        "another codec",
        c.call(c.name("_codecs", "encode"), c.text("a" * 99), c.text("punycode")),
        "else than latin1",
    ),
    ("a list of a number", c.call(c.name("builtins", "list"), b"J\xff\xff\xff\x7f"), "than a list"),
    ("a number from text", c.call(c.name("builtins", "int"), c.text("9" * 10**6)), "a number"),
):
    pickled(label, c.model(body), message)

# ------------------------------------------------------------------ classes and opcodes

COUNTER = c.name("collections", "Counter")
for label, body, message in (
    ("state for a class", COUNTER + c.mapping({"update": b"N"}) + b"b", "not an object.*BUILD"),
    ("state for OrderedDict", c.name("collections", "OrderedDict") + b"}b", "BUILD"),
    ("items for a class", COUNTER + c.text("a") + b"Ns", "not a dict.*SETITEM"),
    ("a class as a value", COUNTER, "holds collections.Counter where"),
    ("a call of what was called", c.call(c.call(COUNTER)), "not a name.*REDUCE"),
    ("a call of a text", c.call(c.text("os.system")), "not a name.*REDUCE"),
    ("state for a dict", b"}}b", "BUILD"),
    ("members for a dict", b"}(Ne", "not a list.*APPENDS"),
    ("a call without a tuple", COUNTER + b"}R", "no tuple"),
    ("a forbidden name", c.name("builtins", "eval"), "names builtins.eval,.*GLOBAL at byte"),
    ("a dotted name", c.name("numpy", "ndarray.__reduce__"), "names numpy.ndarray.__reduce__"),
    ("an attribute of a module", c.name("torch", "load"), "names torch.load"),
    ("a stack global", b"\x8c\x02os\x8c\x06system\x93", "names os.system.*STACK_GLOBAL"),
    ("a name that garbles", c.name("a\x1b[2J", "b\r"), r"names 'a\\x1b\[2J"),
    ("a name without end", b"c" + b"a" * 10**6, "line that is too long"),
    ("INST", b"(ios\nsystem\n", "opcode INST"),
    ("OBJ", b"(" + COUNTER + b"o", "opcode OBJ"),
    ("NEWOBJ_EX", COUNTER + b")}\x92", "opcode NEWOBJ_EX"),
    ("EXT1", b"\x82\x01", "opcode EXT1"),
    ("DUP", b"}2", "opcode DUP"),
    ("POP", b"}0", "opcode POP"),
    ("PERSID", b"Pabc\n", "opcode PERSID"),
    ("NEXT_BUFFER", b"\x97", "opcode NEXT_BUFFER"),
    ("no opcode", b"\xff", "0xff at byte"),
    ("a reference outside", b"NQ", "outside of it.*BINPERSID"),
    ("a value that was never kept", b"j\xff\xff\xff\xff", "never kept"),
    ("a value from below the mark", b"(s", "not there"),
    ("a mark that is missing", b"t" * 9, "not there"),
    ("2^62 bytes", b"\x8e" + struct.pack("<Q", 1 << 62), "announced"),
    ("2^62 letters", b"\x8d" + struct.pack("<Q", 1 << 62), "announced"),
    ("a bytearray of 2^62", b"\x96" + struct.pack("<Q", 1 << 62), "announced"),
    ("bytes of negative length", b"T" + struct.pack("<i", -5), "announced"),
    ("a number of a megabyte", b"\x8b" + struct.pack("<i", 1 << 20) + bytes(1 << 20), "integer of"),
    ("a number of a million digits", b"I" + b"9" * 10**6 + b"\n", "line that is too long"),
    ("a number of a million letters", b"L" + b"9" * 10**6 + b"L\n", "line that is too long"),
    ("protocol 200", b"\x80\xc8", "protocol 200"),
    ("text that is none", c.text(b"\xff\xfe"), "not UTF-8"),
    ("a string without quotes", b"Sabc\n", "quotes"),
    ("a key without value", b"}(Nu", "key without"),
):
    pickled(label, c.model(body), message)

# ------------------------------------------------------------------ bombs and circles


def laughs(levels: int = 40, wide: int = 10) -> bytes:
    """Lists of lists that would print as 10^40 items, each made once."""
    out = b"(]q\x00"
    for level in range(levels):
        out += b"](" + (b"h" + bytes([level])) * wide + b"eq" + bytes([level + 1])
    return out + b"t"


for label, body, message in (
    ("a list in itself", b"]q\x00h\x00a", "contains itself"),
    ("a dict in itself", b"}q\x00Nh\x00s", "contains itself"),
    ("a tuple in itself", b"]q\x00h\x00\x85a", "contains itself"),
    (
        "an ordered dict of itself",
        b"]q\x00K\x01" + c.name("collections", "OrderedDict") + b"h\x00\x85R\x86a",
        "contains itself",
    ),
    ("laughs as a number type", c.array(EIGHT, SHAPE, c.dtype(laughs())), "the type a tuple"),
    ("laughs as a shape", c.array(EIGHT, laughs(), c.dtype()), "16 axes"),
    ("laughs as a device", c.call(c.name("torch", "device"), laughs()), "without a name"),
    ("laughs as a key", b"}" + laughs() + b"\x85Ns", "key that is no text"),
    ("lists deep as a well", b"]" * 10**5 + b"a" * (10**5 - 1), "deeper than 60"),
    ("tuples deep as a well", b"N" + b"\x85" * 10**6, "deeper than 60"),
    ("a key deep as a well", b"}N" + b"\x85" * 10**6 + b"Ns", "deeper than 60"),
    ("dicts deep as a well", b"}N" * 10**5 + b"N" + b"s" * 10**5, "deeper than 60"),
    (
        "calls deep as a well",
        c.name("torch._utils", "_rebuild_parameter") * 10**5 + b"N" + b"\x85R" * 10**5,
        "deeper than 60",
    ),
    ("three million values", b"(" + b"N" * 3_000_000 + b"t", "more than 2,000,000 opcodes"),
    ("three million dicts", b"(" + b"}" * 3_000_000 + b"t", "more than 2,000,000 opcodes"),
    ("three million marks", b"(" * 3_000_000, "more than 2,000,000 opcodes"),
    (
        "a list copied without end",
        b"](" + b"NN\x86" * 200_000 + b"eq\x000"[:-1]
        + b"](" + (c.name("collections", "OrderedDict") + b"h\x00\x85R") * 20_000 + b"e\x86",
        "copies its parts so often",
    ),
    (
        "a text copied without end",
        c.text("a" * 10**6) + b"q\x00("
        + (c.name("_codecs", "encode") + b"h\x00\x85R") * 20_000 + b"t\x86",
        "copies its parts so often",
    ),
    (
        "settings of everything",
        c.call(c.name("argparse", "Namespace"), laughs()) + laughs() + b"b",
        "holds no tensors",
    ),
):  # fmt: skip
    pickled(label, c.model(body), message)

for label, body, message in (
    ("stride 0", c.tensor(c.storage(4), c.numbers(1 << 40), c.numbers(0)), "repeats"),
    (
        "a tensor that ends behind its storage",
        c.tensor(c.storage(4), c.numbers(4), c.numbers(1), c.integer(1)),
        "element 4 of 4",
    ),
    (
        "a tensor of negative offset",
        c.tensor(c.storage(4), c.numbers(4), c.numbers(1), c.integer(-1)),
        "offset",
    ),
    ("a negative stride", c.tensor(c.storage(4), c.numbers(4), c.numbers(-1)), "strides"),
    (
        "a tensor of Boolean sizes",
        c.tensor(c.storage(4), c.many(b"\x88"), c.many(b"\x88")),
        "natural",
    ),
    (
        "a tensor of fractions",
        c.tensor(c.storage(4), c.many(b"G?\xe0" + bytes(6)), c.numbers(1)),
        "natural",
    ),
    (
        "an empty tensor of a huge shape",
        c.tensor(c.storage(4), c.numbers(0, 1 << 62), c.numbers(1, 1)),
        "impossible",
    ),
    (
        "a tensor of many axes",
        c.tensor(c.storage(4), c.numbers(*[1] * 999), c.numbers(*[1] * 999)),
        "16 axes",
    ),
    (
        "a storage that grows after its check",
        c.tensor(
            c.storage(4) + c.mapping({"count": c.integer(1 << 20)}) + b"b",
            *(c.numbers(4), c.numbers(1)),
        ),
        "not an object.*BUILD",
    ),
    (
        "a storage given twice",
        c.many(c.vector(4), c.vector(400)),
        "too few|given twice",
    ),
    (
        "a storage given twice, smaller",
        c.many(c.vector(4), c.vector(2)),
        "given twice",
    ),
    (
        "a storage given twice, of another type",
        c.many(c.vector(4), c.tensor(c.storage(2, "0", "LongStorage"), c.numbers(2), c.numbers(1))),
        "given twice",
    ),
    ("a storage that leads out", c.vector(4, "../../etc/passwd"), "there is no|storage"),
    ("a storage of negative size", c.vector(-4), "without a key or a size"),
    ("a storage of 2^62", c.vector(1 << 62), "too few|impossible"),
    (
        "a storage of an unknown type",
        c.tensor(c.storage(4, "0", "QInt8Storage"), SHAPE, SHAPE),
        "names torch.QInt8Storage",
    ),
    (
        "a module and its source",
        c.many(c.text("module"), COUNTER, c.text("a.py"), c.text("import os")) + b"Q",
        "refers to a module outside",
    ),
    (
        "a storage within another",
        c.tensor(
            c.storage(4, "0", "FloatStorage", c.many(c.text("1"), b"K\x00", b"K\x04")),
            *(c.numbers(4), c.numbers(1)),
        ),
        "part of another",
    ),
    ("a tensor of a dict", c.tensor(b"}", c.numbers(4), c.numbers(1)), "without a storage"),
):
    zipped(f"zip: {label}", c.model(body), message)
    if "2^62" not in label:
        streamed(f"stream: {label}", c.model(body), message)


@attack("would take")
def one_storage_shown_as_a_thousand_tensors(folder):
    size = 1 << 20
    body = c.whole(
        c.mapping({f"w{i}": c.vector(size) for i in range(1000)}),
    )
    return c.archive(folder / "model.pth", body, {"data/0": bytes(4 * size)})


@attack("would take")
def a_million_numbers_shown_in_two_thousand_ways(folder):
    """Each of them is small in the pickle and, of bfloat16, twice its storage in memory."""
    count = 1 << 20
    stored = c.storage(count, "0", "BFloat16Storage")
    views = {
        f"w{i}": c.tensor(stored, c.numbers(2, count // 2), c.numbers(1, 2)) for i in range(99)
    }
    return c.archive(folder / "model.pth", c.whole(c.mapping(views)), {"data/0": bytes(2 * count)})


# ------------------------------------------------------------------ archives and streams

GOOD = c.model(c.vector(4))
zipped("a compressed archive", GOOD, "compressed", compression=zipfile.ZIP_DEFLATED)
zipped("a member that is missing", GOOD, "no archive/data/0", members={})
zipped("a member of too few bytes", GOOD, "has 3 bytes", members={"data/0": b"123"})
zipped("two pickles", GOOD, "2 data.pkl", members={"x/data.pkl": b"", "data/0": bytes(16)})
zipped("an unknown byte order", GOOD, "byte order", members={"byteorder": b"middle"})
zipped("a long byte order", GOOD, "byte order", members={"byteorder": b"little" * 10**6})
streamed("another version", GOOD, "version 7", version=7)
streamed("keys that are no list", GOOD, "list of storages", keys=c.whole(b"}"))
streamed("keys that are no texts", GOOD, "list of storages", keys=c.whole(c.listed(b"N")))
streamed("a key too many", GOOD, "no tensor", keys=c.whole(c.listed(c.text("0"), c.text("1"))))
streamed("a key twice", GOOD, "twice", keys=c.whole(c.listed(c.text("0"), c.text("0"))))
streamed("a key too few", GOOD, "is missing", keys=c.whole(b"]"))
streamed("another count", GOOD, "elements, not 4", data=struct.pack("<q", 2**60) + bytes(16))
streamed("a negative count", GOOD, "elements, not 4", data=struct.pack("<q", -4) + bytes(16))
streamed("half a storage", GOOD, "within storage", data=struct.pack("<q", 4) + bytes(8))
streamed("no storage", GOOD, "before its storages", data=b"")
streamed("no tail", GOOD, "middle of a pickle", keys=b"", data=b"")


@attack("is compressed|would have")
def a_zip_bomb(folder):
    path = folder / "model.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(300 << 20))
    return path


@attack("two members")
def a_member_twice(folder):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = c.archive(folder / "model.pth", GOOD)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("archive/data/0", bytes(16))
    return path


@attack("is encrypted")
def an_encrypted_member(folder):
    path = c.archive(folder / "model.pth", GOOD)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


@attack("would have")
def a_member_larger_than_the_file(folder):
    path = c.archive(folder / "model.pth", GOOD)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00)
    path.write_bytes(data)
    return path


@attack("is damaged: archive/data/0")
def a_member_of_another_name_inside(folder):
    path = c.archive(folder / "model.pth", GOOD)
    data = bytearray(path.read_bytes())
    data[data.index(b"archive/data/0")] ^= 1
    path.write_bytes(data)
    return path


@attack("table of contents of more than")
def a_table_of_contents_of_20_MB(folder):
    path = folder / "model.pth"
    line = b"PK\x01\x02" + bytes(42)
    count = 20 * 2**20 // len(line)
    size = count * len(line)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, size, 30, 0)
    path.write_bytes(b"PK\x03\x04" + bytes(26) + line * count + end)
    return path


@attack("truncated or damaged")
def half_an_archive(folder):
    path = c.archive(folder / "model.pth", GOOD)
    path.write_bytes(path.read_bytes()[:-30])
    return path


# ------------------------------------------------------------------ names and other texts

for label, key in (
    ("a name of 10,000 letters", "a" * 10_000),
    ("a name that clears the screen", "w\x1b[2J\x1b[1;1H"),
    ("a name of two lines", "w\n/etc/passwd is damaged"),
):
    pickled(label, c.model(c.array(EIGHT, SHAPE, c.dtype()), key), "a tensor is named")
pickled("keys that garble", c.whole(c.mapping({"a\x1b[2J" * 99: b"N"})), r"holds no tensors.*\\x1b")


def described(label: str, description: str, message: str) -> None:
    own = {"model": c.mapping({"w": c.vector(4)}), "oneformer_jax": c.text(description)}
    zipped(f"described by {label}", c.whole(c.mapping(own)), message)


described("half an object", '{"model": ', "the text under 'oneformer_jax'")
described("not a number", '{"model": NaN}', "is damaged")
described("a list", "[1, 2]", "unexpected value")
described("a well", '{"a":' * 10**5, "nested too deeply|damaged")
described("five megabytes", '"' + "a" * 5 * 2**20 + '"', "more than 4,194,304 characters")

# ------------------------------------------------------------------ what is no file of tensors


@attack("is empty")
def an_empty_file(folder):
    (folder / "model.pth").write_bytes(b"")
    return folder / "model.pth"


@attack("not a regular file")
def a_pipe(folder):
    os.mkfifo(folder / "model.pth")
    return folder / "model.pth"


@attack("not a regular file")
def a_pipe_of_safetensors(folder):
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


@attack("not a regular file")
def a_device(folder):
    (folder / "model.pth").symlink_to("/dev/zero")
    return folder / "model.pth"


@attack("expected a Hugging Face folder")
def a_folder_with_a_files_name(folder):
    (folder / "model.pth").mkdir()
    return folder / "model.pth"


@attack("does not exist")
def a_link_to_nothing(folder):
    (folder / "model.pth").symlink_to(folder / "nothing")
    return folder / "model.pth"
