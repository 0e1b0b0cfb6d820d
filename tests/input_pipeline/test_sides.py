"""Both splits made from one folder: which image is where, and what is said of bad options."""

import json
import pickle
import shutil

import cv2
import numpy as np
import pytest

from oneformer_jax.app import data
from oneformer_jax.configs import custom
from oneformer_jax.input_pipeline import loader, prepared, sources, statistics
from oneformer_jax.input_pipeline.builders import coco_folder as builder
from oneformer_jax.input_pipeline.records import RecordError
from oneformer_jax.input_pipeline.sides import Side, SideSource

SHARE, SEED = 0.4, 1
NAMES = [f"{i:02d}.png" for i in range(12)]
# Written down: another choice in a later version would score a model on its training images.
VALIDATION = ["01.png", "03.png", "04.png", "07.png", "10.png"]
OWN = {"coco_folder": {"prepare": False}, "coco_instances": {}, "semantic_folder": {}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One folder of twelve images that all three sources read, without validation files."""
    root = tmp_path_factory.mktemp("sides") / "pets"
    for name in ("images/train", "labels/train", "panoptic"):
        (root / name).mkdir(parents=True)
    pictures, maps, boxes = [], [], []
    for i, name in enumerate(NAMES):
        height = 20 + i
        cv2.imwrite(str(root / "images/train" / name), np.full((height, 30, 3), i, np.uint8))
        thing = np.zeros((height, 30), np.uint8)
        thing[2:9, 3:12] = i % 3 > 0  # every third image is without a thing
        cv2.imwrite(str(root / "labels/train" / name), thing)
        ids = np.where(thing, 5, 9).astype(np.uint8)
        zeros = np.zeros_like(ids)
        cv2.imwrite(str(root / "panoptic" / name), np.stack([zeros, zeros, ids], -1))
        segments = [{"id": 9, "category_id": 2}, {"id": 5, "category_id": 1}]
        pictures.append({"id": 100 + i, "file_name": name, "height": height, "width": 30})
        maps.append(
            {
                "image_id": 100 + i,
                "file_name": name,
                "segments_info": segments[: 2 if thing.any() else 1],
            }
        )
        if thing.any():
            outline = [3, 2, 12, 2, 12, 9, 3, 9]
            boxes.append(
                {"id": 500 + i, "image_id": 100 + i, "category_id": 1, "segmentation": [outline]}
            )
    cat, grass = {"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "grass", "isthing": 0}
    for path, annotations, categories in (
        ("panoptic_train.json", maps, [cat, grass]),
        ("instances_train.json", boxes, [cat]),
    ):
        content = {"images": pictures, "annotations": annotations, "categories": categories}
        (root / path).write_text(json.dumps(content))
    (root / "classes.txt").write_text("0 grass\n1 cat\n")
    return root


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "pets")
    return tmp_path / "pets"


def opened(name, root, split, *, share=SHARE, seed=SEED, data_dir=None, **options):
    given = {"train_images": "images/train", "validation_share": share, "split_seed": seed}
    given |= OWN[name] | {"root": str(root)} | options
    where = data_dir or root
    return sources.open_source(name, data_dir=where, split=split, options=given)[0]


def names_of(source):
    return [source[i]["file_name"] for i in range(len(source))]


@pytest.mark.parametrize("name", OWN)
def test_both_splits_come_from_the_training_files(made, name):
    whole = opened(name, made, "train", share=0)
    parts = {split: opened(name, made, split) for split in sources.SPLITS}
    names = {split: names_of(source) for split, source in parts.items()}
    assert sorted(names["train"] + names["validation"]) == names_of(whole)
    assert names["validation"] == VALIDATION
    for split, part in parts.items():
        loaded = pickle.loads(pickle.dumps(part))
        assert names_of(loaded) == names[split] and part.info == whole.info
        for i, file_name in enumerate(names[split]):
            k = names_of(whole).index(file_name)
            assert part.image_size(i) == whole.image_size(k)
            np.testing.assert_array_equal(part.compact(i)["panoptic"], whole.compact(k)["panoptic"])
            np.testing.assert_array_equal(part.classes_of(i), whole.classes_of(k))
            assert hasattr(part, "has_things") == hasattr(whole, "has_things")
            if hasattr(whole, "has_things"):
                assert part.has_things(i) == whole.has_things(k) == bool(k % 3)
        with pytest.raises(IndexError):
            part[len(part)]


@pytest.mark.parametrize("name", OWN)
def test_no_image_changes_sides_when_others_come_or_go(folder, name):
    before = {split: names_of(opened(name, folder, split)) for split in sources.SPLITS}
    gone = "03.png"
    for path in folder.glob("*_train.json"):
        content = json.loads(path.read_text())
        (number,) = (im["id"] for im in content["images"] if im["file_name"] == gone)
        content["images"] = [im for im in content["images"] if im["id"] != number]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != number]
        for picture in content["images"]:  # as tools number them anew
            picture["id"] += 1000
        for annotation in content["annotations"]:
            annotation["image_id"] += 1000
        path.write_text(json.dumps(content))
    (folder / "images/train" / gone).unlink()
    for split, names in before.items():
        left = [n for n in names if n != gone]
        assert names_of(opened(name, folder, split)) == left


def test_the_share_and_the_seed_act():
    names = [f"{i}.jpg" for i in range(4000)]

    def chosen(share, seed=0):
        return {n for n in names if Side("validation", share, seed).holds(n)}

    assert 300 < len(chosen(0.1)) < 500
    assert chosen(0.1) < chosen(0.3)
    assert len(chosen(0.5) & chosen(0.5, seed=1)) < 1200
    assert chosen(0.3) | {n for n in names if Side("train", 0.3, 0).holds(n)} == set(names)


def test_the_loader_and_the_statistics_take_a_side(made):
    train = opened("coco_instances", made, "train")
    with_things = loader.training_images(train, require_things=True)
    assert [int(names_of(train)[i][:2]) % 3 > 0 for i in range(len(train))] == [
        i in with_things for i in range(len(train))
    ]
    found = statistics.collect(train, train.info, limit=0)
    assert len(found.sizes) == found.total == len(train) and not found.faults
    config = custom.get_config("small,data=instances")
    options = {"train_images": "images/train", "validation_share": SHARE, "split_seed": SEED}
    config.dataset.options.update(options)
    config.dataset.data_dir, config.data.max_pixels = str(made), 10
    source, _ = data.open_split(config, "validation")
    assert isinstance(source, SideSource) and len(source) == len(VALIDATION)
    with pytest.raises(RecordError, match="10"):
        source[0]


def test_faults_of_the_file_are_told_on_both_sides(folder):
    path = folder / "panoptic_train.json"
    content = json.loads(path.read_text())
    content["annotations"][4]["segments_info"][0]["category_id"] = 77
    path.write_text(json.dumps(content))
    for split in sources.SPLITS:
        with pytest.raises(ValueError, match="77"):
            opened("coco_folder", folder, split)
        assert len(opened("coco_folder", folder, split, skip_broken=True).faults) == 1


def test_prepared_records_are_split_alike(made, tmp_path):
    options = {"prepare": True, "data_dir": tmp_path}
    for split in sources.SPLITS:
        direct = opened("coco_folder", made, split)
        records = opened("coco_folder", made, split, **options)
        assert isinstance(records, sources.TfdsSource) and names_of(records) == names_of(direct)
    done = prepared.folder_of(builder.CocoFolder, tmp_path, "pets")
    for changed in ({"share": 0.5}, {"seed": 2}, {"share": 0}):
        more = {} if changed != {"share": 0} else {"validation_json": ""}
        with pytest.raises(ValueError, match=r"prepared with validation_share=0.4 split_seed=1"):
            opened("coco_folder", made, "train", **options, **changed, **more)
    shutil.rmtree(done)
    opened("coco_folder", made, "train", share=0, validation_json="", **options)
    with pytest.raises(ValueError, match="prepared with validation_share=0, but"):
        opened("coco_folder", made, "train", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coco_folder", {"validation_json": "other.json"}, "validation_json=other.json"),
        ("coco_instances", {"validation_json": "other.json"}, "validation_json=other.json"),
        ("coco_instances", {"validation_images": "images/b"}, "validation_images=images/b"),
        ("semantic_folder", {"validation_images": "images/b"}, "validation_images=images/b"),
        ("coco_folder", {"validation_share": 1.0}, "validation_share is 1.0; it must be a number"),
        ("coco_folder", {"validation_share": "0.1"}, "validation_share is '0.1'; it must"),
        ("coco_folder", {"validation_share": float("nan")}, "validation_share is nan; it must"),
        ("semantic_folder", {"split_seed": -1}, "split_seed is -1; it must be an integer"),
    ],
)
def test_options_that_do_not_go_together_are_refused(made, name, options, message):
    with pytest.raises(ValueError, match=f"dataset.options.*{message}"):
        opened(name, made, "train", **options)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("coco_folder", "panoptic_val.json"),
        ("coco_instances", "instances_val.json"),
        ("semantic_folder", "images/validation"),
    ],
)
def test_validation_files_under_the_default_name_are_not_passed_over(folder, name, path):
    (folder / path).mkdir()
    with pytest.raises(ValueError, match=f"{path} names others in .*empty"):
        opened(name, folder, "train")
    key = "validation_images" if "images" in path else "validation_json"
    assert names_of(opened(name, folder, "validation", **{key: ""})) == VALIDATION


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("share", "empty"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_an_empty_side_is_an_error_whichever_is_opened(made, name, share, empty):
    for split in sources.SPLITS:
        with pytest.raises(ValueError, match=f"none of the 12 images is for {empty}; .*share"):
            opened(name, made, split, share=share)


def test_the_error_of_an_empty_side_names_a_seed_that_works(made):
    seed = next(
        s for s in range(99) if not any(Side("validation", 0.05, s).holds(n) for n in NAMES)
    )
    with pytest.raises(ValueError, match=r"set split_seed=\d+") as caught:
        opened("coco_instances", made, "train", share=0.05, seed=seed)
    better = int(str(caught.value).split("split_seed=")[2].split(",")[0])
    assert len(opened("coco_instances", made, "validation", share=0.05, seed=better))


class Names:
    """200,000 of them."""

    def __len__(self):
        return 200_000

    def name_of(self, index):
        return str(index)


def test_an_error_about_an_empty_side_looks_through_few_seeds(monkeypatch):
    looked = []

    def holds(self, name):
        looked.append(name)
        return False

    monkeypatch.setattr(Side, "holds", holds)
    with pytest.raises(ValueError, match="set another validation_share"):
        Side("validation", 1e-12, 0).of(Names())
    assert len(looked) <= 1_500_000
