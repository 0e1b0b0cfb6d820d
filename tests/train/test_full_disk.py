"""A disk that is full while a checkpoint is written: one error, and nothing is lost."""

import pathlib
import subprocess
import sys

import pytest

from oneformer_jax.train.runtime import folders

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE = 4 << 20  # room for two checkpoints of 1.5 MB


@pytest.fixture
def small_disk(tmp_path):
    """A file system of SIZE bytes."""
    options = ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill(workdir, *arguments):
    command = [sys.executable, "-m", "tests.train.fill_disk", str(workdir), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def assert_one_error(found, workdir) -> None:
    assert found.returncode == 1, found.stderr
    (line,) = found.stderr.splitlines()
    assert line == (
        f"error: a checkpoint could not be written into {workdir}/checkpoints: the disk is full. "
        "Of this run the last good one is step 2; free some space and start the same command again"
    )
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_room(small_disk):
    workdir = small_disk / "run"
    assert_one_error(fill(workdir), workdir)
    folders.remove(workdir / "checkpoints" / "1")
    assert "first step 3" in fill(workdir).stdout
    assert folders.finished_steps(workdir / "checkpoints") == [2, 3]


def test_a_limit_of_file_sizes_is_told_like_a_full_disk(tmp_path):
    found = fill(tmp_path, "100000")
    assert_one_error(found, tmp_path)
    assert "first step 3" in fill(tmp_path).stdout
    assert folders.finished_steps(tmp_path / "checkpoints") == [3, 4, 5]
