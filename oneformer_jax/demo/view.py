"""One result as HTML: its picture, and a table that is the legend.

An outline lies over each segment of the picture. The outline and the row of a segment have the
same `data-segment`, by which `page.SCRIPT` highlights both in the browser, without a request.
"""

from __future__ import annotations

import base64
import io
from html import escape

import cv2
import numpy as np
from PIL import Image

from oneformer_jax.eval.pictures import overlay
from oneformer_jax.eval.segmentation import Segmentation

SHOWN_PIXELS = 1 << 20  # most pixels of the picture on the page
SHOWN_SIZE = 480  # smaller images are enlarged by a whole factor


def message(text: str, kind: str = "note") -> str:
    """Returns a line of text as HTML."""
    return f'<p class="{kind}" role="status">{escape(text)}</p>'


def page_of(segmentation: Segmentation, note: str = "") -> str:
    """Returns the picture and the table of a segmentation with its image, as HTML."""
    numbers = _numbers(segmentation.labels)
    picture = segmentation.overlay(
        min_score=0.0,
        min_size=SHOWN_SIZE,
        max_pixels=SHOWN_PIXELS,
        numbers=None if segmentation.task == "semantic" else numbers,
    )
    count = f"{len(segmentation)} segment{'' if len(segmentation) == 1 else 's'}"
    parts = _figure(picture, segmentation) + _table(segmentation, numbers)
    line = message(f"{note}; {count}" if note else count)
    return f'{line}<div class="result">{parts}</div>'


def _numbers(labels: np.ndarray) -> list[int]:
    """Numbers the segments of each class from 0."""
    return [np.count_nonzero(labels[:i] == label) for i, label in enumerate(labels)]


def _figure(picture: np.ndarray, segmentation: Segmentation) -> str:
    """Returns the picture with an outline for each segment, the smallest on top."""
    height, width = picture.shape[:2]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    outlines = []
    for i in np.argsort(-segmentation.areas, kind="stable").tolist():
        mask = overlay.resized(segmentation.masks[i], (width, height)).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        corners = (cv2.approxPolyDP(c, 1.0, True)[:, 0] for c in contours)
        path = "".join(f"M{' '.join(f'{x},{y}' for x, y in points)}Z" for points in corners)
        name = escape(segmentation.names[i])
        outlines.append(f'<path data-segment="{i}" d="{path}"><title>{name}</title></path>')
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="xMinYMin" role="img">'
        f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{data}"/>'
        f"{''.join(outlines)}</svg>"
    )


def _table(segmentation: Segmentation, numbers: list[int]) -> str:
    metadata = segmentation.metadata
    rows = []
    for i, (label, box) in enumerate(zip(segmentation.labels, segmentation.boxes, strict=True)):
        color = ",".join(map(str, overlay.shade(metadata.colors[label], numbers[i])))
        name = metadata.class_names[label]
        if metadata.is_thing[label] and segmentation.task != "semantic":
            name += f" {numbers[i] + 1}"  # as in the picture
        score = "–" if segmentation.scores is None else f"{segmentation.scores[i]:.2f}"
        rows.append(
            f'<tr data-segment="{i}" tabindex="0">'
            f'<td><i style="background:rgb({color})"></i>{escape(name)}</td>'
            f"<td>{score}</td><td>{segmentation.areas[i]:,}</td>"
            f"<td>{', '.join(map(str, box.tolist()))}</td></tr>"
        )
    head = (
        "<tr><th>segment</th><th>score</th><th>area, px</th>"
        '<th title="left, top, right and bottom in pixels">box</th></tr>'
    )
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="segments">{table}</div>'
