"""The formats of CVAT, YOLO and Label Studio, sound and damaged."""

import json
import shutil

import numpy as np
import pytest

from oneformer_jax.files import FileError
from oneformer_jax.input_pipeline import importers
from oneformer_jax.input_pipeline.importers import label_studio
from tests.input_pipeline import exports
from tests.input_pipeline.exports import BLOB, CAT, DOG, imported, instances_of, refused

# --- CVAT ---


def cvat(tmp_path, first, second=""):
    root = exports.cvat(tmp_path / "export")
    exports.cvat_xml(root, first, second)
    return root


def test_cvat_ellipses_are_drawn_and_what_is_no_mask_is_told(tmp_path):
    ellipse = '<ellipse label="dog" cx="40" cy="30" rx="20" ry="8" rotation="90"></ellipse>'
    rest = '<points label="cat" points="1.0,2.0"></points><tag label="cat"></tag>'
    attribute = '<polygon label="cat" points="{}"><attribute name="age">3</attribute></polygon>'
    root = cvat(tmp_path, ellipse + rest, attribute.format(exports.cvat_points(CAT)))
    out, report = imported("cvat", root)
    dog, cat = instances_of(out)
    rows, columns = np.nonzero(dog[2])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 49, 32, 47)
    assert cat[0] == "sub/b.png"
    assert "1 shapes of the kind points (a.jpg)" in report and "1 attributes of shapes" in report


