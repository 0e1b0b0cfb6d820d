"""Video files of every kind, sound and damaged: frames or one clear line."""

import itertools
import os
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from oneformer_jax.eval import clips
from tests.eval import clip_files


def frames_of(path, **options):
    with clips.open_clip(path, **options) as clip:
        return list(clip.frames), clip


def close(found, expected, tolerance=12):
    """Compares pictures that have been compressed."""
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).mean() < tolerance


def test_frames_come_with_their_times(tmp_path):
    path = clip_files.write(tmp_path / "a.mp4", rate=25)
    frames, clip = frames_of(path)
    assert (clip.rate, clip.total, clip.aspect, clip.faults) == (25, 8, 1, [])
    assert [frame.number for frame in frames] == list(range(8))
    assert [frame.time for frame in frames] == [Fraction(t, 25) for t in range(8)]
    for frame, expected in zip(frames, clip_files.moving(), strict=True):
        close(frame.image, expected)


@pytest.mark.parametrize(
    "name, codec", [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mov", "mjpeg"), ("a.ts", "mpeg4")]
)
def test_other_containers_and_codecs_are_read(tmp_path, name, codec):
    frames, clip = frames_of(clip_files.write(tmp_path / name, codec=codec))
    assert len(frames) == 8 and not clip.faults
    assert [float(frame.time) for frame in frames] == pytest.approx(
        [t / 10 for t in range(8)], abs=1e-3
    )
    close(frames[5].image, clip_files.moving()[5])


@pytest.mark.parametrize(
    "turn, show",
    [
        ((90,), lambda x: np.rot90(x)),
        ((180,), lambda x: np.rot90(x, 2)),
        ((-90,), lambda x: np.rot90(x, 3)),
        ((0, True, False), lambda x: x[:, ::-1]),
        ((0, False, True), lambda x: x[::-1]),
        ((90, True, False), lambda x: np.rot90(x)[:, ::-1]),
        ((-90, True, False), lambda x: np.rot90(x, 3)[:, ::-1]),
    ],
)
def test_frames_are_turned_as_a_player_shows_them(tmp_path, turn, show):
    path = clip_files.write(tmp_path / "a.mp4", turn=turn, aspect=Fraction(4, 3))
    frames, clip = frames_of(path)
    for frame, expected in zip(frames, clip_files.moving(), strict=True):
        close(frame.image, show(expected))
    assert clip.aspect == (Fraction(3, 4) if turn[0] % 180 else Fraction(4, 3))


def test_a_variable_rate_keeps_its_times(tmp_path):
    times = [0, 7, 8, 50, 51, 300, 301, 1000]
    path = clip_files.write(tmp_path / "a.mp4", times=times, unit=Fraction(1, 1000))
    frames, _ = frames_of(path)
    assert [float(frame.time) for frame in frames] == pytest.approx([t / 1000 for t in times])


def test_times_begin_at_zero_and_rise(tmp_path):
    times = [t + 600 for t in range(8)]
    frames, _ = frames_of(clip_files.write(tmp_path / "a.mkv", times=times))
    assert [float(frame.time) for frame in frames] == pytest.approx([t / 10 for t in range(8)])
    # A raw stream has no times.
    path = clip_files.write(tmp_path / "a.h264")
    os.rename(path, tmp_path / "b.mp4")
    frames, _ = frames_of(tmp_path / "b.mp4")
    steps = [b.time - a.time for a, b in itertools.pairwise(frames)]
    assert len(frames) == 8 and all(step > 0 for step in steps)


def test_times_that_jump_go_on_from_the_last_frame(tmp_path):
    """A recording behind another one begins anew; damage may put a frame years ahead."""
    clock = Fraction(1, 1000)
    for starts in ((0, 90_000_000), (2_000_000, 0)):
        parts = [
            clip_files.write(
                tmp_path / f"{start}.ts",
                times=[start + 100 * t for t in range(8)],
                unit=clock,
                codec="mpeg4",
            )
            for start in starts
        ]
        both = tmp_path / "both.ts"
        both.write_bytes(b"".join(part.read_bytes() for part in parts))
        frames, _ = frames_of(both)
        steps = [float(b.time - a.time) for a, b in itertools.pairwise(frames)]
        assert len(frames) >= 14 and min(steps) > 0 and max(steps) < 1.01, steps
        assert sorted(steps)[len(steps) // 2] == pytest.approx(0.1)


def test_a_size_that_changes_in_the_middle_is_that_of_the_first_frames(tmp_path):
    first = clip_files.write(tmp_path / "a.ts", codec="mpeg2video", rate=25)
    larger = [np.kron(frame, np.ones((2, 2, 1), np.uint8)) for frame in clip_files.moving()]
    second = clip_files.write(tmp_path / "b.ts", larger, codec="mpeg2video", rate=25)
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    frames, clip = frames_of(both)
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)} and len(frames) >= 14
    close(frames[-1].image, clip_files.moving()[-1])
    assert any("size of its frames changes" in fault for fault in clip.faults)
    assert all(a.time < b.time for a, b in itertools.pairwise(frames))


