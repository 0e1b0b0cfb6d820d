"""CLU metric writers that need no TensorFlow: TensorBoard events, and JSON lines beside them.

CLU imports TensorFlow (1.3 GB installed, seconds to import) for its TensorBoard back end
`clu.metric_writers.summary_writer` only. `_import_clu` puts our module in that place before CLU is
imported, so CLU's own helpers, such as `create_default_writer`, write with the class here. A CLU
that another package imported before is left alone.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import socket
import sys
import time
import types
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.histogram import summary_v2 as histogram_summary
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.text import summary_v2 as text_summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from oneformer_jax import files, remote, rules

_CLU_BACK_END = "clu.metric_writers.summary_writer"
_LARGE = 1 << 20  # bytes of an event file in a bucket, which is written anew at each flush
_file_number = itertools.count()  # numbers the event files of one process and second


def _import_clu() -> tuple[types.ModuleType, types.ModuleType | None]:
    """Imports clu.metric_writers; returns it and its new back end (None: CLU was imported)."""
    stand_in = None
    if _CLU_BACK_END not in sys.modules:
        stand_in = types.ModuleType(_CLU_BACK_END, "TensorBoard back end of oneformer_jax.")
        stand_in.SummaryWriter = None  # set later: its base class is in the package being imported
        sys.modules[_CLU_BACK_END] = stand_in
    from clu import metric_writers

    return metric_writers, stand_in


metric_writers, _stand_in = _import_clu()


class SummaryWriter(metric_writers.MetricWriter):
    """Writes TensorBoard event files; every call is on disk when it returns.

    In a bucket it is there after `flush`, and a file that is large is followed by another one: an
    object cannot be appended to.

    Args:
      logdir: folder of the event files; made if missing.
      resume_step: TensorBoard is told to forget later steps in earlier files of `logdir`.
    """

    def __init__(self, logdir: str | os.PathLike, resume_step: int | None = None):
        files.make_folder(logdir)
        self._logdir = logdir
        self._begin_file()
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(
                event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start)
            )

    def _begin_file(self) -> None:
        name = (
            f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
            f".{next(_file_number)}"
        )
        path = os.path.join(self._logdir, name)
        self._file = _open(path, "wb")
        self._records = RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _write(self, event: event_pb2.Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def _write_summary(self, step: int, summary: summary_pb2.Summary) -> None:
        self._write(event_pb2.Event(wall_time=time.time(), step=int(step), summary=summary))

    def _write_tensor(self, step: int, tag: str, value: Any, metadata: Any) -> None:
        entry = summary_pb2.Summary.Value(
            tag=tag, tensor=tensor_util.make_tensor_proto(value), metadata=metadata
        )
        self._write_summary(step, summary_pb2.Summary(value=[entry]))

    def write_summaries(self, step, values, metadata=None):
        for tag, value in values.items():
            self._write_tensor(step, tag, np.asarray(value), metadata)

    def write_scalars(self, step, scalars):
        for tag, value in scalars.items():
            if value is not None:  # None is an undefined score, such as an absent class's
                # A plain value, because `EventAccumulator` does not forget tensors of steps after
                # `resume_step`.
                value = float(np.asarray(value, np.float32).reshape(()))
                entry = summary_pb2.Summary.Value(tag=tag, simple_value=value)
                self._write_summary(step, summary_pb2.Summary(value=[entry]))

    def write_images(self, step, images):
        """Writes images [H, W, C] or [N, H, W, C], C 1 or 3: uint8, or float in 0..1."""
        for tag, batch in images.items():
            batch = np.asarray(batch)
            batch = batch[None] if batch.ndim == 3 else batch
            _, height, width, _ = batch.shape
            value = [str(width).encode(), str(height).encode(), *(_png(x) for x in batch)]
            metadata = image_metadata.create_summary_metadata(display_name=None, description=None)
            self._write_tensor(step, tag, value, metadata)

    def write_videos(self, step, videos):
        raise NotImplementedError("videos cannot be written without TensorFlow")

    def write_audios(self, step, audios, *, sample_rate):
        raise NotImplementedError("sound cannot be written without TensorFlow")

    def write_texts(self, step, texts):
        for tag, text in texts.items():
            self._write_summary(step, text_summary.text_pb(tag, text))

    def write_histograms(self, step, arrays, num_buckets=None):
        for tag, array in arrays.items():
            buckets = (num_buckets or {}).get(tag)
            self._write_summary(
                step, histogram_summary.histogram_pb(tag, np.asarray(array), buckets=buckets)
            )

    def write_hparams(self, hparams):
        """Writes a nested mapping of settings; values that are not numbers become text."""
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in rules.flattened(hparams).items()
        }
        self._write_summary(0, hparams_summary.hparams_pb(plain))

    def flush(self):
        _flush(self._file)
        if remote.is_remote(self._logdir) and len(self._file) > _LARGE:
            self._file.close()
            self._begin_file()

    def close(self):
        self._file.close()


def _png(image: np.ndarray) -> bytes:
    if image.dtype != np.uint8:
        image = np.uint8(np.clip(image.astype(np.float32), 0, 1) * 255 + 0.5)
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


class QuietWriter(metric_writers.MetricWriter):
    """Ignores everything; writers derive from it that take a part."""

    def _ignore(self, *unused: Any, **also_unused: Any) -> None:
        pass

    write_summaries = write_scalars = write_images = write_videos = write_audios = _ignore
    write_texts = write_histograms = write_hparams = flush = close = _ignore


class JsonLinesWriter(QuietWriter):
    """Appends one JSON object for each `write_scalars`: {"step", "time" (Unix), name: value, ...}.

    Values that are not finite are null. Texts go into texts.json beside it, all else is ignored.

    Args:
      path: the file; its folder is made if missing.
      resume_step: drop the lines of later steps, and a half-written last line; do not repeat lines
        of this step.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
        files.make_folder(os.path.dirname(path) or ".")
        self._written: set[tuple[int, frozenset[str]]] = set()  # step and names of lines kept
        if resume_step is not None and remote.path_of(path).exists():
            self._written = _keep_lines(path, resume_step)
        self._file = _open(path, "ab")
        self._texts = remote.path_of(path).with_name("texts.json")

    def write_scalars(self, step, scalars):
        values = {name: _number(value) for name, value in scalars.items()}
        if (int(step), frozenset(values)) in self._written:
            return
        line = json.dumps({"step": int(step), "time": round(time.time(), 3), **values})
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def write_texts(self, step, texts):
        files.write_atomically(self._texts, json.dumps(texts, indent=1) + "\n")

    def flush(self):
        _flush(self._file)

    def close(self):
        self._file.close()


