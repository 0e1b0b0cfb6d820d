"""The lines that tell how far a long job is."""

import itertools
import types
from unittest import mock

import pytest
from absl import logging

from oneformer_jax import progress
from oneformer_jax.input_pipeline import coco_instances, eval_loader, importers, statistics
from tests.input_pipeline import exports


def lines(monkeypatch, total, *moments):
    """The lines for pairs (seconds since the start, number done)."""
    seconds = iter([100.0, *(100.0 + moment for moment, _ in moments)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    log = progress.progress_log(total)
    with mock.patch.object(logging, "info") as said:
        for _, done in moments:
            log(done)
    return [call.args[0] % call.args[1:] for call in said.call_args_list]


def test_rate_and_remaining_time_are_logged_now_and_then(monkeypatch):
    found = lines(monkeypatch, 100, (5, 1), (20, 10), (30, 15), (55, 50), (99, 100))
    assert found == [
        "10 of 100 images, 0.5 a second, 3 min 0 s left",
        "50 of 100 images, 0.9 a second, 55 s left",
    ]


def test_without_a_total_the_number_is_logged(monkeypatch):
    assert lines(monkeypatch, None, (20, 0), (21, 42)) == ["42 images, 2.0 a second"]
    assert lines(monkeypatch, 41, (21, 42)) == ["42 images, 2.0 a second"]  # it was too low


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (7380, "2 h 3 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


@pytest.fixture
def slow(monkeypatch):
    """A clock by which every look at it takes 40 s."""
    clock = itertools.count(0, 40)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))


def test_a_loop_is_logged_and_gives_what_it_had(slow, caplog):
    caplog.set_level("INFO")
    assert list(progress.logged("abcde", 5, "letters")) == list("abcde")
    assert "2 of 5 letters, 0.0 a second, 3 min 0 s left" in caplog.text


def test_import_inspection_and_loading_tell_how_far_they_are(slow, tmp_path, caplog):
    caplog.set_level("INFO")
    root, out = tmp_path / "export", tmp_path / "data"
    for i in range(4):
        exports.image(root / f"{i}.jpg")
        exports.labelme_json(root / f"{i}.json", f"{i}.jpg", [exports.shape("cat", exports.CAT)])
    importers.import_export("labelme", root, out)
    assert "2 images examined" in caplog.text and "2 of 4 images copied" in caplog.text
    source = coco_instances.CocoInstanceSource(out / "images", out / "instances_train.json")
    statistics.collect(source, source.info)
    assert "of 4 images read" in caplog.text
    statistics.remarks(source, source.info)
    assert "of 4 annotations" in caplog.text
    config = eval_loader.EvalLoaderConfig(1, short_edge=64, max_size=64, bucket_multiple=32)
    eval_loader.eval_loader(source, config)
    assert "of 4 image sizes" in caplog.text
