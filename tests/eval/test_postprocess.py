"""Post-processing against a plain NumPy rendering of the official rules."""

import cv2
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax.eval import postprocess, strips
from oneformer_jax.eval.postprocess import PostprocessConfig, Segmentation, segment_batch
from oneformer_jax.types import Metadata

QUERIES, CLASSES = 12, 5
PADDED = (64, 96)
# Input sizes within the padded input, and originals: the same, larger, much larger, smaller.
IMAGE_SIZE = np.array([[64, 96], [50, 91], [37, 60], [64, 70]], np.int32)
ORIGINAL_SIZE = np.array([[64, 96], [77, 140], [211, 197], [33, 41]], np.int32)
METADATA = Metadata(
    dataset="five",
    class_names=("road", "person", "sky", "car", "dog"),
    is_thing=(False, True, False, True, True),
    colors=((1, 2, 3),) * CLASSES,
    category_ids=(7, 24, 23, 26, 30),
)


def random_logits(seed, scale=4.0):
    """Smooth masks and sure classes, so that segments overlap, win, lose and merge."""
    rng = np.random.default_rng(seed)
    classes = rng.normal(size=(4, QUERIES, CLASSES + 1)) * scale
    coarse = rng.normal(size=(4, QUERIES, 4, 6)).astype(np.float32) * 6 - 2
    masks = np.stack(
        [[cv2.resize(q, (24, 16), interpolation=cv2.INTER_CUBIC) for q in b] for b in coarse]
    )
    return classes.astype(np.float32), masks.astype(np.float32)


# --- the official rules, one image, float arrays of full size ---


def resized_masks(masks, b):
    height, width = IMAGE_SIZE[b]
    out = []
    for mask in masks:
        mask = cv2.resize(mask, PADDED[::-1], interpolation=cv2.INTER_LINEAR)[:height, :width]
        out.append(
            cv2.resize(mask, ORIGINAL_SIZE[b][::-1].tolist(), interpolation=cv2.INTER_LINEAR)
        )
    return np.stack(out).astype(np.float64)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def official_panoptic(class_logits, masks, mask_threshold, overlap_threshold):
    probabilities = softmax(class_logits)
    scores, labels = probabilities.max(-1), probabilities.argmax(-1)
    kept = np.flatnonzero((labels != CLASSES) & (scores > mask_threshold))
    result, infos, stuff = np.zeros(masks.shape[1:], np.int32), [], {}
    if not len(kept):
        return result, infos
    probability = sigmoid(masks[kept])
    winner = (scores[kept][:, None, None] * probability).argmax(0)
    for k, query in enumerate(kept):
        inside = probability[k] >= 0.5
        mask = (winner == k) & inside
        if not (winner == k).any() or not inside.any() or not mask.any():
            continue
        if (winner == k).sum() / inside.sum() < overlap_threshold:
            continue
        label = int(labels[query])
        if not METADATA.is_thing[label]:
            if label in stuff:
                result[mask] = stuff[label]
                continue
            stuff[label] = len(infos) + 1
        result[mask] = len(infos) + 1
        infos.append((len(infos) + 1, label, METADATA.is_thing[label]))
    return result, infos


def official_instances(class_logits, masks, topk, score_threshold, things_only, ade):
    p = softmax(class_logits)[:, :-1].reshape(-1)
    things = [c for c in range(CLASSES) if METADATA.is_thing[c]]
    found = []
    for index in np.argsort(-p)[:topk]:
        query, label = divmod(int(index), CLASSES)
        if p[index] <= score_threshold or (things_only and label not in things):
            continue
        mask = masks[query] > 0
        score = p[index] * (sigmoid(masks[query])[mask].sum() / (mask.sum() + 1e-6))
        found.append((mask, score, things.index(label) if ade else label))
    return found


def segment(logits, task, sizes=(IMAGE_SIZE, ORIGINAL_SIZE), **config):
    return segment_batch(
        *logits, *sizes, PADDED, task=task, config=PostprocessConfig(**config), metadata=METADATA
    )


@pytest.mark.parametrize(("mask_threshold", "overlap"), [(0.8, 0.8), (0.3, 0.5), (0.5, 0.95)])
def test_panoptic_follows_the_official_rules(mask_threshold, overlap):
    fewer_segments_than_queries = 0
    for seed in range(4):
        classes, masks = random_logits(seed)
        got = segment(
            (classes, masks),
            "panoptic",
            object_mask_threshold=mask_threshold,
            overlap_threshold=overlap,
        )
        for b, result in enumerate(got):
            segments, infos = official_panoptic(
                classes[b], resized_masks(masks[b], b), mask_threshold, overlap
            )
            assert result.segments.dtype == np.int32
            np.testing.assert_array_equal(result.segments, segments)
            found = [(i["id"], i["category_id"], i["isthing"]) for i in result.segments_info]
            assert found == infos
            areas = np.unique(segments[segments > 0], return_counts=True)[1]
            assert [i["area"] for i in result.segments_info] == areas.tolist()
            assert all(mask_threshold < i["score"] <= 1 for i in result.segments_info)
            labels = softmax(classes[b]).argmax(-1)
            sure = (labels != CLASSES) & (softmax(classes[b]).max(-1) > mask_threshold)
            fewer_segments_than_queries += sure.sum() > len(infos)
    assert fewer_segments_than_queries, "no query was merged or dropped: the cases are too easy"


