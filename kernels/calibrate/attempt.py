"""Tries one candidate on the device: compiles, compares, times; gives up what takes too long."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from oneformer_jax.kernels.bench import records
from oneformer_jax.kernels.calibrate.store import Outcome
from oneformer_jax.kernels.choice import Call, load_trial

COMPILE_SECONDS = 20.0
RUN_SECONDS = 20.0  # for the comparison and for all timed calls of a candidate
TIMED_SECONDS = 0.2
REPEATS = 20
ENDED = 75  # exit code: EX_TEMPFAIL of sysexits.h, try again


class TooLong(Exception):
    """Compilation did not end in its time."""


class Attempts:
    """The candidates of one call, which get the same inputs and the same reference."""

    def __init__(self, call: Call, gradients: bool, device: jax.Device, seconds: float):
        """Draws inputs and computes the reference in float32.

        Raises:
          TooLong: the reference did not compile within the seconds.
          jax.errors.JaxRuntimeError: the device failed, or its memory is full.
        """
        self.call = call
        self._trial = trial = load_trial(call.operation)
        self._make = trial.with_gradients if gradients else trial.forward
        self._tolerance = trial.tolerance(call, device.platform)
        self._device = device
        drawn = trial.drawn_inputs(call)
        self._inputs = jax.device_put(drawn, device)
        precise = jax.device_put([_in_float32(x) for x in drawn], device)
        with jax.default_matmul_precision("highest"):
            run = _compiled(self._make(call, None), precise, seconds)
        self._expected = jax.block_until_ready(self._compared(run(*precise)))

    def attempt(self, candidate: str, seconds: float, mark: Callable[[str], None]) -> Outcome:
        """Compiles, compares and times a candidate.

        Args:
          candidate: its name.
          seconds: in which it must compile.
          mark: see `store.Store.trying`.
        """
        what = f"{candidate} of {self.call.operation} ({self.call}) on {self._device.device_kind}"
        try:
            run = _compiled(self._make(self.call, candidate), self._inputs, seconds)
        except TooLong as error:
            return Outcome(fault=str(error))
        except NotImplementedError as error:
            return Outcome(fault=f"refuses: {one_line(error)}")
        except Exception as error:  # whatever a compiler raises, others may do
            return Outcome(fault=f"did not compile: {one_line(error)}")

        def hung() -> None:
            mark("hung an earlier start")
            _end_process(f"{what} has hung for {RUN_SECONDS:.0f} s")

        with _watched(RUN_SECONDS, hung):
            try:
                error = float(_largest_error(self._compared(run(*self._inputs)), self._expected))
                if not error <= self._tolerance:  # NaN is wrong, too
                    finite = error if math.isfinite(error) else None  # JSON has no others
                    return Outcome(error=finite, fault=f"wrong by {error:.0e}")
                return Outcome(time_call(self.call, candidate, lambda: run(*self._inputs)), error)
            except Exception as failure:
                self._check_device(what, mark)
                return Outcome(fault=f"failed: {one_line(failure)}")

    def _compared(self, out: Sequence[jax.Array]) -> list[jax.Array]:
        first, *gradients = out
        return [self._trial.compared(first, self._inputs[1:]), *gradients]

    def _check_device(self, what: str, mark: Callable[[str], None]) -> None:
        """Ends the process if the device computes no more: nothing that follows would be true."""
        try:
            jax.block_until_ready(jax.device_put(jnp.ones(()), self._device) + 1)
        except Exception as error:
            mark("broke the device at an earlier start")
            _end_process(f"{what} has broken the device ({one_line(error)})")


def time_call(call: Call, candidate: str, run: Callable[[], Any]) -> float:
    """Returns the milliseconds of a compiled call, the median of several if it is short."""
    del call, candidate  # tests tell times by these
    start = time.perf_counter()
    jax.block_until_ready(run())
    took = time.perf_counter() - start
    if took > TIMED_SECONDS:
        return 1e3 * took
    repeats = min(REPEATS, max(3, int(TIMED_SECONDS / max(took, 1e-6))))
    return records.median_milliseconds(lambda: jax.block_until_ready(run()), repeats)


def _in_float32(array: Any) -> Any:
    """Casts floating-point numbers; None stays None."""
    if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array.astype(jnp.float32)


@jax.jit
def _largest_error(found: Sequence[jax.Array], expected: Sequence[jax.Array]) -> jax.Array:
    """Returns the largest error of all arrays, each relative to its largest entry."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        scale = jnp.max(jnp.abs(b))
        difference = jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
        errors.append(difference / jnp.where(scale > 0, scale, 1.0))
    return jnp.max(jnp.stack(errors))


def _compiled(function: Callable, arguments: Sequence[Any], seconds: float) -> Any:
    """Compiles in a thread, which is left to itself after its time: compilers cannot be stopped."""
    precision = jax.config.jax_default_matmul_precision
    found: list[Any] = []
    done = threading.Event()

    def work() -> None:
        try:
            with jax.default_matmul_precision(precision):
                found.append(jax.jit(function).lower(*arguments).compile())
        except BaseException as error:
            found.append(error)
        done.set()

    threading.Thread(target=work, name="compile a kernel", daemon=True).start()
    if not done.wait(seconds):
        raise TooLong(f"did not compile in {seconds:.0f} s")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@contextlib.contextmanager
def _watched(seconds: float, then: Callable[[], None]) -> Iterator[None]:
    """Calls `then` if the context lasts longer: the main thread may wait for the device forever."""
    timer = threading.Timer(seconds, then)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_process(why: str) -> NoReturn:
    sys.stdout.flush()
    print(
        f"kernels.calibrate: {why}. This process ends with exit code {ENDED}; the same command "
        "goes on without that candidate",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(ENDED)


def one_line(error: BaseException) -> str:
    """Returns the message of an error, or its name, in one line that is not long."""
    text = " ".join(f"{error}".split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
