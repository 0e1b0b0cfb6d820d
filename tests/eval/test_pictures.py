"""Overlays and sheets: what a viewer relies on, read off the pixels."""

import itertools

import cv2
import numpy as np
import pytest

from oneformer_jax.eval.pictures import overlay, sheets
from oneformer_jax.eval.segmentation import Segmentation
from tests import tiny

METADATA = tiny.metadata()


def scene(value=128, size=(120, 160)):
    """Sky above road, two cats, a strip of void."""
    panoptic = np.full(size, 1, np.int32)
    panoptic[60:] = 2
    panoptic[20:50, 20:70] = 3
    panoptic[70:110, 90:140] = 4
    panoptic[:, 150:] = 0
    segments = [dict(id=i, category=c, iscrowd=False) for i, c in ((1, 3), (2, 4), (3, 0), (4, 0))]
    return dict(image=np.full((*size, 3), value, np.uint8), panoptic=panoptic, segments=segments)


def draw(record, task="panoptic", **options):
    return Segmentation.from_record(record, METADATA, task).overlay(**options)


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_segments_are_blended_with_their_class_colours(task):
    record = scene(100)
    picture = draw(record, task, labels=False, alpha=0.4)
    assert picture.dtype == np.uint8 and picture.shape == record["image"].shape
    for (y, x), label in {(5, 5): 3, (115, 5): 4, (35, 45): 0}.items():
        expected = np.rint(0.6 * 100 + 0.4 * np.array(METADATA.colors[label]))
        np.testing.assert_array_equal(picture[y, x], expected)
    assert (picture[:, 155:] == 100).all(), "void must stay as it is"


def test_instances_leave_the_rest_alone_and_weak_ones_out():
    truth = Segmentation.from_record(scene(100), METADATA, "instance")
    weak = Segmentation(
        "instance",
        METADATA,
        instances=truth.instances._replace(scores=np.array([0.9, 0.3], np.float32)),
        image=truth.image,
    )
    changed = (weak.overlay() != 100).any(-1)
    assert changed[35, 45] and not changed[65:].any()
    assert (weak.overlay(min_score=0.2) != 100).any(-1)[75:105, 95:135].all()


