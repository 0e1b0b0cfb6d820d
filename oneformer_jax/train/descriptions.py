"""JSON files that describe a working directory; a stranger may have written them.

workdir/
  config.json      the whole configuration of the last start
  model.json       OneFormerConfig.to_dict(), to build the model again
  metadata.json    classes of the data set
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from absl import logging

from oneformer_jax import config_rules, files
from oneformer_jax.models.oneformer import ONCE_STORED, OneFormerConfig
from oneformer_jax.train.runtime import folders
from oneformer_jax.train.runtime.workdir import differing_classes, differing_keys
from oneformer_jax.types import Metadata

CONFIG_FILE, MODEL_FILE, METADATA_FILE = "config.json", "model.json", "metadata.json"

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint or a working directory that cannot be used."""


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` (or a JSON text) to `path`, indented; readers see the old or the new file."""
    text = json.dumps(json.loads(value) if isinstance(value, str) else value, indent=1)
    files.write_atomically(path, text + "\n")


def read_json(
    path: str | os.PathLike[str], schema: type[T] = dict[str, Any], *, expected: str
) -> T:
    """Reads a JSON file; a CheckpointError names it and what was `expected`."""
    try:
        return files.read_json(path, schema)
    except files.FileError as error:
        raise CheckpointError(
            f"{error}; expected {expected}. Remove the file: the next training start in this "
            "workdir writes it again"
        ) from None


def read_model(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads model.json, whose fields must be of a model that the configs allow, too.

    Raises:
      CheckpointError: it is missing or damaged, describes no model, or has an absurd number.
    """
    path = workdir / MODEL_FILE
    model = read_json(path, expected="the model's settings")
    if old := [name for name in ONCE_STORED if name in model]:
        logging.info(
            "%s is of an earlier version: %s are not read from it; config.model and "
            "config.kernels, or an `Execution`, tell how a model is run",
            *(path, ", ".join(old)),
        )
    model = {name: value for name, value in model.items() if name not in ONCE_STORED}
    try:
        OneFormerConfig.from_dict(model)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no model of this program: {error}") from None
    return model


def read_metadata(workdir: pathlib.Path) -> Metadata:
    """Reads metadata.json; CheckpointError if it is missing or damaged."""
    path = workdir / METADATA_FILE
    return read_json(path, Metadata, expected="the classes of the data set")


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads config.json, also of an earlier version.

    Its groups "eval" and "model" are there, if only empty.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    path = workdir / CONFIG_FILE
    settings = read_json(path, expected="the run's configuration")
    for group in ("eval", "model"):
        if not isinstance(settings.setdefault(group, {}), dict):
            raise CheckpointError(f"{path}: {group} is {settings[group]!r}; expected settings")
    if line := config_rules.upgrade(settings):
        logging.info("%s: %s", path, line)
    return settings


def claim_workdir(
    workdir: str | os.PathLike[str], model: Mapping, config_json: str, metadata: Metadata
) -> None:
    """Writes config.json, model.json and metadata.json, or checks those of an earlier start.

    The configuration may change between starts (more steps, another learning rate), and config.json
    follows it. The folder, ids and colours of the dataset may change too, but neither the model nor
    the classes. With several hosts the first one writes.

    Args:
      workdir: created if needed.
      model: `OneFormerConfig.to_dict()`.
      config_json: the whole configuration as JSON text.
      metadata: classes of the data set.

    Raises:
      CheckpointError: the workdir holds another model or other classes.
    """
    workdir = folders.locate(workdir)
    described = {MODEL_FILE: dict(model), METADATA_FILE: json.loads(metadata.to_json())}
    for name, ours in described.items():
        if not (workdir / name).exists():
            continue
        if name == MODEL_FILE:
            theirs = _with_defaults(
                read_json(workdir / name, expected="what an earlier start wrote")
            )
            keys = differing_keys(theirs, json.loads(json.dumps(ours)))
            differing = files.first_few(keys)
        else:
            differing = differing_classes(read_metadata(workdir), metadata)
        if differing:
            what = "another model" if name == MODEL_FILE else "a model of other classes"
            raise CheckpointError(
                f"workdir {workdir} holds {what}: {name} differs in {differing}; use another "
                "--workdir, or the settings of that one"
            )
    if jax.process_index() == 0:
        files.make_folder(workdir)
        for name, ours in described.items():
            if not (workdir / name).exists():
                write_json(workdir / name, ours)
        write_json(workdir / CONFIG_FILE, config_json)


def _with_defaults(model: Mapping) -> Mapping:
    """The fields of a model; those that its version lacked have their defaults."""
    try:
        return json.loads(json.dumps(OneFormerConfig.from_dict(dict(model)).to_dict()))
    except (KeyError, TypeError, ValueError):  # another kind of model: the comparison tells
        return model
