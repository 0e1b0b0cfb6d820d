"""Early stopping: the history of scores, and runs that stop, are cut off and go on."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.eval.evaluate import EvalResult, write_results
from oneformer_jax.train import loop, reading, settings, sharding
from oneformer_jax.train import state as states
from oneformer_jax.train.checkpoint import CheckpointError, Checkpoints
from oneformer_jax.train.evaluator import Evaluator, metric_names
from oneformer_jax.train.patience import Patience
from tests import tiny
from tests.train import eval_scenes
from tests.train.runs import BEST, Batches, make_config

# --- the history ---


def history(scores, most=2, position=None):
    patience = Patience(most, BEST, position or {})
    for step, score in scores.items():
        patience.note(step, {BEST: score, "other": 1.0})
    return patience


@pytest.mark.parametrize(
    ("scores", "over"),
    [
        ({}, False),
        ({1: 5.0}, False),
        ({1: 5.0, 2: 4.0}, False),
        ({1: 5.0, 2: 4.0, 3: 4.9}, True),
        ({1: 5.0, 2: 5.0, 3: 5.0}, True),  # equal is not better
        ({1: 5.0, 2: 4.0, 3: 5.1}, False),
        ({1: None}, False),
        ({1: None, 2: float("nan")}, True),  # never defined
        ({1: None, 2: None, 3: 0.0}, False),
        ({1: 5.0, 2: None, 3: float("nan")}, True),
        ({10: 4.0, 9: 3.0, 8: 5.0}, True),  # by step, not by arrival
    ],
)
def test_a_run_is_over_after_evaluations_without_a_better_score(scores, over):
    assert history(scores).over() is over
    stored = json.loads(json.dumps({"step": 1, "evaluations": history(scores).state()}))
    assert history({}, position=stored).over() is over
    assert not history(scores, most=0).over()


def test_the_same_step_counts_once_and_without_scores_not_at_all():
    patience = history({1: 5.0, 2: 4.0})
    patience.note(2, {BEST: 3.0})
    patience.note(3, None)
    assert not patience.over()
    patience.note(3, {})
    assert patience.over() and "best at step 1 with 5.00, 2 evaluations ago" in str(patience)


def test_all_processes_stop_when_one_of_them_does(monkeypatch):
    asked = []
    monkeypatch.setattr(reading, "any_process", lambda flag: asked.append(flag) or True)
    assert history({1: 5.0}).over() and asked == [False]


def test_another_metric_begins_anew():
    stored = {"evaluations": history({1: 5.0, 2: 4.0, 3: 4.0}).state()}
    assert not Patience(2, "panoptic/PQ", stored).over()


@pytest.mark.parametrize("damage", [[], {"metric": 3}, {"scores": [[1]]}, {"scores": [["a", 1]]}])
def test_a_damaged_history_is_named(damage):
    with pytest.raises(CheckpointError, match=r"checkpoint of step 7 are damaged"):
        Patience(2, BEST, {"step": 7, "evaluations": damage})


@pytest.mark.parametrize("most", [-1, 1.5, True])
def test_wrong_patience_is_named(most):
    with pytest.raises((ValueError, TypeError), match=r"train.patience|int"):
        start("nowhere", script={}, train__patience=most)


# --- runs ---

SAMPLE = 2  # eval.limit
SCORES = {1: 10.0, 2: 30.0, 3: 20.0, 4: 30.0, 5: 25.0, 6: 50.0}


class Cut(Exception):
    """The end of a process."""


@dataclasses.dataclass
class Scripted:
    """Replaces the evaluation: gives the scores of a script, and may cut the run off."""

    script: dict
    cut: tuple = ()  # evaluations, (step, limit), that do not begin
    done: list = dataclasses.field(default_factory=list)

    def __call__(self, evaluator, state, step, eval_batches, writer, *, limit=0):
        if (step, limit) in self.cut:
            raise Cut
        self.done.append((step, limit))
        config, metadata = evaluator._config, evaluator._metadata
        score = self.script[step] + (0 if limit else 0.5)  # all images score otherwise
        metrics = dict.fromkeys(metric_names(config, metadata), 1.0) | {BEST: score}
        seconds = dict.fromkeys(("data", "predict", "postprocess", "metrics", "total"), 1.0)
        rows = [{"class": name, "isthing": True} for name in metadata.class_names]
        result = EvalResult("tiny", None, 3, metrics, {}, rows, {}, seconds, limit=limit)
        write_results(evaluator._results_path(step), result)
        evaluator._last = result
        return metrics


def counting(config, num_classes, text_table, mesh):
    """A training that only counts its steps, in the place of `states.make_training`."""
    zero = {name: np.zeros(()) for name in ("loss", "grad_norm", "skipped_share")}
    state = {"step": np.int32(0), "halted": np.bool_(False), "params": {"w": np.zeros(2)}}
    state = jax.tree.map(jnp.asarray, state | {"stats": {}, "opt": {}})
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    return states.Training(
        settings.model_config(config, num_classes),
        settings.execution(config),
        lambda seed: sharding.put_state(state, shardings),
        sharding.with_shardings(jax.eval_shape(lambda: state), shardings),
        jax.jit(lambda state, *_: ({**state, "step": state["step"] + 1}, zero)),
    )


def start(workdir, script, *, batches=None, cut=(), **overrides):
    """Runs the loop; returns its results, or None if it was cut off, and the evaluations made."""
    settings = dict(train__eval_every=1, train__patience=2, train__keep=1, eval__limit=SAMPLE)
    scripted, results = Scripted(script, cut), None
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Cut):
        patch.setattr(Evaluator, "run", lambda self, *a, **k: scripted(self, *a, **k))
        patch.setattr(states, "make_training", counting)
        results = loop.train(
            make_config(**settings | overrides),
            str(workdir),
            metadata=tiny.metadata(),
            text_table=tiny.text_table(),
            train_batches=batches or Batches(),
            eval_batches=eval_scenes.batches,
            mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        )
    return results, scripted.done


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped") / "workdir"
    return workdir, *start(workdir, SCORES)


def test_a_run_stops_and_is_then_evaluated_on_all_images(stopped):
    _, results, done = stopped
    assert done == [(1, SAMPLE), (2, SAMPLE), (3, SAMPLE), (4, SAMPLE), (4, 0)]
    assert results[BEST] == SCORES[4] + 0.5


def test_a_stopped_run_has_nothing_to_do_until_patience_is_raised(stopped, caplog):
    workdir, results, _ = stopped
    batches = Batches()
    caplog.set_level("INFO")
    assert start(workdir, {}, batches=batches) == (results, [])
    assert "nothing to do" in caplog.text and "train.patience=2" in caplog.text
    found, done = start(workdir, SCORES, batches=batches, train__patience=3)
    assert batches.starts == [4] and done == [(5, SAMPLE), (5, 0)]
    assert found[BEST] == SCORES[5] + 0.5
    found, done = start(workdir, SCORES, batches=batches, train__patience=0)
    assert batches.starts == [4, 5] and done == [(6, 0)] and found[BEST] == SCORES[6] + 0.5


def test_starts_that_are_cut_off_stop_at_the_same_step(stopped, tmp_path, monkeypatch):
    _, results, uninterrupted = stopped
    made = []
    for cut in uninterrupted:
        found, done = start(tmp_path, SCORES, cut=[cut])
        assert found is None
        made += done
    record = Checkpoints.record

    def cut_off(self, step, scores):
        if step == 4:
            raise Cut
        record(self, step, scores)

    assert made == uninterrupted[:-1]  # each once: what was done is not done again
    found, done = start(tmp_path, SCORES)
    assert found == results and done == uninterrupted[-1:]
    # And after the results of a step were written, but not yet its scores.
    monkeypatch.setattr(Checkpoints, "record", cut_off)
    assert start(tmp_path / "b", SCORES) == (None, uninterrupted[:-1])
    monkeypatch.undo()
    assert start(tmp_path / "b", SCORES) == (results, uninterrupted[-2:])
