"""Metrics that a dataset gets, and original instance files as ground truth."""

import dataclasses
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from oneformer_jax.eval.metrics.ap import CocoAP
from oneformer_jax.eval.metrics.cityscapes import CityscapesAP, CityscapesIoU
from oneformer_jax.eval.metrics.instance_json import InstanceAnnotations
from oneformer_jax.eval.metrics.iou import MeanIoU
from oneformer_jax.eval.metrics.pq import PanopticQuality
from oneformer_jax.eval.protocol import choose_protocol
from oneformer_jax.input_pipeline import datasets
from oneformer_jax.types import Metadata
from tests.eval.metric_cases import columns_mask, instances, truth


def table(name):
    return Metadata(**dataclasses.asdict(datasets.dataset_info(name)))


@pytest.mark.parametrize(
    ("dataset", "instance", "semantic", "ids"),
    [
        ("coco", CocoAP, MeanIoU, "contiguous"),
        ("ade20k", CocoAP, MeanIoU, "thing"),
        ("cityscapes", CityscapesAP, CityscapesIoU, "contiguous"),
        ("mapillary", None, MeanIoU, "contiguous"),
        ("synthetic", CocoAP, MeanIoU, "contiguous"),
    ],
)
def test_metrics_of_each_dataset(dataset, instance, semantic, ids):
    metadata = table(dataset)
    protocol = choose_protocol(metadata, dataset=dataset)
    assert protocol.instance_ids == ids
    assert type(protocol.make_metric("panoptic", metadata)) is PanopticQuality
    made = protocol.make_metric("semantic", metadata)
    assert type(made) is semantic
    assert ("instance" in protocol.tasks) == (instance is not None)
    if instance:
        assert type(protocol.make_metric("instance", metadata)) is instance
    else:
        with pytest.raises(ValueError, match=r"mapillary has no metric.*eval\.tasks"):
            protocol.make_metric("instance", metadata)
    with pytest.raises(ValueError, match="depth"):
        protocol.make_metric("depth", metadata)


@pytest.mark.parametrize("folder", ["cityscapes", "mapillary", "ade20k", "plain"])
def test_the_name_of_a_folder_chooses_no_protocol(folder):
    metadata = dataclasses.replace(METADATA, dataset=folder)
    assert choose_protocol(metadata, dataset="coco_folder").name == "coco"
    assert choose_protocol(metadata, dataset="coco_folder", name="mapillary").name == "mapillary"


def test_the_protocol_can_be_chosen():
    metadata = table("mapillary")
    protocol = choose_protocol(metadata, name="coco", instance_ids="thing")
    assert (protocol.name, protocol.instance_ids) == ("coco", "thing")
    assert isinstance(protocol.make_metric("instance", metadata), CocoAP)
    with pytest.raises(ValueError, match=r"eval\.protocol is 'lvis'; it must be one of auto, coco"):
        choose_protocol(metadata, name="lvis")
    with pytest.raises(ValueError, match=r"eval\.instance_ids is 'own'"):
        choose_protocol(metadata, instance_ids="own")


# ------------------------------------------------------------------------ instance annotations

# Five classes, as ADE20K's with gaps between the things.
METADATA = Metadata(
    dataset="five",
    class_names=("road", "person", "sky", "car", "dog"),
    is_thing=(False, True, False, True, True),
    colors=((1, 2, 3),) * 5,
    category_ids=(7, 24, 23, 26, 30),
)


def annotation_file(folder, ids=(24, 26, 30), **changes):
    """Two images of 10 x 4 pixels; the first has a car, a crowd of cars and a person."""
    person, car, _ = ids

    def rle(start, stop):
        code = coco_mask.encode(np.asfortranarray(columns_mask(start, stop), np.uint8))
        return {"size": [4, 10], "counts": code["counts"].decode()}

    content = {
        "images": [
            dict(id=7, height=4, width=10, file_name="train/0007.jpg"),
            dict(id=8, height=4, width=10, file_name="train/0008.jpg"),
        ],
        "annotations": [
            # Columns 0 and 1 as a polygon; 2 to 4 as run lengths, which go column by column.
            dict(
                id=1, image_id=7, category_id=car, area=8, iscrowd=0,
                segmentation=[[0, 0, 2, 0, 2, 4, 0, 4]],
            ),
            dict(
                id=2, image_id=7, category_id=car, area=12, iscrowd=1,
                segmentation={"size": [4, 10], "counts": [8, 12, 20]},
            ),
            dict(
                id=3, image_id=7, category_id=person, area=2000, iscrowd=0, segmentation=rle(6, 10)
            ),
        ],
        "categories": [dict(id=c) for c in ids],
    } | changes  # fmt: skip
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("ids", [(24, 26, 30), (0, 1, 2)])
def test_instances_of_a_file(tmp_path, ids):
    """Numbered as in the dataset, or by the position among the things."""
    found = InstanceAnnotations(annotation_file(tmp_path, ids), METADATA)
    for image_id in ("7", "0007"):  # by the id, or by the name of the file
        masks = found.masks(image_id, (4, 10))
        assert masks.classes.tolist() == [3, 3, 1]
        assert masks.values.tolist() == [8, 12, 2000]
        assert masks.crowd.tolist() == [False, True, False]
        decoded = [coco_mask.decode({"size": [4, 10], "counts": c}) for c in masks.counts]
        expected = [columns_mask(0, 2), columns_mask(2, 5), columns_mask(6, 10)]
        np.testing.assert_array_equal(decoded, expected)
    assert found.masks("8", (4, 10)).counts == []


