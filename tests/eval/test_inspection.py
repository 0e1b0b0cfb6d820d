"""The sheet of training samples."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFont

from oneformer_jax.eval.pictures import inspection
from oneformer_jax.types import Metadata

METADATA = Metadata(
    dataset="test",
    class_names=("cat", "grass"),
    is_thing=(True, False),
    colors=((250, 0, 0), (0, 250, 0)),
    category_ids=(1, 2),
)


def make_sample(height=64, width=96, **changes):
    segment_map = np.zeros((height, width), np.uint8)
    segment_map[height // 2 :] = 1
    segment_map[: height // 2, : width // 3] = 3
    sample = inspection.Sample(
        image=np.full((height, width, 3), 128, np.uint8),
        segment_map=segment_map,
        classes=np.array([1, 0, 0], np.int32),
        valid=np.array([True, False, True]),
        task=2,
        texts=["a photo with a cat", "a photo with a grass", *["a semantic photo"] * 5],
        name="first.jpg",
    )
    return dataclasses.replace(sample, **changes)


def has_color(picture, color, tolerance=12):
    return (np.abs(picture.astype(int) - color).max(-1) <= tolerance).mean()


@pytest.mark.parametrize("shape", [(64, 96), (1024, 512), (400, 400)])
def test_image_and_targets_stand_side_by_side(shape):
    card = inspection._card(make_sample(*shape), METADATA)
    side = inspection._SIDE
    width = round(shape[1] * side / shape[0])
    assert card.shape[1] == 2 * width + inspection._GAP
    left, right = card[:side, :width], card[:side, -width:]
    assert (left == 128).all()
    # Half of the colour of the class over the grey: stuff below, a thing above it on the left.
    assert has_color(right[side // 2 :], (64, 189, 64)) > 0.8
    assert has_color(right[: side // 2, : width // 3], (189, 64, 64)) > 0.6
    assert has_color(right[: side // 2, width // 3 :], (128, 128, 128)) > 0.85
    assert (card[side:] == 255).mean() > 0.5  # text on white
    assert (card[side:] < 60).any()


def test_longer_lists_take_more_lines():
    short = inspection._card(make_sample(), METADATA)
    texts = [f"a photo with a thing number {i}" for i in range(40)]
    long = inspection._card(make_sample(texts=texts), METADATA)
    assert long.shape[0] > short.shape[0] + 5 * inspection._LINE


def test_lines_end_between_texts_and_fit():
    font = ImageFont.load_default(16)
    words = [f"{i} x “a photo with a traffic light”" for i in range(9)]
    lines = inspection._wrap("9 texts:", words, font, 600)
    assert " ".join(lines) == "9 texts: " + ", ".join(words)
    assert len(lines) > 2 and all(font.getlength(line) <= 600 for line in lines)
    assert all(line.endswith("”,") for line in lines[:-1])


def test_sheet_is_written_with_cards_of_any_height(tmp_path):
    samples = [make_sample(), make_sample(texts=[str(i) for i in range(200)]), make_sample(96, 64)]
    path = inspection.write(samples, METADATA, str(tmp_path / "new" / "folder"))
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        assert np.array_equal(picture, inspection.sheet(samples, METADATA))
        assert picture.height > 2 * inspection._SIDE  # two rows


def test_a_sample_without_targets_is_drawn():
    sample = make_sample(segment_map=np.zeros((64, 96), np.uint8), valid=np.zeros(3, bool))
    assert inspection.sheet([sample], METADATA).ndim == 3


def test_no_samples():
    with pytest.raises(ValueError, match="at least one"):
        inspection.sheet([], METADATA)


@pytest.mark.parametrize("size", [(4, 1600), (1600, 4)])
def test_the_card_of_a_strip_is_bounded(size):
    card = inspection._card(make_sample(*size), METADATA)
    assert card.shape[1] <= 2 * inspection._WIDEST + inspection._GAP
    assert card.shape[0] < 3000
