"""Rendered scenes, and the TFDS builders that write records."""

import colorsys
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from oneformer_jax.input_pipeline import records, sources
from oneformer_jax.input_pipeline.builders import scenes
from oneformer_jax.input_pipeline.builders.coco_folder import CocoFolder, CocoFolderConfig
from oneformer_jax.input_pipeline.builders.synthetic import SyntheticConfig, SyntheticPanoptic
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource

ROOT = pathlib.Path(__file__).resolve().parents[2]
INFO = scenes.INFO


@pytest.fixture(scope="module")
def rendered():
    return [scenes.render_scene(0, "train", index) for index in range(150)]


# ------------------------------------------------------------------------------------- scenes


def test_scene_is_a_function_of_seed_split_index_and_size():
    def digest(*arguments):
        scene = scenes.render_scene(*arguments)
        return scene.image.tobytes() + scene.panoptic.tobytes() + repr(scene.segments).encode()

    assert digest(0, "train", 3, 64) == digest(0, "train", 3, 64)
    others = {
        digest(*a)
        for a in (
            (0, "train", 3, 64), (1, "train", 3, 64), (0, "validation", 3, 64),
            (0, "train", 4, 64), (0, "train", 3, 72),
        )
    }  # fmt: skip
    assert len(others) == 5


def test_segments_describe_the_map_exactly(rendered):
    for scene in rendered:
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert scene.panoptic.shape == (128, 128) and scene.panoptic.dtype == np.int32
        ids, areas = np.unique(scene.panoptic[scene.panoptic > 0], return_counts=True)
        assert dict(zip(ids.tolist(), areas.tolist(), strict=True)) == {
            s["id"]: s["area"] for s in scene.segments
        }
        assert ids.max() < 2**24
        stuff = [s["category"] for s in scene.segments if not INFO.is_thing[s["category"]]]
        assert len(stuff) == len(set(stuff))  # one segment per stuff class


def test_dataset_has_what_panoptic_data_has(rendered):
    counts = [[INFO.is_thing[s["category"]] for s in r.segments] for r in rendered]
    assert 0.02 < np.mean([not any(c) for c in counts]) < 0.2  # images without things
    assert 0.02 < np.mean([any(s["iscrowd"] for s in r.segments) for r in rendered]) < 0.2
    assert 0.05 < np.mean([(r.panoptic == 0).mean() > 0.01 for r in rendered]) < 0.3  # void
    seen = {s["category"] for r in rendered for s in r.segments}
    assert seen == set(range(INFO.num_classes))
    assert max(map(sum, counts)) == 5
    ids = np.array([s["id"] for r in rendered for s in r.segments])
    assert (ids > 2**16).mean() > 0.9  # all three channels of the PNG are used


def test_things_occlude_one_another(rendered):
    """A visible area well below that of the whole shape: some other thing lies over it."""
    circle, ratios = INFO.class_names.index("circle"), []
    for scene in rendered:
        for segment in scene.segments:
            rows, columns = np.nonzero(scene.panoptic == segment["id"])
            inside = (
                rows.min() > 0 and rows.max() < 127 and columns.min() > 0 and columns.max() < 127
            )
            if segment["category"] == circle and not segment["iscrowd"] and inside:
                extent = max(np.ptp(rows), np.ptp(columns)) + 1
                ratios.append(segment["area"] / (np.pi / 4 * extent**2))
    assert len(ratios) > 10
    assert np.median(ratios) > 0.9 and min(ratios) < 0.85


@pytest.mark.parametrize("name", scenes._SHAPES)
def test_image_and_mask_agree_on_where_a_thing_is(rendered, name):
    _, hue, spread, _ = scenes._SHAPES[name]
    k, inside = INFO.class_names.index(name), 0
    things = [(r, s) for r in rendered for s in r.segments if s["category"] == k]
    for scene, segment in things:
        color = np.median(scene.image[scene.panoptic == segment["id"]], axis=0) / 255
        distance = (colorsys.rgb_to_hsv(*color)[0] * 360 - hue + 180) % 360 - 180
        inside += abs(distance) < spread + 12
    assert len(things) >= 10 and inside >= 0.9 * len(things)


