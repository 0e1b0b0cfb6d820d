"""A tiny run in a bucket: trained, resumed, evaluated, used; beside the same run in a folder."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from oneformer_jax import files, remote, report
from oneformer_jax.eval import inputs
from oneformer_jax.input_pipeline import array_records, images, sources
from oneformer_jax.remote import RemoteError
from oneformer_jax.train import loop, observe, sharding, tensorboard
from oneformer_jax.train.checkpoint import load_for_inference
from tests import tiny
from tests.eval.tiny_segmenter import Fake, assert_same_result, picture, predict_files
from tests.input_pipeline import prepared_scenes
from tests.train import eval_scenes
from tests.train.runs import STEPS, Batches, make_config
from tests.train.test_observe import read_events
from tests.train.test_replay import STATE, metrics, run_replay, toy, watch  # noqa: F401


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def train(workdir, batches=None, **overrides):
    settings = {"train__pictures": 1, "train__eval_every": 4, "train__steps": 4} | overrides
    return loop.train(
        make_config(**settings),
        str(workdir),
        metadata=tiny.metadata(),
        text_table=tiny.text_table(),
        train_batches=batches or Batches(),
        eval_batches=eval_scenes.batches,
        mesh=one_device(),
    )


def lines(workdir):
    """metrics.jsonl without what the clock says."""
    text = (remote.path_of(workdir) / observe.METRICS_FILE).read_text()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time")}
        for line in text.splitlines()
    ]


def leaves(workdir):
    found = load_for_inference(workdir, use_ema=False)
    return tiny.leaves([found.params, found.stats])


def test_a_run_in_a_bucket_that_stops_leaves_checkpoint_and_logs(
    tmp_path, server, bucket, url, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = {"train__eval_every": 0, "train__pictures": 0, "train__steps": STEPS}
    with pytest.raises(ValueError, match="ended"):
        train(url, Batches({4: lambda batch: None}), **settings)
    assert load_for_inference(url).step == 2
    assert [line["step"] for line in lines(url)] == [1, 2, 3]
    assert server.objects(bucket, "runs/one/LOCK") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_of_a_folder_and_goes_on_after_a_stop(
    tmp_path, server, bucket, url, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    there = train(tmp_path / "run")
    stop = Batches({4: lambda batch: None})
    with pytest.raises(ValueError, match="ended"):
        train(url, stop)
    assert load_for_inference(url).step == 2
    assert stop.steps == [1, 2, 3]
    batches = Batches()
    assert train(url, batches) == there
    assert batches.starts == [2]
    expected = leaves(tmp_path / "run")
    for name, value in leaves(url).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert lines(url) == lines(tmp_path / "run")

    names = {name.removeprefix("runs/one/") for name in server.objects(bucket)}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    saved = {name for name in names if name.startswith("checkpoints/")}
    assert len(events) == 2
    examples = {name for name in names if name.startswith("eval/4/examples/")}
    assert "eval/4/examples/semantic_worst_1.jpg" in examples
    assert names - events - saved - examples == {
        *("config.json", "model.json", "metadata.json", "metrics.jsonl", "texts.json"),
        *("eval/4/results.json", "eval/4/examples.json", "pictures/step_0000004.png"),
        *("eval/4/confusion.json", "eval/4/confusion.png"),
    }
    assert report.write_report(url) == f"{url}/report.html"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing was written here
    for name in events:
        (tmp_path / "events").mkdir(exist_ok=True)
        content = (remote.path_of(url) / name).read_bytes()
        (tmp_path / "events" / name).write_bytes(content)
    assert {"loss/total", "semantic/mIoU"} <= read_events(tmp_path / "events").keys()

    before = server.requests
    assert train(url) == there  # nothing is left to do
    assert server.requests - before < 200

    found = loop.evaluate_workdir(
        make_config(train__pictures=0),
        url,
        metadata=tiny.metadata(),
        eval_batches=eval_scenes.batches,
        mesh=one_device(),
    )
    assert found == there
    assert lines(f"{url}/eval")[-1]["step"] == 4


def test_event_files_in_a_bucket_are_ended_when_they_are_large(bucket, url, server, monkeypatch):
    monkeypatch.setattr(tensorboard, "_LARGE", 500)
    writer = observe.make_writer(url)
    for step in range(40):
        writer.write_scalars(step, {"loss": step})
        writer.flush()
    writer.close()
    events = server.objects(bucket, "runs/one/events")
    assert len(events) > 2
    assert [line["step"] for line in lines(url)] == list(range(40))


def test_a_profile_is_asked_for_and_written_in_the_bucket(server, bucket, url, monkeypatch):
    folders = []

    def start_trace(folder):
        folders.append(pathlib.Path(folder))

    def stop_trace():
        path = folders[-1] / "plugins" / "profile" / "now" / "host.xplane.pb"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start_trace)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop_trace)
    trigger = observe.ProfileTrigger(url, steps=1)
    before = server.requests
    for step in range(1, 50):  # a request for each step would make steps slow
        trigger.before(step)
    assert server.requests - before < 5 and not folders
    remote.write(f"{url}/PROFILE", b"")
    monkeypatch.setattr(observe, "_LOOK_EVERY", 0.0)
    trigger.before(50)
    trigger.after(50)
    assert server.objects(bucket) == ["runs/one/plugins/profile/now/host.xplane.pb"]
    assert not folders[0].exists()
    server.refused[f"/b/{bucket}/"] = 403
    trigger.before(51)
    assert len(folders) == 1


def test_a_step_of_bad_numbers_is_recorded_and_replayed(url, toy):  # noqa: F811
    watcher = watch(url, "stop")
    batch = {"x": np.full(8, -3.0, np.float32), "index": np.arange(8)}
    watcher.add(8, metrics(np.nan), batch)
    with pytest.raises(observe.NonFiniteLoss):
        watcher.check(STATE)
    text = run_replay(url)
    assert "before step 8, as recorded" in text and "not finite: loss = nan" in text


# ------------------------------------------------------------------ prediction


def put_picture(path, seed):
    content = io.BytesIO()
    Image.fromarray(picture(seed=seed)).save(content, "PNG")
    files.write_atomically(path, content.getvalue())


def test_pictures_of_a_bucket_are_predicted_into_a_bucket(tmp_path, server, bucket, url):
    for name in ("a.png", "b.png"):
        put_picture(f"{url}/images/{name}", len(name))
        put_picture(tmp_path / name, len(name))
    for name in ("notes.txt", "more/c.png", ".hidden.png"):
        remote.write(f"{url}/images/{name}", b"x")
    there = predict_files(Fake(), f"{url}/images", f"{url}/results")
    here = predict_files(Fake(), tmp_path, tmp_path / "results")
    assert [path.name for path in there] == [path.name for path in here]
    for one, other in zip(there, here, strict=True):
        assert_same_result(one, other)
    assert len(server.objects(bucket, "runs/one/results/")) == len(here)
    assert predict_files(Fake(), f"{url}/images", f"{url}/results") == []  # it is done
    again = predict_files(Fake(), f"{url}/images/a.png", f"{url}/results", overwrite=True)
    assert {path.name for path in again} < {path.name for path in there}
    put_picture(f"{url}/others/a.jpg.png", 1)
    put_picture(f"{url}/others/a.png", 1)


def test_a_bad_picture_of_a_bucket_is_named(url):
    remote.write(f"{url}/images/a.png", b"no picture")
    with pytest.raises(images.ImageError, match=rf"{url}/images/a.png: .*not an image"):
        predict_files(Fake(), f"{url}/images/a.png", f"{url}/results")
    remote.write(f"{url}/images/b.png", b"no picture")
    with pytest.raises(images.ImageError, match="2 of 2 images cannot be read"):
        predict_files(Fake(), f"{url}/images", f"{url}/results")
    with pytest.raises(images.ImageError, match=f"{url}/x.png is missing"):
        inputs.read_image(f"{url}/x.png")
    with pytest.raises(images.ImageError, match=f"{url}/x.png: there is no such image file or fol"):
        predict_files(Fake(), f"{url}/x.png", f"{url}/results")
    with pytest.raises(ValueError, match="the results would mix with the images"):
        predict_files(Fake(), f"{url}/images", f"{url}/images/")


def test_results_that_may_not_be_written_are_refused_before_anything_is_read(
    server, bucket, url, tmp_path
):
    put_picture(tmp_path / "a.png", 1)
    server.refused[f"/upload/storage/v1/b/{bucket}/"] = 403
    with pytest.raises(RemoteError, match="permission is denied"):
        predict_files(Fake(lambda *unused: pytest.fail("it runs")), tmp_path, f"{url}/results")


# ------------------------------------------------------------------ data


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return prepared_scenes.make(tmp_path_factory.mktemp("scenes"))


def open_scenes(data_dir, split="train"):
    options = prepared_scenes.OPTIONS
    return sources.open_source("synthetic", data_dir=data_dir, split=split, options=options)


def test_records_of_a_bucket_are_those_of_the_folder(scenes, url):
    remote.upload(scenes.parents[2], url)
    here, info = open_scenes(scenes.parents[2])
    there, same = open_scenes(url)
    assert (len(there), same) == (len(here), info)
    for index in range(len(here)):
        for get in (lambda source, i=index: source[i], lambda source, i=index: source.compact(i)):
            one, other = get(here), get(there)
            assert one.keys() == other.keys()
            np.testing.assert_array_equal(one["image"], other["image"])
    assert there._files.where(0).startswith(url)


def test_data_that_is_not_prepared_or_not_whole(scenes, server, bucket, url):
    with pytest.raises(FileNotFoundError, match=r"no prepared dataset in gs://.*; prepare it in a"):
        open_scenes(url)
    with pytest.raises(
        FileNotFoundError, match=r"(?s)coco is not prepared .*--data_dir=FOLDER\nand cop"
    ):
        sources.open_source("coco", data_dir=url, split="train")
    with pytest.raises(RemoteError, match="there is no bucket 'nobodys'"):
        open_scenes("gs://nobodys/data")
    with pytest.raises((ValueError, RemoteError), match=r"ArrayRecord reads gs:// only|needs s3fs"):
        open_scenes("s3://bucket/data")
    with pytest.raises(ValueError, match="semantic_folder reads its own files, which cannot be in"):
        sources.open_source("semantic_folder", data_dir=url, split="train")
    remote.upload(scenes.parents[2], url)
    (name,) = (n for n in remote.sizes(remote.path_of(url)) if "-train.array_record" in n)
    remote.remove(remote.path_of(url) / name)
    folder = (remote.path_of(url) / name).parent
    assert not sources.is_prepared(folder)
    with pytest.raises(array_records.RecordError, match=rf"{url}.*array_record"):
        open_scenes(url)[0][0]
    server.refused[f"/b/{bucket}/"] = 403
    with pytest.raises(RemoteError, match="permission is denied"):
        open_scenes(url)
