"""Annotations that cover nothing, areas, crowds by mistake, and faults that are listed at once."""

import json
import types

import numpy as np
import pytest

from oneformer_jax.eval.metrics.instance_json import InstanceAnnotations
from oneformer_jax.eval.metrics.pq import PanopticQuality
from oneformer_jax.input_pipeline import records, sources, statistics
from oneformer_jax.input_pipeline.annotations import faults, instances, panoptic
from oneformer_jax.input_pipeline.annotations.faults import Fault, FaultsError
from oneformer_jax.input_pipeline.coco_instances import HIDDEN
from oneformer_jax.input_pipeline.records import RecordError, SegmentTable
from oneformer_jax.types import Metadata
from tests.input_pipeline import annotation_cases as cases
from tests.input_pipeline.annotation_cases import SHAPE, opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return cases.make_pictures(tmp_path_factory.mktemp("pictures"))


# --------------------------------------------------------------- annotations that cover nothing


def _instance_file(tmp_path, *segmentations, **keys):
    content = cases.instances()
    content["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 7, "segmentation": s, **keys}
        for i, s in enumerate(segmentations)
    ]
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    return file


SQUARE = [8, 8, 18, 8, 18, 18, 8, 18]
EMPTY = {
    "outside": [60, 8, 70, 8, 70, 18],
    "left of the image": [-20, 8, -10, 8, -10, 18],
    "on a line": [4, 4, 12, 12, 20, 20],
    "in a point": [5, 5, 5, 5, 5, 5],
    "between pixels": [10.1, 10.1, 10.3, 10.1, 10.3, 10.3],
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_annotation_without_a_pixel_is_no_thing_and_no_truth(name, pictures, tmp_path):
    file = _instance_file(tmp_path, [EMPTY[name]])
    source = opened("instances", pictures, file)
    assert not source.has_things(0) and source[0]["segments"] == []
    (remark,) = source.remarks
    assert remark.kind == instances.NO_PIXEL and "annotation 0 of image 1" in remark.message
    metadata = Metadata("two", ("cat", "dog"), (True, True), ((0, 0, 0),) * 2, (7, 30))
    assert InstanceAnnotations(file, metadata).masks("1", SHAPE).counts == []
    assert statistics.collect(source, source.info).remarks == [remark]  # told once


def test_an_empty_run_length_code_covers_no_pixel(pictures, tmp_path):
    code = {"size": list(SHAPE), "counts": [SHAPE[0] * SHAPE[1]]}
    source = opened("instances", pictures, _instance_file(tmp_path, code, [SQUARE]))
    assert len(source.remarks) == 1 and len(source[0]["segments"]) == 1


def test_of_doubled_annotations_one_is_left(pictures, tmp_path):
    source = opened("instances", pictures, _instance_file(tmp_path, *[[SQUARE]] * 3))
    assert [r.kind for r in source.remarks] == [instances.DOUBLE] * 2
    assert [s["area"] for s in source[0]["segments"]] == [100]
    assert source.has_things(0)
    assert len(statistics.collect(source, source.info).remarks) == 2


def test_what_others_hide_is_told_when_it_is_drawn(pictures, tmp_path):
    left, right = [8, 8, 13, 8, 13, 18, 8, 18], [13, 8, 18, 8, 18, 18, 13, 18]
    source = opened("instances", pictures, _instance_file(tmp_path, [SQUARE], [left], [right]))
    record, remarks = source.examine(0)
    assert [s["area"] for s in record["segments"]] == [50, 50]
    assert [s["id"] for s in record["segments"]] == [1, 2]
    assert [r.kind for r in remarks] == [HIDDEN]


@pytest.mark.parametrize("outline", [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9], [0, 0, 1, 0, 1, 1, 0, 1]])
def test_fractions_of_the_image_are_named_as_such(outline, pictures, tmp_path):
    file = _instance_file(tmp_path, [outline])
    (fault,) = opened("instances", pictures, file).faults
    assert fault.kind == instances.FRACTIONS and "multiply x by the width" in fault.message


def test_per_cent_of_the_image_is_named_where_areas_tell(tmp_path):
    file = _instance_file(tmp_path, [SQUARE], [[50, 50, 90, 50, 90, 90]], area=3000)
    content = json.loads(file.read_text())
    for image in content["images"]:
        image.update(height=480, width=640)
    file.write_text(json.dumps(content))
    with pytest.raises(FaultsError, match="look like per cent of the image"):
        instances.read_instances(file)
    for annotation in content["annotations"]:
        annotation["area"] = 100  # small objects at the upper left
    file.write_text(json.dumps(content))
    assert not instances.read_instances(file).faults


