"""Scores a model on a data set: one forward pass per image and task token, all metrics merged.

The official protocol runs every task on its own: PQ with the panoptic token, AP with the instance
token, mIoU with the semantic token. `evaluate(..., token=None)` does that. With `token="instance"`
the model gets this one token, and every kind of output is made from its one prediction: a row of
the paper's table of test-time tokens (arXiv 2211.06220).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from oneformer_jax import files
from oneformer_jax.eval.postprocess import PostprocessConfig, Segmentation, segment_images
from oneformer_jax.eval.protocol import Metric, Protocol
from oneformer_jax.eval.tta import SemanticScores, TtaConfig, with_mirrored
from oneformer_jax.types import TASKS, Metadata, task_id

# (batch, task) -> class logits [B, Q, K+1] and mask logits [B, Q, h, w] of this process's batch.
PredictFn = Callable[[Mapping[str, Any], str], tuple[jax.Array, jax.Array]]

# Columns of the table of classes on the screen; the file has the counts of matches too.
_CLASS_COLUMNS = ("PQ", "SQ", "RQ", "AP", "IoU", "ACC", "iIoU")


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What one evaluation found; the same on every process.

    Attributes:
      dataset: name from the metadata.
      token: the task token that the model got, or None if each output had its own.
      images: images scored, over all processes.
      metrics: name -> percent, or None where the value is not defined on this data.
      reasons: name -> why, for every None in `metrics`.
      per_class: K rows in order of class id: `class`, `isthing`, and name -> percent, or None.
      counts: name -> number of images, segments, instances, pixels.
      seconds: wall time of this process: `data`, `predict`, `postprocess`, `metrics`, `total`.
      protocol: name of the protocol.
      tta: whether the semantic scores are of test-time augmentation.
    """

    dataset: str
    token: str | None
    images: int
    metrics: dict[str, float | None]
    reasons: dict[str, str]
    per_class: list[dict[str, Any]]
    counts: dict[str, int]
    seconds: dict[str, float]
    protocol: str = "coco"
    tta: bool = False


class _Clock:
    """Splits the time since its start into named parts."""

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._parts = dict.fromkeys(("data", "predict", "postprocess", "metrics"), 0.0)

    def lap(self, part: str) -> None:
        """Counts the time since the last lap as `part`."""
        now = time.perf_counter()
        self._parts[part] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return {**self._parts, "total": self._last - self._start}