# --- what is no video, or damaged ---


def message_of(path, **options):
    with pytest.raises(clips.VideoError) as caught:
        frames_of(path, **options)
    text = str(caught.value)
    assert "\n" not in text and os.path.basename(path) in text
    return text


def test_what_is_no_video_is_named_in_one_line(tmp_path):
    (tmp_path / "zero.mp4").write_bytes(b"")
    assert "it is empty" in message_of(tmp_path / "zero.mp4")
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    assert "not a video" in message_of(tmp_path / "text.mp4")
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.mp4", format="JPEG")
    assert "not a video" in message_of(tmp_path / "picture.mp4")
    assert "there is no such" in message_of(tmp_path / "missing.mp4")
    assert "has no video, only audio" in message_of(clip_files.sound(tmp_path / "sound.mp4"))
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "not a regular file" in message_of(tmp_path / "pipe.mp4")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
        '<?xml version="1.0"?><MPD><Period><BaseURL>{path}</BaseURL></Period></MPD>',
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path, text):
    other = clip_files.write(tmp_path / "other.mp4")
    for name in ("list.mp4", "list.ts"):
        (tmp_path / name).write_text(text.format(path=other))
        assert "not a video" in message_of(tmp_path / name)


def test_music_with_a_cover_has_no_video(tmp_path):
    cover = tmp_path / "cover.mp4"
    with clip_files.av.open(str(cover), "w") as container:
        picture = container.add_stream("mjpeg", rate=1)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuvj420p"
        picture.disposition = clip_files.av.stream.Disposition.attached_pic
        frame = clip_files.av.VideoFrame.from_ndarray(clip_files.moving()[0], format="rgb24")
        container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
    assert "has no video" in message_of(cover)


def test_frames_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = clip_files.write(tmp_path / "a.mp4")
    monkeypatch.setattr(clips, "_rgb", lambda frame: pytest.fail("decoded"))
    assert "48 x 64 pixels" in message_of(path, max_pixels=48 * 64 - 1)


def test_a_truncated_video_gives_its_frames_and_a_fault(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (96, 128, 3)).astype(np.uint8) for _ in range(30)]
    whole = clip_files.write(tmp_path / "whole.mkv", noise).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    frames, clip = frames_of(cut)
    assert 0 < len(frames) < 30 and len(clip.faults) == 1
    # The table at the end of an MP4 is lost.
    whole = clip_files.write(tmp_path / "whole.mp4", noise).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert "damaged at its start" in message_of(tmp_path / "cut.mp4")


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "mpeg4")]
)
def test_damaged_bytes_never_stop_the_program(tmp_path, name, codec):
    """Every mutation gives frames of the first size, or a VideoError."""
    whole = clip_files.write(tmp_path / name, codec=codec).read_bytes()
    rng = np.random.default_rng(3)
    results = set()
    for number in range(25):
        data = bytearray(whole)
        for position in rng.integers(0, len(data), 1 << rng.integers(0, 8)):
            data[position] = rng.integers(0, 256)
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(data)
        try:
            frames, clip = frames_of(path, max_pixels=1 << 20)
        except clips.VideoError:
            results.add("error")
            continue
        results.add("faults" if clip.faults else "frames")
        assert len({frame.image.shape for frame in frames}) == 1
        assert all(a.time < b.time for a, b in itertools.pairwise(frames))
    assert len(results) > 1, "the mutations are all alike"


# --- patterns of image files ---


def test_image_files_are_frames_in_the_natural_order(tmp_path):
    for number in (0, 1, 2, 10, 9):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "frame_list.txt").write_text("no image")
    frames, clip = frames_of(str(tmp_path / "frame*"))
    assert [frame.image[0, 0, 0] for frame in frames] == [0, 1, 2, 9, 10]
    assert frames[4].file_name == "frame10.png" and frames[4].time == Fraction(4, 25)
    assert (clip.name, clip.rate, clip.total) == (f"{tmp_path.name}_png", 25, 5)


