"""Image files of every mode, depth and format, damaged ones and hostile ones."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oneformer_jax.eval import inputs
from oneformer_jax.input_pipeline import images, records, sources
from tests.input_pipeline import image_files
from tests.input_pipeline.image_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    animated,
    chunk,
    orientation,
    photo,
    png,
    saved,
    white_is_zero,
)

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
PHOTO = photo()
LUMA = PHOTO[..., 0].copy()
DEEP = (LUMA.astype(np.uint16) << 4) + 7  # 12 bits in 16
COLORS = RNG.integers(0, 256, (256, 3), np.uint8)


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, -1)


def of_12_bits(samples):
    return np.floor(samples.astype(float) * 255 / 4095 + 0.5).astype(np.uint8)


def low_bits(bits):
    return LUMA >> (8 - bits)


def pillow(image):
    """Reads a saved file by Pillow, whose conversion is the rule here."""
    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def from_files():
    """(name, ending, content, pixels that must come out or a function of the content)."""
    rgb = Image.fromarray(PHOTO)
    alpha = np.dstack([PHOTO, LUMA])
    grey_alpha = np.dstack([LUMA, PHOTO[..., 1]])
    indexed = rgb.quantize(17)
    for kind, options in {
        "PNG": {},
        "TIFF": {},
        "TIFF lzw": {"compression": "tiff_lzw"},
        "TIFF deflate": {"compression": "tiff_adobe_deflate"},
        "BMP": {},
        "WebP": {"lossless": True},
        "PPM": {},
    }.items():
        name, ending = kind.split()[0], "." + kind.split()[0].lower()
        yield f"{kind} rgb", ending, saved(rgb, name, **options), PHOTO
        if name != "WebP":
            yield f"{kind} grey", ending, saved(LUMA, name, **options), grey(LUMA)
    for bits in (1, 2, 4, 8):
        samples, top = low_bits(bits), (1 << bits) - 1
        yield f"PNG grey {bits}", ".png", png(samples, bits), grey(samples * (255 // top))
        table = image_files.palette(COLORS[: top + 1])
        yield f"PNG palette {bits}", ".png", png(samples, bits, PALETTE, table), COLORS[samples]
        clear = table + chunk(b"tRNS", bytes([0, 200]))
        yield f"PNG clear {bits}", ".png", png(samples, bits, PALETTE, clear), COLORS[samples]
    for name, ending in (("PNG", ".png"), ("TIFF", ".tif"), ("WebP", ".webp")):
        options = {"lossless": True, "exact": True} if name == "WebP" else {}
        yield f"{name} alpha", ending, saved(alpha, name, **options), PHOTO
    yield "PNG grey alpha", ".png", png(grey_alpha, 8, GREY_ALPHA), grey(LUMA)
    yield "PNG grey clear", ".png", png(LUMA, 8, GREY, chunk(b"tRNS", b"\0\7")), grey(LUMA)
    yield "TIFF grey alpha", ".tif", saved(Image.fromarray(grey_alpha, "LA"), "TIFF"), grey(LUMA)
    for name, ending in (("PNG", ".png"), ("TIFF", ".tiff"), ("BMP", ".bmp"), ("PPM", ".pbm")):
        data = saved(Image.fromarray(LUMA > 99), name)
        yield f"{name} one bit", ending, data, grey((LUMA > 99) * 255)
    for name, ending in (("GIF", ".gif"), ("TIFF", ".tif"), ("BMP", ".bmp"), ("PNG", ".png")):
        yield f"{name} palette", ending, saved(indexed, name), np.asarray(indexed.convert("RGB"))
    yield "TIFF white is zero", ".tif", white_is_zero(LUMA), grey(LUMA)
    yield "JPEG rgb", ".jpg", saved(rgb, "JPEG", quality=95), pillow(rgb)
    yield "JPEG grey", ".jpeg", saved(LUMA, "JPEG"), pillow(rgb)
    yield "JPEG progressive", ".JPG", saved(rgb, "JPEG", progressive=True), pillow(rgb)
    yield "JPEG CMYK", ".jpg", saved(rgb.convert("CMYK"), "JPEG"), pillow(rgb)
    yield "TIFF CMYK", ".tif", saved(rgb.convert("CMYK"), "TIFF"), pillow(rgb)
    yield "TIFF YCbCr", ".tif", saved(rgb.convert("YCbCr"), "TIFF"), pillow(rgb)
    yield "WebP lossy", ".webp", saved(rgb, "WebP"), pillow(rgb)
    for name, ending in (("PNG", ".png"), ("TIFF", ".tif")):
        yield f"{name} 12 of 16 bits", ending, saved(DEEP, name), grey(of_12_bits(DEEP))
    wide = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]])
    yield "PNG rgb 12 of 16 bits", ".png", png(wide, 16, RGB), of_12_bits(wide)
    yield "PNG rgba 16 bits", ".png", png(np.dstack([wide, DEEP * 16]), 16, RGBA), of_12_bits(wide)
    deep_alpha = np.dstack([DEEP, np.full_like(DEEP, 65_535)])
    data = png(deep_alpha, 16, GREY_ALPHA)
    yield "PNG grey alpha 16 bits", ".png", data, grey(of_12_bits(DEEP))
    yield "TIFF rgb 16 bits", ".tif", _tiff_of_16_bits(wide), of_12_bits(wide)
    yield "PGM 16 bits", ".pgm", b"P5 2 1 65535 " + bytes([255, 255, 0, 0]), grey([[255, 0]])
    yield "PGM 12 bits", ".pgm", b"P5 2 1 4095 " + bytes([15, 255, 0, 0]), grey([[255, 0]])
    yield "animated GIF", ".gif", animated(PHOTO, "GIF"), pillow(rgb)
    yield "animated PNG", ".png", animated(PHOTO, "PNG"), PHOTO
    yield "animated WebP", ".webp", animated(PHOTO, "WebP", lossless=True), PHOTO
    yield "pages of TIFF", ".tif", animated(PHOTO, "TIFF"), PHOTO


def _tiff_of_16_bits(samples):
    import cv2

    return cv2.imencode(".tif", samples[..., ::-1])[1].tobytes()


FILES = {name: rest for name, *rest in from_files()}


def all_readings(folder, ending, data):
    """The image as training, evaluation and prediction read it."""
    for part in ("images", "labels"):
        (folder / part).mkdir()
    path = folder / "images" / f"a{ending}"
    path.write_bytes(data)
    pixels = inputs.read_image(path)
    Image.fromarray(np.zeros(pixels.shape[:2], np.uint8)).save(folder / "labels" / "a.png")
    (folder / "classes.txt").write_text("0 ground\n")
    options = {"train_images": "images", "train_labels": "labels"}
    source, _ = sources.open_source(
        "semantic_folder", data_dir=folder, split="train", options=options
    )
    assert source.image_size(0) == pixels.shape[:2]
    return source.compact(0)["image"], source[0]["image"], pixels


@pytest.mark.parametrize("name", FILES)
def test_training_evaluation_and_prediction_read_the_same(tmp_path, name):
    ending, data, expected = FILES[name]
    expected = expected(data) if callable(expected) else expected
    for pixels in all_readings(tmp_path, ending, data):
        assert pixels.dtype == np.uint8 and pixels.flags.writeable
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG late", "WebP", "TIFF"])
def test_an_orientation_is_applied_once(tmp_path, kind, value):
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x),
    }
    exif = orientation(value)
    if kind == "PNG late":
        data = png(PHOTO, 8, RGB, after=chunk(b"eXIf", exif.tobytes()[6:]))
    else:
        options = {"WebP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
        data = saved(PHOTO, kind, exif=exif, **options)
    plain = PHOTO
    if kind == "JPEG":
        plain = np.asarray(Image.open(io.BytesIO(data)))  # Pillow turns TIFF alone
    for pixels in all_readings(tmp_path, "." + kind.split()[0].lower(), data):
        np.testing.assert_array_equal(pixels, turns[value](plain))


def test_a_damaged_orientation_is_none():
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"x" * 40):
        data = saved(PHOTO, "JPEG", exif=exif)
        assert images.decode_image(data, "a").shape == PHOTO.shape
    for value in (0, 9, 77):
        data = saved(PHOTO, "JPEG", exif=orientation(value))
        assert images.read_size(data, "a") == PHOTO.shape[:2]


def test_a_map_of_the_unturned_image_is_explained(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    data = saved(PHOTO, "JPEG", exif=orientation(6))
    (tmp_path / "images" / "a.jpg").write_bytes(data)
    Image.fromarray(np.zeros(PHOTO.shape[:2], np.uint8)).save(tmp_path / "labels" / "a.png")
    (tmp_path / "classes.txt").write_text("0 ground\n")
    options = {"train_images": "images", "train_labels": "labels"}
    source, _ = sources.open_source(
        "semantic_folder", data_dir=tmp_path, split="train", options=options
    )
    with pytest.raises(records.RecordError, match=r"64 x 48 pixels.*48 x 64.*EXIF orientation"):
        source[0]


# ------------------------------------------------------------------------ 16 bits


@given(bits=st.integers(1, 16), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_16_bits_are_scaled_by_the_power_of_two_above_the_maximum(bits, seed):
    samples = np.random.default_rng(seed).integers(0, 1 << bits, (7, 5)).astype(np.uint16)
    samples[0, 0] = (1 << bits) - 1
    top = (1 << max(8, bits)) - 1
    expected = np.floor(samples.astype(float) * 255 / top + 0.5)
    pixels = images.decode_image(png(samples, 16), "a")
    np.testing.assert_array_equal(pixels, grey(expected))


def test_the_rule_of_16_bits_is_said(caplog):
    images._say_once.cache_clear()
    for _ in range(2):
        images.decode_image(png(DEEP, 16), "a")
    assert len([r for r in caplog.records if "16-bit" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    "data",
    [
        saved(DEEP.astype(np.float32), "TIFF"),
        saved(DEEP.astype(np.int32) * 99, "TIFF"),
        saved(Image.fromarray(PHOTO).convert("LAB"), "TIFF"),
    ],
    ids=["float", "32 bits", "LAB"],
)
def test_pictures_without_a_known_range_are_refused(data):
    with pytest.raises(images.ImageError, match=r"a\.tif: .*convert it to 8 or 16 bits"):
        images.decode_image(data, "a.tif")


# ------------------------------------------------------------------------ cut files


def is_read(data):
    try:
        images.decode_image(data, "a.jpg")
    except images.ImageError as error:
        assert "a.jpg: cannot be decoded, the file is truncated or damaged" in str(error)
        return False
    return True


JPEGS = {
    "plain": {},
    "full colour": {"subsampling": 0},
    "restarts": {"restart_marker_blocks": 3},
    "restarted rows": {"restart_marker_rows": 1},
    "grey": {"grey": True},
    "CMYK": {"cmyk": True},
    "quality 30": {"quality": 30},
}


def jpeg(pixels, grey=False, cmyk=False, **options):
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    return saved(image.convert("CMYK") if cmyk else image, "JPEG", **options)


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
def test_a_jpeg_that_was_cut_is_refused_with_and_without_an_end(options, share):
    data = jpeg(photo(160, 200), **options)
    start = data.index(b"\xff\xda")
    cut = data[: start + int(share * (len(data) - start))].rstrip(b"\xff")
    assert is_read(data)
    assert not is_read(cut) and not is_read(cut + b"\xff\xd9")


def test_a_progressive_jpeg_without_its_last_scans_is_refused():
    data = saved(photo(160, 200), "JPEG", progressive=True)
    scans = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    assert is_read(data) and len(scans) > 5
    for start in scans[1:]:
        assert not is_read(data[: start - 1].rstrip(b"\xff") + b"\xff\xd9")
    for share in (0.2, 0.4, 0.6):
        assert not is_read(data[: int(share * scans[-1])].rstrip(b"\xff") + b"\xff\xd9")


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_whole_jpeg_with_a_grey_corner_is_read(options):
    """Files that were cut end in this grey: it must not be what tells them."""
    for height, width in ((1, 1), (7, 9), (8, 8), (16, 33), (64, 17), (40, 200)):
        pixels = photo(height, width)
        pixels[height // 2 :, width // 2 :] = 128
        assert is_read(jpeg(pixels, **options))
        assert is_read(jpeg(np.full_like(pixels, 128), **options))


def test_what_follows_the_end_of_a_jpeg_and_its_thumbnail_do_not_matter():
    grey_corner = photo()
    grey_corner[-20:, -20:] = 128
    exif = orientation(1)
    exif[0x9286] = saved(PHOTO[:8, :8], "JPEG")  # a comment that looks like a JPEG
    data = saved(grey_corner, "JPEG", exif=exif)
    for rest in (b"", b"\0" * 999, b"\xff\xd9", saved(PHOTO, "JPEG")):
        assert is_read(data + rest)
    two = saved(PHOTO, "MPO", save_all=True, append_images=[Image.fromarray(PHOTO)])
    assert images.decode_image(two, "a").shape == PHOTO.shape


@pytest.mark.parametrize("name", FILES)
def test_half_a_file_is_refused(name):
    _, data, _ = FILES[name]
    with pytest.raises(images.ImageError, match=r"^a: "):
        pixels = images.decode_image(data[: int(0.45 * len(data))], "a")
        pytest.fail(f"{pixels.shape} of half a file")


# ------------------------------------------------------------------------ other things


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file"),
        (bytes(50), "an empty file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(60), "PostScript"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "formats JPEG, PNG"),
        (b"%PDF-1.7", "formats JPEG, PNG"),
    ],
)
@pytest.mark.parametrize("ending", [".jpg", ".png", ".eps"])
def test_what_is_no_image_is_named_and_starts_no_program(
    tmp_path, monkeypatch, data, words, ending
):
    def never(*arguments, **options):
        raise AssertionError(f"started {arguments}")

    for owner, name in (
        (subprocess, "Popen"),
        (subprocess, "run"),
        (os, "system"),
        (os, "posix_spawn"),
    ):
        monkeypatch.setattr(owner, name, never)
    path = tmp_path / f"a{ending}"
    path.write_bytes(data)
    for call in (
        lambda: inputs.read_image(path),
        lambda: records.decode_image(data, str(path)),
        lambda: records.read_image_size(data, str(path)),
        lambda: records.decode_labels(data, str(path)),
    ):
        with pytest.raises(
            ValueError, match=rf"a{ending}: cannot be decoded, not an image.*{words}"
        ):
            call()


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", "/dev/zero"):
        with pytest.raises(images.ImageError, match="not a regular file"):
            inputs.read_image(path)


BOMBS = {
    "png": lambda: png(np.zeros((4, 4), np.uint8), 8, RGB, size=(30_000, 30_000)),
    "png of truth": lambda: _whole_png(12_000),
    "gif": lambda: saved(LUMA, "GIF").replace(b"GIF87a\x40\0\x30\0", b"GIF87a" + b"\xff" * 4),
    "bmp": lambda: _huge_bmp(),
    "pbm": lambda: b"P4 60000 60000 " + bytes(100),
    "webp": lambda: _huge_webp(),
    "jpeg": lambda: _huge_jpeg(),
    "tiff": lambda: _huge_tiff(),
}


def _whole_png(side):
    import zlib

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    content = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = png(np.zeros((1, 1), np.uint8), 8, RGB, size=(side, side))
    return head[:33] + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def _huge_bmp():
    data = bytearray(saved(PHOTO, "BMP"))
    data[18:26] = (50_000).to_bytes(4, "little") * 2
    return bytes(data)


def _huge_webp():
    data = bytearray(saved(Image.new("RGB", (8, 8)), "WebP"))
    at = data.index(b"\x9d\x01\x2a") + 3
    data[at : at + 4] = b"\xff\x3f\xff\x3f"
    return bytes(data)


def _huge_jpeg():
    data = bytearray(saved(PHOTO, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    return bytes(data)


def _huge_tiff():
    data = bytearray(saved(PHOTO, "TIFF"))
    for tag in (256, 257):
        at = data.index(tag.to_bytes(2, "little") + (4).to_bytes(2, "little"))
        data[at + 8 : at + 12] = (60_000).to_bytes(4, "little")
    return bytes(data)


def test_bombs_are_refused_by_their_header_in_bounded_memory(tmp_path):
    """Each in 700 MB of addresses, which the libraries alone take half of."""
    for name, make in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    code = """
