"""Video files: frames in, a video out, by PyAV (the extra `video`).

A clip is a video file or a pattern of image files. Only files are read: a playlist under the name
of a video, which could make FFmpeg open other files or addresses, is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import pathlib
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import cv2
import numpy as np

from oneformer_jax import files, remote
from oneformer_jax.input_pipeline import images

ENDINGS = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip
# First bytes of a video file whose name does not tell.
_SIGNATURES = re.compile(
    rb"....ftyp(?!heic|heix|mif1|hevc|msf1|avif|avis)|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01", re.S
)
# FFmpeg's readers of these files; each reads its own file and no other.
_FORMATS = "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,ogg,asf,h264,hevc,m4v,mjpeg,ivf"
FRAME_RATE = Fraction(25)  # of image files, and of a video that does not tell
# Seconds to the next frame: times beyond these are not those of one recording.
_BACK, _LONGEST_PAUSE = -1, 24 * 3600
_UNSPECIFIED = 2  # FFmpeg's number of an unknown colour space
# Encoders, best first. x264 is in PyAV's own packages; others may lack it.
ENCODERS = ("libx264", "libopenh264", "mpeg4")
_OPTIONS = {"libx264": {"preset": "veryfast", "crf": "20"}}
_FINEST_TIME = 65_535  # MPEG-4 divides a second into no more parts


class VideoError(ValueError):
    """A video that cannot be read or written; the message names it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A frame of a clip.

    Attributes:
      number: position in the clip, from 0; damaged frames count where they can be told.
      time: seconds since the first frame.
      image: uint8 [H, W, 3] RGB, upright.
      file_name: of an image file; of a video, None.
    """

    number: int
    time: Fraction
    image: np.ndarray
    file_name: str | None = None


@dataclasses.dataclass
class Clip:
    """An open clip.

    Attributes:
      path: of the video, or the pattern.
      name: start of the names of results: clip_mp4 of clip.mp4, frames_png of "frames/*.png".
      rate: average frames per second.
      total: number of frames if it is known.
      aspect: width of a pixel over its height, upright.
      frames: its frames, all of one size; they can be read once.
      faults: what was wrong so far, a sentence each.
    """

    path: str
    name: str
    rate: Fraction
    total: int | None
    aspect: Fraction = Fraction(1)
    frames: Iterator[Frame] = dataclasses.field(default_factory=lambda: iter(()))
    faults: list[str] = dataclasses.field(default_factory=list)


def is_clip(path: str | os.PathLike[str]) -> bool:
    """Tells whether `path` is a pattern of frames (with *, ? or []), or a video file.

    A file is a video by its ending or its first bytes.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        pattern = glob.has_magic(name) and "://" not in name
        return pattern or name.lower().endswith(ENDINGS)
    if os.path.isdir(name):
        return False
    if name.lower().endswith(ENDINGS):
        return True
    with contextlib.suppress(files.FileError), files.open_regular(name) as file:
        return bool(_SIGNATURES.match(file.read(16)))
    return False


def library() -> Any:
    """Imports PyAV; VideoError if it is missing."""
    try:
        import av
    except ImportError as error:
        raise VideoError(
            'videos need PyAV, which is missing: pip install "oneformer-jax[video]"'
        ) from error
    return av


@contextlib.contextmanager
def open_clip(path: str | os.PathLike[str], max_pixels: int = images.MAX_PIXELS) -> Iterator[Clip]:
    """Opens a video file, or the image files of a pattern in the natural order of their names.

    Raises:
      VideoError: no such file, no video in it, a format that is not read, or more than
        `max_pixels` in a frame. The frames raise it too.
      RemoteError: it is in a bucket.
    """
    name = os.fspath(path)
    remote.require_local(name, "a video")
    if os.path.exists(name):
        with _open_video(name, max_pixels) as clip:
            yield clip
    elif glob.has_magic(name):
        yield _open_images(name, max_pixels)
    else:
        raise VideoError(f"{name}: there is no such video file")


