"""Segments videos: frames in, overlay videos and COCO's formats out.

Objects keep their number and colour from frame to frame. Reading, the model, drawing and encoding
go on beside each other, and only a few frames are in memory, however long the video.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from oneformer_jax.eval import clips, write
from oneformer_jax.eval.clips import Clip, Frame
from oneformer_jax.eval.predict import tasks_of
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.tracking import Identity, Patch, Tracker, distinct, patches
from oneformer_jax.files import first_few
from oneformer_jax.input_pipeline import images
from oneformer_jax.progress import progress_log

# Frames that are read ahead, and threads that draw: drawing takes longer than encoding.
AHEAD = 2
DRAWERS = min(4, os.cpu_count() or 1)
_LARGEST = 3840 * 2160  # pixels of an overlay; many players take no more
# Folders of unfinished results; those of a process that was killed are removed after a while.
_SCRATCH = ".video_"
_STALE_SECONDS = 3600.0


def predict_video(
    segmenter: Callable[[np.ndarray, Sequence[str]], dict[str, Segmentation]],
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    task: str | Sequence[str] = "all",
    max_pixels: int = images.MAX_PIXELS,
    *,
    min_score: float = 0.5,
    overlay_size: int = 480,
) -> list[pathlib.Path]:
    """Segments a video and writes the results of all its frames.

    NAME is clip_mp4 of clip.mp4, and frames_png of "frames/*.png". Each task has an overlay
    NAME_TASK_overlay.mp4 with the times of the source, without sound. Other files:

    * panoptic: NAME_panoptic.json and the folder NAME_panoptic of its PNGs, in COCO's panoptic
      format; each frame is an image. A segment has the id of its object in all frames; that of
      stuff is 1 + the position of its category.
    * instance: NAME_instance.json, a list in COCO's result format, with the object's `track_id`.
    * semantic: the folder NAME_semantic of PNGs of class ids, as `write_prediction` makes them.

    An image id is the number of the frame, from 0. Results get their names when all are complete: a
    run that is interrupted leaves nothing.

    Args:
      segmenter: a `Segmenter`.
      path: a video file, or a pattern of image files such as "frames/*.png".
      out_dir: folder of the results, made as needed.
      task: one of `TASKS`, several, or "all".
      max_pixels: limit of the pixels of a frame.
      min_score: instances below this score are left out, as are those that nearly repeat a better
        one of their class.
      overlay_size: overlays of smaller frames are enlarged, as by `write_prediction`.

    Returns:
      The files and folders written.

    Raises:
      VideoError: the video cannot be read or written.
      ValueError: unknown task.
    """
    tasks = tasks_of(task)
    clips.library()
    out_dir = pathlib.Path(out_dir)
    with contextlib.ExitStack() as stack:
        clip = stack.enter_context(clips.open_clip(path, max_pixels))
        frames = _read_ahead(stack.enter_context(_pool(1, "reader")), clip.frames)
        first = next(frames, None)
        if first is None:
            raise clips.VideoError(f"{path}: no frame can be read: {first_few(clip.faults, 1)}")
        out_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale(out_dir)
        scratch = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=out_dir))
        )
        results = {
            one: _RESULTS[one](scratch / f"{clip.name}_{one}", clip, min_score, overlay_size)
            for one in tasks
        }
        for result in results.values():
            stack.callback(result.close)
        follower, drawers, writer = (
            stack.enter_context(_pool(threads, name))
            for threads, name in ((1, "follower"), (DRAWERS, "drawer"), (1, "writer"))
        )
        waiting: collections.deque[futures.Future[None]] = collections.deque()
        progress = None
        for done, frame in enumerate(itertools.chain([first], frames)):
            for one, segmentation in segmenter(frame.image, tasks).items():
                result = results[one]
                followed = follower.submit(result.follow, result.relevant(segmentation))
                drawn = drawers.submit(result.draw, frame, followed)
                waiting.append(writer.submit(result.add, frame, drawn))
            while len(waiting) > (AHEAD + DRAWERS) * len(tasks):
                waiting.popleft().result()
            # It begins after the first frame, for which programs are compiled.
            progress = progress or progress_log(clip.total, f"frames of {clip.path}")
            progress(done)
            os.utime(scratch)  # alive: see `_remove_stale`
        for written in waiting:
            written.result()
        for result in results.values():
            result.finish()
        if clip.faults:
            logging.warning("%s", first_few(clip.faults, separator="\n"))
        return _publish(scratch, out_dir)


@contextlib.contextmanager
def _pool(threads: int, name: str) -> Iterator[futures.ThreadPoolExecutor]:
    """Makes a pool of threads; what it has not begun when the block ends is dropped."""
    pool = futures.ThreadPoolExecutor(threads, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(reader: futures.Executor, frames: Iterator[Frame]) -> Iterator[Frame]:
    def read() -> Frame | None:
        return next(frames, None)

    started = collections.deque(reader.submit(read) for _ in range(AHEAD))
    while (frame := started.popleft().result()) is not None:
        started.append(reader.submit(read))
        yield frame


# ------------------------------------------------------------------------ results of a task


# A segmentation, and who its segments are, in their order; None without objects.
_Followed = tuple[Segmentation, list[Identity] | None]
# A frame's overlay, uint8 [H, W, 3], and what of it is written into the JSON.
_Drawn = tuple[np.ndarray, list[Any]]


class _Result:
    """The results of a task: files whose names begin with `path`, complete after `finish`.

    `follow` and `add` are called frame after frame, `draw` in any order.
    """

    def __init__(self, path: pathlib.Path, clip: Clip, min_score: float, overlay_size: int):
        self.path, self.clip, self.min_score = path, clip, min_score
        self._overlay_size = overlay_size
        self._video: clips.VideoWriter | None = None

    def relevant(self, segmentation: Segmentation) -> Segmentation:
        """Drops what is not written, before it waits in memory."""
        return segmentation

    def follow(self, segmentation: Segmentation) -> _Followed:
        return segmentation, None

    def draw(self, frame: Frame, following: futures.Future[_Followed]) -> _Drawn:
        segmentation, identities = following.result()
        overlay = segmentation.overlay(
            frame.image,
            min_score=self.min_score,
            min_size=self._overlay_size,
            max_pixels=_LARGEST,
            numbers=None if identities is None else [identity.number for identity in identities],
            steady=True,
        )
        return overlay, self.describe(frame, (segmentation, identities))

    def describe(self, frame: Frame, followed: _Followed) -> list[Any]:
        """Writes the frame's PNG; returns its entries."""
        raise NotImplementedError

    def add(self, frame: Frame, drawing: futures.Future[_Drawn]) -> None:
        overlay, entries = drawing.result()
        if self._video is None:
            height, width = overlay.shape[:2]
            self._video = clips.VideoWriter(
                f"{self.path}_overlay.mp4",
                (height, width),
                self.clip.rate,
                aspect=self.clip.aspect,
            )
        self._video.add(overlay, frame.time)
        for entry in entries:
            self.store(entry)

    def store(self, entry: Any) -> None:
        """Writes an entry into the JSON."""

    def finish(self) -> None:
        if self._video is not None:
            self._video.finish()

    def close(self) -> None:
        """Gives up what is not finished."""
        if self._video is not None:
            self._video.close()

    def write_png(self, frame: Frame, pixels: np.ndarray) -> str:
        name = f"{frame.number:06d}.png"
        self.path.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(self.path / name)
        return name


