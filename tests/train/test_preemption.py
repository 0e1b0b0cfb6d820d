"""SIGTERM and the working directory: what is saved, who may be there, and what is said."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time

import jax.numpy as jnp
import pytest

from oneformer_jax.train import preemption, sharding, workdir
from oneformer_jax.train.preemption import Preemption
from oneformer_jax.train.workdir import WorkdirError


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def terminate_and_wait(seen):
    """Sends SIGTERM to this process; `seen` tells when it was noted by the thread."""
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 10
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen()


def test_the_signal_is_noted_and_the_old_handler_returns(mesh):
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(mesh) as watcher:
        assert not watcher.poll()
        terminate_and_wait(watcher.poll)
        assert watcher.poll()  # and it stays noted
    assert signal.getsignal(signal.SIGTERM) == before
    assert not any(thread.name == "preemption" for thread in threading.enumerate())


def test_at_rest_the_process_ends_once_the_save_is_done(mesh, monkeypatch):
    codes, finished = [], []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    with Preemption(mesh) as watcher, watcher.at_rest(lambda: finished.append("saved")):
        # From a thread: the main one may be in the compiler and never get to its handler.
        terminate_and_wait(lambda: codes)
    assert codes == [preemption.EXIT_CODE]
    assert finished == ["saved"]


def test_a_signal_before_the_rest_ends_it_at_once(mesh, monkeypatch):
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    with Preemption(mesh) as watcher:
        terminate_and_wait(watcher.poll)
        assert codes == []
        watcher.rest(lambda: None)
        assert codes == [preemption.EXIT_CODE]
        watcher.wake()


def test_a_save_that_fails_has_another_exit_code(mesh, monkeypatch):
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)

    def fail():
        raise OSError("disk")

    with Preemption(mesh) as watcher, watcher.at_rest(fail):
        terminate_and_wait(lambda: codes)
    assert codes == [1]


def test_several_processes_agree_one_step_later(mesh, monkeypatch):
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    with Preemption(mesh) as watcher:
        assert [watcher.poll(), watcher.poll()] == [False, False]
        terminate_and_wait(watcher._noted.is_set)
        assert [watcher.poll(), watcher.poll()] == [False, True]


def test_in_another_thread_nothing_is_installed(mesh):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with Preemption(mesh) as watcher:
            seen.append((watcher.poll(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


# ------------------------------------------------------------------ the working directory


def _hold(path, ready, leave):
    with workdir.hold(path):
        ready.set()
        leave.wait(30)


def test_a_second_run_is_kept_out(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "run"), ready, leave))
    process.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(WorkdirError, match=rf"in use by another run \(process {process.pid} on"),
            workdir.hold(tmp_path / "run"),
        ):
            pass
    finally:
        process.kill()
        process.join()
    with workdir.hold(tmp_path / "run"):  # a lock does not outlive its process
        owner = json.loads((tmp_path / "run" / workdir.LOCK_FILE).read_text())
        assert owner["process"] == os.getpid()
    assert (tmp_path / "run" / workdir.LOCK_FILE).read_text() == ""


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(WorkdirError, match=r"file/run cannot be written: Not a directory"),
        workdir.hold(tmp_path / "file" / "run"),
    ):
        pass


def test_a_url_is_no_folder():
    with pytest.raises(WorkdirError, match=r"gs://b/run is a URL"), workdir.hold("gs://b/run"):
        pass


def test_room_for_a_checkpoint(tmp_path, monkeypatch):
    state = {"params": jnp.ones((1024, 1024)), "step": jnp.int32(1)}
    workdir.check_room(tmp_path, state)
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda _: Room)
    with pytest.raises(WorkdirError, match=r"0\.00 GiB free, and one checkpoint takes about 0\.00"):
        workdir.check_room(tmp_path, state)


class Room:
    free = 1000


def test_a_full_disk_is_recognised_behind_other_errors():
    try:
        try:
            raise OSError(errno.ENOSPC, "no space")
        except OSError as error:
            raise ValueError("orbax says: failed") from error
    except ValueError as error:
        assert workdir.is_full(error)
    assert workdir.is_full(RuntimeError("tensorstore: No space left on device"))
    assert not workdir.is_full(OSError(errno.EACCES, "denied"))