def test_scene_scales_with_its_size():
    large = scenes.render_scene(2, "train", 1, 256)
    assert large.image.shape == (256, 256, 3)
    things = [s["area"] for s in large.segments if INFO.is_thing[s["category"]]]
    assert things and max(things) > 4 * 200
    with pytest.raises(ValueError, match="at least 32"):
        scenes.render_scene(0, "train", 0, 16)


# ---------------------------------------------------------------------------------- synthetic

SMALL = {"size": 48, "train_examples": 6, "validation_examples": 2}


@pytest.fixture(scope="module")
def synthetic_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def synthetic(synthetic_dir):
    return sources.open_source("synthetic", data_dir=synthetic_dir, split="train", options=SMALL)[0]


def test_prepared_scenes_are_the_rendered_ones_in_order(synthetic, synthetic_dir):
    assert synthetic.info == INFO
    assert len(synthetic) == 6
    for index in range(6):
        scene, record = scenes.render_scene(0, "train", index, 48), synthetic[index]
        np.testing.assert_array_equal(record["panoptic"], scene.panoptic)
        assert record["segments"] == scene.segments
        assert record["image"].dtype == np.uint8 and record["panoptic"].dtype == np.int32
        assert np.abs(record["image"].astype(int) - scene.image).mean() < 4  # JPEG
        assert record["image_id"] == f"train_{index:06d}"
        assert record["file_name"] == f"train_{index:06d}.jpg"
        assert synthetic.image_size(index) == (48, 48)
        assert synthetic.has_things(index) == any(
            INFO.is_thing[s["category"]] and not s["iscrowd"] for s in scene.segments
        )
    held_out, _ = sources.open_source(
        "synthetic", data_dir=synthetic_dir, split="validation", options=SMALL
    )
    assert len(held_out) == 2
    expected = scenes.render_scene(0, "validation", 1, 48)
    np.testing.assert_array_equal(held_out[1]["panoptic"], expected.panoptic)


def test_second_preparation_renders_nothing(synthetic, synthetic_dir, monkeypatch):
    def refuse(*args):
        raise AssertionError("rendered again")

    monkeypatch.setattr(scenes, "render_scene", refuse)
    again, _ = sources.open_source(
        "synthetic", data_dir=synthetic_dir, split="train", options=SMALL
    )
    assert again[5]["segments"] == synthetic[5]["segments"]
    with pytest.raises(AssertionError, match="rendered again"):  # other data are other files
        sources.open_source(
            "synthetic", data_dir=synthetic_dir, split="train", options={**SMALL, "seed": 1}
        )


def _builder(folder, **kwargs):
    config = SyntheticConfig(size=32, train_examples=3, validation_examples=1, **kwargs)
    return SyntheticPanoptic(config=config, data_dir=folder)


def test_nobody_is_told_of_a_download(tmp_path, capsys):
    options = {"size": 32, "train_examples": 1, "validation_examples": 1}
    sources.open_source("synthetic", data_dir=tmp_path, split="train", options=options)
    shown = capsys.readouterr().out
    assert "ownload" not in shown
    assert f"Writing the records of synthetic_panoptic to {tmp_path}" in shown


def test_interrupted_preparation_does_not_count(tmp_path, monkeypatch):
    render = scenes.render_scene

    def fail_on_the_third(seed, split, index, size):
        if index == 2:
            raise KeyboardInterrupt
        return render(seed, split, index, size)

    builder = _builder(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "render_scene", fail_on_the_third)
        sources.prepare(builder)
    assert not sources.is_prepared(builder.data_dir)
    # What a killed process, which cleans nothing up, leaves behind.
    leftover = pathlib.Path(builder.data_dir).parent / "incomplete.ABCDEF_1.0.0"
    leftover.mkdir(parents=True)
    target = sources.prepare(_builder(tmp_path))
    assert len(sources.TfdsSource(target, "train")) == 3
    assert not leftover.exists()


@pytest.mark.parametrize("victim", ["*-train.array_record*", "dataset_info.json"])
def test_incomplete_folder_is_written_anew(tmp_path, victim):
    target = sources.prepare(_builder(tmp_path))
    before = sources.TfdsSource(target, "train")[2]
    next(target.glob(victim)).unlink()
    assert not sources.is_prepared(target)
    sources.prepare(_builder(tmp_path))
    after = sources.TfdsSource(target, "train")
    np.testing.assert_array_equal(after[2]["image"], before["image"])
    assert after.image_size(2) == (32, 32)