def test_panoptic_without_a_kept_query_is_empty():
    classes, masks = random_logits(0)
    classes[..., -1] = 50
    for result, size in zip(segment((classes, masks), "panoptic"), ORIGINAL_SIZE, strict=True):
        assert result.segments.shape == tuple(size)
        assert not result.segments.any() and result.segments_info == []


def test_stuff_of_a_class_is_one_segment_and_things_are_not():
    """Four quadrants, all of one class: a single segment of stuff, four of things."""
    masks = np.full((4, QUERIES, 16, 24), -20, np.float32)
    for q, (y, x) in enumerate([(0, 0), (0, 12), (8, 0), (8, 12)]):
        masks[:, q, y : y + 8, x : x + 12] = 20
    for label, segments in ((2, 1), (3, 4)):
        classes = np.zeros((4, QUERIES, CLASSES + 1), np.float32)
        classes[:, :4, label] = 20
        classes[:, 4:, CLASSES] = 20
        result = segment((classes, masks), "panoptic")[0]
        assert [i["id"] for i in result.segments_info] == list(range(1, segments + 1))
        # The masks' edges fade to nothing where the four corners meet.
        assert np.count_nonzero(result.segments == 0) <= 4
        assert sum(i["area"] for i in result.segments_info) == np.count_nonzero(result.segments)


@pytest.mark.parametrize(
    "config",
    [
        dict(topk=20),
        dict(topk=20, ade_instance_remap=True),
        dict(topk=20, things_only_instances=False),
        dict(topk=1000, instance_score_threshold=0.4),
    ],
)
def test_instances_follow_the_official_rules(config):
    classes, masks = random_logits(7, scale=1.5)
    results = segment((classes, masks), "instance", **config)
    for b, result in enumerate(results):
        expected = official_instances(
            classes[b],
            resized_masks(masks[b], b),
            config["topk"],
            config.get("instance_score_threshold", 0.0),
            config.get("things_only_instances", True),
            config.get("ade_instance_remap", False),
        )
        assert result.masks.dtype == bool
        assert result.masks.shape == (len(expected), *ORIGINAL_SIZE[b])
        np.testing.assert_array_equal(result.labels, [e[2] for e in expected])
        np.testing.assert_allclose(result.scores, [e[1] for e in expected], rtol=1e-5)
        np.testing.assert_array_equal(result.masks, [e[0] for e in expected])


def test_stuff_takes_places_of_the_top_k_and_a_query_may_appear_twice():
    classes, masks = random_logits(1)
    classes[:] = -9
    classes[..., CLASSES] = 9
    classes[:, 0, :4] = (12, 11, 10, 9.5)  # stuff, thing, stuff, thing of one query
    result = segment((classes, masks), "instance", topk=4)[0]
    np.testing.assert_array_equal(result.labels, [1, 3])
    np.testing.assert_array_equal(result.masks[0], result.masks[1])
    assert segment((classes, masks), "instance", topk=3)[0].labels.tolist() == [1]


def test_ade_remap_carries_metadata_of_the_things():
    result = segment(random_logits(2), "instance", ade_instance_remap=True)[0]
    assert result.metadata.class_names == ("person", "car", "dog")
    assert result.metadata.category_ids == (24, 26, 30)
    assert result.labels.max() <= 2


def test_no_instance_above_the_threshold():
    classes, masks = random_logits(3)
    result = segment((classes * 0, masks), "instance", instance_score_threshold=0.9)[1]
    assert result.masks.shape == (0, *ORIGINAL_SIZE[1])
    assert result.scores.shape == result.labels.shape == (0,)


def test_semantic_follows_the_official_rules():
    classes, masks = random_logits(4)
    for b, result in enumerate(segment((classes, masks), "semantic")):
        full = resized_masks(masks[b], b)
        sums = np.einsum("qc,qhw->chw", softmax(classes[b])[:, :-1], sigmoid(full))
        assert result.class_map.dtype == np.int32
        np.testing.assert_array_equal(result.class_map, sums.argmax(0))


