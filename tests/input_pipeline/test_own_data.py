"""Instance JSON and semantic PNGs as sources: what they give, and what they say of bad data."""

import itertools
import json
import pickle
import types

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from oneformer_jax.app import data
from oneformer_jax.configs import common, custom
from oneformer_jax.eval.metrics.instance_json import InstanceAnnotations
from oneformer_jax.input_pipeline import loader, sources, targets
from oneformer_jax.input_pipeline.coco_instances import CocoInstanceSource
from oneformer_jax.input_pipeline.records import RecordError
from oneformer_jax.input_pipeline.semantic_folder import SemanticFolderSource, read_classes


def box(x, y, width, height):
    """Outline of the pixels x .. x + width - 1, y .. y + height - 1."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def uncompressed(mask):
    """COCO's run-length code: lengths of runs down the columns, the first of zeros."""
    pixels = mask.ravel("F").tolist()
    counts = [len(list(run)) for _, run in itertools.groupby(pixels)]
    return {"size": list(mask.shape), "counts": [0] * pixels[0] + counts}


@pytest.fixture
def instances(tmp_path):
    """Two images of 32 x 48: five annotations on the first, none on the second."""
    root = tmp_path / "pets"
    (root / "images").mkdir(parents=True)
    crowd = np.zeros((32, 48), np.uint8)
    crowd[:, 24:] = 1
    compressed = coco_mask.encode(np.asfortranarray(crowd[:, ::-1]))
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 32, "width": 48} for i in (7, 8)],
        "annotations": [
            # small on large: the small one is listed first, and is on top nevertheless
            {"id": 1, "image_id": 7, "category_id": 4, "segmentation": [box(4, 4, 6, 5)]},
            {"id": 2, "image_id": 7, "category_id": 9, "segmentation": [box(2, 2, 16, 12)]},
            {"id": 3, "image_id": 7, "category_id": 9, "segmentation": [box(30, 20, 8, 8)]},
            {"id": 4, "image_id": 7, "category_id": 4, "segmentation": uncompressed(crowd)},
            {
                "id": 5,
                "image_id": 7,
                "category_id": 4,
                "segmentation": [box(0, 28, 4, 4), box(10, 28, 4, 4)],
            },
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
    }
    content["annotations"][3]["iscrowd"] = 1
    result = types.SimpleNamespace(root=root, content=content, compressed=compressed)
    for image in content["images"]:
        cv2.imwrite(str(root / "images" / image["file_name"]), np.full((32, 48, 3), 90, np.uint8))

    def write():
        for name in ("instances_train.json", "instances_val.json"):
            (root / name).write_text(json.dumps(content))

    write()
    result.write = write
    result.open = lambda **options: sources.open_source(
        "coco_instances", data_dir=root, split="train", options=options
    )[0]
    return result


def test_instances_become_a_record(instances):
    source = instances.open()
    assert isinstance(source, CocoInstanceSource) and len(source) == 2
    assert source.info.class_names == ("cat", "dog") and all(source.info.is_thing)
    assert source.info.category_ids == (9, 4)
    record = source[0]
    expected = np.zeros((32, 48), np.int32)
    expected[:, 24:] = 4  # the crowd is below the others, though it is not the largest
    expected[20:28, 30:38] = 3
    expected[2:14, 2:18] = 2
    expected[4:9, 4:10] = 1
    expected[28:32, 0:4] = expected[28:32, 10:14] = 5
    np.testing.assert_array_equal(record["panoptic"], expected)
    assert record["panoptic"].dtype == np.int32
    assert record["segments"] == [
        {"id": 1, "category": 1, "iscrowd": False, "area": 30},
        {"id": 2, "category": 0, "iscrowd": False, "area": 16 * 12 - 30},
        {"id": 3, "category": 0, "iscrowd": False, "area": 64},
        {"id": 4, "category": 1, "iscrowd": True, "area": 32 * 24 - 64},
        {"id": 5, "category": 1, "iscrowd": False, "area": 32},
    ]
    assert record["image_id"] == "7" and record["file_name"] == "7.jpg"
    compact = source.compact(0)
    assert compact["panoptic"].dtype == np.uint8
    np.testing.assert_array_equal(compact["panoptic"], expected)
    assert source.image_size(0) == (32, 48)


