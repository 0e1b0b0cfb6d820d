"""Metrics of a run on disk, progress on the console, and the use of its time.

`make_writer` makes the CLU writer of the files; the console gets `Chrono.line`, as a writer would
print fifty terms a line.
"""

from __future__ import annotations

import contextlib
import logging as stdlib_logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import msgspec
import numpy as np
from absl import logging

from oneformer_jax import config_rules, remote
from oneformer_jax.files import first_few
from oneformer_jax.progress import duration
from oneformer_jax.train import reading
from oneformer_jax.train.dashboards import RunWriter
from oneformer_jax.train.tensorboard import JsonLinesWriter, metric_writers

METRICS_FILE = "metrics.jsonl"
FLOP_UTILISATION = "time/flop_utilisation"  # only if the devices' peak rate is known
PROFILE_FILE = "PROFILE"
_LOOK_EVERY = 15.0  # seconds between looks for that file in a bucket

# ------------------------------------------------------------------ metrics on disk


def make_writer(
    workdir: str | os.PathLike,
    resume_step: int | None = None,
    trackers: Callable[[], Sequence[metric_writers.MetricWriter]] = tuple,
) -> metric_writers.MetricWriter:
    """Makes a CLU writer of TensorBoard events and of metrics.jsonl in `workdir`.

    With several hosts only the first writes.

    Args:
      workdir: the run's folder, made if missing.
      resume_step: the step that the run resumes from (0: the start). Later steps of an interrupted
        run are removed from metrics.jsonl, and TensorBoard is told to forget them.
      trackers: makes further writers, on the first host.
    """
    if jax.process_index() != 0:
        return metric_writers.MultiWriter([])
    return metric_writers.MultiWriter(
        [
            RunWriter(workdir, resume_step),
            JsonLinesWriter(os.path.join(workdir, METRICS_FILE), resume_step),
            *trackers(),
        ]
    )


# ------------------------------------------------------------------ non-finite values


class NonFiniteLoss(FloatingPointError):
    """A loss or norm that is NaN or infinite.

    Attributes:
      step: step of the value.
      terms: name -> value of the non-finite ones.
      records: positions of that batch's images in the data source, or None.
      images: their image ids, as far as known.
    """

    def __init__(
        self,
        step: int,
        terms: Mapping[str, float],
        records: Sequence[int] | None,
        images: Sequence[str] = (),
    ):
        self.step = step
        self.terms = dict(terms)
        self.records = None if records is None else [int(r) for r in records]
        self.images = [str(image) for image in images]
        shown = ", ".join(f"{name} = {value}" for name, value in self.terms.items())
        text = f"step {step}: not finite: {shown}. "
        if self.records is not None:
            text += f"Its batch was records {first_few(self.records, 16)} of the training data. "
        if self.images:
            text += f"The ids of these images: {first_few(self.images, 16)}. "
        super().__init__(
            text + "The last checkpoint is from before this step and intact: start again from it "
            "with a lower optim.lr, optim.warmup_steps or optim.clip_norm, or inspect those images."
        )


def check_finite(
    metrics: Mapping[str, Any],
    step: int,
    index: Sequence[int] | np.ndarray | None = None,
    images: Callable[[Sequence[int]], Sequence[str]] | None = None,
) -> None:
    """Raises NonFiniteLoss if a metric is NaN or infinite; waits for the device.

    Args:
      metrics: scalars on the device or the host.
      step: their step.
      index: the "index" of the batch, to name the images.
      images: maps such positions to image ids.
    """
    values = {name: np.asarray(value) for name, value in jax.device_get(dict(metrics)).items()}
    bad = {n: float(v.reshape(-1)[0]) for n, v in values.items() if not np.all(np.isfinite(v))}
    if bad:
        records = None if index is None else [int(i) for i in np.asarray(index).reshape(-1)]
        ids = images(records) if images and records else ()
        raise NonFiniteLoss(step, bad, records, ids)


# ------------------------------------------------------------------ time and progress


# Parts of a run's time, in the order of the summary.
TIME_PARTS = {
    "step": "training steps",
    "data": "waiting for data",
    "start": "start and compilation",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "lost": "lost: stopped, or steps made again",
}


# Shown in the line for the console, in this order.
_PROGRESS_TERMS = (
    *("loss", "loss_ce", "loss_mask", "loss_dice", "loss_contrastive", "loss_query_class"),
    "grad_norm",
)


