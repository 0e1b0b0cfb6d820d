"""Compiled training steps in files: compile mode writes them, a training takes them.

A file holds machine code, and JAX reads it by pickle: whoever wrote it decides what runs. So the
user names its SHA-256, as compile mode printed it, and nothing but the first line is looked at
before that is compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import platform
import re
import time
import zlib
from typing import Any

import jax
import msgspec
import numpy as np
from absl import logging
from jax.experimental import serialize_executable
from ml_collections import ConfigDict

from oneformer_jax import compilation, files
from oneformer_jax.train import state as states
from oneformer_jax.train.runtime.workdir import differing_keys

MAGIC = b"OneFormer-JAX training step, 1\n"
LIMIT = 16 << 30
_LENGTH = 8  # bytes of the header's length

# What of a config enters a training step, beside the mesh, the classes and their texts. Of the
# other groups everything does.
_WITHOUT = ("compilation_cache", "dataset", "eval", "init", "mesh", "seed")
_PARTS = {
    "data": ("batch_size", "crop_size", "num_slots"),
    "train": ("on_nonfinite", "steps"),  # the schedule's rates are part of the program
}


class CompiledError(ValueError):
    """A compiled training step that cannot be saved or taken."""


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    """The part of a file that is read before the program.

    Attributes:
      facts: what must be the same where the program is taken; see `_facts`.
      metrics: names of the step's results.
      flops: of a step, over all devices.
      seconds: that compiling took.
      size: bytes of the program.
    """

    facts: dict[str, Any]
    metrics: list[str]
    flops: float
    seconds: float
    size: int


@dataclasses.dataclass(frozen=True)
class Taken:
    """A training step from a file.

    Attributes:
      step: see `states.Training.step`.
      flops: of a step, over all devices.
    """

    step: Any
    flops: float


# ------------------------------------------------------------------ saving


def check_target(path: str, config: ConfigDict) -> None:
    """Says, before anything is compiled, why its training step could not be saved.

    Raises:
      CompiledError: the step calls back to the host, or `path` cannot be written.
    """
    if config.kernels.assignment == "scipy":
        raise CompiledError(
            "kernels.assignment is 'scipy', a callback to this process, which no file can hold: "
            "add --config.kernels.assignment=auto to save the training step, and to the training"
        )
    if config.train.epochs:
        raise CompiledError(
            "train.epochs counts images, which compiling does not read, and the rates of all steps "
            "are in the program: give train.steps, as a training with these epochs logs them, and "
            "--config.train.epochs=0"
        )
    folder = pathlib.Path(path).expanduser().absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CompiledError(f"--save={path} cannot be written: {folder} is no folder for writing")


def save(
    path: str,
    program: jax.stages.Compiled,
    training: states.Training,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    text_table: np.ndarray,
    *,
    flops: float,
    seconds: float,
) -> str:
    """Writes a compiled step of `training`; returns the SHA-256 of the file, for `take`.

    Args:
      path: of the file; replaced if it exists.
      program: the step, compiled for `mesh` and now: one that JAX read from its cache of compiled
        programs cannot be saved again.
      training, config, mesh, text_table: see `states.make_training`.
      flops: of a step, over all devices.
      seconds: that compiling took.
    """
    payload, _, out_tree = serialize_executable.serialize(program)
    metrics = list(jax.tree.unflatten(out_tree, [0] * out_tree.num_leaves)[1])
    facts = _facts(training, config, mesh, text_table)
    header = msgspec.json.encode(_Header(facts, metrics, flops, seconds, len(payload)))
    content = b"".join(
        (MAGIC, len(header).to_bytes(_LENGTH), header, zlib.compress(payload, level=1))
    )
    files.write_atomically(os.path.expanduser(path), content)
    return hashlib.sha256(content).hexdigest()


# ------------------------------------------------------------------ taking


def take(
    name: str,
    training: states.Training,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    text_table: np.ndarray,
) -> Taken:
    """Reads the training step that --compiled names, if it is one for this training.

    Args:
      name: "FILE@SHA256".
      training, config, mesh, text_table: see `states.make_training`.

    Raises:
      CompiledError: the file is missing, damaged, another one than that of the digest, or of
        another program: one line says what differs.
    """
    start = time.monotonic()
    path, digest = _parse(name)
    data = files.read_bytes(path, limit=LIMIT, error=CompiledError)
    if not data.startswith(MAGIC):
        raise CompiledError(
            f"{path} is not a training step that this version of --mode=compile --save=FILE wrote"
        )
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise CompiledError(
            f"{path} is not the file that --compiled names: its SHA-256 begins with {found[:8]}, "
            f"not {digest[:8]}. It is damaged or was replaced: copy or save it again"
        )
    begin = len(MAGIC) + _LENGTH
    end = begin + int.from_bytes(data[len(MAGIC) : begin])
    header = files.parse_json(data[begin:end], _Header, path, error=CompiledError)
    facts = msgspec.json.decode(msgspec.json.encode(_facts(training, config, mesh, text_table)))
    if differing := list(differing_keys(header.facts, facts)):
        raise CompiledError(
            f"{path} is not a program of this run, which differs in "
            f"{files.first_few(differing)}. Compile it again, or leave out --compiled"
        )
    trees = (training.state, states.abstract_batch(config, mesh), states.abstract_key(mesh))
    try:
        step = serialize_executable.deserialize_and_load(
            zlib.decompress(data[end:], bufsize=header.size),
            jax.tree.structure((trees, {})),
            jax.tree.structure((training.state, dict.fromkeys(header.metrics, 0))),
            backend=mesh.devices.flat[0].client,
            execution_devices=list(mesh.devices.flat),
        )
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CompiledError(f"{path} cannot be loaded on these devices: {reason}") from error
    logging.info(
        "Took the training step from %s in %.1f s; compiling it took %.0f s.",
        *(path, time.monotonic() - start, header.seconds),
    )
    return Taken(step, header.flops)


def _parse(name: str) -> tuple[str, str]:
    path, _, digest = name.rpartition("@")
    if not path or not re.fullmatch("[0-9a-f]{64}", digest):
        raise CompiledError(
            f"--compiled={name} lacks the file's SHA-256: give FILE@SHA256, as --mode=compile "
            "printed it when it saved the file. Use no file that you did not make: it is a program"
        )
    return os.path.expanduser(path), digest


# ------------------------------------------------------------------ what a program is made for


def _facts(
    training: states.Training,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    text_table: np.ndarray,
) -> dict[str, Any]:
    """Collects, as JSON, all that two programs must share to be the same."""
    first = mesh.devices.flat[0]
    arguments = {
        "state": training.state,
        "batch": states.abstract_batch(config, mesh),
        "key": states.abstract_key(mesh),
    }
    return compilation.ingredients() | {
        "devices": {
            "kind": _processor() if first.platform == "cpu" else first.device_kind,
            "count": mesh.size,
            "mesh": dict(mesh.shape),
            # With their places in the slice: the program sends to neighbours.
            "order": [[d.id, *getattr(d, "coords", ())] for d in mesh.devices.flat],
        },
        "config": {
            key: {name: group[name] for name in _PARTS[key]} if key in _PARTS else group
            for key, group in config.to_dict().items()
            if key not in _WITHOUT
        },
        "classes": training.model.num_classes,
        "texts": hashlib.sha256(np.ascontiguousarray(text_table)).hexdigest()[:16],
        "arguments": {
            jax.tree_util.keystr(path, simple=True, separator="."): (
                f"{leaf.dtype}{list(leaf.shape)} {leaf.sharding.spec}"
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)
        },
    }


def _processor() -> str:
    """Names a processor and what it can do: code for others may end the process."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"cpu {platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:16]}"
