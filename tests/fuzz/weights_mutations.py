"""Mutates honest files of weights and reads them: `python weights_mutations.py READER FIRST COUNT`.

Runs in a process of its own. Mutation number i of a reader is always the same. Prints JSON: how
many files were read, how many refused, and each fault with its number: an exception that is no
FileError, a message of several lines, more than 10 s of processor time, or more memory than the
bound. A crash shows as the death of the process, which leaves the file where the test finds it.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import pickle
import pickletools
import random
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from oneformer_jax.weights import files, torch_pickle
from oneformer_jax.weights.files import FileError
from tests.peak_memory import peak_bytes
from tests.weights import crafting as c

SECONDS = 10
MEGABYTES = 700

_NUMBERS = (0, 1, 2, 4, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63)
_NAMES = (
    *(("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "defaultdict")),
    *(("builtins", "bytearray"), ("builtins", "list"), ("builtins", "set"), ("builtins", "int")),
    *(("builtins", "eval"), ("os", "system"), ("_codecs", "encode"), ("numpy", "dtype")),
    *(("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct"), ("torch", "Size")),
    *(("numpy.core.multiarray", "scalar"), ("numpy.core.numeric", "_frombuffer")),
    *(("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")),
    *(("torch", "FloatStorage"), ("torch", "LongStorage"), ("torch", "float32")),
    *(("argparse", "Namespace"), ("copyreg", "_reconstructor"), ("torch", "device")),
)
_VALUES = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e300, "", "a", "8"),
    *("\x1b[2J", "../a", "a" * 5000, [], {}, [1], [[1]], {"a": 1}, [None] * 300),
)


# ------------------------------------------------------------------ mutations


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few changes of bytes: flipped, replaced, deleted, inserted, copied, cut."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = rng.randbytes(length)
        elif kind == 4:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + length * 8]
        elif kind == 5:
            number = (rng.choice(_NUMBERS) - rng.randrange(2)) & (2**64 - 1)
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = (number & (256**width - 1)).to_bytes(width, "little")
        elif kind == 6:
            out[at : at + 1] = ord(rng.choice(list(pickletools.code2op))).to_bytes(1, "little")
        elif rng.random() < 0.2:
            del out[at:]
    return bytes(out)


def _opcodes(data: bytes) -> list[bytes]:
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def of_opcodes(data: bytes, rng: random.Random) -> bytes:
    """A few changes of opcodes: deleted, copied, swapped, replaced, others put between."""
    parts = _opcodes(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        kind = rng.randrange(7)
        if kind == 0 and len(parts) > 2:
            del parts[at]
        elif kind == 1:
            start = rng.randrange(len(parts))
            parts[at:at] = parts[start : start + rng.choice((1, 3, 10, 40))]
        elif kind == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts[at] = c.integer(rng.choice(_NUMBERS) * rng.choice((1, 1, -1)))
        elif kind == 4:
            parts[at] = c.name(*rng.choice(_NAMES))
        elif kind == 5:
            code = rng.choice([code for code in pickletools.code2op if code not in ".\x95"])
            parts[at:at] = [code.encode("latin1") + rng.randbytes(rng.choice((0, 0, 1, 4)))]
        else:
            parts[at] = rng.choice(
                (b"N", b"}", b"]", b")", b"(", b"b", b"R", b"s", b"a", b"t", b"Q")
            )
    return b"".join(parts)


def of_json(value: Any, rng: random.Random) -> Any:
    """The same object with a few values replaced, removed, wrapped, or put under other keys."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node, places = value, []
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places.append((node, rng.choice(list(keys))))
            node = places[-1][0][places[-1][1]]
        if not places:
            continue
        parent, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind < 2:
            parent[key] = json.loads(json.dumps(rng.choice(_VALUES)))
        elif kind == 2:
            del parent[key]
        elif kind == 3:
            parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, [parent[key]] * 300))
        elif isinstance(parent, dict):
            parent[rng.choice(("a", "", "\x00", "model_type", "w" * 600))] = parent[key]
        elif isinstance(parent[key], int):
            parent[key] *= rng.choice((-1, 10**6, 10**18))
    return value


