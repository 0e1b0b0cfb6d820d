"""Calibration: every fault of a candidate, what is remembered, several processes, real kernels."""

import json
import os
import pathlib
import resource
import subprocess
import sys
import threading

import jax
import pytest

from oneformer_jax.kernels import calibrate, choice
from oneformer_jax.kernels.calibrate import attempt, chooser, store
from tests.kernels import doubling
from tests.kernels.doubling import Program, in_place
from tests.train.runtime.test_distributed import free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(folder, names, *, times=None, gradients=True, program=None, log=None):
    """Returns the choice of a start with these candidates, and its table by candidate."""
    rows = []
    program = program or Program()
    with in_place(names, times):
        made = calibrate.Chooser(
            folder,
            gradients=gradients,
            log=log or (lambda line: None),
            report=lambda environment, lines: rows.extend(lines),
        )
        made(program.jitted, program.array)
        chosen = doubling.chosen(gradients, len(program.array))
        return chosen, {row["candidate"]: row for row in rows}


def child(folder, *names, **environment):
    """The same in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.doubling", str(folder), *names],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def tried(monkeypatch):
    """The candidates that are compiled and run, in order."""
    names = []
    original = attempt.Attempts.attempt

    def attempt_(self, candidate, *rest):
        names.append(candidate)
        return original(self, candidate, *rest)

    monkeypatch.setattr(attempt.Attempts, "attempt", attempt_)
    return names


# ------------------------------------------------------------------ the choice


def test_the_fastest_right_candidate_is_chosen(tmp_path):
    times = {"xla": 3.0, "right": 1.0, "wrong": 0.5}
    chosen, rows = run(tmp_path, ("xla", "right", "wrong"), times=times)
    assert chosen == "right"
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "xla": "slower",
        "right": "chosen",
        "wrong": "wrong by 3e-02",
    }
    assert rows["right"]["milliseconds"] == 1.0 and rows["right"]["error"] == 0
    assert rows["wrong"]["milliseconds"] is None and rows["wrong"]["error"] > 0.01
    assert rows["xla"]["call"] == "float32[4]" and rows["xla"]["gradients"]


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("wrong", "wrong by 3e-02"),
        ("wrong backward", "wrong by 3e-02"),
        ("not a number", "wrong by nan"),
        ("infinite", "wrong by inf"),
        ("refuses", "refuses: numbers above 3 are too many"),
        ("does not compile", "did not compile: the compiler is lost"),
        ("fails", "failed: "),
        ("fails when timed", "failed: "),
        ("slow", "slower"),
    ],
)
def test_a_candidate_with_a_fault_is_not_chosen_and_the_verdict_says_why(tmp_path, name, verdict):
    chosen, rows = run(tmp_path, ("xla", name))
    assert chosen == "xla" and rows["xla"]["verdict"] == "chosen"
    assert rows[name]["verdict"].startswith(verdict)
    json.dumps(rows, allow_nan=False)
    assert run(tmp_path, ("xla", name))[1] == rows  # as it is remembered


def test_a_candidate_that_compiles_too_long_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "COMPILE_SECONDS", 0.5)
    chosen, rows = run(tmp_path, ("xla", "compiles forever"))
    assert chosen == "xla"
    assert rows["compiles forever"]["verdict"] == "did not compile in 0 s"


def test_gradients_count_only_where_they_are_taken(tmp_path):
    names, times = ("xla", "wrong backward"), {"xla": 2.0, "wrong backward": 1.0}
    assert run(tmp_path, names, times=times, gradients=True)[0] == "xla"
    assert run(tmp_path, names, times=times, gradients=False)[0] == "wrong backward"


def test_xla_is_taken_if_nothing_is_right(tmp_path, monkeypatch):
    monkeypatch.setitem(doubling.CANDIDATES, "xla", doubling.fail)
    monkeypatch.setattr(doubling.Doubling, "reference", lambda *_: lambda x: 2 * x)
    monkeypatch.setattr(doubling.Doubling, "abstract_inputs", lambda self, call: call.abstract * 2)
    with pytest.raises(TypeError, match="lost"):  # as it would be without calibration
        run(tmp_path, ("xla", "wrong"))


def test_what_the_time_does_not_suffice_for_is_tried_at_the_next_start(tmp_path, tried):
    times = {"xla": 3.0, "right": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chooser, "LIMIT_SECONDS", 1.0)
        chosen, rows = run(tmp_path, ("xla", "right"), times=times)
    assert chosen == "xla" and not tried
    assert rows["right"]["verdict"].startswith("not tried: the 1 s were over; the next start")
    assert run(tmp_path, ("xla", "right"), times=times)[0] == "right"
    assert tried == ["xla", "right"]


def test_a_full_memory_is_no_verdict_on_kernels(tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(attempt, "_compiled", full)
    chosen, rows = run(tmp_path, ("xla", "right"))
    assert chosen == "xla"
    assert "not tried: the reference failed (RESOURCE_EXHAUSTED" in rows["right"]["verdict"]


def test_a_named_implementation_is_neither_tried_nor_replaced(tmp_path, tried):
    program = Program(implementation="wrong")
    with in_place(("xla", "right")):
        calibrate.Chooser(tmp_path)(program.jitted, program.array)
        assert not tried and not choice.TABLES[False]
    assert float(program.jitted(program.array)[0]) == pytest.approx(2.06)


def test_a_processor_measures_nothing(tmp_path):
    program = Program()
    calibrate.Chooser(tmp_path / "none")(program.jitted, program.array)
    assert not (tmp_path / "none").exists()
    assert choice.TABLES == {True: {}, False: {}}


def test_a_program_is_traced_again_only_where_another_kernel_is_best(tmp_path):
    traces = []

    def function(x):
        traces.append(x)
        return doubling.double(x)

    for size, times, count in ((4, {"xla": 1, "right": 2}, 1), (5, {"xla": 2, "right": 1}, 2)):
        program = Program(size)
        program.jitted = jax.jit(lambda x: function(x))
        for start in ("first", "second"):
            program.jitted.clear_cache()
            traces.clear()
            run(tmp_path, ("xla", "right"), times=times, program=program)
            assert len(traces) == (count if start == "first" else 1), (size, start)


# ------------------------------------------------------------------ what is remembered


def test_a_second_start_tries_nothing(tmp_path, tried):
    lines = []
    times = {"xla": 3.0, "right": 1.0}
    for _ in range(2):
        assert run(tmp_path, ("xla", "right"), times=times, log=lines.append)[0] == "right"
    assert tried == ["xla", "right"]
    assert lines[0].startswith("Kernels, measured on this device:\n| operation | call |")
    assert lines[1].startswith("Kernels, as measured before (") and "right" in lines[1]
    # A call that is new is tried, and a candidate that is.
    run(tmp_path, ("xla", "right"), program=Program(5))
    run(tmp_path, ("xla", "right", "wrong"))
    assert tried[2:] == ["xla", "right", "wrong"]


def test_other_versions_measure_for_themselves(tmp_path, tried, monkeypatch):
    run(tmp_path, ("xla", "right"))
    for change in ({"source": "another"}, {"device": "TPU v9"}, {"jax": "9"}):
        known = store.environment_of(jax.devices()[0])
        monkeypatch.setattr(chooser, "environment_of", lambda _, new=known | change: new)
        run(tmp_path, ("xla", "right"))
    assert tried == ["xla", "right"] * 4
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_the_digest_is_that_of_the_kernels():
    assert len(store.source_digest()) == 64
    assert store.environment_of(jax.devices()[0])["source"] == store.source_digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: "null",
        lambda text: '{"environment": {}, "calls": {}}',
        lambda text: text.replace('""', "7"),
        lambda text: text.replace("3.0", '"fast"'),
        lambda text: text.replace("3.0", "-1"),
        lambda text: text.replace("3.0", "NaN"),
        lambda text: text.replace("3.0", "true"),
        lambda text: text.replace("3.0", "null"),
    ],
)
def test_a_damaged_file_is_ignored_with_a_line(tmp_path, tried, damage):
    names, times = ("xla", "right"), {"xla": 3.0, "right": 1.0}
    run(tmp_path, names, times=times)
    (path,) = tmp_path.glob("*.json")
    path.write_text(damage(path.read_text()))
    lines = []
    assert run(tmp_path, names, times=times, log=lines.append)[0] == "right"
    assert f"{path} is damaged (" in lines[0] and "measured" in lines[0]
    assert tried == ["xla", "right"] * 2


@pytest.mark.parametrize("key", ["", "[]", '["no", [], [], true]', '["assignment", 3, null, 1]'])
def test_calls_that_this_program_does_not_know_are_passed_over(tmp_path, key, tried):
    run(tmp_path, ("xla", "right"))
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    found["calls"][key] = {"xla": [1.0, 0.0, ""]}
    path.write_text(json.dumps(found))
    assert run(tmp_path, ("xla", "right"))[0] in ("xla", "right")
    assert tried == ["xla", "right"]


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path, tried):
    (tmp_path / "file").write_text("")
    lines = []
    times = {"xla": 3.0, "right": 1.0}
    chosen, _ = run(tmp_path / "file" / "kernels", ("xla", "right"), times=times, log=lines.append)
    assert chosen == "right" and "cannot be written" in lines[0]
    assert tried == ["xla", "right"]


def test_a_file_system_without_locks_costs_only_the_memory(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    lines = []
    times = {"xla": 3.0, "right": 1.0}
    assert run(tmp_path, ("xla", "right"), times=times, log=lines.append)[0] == "right"
    assert "cannot be written (No locks available)" in lines[0] and len(lines) == 2
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ what ends a process


@pytest.mark.parametrize(
    ("name", "code", "verdict"),
    [
        ("kills", -9, "ended the process of an earlier start"),
        ("hangs", attempt.ENDED, "hung an earlier start"),
    ],
)
def test_what_ends_or_hangs_a_process_is_left_out_at_the_next_start(
    tmp_path, tried, name, code, verdict
):
    process = child(tmp_path, "xla", name, "right")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    if name == "hangs":
        (line,) = [line for line in errors.splitlines() if "kernels.calibrate" in line]
        assert "hangs of point_sampling (float32[4]) on cpu has hung for 1 s. This process" in line
        assert "exit code 75; the same command goes on without that candidate" in line
    chosen, rows = run(tmp_path, ("xla", name, "right"), times={"xla": 3.0, "right": 1.0})
    assert tried == ["right"]  # "xla" was done
    assert rows[name]["verdict"] == verdict
    assert chosen in ("xla", "right")
    assert not list(tmp_path.glob("*.trying"))


@pytest.mark.slow
def test_a_signal_from_outside_convicts_nobody(tmp_path, tried):
    process = child(tmp_path, "xla", "is told to end")
    assert process.communicate(timeout=120) and process.returncode == -15
    run(tmp_path, ("xla", "right"))
    assert tried == ["right"]
    assert not list(tmp_path.glob("*.trying"))


def test_a_marker_of_a_living_process_convicts_nobody(tmp_path):
    environment = store.environment_of(jax.devices()[0])
    one = store.Store(tmp_path, environment, print)
    with one.trying("key", "kernel"):
        assert store.Store(tmp_path, environment, print).outcomes == {}
        (marker,) = tmp_path.glob("*.trying")
        kept = marker.read_text()
    assert not list(tmp_path.glob("*.trying"))
    marker.write_text(kept)  # as if its process had ended
    found = store.Store(tmp_path, environment, print).outcomes
    assert found == {
        "key": {"kernel": store.Outcome(fault="ended the process of an earlier start")}
    }
    marker.write_text(kept[:7])
    assert store.Store(tmp_path, environment, print).outcomes == found


def test_who_ends_on_purpose_withdraws_the_marker(tmp_path):
    one = store.Store(tmp_path, store.environment_of(jax.devices()[0]), print)
    with one.trying("key", "kernel"):
        calibrate.withdraw()
        assert not list(tmp_path.glob("*.trying"))


def test_processes_that_measure_at_once_lose_nothing(tmp_path):
    environment = store.environment_of(jax.devices()[0])
    one, other = (store.Store(tmp_path, environment, print) for _ in range(2))
    one.keep("call", "xla", store.Outcome(1.0, 0.0))
    other.keep("call", "kernel", store.Outcome(2.0, 0.0))
    other.keep("another", "xla", store.Outcome(3.0, 0.0))
    found = store.Store(tmp_path, environment, print).outcomes
    assert {key: set(value) for key, value in found.items()} == {
        "call": {"xla", "kernel"},
        "another": {"xla"},
    }


def test_processes_that_write_at_the_same_moment_lose_nothing(tmp_path, monkeypatch):
    environment = store.environment_of(jax.devices()[0])
    one, other = (store.Store(tmp_path, environment, print) for _ in range(2))
    meanwhile = threading.Thread(
        target=other.keep, args=("call", "kernel", store.Outcome(2.0, 0.0))
    )
    read = one._read

    def read_slowly():
        found = read()
        meanwhile.start()
        meanwhile.join(0.3)  # it has to wait for `one`, which has not written yet
        return found

    monkeypatch.setattr(one, "_read", read_slowly)
    one.keep("call", "xla", store.Outcome(1.0, 0.0))
    meanwhile.join()
    found = store.Store(tmp_path, environment, print).outcomes
    assert set(found["call"]) == {"xla", "kernel"}


def test_a_full_disk_does_not_stop_the_end_of_a_hung_process(tmp_path):
    lines = []
    one = store.Store(tmp_path, store.environment_of(jax.devices()[0]), lines.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with one.trying("key", "kernel") as mark:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            mark("hung an earlier start")
            one.keep("key", "kernel", store.Outcome(1.0, 0.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = lines
    assert "cannot be written (File too large)" in line
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_two_processes_choose_alike(tmp_path):
    port = free_port()
    job = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        child(tmp_path / str(n), "xla", "right", JAX_PROCESS_ID=str(n), TIMES=times, **job)
        for n, times in enumerate(("2 1", "1 2"))
    ]
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        found.append(json.loads(output.splitlines()[-1]))
    assert [each["chosen"] for each in found] == ["right", "right"]
    assert len(found[0]["lines"]) == 1 and found[1]["lines"] == []
    assert not (tmp_path / "1").exists()  # the second measures nothing
