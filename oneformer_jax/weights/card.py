"""The card of a model on the hub: how to use it, its scores, how it was trained, its licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from oneformer_jax.weights import download

# Groups of a config that tell how a model was trained. Paths of the machine stay there.
_GROUPS = ("model", "data", "loss", "matcher", "optim", "train", "eval")


def model_card(
    *,
    summary: str,
    dataset: str,
    scores: Mapping[str, float | None],
    config: Mapping[str, Any],
    license: str,
) -> str:
    """Writes README.md of a model; {name} stands where its OWNER/NAME goes.

    Args:
      summary: a sentence about the model.
      dataset: whose classes it has.
      scores: metric -> value in percent, as "panoptic/PQ"; may be empty.
      config: of the run, or less where that is not known.
      license: of the weights, by its identifier on the hub; "" says that it is not stated.

    Raises:
      ValueError: `license` is no such identifier.
    """
    if not re.fullmatch("[a-z0-9.+-]{0,50}", license):
        raise ValueError(f"--license={license!r} is no identifier of the hub, as apache-2.0 or mit")
    head = [
        *([f"license: {license}"] if license else []),
        "library_name: oneformer-jax",
        "pipeline_tag: image-segmentation",
        "tags:",
        *(f"- {tag}" for tag in ("oneformer", "jax", "image-segmentation")),
    ]
    known = {name: value for name, value in scores.items() if value is not None}
    rows = [f"| {name} | {value:.1f} |" for name, value in known.items()]
    table = ["| metric | value |", "|---|---|", *rows]
    said = (
        f"The weights: {license}."
        if license
        else "The owner has not stated a licence of the weights; the training data may bind it."
    )
    code = [
        "```python",
        "import oneformer_jax",
        "",
        'segmenter = oneformer_jax.load("{name}")',
        'result = segmenter(image, task="panoptic")  # uint8 RGB [H, W, 3]',
        "```",
    ]
    told: dict[str, Any] = {name: config[name] for name in _GROUPS if config.get(name)}
    if "eval" in told:
        told["eval"] = {k: v for k, v in told["eval"].items() if k != "instance_json"}
    told |= {"init": start} if (start := _start(config.get("init") or {})) else {}
    training = ["```json", json.dumps(told, indent=1, default=str), "```"]
    parts = [
        ["---", *head, "---", ""],
        ["# {name}", "", summary, ""],
        ["## Use", "", *code, ""],
        ["## Scores", "", f"On the evaluation split of {dataset}:", "", *table, ""]
        if known
        else [],
        ["## Config", "", *training, ""] if told else [],
        ["## Licence", "", said, "The code, OneFormer-JAX: Apache-2.0.", ""],
    ]
    return "\n".join(line for part in parts for line in part)


def _start(init: Mapping[str, Any]) -> dict[str, str]:
    """Names the start of a training: an address without secrets, or the end of a path."""
    names = {key: str(value) for key, value in init.items() if value}
    return {
        key: download.shown(value) if "://" in value else "/".join(value.split("/")[-2:])
        for key, value in names.items()
    }