# ------------------------------------------------------------------ honest files

_ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.bias": np.asfortranarray(np.ones((2, 3))),
    "n": np.int64(3),
    "half": np.float16([1, 2]),
}


def _state() -> bytes:
    """A state dict with all that PyTorch writes beside it, as a pickle."""
    shared = c.tensor(c.storage(4), c.numbers(2, 2), c.numbers(1, 2))
    parameter = c.call(c.name("torch._utils", "_rebuild_parameter"), c.vector(4), b"\x88", b"N")
    state = c.call(c.name("collections", "OrderedDict")) + b"q\x01("
    for key, body in (("w", c.vector(4)), ("t", shared), ("p", parameter)):
        state += c.text(key) + body
    state += b"u" + c.mapping({"_metadata": b"}"}) + b"b"
    kind = c.dtype(state=c.dtype_state())
    more = {
        "model": state,
        "again": b"h\x01",
        "array": c.array(c.binary(bytes(8)), c.numbers(2), kind),
        "args": c.call(c.name("argparse", "Namespace")) + c.mapping({"a": b"N"}) + b"b",
        "sizes": c.call(c.name("torch", "Size"), c.numbers(2, 2)),
        "device": c.call(c.name("torch", "device"), c.text("cpu")),
        "number": b"G?\xe0" + bytes(6),
    }
    return c.whole(c.mapping(more))


def _pickles() -> list[bytes]:
    return [
        pickle.dumps({"model": _ARRAYS, "lr": 0.5, "names": {"a"}, "b": b"x" * 300}, protocol=p)
        for p in range(6)
    ]


_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [22, 30]},
    "d": {"dtype": "BOOL", "shape": [0, 4], "data_offsets": [30, 30]},
}


def _open(path: pathlib.Path) -> None:
    for tensor in files.open_tensors(path).tensors.values():
        if tensor.read().shape != tensor.shape:
            raise AssertionError("another shape than announced")


# ------------------------------------------------------------------ readers


def plain(folder: pathlib.Path, rng: random.Random) -> Callable[[], None]:
    data = rng.choice(_pickles())
    path = folder / "model.pkl"
    path.write_bytes(rng.choice((of_bytes, of_opcodes))(data, rng))
    return lambda: _open(path)


def archive(folder: pathlib.Path, rng: random.Random) -> Callable[[], None]:
    path = folder / "model.pth"
    how = rng.randrange(4)
    if how == 0:
        tensors = {"a": np.ones((2, 3), np.float32), "b": np.int64([1])}
        torch_pickle.save(path, tensors, versions={"": 1}, extra={"oneformer_jax": '{"a": 1}'})
        path.write_bytes(of_bytes(path.read_bytes(), rng))
    elif how == 1:
        c.archive(path, _state())
        path.write_bytes(of_bytes(path.read_bytes(), rng))
    else:
        c.archive(path, (of_bytes if how == 2 else of_opcodes)(_state(), rng))
    return lambda: _open(path)


def stream(folder: pathlib.Path, rng: random.Random) -> Callable[[], None]:
    path = folder / "model.pth"
    if rng.randrange(3):
        keys = c.whole(c.listed(c.text("0")))
        c.stream(path, of_opcodes(_state(), rng), of_bytes(keys, rng) if rng.randrange(3) else keys)
    else:
        c.stream(path, _state())
        path.write_bytes(of_bytes(path.read_bytes(), rng))
    return lambda: _open(path)


def safetensors(folder: pathlib.Path, rng: random.Random) -> Callable[[], None]:
    path = folder / "model.safetensors"
    if rng.randrange(2):
        header = json.dumps(of_json(_HEADER, rng)).encode()
        c.safetensors(path, header, bytes(30))
    else:
        c.safetensors(path, json.dumps(_HEADER).encode(), bytes(30))
        path.write_bytes(of_bytes(path.read_bytes(), rng))
    return lambda: _open(path)


