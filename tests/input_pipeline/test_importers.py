"""Exports of labelling tools become COCO folders, or one clear error."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oneformer_jax.input_pipeline import importers
from oneformer_jax.input_pipeline.importers.export import Export, Picture
from tests.input_pipeline import exports
from tests.input_pipeline.exports import (
    BLOB,
    CAT,
    DOG,
    HEIGHT,
    WIDTH,
    imported,
    instances_of,
    refused,
)

FORMATS = list(exports.MAKERS)


@pytest.fixture(params=FORMATS)
def form(request):
    return request.param


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


def test_every_format_gives_the_instances_that_were_drawn(form, tmp_path):
    out, report = imported(form, exports.MAKERS[form](tmp_path / "export"))
    found = instances_of(out)
    if form == "yolo":
        found += instances_of(out, "val")
    assert [(name.rsplit("/", 1)[-1], label) for name, label, _ in found] == [
        ("a.jpg", "cat"), ("a.jpg", "dog"), ("b.png", "cat"),
    ]  # fmt: skip
    for (_, _, mask), expected in zip(
        found, (exports.drawn(CAT), exports.drawn(DOG), BLOB), strict=True
    ):
        assert iou(mask, expected) > 0.85
    if form != "yolo":  # an outline loses a part of the edge
        np.testing.assert_array_equal(found[2][2], BLOB)
    assert "2 classes: cat, dog" in report and "--mode=inspect" in report
    assert ("validation_share=" in report) == (form != "yolo")


def test_the_images_are_copied_as_they_are(form, tmp_path):
    root = exports.MAKERS[form](tmp_path / "export")
    out, _ = imported(form, root)
    found = [p for p in root.rglob("*") if "masks" not in p.parts]
    originals = {p.name: p.read_bytes() for p in found if p.name in ("a.jpg", "b.png")}
    copies = {p.name: p for p in (out / "images").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in copies.items()} == {
        name: originals[name] for name in ("a.jpg", "b.png")
    }
    assert not any(os.path.samefile(copies["a.jpg"], p) for p in root.rglob("a.jpg"))


def test_a_folder_that_exists_is_never_touched(form, tmp_path):
    root = exports.MAKERS[form](tmp_path / "export")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        imported(form, root, out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    imported(form, root, out)
    assert (out / "instances_train.json").is_file()


def test_an_import_that_fails_in_the_middle_leaves_nothing(form, tmp_path, monkeypatch):
    root = exports.MAKERS[form](tmp_path / "export")
    copy, done = shutil.copyfile, []

    def fails(*paths):
        done.append(copy(*paths))
        if len(done) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fails)
    assert "No space left" in refused(form, root)


def test_a_missing_image_is_named(form, tmp_path):
    root = exports.MAKERS[form](tmp_path / "export")
    next(root.rglob("a.jpg")).unlink()
    # Where images are found by themselves, what belongs to one is left over.
    left = {"yolo": "a.txt belongs to no image", "mask_folders": "a.png belongs to no image"}
    assert left.get(form, "a.jpg") in refused(form, root)


def test_an_image_of_another_size_is_named(form, tmp_path):
    root = exports.MAKERS[form](tmp_path / "export")
    if form == "yolo":  # it states no size
        return
    exports.image(next(root.rglob("b.png")), (HEIGHT, WIDTH + 1))
    message = refused(form, root)
    assert "b.png" in message and ("60 x 81" in message or "[60, 81]" in message)


def test_a_broken_image_is_named(form, tmp_path):
    root = exports.MAKERS[form](tmp_path / "export")
    next(root.rglob("a.jpg")).write_bytes(b"broken")
    assert "a.jpg" in refused(form, root)


def test_an_empty_folder_or_none_is_named(form, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(form, tmp_path / "empty")
    (tmp_path / "empty").rmdir()
    with pytest.raises(FileNotFoundError, match="unpack the export"):
        importers.import_export(form, tmp_path / "missing", tmp_path / "out")


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown format 'pascal'; use one of labelme, cvat"):
        importers.import_export("pascal", tmp_path, tmp_path / "out")


# --- labelme ---


def labelme(tmp_path, *shapes, **options):
    root = tmp_path / "export"
    exports.image(root / "a.jpg")
    exports.labelme_json(root / "a.json", "a.jpg", list(shapes), **options)
    return root


def test_labelme_shapes_of_a_group_are_one_instance_and_circles_are_drawn(tmp_path):
    circle = exports.shape("dog", [(60, 40), (60, 50)], "circle")
    parts = [exports.shape("cat", points, group_id=4) for points in (CAT, DOG)]
    out, _ = imported("labelme", labelme(tmp_path, *parts, circle))
    cat, dog = sorted(instances_of(out), key=lambda found: found[1])
    assert cat[1] == "cat" and dog[1] == "dog"
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    assert iou(dog[2], np.hypot(rows - 40, columns - 60) < 10) > 0.95
    content = json.loads((out / "instances_train.json").read_text())
    assert [len(a["segmentation"]) for a in content["annotations"]] == [2, 2]


def test_labelme_points_and_lines_are_left_out_and_told(tmp_path):
    root = labelme(
        tmp_path,
        exports.shape("cat", CAT),
        exports.shape("nose", [(5, 5)], "point"),
        exports.shape("tail", [(5, 5), (9, 9)], "linestrip"),
        exports.shape("__ignore__", DOG),
    )
    exports.image(root / "plain.jpg")
    _, report = imported("labelme", root)
    assert (
        "1 shapes of the kind point (" in report and "1 images without a JSON (plain.jpg)" in report
    )
    assert "kind linestrip" in report and "kind __ignore__" in report
    assert "1 classes: cat" in report, "labels of shapes that are left out are no classes"


@pytest.mark.parametrize(
    "shape, message",
    [
        (exports.shape("cat", [(1, 1), (9, 9)], "rectangle"), "a box is no mask"),
        (exports.shape("cat", CAT, "hexagon"), "is a hexagon of 4 points"),
        (exports.shape("cat", CAT, "hexa\ngon"), "is a hexa gon of 4 points"),
        (exports.shape("cat", CAT[:2]), "at least three points"),
        (exports.shape("cat", [*CAT, (WIDTH + 2, 5)]), r"the point \(82, 5\) lies outside"),
        (exports.shape("cat", [(1, 1), (1, 1), (1, 1)]), "covers no pixel"),
        (exports.shape(" ", CAT), "has no label"),
        (exports.shape("cat", [(5, 5), (5, 5)], "circle"), "its radii are 0"),
        (exports.shape("cat", [(5, 5)] * 3, "circle"), "circle of 3 points; it needs two"),
        (exports.shape("cat", [(1, 1), (3, 3)], "mask", mask="no base64"), "cannot be decoded"),
        (exports.shape("cat", [(1, 1), (3, 3)], "mask", mask="\xe9"), "cannot be decoded"),
        (exports.shape("cat", [(1, 1), (3, 3)], "mask"), "its mask: cannot be decoded"),
        (
            exports.shape("cat", [(1, 1), (3, 3)], "mask", mask=exports.png(np.ones((90, 90)))),
            r"has the shape \[90, 90\], its box \[3, 3\]",
        ),
        (exports.shape("a\nb", CAT, "hexagon"), r"shape 1 \('a\\nb'\) is a hexagon"),
        (exports.shape("a\nb", CAT), r"cannot be printed: 'a\\nb'"),
        (exports.shape("x" * 501, CAT), "longer than 500 characters"),
        (
            exports.shape("cat", [(1, 1), (3, 3)], "mask", mask=exports.png(BLOB)),
            r"has the shape \[60, 80\], its box \[3, 3\]",
        ),
    ],
)
def test_labelme_shapes_that_are_no_masks_are_refused(tmp_path, shape, message):
    root = labelme(tmp_path, exports.shape("dog", DOG), shape)
    with pytest.raises(ValueError, match=message) as caught:
        importers.import_export("labelme", root, tmp_path / "out")
    named = "a.json, shape 1" in str(caught.value) or "the classes have" in str(caught.value)
    assert named and not (tmp_path / "out").exists()


def test_labelme_files_that_disagree_are_refused(tmp_path):
    root = labelme(tmp_path, exports.shape("cat", CAT))
    exports.labelme_json(root / "twice.json", "a.jpg", [exports.shape("dog", DOG)])
    assert "the image a.jpg occurs already" in refused("labelme", root)
    exports.image(root / "images" / "a.jpg")
    exports.labelme_json(root / "twice.json", "images/a.jpg", [exports.shape("dog", DOG)])
    assert "two files may not have one name in the new folder" in refused("labelme", root)
    (root / "twice.json").write_text('{"shapes": [], "imagePath": "../../secret.jpg"}')
    assert "leads out of" in refused("labelme", root)
    (root / "twice.json").write_text('{"some": "other JSON"}')
    assert "twice.json holds an unexpected value" in refused("labelme", root)
    (root / "twice.json").unlink()
    (root / "labels.txt").write_text("__ignore__\n_background_\ndog\n")
    assert "the label 'cat' is not in the export's list" in refused("labelme", root)


def test_labelme_folders_that_are_hidden_are_not_read(tmp_path):
    root = labelme(tmp_path, exports.shape("cat", CAT))
    exports.labelme_json(root / ".checkpoints" / "a.json", "lost.jpg", [])
    exports.labelme_json(root / "__MACOSX" / "a.json", "lost.jpg", [])
    imported("labelme", root)


def test_names_of_images_that_no_system_or_json_takes_are_named(tmp_path):
    root = labelme(tmp_path, exports.shape("cat", CAT))
    exports.labelme_json(root / "b.json", "x" * 300 + ".jpg", [])
    message = refused("labelme", root)
    assert f"{root / 'b.json'}: its image" in message and "is missing" in message
    (root / "b.json").unlink()
    strange = os.fsdecode(b"caf\xe9.jpg")
    exports.image(root / strange)
    _, report = imported("labelme", root)
    assert "images without a JSON (caf?.jpg)" in report
    root = exports.mask_folders(tmp_path / "other" / "export")
    exports.image(root / "images" / strange)
    assert r"'caf\udce9.jpg' is not UTF-8" in refused("mask_folders", root)


@pytest.mark.parametrize("turn", [0, 30, 90, 137])
def test_ellipses_are_drawn_where_their_equation_holds(tmp_path, turn):
    export = Export(tmp_path, "cvat")
    picture = Picture(tmp_path / "a.jpg", "a.jpg", (90, 120), "train")
    rows, columns = np.mgrid[:90, :120] + 0.5
    for center, radii in (((60, 45), (30, 11)), ((2, 88), (50, 1e9)), ((60.2, 44.9), (0.3, 40))):
        x, y = columns - center[0], rows - center[1]
        cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        expected = ((x * cos + y * sin) / radii[0]) ** 2 + ((y * cos - x * sin) / radii[1]) ** 2
        found = export.ellipse(picture, center, radii, turn, "here")
        np.testing.assert_array_equal(found, expected <= 1)


def test_folders_are_taken_as_in_a_shell_and_none_is_in_a_bucket(tmp_path, monkeypatch):
    root = labelme(tmp_path, exports.shape("cat", CAT))
    monkeypatch.setenv("HOME", str(tmp_path))
    imported("labelme", Path("~/export"), Path("~/out"))
    assert (tmp_path / "out" / "images" / "a.jpg").is_file()
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    imported("labelme", root, Path("."))
    assert (tmp_path / "new" / "instances_train.json").is_file()
    for source, out in ((str(root), "gs://bucket/out"), ("s3://bucket/export", "out")):
        with pytest.raises(OSError, match="cannot be in a bucket"):
            importers.import_export("labelme", source, out)


def test_classes_that_look_alike_are_refused(tmp_path):
    root = labelme(
        tmp_path, exports.shape("Traffic light", CAT), exports.shape("traffic_light", DOG)
    )
    assert "look alike" in refused("labelme", root)


def test_all_faults_are_told_at_once(tmp_path):
    shapes = [exports.shape("cat", CAT, kind) for kind in ("star", "moon", "sun")]
    message = refused("labelme", labelme(tmp_path, *shapes))
    assert "has 3 faults" in message and all(kind in message for kind in ("star", "moon", "sun"))


def test_a_turned_photo_is_taken_upright(tmp_path):
    """Labelme shows photos upright, and its points are those of the upright photo."""
    root = labelme(tmp_path, exports.shape("cat", CAT))
    turned = Image.new("RGB", (HEIGHT, WIDTH))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "a.jpg", exif=exif)
    out, _ = imported("labelme", root)
    assert instances_of(out)[0][2].shape == (HEIGHT, WIDTH)


# --- folders of masks ---


def test_mask_folders_name_what_is_wrong(tmp_path):
    root = exports.mask_folders(tmp_path / "export")
    path = root / "masks" / "cat" / "a.png"
    good = path.read_bytes()
    for pixels, message in (
        (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 7, "has the values 0, 1, 2"),
        (np.ones((HEIGHT, WIDTH - 1)), "has the shape [60, 79], its image [60, 80]"),
        (np.dstack([exports.drawn(CAT) * 255] + [np.zeros((HEIGHT, WIDTH))] * 2), "in colour"),
    ):
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        assert message in refused("mask_folders", root)
    path.write_bytes(good)
    (root / "masks" / "cat" / "lost.png").write_bytes(good)
    assert "lost.png belongs to no image" in refused("mask_folders", root)
    (root / "masks" / "cat" / "lost.png").rename(root / "masks" / "stray.png")
    assert "stray.png is no folder of a class" in refused("mask_folders", root)
    (root / "masks" / "stray.png").unlink()
    exports.image(root / "images" / "a.png")
    assert "differ only in their ending" in refused(
        "mask_folders", root
    ) or "same masks" in refused("mask_folders", root)


def test_empty_masks_are_told(tmp_path):
    _, report = imported("mask_folders", exports.mask_folders(tmp_path / "export"))
    assert "1 empty masks (dog/b.png)" in report
