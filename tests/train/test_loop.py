"""The training loop: one run on one device that many tests look at, and starts that go on from it.

Every start compiles or loads its programs, which is what takes the time here: so there are few, and
all but one of another mesh share the training step of the first.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from oneformer_jax.eval.metrics.cityscapes import CityscapesIoU
from oneformer_jax.train import checkpoint, loop, sharding
from oneformer_jax.train.checkpoint import CheckpointError, load_for_inference
from oneformer_jax.train.observe import NonFiniteLoss
from oneformer_jax.train.runtime.preemption import EXIT_CODE
from tests import tiny
from tests.train import eval_scenes
from tests.train.runs import BATCH, BEST, STEPS, Batches, make_config
from tests.train.test_observe import read_events, read_lines

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(workdir, *, batches=None, mesh=None, **overrides):
    return loop.train(
        make_config(**overrides),
        str(workdir),
        metadata=tiny.metadata(),
        text_table=tiny.text_table(),
        train_batches=batches or Batches(),
        eval_batches=eval_scenes.batches,
        image_ids=lambda positions: [f"image {position}" for position in positions],
        mesh=mesh or sharding.make_mesh(devices=jax.devices()[:1]),
    )


def scalars(workdir, *, since=0):
    """[(step, {name: value})] of metrics.jsonl without what depends on the clock."""
    lines = [line for line in read_lines(workdir) if line["step"] > since]
    for line in lines:
        assert line.pop("time") > 0
    return [
        (line.pop("step"), {k: v for k, v in line.items() if not k.startswith("time/")})
        for line in lines
    ]


def saved_steps(workdir):
    return sorted(int(p.name) for p in (pathlib.Path(workdir) / "checkpoints").iterdir())


def copy_at(run, workdir, step):
    """A copy of a run's folder as a crash after the save of `step` leaves it."""
    shutil.copytree(run, workdir)
    for later in saved_steps(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    return workdir


@dataclasses.dataclass
class Run:
    workdir: pathlib.Path
    results: dict
    batches: Batches
    traces: int  # of the training step: more than one means that it was compiled again


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The uninterrupted run. Tests do not write into its folder: those that go on take a copy."""
    workdir, batches, traces = tmp_path_factory.mktemp("run") / "workdir", Batches(), []
    make_train_step, evaluate = loop.states.make_train_step, loop.Evaluator.run

    def counting(*args, **kwargs):
        step = make_train_step(*args, **kwargs)

        @functools.wraps(step)  # the name is part of what finds a compiled program again
        def traced(*args):
            traces.append(1)
            return step(*args)

        return traced

    def flattering(self, state, step, *args, **kwargs):
        found = evaluate(self, state, step, *args, **kwargs)
        return found | {BEST: 99.0} if step == 2 else found  # let step 2 be the best

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.states, "make_train_step", counting)
        patch.setattr(loop.Evaluator, "run", flattering)
        results = start(workdir, batches=batches)
    return Run(workdir, results, batches, len(traces))


def test_batches_are_used_in_order_and_the_loader_is_closed(run):
    assert run.batches.starts == [0]
    assert run.batches.steps == list(range(1, STEPS + 1))
    assert run.batches.closed


def test_the_step_is_compiled_once(run):
    assert run.traces == 1


def test_the_losses_add_up_and_the_parameters_move(run):
    lines = [values for _, values in scalars(run.workdir) if "loss" in values]
    assert len(lines) == STEPS
    for values in lines:
        terms = [v for k, v in values.items() if k.startswith("loss_")]
        assert values["loss"] == pytest.approx(sum(terms), rel=1e-4)
    assert len({values["param_norm"] for values in lines}) == STEPS
    # The schedule drops the rate after five of six steps.
    assert [values["lr/main"] for values in lines] == pytest.approx([1e-3] * 5 + [1e-4])
    assert [values["lr/backbone"] for values in lines] == pytest.approx([1e-4] * 5 + [1e-5])


def test_every_scalar_is_documented_and_every_documented_one_is_written(run):
    text = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    assert "loss" in documented  # the table was found
    # This run has all of them (things of each size range, stuff, texts, earlier predictions), but
    # for the metrics of Cityscapes alone.
    written = {name for line in read_lines(run.workdir) for name in line} - {"step", "time"}
    written |= CityscapesIoU(("car", "sky"), (True, False)).compute().keys()
    numbered = re.compile(r"(loss_(?:ce|mask|dice))_\d+$")
    assert {numbered.sub(r"\1_{n}", name) for name in written} == documented


def test_tensorboard_has_the_scalars_and_the_pictures(run):
    events = read_events(run.workdir)
    losses = [(s, v["loss"]) for s, v in scalars(run.workdir) if "loss" in v]
    assert events["loss/total"] == [(s, pytest.approx(v)) for s, v in losses]
    assert {tag.split("/")[0] for tag in events} == {
        *("loss", "loss_layers", "norm", "health", "lr", "time", "run"),
        *("panoptic", "instance", "semantic", "_hparams_", "custom_scalars__config__"),
    }
    assert [step for step, _ in events["instance/image_2"]] == [2, 4, 6]
    assert [step for step, _ in events["panoptic/PQ"]] == [2, 4, 6]


def test_pictures_of_every_evaluation(run):
    sheets = sorted((run.workdir / "pictures").iterdir())
    assert [p.name for p in sheets] == [f"step_000000{step}.png" for step in (2, 4, 6)]
    sheets = [np.asarray(Image.open(p)) for p in sheets]
    assert sheets[0].shape[0] > 2 * 360
    assert len(np.unique(sheets[0][::7, ::7].reshape(-1, 3), axis=0)) > 20


def test_the_last_and_the_best_checkpoints_stay(run):
    assert saved_steps(run.workdir) == [2, 4, 6]  # train.keep is 2; 2 is the best
    last = load_for_inference(run.workdir)
    assert last.step == STEPS
    averages = tiny.leaves(last.params)
    trained = tiny.leaves(load_for_inference(run.workdir, use_ema=False).params)
    assert averages.keys() == trained.keys()
    assert any(not np.array_equal(averages[name], trained[name]) for name in trained)


def test_evaluation_of_the_workdir_gives_the_results_of_the_run(run):
    """The run scores its averaged parameters, and so does the evaluation of a checkpoint."""
    results = json.loads((run.workdir / "eval" / str(STEPS) / "results.json").read_text())
    assert results["metrics"] == run.results
    found = loop.evaluate_workdir(
        make_config(),
        str(run.workdir),
        metadata=tiny.metadata(),
        eval_batches=eval_scenes.batches,
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    )
    assert found == run.results
    (line,) = read_lines(run.workdir / "eval")
    assert line["step"] == STEPS
    assert line[BEST] == run.results[BEST]


def test_a_run_below_an_odd_name_goes_on_and_is_evaluated(run, tmp_path):
    """`test_folders` tries many names; this is the whole way."""
    workdir = copy_at(run.workdir, tmp_path / "run[1] *?{}%~#$é\n:-", STEPS - 1)
    results = start(workdir)
    assert saved_steps(workdir)[-1] == STEPS
    found = loop.evaluate_workdir(
        make_config(),
        str(workdir),
        metadata=tiny.metadata(),
        eval_batches=eval_scenes.batches,
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    )
    assert found == results
    assert [path.name for path in tmp_path.iterdir()] == [workdir.name]


def test_evaluation_with_other_classes(run):
    names = tiny.metadata().class_names
    metadata = dataclasses.replace(tiny.metadata(), dataset="other", class_names=names[::-1])
    with pytest.raises(CheckpointError, match=r"classes of tiny.*dataset of this config \(other\)"):
        loop.evaluate_workdir(
            make_config(),
            str(run.workdir),
            metadata=metadata,
            eval_batches=eval_scenes.batches,
            mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        )


def test_evaluation_without_that_checkpoint(run):
    with pytest.raises(CheckpointError, match="has no checkpoint 5"):
        loop.evaluate_workdir(
            make_config(),
            str(run.workdir),
            metadata=tiny.metadata(),
            eval_batches=eval_scenes.batches,
            which=5,
            mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        )


# ------------------------------------------------------------------ going on


def _never(*args, **kwargs):
    raise AssertionError("a finished run needs none of this")


def test_a_finished_run_is_only_reported(run, monkeypatch, capsys):
    before = scalars(run.workdir)
    for owner, name in (
        (loop.states, "make_train_step"),
        (loop.states, "make_init"),
        (loop.Evaluator, "run"),
        (checkpoint.Checkpoints, "restore"),
    ):
        monkeypatch.setattr(owner, name, _never)
    batches = Batches()
    assert start(run.workdir, batches=batches) == run.results
    assert batches.starts == []
    assert scalars(run.workdir) == before
    shown = capsys.readouterr().out
    assert str(run.workdir / "pictures" / "step_0000006.png") in shown
    # Fewer steps than the run has made: it is finished all the same.
    assert start(run.workdir, batches=batches, train__steps=4) == run.results
    assert batches.starts == []


def test_a_finished_run_gets_the_missing_token_table(run, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(run.workdir, tmp_path / "copy")
    batches = Batches()
    monkeypatch.setattr(loop.Evaluator, "run", _never)
    assert start(workdir, batches=batches, eval__token_table=True) == run.results
    table = json.loads((workdir / "eval" / str(STEPS) / "task_tokens.json").read_text())
    assert list(table) == ["panoptic", "instance", "semantic"]
    for token in table:
        column = {"panoptic": "panoptic/PQ", "instance": "instance/AP", "semantic": BEST}[token]
        assert table[token][column] == run.results[column]
    assert "task token" in capsys.readouterr().out
    monkeypatch.setattr(checkpoint.Checkpoints, "restore", _never)
    assert start(workdir, batches=batches, eval__token_table=True) == run.results
    assert batches.starts == []


def test_a_bad_loss_stops_the_run_and_resuming_repeats_it_exactly(run, tmp_path):
    def out_of_range(batch):
        batch["classes"][:] = 10**6
        return batch

    # Step 5 goes wrong while the checkpoint of step 4 is written in the background.
    workdir = copy_at(run.workdir, tmp_path / "copy", 2)
    batches = Batches({5: out_of_range})
    with pytest.raises(NonFiniteLoss) as error:
        start(workdir, batches=batches)
    assert error.value.step == 5
    assert {"loss", "loss_ce", "loss_ce_0"} <= set(error.value.terms)
    assert error.value.records == [500 + i for i in range(BATCH)]
    assert batches.starts == [2]
    assert batches.closed
    assert saved_steps(workdir) == [2, 4]
    assert load_for_inference(workdir).step == 4
    assert [step for step, _ in scalars(workdir)][-1] == 4

    folder = workdir / "nonfinite" / "5"
    report = json.loads((folder / "report.json").read_text())
    assert report["records"] == error.value.records
    assert report["images"][0] == "image 500"
    assert "loss_ce" in report["terms"]
    with np.load(folder / "batch.0.npz") as batch:
        assert (batch["classes"] == 10**6).all()
    kept = ocp.StandardCheckpointer().restore(folder / "state")
    assert int(kept["step"]) == 4  # the last good one, not that of a later step
    saved = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / "4" / "state")
    for name, value in tiny.leaves(saved["params"]).items():
        np.testing.assert_array_equal(tiny.leaves(kept["params"])[name], value)

    batches = Batches()
    assert start(workdir, batches=batches) == run.results
    assert batches.starts == [4]
    assert batches.steps == [5, 6]
    assert_same_run(workdir, run.workdir)


def assert_same_run(workdir, expected):
    """Bit for bit the same weights and log lines, and no line twice."""
    assert scalars(workdir) == scalars(expected)
    for use_ema in (False, True):
        found = load_for_inference(workdir, use_ema=use_ema)
        wanted = load_for_inference(expected, use_ema=use_ema)
        for part in ("params", "stats"):
            theirs = tiny.leaves(getattr(wanted, part))
            for name, value in tiny.leaves(getattr(found, part)).items():
                np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def terminate(workdir, step, error=None):
    """The step that a run saves which gets SIGTERM (and `error`) with the batch of `step`."""

    def signal_to_self(batch):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # a thread takes note of it
        if error:
            raise error
        return batch

    batches = Batches({step: signal_to_self})
    with pytest.raises(SystemExit) as exit_:
        start(workdir, batches=batches)
    assert batches.closed
    assert exit_.value.code == EXIT_CODE
    return exit_.value.step


def test_a_signal_saves_the_step_and_resuming_repeats_the_rest(run, tmp_path):
    workdir = copy_at(run.workdir, tmp_path / "copy", 2)
    assert terminate(workdir, 5) == 5
    assert saved_steps(workdir) == [2, 4, 5]
    assert start(workdir) == run.results
    assert_same_run(workdir, run.workdir)


def test_a_signal_that_ends_the_loader_too_loses_nothing(run, tmp_path):
    workdir = copy_at(run.workdir, tmp_path / "copy", 2)
    assert terminate(workdir, 4, ConnectionError("a loader process is gone")) == 3
    assert saved_steps(workdir) == [2, 3]


def test_an_evaluation_that_was_cut_off_is_made_again(run, tmp_path, monkeypatch):
    """The state is saved before it: nothing but the evaluation itself is to be repeated."""
    workdir, evaluate = copy_at(run.workdir, tmp_path / "copy", 2), loop.Evaluator.run

    def cut_off(self, state, step, *args, **kwargs):
        if step == 4:
            raise KeyboardInterrupt
        return evaluate(self, state, step, *args, **kwargs)

    shutil.rmtree(workdir / "eval" / "4")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Evaluator, "run", cut_off)
        start(workdir)
    assert saved_steps(workdir) == [2, 4]
    batches = Batches()
    assert start(workdir, batches=batches) == run.results
    assert batches.starts == [4]
    assert_same_run(workdir, run.workdir)
    assert json.loads((workdir / "checkpoints" / "4" / "scores.json").read_text())


def test_eight_devices_go_on_with_the_same_losses(run, tmp_path, monkeypatch):
    """From the checkpoint of one device, with sharded parameters and the matcher on the host."""

    def interrupt(batch):
        raise KeyboardInterrupt

    def shard_small_ones_too(state, mesh, shardings=sharding.state_shardings):
        found = shardings(state, mesh, min_size=64)
        sharded.extend(s for s in jax.tree.leaves(found) if "fsdp" in s.spec)
        return found

    sharded = []
    monkeypatch.setattr(loop.sharding, "state_shardings", shard_small_ones_too)
    workdir = copy_at(run.workdir, tmp_path / "copy", 2)
    batches = Batches({5: interrupt})
    with pytest.raises(KeyboardInterrupt):
        start(
            workdir,
            batches=batches,
            mesh=sharding.make_mesh(4, 2),
            kernels__assignment="scipy",
            eval__batch_size=8,
            train__eval_every=0,
        )
    assert len(sharded) > 100
    assert batches.closed
    assert saved_steps(workdir) == [2, 4]
    assert load_for_inference(workdir).step == 4
    expected = {s: v for s, v in scalars(run.workdir, since=2) if "loss" in v}
    found = scalars(workdir, since=2)
    assert [step for step, _ in found] == [3, 4]
    for step, values in found:
        assert values.keys() == expected[step].keys()
        for name, value in values.items():
            assert value == pytest.approx(expected[step][name], rel=1e-2, abs=1e-4), (step, name)
    assert read_lines(workdir)[-1]["time/matcher_share"] > 0
    # Adam's first moments are means of the gradients of every single parameter.
    moments, expected = (tiny.leaves(x) for x in (_moments(workdir), _moments(run.workdir)))
    assert len(moments) > 100
    for name, value in moments.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], atol=0.02 * scale + 1e-7, err_msg=name)


def _moments(workdir):
    """Adam's first moments in the checkpoint of step 4."""
    tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / "4" / "state")
    (moments,) = [s["mu"] for s in tree["opt"] if isinstance(s, dict) and "mu" in s]
    return moments


