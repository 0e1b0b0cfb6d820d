"""Topologies to compile for, by name, and their memory; no device is needed.

A TPU topology needs libtpu (`pip install "jax[tpu]"`), a GPU mesh needs JAX's CUDA plugin and
compiler (`pip install "jax[cuda12]"`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from oneformer_jax.kernels.chips import GPUS, TPU_COMPILER, TPUS, Gpu

# For a slice with fewer chips than a full host of the default 2 x 2 x 1.
_ONE_CHIP = [1, 1, 1]
# Without a GPU the compiler cannot try its own matrix products, and fails if its first choice does
# not fit, so cuBLAS does them.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# Share of a GPU's memory that XLA's allocator takes (XLA_PYTHON_CLIENT_MEM_FRACTION).
_GPU_MEMORY_SHARE = 0.75

EXAMPLES = "v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1, h100:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: the given name, or the kind of this machine's devices.
      devices: jax devices, real or described.
      memory: bytes that programs may use on one device, or None if unknown.
      options: compiler options for these devices.
    """

    name: str
    devices: tuple[Any, ...]
    memory: int | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.devices[0].device_kind


def open_topology(name: str, slices: int = 1) -> Topology:
    """Opens a topology such as "v5e:4x4" or "h100:8"; "" is this machine's devices.

    Called before any device is touched, it keeps JAX from looking for a real accelerator.

    Args:
      name: KIND:SHAPE, see `EXAMPLES`.
      slices: TPU slices of that shape, joined by the data-centre network.

    Raises:
      ValueError: unknown name, or the compiler for it is not installed.
    """
    if not name:
        devices = tuple(jax.devices())
        stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
        limit = (stats or {}).get("bytes_limit")
        return Topology(f"this machine ({devices[0].device_kind})", devices, limit)
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    kinds = (*TPUS, *GPUS)
    if not match or match[1] not in kinds:
        raise ValueError(
            f"mesh.topology is {name!r}; use KIND:SHAPE with a kind of {', '.join(kinds)}, "
            f"as in {EXAMPLES}"
        )
    kind, shape = match[1], tuple(int(n) for n in match[2].split("x"))
    jax.config.update("jax_platforms", "cpu")
    if kind in GPUS:
        if len(shape) != 1 or slices != 1:
            raise ValueError(f"mesh.topology is {name!r}; a GPU mesh is KIND:NUMBER, in one slice")
        return _gpu_topology(name, GPUS[kind], shape[0])
    sides, longest = TPUS[kind].one_chip.count("1x") + 1, TPUS[kind].longest
    if len(shape) > sides or max(shape) > longest:  # of which libtpu would end the process
        raise ValueError(
            f"mesh.topology is {name!r}; a slice of {kind} has up to {sides} sides of up to "
            f"{longest} chips, as in {EXAMPLES}"
        )
    return _tpu_topology(name, kind, shape, slices)


def _tpu_topology(name: str, kind: str, shape: tuple[int, ...], slices: int) -> Topology:
    for variable, value in TPU_COMPILER.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {}
    if TPUS[kind].chip_config:
        options["chip_config_name"] = TPUS[kind].chip_config
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = _ONE_CHIP
    if slices > 1:
        options["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise _no_topology(name, error, "jax[tpu]") from error
    devices = tuple(found.devices)
    return Topology(name, devices, _tpu_memory(devices[0]))


def _gpu_topology(name: str, gpu: Gpu, count: int) -> Topology:
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"1x1x{count}",
            target_config=gpu.target_config(),
        )
    except Exception as error:
        raise _no_topology(name, error, "jax[cuda12]") from error
    memory = int(gpu.memory * _GPU_MEMORY_SHARE)
    return Topology(name, tuple(found.devices), memory, _GPU_OPTIONS)


def _no_topology(name: str, error: Exception, extra: str) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return ValueError(
        f"mesh.topology {name!r} cannot be compiled for here: {reason}. If the compiler is not "
        f'installed, pip install "{extra}" with the version of jax; shapes that exist are, for '
        f"example, {EXAMPLES}"
    )


def _tpu_memory(device: Any) -> int | None:
    """Bytes of HBM that a program may use, from the compiler's refusal of one of 8 TiB."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**43,), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: x + np.int8(1)).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory(error)
        return sizes[1] if sizes else None
    return None


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_OUT_OF_MEMORY = (
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"requires {_SIZE}.*? exceed.*?{_SIZE}",
)


def out_of_memory(error: Exception) -> tuple[int, int] | None:
    """Reads (bytes needed, bytes available) from a compiler's refusal; None for other errors.

    (0, 0) is a refusal for lack of memory without sizes.
    """
    text = str(error)
    for pattern in _OUT_OF_MEMORY:
        if match := re.search(pattern, text, re.DOTALL):
            first, first_unit, second, second_unit = match.groups()
            return int(float(first) * _UNITS[first_unit]), int(float(second) * _UNITS[second_unit])
    return (0, 0) if "RESOURCE_EXHAUSTED" in text else None
