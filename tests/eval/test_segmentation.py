"""One result, three tasks: its segments in one order, and the forms that others read."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from oneformer_jax.eval.postprocess import PostprocessConfig, segment_batch
from oneformer_jax.eval.segmentation import Instances, Segmentation
from oneformer_jax.types import VOID
from tests.eval.tiny_segmenter import METADATA, picture

IMAGE = picture(6, 8)


def panoptic():
    segments = np.zeros((6, 8), np.int32)
    segments[:2] = 1
    segments[2:, :5] = 2
    infos = [
        dict(id=1, category_id=3, isthing=False, score=0.5, area=16),
        dict(id=2, category_id=1, isthing=True, score=0.9, area=20),
    ]
    return Segmentation("panoptic", METADATA, segments=segments, segments_info=infos, image=IMAGE)


def semantic():
    classes = np.full((6, 8), 2, np.int32)
    classes[0], classes[1] = 4, VOID
    return Segmentation("semantic", METADATA, class_map=classes, image=IMAGE)


def instance():
    masks = np.zeros((3, 6, 8), bool)
    masks[0, 1:4, 2:5] = True
    masks[1, 1:4, 2:6] = True
    found = Instances(masks, np.array([0.8, 0.7, 0.1], np.float32), np.array([0, 2, 1], np.int32))
    return Segmentation("instance", METADATA, instances=found, image=IMAGE)


def test_segments_of_every_task_are_described_alike():
    first, second, third = panoptic(), semantic(), instance()
    assert first.labels.tolist() == [1, 3] and first.scores.tolist() == pytest.approx([0.9, 0.5])
    assert first.areas.tolist() == [20, 16]
    assert first.boxes.tolist() == [[0, 2, 5, 6], [0, 0, 8, 2]]
    assert first.names == [METADATA.class_names[1], METADATA.class_names[3]]
    assert second.labels.tolist() == [2, 4] and second.scores is None
    assert second.areas.tolist() == [32, 8]
    np.testing.assert_array_equal(second.masks[1], second.class_map == 4)
    assert third.areas.tolist() == [9, 12, 0] and third.boxes[2].tolist() == [0, 0, 0, 0]
    assert third.masks is third.instances.masks
    for one in (first, second, third):
        assert len(one) == len(one.masks) == len(one.names) == len(one.boxes)
        assert one.masks.dtype == bool and one.labels.dtype == np.int32


def test_the_repr_is_short_and_tells_what_was_found():
    names = METADATA.class_names
    assert repr(panoptic()) == f"Segmentation(panoptic, 6 x 8: {names[1]} 0.90, {names[3]} 0.50)"
    assert repr(semantic()) == f"Segmentation(semantic, 6 x 8: {names[2]}, {names[4]})"
    empty = Segmentation("panoptic", METADATA, segments=np.zeros((6, 8), int), segments_info=[])
    assert repr(empty) == "Segmentation(panoptic, 6 x 8: no segments)"


def test_a_notebook_shows_the_overlay():
    with Image.open(io.BytesIO(panoptic()._repr_png_())) as shown:
        assert shown.format == "PNG" and shown.size == (8 * 80, 6 * 80)
    assert Segmentation("semantic", METADATA, class_map=semantic().class_map)._repr_png_() is None


@pytest.mark.parametrize("make", [panoptic, semantic, instance])
def test_coco_results_are_json_and_hold_the_masks(make):
    result = make()
    found = json.loads(json.dumps(result.to_coco("a")))
    assert len(found) == len(result)
    for entry, mask, label in zip(found, result.masks, result.labels, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), mask)
        assert entry["image_id"] == "a"
        assert entry["category_id"] == METADATA.category_ids[label]
        assert entry["area"] == mask.sum()
        assert ("score" in entry) == (result.task != "semantic")
    left, top, right, bottom = result.boxes[0]
    assert found[0]["bbox"] == [left, top, right - left, bottom - top]


def test_pictures_show_the_instances_that_were_asked_for():
    weak = dataclasses.replace(
        instance(), instances=instance().instances._replace(scores=np.full(3, 0.3, np.float32))
    )
    np.testing.assert_array_equal(weak.overlay(labels=False), IMAGE)
    asked = dataclasses.replace(weak, threshold=0.2)
    assert (asked.overlay(labels=False) != IMAGE).any()
    np.testing.assert_array_equal(asked.overlay(labels=False, min_score=0.5), IMAGE)


def test_save_writes_the_files_of_a_prediction(tmp_path):
    names = {path.name for path in panoptic().save(tmp_path, "b")}
    assert names == {"b_panoptic.png", "b_panoptic.json", "b_panoptic_overlay.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("make", [panoptic, semantic, instance])
def test_supervision_gets_boxes_masks_and_names(make):
    pytest.importorskip("supervision", reason="the extra 'supervision' is not installed")
    result = make()
    found = result.to_supervision()
    assert len(found) == len(result)
    np.testing.assert_array_equal(found.xyxy, result.boxes)
    np.testing.assert_array_equal(found.mask, result.masks)
    np.testing.assert_array_equal(found.class_id, result.labels)
    assert found.data["class_name"].tolist() == result.names
    assert (found.confidence is None) == (result.task == "semantic")


def test_without_supervision_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ValueError, match=r"oneformer-jax\[supervision\]"):
        panoptic().to_supervision()


def test_duplicates_are_left_out_on_request():
    """Three queries: two of the same mask and different classes, one elsewhere."""
    logits = np.full((1, 3, METADATA.num_classes + 1), -9.0, np.float32)
    logits[0, 0, 0], logits[0, 1, 1], logits[0, 2, 0] = 4.0, 3.0, 2.0
    masks = np.full((1, 3, 8, 8), -9.0, np.float32)
    masks[0, :2, :4] = 9.0
    masks[0, 2, 4:] = 9.0
    size = np.array([[32, 32]])

    def run(**options):
        config = PostprocessConfig(topk=3, things_only_instances=False, **options)
        (found,) = segment_batch(
            logits, masks, size, size, (32, 32), task="instance", config=config, metadata=METADATA
        )
        return found

    assert len(run()) == 3
    kept = run(instance_max_iou=0.5)
    assert kept.labels.tolist() == [0, 0] and not (kept.masks[0] & kept.masks[1]).any()
    with pytest.raises(ValueError, match="instance_max_iou"):
        PostprocessConfig(instance_max_iou=2)
