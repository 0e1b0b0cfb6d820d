"""Order, determinism, resuming, broken records and coverage of the loaders."""

import dataclasses
import itertools

import numpy as np
import pytest

from oneformer_jax import types
from oneformer_jax.input_pipeline import loader, transforms
from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.loader import LoaderConfig
from oneformer_jax.input_pipeline.records import RecordError

INFO = DatasetInfo(
    dataset="test",
    class_names=("sky", "person", "road"),
    is_thing=(False, True, False),
    colors=((0, 0, 1), (0, 1, 0), (1, 0, 0)),
    category_ids=(1, 2, 3),
)
AUGMENT = transforms.AugmentConfig("unified", crop_size=(32, 64), short_edge=32, max_size=96)


class ListSource:
    """Small images; record i is broken if i is in `broken`."""

    def __init__(self, sizes, broken=()):
        self.sizes = list(sizes)
        self.broken = set(broken)
        self.reads = []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        self.reads.append(i)
        if i in self.broken:
            raise RecordError(f"image_{i}.jpg is truncated; replace it")
        height, width = self.sizes[i]
        rng = np.random.default_rng(i)
        panoptic = np.zeros((height, width), np.int32)
        panoptic[: height // 2] = 11
        panoptic[height // 3 :, : width // 2] = 22
        panoptic[-1] = 33
        return {
            "image": rng.integers(0, 256, (height, width, 3), np.uint8),
            "panoptic": panoptic,
            "segments": [
                {"id": 11, "category": 0, "iscrowd": False, "area": 1},
                {"id": 22, "category": 1, "iscrowd": i % 2 == 1, "area": 1},
                {"id": 33, "category": 2, "iscrowd": False, "area": 1},
            ],
            "image_id": str(i),
            "file_name": f"image_{i}.jpg",
        }


class RichSource(ListSource):
    def has_things(self, i):
        return i % 2 == 0

    def image_size(self, i):
        return self.sizes[i]


def make_source(count=10, broken=(), kind=ListSource):
    return kind([(20 + i % 3, 24 + i % 5) for i in range(count)], broken)


def make_config(**changes):
    base = LoaderConfig(
        batch_size=4,
        num_slots=5,
        num_texts=7,
        augment=AUGMENT,
        num_workers=0,
        num_threads=2,
        prefetch=2,
        seed=3,
    )
    return dataclasses.replace(base, **changes)


def take(source, config, count, **kwargs):
    batches = loader.train_loader(source, config, INFO, **kwargs)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def assert_all_same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)


# ---------------------------------------------------------------------------------------- training


def test_a_batch_has_the_arrays_that_the_types_tell():
    source = make_source()
    expected = types.layout(types.LoadedBatch, {"B": 4, "H": 32, "W": 64, "M": 5, "R": 7})
    assert set(expected) == {*types.Batch.__annotations__, "index"}
    for batch in take(source, make_config(), 6):
        assert batch.keys() == expected.keys()
        for key, leaf in expected.items():
            assert batch[key].dtype == leaf.dtype and batch[key].shape == leaf.shape, key
        assert (batch["image_size"] == (32, 64)).all()
        for row in range(4):
            slots = np.unique(batch["segment_map"][row])
            valid = batch["valid"][row]
            np.testing.assert_array_equal(slots[slots > 0] - 1, np.flatnonzero(valid))
            present = sorted(batch["classes"][row][valid])
            padding = [3 + batch["task"][row]] * (7 - len(present))
            np.testing.assert_array_equal(batch["text_ids"][row], [*present, *padding])
            if batch["task"][row] == 1:
                assert set(present) <= {1}


def test_texts_name_the_type_of_a_segment_if_asked():
    plain = take(make_source(), make_config(), 6)
    typed = take(make_source(), make_config(text_types=True), 6)
    for a, b in zip(plain, typed, strict=True):
        # Class 1 is the thing; the table's rows of things follow 3 classes and 3 padding texts.
        thing = (a["text_ids"] == 1) & (a["task"] != 2)[:, None]
        np.testing.assert_array_equal(b["text_ids"], a["text_ids"] + 6 * thing)
    assert any((b["text_ids"] == 7).any() for b in typed)


def test_an_epoch_sees_every_record_once_and_the_next_is_reshuffled():
    batches = take(make_source(12), make_config(), 9)
    order = np.concatenate([b["index"] for b in batches]).reshape(3, 12)
    for epoch in order:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in order}) == 3
    assert list(order[0]) != list(range(12))


