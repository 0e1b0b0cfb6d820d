"""Sheet of training samples: the image, its targets, and its text list."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from oneformer_jax.eval.pictures import overlay, sheets
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.types import TASKS, Metadata

BATCH_KEYS = ("image", "segment_map", "classes", "valid", "task")
_SIDE = 400  # height of a picture in pixels, less for one that would be wider than the next
_WIDEST = 1200
_FONT = 16
_LINE = 21
_GAP = 6
_INK = (25, 25, 30)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One row of a training batch: its BATCH_KEYS, its texts, and a name.

    Attributes:
      image: uint8 [H, W, 3] RGB.
      segment_map: uint8 [H, W]; 0 is no segment, i + 1 is slot i.
      classes: int32 [M].
      valid: bool [M].
      task: index into TASKS.
      texts: the text list in order.
      name: name of the image.
    """

    image: np.ndarray
    segment_map: np.ndarray
    classes: np.ndarray
    valid: np.ndarray
    task: int
    texts: Sequence[str]
    name: str


def write(samples: Sequence[Sample], metadata: Metadata, folder: str) -> str:
    """Writes the `sheet` of the samples into `folder`, made if missing; returns its path."""
    picture = Image.fromarray(sheet(samples, metadata))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "samples.png")
    picture.save(path)
    return path


def sheet(samples: Sequence[Sample], metadata: Metadata, columns: int = 2) -> np.ndarray:
    """Draws each sample as image and image with targets side by side, above its texts.

    Returns:
      uint8 [height, width, 3] RGB.

    Raises:
      ValueError: no samples.
    """
    cards = [_card(sample, metadata) for sample in samples]
    height = max((card.shape[0] for card in cards), default=1)
    width = max((card.shape[1] for card in cards), default=1)
    cards = [
        np.pad(card, ((0, height - len(card)), (0, 0), (0, 0)), constant_values=255)
        for card in cards
    ]
    titles = [
        f"{TASKS[s.task]}  ·  {s.name}  ·  {s.valid.sum()} of {len(s.valid)} slots" for s in samples
    ]
    return sheets.contact_sheet(cards, titles, columns=columns, cell=(height, width))


def _card(sample: Sample, metadata: Metadata) -> np.ndarray:
    height, width = sample.image.shape[:2]
    factor = min(_SIDE / height, _WIDEST / width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image, segments = sample.image, sample.segment_map
    if factor < 1:  # before labels and outlines are drawn readably
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        segments = cv2.resize(segments, size, interpolation=cv2.INTER_NEAREST)
    target = Segmentation(
        # Drawn as segments, because the targets of no task overlap.
        task="panoptic",
        metadata=metadata,
        segments=segments,
        segments_info=[
            {"id": int(slot) + 1, "category_id": int(sample.classes[slot]), "score": 1.0}
            for slot in np.flatnonzero(sample.valid)
        ],
    )
    # Small images are drawn larger than shown, so outlines follow the pixels.
    drawn = overlay.draw(image, target, min_size=_SIDE)
    drawn = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    gap = np.full((len(image), _GAP, 3), 255, np.uint8)
    return _with_caption(np.concatenate([image, gap, drawn], 1), sample)


def _with_caption(picture: np.ndarray, sample: Sample) -> np.ndarray:
    """Puts the picture on white above its text list; equal texts are counted."""
    font = ImageFont.load_default(_FONT)
    counts = Counter(sample.texts)
    words = [f"{count} x “{text}”" if count > 1 else f"“{text}”" for text, count in counts.items()]
    lines = _wrap(f"{len(sample.texts)} texts:", words, font, picture.shape[1])
    height, width = picture.shape[:2]
    result = Image.new("RGB", (width, height + _GAP + _LINE * len(lines)), (255, 255, 255))
    result.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(result)
    for number, line in enumerate(lines):
        position = (0, height + _GAP + _LINE * number)
        draw.text(position, line, font=font, fill=_INK)
    return np.asarray(result)


def _wrap(start: str, words: Sequence[str], font: sheets.Font, width: int) -> list[str]:
    """Breaks text between words into lines of at most `width` pixels, or one wider word."""
    lines = [start]
    for i, word in enumerate(words):
        word += "," * (i < len(words) - 1)
        longer = f"{lines[-1]} {word}"
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
