"""Worker processes: they end with the main process, survive its signals, and die with a reason."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import pytest

from oneformer_jax.input_pipeline import loader, workers
from oneformer_jax.input_pipeline.records import RecordError
from tests.input_pipeline.test_loader import INFO, ListSource, make_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@dataclasses.dataclass
class Job:
    """A running `worker_job`, leader of a process group of its own."""

    process: subprocess.Popen
    name: str

    def wait_for(self, line):
        while (got := self.process.stdout.readline()) and not got.startswith(line):
            pass
        assert got, self.process.stderr.read()

    def signal_group(self, number):
        os.killpg(self.process.pid, number)

    def finish(self):
        """Waits for the end; returns the exit code, and what was printed and complained about."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def members(self):
        """Processes of the group that have not ended, without the leader."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    state, _, group = (
                        entry.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
                    )
                    if int(group) == self.process.pid and state not in "ZX":
                        found.append(int(entry.name))
        return [pid for pid in found if pid != self.process.pid]

    def shared_memory(self):
        return list(pathlib.Path("/dev/shm").glob(f"{self.name}*"))

    def assert_all_gone(self, seconds=10):
        deadline = time.monotonic() + seconds
        while self.members() or self.shared_memory():
            assert time.monotonic() < deadline, (self.members(), self.shared_memory())
            time.sleep(0.1)


@pytest.fixture
def start_job():
    jobs = []

    def start(mode):
        name = f"test_{uuid.uuid4().hex[:8]}_"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.input_pipeline.worker_job", mode, name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        jobs.append(Job(process, name))
        return jobs[-1]

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()
        for path in job.shared_memory():
            path.unlink()


SLOW_START = pytest.param("starting", marks=pytest.mark.slow)


@pytest.mark.parametrize("moment", [SLOW_START, "ready"])
def test_a_killed_main_process_leaves_no_process_and_no_shared_memory(start_job, moment):
    job = start_job("forever")
    job.wait_for(moment)
    if moment == "starting":
        while len(job.members()) < 3:  # the resource tracker, and workers that still import
            time.sleep(0.02)
    else:
        time.sleep(1)
        assert len(job.members()) == 3 and job.shared_memory()
    job.process.kill()
    job.process.wait()
    job.assert_all_gone()


def test_ctrl_c_and_sigterm_to_the_group_end_no_worker(start_job):
    job = start_job("saves")
    job.wait_for("starting")
    while len(job.members()) < 3:
        time.sleep(0.02)
    job.signal_group(signal.SIGINT)  # while the workers still import
    job.wait_for("ready")
    time.sleep(1)
    job.signal_group(signal.SIGTERM)
    code, out, err = job.finish()
    assert code == 0 and "saved" in out, err
    assert "Traceback" not in err and "Error" not in err, err
    job.assert_all_gone()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "ready"])
def test_workers_say_nothing_of_a_ctrl_c_that_stops_the_main_process(start_job, moment):
    job = start_job("plain")
    job.wait_for(moment)
    while len(job.members()) < 3:
        time.sleep(0.02)
    job.signal_group(signal.SIGINT)
    code, _, err = job.finish()
    assert code == -signal.SIGINT
    assert err.count("Traceback") == 1, err  # the main process's own
    job.assert_all_gone()


@pytest.mark.slow
def test_a_main_process_that_forgets_to_close_ends_and_leaves_nothing(start_job):
    job = start_job("exits")
    code, _, err = job.finish()
    assert code == 0 and "Traceback" not in err, err
    job.assert_all_gone()


class DeadlySource(ListSource):
    """A source whose record 3 ends the process that reads it, or raises."""

    def __init__(self, death):
        super().__init__([(32, 32)] * 8)
        self.death = death

    def __getitem__(self, i):
        if i == 3 and isinstance(self.death, Exception):
            raise self.death
        if i == 3:
            os.kill(os.getpid(), self.death)
        return super().__getitem__(i)


def _first_error(death, expected, num_workers):
    config = make_config(num_workers=num_workers, batch_size=1)
    batches = loader.train_loader(DeadlySource(death), config, INFO)
    try:
        with pytest.raises(expected) as error:
            list(itertools.islice(batches, 20))
    finally:
        batches.close()
    return str(error.value)


def test_a_dead_worker_is_one_error(capfd):
    message = _first_error(signal.SIGKILL, workers.WorkerError, 2)
    assert message.startswith("a loader worker was ended by SIGKILL") and "\n" not in message
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (-9, ["ended by SIGKILL", "memory ran out", "data.workers, data.prefetch"]),
        (-7, ["ended by SIGBUS", "/dev/shm has", "--shm-size", "data.workers=0"]),
        (-11, ["ended by SIGSEGV", "a library crashed", "data.workers=0"]),
        (-1000, ["ended by signal 1000", "data.workers=0"]),
        (5, ["exit code 5", "the lines above say why"]),
    ],
)
def test_a_dead_worker_is_told_with_the_likely_reason_and_the_settings(code, parts):
    grain_says = f"Worker process was terminated unexpectedly with exit code {code}. Search the"
    message = str(workers.explain(RuntimeError(grain_says)))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("error", "num_workers"),
    [(ValueError("odd values"), 0), (OSError("no such device"), 0), (ValueError("odd values"), 1)],
)
def test_an_error_of_the_data_names_the_record(error, num_workers):
    message = _first_error(error, RecordError, num_workers)
    assert message.startswith("record 3 of ") and message.endswith(str(error))


def test_a_fault_of_the_program_is_no_fault_of_the_data_but_names_the_record():
    error = ZeroDivisionError("a bug")
    _first_error(error, ZeroDivisionError, 0)
    assert error.__notes__[0].startswith("while reading record 3 of ")


def test_other_errors_are_no_dead_worker():
    assert workers.explain(RuntimeError("Worker process was late")) is None