def test_default_options_are_the_embedded_dataset(tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr(sources, "prepare", prepared.append)
    with pytest.raises(FileNotFoundError, match="no prepared dataset"):
        sources.open_source("synthetic", data_dir=tmp_path, split="train")
    config = prepared[0].builder_config
    assert (config.size, config.train_examples, config.validation_examples) == (128, 4000, 200)
    assert config.name in prepared[0].data_dir


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size must be an integer of at least 32, not 8"),
        ({"train_examples": 0}, "train_examples must be an integer of at least 1"),
        ({"seed": "x"}, "seed must be an integer"),
    ],
)
def test_bad_synthetic_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sources.open_source("synthetic", data_dir=tmp_path, split="train", options=options)


_ISOLATED = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
import cv2
from oneformer_jax.input_pipeline import records, sources
assert "tensorflow_datasets" not in sys.modules, "importing sources must stay light"
assert cv2.getNumThreads() == 1
options = dict(size=32, train_examples=2, validation_examples=1)
source, info = sources.open_source(
    "synthetic", data_dir=sys.argv[1], split="train", options=options)
assert source[1]["image"].shape == (32, 32, 3)
"""


def test_preparing_needs_neither_tensorflow_nor_jax_nor_network(tmp_path):
    for package in ("tensorflow", "jax", "flax", "torch"):
        (tmp_path / "traps" / package).mkdir(parents=True)
        trap = tmp_path / "traps" / package / "__init__.py"
        trap.write_text(f"raise AssertionError('{package} was imported')")
    result = subprocess.run(
        [sys.executable, "-c", _ISOLATED, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'traps'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]


# -------------------------------------------------------------------------------- COCO folder


def _open(folder, data_dir, split="train", **options):
    return sources.open_source(
        "coco_folder", data_dir=data_dir, split=split, options={"root": str(folder.root), **options}
    )


def _assert_equal_records(first, second):
    assert first.keys() == second.keys()
    for key in first:
        if isinstance(first[key], np.ndarray):
            np.testing.assert_array_equal(first[key], second[key])
            assert first[key].dtype == second[key].dtype
        else:
            assert first[key] == second[key]


def test_prepared_folder_gives_the_records_of_the_folder(coco_folder, tmp_path):
    for split, count in (("train", 4), ("validation", 2)):
        direct, info = _open(coco_folder, tmp_path, split, prepare=False)
        prepared, prepared_info = _open(coco_folder, tmp_path, split)
        assert isinstance(direct, CocoFolderSource) and isinstance(prepared, sources.TfdsSource)
        assert len(direct) == len(prepared) == count
        assert info == prepared_info
        for index in range(count):
            _assert_equal_records(direct[index], prepared[index])
            assert direct.image_size(index) == prepared.image_size(index)
            assert direct.has_things(index) == prepared.has_things(index)


def test_preparation_reads_on_without_the_original_files(coco_folder, tmp_path):
    source, _ = _open(coco_folder, tmp_path)
    expected = source[0]
    coco_folder.root.rename(tmp_path / "elsewhere")
    again, _ = _open(coco_folder, tmp_path)
    _assert_equal_records(again[0], expected)


def test_preparation_lists_all_broken_records(coco_folder, tmp_path):
    coco_folder.image(1).unlink()
    coco_folder.panoptic(3).write_bytes(coco_folder.panoptic(3).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"has 2 faults") as error:
        _open(coco_folder, tmp_path)
    listing = tmp_path / "coco_folder" / "animals" / "faults.txt"
    assert str(listing) in str(error.value) and listing.read_text().startswith("faults: 2\n")
    assert "0001.jpg" in str(error.value) and "0003.png" in str(error.value)
    assert "skip_broken" in str(error.value)

    source, _ = _open(coco_folder, tmp_path, skip_broken=True)
    assert [source[i]["image_id"] for i in range(len(source))] == ["100", "102"]
    assert source.image_size(1) == (26, 40)  # facts and records keep in step
    with pytest.raises(ValueError, match=r"without 2 broken record.*0001\.jpg"):
        _open(coco_folder, tmp_path)  # not silently fewer


def test_preparation_leaves_out_segments_and_not_their_image(coco_folder, tmp_path):
    segments = coco_folder.json["train"]["annotations"][1]["segments_info"]
    segments[0]["category_id"] = 999
    segments[1]["id"] = "x"
    coco_folder.write("train")
    with pytest.raises(ValueError, match=r"(?s)has 2 faults.*0001\.png.*category_id 999") as error:
        _open(coco_folder, tmp_path)
    assert "segments_info[1].id, it is 'x'" in str(error.value)
    source, _ = _open(coco_folder, tmp_path, skip_broken=True)
    assert len(source) == 4 and [s["id"] for s in source[1]["segments"]] == [300]
    with pytest.raises(ValueError, match="without 2 broken record"):
        _open(coco_folder, tmp_path)  # not silently fewer


def test_all_records_broken_is_an_error_even_when_skipping(coco_folder, tmp_path):
    for index in range(4):
        coco_folder.image(index).unlink()
    with pytest.raises(ValueError, match="none of its records can be read"):
        _open(coco_folder, tmp_path, skip_broken=True)


def test_changed_annotations_are_noticed(coco_folder, tmp_path):
    _open(coco_folder, tmp_path)
    coco_folder.json["train"]["annotations"].pop()
    coco_folder.write("train")
    with pytest.raises(ValueError, match=r"other annotations than .*panoptic_train\.json.*delete"):
        _open(coco_folder, tmp_path)
    renamed, _ = _open(coco_folder, tmp_path, name="animals_2")
    assert len(renamed) == 3


def test_split_that_was_not_prepared_is_named(coco_folder, tmp_path):
    _open(coco_folder, tmp_path, validation_json="")
    with pytest.raises(ValueError, match="without the validation split"):
        _open(coco_folder, tmp_path, split="validation")
    with pytest.raises(ValueError, match="validation_json is empty"):
        _open(coco_folder, tmp_path, split="validation", validation_json="")


def test_class_table_can_replace_the_categories(coco_folder, tmp_path):
    for split in ("train", "validation"):
        coco_folder.json[split]["categories"] = [
            {"id": 12, "name": "triangle", "isthing": 1},
            {"id": 7, "name": "heart", "isthing": 1},
            {"id": 30, "name": "sky", "isthing": 0},
        ]
        coco_folder.write(split)
    with pytest.raises(ValueError, match=r"category 12 \(triangle\) is not in the class table"):
        _open(coco_folder, tmp_path, table="synthetic")
    for split in ("train", "validation"):
        content = json.dumps(coco_folder.json[split])
        for old, new in ((12, 3), (30, 101)):
            content = content.replace(f'"id": {old},', f'"id": {new},')
            content = content.replace(f'"category_id": {old},', f'"category_id": {new},')
        coco_folder.json[split] = json.loads(content)
        coco_folder.write(split)
    source, info = _open(coco_folder, tmp_path, table="synthetic")
    assert info == INFO
    names = [info.class_names[s["category"]] for s in source[0]["segments"]]
    assert names == ["sky", "triangle", "heart"]
    with pytest.raises(ValueError, match="not prepared with the class table 'coco'"):
        _open(coco_folder, tmp_path, table="coco")


def test_config_needs_splits():
    with pytest.raises(ValueError, match="needs splits"):
        CocoFolderConfig(name="x")
    assert CocoFolder.name == "coco_folder"


def test_more_than_255_segments_survive_preparation(coco_folder, tmp_path):
    panoptic = np.arange(1, 24 * 40 + 1, dtype=np.int32).reshape(24, 40) * 17_000 % (2**24 - 3) + 1
    ids = panoptic.ravel().tolist()
    assert len(set(ids)) == len(ids)
    coco_folder.panoptic(0).write_bytes(records.encode_panoptic(panoptic))
    coco_folder.json["train"]["annotations"][0]["segments_info"] = [
        {"id": i, "category_id": 7, "iscrowd": 0, "area": 1} for i in ids
    ]
    coco_folder.write("train")
    source, _ = _open(coco_folder, tmp_path)
    np.testing.assert_array_equal(source[0]["panoptic"], panoptic)
