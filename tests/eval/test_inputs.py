"""Anything that people have becomes the image of a prediction, or one clear error."""

import numpy as np
import pytest
from PIL import Image

from oneformer_jax.eval import inputs
from oneformer_jax.input_pipeline.images import ImageError
from tests.eval.tiny_segmenter import picture

RGB = picture(20, 30)
GREY = RGB[..., 0]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_pil_images_of_every_mode_are_read_as_pil_converts_them(mode):
    given = Image.fromarray(GREY).convert("L") if mode in ("LA",) else Image.fromarray(RGB)
    given = given.convert("RGB").convert("LAB") if mode == "LAB" else given.convert(mode)
    found = inputs.as_image(given)
    assert found.dtype == np.uint8 and found.shape == (20, 30, 3)
    if mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(found, RGB)
    if mode in ("L", "LA"):
        np.testing.assert_array_equal(found, np.asarray(given.convert("RGB")))


def test_files_pil_images_and_arrays_of_16_bits_are_scaled_alike(tmp_path):
    deep = np.linspace(0, 4095, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    from_file = inputs.as_image(tmp_path / "deep.png")
    assert from_file.max() == 255 and from_file.shape == (20, 30, 3)
    for given in (str(tmp_path / "deep.png"), Image.open(tmp_path / "deep.png"), deep):
        np.testing.assert_array_equal(inputs.as_image(given), from_file)
    as_int = Image.fromarray(deep.astype(np.int32))
    assert as_int.mode == "I"
    np.testing.assert_array_equal(inputs.as_image(as_int), from_file)


def test_the_orientation_of_a_pil_image_is_applied_as_that_of_its_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(RGB, k=-1)
    np.testing.assert_array_equal(inputs.as_image(tmp_path / "turned.png"), expected)
    np.testing.assert_array_equal(inputs.as_image(Image.open(tmp_path / "turned.png")), expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB, RGB),
        (np.dstack([RGB, GREY]), RGB),
        (GREY, np.dstack([GREY] * 3)),
        (GREY[..., None], np.dstack([GREY] * 3)),
        (GREY > 100, np.dstack([(GREY > 100) * np.uint8(255)] * 3)),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
        ((RGB / 255).astype(np.float16), RGB),
    ],
)
def test_arrays_of_every_kind(array, expected):
    found = inputs.as_image(array)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8 and found.flags.c_contiguous


def test_an_rgb_array_is_not_copied():
    assert inputs.as_image(RGB) is RGB


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (RGB.transpose(2, 0, 1), r"uint8 \[3, 20, 30\].*image\.transpose\(1, 2, 0\)"),
        (RGB[None], "give several images as a list"),
        (RGB[..., :2], "1, 3 or 4 channels"),
        (RGB[:0], "no pixels"),
        (RGB.astype(np.int64), "int64 .*expected uint8"),
        (RGB.astype(np.float32), "from 0 to 25.*floats must be from 0 to 1"),
        (RGB / 255 - 0.5, "floats must be from 0 to 1"),
        (np.full((4, 4), np.nan), "nan.*floats must be from 0 to 1"),
        (np.array("text"), "expected"),
        (RGB.tolist(), "not list; several images are given as one flat list"),
        (None, "not NoneType"),
        (RGB.tobytes(), "not bytes"),
        (3, "not int"),
        (Image.fromarray(np.zeros((3, 3), np.float32)), "floating-point values"),
        (Image.fromarray(np.full((3, 3), 70_000, np.int32)), "70000 have no known range"),
        ("nowhere.jpg", r"nowhere\.jpg: there is no such image file"),
    ],
)
def test_what_is_no_image_is_refused_with_the_way_out(given, words):
    with pytest.raises(ValueError, match=words):
        inputs.as_image(given)


def test_a_pil_image_that_is_cut_or_too_large_is_refused(tmp_path):
    Image.fromarray(picture(60, 60)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"cut\.png cannot be decoded"):
        inputs.as_image(Image.open(tmp_path / "cut.png"))
    with pytest.raises(ImageError, match=r"20 x 30 pixels .* more than 599"):
        inputs.as_image(Image.fromarray(RGB), max_pixels=599)
