import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import checkpoint, descriptions, optim, seals, sharding
from oneformer_jax.train.checkpoint import CheckpointError, Checkpoints
from oneformer_jax.types import Metadata
from tests import tiny

METADATA = Metadata("toy", ("sky", "cat"), (False, True), ((1, 2, 3), (4, 5, 6)), (7, 9))
MODEL = tiny.model_config().to_dict()


def make_target(mesh, width=8, ema=False, names=("layers", "head")):
    """Abstract state of the real structure: integer keys, empty stats, bfloat16, optax's tuples."""
    f32, bf16 = jnp.float32, jnp.bfloat16
    params = {
        names[0]: {
            0: {"kernel": jax.ShapeDtypeStruct((4, width), f32)},
            1: {"kernel": jax.ShapeDtypeStruct((width, 4), f32)},
        },
        names[1]: {"kernel": jax.ShapeDtypeStruct((4, 2), bf16)},
    }
    optimizer = optim.make_optimizer(optim.OptimConfig(steps=10), params)
    abstract = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "halted": jax.ShapeDtypeStruct((), jnp.bool_),
        "params": params,
        "stats": {"norm": {"mean": jax.ShapeDtypeStruct((3,), f32)}, "empty": {}},
        "opt": jax.eval_shape(optimizer.init, params),
    } | ({"ema": params} if ema else {})
    shardings = sharding.state_shardings(abstract, mesh, min_size=16)
    return sharding.with_shardings(abstract, shardings)


