"""The builders of COCO, ADE20K, Cityscapes and Mapillary: what their records hold."""

import json
import shutil

import cv2
import numpy as np
import pytest

from oneformer_jax.input_pipeline import datasets, eval_loader, loader, records, sources, transforms
from oneformer_jax.input_pipeline.builders import ade20k, cityscapes, preparation
from oneformer_jax.input_pipeline.records import RecordError
from tests.input_pipeline import official


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """dataset -> (download, data_dir), prepared once."""
    done = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for dataset in official.NAMES:
            folder = tmp_path_factory.mktemp(dataset)
            root = official.make(dataset, folder / "download")
            official.shrink(monkeypatch, dataset)
            preparation.prepare(dataset, root, folder / "data", log=lambda line: None)
            done[dataset] = root, folder / "data"
    return done


def _open(prepared, dataset, split="train", **options):
    return sources.open_source(dataset, data_dir=prepared[dataset][1], split=split, options=options)


def _segments(info, record):
    return {
        s["id"]: (info.class_names[s["category"]], s["iscrowd"], s["area"])
        for s in record["segments"]
    }


# ---------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("dataset", official.NAMES)
def test_records_are_those_of_the_download(prepared, dataset):
    root, data_dir = prepared[dataset]
    for split, count in official.COUNTS.items():
        source, info = _open(prepared, dataset, split)
        assert info == source.info == datasets.dataset_info(dataset)
        assert len(source) == count and source.left_out == ()
        files = {p.name: p for p in root.rglob("*") if p.suffix in (".jpg", ".png")}
        seen = set()
        for index in range(count):
            record = source[index]
            pixels = cv2.imread(str(files[record["file_name"]]))[..., ::-1]
            np.testing.assert_array_equal(record["image"], pixels)
            assert record["panoptic"].shape == source.image_size(index) == official.SHAPE
            assert record["panoptic"].dtype == np.int32
            listed = {s["id"] for s in record["segments"]}
            assert set(np.unique(record["panoptic"])) <= listed | {0}
            seen.add(record["image_id"])
        assert len(seen) == count
    report = json.loads((source_dir(data_dir, dataset) / preparation.REPORT).read_text())
    assert {k: v["written"] for k, v in report["splits"].items()} == official.COUNTS
    assert all(v["complete"] and v["files"] > 1 for v in report["splits"].values())


def source_dir(data_dir, dataset):
    builder = preparation.builder_class(dataset)
    return data_dir / builder.name / str(builder.VERSION)


@pytest.mark.parametrize("dataset", official.NAMES)
def test_maps_are_stored_dense_and_images_as_they_came(prepared, dataset):
    import tensorflow_datasets as tfds

    root, data_dir = prepared[dataset]
    builder = tfds.builder_from_directory(str(source_dir(data_dir, dataset)))
    stored_form = {key: tfds.decode.SkipDecoding() for key in ("image", "panoptic_image")}
    example = builder.as_data_source("train", decoders=stored_form)[0]
    stored = cv2.imdecode(np.frombuffer(example["panoptic_image"], np.uint8), -1)
    assert stored.dtype == np.uint8 and stored.ndim == 2
    original = next(root.rglob(example["image/filename"].decode()))
    assert example["image"] == original.read_bytes()


def test_preparation_reads_on_without_the_download(prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared["ade20k"][1], copy)
    shutil.rmtree(next(copy.rglob(".shards")))  # what a careless copy leaves behind
    source, _ = sources.open_source("ade20k", data_dir=copy, split="validation")
    assert len(source) == 3 and source[2]["image"].shape == (20, 30, 3)


@pytest.mark.parametrize("dataset", official.NAMES)
def test_unprepared_dataset_names_the_command(tmp_path, dataset):
    with pytest.raises(FileNotFoundError) as error:
        sources.open_source(dataset, data_dir=tmp_path, split="train")
    assert f"--mode=prepare --dataset={dataset} --source=DIR --data_dir={tmp_path}" in str(
        error.value
    )
    with pytest.raises(ValueError, match="unknown option 'size' of"):
        sources.open_source(dataset, data_dir=tmp_path, split="train", options={"size": 3})


