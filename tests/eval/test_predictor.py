"""Encoding once, decoding for each task: the results are those of single calls, bit by bit."""

import dataclasses

import jax
import numpy as np
import pytest

from oneformer_jax.eval import predict, prediction
from oneformer_jax.eval.predictor import Predictor
from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution
from oneformer_jax.types import TASKS
from tests import tiny
from tests.eval.test_predict import (
    CONFIG,
    LENIENT,
    METADATA,
    SIZE,
    assert_same,
    picture,
    segmenter,
)

# Sizes of one strip and of several, padded or not, and every kind of model.
VARIANTS = [
    ("task", {}, (48, 70)),
    ("task", {}, (64, 96)),
    ("task", {}, (300, 110)),
    ("task", {"dtype": "bfloat16"}, (48, 70)),
    ("learned", {}, (48, 70)),
    ("no_token", {"scan_layers": True}, (48, 70)),
]


@pytest.mark.parametrize(("queries", "how", "size"), VARIANTS)
def test_all_tasks_at_once_are_bit_equal_to_single_calls(queries, how, size):
    config = dataclasses.replace(CONFIG, decoder_layers=3, queries=queries)
    options = dict(postprocess=LENIENT, test_size=SIZE, execution=Execution(**how))
    model = tiny.random_model(config)[1:]
    self = predict.Segmenter(config, *model, METADATA, **options)
    image = picture(*size)
    single = {task: self(image, task) for task in TASKS}
    together = self(image, "all")
    assert tuple(together) == TASKS
    for task in TASKS:
        assert_same(together[task], single[task])
        assert together[task].image is image
    # Whatever ran before, and also from a Segmenter of its own.
    other = predict.Segmenter(config, *model, METADATA, **options)
    for task, found in other(image, ("semantic", "panoptic")).items():
        assert_same(found, single[task])


def test_the_logits_of_all_tasks_are_bit_equal_to_those_of_single_calls(monkeypatch):
    """Thresholds could hide a difference."""
    seen = []
    segment_images = prediction.segment_images

    def spy(*logits, **rest):
        seen.append([np.asarray(x) for x in logits[:2]])
        return segment_images(*logits, **rest)

    monkeypatch.setattr(prediction, "segment_images", spy)
    image = picture(seed=1)
    segmenter()(image, "all")
    for task in TASKS:
        segmenter()(image, task)
    for a, b in zip(seen[:3], seen[3:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(seen[0][0], seen[1][0])


def test_an_image_is_encoded_once_for_all_tasks(monkeypatch):
    self, calls = segmenter(), []
    programs = self._predictor.programs

    def counted(name):
        return lambda *args: calls.append(name) or getattr(programs, name)(*args)

    spies = functional.Programs(counted("encode"), counted("decode"))
    monkeypatch.setattr(self._predictor, "programs", spies)
    self(picture(), "all")
    assert calls == ["encode", "decode", "decode", "decode"]
    calls.clear()
    assert list(self(picture(), ["instance", "semantic", "instance"])) == ["instance", "semantic"]
    assert calls == ["encode", "decode", "decode"]


@pytest.mark.parametrize("devices", [None, 2])
def test_everything_is_moved_to_the_devices_on_purpose(devices):
    """So that a run may forbid all other transfers."""
    graph, params, stats = tiny.random_model(CONFIG)
    mesh = devices and jax.make_mesh(
        (devices,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    place = mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, stats = jax.device_put((params, stats), place)
    predictor = Predictor(functional.programs(graph, mesh), params, stats, mesh)
    batch = dict(image=np.zeros((2, 64, 64, 3), np.uint8), image_size=np.full((2, 2), 64))
    with jax.transfer_guard("disallow"):
        logits = predictor.decode(predictor.encode(batch), "instance")
    assert [len(x.sharding.device_set) for x in logits] == [devices or 1] * 2
    if devices:
        with pytest.raises(ValueError, match="batch of 1 images is not divisible by the 2 devices"):
            predictor.encode({name: array[:1] for name, array in batch.items()})
    with pytest.raises(ValueError, match="unknown task 'all'"):
        predictor.decode(None, "all")
