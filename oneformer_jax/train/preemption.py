"""SIGTERM: what a machine gets that is about to be taken away, as its only notice.

While training steps run, the loop is told, saves and stops. At all other times (start, compilation,
evaluation) everything worth keeping is in a checkpoint already, and Python may be unable to act for
minutes, being inside the compiler; then a thread waits for the save under way and ends the process.
Either way the exit code is `EXIT_CODE`, and the same command goes on from the saved step.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from oneformer_jax.train import sharding

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(SystemExit):
    """The run was told to stop; the state of `step` is saved. Ends the program with `EXIT_CODE`.

    Attributes:
      step: of the saved state.
    """

    def __init__(self, step: int):
        self.step = step
        logging.warning("Stopped at step %d, which is saved; the same command goes on", step)
        super().__init__(EXIT_CODE)


class Preemption:
    """Context in which SIGTERM is noted; see the module's text.

        with Preemption(mesh) as preemption:
            with preemption.at_rest(checkpoints.wait_until_finished):
                ...  # nothing is lost if the process ends in here
            if preemption.poll():
                checkpoints.save(...)
                raise Preempted(step)

    Signals reach Python in the main thread only: in another one nothing is installed.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self._noted = False
        self._lock = threading.Lock()  # held while a rest begins or ends, and to end the process
        self._finish: Callable[[], None] | None = None
        self._pending: jax.Array | None = None
        self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))

    def __enter__(self) -> Preemption:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            # The wake-up file is written by the C handler: also while the main thread compiles.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
            self._old_file = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *unused) -> None:
        if self._installed:
            signal.set_wakeup_fd(self._old_file)
            signal.signal(signal.SIGTERM, self._old_handler)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)

    def _watch(self) -> None:
        while numbers := os.read(self._read, 64):
            if signal.SIGTERM not in numbers:
                continue
            logging.warning("SIGTERM: saving, then ending with exit code %d", EXIT_CODE)
            with self._lock:
                self._noted = True
                if self._finish is not None:
                    self._end(self._finish)

    def _end(self, finish: Callable[[], None]) -> None:
        """Ends the process from outside the main thread, which may be deep in the compiler."""
        code = EXIT_CODE
        try:
            finish()
        except Exception:
            logging.exception("The save under way failed; the checkpoint before it is intact")
            code = 1
        for child in multiprocessing.active_children():
            child.terminate()
        logging.flush()
        sys.stdout.flush()
        os._exit(code)

    def rest(self, finish: Callable[[], None]) -> None:
        """From here on nothing is lost: SIGTERM calls `finish` in a thread and ends the process."""
        with self._lock:
            self._finish = finish
            if self._noted:
                self._end(finish)

    def wake(self) -> None:
        """Ends `rest`: from here on SIGTERM is only noted, for `poll`."""
        with self._lock:
            self._finish = None

    @contextlib.contextmanager
    def at_rest(self, finish: Callable[[], None]) -> Iterator[None]:
        """Around what may be cut off: `rest` and `wake`."""
        self.rest(finish)
        try:
            yield
        finally:
            self.wake()

    @property
    def noted(self) -> bool:
        """Whether this process got the signal."""
        return self._noted

    def poll(self) -> bool:
        """Whether to save and stop after this step; every process calls it once per step.

        With several processes all get the same answer at the same step, one step after the signal
        to any of them; nothing waits for the device but for the flag of the step before.
        """
        if jax.process_count() == 1:
            return self._noted
        stop = self._pending is not None and bool(self._pending.addressable_data(0))
        flags = np.full(self._mesh.local_mesh.size, self._noted)
        self._pending = self._any(sharding.put_batch(flags, self._mesh))
        return stop
