"""Checkpoints of a workdir in a bucket, and its lock."""

import json
import os
import shutil
import socket
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax import remote
from oneformer_jax.remote import RemoteError
from oneformer_jax.train import checkpoint, descriptions, reading, seals
from oneformer_jax.train.checkpoint import CheckpointError, Checkpoints
from oneformer_jax.train.runtime import folders, lease, preemption, workdir
from oneformer_jax.train.runtime.workdir import WorkdirError
from tests import tiny

KEEPING = {"keep": 1, "keep_best": 1, "best_metric": "PQ"}


def target(size=3):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=one)
    return {"params": {"w": leaf}, "stats": {"m": leaf}}


def save(checkpoints, *steps):
    for step in steps:
        state = jax.tree.map(lambda x, step=step: jnp.full(x.shape, step, x.dtype), target())
        checkpoints.save(step, state, {"step": step})
    checkpoints.wait_until_finished()


def claim(place):
    descriptions.claim_workdir(place, tiny.model_config().to_dict(), "{}", tiny.metadata())


def test_the_last_and_the_best_stay_and_are_read(server, bucket, url):
    claim(url)
    with workdir.hold(url), Checkpoints(url, **KEEPING) as checkpoints:
        for step, score in ((1, 0.1), (2, 0.9), (3, 0.3)):
            save(checkpoints, step)
            checkpoints.record(step, {"PQ": score})
    with Checkpoints(url, **KEEPING) as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([2, 3], 2)
        step, state, position = checkpoints.restore_newest(target())
    assert (step, position) == (3, {"step": 3})
    np.testing.assert_array_equal(state["params"]["w"], np.full(3, 3.0))
    for path, step in ((url, 3), (f"{url}/checkpoints/2", 2)):
        found = checkpoint.load_for_inference(path)
        assert (found.step, found.metadata) == (step, tiny.metadata())
        np.testing.assert_array_equal(found.params["w"], np.full(3, step))
    names = {name.split("/")[3] for name in server.objects(bucket, "runs/one/checkpoints/")}
    assert names == {"2", "3"}
    rest = set(server.objects(bucket)) - set(server.objects(bucket, "runs/one/checkpoints/"))
    assert rest == {f"runs/one/{name}.json" for name in ("config", "model", "metadata")}


def test_a_checkpoint_is_seen_only_when_it_is_whole(server, bucket, url, monkeypatch):
    claim(url)
    seen = []
    seal = reading.seal

    def look_and_seal(path, described):
        seen.append((folders.finished_steps(path.parent), workdir_step(url)))
        seal(path, described)
        seen.append((folders.finished_steps(path.parent), workdir_step(url)))

    monkeypatch.setattr(reading, "seal", look_and_seal)
    with Checkpoints(url) as checkpoints:
        save(checkpoints, 1, 2)
    assert seen == [([], None)] * 2 + [([1], 1)] * 2
    assert workdir_step(url) == 2


def workdir_step(url):
    """Step of the checkpoint that a reader beside the run gets."""
    try:
        return checkpoint.load_for_inference(url).step
    except CheckpointError:
        return None


def test_what_an_interrupted_save_or_removal_left_is_removed_at_the_next_start(
    server, bucket, url, monkeypatch
):
    claim(url)
    with Checkpoints(url) as checkpoints:
        save(checkpoints, 1, 2, 3)
    folder = remote.path_of(url) / "checkpoints"
    remote.write(folder / "4.unverified", b"")
    remote.write(folder / "4" / "state" / "d" / "1", b"half")
    remote.write(folder / "5.unverified", b"")
    remote.write(folder / "6.unverified" / "state" / "d" / "1", b"of a copied folder")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "remove", lambda path: None)
        folders.remove(folder / "3")
    assert folders.finished_steps(folder) == [1, 2]
    with pytest.raises(CheckpointError, match="is incomplete"):
        checkpoint.load_for_inference(folder / "3")
    with Checkpoints(url) as checkpoints:
        assert checkpoints.all_steps() == [1, 2]
    assert sorted(remote.names(folder)) == ["1", "2"]


def test_a_save_that_fails_names_the_bucket_and_keeps_the_last(server, bucket, url):
    claim(url)
    with Checkpoints(url) as checkpoints:
        save(checkpoints, 1)
        server.refused[f"/upload/storage/v1/b/{bucket}/"] = 403
        with pytest.raises(CheckpointError, match=r"permission is denied.*last good one is step 1"):
            save(checkpoints, 2)
        server.refused.clear()
        save(checkpoints, 3)
        assert checkpoints.all_steps() == [1, 3]
    assert checkpoint.load_for_inference(url).step == 3


def test_damage_is_noticed_and_the_checkpoint_before_it_is_taken(server, bucket, url):
    claim(url)
    with Checkpoints(url) as checkpoints:
        save(checkpoints, 1, 2)
    folder = remote.path_of(url) / "checkpoints"
    name = next(n for n in remote.sizes(folder / "2") if n.startswith("state/ocdbt.process_0/d/"))
    remote.write(folder / "2" / name, b"damage")
    with pytest.raises(CheckpointError, match="is not as it was written"):
        checkpoint.load_for_inference(url)
    with Checkpoints(url) as checkpoints:
        assert checkpoints.restore_newest(target())[0] == 1
    assert sorted(remote.names(folder)) == ["1", "2.damaged"]
    assert not seals.check(folder / "2.damaged" / "nothing")


