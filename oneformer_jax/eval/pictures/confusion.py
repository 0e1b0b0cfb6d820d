"""The matrix of confused classes: cut to what can be read, and as a picture."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from oneformer_jax.eval.metrics.iou import Pairs
from oneformer_jax.eval.pictures import sheets

_CELL, _NAME, _GAP = 34, 190, 14  # pixels: a cell, the longest name, margins
_INK, _PALE, _RIGHT, _WRONG = (25, 25, 30), (243, 243, 246), (27, 98, 178), (196, 62, 22)


class Confusion(typing.NamedTuple):
    """Pixels of true classes (rows) that are predicted as classes (columns).

    Attributes:
      names: N names, of the rows and the columns; the last may be the sum of all other classes.
      pixels: int64 [N, N].
    """

    names: list[str]
    pixels: np.ndarray

    def shares(self) -> np.ndarray:
        """Returns `pixels` normalised by row, float64 [N, N]; NaN for a class without pixels."""
        whole = self.pixels.sum(axis=1, keepdims=True)
        nan = np.full(self.pixels.shape, np.nan)
        return np.divide(self.pixels, whole, out=nan, where=whole > 0)


def most_confused(
    names: Sequence[str],
    pairs: Pairs,
    most: int,
    *,
    absent: bool = False,
) -> Confusion:
    """Makes the matrix of at most `most` classes, in order of their ids.

    Args:
      names: of the K classes.
      pairs: see `MeanIoU.pairs`.
      most: if there are more classes, those with the most wrong pixels are kept, as truth or as
        prediction, and the others are summed up in a last row and column.
      absent: keep classes that are neither true nor predicted.
    """
    true, predicted, pixels = pairs
    wrong = np.zeros(len(names), np.int64)
    for classes in (true, predicted):
        np.add.at(wrong, classes, np.where(true == predicted, 0, pixels))
    there = np.arange(len(names)) if absent else np.unique(np.concatenate([true, predicted]))
    kept = there
    if len(there) > most:
        kept = np.sort(there[np.argsort(-wrong[there], kind="stable")[: most - 1]])
    place = np.full(len(names), len(kept))
    place[kept] = np.arange(len(kept))
    shown = [names[c] for c in kept.tolist()]
    if rest := len(there) - len(kept):
        shown.append(f"{rest} other classes")
    table = np.zeros((len(shown), len(shown)), np.int64)
    np.add.at(table, (place[true], place[predicted]), pixels)
    return Confusion(shown, table)


def draw(confusion: Confusion) -> np.ndarray:
    """Draws percent of each row: the right ones in blue, the wrong ones in red.

    Returns:
      uint8 [H, W, 3] RGB on white.
    """
    names = [_plain(name) for name in confusion.names]
    font = ImageFont.load_default(15)
    small = ImageFont.load_default(12)
    fitted = [sheets.fit_text(name, 15, _NAME) for name in names]
    room = round(max([f.getlength(text) for text, f in fitted], default=0)) + 2 * _GAP
    title = "percent of a true class (row) that is predicted as a class (column)"
    top, side = room + 2 * _GAP + 16, len(names) * _CELL
    width = max(room + side + _GAP, round(font.getlength(title)) + 2 * _GAP)
    picture = Image.new("RGB", (width, top + side + _GAP), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    pen.text((_GAP, _GAP), title, font=font, fill=_INK)
    for i, (text, own) in enumerate(fitted):
        middle = i * _CELL + _CELL // 2
        pen.text((room - 8, top + middle - 1), text, font=own, anchor="rm", fill=_INK)
        label = Image.new("RGB", (room, _CELL), (255, 255, 255))
        start = (8, _CELL // 2)
        ImageDraw.Draw(label).text(start, text, font=own, anchor="lm", fill=_INK)
        picture.paste(label.rotate(90, expand=True), (room + i * _CELL, top - room))
    for (row, column), share in np.ndenumerate(confusion.shares()):
        x, y = room + column * _CELL, top + row * _CELL
        strength = 0.0 if np.isnan(share) else float(share) ** 0.6  # small shares are seen, too
        full = np.array(_RIGHT if row == column else _WRONG)
        colour = np.round(np.array(_PALE) * (1 - strength) + full * strength).astype(int)
        pen.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=tuple(colour.tolist()))
        if np.isnan(share):
            number = "–"
        elif 0 < share < 0.005:
            number = "·"  # some, but less than one percent
        else:
            number = f"{100 * share:.0f}" if share else ""
        center = (x + _CELL / 2 - 1, y + _CELL / 2 - 1)
        ink = (255, 255, 255) if strength > 0.5 else _INK
        pen.text(center, number, font=small, anchor="mm", fill=ink)
    return np.asarray(picture)


def _plain(name: str) -> str:
    """Makes one line of printable characters of a name; Pillow refuses to place others."""
    return " ".join("".join(c if c.isprintable() else " " for c in name[:200]).split()) or "–"
