"""Time and memory of conversion at full size, with random weights.

  python -m tests.bench.weights [--model=coco:swin_large]

Every step runs in a process of its own; memory is the largest resident size of that process above
what it had after loading the libraries.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from oneformer_jax.models import functional
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.types import Metadata
from oneformer_jax.weights import convert
from tests.peak_memory import peak_bytes

STEPS = ("write official", "read official", "write hugging_face", "read hugging_face")


def metadata(count: int) -> Metadata:
    return Metadata(
        dataset="random",
        class_names=tuple(f"class {i}" for i in range(count)),
        is_thing=(True,) * count,
        colors=((0, 0, 0),) * count,
        category_ids=tuple(range(count)),
    )


def run(step: str, name: str, folder: pathlib.Path) -> dict:
    """One step: seconds, MiB of the file and of memory."""
    direction, form = step.split(" ")
    path = folder / ("model.pth" if form == "official" else "folder")
    config = OneFormerConfig.published(name)
    if direction == "write":
        rng = np.random.default_rng(0)
        params, stats = (
            jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), tree)
            for tree in functional.abstract(config, training=True)[1:]
        )
    base = peak_bytes() / 2**20
    start = time.perf_counter()
    if direction == "write":
        classes = metadata(config.num_classes)
        convert.write_model(path, form, config, params, stats, metadata=classes, settings={})
    else:
        found = convert.read_model(path)
        assert found.config == config
    seconds = time.perf_counter() - start
    files = [path] if path.is_file() else path.iterdir()
    return {
        "seconds": seconds,
        "file": sum(f.stat().st_size for f in files) / 2**20,
        "memory": peak_bytes() / 2**20 - base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="coco:swin_large")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(run(options.step, options.model, options.folder)))
        return
    print(f"{options.model}, jax {jax.__version__}, numpy {np.__version__}")
    print(f"{'step':20} {'seconds':>8} {'file MiB':>9} {'memory MiB':>11} {'memory/file':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            command = [sys.executable, "-m", "tests.bench.weights", f"--model={options.model}"]
            command += [f"--step={step}", f"--folder={folder}"]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(output.splitlines()[-1])
            ratio = row["memory"] / row["file"]
            print(
                f"{step:20} {row['seconds']:8.1f} {row['file']:9.0f} {row['memory']:11.0f} "
                f"{ratio:12.2f}"
            )


if __name__ == "__main__":
    main()
