"""Targets of the three tasks on hand-made maps."""

import numpy as np
import pytest

from oneformer_jax.input_pipeline import targets
from oneformer_jax.input_pipeline.datasets import TASKS

PANOPTIC, INSTANCE, SEMANTIC = (TASKS.index(t) for t in ("panoptic", "instance", "semantic"))
IS_THING = (False, True, True, False)  # sky, person, dog, road


def segment(id, category, iscrowd=False):
    return {"id": id, "category": category, "iscrowd": iscrowd, "area": 1}


BIG = 200_000  # ids are 24 bits wide
SEGMENTS = [
    segment(90, 1),  # has no pixel left
    segment(7, 3),
    segment(BIG, 1),
    segment(20, 2, iscrowd=True),
    segment(5, 2),
    segment(6, 1),
    segment(8, 3),
]
#                 road  person dog(crowd) unknown dog person void road unknown, above all ids
MAP = np.array(
    [
        [7, 7, BIG, BIG, 20, 99],
        [7, 7, 5, 6, 20, 0],
        [8, 8, 5, 6, BIG + 900_000, 0],
    ],
    np.int32,
)


def make(task, num_slots=6, panoptic=MAP, segments=SEGMENTS):
    return targets.make_targets(panoptic, segments, task, num_slots, IS_THING)


def test_panoptic_has_one_slot_per_segment():
    result = make(PANOPTIC)
    expected = [[1, 1, 2, 2, 0, 0], [1, 1, 3, 4, 0, 0], [5, 5, 3, 4, 0, 0]]
    np.testing.assert_array_equal(result.segment_map, expected)
    np.testing.assert_array_equal(result.classes, [3, 1, 2, 1, 3, 0])
    np.testing.assert_array_equal(result.valid, [True] * 5 + [False])
    assert result.dropped == 0
    assert result.segment_map.dtype == np.uint8
    assert result.classes.dtype == np.int32 and result.valid.dtype == bool


def test_instance_has_things_only():
    result = make(INSTANCE)
    expected = [[0, 0, 1, 1, 0, 0], [0, 0, 2, 3, 0, 0], [0, 0, 2, 3, 0, 0]]
    np.testing.assert_array_equal(result.segment_map, expected)
    np.testing.assert_array_equal(result.classes[result.valid], [1, 2, 1])


def test_semantic_merges_classes_in_order_of_first_appearance():
    result = make(SEMANTIC)
    expected = [[1, 1, 2, 2, 0, 0], [1, 1, 3, 2, 0, 0], [1, 1, 3, 2, 0, 0]]
    np.testing.assert_array_equal(result.segment_map, expected)
    # Class 1 is listed first, but by a segment that has no pixel left.
    np.testing.assert_array_equal(result.classes[result.valid], [3, 1, 2])


def test_more_segments_than_slots_keeps_the_largest_in_order():
    result = make(PANOPTIC, num_slots=2)
    expected = [[1, 1, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(result.segment_map, expected)
    np.testing.assert_array_equal(result.classes, [3, 1])
    assert result.dropped == 3
    semantic = make(SEMANTIC, num_slots=2)  # areas: road 6, person 4, dog 2
    np.testing.assert_array_equal(semantic.classes, [3, 1])
    assert semantic.dropped == 1


@pytest.mark.parametrize("task", range(3))
@pytest.mark.parametrize(
    ("panoptic", "segments"),
    [
        (np.zeros((2, 3), np.int32), SEGMENTS),
        (MAP, []),
        (np.full((2, 3), 20, np.int32), SEGMENTS),  # crowd only
    ],
)
def test_nothing_left(task, panoptic, segments):
    result = make(task, panoptic=panoptic, segments=segments)
    assert not result.segment_map.any() and not result.valid.any() and not result.classes.any()


def test_void_stays_void_even_if_listed():
    result = make(PANOPTIC, panoptic=np.zeros((2, 2), np.int32), segments=[segment(0, 3)])
    assert not result.segment_map.any() and not result.valid.any()


def test_many_segments_fill_every_slot():
    ids = np.arange(1, 401, dtype=np.int32).reshape(20, 20) * 1000
    segments = [segment(int(i), 1) for i in ids.flat]
    result = make(PANOPTIC, 255, np.repeat(ids, 2, axis=1), segments)
    assert result.valid.all() and result.dropped == 145
    counts = np.bincount(result.segment_map.reshape(-1), minlength=256)
    np.testing.assert_array_equal(counts[1:], np.full(255, 2))


@pytest.mark.parametrize("num_slots", [0, 256])
def test_slots_out_of_range(num_slots):
    with pytest.raises(ValueError, match=r"data\.num_slots"):
        make(PANOPTIC, num_slots)


def test_text_ids_follow_class_order_then_padding():
    classes = np.array([3, 1, 2, 1, 0], np.int32)
    valid = np.array([True, True, True, True, False])
    ids = targets.text_ids(classes, valid, INSTANCE, 7, num_classes=4)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [1, 1, 2, 3, 4 + INSTANCE, 4 + INSTANCE, 4 + INSTANCE])
    np.testing.assert_array_equal(targets.text_ids(classes, valid, SEMANTIC, 3, 4), [1, 1, 2])
    empty = targets.text_ids(classes, np.zeros(5, bool), PANOPTIC, 2, 4)
    np.testing.assert_array_equal(empty, [4 + PANOPTIC] * 2)


@pytest.mark.parametrize(
    ("task", "things"),
    [(PANOPTIC, [False, True, True, False]), (INSTANCE, [True, True]), (SEMANTIC, [False] * 3)],
)
def test_text_ids_name_the_type_of_each_segment(task, things):
    """Amorphous masks are stuff: all under the semantic task, those of stuff under the panoptic."""
    classes = {PANOPTIC: [0, 1, 1, 3], INSTANCE: [1, 2], SEMANTIC: [0, 1, 3]}[task]
    valid = np.ones(len(classes), bool)
    ids = targets.text_ids(np.array(classes, np.int32), valid, task, 6, 4, IS_THING)
    expected = [c + 7 * thing for c, thing in zip(classes, things, strict=True)]
    np.testing.assert_array_equal(ids, expected + [4 + task] * (6 - len(classes)))
    assert ids.dtype == np.int32


class Fixed:
    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize(
    ("u", "probabilities", "expected"),
    [
        (0.0, (0.33, 0.33), SEMANTIC),
        (0.3299, (0.33, 0.33), SEMANTIC),
        (0.33, (0.33, 0.33), INSTANCE),
        (0.6599, (0.33, 0.33), INSTANCE),
        (0.66, (0.33, 0.33), PANOPTIC),
        (0.9999, (0.33, 0.33), PANOPTIC),
        (0.5, (0.5, 0.0), PANOPTIC),  # Mapillary Vistas: never instance
        (0.4999, (0.5, 0.0), SEMANTIC),
        (0.0, (0.0, 1.0), INSTANCE),
    ],
)
def test_task_thresholds(u, probabilities, expected):
    assert targets.sample_task(Fixed(u), *probabilities) == expected
