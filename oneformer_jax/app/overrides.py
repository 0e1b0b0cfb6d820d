"""Overrides of a config on the command line: --config.KEY=VALUE."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from oneformer_jax import config_rules
from oneformer_jax.files import first_few, nearest

COMMON = os.path.join("configs", "common.py")  # every key of a config
# Other programs' names of keys, in any group.
SYNONYMS = {
    "amp": "model.dtype",
    "crop": "data.crop_size",
    "image_size": "data.crop_size",
    "img_size": "data.crop_size",
    "imgsz": "data.crop_size",
    "iterations": "train.steps",
    "learning_rate": "optim.lr",
    "max_iter": "train.steps",
    "num_epochs": "train.epochs",
    "num_workers": "data.workers",
    "precision": "model.dtype",
    "pretrained": "init.checkpoint",
    "wd": "optim.weight_decay",
    "weights": "init.checkpoint",
}


def overridden_keys(argv: Sequence[str]) -> list[str]:
    """Keys that `argv` overrides: "optim.lr" of "--config.optim.lr=3e-4"."""
    matches = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
    return [match[1] for match in matches if match]


def key_of(override: str) -> str:
    """Returns the key that an override belongs to: "crop_size" of the element "crop_size[0]"."""
    return re.sub(r"\[.*", "", override)


def config_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns dotted keys of all values of `config`, groups included."""
    keys = []
    for name, value in config.items():
        keys.append(prefix + name)
        if isinstance(value, ConfigDict):
            keys += config_keys(value, f"{prefix}{name}.")
    return keys


def unknown_keys(config: ConfigDict, overrides: Iterable[str]) -> str:
    """Returns one line about the `overrides` that are no keys of `config`, or "" if all are.

    Each is given with the keys that it may have been meant as: the one that took the place of an
    earlier version's, or those with the same last name in another group, then those of similar
    spelling.
    """
    keys = config_keys(config)
    messages = []
    for override in overrides:
        renamed = config_rules.RENAMED.get(override)
        if renamed is None and key_of(override) in keys:
            continue
        last = override.rsplit(".", 1)[-1]
        renamed = renamed or SYNONYMS.get(last)
        near = [renamed] if renamed else [k for k in keys if k.rsplit(".", 1)[-1] == last]
        if not renamed:
            near += [key for key in nearest(override, keys, 3, 0.7) if key not in near]
        hint = ", ".join(f"--config.{key}" for key in near[:3])
        messages.append(
            f"the config has no key {override!r}"
            + (f" (did you mean {hint}?)" if hint else f" (all keys are in {COMMON})")
        )
    return "; ".join(messages)


def wrong_values(config: ConfigDict, path: str, overrides: Sequence[str]) -> str:
    """Returns a line for each of the first wrong values of `config`, or "" if there are none.

    Args:
      config: with the overrides.
      path: of the config file, to which the values belong that are not overridden.
      overrides: keys that are.
    """
    lines = []
    for fault in config_rules.find_faults(config):
        overridden = fault.key in map(key_of, overrides)
        source = "--config." if overridden else f"{path}: "
        lines.append(f"{source}{fault.key}={fault.shown}: it must {fault.text}")
    return first_few(lines, 10, "\n")


def value_of(config: ConfigDict, key: str) -> object:
    """Returns the value of a dotted key."""
    value: object = config
    for part in key.split("."):
        value = value[part]  # type: ignore[index]
    return value
