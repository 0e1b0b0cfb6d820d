"""Saves checkpoints until there is no room: `python -m tests.train.fill_disk WORKDIR [FILE_LIMIT]`.

FILE_LIMIT in bytes stands in for a full disk from the third checkpoint on. Prints the step that it
began with, and the error.
"""

import resource
import signal
import sys

import numpy as np
from absl import logging

import tests.conftest  # noqa: F401 - before jax is imported
from oneformer_jax.train import observe
from oneformer_jax.train.checkpoint import CheckpointError, Checkpoints


def main(workdir: str, limit: str = "") -> None:
    logging.use_absl_handler()
    observe.quiet_libraries()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = np.random.default_rng(0)
    arrays = {str(i): noise.random((100, 1000), np.float32) for i in range(4)}
    try:
        with Checkpoints(workdir) as checkpoints:
            first = (checkpoints.latest_step() or 0) + 1
            print("first step", first)
            for step in range(first, first + 3):
                checkpoints.save(step, {"params": arrays}, {"step": step})
                if step == first + 1 and limit:
                    checkpoints.wait_until_finished()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit),) * 2)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
