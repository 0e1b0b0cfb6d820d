"""Post-processing against a plain NumPy rendering of the official rules."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax.eval import postprocess, strips
from oneformer_jax.eval.postprocess import PostprocessConfig, segment_batch
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.types import VOID, Metadata

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
                info = infos[stuff[label] - 1]
                info[3] = max(info[3], scores[query])  # ours: the official rule gives no score
                continue
            stuff[label] = len(infos) + 1
        result[mask] = len(infos) + 1
        infos.append([len(infos) + 1, label, METADATA.is_thing[label], scores[query]])
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
            found = [[i["id"], i["category_id"], i["isthing"]] for i in result.segments_info]
            assert found == [info[:3] for info in infos]
            scores = [i["score"] for i in result.segments_info]
            np.testing.assert_allclose(scores, [info[3] for info in infos], atol=1e-5)
            areas = np.unique(segments[segments > 0], return_counts=True)[1]
            assert [i["area"] for i in result.segments_info] == areas.tolist()
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


@pytest.mark.parametrize(("taken", "stays"), [(1, True), (2, True), (3, False), (10, False)])
def test_a_segment_stays_at_the_overlap_threshold_exactly(taken, stays):
    """A surer dog takes some of the 10 columns of a car: 0.8 of it are not less than 0.8."""
    masks = np.full((4, QUERIES, *PADDED), -20, np.float32)
    masks[:, 0, :, :10] = masks[:, 1, :, 10 - taken : 20] = 20
    masks[:, 2, :, 20:] = 20
    logits = np.zeros((4, QUERIES, CLASSES + 1), np.float32)
    logits[..., CLASSES] = 20
    for query, (label, value) in enumerate([(3, 25), (4, 26), (0, 25)]):
        logits[:, query, label] = value
    sizes = np.array([PADDED] * 4)
    result = segment((logits, masks), "panoptic", sizes=(sizes, sizes))[0]
    found = {i["category_id"]: i["area"] // PADDED[0] for i in result.segments_info}
    car = {3: 10 - taken} if stays else {}
    assert found == {4: 10 + taken, 0: 76} | car
    # What a dropped segment had won stays unassigned.
    assert (result.segments[:, 0] == 0).all() == (not stays and taken < 10)


@pytest.mark.parametrize("above", [False, True])
def test_a_query_needs_more_than_the_mask_threshold(above):
    logits = np.zeros((4, QUERIES, CLASSES + 1), np.float32)  # probability 1/6 each
    logits[..., CLASSES] = 9
    logits[:, 0] = 0
    logits[:, 0, 3] = np.log(5) + (0.01 if above else -0.01)  # a half, nearly
    masks = np.full((4, QUERIES, 16, 24), 9, np.float32)
    result = segment((logits, masks), "panoptic", object_mask_threshold=0.5)[0]
    assert len(result.segments_info) == above
    # "No object" may be the likeliest and above the threshold: it is never a segment.
    logits[:, 0, 3], logits[:, 0, CLASSES] = 0, 9
    assert not segment((logits, masks), "panoptic", object_mask_threshold=0.5)[0].segments_info


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
    before = postprocess.run_heads._cache_size()
    segment(
        logits, "panoptic", sizes=(IMAGE_SIZE - 3, ORIGINAL_SIZE + 5), object_mask_threshold=0.4
    )
    assert postprocess.run_heads._cache_size() == before


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("canvas", [(1024, 2048), (3072, 4096)])
def test_device_memory_is_bounded_by_a_strip(task, canvas):
    """250 queries: no array of them at the size of a Cityscapes or Mapillary image (2.1, 12.6 GB).

    The instance head returns a bit per query and pixel, and holds them twice while it orders them.
    """
    f32, spec = np.float32, jax.ShapeDtypeStruct
    compiled = postprocess.run_heads.lower(
        spec((1, 250, 20), f32),
        spec((1, 250, 256, 512), f32),
        spec((1, 2), np.int32),
        spec((1, 2), np.int32),
        spec((), f32),
        task=task,
        padded_size=(1024, 2048),
        canvas=canvas,
        topk=250,
        mesh=None,
    ).compile()
    bits = 250 * canvas[0] * canvas[1] // 8 if task == "instance" else 0
    assert compiled.memory_analysis().temp_size_in_bytes < 500e6 + 2 * bits


def test_results_are_finished_one_at_a_time():
    """An image's instance masks are unpacked when it is its turn."""
    logits = random_logits(5)
    sizes = (IMAGE_SIZE, ORIGINAL_SIZE, PADDED)
    options = dict(task="instance", config=PostprocessConfig(), metadata=METADATA)
    results = postprocess.segment_images(*logits, *sizes, **options)
    assert iter(results) is results
    for result, size in zip(results, ORIGINAL_SIZE, strict=True):
        assert result.size == tuple(size)
    with pytest.raises(ValueError, match="5 classes"):  # now, not at the first result
        postprocess.segment_images(logits[0][..., :3], logits[1], *sizes, **options)


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
    np.testing.assert_array_equal(semantic.class_map, [[VOID, 1, 1], [2, 2, 3]])
    own = record | {"semantic": np.array([[0, 0, 0], [1, 1, VOID]], np.int32)}
    semantic = Segmentation.from_record(own, METADATA, "semantic")
    np.testing.assert_array_equal(semantic.class_map, own["semantic"])
    assert semantic.class_map.dtype == np.int32
    instance = Segmentation.from_record(record, METADATA, "instance")
    np.testing.assert_array_equal(instance.masks, [panoptic == 5])
    assert instance.labels.tolist() == [1] and instance.size == (2, 3)


@pytest.mark.parametrize("num_classes", [1, 5, 7, 40_000])
def test_the_best_class_does_not_depend_on_how_many_are_compared_at_once(monkeypatch, num_classes):
    rng = np.random.default_rng(num_classes)
    probabilities = jnp.asarray(rng.random((3, num_classes + 1), np.float32))
    masks = jnp.asarray(rng.normal(size=(3, 2, 8)).astype(np.float32))

    def classes():
        def one_strip(head):
            return head(masks, None)

        return postprocess._semantic_tables(probabilities, one_strip, (2, 8))["class_map"]

    whole = np.asarray(classes())
    scores = np.einsum("qc,qsw->csw", probabilities[:, :-1], jax.nn.sigmoid(masks))
    np.testing.assert_allclose(np.take_along_axis(scores, whole[None], 0)[0], scores.max(0), 1e-6)
    monkeypatch.setattr(postprocess, "_CLASSES_AT_ONCE", max(3, num_classes // 3))
    np.testing.assert_array_equal(classes(), whole)
    assert (classes().dtype == np.int16) == (num_classes < 32_768)
