"""Set-up of every test process: the CPU shown as 8 devices, a compilation cache, parsed flags."""
# ruff: noqa: E402

import os
import pathlib

# Read once, when the libraries load, and so set before any of them is imported.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = str(max(1, (os.cpu_count() or 1) // _WORKERS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", _THREADS)
os.environ.setdefault("OPENBLAS_NUM_THREADS", _THREADS)
# Tests compile much and compute little, so compiling quickly is what counts. Eight devices on two
# busy cores may meet late at a collective: XLA's limit of 40 s is for hangs.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_collective_timeout_seconds=600",
    )
).strip()

import jax
import pytest
from absl import flags

NUM_DEVICES = 8
ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
# Shared by the processes of a run and by later runs. JAX ignores, with a warning, an entry that it
# cannot read, so that two processes may write the same one.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

if not flags.FLAGS.is_parsed():  # Grain's workers read them
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def mesh8() -> jax.sharding.Mesh:
    """All 8 devices along the batch: axes data=8, fsdp=1."""
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((NUM_DEVICES, 1), ("data", "fsdp"), axis_types=(auto, auto))
