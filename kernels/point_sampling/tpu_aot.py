"""Compiles the TPU kernels for TPUs that are not there, and counts their cycles."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence

from kernels import tpu_aot
from kernels.tpu_aot import TARGETS

# What `bench --target=... --record` measured; a test holds the kernels to it.
RECORDED = pathlib.Path(__file__).with_name("tpu_cycles.json")
CORES = {"v4": 2, "v5p": 2}  # that share the groups of channels
DIRECTIONS = ("forward", "backward")


def run(target: str, calls: Sequence[tuple[str, str]]) -> Iterator[dict]:
    """Compiles calls in a process of its own.

    Args:
      target: a key of `kernels.tpu_aot.TARGETS`.
      calls: (name of a call in `shapes.PUBLISHED`, dtype of the features).

    Yields:
      {"libtpu", "target"} and what `report` returns, per call.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      RuntimeError: the compiler refused; with its message.
    """
    return tpu_aot.run(__spec__.name, target, [list(call) for call in calls])


def report(target: str, call: tuple[str, str], dump: pathlib.Path) -> dict:
    """What the compiler says of reading the features of one image, and of the gradient.

    Returns:
      {"call", "dtype", "forward", "backward", "temporary_bytes"}: per direction {"kernels",
      "cycles", "milliseconds"}, how many kernels there are (one per band of the map) and the issue
      cycles of one core for uniform points, without cycles if some of the kernels are equal; and
      the temporary memory of both directions.
    """
    import jax
    import jax.numpy as jnp

    from kernels.point_sampling import pallas_tpu, shapes

    name, dtype = call
    shape = next(shape for shape in shapes.PUBLISHED if shape.name == name)
    features = jax.ShapeDtypeStruct((1, *shape.size, shape.depth), dtype)
    points = jax.ShapeDtypeStruct((1, shape.points, 2), jnp.float32)
    gradient = jax.ShapeDtypeStruct((1, shape.points, shape.depth), jnp.float32)

    def both(features, points, gradient):
        return (
            pallas_tpu.forward(features, points),
            pallas_tpu.backward(points, gradient, features),
        )

    compiled = tpu_aot.compile_for(target, both, [features, points, gradient])
    program = compiled.as_text()
    result = {
        "call": name,
        "dtype": dtype,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    for direction in DIRECTIONS:
        kernel = f"point_sampling_{direction}"
        found = tpu_aot.schedules(dump, kernel)
        count = tpu_aot.count_calls(program, kernel)
        result[direction] = {"kernels": count}
        if len(found) == count:  # of equal kernels the compiler dumps one
            cycles = sum(uniform_cycles(text, shape, CORES.get(target, 1)) for text in found)
            result[direction]["cycles"] = round(cycles)
            result[direction]["milliseconds"] = round(1e3 * cycles / TARGETS[target].clock, 3)
    return result


def uniform_cycles(text: str, shape, cores: int = 1) -> float:
    """Issue cycles on one of the cores of a kernel's schedule, for one image and uniform points.

    What runs rarely counts as often as it does: the loop within a loop takes the points of a group
    one by one, where some of a step share pixels; the loop with copies rounds a finished map.
    """
    from kernels.point_sampling import band_rows

    height, width = shape.size
    tile = band_rows.tile_size(shape.points)
    tiles = -(-shape.points // tile)
    maps = -(-shape.depth // band_rows.LANES) / cores
    frequent, loops = _without_loops(text)
    cycles = tpu_aot.issue_cycles(frequent, tiles)
    for depth, body in loops:
        if depth == 3:
            pairs = band_rows.GROUP * (band_rows.STEP - 1) // 2
            shared = 1 - (1 - 9 / (height * width)) ** pairs
            trips = shared * tiles * tile * maps
        else:
            trips = maps * height * width / band_rows.chunk_size(height * width)
        cycles += trips * (len(body) + tpu_aot.BRANCH_DELAY)
    return cycles


def _without_loops(text: str) -> tuple[str, list[tuple[int, list[str]]]]:
    """The text without its rare loops, and these: (depth, bundles).

    Loops of depth 3, and of depth 2 if they copy memory; the steps of the grid are a loop of depth
    1. A bundle begins with as many ">" as loops are around it.
    """
    blocks: list[tuple[int, list[str]]] = []
    for line in text.splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*: (>*)", line)
        depth = len(bundle[2]) if bundle else None
        starts = bundle and (bundle[1] == "LB" or not blocks or blocks[-1][0] != depth)
        if starts or not blocks:
            blocks.append((depth or 0, []))
        blocks[-1][1].append(line)
    rare = [
        (depth, body)
        for depth, body in blocks
        if depth == 3 or (depth == 2 and any("dma" in line for line in body))
    ]
    kept = [line for block in blocks if block not in rare for line in block[1]]
    return "\n".join(kept), rare


if __name__ == "__main__":
    tpu_aot.serve(report)