def test_a_broken_frame_is_left_out_and_one_of_another_size_is_an_error(tmp_path):
    for number in range(3):
        Image.new("RGB", (6, 4)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    frames, clip = frames_of(str(tmp_path / "*.png"))
    assert [(frame.number, frame.time) for frame in frames] == [(0, 0), (2, Fraction(2, 25))]
    assert len(clip.faults) == 1 and "1.png" in clip.faults[0]
    Image.new("RGB", (8, 4)).save(tmp_path / "1.png")
    with pytest.raises(clips.VideoError, match=r"1\.png has 4 x 8 pixels .* one size"):
        frames_of(str(tmp_path / "*.png"))
    with pytest.raises(clips.VideoError, match="no image file fits"):
        frames_of(str(tmp_path / "*.jpg"))


def test_clips_are_told_from_images(tmp_path):
    video = clip_files.write(tmp_path / "a.mp4")
    bare = tmp_path / "bare"
    bare.write_bytes(video.read_bytes())
    picture = tmp_path / "odd[1].png"
    Image.new("RGB", (6, 4)).save(picture)
    heic = tmp_path / "photo"
    heic.write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    assert clips.is_clip(video) and clips.is_clip(bare)
    assert clips.is_clip("no/such/Film.MOV") and clips.is_clip("frames/*.png")
    address = "https://host/a.png?size=large"
    for path in (picture, heic, tmp_path, tmp_path / "missing.png", "frames/1.png", address):
        assert not clips.is_clip(path), path


# --- writing ---


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1)])
def test_videos_keep_pictures_and_times(tmp_path, monkeypatch, encoder, size):
    monkeypatch.setattr(clips, "ENCODERS", ("no_such_encoder", encoder))
    pictures = [frame[: size[0], : size[1]] for frame in clip_files.moving()]
    times = [Fraction(t, 30) + (Fraction(1, 7) if t > 4 else 0) for t in range(8)]
    rate = Fraction(30_000, 1001)
    writer = clips.VideoWriter(tmp_path / "a.mp4", size, rate, aspect=Fraction(4, 3))
    for picture, time in zip(pictures, times, strict=True):
        writer.add(picture, time)
    writer.finish()
    frames, found, _ = clip_files.read(tmp_path / "a.mp4")
    assert found == pytest.approx([float(t) for t in times], abs=1e-4)
    even = tuple(side + side % 2 for side in size)
    for frame, picture in zip(frames, pictures, strict=True):
        assert frame.shape[:2] == even
        close(frame[: size[0], : size[1]], picture)
    _, clip = frames_of(tmp_path / "a.mp4")
    assert clip.aspect == Fraction(4, 3)


def test_a_constant_rate_stays_exact(tmp_path):
    for rate in (Fraction(25), Fraction(24_000, 1001), Fraction(1, 3), Fraction(240)):
        writer = clips.VideoWriter(tmp_path / "a.mp4", (16, 16), rate)
        for t in range(6):
            writer.add(np.zeros((16, 16, 3), np.uint8), t / rate)
        writer.finish()
        _, times, found = clip_files.read(tmp_path / "a.mp4")
        assert times == pytest.approx([float(t / rate) for t in range(6)], abs=1e-6)
        assert found == rate


def test_colours_survive_the_way_through_a_video(tmp_path):
    """Also in large videos, whose colours players read by other rules."""
    for size in ((64, 64), (720, 64)):
        picture = np.full((*size, 3), (200, 40, 90), np.uint8)
        writer = clips.VideoWriter(tmp_path / "a.mp4", size, Fraction(10))
        writer.add(picture, Fraction(0))
        writer.finish()
        (frame,), _ = frames_of(tmp_path / "a.mp4")
        assert np.abs(frame.image.astype(int) - picture).max() <= 4


def test_what_cannot_be_written_is_named(tmp_path):
    writer = clips.VideoWriter(tmp_path / "missing" / "a.mp4", (16, 16), Fraction(10))
    with pytest.raises(clips.VideoError, match="cannot be written"):
        for t in range(100):
            writer.add(np.zeros((16, 16, 3), np.uint8), Fraction(t))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    path = clip_files.write(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(clips.VideoError, match=r'pip install "oneformer-jax\[video\]"'):
        frames_of(path)
