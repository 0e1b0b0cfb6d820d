"""Times neighbourhood attention at the shapes of DiNAT-L, and its share of a training step.

    python -m kernels.neighborhood_attention.bench                     # on the device that is here
    python -m kernels.neighborhood_attention.bench --target=v5e        # compile for one that is not

On a device: the median time of the forward pass, and of forward and backward pass together, and
the temporary memory, of each map. Ahead of time, of one image: what XLA estimates of its part, the
static issue cycles of the kernels, temporary memory, and traffic with memory. Both end with the sum
over all blocks of the backbone. Nothing here is a measurement of a device that is not there.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

from kernels import records
from kernels.neighborhood_attention import IMPLEMENTATIONS, neighborhood_attention, tpu_aot
from kernels.neighborhood_attention.shapes import PUBLISHED, CallShape
from kernels.tpu_aot import TARGETS


def measure(call: CallShape, implementation: str, *, batch: int, dtype, repeats: int) -> list[dict]:
    """One record per pass; {"error"} in place of figures where the implementation refuses."""
    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, rpb = call.shapes(batch)
    arrays = [jax.random.normal(key, qkv[0], dtype) for key in keys[:3]]
    arrays.append(jax.random.normal(keys[3], rpb))
    forward = functools.partial(
        neighborhood_attention,
        kernel_size=call.kernel_size,
        dilation=call.dilation,
        implementation=implementation,
    )

    def both(*arrays):
        out, pull_back = jax.vjp(forward, *arrays)
        return out, *pull_back(out)

    found = []
    for name, function in (("forward", forward), ("forward and backward", both)):
        record = {
            "map": [call.height, call.width],
            "heads": call.heads,
            "kernel_size": call.kernel_size,
            "dilation": call.dilation,
            "blocks": call.blocks,
            "batch": batch,
            "dtype": jnp.dtype(dtype).name,
            "implementation": implementation,
            "device": jax.devices()[0].device_kind,
            "pass": name,
        }
        found.append(record)
        try:
            start = time.perf_counter()
            compiled = jax.jit(function).lower(*arrays).compile()
            record["compile_seconds"] = time.perf_counter() - start
        except NotImplementedError as error:
            record["error"] = str(error)
            continue
        record["temporary_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        if repeats:
            record["milliseconds"] = records.median_milliseconds(
                lambda: jax.block_until_ready(compiled(*arrays)),  # noqa: B023
                repeats,
            )
    return found


def _tpu_row(record: dict) -> dict:
    """A record of `tpu_aot` as a row of a table."""
    row = {key: record[key] for key in ("target", "implementation", "map", "heads", "dilation")}
    row["blocks"] = record["blocks"]
    for name in ("forward", "backward"):
        if name in record:
            row[f"{name} kernel ms"] = record[name]["milliseconds"]
    row["XLA ms"] = record["xla_milliseconds"]
    row["all ms"] = tpu_milliseconds(record)
    row["temporary MB"] = record["temporary_bytes"] / 1e6
    if "traffic_bytes" in record:
        row["traffic MB"] = record["traffic_bytes"] / 1e6
    return row


def tpu_milliseconds(record: dict) -> float:
    """Predicted time of one call of one image, forward and backward."""
    kernels = sum(record.get(name, {"milliseconds": 0})["milliseconds"] for name in PASSES)
    return record["xla_milliseconds"] + kernels


PASSES = ("forward", "backward")


def main(arguments: list[str] | None = None) -> int:
    known = {"x".join(map(str, shape.image_size)): shape for shape in PUBLISHED}
    parser = argparse.ArgumentParser(prog="python -m kernels.neighborhood_attention.bench")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--image", choices=known, default="1024x1024", metavar="HxW")
    parser.add_argument("--stages", nargs="+", type=int, choices=range(1, 5), default=[1, 2, 3, 4])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--batch", type=int, default=1, help="images (TPU targets: always 1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20, help="0: memory only")
    parser.add_argument("--json", type=pathlib.Path, help="also write the records here")
    parser.add_argument(
        "--record", action="store_true", help="make a target's figures those the tests expect"
    )
    options = parser.parse_args(arguments)
    if options.record and not options.target:
        parser.error("--record needs a --target")
    calls = known[options.image].calls()
    stages = sorted({call.heads for call in calls})
    calls = [call for call in calls if stages.index(call.heads) + 1 in options.stages]
    implementations = options.implementations or IMPLEMENTATIONS
    found, totals = [], {}
    try:
        for implementation in implementations:
            if options.target:
                rows = list(tpu_aot.run(options.target, calls, implementation=implementation))
                if options.record:
                    records.keep(tpu_aot.RECORDED, rows, tpu_aot.KEY)
                totals[implementation] = sum(tpu_milliseconds(r) * r["blocks"] for r in rows)
                found += [_tpu_row(row) for row in rows]
                continue
            for call in calls:
                found += measure(
                    call,
                    implementation,
                    batch=options.batch,
                    dtype=jnp.dtype(options.dtype),
                    repeats=options.repeats,
                )
            both = [r for r in found if r["pass"] != "forward"]
            both = [r for r in both if r["implementation"] == implementation]
            if all("milliseconds" in record for record in both):
                totals[implementation] = sum(r["milliseconds"] * r["blocks"] for r in both)
    except (ImportError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    records.show(found, options.json)
    for implementation, milliseconds in totals.items():
        print(f"{implementation}: {milliseconds:.1f} ms for all of these blocks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
