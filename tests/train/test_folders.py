"""Paths of working directories, and what interrupted saves leave in them."""

import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.train import checkpoint, descriptions
from oneformer_jax.train.checkpoint import Checkpoints
from oneformer_jax.train.runtime import folders, workdir
from oneformer_jax.train.runtime.folders import FolderError
from tests import tiny

# Characters that mean something to a shell, a pattern, a URL, a format or a terminal.
ODD = (
    *(
        "run[1]",
        "run[",
        "a]b",
        "[!a]",
        "[]",
        "a*b",
        "a?b",
        "**",
        "{a,b}",
        "{}",
        "{0}",
        "a%20b",
        "%s",
    ),
    *(
        "%2e%2e",
        "100%",
        "~x",
        "a~",
        "a b",
        " a",
        "a ",
        "a\nb",
        "a\tb",
        "a\x01b",
        "a\x7fb",
        "a\u2028b",
    ),
    *("#a", "$HOME", "a:b", "http:", "-x", "--", "a'b", 'a"b', "a&b", "a;b", "a|b", "a<b>", "a`b`"),
    *(
        "a(b)",
        "a+b",
        "a=b",
        "a,b",
        "a@b",
        "a!b",
        "a^b",
        "..a",
        "a..",
        "é漢字",
        "e\u0301",
        "😀",
        "עב",
    ),
    *("x" * 200, "checkpoints", "4", "a.orbax-checkpoint-tmp", "a.unverified", "gs", "s3"),
)
# Where the libraries would read or write elsewhere.
REFUSED = {
    "a\\b": "has a backslash",
    "\\": "has a backslash",
    "run\\[1]": "has a backslash",
    "logs-gs:": "ends in 'gs:'",
    "gs:": "ends in 'gs:'",
    "a\udcffb": "is not UTF-8",
    "a\0b": "has a NUL character",
}
METADATA = tiny.metadata()


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_workdir_of_this_name_saves_lists_restores_and_predicts(tmp_path, name):
    place = tmp_path / name / "run" if len(name) < 200 else tmp_path / name
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=one)
    target = {"params": {"w": leaf}, "stats": {"m": leaf}}
    descriptions.claim_workdir(place, tiny.model_config().to_dict(), "{}", METADATA)
    settings = {"keep": 1, "keep_best": 1, "best_metric": "PQ"}
    with workdir.hold(place), Checkpoints(place, **settings) as checkpoints:
        for step, score in ((1, 0.1), (2, 0.9), (3, 0.3)):
            state = jax.tree.map(lambda x, step=step: jnp.full(x.shape, step, x.dtype), target)
            checkpoints.save(step, state, {"step": step})
            checkpoints.record(step, {"PQ": score})
    with Checkpoints(place, **settings) as checkpoints:
        assert checkpoints.all_steps() == [2, 3]
        assert checkpoints.best_step() == 2
        step, state, position = checkpoints.restore_newest(target)
    assert (step, position) == (3, {"step": 3})
    np.testing.assert_array_equal(state["params"]["w"], np.full(3, 3.0))
    for path, step in ((place, 3), (place / "checkpoints" / "2", 2)):
        found = checkpoint.load_for_inference(path)
        assert (found.step, found.metadata) == (step, METADATA)
        np.testing.assert_array_equal(found.params["w"], np.full(3, step))
    assert {path.name for path in tmp_path.iterdir()} == {name}  # nothing was written elsewhere


def test_a_copy_of_a_bucket_with_an_unfinished_checkpoint(tmp_path):
    """There an object beside the folder says so; a copy has it as a file."""
    for step in (1, 2):
        for part in folders.PARTS:
            (tmp_path / str(step) / part).mkdir(parents=True)
    (tmp_path / "2.unverified").touch()
    (tmp_path / "3.unverified").touch()
    assert folders.finished_steps(tmp_path) == [1]
    folders.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
@pytest.mark.parametrize("use", [workdir.hold, Checkpoints, checkpoint.load_for_inference])
def test_a_workdir_of_this_name_is_refused_in_one_line(tmp_path, name, use):
    with pytest.raises(FolderError, match=REFUSED[name]) as error, use(f"{tmp_path}/{name}/run"):
        pass
    assert "\n" not in str(error.value)
    assert "rename that folder, or use another --workdir" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/gs/run", "/s3/a/b", "/az/run", "/hf"])
def test_the_root_folders_that_stand_for_buckets_are_refused(path):
    with pytest.raises(FolderError, match=r"begins with /\w\w, which Orbax reads as a bucket"):
        folders.locate(path)


@pytest.mark.parametrize("path", ["file:///tmp/run", "s3://bucket/run", "http://host/run"])
def test_no_url_but_one_of_google_is_a_workdir(path):
    for use in (folders.locate, Checkpoints, checkpoint.load_for_inference):
        with pytest.raises(FolderError, match=rf"{path} cannot hold checkpoints: .* use\s+that"):
            use(path)


def test_paths_become_absolute_and_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert folders.locate("~/run") == folders.locate("run") == tmp_path / "run"
    assert folders.locate("-x") == tmp_path / "-x"
    assert folders.locate(".") == tmp_path


# ------------------------------------------------------------------ what is left over


def test_what_a_killed_save_or_write_left_is_removed_at_the_next_start(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(2)}}, {})
    folder = tmp_path / "checkpoints"
    left = [
        folder / "2.unverified" / "state",
        folder / "3.unverified.orbax-checkpoint-tmp" / "state",
        folder / "4.orbax-checkpoint-tmp" / "state",
        folder / "0.deleted" / "state",
    ]
    for path in left:
        path.mkdir(parents=True)
    names = [
        tmp_path / ".config.json.0123abcd.tmp",
        folder / "1" / ".scores.json.0123abcd.tmp",
        tmp_path / "eval" / "1" / ".results.json.0123abcd.tmp",
    ]
    names[-1].parent.mkdir(parents=True)
    for path in names:
        path.touch()
        os.utime(path, (time.time() - 100,) * 2)
    young = names[-1].with_name(".results.json.4567abcd.tmp")  # an evaluation beside the run
    young.touch()
    assert checkpoint.folders.finished_steps(folder) == [1]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1]
    assert [path.name for path in folder.iterdir()] == ["1"]
    assert list(tmp_path.rglob("*.tmp")) == [young]


@pytest.mark.parametrize("name", ["01", "-1", "1.5", "²", "٣", "1e3", "9" * 19, ""])
def test_only_numbers_as_we_write_them_are_steps(name):
    assert not folders.is_step(name)
    assert folders.is_step("0")
    assert folders.is_step("1200000")


def test_a_removal_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(2)}}, {})
    monkeypatch.setattr(folders.shutil, "rmtree", lambda path: pathlib.Path(path, "x").touch())
    folders.remove(tmp_path / "checkpoints" / "1")
    assert folders.finished_steps(tmp_path / "checkpoints") == []