@pytest.mark.parametrize(
    "shape, message",
    [
        ('<box label="cat" xtl="1" ytl="1" xbr="9" ybr="9"></box>', "a box is no mask"),
        ('<blob label="cat"></blob>', "only polygon, mask, ellipse are read"),
        (exports.cvat_polygon("bird", CAT), "'bird' is not in the export's list of classes"),
        (exports.cvat_polygon("cat", [*CAT, (90, 10)]), r"the point \(90, 10\) lies outside"),
        ('<polygon label="cat" points="1,2;3"></polygon>', "cannot be read"),
        ('<polygon label="cat" points="nan,2;3,4;5,6"></polygon>', "not a finite number"),
        ('<polygon label="cat"></polygon>', "cannot be read"),
        (exports.cvat_mask(rle="1, 2, 3"), "no mask of 20 x 20"),
        (exports.cvat_mask(rle="-400, 800"), "no mask of 20 x 20"),
        (exports.cvat_mask(rle="9" * 30), "cannot be read"),
        (exports.cvat_mask(left=70), "reaches out of 80 x 60"),
        ('<ellipse label="cat" cx="5" cy="5" rx="inf" ry="2"></ellipse>', "its radii are inf"),
    ],
)
def test_cvat_shapes_that_are_no_masks_are_refused(tmp_path, shape, message):
    with pytest.raises(ValueError, match=message) as caught:
        importers.import_export("cvat", cvat(tmp_path, shape), tmp_path / "out")
    assert "a.jpg" in str(caught.value) or "lacks" in caught.value.faults[0].kind


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid XML"),
        ("<annotations><image", "not valid XML"),
        ("<html></html>", "no export of CVAT"),
        ('<?xml version="1.0" encoding="utf-99"?><annotations/>', "not valid XML"),
        ('<?xml version="1.0" encoding="utf-7"?><annotations/>', "not valid XML"),
        (
            '<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;&b;">]><annotations>&c;</annotations>',
            "document type",
        ),
        (
            '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotations>&b;</annotations>',
            "document type",
        ),
        ("<annotations><track id='0' label='cat'></track></annotations>", "for video"),
        ("<annotations>" + "<a>" * 50 + "</a>" * 50 + "</annotations>", "nested too deeply"),
        (
            "<annotations><image name='a.jpg' width='x' height='5'/></annotations>",
            "no whole height",
        ),
        (
            "<annotations><image name='../../a.jpg' width='80' height='60'/></annotations>",
            "leads out of",
        ),
        (
            "<annotations><image name='a.jpg' subset='odd' width='80' height='60'/></annotations>",
            "the split 'odd' is none of",
        ),
    ],
)
def test_cvat_files_that_are_hostile_or_others_are_refused(tmp_path, text, message):
    root = exports.cvat(tmp_path / "export")
    (root / "annotations.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        importers.import_export("cvat", root, tmp_path / "out")


def test_cvat_long_texts_take_no_time(tmp_path):
    root = exports.cvat(tmp_path / "export")
    text = (root / "annotations.xml").read_text()
    note = "<note>" + "x&#10;" * 2_000_000 + "</note>"
    (root / "annotations.xml").write_text(text.replace("<meta>", f"<meta>{note}"))
    imported("cvat", root)


def test_cvat_points_of_skeletons_are_no_classes(tmp_path):
    root = exports.cvat(tmp_path / "export")
    path = root / "annotations.xml"
    parts = "".join(
        f"<label><name>1</name><type>points</type><parent>{parent}</parent></label>"
        for parent in ("hand", "foot")
    )
    path.write_text(path.read_text().replace("</labels>", f"{parts}</labels>"))
    assert "2 classes: cat, dog" in imported("cvat", root)[1]


def test_cvat_subsets_are_splits(tmp_path):
    root = exports.cvat(tmp_path / "export")
    for subset, name in (("Train", "a.jpg"), ("Validation", "b.png"), ("Test", "c.png")):
        exports.image(root / "images" / subset / name)
    head = exports.CVAT_HEAD
    images = "".join(
        f'<image id="{i}" name="{name}" subset="{subset}" width="80" height="60">'
        f"{exports.cvat_polygon('cat', CAT)}</image>"
        for i, (subset, name) in enumerate(
            (("Train", "a.jpg"), ("Validation", "b.png"), ("Test", "c.png"))
        )
    )
    (root / "images" / "a.jpg").unlink()
    (root / "annotations.xml").write_text(f"{head}{images}</annotations>")
    out, report = imported("cvat", root)
    assert instances_of(out)[0][0] == "Train/a.jpg"
    assert instances_of(out, "val")[0][0] == "Validation/b.png"
    assert "1 entries of the test split" in report and "classes without an instance: dog" in report


# --- YOLO ---


@pytest.mark.parametrize(
    "line, message",
    [
        ("0 0.5 0.5 0.2 0.2", "is a box; a box is no mask"),
        ("0 0.1 0.1 0.9 0.1", "is a box"),
        ("0 0.1 0.1 0.9 0.1 0.5", "has 6 numbers"),
        ("2 0.1 0.1 0.9 0.1 0.5 0.9", "the class 2 is none of the 2"),
        ("0.5 0.1 0.1 0.9 0.1 0.5 0.9", "the class 0.5 is none"),
        ("-1 0.1 0.1 0.9 0.1 0.5 0.9", "the class -1 is none"),
        ("0 0.1 0.1 1.9 0.1 0.5 0.9", r"the point \(152, 6\) lies outside"),
        ("0 0.1 0.1 nan 0.1 0.5 0.9", "not a finite number"),
        ("cat 0.1 0.1 0.9 0.1 0.5 0.9", "is not of numbers"),
    ],
)
def test_yolo_lines_that_are_no_polygons_are_refused(tmp_path, line, message):
    root = exports.yolo(tmp_path / "export")
    (root / "labels" / "train" / "a.txt").write_text(f"{exports.yolo_line(0, CAT)}\n\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        importers.import_export("yolo", root, tmp_path / "out")
    assert "a.txt, line 3" in str(caught.value), "blank lines count"


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("", "no data.yaml of YOLO"),
        ("names: [cat, dog", "no data.yaml of YOLO"),
        ("train: images/train\n", "no data.yaml of YOLO"),
        ("names: {0: cat, 2: dog}\ntrain: images/train\n", "numbers of names"),
        ("names: [cat, dog]\nnc: 3\ntrain: images/train\n", "nc is 3"),
        ("names: [cat, dog]\ntrain: images/training\n", "no folder or list 'images/training'"),
        ("names: [cat, dog]\ntrain: /etc\n", "no folder or list '/etc'"),
        ("names: !!python/object/apply:os.system [id]\n", "no data.yaml of YOLO"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nnames: [*b, *b]\n", "no data.yaml of YOLO"),
        ("names: [cat]\nnc: !!int ''\n", "no data.yaml of YOLO"),
        ("names: [cat]\nnc: !!bool perhaps\n", "no data.yaml of YOLO"),
        ("names: [cat]\nnc: !!timestamp never\n", "no data.yaml of YOLO"),
        (f"names: [cat]\ntrain: {'x' * 300}\n", "no folder or list 'xxx"),
        ("names: [cat, dog]\nval: images/val\n", "1 images of"),
        ('names: ["cat", "\\ud800"]\ntrain: images/train\n', "cannot be printed: '\\ud800'"),
    ],
)
def test_yolo_descriptions_that_are_wrong_or_hostile_are_refused(tmp_path, yaml, message):
    root = exports.yolo(tmp_path / "export")
    (root / "data.yaml").write_text(yaml)
    assert message in refused("yolo", root)


def test_yolo_lists_of_classes_must_agree(tmp_path):
    root = exports.yolo(tmp_path / "export")
    (root / "classes.txt").write_text("dog\ncat\n")
    assert "lists the classes dog, cat" in refused("yolo", root)


def test_yolo_texts_and_images_belong_together(tmp_path):
    root = exports.yolo(tmp_path / "export")
    exports.image(root / "images" / "train" / "bare.jpg")
    out, report = imported("yolo", root)
    assert "train: 2 images, 2 instances (1 images have none)" in report
    shutil.rmtree(out)
    (root / "labels" / "train" / "lost.txt").write_text(exports.yolo_line(0, CAT))
    assert "lost.txt belongs to no image" in refused("yolo", root)


@pytest.mark.parametrize("above", ["images", "labels"])
def test_yolo_folders_above_the_export_play_no_part(tmp_path, above):
    root = exports.yolo(tmp_path / above / "export")
    exports.image(root / "images" / "train" / "SPARE.JPG")
    (root / "labels" / "train" / "SPARE.txt").write_text("")
    (root / "train.txt").write_text("images/train/a.jpg\n")
    (root / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    out, report = imported("yolo", root)
    assert len(instances_of(out)) == 2 and len(instances_of(out, "val")) == 1
    assert "1 texts of images in no split (SPARE.txt)" in report
    shutil.rmtree(out)
    (root / "images").rename(root / "pictures")
    (root / "data.yaml").write_text("train: pictures/train\nnames: [cat, dog]\n")
    assert "its path lacks" in refused("yolo", root), "these images have no texts"


def test_yolo_layouts_of_other_tools_are_read(tmp_path):
    """Roboflow's folders of splits with paths from another place, and CVAT's lists of files."""
    root = exports.yolo(tmp_path / "export")
    for split in ("train", "val"):
        (root / split).mkdir()
        for kind in ("images", "labels"):
            (root / kind / split).rename(root / split / kind)
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['cat', 'dog']\n"
    )
    out, _ = imported("yolo", root)
    assert len(instances_of(out)) == 2 and len(instances_of(out, "val")) == 1
    shutil.rmtree(out)
    (root / "train.txt").write_text("data/train/images/a.jpg\n")
    (root / "data.yaml").write_text("train: train.txt\nnames: ['cat', 'dog']\n")
    out, _ = imported("yolo", root)
    assert [name for name, _, _ in instances_of(out)] == ["train/a.jpg"] * 2


def test_texts_that_are_not_utf8_are_named(tmp_path):
    root = exports.yolo(tmp_path / "export")
    (root / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe0")
    with pytest.raises(FileError, match="not a text in UTF-8"):
        importers.import_export("yolo", root, tmp_path / "out")


# --- Label Studio ---


def studio(tmp_path, *tasks):
    root = tmp_path / "export"
    exports.image(root / "a.jpg")
    (root / "project.json").write_text(json.dumps(tasks))
    return root


@pytest.mark.parametrize(
    "region, message",
    [
        (exports.region("rectanglelabels", dict(x=1, y=1, width=5, height=5)), "a box is no mask"),
        (exports.region("sculpture", {}), "only polygonlabels, brushlabels, ellipselabels"),
        (exports.studio_polygon([*CAT, (90, 5)]), r"the point \(90, 5\) lies outside"),
        (exports.region("polygonlabels", {"points": [[1, 2], [3]]}), "cannot be read"),
        (exports.region("polygonlabels", {"points": [[1, 2], [3, 4]]}), "at least three points"),
        (exports.region("polygonlabels", {"points": []}, None), "has the labels None, not one"),
        (exports.studio_polygon(CAT) | {"image_rotation": 90}, "turned by 90 degrees"),
        (exports.region("brushlabels", {"rle": [0, 1, 1]}), "ends too early"),
        (exports.region("brushlabels", {"rle": exports.brush(BLOB)[:40]}), "ends too early"),
        (exports.region("brushlabels", {"rle": exports.brush(BLOB[:30])}), "9,600 values of 8"),
        (exports.region("brushlabels", {"rle": [300]}), "cannot be read"),
        (
            exports.region("ellipselabels", dict(x=50, y=50, radiusX=0, radiusY=5)),
            "its radii are 0",
        ),
    ],
)
def test_label_studio_regions_that_are_no_masks_are_refused(tmp_path, region, message):
    root = studio(tmp_path, exports.task(1, "http://host/a.jpg", [region]))
    with pytest.raises(ValueError, match=message) as caught:
        importers.import_export("label_studio", root, tmp_path / "out")
    assert "task 1, region 0" in str(caught.value)


def test_label_studio_sizes_must_agree(tmp_path):
    wide = exports.studio_polygon(CAT) | {"original_width": 90}
    for regions, message in (
        ([wide], "60 x 90 pixels"),
        ([wide, exports.studio_polygon(DOG)], "sizes"),
    ):
        task = exports.task(1, "http://host/a.jpg", regions)
        assert message in refused("label_studio", studio(tmp_path, task))
    bare = exports.studio_polygon(CAT) | {"original_width": None, "original_height": None}
    task = exports.task(1, "http://host/a.jpg", [bare, exports.studio_polygon(DOG)])
    imported("label_studio", studio(tmp_path, task))


def test_label_studio_says_what_it_leaves_out(tmp_path):
    ellipse = exports.region("ellipselabels", dict(x=50, y=50, radiusX=25, radiusY=10, rotation=0))
    regions = [ellipse, exports.region("choices", {"choices": ["day"]}, None)]
    done = exports.task(1, "s3://bucket/some/a.jpg", regions, predictions=[{"result": []}])
    open_task = exports.task(2, "s3://bucket/b.jpg", []) | {"annotations": []}
    out, report = imported("label_studio", studio(tmp_path, done, open_task))
    ((_, label, mask),) = instances_of(out)
    assert label == "cat" and mask.sum() == pytest.approx(np.pi * 20 * 6, rel=0.05)
    assert "regions of the kind choices" in report and "1 predictions (task 1)" in report
    assert "1 tasks that are not annotated (task 2)" in report


def test_label_studio_addresses_are_read_or_named(tmp_path):
    task = exports.task(7, "s3://[bucket/a.jpg", [exports.studio_polygon(CAT)])
    message = refused("label_studio", studio(tmp_path, task))
    assert "task 7: the address 's3://[bucket/a.jpg'" in message and "Invalid IPv6" in message
    root = studio(tmp_path, task | {"data": {"image": "/data/upload/1/0a1b2c3d-a%20#1.jpg"}})
    (root / "a.jpg").rename(root / "a #1.jpg")
    out, _ = imported("label_studio", root)
    assert instances_of(out)[0][0] == "a #1.jpg"


def test_label_studio_tasks_that_are_ambiguous_are_refused(tmp_path):
    first = exports.task(1, "/data/upload/1/0a1b2c3d-a.jpg", [exports.studio_polygon(CAT)])
    twice = first | {"annotations": first["annotations"] * 2}
    assert "task 1 has 2 annotations" in refused("label_studio", studio(tmp_path, twice))
    again = exports.task(2, "http://host/a.jpg", [exports.studio_polygon(DOG)])
    assert "the image a.jpg occurs already" in refused(
        "label_studio", studio(tmp_path, first, again)
    )
    root = studio(tmp_path, first)
    exports.image(root / "other" / "a.jpg")
    assert "has 2 files for the image" in refused("label_studio", root)
    (root / "second.json").write_text("[]")
    assert "must hold the one JSON" in refused("label_studio", root)


def test_the_brush_code_is_read_to_the_pixel():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((40, 50)) < share
        found = label_studio.decode_brush(bytes(exports.brush(mask)), mask.size * 4)
        np.testing.assert_array_equal(found.reshape(40, 50, 4)[..., 3] > 0, mask)


def test_damaged_brush_codes_end_in_one_error():
    rng = np.random.default_rng(1)
    whole = bytes(exports.brush(BLOB))
    for _ in range(300):
        data = bytearray(whole[: rng.integers(0, len(whole) + 1)])
        for position in rng.integers(0, len(data), 3) if data else ():
            data[position] = rng.integers(0, 256)
        try:
            found = label_studio.decode_brush(bytes(data), BLOB.size * 4)
        except ValueError:
            continue
        assert found.shape == (BLOB.size * 4,)
