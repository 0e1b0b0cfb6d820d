"""The report of a run: what it shows, hostile names, damaged files, comparisons."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from oneformer_jax import files, report
from oneformer_jax.configs import common
from oneformer_jax.report import charts, runs

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;\u202e\x00\'"'


class Page(html.parser.HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.text, self.open = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "line", "polyline", "circle"):
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert value.startswith("data:image/"), value[:80]
                self.images.append(value)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(path):
    page = Page(path.read_text("utf-8"))
    return page, " ".join(page.text)


def make_run(folder, *, lr=1e-4, pq=50.0, name="cat", steps=(100, 200)):
    """A workdir as a run leaves it, without the checkpoints."""
    folder.mkdir(parents=True)
    config = common.get_base()
    config.optim.lr = lr
    config.dataset.options = {"side": name}
    (folder / "config.json").write_text(config.to_json())
    texts = {"run/command": f"main.py {name}", "run/versions": "oneformer_jax 1, jax 2"}
    (folder / "texts.json").write_text(json.dumps(texts))
    lines = []
    for step in range(10, steps[-1] + 1, 10):
        time = {"elapsed": 2.0 * step, "step": 1.0, "data": 0.5, "pause": 2, "checkpoint": 1}
        line = {"step": step, "time": 1e9 + step, "loss": 100 / step, "grad_norm": None}
        lines.append(line | {f"time/{key}_seconds": value for key, value in time.items()})
        if step in steps:
            lines.append({"step": step, "time": 1e9 + step, "panoptic/PQ": pq})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 300, "lo')  # it was stopped here
    for step in steps:
        place = folder / "eval" / str(step)
        (place / "examples").mkdir(parents=True)
        results = dict(
            dataset=name,
            images=3,
            protocol="coco",
            metrics={"panoptic/PQ": pq, "instance/APl": None},
            reasons={"instance/APl": f"no {name}"},
            per_class=[{"class": name, "isthing": True, "panoptic/PQ": pq, "panoptic/tp": 3.0}],
            seconds={"data": 1.0, "predict": 2.0, "total": 3.0},
        )
        (place / "results.json").write_text(json.dumps(results))
        example = {"image": name, "score": 12.5, "mistakes": [f"1 × missed: {name}"]}
        listed = {"panoptic": {"worst": [example, example], "best": []}}
        (place / "examples.json").write_text(json.dumps(listed))
        picture = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
        picture.save(place / "confusion.png")
        picture.save(place / "examples" / "panoptic_worst_1.jpg")
    return folder


def test_a_report_shows_scores_curves_pictures_time_and_settings(tmp_path):
    folder = make_run(tmp_path / "run")
    assert report.write_report(folder) == str(folder / "report.html")
    page, text = page_of(folder / "report.html")
    for part in ("50.0", "worst: 12.5 %", "1 × missed: cat", "no cat", "The picture is missing"):
        assert part in text
    assert "3 images of step 200" in text and "oneformer_jax 1, jax 2" in text
    assert len(page.images) == 2  # the matrix and one picture of two
    assert page.tags.count("svg") == 2  # loss and PQ: no other scalar was written
    assert "optim.lr" not in text and "dataset.options.side" in text


def test_the_time_of_a_run_adds_up(tmp_path):
    parts = runs.read_run(make_run(tmp_path / "run")).time()
    assert sum(parts.values()) == pytest.approx(400)
    assert list(parts.values()) == pytest.approx([200, 100, 20, 20, 60])


def test_hostile_names_are_text_and_nothing_else(tmp_path):
    folder = make_run(tmp_path / "a<b>&", name=HOSTILE)
    report.write_report(folder)
    report.write_report(folder, [folder], tmp_path / "comparison.html")
    shown = {folder / "report.html": "</script><img src=x", tmp_path / "comparison.html": "a<b>&"}
    for path, name in shown.items():
        page, text = page_of(path)
        assert "script" not in page.tags and name in text
        raw = path.read_text("utf-8")
        assert not re.search("[\x00\u202e]", raw)
        assert "default-src 'none'" in raw and "http" not in raw.replace("http-equiv", "")


def test_a_run_that_only_began_has_a_report(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("eval", "metrics.jsonl", "texts.json"):
        (folder / name).rename(tmp_path / name)
    report.write_report(folder)
    page, text = page_of(folder / "report.html")
    assert "has not been evaluated yet" in text
    assert "svg" not in page.tags


def test_a_comparison_has_scores_curves_and_the_settings_that_differ(tmp_path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=3e-4, pq=60.0)
    make_run(tmp_path / "three", lr=3e-4)
    path = report.write_report(one, [other, tmp_path / "three"])
    assert path == str(one / "comparison.html")
    page, text = page_of(one / "comparison.html")
    assert '<span class="best">60.0</span>' in (one / "comparison.html").read_text()
    assert "optim.lr" in text and "0.0003" in text and "dataset.options" not in text
    assert page.tags.count("polyline") == 6  # loss and PQ of three runs


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[1]", "config.json holds an unexpected value"),
        ("texts.json", '{"a": 1}', "texts.json holds an unexpected value"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 2}\n', "metrics.jsonl, line 2 is damaged"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', "metrics.jsonl, line 1 holds"),
        ("metrics.jsonl", '{"loss": 1}\n', "line 1: step is None"),
        ("metrics.jsonl", '{"step": -1}\n', "line 1: step is -1"),
        ("eval/200/results.json", "{}", "results.json holds an unexpected value"),
        ("eval/200/examples.json", '{"panoptic": 1}', "examples.json holds an unexpected value"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content, message):
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(files.FileError) as caught:
        report.write_report(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(files.FileError, match="holds no run"):
        report.write_report(tmp_path)
    with pytest.raises(files.FileError, match="missing holds no run"):
        report.write_report(make_run(tmp_path / "run"), [tmp_path / "missing"])


@pytest.mark.parametrize(
    "values", [[0.0], [1e29, -1e29], [5.0] * 3, [1e-30, 2e-30], [0.0, 1e-300], [7, 7.0000001]]
)
def test_any_values_make_a_chart_inside_its_frame(values):
    chart = charts.line_chart("t", [("a", list(enumerate(values)))])
    numbers = [float(n) for n in re.findall(r'(?:cx|cy|x1|y1)="(-?[\d.]+)"', chart)]
    assert numbers and all(0 <= number <= 520 for number in numbers)
    assert 2 <= len(charts.ticks(min(values), max(values), 4)) <= 8


def test_a_long_curve_is_thinned_and_ends_with_its_last_value():
    points = [(step, float(step % 2)) for step in range(100_001)]
    chart = charts.line_chart("t", [("a", points)])
    assert len(chart) < 20_000
    assert "<b>0</b>" in chart
