"""Counts of a hand-made dataset, and what the report advises."""

import numpy as np
import pytest

from oneformer_jax.input_pipeline import statistics
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource


@pytest.fixture
def source(coco_folder):
    root = coco_folder.root
    return CocoFolderSource(root / "images", root / "panoptic", root / "panoptic_train.json")


def test_counts(source):
    # Three images with ground, a cat, a crowd of dogs and void; one with ground alone.
    found = statistics.collect(source, source.info)
    assert found.total == 4 and not found.broken
    np.testing.assert_array_equal(found.sizes, [(24, 40), (25, 40), (26, 40), (27, 40)])
    np.testing.assert_array_equal(found.slots["panoptic"], [2, 2, 1, 2])
    np.testing.assert_array_equal(found.slots["instance"], [1, 1, 0, 1])
    np.testing.assert_array_equal(found.slots["semantic"], [2, 2, 1, 2])
    np.testing.assert_array_equal(found.crowd, [180, 180, 0, 180])
    np.testing.assert_array_equal(found.void, [160, 160, 0, 160])
    # cat, dog (crowd only), ground, sky
    np.testing.assert_array_equal(found.class_images, [3, 0, 4, 0])
    np.testing.assert_array_equal(found.class_segments, [3, 0, 4, 0])


def test_report(source):
    found = statistics.collect(source, source.info)
    text = statistics.report(found, source.info, num_slots=2, num_texts=2)
    assert "4 images; short side 24 to 27, long side 40 to 40" in text
    assert "4 classes (2 things), 2 of them seen" in text
    assert "void 11.8% of the pixels; crowd 13.2%, in 3 images" in text
    assert "enough for every image" in text and "raise" not in text
    assert "ground 4 in 4, cat 3 in 3" in text and "never seen: dog, sky" in text
    short = statistics.report(found, source.info, num_slots=1, num_texts=1)
    assert "--config.data.num_slots=2 would keep all" in short
    assert "3 images" in short
    assert "an image needs 2 texts" in short and "raise model.num_queries" in short


def test_a_part_is_spread_over_the_source(source):
    found = statistics.collect(source, source.info, limit=2)
    np.testing.assert_array_equal(found.sizes[:, 0], [24, 27])
    assert "4 images, 2 of them read" in statistics.report(found, source.info, 9, 9)


def test_broken_records_are_listed(source, coco_folder):
    coco_folder.image(1).unlink()
    found = statistics.collect(source, source.info)
    assert list(found.broken) == [1] and len(found.sizes) == 3
    assert "0001.jpg: cannot be read" in statistics.report(found, source.info, 9, 9)
    for index in (0, 2, 3):
        coco_folder.image(index).unlink()
    with pytest.raises(ValueError, match=r"none of 4 images.*0000\.jpg"):
        statistics.collect(source, source.info)