def test_the_evaluation_finds_the_overlapping_originals(instances):
    for annotation in instances.content["annotations"]:
        annotation["area"] = 1
    instances.write()
    source = instances.open()
    path = instances.root / "instances_val.json"
    originals = InstanceAnnotations(path, data.metadata_of(source.info))
    masks = originals.masks(source[0]["image_id"], (32, 48))
    assert masks.classes.tolist() == [s["category"] for s in source[0]["segments"]]
    pixels = [coco_mask.area({"size": [32, 48], "counts": code}) for code in masks.counts]
    assert pixels == [30, 16 * 12, 64, 32 * 24, 32]


def test_an_image_without_annotations_is_a_record_without_segments(instances):
    source = instances.open()
    record = source[1]
    assert record["segments"] == [] and not record["panoptic"].any()
    assert [source.has_things(i) for i in (0, 1)] == [True, False]
    for annotation in instances.content["annotations"][:3]:
        annotation["iscrowd"] = 1
    instances.content["annotations"][4].update(iscrowd=0, image_id=8)
    instances.write()
    assert [instances.open().has_things(i) for i in (0, 1)] == [False, True]


def test_compressed_run_length_codes_are_read(instances):
    code = {**instances.compressed, "counts": instances.compressed["counts"].decode()}
    instances.content["annotations"][3]["segmentation"] = code
    instances.write()
    expected = np.zeros((32, 48), bool)
    expected[:, :24] = True
    np.testing.assert_array_equal(
        instances.open()[0]["panoptic"][16:20, :24] == 4, expected[:4, :24]
    )


def test_a_table_of_the_code_can_take_the_place_of_the_categories(instances):
    instances.content["categories"] = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    for annotation in instances.content["annotations"]:
        annotation["category_id"] = 17
    instances.write()
    source = instances.open(table="coco")
    assert source.info.num_classes == 133
    assert {s["category"] for s in source[0]["segments"]} == {15}
    instances.content["categories"][1]["name"] = "wolf"
    instances.write()
    with pytest.raises(ValueError, match="category 18 is 'wolf'"):
        instances.open(table="coco")


def test_sources_can_be_pickled_and_train(instances, semantics):
    for source, config in (
        (instances.open(), custom.get_config("small,data=instances")),
        (semantics.open(), custom.get_config("small,data=semantic")),
    ):
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(copy[0]["panoptic"], source[0]["panoptic"])
        config.data.batch_size, config.data.workers = 2, 0
        config.data.crop_size = (32, 64)
        settings = data.train_loader_config(config)
        batches = loader.train_loader(copy, settings, copy.info)
        found = list(itertools.islice(batches, 4))
        batches.close()
        (task,) = {int(t) for batch in found for t in batch["task"]}
        assert (targets.TASKS[task],) == config.eval.tasks
        assert config.eval.best_metric.startswith(targets.TASKS[task] + "/")
        assert any(batch["valid"].any() for batch in found)


def _no_mask(content):
    content["annotations"][1]["segmentation"] = []
    return r"annotation 2 has no segmentation; a box alone"


def _short_polygon(content):
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]
    return r"annotation 2 has a polygon of 4 numbers"


def _odd_polygon(content):
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4, 5, 6, 7]]
    return r"annotation 2 has a polygon of 7 numbers"


def _other_code(content):
    content["annotations"][3]["segmentation"]["size"] = [48, 32]
    return r"annotation 4 has a run-length code of size \[48, 32\], the image \[32, 48\]"


def _unknown_category(content):
    content["annotations"][0]["category_id"] = 5
    return r"annotation 1 has category_id 5, which is not in"


def _no_name(content):
    del content["images"][0]["file_name"]
    return r"image 7 has no file_name"


@pytest.mark.parametrize(
    "damage",
    [_no_mask, _short_polygon, _odd_polygon, _other_code, _unknown_category, _no_name],
    ids=lambda f: f.__name__.strip("_"),
)
def test_a_fault_in_the_json_is_told_at_the_opening(instances, damage):
    message = damage(instances.content)
    instances.write()
    with pytest.raises(ValueError, match=f"(?s){message}.*--mode=inspect.*skip_broken"):
        instances.open()
    source = CocoInstanceSource(instances.root / "images", instances.root / "instances_train.json")
    with pytest.raises(RecordError, match=message):
        source[0]
    assert source[1]["image_id"] == "8" and len(source.faults) == 1


def _other_size(content):
    content["images"][0]["width"] = 50
    del content["annotations"][3]  # a run-length code, which would tell at the opening
    return r"7\.jpg: the image has 32 x 48 pixels.*says 32 x 50"