def evaluate(
    predict_fn: PredictFn,
    batches: Iterable[Mapping[str, Any]],
    *,
    metadata: Metadata,
    postprocess: PostprocessConfig,
    outputs: Sequence[str] = TASKS,
    token: str | None = None,
    protocol: Protocol | None = None,
    tta: TtaConfig | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> EvalResult:
    """Scores `predict_fn` on `batches`; with several processes, each passes its own share.

    All processes must pass the same number of batches (fillers included), since `predict_fn`
    usually runs on all devices at once.

    Args:
      predict_fn: gets a batch and the name of a task token.
      batches: evaluation batches with `image` uint8 [B, Hb, Wb, 3], `image_size`, `original_size`
        int [B, 2], `valid` bool [B] (False: filler) and `records` (B ground truths; see metrics).
        With `tta` also `views`: B-row batches of the same images, each with `image` and
        `image_size`, at the sizes of `tta.short_edges`.
      metadata: the classes, those of the model and of the records.
      postprocess: thresholds. `ade_instance_remap` and `things_only_instances` shape exported
        results only; here the protocol decides.
      outputs: which of panoptic (PQ), instance (AP) and semantic (mIoU) to score.
      token: give the model this one task token for all outputs, and run it once per batch; None:
        each output has a run under its own token.
      protocol: the metrics; None is COCO's.
      tta: score semantic maps from these views instead of the plain images. With a `token` it is
        not used, since the one prediction serves all outputs.
      progress: called after every batch with the images scored by this process and the seconds
        since the start.

    Raises:
      ValueError: unknown task or token, no output, an output that the protocol does not score, no
        image, or predictions and ground truth that do not fit each other.
    """
    outputs = tuple(dict.fromkeys(outputs))
    for task in (*outputs, *([] if token is None else [token])):
        task_id(task)
    if not outputs:
        raise ValueError(f"evaluate got no outputs; use some of {', '.join(TASKS)}")
    runs = {task: (task,) for task in outputs} if token is None else {token: outputs}
    protocol = protocol or Protocol()
    postprocess = dataclasses.replace(
        postprocess,
        ade_instance_remap=protocol.instance_ids == "thing",
        things_only_instances=True,
    )
    metrics = {task: protocol.make_metric(task, metadata) for task in outputs}

    clock = _Clock()
    images = 0
    for batch in batches:
        clock.lap("data")
        for model_token, tasks in runs.items():
            if tta is not None and token is None and tasks == ("semantic",):
                segmented = _semantic_tta(predict_fn, batch, tta, metadata, clock)
                _score(metrics["semantic"], segmented, batch, clock)
                continue
            logits = jax.block_until_ready(predict_fn(batch, model_token))
            clock.lap("predict")
            # Fillers alone are predicted, which all hosts do together, but not segmented.
            for task in tasks if np.any(batch["valid"]) else ():
                segmented = segment_images(
                    *logits,
                    *_sizes(batch, batch),
                    batch["image"].shape[1:3],
                    task=task,
                    config=postprocess,
                    metadata=metadata,
                )
                _score(metrics[task], segmented, batch, clock)
        images += int(np.sum(batch["valid"]))
        if progress is not None:
            progress(images, clock.seconds()["total"])
    metrics = {task: merge_hosts(metric) for task, metric in metrics.items()}
    augmented = tta is not None and token is None and "semantic" in outputs
    result = _result(metrics, metadata, token, clock)
    return dataclasses.replace(result, protocol=protocol.name, tta=augmented)


def _sizes(view: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Image sizes of a view of a batch and original sizes, int [B, 2] each.

    Fillers have no size of their own: they take that of a real image, which keeps the shapes.
    """
    valid = np.asarray(batch["valid"], bool)
    source = np.where(valid, np.arange(len(valid)), valid.argmax())
    return np.asarray(view["image_size"])[source], np.asarray(batch["original_size"])[source]


def _semantic_tta(
    predict_fn: PredictFn,
    batch: Mapping[str, Any],
    tta: TtaConfig,
    metadata: Metadata,
    clock: _Clock,
) -> Iterator[Segmentation]:
    views = batch.get("views", ())
    if len(views) != len(tta.short_edges):
        raise ValueError(
            f"test-time augmentation needs {len(tta.short_edges)} views of each batch, it has "
            f"{len(views)}; give the loader the same short edges"
        )
    scores = SemanticScores(_sizes(batch, batch)[1], metadata)
    for view, flip in with_mirrored(views, tta.flip):
        clock.lap("data")
        logits = jax.block_until_ready(predict_fn({**batch, **view}, "semantic"))
        clock.lap("predict")
        if np.any(batch["valid"]):
            scores.add(*logits, _sizes(view, batch)[0], view["image"].shape[1:3], flip=flip)
    return scores.result() if np.any(batch["valid"]) else iter(())


def _score(
    metric: Metric, segmented: Iterable[Segmentation], batch: Mapping[str, Any], clock: _Clock
) -> None:
    # Not strict: a batch of fillers has no segmentations.
    for segmentation, record, valid in zip(
        segmented, batch["records"], batch["valid"], strict=False
    ):
        clock.lap("postprocess")
        if valid:
            metric.update(segmentation, record)
            clock.lap("metrics")


def merge_hosts(metric: Metric) -> Metric:
    """The metric over the images of all processes; every process must call it, and gets the same.

    The states travel as bytes: as JAX arrays, 64-bit counts would be cut to 32 bits.
    """
    if jax.process_count() == 1:
        return metric
    buffer = io.BytesIO()
    np.savez(buffer, **metric.state())
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    merged = None
    for row, length in zip(gathered, lengths, strict=True):
        with np.load(io.BytesIO(row[:length].tobytes())) as state:
            other = type(metric).from_state(state)
        if merged is None:
            merged = other
        else:
            merged.merge(other)
    return merged


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _result(
    metrics: Mapping[str, Metric], metadata: Metadata, token: str | None, clock: _Clock
) -> EvalResult:
    images = next(iter(metrics.values())).images
    if not images:
        raise ValueError(
            f"evaluation saw no image of {metadata.dataset}: its evaluation split is empty, or "
            "every record was skipped"
        )
    values, reasons, counts = {}, {}, {}
    rows = [
        {"class": name, "isthing": thing}
        for name, thing in zip(metadata.class_names, metadata.is_thing, strict=True)
    ]
    for metric in metrics.values():
        values |= {name: _or_none(value) for name, value in metric.compute().items()}
        reasons |= metric.undefined()
        counts |= metric.counts()
        for name, column in metric.per_class().items():
            for row, value in zip(rows, column, strict=True):
                row[name] = _or_none(value)
    clock.lap("metrics")
    return EvalResult(
        dataset=metadata.dataset,
        token=token,
        images=images,
        metrics=values,
        reasons=reasons,
        per_class=rows,
        counts=counts,
        seconds=clock.seconds(),
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of an aligned table; numbers get one decimal, None is a dash."""

    def cell(value):
        return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def format_results(result: EvalResult, metadata: Metadata) -> str:
    """The overall metrics, the reasons for missing ones, and the classes, as text for a screen.

    `metadata` gives the names of the classes; all values are percent.
    """
    if len(result.per_class) != metadata.num_classes:
        raise ValueError(
            f"the result has {len(result.per_class)} classes, {metadata.dataset} has "
            f"{metadata.num_classes}"
        )
    given = "each output its own" if result.token is None else result.token
    found = result.metrics
    views = ", semantic with test-time augmentation" if result.tta else ""
    blocks = [
        [
            f"{result.dataset}: {result.images} images, protocol {result.protocol}, task token: "
            f"{given}{views}"
        ]
    ]
    if "panoptic/PQ" in found:
        groups = (("all", ""), ("things", "_things"), ("stuff", "_stuff"))
        blocks.append(
            _table(
                ("panoptic", "PQ", "SQ", "RQ"),
                [
                    (label, *(found[f"panoptic/{name}{suffix}"] for name in ("PQ", "SQ", "RQ")))
                    for label, suffix in groups
                ],
            )
        )
    for task in ("instance", "semantic"):
        names = [name for name in found if name.startswith(f"{task}/")]
        if names:
            header = (task, *(name.removeprefix(f"{task}/") for name in names))
            blocks.append(_table(header, [("all", *(found[name] for name in names))]))
    if result.reasons:
        blocks.append([f"{name} is not defined: {why}" for name, why in result.reasons.items()])
    columns = [n for n in result.per_class[0] if n.partition("/")[2] in _CLASS_COLUMNS]
    blocks.append(
        _table(
            ("class", "kind", *(name.partition("/")[2] for name in columns)),
            [
                (name, "thing" if thing else "stuff", *(row[column] for column in columns))
                for name, thing, row in zip(
                    metadata.class_names, metadata.is_thing, result.per_class, strict=True
                )
            ],
        )
    )
    return "\n\n".join("\n".join(lines) for lines in blocks)


def write_results(path: str | os.PathLike[str], result: EvalResult) -> None:
    """Writes a result as JSON: the file is either complete or as it was before.

    Folders are made as needed. With several processes, only one may write.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False) + "\n"
    files.write_atomically(path, text)