def _natural(name: str) -> list[Any]:
    """Sorts frame_2 before frame_10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def _open_images(pattern: str, max_pixels: int) -> Clip:
    found = [
        name
        for name in sorted(glob.glob(pattern, recursive=True), key=_natural)
        if name.lower().endswith(images.ENDINGS) and os.path.isfile(name)
    ]
    if not found:
        raise VideoError(
            f"{pattern}: no image file fits this pattern (files with {', '.join(images.ENDINGS)})"
        )
    first_file = pathlib.Path(found[0]).absolute()
    title = f"{first_file.parent.name or 'frames'}_{first_file.suffix[1:]}"
    clip = Clip(pattern, title, FRAME_RATE, len(found))

    def frames() -> Iterator[Frame]:
        first: tuple[str, tuple[int, int]] | None = None
        for number, name in enumerate(found):
            try:
                image = images.decode_image(images.read_file(name), name, max_pixels=max_pixels)
            except images.ImageError as error:
                clip.faults.append(f"{error}; the frame is left out")
                continue
            size = (image.shape[0], image.shape[1])
            first = first or (name, size)
            if size != first[1]:
                raise VideoError(
                    f"{name} has {size[0]} x {size[1]} pixels (height x width), but {first[0]} has "
                    f"{first[1][0]} x {first[1][1]}: all frames must have one size"
                )
            yield Frame(number, number / FRAME_RATE, image, os.path.basename(name))

    clip.frames = frames()
    return clip


@contextlib.contextmanager
def _open_video(name: str, max_pixels: int) -> Iterator[Clip]:
    av = library()
    with files.open_regular(name, error=VideoError):  # a pipe may never end
        pass
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{name}", options=options, metadata_errors="replace")
    except Exception as error:  # damaged files make PyAV raise many types
        reason = "it is empty" if not os.path.getsize(name) else _reason(error)
        raise VideoError(
            f"{name} is not a video that can be read, or is damaged at its start ({reason})"
        ) from None
    with container:
        # The cover of a piece of music is a video stream of one picture.
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams})
            raise VideoError(f"{name} has no video, only {files.first_few(kinds) or 'no stream'}")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(f"{name}: the codec of its video is unknown or damaged")
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or FRAME_RATE
        # An unknown rate is given as that of the clock.
        if not Fraction(1, _LONGEST_PAUSE) <= rate <= 1000:
            rate = FRAME_RATE
        length = Fraction((stream.duration or 0) * (stream.time_base or 0))
        length = length or Fraction(container.duration or 0, av.time_base)
        total = stream.frames or round(length * rate) or None
        clip = Clip(name, os.path.basename(name).replace(".", "_"), Fraction(rate), total)
        clip.frames = _video_frames(container, stream, clip, length, max_pixels)
        yield clip


def _video_frames(
    container: Any, stream: Any, clip: Clip, length: Fraction, max_pixels: int
) -> Iterator[Frame]:
    """Decodes a stream; times rise, also where those of the file are missing or do not."""
    size: tuple[int, int] | None = None
    start: Fraction | None = None
    number, time = 0, -1 / clip.rate
    for frame in _decoded(container, stream, clip, max_pixels):
        try:
            image, transposed = _upright(_rgb(frame), frame)
        except library().error.FFmpegError as error:
            raise VideoError(
                f"{clip.path}: frame {number:,}, {frame.format.name}, cannot be converted to RGB "
                f"({_reason(error)}); write the video anew as H.264"
            ) from None
        if size is None:
            size = (image.shape[0], image.shape[1])
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            clip.aspect = 1 / aspect if transposed else aspect
        elif image.shape[:2] != size:
            text = (
                f"{clip.path}: the size of its frames changes; the results have that of the first, "
                f"{size[0]} x {size[1]} pixels (height x width)"
            )
            if text not in clip.faults:
                clip.faults.append(text)
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        following = time + 1 / clip.rate
        if frame.pts is None or not frame.time_base:
            time = following
        else:
            seconds = frame.pts * frame.time_base
            start = seconds - following if start is None else start
            pause = seconds - start - time
            if not _BACK <= pause <= _LONGEST_PAUSE:  # two recordings in one file, or damage
                start, pause = seconds - following, 1 / clip.rate
            time = time + pause if pause > 0 else following
        yield Frame(number, time, image)
        number += 1
    if not number:
        raise VideoError(
            f"{clip.path} has no frame that can be decoded"
            + (f" ({files.first_few(clip.faults)})" if clip.faults else "")
        )
    end = time + 1 / clip.rate
    if length - end > max(Fraction(1, 2), length / 20) and not clip.faults:
        clip.faults.append(
            f"{clip.path} ends after {float(end):.1f} of {float(length):.1f} seconds: it may be "
            "truncated"
        )


def _decoded(container: Any, stream: Any, clip: Clip, max_pixels: int) -> Iterator[Any]:
    """Decodes a stream's frames; what cannot be decoded is left out and counted in the faults."""
    av = library()

    def check(height: int, width: int) -> None:
        if height * width > max_pixels:
            raise VideoError(
                f"{clip.path}: frames of {height} x {width} pixels (height x width) are more than "
                f"the limit of {max_pixels:,}; make them smaller, or raise --max_pixels"
            )

    check(stream.codec_context.height, stream.codec_context.width)
    damaged, cause = 0, ""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)  # the last one is empty and flushes the decoder
        except IndexError:  # of a stream that begins in the middle of the file
            packets = container.demux(stream)
            continue
        except av.error.FFmpegError as error:
            damaged, cause = damaged + 1, _reason(error)
            continue  # and then there are no more
        try:
            found = stream.decode(packet)
        except av.error.EOFError:  # it has been flushed
            found = []
        except av.error.FFmpegError as error:
            damaged, cause = damaged + 1, _reason(error)
            found = []
        for frame in found:
            check(frame.height, frame.width)
            damaged += frame.is_corrupt
            yield frame
        if packet is None:
            break
    if damaged:
        cause = f" ({cause})" if cause else ""
        clip.faults.append(f"{clip.path}: {damaged:,} frames or parts of them are damaged{cause}")


