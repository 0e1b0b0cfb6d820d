"""A tiny training run as a program of its own, to be killed: `python -m tests.train.job WORKDIR`.

Arguments after the folder are overrides, as in train.steps=40. It prints "step N" for each step.
"""

import ast
import signal
import sys

import jax
from absl import logging

import tests.conftest  # noqa: F401 - before jax is imported
from oneformer_jax.train import loop, sharding
from tests import tiny
from tests.train import eval_scenes
from tests.train.runs import Batches, make_config


class Printing(Batches):
    def __next__(self):
        batch = super().__next__()
        print(f"step {self._next}", flush=True)
        return batch


def main(workdir: str, *overrides: str) -> None:
    # A shell starts what it runs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    if "cache=off" in overrides:
        jax.config.update("jax_enable_compilation_cache", False)
    pairs = (text.split("=") for text in overrides if text != "cache=off")
    settings = {key.replace(".", "__"): ast.literal_eval(value) for key, value in pairs}
    loop.train(
        make_config(train__pictures=0, train__keep=2, **settings),
        workdir,
        metadata=tiny.metadata(),
        text_table=tiny.text_table(),
        train_batches=Printing(),
        eval_batches=eval_scenes.batches,
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