@pytest.mark.parametrize(("name", "thing_labels"), [("coco", False), ("ade20k", True)])
def test_ap_against_an_instance_file(tmp_path, name, thing_labels):
    """The panoptic truth has no thing at all: what counts is the file."""
    path = annotation_file(tmp_path, (0, 1, 2) if thing_labels else (24, 26, 30))
    protocol = choose_protocol(METADATA, name=name, instance_json=str(path))
    metric = protocol.make_metric("instance", METADATA)
    person, car = (0, 1) if thing_labels else (1, 3)
    found = instances(
        (car, 0.9, columns_mask(0, 2)),
        (car, 0.8, columns_mask(2, 3)),  # in the crowd
        (person, 0.3, columns_mask(6, 10)),
    )
    metric.update(found, truth([1] * 10, {1: 0}, image_id="7"))
    metric.update(instances(), truth([1] * 10, {1: 0}, image_id="8"))
    assert metric.compute()["instance/AP"] == pytest.approx(100)
    assert metric.compute()["instance/APm"] == pytest.approx(100)  # by the annotated area
    expected = [np.nan, 100, np.nan, 100, np.nan]
    np.testing.assert_allclose(metric.per_class()["instance/AP"], expected)
    assert metric.counts()["instance/crowds"] == 1


@pytest.mark.parametrize("by_position", [False, True])
def test_ade20k_file_numbers_its_100_things_in_either_way(tmp_path, by_position):
    metadata = table("ade20k")
    things = np.flatnonzero(metadata.is_thing).tolist()
    numbers = list(range(100)) if by_position else things
    path = tmp_path / "ade20k_instance_val.json"
    categories = [dict(id=i) for i in numbers]
    image = dict(id="ADE_val_00000001", height=4, width=10, file_name="ADE_val_00000001.jpg")
    box = [[0, 0, 2, 0, 2, 4, 0, 4]]
    annotations = [
        dict(id=1, image_id=image["id"], category_id=numbers[i], area=8, segmentation=box)
        for i in (0, 3, 99)
    ]
    path.write_text(
        json.dumps(dict(images=[image], annotations=annotations, categories=categories))
    )
    masks = InstanceAnnotations(path, metadata).masks("ADE_val_00000001", (4, 10))
    assert [metadata.class_names[c] for c in masks.classes] == ["bed", "person", "flag"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(categories=[dict(id=7)], annotations=[]), r"\[7\] are no things of five"),
        (dict(images=[]), "lists no images"),
        (
            dict(annotations=[dict(id=5, image_id=7)]),
            r"lacks category_id - at \$\.annotations\[0\]",
        ),
        (dict(annotations=[dict(id=5, segments_info=[])]), "looks like a panoptic JSON"),
    ],
)
def test_wrong_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        InstanceAnnotations(annotation_file(tmp_path, **changes), METADATA)
    assert "instances.json" in str(error.value)


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eval\.instance_json=.*no such file"):
        choose_protocol(METADATA, instance_json=str(tmp_path / "gone.json"))
    path = annotation_file(tmp_path)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match="not valid JSON"):
        choose_protocol(METADATA, instance_json=str(path))
    for text in ("[]", '{"images": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="COCO instance JSON has the lists"):
            choose_protocol(METADATA, instance_json=str(path))
    annotation_file(tmp_path)
    for name in ("cityscapes", "mapillary"):
        with pytest.raises(ValueError, match=rf"{name} does not score instances against"):
            choose_protocol(METADATA, name=name, instance_json=str(path))


def test_images_that_do_not_fit_are_refused(tmp_path):
    found = InstanceAnnotations(annotation_file(tmp_path), METADATA)
    with pytest.raises(ValueError, match=r"no image 9.*evaluated split"):
        found.masks("9", (4, 10))
    with pytest.raises(ValueError, match=r"image 7 has 4 x 10 pixels.*5 x 10"):
        found.masks("7", (5, 10))


@pytest.mark.parametrize(
    "broken", [None, {"counts": [1]}, {"size": [9, 9], "counts": "abc"}, [[1]], [], {}, 5]
)
def test_segmentations_that_are_none_are_refused(tmp_path, broken):
    annotation = dict(id=4, image_id=7, category_id=26, area=1, segmentation=broken)
    path = annotation_file(tmp_path, annotations=[annotation])
    with pytest.raises(ValueError, match=r"instances\.json: .*(annotation 4|annotations\[0\])"):
        InstanceAnnotations(path, METADATA)


def test_truth_without_area_or_pixels(tmp_path):
    """A missing area is counted; an annotation outside of the image is no truth."""
    square = [[0, 0, 2, 0, 2, 4, 0, 4]]
    outside = [[12, 0, 14, 0, 14, 4, 12, 4]]
    rows = [
        dict(id=i, image_id=7, category_id=26, segmentation=s)
        for i, s in enumerate((square, outside))
    ]
    masks = InstanceAnnotations(annotation_file(tmp_path, annotations=rows), METADATA).masks(
        "7", (4, 10)
    )
    assert masks.values.tolist() == [8] and len(masks.counts) == 1


def test_truth_of_crowds_alone_is_refused_with_the_likely_reason(tmp_path):
    row = dict(id=1, image_id=7, category_id=26, iscrowd=1, segmentation=[[0, 0, 2, 0, 2, 4]])
    with pytest.raises(ValueError, match=r"1 of 1 annotations have iscrowd 1.*CVAT"):
        InstanceAnnotations(annotation_file(tmp_path, annotations=[row]), METADATA)