def _rgb(frame: Any) -> np.ndarray:
    # Players take large videos without a word about their colours for BT.709, as do cameras.
    unknown = frame.colorspace == _UNSPECIFIED and frame.height >= 720
    space = "ITU709" if unknown else None
    return frame.reformat(format="rgb24", src_colorspace=space).to_ndarray()


def _upright(image: np.ndarray, frame: Any) -> tuple[np.ndarray, bool]:
    """Turns and mirrors an image by the matrix for its display, to the nearest quarter turn.

    Returns the image, and whether its rows and columns have changed places.
    """
    matrices = [data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    if not matrices:
        return image, False
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5].astype(np.int64)
    transposed = bool(abs(a) + abs(d) < abs(b) + abs(c))
    if transposed:
        image, a, d = image.transpose(1, 0, 2), c, b
    turned = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(turned), transposed


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


class VideoWriter:
    """Writes pictures as an MP4 that plays everywhere: H.264, or MPEG-4 where there is no encoder.

    Each keeps its time. Sides become even by repeating the last row or column.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int],
        rate: Fraction,
        *,
        aspect: Fraction = Fraction(1),
    ):
        """Opens the file.

        Args:
          path: of the video.
          size: height and width of the pictures.
          rate: average frames per second.
          aspect: width of a pixel over its height.

        Raises:
          VideoError: no encoder takes such pictures.
        """
        self._av = av = library()
        self._path = os.fspath(path)
        self._odd = (size[0] % 2, size[1] % 2)
        self._last = -1
        name = next(name for name in ENCODERS if name in av.codecs_available)
        with self._errors():
            self._container = av.open(
                f"file:{self._path}", "w", format="mp4", options={"movflags": "faststart"}
            )
            stream = self._container.add_stream(name, rate=rate, options=_OPTIONS.get(name, {}))
            stream.height, stream.width = (
                side + odd for side, odd in zip(size, self._odd, strict=True)
            )
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.sample_aspect_ratio = aspect
            # BT.709, and said so: players guess otherwise, by the size.
            context.colorspace = context.color_primaries = context.color_trc = 1
            context.color_range = 1
            context.time_base = self._unit = _time_unit(rate)
            if name == "mpeg4":
                context.qscale = True
                context.global_quality = 3 * 118  # 118 is FFmpeg's unit of quality; 2 to 31
            self._stream = stream

    def add(self, picture: np.ndarray, time: Fraction) -> None:
        """Adds uint8 [H, W, 3] RGB, shown from `time` on, in seconds."""
        (down, right) = self._odd
        if down or right:
            picture = np.pad(picture, ((0, down), (0, right), (0, 0)), mode="edge")
        with self._errors():
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts = self._last = max(round(time / self._unit), self._last + 1)
            frame.time_base = self._unit
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Writes what the encoder still holds; the file is complete."""
        with self._errors():
            self._container.mux(self._stream.encode(None))
            self._container.close()

    def close(self) -> None:
        """Frees the file of a video that is given up."""
        with contextlib.suppress(Exception):
            self._container.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._av.error.FFmpegError as error:
            raise VideoError(f"{self._path} cannot be written ({_reason(error)})") from None


def _time_unit(rate: Fraction) -> Fraction:
    """Seconds of a tick: a whole number of ticks is a frame, and there are many in a second."""
    ticks = max(1, _FINEST_TIME // rate.numerator)
    if rate.numerator > _FINEST_TIME:
        return Fraction(1, 60_000)
    return Fraction(1, rate.numerator * ticks)
