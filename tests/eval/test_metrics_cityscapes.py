"""Cityscapes' AP and IoU on cases worked out by hand, and AP against a loop over its definition."""

import numpy as np
import pytest

from oneformer_jax.eval.metrics.cityscapes import (
    CATEGORIES,
    MEAN_PIXELS,
    OVERLAPS,
    CityscapesAP,
    CityscapesIoU,
)
from oneformer_jax.input_pipeline import datasets
from tests.eval.metric_cases import IS_THING, instances, panoptic, random_updates, truth

CITYSCAPES = datasets.CITYSCAPES
CAR, PERSON = 0, 1  # things of IS_THING; 2 is stuff


def wide(columns):
    """int [100, N]: a column is 100 pixels, the smallest instance that counts."""
    return np.tile(np.array(columns, np.int32), (100, 1))


def box(start, stop, width=10):
    mask = np.zeros((100, width), bool)
    mask[:, start:stop] = True
    return mask


def ap(columns, classes, *found, crowd=()):
    panoptic = wide(columns) if np.ndim(columns) == 1 else columns
    metric = CityscapesAP(IS_THING)
    record = truth(panoptic, classes, crowd=crowd)
    metric.update(instances(*found, shape=panoptic.shape), record)
    return metric


def score(metric, name="AP"):
    return metric.compute()[f"instance/{name}"]


# ------------------------------------------------------------------------------------------- AP

TWO_CARS = [1] * 5 + [2] * 5, {1: CAR, 2: CAR}
ONE_CAR = [1] * 5 + [2] * 5, {1: CAR, 2: 2}
RIGHT = (CAR, 0.3, box(0, 5))


def test_ten_overlaps():
    np.testing.assert_allclose(OVERLAPS, [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])


def test_ap_perfect():
    metric = ap(*TWO_CARS, (CAR, 0.9, box(0, 5)), (CAR, 0.3, box(5, 10)))
    assert metric.compute() == pytest.approx({"instance/AP": 100, "instance/AP50": 100})
    assert metric.undefined() == {}
    np.testing.assert_allclose(metric.per_class()["instance/AP"], [100, np.nan, np.nan, np.nan])
    assert metric.counts() == {
        "instance/images": 1,
        "instance/ground_truth": 2,
        "instance/crowds": 0,
        "instance/detections": 2,
    }


def test_ap_half_of_the_instances():
    # One point (recall 1/2, precision 1) and the artificial (0, 1), each 1/4 wide.
    assert score(ap(*TWO_CARS, (CAR, 0.9, box(0, 5)))) == pytest.approx(50)


def test_ap_does_not_interpolate_the_precision():
    # Points (1, 1/2), (0, 0) and (0, 1), of width 1/2, 1/2 and 0: 1/4. COCO would say 1/2.
    metric = ap(*ONE_CAR, (CAR, 0.9, box(7, 9)), RIGHT)
    assert score(metric) == pytest.approx(25)


def test_ap_is_the_mean_over_overlaps():
    # 5 of 8 columns: IoU 0.625 is a match at 0.5, 0.55 and 0.6 only.
    metric = ap([1] * 8 + [2] * 2, {1: CAR, 2: 2}, (CAR, 0.9, box(0, 5)))
    assert score(metric) == pytest.approx(30)
    assert score(metric, "AP50") == pytest.approx(100)


def test_ap_needs_more_than_the_overlap():
    # 4 common columns, 8 in the union: exactly 0.5.
    assert score(ap([1] * 6 + [2] * 4, {1: CAR, 2: 2}, (CAR, 0.9, box(2, 8)))) == 0


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # Points (1, 1/2) of no width, (1, 1) and (0, 1) of 1/2: the worse one comes too late.
        ((0.9, 0.6), 100),
        ((0.6, 0.9), 100),
        # Equal scores are one point: (1, 1/2) and (0, 1), both 1/2 wide.
        ((0.9, 0.9), 75),
    ],
)
def test_ap_second_detection_of_an_instance_is_wrong(scores, expected):
    # The second covers 4.8 of 5 columns less well, but above 0.95.
    less = box(0, 5)
    less[:3, 0] = False
    metric = ap(*ONE_CAR, (CAR, scores[0], box(0, 5)), (CAR, scores[1], less))
    assert score(metric) == pytest.approx(expected)


