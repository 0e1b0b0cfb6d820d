"""Times every implementation of multi-scale deformable attention at the shapes of the recipes.

    python -m kernels.ms_deform_attn.bench                     # on the device that is here
    python -m kernels.ms_deform_attn.bench --target=v5e        # compile for one that is not

On a device: the median time of the forward pass, and of forward and backward pass together, the
temporary memory, and the share of the device's memory bandwidth that the least possible traffic
would take. Ahead of time: static issue cycles (TPU), or registers and spills (GPU), and memory.
Nothing here is a measurement of a device that is not there.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

from kernels.gpu_aot import TARGETS as GPU_TARGETS
from kernels.ms_deform_attn import IMPLEMENTATIONS, gpu_aot, ms_deform_attn, tpu_aot
from kernels.ms_deform_attn.shapes import PUBLISHED, CallShape
from kernels.records import keep, median_milliseconds, show
from kernels.tpu_aot import TARGETS as TPU_TARGETS

# Bytes per second of device memory, by the start of `device_kind` in lower case; vendors' data.
BANDWIDTH = {
    "tpu v4": 1.2e12,
    "tpu v5 lite": 8.19e11,
    "tpu v5": 2.765e12,
    "tpu v6 lite": 1.64e12,
    "tpu7x": 3.69e12,  # of one of its two devices
    "nvidia h100": 3.35e12,
    "nvidia h200": 4.8e12,
    "nvidia a100": 2.039e12,
    "nvidia l4": 3.0e11,
}


def least_bytes(shape: CallShape, batch: int, dtype) -> dict[str, int]:
    """Traffic with memory if every array is read or written once."""
    value = batch * shape.pixels * shape.heads * shape.head_dim * jnp.dtype(dtype).itemsize
    points = batch * shape.pixels * shape.heads * len(shape.spatial_shapes) * shape.points * 12
    forward = 2 * value + points  # and the output is as large as the value
    return {"forward": forward, "forward and backward": forward + 3 * value + 2 * points}


def measure(
    shape: CallShape, implementation: str, *, batch: int, dtype, repeats: int
) -> list[dict]:
    """One record per pass; {"error"} in place of figures where the implementation refuses."""
    sizes = shape.shapes(batch)
    keys = jax.random.split(jax.random.key(0), 3)
    value = jax.random.normal(keys[0], sizes["value"], dtype)
    # Points a few pixels around their query, as in a trained model.
    centres = jnp.concatenate(
        [
            jnp.stack(
                jnp.meshgrid((jnp.arange(w) + 0.5) / w, (jnp.arange(h) + 0.5) / h), -1
            ).reshape(-1, 2)
            for h, w in shape.spatial_shapes
        ]
    )[None, :, None, None, None]
    spread = 4.0 / jnp.array([(w, h) for h, w in shape.spatial_shapes], jnp.float32)[:, None]
    locations = centres + spread * jax.random.normal(keys[1], sizes["sampling_locations"])
    weights = jax.random.uniform(keys[2], sizes["attention_weights"])
    device = jax.devices()[0]

    def forward(*arguments):
        value, locations, weights = arguments
        return ms_deform_attn(
            value, shape.spatial_shapes, locations, weights, implementation=implementation
        )

    def both(*arguments):
        out, pull_back = jax.vjp(forward, *arguments)
        return pull_back(out)

    records = []
    for name, function in (("forward", forward), ("forward and backward", both)):
        record = {
            "image": list(shape.image_size),
            "batch": batch,
            "dtype": jnp.dtype(dtype).name,
            "implementation": implementation,
            "device": device.device_kind,
            "pass": name,
        }
        records.append(record)
        try:
            start = time.perf_counter()
            compiled = jax.jit(function).lower(value, locations, weights).compile()
            record["compile_seconds"] = time.perf_counter() - start
        except NotImplementedError as error:
            record["error"] = str(error)
            continue
        record["milliseconds"] = median_milliseconds(
            lambda: jax.block_until_ready(compiled(value, locations, weights)),  # noqa: B023
            repeats,
        )
        record["temporary_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        least = least_bytes(shape, batch, dtype)[name]
        record["gigabytes_per_second"] = least / record["milliseconds"] / 1e6
        bandwidth = _bandwidth(device.device_kind)
        if bandwidth:
            record["of_bandwidth"] = record["gigabytes_per_second"] * 1e9 / bandwidth
    return records


def _bandwidth(device_kind: str) -> float | None:
    kind = device_kind.lower()
    fitting = [name for name in BANDWIDTH if kind.startswith(name)]
    return BANDWIDTH[max(fitting, key=len)] if fitting else None


def compile_for_gpu(target: str, shapes: list[CallShape], batch: int, dtype) -> list[dict]:
    """Registers, spills and memory of kernel and XLA, flat; needs the CUDA packages of jax."""
    records = []
    for shape in shapes:
        for backend in (None, "xla"):
            found = gpu_aot.report(
                batch,
                shape.spatial_shapes,
                shape.pixels,
                shape.heads,
                shape.head_dim,
                shape.points,
                jnp.dtype(dtype).name,
                target=target,
                backend=backend,
            )
            for name in ("forward", "backward"):
                kernels = found[name]["kernels"]
                records.append(
                    {
                        "target": target,
                        "image": list(shape.image_size),
                        "batch": batch,
                        "dtype": jnp.dtype(dtype).name,
                        "implementation": found["backend"],
                        "pass": name,
                        "registers": max((k["registers"] for k in kernels), default=0),
                        "spill_bytes": sum(k["spill_bytes"] for k in kernels),
                        "temporary_megabytes": found[name]["temp_bytes"] / 1e6,
                        "compile_seconds": found[name]["compile_seconds"],
                    }
                )
    return records


def _tpu_rows(record: dict) -> list[dict]:
    """A record of `tpu_aot` as two rows of a table."""
    shared = {key: record[key] for key in ("libtpu", "target", "image")}
    ends = {"compile_seconds": record["compile_seconds"]}
    if "temporary_bytes" in record:
        ends["temporary_megabytes"] = record["temporary_bytes"] / 1e6
    return [
        {**shared, "pass": name, **record[name], **(ends if name == "backward" else {})}
        for name in ("forward", "backward")
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.ms_deform_attn.bench")
    parser.add_argument("--target", choices=[*TPU_TARGETS, *GPU_TARGETS])
    parser.add_argument("--images", nargs="+", metavar="HxW", help="default: all of shapes.py")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--batch", type=int, default=1, help="images (TPU targets: always 1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path, help="also write the records here")
    parser.add_argument(
        "--record", action="store_true", help="make a TPU target's cycles those the tests expect"
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="TPU targets: cycles only, in half the time"
    )
    parser.add_argument(
        "--compile-seconds",
        action="store_true",
        help="TPU targets: instead, the processor time to compile each kernel by itself",
    )
    options = parser.parse_args(arguments)
    if options.record and options.target not in TPU_TARGETS:
        parser.error("--record needs a --target that is a TPU")
    if options.compile_seconds and (options.record or options.target not in TPU_TARGETS):
        parser.error("--compile-seconds needs a --target that is a TPU, and no --record")
    shapes = list(PUBLISHED)
    if options.images:
        known = {"x".join(map(str, shape.image_size)): shape for shape in PUBLISHED}
        unknown = [name for name in options.images if name not in known]
        if unknown:
            parser.error(f"--images {' '.join(unknown)}: use any of {' '.join(known)}")
        shapes = [known[name] for name in options.images]

    try:
        images = [shape.image_size for shape in shapes]
        if options.compile_seconds:
            records = list(tpu_aot.run_compile_seconds(options.target, images))
        elif options.target in TPU_TARGETS:
            found = list(tpu_aot.run(options.target, images, memory=not options.no_memory))
            if options.record:
                keep(tpu_aot.RECORDED, found, ("libtpu", "target", "image"))
            records = [row for record in found for row in _tpu_rows(record)]
        elif options.target:
            records = compile_for_gpu(options.target, shapes, options.batch, options.dtype)
        else:
            records = [
                record
                for shape in shapes
                for implementation in options.implementations or IMPLEMENTATIONS
                for record in measure(
                    shape,
                    implementation,
                    batch=options.batch,
                    dtype=options.dtype,
                    repeats=options.repeats,
                )
            ]
    except (ImportError, RuntimeError, NotImplementedError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    show(records, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
