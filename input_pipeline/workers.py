"""Worker processes of the loader: their life, their signals, and the reason of their death.

Grain starts the workers and passes batches through shared memory. This module adds:
  - A worker ends with the main process, however that ends, and frees its memory; Python's resource
    tracker then clears /dev/shm.
  - Ctrl-C and SIGTERM, sent to the whole process group, end no worker: the main process may need
    further batches before it stops.
  - A worker that dies raises a WorkerError with the likely reason.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import TypeVar

T = TypeVar("T")

_HELD = {signal.SIGINT, signal.SIGTERM}
_POLL_SECONDS = 1.0
_DEATH = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")


class WorkerError(OSError):
    """A worker process died; the message gives the likely reason and the settings to change."""


def start(index: int, count: int) -> None:
    """Prepares a worker process; Grain calls it in the worker, before anything is read."""
    del index, count
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process()
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="end-with-parent").start()


def _end_with(parent) -> None:
    # PR_SET_PDEATHSIG would end the worker with the thread that started it, maybe long before the
    # process ends. `is_alive` watches a pipe that closes with the process.
    while parent.is_alive():
        received = signal.sigtimedwait(_HELD, _POLL_SECONDS)
        # From the parent itself: multiprocessing ends its children when the interpreter exits.
        if received and received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            break
    os._exit(1)


def call_shielded(call: Callable[[], T]) -> T:
    """Calls in a thread whose child processes never see Ctrl-C or SIGTERM.

    A process inherits the blocked signals of the thread that starts it, so a worker is safe before
    it reaches `start`, while it imports modules.
    """
    # Started here: the thread that starts the tracker would unblock these signals.
    resource_tracker.ensure_running()
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="start-workers").start()
    return future.result()


def explain(error: RuntimeError) -> WorkerError | None:
    """Explains Grain's error about a dead worker; None for any other error."""
    found = _DEATH.search(str(error))
    if found is None:
        return None
    code = int(found[1])
    if code >= 0:
        return WorkerError(
            f"a loader worker ended with exit code {code}; the lines above say why. Set "
            "data.workers=0 to read in threads of the main process"
        )
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        reason = (
            ", most likely by the kernel because memory ran out (its log, dmesg, then has a line "
            '"Out of memory"). Lower data.workers, data.prefetch or data.batch_size, or give the '
            "machine or container more memory"
        )
    elif name == "SIGBUS":
        free = shutil.disk_usage("/dev/shm").free / 1e6 if os.path.isdir("/dev/shm") else 0
        reason = (
            f", most likely because shared memory ran out (/dev/shm has {free:,.0f} MB free). Make "
            "it larger (docker run --shm-size=4g), lower data.workers or data.prefetch, or set "
            "data.workers=0, which needs none"
        )
    else:
        reason = (
            "; a library crashed or somebody ended it. Set data.workers=0 to read in threads of "
            "the main process"
        )
    return WorkerError(f"a loader worker was ended by {name}{reason}")
