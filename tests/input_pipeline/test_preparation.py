"""Preparing official datasets: wrong folders, broken files, repairs, the command."""

import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from oneformer_jax import progress
from oneformer_jax.app import cli, modes
from oneformer_jax.input_pipeline import sources
from oneformer_jax.input_pipeline.builders import preparation, report
from oneformer_jax.input_pipeline.files import exclusive
from tests.input_pipeline import official

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A miniature download and its preparation."""
    return official.Job(tmp_path, monkeypatch)


# ---------------------------------------------------------------------------- wrong folders


@pytest.mark.parametrize("dataset", official.NAMES)
def test_wrong_folder_says_what_was_expected_and_found(job, dataset):
    job.make(dataset)
    (job.root / "images" / "cats").mkdir(parents=True)
    for name in ("train2017", "images/training", "leftImg8bit", "training"):
        shutil.rmtree(job.root / name, ignore_errors=True)
    message = job.fail(FileNotFoundError)
    builder = preparation.builder_class(dataset)
    missing = builder.required("train")[0][0]
    assert message.startswith(f"{job.root} is not the {dataset} download: it lacks {missing}")
    assert builder.LAYOUT in message
    assert f"Found: {job.root} holds " in message and "images/" in message
    assert not job.data_dir.exists()


def test_wrong_folder_tells_what_to_unpack(job):
    job.make("coco")
    shutil.rmtree(job.root / "annotations/panoptic_val2017")
    (job.root / "annotations/panoptic_val2017.zip").write_bytes(b"PK")
    message = job.fail(FileNotFoundError)
    assert "lacks annotations/panoptic_val2017 or panoptic_val2017. Unpack panoptic_val" in message


def test_folder_that_is_not_there(job, tmp_path):
    job.make("cityscapes").root = tmp_path / "no/such/folder"
    message = job.fail(FileNotFoundError)
    assert f"{job.root} is not the cityscapes download" in message
    assert f"Found: {tmp_path} holds download/" in message


def test_one_split_alone(job):
    job.make("cityscapes")
    shutil.rmtree(job.root / "leftImg8bit/train")
    assert "name it with --split" in job.fail(FileNotFoundError)
    job.prepare(splits=("validation",))
    assert len(job.open("validation")) == 3
    with pytest.raises(ValueError, match="has no split 'train'; it has validation"):
        job.open()
    before = job.records("validation")
    shutil.rmtree(job.root)
    official.cityscapes(job.root)
    job.prepare(splits=("train",))
    assert len(job.open()) == 5 and len(job.open("validation")) == 3
    assert job.records("validation") == before
    assert job.report("validation")["complete"] and job.report("train")["complete"]


def test_wrong_arguments_are_named(job):
    with pytest.raises(ValueError, match="no builder of 'coc', only of coco, ade20k, cityscapes"):
        preparation.prepare("coc", job.data_dir, job.data_dir)
    assert "unknown split 'val'; known are train, validation" in job.make("coco").fail(
        splits=("val",)
    )
    with pytest.raises(ValueError, match="needs source=FOLDER"):
        preparation.builder_class("coco")(data_dir=job.data_dir).download_and_prepare()


# ---------------------------------------------------------------------------- wrong JSON


@pytest.mark.parametrize("dataset", ["coco", "mapillary"])
def test_truncated_json(job, dataset):
    path = job.make(dataset).file("panoptic_*.json")
    path.write_bytes(path.read_bytes()[:200])
    message = job.fail()
    assert f"{path} is not valid JSON" in message and "truncated" in message
    assert not job.data_dir.exists()


def test_instance_json_in_place_of_the_panoptic_one(job):
    path = job.make("coco").file("panoptic_train2017.json")
    shutil.copy(job.root / "annotations/instances_train2017.json", path)
    assert "looks like an instance JSON" in job.fail()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "not valid JSON"),
        ('{"images": []}', r"lacks annotations \(it has images\).*instance JSON of COCO"),
        (
            '{"images": [], "annotations": [{"image_id": 1}]}',
            r"lacks iscrowd - at \$\.annotations\[0\]",
        ),
        ("[]", "Expected object, got array"),
    ],
)
@pytest.mark.parametrize("year", ["train2017", "val2017"])
def test_wrong_instance_json(job, year, content, message):
    path = job.make("coco").root / f"annotations/instances_{year}.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        job.prepare()
    assert str(path) in str(error.value)


# ---------------------------------------------------------------------------- missing and broken


@pytest.mark.parametrize(
    ("dataset", "pattern", "line"),
    [
        ("coco", "000000000101.jpg", "000000000101.jpg: no such file, but the JSON lists it"),
        ("coco", "000000000101.png", "000000000101.png: no such file, but the JSON lists it"),
        ("mapillary", "training-1.jpg", "training-1.jpg: no such file"),
        ("ade20k", "ADE_train_00000001.jpg", "ADE_train_00000001: has no image file"),
        ("ade20k", "ADE_train_00000001.png", "ADE_train_00000001: has no annotations file"),
        ("cityscapes", "*_000001_*_leftImg8bit.png", "zurich_000001_000019: has no image file"),
        ("cityscapes", "*_000001_*_instanceIds.png", "has no instanceIds file"),
    ],
)
def test_missing_files_are_told_before_anything_is_written(job, dataset, pattern, line):
    path = job.make(dataset).file(pattern)
    path.unlink()
    message = job.fail()
    assert "train (1), listed in" in message and "--skip_broken" in message
    (told,) = job.report()["missing"]
    assert line in told
    assert any(line in text for text in job.lines)
    assert not job.records() and not sources.is_prepared(job.folder)

    job.prepare(skip_broken=True)
    with pytest.raises(ValueError, match="without all of its train records"):
        job.open()
    source = job.open(skip_broken=True)
    assert len(source) == 4 and source[3]["image"].shape == (20, 30, 3)
    assert len(job.open("validation")) == 3  # the other split is whole


def test_a_wrong_count_is_an_error(job):
    job.make("ade20k", train=6)
    message = job.fail()
    assert "train (1)" in message and "validation" not in message
    assert "    the download has 5 records, the dataset 6" in job.lines
    job.prepare(skip_broken=True)
    assert len(job.open(skip_broken=True)) == 5


def test_real_counts_are_expected():
    counts = {name: preparation.builder_class(name).EXPECTED for name in official.NAMES}
    assert counts == {
        "coco": {"train": 118_287, "validation": 5_000},
        "ade20k": {"train": 20_210, "validation": 2_000},
        "cityscapes": {"train": 2_975, "validation": 500},
        "mapillary": {"train": 18_000, "validation": 2_000},
    }


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = {
    "truncated_jpg": ("coco", "*101.jpg", _truncate, "101.jpg: cannot be decoded.*truncated"),
    "truncated_png": ("coco", "*101.png", _truncate, "101.png: cannot be decoded.*truncated"),
    "empty_image": ("ade20k", "*001.jpg", lambda p: p.write_bytes(b""), "001.jpg: cannot be dec"),
    "no_image": ("mapillary", "*-1.jpg", lambda p: p.write_text("<html>"), "1.jpg: cannot be"),
    "truncated_map": ("cityscapes", "zurich*Ids.png", _truncate, "zurich.*Ids.png: cannot be dec"),
    "truncated_frame": ("cityscapes", "zurich*8bit.png", _truncate, "8bit.png: cannot be decoded"),
    "other_size": (
        "ade20k",
        "*001.jpg",
        lambda p: official.write(p, np.zeros((9, 30, 3), np.uint8)),
        r"001.jpg: the image has 9 x 30 pixels \(height x width\), its annotation 20 x 30",
    ),
    "label_ids": (
        "cityscapes",
        "zurich*Ids.png",
        lambda p: official.write(p, np.full((20, 30), 40, np.uint16)),
        "label id 40",
    ),
    "grey_panoptic": (
        "mapillary",
        "*-1.png",
        lambda p: official.write(p, np.zeros((20, 30), np.uint8)),
        "must be 8-bit RGB",
    ),
    "unlisted_id": (
        "coco",
        "*101.png",
        lambda p: official.write(p, np.full((20, 30, 3), 9, np.uint8)),
        "1 segment id",
    ),
    "a_folder": ("ade20k", "*001.jpg", lambda p: (p.unlink(), p.mkdir()), "001.jpg: cannot be re"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_record_is_listed_the_rest_is_kept_and_repair_goes_on(job, case):
    dataset, pattern, damage, line = BROKEN[case]
    path = job.make(dataset).file(pattern)
    backup = path.read_bytes()
    damage(path)
    message = job.fail()
    assert "train (1)" in message
    (told,) = job.report()["broken"]
    assert told in "".join(job.lines)
    assert re.search(line, told)
    told = job.report()
    assert (told["written"], told["complete"]) == (4, False)
    assert job.report("validation")["complete"]
    with pytest.raises(ValueError, match="no split 'train'"):
        job.open(skip_broken=True)

    done = {name: (job.folder / name).stat().st_mtime_ns for name in job.records()}
    if path.is_dir():
        path.rmdir()
    path.write_bytes(backup)
    job.prepare()
    assert len(job.open()) == 5
    rewritten = [n for n, t in done.items() if (job.folder / n).stat().st_mtime_ns != t]
    assert len(done) == 3 and len(rewritten) == 1  # two records each, the last has one


@pytest.mark.parametrize("dataset", ["coco", "mapillary"])
def test_a_broken_annotation_may_be_left_out_and_is_counted_by_kind(job, dataset):
    path = job.make(dataset).file("panoptic_*.json")
    content = json.loads(path.read_text())
    first, second = content["annotations"][:2]
    first["segments_info"][0]["category_id"] = 9999
    second["segments_info"][0].update(id=1.5, area=5)
    second["segments_info"][1]["area"] = 3
    path.write_text(json.dumps(content))
    message = job.fail()
    assert "train (2)" in message
    kinds = {"category that is not listed": 1, "value of a wrong type or out of range": 1}
    assert job.report()["kinds"] == kinds
    assert any("1 x category that is not listed" in line for line in job.lines)
    for _ in range(2):  # again: what was left out is looked at anew, and told again
        job.prepare(skip_broken=True)
        assert job.report()["kinds"] == kinds and job.report()["written"] == 5
        assert any("area that is not the number of pixels" in n for n in job.report()["notes"])
    with pytest.raises(ValueError, match="was prepared without all of its train records"):
        job.open()
    source = job.open(skip_broken=True)
    lengths = [len(entry["segments_info"]) for entry in (first, second)]
    assert [len(source[i]["segments"]) for i in (0, 1)] == [n - 1 for n in lengths]


def test_all_records_broken_is_an_error_even_when_skipping(job):
    for path in job.make("ade20k").root.glob("images/training/*"):
        path.write_bytes(b"")
    assert "none of the 5 records of train can be read" in job.fail(skip_broken=True)
    assert len(job.report()["broken"]) == 5


def test_a_file_whose_records_are_all_broken_may_be_skipped(job):
    for path in sorted(job.make("ade20k").root.glob("images/training/*"))[:2]:
        path.write_bytes(b"")
    job.prepare(skip_broken=True)
    source = job.open(skip_broken=True)
    assert [source[i]["image_id"][-1] for i in range(3)] == ["2", "3", "4"]
    assert len(source.left_out) == 2


def test_long_lists_are_cut_in_the_text_and_whole_in_the_report(job, monkeypatch):
    monkeypatch.setattr(report, "_SHOWN_MESSAGES", 2)
    for path in job.make("ade20k").root.glob("images/training/*"):
        path.unlink()
    job.fail()
    assert len(job.report()["missing"]) == 5
    assert sum("has no image file" in line for line in job.lines) == 2
    assert any("and 3 more, see prepare_report.json" in line for line in job.lines)


# ---------------------------------------------------------------------------- again, and changed


def test_second_preparation_reads_nothing(job, monkeypatch):
    job.make("ade20k").prepare()
    before, told = job.records(), job.report()

    def refuse(*args):
        raise AssertionError("read again")

    monkeypatch.setattr(preparation, "decode_image", refuse)
    job.prepare()
    assert job.records() == before and job.report() == told
    assert "ade20k train: complete already" in job.lines


def test_lost_file_is_written_again(job):
    job.make("ade20k").prepare()
    before = job.records()
    victim = job.folder / sorted(before)[1]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match="has lost some of its files"):
        job.open()
    job.prepare()
    assert job.records() == before
    assert len(job.open()) == 5


def test_another_download_is_not_mixed_in(job):
    job.make("coco").prepare()
    path = job.root / "annotations/panoptic_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"].reverse()
    official.write(path, content)
    before = job.records()
    message = job.fail()
    assert "was prepared from other annotations" in message and str(job.folder) in message
    assert job.records() == before
    assert job.open()[0]["image_id"] == "100"


def test_unfinished_work_on_another_download_is_thrown_away(job):
    path = job.make("coco").file("000000000104.jpg")
    backup = path.read_bytes()
    _truncate(path)
    job.fail()
    assert len(job.records()) == 3
    path.write_bytes(backup)
    json_path = job.root / "annotations/panoptic_train2017.json"
    content = json.loads(json_path.read_text())
    content["annotations"].reverse()
    official.write(json_path, content)
    job.prepare()
    assert "coco train: the download has changed; starting anew" in job.lines
    assert [job.open()[i]["image_id"] for i in range(5)] == ["104", "103", "102", "101", "100"]


def test_two_processes_take_turns(job):
    job.make("ade20k")
    with exclusive(job.folder.parent):
        thread = threading.Thread(target=job.prepare)
        thread.start()
        while not any("waiting" in line for line in job.lines):
            time.sleep(0.01)
        assert not job.folder.exists()
    thread.join()
    assert len(job.open()) == 5


def test_progress_is_told(job, monkeypatch):
    clock = itertools.count(0, 40)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    job.make("ade20k").prepare()
    line = "2 of 5 records of ade20k train, 0.0 a second, 2 min 0 s left"
    assert line in job.lines


def test_builder_is_used_like_any_of_tfds(job):
    job.make("ade20k")
    builder = preparation.builder_class("ade20k")(source=job.root, data_dir=job.data_dir)
    assert not builder.is_prepared()
    builder.download_and_prepare(log=job.lines.append)
    builder = type(builder)(data_dir=job.data_dir)
    assert builder.is_prepared()
    assert builder.info.splits["train"].num_examples == 5
    example = builder.as_data_source("validation[1:]")[0]
    assert example["image"].shape == (20, 30, 3) and example["panoptic_image"].max() == 2
    assert example["image/filename"] == b"ADE_valid_00000001.jpg"


# ---------------------------------------------------------------------------- the command


def test_main_prepares_without_jax(job, capsys, monkeypatch):
    job.make("cityscapes")
    monkeypatch.setattr(cli, "start_jax", lambda *args: pytest.fail("JAX was started"))
    modes.prepare("cityscapes", str(job.root), str(job.data_dir), ["validation", "validation"])
    assert "validation: 3 of 3 records in 2 files" in capsys.readouterr().out
    assert len(job.open("validation")) == 3


def test_command_line(job):
    job.make("ade20k")
    result = subprocess.run(
        [
            sys.executable, "main.py", "--mode=prepare", "--dataset=ade20k",
            f"--source={job.root}", f"--data_dir={job.data_dir}", "--skip_broken",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "the download has 5 records, the dataset 20,210" in result.stdout
    assert len(job.open(skip_broken=True)) == 5