class _Past(msgspec.Struct):
    """The times of earlier starts, in the position of a checkpoint."""

    elapsed_seconds: float = 0.0
    parts: dict[Literal[tuple(TIME_PARTS)], float] = {}
    saved_at: float | None = None


class Chrono:
    """Splits a run's time into waiting for data, steps and pauses; estimates the rest.

    The first step, which compiles, is not measured. Steps run on the device while the host goes on,
    so "step" is all time that is neither data nor pause. That is right over a logging interval, at
    whose end the host waits for the device.

        with chrono.data():
            batch = next(batches)
        state, metrics = train_step(state, batch)
        chrono.tick(step)
        if log_now:
            writer.write_scalars(step, chrono.scalars())
        with chrono.pause("evaluation"):
            evaluate()
    """

    def __init__(
        self,
        first_step: int,
        total_steps: int,
        batch_size: int,
        *,
        state: Mapping[str, Any] | None = None,
        peak_flops: float | None = None,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        """Starts the clock.

        Args:
          first_step: steps done before this start.
          total_steps: step at which the run ends.
          batch_size: images of a step on all hosts together.
          state: `state()` of an earlier start of the run, to count its time too; the time since
            then is "lost". A CheckpointError is raised for anything else.
          peak_flops: FLOP/s of all devices together, for the FLOP utilisation.
          started: time of `clock` at which this start began; now by default.
          clock: seconds.
          wall: seconds since 1970, the same for all starts.
        """
        self._clock, self._wall = clock, wall
        self._step = first_step
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._peak_flops = peak_flops
        self._step_flops = 0.0
        self._started = clock() if started is None else started
        what = f"the times of earlier starts in the checkpoint of step {first_step}"
        past = reading.checked({} if state is None else state, _Past, what)
        self._before = past.elapsed_seconds
        self._parts = dict.fromkeys(TIME_PARTS, 0.0) | past.parts
        if past.saved_at is not None:
            began = wall() - (clock() - self._started)
            self._parts["lost"] += max(began - past.saved_at, 0.0)
        self._mark = self._started  # the time until this is in `_parts`
        self._warm = False
        self._steps = 0  # measured steps of this start, and their time with pauses
        self._seconds = 0.0
        self._matcher_seconds = 0.0
        self._begin_interval(clock())

    def set_step_flops(self, flops: float) -> None:
        """Sets the FLOPs of one step on all devices, for the FLOP utilisation."""
        self._step_flops = flops

    def _begin_interval(self, now: float) -> None:
        self._interval_start = now
        self._interval_steps = 0
        self._data = self._pause = self._checkpoint = 0.0

    def _count(self, part: str) -> float:
        """Adds the time since the last call to `part`; returns it."""
        now = self._clock()
        passed, self._mark = now - self._mark, now
        self._parts[part] += passed
        return passed

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Counts the time of its block as waiting for a batch."""
        self._count("step" if self._warm else "start")
        try:
            yield
        finally:
            self._data += self._count("data" if self._warm else "start")

    @contextlib.contextmanager
    def pause(self, part: str = "evaluation") -> Iterator[None]:
        """Counts the time of its block as a pause for `part`: "evaluation" or "checkpoint"."""
        self._count("step" if self._warm else "start")
        try:
            yield
        finally:
            passed = self._count(part)
            self._pause += passed
            if part == "checkpoint":
                self._checkpoint += passed

    def tick(self, step: int) -> None:
        """Notes that `step` was given to the device."""
        self._step = step
        if self._warm:
            self._interval_steps += 1
        else:
            self._count("start")
            self._warm = True
            self._begin_interval(self._clock())

    def scalars(self, matcher_seconds: float | None = None) -> dict[str, float]:
        """Measures since the last call (or since the first step); each name begins with "time/".

        images_per_second: in data and step time. step_seconds, data_seconds: of one step.
        pause_seconds: in the interval; checkpoint_seconds is a part of it. goodput: share of steps
        in the run's whole time, with earlier starts and the time lost between them. matcher_share:
        of data and step time. flop_utilisation: FLOPs of steps over the devices' peak in step time.
        eta_seconds: until the last step, with as many pauses as before. elapsed_seconds: of the
        run, with earlier starts. Rates are absent until the second step.

        Args:
          matcher_seconds: time in the host's matcher since the process began.
        """
        self._count("step" if self._warm else "start")
        now = self._mark
        wall = now - self._interval_start
        steps, busy = self._interval_steps, max(wall - self._pause, 1e-9)
        result = {}
        if steps:
            self._steps += steps
            self._seconds += wall
            result["time/images_per_second"] = steps * self._batch_size / busy
            result["time/step_seconds"] = max(busy - self._data, 0.0) / steps
            result["time/data_seconds"] = self._data / steps
            if matcher_seconds is not None:
                share = (matcher_seconds - self._matcher_seconds) / busy
                result["time/matcher_share"] = share
            if self._peak_flops and self._step_flops:
                possible = self._peak_flops * max(busy - self._data, 1e-9)
                result[FLOP_UTILISATION] = self._step_flops * steps / possible
            left = self._total_steps - self._step
            result["time/eta_seconds"] = left * self._seconds / self._steps
        result["time/pause_seconds"] = self._pause
        result["time/checkpoint_seconds"] = self._checkpoint
        result["time/goodput"] = self._parts["step"] / max(sum(self._parts.values()), 1e-9)
        result["time/elapsed_seconds"] = self._before + now - self._started
        self._matcher_seconds = matcher_seconds or 0.0
        self._begin_interval(now)
        return result

    def summary(self) -> str:
        """Returns a table of the parts of the run's time, over all its starts."""
        self._count("step" if self._warm else "start")
        total = max(sum(self._parts.values()), 1e-9)
        lines = [f"time of the run, {duration(total)}:"]
        for part, text in TIME_PARTS.items():
            share = 100 * self._parts[part] / total
            lines.append(f"  {text:<36}{duration(self._parts[part]):>12}{share:7.1f} %")
        return "\n".join(lines)

    def line(self, scalars: Mapping[str, Any]) -> str:
        """Returns the line for the console, from the losses and the result of `scalars`.

        "step 120/2000 (6%)  loss 34.2  ce 2.1 ...  12.3 images/s  data 3%  ETA 12 min 31 s"
        """
        share = 100 * self._step // max(self._total_steps, 1)
        parts = [f"step {self._step}/{self._total_steps} ({share}%)"]
        for term in _PROGRESS_TERMS:
            if scalars.get(term) is not None:
                parts.append(f"{term.removeprefix('loss_')} {float(scalars[term]):.4g}")
        if "time/images_per_second" in scalars:
            parts.append(f"{scalars['time/images_per_second']:.3g} images/s")
            data, compute = scalars["time/data_seconds"], scalars["time/step_seconds"]
            parts.append(f"data {100 * data / max(data + compute, 1e-9):.0f}%")
            parts.append(f"ETA {duration(scalars['time/eta_seconds'])}")
        return "  ".join(parts)

    def state(self) -> dict[str, Any]:
        """Returns JSON values for the checkpoint's position; see `__init__`."""
        self._count("step" if self._warm else "start")
        return {
            "elapsed_seconds": self._before + self._mark - self._started,
            "parts": dict(self._parts),
            "saved_at": self._wall(),
        }


# ------------------------------------------------------------------ parameters at start


def parameter_overview(params: Mapping[str, Any]) -> str:
    """Tabulates the (abstract) parameters by top-level module: arrays, numbers, whole memory."""
    rows = []
    for part, tree in params.items():
        leaves = jax.tree.leaves(tree)
        size = sum(leaf.size for leaf in leaves)
        rows.append((str(part), len(leaves), size, sum(x.size * x.dtype.itemsize for x in leaves)))
    rows.append(("total", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
    total = max(rows[-1][2], 1)
    lines = [f"{'part':<18}{'arrays':>8}{'parameters':>15}{'MiB':>10}{'share':>8}"]
    for part, arrays, size, memory in rows:
        share = f"{100 * size / total:.1f}%"
        lines.append(f"{part:<18}{arrays:>8}{size:>15,}{memory / 2**20:>10.1f}{share:>8}")
    return "\n".join(lines)


# Warnings of intended behaviour: a save between evaluations has no scores, and the synthetic
# dataset makes its configuration from its options.
_EXPECTED_WARNINGS = ("tracked_metric", "Using custom data configuration")


class _LibraryFilter:
    """Hides the libraries' log lines that `quiet_libraries` lists."""

    _libraries = re.compile(r"[/\\](orbax|tensorflow_datasets)[/\\]")

    def __call__(self, record: stdlib_logging.LogRecord) -> bool:
        if not self._libraries.search(record.pathname):
            return True
        if record.levelno <= stdlib_logging.INFO:
            return False
        if record.exc_info:  # of a background save, which `Checkpoints` reports
            return False
        return not any(text in record.getMessage() for text in _EXPECTED_WARNINGS)


class _ConsoleFormatter(stdlib_logging.Formatter):
    """Lines like "20:56:41 step 120/2000 ...", with the level from warnings on."""

    def format(self, record: stdlib_logging.LogRecord) -> str:
        level = f"{record.levelname} " if record.levelno > stdlib_logging.INFO else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{super().format(record)}"


class _UnraisableFilter:
    """Hides TensorStore's errors of further writes after one has failed: nobody waits for them."""

    def __init__(self, hook: Callable[[Any], None]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)


def quiet_libraries() -> None:
    """Hides libraries' log lines that no user of a run needs; the others get the time of day.

    Hidden are the INFO lines of Orbax (a page for each save) and of TFDS, `_EXPECTED_WARNINGS`,
    JAX's lines about missing accelerators, and the tracebacks of a failed save, which `Checkpoints`
    reports. Calling it again changes nothing.
    """
    logger = logging.get_absl_logger()
    for old in [f for f in logger.filters if isinstance(f, _LibraryFilter)]:
        logger.removeFilter(old)
    logger.addFilter(_LibraryFilter())
    logging.get_absl_handler().setFormatter(_ConsoleFormatter())
    stdlib_logging.getLogger("jax._src.xla_bridge").setLevel(stdlib_logging.WARNING)
    if not isinstance(sys.unraisablehook, _UnraisableFilter):
        sys.unraisablehook = _UnraisableFilter(sys.unraisablehook)


# ------------------------------------------------------------------ profile on demand


class ProfileTrigger:
    """Profiles a few steps, at a step from the config or when somebody touches a file.

    `touch WORKDIR/PROFILE` profiles the next steps and removes the file. The profile lies in
    WORKDIR/plugins/profile, for TensorBoard's profile plugin. The first host profiles.
    """

    def __init__(self, workdir: str | os.PathLike, start: int = 0, steps: int = 3):
        """Prepares the trigger.

        Args:
          workdir: the run's folder.
          start: first step of the profile; 0 is none.
          steps: number of steps in a profile.
        """
        config_rules.require({"train.profile_start": start, "train.profile_steps": steps})
        self._workdir = self._traces = os.fspath(workdir)
        self._file = remote.path_of(workdir) / PROFILE_FILE
        self._looked = -_LOOK_EVERY
        self._start = start
        self._steps = steps
        self._last: int | None = None  # last step of the current profile
        self._first_host = jax.process_index() == 0

    def before(self, step: int) -> None:
        """Starts a profile if one is due; to call before each step."""
        if not self._first_host or self._last is not None:
            return
        asked = self._is_asked()
        if not asked and (step != self._start or self._start == 0):
            return
        if asked:
            self._file.unlink()
        self._last = step + self._steps - 1
        logging.info("Profiling steps %d to %d into %s", step, self._last, self._workdir)
        if remote.is_remote(self._workdir):  # the profiler writes to this machine only
            self._traces = tempfile.mkdtemp()
        jax.profiler.start_trace(self._traces)

    def _is_asked(self) -> bool:
        """Looks for the file; in a bucket not at every step, and a request may fail."""
        if not remote.is_remote(self._workdir):
            return self._file.exists()
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return False
        self._looked = time.monotonic()
        with contextlib.suppress(Exception):
            return self._file.exists()
        return False

    def after(self, step: int, results: Any = None) -> None:
        """Ends the profile after its last step, whose `results` it waits for."""
        if self._last is not None and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the current profile, if any."""
        if self._last is not None:
            self._last = None
            jax.profiler.stop_trace()
            try:
                if remote.is_remote(self._workdir):
                    remote.upload(self._traces, self._workdir)
                    shutil.rmtree(self._traces)
                logging.info("Profile written to %s/plugins/profile", self._workdir)
            except OSError as error:  # no reason to end a training
                logging.warning("The profile stays in %s: %s", self._traces, error)