# ------------------------------------------------------------------ transfers


def test_a_transfer_that_nobody_asked_for_ends_the_run(tmp_path, monkeypatch):
    def light(*args, **kwargs):
        step = jax.jit(lambda state, batch, key: (state, {"loss": batch["task"].sum()}))
        return dataclasses.replace(make_training(*args, **kwargs), step=step)

    make_training = loop.states.make_training
    monkeypatch.setattr(loop.states, "make_training", light)
    refused = pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer")
    sums = Batches({2: lambda batch: jax.numpy.negative(batch["image"])})
    with refused:  # in the loop, after a step without one
        start(tmp_path / "loop", batches=sums, train__log_every=100)
    assert sums.steps == [1]
    monkeypatch.setattr(loop.sharding, "put_batch", lambda batch, mesh: batch)
    with refused:  # by the step
        start(tmp_path / "step")


# ------------------------------------------------------------------ what does not fit


def test_data_that_ends_is_an_error(run, tmp_path):
    workdir = copy_at(run.workdir, tmp_path / "copy", 2)
    batches = Batches({3: lambda batch: None})
    with pytest.raises(ValueError, match=r"ended before step 3 of train\.steps = 6"):
        start(workdir, batches=batches)
    assert batches.closed


def test_a_workdir_of_another_model(run):
    with pytest.raises(CheckpointError, match=r"holds another model.*decoder_ffn"):
        start(run.workdir, model__decoder_ffn=64)


