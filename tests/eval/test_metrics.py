"""PQ and mIoU on cases worked out by hand and against a slow loop; merging of all metrics."""

import numpy as np
import pytest

from oneformer_jax.eval.metrics.ap import CocoAP
from oneformer_jax.eval.metrics.cityscapes import CityscapesAP, CityscapesIoU
from oneformer_jax.eval.metrics.iou import MeanIoU
from oneformer_jax.eval.metrics.pq import PanopticQuality
from oneformer_jax.eval.protocol import PROTOCOLS, Protocol
from oneformer_jax.types import VOID
from tests.eval.metric_cases import (
    IS_THING,
    METADATA,
    panoptic,
    random_pair,
    random_updates,
    semantic,
    truth,
)


def pq(record, prediction):
    metric = PanopticQuality(IS_THING)
    metric.update(prediction, record)
    return metric


def table(metric, c):
    """(tp, fp, fn) of a class."""
    return int(metric.tp[c]), int(metric.fp[c]), int(metric.fn[c])


# --------------------------------------------------------------------------- panoptic quality


def test_pq_perfect():
    columns = [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    metric = pq(truth(columns, {1: 0, 2: 0, 3: 2}), panoptic(columns, {1: 0, 2: 0, 3: 2}))
    # Classes 1 and 3 do not occur and leave the means.
    assert set(metric.compute().values()) == {100.0}
    assert metric.undefined() == {}
    assert metric.counts() == {
        "panoptic/images": 1,
        "panoptic/classes": 2,
        "panoptic/tp": 3,
        "panoptic/fp": 0,
        "panoptic/fn": 0,
    }
    per_class = metric.per_class()["panoptic/PQ"]
    np.testing.assert_array_equal(per_class, [100, np.nan, 100, np.nan])


def test_pq_does_not_depend_on_the_ids():
    big = 256**3 - 1
    a = truth([9, 9, 9, 9, 9, 9, big, big, big, big], {9: 0, big: 2})
    metric = pq(a, panoptic([4] * 6 + [2] * 4, {2: 2, 4: 0}))
    assert metric.compute()["panoptic/PQ"] == 100


def test_pq_shifted():
    # The thing has columns 0..5, is predicted at 1..6: 5 common, 7 in the union.
    # The stuff has 6..9, is predicted at 0 and 7..9: 3 common, 5 in the union.
    record = truth([1] * 6 + [2] * 4, {1: 0, 2: 2})
    metric = pq(record, panoptic([2] + [1] * 6 + [2] * 3, {1: 0, 2: 2}))
    values = metric.compute()
    assert values["panoptic/PQ_things"] == pytest.approx(500 / 7)
    assert values["panoptic/PQ_stuff"] == pytest.approx(60)
    assert values["panoptic/PQ"] == pytest.approx((500 / 7 + 60) / 2)
    assert values["panoptic/SQ"] == values["panoptic/PQ"]
    assert values["panoptic/RQ"] == 100


def test_pq_needs_more_than_half():
    # Shifted by two columns: 4 common, 8 in the union. Exactly 0.5 is no match.
    metric = pq(
        truth([1] * 6 + [2] * 4, {1: 0, 2: 2}), panoptic([0, 0] + [1] * 6 + [0] * 2, {1: 0})
    )
    assert table(metric, 0) == (0, 1, 1)
    assert metric.compute()["panoptic/PQ_things"] == 0
    assert metric.compute()["panoptic/SQ_things"] == 0


def test_pq_merged():
    # Two things of 4 and 6 columns predicted as one of 10: it matches the second (6 / 10), and
    # the first is missed. PQ = 0.6 / (1 + 1/2), RQ = 1 / (1 + 1/2).
    metric = pq(truth([1] * 4 + [2] * 6, {1: 0, 2: 0}), panoptic([5] * 10, {5: 0}))
    assert table(metric, 0) == (1, 0, 1)
    values = metric.compute()
    assert values["panoptic/PQ"] == pytest.approx(40)
    assert values["panoptic/SQ"] == pytest.approx(60)
    assert values["panoptic/RQ"] == pytest.approx(200 / 3)


def test_pq_split():
    # One thing of 10 columns predicted as 7 and 3: one match of 0.7 and one false positive.
    metric = pq(truth([1] * 10, {1: 1}), panoptic([1] * 7 + [2] * 3, {1: 1, 2: 1}))
    assert table(metric, 1) == (1, 1, 0)
    assert metric.compute()["panoptic/PQ"] == pytest.approx(70 / 1.5)


def test_pq_wrong_class_is_a_miss_and_a_false_positive():
    # Class 1 is only predicted: it counts in the mean, as 0.
    metric = pq(truth([1] * 5 + [2] * 5, {1: 0, 2: 2}), panoptic([1] * 5 + [2] * 5, {1: 1, 2: 2}))
    assert table(metric, 0) == (0, 0, 1)
    assert table(metric, 1) == (0, 1, 0)
    assert metric.compute()["panoptic/PQ"] == pytest.approx(100 / 3)
    assert metric.compute()["panoptic/PQ_things"] == 0
    assert metric.per_class()["panoptic/PQ"][1] == 0


def test_pq_void_leaves_the_union():
    # 6 columns of thing, 4 of void; the prediction covers all 10: union 10 + 6 - 6 - 4 = 6.
    metric = pq(truth([1] * 6 + [0] * 4, {1: 0}), panoptic([3] * 10, {3: 0}))
    assert metric.compute()["panoptic/PQ"] == 100


@pytest.mark.parametrize(("on_void", "false_positives"), [(4, 0), (3, 1), (2, 1)])
def test_pq_prediction_mostly_on_void_is_forgiven(on_void, false_positives):
    # A prediction of 6 columns with `on_void` of them on void; half is not enough.
    record = truth([1] * (10 - on_void) + [0] * on_void, {1: 2})
    metric = pq(record, panoptic([0] * 4 + [8] * 6, {8: 0}))
    assert table(metric, 0) == (0, false_positives, 0)


def test_pq_crowd_forgives_its_own_class_only():
    # Columns 0..5 are a crowd of class 0. Segment 1 (class 0) has 3 of its 4 columns in it;
    # segment 2 (class 1) lies in it entirely. The crowd itself is neither found nor missed.
    record = truth([4] * 6 + [5] * 4, {4: 0, 5: 2}, crowd={4})
    metric = pq(record, panoptic([2, 2, 0, 1, 1, 1, 1, 0, 0, 0], {1: 0, 2: 1}))
    assert table(metric, 0) == (0, 0, 0)
    assert table(metric, 1) == (0, 1, 0)
    assert table(metric, 2) == (0, 0, 1)


def test_pq_crowd_never_matches():
    # Even exactly covered, a crowd is no true positive; the prediction on it is forgiven.
    columns = [4] * 6 + [5] * 4
    metric = pq(truth(columns, {4: 0, 5: 2}, crowd={4}), panoptic(columns, {4: 0, 5: 2}))
    assert table(metric, 0) == (0, 0, 0)
    assert metric.compute()["panoptic/PQ"] == 100


def test_pq_only_the_last_crowd_of_a_class_forgives():
    # The prediction has 3 columns in the first crowd and 3 in the last, of 6. With void (none)
    # only the last counts: 3 / 6 is not more than half. Listed the other way round: the same.
    for order in ([1, 2], [2, 1]):
        record = truth([1] * 5 + [2] * 5, dict.fromkeys(order, 0), crowd={1, 2})
        metric = pq(record, panoptic([0] * 2 + [7] * 6 + [0] * 2, {7: 0}))
        assert table(metric, 0) == (0, 1, 0)
    # With 2 columns in the first and 4 in the last, the order decides: 4 / 6 or 2 / 6.
    for order, false_positives in (([1, 2], 0), ([2, 1], 1)):
        record = truth([1] * 5 + [2] * 5, dict.fromkeys(order, 0), crowd={1, 2})
        metric = pq(record, panoptic([0] * 3 + [7] * 6 + [0], {7: 0}))
        assert table(metric, 0) == (0, false_positives, 0)


def test_pq_void_and_crowd_add_up():
    # 6 columns: 2 on void, 2 on the crowd, 2 on stuff: 4 / 6 is forgiven.
    record = truth([0] * 4 + [1] * 2 + [2] * 4, {1: 0, 2: 2}, crowd={1})
    metric = pq(record, panoptic([0] * 2 + [7] * 6 + [0] * 2, {7: 0}))
    assert table(metric, 0) == (0, 0, 0)


def test_pq_takes_the_true_area_from_the_annotation():
    # The annotation says 48 pixels, the map has 40 (10 columns): 40 / 48.
    metric = pq(truth([1] * 10, {1: 0}, areas={1: 48}), panoptic([1] * 10, {1: 0}))
    assert metric.compute()["panoptic/SQ"] == pytest.approx(100 * 40 / 48)


@pytest.mark.parametrize("area", [0, 4, 39])
def test_pq_takes_the_pixels_where_the_area_is_too_small(area):
    metric = pq(truth([1] * 10, {1: 0}, areas={1: area}), panoptic([1] * 10, {1: 0}))
    assert metric.compute()["panoptic/PQ"] == 100


def test_pq_annotated_segment_without_pixels_is_missed():
    metric = pq(truth([1] * 10, {1: 0, 2: 1}, areas={2: 5}), panoptic([1] * 10, {1: 0}))
    assert table(metric, 1) == (0, 0, 1)


def test_pq_without_any_segment():
    metric = pq(truth([0] * 10, {}), panoptic([0] * 10, {}))
    assert np.isnan(list(metric.compute().values())).all()
    assert metric.undefined().keys() == metric.compute().keys()
    metric = pq(truth([1] * 10, {1: 2}), panoptic([0] * 10, {}))
    assert metric.compute()["panoptic/PQ"] == 0
    assert set(metric.undefined()) == {f"panoptic/{name}_things" for name in ("PQ", "SQ", "RQ")}
    assert "no thing class" in metric.undefined()["panoptic/PQ_things"]


GOOD_TRUTH = truth([1] * 10, {1: 0}, image_id="street_12")
GOOD_PREDICTION = panoptic([1] * 10, {1: 0})


@pytest.mark.parametrize(
    ("record", "prediction", "message"),
    [
        (truth([1] * 9 + [3], {1: 0}, image_id="street_12"), GOOD_PREDICTION, r"lacks: \[3\]"),
        (truth([1] * 10, {1: 4}, image_id="street_12"), GOOD_PREDICTION, "class id 4"),
        (truth([-1] * 10, {1: 0}, image_id="street_12"), GOOD_PREDICTION, "segment ids must be"),
        (GOOD_TRUTH, panoptic([1] * 9 + [2], {1: 0}), r"lacks: \[2\]"),
        (GOOD_TRUTH, panoptic([1] * 10, {1: -1}), "class id -1"),
        (GOOD_TRUTH, panoptic([1] * 10, {1: 0, 2: 0}), "segment 2 has no pixel"),
        (GOOD_TRUTH, panoptic([1] * 9, {1: 0}), "original size"),
    ],
)
def test_pq_bad_input_names_the_image(record, prediction, message):
    metric = PanopticQuality(IS_THING)
    with pytest.raises(ValueError, match=message) as error:
        metric.update(prediction, record)
    assert "image street_12" in str(error.value)
    assert metric.images == 0 and not metric.tp.any() and not metric.fn.any()


def test_repeated_segment_id_is_an_error():
    record = truth([1] * 10, {1: 0})
    record["segments"] *= 2
    with pytest.raises(ValueError, match="more than once"):
        pq(record, GOOD_PREDICTION)


def reference_counts(record, prediction, k):
    """(IoU sum, tp, fp, fn), each [K], by loops over pairs of masks, from the definition."""
    iou_sum, tp, fp, fn = np.zeros(k), *np.zeros((3, k), int)
    void = record["panoptic"] == 0
    matched_truth, matched_guess = set(), set()
    for t in record["segments"]:
        for p in prediction.segments_info:
            true = record["panoptic"] == t["id"]
            guess = prediction.segments == p["id"]
            common = (true & guess).sum()
            union = t["area"] + guess.sum() - common - (guess & void).sum()
            same = t["category"] == p["category_id"] and not t["iscrowd"]
            if common and same and common / union > 0.5:
                iou_sum[t["category"]] += common / union
                tp[t["category"]] += 1
                matched_truth.add(t["id"])
                matched_guess.add(p["id"])
    for t in record["segments"]:
        if not t["iscrowd"] and t["id"] not in matched_truth:
            fn[t["category"]] += 1
    for p in prediction.segments_info:
        if p["id"] in matched_guess:
            continue
        guess = prediction.segments == p["id"]
        free = void
        crowds = [
            t for t in record["segments"] if t["iscrowd"] and t["category"] == p["category_id"]
        ]
        if crowds:
            free = void | (record["panoptic"] == crowds[-1]["id"])
        if (guess & free).sum() <= 0.5 * guess.sum():
            fp[p["category_id"]] += 1
    return iou_sum, tp, fp, fn


def test_pq_equals_a_loop_over_segments():
    rng = np.random.default_rng(0)
    metric = PanopticQuality(IS_THING)
    expected = np.zeros((4, 4))
    forgiven = 0
    for i in range(60):
        record, prediction = random_pair(rng, str(i))
        metric.update(prediction, record)
        counts = np.array(reference_counts(record, prediction, 4))
        forgiven += len(prediction.segments_info) - int(counts[1:3].sum())
        expected += counts
    np.testing.assert_allclose(metric.iou_sum, expected[0], rtol=1e-12)
    np.testing.assert_array_equal([metric.tp, metric.fp, metric.fn], expected[1:])
    # The random maps exercise all four outcomes.
    assert expected[1:].min() > 5 and forgiven > 5


# ------------------------------------------------------------------------------ semantic IoU


def miou(record, prediction):
    metric = MeanIoU(4)
    metric.update(prediction, record)
    return metric


def test_miou_takes_crowds_and_ignores_void():
    # Void, two columns of class 1, a crowd of class 0 and class 2, all predicted as class 1.
    record = truth([0, 5, 5, 6, 8], {5: 1, 6: 0, 8: 2}, crowd={6})
    metric = miou(record, semantic([1] * 5))
    hits, true, predicted = metric.totals()
    assert true.tolist() == [4, 8, 4, 0]
    assert predicted.tolist() == [0, 16, 0, 0]
    assert hits.tolist() == [0, 8, 0, 0]


def test_miou_perfect():
    # Void pixels may be predicted as anything, even as a class that occurs nowhere else.
    metric = miou(truth([0, 1, 1, 2, 2], {1: 0, 2: 2}), semantic([3, 0, 0, 2, 2]))
    assert set(metric.compute().values()) == {100.0}
    np.testing.assert_array_equal(metric.per_class()["semantic/IoU"], [100, np.nan, 100, np.nan])
    assert metric.counts() == {"semantic/images": 1, "semantic/classes": 2, "semantic/pixels": 16}


def test_miou_worked_out():
    # truth       0 0 0 0 0 0 2 2 2 2 (and two columns of void)
    # prediction  0 0 0 0 2 2 2 2 2 1 (0 and 1 on the void)
    # Class 0: 4 hits, union 6. Class 2: 3 hits, union 4 + 5 - 3 = 6. Class 1 only predicted: 0.
    # Class 3 does not occur.
    record = truth([1] * 6 + [2] * 4 + [0] * 2, {1: 0, 2: 2})
    metric = miou(record, semantic([0] * 4 + [2] * 5 + [1] + [0, 1]))
    values = metric.compute()
    assert values["semantic/mIoU"] == pytest.approx(100 * (4 / 6 + 3 / 6 + 0) / 3)
    assert values["semantic/fwIoU"] == pytest.approx(100 * (0.6 * 4 / 6 + 0.4 * 3 / 6))
    assert values["semantic/mACC"] == pytest.approx(100 * (4 / 6 + 3 / 4) / 2)
    assert values["semantic/pACC"] == pytest.approx(70)
    np.testing.assert_allclose(metric.per_class()["semantic/IoU"], [400 / 6, 0, 50, np.nan])
    np.testing.assert_allclose(metric.per_class()["semantic/ACC"], [400 / 6, np.nan, 75, np.nan])


def test_miou_is_over_the_whole_set_not_per_image():
    # Class 0: 10 of 10 columns in one image, 0 of 2 in the other: 10 / 12, not the mean of 1 and 0.
    metric = miou(truth([1] * 10, {1: 0}), semantic([0] * 10))
    metric.update(semantic([2, 2]), truth([1, 1], {1: 0}))
    assert metric.per_class()["semantic/IoU"][0] == pytest.approx(100 * 10 / 12)


def test_miou_of_void_only_is_undefined():
    metric = miou(truth([0] * 10, {}), semantic([0] * 10))
    assert np.isnan(list(metric.compute().values())).all()
    assert metric.undefined().keys() == metric.compute().keys()


def test_miou_bad_input():
    with pytest.raises(ValueError, match=r"image 7.*class id 255"):
        miou(truth([1] * 10, {1: 0}), semantic([255] * 10))
    with pytest.raises(ValueError, match="original size"):
        miou(truth([1] * 10, {1: 0}), semantic([0] * 9))


def test_miou_on_a_semantic_annotation_of_its_own():
    """The panoptic annotation calls the columns otherwise: it does not count."""
    record = truth([1] * 6, {1: 0}) | {"semantic": semantic([2, 2, 2, 3, VOID, VOID]).class_map}
    metric = miou(record, semantic([2, 2, 3, 3, 0, 1]))
    hits, true, predicted = metric.totals()
    assert true.tolist() == [0, 0, 12, 4]
    assert predicted.tolist() == [0, 0, 8, 8]
    assert hits.tolist() == [0, 0, 8, 4]
    stray = record | {"semantic": semantic([2, 2, 2, 3, 255, 255]).class_map}
    with pytest.raises(ValueError, match=r"semantic map of image 7: class id 255"):
        miou(stray, semantic([2] * 6))
    with pytest.raises(ValueError, match="original size"):
        miou(record | {"semantic": semantic([2] * 5).class_map}, semantic([2] * 6))


def test_miou_equals_a_count_of_pixels():
    metric = MeanIoU(4)
    expected = np.zeros((4, 4), int)
    for prediction, record in random_updates("semantic", 20):
        metric.update(prediction, record)
        for s in record["segments"]:
            for c in range(4):
                hits = (record["panoptic"] == s["id"]) & (prediction.class_map == c)
                expected[s["category"], c] += hits.sum()
    counted = (np.diagonal(expected), expected.sum(axis=1), expected.sum(axis=0))
    np.testing.assert_array_equal(metric.totals(), counted)


def test_miou_of_65535_classes_takes_memory_by_class_not_by_pair():
    metric = MeanIoU(65_535)
    wide = truth([1, 1, 2, 0], {1: 65_534, 2: 3})
    metric.update(semantic([65_534, 9, 3, 0]), wide)
    assert sum(array.nbytes for array in metric.state().values()) < 2_000_000
    assert metric.per_class()["semantic/IoU"][[65_534, 3, 9]].tolist() == [50.0, 100.0, 0.0]


# ------------------------------------------------------------------------------------ merging

METRICS = [(name, task) for name in PROTOCOLS for task in Protocol(name).tasks]
merging = pytest.mark.parametrize(("name", "task"), METRICS)


def empty(name, task):
    return Protocol(name).make_metric(task, METADATA)


@merging
def test_two_halves_merge_to_the_whole(name, task):
    whole, first, second = (empty(name, task) for _ in range(3))
    for i, update in enumerate(random_updates(task)):
        whole.update(*update)
        (first if i % 3 == 0 else second).update(*update)
    assert first.counts() != whole.counts()
    # Second first: the order of hosts must not matter.
    restored = type(second).from_state(second.state())
    np.testing.assert_array_equal(
        list(restored.compute().values()), list(second.compute().values())
    )
    restored.merge(type(first).from_state(first.state()))
    assert restored.counts() == whole.counts()
    assert restored.images == 8
    expected = whole.compute()
    np.testing.assert_allclose(
        list(restored.compute().values()), list(expected.values()), rtol=1e-12
    )
    assert np.isfinite(next(iter(expected.values())))
    for column, values in whole.per_class().items():
        np.testing.assert_allclose(restored.per_class()[column], values, rtol=1e-12)


@merging
def test_merging_an_empty_state_changes_nothing(name, task):
    metric = empty(name, task)
    for update in random_updates(task, 2):
        metric.update(*update)
    before = metric.counts(), metric.compute()
    metric.merge(type(metric).from_state(empty(name, task).state()))
    np.testing.assert_equal((metric.counts(), metric.compute()), before)


@merging
def test_state_is_plain_arrays(name, task, tmp_path):
    metric = empty(name, task)
    for update in random_updates(task, 2):
        metric.update(*update)
    np.savez(tmp_path / "state.npz", **metric.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        restored = type(metric).from_state(state)
    np.testing.assert_equal(restored.compute(), metric.compute())


@merging
def test_every_undefined_value_has_a_reason(name, task):
    metric = empty(name, task)
    missing = {name for name, value in metric.compute().items() if np.isnan(value)}
    assert missing == set(metric.compute()) == set(metric.undefined())


def test_states_of_other_classes_do_not_merge():
    for ours, theirs in (
        (PanopticQuality(IS_THING), PanopticQuality((True, False, False, False))),
        (MeanIoU(4), MeanIoU(5)),
        (CocoAP(IS_THING), CocoAP((True,))),
        (CityscapesAP(IS_THING), CityscapesAP((True,))),
        (CityscapesIoU(("car", "sky"), (1, 0)), CityscapesIoU(("car", "road"), (1, 0))),
    ):
        with pytest.raises(ValueError, match="cannot merge"):
            ours.merge(theirs)
