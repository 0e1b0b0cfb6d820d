"""Host-side time of a training step beyond the device's own, on the synthetic default.

  python -m tests.bench.step_overhead [--steps=200]

The real loop runs with a program that takes and gives the same arrays and computes nothing: what
is left is fetching a batch that is there, moving it, dispatch, the look at the metrics, logging and
TensorBoard. The matcher's callback is measured beside it, on costs of the real shape.
"""

import argparse
import contextlib
import itertools
import platform
import statistics
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.app import data
from oneformer_jax.configs import synthetic
from oneformer_jax.input_pipeline import datasets, tokenizer
from oneformer_jax.kernels.bench.records import median_milliseconds
from oneformer_jax.models import matcher
from oneformer_jax.train import loop, sharding
from oneformer_jax.train import state as states

LOG_EVERY = 20


def random_batch(config, mesh) -> dict[str, np.ndarray]:
    abstract = states.abstract_batch(config, mesh)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in abstract.items()}
    return batch | {"index": np.zeros(config.data.batch_size, np.int32)}


class StopRun(Exception):
    pass


def loop_seconds(config, steps: int) -> list[float]:
    """Seconds of each step but the first ones; every logging interval is in them."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    info = datasets.dataset_info("synthetic")
    real, times = states.make_training, []

    def make_training(*args):
        training = real(*args)
        key = states.abstract_key(mesh)
        batch = states.abstract_batch(config, mesh)
        _, metrics = jax.eval_shape(training.step.__wrapped__, training.state, batch, key)

        def nothing(state, batch, key):
            return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)

        step = jax.jit(nothing, donate_argnums=0, out_shardings=(training.shardings, None))
        return states.Training(training.model, training.init, training.state, step)

    def batches(start):
        batch = random_batch(config, mesh)
        for _ in itertools.repeat(None, steps):
            times.append(time.perf_counter())
            yield batch
        raise StopRun

    with (
        mock.patch.object(states, "make_training", make_training),
        tempfile.TemporaryDirectory() as workdir,
        contextlib.suppress(StopRun),
    ):
        loop.train(
            config,
            workdir,
            metadata=data.metadata_of(info),
            text_table=tokenizer.text_table(info.class_names),
            train_batches=batches,
            eval_batches=list,
        )
    return np.diff(times)[LOG_EVERY:].tolist()


def callback_milliseconds(config, repeats: int = 50) -> float:
    """Median time in which the host matches a batch; all slots of all images are taken."""
    predictions = config.model.decoder_layers + 1
    shape = (predictions, config.data.batch_size, config.model.num_queries, config.data.num_slots)
    costs = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    valid = np.ones((config.data.batch_size, config.data.num_slots), bool)
    return median_milliseconds(lambda: matcher._solve_with_scipy(costs, valid), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    config = synthetic.get_config()
    config.train.steps = 10 * steps
    config.train.log_every = LOG_EVERY
    config.train.eval_every = config.train.checkpoint_every = 0
    times = loop_seconds(config, steps)
    callback = callback_milliseconds(config)
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(
        f"loop     median {1e3 * statistics.median(times):.2f} ms, mean with logging "
        f"{1e3 * statistics.mean(times):.2f} ms a step ({len(times)} steps)"
    )
    print(f"matcher  median {callback:.2f} ms a step")
    print(f"together {1e3 * statistics.mean(times) + callback:.2f} ms a step")


if __name__ == "__main__":
    main()
