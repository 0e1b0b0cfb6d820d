"""The run for a device that is there briefly: its order, its seconds, and what it keeps."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from oneformer_jax.kernels.choice import OPERATIONS
from tests.bench import device
from tests.bench.device import Step, carry_out, steps


def script(name, text, **changes):
    return Step(name, ("-c", text), **changes)


def read(folder):
    return json.loads((folder / "device.json").read_text())


def test_a_step_that_hangs_is_cut_off_and_what_it_wrote_is_kept(tmp_path):
    wrote = tmp_path / "half.json"
    hang = script(
        "hang",
        "import subprocess, sys, time\n"
        f"open({str(wrote)!r}, 'w').write('[1]')\n"
        "print('half done', flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(1000)'])",
        share=0.2,
        result=lambda: json.loads(wrote.read_text()),
    )
    start = time.monotonic()
    record = carry_out([hang, script("next", "print('after')")], tmp_path, 10.0)
    assert time.monotonic() - start < 9
    first, second = record["steps"]
    assert first["verdict"] == "cut off after 2 s"
    assert first["result"] == [1] and first["tail"] == ["half done"]
    assert second["verdict"] == "done" and second["tail"] == ["after"]
    assert read(tmp_path) == record


def test_the_record_is_written_after_every_step(tmp_path):
    text = f"import json; print(json.load(open({str(tmp_path / 'device.json')!r}))['steps'])"
    record = carry_out([script("one", "pass"), script("two", text)], tmp_path, 60.0, dry=True)
    assert "'one'" in record["steps"][1]["tail"][0] and "'two'" not in record["steps"][1]["tail"][0]
    assert record["dry"] and record["budget_seconds"] == 60.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_keeps_what_it_has_and_its_children_end(number, tmp_path):
    code = (
        "import pathlib, sys\n"
        "from tests.bench.device import Step, carry_out, leave_at_signals\n"
        "leave_at_signals()\n"
        "carry_out([Step('one', ('-c', 'print(1)')),\n"
        "  Step('two', ('-c',\n"
        "    'import os, time; print(os.getpid(), flush=True); time.sleep(99)'))],\n"
        "  pathlib.Path(sys.argv[1]), 100.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=device.ROOT)
    log = tmp_path / "two.log"
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    (one,) = read(tmp_path)["steps"]
    assert one["verdict"] == "done" and one["tail"] == ["1"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_failures_missing_packages_and_a_spent_budget_are_told(tmp_path):
    every = [
        script("fails", "raise SystemExit(3)", result=lambda: json.loads("{")),
        script("absent", "pass", needs="no_such_package"),
    ]
    fails, absent = carry_out(every, tmp_path, 60.0)["steps"]
    assert fails["verdict"] == "failed with exit code 3" and fails["code"] == 3
    assert fails["result"] is None and "line 1" in fails["no_result"]
    assert absent["verdict"] == "left out: no_such_package is not installed"
    (late,) = carry_out([script("late", "pass")], tmp_path, 1.0)["steps"]
    assert late["verdict"] == "left out: no time was left"


def test_a_step_that_gives_up_a_kernel_is_started_anew(tmp_path):
    text = (
        f"import pathlib; file = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "count = len(file.read_text()) if file.exists() else 0\n"
        "file.write_text('x' * (count + 1)); print('start', count)\n"
        "raise SystemExit(75 if count < 2 else 0)"
    )
    (step,) = carry_out([script("gives_up", text)], tmp_path, 60.0)["steps"]
    assert step["verdict"] == "done" and step["tail"] == ["start 0", "start 1", "start 2"]


def test_the_steps_are_in_the_order_of_their_worth(tmp_path):
    for dry in (False, True):
        names = [step.name for step in steps(tmp_path, dry)]
        assert names[:3] == ["device", "on_device_tests", "calibration"]
        assert names[-1] == "training" and names[3].startswith("peers_")
    with pytest.raises(SystemExit):
        device.main([f"--output={tmp_path}", "--only=nothing"])


@pytest.mark.parametrize("dry", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_published_calls_take_turns_and_are_all_there(dry):
    calls = [call for call, _ in device.published_calls(dry)]
    assert [call.operation for call in calls[:4]] == list(OPERATIONS)
    counts = [sum(call.operation == name for call in calls) for name in OPERATIONS]
    if dry:
        assert counts == [1, 1, 1, 1]
    else:  # deformable attention and points in two dtypes, DiNAT's calls, the problems by size
        assert counts[0] == 16 and counts[1] > 40 and counts[2:] == [4, 4]


@pytest.mark.slow
def test_the_dry_form_does_all_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.device", "--dry", f"--output={tmp_path}"],
        cwd=device.ROOT,
        capture_output=True,
        text=True,
        timeout=540,
    )
    found = read(tmp_path)
    verdicts = {step["name"]: step["verdict"] for step in found["steps"]}
    assert done.returncode == 0, verdicts
    assert set(verdicts.values()) <= {"done", "left out: transformers is not installed"}
    results = {step["name"]: step.get("result") for step in found["steps"]}
    assert results["device"]["platform"] == "cpu"
    assert {row["operation"] for row in results["calibration"]["table"]} == {"ms_deform_attn"}
    assert results["training"]["results"]["images"] == 2