def _open(path: str | os.PathLike, mode: str) -> Any:
    """Opens a file to write, "wb" or "ab"; the writer closes it."""
    if remote.is_remote(path):
        return remote.Growing(path, append=mode == "ab")
    return open(path, mode)


def _flush(file: Any) -> None:
    """Brings all that was written to the disk, or into the bucket."""
    file.flush()
    if isinstance(file, remote.Growing):
        file.store()


def _number(value: Any) -> float | int | None:
    if value is None:
        return None
    value = np.asarray(value).reshape(()).item()
    return value if math.isfinite(value) else None


def _keep_lines(path: str | os.PathLike, last_step: int) -> set[tuple[int, frozenset[str]]]:
    """Rewrites the file at `path` without lines after `last_step` or broken ones.

    Returns the names in each line of that step.
    """
    kept, of_last = [], set()
    with remote.path_of(path).open(encoding="utf-8") as file:
        for line in file:
            try:
                values = json.loads(line)
                if values["step"] <= last_step:
                    kept.append(line)
                if values["step"] == last_step:
                    of_last.add((last_step, frozenset(values) - {"step", "time"}))
            except (ValueError, KeyError, TypeError):
                continue  # the process died while it wrote this line
    files.write_atomically(path, "".join(kept))
    return of_last


if _stand_in is not None:
    _stand_in.SummaryWriter = SummaryWriter
    metric_writers.SummaryWriter = SummaryWriter
    metric_writers.utils.SummaryWriter = SummaryWriter
