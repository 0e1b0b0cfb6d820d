"""From a ConfigDict to the frozen dataclasses that the rooms below read."""

from __future__ import annotations

from absl import logging
from ml_collections import ConfigDict

from oneformer_jax import config_rules
from oneformer_jax.models import backbones
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.models.losses import LossConfig
from oneformer_jax.models.matcher import MatcherConfig
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train.optim import OptimConfig

EXECUTION = ("dtype", "remat", "scan_layers")  # keys of `config.model` that are no architecture


def checked(config: ConfigDict) -> ConfigDict:
    """Moves keys of earlier versions to their new places, and checks all but the data.

    Raises:
      ValueError: a line for each of the first wrong values.
    """
    config = config.copy_and_resolve_references()
    if line := config_rules.upgrade(config):
        logging.warning("The config has %s", line)
    config_rules.check(config, but=("dataset",))
    return config


def model_config(config: ConfigDict, num_classes: int) -> OneFormerConfig:
    """Reads the architecture in `config.model`, for a dataset of `num_classes` classes."""
    fields = {k: v for k, v in config.model.to_dict().items() if k not in EXECUTION}
    backbone = fields.pop("backbone")
    try:
        made = backbones.backbone_config(backbone["name"], **backbone["overrides"])
    except ValueError as error:
        raise ValueError(f"model.backbone.overrides: {error}") from error
    return OneFormerConfig(num_classes=num_classes, backbone=made, **fields)


def execution(config: ConfigDict) -> Execution:
    """Reads the `Execution` from `config.model` and `config.kernels`."""
    fields = {name: config.model[name] for name in EXECUTION}
    return Execution(**fields, kernels=Kernels(**config.kernels.to_dict()))


def loss_config(config: ConfigDict) -> LossConfig:
    """Returns the losses that `config.loss` and `config.matcher` describe."""
    return LossConfig(**config.loss.to_dict(), matcher=MatcherConfig(**config.matcher.to_dict()))


def optim_config(config: ConfigDict) -> OptimConfig:
    """Returns the optimizer that `config.optim` describes."""
    fields = config.optim.to_dict()
    for name in ("accumulate", "ema_decay"):  # of the training step, not of the optimizer
        del fields[name]
    return OptimConfig(steps=config.train.steps, **fields)
