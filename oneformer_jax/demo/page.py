"""The demo page: an image in; its three segmentations, their segments and files out.

The model runs once for an image. Its logits stay in the session, so that another task or threshold
only needs the post-processing; the result is that of `segmenter(image, task, threshold=...)`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import pathlib
import signal
import tempfile
import time
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from oneformer_jax.demo import view
from oneformer_jax.eval.predict import Segmenter
from oneformer_jax.eval.prediction import Prediction
from oneformer_jax.input_pipeline import images
from oneformer_jax.types import TASKS

MAX_BYTES = 1 << 26  # of an uploaded file
MAX_PIXELS = 1 << 26  # of an uploaded image, unless the caller says otherwise
# Larger images are shrunk to as many pixels: the results of a crowded one take 150 bits a pixel.
KEPT_PIXELS = 1 << 21
SESSIONS = 8  # whose last image is kept
KEPT_SECONDS = 900  # for files of uploads and downloads

# Highlights what has the number of the element under the cursor, or in focus. A click keeps it.
SCRIPT = """
const number = event => event.target.closest("[data-segment]")?.dataset.segment;
const mark = (kind, segment) => {
  element.querySelectorAll("." + kind).forEach(x => x.classList.remove(kind));
  element.querySelectorAll(`[data-segment="${segment}"]`).forEach(x => x.classList.add(kind));
};
for (const type of ["mouseover", "focusin"])
  element.addEventListener(type, event => mark("lit", number(event)));
