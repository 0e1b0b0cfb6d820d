"""The calls of DiNAT-L's neighbourhood attention, for `oneformer_jax.kernels.bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from oneformer_jax.kernels.bench import tpu
from oneformer_jax.kernels.bench.operation import PASSES, Operation
from oneformer_jax.kernels.neighborhood_attention.shapes import PUBLISHED, CallShape


def _cases() -> dict[str, CallShape]:
    return {
        f"{'x'.join(map(str, model.image_size))}-{call.heads}-{call.dilation}": call
        for model in PUBLISHED
        for call in model.calls()
    }


class NeighborhoodAttention(Operation[CallShape]):
    """Arrays: query, key, value and rpb of `neighborhood_attention`."""

    def labels(self, case: CallShape, dtype: str) -> dict[str, Any]:
        fields = dataclasses.asdict(case)
        return {"map": [fields.pop("height"), fields.pop("width")], **fields, "dtype": dtype}

    def arguments(self, case: CallShape, batch: int, dtype: str) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in case.shapes(batch)]

    def static(self, case: CallShape) -> dict[str, Any]:
        return {"kernel_size": case.kernel_size, "dilation": case.dilation}

    def cycles(self, text: str, case: CallShape, cores: int) -> float:
        """Cycles of one core: the two of v4 and v5p share the groups of heads."""
        return tpu.issue_cycles(text, tiles=1)

    def predict(self, record: Mapping[str, Any], case: CallShape) -> list[dict[str, Any]]:
        """Returns one line: the kernels of both passes and XLA's estimate of the rest."""
        row = {key: record[key] for key in ("target", "implementation", *self.key, "blocks")}
        parts = {name: record[name].get("milliseconds") for name in PASSES if name in record}
        row |= {f"{name} kernel ms": took for name, took in parts.items()}
        if "xla_milliseconds" in record:
            row["XLA ms"] = record["xla_milliseconds"]
            if None not in parts.values():
                row["milliseconds"] = record["xla_milliseconds"] + sum(parts.values())
            row["temporary_megabytes"] = record["temporary_bytes"] / 1e6
        return [row]

    def summary(self, found: Sequence[Mapping[str, Any]]) -> str:
        """Returns the time of all blocks of the calls by implementation, forward and backward."""
        totals: dict[str, float] = {}
        for row in found:
            if row.get("pass") != "forward" and "milliseconds" in row:
                name = row["implementation"]
                totals[name] = totals.get(name, 0) + row["blocks"] * row["milliseconds"]
        return "\n".join(f"{n}: {ms:.1f} ms for all of these blocks" for n, ms in totals.items())


OPERATION = NeighborhoodAttention(
    name="neighborhood_attention",
    # by image, heads and dilation: "1024x1024-6-20"
    cases=_cases(),
    dtypes=("bfloat16", "float32"),
    key=("map", "heads", "kernel_size", "dilation"),
)
