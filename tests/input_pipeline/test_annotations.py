"""Annotation files: every value is checked before it is used, and every fault is listed."""

import contextlib
import itertools
import re

import numpy as np
import pytest

from oneformer_jax.eval.metrics.instance_json import InstanceAnnotations
from oneformer_jax.input_pipeline.annotations.faults import FaultsError
from oneformer_jax.input_pipeline.records import RecordError
from oneformer_jax.types import Metadata
from tests.input_pipeline import annotation_cases as cases
from tests.input_pipeline.annotation_cases import opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return cases.make_pictures(tmp_path_factory.mktemp("pictures"))


def _mutations(content):
    """Paths of all values, but of the first two entries of a list alone."""
    for path in cases.places(content):
        if not any(isinstance(key, int) and key > 1 for key in path):
            yield path


PLACES = [
    (kind, path)
    for kind, content in (("panoptic", cases.panoptic()), ("instances", cases.instances()))
    for path in _mutations(content)
]


@pytest.mark.parametrize(
    ("kind", "path"),
    PLACES,
    ids=lambda value: value if isinstance(value, str) else ".".join(map(str, value)),
)
def test_a_spoiled_value_is_refused_with_its_place_or_read_right(kind, path, pictures, tmp_path):
    """Every key of both files with every kind of wrong value.

    Whatever is read has areas that are its pixels, ids and classes that exist.
    """
    for name, value in cases.SPOILED.items():
        content = cases.spoiled(getattr(cases, kind)(), path, value)
        file = tmp_path / "annotations.json"
        file.write_text(cases.dump(content))
        try:
            source = opened(kind, pictures, file)
        except ValueError as error:
            assert str(file) in str(error), (name, error)
            continue
        for fault in source.faults:
            assert str(file) in fault.message and "\n" not in fault.message, name
        records = []
        for index in range(len(source)):
            try:
                records.append(source[index])
            except RecordError as error:
                assert str(tmp_path) in str(error) or str(pictures) in str(error), (name, error)
        for record in records:
            pixels = np.bincount(record["panoptic"].ravel(), minlength=4)
            for segment in record["segments"]:
                assert segment["area"] == pixels[segment["id"]] > 0, name
                assert 0 <= segment["category"] < source.info.num_classes
        skipping = opened(kind, pictures, file, skip_broken=True)
        assert len(skipping) == len(source), name
        for index in range(len(skipping)):
            with contextlib.suppress(RecordError):  # where the whole image is concerned
                skipping[index]


@pytest.mark.parametrize("name", sorted(set(cases.SPOILED) - {"null", "missing", "true"}))
@pytest.mark.parametrize("key", ["id", "category_id", "iscrowd"])
def test_numbers_of_a_segment_are_whole_and_in_range(key, name, pictures, tmp_path):
    path = ("annotations", 0, "segments_info", 0, key)
    content = cases.spoiled(cases.panoptic(), path, cases.SPOILED[name])
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    with pytest.raises(RecordError, match=rf"annotations\[0\]\.segments_info\[0\]\.{key}"):
        opened("panoptic", pictures, file)[0]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (key, name)
        for key in ("image_id", "category_id", "iscrowd", "segmentation")
        for name in sorted(set(cases.SPOILED) - {"null", "missing", "text"})
        if (key, name) not in {("iscrowd", "true"), ("segmentation", "list")}  # mean something
    ],
)
def test_values_of_an_instance_are_of_their_type_and_in_range(key, name, pictures, tmp_path):
    content = cases.spoiled(cases.instances(), ("annotations", 0, key), cases.SPOILED[name])
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    source = opened("instances", pictures, file)
    place = rf"annotations\[0\]\.{key}|annotation 10 (is of image_id|has category_id)"
    assert re.search(place, source.faults[0].message)


def test_not_a_number_is_named_and_leaves_the_other_annotations_alone(pictures, tmp_path):
    content = cases.instances()
    content["annotations"][1]["area"] = float("-inf")
    content["annotations"][0]["segmentation"][0][2] = float("nan")
    content["annotations"][0]["note"] = 'a "NaN" in a text, and \\'
    content["info"] = {"version": float("nan")}  # which nobody reads
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    source = opened("instances", pictures, file)
    assert [f.kind for f in source.faults] == ["value of a wrong type or out of range"] * 2
    assert "segmentation[0][2], it is NaN, which JSON does not have" in source.faults[0].message
    assert "annotations[1].area, it is -Infinity, which" in source.faults[1].message
    assert len(source[1]["segments"]) == 2


