"""Sheets of titled pictures side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont  # what `ImageFont.load_default` may give

_INK = (25, 25, 30)


def scale(shape: Sequence[int]) -> float:
    return math.sqrt(shape[0] * shape[1])


def contact_sheet(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    columns: int,
    cell: tuple[int, int] = (360, 360),
) -> np.ndarray:
    """Arranges pictures in a grid on white, each below its title.

    Args:
      images: uint8 [H, W, 3] RGB pictures of any sizes; each is fitted into its cell.
      titles: one line per picture.
      columns: pictures in a row.
      cell: largest height and width of a picture, in pixels.

    Returns:
      uint8 [rows of cells, columns of cells, 3] RGB; rows and columns of small pictures are
      narrower.

    Raises:
      ValueError: no pictures, or another number of titles.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    if len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images")
    columns = min(len(images), columns)
    pictures = [_fit(np.asarray(image), cell) for image in images]
    gap = max(6, round(0.03 * scale(cell)))
    font_size = max(10, round(0.045 * scale(cell)))
    band = round(1.6 * font_size)
    grid = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(p.shape[0] for p in row) for row in grid]
    widths = [max(p.shape[1] for p in pictures[c::columns]) for c in range(columns)]
    size = (sum(widths) + gap * (columns + 1), sum(heights) + (gap + band) * len(grid) + gap)
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    y = gap
    for r, row in enumerate(grid):
        x = gap
        for c, picture in enumerate(row):
            middle = x + widths[c] // 2
            text, font = fit_text(titles[r * columns + c], font_size, widths[c] + gap // 2)
            draw.text((middle, y + band / 2), text, font=font, anchor="mm", fill=_INK)
            offset = (heights[r] - picture.shape[0]) // 2
            position = (middle - picture.shape[1] // 2, y + band + offset)
            sheet.paste(Image.fromarray(picture), position)
            x += widths[c] + gap
        y += heights[r] + band + gap
    return np.asarray(sheet)


def _fit(image: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """Resizes to the largest size that fits into the cell, aspect kept."""
    height, width = image.shape[:2]
    factor = min(cell[0] / height, cell[1] / width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    method = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size, method))


def fit_text(text: str, size: int, width: int) -> tuple[str, Font]:
    """Shrinks the font, then cuts the text, until it is at most `width` pixels wide."""
    font = ImageFont.load_default(size)
    while font.getlength(text) > width and size > 10:
        size -= 1
        font = ImageFont.load_default(size)
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text, font
