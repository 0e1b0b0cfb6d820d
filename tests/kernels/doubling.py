"""An operation that doubles numbers, by candidates with every fault, for tests of `calibrate`.

As a program: python -m tests.kernels.doubling FOLDER NAME... runs a `Chooser` with these candidates
and prints as JSON what it chose and the lines that it logged.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.kernels import calibrate, choice
from oneformer_jax.kernels.calibrate import attempt, chooser
from oneformer_jax.kernels.trial import Trial


def on_host(x, act):
    """Zeros like `x`, for which the device waits until `act` is done."""

    def call(x):
        act()
        return np.zeros_like(x)

    zeros = jax.pure_callback(
        call, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x)
    )
    return 2 * x + zeros


def refuse(x):
    raise NotImplementedError("numbers above 3 are too many")


def fail(x):
    raise TypeError("the compiler is\nlost")


def fail_late():
    raise RuntimeError("illegal instruction")


def fail_after_the_first(calls=[]):  # noqa: B006
    calls.append(1)
    if len(calls) > 1:
        calls.clear()
        raise RuntimeError("out of memory")


@jax.custom_vjp
def _wrong_backward(x):
    return 2 * x


_wrong_backward.defvjp(lambda x: (2 * x, None), lambda _, g: (2.06 * g,))

CANDIDATES = {
    "xla": lambda x: 2 * x,
    "right": lambda x: x + x,
    "wrong": lambda x: 2.06 * x,
    "wrong backward": _wrong_backward,
    "not a number": lambda x: 2 * x + jnp.where(x > 1, jnp.nan, 0),
    "infinite": lambda x: 2 * x / jnp.where(x > 1, 0.0, 1),
    "refuses": refuse,
    "does not compile": fail,
    "fails": lambda x: on_host(x, fail_late),
    "fails when timed": lambda x: on_host(x, fail_after_the_first),
    "slow": lambda x: on_host(x, lambda: time.sleep(0.05)),
    "compiles forever": lambda x: (time.sleep(2), 2 * x)[1],
    "hangs": lambda x: on_host(x, threading.Event().wait),
    "kills": lambda x: on_host(x, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "is told to end": lambda x: on_host(x, lambda: os.kill(os.getpid(), signal.SIGTERM)),
}


class Doubling(Trial):
    differentiated = (0,)

    def function(self, call, candidate):
        return CANDIDATES[candidate]


def double(x: jax.Array, implementation: str = "auto") -> jax.Array:
    """The api."""
    name = choice.choose("point_sampling", implementation, tuple(CANDIDATES), (x,))
    return CANDIDATES[name](x)


class Program:
    """A jitted function that doubles, and what it is called with."""

    def __init__(self, size: int = 4, implementation: str = "auto"):
        self.jitted = jax.jit(lambda x: double(x, implementation))
        self.array = jnp.arange(1.0, size + 1)


def chosen(gradients: bool = True, size: int = 4) -> str:
    """Looks a call up in the table of this process."""
    call = choice.Call("point_sampling", (((size,), "float32"),))
    return choice.TABLES[jax.process_count() > 1][call.key(gradients)]


@contextlib.contextmanager
def in_place(names: Sequence[str], milliseconds=None):
    """Lets `calibrate` try these candidates of the doubling here, as in a new process.

    Args:
      names: keys of `CANDIDATES`.
      milliseconds: name -> what a clock shows; None is the real clock.
    """
    with contextlib.ExitStack() as stack:
        patch = lambda *change: stack.enter_context(mock.patch.object(*change))  # noqa: E731
        patch(choice, "TABLES", {True: {}, False: {}})
        patch(chooser, "_STORES", {})
        patch(chooser, "_BUDGET", [chooser.LIMIT_SECONDS])
        patch(chooser, "measures", lambda: True)
        patch(chooser, "candidates", lambda call: list(names))
        for module in (choice, attempt):
            patch(module, "load_trial", lambda name: Doubling())
        if milliseconds is not None:
            patch(attempt, "time_call", lambda call, name, run: milliseconds[name])
        yield


def main(folder: str, *names: str) -> None:
    lines: list[str] = []
    everywhere = "JAX_NUM_PROCESSES" in os.environ
    times = dict(zip(names, map(float, os.environ.get("TIMES", "").split()), strict=False))
    if everywhere:
        names_of_places = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
        address, count, number = (os.environ[f"JAX_{name}"] for name in names_of_places)
        jax.distributed.initialize(address, int(count), int(number))
    program = Program()
    with in_place(names, times or None), mock.patch.object(attempt, "RUN_SECONDS", 1.0):
        made = calibrate.Chooser(folder, gradients=True, everywhere=everywhere, log=lines.append)
        made(program.jitted, program.array)
        print(json.dumps({"chosen": chosen(), "lines": lines}))


if __name__ == "__main__":
    main(*sys.argv[1:])