def make_state(target):
    """Random values for `target`."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), target
    ) | {"halted": jax.device_put(np.bool_(False), target["halted"].sharding)}


@functools.partial(jax.jit, donate_argnums=0)
def advance(state):
    return jax.tree.map(lambda x: x + 1 if x.dtype != bool else x, state)


def on_host(state):
    return jax.tree.map(lambda x: np.array(x, copy=True), state)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=4, fsdp=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, mesh):
    """A finished little run with checkpoints 2 and 4: (workdir, states on the host, target)."""
    workdir = tmp_path_factory.mktemp("run")
    target = make_target(mesh, ema=True)
    state = make_state(target)
    saved = {}
    descriptions.claim_workdir(workdir, MODEL, json.dumps({"optim": {"lr": 1}}), METADATA)
    with Checkpoints(workdir) as checkpoints:
        for step in (2, 4):
            state = advance(state)
            saved[step] = on_host(state)
            assert checkpoints.save(step, state, {"step": step, "note": [1, "a"]})
            state = advance(state)  # donates what is being saved
    return workdir, saved, target


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may damage."""
    shutil.copytree(run[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_round_trip_is_bitwise_although_the_step_donates(run):
    workdir, saved, target = run
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.all_steps() == [2, 4]
        assert checkpoints.latest_step() == 4
        for step in (2, 4):
            state, position = checkpoints.restore(step, target)
            assert_same(state, saved[step])
            assert position == {"step": step, "note": [1, "a"]}
            kernel = state["params"]["layers"][0]["kernel"]
            assert kernel.sharding == target["params"]["layers"][0]["kernel"].sharding
        with pytest.raises(CheckpointError, match=r"no checkpoint .*/3; .* steps \[2, 4\]"):
            checkpoints.restore(3, target)


def test_restore_to_another_mesh(run):
    workdir, saved, _ = run
    for mesh in (sharding.make_mesh(fsdp=4), sharding.make_mesh(devices=jax.devices()[:1])):
        target = make_target(mesh, ema=True)
        with Checkpoints(workdir) as checkpoints:
            state, _ = checkpoints.restore(4, target)
        assert_same(state, saved[4])
        assert state["params"]["layers"][1]["kernel"].sharding.mesh == mesh
    assert jax.tree.leaves(state)[0].sharding.device_set == set(jax.devices()[:1])


def test_keep_last_and_best(tmp_path, mesh):
    state = {"params": {"w": jnp.ones(2)}}
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.2, 5: float("nan"), 6: 0.3}
    settings = {"keep": 2, "keep_best": 1, "best_metric": "panoptic/PQ"}
    with Checkpoints(tmp_path, **settings) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        for step, score in scores.items():
            checkpoints.save(step, state, {"step": step})
            if step != 3:
                checkpoints.record(step, {"panoptic/PQ": score, "instance/AP": None})
        assert checkpoints.best_step() == 2
        assert checkpoints.all_steps() == [2, 5, 6]
    # Scores are read again from disk: a better one takes the place of the best after a restart.
    with Checkpoints(tmp_path, **settings) as checkpoints:
        assert checkpoints.best_step() == 2
        checkpoints.save(7, state, {})
        checkpoints.record(7, {"panoptic/PQ": 0.95})
        assert checkpoints.best_step() == 7
        checkpoints.save(8, state, {})  # a score counts from the next save on
        assert checkpoints.all_steps() == [7, 8]
        checkpoints.save(9, state, {})
        assert checkpoints.all_steps() == [7, 8, 9]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best_step() is None  # no metric was named


def test_saving_a_step_twice_or_backwards(tmp_path):
    state = {"params": {"w": jnp.ones(2)}}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(5, state, {})
        assert not checkpoints.save(5, state, {})
        with pytest.raises(CheckpointError, match=r"cannot save step 3: .* holds step 5"):
            checkpoints.save(3, state, {})
    with pytest.raises(ValueError, match=r"train.keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match=r"train.keep_best is -1"):
        Checkpoints(tmp_path, keep_best=-1)


def test_half_written_checkpoints_are_not_seen(copy, run):
    folder = copy / "checkpoints"
    (folder / "6.orbax-checkpoint-tmp").mkdir()
    (folder / "6.orbax-checkpoint-tmp" / "state").mkdir()
    shutil.copytree(folder / "4", folder / "8")
    shutil.rmtree(folder / "8" / "position")
    (folder / "9").mkdir()
    assert checkpoint.load_for_inference(copy).step == 4
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.all_steps() == [2, 4]
        state, _ = checkpoints.restore(4, run[2])
        assert_same(state, run[1][4])
        assert checkpoints.save(6, state, {"step": 6})  # nothing of the wreck is in the way
        checkpoints.wait_until_finished()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["2", "4", "6", "8.incomplete", "9.incomplete"]


def test_checkpoint_of_another_model(run, mesh):
    workdir = run[0]
    with Checkpoints(workdir) as checkpoints:
        wider = make_target(mesh, width=16, ema=True)
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(4, wider)
        message = str(error.value)
        assert f"checkpoint {workdir}/checkpoints/4 is of another model" in message
        assert "params/layers/0/kernel: there float32[4,8], here float32[4,16]" in message
        assert "another --workdir" in message
        assert message.index("params/") < message.index("and ")  # the model's arrays come first

        renamed = make_target(mesh, ema=True, names=("layers", "class_head"))
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(4, renamed)
        assert "params/class_head/kernel: there none, here bfloat16[4,2]" in str(error.value)
        assert "params/head/kernel: there bfloat16[4,2], here none" in str(error.value)

        without_ema = make_target(mesh)
        with pytest.raises(CheckpointError, match=r"other training state; 3 arrays(?s:.)*ema_dec"):
            checkpoints.restore(4, without_ema)


# Of many reads under way TensorStore reports one; the others end after the event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("victim", ["state/_METADATA", "position/metadata", "arrays"])
def test_damaged_checkpoint_names_the_path(copy, run, victim):
    step = copy / "checkpoints" / "4"
    if victim == "arrays":
        for path in step.glob("state/**/d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        (step / victim).unlink()
    with (
        Checkpoints(copy) as checkpoints,
        pytest.raises(CheckpointError, match=rf"checkpoint {step} is damaged: (?s:.)*Remove"),
    ):
        checkpoints.restore(4, run[2])
    if victim != "position/metadata":  # inference does not read that one
        with pytest.raises(CheckpointError, match=rf"checkpoint {step} is damaged"):
            checkpoint.load_for_inference(copy)
    assert checkpoint.load_for_inference(copy / "checkpoints" / "2").step == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(copy, run, monkeypatch):
    shouted = []
    monkeypatch.setattr(checkpoint.logging, "error", lambda text, *a: shouted.append(text % a))
    folder = copy / "checkpoints"
    for path in (folder / "4").glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Checkpoints(copy) as checkpoints:
        step, state, position = checkpoints.restore_newest(run[2])
        assert (step, position["step"]) == (2, 2)
        assert_same(state, run[1][2])
        assert checkpoints.all_steps() == [2]
        assert checkpoints.save(4, state, {"step": 4})
        checkpoints.wait_until_finished()
        assert checkpoints.restore_newest(run[2])[0] == 4
    (message,) = shouted
    assert f"checkpoint {folder / '4'} is damaged" in message
    assert "Going on from step 2" in message
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "4.damaged"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_everywhere_is_an_error_and_renames_nothing(copy, run):
    for path in (copy / "checkpoints").glob("*/state/_METADATA"):
        path.unlink()
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(CheckpointError, match=r"checkpoints/4 is damaged"):
            checkpoints.restore_newest(run[2])
        assert checkpoints.all_steps() == [2, 4]


def test_a_model_that_differs_is_no_damage(copy, mesh):
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(CheckpointError, match="of another model"):
            checkpoints.restore_newest(make_target(mesh, width=16, ema=True))
        assert checkpoints.all_steps() == [2, 4]


def test_a_disk_that_is_full(tmp_path, mesh, monkeypatch):
    """Orbax fails in its background thread; the error names the folder and the last good step."""
    state = make_state(make_target(mesh))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        monkeypatch.setattr(checkpoints._checkpointer, "save", full)
        with pytest.raises(CheckpointError, match=r"the disk is full.* step 1; free some"):
            checkpoints.save(2, state, {})


def test_load_for_inference(run):
    workdir, saved, _ = run
    found = checkpoint.load_for_inference(workdir)
    assert found.step == 4
    assert_same(found.params, saved[4]["ema"])
    assert_same(found.stats, saved[4]["stats"])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found.params))
    assert found.model == json.loads(json.dumps(MODEL))
    assert found.metadata == METADATA
    assert found.settings == {"optim": {"lr": 1}, "eval": {}, "model": {}}
    older = checkpoint.load_for_inference(f"{workdir}/checkpoints/2", use_ema=False)
    assert older.step == 2
    assert_same(older.params, saved[2]["params"])


def test_load_for_inference_without_averages(tmp_path, mesh):
    state = make_state(make_target(mesh))
    descriptions.claim_workdir(tmp_path, MODEL, "{}", METADATA)
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no finished checkpoint yet"):
        checkpoint.load_for_inference(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    assert_same(checkpoint.load_for_inference(tmp_path).params, on_host(state["params"]))


def test_load_for_inference_of_a_bad_path(copy, tmp_path):
    def load(path):
        return checkpoint.load_for_inference(path)

    with pytest.raises(CheckpointError, match=rf"{tmp_path}/no does not exist; expected a workdir"):
        load(tmp_path / "no")
    with pytest.raises(CheckpointError, match=rf"{tmp_path} has no model.json; expected a workdir"):
        load(tmp_path)
    (copy / "checkpoints" / "7").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoints/7 is incomplete: it lacks .*state"):
        load(copy / "checkpoints" / "7")
    (copy / "metadata.json").write_text('{"dataset": "toy"}')
    with pytest.raises(CheckpointError, match=r"metadata.json holds an unexpected .*`class_names`"):
        load(copy)
    (copy / "config.json").write_text('{"half": ')
    with pytest.raises(CheckpointError, match=r"config.json is damaged .*run's configuration"):
        load(copy)
    (copy / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"model.json is missing; expected the model's"):
        load(copy / "checkpoints" / "4")


def test_a_best_metric_of_no_kind_has_no_best(copy):
    (copy / "config.json").write_text('{"eval": {"best_metric": ["a"]}}')
    seals.write_scores(copy / "checkpoints" / "2", {"a": 1.0})
    with pytest.raises(CheckpointError, match="has scores yet, so none is the best"):
        checkpoint.find_checkpoint(copy, "best")
    assert checkpoint.find_checkpoint(copy, "auto")[1].name == "4"


def test_a_model_of_an_earlier_version_is_completed(tmp_path):
    model = tiny.model_config().to_dict()
    old = {name: value for name, value in model.items() if name not in ("queries", "query_loss")}
    descriptions.claim_workdir(tmp_path, old, "{}", METADATA)
    descriptions.claim_workdir(tmp_path, model, "{}", METADATA)
    with pytest.raises(CheckpointError, match=r"queries \(there \"task\", here \"zeros\"\)"):
        descriptions.claim_workdir(tmp_path, model | {"queries": "zeros"}, "{}", METADATA)


# What the version before wrote beside the weights: how a model was run stood in several places.
EARLIER_MODEL = MODEL | {"dtype": "bfloat16", "remat": True}
EARLIER_CONFIG = {
    "model": {
        "sampling": "xla",
        "neighborhood": "auto",
        "dtype": "bfloat16",
        "remat": True,
        "scan_layers": True,
    },
    "loss": {"num_points": 64, "point_kernel": "pallas_tpu"},
    "matcher": {"class_cost": 2.0, "backend": "device", "implementation": "xla"},
    "eval": {"topk": 20},
}


def test_a_workdir_of_the_version_before_is_read(run, tmp_path, caplog):
    _, saved, target = run
    state = jax.tree.map(jnp.asarray, saved[2])
    del state["halted"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(2, state, {"step": 2})
    for name, value in (("model", EARLIER_MODEL), ("config", EARLIER_CONFIG)):
        descriptions.write_json(tmp_path / f"{name}.json", value)
    (tmp_path / "metadata.json").write_text(METADATA.to_json())

    with caplog.at_level("INFO"):
        found = checkpoint.load_for_inference(tmp_path)
    told = [line for line in caplog.messages if "earlier version" in line]
    assert len(told) == 2
    assert "dtype, remat are not read" in told[0] and "config.model and config.kernels" in told[0]
    assert "model.sampling (now kernels.deform_attn)" in told[1]
    assert "loss.point_kernel (now kernels.points)" in told[1]
    assert OneFormerConfig.from_dict(found.model) == tiny.model_config()
    assert found.settings["kernels"] == {
        "deform_attn": "xla",
        "neighborhood": "auto",
        "points": "pallas_tpu",
        "assignment": "xla",
    }
    assert found.settings["matcher"] == {"class_cost": 2.0}
    assert found.settings["loss"] == {"num_points": 64}
    assert found.settings["model"] == {"dtype": "bfloat16", "remat": True, "scan_layers": True}

    # A run goes on in it: its model is the same one, and its state was not halted.
    descriptions.claim_workdir(tmp_path, MODEL, "{}", METADATA)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(2, target)
    assert_same(restored, saved[2])
    assert restored["halted"].sharding == target["halted"].sharding


def test_claim_workdir(tmp_path):
    workdir = tmp_path / "a" / "b"
    descriptions.claim_workdir(workdir, MODEL, '{"lr": 1}', METADATA)
    descriptions.claim_workdir(workdir, MODEL, '{"lr": 2}', METADATA)  # tuples equal JSON's lists
    assert json.loads((workdir / "config.json").read_text()) == {"lr": 2}
    other = MODEL | {"backbone": MODEL["backbone"] | {"depths": (1, 1, 1, 6)}, "num_queries": 20}
    with pytest.raises(CheckpointError) as error:
        descriptions.claim_workdir(workdir, other, '{"lr": 3}', METADATA)
    assert str(error.value) == (
        f"workdir {workdir} holds another model: model.json differs in backbone.depths "
        "(there [1, 1, 1, 1], here [1, 1, 1, 6]), num_queries (there 7, here 20); use another "
        "--workdir, or the settings of that one"
    )
    assert json.loads((workdir / "config.json").read_text()) == {"lr": 2}  # left as it was
    classes = Metadata("toy", ("sky", "dog"), *list(vars(METADATA).values())[2:])
    with pytest.raises(CheckpointError, match=r"a model of other classes: .*class_names"):
        descriptions.claim_workdir(workdir, MODEL, "{}", classes)
    # The folder's name, colours and ids in files are not part of the model.
    moved = dataclasses.replace(
        METADATA,
        dataset="renamed",
        colors=METADATA.colors[::-1],
        category_ids=tuple(i + 900 for i in METADATA.category_ids),
        ignore_label=0,
    )
    descriptions.claim_workdir(workdir, MODEL, '{"lr": 2}', moved)
    assert json.loads((workdir / "metadata.json").read_text())["dataset"] == METADATA.dataset
    kinds = dataclasses.replace(METADATA, is_thing=tuple(not t for t in METADATA.is_thing))
    with pytest.raises(CheckpointError, match=r"class_names\[0\] \(there .*, here "):
        descriptions.claim_workdir(workdir, MODEL, "{}", kinds)
    (workdir / "model.json").write_text("")
    with pytest.raises(CheckpointError, match=rf"{workdir}/model.json is damaged"):
        descriptions.claim_workdir(workdir, MODEL, "{}", METADATA)


def test_write_json_replaces_in_one_go(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    descriptions.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        descriptions.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ["x.json"]
