"""Findings of an evaluation: which classes are confused, and the best and worst images.

Beside the results of a step lie

  confusion.json, confusion.png   where the semantic task is scored
  examples.json                   the images, with their scores and mistakes
  examples/TASK_worst_1.jpg       image, truth and prediction
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from PIL import Image

from oneformer_jax import files
from oneformer_jax.eval.metrics.iou import MeanIoU, Pairs
from oneformer_jax.eval.metrics.outcome import NOTHING, Outcome
from oneformer_jax.eval.metrics.truth import Record
from oneformer_jax.eval.pictures import confusion, sheets
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.write import write_png
from oneformer_jax.types import Metadata

KEPT = 3  # best images, and worst ones, of each task
_SHOWN = 30  # classes of the picture
_STORED = 1000  # classes of the JSON file


class Findings:
    """Collects images and their outcomes as they are scored; holds the best and worst only.

    Args:
      metadata: the classes.
      thing_labels: the labels of instances are positions among the things.
    """

    def __init__(self, metadata: Metadata, *, thing_labels: bool = False):
        self._metadata = metadata
        self._thing_labels = thing_labels
        self._examples: dict[str, list[dict[str, Any]]] = {}
        self._pairs: Pairs | None = None

    def add(self, segmentation: Segmentation, record: Record, outcome: Outcome) -> None:
        """Keeps the image, drawn, if it is among the best or worst so far."""
        found = self._examples.setdefault(segmentation.task, [])
        if outcome.score is None:
            return
        if len(found) >= 2 * KEPT:
            worst, best = found[KEPT - 1]["score"], found[-KEPT]["score"]
            if worst <= outcome.score <= best:
                return
        entry = {
            "image": str(record["image_id"]),
            "score": outcome.score,
            "mistakes": [self._mistake(*m, segmentation.task) for m in outcome.mistakes[:5]],
            "picture": base64.b64encode(self._picture(segmentation, record)).decode(),
        }
        self._keep(segmentation.task, [entry])

    def _keep(self, task: str, entries: list[dict[str, Any]]) -> None:
        found = self._examples.setdefault(task, [])
        found += entries
        found.sort(key=lambda entry: (entry["score"], entry["image"]))
        del found[KEPT:-KEPT]

    def _mistake(self, true: int, predicted: int, amount: float, task: str) -> str:
        names = self._metadata.class_names
        size = f"{amount:.1f} % of the pixels" if task == "semantic" else f"{amount:.0f} ×"
        if predicted == NOTHING:
            return f"{size} missed: {names[true]}"
        if true == NOTHING:
            return f"{size} invented: {names[predicted]}"
        return f"{size} confused: {names[true]} taken for {names[predicted]}"

    def _picture(self, segmentation: Segmentation, record: Record) -> bytes:
        if self._thing_labels and segmentation.task == "instance":
            things = np.flatnonzero(self._metadata.is_thing)
            labels = things[segmentation.instances.labels].astype(np.int32)
            instances = segmentation.instances._replace(labels=labels)
            segmentation = dataclasses.replace(segmentation, instances=instances)
        image = record["image"]
        truth = Segmentation.from_record(record, self._metadata, segmentation.task)
        size = {"min_size": 300, "max_pixels": 500_000}
        row = [image, truth.overlay(image, **size), segmentation.overlay(image, **size)]
        sheet = sheets.contact_sheet(row, ["image", "truth", "prediction"], columns=3)
        content = io.BytesIO()
        Image.fromarray(sheet).save(content, "JPEG", quality=85)
        return content.getvalue()

    def merge(self, other: Findings) -> None:
        """Adds the images that `other` has seen."""
        for task, entries in other._examples.items():
            self._keep(task, entries)

    def state(self) -> dict[str, np.ndarray]:
        """Packs the images as JSON, uint8 [N], and what tells how to read it."""
        packed = json.dumps([self._thing_labels, self._metadata.to_json(), self._examples])
        return {"json": np.frombuffer(packed.encode(), np.uint8)}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        thing_labels, metadata, examples = json.loads(state["json"].tobytes())
        result = cls(Metadata.from_json(metadata), thing_labels=thing_labels)
        result._examples = examples
        return result

    def finish(self, merged: Findings, semantic: Any) -> None:
        """Takes the images of all processes, and the confused classes of a `MeanIoU`."""
        self._examples = merged._examples
        self._pairs = semantic.pairs() if isinstance(semantic, MeanIoU) else None

    def write(self, folder: pathlib.Path) -> None:
        """Writes the files into the folder of a step's results, in place of earlier ones."""
        files.make_folder(folder / "examples")
        for old in sorted((folder / "examples").glob("*.jpg")):
            old.unlink()
        listed: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for task, found in self._examples.items():
            half = (len(found) + 1) // 2
            kinds = {"worst": found[:half], "best": found[half:][::-1]}
            for kind, entries in kinds.items():
                for number, entry in enumerate(entries, 1):
                    picture = base64.b64decode(entry["picture"])
                    path = folder / "examples" / f"{task}_{kind}_{number}.jpg"
                    files.write_atomically(path, picture)
                shown = [{k: v for k, v in e.items() if k != "picture"} for e in entries]
                listed.setdefault(task, {})[kind] = shown
        files.write_atomically(folder / "examples.json", json.dumps(listed, indent=1) + "\n")
        if self._pairs is None:
            for name in ("confusion.json", "confusion.png"):
                (folder / name).unlink(missing_ok=True)
            return
        names = self._metadata.class_names
        table = confusion.most_confused(names, self._pairs, _STORED, absent=True)
        shares = [[None if np.isnan(x) else round(x, 6) for x in row] for row in table.shares()]
        described = {
            "classes": table.names,
            "rows": "truth",
            "columns": "prediction",
            "pixels": table.pixels.sum(axis=1).tolist(),
            "shares": shares,
        }
        files.write_atomically(folder / "confusion.json", json.dumps(described) + "\n")
        drawn = confusion.draw(confusion.most_confused(names, self._pairs, _SHOWN))
        write_png(folder / "confusion.png", drawn)
