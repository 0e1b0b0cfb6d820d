"""Starts a run from the files of `config.init`, and takes the architecture of a whole model."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from oneformer_jax import config_rules
from oneformer_jax.files import FileError, first_few
from oneformer_jax.models import backbones, functional
from oneformer_jax.models.backbones import BackboneConfig
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.rules import shown
from oneformer_jax.train import checkpoint, descriptions, settings
from oneformer_jax.train.runtime import folders
from oneformer_jax.weights import convert, fetch, files, start
from oneformer_jax.weights.start import Start

# Fields of an architecture that a run may choose: no array has another shape by them.
_OF_THE_RUN = ("encoder_dropout", "query_init_dropout")
_OF_THE_RUN_IN_BACKBONES = ("drop_path_rate", "norm", "layer_scale_init")
# Fields that no array shows.
_NOT_IN_TENSORS = (
    *("num_heads", "encoder_points", "text_heads"),
    *("text_causal", "queries", "query_loss"),
)
# Fields in which a run may differ from its checkpoint: a part starts afresh or is left out.
_MAY_DIFFER = (
    *("num_queries", "num_context", "queries", "query_loss"),
    *("encoder_layers", "query_init_layers", "decoder_layers"),
    *("text_width", "text_layers", "text_heads", "text_causal"),
    "backbone.dilations",
)


def take_architecture(
    config: ConfigDict, base: ConfigDict, workdir: str | os.PathLike[str] | None = None
) -> ConfigDict:
    """Returns a config whose defaults in `model` have given way to those of `init.checkpoint`.

    What the config sets itself stays. Where the checkpoint has something else there, the log says
    so if a training can start from it all the same. The number of classes is the dataset's; dropout
    and the like are the run's.

    Args:
      config: see `configs/common.py`; it is left as it is.
      base: the defaults.
      workdir: of the run. One that has begun keeps its architecture, and the file is not read.

    Raises:
      ValueError: the checkpoint cannot be read, or it contradicts what the config sets; the message
        has the keys with both values.
    """
    if not config.init.checkpoint or config.init.backbone:  # the config's rules refuse both
        return config
    config = config.copy_and_resolve_references()
    ours = settings.model_config(config, num_classes=1)
    run = None if workdir is None else folders.locate(workdir)
    begun = run is not None and (run / descriptions.MODEL_FILE).exists()
    if begun:
        theirs, text = OneFormerConfig.from_dict(descriptions.read_model(run)), True
    else:
        theirs, text = _architecture(config.init, ours, base)
    taken: dict[str, Any] = {}
    conflicts: dict[str, str] = {}
    for key, value in theirs.to_dict().items():
        skipped = key in ("num_classes", "backbone", *_OF_THE_RUN)
        skipped |= not text and key in ("num_context", *_text_fields())
        if skipped or value == config.model[key]:
            continue
        if config.model[key] == base.model[key]:
            taken[f"model.{key}"] = value
        else:
            mine = shown(config.model[key])
            conflicts[key] = f"model.{key} is {mine}, the checkpoint has {shown(value)}"
    if found := _backbone_conflicts(ours.backbone, theirs.backbone):
        if config.model.backbone.to_dict() == base.model.backbone.to_dict():
            taken |= _named_backbone(theirs.backbone)
        else:
            conflicts |= found
    where = fetch.shown(config.init.checkpoint)
    hard = [text for key, text in conflicts.items() if key not in _MAY_DIFFER]
    if hard and not begun:
        raise ValueError(
            f"init.checkpoint={where} has another architecture than this config: "
            f"{first_few(hard, 10, '; ')}. Leave these keys out, since defaults give way to the "
            "checkpoint, or take a config of its architecture"
        )
    for key, value in taken.items():
        *groups, last = key.split(".")
        functools.reduce(getattr, groups, config)[last] = value
    if taken and not begun:
        values = ", ".join(f"{key}={shown(value)}" for key, value in taken.items())
        logging.info("From init.checkpoint=%s, in place of defaults: %s", where, values)
    if conflicts and not begun:
        logging.warning("init.checkpoint=%s differs: %s", where, "; ".join(conflicts.values()))
    return config


def check_start(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Compares the file of `config.init` with the config, before the values are needed.

    A run that resumes does not read the file.

    Raises:
      ValueError: the file is missing, cannot be fetched or read, or is of another architecture.
    """
    run = folders.locate(workdir) / folders.CHECKPOINT_FOLDER
    if (config.init.backbone or config.init.checkpoint) and not folders.finished_steps(run):
        model = settings.model_config(config, num_classes=1)
        shapes = functional.abstract(model, training=True)
        read_start(config.init, shapes.params, shapes.stats, model.backbone, values=False)


