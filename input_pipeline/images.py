"""Image files as arrays: the one reader of training, evaluation and prediction.

The first bytes tell the format, never the ending. Only `FORMATS` are read, so no decoder that
starts other programs can be reached. The size is checked against a limit before anything is
decoded. The rules:

- grey, palette and one-bit pictures become RGB; alpha is dropped; CMYK is converted;
- 16 bits become 8, scaled by the smallest 2^n - 1 (n from 8 to 16) that is not below the picture's
  maximum, so 12-bit values in 16 bits keep their brightness;
- 32-bit and floating-point pictures have no known range and are refused;
- the EXIF orientation (TIFF: its tag) is applied once; the first of several frames is read;
- truncated files are refused, also those that were cut and given an end marker.

OpenCV decodes JPEGs and most PNGs because it is faster; Pillow reads the headers and the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import IO

import cv2
import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from oneformer_jax import files, remote

MAX_PIXELS = 1 << 28  # default limit of the pixels of an image: 16,384 x 16,384
FILE_LIMIT = 1 << 31  # bytes of the largest file that is read

# First bytes of a file -> its format and Pillow's reader. `Image.open` would try the readers of all
# formats, and has its own limit of pixels.
_READERS = (
    (rb"\xff\xd8\xff", "JPEG", JpegImagePlugin.JpegImageFile),
    (rb"\x89PNG\r\n\x1a\n", "PNG", PngImagePlugin.PngImageFile),
    (rb"RIFF....WEBP", "WebP", WebPImagePlugin.WebPImageFile),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF", TiffImagePlugin.TiffImageFile),
    (rb"BM", "BMP", BmpImagePlugin.BmpImageFile),
    (rb"GIF8[79]a", "GIF", GifImagePlugin.GifImageFile),
    (rb"P[1-6]\s", "PPM", PpmImagePlugin.PpmImageFile),
)
FORMATS = tuple(name for _, name, _ in _READERS)
# A file in a folder is an image if it has one of these endings.
ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
# Other files that lie under the name of an image, for messages.
_OTHERS = (
    (rb"....ftyp(heic|heix|mif1|hevc|msf1)", "a HEIC photo; convert it to JPEG"),
    (rb"....ftypavi[fs]", "an AVIF picture; convert it to JPEG or PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript program; convert it to PNG"),
    (rb"version https://git-lfs", "a pointer of Git LFS; run `git lfs pull`"),
    (rb"\s*<(!DOCTYPE|html|\?xml|svg)", "the text of a web page or a drawing; fetch it again"),
    (rb"\0*\Z", "an empty file; restore it"),
)
_TRUNCATED = "cannot be decoded, the file is truncated or damaged; restore it"
_MODES_8 = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_MODES_16 = ("I;16", "I;16B", "I;16L")
_PHOTOMETRIC = TiffImagePlugin.PHOTOMETRIC_INTERPRETATION  # 0: zero is white
# Orientation -> OpenCV's steps that turn the picture upright.
_TURNS = {
    2: lambda x: cv2.flip(x, 1),
    3: lambda x: cv2.rotate(x, cv2.ROTATE_180),
    4: lambda x: cv2.flip(x, 0),
    5: cv2.transpose,
    6: lambda x: cv2.rotate(x, cv2.ROTATE_90_CLOCKWISE),
    7: lambda x: cv2.flip(cv2.transpose(x), -1),
    8: lambda x: cv2.rotate(x, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
_COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_AS_IT_IS = cv2.IMREAD_UNCHANGED  # ignores orientations, except TIFF's


class ImageError(ValueError):
    """An image that cannot be read; the message names the file."""


class _Broken(Exception):
    """Describes what is wrong with a file, without its name."""


@dataclasses.dataclass(frozen=True)
class _Header:
    """The header of a picture.

    Attributes:
      kind: one of `FORMATS`.
      picture: Pillow's picture, not decoded yet.
      mode: Pillow's mode.
      bits: per sample.
      size: (height, width) as stored; of TIFF upright.
      turn: the orientation still to apply, 1 to 8.
      animated: True for a PNG with frames, which OpenCV and Pillow read differently.
    """

    kind: str
    picture: ImageFile.ImageFile
    mode: str
    bits: int
    size: tuple[int, int]
    turn: int = 1
    animated: bool = False

    @property
    def upright_size(self) -> tuple[int, int]:
        return self.size[::-1] if self.turn >= 5 else self.size


def list_images(folder: str | os.PathLike[str], endings: tuple[str, ...] = ENDINGS) -> list[str]:
    """Lists the image files directly in `folder`, sorted, by their ending in either case.

    Hidden files are left out, including the `._NAME` that macOS puts beside NAME.
    """
    if remote.is_remote(folder):
        found = remote.names(remote.path_of(folder))
        return sorted(name for name in found if _is_named(name, endings))
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if _is_named(e.name, endings) and e.is_file())


def _is_named(name: str, endings: tuple[str, ...]) -> bool:
    return not name.startswith(".") and name.lower().endswith(endings)


def walk_images(folder: str | os.PathLike[str], endings: tuple[str, ...] = ENDINGS) -> list[str]:
    """As `list_images`, subfolders included: paths relative to `folder`, with "/", sorted.

    Hidden folders and the `__MACOSX` of macOS archives are left out. Other `endings` name other
    files.
    """
    found = []
    for path, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        inside = os.path.relpath(path, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        found += [prefix + name for name in list_images(path, endings)]
    return sorted(found)


def read_file(path: str | os.PathLike[str], error: type[Exception] = ImageError) -> bytes:
    """Reads an image file of at most `FILE_LIMIT` bytes; see `files.read_bytes`."""
    return files.read_bytes(path, limit=FILE_LIMIT, error=error)


def decode_image(
    data: bytes, where: str, max_pixels: int = MAX_PIXELS, *, error: type[Exception] = ImageError
) -> np.ndarray:
    """Decodes a picture into uint8 [H, W, 3], RGB, upright, by the rules of this module.

    Args:
      data: content of the file.
      where: name of the picture in messages.
      max_pixels: limit of its pixels; see `data.max_pixels`.
      error: the exception to raise.

    Raises:
      error: another format, damaged, truncated, too large, or a kind of picture that is refused.
    """
    return _checked(_of_its_size(_decode_image), data, where, max_pixels, error)


def decode_samples(
    data: bytes,
    where: str,
    max_pixels: int = MAX_PIXELS,
    *,
    palette: bool = False,
    error: type[Exception] = ImageError,
) -> np.ndarray:
    """Decodes a map of labels (PNG or TIFF) into its exact samples: nothing is scaled.

    The arguments are those of `decode_image`, and
      palette: turn the indices of a palette into its colours.

    Returns:
      uint8 or uint16 [H, W] of a grey or palette picture with 1, 2, 4, 8 or 16 bits; [H, W, 3],
      RGB, of a colour picture, whose alpha is dropped.

    Raises:
      error: see `decode_image`; a lossy or other format.
    """
    decode = functools.partial(_decode_samples, palette)
    return _checked(_of_its_size(decode), data, where, max_pixels, error)


def read_size(
    data: bytes, where: str, max_pixels: int = MAX_PIXELS, *, error: type[Exception] = ImageError
) -> tuple[int, int]:
    """Reads height and width of the result of `decode_image` in the header alone; same errors."""
    return _checked(lambda header, _: header.upright_size, data, where, max_pixels, error)


def _of_its_size(decode):
    """Makes `decode` refuse a result whose size differs from the header's."""

    def checked(header, data):
        pixels = decode(header, data)
        if pixels.shape[:2] != header.upright_size:
            raise _Broken(_TRUNCATED)
        return pixels

    return checked


