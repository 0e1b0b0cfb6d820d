"""Evaluation within a run: scores, pictures of fixed held-out images, the table of task tokens."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from oneformer_jax import config_rules, remote
from oneformer_jax.eval import postprocess, tta
from oneformer_jax.eval.evaluate import (
    EvalResult,
    evaluate,
    evaluate_tokens,
    format_results,
    write_results,
)
from oneformer_jax.eval.findings import Findings
from oneformer_jax.eval.pictures import sheets
from oneformer_jax.eval.postprocess import PostprocessConfig, segment_batch
from oneformer_jax.eval.predictor import Predictor, real_sizes
from oneformer_jax.eval.protocol import Protocol, choose_protocol
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.write import write_png
from oneformer_jax.models import functional
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.progress import progress_log
from oneformer_jax.train import descriptions, kernel_choice, settings
from oneformer_jax.train.runtime import folders
from oneformer_jax.train.tensorboard import metric_writers
from oneformer_jax.types import TASKS, Metadata

# (number of evenly sampled images, 0 is all) -> one pass over this host's evaluation batches.
Batches = Callable[[int], Iterable[Mapping[str, Any]]]

TokenTable = dict[str, dict[str, float | None]]  # task token -> metric -> percent

# Columns of the table of task tokens, as in the paper.
TOKEN_COLUMNS = (
    "panoptic/PQ",
    "panoptic/PQ_things",
    "panoptic/PQ_stuff",
    "instance/AP",
    "semantic/mIoU",
)
# Overlays are drawn about as large as they are shown (a cell of the sheet, a thumbnail of
# TensorBoard), or their labels would be too small or coarse: shorter side, and pixels at most.
_LEGIBLE = {"min_size": 360, "max_pixels": 360 * 480}


class Evaluator:
    """Scores states of one model; writes into `workdir`/eval and `workdir`/pictures."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        metadata: Metadata,
        model: OneFormerConfig,
        mesh: jax.sharding.Mesh,
    ):
        self._config = config
        self._workdir = remote.path_of(workdir)
        self._metadata = metadata
        self._mesh = mesh
        self._postprocess = postprocess_config(config)
        # Wrong settings raise now, not at the first evaluation.
        self._protocol = protocol_of(config, metadata)
        self._tasks = scored_tasks(config, self._protocol)
        self._tta = tta_config(config)
        config_rules.require(
            {"eval.limit": config.eval.limit, "train.pictures": config.train.pictures}
        )
        execution = settings.execution(config)
        graph = functional.abstract(model, execution, training=False).graph
        self._programs = functional.programs(
            graph, mesh, prepare=kernel_choice.chooser(execution.kernels, mesh, workdir)
        )
        self._last: EvalResult | None = None

    def run(
        self,
        state: Mapping[str, Any],
        step: int,
        eval_batches: Batches,
        writer: metric_writers.MetricWriter,
        *,
        limit: int = 0,
    ) -> dict[str, float | None]:
        """Scores each task under its own token and draws the fixed images.

        Args:
          state: the training state, or {params, stats}; its averaged parameters take precedence.
          step: step of the state; it names the files.
          eval_batches: called with a number of images, gives one pass over this host's evaluation
            batches of an even sample; 0 is all.
          writer: receives the metrics and the pictures.
          limit: images to score; 0 is all.

        Returns:
          Metric name -> percent, or None if not defined.
        """
        batches = eval_batches(limit)
        sizes = getattr(batches, "buckets", None)
        shapes = "" if sizes is None else f", {len(sizes)} padded sizes"
        logging.info("Evaluating step %d (protocol %s%s)", step, self._protocol.name, shapes)
        predictor = self._predictor(state)
        thing_labels = self._protocol.instance_ids == "thing"
        findings = Findings(self._metadata, thing_labels=thing_labels)
        result = evaluate(
            predictor,
            batches,
            metadata=self._metadata,
            postprocess=self._postprocess,
            outputs=self._tasks,
            protocol=self._protocol,
            tta=self._tta,
            progress=_progress(batches),
            findings=findings,
        )
        result = dataclasses.replace(result, limit=limit)
        scores = {name: value for name, value in result.metrics.items() if value is not None}
        writer.write_scalars(step, scores)
        self._draw(predictor, step, eval_batches(limit), writer)
        writer.flush()
        if jax.process_index() == 0:  # last, as `finished` looks for this file
            findings.write(self._results_path(step).parent)
            write_results(self._results_path(step), result)
        shown = ", ".join(f"{name} {scores[name]:.1f}" for name in TOKEN_COLUMNS if name in scores)
        logging.info(
            "Step %d on %d images in %.0f s: %s",
            step,
            result.images,
            result.seconds["total"],
            shown,
        )
        logging.info(
            "Programs compiled for evaluation so far: %d to encode, %d to decode, %d for "
            "post-processing",
            *map(len, self._programs),
            postprocess.program_count() + tta.program_count(),
        )
        self._last = result
        return result.metrics

    def finished(self, step: int, *, whole: bool = False) -> dict[str, float | None] | None:
        """Reads the metrics of an earlier start for `step`; None if this config has others.

        With `whole`, also None if they are of a sample of the images.
        """
        result = read_results(self._workdir, step)
        if result is None:
            return None
        asked = (self._protocol.name, self._tta is not None and "semantic" in self._tasks)
        if set(result.metrics) != set(metric_names(self._config, self._metadata)):
            return None
        if (result.protocol, result.tta) != asked or (whole and result.limit):
            return None
        self._last = result
        return result.metrics

    def has_token_table(self, step: int) -> bool:
        """Tells whether `token_table` was made for `step`."""
        return self._table_path(step).exists()

    def token_table(self, state: Mapping[str, Any], step: int, eval_batches: Batches) -> TokenTable:
        """Computes and stores every metric under every task token (the paper's token table)."""
        logging.info("Evaluating every output under each of the task tokens")
        batches = eval_batches(0)
        results = evaluate_tokens(
            self._predictor(state),
            batches,
            metadata=self._metadata,
            postprocess=self._postprocess,
            protocol=self._protocol,
            progress=_progress(batches),
        )
        table = {
            token: {name: result.metrics.get(name) for name in TOKEN_COLUMNS}
            for token, result in results.items()
        }
        if jax.process_index() == 0:
            descriptions.write_json(self._table_path(step), table)
        return table

    def report(self, step: int) -> None:
        """Prints the last results and the paths of all outputs."""
        if jax.process_index() != 0:
            return
        print(format_results(self._last, self._metadata))
        if self.has_token_table(step):
            table = descriptions.read_json(
                self._table_path(step), TokenTable, expected="the table of task tokens"
            )
            print("\n" + format_token_table(table))
        print(
            f"\nresults      {self._results_path(step)}"
            f"\npictures     {self._picture_path(step)}"
            f"\ncheckpoints  {self._workdir / folders.CHECKPOINT_FOLDER}"
            f"\ndashboard    tensorboard --logdir={self._workdir}",
            flush=True,
        )

    def _predictor(self, state: Mapping[str, Any]) -> Predictor:
        params = functional.inference_params(state.get("ema", state["params"]))
        return Predictor(self._programs, params, state["stats"], self._mesh)

    def _draw(self, predictor: Predictor, step: int, batches: Iterable, writer) -> None:
        """Draws the first held-out images.

        One sheet has a row each of image, truth and three tasks. The writer gets a picture for
        each image and task: the prediction, and below it the truth.

        Every host predicts, because the program spans all devices; the first one draws.
        """
        missing = self._config.train.pictures
        shown: list[tuple[Mapping[str, Any], dict[str, Segmentation]]] = []
        for batch in batches if missing > 0 else ():
            valid = np.flatnonzero(batch["valid"])
            found = self._segment(predictor, batch)
            for i in valid[:missing]:
                shown.append((batch["records"][i], {task: found[task][i] for task in TASKS}))
            # The first host's count: hosts that disagree would wait for each other forever.
            with jax.transfer_guard("allow"):  # those of the broadcast
                missing -= int(multihost_utils.broadcast_one_to_all(np.int32(len(valid))))
            if missing <= 0:
                break
        if not shown or jax.process_index() != 0:
            return
        cells, titles, pictures = [], [], {}
        for number, (record, predicted) in enumerate(shown, 1):
            image, name = record["image"], record["image_id"]
            truths = {
                task: Segmentation.from_record(record, self._metadata, task) for task in TASKS
            }
            above, below = (
                {
                    task: segmentation.overlay(image, **_LEGIBLE)
                    for task, segmentation in kind.items()
                }
                for kind in (predicted, truths)
            )
            cells += [image, below["panoptic"], *above.values()]
            titles += [name, "ground truth", *TASKS]
            for task in TASKS:
                pair, words = [above[task], below[task]], [f"{task}: {name}", "ground truth"]
                picture = sheets.contact_sheet(pair, words, columns=1)
                pictures[f"{task}/image_{number}"] = picture[None]
        writer.write_images(step, pictures)
        sheet = sheets.contact_sheet(cells, titles, columns=2 + len(TASKS))
        write_png(self._picture_path(step), sheet)

    def _segment(
        self, predictor: Predictor, batch: Mapping[str, Any]
    ) -> dict[str, list[Segmentation]]:
        """Segments a batch for all tasks, from one encoding."""
        features = predictor.encode(batch)
        sizes = real_sizes(batch, batch)
        return {
            task: segment_batch(
                *predictor.decode(features, task),
                *sizes,
                batch["image"].shape[1:3],
                task=task,
                config=self._postprocess,
                metadata=self._metadata,
            )
            for task in TASKS
        }

    def _results_path(self, step: int) -> pathlib.Path:
        return results_path(self._workdir, step)

    def _table_path(self, step: int) -> pathlib.Path:
        return self._results_path(step).with_name("task_tokens.json")

    def _picture_path(self, step: int) -> pathlib.Path:
        return self._workdir / "pictures" / f"step_{step:07d}.png"


