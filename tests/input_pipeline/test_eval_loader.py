"""Coverage, buckets, sampling and views of the evaluation batches."""

import dataclasses

import numpy as np
import pytest

from oneformer_jax.input_pipeline import resize
from oneformer_jax.input_pipeline.eval_loader import EvalLoaderConfig, _merge_buckets, eval_loader
from oneformer_jax.input_pipeline.records import RecordError
from tests.input_pipeline.test_loader import ListSource, RichSource

EVAL_SIZES = [(40, 60), (60, 40), (64, 64), (20, 30), (50, 200), (44, 61), (40, 60)]
EVAL = EvalLoaderConfig(batch_size=2, short_edge=40, max_size=90)


@pytest.mark.parametrize("kind", [ListSource, RichSource])
@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_eval_covers_every_record_once(process_count, kind):
    source = kind(EVAL_SIZES)
    loaders = [eval_loader(source, EVAL, p, process_count) for p in range(process_count)]
    assert len({len(x) for x in loaders}) == 1
    assert len({x.buckets for x in loaders}) == 1
    seen = []
    for batches in zip(*loaders, strict=True):
        # One program for all processes at every step.
        assert len({b["image"].shape for b in batches}) == 1
        for batch in batches:
            assert batch["image"].dtype == np.uint8 and batch["valid"].dtype == bool
            assert batch["image"].shape[1] % 32 == 0 and batch["image"].shape[2] % 32 == 0
            for row in range(2):
                if not batch["valid"][row]:
                    assert batch["records"][row] is None and batch["index"][row] == -1
                    assert not batch["image"][row].any()
                    continue
                index = int(batch["index"][row])
                seen.append(index)
                record = batch["records"][row]
                assert record["file_name"] == f"image_{index}.jpg"
                height, width = batch["image_size"][row]
                np.testing.assert_array_equal(batch["original_size"][row], EVAL_SIZES[index])
                assert record["panoptic"].shape == EVAL_SIZES[index]
                expected = resize.resize_for_test(record["image"], 40, 90)
                assert expected.shape == (height, width, 3)
                np.testing.assert_array_equal(batch["image"][row, :height, :width], expected)
                assert not batch["image"][row, height:].any()
                assert not batch["image"][row, :, width:].any()
    assert sorted(seen) == list(range(len(EVAL_SIZES)))


def test_eval_buckets_and_second_pass():
    batches = eval_loader(RichSource(EVAL_SIZES), EVAL)
    # 40x60 and 20x30 -> 40x60; 44x61 -> 40x55; 50x200 is capped: 23x90.
    assert batches.buckets == ((64, 64), (32, 96)) and len(batches) == 4
    passes = [[list(b["index"]) for b in batches] for _ in range(2)]
    assert passes[0] == passes[1] == [[0, 1], [2, 3], [5, 6], [4, -1]]
    coarse = dataclasses.replace(EVAL, bucket_multiple=96)
    assert eval_loader(RichSource(EVAL_SIZES), coarse).buckets == ((96, 96),)