@pytest.mark.parametrize("dataset", official.NAMES)
def test_training_and_evaluation_read_it(prepared, dataset):
    source, info = _open(prepared, dataset)
    config = loader.LoaderConfig(
        batch_size=4,
        num_slots=8,
        num_texts=10,
        augment=transforms.AugmentConfig(crop_size=(32, 32), kind="none"),
        require_things=True,
        num_workers=0,
        num_threads=2,
        prefetch=2,
    )
    batches = loader.train_loader(source, config, info)
    kept = set(np.concatenate([next(batches)["index"] for _ in range(4)]).tolist())
    batches.close()
    assert kept == {i for i in range(5) if source.has_things(i)}
    held_out, _ = _open(prepared, dataset, "validation")
    settings = eval_loader.EvalLoaderConfig(batch_size=2, short_edge=20, max_size=40)
    records = [r for b in eval_loader.eval_loader(held_out, settings) for r in b["records"] if r]
    assert len(records) == 3
    assert all(("semantic" in r) == (dataset == "ade20k") for r in records)


# ---------------------------------------------------------------------------- COCO


def test_coco_record(prepared):
    source, info = _open(prepared, "coco")
    assert source[0]["image_id"] == "100" and source[0]["file_name"] == "000000000100.jpg"
    assert _segments(info, source[0]) == {
        300: ("person", False, 50),
        70_000: ("rug-merged", False, 600 - 60 - 50 - 24),
        16_000_000: ("person", True, 24),
    }


def test_coco_training_filter_goes_by_the_original_instances(prepared):
    # The panoptic annotation would say 0, 1, 3, 4.
    source, _ = _open(prepared, "coco")
    assert [i for i in range(5) if source.has_things(i)] == [1, 2, 4]


def test_coco_without_instances_goes_by_the_panoptic_annotation(tmp_path, monkeypatch):
    root = official.coco(tmp_path / "coco")
    for path in (root / "annotations").glob("instances_*"):
        path.unlink()
    official.shrink(monkeypatch, "coco")
    lines = []
    preparation.prepare("coco", tmp_path, tmp_path / "out", log=lines.append)  # the parent will do
    source, _ = sources.open_source("coco", data_dir=tmp_path / "out", split="train")
    assert [i for i in range(5) if source.has_things(i)] == [0, 1, 3, 4]
    assert any("there is no" in line and "instances_train2017.json" in line for line in lines)


def test_coco_pngs_may_lie_beside_the_annotations_folder(tmp_path, monkeypatch):
    root = official.coco(tmp_path / "download")
    for year in ("train2017", "val2017"):
        (root / f"annotations/panoptic_{year}").rename(root / f"panoptic_{year}")
    official.shrink(monkeypatch, "coco")
    preparation.prepare("coco", root, tmp_path, log=lambda line: None)
    assert len(_open({"coco": (root, tmp_path)}, "coco")[0]) == 5


# ---------------------------------------------------------------------------- Mapillary


def test_mapillary_record(prepared):
    source, info = _open(prepared, "mapillary")
    assert source[1]["image_id"] == "training-1"
    assert _segments(info, source[1]) == {
        300: ("Car", False, 50),
        70_000: ("Road", False, 600 - 60 - 50 - 24),
        16_000_000: ("Car", True, 24),
    }
    assert [source.has_things(i) for i in range(5)] == [True, True, False, True, True]


def test_mapillary_of_the_package_with_both_versions(tmp_path, monkeypatch):
    root = official.mapillary(tmp_path / "download", panoptic="v1.2/panoptic")
    official.shrink(monkeypatch, "mapillary")
    preparation.prepare("mapillary", root, tmp_path, log=lambda line: None)
    assert len(_open({"mapillary": (root, tmp_path)}, "mapillary")[0]) == 5


def _change_categories(root, change):
    path = root / "training/panoptic/panoptic_2018.json"
    content = json.loads(path.read_text())
    change(content["categories"])
    official.write(path, content)


