"""Times every implementation of point sampling at the sizes of the COCO recipe.

    python -m kernels.point_sampling.bench                     # on the device that is here
    python -m kernels.point_sampling.bench --target=v5e        # compile for one that is not

On a device: the median time of reading, and of reading and the gradient together, and the temporary
memory. Ahead of time: static issue cycles of the TPU kernels. What XLA's version costs on a TPU
that is not there, and as a share of the training step: `python -m tests.bench_points`.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax

from kernels.point_sampling import IMPLEMENTATIONS, sample_features, tpu_aot
from kernels.point_sampling.shapes import PUBLISHED, CallShape
from kernels.records import keep, median_milliseconds, show
from kernels.tpu_aot import TARGETS

DTYPES = ("float32", "bfloat16")


def measure(
    shape: CallShape, implementation: str, *, batch: int, dtype: str, repeats: int
) -> list[dict]:
    """One record per pass; {"error"} in place of figures where the implementation refuses."""
    keys = jax.random.split(jax.random.key(0), 3)
    features = jax.random.normal(keys[0], (batch, *shape.size, shape.depth), dtype)
    points = jax.random.uniform(keys[1], (batch, shape.points, 2))
    given = jax.random.normal(keys[2], (batch, shape.points, shape.depth))

    def forward(features, points, given):
        return sample_features(features, points, implementation=implementation)

    def both(features, points, given):
        out, pull_back = jax.vjp(lambda f: forward(f, points, given), features)
        return out, pull_back(given)

    records = []
    for name, function in (("forward", forward), ("forward and backward", both)):
        record = {
            "call": shape.name,
            "points": shape.points,
            "batch": batch,
            "dtype": dtype,
            "implementation": implementation,
            "device": jax.devices()[0].device_kind,
            "pass": name,
        }
        records.append(record)
        try:
            compiled = jax.jit(function).lower(features, points, given).compile()
        except NotImplementedError as error:
            record["error"] = str(error)
            continue
        record["milliseconds"] = median_milliseconds(
            lambda: jax.block_until_ready(compiled(features, points, given)),  # noqa: B023
            repeats,
        )
        record["temporary_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return records


def _rows(record: dict) -> list[dict]:
    """A record of `tpu_aot` as two rows of a table."""
    shared = {key: record[key] for key in ("libtpu", "target", "call", "dtype")}
    memory = {"temporary_megabytes": record["temporary_bytes"] / 1e6}
    return [{**shared, "pass": name, **record[name]} | memory for name in tpu_aot.DIRECTIONS]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.point_sampling.bench")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=2, help="images (targets: always 1)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path, help="also write the records here")
    parser.add_argument(
        "--record", action="store_true", help="make a target's cycles those the tests expect"
    )
    options = parser.parse_args(arguments)
    if options.record and not options.target:
        parser.error("--record needs a --target")
    try:
        if options.target:
            calls = [(shape.name, dtype) for shape in PUBLISHED for dtype in options.dtypes]
            found = list(tpu_aot.run(options.target, calls))
            if options.record:
                keep(tpu_aot.RECORDED, found, ("libtpu", "target", "call", "dtype"))
            records = [row for record in found for row in _rows(record)]
        else:
            records = [
                record
                for shape in PUBLISHED
                for dtype in options.dtypes
                for implementation in options.implementations or IMPLEMENTATIONS
                for record in measure(
                    shape,
                    implementation,
                    batch=options.batch,
                    dtype=dtype,
                    repeats=options.repeats,
                )
            ]
    except (ImportError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    show(records, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
