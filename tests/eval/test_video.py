"""Videos in, overlay videos and COCO's formats out."""

import contextlib
import itertools
import json
import os
import threading
import time
import types
import weakref

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from oneformer_jax import progress
from oneformer_jax.app import modes
from oneformer_jax.eval import clips, predict, video
from oneformer_jax.eval.segmentation import Instances, Segmentation
from oneformer_jax.input_pipeline import coco_format
from tests.eval import clip_files
from tests.eval.tiny_segmenter import METADATA, picture, segmenter

THING, SKY, GRASS = 1, 3, 4


def by_colour(image, tasks):
    """Segments the frames of `clip_files.moving` by their colours, as a Segmenter would."""
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    panoptic = np.where(red > 120, 1, np.where(green > blue, 2, 3)).astype(np.int32)
    categories = {1: THING, 2: GRASS, 3: SKY}
    segments = [dict(id=i, category=c) for i, c in categories.items() if (panoptic == i).any()]
    record = dict(image=image, panoptic=panoptic, segments=segments)
    return {task: Segmentation.from_record(record, METADATA, task) for task in tasks}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Results of a video in all tasks: (folder, paths)."""
    folder = tmp_path_factory.mktemp("video")
    path = clip_files.write(folder / "clip.mp4", rate=5)
    out = folder / "out"
    return out, video.predict_video(by_colour, path, out, overlay_size=96)


def test_every_task_has_an_overlay_and_its_files(made):
    out, written = made
    assert sorted(path.name for path in written) == sorted(os.listdir(out)) == [
        "clip_mp4_instance.json", "clip_mp4_instance_overlay.mp4", "clip_mp4_panoptic",
        "clip_mp4_panoptic.json", "clip_mp4_panoptic_overlay.mp4", "clip_mp4_semantic",
        "clip_mp4_semantic_overlay.mp4",
    ]  # fmt: skip
    for task in ("panoptic", "instance", "semantic"):
        frames, times, rate = clip_files.read(out / f"clip_mp4_{task}_overlay.mp4")
        assert len(frames) == 8 and frames[0].shape == (96, 128, 3) and rate == 5
        assert times == pytest.approx([t / 5 for t in range(8)])


def test_the_panoptic_json_is_read_as_a_data_set(made):
    out, _ = made
    content = json.loads((out / "clip_mp4_panoptic.json").read_text())
    assert [image["id"] for image in content["images"]] == list(range(8))
    assert [image["time"] for image in content["images"]] == [t / 5 for t in range(8)]
    assert content["videos"] == [dict(id=1, file_name="clip.mp4")]
    images = out.parent / "images"
    images.mkdir(exist_ok=True)
    for image, frame in zip(content["images"], clip_files.moving(), strict=True):
        Image.fromarray(frame).save(images / image["file_name"])
    source = coco_format.CocoFolderSource(
        images, out / "clip_mp4_panoptic", out / "clip_mp4_panoptic.json"
    )
    assert source.faults == [] and len(source) == 8
    for index, frame in enumerate(clip_files.moving()):
        record, remarks = source.examine(index)
        assert remarks == []
        thing = np.isin(record["panoptic"], [s["id"] for s in record["segments"] if s["id"] > 5])
        assert (thing == (frame[..., 0] > 120)).mean() > 0.97


def test_a_segment_has_one_id_in_all_frames(made):
    out, _ = made
    content = json.loads((out / "clip_mp4_panoptic.json").read_text())
    found = {
        tuple((info["category_id"], info["id"]) for info in annotation["segments_info"])
        for annotation in content["annotations"]
    }
    ids = METADATA.category_ids
    assert found == {((ids[THING], 6), (ids[GRASS], 1 + GRASS), (ids[SKY], 1 + SKY))}
    results = json.loads((out / "clip_mp4_instance.json").read_text())
    assert [(result["image_id"], result["track_id"]) for result in results] == [
        (t, 1) for t in range(8)
    ]
    for result, frame in zip(results, clip_files.moving(), strict=True):
        mask = coco_mask.decode(result["segmentation"]) > 0
        assert (mask == (frame[..., 0] > 120)).mean() > 0.97


def test_semantic_pictures_have_the_ids_of_the_data_set(made):
    out, _ = made
    for t in (0, 7):
        with Image.open(out / "clip_mp4_semantic" / f"{t:06d}.png") as stored:
            found = set(np.unique(np.asarray(stored)).tolist())
        assert found == {METADATA.category_ids[c] for c in (THING, SKY, GRASS)}


def colours_of(out, name, seconds):
    """The colour of the overlay in the middle of the square, for each frame."""
    frames, _, _ = clip_files.read(out / f"{name}_overlay.mp4")
    factor = len(frames[0]) // 48
    return [
        frame[18 * factor, (6 + 3 * t) * factor] for t, frame in enumerate(frames) if t in seconds
    ]


def test_an_object_keeps_its_colour_when_the_order_of_the_segments_changes(tmp_path):
    def shuffled(image, tasks):
        results = by_colour(image, tasks)
        number = shuffled.calls = shuffled.calls + 1
        mask = results["instance"].masks[0]
        far = np.zeros_like(mask)
        far[36:46, 2:20] = True
        order = [0, 1] if number % 2 else [1, 0]
        masks = np.stack([mask, far])[order]
        kept = results["instance"]
        return {
            "instance": Segmentation(
                "instance",
                METADATA,
                instances=Instances(
                    masks,
                    np.array([0.9, 0.8], np.float32),
                    np.array([kept.labels[0]] * 2, np.int32),
                ),
                image=image,
            )
        }

    shuffled.calls = 0
    path = clip_files.write(tmp_path / "a.mp4")
    video.predict_video(shuffled, path, tmp_path / "out", "instance")
    results = json.loads((tmp_path / "out" / "a_mp4_instance.json").read_text())
    left = {r["track_id"] for r in results if r["bbox"][1] == 36}
    assert len(left) == 1 and len({r["track_id"] for r in results}) == 2
    found = np.array(colours_of(tmp_path / "out", "a_mp4_instance", range(8)), int)
    assert np.abs(found - found[0]).max() < 25, found.tolist()


def test_instances_below_the_score_or_found_twice_are_left_out(tmp_path):
    def twice(image, tasks):
        mask = by_colour(image, ("instance",))["instance"].masks[0]
        return {
            "instance": Segmentation(
                "instance",
                METADATA,
                instances=Instances(
                    np.stack([mask, mask, mask, ~mask]),
                    np.array([0.9, 0.8, 0.7, 0.4], np.float32),
                    np.array([1, 1, 0, 1], np.int32),
                ),
                image=image,
            )
        }

    path = clip_files.write(tmp_path / "a.mp4")
    video.predict_video(twice, path, tmp_path, "instance")
    results = json.loads((tmp_path / "a_mp4_instance.json").read_text())
    ids = METADATA.category_ids
    assert [(r["category_id"], r["track_id"]) for r in results[:2]] == [(ids[1], 1), (ids[0], 2)]
    assert len(results) == 16 and {r["score"] for r in results} == {0.9, 0.7}


def test_frames_without_any_segment_give_a_video(tmp_path):
    def nothing(image, tasks):
        size = image.shape[:2]
        empty = Instances(
            np.zeros((0, *size), bool), np.zeros(0, np.float32), np.zeros(0, np.int32)
        )
        return {
            "panoptic": Segmentation(
                "panoptic",
                METADATA,
                segments=np.zeros(size, np.int32),
                segments_info=[],
                image=image,
            ),
            "instance": Segmentation("instance", METADATA, instances=empty, image=image),
            "semantic": Segmentation(
                "semantic", METADATA, class_map=np.zeros(size, np.int32), image=image
            ),
        }

    video.predict_video(nothing, clip_files.write(tmp_path / "a.mp4"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "a_mp4_instance.json").read_text()) == []
    content = json.loads((tmp_path / "out" / "a_mp4_panoptic.json").read_text())
    assert [a["segments_info"] for a in content["annotations"]] == [[]] * 8


def test_a_real_model_segments_a_pattern_of_frames(tmp_path):
    """Its results are those of the frames alone, but for the ids."""
    for t in range(3):
        Image.fromarray(picture(seed=t)).save(tmp_path / f"{t}.png")
    video.predict_video(segmenter(), tmp_path / "*.png", tmp_path / "out")
    name = f"{tmp_path.name}_png"
    content = json.loads((tmp_path / "out" / f"{name}_panoptic.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["0.png", "1.png", "2.png"]
    for t in range(3):
        alone = segmenter()(picture(seed=t), task="panoptic")
        infos = content["annotations"][t]["segments_info"]
        with Image.open(tmp_path / "out" / f"{name}_panoptic" / f"{t:06d}.png") as stored:
            ids = np.asarray(stored).astype(int) @ [1, 256, 65536]
        assert len(infos) == len(alone.segments_info)
        for info, own in zip(infos, alone.segments_info, strict=True):
            np.testing.assert_array_equal(ids == info["id"], alone.segments == own["id"])


def test_the_command_takes_videos(tmp_path, monkeypatch, capsys):
    path = clip_files.write(tmp_path / "a.mp4")
    monkeypatch.setattr("oneformer_jax.load", lambda path, checkpoint: by_colour)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.json").touch()
    modes.predict(str(tmp_path / "run"), str(path), "semantic", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "2 results are in" in printed and "a_mp4_semantic_overlay.mp4" in printed


def test_a_video_and_its_results_are_on_this_machine(tmp_path, monkeypatch):
    path = clip_files.write(tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"--output of a video cannot be in a bucket \(gs://b/out\)"):
        modes.predict("run", str(path), "semantic", "gs://b/out")
    for call in (clips.open_clip("gs://b/a.mp4"), clips.open_clip("s3://b/*.png")):
        with pytest.raises(OSError, match=r"a video cannot be in a bucket"), call:
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


# --- what goes wrong ---


def entries(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_a_clip_without_frames_leaves_no_trace(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"no image")
    for path in ("a.mp4", "*.png", "missing.mp4"):
        with pytest.raises(clips.VideoError):
            video.predict_video(by_colour, tmp_path / path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError("no memory")])
def test_an_interrupted_run_leaves_the_earlier_results(tmp_path, stop):
    path = clip_files.write(tmp_path / "a.mp4")
    out = tmp_path / "out"
    video.predict_video(by_colour, path, out)
    before = {name: (out / name).stat().st_mtime_ns for name in entries(out)}
    calls = []

    def stopping(image, tasks):
        calls.append(1)
        if len(calls) == 6:
            raise stop
        return by_colour(image, tasks)

    threads = threading.active_count()
    with pytest.raises((KeyboardInterrupt, ValueError)):
        video.predict_video(stopping, path, out)
    assert {name: (out / name).stat().st_mtime_ns for name in entries(out)} == before
    assert threading.active_count() == threads


def test_a_failing_disk_ends_the_run_in_one_error(tmp_path, monkeypatch):
    def full(self, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    path = clip_files.write(tmp_path / "a.mp4", clip_files.moving(30))
    with pytest.raises(OSError, match="No space left"):
        video.predict_video(by_colour, path, tmp_path / "out", "semantic")
    assert entries(tmp_path / "out") == []


def test_a_second_run_replaces_all_files_of_the_first(tmp_path):
    path = clip_files.write(tmp_path / "a.mp4")
    video.predict_video(by_colour, path, tmp_path / "out", "panoptic")
    clip_files.write(path, clip_files.moving(3))
    video.predict_video(by_colour, path, tmp_path / "out", "panoptic")
    assert entries(tmp_path / "out" / "a_mp4_panoptic") == [f"{t:06d}.png" for t in range(3)]
    content = json.loads((tmp_path / "out" / "a_mp4_panoptic.json").read_text())
    assert len(content["annotations"]) == 3
    assert len(entries(tmp_path / "out")) == 3


def test_results_of_folders_with_dots_replace_their_own_alone(tmp_path):
    for folder in ("v1.frames", "v1"):
        (tmp_path / folder).mkdir()
        for t in range(2):
            Image.fromarray(clip_files.moving()[t]).save(tmp_path / folder / f"{t}.png")
    for folder in ("v1.frames", "v1", "v1.frames"):
        video.predict_video(by_colour, tmp_path / folder / "*.png", tmp_path / "out", "panoptic")
    assert entries(tmp_path / "out") == [
        f"{name}_png_panoptic{end}"
        for name in ("v1.frames", "v1")
        for end in ("", ".json", "_overlay.mp4")
    ]


def test_leftovers_of_a_killed_run_are_removed_and_those_of_a_running_one_are_kept(tmp_path):
    old, young = tmp_path / f"{video._SCRATCH}old", tmp_path / f"{video._SCRATCH}young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half.mp4").write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    video.predict_video(by_colour, clip_files.write(tmp_path / "a.mp4"), tmp_path, "semantic")
    assert not old.exists() and young.exists()


def test_few_frames_are_in_memory_however_long_the_video(tmp_path, monkeypatch):
    alive, most = set(), []

    def counted(frames):
        for frame in frames:
            alive.add(frame.number)
            weakref.finalize(frame, alive.discard, frame.number)
            most.append(len(alive))
            yield frame

    opened = clips.open_clip

    @contextlib.contextmanager
    def watched(*args):
        with opened(*args) as clip:
            clip.frames = counted(clip.frames)
            yield clip

    monkeypatch.setattr(clips, "open_clip", watched)
    path = clip_files.write(tmp_path / "a.mp4", clip_files.moving(60))
    video.predict_video(by_colour, path, tmp_path / "out", "semantic", overlay_size=0)
    assert len(most) == 60 and max(most) <= 2 * video.AHEAD + 2 * video.DRAWERS


def test_progress_tells_the_rate_and_the_time_left(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    clock = itertools.count(0, 40)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    path = clip_files.write(tmp_path / "a.mp4")
    video.predict_video(by_colour, path, tmp_path / "out", "semantic")
    # The first frame, for which programs are compiled, does not count.
    assert f"1 of 8 frames of {path}, 0.0 a second, 9 min 20 s left" in caplog.text


def test_an_unknown_task_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'all of them'"):
        video.predict_video(by_colour, "a.mp4", tmp_path, "all of them")
    assert predict.tasks_of("all") == ("panoptic", "instance", "semantic")
