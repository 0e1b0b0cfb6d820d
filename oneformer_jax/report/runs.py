"""Reads what a run left in its workdir; every part but the config may be missing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from oneformer_jax import config_rules, files, remote, rules
from oneformer_jax.configs import common

_LOG_LIMIT = 1 << 29  # bytes of metrics.jsonl: months of training
_PICTURE_LIMIT = 16 << 20
_LARGEST = 1e30  # a larger value would break the axes

Points = list[tuple[int, float]]  # (step, value)


class Results(msgspec.Struct):
    """The parts of results.json that a report shows."""

    dataset: str
    images: int
    protocol: str
    metrics: dict[str, float | None]
    reasons: dict[str, str]
    per_class: list[dict[str, str | bool | float | None]]
    seconds: dict[str, float]


class Example(msgspec.Struct):
    """An image of examples.json; `picture` is the content of its file, if that is there."""

    image: str
    score: float
    mistakes: list[str]
    picture: bytes = b""


@dataclasses.dataclass
class Run:
    """A run.

    Attributes:
      name: the workdir, as it was given.
      config: dotted key -> value.
      texts: what describes the start: "run/command" and "run/versions".
      lines: the objects of metrics.jsonl, in order of their steps.
      step: of the last evaluation, or None.
      results: of that evaluation.
      examples: task -> "worst" or "best" -> images.
      confusion: the picture of confused classes, PNG, or b"".
    """

    name: str
    config: dict[str, Any]
    texts: dict[str, str]
    lines: list[dict[str, float | None]]
    step: int | None
    results: Results | None
    examples: dict[str, dict[str, list[Example]]]
    confusion: bytes

    def curve(self, name: str) -> Points:
        """Returns the values of a scalar; a later line of the same step replaces an earlier one."""
        found = {}
        for line in self.lines:
            value = line.get(name)
            if value is not None and abs(value) < _LARGEST:
                found[int(line["step"] or 0)] = float(value)
        return sorted(found.items())

    def time(self) -> dict[str, float]:
        """Returns seconds by part, until the last logged step; empty without a log."""
        parts = dict.fromkeys(
            ("training steps", "waiting for data", "evaluation", "checkpoints"), 0.0
        )
        before, elapsed = 0, 0.0
        for line in self.lines:
            if line.get("time/elapsed_seconds") is None:
                continue
            step = int(line["step"] or 0)
            steps, before = max(step - before, 0), step
            values = {name: line.get(f"time/{name}_seconds") or 0.0 for name in _TIMES}
            parts["training steps"] += steps * values["step"]
            parts["waiting for data"] += steps * values["data"]
            parts["checkpoints"] += values["checkpoint"]
            parts["evaluation"] += max(values["pause"] - values["checkpoint"], 0.0)
            elapsed = max(elapsed, values["elapsed"])
        rest = elapsed - sum(parts.values())
        parts["start, compilation and stops"] = max(rest, 0.0)
        return parts if elapsed else {}

    def median(self, name: str) -> float | None:
        """Returns the median of a scalar over the run, None if it was never written."""
        values = [value for _, value in self.curve(name)]
        return statistics.median(values) if values else None


_TIMES = ("step", "data", "checkpoint", "pause", "elapsed")


def read_run(workdir: str | os.PathLike[str]) -> Run:
    """Reads a workdir.

    Raises:
      FileError: it holds no run, or a file in it is damaged; the message names the file.
      RemoteError: a bucket that cannot be read.
    """
    folder = remote.path_of(workdir)
    if not (folder / "config.json").exists():
        raise files.FileError(
            f"{workdir} holds no run (it has no config.json); name the --workdir of a training"
        )
    config = files.read_json(folder / "config.json")
    config_rules.upgrade(config)
    texts = {}
    if (folder / "texts.json").exists():
        texts = files.read_json(folder / "texts.json", dict[str, str])
    step = _last_evaluation(folder)
    results, examples, confusion = None, {}, b""
    if step is not None:
        place = folder / "eval" / str(step)
        results = files.read_json(place / "results.json", Results)
        examples = _read_examples(place)
        confusion = _picture(place / "confusion.png")
    return Run(
        os.fspath(workdir),
        rules.flattened(config),
        texts,
        _read_lines(folder / "metrics.jsonl"),
        step,
        results,
        examples,
        confusion,
    )


def _last_evaluation(folder: pathlib.Path) -> int | None:
    names = remote.names(folder / "eval") if (folder / "eval").exists() else []
    steps = [int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 19]
    found = [s for s in steps if (folder / "eval" / str(s) / "results.json").exists()]
    return max(found, default=None)


def _read_lines(path: pathlib.Path) -> list[dict[str, float | None]]:
    if not path.exists():
        return []
    lines = files.read_bytes(path, limit=_LOG_LIMIT).split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or number == len(lines):
            continue  # no newline: a run writes this line just now, or was stopped in it
        values = files.parse_json(line, dict[str, float | None], f"{path}, line {number}")
        step = values.get("step")
        if step is None or not 0 <= step < 1e15:
            raise files.FileError(f"{path}, line {number}: step is {step}; expected a number")
        found.append(values)
    return sorted(found, key=lambda values: values["step"] or 0)


def _read_examples(place: pathlib.Path) -> dict[str, dict[str, list[Example]]]:
    path = place / "examples.json"
    if not path.exists():
        return {}
    listed = files.read_json(path, dict[str, dict[str, list[Example]]])
    for task, kind in ((task, kind) for task in config_rules.TASKS for kind in ("worst", "best")):
        for number, example in enumerate(listed.get(task, {}).get(kind, []), 1):
            example.picture = _picture(place / "examples" / f"{task}_{kind}_{number}.jpg")
    return listed


def _picture(path: pathlib.Path) -> bytes:
    return files.read_bytes(path, limit=_PICTURE_LIMIT) if path.exists() else b""


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns dotted key -> its value in each config as JSON ("–": none), where they differ."""
    found = {}
    for key in sorted(set().union(*configs)):
        values = [json.dumps(c[key], ensure_ascii=False) if key in c else "–" for c in configs]
        if len(set(values)) > 1:
            found[key] = values
    return found


def defaults() -> dict[str, Any]:
    """Returns the settings of configs/common.py by their dotted keys."""
    return rules.flattened(json.loads(common.get_base().to_json()))


def finite(value: Any) -> float | None:
    """Returns a number as it is, and None for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None