def test_augmentation_differs_between_epochs():
    augment = dataclasses.replace(AUGMENT, max_size=1000)
    first, second = take(make_source(4), make_config(augment=augment), 2)
    for index in range(4):
        a = first["image"][list(first["index"]).index(index)]
        b = second["image"][list(second["index"]).index(index)]
        assert (a != b).any()


def test_every_task_occurs_with_its_probability():
    batches = take(make_source(8), make_config(batch_size=40, prefetch=1), 6)
    tasks = np.concatenate([b["task"] for b in batches])
    shares = np.bincount(tasks, minlength=3) / len(tasks)
    np.testing.assert_allclose(shares, [0.34, 0.33, 0.33], atol=0.1)
    only = take(make_source(8), make_config(semantic_prob=0.0, instance_prob=1.0), 3)
    assert all((b["task"] == 1).all() for b in only)


@pytest.mark.parametrize(("process_count", "start_step"), [(2, 0), (4, 0), (8, 0), (8, 3), (2, 5)])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(process_count, start_step):
    # Also where a run goes on with other processes than it began with.
    source = make_source()  # 10 records: the global batch of 8 crosses epochs
    whole = take(source, make_config(batch_size=8), 7)[start_step:]
    shards = [
        take(
            source,
            make_config(batch_size=8 // process_count),
            7 - start_step,
            process_index=p,
            process_count=process_count,
            start_step=start_step,
        )
        for p in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_all_same(joined, whole)


def test_worker_processes_give_the_same_batches_and_resume():
    # The second of two processes, from step 2 on, with records missing.
    config = make_config(batch_size=2, skip_broken=True)
    source = make_source(broken=(2, 3))
    place = dict(process_index=1, process_count=2)
    expected = take(source, config, 9, **place)
    batches = loader.train_loader(
        source, dataclasses.replace(config, num_workers=2), INFO, **place, start_step=2
    )
    try:
        assert_all_same(list(itertools.islice(batches, 7)), expected[2:])
        assert batches.position == 9
        assert batches.broken == {i: f"image_{i}.jpg is truncated; replace it" for i in (2, 3)}
    finally:
        batches.close()


def test_threads_do_not_change_the_batches():
    one = take(make_source(), make_config(num_threads=1, prefetch=1), 5)
    many = take(make_source(), make_config(num_threads=4, prefetch=4), 5)
    assert_all_same(one, many)


def test_resume_starts_at_the_step_without_reading_what_came_before():
    expected = take(make_source(), make_config(), 9)
    source = make_source()
    config = make_config(num_threads=1, prefetch=1)
    batches = loader.train_loader(source, config, INFO, start_step=7)
    assert batches.position == 7
    assert_same(next(batches), expected[7])
    assert batches.position == 8
    assert_same(next(batches), expected[8])
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    assert len(source.reads) <= 4 * 4  # two batches, one ahead, one in the making
    far = take(make_source(), make_config(), 1, start_step=10_000_000)
    assert far[0]["image"].shape == (4, 32, 64, 3)


def test_seed_changes_order_and_augmentation():
    a = take(make_source(), make_config(seed=3), 2)
    b = take(make_source(), make_config(seed=4), 2)
    assert any((x["index"] != y["index"]).any() for x, y in zip(a, b, strict=True))
    single = [take(make_source(1), make_config(seed=s), 1)[0]["image"] for s in (3, 4)]
    assert (single[0] != single[1]).any()


def test_broken_record_stops_and_names_its_file():  # that of a worker: see test_workers
    with pytest.raises(RecordError, match=r"image_5\.jpg"):
        take(make_source(broken=(5,)), make_config(), 3)


def test_broken_records_are_replaced_counted_and_listed(caplog):
    config = make_config(skip_broken=True, num_threads=1)
    good = take(make_source(), config, 5)
    batches = loader.train_loader(make_source(broken=(9, 0, 4)), config, INFO)
    with caplog.at_level("WARNING", logger="absl"):
        skipped = list(itertools.islice(batches, 5))
    batches.close()
    replaced = {9: 1, 0: 1, 4: 5}
    for a, b in zip(good, skipped, strict=True):
        np.testing.assert_array_equal(b["index"], [replaced.get(i, i) for i in a["index"]])
        rows = [row for row, i in enumerate(a["index"]) if i not in replaced]
        assert_same({k: v[rows] for k, v in a.items()}, {k: v[rows] for k, v in b.items()})
    assert sorted(batches.broken) == [0, 4, 9]
    for i in (0, 4, 9):
        assert caplog.text.count(f"image_{i}.jpg") == 1


def test_all_records_broken():
    with pytest.raises(RecordError, match="all 3 training records are broken"):
        take(make_source(3, broken=(0, 1, 2)), make_config(skip_broken=True), 1)


def test_dropped_segments_are_counted():
    augment = transforms.AugmentConfig("none", crop_size=(32, 32))
    config = make_config(augment=augment, num_slots=1, semantic_prob=0.0, instance_prob=0.0)
    batches = loader.train_loader(make_source(), config, INFO)
    indices = np.concatenate([next(batches)["index"] for _ in range(2)])
    batches.close()
    # Three segments in even records, two (the person is a crowd) in odd ones; one slot.
    assert batches.dropped_segments == np.where(indices % 2 == 0, 2, 1).sum()


def test_require_things():
    config = make_config(require_things=True)
    batches = take(make_source(kind=RichSource), config, 5)
    indices = np.concatenate([b["index"] for b in batches])
    assert sorted(indices[:5]) == [0, 2, 4, 6, 8] and (indices % 2 == 0).all()
    with pytest.raises(ValueError, match=r"data\.require_things.*ListSource"):
        take(make_source(), config, 1)
    nothing = make_source(kind=RichSource)
    nothing.has_things = lambda i: False
    with pytest.raises(ValueError, match=r"none of the 10"):
        take(nothing, config, 1)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"batch_size": 0}, r"data\.batch_size"),
        ({"num_slots": 256}, r"data\.num_slots"),
        ({"num_slots": 0}, r"data\.num_slots"),
        ({"num_texts": -1}, r"model\.num_queries"),
        ({"seed": -1}, "seed"),
        ({"semantic_prob": 1.2}, r"data\.semantic_prob"),
        ({"instance_prob": -0.1}, r"data\.instance_prob"),
        ({"semantic_prob": 0.6, "instance_prob": 0.6}, r"data\.semantic_prob"),
        ({"num_workers": -1}, r"data\.workers"),
        ({"num_threads": 0}, r"data\.threads"),
        (
            {"augment": transforms.AugmentConfig(crop_size=(512, 1000))},
            r"data\.crop_size is \(512, 1000\).*use \(512, 1024\)",
        ),
        ({"prefetch": 0}, r"data\.prefetch"),
    ],
)
def test_bad_settings_name_their_key(change, key):
    with pytest.raises(ValueError, match=key):
        make_config(**change)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"empty.*dataset\.data_dir"):
        take(make_source(0), make_config(), 1)
    with pytest.raises(ValueError, match="process_index"):
        take(make_source(), make_config(), 1, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="start_step"):
        take(make_source(), make_config(), 1, start_step=-1)
