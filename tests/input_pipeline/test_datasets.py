"""The tables of the datasets."""

import dataclasses
import itertools

import numpy as np
import pytest

from oneformer_jax import types
from oneformer_jax.input_pipeline import datasets

TABLES = ("coco", "ade20k", "cityscapes", "mapillary", "synthetic")


def test_tasks_are_those_of_the_model():
    assert datasets.TASKS == types.TASKS


@pytest.mark.parametrize(
    ("name", "classes", "things", "ignore_label"),
    [
        ("coco", 133, 80, 255),
        ("ade20k", 150, 100, 255),
        ("cityscapes", 19, 8, 255),
        ("mapillary", 65, 37, 65),
        ("synthetic", 13, 7, 255),
    ],
)
def test_published_counts(name, classes, things, ignore_label):
    info = datasets.dataset_info(name)
    assert (info.dataset, info.num_classes, sum(info.is_thing)) == (name, classes, things)
    assert info.ignore_label == ignore_label


@pytest.mark.parametrize(
    ("name", "index", "class_name", "thing", "category"),
    [
        ("coco", 0, "person", True, 1),
        ("coco", 11, "stop sign", True, 13),
        ("coco", 79, "toothbrush", True, 90),
        ("coco", 80, "banner", False, 92),
        ("coco", 116, "tree-merged", False, 184),
        ("coco", 132, "rug-merged", False, 200),
        ("ade20k", 6, "road, route", False, 6),
        ("ade20k", 8, "window ", True, 8),  # the blank is the official name's
        ("ade20k", 149, "flag", True, 149),
        ("cityscapes", 10, "sky", False, 23),
        ("cityscapes", 18, "bicycle", True, 33),
        ("mapillary", 8, "Crosswalk - Plain", True, 9),
        ("mapillary", 43, "Pothole", False, 44),
        ("mapillary", 64, "Ego Vehicle", False, 65),
    ],
)
def test_entries(name, index, class_name, thing, category):
    info = datasets.dataset_info(name)
    assert (info.class_names[index], info.is_thing[index]) == (class_name, thing)
    assert info.category_ids[index] == category
    assert info.contiguous_ids()[category] == index


def test_cityscapes_colors_are_the_standard_ones():
    info = datasets.CITYSCAPES
    assert info.colors[info.class_names.index("road")] == (128, 64, 128)
    assert info.colors[info.class_names.index("bicycle")] == (119, 11, 32)


@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_the_model_metadata(name):
    info = datasets.dataset_info(name)
    assert types.Metadata(**dataclasses.asdict(info)).class_names == info.class_names
    assert len(set(info.colors)) == info.num_classes


def test_unknown_dataset_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"did you mean 'ade20k'.*cityscapes, coco, mapillary"):
        datasets.dataset_info("ade20")


def test_palette_is_distinct_legible_and_a_prefix_of_longer_ones():
    colors = datasets.palette(150)
    assert datasets.palette(20) == colors[:20]
    lightness = np.array(colors) @ (0.2126, 0.7152, 0.0722)
    assert lightness.min() > 25 and lightness.max() < 235  # visible on black and on white
    nearest = min(
        np.abs(np.subtract(a, b)).sum() for a, b in itertools.combinations(colors[:60], 2)
    )
    assert nearest >= 45
    many = datasets.palette(65_535)
    assert len(many) == 65_535 and many[:20] == colors[:20] and len(set(many)) > 1000


def test_categories_of_a_json_put_things_first_in_json_order():
    categories = [
        {"id": 9, "name": "road", "isthing": 0},
        {"id": 4, "name": "car", "isthing": 1},
        {"id": 2, "name": "sky", "isthing": 0},
        {"id": 1, "name": "bus", "isthing": 1},
    ]
    info = datasets.from_coco_categories("mine", categories)
    assert info.class_names == ("car", "bus", "road", "sky")
    assert info.is_thing == (True, True, False, False)
    assert info.category_ids == (4, 1, 9, 2)
    assert info.colors == datasets.palette(4)
    for shade, category in enumerate(categories):
        category["color"] = [shade, 0, 0]
    colored = datasets.from_coco_categories("mine", categories)
    assert colored.colors == ((1, 0, 0), (3, 0, 0), (0, 0, 0), (2, 0, 0))


_A = {"id": 1, "name": "a", "isthing": 1}


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "empty"),
        ([{"id": 1, "name": "a"}], "lacks isthing"),
        ([_A, {**_A, "name": "b"}], "category_ids 1"),
        ([_A, {**_A, "id": 2}], "class_names a"),
    ],
)
def test_bad_categories_are_named(categories, message):
    with pytest.raises(ValueError, match=message):
        datasets.from_coco_categories("mine", categories)


def test_fields_of_unequal_length_are_named():
    with pytest.raises(ValueError, match="2 class_names but 1 colors"):
        datasets.DatasetInfo("mine", ("a", "b"), (True, False), ((0, 0, 0),), (1, 2))