def folder(folder: pathlib.Path, rng: random.Random) -> Callable[[], None]:
    """A folder of transformers: index, config.json and our own description, in two shards."""
    (folder / "1.bin").write_bytes(pickle.dumps({"w": np.ones(2, np.float32)}))
    c.safetensors(folder / "2.safetensors", json.dumps(_HEADER).encode(), bytes(30))
    index = {"w": "1.bin", "a": "2.safetensors", "b": "2.safetensors"}
    for name, value in (
        ("model.safetensors.index.json", {"metadata": {"total": 1}, "weight_map": index}),
        ("config.json", {"model_type": "oneformer", "backbone_config": {"depths": [1, 2]}}),
        ("oneformer_jax.json", {"model": {"a": 1}}),
    ):
        text = json.dumps(of_json(value, rng) if rng.randrange(2) else value).encode()
        (folder / name).write_bytes(of_bytes(text, rng) if not rng.randrange(4) else text)
    return lambda: _open(folder)


_MODELS: list[tuple[dict, dict, dict]] = []


def _models() -> list[tuple[dict, dict, dict]]:
    """Returns description, config.json and shapes by name of each kind of backbone."""
    if not _MODELS:
        from oneformer_jax.models import functional
        from oneformer_jax.weights import convert, hugging_face
        from tests import tiny
        from tests.weights.test_convert import BACKBONES, SETTINGS, make_config

        for kind in BACKBONES:
            config = make_config(kind)
            metadata = tiny.metadata()
            own = {"model": config.to_dict(), "metadata": json.loads(metadata.to_json())}
            theirs = {}
            if kind != "internimage":
                theirs = hugging_face.to_config(config, metadata, training=True)
            trees = functional.abstract(config, training=True)[1:]
            shapes = {name: list(leaf.shape) for name, leaf in convert.leaves(trees)}
            _MODELS.append((own | {"settings": SETTINGS}, theirs, shapes))
    return _MODELS


def description(folder: pathlib.Path, rng: random.Random) -> Callable[[], None]:
    """Our description, config.json and the shapes of tensors, down to the architecture."""
    from oneformer_jax.weights import architecture, descriptions, hugging_face

    own, theirs, shapes = rng.choice(_models())
    which = rng.randrange(3)
    if which == 0:
        text = json.dumps(of_json(own, rng))
    elif which == 1:
        text = json.dumps(of_json(theirs, rng))
    else:
        text = json.dumps(of_json(shapes, rng))
    (folder / "text.json").write_text(text)
    found = json.loads(text)

    def read() -> None:
        if which == 0:
            read_own = descriptions.read(found, "a.json")
            if read_own.model is not None:
                descriptions.model_config(read_own.model, "a.json")
        else:
            noted = hugging_face.noted(found if which == 1 else theirs, "a") if theirs else {}
            sizes = shapes
            if which == 2:  # what files.py lets pass
                sizes = {
                    name: tuple(shape)
                    for name, shape in found.items()
                    if isinstance(shape, list)
                    and len(shape) < 16
                    and all(type(n) is int and 0 <= n < 2**40 for n in shape)
                }
            architecture.recognise(sizes, path="a", given={}, noted=noted)

    return read


READERS = {
    "pickle": plain,
    "archive": archive,
    "stream": stream,
    "safetensors": safetensors,
    "folder": folder,
    "description": description,
}


def main(reader: str, first: int, count: int, home: pathlib.Path) -> dict[str, Any]:
    counts = {"read": 0, "refused": 0}
    faults = []

    def late(*unused):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGPROF, late)  # processor time: the machine may be busy
    for number in range(first, first + count):
        for old in home.iterdir():
            old.unlink()
        read = READERS[reader](home, random.Random(f"{reader} {number}"))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read()
            counts["read"] += 1
        except FileError as error:
            counts["refused"] += 1
            if not str(error).isprintable() or len(str(error)) > 2000:
                faults.append((number, f"a message that garbles: {str(error)[:300]!r}"))
        except BaseException:
            faults.append((number, traceback.format_exc(limit=-4)))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    megabytes = peak_bytes() >> 20
    return {**counts, "faults": faults, "megabytes": megabytes}


if __name__ == "__main__":
    folder_of_files = pathlib.Path(sys.argv[4])
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), folder_of_files)))