def _memory(clip: Clip) -> int:
    """Frames that the tracker remembers: those of a second."""
    return min(max(8, round(clip.rate)), 60)


class _Semantic(_Result):
    def describe(self, frame: Frame, followed: _Followed) -> list[Any]:
        self.write_png(frame, write.dataset_ids(followed[0]))
        return []


class _Listed(_Result):
    """A result with a JSON, which is written as it comes."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._json = open(f"{self.path}.json", "w", encoding="utf-8")  # noqa: SIM115
        self._separator = ""

    def store(self, entry: Any) -> None:
        self._json.write(self._separator + json.dumps(entry, allow_nan=False))
        self._separator = ",\n"

    def close(self) -> None:
        super().close()
        self._json.close()


class _Instances(_Listed):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self._tracker = Tracker(memory=_memory(self.clip))
        self._json.write("[")

    def relevant(self, segmentation: Segmentation) -> Segmentation:
        found = segmentation.instances
        sure = found.take(np.flatnonzero(found.scores >= self.min_score))
        return dataclasses.replace(segmentation, instances=sure)

    def follow(self, segmentation: Segmentation) -> _Followed:
        found = [Patch.of(mask) for mask in segmentation.masks]
        labels = segmentation.labels.tolist()
        kept = distinct(found, labels)
        identities = self._tracker.update([found[i] for i in kept], [labels[i] for i in kept])
        kept_ones = segmentation.instances.take(kept)
        return dataclasses.replace(segmentation, instances=kept_ones), identities

    def describe(self, frame: Frame, followed: _Followed) -> list[Any]:
        segmentation, identities = followed
        entries = segmentation.to_coco(frame.number)
        return [
            entry | {"track_id": identity.id}
            for entry, identity in zip(entries, identities or (), strict=True)
        ]

    def finish(self) -> None:
        super().finish()
        self._json.write("]\n")
        self._json.close()


class _Panoptic(_Listed):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self._tracker: Tracker | None = None
        # The list of images comes after that of annotations. Its texts are kept in a file, too.
        self._images = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._categories: list[Any] = []
        self._json.write('{"annotations": [')

    def follow(self, segmentation: Segmentation) -> _Followed:
        if self._tracker is None:
            first = 1 + segmentation.metadata.num_classes
            self._tracker = Tracker(first, memory=_memory(self.clip))
        infos = segmentation.segments_info
        things = [info for info in infos if info["isthing"]]
        tracked = iter(
            self._tracker.update(
                patches(segmentation.segments, [info["id"] for info in things]),
                [info["category_id"] for info in things],
            )
        )
        identities = {
            info["id"]: next(tracked) if info["isthing"] else Identity(1 + info["category_id"], 0)
            for info in infos
        }
        ids = np.zeros(1 + max(identities, default=0), np.int32)
        for position, identity in identities.items():
            ids[position] = identity.id
        numbered = dataclasses.replace(
            segmentation,
            segments=ids[segmentation.segments],
            segments_info=[info | {"id": identities[info["id"]].id} for info in infos],
        )
        return numbered, [identities[info["id"]] for info in segmentation.ranked_infos]

    def describe(self, frame: Frame, followed: _Followed) -> list[Any]:
        segmentation, _ = followed
        png = self.write_png(frame, write.encode_ids(segmentation.segments))
        content = write.coco_panoptic(segmentation, png, frame.number)
        (image,), (annotation,) = content["images"], content["annotations"]
        image["file_name"] = frame.file_name or png
        image |= {"video_id": 1, "frame_id": frame.number, "time": round(float(frame.time), 6)}
        return [(image, annotation, content["categories"])]

    def store(self, entry: Any) -> None:
        image, annotation, self._categories = entry
        self._images.write(self._separator + json.dumps(image))
        super().store(annotation)

    def finish(self) -> None:
        super().finish()
        self._json.write('],\n"images": [')
        self._images.seek(0)
        shutil.copyfileobj(self._images, self._json)
        videos = [{"id": 1, "file_name": os.path.basename(self.clip.path)}]
        rest = json.dumps({"videos": videos, "categories": self._categories})
        self._json.write(f"],\n{rest[1:]}\n")
        self._json.close()

    def close(self) -> None:
        super().close()
        self._images.close()


_RESULTS: dict[str, type[_Result]] = {
    "panoptic": _Panoptic,
    "instance": _Instances,
    "semantic": _Semantic,
}


# ------------------------------------------------------------------------ folders


def _remove_stale(out_dir: pathlib.Path) -> None:
    """Removes the unfinished results of processes that were killed."""
    for folder in out_dir.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(scratch: pathlib.Path, out_dir: pathlib.Path) -> list[pathlib.Path]:
    """Gives the results their final names, folders first: a JSON is there when its PNGs are."""
    written = []
    for made in sorted(scratch.iterdir(), key=lambda path: (path.is_file(), path.name)):
        target = out_dir / made.name
        if made.is_dir():
            (out_dir / f"{made.name}.json").unlink(missing_ok=True)
            if target.exists():
                target.rename(scratch / f"{made.name}_old")
        else:
            with open(made, "rb") as file:
                os.fsync(file.fileno())
        made.replace(target)
        written.append(target)
    return written
