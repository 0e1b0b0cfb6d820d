"""Several processes: who is where, who is missing, and a whole job by two and four of them."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from oneformer_jax.train import sharding
from oneformer_jax.train.checkpoint import Checkpoints, load_for_inference
from oneformer_jax.train.runtime import distributed
from oneformer_jax.train.runtime.distributed import DistributedError, Place, call_roll, find_place
from oneformer_jax.train.runtime.preemption import EXIT_CODE
from tests import tiny
from tests.train.test_checkpoint import assert_same, make_state, make_target
from tests.train.test_observe import read_lines

ROOT = pathlib.Path(__file__).resolve().parents[3]


def free_port() -> int:
    """A port of which the next one is free too."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no two free ports side by side")


# ------------------------------------------------------------------ places


def test_places_of_the_environments():
    assert find_place({}) is None
    given = Place(2, 4, "host:12", "flags or JAX_*")
    assert find_place({}, "host:12", 4, 2) == given
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    jax_set = dict(zip((f"JAX_{name}" for name in names), ("host:12", "4", "2"), strict=True))
    assert find_place(jax_set) == given
    assert find_place(jax_set, process_id=3).process == 3  # flags come first
    tpu = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}
    assert find_place(tpu) == Place(1, 2, "a:8476", "TPU_WORKER_*", ("a", "b"))
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
    slices["MEGASCALE_COORDINATOR_ADDRESS"] = "first:1234"
    assert find_place(tpu | slices) == Place(5, 6, "first:8476", "TPU_WORKER_*")
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "4097"}
    slurm["SLURM_STEP_NODELIST"] = "node[007-010,12]"
    assert find_place(slurm) == Place(3, 8, f"node007:{65535 - 8192 + 1}", "SLURM")
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert find_place(mpi) == Place(1, 2, None, "MPI")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 4, None), "lack --process_id, JAX_PROCESS_ID"),
        ((None, None, 1), "lack --coordinator.*; --num_processes"),
        (("host:1", 4, 4), "process 4 of 4 .* numbered 0 to 3"),
        (("host", 4, 1), "coordinator 'host' .* is not host:port"),
        (("host:1", "many", 1), "'many' is not a number"),
    ],
)
def test_a_place_that_cannot_be(arguments, message):
    with pytest.raises(DistributedError, match=message):
        find_place({}, *arguments)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("n[3,5-7]", "n3"), ("n[05-07],m", "n05"), ("", "")],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert distributed.first_host(nodes) == first


# ------------------------------------------------------------------ the roll


def roll(places, timeout):
    """Returns what each of `places` gets: None, or the text of its error."""

    def call(place):
        try:
            call_roll(place, timeout)
        except DistributedError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(call, places))


def places(numbers, count, **fields):
    address = f"localhost:{free_port()}"
    return [Place(number, count, address, "test", **fields) for number in numbers]


def test_all_are_there():
    assert roll(places(range(4), 4), 60) == [None] * 4
    assert roll(places([0], 1), 60) == [None]


def test_all_learn_who_is_missing():
    texts = roll(places([0, 2], 4, hosts=("a", "b", "c", "d")), 1.5)
    for text in texts:
        assert "after 2 s 2 of 4 processes have not come: 1 (b), 3 (d)." in text
    assert texts[1].startswith("process 2: ")


def test_nobody_at_the_coordinator():
    (text,) = roll(places([1], 2), 0.5)
    assert "process 1: process 0 cannot be reached at localhost" in text


def test_two_claim_one_number_or_another_count():
    address = places([0], 1)[0].coordinator
    same = [Place(0, 3, address, "test"), Place(1, 3, address, "test"), Place(1, 3, address, "")]
    assert any("are both process 1" in (text or "") for text in roll(same, 5))
    address = places([0], 1)[0].coordinator
    other = [Place(0, 2, address, "test"), Place(1, 3, address, "test")]
    for text in roll(other, 5):
        assert re.search("counts 3 processes and process 0 2", text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"process": [1], "count": 2, "host": "x"}\n',
        b'{"process": 7, "count": 2, "host": "x"}\n',
        b'{"process": 1, "count": 2}\n',
        b"GET / HTTP/1.1\r\n",
        b"x" * 100_000,
    ],
)
def test_a_stranger_at_the_port_is_ignored(text):
    first, second = places(range(2), 2)
    host, port = first.coordinator.split(":")

    def disturb():
        for _ in range(100):
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host, int(port) + 1), 5) as s,
            ):
                return s.sendall(text)
            time.sleep(0.05)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = pool.submit(call_roll, first, 30)
        pool.submit(disturb).result()
        assert roll([second], 30) == [None]
        assert found.result().keys() == {0, 1}


# ------------------------------------------------------------------ several processes