def _checked(use, data, where, max_pixels, error):
    """Calls `use(header, data)`; raises its errors and those of the libraries as one `error`."""
    try:
        return use(_open(data, max_pixels), data)
    except _Broken as cause:
        raise error(f"{where}: {cause}") from None
    except MemoryError:
        raise error(f"{where}: there is not enough memory to decode it") from None
    except Exception as cause:  # Pillow's decoders raise many types
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise error(f"{where}: {_TRUNCATED} ({reason})") from cause


# ------------------------------------------------------------------------ headers


def _open(data: bytes, max_pixels: int) -> _Header:
    kind, reader = _reader_of(data)
    try:
        picture = reader(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise _Broken(
            f"it has more pixels than Pillow accepts in a {kind}, whatever data.max_pixels; store "
            "it as JPEG"
        ) from None
    width, height = picture.size
    if height < 1 or width < 1:
        raise _Broken("it has no pixels; restore it")
    if height * width > max_pixels:
        raise _Broken(
            f"{height} x {width} pixels (height x width) are more than data.max_pixels, "
            f"{max_pixels:,}; make it smaller, or raise the setting (--max_pixels in prediction)"
        )
    header = _Header(kind, picture, picture.mode, 8, (height, width))
    if kind == "PNG":
        chunks = dict(_png_chunks(data))
        turn = _orientation(chunks.get(b"eXIf") or picture.info.get("exif"))
        return dataclasses.replace(header, bits=data[24], turn=turn, animated=b"acTL" in chunks)
    if kind == "TIFF":  # Pillow turns it itself
        bits = picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        return dataclasses.replace(header, bits=max(bits))
    if kind in ("JPEG", "WebP"):
        return dataclasses.replace(header, turn=_orientation(picture.info.get("exif")))
    return header


def _reader_of(data: bytes) -> tuple[str, Callable[[IO[bytes]], ImageFile.ImageFile]]:
    for start, kind, reader in _READERS:
        if re.match(start, data, re.DOTALL):
            return kind, reader
    for start, hint in _OTHERS:
        if re.match(start, data, re.DOTALL):
            raise _Broken(f"cannot be decoded, not an image but {hint}")
    raise _Broken(
        f"cannot be decoded, not an image in one of the formats {', '.join(FORMATS)}; restore or "
        "convert it"
    )


def _orientation(exif: bytes | None) -> int:
    """The orientation in EXIF data; 1 if it is missing or unreadable."""
    if not exif:
        return 1
    found = Image.Exif()
    try:
        found.load(exif)
        value = found.get(ExifTags.Base.Orientation, 1)
    except Exception:  # the picture itself may be whole
        return 1
    return value if value in _TURNS else 1


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the names of a PNG's chunks, with eXIf's content; `_Broken` if the end is missing."""
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            break
        yield name, data[position + 8 : end - 4] if name == b"eXIf" else b""
        if name == b"IEND":
            return
        position = end
    raise _Broken(_TRUNCATED)


# ------------------------------------------------------------------------ pictures


def _decode_image(header: _Header, data: bytes) -> np.ndarray:
    deep = header.bits > 8 or header.mode in _MODES_16 or (header.kind, header.mode) == ("PPM", "I")
    if header.mode not in (*_MODES_8, *_MODES_16) and not deep:
        raise _Broken(
            f"a picture of Pillow's mode {header.mode}, whose range or colours are not known; "
            "convert it to 8 or 16 bits, grey or RGB"
        )
    if deep:
        pixels = eight_bits(_deep_samples(header, data))
        pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB) if pixels.ndim == 2 else pixels
        return _turned(pixels, header.turn)
    if header.kind == "JPEG":
        return _turned(_decode_jpeg(header, data), header.turn)
    if header.kind == "PNG" and not header.animated:
        return _turned(_opencv(data, _COLOR), header.turn)
    return _turned(np.array(header.picture.convert("RGB")), header.turn)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return _TURNS[orientation](pixels) if orientation != 1 else pixels


def _opencv(data: bytes, flags: int) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise _Broken(_TRUNCATED)
    return pixels


def _deep_samples(header: _Header, data: bytes) -> np.ndarray:
    """uint16 [H, W] or [H, W, 3], RGB: the samples of a picture of 16 bits, without alpha."""
    if header.kind == "TIFF" and header.picture.tag_v2.get(_PHOTOMETRIC) == 0:
        raise _Broken(
            "a TIFF of 16 bits whose zero is white; convert it to one whose zero is black"
        )
    if header.mode in _MODES_16 or header.mode == "I":
        samples = np.asarray(header.picture)
    elif header.kind in ("PNG", "TIFF") and header.bits == 16:  # Pillow keeps the high bytes only
        samples = _opencv(data, _AS_IT_IS)
    else:
        samples = np.zeros(0)
    if samples.dtype == np.int32 and samples.min() >= 0 and samples.max() <= 65_535:
        samples = samples.astype(np.uint16)
    if not np.issubdtype(samples.dtype, np.uint16):
        raise _Broken(
            f"a picture of {header.bits} bits of Pillow's mode {header.mode}, whose range is not "
            "known; convert it to 8 or 16 bits, grey or RGB"
        )
    return _rgb_order(samples)


def _rgb_order(samples: np.ndarray) -> np.ndarray:
    """Brings OpenCV's [H, W] or BGR(A) [H, W, 3 or 4] into [H, W] or RGB [H, W, 3]."""
    if samples.ndim == 2:
        return samples
    code = cv2.COLOR_BGR2RGB if samples.shape[2] == 3 else cv2.COLOR_BGRA2RGB
    return cv2.cvtColor(samples, code)


def eight_bits(samples: np.ndarray) -> np.ndarray:
    """Scales 16 bits to 8 by the smallest 2^n - 1 (n from 8 to 16) not below the maximum."""
    top = (1 << max(8, int(samples.max()).bit_length())) - 1
    _say_once(
        "16-bit images are read as 8 bits: the smallest of 255, 511, ... 65535 that is not below "
        "an image's largest value scales it"
    )
    table = (np.arange(top + 1, dtype=np.uint32) * 255 + top // 2) // top
    return table.astype(np.uint8)[samples]


@functools.cache
def _say_once(text: str) -> None:
    logging.warning("%s", text)


def _decode_jpeg(header: _Header, data: bytes) -> np.ndarray:
    scan = _first_scan(data)
    if header.mode == "CMYK":
        pixels = np.array(header.picture.convert("RGB"))
        last = header.picture.getpixel((header.size[1] - 1, header.size[0] - 1))
    else:
        pixels = _opencv(data, _COLOR)
        last = pixels[-1, -1]
    # libjpeg fills the missing part of a cut file with this grey, and reports it on stderr only.
    # Pillow inverts CMYK, hence 127.
    filled = np.isin(last, (127, 128)).all()
    if filled and scan and not _reaches_last_pixel(data[: data.find(_END, scan)]):
        raise _Broken(_TRUNCATED)
    return pixels


def _reaches_last_pixel(data: bytes) -> bool:
    """Tells whether a sequential JPEG without its end marker still yields its last pixel, a grey.

    Without the marker libjpeg waits for more data instead of filling with grey, so Pillow's picture
    stays black there. The added bytes are those that libjpeg reads ahead.
    """
    picture = JpegImagePlugin.JpegImageFile(io.BytesIO(data + bytes(8)))
    try:
        picture.load()
    except OSError:  # expected: the end marker is missing
        picture.tile = []  # shows what was decoded
    last = picture.getpixel((picture.width - 1, picture.height - 1))
    return any(last) if isinstance(last, tuple) else bool(last)


# A marker: neither a stuffed zero, nor a restart, nor a filling byte.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_END = b"\xff\xd9"
_SOF2, _SOI, _EOI, _SOS, _TEM = 0xC2, 0xD8, 0xD9, 0xDA, 0x01


def _first_scan(data: bytes) -> int:
    """Checks that a JPEG has its end marker; returns where its first scan begins, 0 if progressive.

    The scans of a progressive JPEG must bring every coefficient to its full precision; a cut within
    the last scan passes.

    Raises:
      _Broken: the end marker or scans are missing.
    """
    # Component of a progressive JPEG -> the coefficients that are not precise yet.
    missing: dict[int, set[int]] = {}
    position = 2
    while match := _MARKER.search(data, position):
        code, position = match[0][1], match.end()
        if code == _EOI and not any(missing.values()):
            return 0
        if code == _EOI:
            break
        if code in (_SOI, _TEM):
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        segment = data[position + 2 : position + length]
        position += length
        if code == _SOF2:
            missing = {segment[6 + 3 * i]: set(range(64)) for i in range(segment[5])}
        elif code == _SOS and not missing:
            if not data.endswith(_END) and data.find(_END, position) < 0:
                break
            return position
        elif code == _SOS:
            count = segment[0]
            first, last, approximation = segment[1 + 2 * count : 4 + 2 * count]
            if approximation & 15 == 0:
                for i in range(count):
                    missing[segment[1 + 2 * i]] -= set(range(first, last + 1))
    raise _Broken(_TRUNCATED)


# ------------------------------------------------------------------------ maps of labels


def _decode_samples(palette: bool, header: _Header, data: bytes) -> np.ndarray:
    if header.kind not in ("PNG", "TIFF"):
        raise _Broken(
            f"a map must be a PNG (or TIFF), this is {header.kind}"
            + (", which changes values; make the maps anew" if header.kind == "JPEG" else "")
        )
    if header.kind == "TIFF":
        samples = _tiff_samples(header, palette)
    else:
        samples = _png_samples(header, palette, data)
    return _turned(samples, header.turn)


def _png_samples(header: _Header, palette: bool, data: bytes) -> np.ndarray:
    if header.mode == "LA":
        raise _Broken("a map of grey and alpha; store it without alpha")
    if header.animated:
        raise _Broken("a map must be a PNG of one frame")
    if header.mode == "P" and not palette:
        return np.array(header.picture)  # the indices
    if header.mode == "P" or (header.mode != "L" and header.bits == 8):
        return _opencv(data, _COLOR)
    samples = _opencv(data, _AS_IT_IS)
    return _unscaled(samples, header.bits) if header.bits < 8 else _rgb_order(samples)


def _tiff_samples(header: _Header, palette: bool) -> np.ndarray:
    photometric = header.picture.tag_v2.get(_PHOTOMETRIC)
    compression = header.picture.info.get("compression")
    if photometric == 0 or compression in ("jpeg", "webp"):
        kind = "whose zero is white" if photometric == 0 else f"compressed by {compression}"
        raise _Broken(f"a TIFF {kind}, which changes values; store the map as PNG")
    if header.mode == "P" and palette:
        return np.array(header.picture.convert("RGB"))
    samples = np.array(header.picture)
    if header.mode in ("1", "L") and header.bits < 8:
        samples = samples.astype(np.uint8) * (255 if header.mode == "1" else 1)
        return _unscaled(samples, header.bits)
    if header.mode == "I" and samples.min() >= 0 and samples.max() <= 65_535:
        return samples.astype(np.uint16)
    colors = header.mode in ("RGB", "RGBA", "RGBX") and header.bits == 8  # else the high bytes
    if header.mode not in ("L", "P", *_MODES_16) and not colors:
        raise _Broken(
            f"a map of {header.bits} bits of Pillow's mode {header.mode}; values must be whole "
            "numbers from 0 to 65535: store the map as PNG"
        )
    return samples[..., :3] if samples.ndim == 3 else samples


def _unscaled(samples: np.ndarray, bits: int) -> np.ndarray:
    """Undoes the scaling of 1, 2 or 4 bits to 0..255 by the libraries."""
    return samples // (255 // ((1 << bits) - 1))