def test_pairs_of_coordinates_are_read_as_a_flat_list(pictures, tmp_path):
    pairs = np.reshape(SQUARE, (-1, 2)).tolist()
    flat, paired = (
        opened("instances", pictures, _instance_file(tmp_path, [outline]))[0]
        for outline in (SQUARE, pairs)
    )
    np.testing.assert_array_equal(flat["panoptic"], paired["panoptic"])


# ----------------------------------------------------------------------------------- areas


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("area", [None, 0, 7, 1e6, cases.MISSING])
def test_a_perfect_prediction_gets_a_pq_of_100_whatever_the_areas_say(
    area, prepare, pictures, tmp_path, caplog
):
    content = cases.panoptic()
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["area"] = area
            if area is cases.MISSING:
                del segment["area"]
        # Listed, but not drawn.
        annotation["segments_info"].append({"id": 3, "category_id": 7, "area": 50})
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    options = {
        "train_images": str(pictures),
        "train_panoptic": str(pictures),
        "train_json": str(file),
        "validation_json": "",
        "name": "areas",
        "prepare": prepare,
    }
    source, info = sources.open_source(
        "coco_folder", data_dir=tmp_path, split="train", options=options
    )
    assert "4 x area that is not the number of pixels" in caplog.text
    assert "2 x segment without a pixel" in caplog.text
    metric = PanopticQuality(info.is_thing)
    for index in range(len(source)):
        record = source[index]
        segments = [{"id": s["id"], "category_id": s["category"]} for s in record["segments"]]
        metric.update(
            types.SimpleNamespace(segments=record["panoptic"], segments_info=segments), record
        )
    assert metric.compute()["panoptic/PQ"] == 100 and metric.counts()["panoptic/fn"] == 0


def test_a_thing_that_is_not_drawn_makes_no_prepared_image_with_things(pictures, tmp_path):
    content = cases.panoptic()
    content["annotations"][0]["segments_info"][0]["category_id"] = 30
    content["annotations"][0]["segments_info"].append({"id": 3, "category_id": 7, "area": 50})
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    options = {
        "train_images": str(pictures),
        "train_panoptic": str(pictures),
        "train_json": str(file),
        "validation_json": "",
        "name": "things",
    }
    source, _ = sources.open_source(
        "coco_folder", data_dir=tmp_path, split="train", options=options
    )
    assert [source.has_things(i) for i in (0, 1)] == [False, True]


def test_areas_of_records_prepared_earlier_are_counted_when_they_are_read():
    table = SegmentTable.from_lists([5, 9, 7], [0, 1, 0], [0, 0, 0], [1, 999, 4])
    numbers = records.number_segments(np.array([[5, 5, 0], [9, 0, 0]]), table, "here")
    pixels = records.count_pixels(numbers, table)
    numbers, measured = records.keep_visible(numbers, table, pixels)
    assert (measured.ids.tolist(), measured.areas.tolist()) == ([5, 9], [2, 1])


# --------------------------------------------------------------------------------- crowds


def test_crowds_by_mistake_are_named_and_can_be_read_as_instances(pictures, tmp_path):
    file = _instance_file(tmp_path, [SQUARE], [[20, 8, 30, 8, 30, 18]], iscrowd=1)
    with pytest.raises(ValueError, match=r"2 of 2 annotations have iscrowd 1.*CVAT.*crowd_as_inst"):
        opened("instances", pictures, file)
    source = opened("instances", pictures, file, crowd_as_instances=True)
    assert source.has_things(0) and not any(s["iscrowd"] for s in source[0]["segments"])
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 0
    file.write_text(json.dumps(content))
    (note,) = opened("instances", pictures, file).notes
    assert "1 of 2 annotations have iscrowd 1" in note


def test_the_option_of_crowds_is_one_of_the_source(pictures, tmp_path):
    file = _instance_file(tmp_path, [SQUARE], iscrowd=1)
    options = {
        "root": tmp_path,
        "train_images": str(pictures),
        "train_json": file.name,
        "crowd_as_instances": True,
    }
    source, _ = sources.open_source(
        "coco_instances", data_dir=tmp_path, split="train", options=options
    )
    assert source.has_things(0)