def _missing_image(content):
    content["images"][0]["file_name"] = "gone.jpg"
    return r"gone\.jpg: cannot be read.*instances_train\.json lists it"


@pytest.mark.parametrize(
    "damage", [_other_size, _missing_image], ids=lambda f: f.__name__.strip("_")
)
def test_a_broken_image_is_named_and_the_others_are_read(instances, damage):
    message = damage(instances.content)
    instances.write()
    source = instances.open()
    with pytest.raises(RecordError, match=message):
        source[0]
    assert source[1]["image_id"] == "8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), r"lacks annotations \(it has images, categories\)"),
        (lambda c: c.update(images=[]), "lists no images"),
        (
            lambda c: c["annotations"][0].pop("segmentation"),
            r"lacks segmentation - at \$\.annotations\[0\]",
        ),
        (lambda c: c["annotations"][0].update(segments_info=[]), "panoptic JSON.*coco_folder"),
        (
            lambda c: c["annotations"][0].update(image_id=77),
            "annotation 1 is of image_id 77, which is not in",
        ),
        (lambda c: c["categories"][0].pop("name"), r"lacks name - at \$\.categories\[0\]"),
    ],
)
def test_a_wrong_json_is_explained(instances, change, message):
    change(instances.content)
    instances.write()
    with pytest.raises(ValueError, match=message):
        instances.open()


def test_missing_files_and_splits_are_explained(instances):
    with pytest.raises(FileNotFoundError, match=r"no folder of images .*/jpgs: .*holds images/"):
        instances.open(train_images="jpgs")
    with pytest.raises(FileNotFoundError, match=r"no instance JSON .*a\.json.*instances_val\.json"):
        instances.open(train_json="a.json")
    with pytest.raises(ValueError, match="no train split: the option train_json is empty"):
        instances.open(train_json="")
    (instances.root / "instances_train.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="truncated"):
        instances.open()


# -------------------------------------------------------------------------------- semantic maps

LABELS = np.zeros((24, 30), np.uint8)
LABELS[:8], LABELS[8:20, :10], LABELS[20:] = 7, 3, 255


@pytest.fixture
def semantics(tmp_path):
    """Two training images, one in a subfolder; values 0 road, 3 car, 7 sky, 255 unlabelled."""
    root = tmp_path / "town"
    for name in ("a", "north/b"):
        for folder in ("images/train", "labels/train"):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / f"images/train/{name}.jpg"), np.full((24, 30, 3), 60, np.uint8))
        cv2.imwrite(str(root / f"labels/train/{name}.png"), LABELS)
    (root / "classes.txt").write_text("# value name\n0 road\n3 car\n\n7 blue sky\n12 snow\n")
    return types.SimpleNamespace(
        root=root,
        label=root / "labels/train/a.png",
        open=lambda **options: sources.open_source(
            "semantic_folder", data_dir=root, split="train", options=options
        )[0],
    )


