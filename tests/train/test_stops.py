"""Runs that are stopped, as processes of their own: SIGKILL, SIGTERM and SIGINT in every phase."""

import random
import re
import signal
import time

import pytest

from oneformer_jax.train.checkpoint import load_for_inference
from oneformer_jax.train.runtime import folders
from oneformer_jax.train.runtime.preemption import EXIT_CODE, INTERRUPTED
from tests.train.stress_kill import Job, stress

pytestmark = pytest.mark.slow

EVALUATE_NEVER = "train.eval_every=0"


def test_sigkill_costs_nothing_but_time(tmp_path):
    where = stress(tmp_path, kills=5, seed=1)
    assert sum(where.values()) == 5
    assert where["saving"] >= 1


BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@BOTH
def test_a_signal_in_evaluation_and_on_again(tmp_path, number):
    job = Job(tmp_path, "train.steps=16")
    assert job.wait_for(job.said("Evaluating step 10")), job.output
    begun = time.monotonic()
    assert job.send(number) == EXIT_CODE, job.output
    assert time.monotonic() - begun < 30  # the usual grace period
    assert load_for_inference(tmp_path).step == 10
    # While the save under way was waited for, the evaluation may have come to its end.
    evaluated = (tmp_path / "eval" / "10" / "results.json").exists()
    job = Job(tmp_path, "train.steps=16")
    assert job.wait_for(job.said("Resuming from step 10")), job.output
    assert job.finish() == 0, job.output
    assert job.said("Evaluating step 10")() != evaluated


@BOTH
def test_a_signal_while_the_first_step_is_compiled(tmp_path, number):
    job = Job(tmp_path, "train.steps=16", "cache=off")
    assert job.wait_for(lambda: job.steps == 1), job.output  # its batch is there, and no program
    time.sleep(1)
    begun = time.monotonic()
    assert job.send(number) == EXIT_CODE, job.output
    assert time.monotonic() - begun < 5
    assert job.steps == 1


def saved_step(job) -> int:
    """The step that a stopped run says it has saved, which must be its last begun or one before."""
    steps = [re.search(r"Stopped at step (\d+), which is saved", line) for line in job.output]
    (step,) = [int(match[1]) for match in steps if match]
    return step


# The host matcher calls back from the step: there Python's own answer to Ctrl-C is lost.
@pytest.mark.parametrize("matcher", ["xla", "scipy"])
def test_ctrl_c_at_random_moments_of_training_saves_the_step(tmp_path, matcher):
    rng, last = random.Random(3), 0
    for _ in range(4 if matcher == "xla" else 2):  # the latter compiles each time
        job = Job(tmp_path, "train.steps=100000", f'kernels.assignment="{matcher}"', EVALUATE_NEVER)
        steps = rng.randint(2, 9)
        assert job.wait_for(lambda job=job, steps=steps: job.steps >= steps), job.output
        time.sleep(rng.uniform(0, 0.2))
        assert job.send(signal.SIGINT) == EXIT_CODE, job.output
        step = saved_step(job)
        assert last < step <= last + job.steps
        assert folders.finished_steps(job.checkpoints)[-1] == step
        assert last == 0 or job.said(f"Resuming from step {last} ")()
        last = step
    assert load_for_inference(tmp_path).step == last


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path):
    job = Job(tmp_path, "train.steps=100000", EVALUATE_NEVER)
    assert job.wait_for(lambda: job.steps >= 5 and job.is_saving()), job.output
    assert job.send(signal.SIGINT) == EXIT_CODE, job.output
    assert not job.is_saving()
    assert load_for_inference(tmp_path).step == saved_step(job) >= 5


@pytest.mark.parametrize("moment", ["training", "evaluating", "compiling"])
def test_ctrl_c_twice_ends_at_once_and_leaves_no_half_checkpoint(tmp_path, moment):
    job = Job(tmp_path, "train.steps=100000", *(["cache=off"] if moment == "compiling" else []))
    ready = {
        "training": lambda: job.steps >= 7,
        "evaluating": job.said("Evaluating step 10"),
        "compiling": lambda: job.steps == 1,
    }[moment]
    assert job.wait_for(ready), job.output
    job.process.send_signal(signal.SIGINT)
    job.wait_for(job.said("SIGINT: saving"))  # two at the same time would be one
    job.process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    code = job.finish()
    assert code in (INTERRUPTED, EXIT_CODE), job.output  # the first may have ended it
    assert code == EXIT_CODE or time.monotonic() - begun < 10
    done = folders.finished_steps(job.checkpoints)
    if done:
        assert load_for_inference(tmp_path).step == done[-1]
    job = Job(tmp_path, "train.steps=12", EVALUATE_NEVER)
    assert job.finish() == 0, job.output
    assert load_for_inference(tmp_path).step == 12