def test_things_that_are_all_crowds_are_noted(pictures, tmp_path):
    content = cases.panoptic()
    for annotation in content["annotations"]:
        annotation["segments_info"][0]["iscrowd"] = 1
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    (note,) = opened("panoptic", pictures, file).notes
    assert "all 2 segments of things have iscrowd 1" in note


# ----------------------------------------------------------------------- all faults at once


def _many_faults(tmp_path):
    """Five faults of four kinds in three of the four annotations of the first image, and one."""
    file = _instance_file(tmp_path, [SQUARE], [[5, 5, 5, 5]], [[5, 5, 6, 6]], "text")
    content = json.loads(file.read_text())
    content["annotations"] += [
        {"id": 8, "image_id": 1, "category_id": 99, "segmentation": [SQUARE]},
        {"id": 9, "image_id": 77, "category_id": 7, "segmentation": [SQUARE]},
        {"id": 10, "image_id": 2, "category_id": 7, "segmentation": [SQUARE]},
    ]
    file.write_text(json.dumps(content))
    return file


def _open(tmp_path, pictures, file, **options):
    return sources.open_source(
        "coco_instances",
        data_dir=tmp_path,
        split="train",
        options={"train_images": str(pictures), "train_json": str(file), **options},
    )[0]


def test_opening_for_training_names_the_first_few_faults_and_inspect(pictures, tmp_path):
    file = _many_faults(tmp_path)
    with pytest.raises(FaultsError, match="the annotation file has 5 faults") as error:
        _open(tmp_path, pictures, file)
    assert len(error.value.faults) == 5 and "--mode=inspect" in str(error.value)


def test_skip_broken_leaves_out_annotations_and_not_their_image(pictures, tmp_path, caplog):
    source = _open(tmp_path, pictures, _many_faults(tmp_path), skip_broken=True)
    assert [s["area"] for s in source[0]["segments"]] == [100]
    assert [s["area"] for s in source[1]["segments"]] == [100]
    assert "left out: 2 x polygon without three points" in caplog.text


def test_a_segment_with_a_fault_becomes_void(pictures, tmp_path):
    for key, value in (("category_id", 99), ("id", "1"), ("area", -5)):
        content = cases.panoptic()
        content["annotations"][0]["segments_info"][0][key] = value
        file = tmp_path / "annotations.json"
        file.write_text(cases.dump(content))
        with pytest.raises(RecordError):
            opened("panoptic", pictures, file)[0]
        source = opened("panoptic", pictures, file, skip_broken=True)
        record = source[0]
        assert [s["id"] for s in record["segments"]] == [2]
        assert np.count_nonzero(record["panoptic"] == 0) == 100
        assert np.count_nonzero(source.compact(0)["panoptic"] == 0) == 100
        assert len(source[1]["segments"]) == 2


def test_segments_that_share_an_id_are_all_void(pictures, tmp_path):
    content = cases.panoptic()
    content["annotations"][0]["segments_info"][1]["id"] = 1
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    source = opened("panoptic", pictures, file, skip_broken=True)
    assert [f.kind for f in source.faults] == [panoptic.REPEATED_ID] * 2
    assert not source[0]["panoptic"].any() and source[0]["segments"] == []


def test_faults_are_counted_by_kind_and_written_whole(tmp_path):
    found = [Fault("a", f"a {i}") for i in range(30)] + [Fault("b", "b 0")]
    assert faults.summary(found, shown=2) == [
        "30 x a", "  a 0", "  a 1", "  and 28 more", "1 x b", "  b 0",
    ]  # fmt: skip
    faults.write(tmp_path / "faults.txt", found, found[-1:])
    text = (tmp_path / "faults.txt").read_text()
    assert text.startswith("faults: 31\n       30 x a\n        1 x b\n")
    assert text.count("\n  a ") == 30 and text.count("\n  b 0") == 2 and "odd, but read: 1" in text


def test_inspection_goes_on_after_every_fault(pictures, tmp_path):
    source, info = sources.open_source(
        "coco_instances",
        data_dir=tmp_path,
        split="train",
        options={"train_images": str(pictures), "train_json": str(_many_faults(tmp_path))},
        for_inspection=True,
    )
    found = statistics.collect(source, info, limit=0)
    assert len(found.faults) == 5 and len(found.sizes) == 2
    report = statistics.report(found, info, 10, 10)
    assert "faults (5), which end a training" in report and "2 x polygon without three" in report