import json, pathlib, resource, sys
from oneformer_jax.input_pipeline import images
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
found = {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    for read in (images.decode_image, images.decode_samples, images.read_size):
        try:
            read(path.read_bytes(), "bomb", max_pixels=1 << 26)
            found.setdefault(path.name, []).append("read")
        except images.ImageError as error:
            found.setdefault(path.name, []).append(str(error))
print(json.dumps(found))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(result.stdout)
    assert found.keys() == BOMBS.keys()
    for name, messages in found.items():
        for message in messages:
            assert message.startswith("bomb: ") and "data.max_pixels" in message, (name, message)


def test_the_limit_is_a_setting_also_above_that_of_pillow():
    data = png(np.zeros((13_500, 13_500), np.uint8), 1)  # 182 million
    assert images.read_size(data, "a") == (13_500, 13_500)
    with pytest.raises(images.ImageError, match=r"data\.max_pixels, 100,000,000"):
        images.read_size(data, "a", max_pixels=10**8)
    assert images.decode_samples(data, "a").shape == (13_500, 13_500)


# ------------------------------------------------------------------------ folders


def test_hidden_files_are_nowhere_images(tmp_path):
    for name in (
        "b.JPG", "a.png", "._a.png", ".a.jpg", "Thumbs.db", "notes.txt", "sub/c.tif", "sub/._c.tif",
        ".cache/d.png", "__MACOSX/a.png", "sub/e.webp/f.png",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert images.list_images(tmp_path) == ["a.png", "b.JPG"]
    assert images.walk_images(tmp_path) == ["a.png", "b.JPG", "sub/c.tif", "sub/e.webp/f.png"]
