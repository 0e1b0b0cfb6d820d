"""Maps of labels: exact samples of every depth and format, or an error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oneformer_jax.input_pipeline import images, records
from tests.input_pipeline import image_files
from tests.input_pipeline.image_files import (
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    animated,
    photo,
    png,
    saved,
    white_is_zero,
)

PHOTO = photo()
LUMA = PHOTO[..., 0].copy()
DEEP = (LUMA.astype(np.uint16) << 4) + 7  # 12 bits in 16


@given(
    bits=st.sampled_from([1, 2, 4, 8, 16]),
    indexed=st.booleans(),
    height=st.integers(1, 9),
    width=st.integers(1, 19),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_samples_are_exact_at_every_depth(bits, indexed, height, width, seed):
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, 1 << bits, (height, width))
    if indexed and bits <= 8:
        colors = rng.integers(0, 256, (1 << bits, 3), np.uint8)
        data = png(samples, bits, PALETTE, image_files.palette(colors))
        with_colors = images.decode_samples(data, "a", palette=True)
        np.testing.assert_array_equal(with_colors, colors[samples])
    else:
        data = png(samples, bits)
    found = images.decode_samples(data, "a")
    assert found.dtype == (np.uint16 if bits == 16 else np.uint8)
    np.testing.assert_array_equal(found, samples)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits"])
@pytest.mark.parametrize(
    "samples",
    [LUMA, DEEP, DEEP.astype(np.int32), LUMA > 99, PHOTO],
    ids=["8", "16", "32", "1", "rgb"],
)
def test_samples_of_a_tiff_are_exact(samples, compression):
    found = images.decode_samples(saved(samples, "TIFF", compression=compression), "a")
    np.testing.assert_array_equal(found, samples)


def test_samples_of_a_palette_in_tiff_are_its_indices():
    indexed = Image.fromarray(PHOTO).quantize(9)
    found = images.decode_samples(saved(indexed, "TIFF"), "a")
    np.testing.assert_array_equal(found, np.asarray(indexed))


def test_colours_of_a_map_keep_their_order_and_lose_their_alpha():
    deep = PHOTO.astype(np.uint16) * 200
    for data, expected in (
        (png(PHOTO, 8, RGB), PHOTO),
        (png(np.dstack([PHOTO, LUMA]), 8, RGBA), PHOTO),
        (png(deep, 16, RGB), deep),
        (png(np.dstack([deep, DEEP]), 16, RGBA), deep),
    ):
        np.testing.assert_array_equal(images.decode_samples(data, "a"), expected)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (saved(LUMA, "JPEG"), "this is JPEG, which changes values"),
        (saved(PHOTO, "WebP"), "must be a PNG"),
        (png(np.dstack([LUMA, LUMA]), 8, GREY_ALPHA), "grey and alpha"),
        (animated(PHOTO, "PNG"), "one frame"),
        (saved(DEEP.astype(np.float32), "TIFF"), "whole numbers from 0 to 65535"),
        (saved(DEEP.astype(np.int32) * 99, "TIFF"), "whole numbers from 0 to 65535"),
        (white_is_zero(LUMA), "zero is white"),
        (saved(LUMA, "TIFF", compression="jpeg"), "compressed by jpeg"),
        (png(LUMA, 8)[:-40], "truncated"),
    ],
)
def test_maps_whose_values_are_not_exact_are_refused(data, words):
    with pytest.raises(images.ImageError, match=rf"a\.png: .*{words}"):
        images.decode_samples(data, "a.png")


@pytest.mark.parametrize("form", ["rgb", "rgba", "palette"])
def test_a_panoptic_map_may_have_alpha_or_a_palette(form):
    ids = np.array([[1, 300], [70_000, 0]], np.int32)
    pixels = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
    data = {
        "rgb": lambda: png(pixels, 8, RGB),
        "rgba": lambda: png(np.dstack([pixels, [[0, 9], [255, 1]]]), 8, RGBA),
        "palette": lambda: png(
            np.arange(4).reshape(2, 2), 2, PALETTE, image_files.palette(pixels.reshape(4, 3))
        ),
    }[form]()
    table = records.SegmentTable.from_lists([1, 300, 70_000], [0] * 3, [0] * 3, [1] * 3)
    numbers = records.decode_panoptic(data, table, "a")
    np.testing.assert_array_equal(records.with_ids(numbers, table), ids)
