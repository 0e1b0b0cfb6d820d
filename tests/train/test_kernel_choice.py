"""Kernels of a run: chosen before its programs are compiled, and told in its workdir."""

import functools
import json
import types

import jax
import pytest

from oneformer_jax.eval import predict
from oneformer_jax.kernels import calibrate, choice
from oneformer_jax.kernels.calibrate import chooser
from oneformer_jax.kernels.calibrate.store import Outcome
from oneformer_jax.kernels.ms_deform_attn import api as deform_api
from oneformer_jax.kernels.ms_deform_attn import pallas_tpu as deform_tpu
from oneformer_jax.kernels.point_sampling import api as points_api
from oneformer_jax.kernels.point_sampling import pallas_tpu as points_tpu
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.train import descriptions, kernel_choice, sharding
from oneformer_jax.train import state as states
from oneformer_jax.train.descriptions import CheckpointError
from tests import tiny
from tests.train.runs import make_config

ENVIRONMENT = {"device": "TPU v9", "jax": "1"}


def row(call, candidate="xla", **changes):
    found = {"operation": "point_sampling", "call": call, "gradients": True}
    return found | {"candidate": candidate, "verdict": "chosen"} | changes


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Has kernels in the interpreter chosen, by a made-up table; lists the calls that it tells."""
    for api, kernel in (
        (deform_api, functools.partial(deform_tpu.ms_deform_attn, interpret=True)),
        (
            points_api,
            types.SimpleNamespace(
                forward=functools.partial(points_tpu.forward, interpret=True),
                backward=functools.partial(points_tpu.backward, interpret=True),
            ),
        ),
    ):
        load = api.load
        monkeypatch.setattr(
            api,
            "load",
            lambda name, load=load, kernel=kernel: kernel if name == "pallas_tpu" else load(name),
        )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "TABLES", {True: {}, False: {}})
    monkeypatch.setattr(chooser, "_STORES", {})
    monkeypatch.setattr(chooser, "measures", lambda: True)
    monkeypatch.setattr(chooser, "candidates", lambda call: ["xla", "pallas_tpu"])
    tried = []

    def try_calls(calls, gradients, store, seconds):
        tried.extend((call.operation, gradients) for call in calls)
        for call in calls:
            for name, milliseconds in (("xla", 2.0), ("pallas_tpu", 1.0)):
                store.keep(call.key(gradients), name, Outcome(milliseconds, 0.0))

    monkeypatch.setattr(chooser, "try_calls", try_calls)
    return tried


def made(workdir, **overrides):
    """The training of the tiny model, whose kernels are chosen as in the loop; and its batch."""
    config = make_config(data__batch_size=2, optim__lr=1e-5, **overrides)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    training = states.make_training(config, tiny.CLASSES, tiny.text_table(), mesh)
    choose = kernel_choice.chooser(training.execution.kernels, mesh, workdir, gradients=True)
    batch = jax.eval_shape(lambda: tiny.batch(0))
    if choose is not None:
        choose(training.step, training.state, batch, states.abstract_key(mesh))
    return training, mesh, batch


def losses_of(steps, workdir, **overrides):
    """The losses of some steps."""
    training, mesh, _ = made(workdir, **overrides)
    key = sharding.put_key(jax.random.key(0), mesh)
    state, found = training.init(0), []
    for step in range(steps):
        batch = sharding.put_batch(tiny.batch(step), mesh)
        state, metrics = training.step(state, batch, key)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
def test_loops_and_recomputed_layers_are_traced_again_with_the_chosen_kernels(tmp_path, measuring):
    how = dict(model__remat=True, model__scan_layers=True, model__encoder_layers=2)
    training, mesh, batch = made(tmp_path, **how)
    traced = training.step.trace(training.state, batch, states.abstract_key(mesh))
    for name in ("ms_deform_attn", "point_sampling"):
        for part in ("forward", "backward"):
            assert f"{name}_{part}" in str(traced.jaxpr)


@pytest.mark.slow
def test_twenty_steps_with_chosen_kernels_have_the_losses_of_plain_jax(
    tmp_path, measuring, monkeypatch
):
    """The tests' tolerance of a kernel is 1e-4; Adam's steps multiply what differs."""
    found = losses_of(20, tmp_path)
    told = json.loads((tmp_path / kernel_choice.FILE).read_text())
    assert told["environment"]["device"] == "cpu"
    chosen = {(r["operation"], r["candidate"]) for r in told["table"] if r["verdict"] == "chosen"}
    assert chosen == {("ms_deform_attn", "pallas_tpu"), ("point_sampling", "pallas_tpu")}
    expected = losses_of(
        20, tmp_path, kernels__deform_attn="xla", kernels__points="xla", kernels__calibrate=False
    )
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != expected  # other sums were taken

    # The next start measures nothing.
    assert set(measuring) == {("ms_deform_attn", True), ("point_sampling", True)}
    measuring.clear()
    monkeypatch.setattr(choice, "TABLES", {True: {}, False: {}})
    monkeypatch.setattr(chooser, "_STORES", {})
    (tmp_path / kernel_choice.FILE).unlink()
    made(tmp_path)
    assert not measuring
    assert json.loads((tmp_path / kernel_choice.FILE).read_text()) == told


@pytest.mark.parametrize("asks", [True, False])
def test_a_segmenter_asks_the_device_unless_it_is_told_not_to(asks):
    model = tiny.random_model(tiny.model_config())
    segmenter = predict.Segmenter(
        tiny.model_config(),
        *model[1:],
        tiny.metadata(),
        execution=Execution(kernels=Kernels(calibrate=asks)),
    )
    for program in segmenter._predictor.programs:
        assert isinstance(program.prepare, calibrate.Chooser) == asks


def test_the_table_of_a_workdir_keeps_what_other_programs_told(tmp_path):
    path = tmp_path / kernel_choice.FILE
    kernel_choice.report(path, ENVIRONMENT, [row("one"), row("one", "kernel"), row("two")])
    kernel_choice.report(path, ENVIRONMENT, [row("one", "other"), row("three")])
    kernel_choice.report(path, ENVIRONMENT, [row("two", gradients=False)])
    table = json.loads(path.read_text())["table"]
    found = [(r["call"], r["candidate"], r["gradients"]) for r in table]
    assert found == [
        ("two", "xla", True),
        ("one", "other", True),
        ("three", "xla", True),
        ("two", "xla", False),
    ]
    # What another device, or other versions, told is out of date.
    kernel_choice.report(path, ENVIRONMENT | {"jax": "2"}, [row("four")])
    assert [r["call"] for r in json.loads(path.read_text())["table"]] == ["four"]


def test_the_table_of_a_run_in_a_bucket_goes_there(monkeypatch):
    def missing(path, **_):
        raise CheckpointError(f"{path} is missing")

    written = []
    monkeypatch.setattr(descriptions, "read_json", missing)
    monkeypatch.setattr(descriptions, "write_json", lambda path, _: written.append(str(path)))
    made = []
    monkeypatch.setattr(kernel_choice.execution, "chooser", lambda *_, **how: made.append(how))
    kernel_choice.chooser(Kernels(), None, "gs://bucket/run")
    made[0]["report"](ENVIRONMENT, [row("one")])
    assert written == ["gs://bucket/run/kernels.json"]


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"environment": {}, "table": 3}', '{"table": []}', "nonsense"]
)
def test_a_damaged_table_is_made_afresh(tmp_path, damage):
    path = tmp_path / kernel_choice.FILE
    path.write_text(damage)
    kernel_choice.report(path, ENVIRONMENT, [row("one")])
    assert json.loads(path.read_text()) == {"environment": ENVIRONMENT, "table": [row("one")]}


@pytest.mark.slow
def test_the_command_prints_the_table_of_a_config(measuring):
    config = make_config(data__crop_size=(64, 64))
    text = kernel_choice.table(config, tiny.CLASSES, tiny.text_table())
    assert sorted(set(measuring)) == [
        ("ms_deform_attn", False),
        ("ms_deform_attn", True),
        ("point_sampling", True),
    ]
    assert text.count("| chosen |") == len(measuring)
