"""The calls of the losses that read features at points, for `oneformer_jax.kernels.bench`.

`python -m tests.bench.points` gives the cost of XLA's version on a TPU, ahead of time, and its
share of the training step.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from oneformer_jax.kernels.bench import tpu
from oneformer_jax.kernels.bench.operation import Operation
from oneformer_jax.kernels.point_sampling import band_rows
from oneformer_jax.kernels.point_sampling.shapes import PUBLISHED, CallShape


class PointSampling(Operation[CallShape]):
    """Arrays: features and points of `sample_features`."""

    def labels(self, case: CallShape, dtype: str) -> dict[str, Any]:
        return {"call": case.name, "dtype": dtype}

    def arguments(self, case: CallShape, batch: int, dtype: str) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct((batch, *case.size, case.depth), jnp.dtype(dtype)),
            jax.ShapeDtypeStruct((batch, case.points, 2), jnp.float32),
        ]

    def cycles(self, text: str, case: CallShape, cores: int) -> float:
        return uniform_cycles(text, case, cores)


OPERATION = PointSampling(
    name="point_sampling",
    cases={shape.name: shape for shape in PUBLISHED},
    key=("call", "dtype"),
    # they share the groups of channels
    cores={"v4": 2, "v5p": 2},
)


def uniform_cycles(text: str, shape, cores: int = 1) -> float:
    """Returns issue cycles of a kernel's schedule on one core, for one image and uniform points.

    Rare loops count with their frequency: the inner loop does the points of a group one by one if
    some of a step share pixels; the loop with copies rounds a finished map.
    """
    height, width = shape.size
    tile = band_rows.tile_size(shape.points)
    tiles = -(-shape.points // tile)
    maps = -(-shape.depth // band_rows.LANES) / cores
    frequent, loops = _without_loops(text)
    cycles = tpu.issue_cycles(frequent, tiles)
    for depth, body in loops:
        if depth == 3:
            pairs = band_rows.GROUP * (band_rows.STEP - 1) // 2
            shared = 1 - (1 - 9 / (height * width)) ** pairs
            trips = shared * tiles * tile * maps
        else:
            trips = maps * height * width / band_rows.chunk_size(height * width)
        cycles += trips * (len(body) + tpu.BRANCH_DELAY)
    return cycles


def _without_loops(text: str) -> tuple[str, list[tuple[int, list[str]]]]:
    """Splits the text into the common part and its rare loops: (depth, bundles).

    Rare loops have depth 3, or depth 2 if they copy memory; the grid is a loop of depth 1. A bundle
    begins with a ">" for each loop around it.
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