def start(arguments, devices):
    """A Python process with so many CPU devices."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(started):
    """Output of each process; they must all succeed."""
    outputs = [process.communicate(timeout=1500)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def test_a_checkpoint_reads_the_same_on_other_processes_and_another_mesh(tmp_path):
    """Written by one process on 4x2, read and written by two on 2x4, read by one on 1x8."""
    state = make_state(make_target(sharding.make_mesh(4, 2), ema=True))
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(4, state, {"step": 4})
    address = f"localhost:{free_port()}"
    command = ("-m", "tests.train.resave", tmp_path / "one", tmp_path / "two", 4, 2, 4, address, 2)
    finish([start((*command, number), 4) for number in range(2)])
    sealed = (tmp_path / "two" / "checkpoints" / "4" / "SHA256SUMS").read_text()
    for number in range(2):
        assert f"  state/ocdbt.process_{number}/manifest.ocdbt\n" in sealed
    other = make_target(sharding.make_mesh(1, 8), ema=True)
    with Checkpoints(tmp_path / "two") as checkpoints:
        found, position = checkpoints.restore(4, other)
    assert position == {"step": 4}
    assert_same(found, state)
    split = found["params"]["layers"][0]["kernel"].sharding
    assert split == other["params"]["layers"][0]["kernel"].sharding


COMPILE = """
import sys, time
import tests.conftest
import jax
import numpy as np
from oneformer_jax.train import sharding
from oneformer_jax.train.runtime import distributed

distributed.start(distributed.find_place({}, sys.argv[1], 2, sys.argv[2]), 60)

@jax.jit
def total(x):
    time.sleep(3 * jax.process_index())  # the second process takes longer
    print("traced at", time.monotonic())
    return x.sum()

x = sharding.put_batch(np.ones(jax.local_device_count()), sharding.make_mesh())
distributed.compile_everywhere(total, x, name="total")
print("compiled at", time.monotonic())
print("total", float(total(x)))
"""


def test_no_process_runs_a_program_before_all_have_compiled_it():
    address = f"localhost:{free_port()}"
    outputs = finish([start(("-c", COMPILE, address, number), 1) for number in range(2)])
    found = [dict(re.findall(r"(\w+) (?:at )?(\d+\.\d+)$", text, re.M)) for text in outputs]
    assert [float(times["total"]) for times in found] == [16.0, 16.0]
    assert [text.count("traced at") for text in outputs] == [1, 1]
    assert float(found[0]["compiled"]) > float(found[1]["traced"])
    assert float(found[1]["traced"]) > float(found[0]["traced"]) + 2


# ------------------------------------------------------------------ whole jobs

OVERRIDES = {
    "dataset.options": '{"size": 64, "train_examples": 24, "validation_examples": 11, "seed": 0}',
    "data.batch_size": 8,
    "data.crop_size": "(64, 64)",
    "data.num_slots": 8,
    "model.num_queries": 9,
    "model.hidden_dim": 32,
    "model.mask_dim": 32,
    "model.encoder_layers": 1,
    "model.query_init_layers": 1,
    "model.decoder_layers": 1,
    "model.text_width": 32,
    "model.text_layers": 1,
    "loss.num_points": 64,
    # Many points of these flat scenes are equally uncertain: which are chosen is a matter of
    # rounding. `test_meshes` has points that are not.
    "loss.importance_ratio": 0.0,
    "kernels.assignment": "xla",  # programs that call back to the host are not kept for later
    # Small: Adam turns gradients that are nothing but rounding into whole steps.
    "optim.lr": 1e-6,
    "optim.warmup_steps": 0,
    "train.steps": 4,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.checkpoint_every": 2,
    "train.pictures": 2,
    "eval.batch_size": 8,
    "eval.short_edge": 64,
    "eval.max_size": 64,
    "eval.token_table": False,
    "compilation_cache": ROOT / ".pytest_cache" / "jax",
}
ROUNDING = 2e-5  # measured: up to 1e-6 of a loss, 1e-5 of a norm of gradients
DEVICES = 8


def start_job(workdir, data_dir, devices, *flags):
    overrides = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    return start(
        (
            *("main.py", "--config=configs/synthetic.py", f"--workdir={workdir}"),
            *(f"--config.dataset.data_dir={data_dir}", *overrides, *flags),
        ),
        devices,
    )


def run(workdir, data_dir, processes, *flags):
    """Output of each process of a job on eight devices."""
    address = f"localhost:{free_port()}"
    places = [
        (f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={number}")
        for number in range(processes)
    ]
    started = [
        start_job(workdir, data_dir, DEVICES // processes, *flags, *(p if processes > 1 else ()))
        for p in places
    ]
    return finish(started)


def losses(workdir):
    """Returns the log of each step, without times."""
    lines = [line for line in read_lines(workdir) if "loss" in line]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def assert_close(workdir, expected, since=0):
    found, wanted = losses(workdir), losses(expected)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line, other in zip(found[since:], wanted[since:], strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            assert line[name] == pytest.approx(value, rel=ROUNDING, abs=1e-7), (line["step"], name)


def assert_equal(workdir, expected):
    """Bit for bit the same logs and final state."""
    assert losses(workdir) == losses(expected)
    found, wanted = (load_state(path / "checkpoints" / "4") for path in (workdir, expected))
    assert len(found) > 500
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def load_state(path):
    """The arrays of a checkpoint on the host, by name."""
    tree = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return tiny.leaves(
        ocp.PyTreeCheckpointer().restore(
            path / "state", args=ocp.args.PyTreeRestore(tree, restore_args=args)
        )
    )


def results(workdir):
    return json.loads((workdir / "eval" / "4" / "results.json").read_text())


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Workdirs of whole runs by 1, 2 and 4 processes, what these printed, and their data."""
    folder = tmp_path_factory.mktemp("jobs")
    outputs = {count: run(folder / str(count), folder / "data", count) for count in (1, 2, 4)}
    return folder, outputs


