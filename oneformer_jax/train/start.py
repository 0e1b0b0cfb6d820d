"""The state of step 0 from files: `config.init.backbone` or `config.init.checkpoint`."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from oneformer_jax import config_rules
from oneformer_jax.files import first_few
from oneformer_jax.models import backbones
from oneformer_jax.models.backbones import BackboneConfig
from oneformer_jax.train import checkpoint
from oneformer_jax.weights import files, names, start
from oneformer_jax.weights.start import Start


def read_start(
    init: ConfigDict, params: dict, stats: dict, backbone: BackboneConfig
) -> Start | None:
    """Reads the file that `config.init` names, or returns None.

    Args:
      init: `config.init`.
      params: shapes of the parameters of the model, a nested dict.
      stats: shapes of its other values.
      backbone: config of its backbone.

    Raises:
      ValueError: both settings are given, or the file cannot be read or does not fit.
    """
    config_rules.require({"init.backbone": init.backbone, "init.checkpoint": init.checkpoint})
    expected = dict(names.flatten(params)) | dict(names.flatten(stats))
    if init.backbone:
        return start.from_backbone(os.path.expanduser(init.backbone), expected, backbone)
    if not init.checkpoint:
        return None
    path = os.path.expanduser(init.checkpoint)
    if files.is_foreign(path):
        return start.from_model(path, expected, backbones.kind_of(backbone))
    trained = checkpoint.load_for_inference(path)
    values = dict(names.flatten(trained.params)) | dict(names.flatten(trained.stats))
    return start.from_arrays(path, values, expected)


def log_start(found: Start, path: str) -> None:
    """Logs the arrays taken from `path`, and those that start afresh."""
    logging.info("Starting from %s: %d arrays are taken", path, len(found.arrays))
    logging.info("  licence: %s", found.licence)
    reasons = dict.fromkeys(found.fresh.values())
    for reason in reasons:
        listed = [name for name, why in found.fresh.items() if why == reason]
        logging.info("  %d start afresh (%s): %s", len(listed), reason, first_few(listed, 5))
    if found.unused:
        logging.info("  not used from the file: %s", first_few(found.unused, 5))


def apply_start(found: Start, state: dict[str, Any]) -> dict[str, Any]:
    """Replaces arrays of the state by those of `found`, with the same layout on the devices."""
    values: dict[str, np.ndarray] = {}

    def replace(tree: Any, name: str = "") -> Any:
        if isinstance(tree, dict):
            return {k: replace(v, f"{name}.{k}" if name else str(k)) for k, v in tree.items()}
        if name not in found.arrays:
            return tree
        if name not in values:  # averaged parameters have the names of the parameters
            values[name] = found.arrays[name]().astype(tree.dtype)
        return jax.make_array_from_callback(
            tree.shape, tree.sharding, lambda index: values[name][index]
        )

    return state | {
        part: replace(state[part]) for part in ("params", "stats", "ema") if part in state
    }
