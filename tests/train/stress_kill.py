"""Kills a run again and again; it must end with the weights and logs of one that was left alone.

  python -m tests.train.stress_kill --kills=20 [--seed=0] [--folder=DIR]

One run is started and killed (SIGKILL) that many times: while it starts, between steps, while it
writes a checkpoint, while it evaluates, at a random moment of each. Then it is let through, and its
weights, bit by bit, and the values it logged must be those of the undisturbed run.
"""

import argparse
import collections
import itertools
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
from oneformer_jax.train.runtime import folders
from tests import tiny
from tests.train.test_observe import read_lines

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAVE_EVERY = 5
SETTINGS = (f"train.checkpoint_every={SAVE_EVERY}", "train.eval_every=10", "train.log_every=5")
# Steps that a start may begin before it is killed, and steps of the run for each kill: more than
# starts get done on average, so that the run does not come to its end before the last kill.
LIFE, STEPS_PER_KILL = 2 * SAVE_EVERY + 1, 8


class Job:
    """A run of `tests.train.job`; reads what it prints in a thread."""

    def __init__(self, workdir, *overrides):
        command = [sys.executable, "-m", "tests.train.job", str(workdir), *SETTINGS, *overrides]
        self.checkpoints = folders.locate(workdir) / CHECKPOINT_FOLDER
        self.output: list[str] = []
        self.start = 0.0  # seconds until the second step, that is with compiling the first
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.output.append(line.rstrip())
            if self.steps == 2 and not self.start:
                self.start = time.monotonic() - self._began

    @property
    def steps(self) -> int:
        """Steps that it has begun."""
        return sum(line.startswith("step ") for line in list(self.output))

    def wait_for(self, ready, seconds=600) -> bool:
        """Tells if `ready()` came true before the process ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(0.002)
        return False

    def said(self, pattern: str):
        return lambda: any(re.search(pattern, line) for line in list(self.output))

    def is_saving(self) -> bool:
        """Tells if a checkpoint is being written, or was when the process died."""
        try:
            names = os.listdir(self.checkpoints)
            return any(folders.UNVERIFIED in name for name in names)
        except FileNotFoundError:
            return False

    def finished_steps(self) -> list[int]:
        try:
            return folders.finished_steps(self.checkpoints)
        except FileNotFoundError:
            return []

    def is_evaluating(self) -> bool:
        """Tells if the last thing that it said is that it evaluates."""
        return "Evaluating step" in "".join(self.output[-1:])

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


def assert_same_logs(workdir, expected) -> None:
    """The same values, and each step once; what the clock says may differ."""
    found, wanted = (
        [{name: v for name, v in line.items() if not name.startswith("time")} for line in lines]
        for lines in (read_lines(workdir), read_lines(expected))
    )
    assert found == wanted


def kill(job: Job, moment: str, rng: random.Random, start: float) -> str:
    """Kills `job` at a random `moment`, at the latest after LIFE steps; where that really was.

    Args:
      job: just started.
      moment: "starting", "training", "saving" or "evaluating".
      rng: random numbers.
      start: seconds until the second step, in which the program is compiled or loaded.
    """

    def late():
        return job.steps > LIFE

    if moment == "starting":
        job.wait_for(late, rng.uniform(0.1, 1.0) * start)
    elif moment == "training":
        steps = rng.randint(2, SAVE_EVERY - 1)
        job.wait_for(lambda: job.steps >= steps)
        time.sleep(rng.uniform(0, 0.1))
    elif moment == "saving":
        steps = SAVE_EVERY * rng.randint(1, 2)
        job.wait_for(lambda: (job.steps >= steps and job.is_saving()) or late())
        time.sleep(rng.uniform(0, 0.3))
    else:
        job.wait_for(lambda: job.is_evaluating() or late())
        time.sleep(rng.uniform(0, 2))
    assert job.process.poll() is None, f"the run ended before its kill: {job.output}"
    evaluating = job.is_evaluating()
    code = job.send(signal.SIGKILL)
    assert code == -signal.SIGKILL, (code, job.output)
    if job.steps and job.is_saving():  # what lies there now was not finished
        return "saving"
    if evaluating:
        return "evaluating"
    return "training" if job.steps > 1 else "starting"  # the first one has to be compiled


def stress(folder, kills: int, seed: int, make_job=Job) -> dict[str, int]:
    """How many kills came where; AssertionError if weights or logs differ."""
    rng, folder = random.Random(seed), folders.locate(folder)
    length = f"train.steps={STEPS_PER_KILL * kills}"
    began = time.monotonic()
    undisturbed = make_job(folder / "undisturbed", length)
    assert undisturbed.finish() == 0, undisturbed.output
    print(f"undisturbed: {undisturbed.steps} steps, {time.monotonic() - began:.0f} s", flush=True)

    moments = itertools.cycle(("saving", "starting", "saving", "training", "evaluating"))
    where, start, done = collections.Counter(), 10.0, 0
    for number, moment in zip(range(1, kills + 1), moments, strict=False):
        job = make_job(folder / "killed", length)
        place = kill(job, moment, rng, start)
        start = job.start or start
        where[place] += 1
        done = max([done, *job.finished_steps()])
        print(f"kill {number}: {place}, after {job.steps} steps; step {done} is saved", flush=True)
    last = make_job(folder / "killed", length)
    assert last.finish() == 0, last.output
    assert last.said(f"Resuming from step {done} ")(), last.output
    assert_same_weights(folder / "killed", folder / "undisturbed")
    assert_same_logs(folder / "killed", folder / "undisturbed")
    return dict(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="empty or new; it is kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        where = stress(folder, arguments.kills, arguments.seed)
    places = ", ".join(f"{count} {place}" for place, count in sorted(where.items()))
    print(
        f"{sum(where.values())} kills of one run of {STEPS_PER_KILL * arguments.kills} steps "
        f"({places}): weights bit for bit and logs are those of the undisturbed run"
    )


if __name__ == "__main__":
    main()