def _local_path(init: ConfigDict, key: str) -> pathlib.Path:
    try:
        return fetch.local_path(init[key])
    except FileError as error:
        raise FileError(f"init.{key}: {error}") from error


def _architecture(
    init: ConfigDict, ours: OneFormerConfig, base: ConfigDict
) -> tuple[OneFormerConfig, bool]:
    """The architecture of a checkpoint, and whether its text branch is there."""
    path = _local_path(init, "checkpoint")
    if not files.is_foreign(path):
        return checkpoint.read_architecture(path), True
    # What the tensors of other programs do not tell is as the config has it.
    hints = {
        key: getattr(ours, key) for key in _NOT_IN_TENSORS if getattr(ours, key) != base.model[key]
    }
    if backbones.kind_of(ours.backbone) == "dinat":
        hints["backbone"] = {"dilations": ours.backbone.dilations}
    return convert.read_architecture(path, hints)


def _text_fields() -> list[str]:
    return [key for key in _MAY_DIFFER if key.startswith("text_")]


def _backbone_conflicts(ours: Any, theirs: Any) -> dict[str, str]:
    """Names the fields in which two backbones differ, with both values."""
    mine, there = _shaping(ours), _shaping(theirs)
    if mine["kind"] != there["kind"]:
        text = f"model.backbone is a {mine['kind']}, the checkpoint has a {there['kind']}"
        return {"backbone": text}
    return {
        f"backbone.{key}": f"model.backbone has {key}={shown(mine[key])}, the checkpoint has "
        f"{shown(value)}"
        for key, value in there.items()
        if mine[key] != value
    }


def _shaping(backbone: Any) -> dict[str, Any]:
    fields = backbones.to_dict(backbone)
    return {key: v for key, v in fields.items() if key not in _OF_THE_RUN_IN_BACKBONES}


def _named_backbone(backbone: Any) -> dict[str, Any]:
    """Keys of a config that make this backbone: a published name if it has one."""
    fields = backbones.to_dict(backbone)
    kind = fields.pop("kind")
    for name in backbones.PUBLISHED:
        made = backbones.backbone_config(name)
        if _shaping(made) == _shaping(backbone):
            base = backbones.to_dict(made)
            kind = name
            fields = {key: value for key, value in fields.items() if base[key] != value}
            break
    overrides = ConfigDict(fields, convert_dict=False)
    return {"model.backbone.name": kind, "model.backbone.overrides": overrides}


def read_start(
    init: ConfigDict, params: dict, stats: dict, backbone: BackboneConfig, values: bool = True
) -> Start | None:
    """Reads the file that `config.init` names, or returns None.

    Args:
      init: `config.init`.
      params: shapes of the parameters of the model, a nested dict.
      stats: shapes of its other values.
      backbone: config of its backbone.
      values: False leaves out those of one of our checkpoints; the result tells only what fits.

    Raises:
      ValueError: both settings are given, or the file cannot be read or does not fit.
    """
    config_rules.require({"init.backbone": init.backbone, "init.checkpoint": init.checkpoint})
    expected = dict(convert.leaves((params, stats)))
    if init.backbone:
        return start.from_backbone(_local_path(init, "backbone"), expected, backbone)
    if not init.checkpoint:
        return None
    path = _local_path(init, "checkpoint")
    if files.is_foreign(path):
        return start.from_model(path, expected, backbones.kind_of(backbone))
    if values:
        trained = checkpoint.load_for_inference(path)
        params, stats = trained.params, trained.stats
    else:
        shapes = functional.abstract(checkpoint.read_architecture(path), training=True)
        params, stats = shapes.params, shapes.stats
    return start.from_arrays(str(path), dict(convert.leaves((params, stats))), expected)


def log_start(found: Start, path: str) -> None:
    """Logs the arrays taken from `path`, and those that start afresh."""
    logging.info("Starting from %s: %d arrays are taken", fetch.shown(path), len(found.arrays))
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
