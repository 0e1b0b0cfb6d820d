"""Benchmark: prediction and a training step of one image, with one backbone after the other.

    python -m tests.bench.backbones                  # Swin-T, Swin-L and ViT-B at 512 pixels
    python -m tests.bench.backbones --configs=coco:dinov3_large --side=1024 --repeats=3

The models are those of the recipes, with random parameters; each work has a process of its own.
FLOPs are those of matrix products and convolutions, loops in full (`train/flops.py`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from oneformer_jax.files import read_json
from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution
from oneformer_jax.train import optim, settings, state
from oneformer_jax.train.flops import count_flops
from tests.bench.peer_models import COCO, SWIN_T, Size, inputs, task_tokens
from tests.bench.peers import machine, peak
from tests.peak_memory import peak_bytes

CONFIGS = ("coco:swin_tiny", "coco:swin_large", "coco:dinov3_base")
WORKS = ("prediction", "training step")


def work(config: str, name: str, side: int, repeats: int) -> dict[str, float]:
    """Does one work with one recipe's model in this process."""
    jax.config.update("jax_enable_compilation_cache", False)
    module, _, variant = config.partition(":")
    c = importlib.import_module(f"oneformer_jax.configs.{module}").get_config(variant)
    training = name == "training step"
    # The backbone of a `Size` is the peers'; the batch is the same whatever it is.
    given = inputs(Size(side=side, batch=1, backbone=SWIN_T, fields=COCO))
    model = settings.model_config(c, COCO["num_labels"])
    graph, params, stats = functional.init(model, 0, training=training)
    key = jax.random.key(0)
    if training:
        optimizer = optim.make_optimizer(settings.optim_config(c), params)
        table = given["text_table"]
        call = state.make_train_step(
            model,
            settings.loss_config(c),
            optimizer,
            table[:, : int(np.argmax(table, 1).max()) + 1],
            execution=Execution(),
        )
        batch = {n: x for n, x in given.items() if n != "text_table"}
        opt = jax.jit(optimizer.init)(params)
        start = {"step": np.int32(0), "halted": np.bool_(False), "params": params}
        arguments = ({**start, "stats": stats, "opt": opt}, batch, key)
    else:

        def call(params, stats, image):
            features = functional.encode(graph, params, stats, image)
            found = functional.decode(graph, params, stats, features, task_tokens()[None])
            return found.class_logits[-1], found.mask_logits()

        arguments = (params, stats, given["image"].astype(np.float32) / 255)
    traced = jax.jit(call, donate_argnums=0 if training else ()).trace(*arguments)
    compiled = traced.lower().compile()
    walls = []
    for _ in range(repeats + 1):  # the first one is not counted
        begin = time.perf_counter()
        found = jax.block_until_ready(compiled(*arguments))
        walls.append(time.perf_counter() - begin)
        if training:
            arguments = (found[0], *arguments[1:])
    return {
        "seconds": statistics.median(walls[1:]),
        "flops": count_flops(traced.jaxpr),
        "peak_flops": peak(),
        "resident_bytes": peak_bytes(),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default=",".join(CONFIGS), help="names of shipped recipes")
    parser.add_argument("--side", type=int, default=512, help="of the square image, pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", nargs=3, metavar=("CONFIG", "WORK", "JSON"))
    options = parser.parse_args()
    if options.work:
        config, name, out = options.work
        found = work(config, name, options.side, options.repeats)
        pathlib.Path(out).write_text(json.dumps(found))
        return 0
    print(machine(), flush=True)
    print("\n| recipe | work | parameters | wall | GFLOP | GFLOP/s | of the peak | resident |")
    print("|---|---|---|---|---|---|---|---|")
    for name in WORKS:
        for config in options.configs.split(","):
            print("| " + " | ".join(row(config, name, options)) + " |", flush=True)
    return 0


def row(config: str, name: str, options: argparse.Namespace) -> list[str]:
    """Does `work` in a process of its own and describes its figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "result.json")
        command = [sys.executable, "-m", __spec__.name, f"--side={options.side}"]
        command += [f"--repeats={options.repeats}", "--work", config, name, str(out)]
        subprocess.run(command, check=True)
        found: dict[str, Any] = read_json(out)
    rate = found["flops"] / found["seconds"]
    return [
        config,
        name,
        f"{found['parameters'] / 1e6:.1f}M",
        f"{found['seconds']:.2f} s",
        f"{found['flops'] / 1e9:,.0f}",
        f"{rate / 1e9:,.0f}",
        f"{rate / found['peak_flops']:.0%}" if found["peak_flops"] else "",
        f"{found['resident_bytes'] / 2**30:.2f} GiB",
    ]


if __name__ == "__main__":
    sys.exit(main())
