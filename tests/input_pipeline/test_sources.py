"""Sources of records: what they give, and what they say of bad data."""

import io
import json
import os
import pathlib
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from oneformer_jax.input_pipeline import coco_format, records, sources
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource
from oneformer_jax.input_pipeline.files import read_file
from oneformer_jax.input_pipeline.records import RecordError


def _source(folder, **kwargs):
    return CocoFolderSource(
        folder.root / "images",
        folder.root / "panoptic",
        folder.root / "panoptic_train.json",
        **kwargs,
    )


def test_record_of_a_folder(coco_folder):
    source = _source(coco_folder)
    assert len(source) == 4
    assert source.info.class_names == ("cat", "dog", "ground", "sky")
    record = source[1]
    expected = cv2.imread(str(coco_folder.image(1)))[..., ::-1]
    np.testing.assert_array_equal(record["image"], expected)
    assert record["image"].dtype == np.uint8 and record["panoptic"].dtype == np.int32
    assert record["image_id"] == "101" and record["file_name"] == "0001.jpg"
    assert record["segments"] == [
        {"id": 70_001, "category": 2, "iscrowd": False, "area": 25 * 40 - 4 * 40 - 80 - 180},
        {"id": 16_000_000, "category": 1, "iscrowd": True, "area": 180},
        {"id": 300, "category": 0, "iscrowd": False, "area": 80},
    ]
    np.testing.assert_array_equal(np.unique(record["panoptic"]), [0, 300, 70_001, 16_000_000])
    assert [source.has_things(i) for i in range(4)] == [True, True, False, True]
    assert source.image_size(1) == (25, 40)


def test_crowd_alone_is_no_thing(coco_folder):
    for segment in coco_folder.json["train"]["annotations"][0]["segments_info"]:
        segment["iscrowd"] = 1
    coco_folder.write("train")
    assert not _source(coco_folder).has_things(0)


@pytest.mark.parametrize("index", [-1, 4])
def test_index_out_of_range(coco_folder, index):
    with pytest.raises(IndexError):
        _source(coco_folder)[index]


def test_areas_are_counted_and_segments_without_a_pixel_are_left_out(coco_folder):
    segments = coco_folder.json["train"]["annotations"][2]["segments_info"]
    segments[0]["area"] = 12_345
    segments.insert(0, {"id": 5, "category_id": 12, "iscrowd": 0, "area": 9})  # not in the PNG
    coco_folder.write("train")
    source = _source(coco_folder)
    record, remarks = source.examine(2)
    assert [(s["id"], s["area"]) for s in record["segments"]] == [(70_002, 26 * 40)]
    assert (record["panoptic"] == 70_002).all()
    compact = source.compact(2)
    assert [(s["id"], s["area"]) for s in compact["segments"]] == [(1, 26 * 40)]
    assert (compact["panoptic"] == 1).all()
    assert [r.kind for r in remarks] == [coco_format.NO_PIXEL, coco_format.WRONG_AREA]
    assert "0002.png: segment 70002 has the area 12345, but 1040 pixels" in remarks[1].message


def test_image_is_turned_upright_by_its_exif_orientation(coco_folder):
    pixels = np.zeros((40, 24, 3), np.uint8)
    pixels[:20] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(coco_folder.image(0), exif=exif, quality=95)
    source = _source(coco_folder)
    assert source.image_size(0) == (24, 40)
    record = source[0]["image"]
    assert record.shape == (24, 40, 3)
    assert record[:, 25:].mean() > 240 and record[:, :15].mean() < 15


def test_png_with_alpha_and_grey_jpeg_are_read(coco_folder):
    expected = _source(coco_folder)[0]["panoptic"]
    bgr = cv2.imread(str(coco_folder.panoptic(0)))
    alpha = np.full((*bgr.shape[:2], 1), 200, np.uint8)
    cv2.imwrite(str(coco_folder.panoptic(0)), np.concatenate([bgr, alpha], -1))
    cv2.imwrite(str(coco_folder.image(0)), np.full((24, 40), 90, np.uint8))
    record = _source(coco_folder)[0]
    np.testing.assert_array_equal(record["panoptic"], expected)
    assert record["image"].shape == (24, 40, 3) and (record["image"] == 90).all()


