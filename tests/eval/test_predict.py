"""From files and arrays to files: a tiny real model, and the formats that others read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from oneformer_jax import compilation
from oneformer_jax.eval import predict, prediction
from oneformer_jax.eval.postprocess import PostprocessConfig
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.tta import TtaConfig
from oneformer_jax.input_pipeline import resize
from oneformer_jax.input_pipeline.eval_loader import EvalLoaderConfig, eval_loader
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.types import TASK_TOKENS, TASKS
from tests.eval.tiny_segmenter import (
    CONFIG,
    LENIENT,
    METADATA,
    SIZE,
    picture,
    segmenter,
    state,
)

# --- arrays ---


@pytest.mark.parametrize("task", TASKS)
def test_segmenter_gives_a_result_of_the_image_size(task):
    image = picture()
    result = segmenter()(image, task=task)
    assert result.task == task and result.size == (48, 70)
    assert result.image is image
    assert result.overlay().shape == image.shape
    if task == "panoptic":
        assert set(np.unique(result.segments)) - {0} == {i["id"] for i in result.segments_info}
    elif task == "instance":
        assert len(result.masks) == len(result.scores) == len(result.labels)


def assert_same(a, b):
    """Two segmentations are equal, bit by bit."""
    assert a.task == b.task and a.segments_info == b.segments_info
    for name in ("segments", "class_map", "masks", "scores", "labels"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, name)


def test_one_name_gives_a_segmentation_and_several_a_dict():
    assert isinstance(segmenter()(picture()), Segmentation)
    assert isinstance(segmenter()(picture(), "semantic"), Segmentation)
    found = segmenter()(picture(), ("semantic",))
    assert list(found) == ["semantic"] and isinstance(found["semantic"], Segmentation)


def prepared(image):
    """A 48 x 70 image in the official evaluation: 64 x 93.3 -> 64 x 93, then zeros."""
    resized = np.asarray(Image.fromarray(image).resize((93, 64), Image.Resampling.BILINEAR))
    normal = (resized - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    padded = np.zeros((64, 96, 3), np.float32)
    padded[:, :93] = normal
    return padded


@pytest.fixture(scope="module")
def raw(mesh8):
    """Outputs for 8 times the same image under the tasks 0, 1, 2, 0, 1, ... on 8 devices."""
    sharded = predict.Segmenter(CONFIG, *state(), METADATA, mesh=mesh8)
    tokens = np.stack([sharded.task_tokens(TASKS[b % 3]) for b in range(8)])
    return sharded.raw(np.repeat(prepared(picture())[None], 8, 0), tokens)


@pytest.mark.parametrize("task", TASKS)
def test_segmenter_prepares_the_image_as_the_official_evaluation_does(monkeypatch, raw, task):
    seen = {}

    def spy(class_logits, mask_logits, image_size, original_size, padded_size, **rest):
        seen.update(image_size=image_size, original_size=original_size, padded_size=padded_size)
        seen.update(class_logits=class_logits, mask_logits=mask_logits)
        return segment_images(
            class_logits, mask_logits, image_size, original_size, padded_size, **rest
        )

    segment_images = prediction.segment_images
    monkeypatch.setattr(prediction, "segment_images", spy)
    segmenter()(picture(), task)
    assert seen["image_size"].tolist() == [[64, 93]]
    assert seen["original_size"].tolist() == [[48, 70]]
    assert seen["padded_size"] == (64, 96)
    row = TASKS.index(task)
    np.testing.assert_allclose(seen["class_logits"][0], raw.class_logits[row], atol=1e-4)
    np.testing.assert_allclose(seen["mask_logits"][0], raw.mask_logits[row], atol=1e-3)


def test_segmenter_averages_views_of_the_resized_image(monkeypatch):
    """The sizes are made from the 64 x 93 image of the test, and each is mirrored too."""
    image = picture()
    resized = resize.resize_for_test(image, *SIZE)
    seen = []

    def spy(view):
        seen.append(view)
        return encode(view)

    views = TtaConfig((32, 64), 80)
    model = predict.Segmenter(CONFIG, *state(), METADATA, test_size=SIZE, tta=views)
    encode = model._encode
    monkeypatch.setattr(model, "_encode", spy)
    result = model(image, "semantic", tta=True)
    assert result.class_map.shape == image.shape[:2] and result.image is image
    sizes = [(32, 47), (32, 47), (55, 80), (55, 80)]  # the longer side is capped
    padded = [(32, 64), (32, 64), (64, 96), (64, 96)]
    assert [tuple(v["image_size"][0]) for v in seen] == sizes
    assert [v["image"].shape[1:3] for v in seen] == padded
    for view, mirrored in zip(seen, (False, True, False, True), strict=True):
        height, width = view["image_size"][0]
        expected = np.asarray(
            Image.fromarray(resized).resize((width, height), Image.Resampling.BILINEAR)
        )
        expected = expected[:, ::-1] if mirrored else expected
        np.testing.assert_array_equal(view["image"][0, :height, :width], expected)
        assert not view["image"][0, height:].any() and not view["image"][0, :, width:].any()
    several = model(image, ["semantic"], tta=True)
    assert_same(several["semantic"], result)
    for task in ("panoptic", "all", ("semantic", "instance")):
        with pytest.raises(ValueError, match=r"semantic task only, not for .*(panoptic|all|inst)"):
            model(image, task, tta=True)


def test_raw_outputs_have_every_prediction(raw):
    queries, classes, layers = CONFIG.num_queries, CONFIG.num_classes, CONFIG.decoder_layers
    assert raw.class_logits.shape == (8, queries, classes + 1)
    assert raw.mask_logits.shape == (8, queries, 16, 24)
    assert raw.aux_class_logits.shape == (layers, 8, queries, classes + 1)
    assert raw.aux_mask_logits.shape == (layers, 8, queries, 16, 24)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(raw))
    assert not np.allclose(raw.aux_class_logits[-1], raw.class_logits)


def test_raw_takes_a_batch_that_the_devices_do_not_divide(raw, mesh8):
    sharded = predict.Segmenter(CONFIG, *state(), METADATA, mesh=mesh8)
    tokens = np.stack([sharded.task_tokens(task) for task in TASKS])
    found = sharded.raw(np.repeat(prepared(picture())[None], 3, 0), tokens)
    assert found.class_logits.shape[0] == found.aux_mask_logits.shape[1] == 3
    np.testing.assert_allclose(found.class_logits, raw.class_logits[:3], atol=1e-5)
    np.testing.assert_allclose(found.aux_mask_logits, raw.aux_mask_logits[:, :3], atol=1e-4)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_one_image_on_a_mesh_runs_kernels_on_each_device(monkeypatch, axis_type):
    """A kernel cannot do without the mesh: it gets one image there, and the result is the same."""
    from oneformer_jax.kernels.ms_deform_attn import api

    plain = segmenter()(picture(), "semantic")
    batches = []
    load = api.load

    def recording(implementation):
        assert implementation == "pallas_tpu"

        def run(value, *rest):
            batches.append(value.shape[0])
            return load("xla")(value, *rest)

        return run

    monkeypatch.setattr(api, "load", recording)
    types = (getattr(jax.sharding.AxisType, axis_type),)
    mesh = jax.make_mesh((4,), ("x",), axis_types=types, devices=jax.devices()[:4])
    how = Execution(kernels=Kernels(deform_attn="pallas_tpu"))
    settings = dict(postprocess=LENIENT, test_size=SIZE, execution=how)
    sharded = predict.Segmenter(CONFIG, *state(), METADATA, mesh=mesh, **settings)
    features = sharded._encode(
        dict(image=np.zeros((1, 64, 96, 3), np.uint8), image_size=[[64, 93]])
    )
    assert features.mask_features.sharding.shard_shape(features.mask_features.shape)[0] == 1
    found = sharded(picture(), "all")
    assert batches == [1]
    for task in TASKS:
        assert_same(found[task], sharded(picture(), task))
        assert found[task].size == (48, 70)
    assert (found["semantic"].class_map != plain.class_map).mean() < 0.01


def test_raw_shares_the_batch_among_the_devices(raw):
    assert len(raw.class_logits.sharding.device_set) == 8
    assert not raw.class_logits.sharding.is_fully_replicated
    np.testing.assert_allclose(raw.class_logits[0], raw.class_logits[6], atol=1e-5)


def test_the_task_reaches_the_model(raw):
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not np.allclose(raw.class_logits[a], raw.class_logits[b], atol=1e-3)


def test_task_tokens():
    np.testing.assert_array_equal(segmenter().task_tokens("semantic"), TASK_TOKENS[2])
    assert segmenter().task_tokens("semantic").dtype == np.int32
    assert segmenter().task_tokens("instance")[:6].tolist() == [
        49406,
        518,
        10549,
        533,
        34572,
        49407,
    ]


def test_parameters_are_arguments_of_the_programs():
    """As constants they would be copied into each of the programs."""
    self = segmenter()
    programs = self._predictor.programs
    arrays = (np.zeros((1, *SIZE, 3), np.uint8), np.array([SIZE], np.int32))

    def run(params):
        features = programs.encode(params, self._stats, *arrays)
        return programs.decode(params, self._stats, features, TASK_TOKENS[0])[0]

    assert np.abs(run(self._params)).max() > 0
    compiled = [program.jitted._cache_size() for program in programs]
    assert not run(jax.tree.map(jnp.zeros_like, self._params)).any()
    assert [program.jitted._cache_size() for program in programs] == compiled
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((self._params, self._stats)))


def test_parameters_of_the_text_branch_are_left_out():
    assert "text_encoder" in state()[0]
    assert not {"text_encoder", "text_projector", "prompt_ctx"} & set(segmenter()._params)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match=r"unknown task 'depth'.*panoptic"):
        segmenter()(picture(), task="depth")
    for task in (("panoptic", "depth"), None, 3):
        with pytest.raises(ValueError, match=r"unknown task (None|3|'depth')"):
            segmenter()(picture(), task=task)
    with pytest.raises(ValueError, match="no task is given; use some of panoptic"):
        segmenter()(picture(), task=())
    for threshold in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"^threshold is {threshold}; it must be a number"):
            segmenter()(picture(), "instance", threshold=threshold)
    with pytest.raises(ValueError, match="threshold: the semantic task"):
        segmenter()(picture(), "semantic", threshold=0.5)
    tokens = TASK_TOKENS[:1]
    with pytest.raises(ValueError, match="multiples of 32"):
        segmenter().raw(jnp.zeros((1, 60, 64, 3)), tokens)
    with pytest.raises(ValueError, match="uint8; expected normalised"):
        segmenter().raw(jnp.zeros((1, 64, 64, 3), jnp.uint8), tokens)
    with pytest.raises(ValueError, match=r"task_tokens have shape.*\(2, 77\)"):
        segmenter().raw(jnp.zeros((2, 64, 64, 3)), tokens)


def test_parameters_of_another_model_are_refused():
    params, stats = state()
    with pytest.raises(ValueError, match=r"has shape \(\d+.*another model"):
        predict.Segmenter(dataclasses.replace(CONFIG, num_queries=9), params, stats, METADATA)
    rest = {name: value for name, value in params.items() if name != "task_mlp"}
    with pytest.raises(ValueError, match=r"task_mlp.*another model"):
        predict.Segmenter(CONFIG, rest, stats, METADATA)
    with pytest.raises(ValueError, match="the model has 6 classes, but tiny has 5"):
        predict.Segmenter(dataclasses.replace(CONFIG, num_classes=6), params, stats, METADATA)
    with pytest.raises(ValueError, match="test_size"):
        predict.Segmenter(CONFIG, params, stats, METADATA, test_size=(100, 90))
    with pytest.raises(ValueError, match=r"^eval\.short_edge is 0; it must be an integer from 8"):
        predict.Segmenter(CONFIG, params, stats, METADATA, test_size=(0.5, 90))
    with pytest.raises(ValueError, match=r"eval\.bucket_multiple is 48"):
        predict.Segmenter(CONFIG, params, stats, METADATA, bucket_multiple=48)


def test_settings_of_a_run_and_overrides():
    settings = dict(short_edge=64, max_size=96, topk=7, batch_size=8, tasks=["panoptic"])
    build = functools.partial(predict.Segmenter.from_settings, CONFIG, *state(), METADATA, settings)
    made = build(topk=9, overlap_threshold=0.5)
    assert made.test_size == (64, 96)
    assert made.tta == TtaConfig((32, 48, 64, 80, 96, 112), 448)
    other = build(tta=dict(short_edges=(9,), max_size=0, flip=False))
    assert other.tta == TtaConfig((9,), 448, flip=False)
    settings["tta"] = dict(enabled=True, short_edges=(32, 40), max_size=50, flip=True)
    assert build(tta=dict(flip=False)).tta == TtaConfig((32, 40), 50, flip=False)
    assert made.postprocess == PostprocessConfig(topk=9, overlap_threshold=0.5)
    with pytest.raises(ValueError, match=r"unknown setting 'top_k'.*topk"):
        build(top_k=9)


class Blind:
    """A model on its devices that finds nothing; it keeps the batches that it was shown."""

    def __init__(self):
        self.seen = []

    def encode(self, batch):
        self.seen.append(batch)
        return batch["image"].shape

    def compile(self, shape):
        del shape

    def decode(self, shape, task):
        batch, height, width, _ = shape
        classes = np.zeros((batch, CONFIG.num_queries, CONFIG.num_classes + 1), np.float32)
        masks = np.zeros((batch, CONFIG.num_queries, height // 4, width // 4), np.float32)
        return jnp.asarray(classes), jnp.asarray(masks)


def blind(**options):
    """A Segmenter whose model is `Blind`, and the batches that it is shown."""
    model = predict.Segmenter(CONFIG, *state(), METADATA, test_size=SIZE, **options)
    model._predictor = Blind()
    return model, model._predictor.seen


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 200), (48, 96)), ((48, 70), (64, 93)), ((70, 48), (93, 64)), ((64, 64), (64, 64))],
)
def test_prediction_and_evaluation_show_the_model_the_same_pixels(size, expected):
    image = picture(*size)
    model, seen = blind(tta=TtaConfig((32, 80), 100, flip=False))
    model(image, "semantic")
    model(image, "semantic", tta=True)
    options = {"tta_short_edges": (32, 80), "tta_max_size": 100}
    config = EvalLoaderConfig(batch_size=1, short_edge=64, max_size=96, **options)
    (batch,) = eval_loader([{"image": image, "file_name": "a"}], config)
    assert seen[0]["image_size"].tolist() == [list(expected)]
    for view, shown in zip([batch, *batch["views"]], seen, strict=True):
        for name in ("image", "image_size"):
            np.testing.assert_array_equal(view[name], shown[name])


# --- several images ---


SIZES = ((48, 70), (70, 48), (48, 71), (100, 200), (48, 70))


def test_a_list_of_images_of_any_sizes_gives_what_single_calls_give():
    images = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    together = segmenter()(images, "all")
    for image, found in zip(images, together, strict=True):
        alone = segmenter()(image, "all")
        assert list(found) == list(alone)
        for task in TASKS:
            assert_same(found[task], alone[task])
            assert found[task].image is image
    assert segmenter()([], "all") == []
    (one,) = segmenter()((images[0],), "semantic")
    assert_same(one, together[0]["semantic"])


def test_batches_and_buckets_act_as_in_the_evaluation(monkeypatch):
    images = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    options = dict(postprocess=LENIENT, test_size=SIZE, batch_size=2)
    seen = []
    batched = predict.Segmenter(CONFIG, *state(), METADATA, **options)
    encode = batched._predictor.encode
    monkeypatch.setattr(
        batched._predictor, "encode", lambda batch: seen.append(batch) or encode(batch)
    )
    found = batched(images, "semantic")
    # 96 x 64 has one image, so its second row is empty.
    assert shapes(seen) == [(2, 64, 96), (2, 64, 96), (2, 96, 64)]
    alone = segmenter()(images, "semantic")
    for one, other in zip(found, alone, strict=True):
        assert (one.class_map != other.class_map).mean() < 0.01

    wide, seen = blind(max_buckets=1)
    wide(images, "semantic")
    assert shapes(seen) == [(1, 96, 96)] * 5
    coarse, seen = blind(bucket_multiple=96)
    coarse(images, "semantic")
    coarse(images[0], "semantic")
    assert shapes(seen) == [(1, 96, 96)] * 6


def shapes(batches):
    return [batch["image"].shape[:3] for batch in batches]


def test_the_programs_of_the_next_size_are_compiled_ahead_and_only_once(monkeypatch):
    model = predict.Segmenter(CONFIG, *state(), METADATA, postprocess=LENIENT, test_size=SIZE)
    compiled, calls = [], []
    compile_ahead = model._predictor.compile
    monkeypatch.setattr(
        model._predictor, "compile", lambda shape: calls.append(shape) or compile_ahead(shape)
    )
    monkeypatch.setattr(compilation, "compile_now", counting(compilation.compile_now, compiled))
    model([picture(48, 70), picture(70, 48)], "semantic")
    assert len(calls) == 1 and calls[0][0] == 1  # of the second size; the first compiled itself
    assert len(compiled) == 4 == len(set(compiled))
    programs = model._predictor.programs
    assert [program.jitted._cache_size() for program in programs] == [2, 2]


def counting(function, names):
    def counted(*arguments, name):
        names.append(name)
        return function(*arguments, name=name)

    return counted


def test_a_list_on_a_mesh_fills_the_devices():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    model = predict.Segmenter(
        CONFIG, *state(), METADATA, postprocess=LENIENT, test_size=SIZE, mesh=mesh
    )
    images = [picture(48, 70, seed) for seed in range(3)]
    for one, other in zip(model(images, "semantic"), segmenter()(images, "semantic"), strict=True):
        assert (one.class_map != other.class_map).mean() < 0.01


# --- thresholds ---


def test_a_threshold_keeps_what_is_above_it():
    everything = segmenter()(picture(), "all")
    scores = everything["instance"].scores
    assert len(scores) > 1 and (np.diff(scores) <= 0).all()
    threshold = float(np.sort(scores)[len(scores) // 2])
    kept = segmenter()(picture(), "instance", threshold=threshold)
    assert 0 < len(kept) < len(scores) and (kept.scores > threshold).all()
    (score,) = everything["panoptic"].scores
    assert len(segmenter()(picture(), threshold=float(score) - 0.01)) == 1
    assert len(segmenter()(picture(), threshold=float(score) + 0.01)) == 0
    many = segmenter()(picture(), "all", threshold=0.0)
    assert_same(many["semantic"], everything["semantic"])
    none = segmenter()(picture(), "instance", threshold=1.0)
    assert len(none) == 0 and none.masks.shape == (0, 48, 70) and none.boxes.shape == (0, 4)
