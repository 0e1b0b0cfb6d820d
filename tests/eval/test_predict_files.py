"""Files in, files out: reading images and writing results."""

import dataclasses
import json
import os
import pathlib
import re
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image
from pycocotools import mask as coco_mask

from oneformer_jax.eval import folder as folders
from oneformer_jax.eval import inputs, predict, write
from oneformer_jax.eval.segmentation import Instances, Segmentation
from oneformer_jax.input_pipeline.images import ImageError
from oneformer_jax.types import VOID
from tests.eval.tiny_segmenter import (
    CONFIG,
    LENIENT,
    METADATA,
    SIZE,
    Fake,
    fake,
    picture,
    predict_files,
    segmenter,
    state,
)


def test_panoptic_files_are_in_coco_format(tmp_path):
    panoptic = np.zeros((40, 60), np.int32)
    panoptic[10:30, 5:25] = 3
    panoptic[:, 40:] = 70_000  # needs all three channels
    record = dict(
        image=picture(40, 60),
        panoptic=panoptic,
        segments=[dict(id=3, category=1), dict(id=70_000, category=4)],
    )
    result = Segmentation.from_record(record, METADATA, "panoptic")
    written = write.write_prediction(tmp_path, "000042", result, overlay_size=80)
    assert [p.name for p in written] == [
        "000042_panoptic_overlay.png", "000042_panoptic.png", "000042_panoptic.json",
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == sorted(written), "temporary files are left behind"
    assert Image.open(written[0]).size == (120, 80)
    pixels = np.asarray(Image.open(written[1])).astype(int)
    np.testing.assert_array_equal(pixels @ [1, 256, 65536], panoptic)
    content = json.loads(written[2].read_text())
    (annotation,) = content["annotations"]
    assert content["images"][0] == dict(id=42, file_name=written[1].name, height=40, width=60)
    assert annotation["image_id"] == 42 and annotation["file_name"] == written[1].name
    rest = dict(iscrowd=0, score=1.0)
    assert annotation["segments_info"] == [
        dict(id=3, category_id=2, isthing=1, area=400, bbox=[5, 10, 20, 20]) | rest,
        dict(id=70_000, category_id=12, isthing=0, area=800, bbox=[40, 0, 20, 40]) | rest,
    ]
    assert [c["id"] for c in content["categories"]] == list(METADATA.category_ids)


def test_a_true_segment_without_pixels_has_an_empty_box(tmp_path):
    segments = [dict(id=1, category=1), dict(id=7, category=4)]
    record = dict(image=picture(4, 6), panoptic=np.ones((4, 6), np.int32), segments=segments)
    Segmentation.from_record(record, METADATA, "panoptic").save(tmp_path, "a")
    (annotation,) = json.loads((tmp_path / "a_panoptic.json").read_text())["annotations"]
    boxes = {info["id"]: (info["bbox"], info["area"]) for info in annotation["segments_info"]}
    assert boxes == {1: ([0, 0, 6, 4], 24), 7: ([0, 0, 0, 0], 0)}


def test_semantic_file_has_the_ids_of_the_data_set(tmp_path):
    classes = np.array([[0, 1, 2], [3, 4, 4]], np.int32)
    image = picture(2, 3)
    for ids, mode in ((METADATA.category_ids, "L"), ((1, 2, 3, 11, 1000), "I;16")):
        metadata = dataclasses.replace(METADATA, category_ids=ids)
        result = Segmentation("semantic", metadata, class_map=classes, image=image)
        path = write.write_prediction(tmp_path, "a", result)[1]
        with Image.open(path) as stored:
            assert stored.mode == mode
            np.testing.assert_array_equal(np.asarray(stored), np.array(ids)[classes])


def test_unlabelled_pixels_do_not_become_those_of_the_last_class(tmp_path):
    classes = np.array([[0, 1, VOID], [3, 4, 4]], np.int32)
    result = Segmentation("semantic", METADATA, class_map=classes, image=picture(2, 3))
    with pytest.raises(ValueError, match="unlabelled pixels has no file"):
        result.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_instance_file_is_a_coco_result(tmp_path):
    masks = np.zeros((2, 30, 20), bool)
    masks[0, 5:10, 3:9] = True
    result = Segmentation(
        "instance",
        METADATA,
        instances=Instances(masks, np.array([0.75, 0.125], np.float32), np.array([2, 0], np.int32)),
        image=picture(30, 20),
    )
    path = write.write_prediction(tmp_path, "dog", result)[1]
    first, second = json.loads(path.read_text())
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]), masks[0])
    assert (first["image_id"], first["category_id"], first["score"]) == ("dog", 3, 0.75)
    assert first["bbox"] == [3, 5, 6, 5] and second["bbox"] == [0, 0, 0, 0]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")

    def fails(self, data):
        self.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "write_bytes", fails)
    with pytest.raises(OSError, match="disk full"):
        write.write_png(path, picture())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_images_are_read_upright_and_in_rgb(tmp_path):
    pixels = picture(20, 30)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to show
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        inputs.read_image(tmp_path / "turned.png"), np.rot90(pixels, k=-1)
    )
    image.convert("RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(inputs.read_image(tmp_path / "alpha.png"), pixels)
    image.convert("L").save(tmp_path / "grey.png")
    assert inputs.read_image(tmp_path / "grey.png").shape == (20, 30, 3)


def broken_images(folder):
    """{name: words of its message}."""
    Image.fromarray(picture(50, 50)).save(folder / "cut.png")
    data = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    Image.fromarray(picture(90, 90)).save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(folder / "deep.tif")
    return {
        "cut.png": "damaged",
        "cut.jpg": "damaged",
        "text.jpg": "not an image",
        "empty.jpg": "not an image",
        "deep.tif": "8 or 16 bits",
    }


def test_broken_images_are_named(tmp_path):
    for name, words in broken_images(tmp_path).items():
        with pytest.raises(ImageError, match=rf"{name}: .*{words}"):
            inputs.read_image(tmp_path / name)
        with pytest.raises(ImageError, match=rf"{name}: .*{words}"):
            predict_files(Fake(), tmp_path / name, tmp_path / "out")
    for call in (inputs.read_image, lambda p: predict_files(Fake(), p, tmp_path / "out")):
        with pytest.raises(ImageError, match=r"gone\.jpg: there is no such"):
            call(tmp_path / "gone.jpg")


def test_a_folder_with_broken_images_is_done_for_the_rest(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = broken_images(folder)
    Image.fromarray(picture()).save(folder / "fine.JPG", format="JPEG")
    (folder / "notes.txt").write_text("not to be read")
    with pytest.raises(ImageError, match=rf"5 of 6 images cannot be read.*others are in {out}"):
        predict_files(Fake(), folder, out, "semantic")
    assert {p.name for p in out.iterdir()} == {"fine_semantic_overlay.png", "fine_semantic.png"}
    # With a model, too; each broken file is named once.
    with mock.patch.object(logging, "warning") as said, pytest.raises(ImageError, match="5 of 6"):
        predict_files(segmenter(), folder, tmp_path / "real", "semantic")
    lines = [call.args[0] % call.args[1:] for call in said.call_args_list]
    for name, words in names.items():
        (line,) = [line for line in lines if name in line]
        assert words in line


@pytest.fixture
def plain(monkeypatch):
    """Overlays without a drawing, which takes most of the time where nobody looks at it."""
    monkeypatch.setattr(Segmentation, "overlay", lambda self, **options: self.image)


@pytest.mark.usefixtures("plain")
def test_what_is_done_is_skipped(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(picture()).save(folder / f"{name}.png")

    def run(model=None, task="all", **options):
        model = model or Fake()
        report = folders.predict_files(
            model, folders.find_images(folder, out), out, task, **options
        )
        assert report.segmented + report.skipped == 2
        return sorted(pathlib.Path(name).stem for name in model.seen)

    assert run() == ["a", "b"] and run() == []
    assert run(overwrite=True) == ["a", "b"]
    assert run(task="semantic") == []  # a part of all
    (out / "a_panoptic.json").unlink()
    assert run(task="semantic") == [] and run() == ["a"]
    Image.fromarray(picture(seed=1)).save(folder / "b.png")  # another image of that name
    os.utime(folder / "b.png", (1, 1))
    assert run() == ["b"]
    (out / "a_semantic_overlay.png").write_bytes(b"not a picture")
    assert run() == ["a"]
    assert run(threshold=0.5) == ["a", "b"] and run(threshold=0.5) == []
    other = Fake()
    other.fingerprint = "another model"
    assert run(other) == ["a", "b"]


def test_the_fingerprint_follows_parameters_and_settings():
    model = segmenter()
    same = predict.Segmenter(CONFIG, *state(), METADATA, postprocess=LENIENT, test_size=SIZE)
    assert same.fingerprint == model.fingerprint
    params, stats = state()
    changed = jax.tree.map(lambda x: x, params)
    changed["task_mlp"] = jax.tree.map(lambda x: x + 1e-6, params["task_mlp"])
    others = [
        predict.Segmenter(CONFIG, changed, stats, METADATA, postprocess=LENIENT, test_size=SIZE),
        predict.Segmenter(CONFIG, *state(), METADATA, postprocess=LENIENT, test_size=(64, 97)),
        predict.Segmenter(CONFIG, *state(), METADATA, test_size=SIZE),
    ]
    assert len({model.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.usefixtures("plain")
def test_a_folder_of_images_for_all_tasks(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "deep" / "out"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.fromarray(picture()).save(folder / name)
    written = predict_files(Fake(), folder, out)
    assert len(written) == 3 * 7
    assert all(p.is_file() for p in written) and sorted(out.iterdir()) == sorted(written)
    assert {p.name.split("_panoptic")[0] for p in written if "panoptic" in p.name} == {
        "a_png", "a_jpg", "b",
    }  # fmt: skip


@pytest.mark.usefixtures("plain")
def test_the_last_results_are_written_beside_the_model(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcde":
        Image.fromarray(picture()).save(folder / f"{name}.png")
    written = threading.Semaphore(0)
    write_prediction = folders.write_prediction

    def counted_write(*arguments, **options):
        found = write_prediction(*arguments, **options)
        written.release()
        return found

    calls = []

    def model(image, tasks):
        calls.append(tasks)
        if len(calls) == 2:  # while it works on the second, the first one's results are written
            assert written.acquire(timeout=10)
        return fake(image, tasks)

    monkeypatch.setattr(folders, "write_prediction", counted_write)
    predict_files(Fake(model), folder, tmp_path / "out", "semantic")
    assert len(calls) == 5 and len(results(tmp_path / "out")) == 5


def test_results_that_cannot_be_written_end_the_run(tmp_path, monkeypatch):
    for name in "abcd":
        Image.fromarray(picture()).save(tmp_path / f"{name}.png")

    def full(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(folders, "write_prediction", full)
    with pytest.raises(OSError, match="no space left"):
        predict_files(Fake(), tmp_path, tmp_path / "out", "semantic")


def results(folder):
    """Starts of the names of the results in `folder`."""
    return {p.name.removesuffix("_semantic.png") for p in folder.glob("*_semantic.png")}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.png", "a.jpg", "b.png"), {"a_png", "a_jpg", "b"}),
        (("a.png", "a.jpg", "a_jpg.png"), {"a_png", "a_jpg", r"a_jpg_[0-9a-f]{8}"}),
        (("A.png", "a.png"), {"A_png", r"a_png_[0-9a-f]{8}"}),
        (("x.y.png", "x.y.jpg", "x_y.png"), {"x_y_png", "x_y_jpg", "x_y"}),
    ],
)
@pytest.mark.usefixtures("plain")
def test_every_image_has_results_of_its_own(tmp_path, names, expected):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in names:
        Image.fromarray(picture()).save(folder / name)
    written = predict_files(Fake(), folder, out, "semantic")
    assert len({p.name.casefold() for p in written}) == 2 * len(names)
    found = results(out)
    assert len(found) == len(expected)
    for pattern in expected:
        assert any(re.fullmatch(pattern, name) for name in found), (pattern, found)


@pytest.mark.usefixtures("plain")
def test_a_later_run_overwrites_its_own_results_only(tmp_path):
    out = tmp_path / "out"
    for name in ("a.png", "a.jpg", "a.png"):
        Image.fromarray(picture()).save(tmp_path / name)
        predict_files(Fake(), tmp_path / name, out, "semantic")
    assert results(out) == {"a", "a_jpg"}


def test_hidden_files_and_those_of_macos_are_no_images(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".b.jpg").write_bytes(b"")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    predict_files(Fake(), tmp_path, tmp_path / "out", "semantic")
    assert results(tmp_path / "out") == {"a"}


def test_what_a_killed_prediction_left_is_removed(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    old, young, other = (out / n for n in (".a.png.0123abcd.tmp", ".b.png.0123abcd.tmp", "x.tmp"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    os.utime(other, (time.time() - 3600,) * 2)
    predict_files(Fake(), tmp_path / "a.png", out, "semantic")
    assert not old.exists() and young.exists() and other.exists()


def test_too_many_pixels_are_refused_by_the_setting(tmp_path):
    Image.fromarray(picture(20, 30)).save(tmp_path / "a.png")
    assert inputs.read_image(tmp_path / "a.png", max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match=r"20 x 30 pixels .*data\.max_pixels, 599"):
        predict_files(Fake(), tmp_path / "a.png", tmp_path / "out", max_pixels=599)


def test_semantic_ids_above_16_bits_are_exact(tmp_path):
    classes = np.array([[0, 1, 2], [3, 4, 4]], np.int32)
    ids = (1, 2, 65_536, 70_000, (1 << 24) - 1)
    metadata = dataclasses.replace(METADATA, category_ids=ids)
    result = Segmentation("semantic", metadata, class_map=classes, image=picture(2, 3))
    path = write.write_prediction(tmp_path, "a", result)[1]
    pixels = np.asarray(Image.open(path)).astype(int) @ [1, 256, 65_536]
    np.testing.assert_array_equal(pixels, np.array(ids)[classes])
    for strange in (1 << 24, -1):
        metadata = dataclasses.replace(METADATA, category_ids=(1, 2, 3, 4, strange))
        result = dataclasses.replace(result, metadata=metadata)
        with pytest.raises(ValueError, match=rf"category id {strange} .*smaller ids"):
            write.write_prediction(tmp_path, "a", result)


def test_wrong_folders_and_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no images"):
        predict_files(Fake(), tmp_path, tmp_path / "out")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="another folder"):
        predict_files(Fake(), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="unknown task 'everything'"):
        predict_files(Fake(), tmp_path, tmp_path / "out", "everything")


def test_a_real_segmenter_writes_files(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    written = predict_files(segmenter(), tmp_path / "a.png", tmp_path / "out")
    assert len(written) == 7
    size = Image.open(tmp_path / "out" / "a_panoptic.png").size
    assert size == (70, 48)