def test_ap_second_detection_with_the_better_score_counts():
    # The first has a match up to 0.6 only, and the better score. Up to 0.6 it is right and the
    # other one wrong (100); above, it is wrong and ahead of the other (25).
    metric = ap([1] * 8 + [2] * 2, {1: CAR, 2: 2}, (CAR, 0.9, box(0, 5)), (CAR, 0.3, box(0, 8)))
    assert score(metric) == pytest.approx((3 * 100 + 7 * 25) / 10)


def test_ap_detection_on_void_is_left_out():
    # 6 of its 10 columns are void: left out at 0.5 and 0.55, but not at 0.6 (not more than it).
    columns = [1] * 5 + [0] * 6 + [2] * 4
    wrong = (CAR, 0.9, box(5, 15, 15))
    metric = ap(columns, {1: CAR, 2: 2}, wrong, (CAR, 0.3, box(0, 5, 15)))
    assert score(metric) == pytest.approx((2 * 100 + 8 * 25) / 10)
    assert score(metric, "AP50") == pytest.approx(100)


def test_ap_detection_on_a_group_of_its_class_is_left_out():
    columns, classes = [1] * 5 + [2] * 5, {1: CAR, 2: CAR}
    on_group = [(CAR, 0.9 - i / 100, box(5 + i, 7 + i)) for i in range(3)]
    assert score(ap(columns, classes, *on_group, RIGHT, crowd={2})) == pytest.approx(100)
    # The group itself need not be found, and a detection of all of it is neither right nor wrong.
    assert score(ap(columns, classes, (CAR, 0.9, box(5, 10)), RIGHT, crowd={2})) == 100
    # A group of another class does not help: points (1, 1/4) and three of recall 0.
    classes = {1: CAR, 2: PERSON}
    assert score(ap(columns, classes, *on_group, RIGHT, crowd={2})) == pytest.approx(100 / 8)


