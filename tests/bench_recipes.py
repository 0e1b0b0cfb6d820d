"""The smallest topology of each kind that holds each published recipe at its batch of 16 images.

    python -m tests.bench_recipes --kinds=v5e,v5p

Compiles the training step ahead of time (`pip install "jax[tpu]"`, for h100 `"jax[cuda12]"`), with
parameters sharded over all chips and recomputation, by the quick way of compile mode (a run's own
program may need more or less); each in a process of its own. What a step needs on one topology
tells about where it is expected to fit and where not; only what that leaves open is compiled, from
the fewest chips up. What was compiled is in the output file, so a second start goes on; recipes
with the same program share it. A change of `model`, `loss` or `matcher` in the configs makes it
another program. A record with "at_most" is of a version that added up all temporary arrays of a
TPU's program, of which never all are there at once: the step fits and needs less.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import time

RECORDED = pathlib.Path(__file__).with_name("recipes.json")  # jax 0.10.2, libtpu 0.0.42.1, CUDA 12
DATASETS = ("coco", "ade20k", "cityscapes", "mapillary")
# Of at most 16 devices, since a device takes at least one image; numbers that divide 16.
TOPOLOGIES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4"),
    "v6e": ("1x1", "2x2", "2x4", "4x4"),
    "v4": ("2x2x1", "2x2x2", "2x2x4"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4"),
    "tpu7x": ("2x2x1", "2x2x2"),  # of two devices a chip
    "h100": ("1", "2", "4", "8", "16"),
}
# The first to be compiled; for the other kinds of a family its figure is the first evidence.
FIRST = {"tpu": "v5p:2x2x1", "gpu": "h100:8"}
# Of a device, as the compiler says it; for GPUs as `accelerators` has it.
MEMORY_GIB = {"v4": 30.7, "v5p": 95.7, "tpu7x": 94.7, "v5e": 15.7, "v6e": 31.2, "h100": 55.8}
# What a device needs on another topology, as a factor on equal shares of state and images: other
# chips; for each halving of the devices what is not shared among them; and what one image alone
# needs less than a share of several. Chosen so that all that is recorded is within: `unexpected`
# says what is not.
OTHER_CHIPS, NOT_SHARED, ONE_IMAGE = 1.2, 1.35, 1.2
BATCH = 16  # images, of every recipe: on so many devices each is alone
NOTHING = 0.0, math.inf  # the GiB of which nothing is known


def load(dataset: str, variant: str):
    return importlib.import_module(f"configs.{dataset}").get_config(variant)


def fingerprint(config) -> str:
    """Equal for recipes whose training steps are the same program but for numbers in it."""
    parts = {key: config[key].to_dict() for key in ("model", "loss", "matcher")}
    parts |= {key: config.data[key] for key in ("crop_size", "batch_size", "num_slots")}
    parts["dataset"] = config.dataset.name
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def compile_one(dataset: str, variant: str, topology: str) -> dict:
    """Compiles here and now: what `run` prints as JSON."""
    from input_pipeline import datasets, tokenizer
    from oneformer_jax.train import accelerators, compile

    compile.spare_the_host()
    found = accelerators.open_topology(topology)
    config = load(dataset, variant)
    config.model.remat = True
    config.mesh.data = -1
    config.mesh.fsdp = len(found.devices)
    if family(topology.partition(":")[0]) == "gpu":
        config.matcher.backend = "device"  # the host's cannot be compiled without a GPU
    info = datasets.dataset_info(config.dataset.name)
    start = time.perf_counter()
    (report,) = compile.compile_programs(
        config,
        found,
        num_classes=len(info.class_names),
        text_table=tokenizer.text_table(info.class_names, config.data.text_template),
        quick=True,
        predict=False,
    )
    return {
        "fits": report.fits,
        "gib": report.peak / 2**30,
        "limit_gib": report.limit / 2**30,
        "seconds": time.perf_counter() - start,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def run(dataset: str, variant: str, topology: str) -> dict:
    command = [sys.executable, "-m", "tests.bench_recipes", "--one", dataset, variant, topology]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": last[0][:500]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def num_devices(topology: str) -> int:
    kind, _, shape = topology.partition(":")
    return math.prod(map(int, shape.split("x"))) * (2 if kind == "tpu7x" else 1)


def family(kind: str) -> str:
    return "gpu" if kind == "h100" else "tpu"


def expected(results: dict, key: str, topology: str) -> tuple[float, float]:
    """(least, most) GiB that a device is expected to need, by what others of its family needed.

    State and images are shared among the devices, so each has twice as much on half as many, but
    for what each has anyway; one image alone on a device may need less than its share of several.
    `NOTHING` if nothing is known.
    """
    count = num_devices(topology)
    least, most = NOTHING
    for name, result in results.items():
        program, _, other = name.partition("@")
        same = family(other.partition(":")[0]) == family(topology.partition(":")[0])
        if program != key or not same or other == topology or "gib" not in result:
            continue
        ratio = num_devices(other) / count
        gib = result["gib"] * ratio
        alone = ONE_IMAGE if BATCH in (count, num_devices(other)) else 1
        if "at_most" not in result:
            less = OTHER_CHIPS * (alone if ratio < 1 else 1)
            least = max(least, gib / less / NOT_SHARED ** max(math.log2(ratio), 0))
        if result["fits"]:  # else it may be a part of what is needed
            more = OTHER_CHIPS * (alone if ratio > 1 else 1)
            most = min(most, gib * more * NOT_SHARED ** max(-math.log2(ratio), 0))
    return least, most


def fits(results: dict, key: str, topology: str) -> bool | None:
    """Whether the step fits, as compiled or as expected; None where neither says so."""
    if result := results.get(f"{key}@{topology}"):
        return result.get("fits")
    memory = MEMORY_GIB[topology.partition(":")[0]]
    least, most = expected(results, key, topology)
    if most < memory:
        return True
    return False if least > memory else None


def smallest(results: dict, key: str, kind: str) -> tuple[str, bool | None]:
    """(the smallest topology that holds a recipe, True), ("", False) if none does.

    Or, not to be said yet, (the topology to compile for next, None).
    """
    names = [f"{kind}:{shape}" for shape in TOPOLOGIES[kind]]
    first = FIRST[family(kind)]
    known = any(expected(results, key, name) != NOTHING for name in names)
    if not known and f"{key}@{first}" not in results:
        return first, None
    for name in names:
        if (fitting := fits(results, key, name)) is not False:
            return name, fitting
    return "", False


def cell(results: dict, kind: str, key: str) -> str:
    """The smallest topology of a kind that holds a recipe and its memory; "~": as expected.

    "~ 2x2 to 4x4": 2x2 may hold it, 4x4 will.
    """
    name, fitting = smallest(results, key, kind)
    result = results.get(f"{key}@{name}")
    if fitting:
        shape = name.partition(":")[2]
        if not result:
            return f"~ {shape}"
        return f"{shape}, {'≤ ' if 'at_most' in result else ''}{result['gib']:.1f} GiB"
    if result and "error" in result:
        return "fails to compile"
    if fitting is None:
        names = [f"{kind}:{shape}" for shape in TOPOLOGIES[kind]]
        if all(expected(results, key, other) == NOTHING for other in names):
            return "not compiled"
        enough = (other.partition(":")[2] for other in names if fits(results, key, other))
        return f"~ {name.partition(':')[2]} to {next(enough, 'none')}"
    return "none" if f"{key}@{kind}:{TOPOLOGIES[kind][-1]}" in results else "~ none"


def unexpected(results: dict) -> tuple[int, list[str]]:
    """(how many compiled steps others tell about, those that needed more or less than expected)."""
    told, wrong = 0, []
    for name, result in results.items():
        least, most = expected(results, *name.split("@"))
        if "gib" in result and "at_most" not in result and (least, most) != NOTHING:
            told += 1
            # Of what does not fit the compiler may have counted a part.
            if result["gib"] > most or (result["fits"] and result["gib"] < least):
                wrong.append(
                    f"{result['recipe']}@{name.partition('@')[2]} {result['gib']:.1f} GiB, "
                    f"not {least:.1f} to {most:.1f}"
                )
    return told, wrong


def table(results: dict, kinds: list[str], rows: list[tuple[str, str, str]]) -> str:
    """Markdown; a row for each recipe."""
    lines = ["| recipe | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for dataset, variant, key in rows:
        cells = [cell(results, kind, key) for kind in kinds]
        lines.append(f"| {dataset}:{variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wanted(results: dict, kinds: list[str], rows: list[tuple[str, str, str]]) -> dict:
    """{key@topology: (dataset, variant, topology)}: what has to be compiled next."""
    found = {}
    for kind in kinds:
        for dataset, variant, key in rows:
            topology, fitting = smallest(results, key, kind)
            name = f"{key}@{topology}"
            if fitting is None and name not in results:
                found.setdefault(name, (dataset, variant, topology))
    return found


def compile_all(
    output: pathlib.Path, kinds: list[str], rows: list[tuple[str, str, str]], jobs: int
) -> dict:
    """Compiles what is wanted, `jobs` at a time, until nothing is; keeps `output` up to date."""
    results = json.loads(output.read_text()) if output.exists() else {}
    running: dict[concurrent.futures.Future, tuple[str, str]] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while True:
            under_way = {name for name, _ in running.values()}
            for name, place in wanted(results, kinds, rows).items():
                if name not in under_way and len(running) < jobs:
                    running[pool.submit(run, *place)] = (name, ":".join(place[:2]))
            if not running:
                return results
            for done in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                name, recipe = running.pop(done)
                results[name] = {"recipe": recipe, **done.result()}
                output.parent.mkdir(parents=True, exist_ok=True)
                partial = output.with_suffix(".partial")
                partial.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
                partial.replace(output)
                print(f"{recipe} {name.partition('@')[2]} {done.result()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="v5e,v5p")
    parser.add_argument("--datasets", default=",".join(DATASETS))
    parser.add_argument("--only", default="", help="part of the variant's name")
    parser.add_argument("--jobs", type=int, default=1, help="at a time; up to 11 GiB of RAM each")
    parser.add_argument("--output", default=str(RECORDED))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compile_one(*arguments.one)))
        return
    kinds = arguments.kinds.split(",")
    rows = [
        (dataset, variant, fingerprint(load(dataset, variant)))
        for dataset in arguments.datasets.split(",")
        for variant in importlib.import_module(f"configs.{dataset}").VARIANTS
        if arguments.only in variant
    ]
    results = compile_all(pathlib.Path(arguments.output), kinds, rows, arguments.jobs)
    print(table(results, kinds, rows))
    told, wrong = unexpected(results)
    print(f"of {told} steps that others tell about, not as expected: {', '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
