"""Identities that follow segments: motion, crossing, hiding, splits."""

import numpy as np
import pytest

from oneformer_jax.eval import tracking
from oneformer_jax.eval.tracking import Patch, Tracker

SIZE = (60, 200)


def box(top, left, height=20, width=20):
    mask = np.zeros(SIZE, bool)
    mask[max(0, top) : top + height, max(0, left) : left + width] = True
    return mask


def run(frames, labels=None, **options):
    """The ids that a tracker gives to the masks of each frame."""
    tracker = Tracker(**options)
    return [
        [
            identity.id
            for identity in tracker.update(
                [Patch.of(mask) for mask in masks], labels[t] if labels else [0] * len(masks)
            )
        ]
        for t, masks in enumerate(frames)
    ]


def test_a_patch_is_the_smallest_box_and_keeps_no_frame_alive():
    mask = box(5, 7, 3, 4)
    mask[5, 7] = False
    patch = Patch.of(mask)
    assert (patch.top, patch.left, patch.mask.shape) == (5, 7, (3, 4))
    assert patch.mask.base is None and patch.mask.sum() == 11
    assert Patch.of(np.zeros(SIZE, bool)).mask.size == 0


def test_the_overlap_of_patches_counts_the_common_pixels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, second = (
            box(*rng.integers(-5, 60, 2), *rng.integers(1, 30, 2)) & (rng.random(SIZE) < 0.7)
            for _ in range(2)
        )
        expected = np.count_nonzero(first & second)
        assert Patch.of(first).overlap(Patch.of(second)) == expected


def test_the_patches_of_a_map_are_those_of_its_masks():
    segments = np.zeros(SIZE, np.int32)
    segments[3:10, 4:50], segments[5:30, 90:95], segments[7, 20] = 1, 4, 2
    for id_, patch in zip((4, 1, 2), tracking.patches(segments, [4, 1, 2]), strict=True):
        assert patch[:2] == Patch.of(segments == id_)[:2]
        np.testing.assert_array_equal(patch.mask, Patch.of(segments == id_).mask)
    (empty,) = tracking.patches(segments, [3])
    assert not empty.mask.size and tracking.patches(segments, []) == []


def test_objects_keep_their_ids_when_the_model_lists_them_in_another_order():
    rng = np.random.default_rng(1)
    frames, orders = [], []
    for t in range(12):
        objects = [box(0, 4 * t), box(25, 150 - 5 * t), box(40, 60 + 2 * t, 15, 30)]
        order = rng.permutation(3)
        frames.append([objects[i] for i in order])
        orders.append(order)
    first = run(frames)[0]
    names = dict(zip(orders[0].tolist(), first, strict=True))
    for ids, order in zip(run(frames), orders, strict=True):
        assert ids == [names[i] for i in order.tolist()]


def test_two_objects_that_pass_each_other_keep_their_ids():
    for speed in (3, 5, 8):
        frames = []
        for t in range(24):
            left, right = speed * t, 23 * speed - speed * t
            # One that is hidden by the other is not seen.
            hidden = abs(left - right) < 10
            frames.append([box(20, left)] if hidden else [box(20, left), box(20, right)])
        ids = run(frames)
        assert any(len(found) == 1 for found in ids), "they must meet"
        assert ids[0] == ids[-1] and set(ids[0]) == set().union(*ids), f"speed {speed}: {ids}"


def test_a_fast_object_is_followed_by_its_motion():
    """Without the motion its frames would overlap by less than the limit."""
    starts = np.cumsum([0, 3, 6, 9, 12, 14, 15, 15, 15, 15, 15])
    ids = run([[box(20, int(left))] for left in starts], min_iou=0.3)
    assert {i for found in ids for i in found} == {1}


def test_a_segment_that_vanishes_for_some_frames_keeps_its_id():
    seen = [[box(20, 3 * t)] for t in range(30)]
    for gap in (1, 3, 7):
        frames = [[] if 10 <= t < 10 + gap else masks for t, masks in enumerate(seen)]
        assert {i for found in run(frames, memory=8) for i in found} == {1}


def test_a_segment_that_is_gone_for_too_long_is_another_object():
    frames = [[box(20, 20)], *[[]] * 4, [box(20, 20)]]
    assert run(frames, memory=4)[-1] == [2]
    assert run(frames, memory=5)[-1] == [1]


def test_a_missing_segment_does_not_take_the_id_of_a_seen_one():
    """A new object appears where another was some frames ago, which has moved on."""
    frames = [[box(20, 2 * t)] for t in range(6)]
    frames.append([box(20, 0), box(20, 12)])
    assert run(frames)[-1] == [2, 1]


def test_the_larger_part_of_a_split_segment_keeps_the_id_and_the_other_gets_it_back():
    whole = [box(20, 20, 20, 50)]
    parts = [box(20, 20, 20, 35), box(20, 60, 20, 10)]
    ids = run([whole, parts, parts[::-1], whole, parts])
    assert ids == [[1], [1, 2], [2, 1], [1], [1, 2]]


def test_objects_of_two_classes_never_share_an_id():
    frames = [[box(20, 20), box(20, 24)], [box(20, 20), box(20, 24)], [box(20, 22)]]
    ids = run(frames, labels=[[0, 1], [1, 0], [1]])
    assert ids == [[1, 2], [2, 1], [2]]


def test_ids_of_a_frame_are_distinct_whatever_is_found():
    rng = np.random.default_rng(2)
    tracker = Tracker(first=7)
    for _ in range(60):
        count = rng.integers(0, 8)
        masks = [box(*rng.integers(-10, 60, 2), *rng.integers(1, 40, 2)) for _ in range(count)]
        found = tracker.update([Patch.of(m) for m in masks], rng.integers(0, 3, count).tolist())
        ids = [identity.id for identity in found]
        assert len(set(ids)) == count and all(i >= 7 for i in ids)
    alive = sum(map(len, tracker._tracks.values()))
    assert alive <= 8 * 9, "segments of old frames are kept"


def test_numbers_count_the_objects_of_a_class():
    tracker = Tracker(first=100)
    found = tracker.update([Patch.of(box(20, 50 * i)) for i in range(3)], [4, 2, 4])
    assert found == [(100, 0), (102, 0), (101, 1)]


def test_ids_begin_again_before_they_exceed_a_pixel(monkeypatch):
    monkeypatch.setattr(tracking, "_IDENTITIES", 6)
    far = [[box(20, 50 * (t % 4), 5, 5)] for t in range(7)]
    ids = [i for found in run(far, first=3, memory=1) for i in found]
    assert ids == [3, 4, 5, 3, 4, 5, 3]


@pytest.mark.parametrize("memory", [1, 8])
def test_empty_masks_are_segments_of_their_own(memory):
    empty = np.zeros(SIZE, bool)
    ids = run([[empty, box(20, 20)], [box(20, 20), empty]], memory=memory)
    assert ids[0] == [1, 2] and ids[1][0] == 2