def test_things_of_one_class_differ_in_shade():
    picture = draw(scene(), labels=False).astype(int)
    assert np.abs(picture[35, 45] - picture[80, 100]).max() > 40
    for color in (*METADATA.colors, (0, 0, 0), (255, 255, 255), (128, 128, 128)):
        shades = np.array([overlay.shade(color, n) for n in range(8)])
        assert tuple(shades[0]) == color
        lab = cv2.cvtColor(shades[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
        for a, b in itertools.combinations(lab, 2):
            assert np.linalg.norm(a - b) > 15, "shades that are hard to tell apart"
    assert len(overlay.shade((1, 2, 3), 1000)) == 3


@pytest.mark.parametrize("value", [0, 128, 255])
def test_outlines_stand_out_on_any_image(value):
    """Across the border of a cat, the lightest pixel differs clearly from both its sides."""
    picture = draw(scene(value), labels=False).astype(int).sum(-1)
    row = picture[35, 10:30]
    assert row.max() - row.min() > 100
    assert len(np.unique(picture[35:45, 18:23].mean(0).round())) >= 3


def test_no_line_runs_along_the_edge_of_the_image():
    picture = draw(scene(100), labels=False)
    for y in range(5, 50):
        np.testing.assert_array_equal(picture[y, 0], picture[y, 8])


@pytest.mark.parametrize("value", [0, 255])
def test_labels_are_white_on_dark_inside_their_segments(value):
    record = scene(value, (240, 320))
    plain, labelled = draw(record, labels=False), draw(record)
    changed = (plain != labelled).any(-1)
    for segment in (1, 2, 3, 4):
        inside = changed & (record["panoptic"] == segment)
        assert inside.any(), f"segment {segment} has no label"
        text = labelled[inside].astype(int).sum(-1)
        assert text.max() > 680 and np.median(text) < 330, "text must be white, its plate dark"
    assert not changed[record["panoptic"] == 0].any()


def test_labels_do_not_overlap_and_dwarfs_have_none(monkeypatch):
    placed = []
    place = overlay._place

    def spy(region, taken, base, **options):
        placed.append((region, place(region, taken, base, **options)))
        return placed[-1][1]

    monkeypatch.setattr(overlay, "_place", spy)
    rng = np.random.default_rng(0)
    panoptic = np.ones((200, 300), np.int32)
    for i in range(2, 40):
        y, x = rng.integers(0, (180, 280))
        panoptic[y : y + 20, x : x + 30] = i
    panoptic[100, 150] = 40
    segments = [dict(id=i, category=0 if i > 1 else 3) for i in np.unique(panoptic)]
    record = dict(image=np.zeros((200, 300, 3), np.uint8), panoptic=panoptic, segments=segments)
    draw(record)
    taken = np.zeros(panoptic.shape, int)
    for region, plate in placed:
        if np.count_nonzero(region.mask) == 1:
            assert plate is None
        elif plate is not None:
            x, y, width, height, size = plate
            assert size >= 9
            assert 0 <= x <= 300 - width and 0 <= y <= 200 - height
            taken[y : y + height, x : x + width] += 1
    assert taken.max() == 1
    assert sum(plate is not None for _, plate in placed) > 10


def test_small_images_are_enlarged_by_a_whole_factor():
    record = scene(100, (128, 160))
    assert draw(record, min_size=400).shape == (512, 640, 3)
    assert draw(record, min_size=128).shape == (128, 160, 3)
    np.testing.assert_array_equal(
        draw(record, min_size=400, labels=False)[20, 20], draw(record, labels=False)[5, 5]
    )


def test_overlay_of_nothing_is_the_image():
    record = scene(77)
    record["segments"] = []
    for task in ("panoptic", "instance", "semantic"):
        np.testing.assert_array_equal(draw(record, task), record["image"])


def test_overlay_errors():
    truth = Segmentation.from_record(scene(), METADATA, "panoptic")
    with pytest.raises(ValueError, match=r"image is uint8 \[5, 5, 3\].*\[120, 160, 3\]"):
        truth.overlay(np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="float32"):
        truth.overlay(np.zeros((120, 160, 3), np.float32))
    record = scene()
    del record["image"]
    with pytest.raises(ValueError, match=r"overlay\(image\)"):
        Segmentation.from_record(record, METADATA, "panoptic").overlay()


def test_contact_sheet_shows_every_picture_under_its_title():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [np.full((h, 30, 3), c, np.uint8) for h, c in zip((20, 20, 60), colors, strict=True)]
    sheet = sheets.contact_sheet(pictures, ["one", "two", "three " * 40], columns=2)
    tops = []
    for color in colors:
        rows, columns = np.nonzero((sheet == color).all(-1))
        tops.append((rows.min(), columns.min()))
        above = sheet[rows.min() - 20 : rows.min() - 2, columns.min() : columns.max()]
        assert above.min() < 100, "no title above the picture"
    assert tops[0][1] < tops[1][1] and tops[2][0] > tops[0][0]
    assert (sheet[[0, -1]] == 255).all() and (sheet[:, [0, -1]] == 255).all()
    row = sheets.contact_sheet(pictures, ["", "", ""], columns=3, cell=(50, 200))
    for color in colors:
        assert np.ptp(np.nonzero((row == color).all(-1))[0]) == 49
    with pytest.raises(ValueError, match="2 titles for 3 images"):
        sheets.contact_sheet(pictures, ["a", "b"], columns=2)
    with pytest.raises(ValueError, match="at least one image"):
        sheets.contact_sheet([], [], columns=1)


@pytest.mark.parametrize("size", [(4, 1600), (1600, 4), (1, 5000), (5000, 1), (2, 2), (900, 1300)])
def test_pictures_of_strips_are_bounded(size):
    record = scene(size=(120, 160))
    record["image"] = cv2.resize(record["image"], size[::-1])
    record["panoptic"] = cv2.resize(record["panoptic"], size[::-1], interpolation=0)
    result = Segmentation.from_record(record, METADATA, "panoptic")
    height, width = result.overlay(min_size=480, max_pixels=1 << 20).shape[:2]
    assert height * width <= max(1 << 20, size[0] * size[1])
    # Enlarged by a whole factor, if at all.
    assert (height % size[0], width % size[1]) == (0, 0) or size == (900, 1300)
    sheet = sheets.contact_sheet([record["image"]] * 3, ["", "", ""], columns=3, cell=(100, 400))
    assert sheet.shape[0] < 400 and sheet.shape[1] < 1600


@pytest.mark.parametrize("size", [(300, 400), (1, 5000), (5000, 1), (70, 3)])
def test_large_images_are_drawn_smaller(size):
    record = scene(100, size=(120, 160))
    record["image"] = cv2.resize(record["image"], size[::-1])
    record["panoptic"] = cv2.resize(record["panoptic"], size[::-1], interpolation=0)
    for task in ("panoptic", "instance", "semantic"):
        result = Segmentation.from_record(record, METADATA, task)
        picture = result.overlay(max_pixels=100, labels=False)
        assert picture.dtype == np.uint8 and 0 < picture.shape[0] * picture.shape[1] <= 100


def test_objects_of_a_video_show_their_number_and_have_its_shade():
    panoptic = np.ones((120, 240), np.int32)
    panoptic[20:80, 10:100], panoptic[20:80, 140:230] = 2, 3
    segments = [dict(id=1, category=3), dict(id=2, category=0), dict(id=3, category=0)]
    record = dict(image=np.zeros((120, 240, 3), np.uint8), panoptic=panoptic, segments=segments)
    result = Segmentation.from_record(record, METADATA, "panoptic")
    regions = overlay._regions(result, 0.0, (240, 120), [0, 4, 1])
    assert [region.text for region in regions] == [
        METADATA.class_names[3],
        f"{METADATA.class_names[0]} 5",
        f"{METADATA.class_names[0]} 2",
    ]
    assert [region.color for region in regions] == [
        overlay.shade(METADATA.colors[c], n) for c, n in ((3, 0), (0, 4), (0, 1))
    ]


def test_the_label_of_a_video_stays_near_the_middle_of_its_segment():
    """The widest place jumps from one side to the other when the segment hardly changes."""
    distances = {}
    for steady in (False, True):
        found = []
        for left in (5, 165):
            mask = np.zeros((120, 300), bool)
            mask[30:90, 5:295] = mask[5:115, left : left + 130] = True
            region = overlay._Region(mask, (9, 9, 9), "sky", False)
            x, y, width, height, _ = overlay._place(region, ~mask, 12, steady=steady)
            assert mask[y : y + height, x : x + width].all()
            found.append(x + width / 2)
        distances[steady] = abs(found[0] - found[1])
    assert distances[False] > 100 and distances[True] < 60, distances