def results_path(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """Gives the place of the results of a step."""
    return workdir / "eval" / str(step) / "results.json"


def read_results(workdir: pathlib.Path, step: int) -> EvalResult | None:
    """Reads the results of a step, None if it has none.

    Raises:
      CheckpointError: the file holds something else.
    """
    path = results_path(workdir, step)
    if not path.exists():
        return None
    return descriptions.read_json(path, EvalResult, expected="results of an evaluation")


def protocol_of(config: ConfigDict, metadata: Metadata) -> Protocol:
    """Returns the protocol that `config.eval` describes; see `choose_protocol`."""
    return choose_protocol(
        metadata,
        dataset=config.dataset.name,
        name=config.eval.protocol,
        instance_ids=config.eval.instance_ids,
        instance_json=config.eval.instance_json,
    )


def scored_tasks(config: ConfigDict, protocol: Protocol) -> tuple[str, ...]:
    """Lists the tasks of `config.eval.tasks` that the protocol scores; ValueError if none."""
    config_rules.require({"eval.tasks": config.eval.tasks})
    tasks = tuple(config.eval.tasks)
    scored = tuple(task for task in tasks if task in protocol.tasks)
    if not scored:
        raise ValueError(
            f"eval.tasks is {tasks}, but the protocol {protocol.name} scores only "
            f"{', '.join(protocol.tasks)}"
        )
    return scored


def metric_names(config: ConfigDict, metadata: Metadata) -> tuple[str, ...]:
    """Returns the names of the metrics of an evaluation; ValueError for wrong settings."""
    names = {"dataset": config.dataset.name, "name": config.eval.protocol}
    protocol = choose_protocol(metadata, **names)  # names need no file
    return tuple(
        name
        for task in scored_tasks(config, protocol)
        for name in protocol.make_metric(task, metadata).compute()
    )


def tta_config(config: ConfigDict) -> tta.TtaConfig | None:
    """Returns the views of `config.eval.tta`, or None if it is off."""
    if not config.eval.tta.enabled:
        return None
    return tta.TtaConfig.from_settings(config.eval.tta, config.eval.short_edge)


def _progress(batches: Iterable[Any]) -> Callable[[int, float], None]:
    """Makes a function (images, seconds) that logs how far one pass over `batches` is."""
    log = progress_log(getattr(batches, "images", None))
    return lambda images, seconds: log(images)


def postprocess_config(config: ConfigDict) -> PostprocessConfig:
    """Returns the thresholds of `config.eval`."""
    return PostprocessConfig(
        object_mask_threshold=config.eval.object_mask_threshold,
        overlap_threshold=config.eval.overlap_threshold,
        topk=config.eval.topk,
        instance_max_iou=config.eval.instance_max_iou,
    )


def format_token_table(table: TokenTable) -> str:
    """Formats the token table: rows of task tokens, columns of metrics."""
    header = ["task token", *(name.split("/")[1] for name in TOKEN_COLUMNS)]
    rows = [
        [token, *("-" if row.get(name) is None else f"{row[name]:.1f}" for name in TOKEN_COLUMNS)]
        for token, row in table.items()
    ]
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )
