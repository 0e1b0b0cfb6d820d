"""The demo page in a real browser, served by the command; screenshots in light and dark."""

import io
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from oneformer_jax.train import checkpoint
from tests.eval.tiny_segmenter import CONFIG, METADATA, picture, state

pytest.importorskip("gradio", reason="the extra `demo`, of 200 MB with what it needs")
playwright = pytest.importorskip("playwright.sync_api", reason="it drives a browser")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Drops files on an element as a person does.
DROP = """(element, [name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name));
  for (const type of ["dragenter", "dragover", "drop"])
    element.dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true}));
}"""
# Finds a point of the picture at which an outline lies, and the number of its segment.
POINT = """() => {
  const box = document.querySelector("#result .result svg").getBoundingClientRect();
  for (let y = box.top + 3; y < box.bottom; y += 7)
    for (let x = box.left + 3; x < box.right; x += 7) {
      const segment = document.elementFromPoint(x, y)?.dataset?.segment;
      if (segment !== undefined) return [x, y, segment];
    }
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        path = shutil.which("chromium") or started.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("there is no Chromium: apt-get install chromium")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    params, stats = state()
    settings = {"eval": {"short_edge": 64, "max_size": 96, "overlap_threshold": 0.0}}
    trained = checkpoint.Trained(CONFIG.to_dict(), params, stats, METADATA, settings, step=0)
    checkpoint.write_converted(path, trained)
    return path


@pytest.fixture
def served(workdir, tmp_path):
    """The address of the page; its temporary files are in `tmp_path`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "main.py"), "--mode=demo", f"--workdir={workdir}"]
    command += [f"--port={port}", "--threshold=0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, line
        yield address[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not list(tmp_path.iterdir()), "temporary files are left"


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def drop(page, name, content):
    page.locator("#image button").first.wait_for()
    page.locator("#image button").first.evaluate(DROP, [name, list(content)])


def wait_for_line(page, pattern):
    line = page.locator("#result p")
    playwright.expect(line).to_have_text(re.compile(pattern), timeout=60_000)
    return line.inner_text()


def shown(page):
    """The picture and the rows of the table."""
    href = page.locator("#result .result image").get_attribute("href")
    return href, page.locator("#result tbody tr").all_inner_texts()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_dropped_image_is_segmented_shown_and_downloaded(
    browser, served, theme, tmp_path_factory
):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{served}?__theme={theme}")
    drop(page, "street.png", png(picture(seed=3)))
    wait_for_line(page, r"^street\.png: 70 x 48 pixels; \d+ segments?$")
    results = {"panoptic": shown(page)}
    for task in ("instance", "semantic"):
        page.get_by_label(task).check()
        playwright.expect(page.locator("#result .result image")).not_to_have_attribute(
            "href", results[list(results)[-1]][0]
        )
        results[task] = shown(page)
    pictures, tables = zip(*results.values(), strict=True)
    assert len(set(pictures)) == 3
    assert len({str(rows) for rows in tables}) == 3
    assert all(tables)

    page.get_by_label("instance").check()
    playwright.expect(page.locator("#result .result image")).to_have_attribute(
        "href", results["instance"][0]
    )
    scores = [float(row.split("\t")[1]) for row in results["instance"][1]]
    threshold = round(min(scores) + 0.02, 2)
    number = page.locator("#threshold input[type=number]")
    number.fill(str(threshold))
    number.press("Tab")
    wait_for_line(page, rf"; (?!{len(scores)} )\d+ segments?$")
    fewer = [float(row.split("\t")[1]) for row in shown(page)[1]]
    assert all(score >= threshold for score in fewer)
    assert len(fewer) < len(scores)
    number.fill("0")
    number.press("Tab")
    wait_for_line(page, rf"; {len(scores)} segments$")

    page.wait_for_timeout(500)  # the last answer has come, its pieces may not have
    before = len(requests)
    x, y, segment = page.evaluate(POINT)
    page.mouse.move(x, y)
    playwright.expect(page.locator("#result tr.lit")).to_have_attribute("data-segment", segment)
    page.mouse.click(x, y)
    page.mouse.move(2, 2)
    playwright.expect(page.locator("#result .lit")).to_have_count(0)
    assert page.locator("#result tr.kept").get_attribute("data-segment") == segment
    page.locator("#result tbody tr").nth(1).hover()
    playwright.expect(page.locator("#result path.lit")).to_have_attribute("data-segment", "1")
    assert len(requests) == before, "a highlight asked the server"
    folder = pathlib.Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    page.screenshot(path=folder / f"{theme}.png")
    background = np.asarray(Image.open(folder / f"{theme}.png").convert("L"))[-2, -2]
    assert (background > 200) == (theme == "light")

    with page.expect_download() as download:
        page.locator("#files").click()
    assert download.value.suggested_filename == "street.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        assert len(archive.namelist()) == 7

    drop(page, "broken.png", b"\x89PNG\r\n\x1a\n")
    wait_for_line(page, r"^broken\.png")
    assert page.locator("#result .result").count() == 0
    drop(page, "next.png", png(picture(seed=4)))
    wait_for_line(page, r"^next\.png: 70 x 48 pixels")
    assert not errors
    assert all(url.startswith((served, "data:", "blob:")) for url in requests)
