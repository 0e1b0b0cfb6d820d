"""Runs in a bucket that are stopped, as processes of their own, and a server that goes away."""

import json
import multiprocessing
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from oneformer_jax import remote
from oneformer_jax.train.checkpoint import load_for_inference
from oneformer_jax.train.runtime import folders
from oneformer_jax.train.runtime.preemption import EXIT_CODE
from tests.buckets import saving_job
from tests.eval.tiny_segmenter import picture
from tests.train.runtime import test_distributed
from tests.train.stress_kill import ROOT, Job, assert_same_logs, assert_same_weights, stress

pytestmark = pytest.mark.slow

NO_EVALUATION = "train.eval_every=0"


@pytest.fixture
def make_job(server, bucket):
    """Makes jobs that look at the server's memory: requests would keep it from its work."""

    class BucketJob(Job):
        def is_saving(self):
            prefix = remote.bucket_and_key(self.checkpoints)[1]
            names = list(server.storage.objects.get(bucket, {}))
            return any(n.startswith(prefix) and n.endswith(folders.UNVERIFIED) for n in names)

    return BucketJob


def test_sigkill_of_a_run_that_only_saves(server, bucket, url):
    """Saves small arrays, without a program to compile: many kills, most of them in a save."""
    steps, rng, in_save, kills = 100, random.Random(5), 0, 0

    def is_saving():
        return any(name.endswith(folders.UNVERIFIED) for name in server.objects(bucket))

    processes = multiprocessing.get_context("forkserver")  # it imports once for all of them
    processes.set_forkserver_preload([saving_job.__name__])
    while True:
        began = processes.Event()
        process = processes.Process(target=saving_job.main, args=(url, steps, began))
        process.start()
        assert began.wait(300)
        if kills < 12:
            process.join(rng.uniform(0, 0.8))
            while kills % 2 and process.is_alive() and not is_saving():
                time.sleep(0.002)
            process.join(rng.uniform(0, 0.1))
            process.kill()
        process.join(300)
        if process.exitcode != -signal.SIGKILL:
            break
        kills += 1
        in_save += is_saving()
    print(f"{kills} kills, {in_save} in a save or removal")
    assert process.exitcode == 0
    assert in_save >= 4 and kills >= 10
    expected = saving_job.first_state()
    for step in range(1, steps + 1):
        expected = saving_job.after(expected, step)
    found = load_for_inference(url)
    assert found.step == steps
    np.testing.assert_array_equal(found.params["big"], expected["params"]["big"])
    for name, value in expected["stats"].items():
        np.testing.assert_array_equal(found.stats[name], value)
    logged = (remote.path_of(url) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, steps + 1))
    names = {name.split("/")[3] for name in server.objects(bucket, "runs/one/checkpoints/")}
    assert names == {str(steps - saving_job.EVERY), str(steps)}
    assert server.objects(bucket, "runs/one/LOCK") == []


def test_sigkill_costs_nothing_but_time(bucket, make_job):
    where = stress(f"gs://{bucket}", kills=10, seed=1, make_job=make_job)
    assert sum(where.values()) == 10
    assert where["saving"] >= 2


def test_a_server_that_is_away_in_the_middle_of_a_save_costs_nothing(
    server, tmp_path, url, make_job
):
    length = "train.steps=20"
    undisturbed = Job(tmp_path / "run", length)
    assert undisturbed.finish() == 0, undisturbed.output
    job = make_job(url, length)
    assert job.wait_for(lambda: job.steps >= 5 and job.is_saving()), job.output
    time.sleep(0.1)
    with server.away(20):
        assert job.is_saving()
        assert folders.UNVERIFIED in " ".join(server.objects(*remote.bucket_and_key(url)))
    assert job.finish() == 0, job.output
    assert not job.said("Resuming")()
    assert_same_weights(url, tmp_path / "run")
    assert_same_logs(remote.path_of(url), tmp_path / "run")
    assert job.finished_steps() == undisturbed.finished_steps()


