"""Image files for tests, made without the libraries that read them where these would differ."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def saved(image, kind, **options):
    """Content of the file in which Pillow saves an image or array."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        stream, kind, **options
    )
    return stream.getvalue()


def chunk(name, content):
    """A chunk of a PNG."""
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def png(samples, bits, kind=GREY, before=b"", after=b"", size=None):
    """A PNG with exactly these samples [H, W] or [H, W, C]; chunks before and after the pixels.

    `size`, (height, width), is what the header says instead of the truth.
    """
    height, width = size or samples.shape[:2]
    rows = samples.reshape(samples.shape[0], -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    elif bits == 8:
        packed = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        shifts = np.arange(bits - 1, -1, -1)
        packed = [np.packbits(row[:, None] >> shifts & 1).tobytes() for row in rows]
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
        + before
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
        + after
        + chunk(b"IEND", b"")
    )


def palette(colors):
    """The chunk of a palette, uint8 [N, 3]."""
    return chunk(b"PLTE", np.asarray(colors, np.uint8).tobytes())


def orientation(value):
    """EXIF data that hold an orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def photo(height=48, width=64, seed=0):
    """uint8 [H, W, 3]: smooth colours with some noise, which JPEG keeps well."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-9, 10, (height, width, 1))
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def animated(pixels, kind, **options):
    """A file of two frames or pages, the first of them `pixels`."""
    second = Image.fromarray(255 - pixels)
    return saved(pixels, kind, save_all=True, append_images=[second], **options)


def white_is_zero(pixels):
    """A grey TIFF of these pixels whose samples are their negative, as its header says."""
    data = bytearray(saved(255 - pixels, "TIFF"))
    at = data.index((262).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    data[at + 8] = 0  # PhotometricInterpretation
    return bytes(data)