def small_things(pixels, crowd=()):
    """A car of 500 pixels and one of `pixels` in columns 5 and 6; a detection of both columns."""
    columns = wide([1] * 5 + [9] * 5)
    columns[: pixels // 2, 5] = columns[: pixels - pixels // 2, 6] = 2
    return ap(columns, {1: CAR, 2: CAR, 9: 2}, (CAR, 0.9, box(5, 7)), RIGHT, crowd=crowd)


def test_ap_small_instances_need_not_be_found():
    # A detection of 200 pixels. Of 99 pixels the instance does not count, and covers 49.5 % of
    # the detection, which is not more than half: it is wrong.
    assert score(small_things(99)) == pytest.approx(25)
    # From 100 on it is an instance, missed here: points (1/2, 1/2), (0, 0), (0, 1).
    assert score(small_things(100)) == pytest.approx(100 / 8)
    columns = wide([1] * 5 + [9] * 5)
    columns[:99, 5] = 2
    metric = ap(columns, {1: CAR, 2: CAR, 9: 2}, (CAR, 0.9, box(5, 6)), RIGHT)
    assert score(metric) == pytest.approx(100)  # 99 of 100 pixels: a match that is left out


def test_ap_small_group_counts_twice():
    # 60 of 200 pixels, doubled 0.6: left out at 0.5 and 0.55.
    assert score(small_things(60, crowd={2})) == pytest.approx((2 * 100 + 8 * 25) / 10)
    # A group of 102 pixels counts once: 0.51 is left out at 0.5 only.
    assert score(small_things(102, crowd={2})) == pytest.approx((100 + 9 * 25) / 10)


def test_ap_of_classes():
    # Cars are found, the person is not: the mean of 100 and 0. Stuff has no AP.
    metric = ap([1] * 5 + [2] * 5, {1: CAR, 2: PERSON}, RIGHT)
    np.testing.assert_allclose(metric.per_class()["instance/AP"], [100, 0, np.nan, np.nan])
    assert score(metric) == pytest.approx(50)
    # A class that is only detected has no AP.
    metric = ap(*ONE_CAR, RIGHT, (PERSON, 0.9, box(5, 10)))
    assert score(metric) == pytest.approx(100)


def test_ap_without_detections_or_instances():
    assert score(ap(*ONE_CAR)) == 0
    # All that is detected is left out: no curve.
    metric = ap([1] * 5 + [0] * 5, {1: CAR}, (CAR, 0.9, box(5, 10)))
    assert score(metric) == 0
    metric = ap([1] * 10, {1: 2}, (CAR, 0.5, box(0, 2)))
    assert np.isnan(score(metric))
    assert "100 pixels" in metric.undefined()["instance/AP"]
    # An empty mask is no detection.
    assert ap(*ONE_CAR, (CAR, 0.5, box(0, 0))).counts()["instance/detections"] == 0


def test_ap_labels_by_position_among_the_things():
    is_thing = (False, True, False, True)
    metric = CityscapesAP(is_thing, thing_labels=True)
    record = truth(wide([1] * 5 + [2] * 5), {1: 3, 2: 1})
    metric.update(instances((1, 0.9, box(0, 5)), (0, 0.9, box(5, 10)), shape=(100, 10)), record)
    np.testing.assert_allclose(metric.per_class()["instance/AP"], [np.nan, 100, np.nan, 100])
    with pytest.raises(ValueError, match=r"image 7.*class id 2"):
        metric.update(instances((2, 0.9, box(0, 5)), shape=(100, 10)), record)


def test_ap_rejects_an_image_twice_and_stuff():
    metric = ap(*ONE_CAR)
    with pytest.raises(ValueError, match="image 7 was scored twice"):
        metric.update(instances(shape=(100, 10)), truth(wide(ONE_CAR[0]), ONE_CAR[1]))
    with pytest.raises(ValueError, match="class 2 is stuff"):
        ap(*ONE_CAR, (2, 0.5, box(0, 5)))


def by_definition(updates, category, overlap):
    """AP of one class at one overlap, by loops over masks; None without an instance."""
    scores, right, missed, instances_seen = [], [], 0, 0
    for prediction, record in updates:
        segments = [s for s in record["segments"] if s["category"] == category]
        areas = {s["id"]: (record["panoptic"] == s["id"]) for s in segments}
        areas = {i: m for i, m in areas.items() if m.any()}
        crowds = {s["id"] for s in segments if s["iscrowd"]}
        wanted = [i for i, m in areas.items() if i not in crowds and m.sum() >= 100]
        masks = [
            (m, s)
            for m, s, c in zip(prediction.masks, prediction.scores, prediction.labels, strict=True)
            if c == category and m.any()
        ]

        def iou(a, b):
            return (a & b).sum() / (a | b).sum()

        for i in wanted:
            instances_seen += 1
            matches = sorted((float(s) for m, s in masks if iou(areas[i], m) > overlap))
            if not matches:
                missed += 1
                continue
            scores += matches
            right += [False] * (len(matches) - 1) + [True]
        for mask, value in masks:
            if any(iou(a, mask) > overlap for a in areas.values()):
                continue
            ignored = (mask & (record["panoptic"] == 0)).sum()
            for i, a in areas.items():
                ignored += (a & mask).sum() * ((i in crowds) + (a.sum() < 100))
            if ignored / mask.sum() <= overlap:
                scores.append(float(value))
                right.append(False)
    if not instances_seen:
        return None
    points = [(0.0, 1.0)]  # (recall, precision) from the highest score on
    for value in sorted(set(scores), reverse=True):
        above = [r for s, r in zip(scores, right, strict=True) if s >= value]
        points.append((sum(above) / instances_seen, sum(above) / len(above)))
    recall = [0.0, *(r for r, _ in points), points[-1][0]]
    return sum(
        p * (after - before) / 2
        for (_, p), before, after in zip(points, recall[:-2], recall[2:], strict=True)
    )


def test_ap_equals_a_loop_over_its_definition():
    updates = list(random_updates("instance", 20))
    metric = CityscapesAP(IS_THING)
    for update in updates:
        metric.update(*update)
    table = metric._average_precisions()
    for category in range(2):
        expected = [by_definition(updates, category, overlap) for overlap in OVERLAPS]
        np.testing.assert_allclose(table[category], expected, rtol=1e-12)
        assert 0 < table[category, 0] < 1 and len(set(expected)) > 4


# ------------------------------------------------------------------------------------------ IoU


def test_tables_name_the_classes_of_cityscapes():
    names = [name for names in CATEGORIES.values() for name in names]
    assert sorted(names) == sorted(CITYSCAPES.class_names)
    things = [n for n, t in zip(CITYSCAPES.class_names, CITYSCAPES.is_thing, strict=True) if t]
    assert list(MEAN_PIXELS) == things


def iou(columns, classes, predicted, crowd=()):
    """`classes` and `predicted` by name."""
    ids = {name: c for c, name in enumerate(CITYSCAPES.class_names)}
    metric = CityscapesIoU(CITYSCAPES.class_names, CITYSCAPES.is_thing)
    record = truth(wide(columns), {i: ids[name] for i, name in classes.items()}, crowd=crowd)
    prediction = panoptic([0], {})
    prediction.class_map = wide([ids[name] for name in predicted])
    metric.update(prediction, record)
    return metric


def column(metric, name, label):
    return metric.per_class()[f"semantic/{name}"][CITYSCAPES.class_names.index(label)]


# Cars of 2 and 6 columns, road and void. The second half of the first car is called a truck, one
# column of the road a car. On void anything goes.
IOU_CASE = (
    [1] * 2 + [2] * 6 + [3] * 3 + [0],
    {1: "car", 2: "car", 3: "road"},
    ["car", "truck"] + ["car"] * 7 + ["road"] * 2 + ["bus"],
)


def test_iou_of_classes():
    values = iou(*IOU_CASE).compute()
    # Cars: 7 hits, union 8 + 1. Road: 2 of 3. Trucks: only predicted, 0. The bus is on void.
    assert values["semantic/mIoU"] == pytest.approx(100 * (7 / 9 + 2 / 3 + 0) / 3)


def test_iiou_weights_every_instance_alike():
    metric = iou(*IOU_CASE)
    # Found: half of one car and all of the other, of two; false are 100 pixels. The truck is only
    # predicted: 0 of 100 pixels.
    weight = MEAN_PIXELS["car"]
    expected = 100 * 1.5 * weight / (2 * weight + 100)
    assert column(metric, "iIoU", "car") == pytest.approx(expected)
    assert column(metric, "iIoU", "truck") == 0
    assert np.isnan(column(metric, "iIoU", "road")) and np.isnan(column(metric, "iIoU", "bus"))
    assert metric.compute()["semantic/iIoU"] == pytest.approx(expected / 2)


def test_iou_of_categories():
    metric = iou(*IOU_CASE)
    # Vehicles: all 8 columns are hit, one is false: 8 / 9. Flat: 2 / 3. The rest does not occur.
    values = metric.compute()
    assert values["semantic/IoU_category"] == pytest.approx(100 * (8 / 9 + 2 / 3) / 2)
    weight = MEAN_PIXELS["car"]
    expected = 100 * 2 * weight / (2 * weight + 100)
    assert values["semantic/iIoU_category"] == pytest.approx(expected)


def test_groups_have_a_class_but_no_instance():
    metric = iou(*IOU_CASE, crowd={2})
    weight = MEAN_PIXELS["car"]
    assert column(metric, "iIoU", "car") == pytest.approx(100 * 0.5 * weight / (weight + 100))
    assert column(metric, "IoU", "car") == pytest.approx(700 / 9)


def test_categories_of_stuff_have_no_instances():
    metric = iou([1] * 4, {1: "sky"}, ["sky"] * 4)
    assert metric.compute()["semantic/IoU_category"] == 100
    assert set(metric.undefined()) == {"semantic/iIoU", "semantic/iIoU_category"}


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"'cat' is none of Cityscapes.*eval\.protocol=coco"):
        CityscapesIoU(("car", "cat"), (True, True))
    with pytest.raises(ValueError, match="'road' is none"):
        CityscapesIoU(("car", "road"), (True, True))
