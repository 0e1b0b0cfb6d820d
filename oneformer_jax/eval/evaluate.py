"""Scores a model on a data set: one encoding per image, one decoding per task token.

`evaluate` runs each task under its own token, as the official protocol does: PQ with the panoptic
token, AP with the instance token, mIoU with the semantic token. `evaluate_tokens` scores every
output under every token, for the paper's table of test-time tokens (arXiv 2211.06220).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from oneformer_jax import files, remote
from oneformer_jax.eval.findings import Findings
from oneformer_jax.eval.postprocess import PostprocessConfig, segment_images
from oneformer_jax.eval.predictor import Predictor, real_sizes
from oneformer_jax.eval.protocol import Metric, Protocol
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.tta import SemanticScores, TtaConfig, with_mirrored
from oneformer_jax.types import TASKS, Metadata

# Columns of the table of classes on the screen; the file also has the counts of matches.
_CLASS_COLUMNS = ("PQ", "SQ", "RQ", "AP", "IoU", "ACC", "iIoU")


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """The result of one evaluation; the same on every process.

    Attributes:
      dataset: name from the metadata.
      token: the task token that the model got, or None if each output had its own.
      images: images scored, over all processes.
      metrics: name -> percent, or None if the value is not defined on this data.
      reasons: name -> the reason of every None in `metrics`.
      per_class: K rows in order of class id: `class`, `isthing`, and name -> percent, or None.
      counts: name -> number of images, segments, instances, pixels.
      seconds: wall time of this process for all tokens: `data`, `predict`, `postprocess`,
        `metrics`, `total`.
      protocol: name of the protocol.
      tta: True if the semantic scores use test-time augmentation.
      limit: most images of the even sample that was scored; 0: all images.
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
    limit: int = 0


class _Clock:
    """Splits the time since its start into named parts."""

    def __init__(self) -> None:
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
    predictor: Predictor,
    batches: Iterable[Mapping[str, Any]],
    *,
    metadata: Metadata,
    postprocess: PostprocessConfig,
    outputs: Sequence[str] = TASKS,
    protocol: Protocol | None = None,
    tta: TtaConfig | None = None,
    progress: Callable[[int, float], None] | None = None,
    findings: Findings | None = None,
) -> EvalResult:
    """Scores each output under its own task token; with several processes, each passes its share.

    All processes must pass the same number of batches (fillers included), because the predictor
    runs on all devices at once.

    Args:
      predictor: encodes a batch once and decodes it for each output.
      batches: evaluation batches with `image` uint8 [B, Hb, Wb, 3], `image_size`, `original_size`
        int [B, 2], `valid` bool [B] (False: filler) and `records` (B ground truths; see metrics).
        With `tta` also `views`: B-row batches of the same images, each with `image` and
        `image_size`, at the sizes of `tta.short_edges`.
      metadata: the classes of the model and of the records.
      postprocess: thresholds. `ade_instance_remap` and `things_only_instances` shape exported
        results only; here the protocol decides.
      outputs: the tasks to score: panoptic (PQ), instance (AP) and semantic (mIoU).
      protocol: the metrics; None is COCO's.
      tta: score semantic maps from these views instead of the plain images.
      progress: called after every batch with the images scored by this process and the seconds
        since the start.
      findings: collects the best and worst images and the confused classes, over all processes.

    Raises:
      ValueError: unknown task, no output, an output that the protocol does not score, no image, or
        predictions that do not fit the ground truth.
    """
    protocol = protocol or Protocol()
    metrics = {task: protocol.make_metric(task, metadata) for task in outputs}
    if not metrics:
        raise ValueError(f"evaluate got no outputs; use some of {', '.join(TASKS)}")
    runs = {task: {task: metric} for task, metric in metrics.items()}
    scoring = _Pass(predictor, runs, metadata, _as_scored(postprocess, protocol), tta, findings)
    scoring.run(batches, progress)
    metrics = {task: merge_hosts(metric) for task, metric in metrics.items()}
    if findings is not None:
        findings.finish(merge_hosts(findings), metrics.get("semantic"))
    result = _result(metrics, metadata, None, protocol, scoring.clock)
    return dataclasses.replace(result, tta=tta is not None and "semantic" in metrics)


def evaluate_tokens(
    predictor: Predictor,
    batches: Iterable[Mapping[str, Any]],
    *,
    metadata: Metadata,
    postprocess: PostprocessConfig,
    protocol: Protocol | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, EvalResult]:
    """Scores all outputs of the protocol under every token, in one pass; a result for each token.

    A batch is encoded once, and decoded once for each token; that prediction gives all outputs. For
    arguments and errors see `evaluate`.
    """
    protocol = protocol or Protocol()
    runs = {
        token: {task: protocol.make_metric(task, metadata) for task in protocol.tasks}
        for token in TASKS
    }
    scoring = _Pass(predictor, runs, metadata, _as_scored(postprocess, protocol))
    scoring.run(batches, progress)
    return {
        token: _result(
            {task: merge_hosts(metric) for task, metric in metrics.items()},
            metadata,
            token,
            protocol,
            scoring.clock,
        )
        for token, metrics in runs.items()
    }


Mergeable = TypeVar("Mergeable", bound=Metric | Findings)