@pytest.mark.parametrize(
    "sizes", [(16, 64, 64, 64), (16, 64, 37, 200), (20, 77, 50, 13), (8, 32, 1, 5)]
)
def test_axis_weights_are_two_bilinear_resizes(sizes):
    source, padded, crop, original = sizes
    weights = jax.jit(strips.axis_weights, static_argnums=(0, 1, 2))
    weights = np.asarray(weights(256, source, padded, crop, original))
    values = np.random.default_rng(0).normal(size=(source, 1)).astype(np.float32)
    once = cv2.resize(values, (1, padded), interpolation=cv2.INTER_LINEAR)[:crop].reshape(crop, 1)
    twice = cv2.resize(once, (1, original), interpolation=cv2.INTER_LINEAR).reshape(original, 1)
    np.testing.assert_allclose(weights[:original] @ values, twice, atol=2e-5)
    assert not weights[original:].any()


def test_batch_sharded_over_devices_gives_the_same_result():
    logits = random_logits(5)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    sharding = NamedSharding(mesh, P("batch"))
    sharded = tuple(jax.device_put(x, sharding) for x in logits)
    for task, field in (("panoptic", "segments"), ("semantic", "class_map")):
        for a, b in zip(segment(logits, task), segment(sharded, task), strict=True):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    by_query = tuple(jax.device_put(x, NamedSharding(mesh, P(None, "batch"))) for x in logits)
    with pytest.raises(ValueError, match="first axis only"):
        segment(by_query, "panoptic")


def test_programs_do_not_depend_on_image_sizes_or_thresholds():
    logits = random_logits(6)
    segment(logits, "panoptic")
    before = postprocess._run._cache_size()
    segment(
        logits, "panoptic", sizes=(IMAGE_SIZE - 3, ORIGINAL_SIZE + 5), object_mask_threshold=0.4
    )
    assert postprocess._run._cache_size() == before


def test_device_memory_is_bounded_by_a_strip():
    """A Cityscapes image with 250 queries: no [Q, 1024, 2048] array (2 GB) in the program."""
    f32 = np.float32
    spec = jax.ShapeDtypeStruct
    compiled = postprocess._run.lower(
        spec((1, 250, 20), f32),
        spec((1, 250, 256, 512), f32),
        spec((1, 2), np.int32),
        spec((1, 2), np.int32),
        spec((), f32),
        task="panoptic",
        padded_size=(1024, 2048),
        canvas=(1024, 2048),
        topk=1,
        mesh=None,
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 700e6


def test_errors_name_the_way_out():
    classes, masks = random_logits(0)
    with pytest.raises(ValueError, match=r"unknown task 'depth'.*panoptic"):
        segment((classes, masks), "depth")
    with pytest.raises(ValueError, match=r"4 entries.*five has 5 classes"):
        segment((classes[..., :4], masks), "panoptic")
    with pytest.raises(ValueError, match="original_size has shape"):
        segment((classes, masks), "panoptic", sizes=(IMAGE_SIZE, ORIGINAL_SIZE[:2]))
    with pytest.raises(ValueError, match="exceeds padded_size"):
        segment((classes, masks), "panoptic", sizes=(IMAGE_SIZE + 90, ORIGINAL_SIZE))
    with pytest.raises(ValueError, match=r"overlap_threshold is 1.5"):
        PostprocessConfig(overlap_threshold=1.5)
    with pytest.raises(ValueError, match="topk is 0"):
        PostprocessConfig(topk=0)
    with pytest.raises(ValueError, match="things_only_instances"):
        PostprocessConfig(ade_instance_remap=True, things_only_instances=False)


def test_ground_truth_of_a_record():
    panoptic = np.array([[0, 5, 5], [9, 9, 2]], np.int32)
    record = dict(
        image=np.zeros((2, 3, 3), np.uint8),
        panoptic=panoptic,
        segments=[
            dict(id=5, category=1, iscrowd=False),
            dict(id=9, category=2, iscrowd=False),
            dict(id=2, category=3, iscrowd=True),
        ],
    )
    truth = Segmentation.from_record(record, METADATA, "panoptic")
    assert [(i["id"], i["category_id"], i["isthing"], i["area"]) for i in truth.segments_info] == [
        (5, 1, True, 2),
        (9, 2, False, 2),
        (2, 3, True, 1),
    ]
    np.testing.assert_array_equal(truth.segments, panoptic)
    semantic = Segmentation.from_record(record, METADATA, "semantic")
    np.testing.assert_array_equal(semantic.class_map, [[255, 1, 1], [2, 2, 3]])
    instance = Segmentation.from_record(record, METADATA, "instance")
    np.testing.assert_array_equal(instance.masks, [panoptic == 5])
    assert instance.labels.tolist() == [1] and instance.size == (2, 3)
