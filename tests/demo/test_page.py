"""The demo page: what it reads, shows and gives to download, without a browser."""

import base64
import io
import json
import pathlib
import re
import sys
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

from oneformer_jax.app import modes
from oneformer_jax.demo import page, view
from oneformer_jax.eval import predict
from oneformer_jax.eval.segmentation import Instances, Segmentation
from oneformer_jax.input_pipeline.images import ImageError
from oneformer_jax.types import TASKS
from tests import tiny
from tests.eval.tiny_segmenter import CONFIG, LENIENT, METADATA, SIZE, picture, state


class Counted:
    """The model on its devices, with a list of what it was asked for."""

    def __init__(self, predictor):
        self.predictor, self.calls = predictor, []

    def encode(self, batch):
        self.calls.append("encode")
        return self.predictor.encode(batch)

    def decode(self, features, task):
        self.calls.append(task)
        return self.predictor.decode(features, task)


@pytest.fixture(scope="module")
def segmenter():
    made = predict.Segmenter(CONFIG, *state(), METADATA, postprocess=LENIENT, test_size=SIZE)
    made._predictor = Counted(made._predictor)
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "street <1>.png"
    Image.fromarray(picture()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def opened(segmenter, file):
    segmenter._predictor.calls.clear()
    return page.open_image(segmenter, file)


def panoptic():
    """Two cats, the less sure one first, and sky; the image is black."""
    segments = np.full((60, 80), 3, np.int32)
    segments[5:25, 5:35], segments[30:55, 40:75] = 1, 2
    infos = [
        dict(id=id, category_id=label, isthing=label < 3, score=score, area=0)
        for id, label, score in ((1, 0, 0.6), (2, 0, 0.9), (3, 3, 0.7))
    ]
    image = np.zeros((60, 80, 3), np.uint8)
    return Segmentation("panoptic", METADATA, segments=segments, segments_info=infos, image=image)


def rows_of(html):
    """The cells of the table's rows."""
    rows = re.findall(r'<tr data-segment="(\d+)".*?</tr>', html)
    assert rows == [str(i) for i in range(len(rows))]
    return [
        re.findall(r"<td>(?:<i [^>]*></i>)?(.*?)</td>", row)
        for row in re.findall(r"<tr data-segment.*?</tr>", html)
    ]


def test_one_run_of_the_model_serves_every_task_and_threshold(segmenter, opened, tmp_path):
    assert sorted(segmenter._predictor.calls) == sorted(["encode", *TASKS])
    for task in TASKS:
        for threshold in (0.0, 0.3, 1.0):
            page.show(opened, task, threshold)
    page.write_zip(opened, 0.2, str(tmp_path))
    assert len(segmenter._predictor.calls) == 4


@pytest.mark.parametrize("task", TASKS)
def test_a_result_is_that_of_the_segmenter_with_this_threshold(segmenter, opened, file, task):
    everything = opened.prediction.segmentation(task, 0.0)
    cuts = [None] if task == "semantic" else [None, 0.0, *np.quantile(everything.scores, (0.3, 1))]
    counts = []
    for threshold in cuts:
        threshold = None if threshold is None else float(threshold)
        shown = opened.prediction.segmentation(task, threshold)
        expected = segmenter(file, task, threshold=threshold)
        np.testing.assert_array_equal(shown.masks, expected.masks)
        np.testing.assert_array_equal(shown.labels, expected.labels)
        np.testing.assert_array_equal(shown.scores, expected.scores)
        counts.append(len(shown))
    if task != "semantic":
        assert counts[0] == counts[1] > counts[3], "the threshold does nothing"


def test_the_threshold_leaves_the_semantic_result_alone(opened):
    one, other = (opened.prediction.segmentation("semantic", t) for t in (None, 0.9))
    np.testing.assert_array_equal(one.class_map, other.class_map)


@pytest.mark.parametrize("task", TASKS)
def test_the_table_lists_what_the_segmentation_holds(opened, task):
    found = opened.prediction.segmentation(task, 0.0)
    html = page.show(opened, task, 0.0)
    assert f"street &lt;1&gt;.png: 70 x 48 pixels; {len(found)} segment" in html
    rows = rows_of(html)
    assert len(rows) == len(found) > 0
    for i, (name, score, area, box) in enumerate(rows):
        assert re.fullmatch(rf"{found.names[i]}( \d+)?", name)
        assert score == ("–" if found.scores is None else f"{found.scores[i]:.2f}")
        assert area == f"{found.areas[i]:,}"
        assert box == ", ".join(str(x) for x in found.boxes[i])


def test_nothing_above_the_threshold_is_an_empty_table(opened):
    html = page.show(opened, "instance", 1.0)
    assert "; 0 segments" in html
    assert rows_of(html) == []


def test_a_page_without_an_image_asks_for_one():
    assert "Drop an image" in page.show(None, "panoptic", 0.5)


def test_names_and_colours_of_the_table_are_those_of_the_picture():
    found = panoptic()
    html = view.page_of(found)
    assert [row[0] for row in rows_of(html)] == ["cat 1", "sky", "cat 2"]  # the surest is first
    swatches = [tuple(map(int, s.split(","))) for s in re.findall(r"background:rgb\((.*?)\)", html)]
    assert len(set(swatches)) == 3
    data = re.search(r'href="data:image/jpeg;base64,(.*?)"', html)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    scale = shown.shape[0] // 60
    for position, swatch in zip(((50, 70), (2, 40), (8, 8)), swatches, strict=True):
        y, x = (side * scale for side in position)
        patch = np.median(shown[y - 6 : y + 6, x - 6 : x + 6].reshape(-1, 3), axis=0)
        np.testing.assert_allclose(patch, np.array(swatch) / 2, atol=6)  # half of it over black


def test_an_outline_covers_the_pixels_of_its_segment():
    found = panoptic()
    html = view.page_of(found)
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', html).groups())
    paths = re.findall(r'<path data-segment="(\d+)" d="(.*?)">', html)
    assert {int(i) for i, _ in paths} == {0, 1, 2}
    assert int(paths[0][0]) == 1, "the largest lies lowest"
    for i, path in paths:
        rings = [
            np.array([point.split(",") for point in ring.split()], np.int32)
            for ring in path.replace("M", "").split("Z")[:-1]
        ]
        drawn = np.zeros((height, width), np.uint8)
        cv2.fillPoly(drawn, rings, 1)  # holes by the even-odd rule, as on the page
        mask = cv2.resize(found.masks[int(i)].astype(np.uint8), (width, height)) > 0
        assert (mask & (drawn > 0)).sum() > 0.98 * (mask | (drawn > 0)).sum()


def test_names_of_classes_are_text_on_the_page():
    metadata = tiny.metadata()
    names = ('<script>alert("x")</script>', *metadata.class_names[1:])
    masks = np.ones((1, 40, 40), bool)
    html = view.page_of(
        Segmentation(
            "instance",
            type(metadata)(**{**vars(metadata), "class_names": names}),
            instances=Instances(masks, np.ones(1, np.float32), np.zeros(1, np.int32)),
            image=np.zeros((40, 40, 3), np.uint8),
        )
    )
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_download_holds_what_save_writes(opened, tmp_path):
    path = page.write_zip(opened, 0.2, str(tmp_path))
    assert pathlib.Path(path).name == "street <1>.zip"
    expected = {}
    for task in TASKS:
        for file in opened.prediction.segmentation(task, 0.2).save(tmp_path, opened.name):
            expected[file.name] = file.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == expected
        instances = json.loads(archive.read("street <1>_instance.json"))
    assert all(one["score"] > 0.2 for one in instances)


def test_a_large_image_is_shrunk_and_the_page_says_so(segmenter, file, monkeypatch):
    monkeypatch.setattr(page, "KEPT_PIXELS", 48 * 70 // 4)
    found = page.open_image(segmenter, file)
    assert found.prediction.image.shape == (24, 35, 3)
    assert found.note.endswith("70 x 48 pixels, shrunk to 35 x 24")


@pytest.mark.parametrize(
    ("max_bytes", "max_pixels", "message"),
    [
        (100, 10_000, r"^street <1>\.png: [\d,]+ bytes are more than 100$"),
        (100_000, 1000, r"^street <1>\.png: 48 x 70 pixels .* more than data.max_pixels, 1,000"),
    ],
)
def test_a_file_over_a_limit_is_refused(
    segmenter, file, monkeypatch, max_bytes, max_pixels, message
):
    monkeypatch.setattr(page, "MAX_BYTES", max_bytes)
    with pytest.raises(ImageError, match=message):
        page.open_image(segmenter, file, max_pixels)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n broken"])
def test_a_file_that_is_no_image_is_named_without_its_folder(segmenter, tmp_path, content):
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        page.open_image(segmenter, str(path))
    assert str(caught.value).startswith("odd.png")
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_said_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'pip install "oneformer-jax\[demo\]"'):
        modes.demo("no such weights", "127.0.0.1", 7860)


def test_a_key_that_does_nothing_is_refused():
    with pytest.raises(ValueError, match=r"--config\.optim\.lr does nothing in prediction"):
        modes.demo("no such weights", "127.0.0.1", 7860, settings={"optim.lr": 0.1})


def test_an_exported_program_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "check", lambda: None)
    monkeypatch.setattr("oneformer_jax.load", lambda *_, **__: object())
    with pytest.raises(ValueError, match="is an exported program; name the weights"):
        modes.demo("model.stablehlo", "127.0.0.1", 7860)
    (tmp_path / "model.stablehlo").touch()
    Image.fromarray(picture()).save(tmp_path / "a.png")
    files = (tmp_path / name for name in ("model.stablehlo", "a.png"))
    with pytest.raises(ValueError, match="is an exported program; name the weights"):
        modes.predict(*map(str, files), "all", str(tmp_path / "out"))