def test_mapillary_of_another_version_is_refused(tmp_path):
    root = official.mapillary(tmp_path / "download")
    _change_categories(root, lambda c: c.pop(9))
    with pytest.raises(ValueError, match=r"category 10 \(Curb Cut\) is missing.*v1\.2"):
        preparation.prepare("mapillary", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mapillary_kind_of_a_class_is_the_tables(tmp_path, monkeypatch):
    root = official.mapillary(tmp_path / "download")
    _change_categories(root, lambda c: c[0].update(isthing=0))
    official.shrink(monkeypatch, "mapillary")
    lines = []
    preparation.prepare("mapillary", root, tmp_path, log=lines.append)
    assert sum("isthing 0 for category 1 (Bird); it is taken for a thing" in x for x in lines) == 1
    assert _open({"mapillary": (root, tmp_path)}, "mapillary")[1] == datasets.MAPILLARY


# ---------------------------------------------------------------------------- Cityscapes


def test_cityscapes_record(prepared):
    source, info = _open(prepared, "cityscapes")
    record = source[0]
    assert record["image_id"] == "aachen_000000_000019"
    assert record["file_name"] == "aachen_000000_000019_leftImg8bit.png"
    assert _segments(info, record) == {
        7: ("road", False, 600 - 60 - 50 - 25 - 16 - 8),
        26: ("car", True, 16),  # a group
        26_000: ("car", False, 50),
        26_001: ("car", False, 25),
    }
    ids = record["panoptic"]
    assert (ids[18:] == 0).all()  # ego vehicle
    assert (ids[12:14, :4] == 0).all()  # a trailer
    assert (ids[5:10, 15:20] == 26_001).all() and ids[0, 0] == 7


def test_cityscapes_ids_are_kept_and_areas_counted():
    ids = np.array([[0, 11, 24_003, 24_003], [24, 33_000, 23, 29_001]], np.uint16)
    panoptic, table = cityscapes.panoptic_map(ids, "here")
    np.testing.assert_array_equal(panoptic, [[0, 11, 24_003, 24_003], [24, 33_000, 23, 0]])
    assert panoptic.dtype == np.int32
    names = [datasets.CITYSCAPES.class_names[k] for k in table.categories]
    assert table.ids.tolist() == [11, 23, 24, 24_003, 33_000]
    assert names == ["building", "sky", "person", "person", "bicycle"]
    assert table.crowd.tolist() == [0, 0, 1, 0, 0]
    assert table.areas.tolist() == [1, 1, 1, 2, 1]


def test_cityscapes_every_label_is_a_class_or_void():
    """Against the ids of spec 4.6, written once more: 19 of the 34 labels are evaluated."""
    evaluated = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
    for label in range(34):
        ids = np.full((2, 2), label, np.uint16)
        panoptic, table = cityscapes.panoptic_map(ids, "here")
        assert table.ids.tolist() == ([label] if label in evaluated else [])
        assert (panoptic == (label if label in evaluated else 0)).all()
        assert table.crowd.tolist() == ([int(label >= 24)] if label in evaluated else [])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.full((2, 2), 34, np.uint16), "label id 34; Cityscapes has 0 to 33"),
        (np.full((2, 2), 65_535, np.uint16), "label id 65"),
        (np.zeros((2, 2, 3), np.uint8), "instanceIds are one 16-bit channel"),
    ],
)
def test_cityscapes_other_maps_are_refused(ids, message):
    with pytest.raises(RecordError, match=f"here: .*{message}"):
        cityscapes.panoptic_map(ids, "here")


# ---------------------------------------------------------------------------- ADE20K


def test_ade20k_record(prepared):
    source, info = _open(prepared, "ade20k")
    record = source[0]
    assert record["image_id"] == "ADE_train_00000000"
    # The wall's area is that before the bed is laid over its edge, as in the official JSON.
    assert _segments(info, record) == {
        1: ("wall", False, 600 - 60 - 50 - 20),
        2: ("bed", False, 55),
    }
    assert (record["panoptic"] == 1).sum() == 600 - 60 - 50 - 20 - 5
    assert (record["panoptic"][15:, :4] == 0).all()  # the chair without an instance
    assert (record["panoptic"][:2] == 0).all()
    assert source.has_things(0)
    semantic = record["semantic"]
    assert semantic.dtype == np.int32
    assert (semantic[:2] == records.VOID).all() and (semantic[15:, :4] == 19).all()
    assert (semantic[5:10, 5:15] == 7).all() and (semantic[5:10, 4] == 0).all()