def test_bytes_after_the_end_of_an_image_are_no_truncation(coco_folder):
    expected = _source(coco_folder)[0]["image"]
    coco_folder.image(0).write_bytes(coco_folder.image(0).read_bytes() + b"camera notes")
    np.testing.assert_array_equal(_source(coco_folder)[0]["image"], expected)


@pytest.mark.parametrize(
    ("name", "option", "value", "wanted"),
    [
        ("coco_folder", "skip_broken", "no", "True or False"),
        ("coco_folder", "prepare", "False", "True or False"),
        *(("coco_folder", "name", name, "the name of a folder") for name in ("..", "a/b", "/a")),
        ("coco_instances", "crowd_as_instances", 0, "True or False"),
        ("coco_instances", "train_images", None, "a path or a name"),
        ("semantic_folder", "label_suffix", 5, "a path or a name"),
        ("semantic_folder", "ignore_label", "0,255", "a tuple of 0 to 65536 values"),
        ("semantic_folder", "ignore_label", (255, "0"), "a tuple of 0 to 65536 values"),
        ("semantic_folder", "ignore_label", (True,), "a tuple of 0 to 65536 values"),
        ("coco", "skip_broken", "no", "True or False"),
    ],
)
def test_options_of_a_wrong_kind_are_named(tmp_path, name, option, value, wanted):
    with pytest.raises(ValueError) as caught:
        sources.open_source(name, data_dir=tmp_path, split="train", options={option: value})
    message = str(caught.value)
    assert message.startswith(f"dataset.options.{option} is {value!r}; it must be {wanted}")


def test_panoptic_codes_round_trip():
    ids = np.array([[0, 1, 255], [256, 65_536, 2**24 - 1]], np.int32)
    table = records.SegmentTable.from_lists(ids.ravel()[1:], [0] * 5, [0] * 5, [1] * 5)
    for encode, decode in (
        (records.encode_panoptic, records.decode_panoptic),
        (lambda m: records.encode_dense(m, table), records.decode_dense),
    ):
        decoded = records.with_ids(decode(encode(ids), table, "here"), table)
        np.testing.assert_array_equal(decoded, ids)
        assert decoded.dtype == np.int32
    with Image.open(io.BytesIO(records.encode_panoptic(ids))) as image:
        red, green, blue = np.asarray(image, np.int32).transpose(2, 0, 1)
    np.testing.assert_array_equal(red + 256 * green + 65_536 * blue, ids)


def test_sources_are_small_pickles_that_open_anew(coco_folder, tmp_path):
    direct = _source(coco_folder)
    prepared, _ = sources.open_source(
        "coco_folder", data_dir=tmp_path, split="train", options={"root": coco_folder.root}
    )
    for source in (direct, prepared):
        expected = source[3]  # opens the files
        data = pickle.dumps(source)
        copy = pickle.loads(data)
        assert len(data) < 10_000 and len(copy) == 4
        np.testing.assert_array_equal(copy[3]["panoptic"], expected["panoptic"])
        assert copy.info == source.info and repr(copy) == repr(source)


# ------------------------------------------------------------------- single broken records


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _annotation(folder):
    return folder.json["train"]["annotations"][1]


def _missing_image(folder):
    folder.image(1).unlink()
    return r"0001\.jpg: cannot be read.*panoptic_train\.json lists it"


def _missing_png(folder):
    folder.panoptic(1).unlink()
    return r"0001\.png: cannot be read"


def _truncated_image(folder):
    _truncate(folder.image(1))
    return r"0001\.jpg: cannot be decoded.*truncated"


