"""Handles SIGTERM, the only warning a preemptible machine gets, and SIGINT (Ctrl-C).

While training steps run, the loop saves and stops. At other times (start, compilation, evaluation)
a checkpoint already holds everything worth keeping, and the main thread may be inside the compiler
for minutes. Then a thread waits for the current save and ends the process. Either way the exit code
is `EXIT_CODE`, and the same command resumes from the saved step. A second Ctrl-C ends the process
at once, with `INTERRUPTED`; a half-saved checkpoint is discarded.

Python's own answer to Ctrl-C, an exception in the main thread, is lost inside a callback of JAX,
and the run would go on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from oneformer_jax.train import sharding

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130  # a shell's code for a program that SIGINT ended


class Preempted(SystemExit):
    """The run was told to stop and saved its state. Ends the program with `EXIT_CODE`.

    Attributes:
      step: step of the saved state.
    """

    def __init__(self, step: int):
        self.step = step
        logging.warning("Stopped at step %d, which is saved; the same command resumes", step)
        super().__init__(EXIT_CODE)


class Preemption:
    """Context that handles SIGTERM and SIGINT; see the module's docstring.

        with Preemption(mesh) as preemption:
            with preemption.at_rest(checkpoints.wait_until_finished):
                ...  # nothing is lost if the process ends here
            if preemption.poll():
                checkpoints.save(...)
                raise Preempted(step)

    Signals reach Python in the main thread only: in another one nothing is installed. A signal that
    the process ignores from its start, such as SIGINT under `nohup ... &`, stays ignored.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self._noted = threading.Event()
        self._lock = threading.Lock()  # held while a rest begins or ends, and to end the process
        self._finish: Callable[[], None] | None = None
        self._pending: jax.Array | None = None
        self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            # The C handler writes the wake-up file, even while the main thread compiles.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._old_handlers[number] = signal.signal(number, lambda *_: None)
            self._old_file = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self._installed:
            return
        # At rest, the error may come from a loader process that the same signal ended.
        if error is not None and self._finish is not None and self.came():
            self._end(self._finish)
        signal.set_wakeup_fd(self._old_file)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if number not in self._old_handlers:
                    continue
                name = signal.Signals(number).name
                if not self._noted.is_set():
                    more = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
                    logging.warning(
                        "%s: saving, then ending with exit code %d%s", name, EXIT_CODE, more
                    )
                    self._noted.set()
                    # In another thread: this one watches for the second signal.
                    threading.Thread(target=self._end_rest, daemon=True).start()
                elif number == signal.SIGINT:
                    logging.warning("%s again: ending at once", name)
                    end_process(INTERRUPTED)

    def _end_rest(self) -> None:
        with self._lock:
            if self._finish is not None:
                self._end(self._finish)

    def _end(self, finish: Callable[[], None]) -> None:
        """Ends the process from outside the main thread, which may be deep in the compiler."""
        code = EXIT_CODE
        try:
            finish()
        except Exception as error:
            logging.error("The current save failed, the checkpoint before it is intact: %s", error)
            code = 1
        end_process(code)

    def rest(self, finish: Callable[[], None]) -> None:
        """Begins a rest, when nothing can be lost: a signal calls `finish` and ends the run."""
        with self._lock:
            self._finish = finish
            if self._noted.is_set():
                self._end(finish)

    def wake(self) -> None:
        """Ends a rest: a signal is only noted, for `poll`."""
        with self._lock:
            self._finish = None

    @contextlib.contextmanager
    def at_rest(self, finish: Callable[[], None]) -> Iterator[None]:
        """Rests during a block that may be cut off; after an error the rest goes on."""
        self.rest(finish)
        yield
        self.wake()

    def came(self, within: float = 1.0) -> bool:
        """Tells whether this process got a signal, or gets one `within` some seconds.

        The effect of a signal to the process group may show in another process first.
        """
        return bool(self._old_handlers) and self._noted.wait(within)

    def poll(self) -> bool:
        """Tells whether to save and stop after this step; every process calls it every step.

        All processes get the same answer at the same step, one step after the signal to any of
        them. It waits for the device only until the flag of the step before is known.
        """
        if jax.process_count() == 1:
            return self._noted.is_set()
        stop = self._pending is not None and bool(jax.device_get(self._pending.addressable_data(0)))
        flags = np.full(self._mesh.local_mesh.size, self._noted.is_set())
        self._pending = self._any(sharding.put_batch(flags, self._mesh))
        return stop


def end_process(code: int) -> NoReturn:
    """Ends the process, and its loader processes, from any thread."""
    for child in multiprocessing.active_children():
        child.terminate()
    logging.flush()
    sys.stdout.flush()
    os._exit(code)
