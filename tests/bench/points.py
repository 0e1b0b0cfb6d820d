"""Benchmark: what reading maps at points costs a training step on a TPU that is not there.

python -m tests.bench.points --target=v5e       # needs libtpu: pip install "jax[tpu]"

Compiles the parts of the COCO recipe's losses that read or write at points, for one image of 1024 x
1024 pixels, and adds up the cycles of the compiled programs: of each operation the larger of the
issue cycles of its final schedule and, where the compiler writes one, its own estimate (which knows
the memory's bandwidth, but is not made for gathers, scatters and kernels). Loops that end by a
condition on data count as one trip, so the sums are lower bounds, and marked so; waiting for copies
to vector memory is not in them. The share is that of a step of Swin-L: three times the forward
pass, at 40 % of the peak rate.
"""

import argparse
import json
import math
import pathlib
import re

from oneformer_jax.kernels.bench import process, records, tpu
from oneformer_jax.kernels.point_sampling import bench, sample_features, shapes

SLOTS, NUM_POINTS, CANDIDATES, SLOTS_AT_A_TIME, PREDICTIONS = 100, 12544, 37632, 8, 10
CHOSEN = NUM_POINTS * 3 // 4
SHARED = CANDIDATES + NUM_POINTS - CHOSEN
SIDE, WIDTH = 256, 256
STEP_FLOPS = 3 * 2 * 891e9  # of one image; the published 891 GFLOP are multiply-adds
UTILISATION = 0.4

CHUNKS = PREDICTIONS * math.ceil(SLOTS / SLOTS_AT_A_TIME)
# sampling: [(part, points, times in a step)]
PARTS = {
    "shared": [
        ("features", NUM_POINTS, 1),
        ("features", SHARED, 1),
        ("gradient", SHARED, 1),
        ("targets", NUM_POINTS, 1),
        ("targets", SHARED, 1),
    ],
    "per_mask": [
        ("features", NUM_POINTS, PREDICTIONS),
        ("targets", NUM_POINTS, PREDICTIONS),
        ("maps", CANDIDATES, CHUNKS),
        ("maps", NUM_POINTS, 2 * CHUNKS),  # again in the backward pass
        ("gradient of maps", NUM_POINTS, CHUNKS),
        ("targets of masks", NUM_POINTS, 2 * CHUNKS),
    ],
}


def part(name: str, points: int, dtype: str, implementation: str):
    """The function of a part, and its abstract arguments."""
    import jax
    import jax.numpy as jnp

    from oneformer_jax.models import points as points_lib

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    features = array(SIDE, SIDE, WIDTH, dtype=dtype)
    packed = array(4 * SIDE + 1, 4 * SIDE + 1, dtype=jnp.uint32)
    shared, own = array(points, 2), array(SLOTS_AT_A_TIME, points, 2)
    maps = array(SLOTS_AT_A_TIME, SIDE, SIDE)

    def read(features, points):
        return sample_features(features, points, implementation=implementation)

    def pull_back(function):
        return lambda x, points, given: jax.vjp(lambda x: function(x, points), x)[1](given)[0]

    def read_targets(packed, points):
        slots = jnp.arange(SLOTS if points.shape[1] == 1 else SLOTS_AT_A_TIME)
        return points_lib.read_targets(packed, points, slots)

    return {
        "features": (read, (features, shared)),
        "gradient": (pull_back(read), (features, shared, array(points, WIDTH))),
        "targets": (lambda m, p: read_targets(m, p[:, None]), (packed, shared)),
        "maps": (points_lib.read_maps, (maps, own)),
        "gradient of maps": (
            pull_back(points_lib.read_maps),
            (maps, own, array(SLOTS_AT_A_TIME, points)),
        ),
        "targets of masks": (read_targets, (packed, own)),
    }[name]


def report(target: str, case: list, dump: pathlib.Path) -> dict:
    """{"cycles", "at_least", "temporary_bytes", "case"} of a part."""
    name, points, dtype, implementation = case
    function, arguments = part(name, points, dtype, implementation)
    compiled = tpu.compile_for(target, function, arguments)
    shape = shapes.CallShape(name, points, (SIDE, SIDE), WIDTH)
    cores = bench.OPERATION.cores.get(target, 1)
    cycles, at_least = program_cycles(compiled.as_text(), dump, shape, cores)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {
        "case": case,
        "cycles": round(cycles),
        "at_least": at_least,
        "temporary_bytes": temporary,
    }


def program_cycles(program: str, dump: pathlib.Path, shape, cores: int) -> tuple[float, bool]:
    """Cycles of the operations of a program's entry, and whether that is only a lower bound."""
    schedules: dict[str, list[str]] = {}
    for file in sorted(dump.glob("*-final_bundles.txt")):
        found = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", file.name)
        if found and "schedule-analysis" not in file.name:
            schedules[found[1]] = file.read_text(errors="replace")
    total, at_least = 0.0, False
    for line in program[program.index("\nENTRY ") :].splitlines():
        found = re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line)
        if not found:
            continue
        name = found[1]
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        # Of equal operations the compiler writes one schedule.
        alike = [s for s in schedules if re.sub(r"\.\d+$", "", s) == re.sub(r"\.\d+$", "", name)]
        texts = [schedules[name]] if name in schedules else [schedules[s] for s in alike]
        counted = []
        for text in texts:
            if "point_sampling" in name:
                counted.append(bench.uniform_cycles(text, shape, cores))
                continue
            try:
                counted.append(tpu.issue_cycles(text))
            except ValueError:
                counted.append(tpu.issue_cycles(text, steps=1))
                at_least = True
        total += max(float(estimate[1]) if estimate else 0.0, min(counted, default=0.0))
    return total, at_least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=tpu.TARGETS, default="v5e")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--samplings", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--implementations", nargs="+", default=["xla", "pallas_tpu"])
    parser.add_argument("--json", type=pathlib.Path, help="also write the records here")
    options = parser.parse_args()
    step = 1e3 * STEP_FLOPS / (UTILISATION * tpu.TARGETS[options.target].peak_flops)
    cases = list(
        dict.fromkeys(
            (name, points, dtype, implementation)
            for sampling in options.samplings
            for name, points, _ in PARTS[sampling]
            for dtype in (options.dtypes if name in ("features", "gradient") else ["float32"])
            for implementation in (
                options.implementations if name in ("features", "gradient") else ["xla"]
            )
        )
    )
    found = {tuple(r["case"]): r for r in tpu.run(__spec__.name, options.target, cases)}
    clock = tpu.TARGETS[options.target].clock
    rows = []
    for sampling in options.samplings:
        for name, points, times in PARTS[sampling]:
            for case in (c for c in cases if c[:2] == (name, points)):
                record = found[case]
                milliseconds = 1e3 * times * record["cycles"] / clock
                rows.append(
                    {
                        "sampling": sampling,
                        "part": name,
                        "points": points,
                        "times": times,
                        "dtype": case[2],
                        "implementation": case[3],
                        "milliseconds": milliseconds,
                        "bound": "at least" if record["at_least"] else "",
                        "percent of the step": 100 * milliseconds / step,
                        "temporary_megabytes": record["temporary_bytes"] / 1e6,
                    }
                )
    print(f"{options.target}; a step of {step:.1f} ms an image; all figures of one image")
    print(records.table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    import sys

    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        tpu.serve(process.request(), report)
    else:
        main()
