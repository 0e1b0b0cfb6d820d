"""Kills a run again and again; its final weights must be those of one that was left alone.

  python -m tests.train.stress_kill --kills=20 [--seed=0] [--folder=DIR]

Half of the kills (SIGKILL) come at random moments from the start on, half while a checkpoint is
being written. After them the run is let through, and the weights of both are compared bit by bit.
"""

import argparse
import collections
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

import tests.conftest  # noqa: F401 - chooses the CPU before jax is imported
from oneformer_jax.train.checkpoint import CHECKPOINT_FOLDER, load_for_inference
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = ("train.checkpoint_every=2", "train.eval_every=8", "train.log_every=4")
TEMPORARY = "orbax-checkpoint-tmp"


class Job:
    """A run of `tests.train.job`; reads what it prints in a thread."""

    def __init__(self, workdir, *overrides):
        command = [sys.executable, "-m", "tests.train.job", str(workdir), *SETTINGS, *overrides]
        self.checkpoints = pathlib.Path(workdir) / CHECKPOINT_FOLDER
        self.output: list[str] = []
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.output.append(line.rstrip())

    @property
    def steps(self) -> int:
        """Steps that it has begun."""
        return sum(line.startswith("step ") for line in self.output)

    def wait_for(self, ready, seconds=600) -> bool:
        """Whether `ready()` came true before the process ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(0.002)
        return False

    def said(self, pattern: str):
        return lambda: any(re.search(pattern, line) for line in list(self.output))

    def is_saving(self) -> bool:
        try:
            return any(TEMPORARY in name for name in os.listdir(self.checkpoints))
        except FileNotFoundError:
            return False

    def send(self, number: int) -> int:
        """Sends a signal; the exit code."""
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> int:
        code = self.process.wait(600)
        self._reader.join()
        return code


def weights(workdir) -> dict[str, np.ndarray]:
    found = load_for_inference(workdir, use_ema=False)
    return {"step": np.array(found.step)} | tiny.leaves([found.params, found.stats])


def assert_same_weights(workdir, expected) -> None:
    found, wanted = weights(workdir), weights(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def stress(folder, kills: int, seed: int, steps: int = 40) -> dict[str, int]:
    """Where the kills came, by name; AssertionError if the weights differ."""
    rng, folder = random.Random(seed), pathlib.Path(folder)
    length = f"train.steps={steps}"
    undisturbed = Job(folder / "undisturbed", length)
    begun = time.monotonic()
    assert undisturbed.wait_for(lambda: undisturbed.steps > 0), undisturbed.output
    start = time.monotonic() - begun
    assert undisturbed.finish() == 0, undisturbed.output
    whole = time.monotonic() - begun
    print(f"undisturbed: {whole:.1f} s, of which {start:.1f} s before the first step", flush=True)

    where = collections.Counter()
    killed = folder / "killed-1"
    while sum(where.values()) < kills:
        job = Job(killed, length)
        if sum(where.values()) % 2 == 0:
            job.wait_for(job.is_saving)
            job.wait_for(lambda: False, rng.uniform(0, 0.05))
        else:
            job.wait_for(lambda: False, rng.uniform(0.3 * start, start + 0.5 * (whole - start)))
        saving, begun_steps = job.is_saving(), job.steps
        if job.process.poll() is not None:  # it came to its end: another run takes its place
            assert job.process.returncode == 0, job.output
            assert_same_weights(killed, folder / "undisturbed")
            killed = folder / f"killed-{sum(where.values()) + 1}"
            continue
        code = job.send(signal.SIGKILL)
        assert code == -signal.SIGKILL, (code, job.output)
        place = "while saving" if saving else "in training" if begun_steps else "at the start"
        where[place] += 1
        print(f"kill {sum(where.values())}: {place}, after {begun_steps} steps", flush=True)
    last = Job(killed, length)
    assert last.finish() == 0, last.output
    assert_same_weights(killed, folder / "undisturbed")
    return dict(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        where = stress(folder, arguments.kills, arguments.seed, arguments.steps)
    print(f"{where}: the weights are bit for bit those of the undisturbed run")


if __name__ == "__main__":
    main()