element.addEventListener("mouseleave", () => mark("lit"));
element.addEventListener("click", event => {
  mark("kept", event.target.closest(".kept") ? undefined : number(event));
  element.querySelector("tr.kept")?.scrollIntoView({block: "nearest"});
});
"""
STYLE = """
.result { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
svg, .segments { max-height: max(400px, calc(100vh - 370px)); }
svg { flex: 3 1 400px; min-width: 0; max-width: 100%; overflow: hidden; }
.segments { flex: 2 1 340px; overflow: auto; }
table { width: 100%; margin: 0; border: 0; border-collapse: collapse;
  color: var(--body-text-color); }
tr { border: 0; }
th, td { padding: 4px 8px; text-align: right; white-space: nowrap; border: 0;
  border-bottom: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--body-background-fill); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr[data-segment], path { cursor: pointer; }
i { display: inline-block; width: 14px; height: 14px; margin-right: 8px; border-radius: 3px;
  vertical-align: -2px; border: 1px solid var(--border-color-primary); }
path { fill: transparent; fill-rule: evenodd; stroke: none; }
path.lit, path.kept { fill: rgb(255 255 255 / 0.25); stroke: white; stroke-width: 3;
  filter: drop-shadow(0 0 2px black); }
tr.lit, tr.kept { background: var(--color-accent-soft); }
tr.kept td:first-child { font-weight: 600; }
tr:focus-visible { outline: 2px solid var(--color-accent); outline-offset: -2px; }
.error { color: var(--error-text-color, #b91c1c); font-weight: 600; }
"""


@dataclasses.dataclass(frozen=True)
class Opened:
    """The image of a session: its name, what was done to it, and the model's answer."""

    name: str
    note: str
    prediction: Prediction


def open_image(segmenter: Segmenter, path: str, max_pixels: int = MAX_PIXELS) -> Opened:
    """Reads an image file, shrinks it to `KEPT_PIXELS`, and runs the model once for all tasks.

    Raises:
      ImageError: it cannot be read, or is larger than `MAX_BYTES` or `max_pixels`.
    """
    name = pathlib.Path(path)
    if (length := os.path.getsize(path)) > MAX_BYTES:
        raise images.ImageError(f"{name.name}: {length:,} bytes are more than {MAX_BYTES:,}")
    image = images.decode_image(images.read_file(path), name.name, max_pixels=max_pixels)
    height, width = image.shape[:2]
    note = f"{name.name}: {width} x {height} pixels"
    if height * width > KEPT_PIXELS:
        shrink = (KEPT_PIXELS / (height * width)) ** 0.5
        size = (max(1, int(width * shrink)), max(1, int(height * shrink)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        note += f", shrunk to {size[0]} x {size[1]}"
    return Opened(name.stem, note, segmenter.predict(image, TASKS))


def show(opened: Opened | None, task: str, threshold: float) -> str:
    """Returns a task's result as HTML: see `view`."""
    if opened is None:
        return view.message("Drop an image above.")
    return view.page_of(opened.prediction.segmentation(task, threshold), opened.note)


def write_zip(opened: Opened, threshold: float, folder: str) -> str:
    """Writes what `Segmentation.save` writes for each task into NAME.zip in `folder`."""
    path = os.path.join(folder, f"{opened.name}.zip")
    with tempfile.TemporaryDirectory() as files, zipfile.ZipFile(path, "w") as archive:
        for task in TASKS:
            result = opened.prediction.segmentation(task, threshold)
            for file in result.save(files, opened.name):
                archive.write(file, file.name, zipfile.ZIP_DEFLATED)
    return path


def check() -> None:
    """Raises ValueError if gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            'the demo page needs gradio, which is missing: pip install "oneformer-jax[demo]"'
        )


def build(segmenter: Segmenter, threshold: float | None, max_pixels: int) -> Any:
    """Makes the page, a `gradio.Blocks`; see `serve`."""
    import gradio as gr

    if threshold is None:
        threshold = segmenter.postprocess.object_mask_threshold

    def opened_and_shown(path: str, task: str, threshold: float) -> tuple[Any, str, None]:
        try:
            opened = open_image(segmenter, path, max_pixels)
            return opened, show(opened, task, threshold), None  # the field is free for the next
        except (ValueError, OSError) as error:
            return None, view.message(str(error), "error"), None

    def downloaded(opened: Opened | None, threshold: float) -> str | None:
        if opened is None:
            gr.Warning("Drop an image first.")
            return None
        return write_zip(opened, threshold, tempfile.mkdtemp(dir=download.GRADIO_CACHE))

    title = f"OneFormer: {segmenter.metadata.num_classes} classes of {segmenter.metadata.dataset}"
    with gr.Blocks(
        title="OneFormer", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.Markdown(f"## {view.escape(title)}")
        state = gr.State()
        with gr.Row():
            file = gr.File(label="Image", height=228, elem_id="image")
            with gr.Column():
                task = gr.Radio(TASKS, value="panoptic", label="Task", elem_id="task")
                slider = gr.Slider(
                    0, 1, threshold, step=0.01, label="Threshold", elem_id="threshold",
                    info="Segments whose score is above it are shown; semantic ones have no score.",
                )  # fmt: skip
                button = gr.Button("Download the files of all tasks", elem_id="files")
                download = gr.DownloadButton(visible="hidden", elem_id="download")
        result = gr.HTML(
            show(None, "panoptic", threshold),
            css_template=STYLE,
            js_on_load=SCRIPT,
            elem_id="result",
        )
        # One at a time: all of these use the model's device.
        how = dict(concurrency_id="model", api_visibility="private", show_progress_on=result)
        choice = [task, slider]
        file.upload(opened_and_shown, [file, *choice], [state, result, file], **how)
        for control in (task, slider):
            control.change(show, [state, *choice], result, trigger_mode="always_last", **how)
        button.click(downloaded, [state, slider], download, **how).success(
            fn=None, js="() => document.querySelector('#download')?.click()"
        )
    return page


def serve(
    segmenter: Segmenter,
    host: str,
    port: int,
    *,
    threshold: float | None = None,
    max_pixels: int | None = None,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM; then its temporary files are deleted.

    Args:
      segmenter: the model.
      host, port: the address.
      threshold: where the slider begins; None is the model's object mask threshold.
      max_pixels: largest image that is read; None is `MAX_PIXELS`.

    Raises:
      OSError: the address cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="oneformer_demo_") as folder:
        # Gradio reads both when it is imported. It is to report nothing to its makers.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio as gr

        logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log requests to itself
        page = build(segmenter, threshold, max_pixels or MAX_PIXELS)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=MAX_BYTES,
                state_session_capacity=SESSIONS,
                ssr_mode=False,
                footer_links=[],
                theme=gr.themes.Default(  # of fonts that are there: no request leaves the machine
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
            )
            print(f"The demo page is at {page.local_url} (Ctrl-C ends it)", flush=True)
            while True:
                time.sleep(1)
        except OSError as error:
            raise OSError(
                f"the page cannot be served at {host}:{port}: it is in use, or not an "
                "address of this machine; choose another --port or --host"
            ) from error
        except KeyboardInterrupt:
            pass
        finally:
            page.close(verbose=False)