def _truncated_png(folder):
    _truncate(folder.panoptic(1))
    return r"0001\.png: cannot be decoded.*truncated"


def _damaged_png(folder):
    data = folder.panoptic(1).read_bytes()
    folder.panoptic(1).write_bytes(data[: len(data) // 2] + data[-12:])
    return r"0001\.png: cannot be decoded.*damaged"


def _no_image(folder):
    folder.image(1).write_text("<html>404</html>")
    return r"0001\.jpg: cannot be decoded.*not an image"


def _empty_image(folder):
    folder.image(1).write_bytes(b"")
    return r"0001\.jpg: cannot be decoded"


def _grey_png(folder):
    cv2.imwrite(str(folder.panoptic(1)), np.zeros((25, 40), np.uint8))
    return r"0001\.png: a panoptic PNG must be 8-bit RGB.*1 channel"


def _unknown_id(folder):
    _annotation(folder)["segments_info"].pop()
    folder.write("train")
    return r"0001\.png: the panoptic PNG has 1 segment id\(s\) that the JSON lacks \(300\)"


def _other_size(folder):
    cv2.imwrite(str(folder.image(1)), np.zeros((20, 40, 3), np.uint8))
    return r"0001\.jpg.*the image has 20 x 40 pixels.*panoptic PNG 25 x 40"


def _unknown_category(folder):
    _annotation(folder)["segments_info"][0]["category_id"] = 999
    folder.write("train")
    return r"0001\.png: segment 70001 has category_id 999, which is not in"


def _duplicate_id(folder):
    _annotation(folder)["segments_info"].append(_annotation(folder)["segments_info"][0])
    folder.write("train")
    return r"0001\.png: segment id 70001 is listed twice"


def _id_out_of_range(folder):
    _annotation(folder)["segments_info"][0]["id"] = 2**24
    folder.write("train")
    return r"int <= 16777215 - at \$\.annotations\[1\]\.segments_info\[0\]\.id"


def _no_segments(folder):
    del _annotation(folder)["segments_info"]
    folder.write("train")
    return r"lacks segments_info - at \$\.annotations\[1\]"


def _unlisted_image(folder):
    folder.json["train"]["images"].pop(1)
    folder.write("train")
    return r'panoptic_train\.json: the "images" list has no file_name for image_id 101'


BREAK = [
    _missing_image, _missing_png, _truncated_image, _truncated_png, _damaged_png, _no_image,
    _empty_image, _grey_png, _unknown_id, _other_size, _unknown_category, _duplicate_id,
    _id_out_of_range, _no_segments, _unlisted_image,
]  # fmt: skip


@pytest.mark.parametrize("damage", BREAK, ids=lambda f: f.__name__.strip("_"))
def test_broken_record_is_named_and_the_others_are_read(coco_folder, damage):
    message = damage(coco_folder)
    source = _source(coco_folder)
    with pytest.raises(RecordError, match=message):
        source[1]
    assert [source[i]["image_id"] for i in (0, 2, 3)] == ["100", "102", "103"]
    assert source.has_things(0)


@pytest.mark.parametrize("damage", [_missing_image, _no_image, _unlisted_image])
def test_size_of_a_broken_image_is_a_record_error(coco_folder, damage):
    damage(coco_folder)
    with pytest.raises(RecordError, match=r"0001\.jpg|101"):
        _source(coco_folder).image_size(1)


def test_damaged_prepared_map_is_a_record_error():
    table = records.SegmentTable.from_lists([5, 9], [0, 0], [0, 0], [1, 1])
    data = cv2.imencode(".png", np.array([[0, 1], [2, 3]], np.uint8))[1].tobytes()
    with pytest.raises(RecordError, match="here: the map refers to a segment"):
        records.decode_dense(data, table, "here")


def test_an_id_without_a_segment_is_not_encoded():
    table = records.SegmentTable.from_lists([5, 9], [0, 0], [0, 0], [1, 1])
    with pytest.raises(RecordError, match=r"1 segment id\(s\).*\(7\)"):
        records.encode_dense(np.array([[0, 5], [7, 9]]), table)


def test_class_out_of_the_table_is_a_record_error():
    table = records.SegmentTable.from_lists([5], [7], [0], [1])
    with pytest.raises(RecordError, match="here: segment 5 has class 7, but the dataset has 3"):
        table.check(3, "here")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (pathlib.Path.mkdir, "is not a regular file"),
        (lambda path: None, "is missing"),
    ],
    ids=["pipe", "device", "folder", "missing"],
)
def test_a_file_of_a_record_must_be_a_regular_file(tmp_path, make, reason):
    path = tmp_path / "image.jpg"
    make(path)
    with pytest.raises(RecordError, match=rf"image\.jpg: cannot be read \({reason}.*restore"):
        read_file(path)


