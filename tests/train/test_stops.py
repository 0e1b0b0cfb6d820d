"""Runs that are stopped, as processes of their own: SIGKILL, and SIGTERM in every phase."""

import signal
import time

import pytest

from oneformer_jax.train.checkpoint import load_for_inference
from oneformer_jax.train.preemption import EXIT_CODE
from tests.train.stress_kill import Job, stress

pytestmark = pytest.mark.slow


def test_sigkill_costs_nothing_but_time(tmp_path):
    where = stress(tmp_path, kills=5, seed=1)
    assert sum(where.values()) == 5
    assert where["saving"] >= 1


def test_sigterm_in_evaluation_and_again_at_once(tmp_path):
    job = Job(tmp_path, "train.steps=16")
    assert job.wait_for(job.said("Evaluating step 10")), job.output
    begun = time.monotonic()
    assert job.send(signal.SIGTERM) == EXIT_CODE, job.output
    assert time.monotonic() - begun < 30  # the usual grace period
    assert load_for_inference(tmp_path).step == 10
    job = Job(tmp_path, "train.steps=16")
    assert job.wait_for(job.said("Resuming from step 10")), job.output
    assert job.finish() == 0, job.output
    assert any("Evaluating step 10" in line for line in job.output)


def test_sigterm_while_the_first_step_is_compiled(tmp_path):
    job = Job(tmp_path, "train.steps=16", "cache=off")
    assert job.wait_for(lambda: job.steps == 1), job.output  # its batch is there, and no program
    time.sleep(1)
    begun = time.monotonic()
    assert job.send(signal.SIGTERM) == EXIT_CODE, job.output
    assert time.monotonic() - begun < 5
    assert job.steps == 1
