"""Benchmark: this project beside the other OneFormers, on the device that is there, in one run.

    make bench-peers                                    # all sizes that suit this device
    python -m tests.bench.peers --sizes=tiny --works=forward,train --peers=ours,transformers

Each peer works in a process of its own, one after the other, `--rounds` times in turn; the table
has the medians over the rounds. All have the same weights: a random model of `transformers` is
written as a Hugging Face folder, which ours and zeromodels read. Their outputs are compared before
anything is timed. A peer that is not installed is named and left out:

    pip install transformers torch              # transformers, eager and torch.compile
    pip install zeromodels                      # Keras on the JAX backend; prediction only

"train" is a step with loss, gradients and AdamW, on the same images and targets and with as many
points per mask; each peer draws its own points.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oneformer_jax.files import read_json
from tests.bench.peer_models import MAKERS, SIZES, write_weights
from tests.peak_memory import peak_bytes

WORKS = ("forward", "three_tasks", "train")
PEERS = ("ours", "transformers", "transformers_compiled", "zeromodels")
PACKAGES = {
    "ours": ("jax",),
    "transformers": ("transformers", "torch"),
    "transformers_compiled": ("transformers", "torch"),
    "zeromodels": ("zeromodels", "keras", "jax"),
}
TOLERANCE = 1e-3  # of the largest mask logit; float32, other orders of summation
BF16_TOLERANCE = 0.1


# ------------------------------------------------------------------ one process


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Does one work with one peer in this process: the first result, then `repeats` timed calls."""
    size, name = SIZES[request["size"]], request["work"]
    start = time.perf_counter()
    peer = MAKERS[request["peer"]](size, request["folder"], name == "train")
    if request.get("outputs"):
        np.savez(request["outputs"], **peer.outputs())
        return {}
    call = getattr(peer, name)
    loaded = time.perf_counter()
    call()
    first = time.perf_counter()
    times = timed(call, request["repeats"])
    return {
        **times,
        "load_seconds": loaded - start,
        "first_seconds": first - start,
        "resident_bytes": peak_bytes(),
        "program_bytes": peer.memory(),
        "images_per_second": size.batch / times["wall_seconds"],
        **({"flops": peer.flops(name), "peak_flops": peak()} if request["peer"] == "ours" else {}),
    }


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Times `call`, which must block until done: medians after a call to warm up."""
    call()
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {
        "wall_seconds": statistics.median(walls),
        "processor_seconds": statistics.median(processors),
    }


def chosen(
    parser: argparse.ArgumentParser, option: str, given: str, known: Sequence[str]
) -> list[str]:
    """The words of an option, with commas between, all of them known."""
    words = given.split(",")
    if unknown := [word for word in words if word not in known]:
        parser.error(f"--{option} {','.join(unknown)}: use some of {','.join(known)}")
    return words


def suitable_sizes() -> str:
    """The sizes that suit this device, with commas between."""
    import jax

    on_accelerator = jax.default_backend() != "cpu"
    return ",".join(n for n, size in SIZES.items() if size.accelerator == on_accelerator)


def peak() -> float:
    """The peak rate of jax's device, in FLOP/s; 0 if it is not in the table of chips."""
    import jax

    from oneformer_jax.kernels import chips

    return chips.peak_flops(jax.devices()[0]) or 0.0


