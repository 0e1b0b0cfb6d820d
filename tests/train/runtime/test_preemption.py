"""SIGTERM, SIGINT and the working directory: what is saved, who may be there, and what is said."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time

import jax.numpy as jnp
import pytest

from oneformer_jax.train import sharding
from oneformer_jax.train.runtime import preemption, workdir
from oneformer_jax.train.runtime.preemption import Preemption
from oneformer_jax.train.runtime.workdir import WorkdirError


@pytest.fixture(scope="module", autouse=True)
def ctrl_c():
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def terminate_and_wait(seen, number=signal.SIGTERM):
    """Sends a signal to this process; `seen` tells when it was noted by the thread."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen()


BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@BOTH
def test_the_signal_is_noted_and_the_old_handler_returns(mesh, number):
    before = signal.getsignal(number)
    with Preemption(mesh) as watcher:
        assert not watcher.poll()
        terminate_and_wait(watcher.poll, number)
        assert watcher.poll()  # and it stays noted
    assert signal.getsignal(number) == before
    assert not any(thread.name == "preemption" for thread in threading.enumerate())


@BOTH
def test_at_rest_the_process_ends_once_the_save_is_done(mesh, monkeypatch, number):
    codes, finished = [], []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    with Preemption(mesh) as watcher, watcher.at_rest(lambda: finished.append("saved")):
        # From a thread: the main one may be in the compiler and never get to its handler.
        terminate_and_wait(lambda: codes, number)
    assert codes == [preemption.EXIT_CODE]
    assert finished == ["saved"]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_the_first_signal_ends_at_once_also_while_a_save_is_waited_for(
    mesh, monkeypatch, first
):
    codes, saved, waiting = [], threading.Event(), threading.Event()
    monkeypatch.setattr(preemption.os, "_exit", codes.append)

    def finish():
        waiting.set()
        saved.wait(30)

    with Preemption(mesh) as watcher, watcher.at_rest(finish):
        terminate_and_wait(waiting.is_set, first)
        terminate_and_wait(lambda: codes, signal.SIGINT)
        assert codes == [preemption.INTERRUPTED]
        saved.set()


def test_sigterm_twice_does_not_cut_off_the_save(mesh, monkeypatch):
    """Launchers pass it on to processes that have got it themselves."""
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    with Preemption(mesh) as watcher:
        terminate_and_wait(watcher.poll)
        terminate_and_wait(watcher.poll)
        time.sleep(0.2)
        assert codes == []


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(mesh):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption(mesh) as watcher:
            os.kill(os.getpid(), signal.SIGINT)
            assert not watcher.came(0.2)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_at_rest_that_a_signal_to_the_group_caused_ends_as_the_signal_does(
    mesh, monkeypatch
):
    """A loader process may die of the signal before this process has noted its own."""
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with (
        pytest.raises(RuntimeError, match="a worker died"),
        Preemption(mesh) as watcher,
        watcher.at_rest(lambda: None),
    ):
        timer.start()
        raise RuntimeError("a worker died")
    assert set(codes) == {preemption.EXIT_CODE}


def test_an_error_without_a_signal_is_just_an_error(mesh, monkeypatch):
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    with (
        pytest.raises(RuntimeError, match="ours"),
        Preemption(mesh) as watcher,
        watcher.at_rest(lambda: None),
    ):
        raise RuntimeError("ours")
    assert codes == []


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


@pytest.mark.parametrize("text", ["", "[]", '{"host": "x", "process": 1, "since": 1e300}'])
def test_a_lock_of_any_content_keeps_a_second_run_out(tmp_path, text):
    with open(tmp_path / workdir.LOCK_FILE, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(text)
        file.flush()
        with (
            pytest.raises(WorkdirError, match=r"in use by another run \(which has just started"),
            workdir.hold(tmp_path),
        ):
            pass


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(WorkdirError, match=r"file/run cannot be written: Not a directory"),
        workdir.hold(tmp_path / "file" / "run"),
    ):
        pass


def test_room_for_a_checkpoint(tmp_path, monkeypatch):
    state = {"params": jnp.ones((1024, 1024)), "step": jnp.int32(1)}
    workdir.check_room(tmp_path, state)
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda _: Room)
    with pytest.raises(WorkdirError, match=r"0\.00 GiB free, but one checkpoint takes about 0\.00"):
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