def _official_ade20k(semantic, instance):
    """The official conversion, step by step: masks, and their classes and areas, in its order."""
    things = [k for k, thing in enumerate(datasets.ADE20K.is_thing) if thing]
    panoptic, segments = np.zeros(semantic.shape, int), []
    for value in np.unique(semantic):
        if value and value - 1 not in things:
            segments.append((value - 1, int((semantic == value).sum())))
            panoptic[semantic == value] = len(segments)
    for number in np.unique(instance[..., 1]):
        if number:
            mask = instance[..., 1] == number
            (category,) = np.unique(instance[..., 0][mask])
            segments.append((things[category - 1], int(mask.sum())))
            panoptic[mask] = len(segments)
    return panoptic, segments


def test_ade20k_equals_the_official_steps_on_random_maps():
    rng = np.random.default_rng(3)
    for _ in range(20):
        semantic = rng.integers(0, 151, (12, 12)).astype(np.uint8).repeat(3, 0).repeat(3, 1)
        category = rng.integers(1, 101, 256).astype(np.uint8)
        number = (rng.integers(0, 256, (9, 9)) * rng.integers(0, 2, (9, 9))).astype(np.uint8)
        number = number.repeat(4, 0).repeat(4, 1)
        instance = np.stack(
            [np.where(number > 0, category[number], rng.integers(0, 256)), number, number], -1
        ).astype(np.uint8)
        panoptic, table = ade20k.panoptic_map(semantic, instance, "here")
        expected, segments = _official_ade20k(semantic, instance)
        np.testing.assert_array_equal(panoptic, expected)
        assert panoptic.dtype == np.int32
        assert table.ids.tolist() == list(range(1, len(segments) + 1))
        assert list(zip(table.categories, table.areas, strict=True)) == segments
        assert not table.crowd.any()


@pytest.mark.parametrize(
    ("category", "semantic"),
    [(1, 8), (5, 15), (18, 36), (30, 51), (57, 89), (65, 103), (84, 130), (100, 150)],
)
def test_ade20k_instance_categories(category, semantic):
    """Against lines of the official ade20k_instance_catid_mapping.txt (ids from 1 on)."""
    instance = np.full((2, 2, 3), (category, 1, 0), np.uint8)
    _, table = ade20k.panoptic_map(np.zeros((2, 2), np.uint8), instance, "here")
    assert table.categories.tolist() == [semantic - 1]


def test_ade20k_covered_stuff_stays_listed():
    semantic = np.array([[1, 1], [3, 3]], np.uint8)
    instance = np.zeros((2, 2, 3), np.uint8)
    instance[0] = 2, 1, 0
    panoptic, table = ade20k.panoptic_map(semantic, instance, "here")
    np.testing.assert_array_equal(panoptic, [[3, 3], [2, 2]])
    assert table.areas.tolist() == [2, 2, 2]
    assert table.categories.tolist() == [0, 2, 8]


def _ade_maps(semantic=1, category=1, number=1):
    return (
        np.full((2, 2), semantic, np.uint8),
        np.full((2, 2, 3), (category, number, 0), np.uint8),
    )


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (_ade_maps(semantic=151), "annotations/here: class 151"),
        (_ade_maps(category=101), "instance 1 has category 101"),
        (_ade_maps(category=0), "instance 1 has category 0"),
        ((_ade_maps()[0][:1], _ade_maps()[1]), r"\(1, 2\) pixels.*\(2, 2\)"),
        ((_ade_maps()[1], _ade_maps()[1]), "not one 8-bit channel"),
        ((_ade_maps()[0], _ade_maps()[0]), "not 8-bit RGB"),
        (
            (_ade_maps()[0], np.array([[[1, 1, 0], [2, 1, 0]]] * 2, np.uint8)),
            "instance 1 has more than one category",
        ),
    ],
)
def test_ade20k_other_maps_are_refused(maps, message):
    with pytest.raises(RecordError, match=message):
        ade20k.panoptic_map(*maps, "here")


def test_labels_keep_their_depth_and_order():
    for labels in (
        np.array([[0, 70], [255, 3]], np.uint8),
        np.array([[0, 26_001], [65_535, 3]], np.uint16),
        np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    ):
        data = cv2.imencode(".png", labels[..., ::-1] if labels.ndim == 3 else labels)[1].tobytes()
        decoded = records.decode_labels(data, "here")
        np.testing.assert_array_equal(decoded, labels)
        assert decoded.dtype == labels.dtype