def copy_at_2(jobs, count, target):
    """A copy of a run as it was killed after its second step."""
    shutil.copytree(jobs[0] / str(count), target)
    for later in (target / "checkpoints" / "4", target / "eval"):
        shutil.rmtree(later)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_do_what_one_does(jobs, count):
    """The same losses, every image once, one set of files."""
    folder, outputs = jobs
    workdir = folder / str(count)
    for number, output in enumerate(outputs[count]):
        assert f"Process {number} of {count} on " in output
        assert f"{DEVICES // count} of 8 devices are its own" in output
    assert_close(workdir, folder / "1")
    assert results(workdir)["images"] == results(folder / "1")["images"] == 11
    assert results(workdir)["counts"].keys() == results(folder / "1")["counts"].keys()
    assert len(list(workdir.glob("events.out.*"))) == 1
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.slow
def test_how_many_processes_changes_no_bit(jobs):
    """One process sums over its devices in another order than several do."""
    assert_equal(jobs[0] / "4", jobs[0] / "2")


@pytest.mark.slow
def test_going_on_with_another_number_of_processes_changes_no_bit(jobs, tmp_path):
    workdir = copy_at_2(jobs, 4, tmp_path / "copy")
    outputs = run(workdir, jobs[0] / "data", 2)
    assert all("Resuming from step 2 of" in output for output in outputs)
    assert_equal(workdir, jobs[0] / "4")
    assert results(workdir)["metrics"] == results(jobs[0] / "4")["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "flags"),
    [
        (2, 1, ()),
        (1, 2, ("--config.mesh.fsdp=2", "--config.kernels.assignment=scipy")),
    ],
)
def test_going_on_alone_or_on_another_mesh(jobs, tmp_path, before, after, flags):
    """The same losses up to rounding; the matcher calls back to the host of each process."""
    workdir = copy_at_2(jobs, before, tmp_path / "copy")
    outputs = run(workdir, jobs[0] / "data", after, *flags)
    assert all("Resuming from step 2 of" in output for output in outputs)
    assert_close(workdir, jobs[0] / str(before), since=2)
    assert results(workdir)["images"] == 11


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(jobs, tmp_path):
    address, workdir = f"localhost:{free_port()}", tmp_path / "run"
    flags = ("--config.train.steps=100000", f"--coordinator={address}", "--num_processes=2")
    started = [
        start_job(workdir, jobs[0] / "data", 4, *flags, f"--process_id={number}")
        for number in range(2)
    ]
    for line in started[0].stdout:
        if re.search(r"\bstep 3/", line):
            break
    started[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [EXIT_CODE] * 2, outputs
    stopped = {re.search(r"Stopped at step (\d+), which is saved", text)[1] for text in outputs}
    (step,) = stopped
    assert load_for_inference(workdir).step == int(step) >= 3


@pytest.mark.slow
def test_a_job_whose_second_process_never_comes(tmp_path):
    process = start_job(
        *(tmp_path / "run", tmp_path / "data", 4, f"--coordinator=localhost:{free_port()}"),
        *("--num_processes=2", "--process_id=0", "--startup_timeout=3"),
    )
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "after 3 s 1 of 2 processes have not come: 1." in output


@pytest.mark.slow
def test_patience_ends_all_processes_at_the_same_step(tmp_path):
    """Between the last sample's score and the whole evaluation nothing is decided twice."""
    workdir = tmp_path / "run"
    keys = ("steps=40", "eval_every=1", "checkpoint_every=0", "patience=2")
    flags = (*(f"--config.train.{key}" for key in keys), "--config.eval.limit=4")
    outputs = run(workdir, tmp_path / "data", 2, *flags)
    step = load_for_inference(workdir).step
    assert 3 <= step < 40, "the score of a model that hardly learns rose at every evaluation"
    assert all("training ends by train.patience=2" in output for output in outputs)
    found = json.loads((workdir / "eval" / str(step) / "results.json").read_text())
    assert found["images"] == 11 and found["limit"] == 0
    again = run(workdir, tmp_path / "data", 2, *flags)
    assert all(f"is trained to step {step} and evaluated: nothing to do" in out for out in again)
