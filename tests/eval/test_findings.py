"""The findings of an evaluation: outcomes of images, confused classes, best and worst images."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from oneformer_jax.eval.findings import KEPT, Findings
from oneformer_jax.eval.metrics.iou import MeanIoU
from oneformer_jax.eval.metrics.outcome import NOTHING, Outcome, of_instances, of_pixels
from oneformer_jax.eval.metrics.pq import PanopticQuality
from oneformer_jax.eval.pictures import confusion
from oneformer_jax.eval.segmentation import Segmentation
from tests import tiny
from tests.train import eval_scenes

METADATA = tiny.metadata()


def truth_of(number, task):
    record = eval_scenes.record(number)
    return record, Segmentation.from_record(record, METADATA, task)


def test_panoptic_mistakes_are_missed_invented_and_confused():
    record, found = truth_of(0, "panoptic")
    infos = [dict(info) for info in found.segments_info]
    segments = found.segments.copy()
    infos[1]["category_id"] = 2  # confused: 1 taken for 2
    segments[segments == 3] = 0  # missed: class 2
    infos = [info for info in infos if info["id"] != 3]
    segments[72:100, 100:124] = 9  # invented in a part of class 3
    infos.append(dict(id=9, category_id=0, isthing=True, score=1.0, area=1))
    changed = dataclasses.replace(found, segments=segments, segments_info=infos)
    outcome = PanopticQuality(METADATA.is_thing).update(changed, record)
    assert sorted(m[:2] for m in outcome.mistakes) == [(NOTHING, 0), (1, 2), (2, NOTHING)]
    assert 0 < outcome.score < 80
    assert PanopticQuality(METADATA.is_thing).update(found, record) == Outcome(100.0, [])


def test_unsure_instances_and_those_on_crowds_are_no_mistakes():
    true, crowd = np.array([0, 1]), np.array([False, True])
    iou = np.array([[0.9, 0.8, 0.0, 0.0], [0.0, 0.0, 0.0, 0.7]])
    predicted, scores = np.array([0, 0, 2, 1]), np.array([0.9, 0.8, 0.4, 0.9])
    outcome = of_instances(true, crowd, predicted, scores, iou)
    assert outcome == Outcome(pytest.approx(200 / 3), [(NOTHING, 0, 1.0)])
    nothing = of_instances(true[:0], crowd[:0], predicted[:0], scores[:0], np.zeros((0, 0)))
    assert nothing == Outcome(None, [])


def test_a_semantic_outcome_is_the_mean_iou_of_the_image():
    outcome = of_pixels(np.array([0, 0, 3]), np.array([0, 3, 3]), np.array([60, 20, 20]))
    assert outcome == Outcome(pytest.approx(100 * (60 / 80 + 20 / 40) / 2), [(0, 3, 20.0)])


def test_the_pairs_of_classes_add_up_over_images_and_hosts():
    metrics = []
    for number in (0, 1):
        record, found = truth_of(number, "semantic")
        wrong = np.where(found.class_map == 1, 2, found.class_map)
        metrics.append(MeanIoU(METADATA.num_classes))
        metrics[-1].update(dataclasses.replace(found, class_map=wrong), record)
    whole = MeanIoU.from_state(metrics[0].state())
    whole.merge(metrics[1])
    table = np.zeros((METADATA.num_classes, METADATA.num_classes), np.int64)
    true, predicted, pixels = whole.pairs()
    table[true, predicted] = pixels
    hits, true, _ = whole.totals()
    np.testing.assert_array_equal(table.sum(axis=1), true)
    np.testing.assert_array_equal(np.diagonal(table), hits)
    assert table[1, 2] == true[1] and table[1, 1] == 0


def test_the_most_confused_classes_are_kept_and_the_others_summed_up():
    true, predicted = np.array([0, 1, 2, 2, 3, 4]), np.array([0, 1, 2, 4, 3, 4])
    pairs = (true, predicted, np.array([10, 20, 30, 5, 40, 50]))
    found = confusion.most_confused(list("abcdef"), pairs, 3)
    assert found.names == ["c", "e", "3 other classes"]  # "f" does not occur
    assert found.pixels.tolist() == [[30, 5, 0], [0, 50, 0], [0, 0, 70]]
    every = confusion.most_confused(list("abcdef"), pairs, 6, absent=True)
    assert every.names == list("abcdef")
    assert np.isnan(every.shares()[5]).all()
    np.testing.assert_allclose(every.shares()[:5].sum(axis=1), 1)


@pytest.mark.parametrize("name", ["a\nb\x00c", "", "w" * 5000, "‮<b>", "\ud800"])
def test_any_class_name_can_be_drawn(name):
    picture = confusion.draw(confusion.Confusion([name, "b"], np.array([[1, 1], [0, 0]])))
    assert picture.shape[1] < 700


def test_the_best_and_worst_images_are_kept_whatever_the_order_and_the_hosts(tmp_path):
    record, found = truth_of(0, "panoptic")
    hosts = [Findings(METADATA), Findings(METADATA)]
    order = np.random.default_rng(0).permutation(40)
    for score in order.tolist():
        mistakes = [(0, NOTHING, 2.0)]
        named = record | {"image_id": f"image {score}"}
        hosts[score % 2].add(found, named, Outcome(float(score), mistakes))
    hosts[0].add(found, record, Outcome(None, []))
    merged = Findings.from_state(hosts[0].state())
    merged.merge(Findings.from_state(hosts[1].state()))
    merged.write(tmp_path)
    listed = json.loads((tmp_path / "examples.json").read_text())["panoptic"]
    assert [e["score"] for e in listed["worst"]] == [0, 1, 2]
    assert [e["score"] for e in listed["best"]] == [39, 38, 37]
    expected = f"2 × missed: {METADATA.class_names[0]}"
    assert listed["worst"][0] == {"image": "image 0", "score": 0, "mistakes": [expected]}
    pictures = sorted(p.name for p in (tmp_path / "examples").iterdir())
    assert len(pictures) == 2 * KEPT
    with Image.open(tmp_path / "examples" / "panoptic_worst_1.jpg") as picture:
        assert picture.width > 900


def test_labels_among_the_things_are_drawn_as_their_classes():
    record, found = truth_of(0, "instance")
    things = np.flatnonzero(METADATA.is_thing)
    places = np.searchsorted(things, found.instances.labels).astype(np.int32)
    remapped = dataclasses.replace(found, instances=found.instances._replace(labels=places))
    pictures = []
    for thing_labels, one in ((False, found), (True, remapped)):
        findings = Findings(METADATA, thing_labels=thing_labels)
        findings.add(one, record, Outcome(1.0, []))
        pictures.append(findings.state()["json"].tobytes().partition(b'"picture"')[2])
    assert pictures[0] == pictures[1]


def test_a_later_evaluation_without_semantic_scores_leaves_no_old_matrix(tmp_path):
    record, found = truth_of(0, "semantic")
    metric = MeanIoU(METADATA.num_classes)
    findings = Findings(METADATA)
    findings.add(found, record, metric.update(found, record))
    findings.finish(findings, metric)
    findings.write(tmp_path)
    matrix = json.loads((tmp_path / "confusion.json").read_text())
    assert matrix["classes"] == list(METADATA.class_names)
    assert np.trace(np.array(matrix["shares"])) == METADATA.num_classes
    assert (tmp_path / "confusion.png").exists()
    later = Findings(METADATA)
    later.write(tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["examples", "examples.json"]
    assert not list((tmp_path / "examples").iterdir())