def run(request: dict[str, Any]) -> dict[str, Any]:
    """`work` in a process of its own; {"error"} where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "result.json")
        command = [sys.executable, "-m", __spec__.name, "--work", json.dumps(request), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode or not out.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {"error": lines[-1][:300]}
        return read_json(out)


# ------------------------------------------------------------------ the run


def missing(peer: str) -> str:
    """The packages of a peer that are not installed, or ""."""
    absent = []
    for package in PACKAGES[peer]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return ", ".join(absent)


def compare(peer: str, size: str, folder: str, scratch: str) -> str:
    """The largest difference of a peer's outputs from ours, in words; "" where it cannot be had.

    Raises:
      RuntimeError: the outputs differ by more than rounding: a benchmark of something else.
    """
    found = {}
    for name in ("ours", peer):
        path = f"{scratch}/{name}-{size}.npz"
        if not os.path.exists(path):
            request = dict(peer=name, size=size, work="forward", folder=folder, outputs=path)
            answer = run(request)
            if "error" in answer:
                return f"not compared: {answer['error']}"
        found[name] = dict(np.load(path))
    errors = {}
    for key, ours in found["ours"].items():
        theirs = found[peer][key]
        if ours.shape != theirs.shape and theirs.ndim == 4:
            theirs = np.moveaxis(theirs, -1, 1)  # channels last
        errors[key] = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    worst = max(errors.values())
    if worst > (BF16_TOLERANCE if SIZES[size].bfloat16 else TOLERANCE):
        raise RuntimeError(f"{peer} gives other outputs than ours at {size}: {errors}")
    return f"outputs equal to {worst:.0e} of the largest"


def table(results: list[dict[str, Any]]) -> str:
    """Formats the medians as Markdown; ratios are ours over the peer's, below 1 where we win.

    The rates of all peers are of the FLOPs that our program has for the same work.
    """
    head = ["size", "work", "peer", "wall", "processor", "images/s", "first result", "resident"]
    head += ["program", "GFLOP/s", "of the peak", "ours / peer: wall", "processor", "resident"]
    lines = [head, ["---"] * len(head)]
    ours = {(r["size"], r["work"]): r for r in results if r["peer"] == "ours" and "error" not in r}
    for r in results:
        if "error" in r:
            lines.append([r["size"], r["work"], r["peer"], r["error"], *[""] * (len(head) - 4)])
            continue
        base = ours.get((r["size"], r["work"]))
        names = ("wall_seconds", "processor_seconds", "resident_bytes")
        ratios = [f"{base[n] / r[n]:.2f}" if base and base is not r else "" for n in names]
        rate = base["flops"] / r["wall_seconds"] if base else 0
        lines.append(
            [
                *(r["size"], r["work"], r["peer"]),
                f"{r['wall_seconds']:.3f} s",
                f"{r['processor_seconds']:.3f} s",
                f"{r['images_per_second']:.2f}",
                f"{r['first_seconds']:.1f} s",
                f"{r['resident_bytes'] / 1e9:.2f} GB",
                f"{r['program_bytes'] / 1e9:.2f} GB" if r["program_bytes"] else "",
                f"{rate / 1e9:.0f}" if rate else "",
                f"{rate / base['peak_flops']:.0%}" if base and base["peak_flops"] else "",
                *ratios,
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Names the processor, its cores, and the versions of what is compared."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    packages = dict.fromkeys(p for names in PACKAGES.values() for p in names)
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}, {', '.join(versions)}"


def median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; the first error, if there is one."""
    for found in rounds:
        if "error" in found:
            return found
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="", help="of " + ", ".join(SIZES))
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # the process of one peer
    options = parser.parse_args()
    if options.work:
        result = work(json.loads(options.work[0]))
        pathlib.Path(options.work[1]).write_text(json.dumps(result))
        return 0
    sizes = chosen(parser, "sizes", options.sizes or suitable_sizes(), tuple(SIZES))
    works = chosen(parser, "works", options.works, WORKS)
    names = chosen(parser, "peers", options.peers, PEERS)
    if what := missing("transformers"):
        print(f"bench: {what} must be installed: the weights of all peers come from it")
        return 1
    peers = []
    for peer in names:
        if what := missing(peer):
            print(f"{peer} is left out: {what} is not installed")
        else:
            peers.append(peer)
    print(machine(), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            folder = f"{scratch}/{size}"
            write_weights(SIZES[size], folder)
            for peer in (p for p in peers if p != "ours"):
                print(f"{size}, {peer}: {compare(peer, size, folder, scratch)}", flush=True)
            for name in works:
                request = dict(size=size, work=name, folder=folder, repeats=options.repeats)
                found: dict[str, list] = {peer: [] for peer in peers}
                for _ in range(options.rounds):
                    for peer in peers:  # in turn
                        if not any("error" in r for r in found[peer]):
                            found[peer].append(run(request | {"peer": peer}))
                for peer in peers:
                    known = {"size": size, "work": name, "peer": peer}
                    results.append(known | median(found[peer]))
                print("\n" + table([r for r in results if r["size"] == size]), flush=True)
    if options.json:
        record = {"machine": machine(), "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
