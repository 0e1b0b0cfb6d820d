"""Bad numbers: what is recorded of a step, and its replay, with a training of one parameter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from oneformer_jax.train import checkpoint, replay, sharding
from oneformer_jax.train.checkpoint import CheckpointError
from oneformer_jax.train.observe import NonFiniteLoss
from tests import tiny
from tests.train.runs import make_config

EARLIER = {"step": np.int32(7), "params": {"w": np.float32(2.0)}, "stats": {}, "opt": {}}
STATE = EARLIER | {"halted": np.zeros((), np.bool_)}


def batch(value):
    return {"x": np.full(8, value, np.float32), "index": np.arange(8)}


def metrics(value):
    return {"loss": jnp.float32(value), "loss_ce": jnp.float32(1)}


def watch(workdir, mode):
    return replay.Watch(str(workdir), mode, lambda positions: [f"id {p}" for p in positions])


def test_stop_records_the_batch_and_the_last_good_state(tmp_path):
    watcher = watch(tmp_path, "stop")
    watcher.check(STATE)  # nothing was added yet
    watcher.add(7, metrics(1), batch(1))
    watcher.check(STATE)
    watcher.add(8, metrics(np.nan), batch(-3))
    with pytest.raises(NonFiniteLoss, match=r"step 8: not finite: loss = nan.*id 0, id 1,"):
        watcher.check({**STATE, "halted": np.bool_(True)})  # as the step leaves it
    folder = tmp_path / "nonfinite" / "8"
    report = json.loads((folder / "report.json").read_text())
    assert report["terms"] == {"loss": "nan"}
    assert report["images"][:2] == ["id 0", "id 1"]
    with np.load(folder / "batch.0.npz") as saved:
        np.testing.assert_array_equal(saved["x"], batch(-3)["x"])
    kept = ocp.StandardCheckpointer().restore(folder / "state")
    assert (kept["step"], kept["halted"]) == (7, False)


def test_skip_goes_on_and_gives_up_in_the_end(tmp_path):
    watcher = watch(tmp_path, "skip")

    def run(step, value):
        watcher.add(step, metrics(value), batch(step))
        watcher.check(STATE)

    for step in range(1, 30):
        run(step, np.nan if step % 2 else 1)  # a good one in between each time
    written = sorted(int(path.name) for path in (tmp_path / "nonfinite").iterdir())
    assert written == [1, 3, 5]
    assert not (tmp_path / "nonfinite" / "1" / "state").exists()
    with pytest.raises(NonFiniteLoss, match="step 40"):
        for step in range(31, 60):
            run(step, np.nan)
    with pytest.raises(ValueError, match=r"train\.on_nonfinite is 'go'; it must be one of stop"):
        watch(tmp_path, "go")


@pytest.fixture
def toy(monkeypatch):
    """A training whose loss takes the logarithm of the batch."""

    def make_training(config, num_classes, text_table, mesh):
        @jax.jit
        def step(state, batch, key):
            loss = jnp.mean(jnp.log(batch["x"]) * state["params"]["w"])
            return state, {"loss": loss, "loss_ce": state["params"]["w"]}

        whole = sharding.replicated(mesh)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), STATE
        )
        return replay.states.Training(None, None, None, abstract, step)

    monkeypatch.setattr(replay.states, "make_training", make_training)


def run_replay(workdir, **options):
    return replay.replay(
        make_config(), str(workdir), metadata=tiny.metadata(), text_table=None, **options
    )


@pytest.mark.parametrize("state", [STATE, EARLIER], ids=["now", "earlier"])
def test_replay_names_the_terms_and_the_place(state, toy, tmp_path):
    error = NonFiniteLoss(8, {"loss": np.nan}, [3, 4], ["id 3", "id 4"])
    replay.write(tmp_path, error, batch(-1.0), state)
    text = run_replay(tmp_path)
    assert "step 8, images id 3, id 4" in text
    assert "before step 8, as recorded" in text
    assert "not finite: loss = nan" in text
    assert "first made: invalid value (nan) encountered in log" in text
    assert not jax.config.jax_debug_nans
    with pytest.raises(CheckpointError, match=r"holds no step 5, but \[8\]"):
        run_replay(tmp_path, step=5)


def test_replay_without_a_state_takes_the_checkpoint_before(toy, tmp_path):
    with pytest.raises(CheckpointError, match="this run has had no bad numbers"):
        run_replay(tmp_path)
    error = NonFiniteLoss(8, {"loss": np.nan}, [3])
    replay.write(tmp_path, error, batch(1.0))
    with pytest.raises(CheckpointError, match="no checkpoint from before step 8"):
        (tmp_path / "checkpoints").mkdir()
        run_replay(tmp_path)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step in (4, 6, 9):
            checkpoints.save(step, EARLIER if step == 6 else STATE, {"step": step})
    text = run_replay(tmp_path)
    assert "of the checkpoint of step 6" in text
    assert "all terms are finite this time" in text
    (tmp_path / "nonfinite" / "8" / "batch.0.npz").unlink()
    with pytest.raises(CheckpointError, match="as many processes as the run had"):
        run_replay(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", b"{}", r"report\.json holds an unexpected value: .*`step`"),
        ("report.json", b'{"step": 8, "terms": {}, "records": 3, "images": []}', "records"),
        ("batch.0.npz", b"PK\x03\x04nonsense", r"batch\.0\.npz is damaged"),
        ("batch.0.npz", b"", r"batch\.0\.npz is damaged"),
        ("state/_METADATA", b"{}", r"8 is damaged: .*_METADATA"),
    ],
)
def test_a_damaged_record_is_named(file, content, message, toy, tmp_path):
    replay.write(tmp_path, NonFiniteLoss(8, {"loss": np.nan}, [3]), batch(1.0), STATE)
    (tmp_path / "nonfinite" / "notes").mkdir()  # of the user
    (tmp_path / "nonfinite" / "notes" / "report.json").touch()
    assert "step 8, images 3" in run_replay(tmp_path)
    (tmp_path / "nonfinite" / "8" / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        run_replay(tmp_path)