FILES = {
    "nothing": "",
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "cut": '{"images": [{"id": 1',
    "two values": '{"images": []} {}',
    "no lists": "{}",
    "objects for lists": '{"images": {}, "annotations": {}, "categories": {}}',
    "nulls for lists": '{"images": null, "annotations": null, "categories": null}',
    "empty lists": '{"images": [], "annotations": [], "categories": []}',
    "deep": '{"images": ' + "[" * 100_000,
    "deep inside": '{"images": [{"x": ' + "[" * 2000 + "]" * 2000 + '}], "annotations": [1]}',
    "not text": b"\xff\xfe\x00",
    "zeros": b"\0" * 100,
    "UTF-16": cases.dump(cases.panoptic()).encode("utf-16"),
}


@pytest.mark.parametrize("kind", ["panoptic", "instances", "truth"])
@pytest.mark.parametrize("name", FILES)
def test_other_files_are_refused_in_one_sentence(kind, name, pictures, tmp_path):
    file = tmp_path / "annotations.json"
    data = FILES[name]
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    metadata = Metadata("two", ("cat", "dog"), (True, True), ((0, 0, 0),) * 2, (7, 30))
    with pytest.raises(ValueError, match=r"annotations\.json") as error:
        if kind == "truth":
            InstanceAnnotations(file, metadata)
        else:
            opened(kind, pictures, file)
    assert len(str(error.value)) < 1500


def test_a_mark_before_the_text_is_no_fault(pictures, tmp_path):
    file = tmp_path / "annotations.json"
    file.write_bytes(b"\xef\xbb\xbf" + cases.dump(cases.panoptic()).encode())
    assert len(opened("panoptic", pictures, file)) == 2


def test_keys_that_nobody_reads_may_hold_anything(pictures, tmp_path):
    content = cases.instances()
    for entry in itertools.chain(content["images"], content["annotations"], content["categories"]):
        entry.update(bbox=None, license="x", attributes={"occluded": [None]}, area2=1.5)
    content["licenses"] = content["info"] = "none"
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    assert not opened("instances", pictures, file).faults


# ------------------------------------------------------------------------- ids and names


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
@pytest.mark.parametrize(("key", "value"), [("id", 1), ("id", "1"), ("file_name", "1.jpg")])
def test_ids_and_names_of_two_images_are_refused(kind, key, value, pictures, tmp_path):
    content = getattr(cases, kind)()
    content["images"][1][key] = value
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    with pytest.raises(FaultsError, match=rf"the {key} 1(\.jpg)? occurs more than once"):
        opened(kind, pictures, file)


@pytest.mark.parametrize(("key", "value"), [("image_id", 1), ("file_name", "1.png")])
def test_two_annotations_of_one_image_are_refused(key, value, pictures, tmp_path):
    content = cases.panoptic()
    content["annotations"][1][key] = value
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    with pytest.raises(FaultsError, match=rf"the {key} 1(\.png)? occurs in more than one"):
        opened("panoptic", pictures, file)


def test_all_doubled_ids_are_counted_and_the_first_few_named(pictures, tmp_path):
    content = cases.panoptic()
    content["images"] = [{"id": i % 50, "file_name": f"{i}.jpg"} for i in range(100)]
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    with pytest.raises(FaultsError, match="has 50 faults") as error:
        opened("panoptic", pictures, file)
    assert len(error.value.faults) == 50 and str(error.value).count("the id") == 5


def test_ids_of_images_may_be_texts_and_differ_in_type_from_their_annotations(pictures, tmp_path):
    for kind in ("panoptic", "instances"):
        content = getattr(cases, kind)()
        for image in content["images"]:
            image["id"] = str(image["id"])
        file = tmp_path / "annotations.json"
        file.write_text(cases.dump(content))
        source = opened(kind, pictures, file)
        assert not source.faults and source[1]["image_id"] == "2"


def test_images_without_an_annotation_are_counted(pictures, tmp_path):
    content = cases.panoptic()
    del content["annotations"][0]
    file = tmp_path / "annotations.json"
    file.write_text(cases.dump(content))
    source = opened("panoptic", pictures, file)
    assert len(source) == 1 and "1 images have no annotation" in source.notes[0]
