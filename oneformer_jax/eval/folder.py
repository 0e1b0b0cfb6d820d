"""Segments image files and folders of them, and writes the results: `predict_files`."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from concurrent import futures
from typing import Any

from oneformer_jax import files, remote
from oneformer_jax.eval.inputs import read_image
from oneformer_jax.eval.predict import Segmenter, tasks_of
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.write import is_done, source_of, write_prediction
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.eval_loader import RecordError
from oneformer_jax.input_pipeline.images import ImageError
from oneformer_jax.progress import progress_log
from oneformer_jax.types import TASKS

# Results that may wait to be written.
_WAITING = 2


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `predict_files`.

    Attributes:
      written: files written, those of an image together.
      segmented: number of images segmented.
      skipped: number of images whose results were there.
    """

    written: tuple[pathlib.Path, ...]
    segmented: int
    skipped: int


class _Files:
    """Image files as the records of an evaluation."""

    def __init__(self, paths: Sequence[pathlib.Path], max_pixels: int):
        self._paths, self._max_pixels = paths, max_pixels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        path = str(self._paths[index])
        try:
            return {"image": read_image(path, self._max_pixels), "file_name": path}
        except ImageError as error:
            raise RecordError(str(error)) from error

    def image_size(self, index: int) -> tuple[int, int]:
        path = str(self._paths[index])
        data = images.read_file(path, RecordError)
        return images.read_size(data, path, max_pixels=self._max_pixels, error=RecordError)


def find_images(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str]
) -> list[pathlib.Path]:
    """Lists an image file, or those directly in a folder: visible files with `images.ENDINGS`.

    Raises:
      ImageError: there is no such file or folder.
      ValueError: a folder without images, or the results in `out_dir` would land among them.
    """
    path, out_dir = remote.path_of(path), remote.path_of(out_dir)
    remote.check(path)
    remote.check(out_dir, writing=True)
    if not path.exists():
        raise ImageError(f"{path}: there is no such image file or folder")
    if not path.is_dir():
        return [path]
    if out_dir.resolve() == path.resolve():
        raise ValueError(f"the results would mix with the images in {path}; use another folder")
    found = [path / name for name in images.list_images(path)]
    if not found:
        raise ValueError(f"{path} has no images (files with {', '.join(images.ENDINGS)})")
    return found


def predict_files(
    segmenter: Segmenter,
    found: Sequence[pathlib.Path],
    out_dir: str | os.PathLike[str],
    task: str | Sequence[str] = "all",
    max_pixels: int = images.MAX_PIXELS,
    *,
    threshold: float | None = None,
    overwrite: bool = False,
) -> Report:
    """Segments image files and writes the results.

    Images of one padded size follow each other, in batches. Reading the next images and writing
    the last results go on beside the model. An image whose results of the same model, settings and
    image file are in `out_dir` is skipped.

    Args:
      segmenter: the model.
      found: the files, see `find_images`.
      out_dir: folder of the results, made as needed; see `write_prediction`.
      task: one of `TASKS`, several, or "all".
      max_pixels: limit of the pixels of an image.
      threshold: see `Segmenter.__call__`.
      overwrite: segment every image again.

    Raises:
      ImageError: images cannot be read; of several, after all others are done, and the log names
        each.
      ValueError: unknown task.
    """
    tasks = tasks_of(task)
    out_dir = remote.path_of(out_dir)
    files.remove_leftovers(out_dir)
    # One look at a folder, and not one for each name, which in a bucket takes minutes.
    present = {name.casefold() for name in remote.names(out_dir)}
    names = _result_names(found, out_dir, present)
    named = list(zip(found, names, strict=True))
    made_by = {file: _fingerprint(segmenter, file, threshold) for file in found}
    waiting = [
        (file, name)
        for file, name in named
        if overwrite
        or not _has_results(name, present)
        or not is_done(out_dir, name, tasks, made_by[file])
    ]
    if len(found) == len(waiting) == 1:
        read_image(found[0], max_pixels)  # raises its own error
    broken: dict[int, str] = {}
    writing: collections.deque[futures.Future] = collections.deque()

    def write(index: int, results: dict[str, Segmentation]) -> list[pathlib.Path]:
        file, name = waiting[index]
        return [
            written_path
            for segmentation in results.values()
            for written_path in write_prediction(
                out_dir, name, segmentation, source=file.name, made_by=made_by[file]
            )
        ]

    written: list[pathlib.Path] = []
    source = _Files([file for file, _ in waiting], max_pixels)
    progress = progress_log(len(waiting))
    segmented = 0
    with futures.ThreadPoolExecutor(1, "writer") as writer:
        stream = segmenter.segment_source(source, tasks, threshold=threshold, broken=broken)
        for segmented, (index, results) in enumerate(stream, 1):
            writing.append(writer.submit(write, index, results))
            while len(writing) > _WAITING:
                written += writing.popleft().result()
            progress(segmented + len(broken))
        for files_of_image in writing:
            written += files_of_image.result()
    if broken:
        raise ImageError(
            f"{len(broken)} of {len(found)} images cannot be read, see above; the results of the "
            f"others are in {out_dir}"
        )
    return Report(tuple(written), segmented, len(found) - len(waiting))


def _fingerprint(segmenter: Segmenter, file: pathlib.Path, threshold: float | None) -> str:
    """Identifies what results are made of: the model, its settings, and the image file."""
    found: Any = file.stat()
    if remote.is_remote(file):
        version = f"{found.length} {found.mtime}"
    else:
        version = f"{found.st_size} {found.st_mtime_ns}"
    text = f"{segmenter.fingerprint} {threshold} {version}"
    return hashlib.sha256(text.encode()).hexdigest()


def _has_results(name: str, present: Collection[str]) -> bool:
    return any(f"{name}_{task}_overlay.png".casefold() in present for task in TASKS)


def _result_names(
    found: Sequence[pathlib.Path], out_dir: pathlib.Path, present: Collection[str]
) -> list[str]:
    """Names the results of files, distinctly even if case does not count.

    A name is the file's stem. If another file's results in the folder have it, of this run or an
    earlier one, it is the file's name with "_" for ".", then with a digest.
    """
    stems = collections.Counter(file.stem.casefold() for file in found)
    names: list[str] = []
    taken: set[str] = set()
    for file in found:
        whole = file.name.replace(".", "_")
        name = next(
            (
                name
                for name in (file.stem, whole)
                if stems[name.casefold()] == (name == file.stem)
                and name.casefold() not in taken
                and (
                    not _has_results(name, present) or source_of(out_dir, name) in (file.name, None)
                )
            ),
            f"{whole}_{hashlib.sha256(file.name.encode()).hexdigest()[:8]}",
        )
        names.append(name)
        taken.add(name.casefold())
    return names
