"""Test-time augmentation against a plain average of full-size class scores, and its settings."""

import cv2
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax.configs import common
from oneformer_jax.eval import tta
from oneformer_jax.eval.evaluate import evaluate, format_results
from oneformer_jax.eval.postprocess import PostprocessConfig
from oneformer_jax.eval.tta import SemanticScores, TtaConfig, with_mirrored
from tests.eval.test_evaluate import METADATA as BLOCKS
from tests.eval.test_evaluate import Oracle, make_batches
from tests.eval.test_postprocess import CLASSES, METADATA, QUERIES, sigmoid, softmax

ORIGINAL_SIZE = np.array([[64, 96], [77, 140], [211, 197], [33, 41]])
# (padded input, image sizes within it) of two views.
VIEWS = (
    ((64, 96), np.array([[64, 96], [50, 91], [37, 60], [64, 70]])),
    ((96, 128), np.array([[96, 120], [75, 128], [64, 61], [90, 99]])),
)


def random_view(seed, padded):
    rng = np.random.default_rng(seed)
    classes = rng.normal(size=(4, QUERIES, CLASSES + 1)).astype(np.float32) * 2
    masks = rng.normal(size=(4, QUERIES, padded[0] // 4, padded[1] // 4)).astype(np.float32) * 4
    return classes, masks


def average_scores(b):
    """float64 [K, H, W]: the official average of the four passes, in full-size arrays."""
    height, width = ORIGINAL_SIZE[b]
    total = 0
    for seed, ((padded, sizes), flip) in enumerate(passes()):
        classes, masks = (x[b] for x in random_view(seed, padded))
        h, w = sizes[b]
        full = [cv2.resize(m, padded[::-1], interpolation=cv2.INTER_LINEAR)[:h, :w] for m in masks]
        full = [cv2.resize(m, (width, height), interpolation=cv2.INTER_LINEAR) for m in full]
        scores = np.einsum("qc,qhw->chw", softmax(classes)[:, :-1], sigmoid(np.stack(full)))
        total = total + (scores[:, :, ::-1] if flip else scores)
    return total / 4


def passes():
    return [(view, flip) for view in VIEWS for flip in (False, True)]


def summed(place=lambda x: x):
    scores = SemanticScores(ORIGINAL_SIZE, METADATA)
    for seed, ((padded, sizes), flip) in enumerate(passes()):
        logits = (place(x) for x in random_view(seed, padded))
        scores.add(*logits, sizes, padded, flip=flip)
    return scores


@pytest.fixture(scope="module")
def one_device():
    return list(summed().result())


def test_class_maps_are_those_of_the_averaged_scores(one_device):
    for b, result in enumerate(one_device):
        expected = average_scores(b)
        assert result.class_map.dtype == np.int32
        assert result.class_map.shape == tuple(ORIGINAL_SIZE[b])
        # Where the two best classes are as good as equal, rounding decides.
        best = np.sort(expected, axis=0)
        clear = best[-1] - best[-2] > 1e-4
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(result.class_map[clear], expected.argmax(0)[clear])


def test_every_pass_matters(one_device):
    alone = SemanticScores(ORIGINAL_SIZE, METADATA)
    padded, sizes = VIEWS[0]
    alone.add(*random_view(0, padded), sizes, padded, flip=False)
    for first, all_four in zip(alone.result(), one_device, strict=True):
        assert (first.class_map != all_four.class_map).mean() > 0.1


def test_batch_sharded_over_devices_gives_the_same(one_device):
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    scores = summed(lambda x: jax.device_put(x, NamedSharding(mesh, P("batch"))))
    assert len(scores._total.sharding.device_set) == 2
    for a, b in zip(scores.result(), one_device, strict=True):
        np.testing.assert_array_equal(a.class_map, b.class_map)


def test_memory_is_one_sum_and_a_strip():
    """A Cityscapes image with 250 queries: the sum is changed in place, 160 MB for 19 classes."""
    f32, spec = np.float32, jax.ShapeDtypeStruct
    compiled = tta._add.lower(
        spec((1, 16, 19, 64, 2048), f32),
        spec((1, 250, 20), f32),
        spec((1, 250, 256, 512), f32),
        spec((1, 2), np.int32),
        spec((1, 2), np.int32),
        spec((), bool),
        padded_size=(1024, 2048),
        canvas=(1024, 2048),
        mesh=None,
    ).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 19 * 1024 * 2048
    assert memory.temp_size_in_bytes < 700e6


def test_views_are_mirrored_within_their_size():
    image = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    size = np.array([[4, 6], [3, 5]])
    image[1, 3:] = image[1, :, 5:] = 0
    plain, mirrored = with_mirrored([dict(image=image, image_size=size)], flip=True)
    assert [plain[1], mirrored[1]] == [False, True]
    np.testing.assert_array_equal(plain[0]["image"], image)
    np.testing.assert_array_equal(mirrored[0]["image"][0], image[0, :, ::-1])
    np.testing.assert_array_equal(mirrored[0]["image"][1, :3, :5], image[1, :3, 4::-1])
    assert not mirrored[0]["image"][1, 3:].any() and not mirrored[0]["image"][1, :, 5:].any()
    assert len(list(with_mirrored([plain[0]] * 3, flip=False))) == 3


# -------------------------------------------------------------------------------- the evaluation


def batches_with_views(count=3):
    for batch in make_batches(range(count)):
        view = {name: batch[name] for name in ("image", "image_size")}
        yield {**batch, "views": [view, {**view, "image": view["image"] + 1}]}


class HalfRight(Oracle):
    """Sees the truth in images of value 0, not quite sure, and calls all "grass" in others."""

    def decode(self, batch, task):
        classes, masks = map(np.array, super().decode(batch, task))
        if batch["image"].max() > 0:
            classes[..., 2] += 30
        else:
            classes /= 10  # probability 0.65
        return classes, masks


def test_evaluation_scores_the_views():
    settings = dict(metadata=BLOCKS, postprocess=PostprocessConfig(topk=12))
    seen = []

    class Model(Oracle):
        def decode(self, batch, task):
            seen.append((task, int(batch["image"].max())))
            return super().decode(batch, task)

    model = Model()
    config = TtaConfig((64, 65), 100, flip=False)
    result = evaluate(model, batches_with_views(), tta=config, **settings)
    assert result.metrics["semantic/mIoU"] == pytest.approx(100)
    assert result.images == 3 and result.tta
    assert "semantic with test-time augmentation" in format_results(result, BLOCKS)
    # Two batches: the other tasks see the plain image, the semantic one both views.
    once = [("panoptic", 0), ("instance", 0), ("semantic", 0), ("semantic", 1)]
    assert seen == once * 2
    assert model.encoded == 3 * 2
    # The views are averaged, and the surer one is wrong.
    outputs = dict(outputs=("semantic",))
    worse = evaluate(HalfRight(), batches_with_views(), tta=config, **outputs, **settings)
    assert worse.metrics["semantic/mIoU"] < 90
    plain = evaluate(HalfRight(), batches_with_views(), **outputs, **settings)
    assert plain.metrics["semantic/mIoU"] == pytest.approx(100)


def test_a_batch_without_views_is_refused():
    settings = dict(metadata=BLOCKS, postprocess=PostprocessConfig(topk=12))
    model = Oracle()
    config = TtaConfig((64,), 64)
    with pytest.raises(ValueError, match="needs 1 views of each batch, but it has 0"):
        evaluate(model, make_batches(range(2)), tta=config, **settings)


def test_a_batch_of_fillers_only_is_run_but_not_scored():
    filler = next(batches_with_views(1))
    filler = filler | {"valid": np.zeros(2, bool), "records": [None, None]}
    model = Oracle()
    result = evaluate(
        model,
        [*batches_with_views(2), filler],
        outputs=("semantic",),
        tta=TtaConfig((64, 64), 64),
        metadata=BLOCKS,
        postprocess=PostprocessConfig(),
    )
    assert result.images == 2
    assert len(model.tokens) == 8  # two batches, two views, mirrored or not


# ---------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("short_edge", "edges", "max_size"),
    [
        (512, (256, 384, 512, 640, 768, 896), 3584),
        (640, (320, 480, 640, 800, 960, 1120), 4480),
        (1280, (640, 960, 1280, 1600, 1920, 2240), 8960),
    ],
)
def test_default_views_are_the_official_ones_of_ade20k(short_edge, edges, max_size):
    settings = common.get_base().eval.tta
    assert TtaConfig.from_settings(settings, short_edge) == TtaConfig(edges, max_size, flip=True)


@pytest.mark.parametrize("short_edge", [8, 65_536])
def test_every_test_size_has_default_views(short_edge):
    made = TtaConfig.from_settings({}, short_edge)
    assert len(made.short_edges) == 6 and made.short_edges[2] == short_edge


def test_settings_of_cityscapes():
    config = common.get_base()
    config.eval.tta.max_size = 4096
    made = TtaConfig.from_settings(config.eval.tta, 1024)
    assert made == TtaConfig((512, 768, 1024, 1280, 1536, 1792), 4096)
    config.eval.tta.short_edges = (512, 768)
    config.eval.tta.flip = False
    made = TtaConfig.from_settings(config.eval.tta, 2048)
    assert made == TtaConfig((512, 768), 4096, flip=False)


def test_bad_settings_name_their_key():
    with pytest.raises(ValueError, match=r"eval\.tta\.short_edges is \(0, 5\)"):
        TtaConfig((0, 5), 10)
    with pytest.raises(ValueError, match=r"eval\.tta\.max_size is 10.*the largest.*20"):
        TtaConfig((8, 20), 10)
