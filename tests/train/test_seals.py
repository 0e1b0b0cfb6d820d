"""Digests of a checkpoint's files: every flipped bit is noticed, and named."""

import os
import pathlib
import random
import shutil
import subprocess

import jax.numpy as jnp
import pytest

from oneformer_jax.train import reading, seals, sharding
from oneformer_jax.train.checkpoint import CheckpointError, Checkpoints
from oneformer_jax.train.seals import SEAL_FILE, SealError
from tests.train.test_checkpoint import assert_same, make_state, make_target, on_host


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints 2 and 4 of a state, the state on the host, and its target."""
    workdir = tmp_path_factory.mktemp("saved")
    target = make_target(sharding.make_mesh(data=4, fsdp=2), ema=True)
    state = make_state(target)
    with Checkpoints(workdir) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait_until_finished()
        checkpoints.record(2, {"panoptic/PQ": 41.5, "instance/AP": None})
    return workdir, on_host(state), target


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def flip(path: pathlib.Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_the_list_is_what_coreutils_checks(saved):
    for step in ("2", "4"):
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", SEAL_FILE],
            cwd=saved[0] / "checkpoints" / step,
            check=True,
        )


def test_every_flipped_bit_is_noticed_and_its_file_is_named(copy):
    """In arrays, indices, descriptions, markers, the position, and the digests themselves."""
    folder, rng = copy / "checkpoints" / "4", random.Random(0)
    for path in files_of(folder) * 12:
        bit, before = rng.randrange(8 * path.stat().st_size), path.read_bytes()
        flip(path, bit)
        with pytest.raises(SealError, match=r".") as error:
            seals.check(folder)
        name = path.relative_to(folder).as_posix()
        assert name in str(error.value), (name, bit)
        path.write_bytes(before)
    assert seals.check(folder)


def test_every_bit_of_the_list_counts(copy):
    folder = copy / "checkpoints" / "4"
    path = folder / SEAL_FILE
    before = path.read_bytes()
    for byte in range(len(before)):
        flip(path, 8 * byte + byte % 8)
        with pytest.raises(SealError, match=SEAL_FILE):
            seals.check(folder)
        path.write_bytes(before)
    for length in range(len(before)):
        path.write_bytes(before[:length])
        with pytest.raises(SealError):
            seals.check(folder)


@pytest.mark.parametrize("change", ["cut", "longer", "removed", "new", "empty list", "pipe"])
def test_other_sizes_and_other_files_are_noticed(copy, change):
    folder = copy / "checkpoints" / "4"
    path = folder / "state" / "_METADATA"
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "new":
        path = folder / "state" / "extra"
        path.touch()
    elif change == "empty list":
        path = folder / SEAL_FILE
        path.write_bytes(b"")
    else:
        path.unlink()
        if change == "pipe":  # reading it would never end
            os.mkfifo(path)
    with pytest.raises(SealError, match=path.name):
        seals.check(folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_goes_on_from_the_step_before_a_flipped_bit(copy, saved):
    rng = random.Random(1)
    for path in rng.sample(files_of(copy / "checkpoints" / "4"), 6):
        work = copy.with_name("work")
        shutil.copytree(copy, work)
        inner = work / path.relative_to(copy)
        flip(inner, rng.randrange(8 * inner.stat().st_size))
        with Checkpoints(work) as checkpoints:
            with pytest.raises(CheckpointError, match=rf"4 is damaged: .*{path.name}"):
                checkpoints.restore(4, saved[2])
            step, state, position = checkpoints.restore_newest(saved[2])
        assert (step, position) == (2, {"step": 2})
        assert_same(state, saved[1])
        shutil.rmtree(work)


def test_processes_share_the_files(copy):
    """All act on what one of them finds (`reading.read_state`); together they read every file."""
    folder = copy / "checkpoints" / "4"
    for path in files_of(folder):
        if path.name == SEAL_FILE:
            continue
        flip(path, 3)
        found = []
        for part in range(3):
            try:
                seals.check(folder, part, 3)
            except SealError:
                found.append(part)
        assert len(found) == 1
        flip(path, 3)


def test_a_checkpoint_of_an_earlier_version_is_read_and_that_is_said(copy, saved, monkeypatch):
    said = []
    monkeypatch.setattr(reading.logging, "warning", lambda text, *a: said.append(text % a))
    (copy / "checkpoints" / "4" / SEAL_FILE).unlink()
    with Checkpoints(copy) as checkpoints:
        state, _ = checkpoints.restore(4, saved[2])
    assert_same(state, saved[1])
    (line,) = said
    assert "checkpoints/4 is of an earlier version without digests" in line


# ------------------------------------------------------------------ when a save counts


def test_no_checkpoint_goes_before_the_next_one_was_read_back(tmp_path, monkeypatch):
    """A save whose files cannot be read back is no checkpoint, and the older ones stay."""
    state = {"params": {"w": jnp.ones((8, 8))}}
    with Checkpoints(tmp_path, keep=1, keep_best=0) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
        checkpoints.wait_until_finished()
        assert [path.name for path in checkpoints.directory.iterdir()] == ["2"]
        seal = reading.seal

        def lose_the_index(path, described):
            assert (checkpoints.directory / "2").exists()
            (path / "state" / "manifest.ocdbt").unlink()
            seal(path, described)

        monkeypatch.setattr(reading, "seal", lose_the_index)
        checkpoints.save(3, state, {})
        with pytest.raises(CheckpointError, match=r"could not be written.*last good one is step 2"):
            checkpoints.wait_until_finished()
        assert [path.name for path in checkpoints.directory.iterdir()] == ["2"]
        assert checkpoints.all_steps() == [2]


def test_a_save_of_other_arrays_than_were_given_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(reading.stores, "describe", lambda store: {"params": {}})
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="does not hold the arrays that were written"),
    ):
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})
        checkpoints.wait_until_finished()


# ------------------------------------------------------------------ scores


def test_every_flipped_bit_of_the_scores_is_noticed_or_changes_no_score(copy):
    folder = copy / "checkpoints" / "2"
    path, expected = folder / seals.SCORES_FILE, {"panoptic/PQ": 41.5}
    assert seals.read_scores(folder) == expected
    before, noticed = path.read_bytes(), 0
    for bit in range(8 * len(before)):
        flip(path, bit)
        try:
            assert seals.read_scores(folder) == expected, bit
        except SealError as error:
            assert seals.SCORES_FILE in str(error)
            noticed += 1
        path.write_bytes(before)
    assert noticed > 0.8 * 8 * len(before)  # the rest is white space


def test_a_checkpoint_whose_scores_are_lost_stays(copy, saved):
    (copy / "checkpoints" / "2" / seals.SCORES_FILE).write_text('{"panoptic/PQ": "much"}')
    settings = {"keep": 1, "keep_best": 1, "best_metric": "panoptic/PQ"}
    with Checkpoints(copy, **settings) as checkpoints:
        checkpoints.save(6, {"params": {"w": jnp.ones(3)}}, {})
        assert checkpoints.all_steps() == [2, 6]  # it may be the best one
        checkpoints.record(2, {"panoptic/PQ": 1.0})
        checkpoints.record(6, {"panoptic/PQ": 2.0})
        checkpoints.save(8, {"params": {"w": jnp.ones(3)}}, {})
        assert checkpoints.all_steps() == [6, 8]


def test_scores_of_an_earlier_version_are_read(copy):
    folder = copy / "checkpoints" / "4"
    (folder / seals.SCORES_FILE).write_text('{\n "panoptic/PQ": 3.5\n}\n')
    assert seals.read_scores(folder) == {"panoptic/PQ": 3.5}
