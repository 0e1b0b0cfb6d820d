"""Kernels of a run: chosen before its programs are compiled, and told in its workdir."""

import functools
import json
import types

import pytest

from oneformer_jax.eval import predict
from oneformer_jax.kernels import calibrate, choice
from oneformer_jax.kernels.calibrate import attempt, chooser
from oneformer_jax.kernels.calibrate.store import Outcome
from oneformer_jax.kernels.ms_deform_attn import api as deform_api
from oneformer_jax.kernels.ms_deform_attn import pallas_tpu as deform_tpu
from oneformer_jax.kernels.point_sampling import api as points_api
from oneformer_jax.kernels.point_sampling import pallas_tpu as points_tpu
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.train import kernel_choice
from tests import tiny
from tests.train.runs import make_config
from tests.train.test_loop import scalars, start

ENVIRONMENT = {"device": "TPU v9", "jax": "1"}


def row(call, candidate="xla", **changes):
    found = {"operation": "point_sampling", "call": call, "gradients": True}
    return found | {"candidate": candidate, "verdict": "chosen"} | changes


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Has this processor measured: kernels in the interpreter, which the clock prefers."""
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
    monkeypatch.setattr(chooser, "_BUDGET", [1000.0])
    monkeypatch.setattr(attempt, "COMPILE_SECONDS", 500.0)
    monkeypatch.setattr(attempt, "RUN_SECONDS", 500.0)
    monkeypatch.setattr(chooser, "measures", lambda: True)
    monkeypatch.setattr(chooser, "candidates", lambda call: ["xla", "pallas_tpu"])
    fast = {"xla": 2.0, "pallas_tpu": 1.0}
    monkeypatch.setattr(attempt, "time_call", lambda call, name, run: fast[name])


@pytest.mark.slow
def test_twenty_steps_with_chosen_kernels_have_the_losses_of_plain_jax(
    tmp_path, measuring, monkeypatch
):
    """The tests' tolerance of a kernel is 1e-4; Adam's steps multiply what differs."""
    settings = dict(
        train__steps=20,
        train__eval_every=0,
        train__checkpoint_every=20,
        train__pictures=1,
        optim__lr=1e-5,
    )
    start(tmp_path / "auto", **settings)
    told = json.loads((tmp_path / "auto" / kernel_choice.FILE).read_text())
    assert told["environment"]["device"] == "cpu"
    chosen = {
        (r["operation"], r["gradients"], r["candidate"])
        for r in told["table"]
        if r["verdict"] == "chosen"
    }
    assert chosen == {
        ("ms_deform_attn", True, "pallas_tpu"),
        ("point_sampling", True, "pallas_tpu"),
        ("ms_deform_attn", False, "pallas_tpu"),  # of the evaluation
    }
    named = dict(kernels__deform_attn="xla", kernels__points="xla", kernels__calibrate=False)
    start(tmp_path / "xla", **settings, **named)
    assert not (tmp_path / "xla" / kernel_choice.FILE).exists()
    found, expected = (
        [(step, line["loss"]) for step, line in scalars(tmp_path / name) if "loss" in line]
        for name in ("auto", "xla")
    )
    assert len(found) == 20
    for (step, loss), (_, other) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other, rel=1e-4), step
    assert found != expected  # other sums were taken

    # A second start measures nothing.
    monkeypatch.setattr(choice, "TABLES", {True: {}, False: {}})
    monkeypatch.setattr(chooser, "_STORES", {})
    monkeypatch.setattr(attempt, "Attempts", None)
    start(tmp_path / "again", **settings | {"train__steps": 1})
    again = json.loads((tmp_path / "again" / kernel_choice.FILE).read_text())
    assert again == told


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


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"environment": {}, "table": 3}', '{"table": []}', "nonsense"]
)
def test_a_damaged_table_is_made_afresh(tmp_path, damage):
    path = tmp_path / kernel_choice.FILE
    path.write_text(damage)
    kernel_choice.report(path, ENVIRONMENT, [row("one")])
    assert json.loads(path.read_text()) == {"environment": ENVIRONMENT, "table": [row("one")]}


@pytest.mark.slow
def test_the_command_prints_the_table_of_a_config(measuring, monkeypatch):
    tried = []

    def no_attempts(calls, gradients, store, seconds, log):
        tried.extend((call.operation, gradients) for call in calls)
        for call in calls:
            for name, milliseconds in (("xla", 2.0), ("pallas_tpu", 1.0)):
                store.keep(call.key(gradients), name, Outcome(milliseconds, 0.0))

    monkeypatch.setattr(chooser, "try_calls", no_attempts)
    config = make_config(data__crop_size=(64, 64))
    text = kernel_choice.table(config, tiny.CLASSES, tiny.text_table())
    assert sorted(set(tried)) == [
        ("ms_deform_attn", False),
        ("ms_deform_attn", True),
        ("point_sampling", True),
    ]
    assert text.count("| chosen |") == len(tried)
