"""Facts of accelerators, in one place: rates, clocks, memory, and their compilers' settings.

Sources: cloud.google.com/tpu/docs and NVIDIA's data sheets. Rates are those of one jax device, for
bfloat16 matrix products with float32 sums, without sparsity.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU.

    Attributes:
      kinds: jax's names of its devices.
      peak_flops: FLOP/s of a jax device; a v7x chip is two.
      clock: cycles per second: the peak rate over the matrix units' operations per cycle.
      one_chip: name of a topology of a single chip.
      longest: chips along the longest side of the largest slice.
      chip_config: "megacore" if the two cores of a chip are one device.
    """

    kinds: tuple[str, ...]
    peak_flops: float
    clock: float
    one_chip: str
    longest: int
    chip_config: str | None = None


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, with the facts that XLA's compiler needs.

    Attributes:
      kinds: jax's names of it; the first is compiled for.
      peak_flops: FLOP/s.
      cores: multiprocessors.
      memory: bytes.
      bandwidth: bytes per second.
      l2: bytes of its cache.
      clock: boost clock, cycles per second.
      capability: compute capability.
      shared: bytes of shared memory that a block may opt in to.
    """

    kinds: tuple[str, ...]
    peak_flops: float
    cores: int
    memory: int
    bandwidth: int
    l2: int
    clock: float
    capability: tuple[int, int]
    shared: int

    def target_config(self) -> str:
        """Returns the description of the chip as XLA's target configuration."""
        major, minor = self.capability
        return f"""
          gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
            shared_memory_per_block: 49152 shared_memory_per_core: {self.shared + 1024}
            shared_memory_per_block_optin: {self.shared} core_count: {self.cores}
            fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
            block_dim_limit_z: 65535 memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2}
            clock_rate_ghz: {self.clock / 1e9:.2f} device_memory_size: {self.memory}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            cuda_compute_capability {{ major: {major} minor: {minor} }}
          }}
          platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
          runtime_version {{ major: 12 minor: 9 patch: 0 }}
          device_description_str: "{self.kinds[0]}"
        """


# Variables with which libtpu compiles on a machine without a TPU.
TPU_COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",  # or it asks the metadata server of a TPU machine
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any value: it is required, but not used
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or it aborts beside another process
}
TPUS = {
    "v4": Tpu(("TPU v4",), 275e12, 1.05e9, "v4:1x1x1", 16, "megacore"),
    "v5e": Tpu(("TPU v5 lite",), 197e12, 1.5e9, "v5e:1x1", 16),
    "v5p": Tpu(("TPU v5", "TPU v5p"), 459e12, 1.75e9, "v5p:1x1x1", 28, "megacore"),
    "v6e": Tpu(("TPU v6 lite",), 918e12, 1.75e9, "v6e:1x1", 16),
    "tpu7x": Tpu(("TPU7x",), 1153.5e12, 2.2e9, "tpu7x:1x1x1", 24),
}
GPUS = {
    "a100": Gpu(
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
        312e12,
        108,
        80 * 10**9,
        2039 * 10**9,
        40 << 20,
        1.41e9,
        (8, 0),
        166912,
    ),
    "l4": Gpu(
        ("NVIDIA L4",), 121e12, 58, 24 * 10**9, 300 * 10**9, 48 << 20, 2.04e9, (8, 9), 101376
    ),
    "h100": Gpu(
        ("NVIDIA H100 80GB HBM3",),
        989e12,
        132,
        80 * 10**9,
        3350 * 10**9,
        50 << 20,
        1.98e9,
        (9, 0),
        232448,
    ),
    "h200": Gpu(
        ("NVIDIA H200",), 989e12, 132, 141 * 10**9, 4800 * 10**9, 50 << 20, 1.98e9, (9, 0), 232448
    ),
    "b200": Gpu(
        ("NVIDIA B200",),
        2250e12,
        148,
        180 * 10**9,
        8000 * 10**9,
        126 << 20,
        1.965e9,
        (10, 0),
        232448,
    ),
}


def peak_flops(device: Any) -> float | None:
    """Returns the peak FLOP/s of a jax device, or None if its kind is not in the tables."""
    for chip in (*TPUS.values(), *GPUS.values()):
        if device.device_kind in chip.kinds:
            return chip.peak_flops
    return None