# Task token -> output -> the metric of the output under this token.
_Runs = Mapping[str, Mapping[str, Metric]]


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One pass over the batches of an evaluation, whose images it adds to the metrics of `runs`."""

    predictor: Predictor
    runs: _Runs
    metadata: Metadata
    postprocess: PostprocessConfig
    tta: TtaConfig | None = None
    findings: Findings | None = None
    clock: _Clock = dataclasses.field(default_factory=_Clock)

    def run(
        self,
        batches: Iterable[Mapping[str, Any]],
        progress: Callable[[int, float], None] | None,
    ) -> None:
        """Adds all batches, each encoded once, or once for each view."""
        tta = self.tta if "semantic" in self.runs else None
        plain = [token for token in self.runs if tta is None or token != "semantic"]
        images = 0
        for batch in batches:
            self.clock.lap("data")
            if plain:
                self._add_plain(batch, plain)
            if tta is not None:
                self._add(self.runs["semantic"]["semantic"], self._average(batch, tta), batch)
            images += int(np.sum(batch["valid"]))
            if progress is not None:
                progress(images, self.clock.seconds()["total"])

    def _add_plain(self, batch: Mapping[str, Any], tokens: Sequence[str]) -> None:
        """Encodes a batch, decodes it under each token and scores the outputs.

        The devices hold the features, and the logits of one token at a time.
        """
        features = self.predictor.encode(batch)
        image_size, original_size = real_sizes(batch, batch)
        for token in tokens:
            class_logits, mask_logits = jax.block_until_ready(
                self.predictor.decode(features, token)
            )
            self.clock.lap("predict")
            # A batch of fillers is predicted, as all hosts must, but not segmented.
            for task, metric in self.runs[token].items() if np.any(batch["valid"]) else ():
                segmented = segment_images(
                    class_logits,
                    mask_logits,
                    image_size,
                    original_size,
                    batch["image"].shape[1:3],
                    task=task,
                    config=self.postprocess,
                    metadata=self.metadata,
                )
                self._add(metric, segmented, batch)
            del class_logits, mask_logits

    def _average(self, batch: Mapping[str, Any], tta: TtaConfig) -> Iterator[Segmentation]:
        """Segments a batch semantically from its views."""
        views = batch.get("views", ())
        if len(views) != len(tta.short_edges):
            raise ValueError(
                f"test-time augmentation needs {len(tta.short_edges)} views of each batch, but it "
                f"has {len(views)}; give the loader the same short edges"
            )
        scores = SemanticScores(real_sizes(batch, batch)[1], self.metadata)
        for view, flip in with_mirrored(views, tta.flip):
            self.clock.lap("data")
            logits = self.predictor.decode(self.predictor.encode({**batch, **view}), "semantic")
            jax.block_until_ready(logits)
            self.clock.lap("predict")
            if np.any(batch["valid"]):
                scores.add(*logits, real_sizes(view, batch)[0], view["image"].shape[1:3], flip=flip)
        return scores.result() if np.any(batch["valid"]) else iter(())

    def _add(
        self, metric: Metric, segmented: Iterable[Segmentation], batch: Mapping[str, Any]
    ) -> None:
        # Not strict, as a batch of fillers has no segmentations.
        for segmentation, record, valid in zip(
            segmented, batch["records"], batch["valid"], strict=False
        ):
            self.clock.lap("postprocess")
            if valid:
                outcome = metric.update(segmentation, record)
                if self.findings is not None:
                    self.findings.add(segmentation, record, outcome)
                self.clock.lap("metrics")


def _as_scored(postprocess: PostprocessConfig, protocol: Protocol) -> PostprocessConfig:
    """Takes the settings that shape the outputs of instances from the protocol."""
    return dataclasses.replace(
        postprocess,
        ade_instance_remap=protocol.instance_ids == "thing",
        things_only_instances=True,
    )


def merge_hosts(metric: Mergeable) -> Mergeable:
    """Merges the metric over all processes; every process must call it, and gets the same.

    States travel as bytes, because JAX arrays would cut 64-bit counts to 32 bits.
    """
    if jax.process_count() == 1:
        return metric
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **metric.state())
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    with jax.transfer_guard("allow"):  # those of process_allgather
        lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(data)] = data
        gathered = np.asarray(multihost_utils.process_allgather(padded))
    merged: Any = None
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
    metrics: Mapping[str, Metric],
    metadata: Metadata,
    token: str | None,
    protocol: Protocol,
    clock: _Clock,
) -> EvalResult:
    """Makes the result of metrics that are merged over all processes."""
    images = next(iter(metrics.values())).images
    if not images:
        raise ValueError(
            f"evaluation saw no image of {metadata.dataset}: its evaluation split is empty, or "
            "every record was skipped"
        )
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    counts: dict[str, int] = {}
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
        protocol=protocol.name,
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Formats an aligned table as lines; numbers get one decimal, None is a dash."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def format_results(result: EvalResult, metadata: Metadata) -> str:
    """Formats the overall metrics, the reasons for missing ones, and the classes, in percent."""
    if len(result.per_class) != metadata.num_classes:
        raise ValueError(
            f"the result has {len(result.per_class)} classes, but {metadata.dataset} has "
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
    """Writes a result as JSON, from one process; a failure leaves the old file."""
    path = remote.path_of(path)
    files.make_folder(path.parent)
    text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False) + "\n"
    files.write_atomically(path, text)