# --------------------------------------------------------------------------- broken datasets


def test_missing_json_says_what_is_there(coco_folder):
    (coco_folder.root / "panoptic_train.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no panoptic JSON .*panoptic_train\.json"
    ) as error:
        _source(coco_folder)
    assert "panoptic PNGs and a JSON" in str(error.value)  # what was expected
    assert "holds images/, panoptic/, panoptic_val.json" in str(error.value)  # what was found


@pytest.mark.parametrize("name", ["images", "panoptic"])
def test_missing_folder_says_what_is_there(coco_folder, name):
    (coco_folder.root / name).rename(coco_folder.root / "other")
    with pytest.raises(FileNotFoundError, match=rf"no folder of .*/{name}:.*holds .*other/"):
        _source(coco_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "it lacks categories"),
        (
            lambda c: c.update(annotations=[{"image_id": 1, "segmentation": [], "id": 1}]),
            "looks like an instance JSON",
        ),
        (lambda c: c.update(annotations=[]), "the dataset is empty"),
        (lambda c: c.update(categories=[]), "empty"),
    ],
)
def test_bad_json_is_explained(coco_folder, change, message):
    change(coco_folder.json["train"])
    coco_folder.write("train")
    with pytest.raises(ValueError, match=message) as error:
        _source(coco_folder)
    assert not isinstance(error.value, RecordError)


@pytest.mark.parametrize(
    ("text", "message"), [('{"images": [', "truncated"), ("[]", "Expected object, got array")]
)
def test_other_json_is_explained(coco_folder, text, message):
    (coco_folder.root / "panoptic_train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        _source(coco_folder)


def test_splits_with_other_categories_are_refused(coco_folder):
    categories = json.loads(json.dumps(coco_folder.json["train"]["categories"]))
    categories[1]["name"] = "lion"
    coco_folder.json["validation"]["categories"] = categories
    coco_folder.write("validation")
    with pytest.raises(ValueError, match=r"panoptic_val\.json: category 7 is 'lion'.*'cat'"):
        sources.open_source(
            "coco_folder",
            data_dir=coco_folder.root,  # also the default of the option root
            split="validation",
            options={"prepare": False},
        )


def test_nothing_prepared_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared dataset in .*prepare"):
        sources.TfdsSource(tmp_path, "train")


def test_unknown_split_of_prepared_data_is_named(coco_folder, tmp_path):
    source, _ = sources.open_source(
        "coco_folder", data_dir=tmp_path, split="train", options={"root": coco_folder.root}
    )
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        sources.TfdsSource(source._dir, "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "coco_foldr"}, "did you mean 'coco_folder'"),
        ({"split": "val"}, "unknown split 'val'.*train, validation"),
        ({"options": {"train_jsn": "x"}}, "unknown option 'train_jsn'.*did you mean 'train_json'"),
    ],
)
def test_bad_arguments_name_the_known_ones(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        sources.open_source(
            **{"name": "coco_folder", "data_dir": tmp_path, "split": "train", **arguments}
        )
