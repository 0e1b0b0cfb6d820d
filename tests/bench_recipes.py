"""The smallest topology of each kind that holds each published recipe at its batch of 16 images.

    python -m tests.bench_recipes --kinds=v5e,v5p

Compiles the training step ahead of time (`pip install "jax[tpu]"`), with parameters sharded over
all chips and recomputation, by the quick way of compile mode, whose memory is an upper bound; each
in a process of its own. Chips of much memory are tried from the fewest up, until one topology
holds the recipe, the others from 16 chips down, until one does not. What was compiled is in the
output file, so a second start goes on; recipes with the same program share it. A change of `model`,
`loss` or `matcher` in the configs makes it another program.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import time

RECORDED = pathlib.Path(__file__).with_name("recipes.json")  # with libtpu 0.0.42.1
DATASETS = ("coco", "ade20k", "cityscapes", "mapillary")
# Of at most 16 chips, since a chip takes at least one image; numbers of chips that divide 16. In
# the order in which they are tried.
UP = {
    "v4": ("2x2x1", "2x2x2", "2x2x4"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4"),
    "tpu7x": ("2x2x1", "2x2x2"),  # of two devices a chip
}
DOWN = {
    "v5e": ("4x4", "2x4", "2x2", "1x1"),
    "v6e": ("4x4", "2x4", "2x2", "1x1"),
    "h100": ("16", "8", "4", "2", "1"),
}
TOPOLOGIES = UP | DOWN
# Of a device; what a kind that was not compiled for is expected to hold, and the share that counts.
MEMORY_GIB = {"v4": 31.2, "v5p": 95.7, "tpu7x": 94.7, "v5e": 15.7, "v6e": 31.2, "h100": 55.8}
EXPECTED_SHARE = 0.8


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


def num_devices(kind: str, topology: str) -> int:
    return math.prod(map(int, topology.split("x"))) * (2 if kind == "tpu7x" else 1)


def cell(results: dict, kind: str, key: str) -> str:
    """The smallest topology of a kind that holds a recipe and its memory; "~": only expected to."""
    names = TOPOLOGIES[kind]
    found = {name: results.get(f"{key}@{kind}:{name}") for name in names}
    tried = [result for result in found.values() if result]
    fitting = [name for name, result in found.items() if result and result.get("fits")]
    if fitting:
        least = kind in UP or len(fitting) < len(tried) or len(tried) == len(names)
        gib = found[fitting[-1]]["gib"]
        return f"{fitting[-1]}{'' if least else ' or smaller'}, {gib:.1f} GiB"
    if any("error" in result for result in tried):
        return "fails to compile"
    if len(tried) == len(names) or (tried and kind in DOWN):
        return "none"
    # From a topology of another kind with as many devices or fewer: of what one of them needs, the
    # share of one of these. Nothing is concluded from more devices.
    needs = [
        (num_devices(other, name), result["gib"])
        for other, others in TOPOLOGIES.items()
        for name in others
        if (result := results.get(f"{key}@{other}:{name}")) and result.get("fits")
    ]
    untried = [name for name, result in found.items() if not result]
    for name in sorted(untried, key=lambda name: num_devices(kind, name)):
        count = num_devices(kind, name)
        most = EXPECTED_SHARE * MEMORY_GIB[kind]
        if any(n <= count and gib * n / count < most for n, gib in needs):
            return f"~ {name}"
    return "not compiled"


def table(results: dict, kinds: list[str], rows: list[tuple[str, str, str]]) -> str:
    """Markdown; a row for each recipe."""
    lines = ["| recipe | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for dataset, variant, key in rows:
        cells = [cell(results, kind, key) for kind in kinds]
        lines.append(f"| {dataset}:{variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="v5e,v5p")
    parser.add_argument("--datasets", default=",".join(DATASETS))
    parser.add_argument("--only", default="", help="part of the variant's name")
    parser.add_argument("--output", default=str(RECORDED))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compile_one(*arguments.one)))
        return
    output = pathlib.Path(arguments.output)
    results = json.loads(output.read_text()) if output.exists() else {}
    kinds = arguments.kinds.split(",")
    rows = [
        (dataset, variant, fingerprint(load(dataset, variant)))
        for dataset in arguments.datasets.split(",")
        for variant in importlib.import_module(f"configs.{dataset}").VARIANTS
        if arguments.only in variant
    ]
    # First all recipes on the first topology, then on the next one those that it may settle.
    for place in range(max(len(TOPOLOGIES[kind]) for kind in kinds)):
        for kind, (dataset, variant, key) in itertools.product(kinds, rows):
            if place >= len(TOPOLOGIES[kind]):
                continue
            # Settled where one fits on the way up, none does on the way down, or an error came.
            before = (f"{key}@{kind}:{t}" for t in TOPOLOGIES[kind][:place])
            if any(results[name].get("fits") != (kind in DOWN) for name in before):
                continue
            topology = f"{kind}:{TOPOLOGIES[kind][place]}"
            if (name := f"{key}@{topology}") in results:
                continue
            result = run(dataset, variant, topology)
            results[name] = {"recipe": f"{dataset}:{variant}", **result}
            output.parent.mkdir(parents=True, exist_ok=True)
            partial = output.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1))
            partial.replace(output)
            print(f"{dataset}:{variant} {topology} {result}", flush=True)
    print(table(results, kinds, rows))


if __name__ == "__main__":
    main()