def test_a_run_may_be_copied_from_a_folder_into_a_bucket_and_back(tmp_path, server, bucket, url):
    claim(tmp_path / "run")
    with Checkpoints(tmp_path / "run") as checkpoints:
        save(checkpoints, 1)
    remote.upload(tmp_path / "run", url)
    with Checkpoints(url) as checkpoints:
        assert checkpoints.restore_newest(target())[0] == 1
        save(checkpoints, 2)
    for name in remote.sizes(remote.path_of(url)):
        path = tmp_path / "back" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((remote.path_of(url) / name).read_bytes())
    with Checkpoints(tmp_path / "back") as checkpoints:
        assert checkpoints.restore_newest(target())[0] == 2
    shutil.rmtree(tmp_path / "back" / "checkpoints" / "2")
    assert checkpoint.load_for_inference(tmp_path / "back").step == 1


def test_a_converted_model_goes_into_an_empty_folder_only(url):
    arrays = {"w": np.ones(3, np.float32)}
    model = tiny.model_config().to_dict()
    settings = {"eval": {}, "model": {}}
    trained = checkpoint.Trained(model, arrays, arrays, tiny.metadata(), settings, 0)
    checkpoint.write_converted(url, trained)
    assert checkpoint.load_for_inference(url).step == 0
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        checkpoint.write_converted(url, trained)


def test_reading_what_is_not_there(server, bucket, url):
    with pytest.raises(CheckpointError, match=f"{url} does not exist"):
        checkpoint.load_for_inference(url)
    with pytest.raises(RemoteError, match="there is no bucket 'nobodys'"):
        checkpoint.load_for_inference("gs://nobodys/run")
    with (
        pytest.raises(RemoteError, match="there is no bucket 'nobodys'"),
        workdir.hold("gs://nobodys/run"),
    ):
        pass
    server.refused[f"/upload/storage/v1/b/{bucket}/"] = 403
    with pytest.raises(RemoteError, match="permission is denied"), workdir.hold(url):
        pass


# ------------------------------------------------------------------ the lock


@pytest.fixture
def fast(monkeypatch):
    """Heartbeats and their limit, fifty times as fast."""
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "EXPIRES", 1.5)
    monkeypatch.setattr(lease, "_POLL", 0.05)


def owned_by(url, **fields):
    owner = {"host": "elsewhere", "process": 1, "since": 0.0, "token": "x"} | fields
    remote.write(f"{url}/LOCK", json.dumps(owner).encode())


def test_a_second_run_is_refused_and_the_end_of_the_first_frees_the_workdir(
    server, bucket, url, fast
):
    with (
        workdir.hold(url),
        pytest.raises(
            WorkdirError, match=rf"{url} is in use by another run \(process {os.getpid()} on"
        ),
        workdir.hold(url),
    ):
        pass
    assert server.objects(bucket) == []
    with workdir.hold(url):
        assert server.objects(bucket) == ["runs/one/LOCK"]
    assert server.objects(bucket) == []


def test_of_two_that_start_together_one_gets_the_lock(url, fast):
    together, got = threading.Barrier(4), []

    def start():
        together.wait()
        try:
            got.append(lease.Lease(remote.path_of(url), "LOCK", lambda: None))
        except lease.Held:
            got.append(None)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (held,) = filter(None, got)
    held.release()


def test_the_lock_of_a_dead_owner_expires(server, url, fast):
    owned_by(url)
    with workdir.hold(url):
        owner = json.loads(remote.path_of(f"{url}/LOCK").read_bytes())
        assert (owner["host"], owner["process"]) == (socket.gethostname(), os.getpid())


@pytest.mark.parametrize("text", ["", "null", '{"host": 1}'])
def test_a_lock_of_any_content_expires(url, fast, text):
    remote.write(f"{url}/LOCK", text.encode())
    with workdir.hold(url):
        pass


def test_a_process_of_this_machine_that_has_ended_is_not_waited_for(url, monkeypatch):
    process = subprocess.Popen(["true"])
    process.wait()
    owned_by(url, host=socket.gethostname(), process=process.pid)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: pytest.fail("it waits"))
    with workdir.hold(url):
        pass


def test_a_run_whose_lock_was_taken_ends(url, fast, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(preemption, "end_process", lambda code: ended.set())
    with workdir.hold(url):
        owned_by(url)
        assert ended.wait(5)
    assert json.loads(remote.path_of(f"{url}/LOCK").read_bytes())["host"] == "elsewhere"


def test_a_heartbeat_goes_on_after_the_server_was_away(server, url, fast, monkeypatch):
    monkeypatch.setattr(preemption, "end_process", lambda code: pytest.fail("the lock was lost"))
    with workdir.hold(url):
        with server.away(1.0):
            pass
        before = remote.path_of(f"{url}/LOCK").read_bytes()
        with (
            pytest.raises(WorkdirError, match="in use by another run"),
            workdir.hold(url),
        ):
            pass
        assert remote.path_of(f"{url}/LOCK").read_bytes() != before
