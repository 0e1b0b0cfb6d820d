"""The fast pipeline makes the samples of the plain one: same pixels, same masks, same tokens."""

import numpy as np
import pytest

from oneformer_jax.input_pipeline import loader, sources, targets, tokenizer, transforms
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource
from oneformer_jax.input_pipeline.transforms import AugmentConfig
from tests.input_pipeline import plain

CROP = (32, 64)


@pytest.fixture(params=["folder", "prepared"])
def both(request, coco_folder, tmp_path):
    """(source of the pipeline, the same folder read the plain way)."""
    root = coco_folder.root
    paths = (root / "images", root / "panoptic", root / "panoptic_train.json")
    if request.param == "folder":
        source = CocoFolderSource(*paths)
    else:
        options = {"root": root, "prepare": True}
        source, _ = sources.open_source(
            "coco_folder", data_dir=tmp_path, split="train", options=options
        )
    return source, plain.PlainFolder(*paths)


def assert_same_sample(sample, expected, info):
    image, masks, classes, task = (expected[k] for k in ("image", "masks", "classes", "task"))
    assert plain.TASKS[sample["task"]] == task
    # Where an image grows, OpenCV resizes it: to one grey level what PIL gives.
    assert np.abs(sample["image"].astype(int) - image).max() <= 1
    count = len(classes)
    np.testing.assert_array_equal(sample["valid"], np.arange(len(sample["valid"])) < count)
    np.testing.assert_array_equal(sample["classes"][:count], classes)
    slots = np.arange(1, count + 1)[:, None, None]
    np.testing.assert_array_equal(sample["segment_map"] == slots, masks)
    assert not sample["segment_map"][~masks.any(0)].any()
    table = tokenizer.text_table(info.class_names)
    tokens = table[sample["text_ids"]]
    np.testing.assert_array_equal(tokens, expected["tokens"][:, : table.shape[1]])
    assert not expected["tokens"][:, table.shape[1] :].any()


def test_batches_of_the_coco_recipe(both):
    source, folder = both
    config = loader.LoaderConfig(
        batch_size=4,
        num_slots=6,
        num_texts=8,
        augment=AugmentConfig("lsj", crop_size=CROP),
        seed=11,
        num_workers=0,
        num_threads=2,
        prefetch=2,
    )
    batches = loader.train_loader(source, config, source.info)
    tasks = set()
    for epoch in range(8):  # 4 records: a batch is an epoch
        batch = next(batches)
        for row, index in enumerate(batch["index"]):
            rng = np.random.default_rng((11, epoch, index))
            expected = plain.lsj_sample(folder, index, rng, CROP, 8)
            assert_same_sample({k: v[row] for k, v in batch.items()}, expected, source.info)
            tasks.add(expected["task"])
    batches.close()
    assert tasks == set(plain.TASKS)


@pytest.mark.parametrize("crop", [(32, 32), (32, 64)])  # the square of ADE20K; Cityscapes
def test_samples_of_the_unified_recipe(both, crop):
    source, folder = both
    config = AugmentConfig("unified", crop_size=crop, short_edge=32, max_size=96, color=False)
    things = source.info.is_thing
    for seed in range(12):
        index = seed % len(source)
        rng, again = (np.random.default_rng(seed) for _ in range(2))
        record = transforms.augment(rng, source.compact(index), config)
        task = targets.sample_task(rng, 0.33, 0.33)
        target = targets.make_targets(record["panoptic"], record["segments"], task, 6, things)

        image, panoptic, segments = folder.read(index)
        image, panoptic = plain.augment_unified(
            again, image, panoptic, crop, config.short_edges(), 96
        )
        name = plain.draw_task(again)
        masks, classes = plain.make_masks(panoptic, segments, name, folder.category, things)
        assert plain.TASKS[task] == name
        assert np.abs(record["image"].astype(int) - image).max() <= 1
        slots = np.arange(1, len(classes) + 1)[:, None, None]
        np.testing.assert_array_equal(target.segment_map == slots, masks)
        np.testing.assert_array_equal(target.classes[target.valid], classes)


def test_color_jitter_is_that_of_ssd_to_the_bit():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 50, 3), np.uint8)
    record = {"image": image, "panoptic": np.zeros((40, 50), np.uint8)}
    changed = 0
    for seed in range(60):
        a, b = (np.random.default_rng(seed) for _ in range(2))
        result = transforms.random_color(a, record, AugmentConfig())["image"]
        expected = plain.color_jitter(b, image[..., ::-1].copy())[..., ::-1]
        np.testing.assert_array_equal(result, expected)
        changed += (result != image).any()
    assert changed > 40


def test_compact_records_are_the_records_with_small_ids(both):
    source, _ = both
    for index in range(len(source)):
        full, compact = source[index], source.compact(index)
        assert compact["panoptic"].dtype == np.uint8 and full["panoptic"].dtype == np.int32
        np.testing.assert_array_equal(compact["image"], full["image"])
        ids = np.array([0] + [segment["id"] for segment in full["segments"]])
        np.testing.assert_array_equal(ids[compact["panoptic"]], full["panoptic"])
        for number, (a, b) in enumerate(
            zip(full["segments"], compact["segments"], strict=True), start=1
        ):
            assert b == {**a, "id": number}


def test_more_than_255_segments_need_two_bytes(coco_folder):
    import cv2

    from oneformer_jax.input_pipeline import records

    ids = np.arange(1, 301, dtype=np.int32).reshape(20, 15).repeat(2, 0) * 50_000
    coco_folder.panoptic(0).write_bytes(records.encode_panoptic(ids))
    cv2.imwrite(str(coco_folder.image(0)), np.zeros((40, 15, 3), np.uint8))
    coco_folder.json["train"]["annotations"][0]["segments_info"] = [
        {"id": int(i), "category_id": 7, "area": 2} for i in ids[::2].flat
    ]
    coco_folder.write("train")
    root = coco_folder.root
    source = CocoFolderSource(root / "images", root / "panoptic", root / "panoptic_train.json")
    compact = source.compact(0)
    assert compact["panoptic"].dtype == np.uint16
    for task in range(3):
        small, large = (
            targets.make_targets(r["panoptic"], r["segments"], task, 255, source.info.is_thing)
            for r in (compact, source[0])
        )
        for a, b in zip(small, large, strict=True):
            np.testing.assert_array_equal(a, b)
        assert large.dropped == (0 if plain.TASKS[task] == "semantic" else 45)
