"""Reads a checkpoint and writes it anew, as one of several processes: for tests.

python -m tests.train.resave FROM TO STEP DATA FSDP COORDINATOR COUNT NUMBER

The state is that of `test_checkpoint`; DATA and FSDP are the axes of the mesh over all processes.
"""

import sys

import jax

import tests.conftest  # noqa: F401 - before jax is imported
from oneformer_jax.train import sharding
from oneformer_jax.train.checkpoint import Checkpoints
from oneformer_jax.train.runtime import distributed
from tests.train.test_checkpoint import make_target


def main(source, target, step, data, fsdp, *place) -> None:
    step, data, fsdp, count = (int(text) for text in (step, data, fsdp, place[1]))
    jax.config.update("jax_num_cpu_devices", data * fsdp // count)
    distributed.start(distributed.find_place({}, *place), 60)
    abstract = make_target(sharding.make_mesh(data, fsdp), ema=True)
    with Checkpoints(source) as checkpoints:
        state, position = checkpoints.restore(step, abstract)
    with Checkpoints(target) as checkpoints:
        checkpoints.save(step, state, position)


if __name__ == "__main__":
    main(*sys.argv[1:])