def test_eval_limit_is_an_even_sample_whatever_the_processes():
    # The largest images come first in a data set of 12; each size is in the sample once.
    sizes = [(80 - 20 * (i // 4), 60) for i in range(12)]
    for limit, expected in ((3, [0, 4, 8]), (5, [0, 2, 4, 7, 9]), (12, range(12)), (99, range(12))):
        for process_count in (1, 2):
            config = dataclasses.replace(EVAL, limit=limit)
            seen = [
                int(index)
                for process in range(process_count)
                for batch in eval_loader(RichSource(sizes), config, process, process_count)
                for index in batch["index"][batch["valid"]]
            ]
            assert sorted(seen) == list(expected)


def test_rare_sizes_join_larger_ones():
    sizes = [(40, 60), (64, 64), (60, 40), (20, 60), (20, 60), (25, 90), (50, 100)]
    config = EvalLoaderConfig(batch_size=4, short_edge=40, max_size=96)
    plain = eval_loader(RichSource(sizes), config)
    for most in (1, 2):
        merged = eval_loader(RichSource(sizes), dataclasses.replace(config, max_buckets=most))
        assert len(merged.buckets) == most < len(plain.buckets)
        images = {}
        for batch in merged:
            for row in np.flatnonzero(batch["valid"]):
                height, width = batch["image_size"][row]
                images[int(batch["index"][row])] = batch["image"][row, :height, :width]
                assert not batch["image"][row, height:].any()
        for batch in plain:
            for row in np.flatnonzero(batch["valid"]):
                height, width = batch["image_size"][row]
                expected = batch["image"][row, :height, :width]
                np.testing.assert_array_equal(images.pop(int(batch["index"][row])), expected)
        assert not images
    same = eval_loader(RichSource(sizes), dataclasses.replace(config, max_buckets=99))
    assert same.buckets == plain.buckets


def test_the_cheapest_pair_of_sizes_is_joined():
    # Padding the 64 x 32 image to 64 x 64 adds 2048 pixels; joined with the 32 x 96 one both would
    # become 64 x 96, which adds 4096 and 3072.
    buckets = {((64, 64),): [0, 1, 2, 3], ((64, 32),): [4], ((32, 96),): [5]}
    merged = _merge_buckets(buckets, 2)
    assert merged == {((64, 64),): [0, 1, 2, 3, 4], ((32, 96),): [5]}
    assert _merge_buckets(buckets, 1) == {((64, 96),): [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize("process_count", [1, 2])
def test_views_are_made_from_the_resized_image(process_count):
    config = dataclasses.replace(EVAL, tta_short_edges=(20, 60), tta_max_size=100)
    source = RichSource(EVAL_SIZES)
    loaders = [eval_loader(source, config, p, process_count) for p in range(process_count)]
    seen = []
    for batches in zip(*loaders, strict=True):
        shapes = [[v["image"].shape for v in (b, *b["views"])] for b in batches]
        assert all(s == shapes[0] for s in shapes)  # one program for all processes
        assert {s[1:3] for s in shapes[0]} <= set(loaders[0].buckets)
        for batch in batches:
            assert len(batch["views"]) == 2
            for row in np.flatnonzero(batch["valid"]):
                seen.append(int(batch["index"][row]))
                resized = resize.resize_for_test(batch["records"][row]["image"], 40, 90)
                for view, edge in zip(batch["views"], (20, 60), strict=True):
                    expected = resize.resize_for_test(resized, edge, 100)
                    height, width = view["image_size"][row]
                    assert (height, width) == expected.shape[:2]
                    # Padded no further than the official evaluation pads.
                    assert view["image"].shape[1:3] == (-(-height // 32) * 32, -(-width // 32) * 32)
                    np.testing.assert_array_equal(view["image"][row, :height, :width], expected)
                    assert not view["image"][row, height:].any()
                    assert not view["image"][row, :, width:].any()
    assert sorted(seen) == list(range(len(EVAL_SIZES)))


def test_without_views_there_is_no_such_key():
    assert "views" not in next(iter(eval_loader(RichSource(EVAL_SIZES), EVAL)))


@pytest.mark.parametrize("kind", [ListSource, RichSource])
def test_eval_broken_record(kind):
    source = kind(EVAL_SIZES, broken=(2,))
    with pytest.raises(RecordError, match=r"image_2\.jpg"):
        list(eval_loader(source, EVAL))
    batches = eval_loader(source, dataclasses.replace(EVAL, skip_broken=True))
    seen = sorted(int(i) for b in batches for i in b["index"][b["valid"]])
    assert seen == [0, 1, 3, 4, 5, 6]
    assert list(batches.broken) == [2]


def test_eval_image_of_another_size_than_announced():
    source = RichSource(EVAL_SIZES)
    source.image_size = lambda i: (40, 200)
    with pytest.raises(RecordError, match=r"image_0\.jpg.*40 x 60"):
        list(eval_loader(source, EVAL))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"batch_size": 0}, r"eval\.batch_size"),
        ({"short_edge": 0}, r"eval\.short_edge"),
        ({"max_size": 0}, r"eval\.max_size"),
        ({"bucket_multiple": 48}, r"eval\.bucket_multiple"),
        ({"limit": -1}, r"eval\.limit"),
        ({"max_buckets": -1}, r"eval\.max_buckets"),
        ({"tta_short_edges": (20, 40)}, r"eval\.tta\.max_size"),
        ({"tta_short_edges": (0, 40), "tta_max_size": 9}, r"eval\.tta\.short_edges"),
    ],
)
def test_bad_eval_settings_name_their_key(change, key):
    with pytest.raises(ValueError, match=key):
        dataclasses.replace(EVAL, **change)


def test_eval_of_an_empty_dataset():
    with pytest.raises(ValueError, match=r"empty.*dataset\.eval_split"):
        eval_loader(ListSource([]), EVAL)
