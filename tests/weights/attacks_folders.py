"""Hostile safetensors and folders of Hugging Face; they join those of `attacks.py`."""

from __future__ import annotations

import json
import os
import pathlib
import pickle

import numpy as np

from tests.weights import crafting as c
from tests.weights.attacks import ATTACKS, attack

# ------------------------------------------------------------------ safetensors


def header(label: str, content, message: str, data: bytes = b"", length: int | None = None) -> None:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / "model.safetensors"
        c.safetensors(path, content, data, length)
        return path

    ATTACKS[f"safetensors: {label}"] = (make, message)


def entry(shape, kind="F32", begin=0, end=0, key="w"):
    return {key: {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}}


header(
    "an unknown type", entry([4], "F8_E4M3", 0, 4), "number type F8_E4M3; known are F64", bytes(4)
)
header("complex numbers", entry([1], "C64", 0, 8), "number type C64", bytes(8))
header("many axes", entry([1] * 10**5, end=4), "more than 16", bytes(4))
header("an empty tensor of a huge shape", entry([0, 1 << 62, 1 << 62]), "impossible")
header("a huge shape", entry([1 << 62, 1 << 62]), "truncated or damaged")
header("a range too long", entry([2], end=8), "truncated or damaged", bytes(4))
header("two of one range", entry([2], end=8) | entry([2], end=8, key="v"), "damaged", bytes(8))
header("a header of 2^60", b"{}", "a header of 1,152,921,504,606,846,976 bytes", length=1 << 60)
header("a header of 30 MB", b" " * (30 << 20), "a header of 31,457,280 bytes")
header("a well", b'{"a":' * 10**5, "truncated or damaged")
header("a name that clears the screen", entry([1], end=4, key="\x1b[2J"), "is named", bytes(4))
header("a name of 10,000 letters", entry([1], end=4, key="a" * 10**4), "is named", bytes(4))
header("a type that clears the screen", entry([1], "\x1b[2J", end=4), "damaged", bytes(4))
header("nothing", b"", "truncated or damaged")

# ------------------------------------------------------------------ folders of Hugging Face


def indexed(label: str, index, message: str, prepare=lambda folder: None) -> None:
    def make(folder: pathlib.Path) -> pathlib.Path:
        inner = folder / "model"
        inner.mkdir()
        (inner / "config.json").write_text("{}")
        content = index if isinstance(index, str) else json.dumps(index)
        (inner / "model.safetensors.index.json").write_text(content)
        (folder / "outside.pkl").write_bytes(pickle.dumps({"w": np.zeros(2, np.float32)}))
        prepare(inner)
        return inner

    ATTACKS[f"index: {label}"] = (make, message)


def mapped(shard: str):
    return {"weight_map": {"w": shard}}


OWN_FOLDER = "files of its own folder only"
indexed("a file of the parent", mapped("../outside.pkl"), OWN_FOLDER)
indexed("an absolute path", mapped("/etc/hostname"), OWN_FOLDER)
indexed("a device", mapped("/dev/zero"), OWN_FOLDER)
indexed("the folder itself", mapped("."), OWN_FOLDER)
indexed("the folder above", mapped(".."), OWN_FOLDER)
indexed("no name", mapped(""), OWN_FOLDER)
indexed("a name with a zero", mapped("a\x00b"), OWN_FOLDER)
indexed("a name that garbles", mapped("\x1b[2J"), OWN_FOLDER)
indexed("a name of 10,000 letters", mapped("a" * 10_000), OWN_FOLDER)
indexed("a path of Windows", mapped("..\\outside.pkl"), OWN_FOLDER)
indexed("numbers as names", {"weight_map": {"w": 1}}, r"\$\.weight_map")
indexed("a list", {"weight_map": ["a"]}, r"\$\.weight_map")
indexed("no map", {"metadata": {}}, "weight_map")
indexed("half an object", '{"weight_map": {', "index.json is damaged")
indexed("a well", '{"weight_map":' * 10**5, "unexpected value|deeply|damaged")
indexed("10,000 files", {"weight_map": {f"w{i}": f"{i}.bin" for i in range(10**4)}}, "10,000 files")
indexed("a missing file", mapped("a.safetensors"), "lacks a.safetensors")
indexed(
    "a link out of the folder",
    mapped("a.bin"),
    "is a link out of the folder",
    lambda inner: (inner / "a.bin").symlink_to(inner.parent / "outside.pkl"),
)
indexed(
    "a link to a device",
    mapped("a.bin"),
    "is a link out of the folder",
    lambda inner: (inner / "a.bin").symlink_to("/dev/zero"),
)
indexed("a pipe", mapped("a.bin"), "regular file", lambda inner: os.mkfifo(inner / "a.bin"))
indexed(
    "a tensor that the file lacks",
    mapped("a.bin"),
    "lacks w",
    lambda inner: (inner / "a.bin").write_bytes(pickle.dumps({"v": np.zeros(2, np.float32)})),
)


@attack("config.json has more than")
def a_config_of_five_megabytes(folder):
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_bytes(b" " * (5 << 20))
    return folder


@attack("config.json.*regular file|out of the folder")
def a_config_that_is_a_pipe(folder):
    (folder / "model.safetensors").write_bytes(b"")
    os.mkfifo(folder / "config.json")
    return folder
