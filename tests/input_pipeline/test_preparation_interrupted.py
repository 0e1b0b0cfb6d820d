"""Preparations that are killed, stopped, or run into a full disk: what is left, and going on."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from oneformer_jax.input_pipeline import sources
from oneformer_jax.input_pipeline.builders import preparation
from tests.input_pipeline import official

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A miniature download and its preparation."""
    return official.Job(tmp_path, monkeypatch)


# Runs every case in a fork of one process that has imported what they need.
_FORKING = """
import json, os, sys
from oneformer_jax.input_pipeline import sources
from oneformer_jax.input_pipeline.builders import preparation, synthetic
for line in sys.stdin:
    code, *arguments = json.loads(line)
    said, saying = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(saying, 1)
        os.dup2(saying, 2)
        sys.argv[1:] = arguments
        exec(code)
        sys.exit()
    os.close(saying)
    with open(said) as stream:
        text = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, text]), flush=True)
"""
_PREPARE = """
import sys
from oneformer_jax.input_pipeline.builders import preparation
dataset, source, data_dir, code = sys.argv[1:]
builder = preparation.builder_class(dataset)
builder.EXPECTED, builder.RECORDS_PER_SHARD = {"train": 5, "validation": 3}, 2
exec(code)
try:
    preparation.prepare(dataset, source, data_dir)
except OSError as error:
    sys.exit(f"OSError: {error}")
"""


@pytest.fixture(scope="module")
def forking():
    """Runs code with arguments in a process of its own; gives its exit code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKING],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(code, *arguments):
        process.stdin.write(json.dumps([code, *map(str, arguments)]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture
def run(forking):
    """Runs a preparation after some code."""
    return lambda job, code: forking(_PREPARE, job.dataset, job.root, job.data_dir, code)


# The moments at which a kill leaves most behind: the function, and the how manieth call of it.
_KILL = """
import os, signal
import oneformer_jax.input_pipeline.files
owner, name, calls = {owner}, {name!r}, [0]
original = getattr(owner, name)
def kill(*args, **kwargs):
    calls[0] += 1
    if calls[0] == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, kill)
"""


@pytest.mark.parametrize(
    ("owner", "name", "call", "trains"),
    [
        ("preparation", "decode_image", 4, False),  # while records are read
        ("preparation", "sync", 2, False),  # a file is written, but has no final name
        ("preparation", "write_atomically", 3, False),  # it has, but its facts are not there
        ("os", "replace", 10, False),  # the last step of the first split's description
        ("preparation", "decode_image", 7, True),  # while the second split is read
    ],
)
def test_killed_preparation_goes_on(job, run, owner, name, call, trains):
    job.make("cityscapes")
    code, said = run(job, _KILL.format(owner=owner, name=name, call=call))
    assert code == -signal.SIGKILL, said
    assert sources.is_prepared(job.folder) == trains
    if trains:
        assert len(job.open()) == 5 and job.open()[4]["image"].shape == (20, 30, 3)
    finished = {n: (job.folder / n).stat().st_mtime_ns for n in job.records()}
    job.prepare()
    kept = [n for n, t in finished.items() if (job.folder / n).stat().st_mtime_ns == t]
    assert kept, "nothing was kept"
    got = [repr(job.open(split)[i]) for split in official.COUNTS for i in range(3)]
    shutil.rmtree(job.data_dir)
    job.prepare()  # in one go
    assert got == [repr(job.open(split)[i]) for split in official.COUNTS for i in range(3)]
    assert {path.suffix for path in (job.folder / ".shards").iterdir()} == {".json"}


def test_repaired_split_is_not_listed_while_it_is_rewritten(job, monkeypatch):
    path = job.make("ade20k").file("ADE_train_00000003.jpg")
    backup = path.read_bytes()
    path.unlink()
    job.prepare(skip_broken=True)
    path.write_bytes(backup)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "decode_image", interrupt)
        job.prepare()
    assert job.report()["complete"] is False
    with pytest.raises(ValueError, match="no split 'train'; it has validation"):
        job.open(skip_broken=True)
    job.prepare()
    assert len(job.open()) == 5


@pytest.mark.parametrize(
    "damaged, content",
    [
        *((".shards/train-00000.json", text) for text in ("", "[]", "{}", '{"height": 5}')),
        (".shards/train-00000.json", '{"height": [20, 20], "width": [], "has_things": [true]}'),
        (".shards/train.json", '{"finger'),
        ("prepare_report.json", "{"),
        ("prepare_report.json", '{"splits": [1]}'),
    ],
)
def test_notes_of_a_preparation_that_are_damaged_are_made_anew(job, damaged, content):
    job.make("ade20k").prepare()
    (job.folder / "dataset_info.json").unlink()
    (job.folder / damaged).write_text(content)
    job.prepare()
    assert len(job.open()) == 5 and job.report()["complete"]


def test_a_split_without_its_fingerprint_is_of_another_download(job):
    job.make("ade20k").prepare()
    path = job.folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprints": {}}))
    assert "was prepared from other annotations" in job.fail()


# Every file of records is larger than that: the writer fails as on a full disk.
_LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
"""
_SYNTHETIC = """
import sys
from oneformer_jax.input_pipeline import sources
exec(sys.argv[2])
options = dict(size=32, train_examples=40, validation_examples=1)
try:
    sources.open_source("synthetic", data_dir=sys.argv[1], split="train", options=options)
except OSError as error:
    sys.exit(f"OSError: {error}")
"""


def test_full_disk_while_other_datasets_are_prepared(forking, tmp_path):
    code, said = forking(_SYNTHETIC, tmp_path, _LIMIT)
    assert code == 1
    assert f"OSError: cannot write to {tmp_path}" in said
    assert not list(tmp_path.rglob("*.array_record*"))


def test_full_disk_is_explained_and_goes_on(job, run):
    job.make("cityscapes")
    code, said = run(job, _LIMIT)
    assert code == 1
    assert f"OSError: cannot write to {job.folder} (" in said
    assert "File too large" in said and "GB are free there" in said
    assert "The same command resumes" in said
    assert not job.records() and not sources.is_prepared(job.folder)
    assert not list(job.folder.rglob("*.incomplete"))
    job.prepare()
    assert len(job.open()) == 5


def test_disk_that_fills_up_half_way_keeps_what_is_done(job, monkeypatch):
    job.make("ade20k")
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if "00001-of-00003" in str(target):
            raise OSError(28, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        message = job.fail(OSError)
    assert "No space left on device" in message and "Make room" in message
    (first,) = job.records()
    time_before = (job.folder / first).stat().st_mtime_ns
    assert (job.report()["complete"], job.report()["written"]) == (False, 2)
    job.prepare()
    assert (job.folder / first).stat().st_mtime_ns == time_before
    assert len(job.open()) == 5


def test_interrupt_stops_at_once_and_goes_on(job, monkeypatch):
    job.make("ade20k")
    decode, calls = preparation.decode_image, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "decode_image", interrupt)
        job.prepare()
    assert not sources.is_prepared(job.folder) and len(job.records()) == 1
    job.prepare()
    assert len(job.open()) == 5
