"""Compiles for GPUs without having one, and reports the resources of the compiled kernels.

Needs no GPU or driver, but jax's CUDA packages of its own version (0.10 to 0.12), and `ptxas`:

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12

The compilers read the folder of their dumps from the environment, and can abort the process for old
GPUs, so each report comes from its own process (`process`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from oneformer_jax.kernels.bench import process
from oneformer_jax.kernels.chips import GPUS, Gpu

TARGETS = GPUS
_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_TIMEOUT_SECONDS = 600


def missing() -> str | None:
    """Names the first missing package and how to install it, or None."""
    if not any(_installed(name) for name in _PLUGINS):
        return "the CUDA plugin of jax (pip install jax-cuda12-plugin jax-cuda12-pjrt)"
    if _ptxas() is None:
        return "ptxas, CUDA's compiler (pip install nvidia-cuda-nvcc-cu12)"
    return None


def chip(target: str) -> Gpu:
    """Returns one of `TARGETS`; ValueError for an unknown one."""
    if target not in TARGETS:
        raise ValueError(f"gpu: unknown target {target!r}; use one of {', '.join(TARGETS)}")
    return TARGETS[target]


def run(module: str, target: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Runs `module`, with `serve` as its main program, in a process that dumps its kernels.

    Args:
      module: dotted name.
      target: one of `TARGETS`.
      request: passed to the module as JSON.

    Returns:
      {"target", "device_kind", "compute_capability", "jax"} and the module's report.

    Raises:
      ValueError: an unknown target.
      RuntimeError: the CUDA packages are missing, or the compiler failed (with its output).
    """
    gpu = chip(target)
    if (what := missing()) is not None:
        raise RuntimeError(f"gpu: needs {what}")
    known = {
        "target": target,
        "device_kind": gpu.kinds[0],
        "compute_capability": ".".join(map(str, gpu.capability)),
        "jax": jax.__version__,
    }
    request = {**request, "target": target}
    return known | process.run(module, request, _variables, _TIMEOUT_SECONDS)


def _variables(folder: str) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # cached programs are not dumped
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def serve(
    request: Mapping[str, Any],
    report: Callable[[Mapping[str, Any], Callable[..., dict]], dict[str, Any]],
) -> None:
    """Runs the main program of a module that `run` starts.

    Args:
      request: of `process.request`.
      report: called with the request and a function `compile_(name, function, arguments)`, which
        compiles for the target (`arguments` are abstract) and returns {"kernels": [{"name",
        "registers" per thread, "spill_bytes" stored per thread, "stack_bytes" per thread}],
        "temp_bytes", "argument_bytes", "output_bytes", "compile_seconds"}. The kernels include
        those that XLA made of its own operations.
    """
    device = _topology(request["target"]).devices[0]
    folder = pathlib.Path(request["folder"])

    def compile_(name: str, function: Callable, arguments: Sequence[jax.ShapeDtypeStruct]) -> dict:
        return _compile(function, arguments, device, folder / name)

    process.answer(request, report(request, compile_))


def kernel_resources(text: str) -> list[dict]:
    """Reads the kernels from the output of `ptxas -v`: name, registers, spill and stack bytes."""
    found = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1].removesuffix("_mosaic_gpu_kernel")
            found.append({"name": name, "registers": None, "spill_bytes": 0, "stack_bytes": 0})
        elif found and (match := re.search(r"(\d+) bytes stack.* (\d+) bytes spill stores", line)):
            found[-1].update(stack_bytes=int(match[1]), spill_bytes=int(match[2]))
        elif found and (match := re.search(r"Used (\d+) registers", line)):
            found[-1]["registers"] = int(match[1])
    return found


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def _ptxas() -> str | None:
    """The path of ptxas in the CUDA packages, else in the system."""
    if _installed("nvidia"):
        for folder in importlib.util.find_spec("nvidia").submodule_search_locations or ():
            for path in sorted(pathlib.Path(folder).glob("*/bin/ptxas")):
                return str(path)
    return shutil.which("ptxas")


def _topology(target: str):
    """A description of one GPU, in the words of XLA's target configuration."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target,
        topology="1x1x1",
        target_config=TARGETS[target].target_config(),
    )


def _compile(function, arguments, device, log: pathlib.Path) -> dict:
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    before = set(log.parent.glob("*.ptx"))
    start = time.perf_counter()
    # Pallas learns from the abstract mesh which GPU it compiles for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _output_to(log):
        compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    kernels = kernel_resources(log.read_text("utf-8", errors="replace"))  # Mosaic GPU's
    for path in sorted(set(log.parent.glob("*.ptx")) - before):
        kernels += kernel_resources(_assemble(path))
    memory = compiled.memory_analysis()
    return {
        "kernels": kernels,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "compile_seconds": round(seconds, 2),
    }


@contextlib.contextmanager
def _output_to(path: pathlib.Path):
    """Sends the output of the compilers, from C++ too, into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    with path.open("wb") as file:
        for fd, _ in kept:
            os.dup2(file.fileno(), fd)
    try:
        yield
    except BaseException:
        text = path.read_text("utf-8", errors="replace")
        os.write(kept[1][1], text.encode())
        raise
    finally:
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)


def _assemble(ptx: pathlib.Path) -> str:
    """Runs `ptxas -v` on a file; returns its output."""
    target = re.search(r"^\.target (\w+)", ptx.read_text("utf-8"), re.MULTILINE)
    if target is None:  # jax 0.10 dumps an empty file for a module of constants
        return ""
    command = [_ptxas(), "-v", f"-arch={target[1]}", "-o", os.devnull, str(ptx)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr
