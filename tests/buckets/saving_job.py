"""A run that only saves, logs and resumes: it starts in no time, so that many can be killed."""

import time
from multiprocessing.synchronize import Event

import jax
import numpy as np
from absl import logging

import tests.conftest  # noqa: F401 - before jax is imported
from oneformer_jax.train import descriptions, observe
from oneformer_jax.train.checkpoint import Checkpoints
from oneformer_jax.train.runtime.workdir import hold
from tests import tiny

EVERY = 4  # steps between two saves


def first_state():
    return {
        "params": {"big": np.zeros((256, 1024), np.float32)},
        "stats": {f"a{i}": np.full(16, i, np.float32) for i in range(40)},
    }


def after(state, step):
    """The state after a step."""
    return jax.tree.map(lambda x: x * np.float32(0.5) + np.float32(step), state)


def main(url: str, steps: int, began: Event) -> None:
    """Runs up to a step; sets `began` when it takes its first one."""
    logging.use_absl_handler()
    observe.quiet_libraries()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, done = first_state(), 0
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
    with hold(url):
        descriptions.claim_workdir(url, tiny.model_config().to_dict(), "{}", tiny.metadata())
        with Checkpoints(url, keep=2, keep_best=0) as checkpoints:
            if checkpoints.latest_step() is not None:
                done, state, _ = checkpoints.restore_newest(target)
                state = jax.tree.map(np.asarray, state)
            writer = observe.make_writer(url, resume_step=done)
            for step in range(done + 1, steps + 1):
                began.set()
                state = after(state, step)
                writer.write_scalars(step, {"sum": float(state["params"]["big"][0, 0])})
                if step % EVERY == 0:
                    writer.flush()
                    checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), {"step": step})
                time.sleep(0.01)
            writer.close()
