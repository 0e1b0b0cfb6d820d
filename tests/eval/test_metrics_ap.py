"""AP on cases worked out by hand, and against pycocotools used the ordinary way."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from oneformer_jax.eval.metrics.ap import CocoAP
from tests.eval.metric_cases import (
    IS_THING,
    columns_mask,
    instances,
    random_instances,
    random_pair,
    truth,
)


def ap(record, prediction):
    metric = CocoAP(IS_THING)
    metric.update(prediction, record)
    return metric


# Things of 2 and 8 columns (8 and 32 pixels, "small"), both of class 0.
TWO_THINGS = truth([1] * 2 + [2] * 8, {1: 0, 2: 0})


def test_ap_perfect(capsys):
    metric = ap(TWO_THINGS, instances((0, 0.9, columns_mask(0, 2)), (0, 0.3, columns_mask(2, 10))))
    values = metric.compute()
    assert [values[f"instance/{n}"] for n in ("AP", "AP50", "AP75", "APs")] == pytest.approx(
        [100] * 4
    )
    # No instance is that large; class 1 and the stuff have no instance.
    assert set(metric.undefined()) == {"instance/APm", "instance/APl"}
    assert "32^2" in metric.undefined()["instance/APm"]
    np.testing.assert_allclose(metric.per_class()["instance/AP"], [100, np.nan, np.nan, np.nan])
    assert capsys.readouterr().out == ""


def test_ap_partly_found():
    # The second detection covers 5 of 8 columns: IoU 0.625, a match at 0.5, 0.55 and 0.6 only.
    # At the other 7 thresholds recall ends at 1/2, which 51 of the 101 recall points reach.
    metric = ap(TWO_THINGS, instances((0, 0.9, columns_mask(0, 2)), (0, 0.3, columns_mask(2, 7))))
    values = metric.compute()
    assert values["instance/AP"] == pytest.approx(100 * (3 + 7 * 51 / 101) / 10)
    assert values["instance/AP50"] == pytest.approx(100)
    assert values["instance/AP75"] == pytest.approx(100 * 51 / 101)


def test_ap_false_positive_ahead():
    # The best score is wrong, so precision is 1/2 and then 2/3: the envelope is 2/3 everywhere.
    metric = ap(
        TWO_THINGS,
        instances(
            (0, 0.95, columns_mask(4, 5)),
            (0, 0.9, columns_mask(0, 2)),
            (0, 0.3, columns_mask(2, 10)),
        ),
    )
    assert metric.compute()["instance/AP"] == pytest.approx(200 / 3)


def test_ap_is_the_mean_over_classes_with_truth():
    # Class 0 is found, class 1 is not; the stuff is no instance.
    record = truth([1] * 2 + [2] * 4 + [3] * 4, {1: 0, 2: 1, 3: 2})
    metric = ap(record, instances((0, 0.9, columns_mask(0, 2))))
    assert metric.compute()["instance/AP"] == pytest.approx(50)
    np.testing.assert_allclose(metric.per_class()["instance/AP"], [100, 0, np.nan, np.nan])
    assert metric.counts() == {
        "instance/images": 1,
        "instance/ground_truth": 2,
        "instance/crowds": 0,
        "instance/detections": 1,
    }


def test_ap_crowd_is_ignored():
    # Three detections inside the crowd cost nothing, and the crowd need not be found.
    record = truth([1] * 4 + [2] * 6, {1: 0, 2: 0}, crowd={2})
    found = [(0, 0.9 - i / 100, columns_mask(4 + i, 6 + i)) for i in range(3)]
    metric = ap(record, instances(*found, (0, 0.1, columns_mask(0, 4))))
    assert metric.compute()["instance/AP"] == pytest.approx(100)
    assert metric.counts()["instance/crowds"] == 1
    # As plain instance, segment 2 would be missed and the three would be wrong.
    plain = ap(
        truth([1] * 4 + [2] * 6, {1: 0, 2: 0}), instances(*found, (0, 0.1, columns_mask(0, 4)))
    )
    assert plain.compute()["instance/AP"] < 20


def test_ap_sizes_follow_the_annotated_area():
    # 32 pixels on the map, but annotated as 2000: medium.
    record = truth([1] * 2 + [2] * 8, {1: 1, 2: 0}, areas={2: 2000})
    values = ap(record, instances((0, 0.9, columns_mask(2, 10)))).compute()
    assert values["instance/APm"] == pytest.approx(100)
    assert values["instance/APs"] == 0  # the other one, missed


def test_ap_counts_100_detections_of_an_image_and_class():
    wrong = [(0, 0.9, columns_mask(4, 5))] * 100
    good = [(0, 0.1, columns_mask(0, 2)), (0, 0.1, columns_mask(2, 10))]
    assert ap(TWO_THINGS, instances(*wrong[:98], *good)).compute()["instance/AP"] > 0
    assert ap(TWO_THINGS, instances(*wrong, *good)).compute()["instance/AP"] == 0


def test_ap_without_detections_or_truth():
    assert ap(TWO_THINGS, instances()).compute()["instance/AP"] == 0
    metric = ap(truth([1] * 10, {1: 2}), instances((0, 0.5, columns_mask(0, 2))))
    assert np.isnan(list(metric.compute().values())).all()
    assert "no instance" in metric.undefined()["instance/AP"]
    stuff_only = CocoAP((False, False))
    stuff_only.update(instances(), truth([1] * 10, {1: 1}))
    assert stuff_only.undefined().keys() == stuff_only.compute().keys()
    assert np.isnan(CocoAP(IS_THING).compute()["instance/AP"])


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (instances((2, 0.5, columns_mask(0, 2))), "class 2 is stuff"),
        (instances((4, 0.5, columns_mask(0, 2))), "class id 4"),
        (instances((0, np.nan, columns_mask(0, 2))), "not finite"),
        (instances((0, 0.5, columns_mask(0, 2, 9)), shape=(4, 9)), "original size"),
    ],
)
def test_ap_bad_input(prediction, message):
    with pytest.raises(ValueError, match=f"image 7.*{message}"):
        ap(TWO_THINGS, prediction)


def test_ap_rejects_an_image_twice():
    metric = ap(TWO_THINGS, instances())
    with pytest.raises(ValueError, match="image 7 was scored twice"):
        metric.update(instances(), TWO_THINGS)
    with pytest.raises(ValueError, match="image 7 was scored twice"):
        metric.merge(ap(TWO_THINGS, instances()))


def test_ap_equals_pycocotools_on_files():
    """The usual way, through COCO annotations and `loadRes`, gives the same twelve digits."""
    rng = np.random.default_rng(1)
    metric = CocoAP(IS_THING)
    images, annotations, results = [], [], []
    # Ids of unequal length, out of order: ties must be broken in the order of the numbers.
    for number in rng.permutation([3, 20, 100, 7, 45, 1000]):
        record, _ = random_pair(rng, str(number))
        prediction = random_instances(rng, record, record["panoptic"].shape)
        metric.update(prediction, record)
        images.append(dict(id=int(number), height=24, width=32))

        def encode(mask):
            return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))

        annotations += [
            dict(
                id=len(annotations) + n,
                image_id=int(number),
                category_id=s["category"],
                iscrowd=int(s["iscrowd"]),
                area=s["area"],
                segmentation=encode(record["panoptic"] == s["id"]),
            )
            for n, s in enumerate((s for s in record["segments"] if s["category"] < 2), start=1)
        ]
        results += [
            dict(
                image_id=int(number),
                category_id=int(label),
                score=float(score),
                segmentation=encode(mask),
            )
            for label, score, mask in zip(
                prediction.labels, prediction.scores, prediction.masks, strict=True
            )
        ]
    coco = COCO()
    coco.dataset = dict(images=images, annotations=annotations, categories=[{"id": 0}, {"id": 1}])
    coco.createIndex()
    run = COCOeval(coco, coco.loadRes(results), "segm")
    run.evaluate()
    run.accumulate()
    run.summarize()
    values = metric.compute()
    assert 0 < run.stats[0] < 1
    for i, name in enumerate(("AP", "AP50", "AP75", "APs")):
        assert values[f"instance/{name}"] == pytest.approx(100 * run.stats[i], rel=1e-12)


def test_ap_result_follows_new_images():
    """A computed result is not kept beyond the next update or merge."""
    metric = ap(TWO_THINGS, instances((0, 0.9, columns_mask(0, 2)), (0, 0.3, columns_mask(2, 10))))
    assert metric.compute()["instance/AP"] == pytest.approx(100)
    metric.update(instances(), TWO_THINGS | {"image_id": "8"})
    assert metric.compute()["instance/AP"] < 60
