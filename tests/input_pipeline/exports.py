"""The same two images in the exports of several labelling tools, for the tests of importers."""

import base64
import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from oneformer_jax.input_pipeline import coco_instances, importers

HEIGHT, WIDTH = 60, 80
# Outlines in pixels, (x, y).
CAT = [(10.0, 8.0), (40.0, 10.0), (34.0, 40.0), (12.0, 36.0)]
DOG = [(50.0, 20.0), (75.0, 22.0), (70.0, 55.0)]
BLOB = np.zeros((HEIGHT, WIDTH), bool)
BLOB[30:50, 5:25] = np.hypot(*(np.mgrid[:20, :20] - 9.5)) < 9


def image(path, size=(HEIGHT, WIDTH), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def drawn(points):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(mask, [np.array(points).round().astype(int)], 1)
    return mask > 0


def png(mask, value=1):
    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * value).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def shape(label, points, kind="polygon", **more):
    given = dict(label=label, points=[list(map(float, p)) for p in points], shape_type=kind)
    return dict(group_id=None, description="", flags={}, mask=None) | given | more


def labelme_json(path, image_path, shapes, size=(HEIGHT, WIDTH)):
    content = dict(version="5.5.0", flags={}, shapes=shapes, imagePath=image_path, imageData=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | dict(imageHeight=size[0], imageWidth=size[1])))


def labelme(root):
    image(root / "a.jpg")
    image(root / "pictures" / "b.png", seed=1)
    blob = shape("cat", [(5, 30), (24, 49)], "mask", mask=png(BLOB[30:50, 5:25]))
    labelme_json(root / "a.json", "a.jpg", [shape("cat", CAT), shape("dog", DOG)])
    labelme_json(root / "json" / "b.json", "..\\pictures\\b.png", [blob])
    return root


CVAT_HEAD = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><id>7</id><name>animals</name><size>2</size>
<mode>annotation</mode><labels>
<label><name>cat</name><color>#ff0000</color><type>any</type><attributes></attributes></label>
<label><name>dog</name><color>#00ff00</color><type>any</type><attributes></attributes></label>
</labels></task><dumped>2024-03-01 10:00:00+00:00</dumped></meta>
"""


def cvat_points(points):
    return ";".join(f"{x:.2f},{y:.2f}" for x, y in points)


def cvat_runs(mask):
    flat = mask.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return ", ".join(map(str, [0, *runs] if flat[0] else runs))


def cvat_xml(root, first="", second=""):
    (root / "annotations.xml").write_text(
        f"""{CVAT_HEAD}
<image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}">{first}</image>
<image id="1" name="sub/b.png" width="{WIDTH}" height="{HEIGHT}">{second}</image>
</annotations>"""
    )


def cvat_polygon(label, points):
    return (
        f'<polygon label="{label}" source="manual" occluded="0" points="{cvat_points(points)}" '
        'z_order="0"></polygon>'
    )


def cvat_mask(label="cat", rle=None, left=5, top=30, width=20, height=20):
    rle = cvat_runs(BLOB[30:50, 5:25]) if rle is None else rle
    return (
        f'<mask label="{label}" source="manual" occluded="0" rle="{rle}" left="{left}" '
        f'top="{top}" width="{width}" height="{height}" z_order="0"></mask>'
    )


def cvat(root):
    image(root / "images" / "a.jpg")
    image(root / "images" / "sub" / "b.png", seed=1)
    cvat_xml(root, cvat_polygon("cat", CAT) + cvat_polygon("dog", DOG), cvat_mask())
    return root


def outline(mask):
    (contour,), _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    return contour[:, 0].astype(float)


def yolo_line(number, points):
    values = (np.array(points) / [WIDTH, HEIGHT]).ravel()
    return " ".join([str(number), *(f"{v:.6f}" for v in values)])


def yolo(root):
    image(root / "images" / "train" / "a.jpg")
    image(root / "images" / "val" / "b.png", seed=1)
    for split, name, lines in (
        ("train", "a", [yolo_line(0, CAT), yolo_line(1, DOG)]),
        ("val", "b", [yolo_line(0, outline(BLOB))]),
    ):
        path = root / "labels" / split / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
    )
    return root


def brush(mask):
    """Label Studio's run lengths: all lengths as the fourth kind, of 16 bits."""
    values = np.repeat(mask.ravel().astype(np.uint8) * 255, 4)
    bits = [f"{len(values):032b}", f"{7:05b}", *(f"{n:04b}" for n in (2, 3, 7, 15))]
    starts = np.flatnonzero(np.diff(values.astype(int), prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        for position in range(start, end, 1 << 16):
            run = min(1 << 16, end - position)
            if run == 4:  # written out, as the tool does for short runs
                bits += ["0", "00", f"{run - 1:03b}", f"{values[start]:08b}" * run]
            else:
                bits += ["1", "11", f"{run - 1:016b}", f"{values[start]:08b}"]
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def region(kind, value, label="cat"):
    value = value if label is None else value | {kind: [label]}
    return dict(
        original_width=WIDTH, original_height=HEIGHT, image_rotation=0, value=value, id="x1",
        from_name="tag", to_name="image", type=kind, origin="manual",
    )  # fmt: skip


def task(number, address, regions, **more):
    annotation = dict(id=10 + number, completed_by=1, result=regions, was_cancelled=False)
    return dict(id=number, data={"image": address}, annotations=[annotation], predictions=[]) | more


def studio_polygon(points, label="cat"):
    percent = (np.array(points) / [WIDTH, HEIGHT] * 100).tolist()
    return region("polygonlabels", {"points": percent, "closed": True}, label)


def studio_brush(mask, label="cat"):
    return region("brushlabels", {"format": "rle", "rle": brush(mask)}, label)


def label_studio(root):
    image(root / "images" / "a.jpg")
    image(root / "images" / "b.png", seed=1)
    first = [studio_polygon(CAT), studio_polygon(DOG, "dog")]
    tasks = [
        task(1, "/data/upload/3/0a1b2c3d-a.jpg", first),
        task(2, "/data/local-files/?d=images/b.png", [studio_brush(BLOB)]),
    ]
    (root / "project-1.json").write_text(json.dumps(tasks))
    return root


def mask_folders(root):
    image(root / "images" / "a.jpg")
    image(root / "images" / "b.png", seed=1)
    for name, mask in (
        ("cat/a.png", drawn(CAT)),
        ("dog/a/0.png", drawn(DOG)),
        ("cat/b.png", BLOB),
        ("dog/b.png", np.zeros_like(BLOB)),
    ):
        path = root / "masks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return root


MAKERS = dict(
    labelme=labelme, cvat=cvat, yolo=yolo, label_studio=label_studio, mask_folders=mask_folders
)


# --- what becomes of them ---


def imported(form, root, out=None):
    out = out or root.parent / "out"
    return out, importers.import_export(form, root, out)


def refused(form, root):
    """The message of the error of an export; nothing may be written."""
    out = root.parent / "out"
    with pytest.raises((ValueError, OSError)) as caught:
        importers.import_export(form, root, out)
    assert sorted(p.name for p in root.parent.iterdir()) == [root.name], "something was written"
    return str(caught.value)


def instances_of(out, split="train"):
    """[(file name, class name, mask bool)] by the reader of training."""
    source = coco_instances.CocoInstanceSource(out / "images", out / f"instances_{split}.json")
    assert source.faults == [] and source.remarks == []
    found = []
    for index in range(len(source)):
        record = source[index]
        found += [
            (
                record["file_name"],
                source.info.class_names[segment["category"]],
                record["panoptic"] == segment["id"],
            )
            for segment in record["segments"]
        ]
    return found
