"""Compiles for TPUs that are not there, and counts the cycles of the compiled kernels.

libtpu (`pip install "jax[tpu]"`) holds the whole compiler, so a machine without a TPU can compile
for one. With its dump flags it also writes the final schedule of every kernel: a list of bundles,
one issued per cycle. Bundles times the trip counts of the loops around them are the kernel's issue
cycles. Waiting for memory copies is not in them, nor what a real memory system adds.

The flags must be in the environment before JAX starts, so `run` does this in a program of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

# What `bench --target=... --record` measured; a test holds the kernels to it.
RECORDED = pathlib.Path(__file__).with_name("tpu_cycles.json")
MISSING = 'libtpu is not installed (pip install "jax[tpu]")'


@dataclasses.dataclass(frozen=True)
class Target:
    """A single chip.

    Attributes:
      topology: its name for `get_topology_desc`.
      clock: cycles per second: peak bfloat16 rate over the operations of the matrix units' cycle.
    """

    topology: str
    clock: float


TARGETS = {
    "v4": Target("v4:1x1x1", 1.05e9),
    "v5e": Target("v5e:1x1", 1.5e9),
    "v5p": Target("v5p:1x1x1", 1.75e9),
    "v6e": Target("v6e:1x1", 1.75e9),
    "v7x": Target("tpu7x:1x1x1", 2.2e9),
}


def environment(dump: str | os.PathLike) -> dict[str, str]:
    """Variables that let libtpu compile without a TPU and write its schedules to `dump`."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise the second process here is aborted
        "LIBTPU_INIT_ARGS": (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        ),
    }


def run(target: str, images: Sequence[tuple[int, int]], *, memory: bool = True) -> Iterator[dict]:
    """Compiles the forward and backward pass of one image each, in a process of its own.

    Args:
      target: a key of TARGETS.
      images: (height, width), as in `shapes.PUBLISHED`.
      memory: whether to report the temporary memory. Without it XLA's own optimisations are left
        out, which takes half the time and changes nothing about the kernels.

    Yields:
      What `report` returns, per image.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      RuntimeError: the compiler refused; with its message.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(MISSING)
    with tempfile.TemporaryDirectory(prefix="llo_") as dump:
        request = json.dumps({"target": target, "images": list(images), "dump": dump})
        variables = {**os.environ, **environment(dump)}
        if not memory:
            variables["JAX_OPTIMIZATION_LEVEL"] = "O0"
        process = subprocess.run(
            [sys.executable, "-m", __spec__.name, request],
            env=variables,
            cwd=pathlib.Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
    if process.returncode:
        raise RuntimeError(f"compiling for {target} failed:\n{process.stderr[-4000:]}")
    for line in process.stdout.splitlines():
        result = json.loads(line)
        if not memory:
            del result["temporary_bytes"]
        yield result


def report(target: str, image: tuple[int, int], dump: pathlib.Path) -> dict:
    """What the compiler says of one image, 8 heads of 32 channels, float32.

    Returns:
      {"libtpu", "target", "image", "forward", "backward", "temporary_bytes", "compile_seconds"}:
      the version of the compiler; per direction {"kernels", "cycles", "milliseconds"}, how many
      kernels there are (one per pass over the tables) and their issue cycles on one core (the two
      of v4 and v5p share the heads, and the loops in the schedule are those of one), without
      cycles if some of the kernels are equal; and
      the temporary memory and the time to compile of the whole operation with its gradients.
    """
    import jax
    import jax.numpy as jnp

    from kernels.ms_deform_attn import pallas_tpu, quad_rows, shapes

    call = next(shape for shape in shapes.PUBLISHED if shape.image_size == tuple(image))
    sizes = call.shapes(batch=1)
    arguments = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes.values()]

    def operation(value, locations, weights):
        return pallas_tpu.ms_deform_attn(value, call.spatial_shapes, locations, weights)

    def with_gradients(*arguments):
        out, pull_back = jax.vjp(operation, *arguments)
        return out, *pull_back(out)

    start = time.perf_counter()
    compiled = compile_for(target, with_gradients, arguments)
    seconds = time.perf_counter() - start
    result = {
        "libtpu": importlib.metadata.version("libtpu"),
        "target": target,
        "image": list(image),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }
    program = compiled.as_text()
    tiles = -(-call.pixels // quad_rows.tile_size(call.pixels, 12))
    for name in ("forward", "backward"):
        files = list(dump.glob(f"*ms_deform_attn_{name}*-final_bundles.txt"))
        files = [f for f in files if "schedule-analysis" not in f.name]
        calls = len(re.findall(rf"%ms_deform_attn_{name}[.\d]* = ", program))
        result[name] = {"kernels": calls}
        if len(files) == calls:  # of equal kernels the compiler dumps one
            cycles = sum(issue_cycles(f.read_text(errors="replace"), tiles) for f in files)
            result[name]["cycles"] = round(cycles)
            result[name]["milliseconds"] = round(1e3 * cycles / TARGETS[target].clock, 3)
    for file in dump.iterdir():
        file.unlink()
    return result


def compile_for(target: str, function, arguments):
    """The compiled program of `function` for one chip of `target`."""
    import jax
    from jax.sharding import Mesh, SingleDeviceSharding

    device = _device(target)
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
        for x in arguments
    ]
    # The mesh tells Pallas which chip it is for.
    mesh = Mesh([device], ("chip",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower().compile()


@functools.cache
def _device(target: str):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=TARGETS[target].topology,
        chips_per_host_bounds=[1, 1, 1],
    )
    return topology.devices[0]


BRANCH_DELAY = 4  # bundles after a branch that still run
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_BACK = re.compile(r"sbr\.rel \(!%(p\d+)_p\d+\) target = \$region(\d+)")
_TRIPS = r"%{}_p\d+ = scmp\.ge\.s32\.totalorder %s\d+_s\d+, (\d+) /\* loop exit test"


def issue_cycles(text: str, tiles: int) -> float:
    """Cycles of a kernel from its final bundles: each bundle times the trips of its loops.

    Code under a condition counts as if it always ran, except loops that only store, which fill an
    array with zeros in the first of the `tiles` grid steps that share it.

    Raises:
      ValueError: a loop's trip count is not in the text.
    """
    bundles = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:  # some bundles take several lines
            bundles[-1] += line
    weights = [1.0] * len(bundles)
    for i, bundle in enumerate(bundles):
        for predicate, region in _BACK.findall(bundle):
            mark = re.compile(rf"Start region {region}\b")
            start = next((j for j in range(i, -1, -1) if mark.search(bundles[j])), None)
            if start is None:
                continue
            end = i + BRANCH_DELAY
            body = "\n".join(bundles[start : end + 1])
            count = re.search(_TRIPS.format(predicate), body)
            if count is None:
                raise ValueError(f"no trip count for the loop of region {region}")
            trips = float(count.group(1))
            if " vst " in body and " vld " not in body:
                trips /= tiles
            for j in range(start, end + 1):
                weights[j] *= trips
    return sum(weights)


def main():
    request = json.loads(sys.argv[1])
    for image in request["images"]:
        result = report(request["target"], tuple(image), pathlib.Path(request["dump"]))
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