@pytest.mark.parametrize(
    ("devices", "overrides", "message"),
    [
        (8, {"data__batch_size": 12, "eval__batch_size": 8}, r"data\.batch_size 12 .* 8 or 16"),
        (1, {"train__on_nonfinite": "ignore"}, r"train\.on_nonfinite is 'ignore'.*stop, skip"),
        (1, {"optim__accumulate": 3}, r"optim\.accumulate is 3; .* data\.batch_size = 8"),
        (8, {"optim__accumulate": 2, "eval__batch_size": 8}, r"\(8/2\) = 4 is not divisible by 8"),
        (1, {"eval__tasks": ("semantic", "depth")}, r"eval\.tasks .*depth"),
        (1, {"eval__tasks": ("panoptic",)}, r"eval\.best_metric is 'semantic/mIoU'.*keep_best=0"),
        (1, {"eval__best_metric": "PQ"}, r"eval\.best_metric is 'PQ'.*panoptic/PQ"),
        (1, {"train__log_every": 0}, r"train\.log_every is 0"),
        (1, {"train__eval_every": -1}, r"train\.eval_every is -1"),
        (1, {"train__profile_steps": 0}, r"train\.profile_steps is 0"),
        (1, {"kernels__assignment": "gpu"}, r"kernels\.assignment is 'gpu'"),
        (1, {"train__steps": 0}, r"train\.steps is 0"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(devices, overrides, message, tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "run", mesh=mesh, **overrides)
    assert not (tmp_path / "run").exists()


def test_due():
    assert [step for step in range(1, 8) if loop.due(step, 3)] == [3, 6]
    assert not any(loop.due(step, 0) for step in range(1, 8))
