"""Small video files for the tests."""

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av", reason="videos need PyAV, the extra `video`")


def moving(count=8, height=48, width=64):
    """Frames uint8 [H, W, 3]: blue above green, a red square that moves right."""
    frames = []
    for t in range(count):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[: height // 2, :, 2], frame[height // 2 :, :, 1] = 200, 160
        frame[10:26, 4 + 3 * t : 20 + 3 * t] = (220, 20, 30)
        frames.append(frame)
    return frames


def write(
    path, frames=None, *, rate=10, codec="libx264", times=None, unit=None, turn=None, aspect=None
):
    """Writes a clip; `times` are in `unit`s, `turn` the arguments of `set_display_rotation`."""
    frames = moving() if frames is None else frames
    with av.open(str(path), "w") as container:
        options = {"crf": "8"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if unit:
            stream.codec_context.time_base = unit
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn:
            stream.set_display_rotation(*turn)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = unit or Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read(path):
    """(frames, seconds of each, stream's average rate) of a video, read with PyAV alone."""
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        found = [(f.to_ndarray(format="rgb24"), f.time) for f in container.decode(stream)]
        return [f for f, _ in found], [t for _, t in found], stream.average_rate


def sound(path, **format):
    with av.open(str(path), "w", **format) as container:
        stream = container.add_stream("aac" if str(path).endswith((".mp4", ".m4a")) else "mp3")
        stream.sample_rate = 44_100
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), "fltp", "mono")
        frame.sample_rate = 44_100
        for number in range(20):
            frame.pts = number * 1152
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