def test_a_second_run_is_refused_while_the_first_goes_on(url, make_job):
    first = make_job(url, "train.steps=100000", NO_EVALUATION)
    assert first.wait_for(lambda: first.steps >= 2), first.output
    second = make_job(url, "train.steps=100000", NO_EVALUATION)
    assert second.finish() != 0
    assert second.said(
        rf"workdir {url} is in use by another run \(process {first.process.pid} on"
    )()
    assert second.steps == 0
    assert first.send(signal.SIGTERM) == EXIT_CODE, first.output
    (step,) = [
        int(m[1]) for m in (re.search(r"Stopped at step (\d+)", x) for x in first.output) if m
    ]
    assert load_for_inference(url).step == step
    third = make_job(url, f"train.steps={step + 2}", NO_EVALUATION)
    assert third.finish() == 0, third.output
    assert third.said(f"Resuming from step {step} ")()


# ------------------------------------------------------------------ the command line


def main(*arguments):
    """Runs the program; its exit code, and its standard output and error together."""
    done = subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout


def test_two_processes_train_in_a_bucket_and_all_modes_use_what_they_made(server, bucket, tmp_path):
    folder, data = f"gs://{bucket}/two", f"gs://{bucket}/data"
    test_distributed.run(tmp_path / "one", tmp_path / "data", 1)
    remote.upload(tmp_path / "data", data)
    test_distributed.run(folder, data, 2)
    test_distributed.assert_close(remote.path_of(folder), tmp_path / "one")
    sealed = (remote.path_of(folder) / "checkpoints" / "4" / "SHA256SUMS").read_text()
    for number in range(2):
        assert f"  state/ocdbt.process_{number}/manifest.ocdbt\n" in sealed
    overrides = [f"--config.{key}={value}" for key, value in test_distributed.OVERRIDES.items()]
    config = ("--config=configs/synthetic.py", *overrides, f"--config.dataset.data_dir={data}")
    code, output = main(*config, f"--workdir={folder}", "--mode=eval")
    assert code == 0 and f"results      {folder}/eval/4/results.json" in output, output
    code, output = main(f"--source={folder}", f"--output={folder}/converted", "--mode=convert")
    assert code == 0, output
    Image.fromarray(picture()).save(tmp_path / "a.png")
    remote.write(f"{folder}/images/a.png", (tmp_path / "a.png").read_bytes())
    predict = (f"--workdir={folder}/converted", "--mode=predict", "--task=all")
    code, output = main(*predict, f"--image={folder}/images")
    assert code == 0, output
    assert f"1 of 1 images segmented; results: {folder}/converted/predictions" in output
    assert server.objects(bucket, "two/converted/predictions/a_panoptic.json")
    code, output = main(*config, f"--workdir={folder}", "--mode=replay")
    assert code == 1 and "holds no recorded step" in output, output
    assert server.objects(bucket, "two/LOCK") == []


def test_the_command_line_says_in_one_line_what_is_wrong_with_a_bucket(server, bucket, url):
    server.refused["/b/closed/"] = 403
    server.refused["/b/unknown/"] = 401
    server.refused[f"/upload/storage/v1/b/{bucket}/"] = 403
    cases = {
        ("--mode=predict", "--workdir=gs://nobodys/run", "--image=x"): "no bucket 'nobodys'",
        ("--mode=predict", "--workdir=gs://closed/run", "--image=x.png"): "permission is denied",
        ("--mode=predict", "--workdir=gs://unknown/run", "--image=x.png"): "no valid credentials",
        ("--mode=predict", "--workdir=az://a/run", "--image=x.png"): "is no URL that this program",
        ("--mode=convert", f"--source={url}", "--output=x"): f"{url} does not exist",
        ("--mode=convert", f"--source={url}", f"--output={url}", "--format=official"): "bucket",
        ("--mode=inspect", f"--output={url}", "--config=synthetic"): "cannot be in a bucket",
    }
    for arguments, message in cases.items():
        code, output = main(*arguments)
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert code == 1 and message in line, output
        assert "Traceback" not in output