def test_a_semantic_map_becomes_a_record(semantics):
    source = semantics.open()
    assert isinstance(source, SemanticFolderSource) and len(source) == 2
    info = source.info
    assert info.class_names == ("road", "car", "blue sky", "snow") and not any(info.is_thing)
    assert info.category_ids == (0, 3, 7, 12) and info.ignore_label == 255
    record = source[0]
    expected = np.full((24, 30), 1, np.int32)
    expected[:8], expected[8:20, :10], expected[20:] = 3, 2, 0
    np.testing.assert_array_equal(record["panoptic"], expected)
    assert record["segments"] == [
        {"id": 1, "category": 0, "iscrowd": False, "area": 12 * 20},
        {"id": 2, "category": 1, "iscrowd": False, "area": 120},
        {"id": 3, "category": 2, "iscrowd": False, "area": 240},
    ]
    assert record["file_name"] == "a.jpg" and source[1]["image_id"] == "north/b"
    assert source.compact(0)["panoptic"].dtype == np.uint8
    np.testing.assert_array_equal(source.compact(0)["panoptic"], expected)
    assert source.image_size(1) == (24, 30)


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_other_kinds_of_png_are_read(semantics, mode):
    expected = semantics.open()[0]["panoptic"]
    if mode == "P":  # the values are the indices, not the colours of the palette
        picture = Image.fromarray(LABELS, "P")
        picture.putpalette([255 - i // 3 for i in range(768)])
    elif mode == "I;16":
        picture = Image.fromarray(LABELS.astype(np.uint16))
    else:
        picture = Image.fromarray(np.zeros((24, 30), np.uint8)).convert("1")
        expected = np.ones((24, 30), int)
    assert picture.mode == mode
    picture.save(semantics.label)
    np.testing.assert_array_equal(semantics.open()[0]["panoptic"], expected)


def test_values_above_a_byte_and_no_ignore_label(semantics):
    (semantics.root / "classes.txt").write_text("0 road\n3 car\n7 sky\n255 snow\n40000 ice\n")
    labels = LABELS.astype(np.uint16)
    labels[8:10] = 40_000
    Image.fromarray(labels).save(semantics.label)
    with pytest.raises(ValueError, match="'snow' has the value 255 of unlabelled pixels"):
        semantics.open()
    record = semantics.open(ignore_label=-1)[0]
    assert [s["category"] for s in record["segments"]] == [0, 1, 2, 3, 4]
    assert (record["panoptic"] > 0).all()


def test_names_with_another_ending(semantics):
    for path in sorted((semantics.root / "labels/train").rglob("*.png")):
        path.rename(path.with_name(path.stem + "_gt.png"))
    with pytest.raises(
        ValueError, match=r"that of a\.jpg would be .*labels/train/a\.png.*label_suf"
    ):
        semantics.open()
    assert len(semantics.open(label_suffix="_gt.png")[1]["segments"]) == 3


def _value(semantics):
    labels = LABELS.copy()
    labels[8, :5] = 9
    cv2.imwrite(str(semantics.label), labels)
    return r"a\.png: 5 pixels have values that are no class \(9\).*ignore_label"


def _colours(semantics):
    cv2.imwrite(str(semantics.label), np.zeros((24, 30, 3), np.uint8))
    return r"a\.png: a semantic map must be a grey or palette PNG.*RGB with 3 channels"


def _size(semantics):
    cv2.imwrite(str(semantics.label), LABELS[:20])
    return r"a\.jpg.*24 x 30 pixels.*20 x 30"


def _truncated(semantics):
    data = semantics.label.read_bytes()
    semantics.label.write_bytes(data[: len(data) // 2])
    return r"a\.png: cannot be decoded.*truncated"


def _missing(semantics):
    semantics.label.unlink()
    return r"a\.png: cannot be read.*every image needs its map"


@pytest.mark.parametrize(
    "damage", [_value, _colours, _size, _truncated, _missing], ids=lambda f: f.__name__.strip("_")
)
def test_a_broken_map_is_named_and_the_others_are_read(semantics, damage):
    message = damage(semantics)
    source = semantics.open()
    with pytest.raises(RecordError, match=message):
        source[0]
    assert source[1]["file_name"] == "north/b.jpg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("road\n", r"line 1: 'road' is not VALUE NAME"),
        ("0 road\n1\n", r"line 2: '1' is not VALUE NAME"),
        ("70000 road\n", "line 1"),
        ("0 road\n1 road\n", "repeats class_names road"),
        ("0 road\n0 car\n", "repeats category_ids 0"),
        ("# nothing\n", "has no classes"),
    ],
)
def test_a_bad_list_of_classes_is_explained(semantics, text, message):
    (semantics.root / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(semantics.root / "classes.txt")


def test_missing_folders_and_splits_of_maps_are_explained(semantics):
    with pytest.raises(
        FileNotFoundError, match=r"no folder of maps .*/masks: .*holds classes\.txt, images/"
    ):
        semantics.open(train_labels="masks")
    with pytest.raises(FileNotFoundError, match=r"no list of classes .*names\.txt"):
        semantics.open(classes="names.txt")
    with pytest.raises(ValueError, match="no train split: the option train_images is empty"):
        semantics.open(train_images="")
    (semantics.root / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no \.jpg, \.jpeg, \.png, .*holds nothing"):
        semantics.open(train_images="empty")


# ------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize("variant", custom.VARIANTS)
def test_the_config_of_every_variant_names_known_options(variant):
    config = custom.get_config(variant)
    assert set(config) == set(common.get_base())
    known = sources.OPTIONS[config.dataset.name]
    assert set(config.dataset.options) <= set(known)


def test_the_default_is_panoptic_and_small():
    default, named = custom.get_config(), custom.get_config("small,data=panoptic")
    assert default.to_dict() == named.to_dict()
    assert default.dataset.name == "coco_folder" and len(default.eval.tasks) == 3
    with pytest.raises(
        ValueError, match=r"configs/custom\.py has no variant 'tiny'.*data=semantic"
    ):
        custom.get_config("tiny")
