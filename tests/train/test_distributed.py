"""Several processes: who is where, who is missing, and a whole job by two and four of them."""

import concurrent.futures
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from oneformer_jax.train import distributed
from oneformer_jax.train.distributed import DistributedError, Place, call_roll, find_place
from tests.train.test_observe import read_lines

ROOT = pathlib.Path(__file__).resolve().parents[2]


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
        (("host:1", 4, None), "lacks --process_id, JAX_PROCESS_ID"),
        ((None, None, 1), "lacks --coordinator.*; --num_processes"),
        (("host:1", 4, 4), "process 4 of 4 .* numbered 0 to 3"),
        (("host", 4, 1), "coordinator 'host' .* is not host:port"),
        (("host:1", "many", 1), "'many' is no number"),
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
    """What each of `places` gets: None, or the text of its error."""

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
    # Small: Adam turns rounding of tiny gradients into whole steps, and a near tie in the matching
    # or among uncertain points may fall to either side.
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
}


def start(workdir, data_dir, devices, *flags):
    overrides = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    return subprocess.Popen(
        [
            *(sys.executable, "main.py", "--config=configs/synthetic.py", f"--workdir={workdir}"),
            *(f"--config.dataset.data_dir={data_dir}", *overrides, *flags),
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(workdir, data_dir, processes, devices):
    """Output of each process; they must all succeed."""
    address = f"localhost:{free_port()}"
    flags = [
        (f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={number}")
        for number in range(processes)
    ]
    started = [start(workdir, data_dir, devices, *(f if processes > 1 else ())) for f in flags]
    outputs = [process.communicate(timeout=1500)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.mark.slow
def test_two_and_four_processes_do_what_one_does(tmp_path):
    """Eight devices each time: the same losses, every image once, one set of files."""
    data = tmp_path / "data"
    run(tmp_path / "one", data, 1, 8)
    expected = [line for line in read_lines(tmp_path / "one") if "loss" in line]
    assert len(expected) == 4
    results = json.loads((tmp_path / "one" / "eval" / "4" / "results.json").read_text())
    assert results["images"] == 11
    for processes in (2, 4):
        workdir = tmp_path / str(processes)
        outputs = run(workdir, data, processes, 8 // processes)
        for number, output in enumerate(outputs):
            assert f"Process {number} of {processes} on " in output
            assert f"{8 // processes} of 8 devices are its own" in output
        lines = [line for line in read_lines(workdir) if "loss" in line]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        for line, wanted in zip(lines, expected, strict=True):
            for name in ("loss", "loss_ce", "loss_mask", "loss_contrastive", "grad_norm"):
                assert line[name] == pytest.approx(wanted[name], rel=2e-3), (line["step"], name)
        found = json.loads((workdir / "eval" / "4" / "results.json").read_text())
        assert found["images"] == 11
        assert found["counts"].keys() == results["counts"].keys()
        assert len(list(workdir.glob("events.out.*"))) == 1
        assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    # Another number of processes goes on from what these have saved, and a missing one is named.
    run(tmp_path / "2", data, 1, 4)
    waiting = start(
        *(tmp_path / "2", data, 4, f"--coordinator=localhost:{free_port()}", "--num_processes=2"),
        *("--process_id=0", "--startup_timeout=3"),
    )
    output = waiting.communicate(timeout=300)[0]
    assert waiting.returncode == 1
    assert "after 3 s 1 of 2 processes have not come: 1." in output
