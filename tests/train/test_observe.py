import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from oneformer_jax.train import observe, tensorboard
from oneformer_jax.train.descriptions import CheckpointError
from oneformer_jax.train.observe import Chrono, NonFiniteLoss, ProfileTrigger

ROOT = pathlib.Path(__file__).resolve().parents[2]


def read_events(workdir):
    """{tag: [(step, value)]}: scalars as numbers, all else as numpy arrays."""
    events = EventAccumulator(str(workdir)).Reload()
    scalars = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    return scalars | {
        tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def read_dashboard(workdir, tag):
    """[(step, value)] of a scalar as TensorBoard's dashboards load it."""
    events = plugin_event_accumulator.EventAccumulator(str(workdir)).Reload()
    return [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_writer_makes_events_and_json_lines(tmp_path):
    writer = observe.make_writer(tmp_path / "run")
    assert isinstance(writer, tensorboard.metric_writers.MultiWriter)
    writer.write_scalars(1, {"loss": jnp.float32(2.5), "count": 3, "absent": None})
    writer.write_scalars(2, {"loss": np.float32(1.25), "bad": float("nan")})
    writer.write_texts(2, {"note": "hello"})
    writer.write_histograms(2, {"weights": np.arange(10.0)}, num_buckets={"weights": 5})
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[1, 2] = (10, 20, 30)
    writer.write_images(2, {"picture": picture, "grey": np.full((2, 4, 6, 1), 0.5)})
    writer.write_hparams({"optim": {"lr": 0.1, "boundaries": (1, 2)}, "name": "x"})
    writer.flush()
    # Everything is on disk before the writer is closed: a run may die at any time.
    lines = read_lines(tmp_path / "run")
    events = read_events(tmp_path / "run")
    writer.close()
    assert [line.pop("time") > 1e9 for line in lines] == [True, True]
    assert lines == [
        {"step": 1, "loss": 2.5, "count": 3, "absent": None},
        {"step": 2, "loss": 1.25, "bad": None},
    ]
    assert events["loss/total"] == [(1, 2.5), (2, 1.25)]
    assert events["note"][0][1].item() == b"hello"
    assert events["weights"][0][1].shape == (5, 3)
    width, height, png = events["picture"][0][1]
    assert (width, height) == (b"6", b"4")
    np.testing.assert_array_equal(decode(png), picture)
    assert len(events["grey"][0][1]) == 4
    assert decode(events["grey"][0][1][2]).tolist() == [[128] * 6] * 4
    assert "health/absent" not in events and "health/count" in events


def decode(png):
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


def test_resume_leaves_no_duplicates(tmp_path):
    writer = observe.make_writer(tmp_path, resume_step=0)
    for step in (10, 20, 30):
        writer.write_scalars(step, {"loss": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "lo')  # died here
    writer = observe.make_writer(tmp_path, resume_step=20)
    writer.write_scalars(30, {"loss": -30})
    writer.write_scalars(40, {"loss": -40})
    writer.close()
    expected = [(10, 10), (20, 20), (30, -30), (40, -40)]
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == expected
    assert read_events(tmp_path)["loss/total"] == expected
    assert read_dashboard(tmp_path, "loss/total") == expected
    observe.make_writer(tmp_path, resume_step=0).close()  # starts from scratch
    assert read_lines(tmp_path) == []


def test_an_installed_tensorflow_is_never_imported(tmp_path):
    """CLU's own back end would import it, at the cost of seconds and of a second CUDA client."""
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')")
    code = (
        "from oneformer_jax.train import observe\n"
        f"w = observe.make_writer({str(tmp_path / 'run')!r})\n"
        "w.write_scalars(1, {'loss': 2.0})\n"
        "w.close()\n"
        "from clu import metric_writers\n"
        "from oneformer_jax.train.tensorboard import SummaryWriter\n"
        "assert metric_writers.SummaryWriter is SummaryWriter\n"
        f"w = metric_writers.create_default_writer({str(tmp_path / 'clu')!r}, asynchronous=False)\n"
        "w.write_scalars(1, {'loss': 3.0})\n"
        "w.close()\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert read_events(tmp_path / "run")["loss/total"] == [(1, 2.0)]
    assert read_events(tmp_path / "clu")["loss"] == [(1, 3.0)]


def test_only_the_first_host_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(observe.jax, "process_index", lambda: 1)
    writer = observe.make_writer(tmp_path / "run")
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_check_finite_names_step_terms_and_records():
    good = {"loss": jnp.float32(1.0), "matcher_nonfinite": jnp.int32(3)}
    observe.check_finite(good, 6)
    bad = good | {"loss_mask_3": jnp.float32(jnp.nan), "grad_norm": np.float32(np.inf)}
    with pytest.raises(NonFiniteLoss) as error:
        observe.check_finite(bad, 7, np.arange(20))
    assert error.value.step == 7
    assert set(error.value.terms) == {"loss_mask_3", "grad_norm"}
    assert error.value.records == list(range(20))
    message = str(error.value)
    assert message.startswith("step 7: not finite: ")
    assert "loss_mask_3 = nan" in message
    assert "grad_norm = inf" in message
    assert "15 and 4 more of the training data" in message
    assert "optim.lr" in message
    with pytest.raises(NonFiniteLoss, match=r"step 8: not finite: loss = nan\. The last"):
        observe.check_finite({"loss": float("nan")}, 8)
    with pytest.raises(NonFiniteLoss, match=r"ids of these images: id 4, id 9\."):
        observe.check_finite({"loss": float("nan")}, 9, [4, 9], lambda rs: [f"id {r}" for r in rs])


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_chrono_separates_data_step_and_pause():
    clock = Clock()
    chrono = Chrono(0, 100, 8, clock=clock, wall=clock)
    with chrono.data():
        clock.wait(7)  # workers start
    clock.wait(50)  # compilation
    chrono.tick(1)
    first = chrono.scalars()
    assert first == {
        "time/pause_seconds": 0,
        "time/checkpoint_seconds": 0,
        "time/goodput": 0,
        "time/elapsed_seconds": 57,
    }

    for step in (2, 3, 4, 5):
        with chrono.data():
            clock.wait(0.5)
        clock.wait(1.5)
        chrono.tick(step)
    scalars = chrono.scalars(matcher_seconds=0.8)
    parts = ("step", "data", "pause", "checkpoint", "eta", "elapsed")
    names = {"images_per_second", "goodput", "matcher_share", *(f"{n}_seconds" for n in parts)}
    assert set(scalars) == {f"time/{name}" for name in names}
    assert scalars["time/images_per_second"] == pytest.approx(4 * 8 / 8)
    assert scalars["time/step_seconds"] == pytest.approx(1.5)
    assert scalars["time/data_seconds"] == pytest.approx(0.5)
    assert scalars["time/pause_seconds"] == 0
    assert scalars["time/matcher_share"] == pytest.approx(0.1)
    assert scalars["time/eta_seconds"] == pytest.approx(95 * 2)
    assert scalars["time/elapsed_seconds"] == pytest.approx(65)

    with chrono.pause("evaluation"):
        clock.wait(9)
    with chrono.pause("checkpoint"):
        clock.wait(3)
    for step in (6, 7, 8, 9):
        clock.wait(2)
        chrono.tick(step)
    scalars = chrono.scalars(matcher_seconds=1.6)
    assert scalars["time/images_per_second"] == pytest.approx(4)  # the pause does not count
    assert scalars["time/step_seconds"] == pytest.approx(2)
    assert scalars["time/pause_seconds"] == pytest.approx(12)
    assert scalars["time/checkpoint_seconds"] == pytest.approx(3)
    # 57 s of start, 6 and 8 s of steps, 2 s of data, 12 s of pauses.
    assert scalars["time/goodput"] == pytest.approx(14 / 85)
    assert scalars["time/matcher_share"] == pytest.approx(0.1)  # of this interval alone
    assert scalars["time/eta_seconds"] == pytest.approx(91 * 28 / 8)  # pauses come again

    saved = json.loads(json.dumps(chrono.state()))
    clock.wait(10)  # steps that are lost, then a stop
    later = Chrono(9, 100, 8, state=saved, clock=clock, wall=clock)
    clock.wait(1)
    later.tick(10)
    scalars = later.scalars()
    assert scalars["time/elapsed_seconds"] == pytest.approx(86)
    assert scalars["time/goodput"] == pytest.approx(14 / 96)
    rows = dict(re.findall(r"^  (.*?)  .*?([\d.]+) %$", later.summary(), re.MULTILINE))
    assert rows.keys() == set(observe.TIME_PARTS.values())
    assert float(rows["lost: stopped, or steps made again"]) == pytest.approx(10 / 0.96, abs=0.1)
    assert float(rows["start and compilation"]) == pytest.approx(58 / 0.96, abs=0.1)


@pytest.mark.parametrize(
    "damage", [3, {"elapsed_seconds": "x"}, {"parts": {"other": 1.0}}, {"saved_at": []}]
)
def test_damaged_times_of_earlier_starts_are_named(damage):
    with pytest.raises(CheckpointError, match="earlier starts in the checkpoint of step 9 are dam"):
        Chrono(9, 100, 8, state=damage)


def test_flop_utilisation():
    clock = Clock()
    chrono = Chrono(0, 100, 8, peak_flops=50.0, clock=clock)
    chrono.set_step_flops(30.0)
    chrono.tick(1)
    for step in (2, 3):
        with chrono.data():
            clock.wait(4)
        clock.wait(1)
        chrono.tick(step)
    assert chrono.scalars()[observe.FLOP_UTILISATION] == pytest.approx(60 / 100)


def test_progress_line():
    scalars = {
        "loss": 34.2468,
        "loss_ce": np.float32(2.0),
        "loss_ce_0": 9.0,
        "time/images_per_second": 12.345,
        "time/data_seconds": 0.1,
        "time/step_seconds": 0.9,
        "time/eta_seconds": 751.0,
    }
    chrono = Chrono(0, 2000, 1)
    chrono.tick(120)
    assert chrono.line(scalars) == (
        "step 120/2000 (6%)  loss 34.25  ce 2  12.3 images/s  data 10%  ETA 12 min 31 s"
    )
    chrono.tick(1)
    assert chrono.line({"loss": 1.0}) == "step 1/2000 (0%)  loss 1"


def test_parameter_overview():
    params = {
        "backbone": {"conv": {"kernel": jnp.ones((512, 512))}, "norm": {"scale": jnp.ones(512)}},
        "logit_scale": jnp.ones((), jnp.bfloat16),
    }
    rows = [line.split() for line in observe.parameter_overview(params).splitlines()]
    assert rows == [
        ["part", "arrays", "parameters", "MiB", "share"],
        ["backbone", "2", "262,656", "1.0", "100.0%"],
        ["logit_scale", "1", "1", "0.0", "0.0%"],
        ["total", "3", "262,657", "1.0", "100.0%"],
    ]


@pytest.fixture
def profiler(monkeypatch):
    calls = []
    monkeypatch.setattr(observe.jax.profiler, "start_trace", lambda path: calls.append(path))
    monkeypatch.setattr(observe.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def test_a_profile_that_cannot_be_copied_ends_no_training(profiler, monkeypatch, caplog):
    def unreachable(*_):
        raise observe.remote.RemoteError("gs://bucket/run: the bucket cannot be reached")

    monkeypatch.setattr(observe.remote, "upload", unreachable)
    monkeypatch.setattr(ProfileTrigger, "_is_asked", lambda _: False)
    trigger = ProfileTrigger("gs://bucket/run", start=1, steps=1)
    trigger.before(1)
    trigger.after(1, jnp.ones(()))
    assert profiler[1:] == ["stop"]
    assert f"The profile stays in {profiler[0]}: gs://bucket/run" in caplog.text


def drive(trigger, calls, steps):
    """{step: calls to the profiler around it}."""
    seen = {}
    for step in steps:
        before = len(calls)
        trigger.before(step)
        trigger.after(step, jnp.ones(()))
        if calls[before:]:
            seen[step] = calls[before:]
    return seen


def test_profile_of_configured_steps(tmp_path, profiler):
    trigger = ProfileTrigger(tmp_path, start=3, steps=2)
    assert drive(trigger, profiler, range(1, 8)) == {3: [str(tmp_path)], 4: ["stop"]}
    assert drive(ProfileTrigger(tmp_path), profiler, range(1, 8)) == {}
    with pytest.raises(ValueError, match=r"train.profile_steps is 0"):
        ProfileTrigger(tmp_path, steps=0)


def test_profile_on_demand(tmp_path, profiler):
    trigger = ProfileTrigger(tmp_path, steps=1)
    assert drive(trigger, profiler, (1, 2)) == {}
    (tmp_path / "PROFILE").touch()
    assert drive(trigger, profiler, (3, 4)) == {3: [str(tmp_path), "stop"]}
    assert not (tmp_path / "PROFILE").exists()
    (tmp_path / "PROFILE").touch()
    trigger = ProfileTrigger(tmp_path, steps=5)
    assert drive(trigger, profiler, (5, 6)) == {5: [str(tmp_path)]}
    trigger.close()  # training ended within the profile
    trigger.close()
    assert profiler[-2:] == [str(tmp_path), "stop"]


def test_quiet_libraries_hides_orbax_chatter_only():
    logger = absl_logging.get_absl_logger()
    before = list(logger.filters)
    observe.quiet_libraries()
    (added,) = [f for f in logger.filters if f not in before]
    logger.removeFilter(added)

    def record(path, level, text="text"):
        return logging.LogRecord("absl", level, path, 1, text, None, None)

    assert not added(record("/x/site-packages/orbax/checkpoint/a.py", logging.INFO))
    assert added(record("/x/site-packages/orbax/checkpoint/a.py", logging.WARNING))
    without_scores = "Requested `tracked_metric`; did not provide metrics."
    assert not added(record("/x/orbax/checkpoint/a.py", logging.WARNING, without_scores))
    assert added(record("/x/oneformer_jax/train/loop.py", logging.INFO))
    assert not logging.getLogger("jax._src.xla_bridge").isEnabledFor(logging.INFO)


def test_quiet_libraries_is_idempotent(monkeypatch):
    logger, handler = absl_logging.get_absl_logger(), absl_logging.get_absl_handler()
    monkeypatch.setattr(logger, "filters", list(logger.filters))
    monkeypatch.setattr(handler, "formatter", handler.formatter)
    observe.quiet_libraries()
    count = len(logger.filters)
    observe.quiet_libraries()
    assert len(logger.filters) == count

    def record(path, level, text):
        return logger.makeRecord("absl", level, path, 1, text, None, None)

    tfds = "/site-packages/tensorflow_datasets/core/dataset_info.py"
    assert not logger.filter(record(tfds, 20, "Load dataset info"))
    assert not logger.filter(record(tfds, 30, "Using custom data configuration: x"))
    assert logger.filter(record(tfds, 30, "the download is damaged"))
    line = handler.format(record("/oneformer_jax/train/loop.py", 20, "step 3"))
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 3", line)
    warning = handler.format(record("/oneformer_jax/train/loop.py", 30, "odd"))
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING odd", warning)
