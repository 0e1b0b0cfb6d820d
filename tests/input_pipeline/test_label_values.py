"""Semantic folders: class values and ignored values of every kind, names of images and maps."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from oneformer_jax.eval.metrics.iou import MeanIoU
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.input_pipeline import datasets, records, sources, statistics
from oneformer_jax.input_pipeline.semantic_folder import SemanticFolderSource, read_classes
from oneformer_jax.types import VOID, Metadata
from tests.input_pipeline.image_files import png, saved

SHAPE = (6, 7)


def write_folder(root, classes, maps, *, bits=8, images=None, names=None, labels="labels"):
    """images/ and labels/ with one map each (or those of `names`), and classes.txt."""
    names = names or [f"{i}.jpg" for i in range(len(maps))]
    for part in ("images", labels):
        (root / part).mkdir(parents=True, exist_ok=True)
    for name, values in zip(names, maps, strict=True):
        photo = np.full((*values.shape, 3), 90, np.uint8)
        Image.fromarray(photo).save(root / (images or "images") / name)
        stem = name.rsplit(".", 1)[0]
        (root / labels / f"{stem}.png").write_bytes(png(values, bits))
    (root / "classes.txt").write_text("".join(f"{v} {n}\n" for v, n in classes))


def opened(root, **options):
    options = {"train_images": "images", "train_labels": "labels"} | options
    return sources.open_source("semantic_folder", data_dir=root, split="train", options=options)[0]


def score_of_a_perfect_prediction(source):
    metadata = Metadata(**dataclasses.asdict(source.info))
    metric = MeanIoU(metadata.num_classes)
    for index in range(len(source)):
        record = source[index]
        truth = Segmentation.from_record(record, metadata, "semantic")
        filled = np.where(truth.class_map == VOID, 0, truth.class_map)
        metric.update(dataclasses.replace(truth, class_map=filled), record)
    return metric


@given(data=st.data(), bits=st.sampled_from([1, 2, 4, 8, 16]))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_class_and_ignored_values_are_read_exactly(tmp_path_factory, data, bits):
    values = st.integers(0, (1 << bits) - 1)
    classes = data.draw(st.lists(values, min_size=1, max_size=12, unique=True))
    ignored = data.draw(st.lists(values, max_size=3, unique=True).map(set)) - set(classes)
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    label = rng.choice([*classes, *ignored], SHAPE)
    root = tmp_path_factory.mktemp("any")
    write_folder(root, [(v, f"class {v}") for v in classes], [label], bits=bits)
    source = opened(root, ignore_label=tuple(ignored) or (-1,))
    record, compact = source[0], source.compact(0)
    expected = np.zeros(SHAPE, int)
    for number, value in enumerate(classes, 1):
        expected[label == value] = number
    np.testing.assert_array_equal(record["panoptic"], expected)
    np.testing.assert_array_equal(compact["panoptic"], expected)
    present = np.unique(expected[expected > 0])
    assert [s["id"] for s in record["segments"]] == present.tolist()
    assert [s["category"] for s in record["segments"]] == (present - 1).tolist()
    assert [s["area"] for s in record["segments"]] == [(expected == n).sum() for n in present]
    np.testing.assert_array_equal(source.classes_of(0), present - 1)
    metric = score_of_a_perfect_prediction(source)
    assert metric.counts()["semantic/pixels"] == (expected > 0).sum()
    if len(present):
        assert set(metric.compute().values()) == {100.0}


@given(value=st.integers(0, 65_535))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_value_that_nobody_listed_is_an_error_that_names_it(tmp_path_factory, value):
    root = tmp_path_factory.mktemp("stray")
    label = np.zeros(SHAPE, np.uint16)
    label[2, 3] = value
    write_folder(root, [(0, "ground"), (9, "hill")], [label], bits=16)
    source = opened(root, ignore_label=(255, 300))
    if value in (0, 9, 255, 300):
        assert source[0]["panoptic"][2, 3] == {0: 1, 9: 2}.get(value, 0)
        return
    for call in (source.__getitem__, source.compact, source.classes_of):
        with pytest.raises(records.RecordError, match=rf"0\.png: 1 pixels .*\({value}\).*255, 300"):
            call(0)


def test_65535_classes(tmp_path):
    label = np.array([[0, 1, 255, 256], [40_000, 65_533, 65_534, 65_535]])
    write_folder(tmp_path, [(v, f"c{v}") for v in range(65_535)], [label], bits=16)
    source = opened(tmp_path, ignore_label=65_535)
    assert source.info.num_classes == 65_535
    record = source.compact(0)
    assert record["panoptic"].dtype == np.uint16
    np.testing.assert_array_equal(record["panoptic"], np.where(label == 65_535, 0, label + 1))
    assert set(score_of_a_perfect_prediction(source).compute().values()) == {100.0}
    with open(tmp_path / "classes.txt", "a") as file:
        file.write("65535 c65535\n")
    with pytest.raises(ValueError, match="65,536 classes; at most 65,535"):
        read_classes(tmp_path / "classes.txt", ())


def test_class_255_among_many_is_no_void(tmp_path):
    label = np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE) + 240
    write_folder(tmp_path, [(v, f"c{v}") for v in range(300)], [label], bits=16)
    with pytest.raises(ValueError, match=r"'c255' has the value 255 .*ignore_label"):
        opened(tmp_path)
    metric = score_of_a_perfect_prediction(opened(tmp_path, ignore_label=-1))
    assert metric.counts() == {"semantic/images": 1, "semantic/classes": 42, "semantic/pixels": 42}


def test_an_ignored_zero_is_no_class_of_the_scores(tmp_path):
    label = np.array([[0, 1, 2], [0, 0, 2]])
    write_folder(tmp_path, [(1, "square"), (2, "disc")], [label])
    metric = score_of_a_perfect_prediction(opened(tmp_path, ignore_label=0))
    assert metric.totals()[1].tolist() == [1, 2] and metric.compute()["semantic/mIoU"] == 100


def test_masks_of_0_and_255_are_read_only_as_told(tmp_path):
    label = np.array([[0, 0, 255], [0, 255, 255]])
    write_folder(tmp_path, [(0, "ground"), (1, "object")], [label, label])
    with pytest.raises(ValueError, match=r"0 and 255 only.*'object' would never.*'255 object'"):
        opened(tmp_path)
    with pytest.raises(records.RecordError, match=r"no class \(255\)"):
        opened(tmp_path, ignore_label=-1)[0]
    (tmp_path / "classes.txt").write_text("0 ground\n255 object\n")
    metric = score_of_a_perfect_prediction(opened(tmp_path, ignore_label=-1))
    assert metric.totals()[1].tolist() == [6, 6]
    # Honest masks of 0 and 1 with unlabelled pixels.
    label = np.array([[0, 1, 255], [0, 0, 255]])
    write_folder(tmp_path, [(0, "ground"), (1, "object")], [label, label])
    assert opened(tmp_path).classes_of(0).tolist() == [0, 1]


def test_the_table_of_a_dataset_brings_its_own_ignored_value(tmp_path):
    label = np.array([[7, 255], [8, 255]])
    write_folder(tmp_path, [(0, "not read")], [label])
    source = opened(tmp_path, table="cityscapes", ignore_label=8)
    assert source.classes_of(0).tolist() == [0, 1]


# ------------------------------------------------------------------------ names


def test_maps_beside_their_images_are_no_images(tmp_path):
    labels = [np.full(SHAPE, i) for i in range(3)]
    classes = [(i, f"c{i}") for i in range(3)]
    write_folder(tmp_path, classes, labels, labels="images")
    beside = {"train_labels": "images"}
    source = opened(tmp_path, **beside)
    assert [source[i]["file_name"] for i in range(len(source))] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [source.classes_of(i).tolist() for i in range(3)] == [[0], [1], [2]]
    Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(tmp_path / "images/photo.png")
    with pytest.raises(ValueError, match=r"photo\.png would be both image and map.*label_suffix"):
        opened(tmp_path, **beside)


def test_maps_with_an_ending_of_their_own_beside_png_images(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(tmp_path / f"images/{name}.png")
        Image.fromarray(np.zeros(SHAPE, np.uint8)).save(tmp_path / f"images/{name}_mask.png")
    (tmp_path / "classes.txt").write_text("0 ground\n")
    source = opened(tmp_path, train_labels="images", label_suffix="_mask.png")
    assert [source[i]["file_name"] for i in range(len(source))] == ["a.png", "b.png"]


def test_images_that_share_a_map_are_refused(tmp_path):
    labels = [np.zeros(SHAPE, int)] * 3
    write_folder(tmp_path, [(0, "ground")], labels, names=["a.jpg", "a.png", "b.jpg"])
    with pytest.raises(ValueError, match=r"a\.jpg, a\.png differ in their ending only"):
        opened(tmp_path)


def test_hidden_files_of_macos_are_no_records(tmp_path):
    write_folder(tmp_path, [(0, "ground")], [np.zeros(SHAPE, int)])
    for name in ("images/._0.jpg", "images/.x.png", "labels/._0.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert len(opened(tmp_path)) == 1


@pytest.mark.parametrize("ending", [".tif", ".webp", ".bmp"])
def test_images_of_other_formats_are_records(tmp_path, ending):
    write_folder(tmp_path, [(0, "ground")], [np.zeros(SHAPE, int)], names=[f"a{ending}"])
    assert opened(tmp_path)[0]["image"].shape == (*SHAPE, 3)


def test_the_limit_of_pixels_holds_for_images_and_maps(tmp_path):
    write_folder(tmp_path, [(0, "ground")], [np.zeros(SHAPE, int)])
    options = {"train_images": "images", "train_labels": "labels"}
    arguments = {"data_dir": tmp_path, "split": "train", "options": options}
    source, _ = sources.open_source("semantic_folder", **arguments, max_pixels=41)
    for call in (source.__getitem__, source.compact, source.classes_of, source.image_size):
        with pytest.raises(records.RecordError, match=r"data\.max_pixels, 41"):
            call(0)
    assert sources.open_source("semantic_folder", **arguments, max_pixels=42)[0][0]["image_id"]


def test_a_list_of_classes_may_begin_with_a_mark_and_must_be_text(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbf0 ground\r\n1 hill\r\n")
    assert read_classes(path).class_names == ("ground", "hill")
    for content in (saved(np.zeros(SHAPE, np.uint8), "PNG"), "0 ground".encode("utf-16")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"classes\.txt.* is not"):
            read_classes(path)


# ------------------------------------------------------------------------ what is said


def test_classes_that_never_occur_and_broken_maps_are_said(tmp_path):
    labels = [np.full(SHAPE, i % 2) for i in range(4)]
    write_folder(tmp_path, [(i, f"kind {i}") for i in range(5)], labels)
    source = opened(tmp_path)
    (line,) = statistics.remarks(source, source.info)
    assert "3 of 5 classes occur in none of the 4 annotations looked at: kind 2" in line
    (tmp_path / "labels/2.png").write_bytes(png(np.full(SHAPE, 77), 8))
    absent, broken = statistics.remarks(source, source.info)
    assert "3 of 5 classes" in absent
    assert broken.startswith("1 of the 4 annotations") and "(77)" in broken
    (line,) = statistics.remarks(source, source.info, limit=1)
    assert "4 of 5 classes occur in none of the 1 annotations looked at (of 4)" in line


def test_nothing_is_said_of_annotations_that_use_all_classes(tmp_path):
    write_folder(tmp_path, [(0, "a"), (1, "b")], [np.arange(42).reshape(SHAPE) % 2])
    source = opened(tmp_path)
    assert isinstance(source, SemanticFolderSource)
    assert statistics.remarks(source, source.info) == []
    assert statistics.remarks([], datasets.COCO) == []


def test_300_categories_of_which_three_occur(coco_folder):
    more = [{"id": 500 + i, "name": f"kind {i}", "isthing": i % 2} for i in range(296)]
    for split, content in coco_folder.json.items():
        content["categories"] = [*content["categories"], *more]
        coco_folder.write(split)
    options = {"prepare": False}
    source, info = sources.open_source(
        "coco_folder", data_dir=coco_folder.root, split="train", options=options
    )
    assert info.num_classes == 300 and source[0]["image"].shape == (24, 40, 3)
    (line,) = statistics.remarks(source, info)
    assert line.startswith("297 of 300 classes occur in none of the 4 annotations looked at: ")
