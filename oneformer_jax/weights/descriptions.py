"""Descriptions of models in files: our own beside the weights, checked before they are used.

`OneFormerConfig` and the configs of the backbones have a rule for every field. What a model of a
file may have of all layers together is bounded here: it is refused for its missing tensors within
seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from oneformer_jax.files import FileError
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.types import Metadata
from oneformer_jax.weights.pickle_reader import quoted

# Published models have up to 73. A layer takes some 60 ms before the first tensor is read.
MAX_LAYERS = 160

_Size = Annotated[int, Meta(ge=1, le=65_536)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """Test size and thresholds of a run, see `eval.predict`."""

    short_edge: _Size | UnsetType = UNSET
    max_size: _Size | UnsetType = UNSET
    object_mask_threshold: _Share | UnsetType = UNSET
    overlap_threshold: _Share | UnsetType = UNSET
    topk: Annotated[int, Meta(ge=1, le=1 << 20)] | UnsetType = UNSET


class Description(NamedTuple):
    """Our own description of a model.

    Attributes:
      model: fields of `OneFormerConfig`, as its `to_dict` gives them, or None.
      metadata: the classes, or None.
      settings: what of `Settings` is known.
    """

    model: dict[str, Any] | None
    metadata: Metadata | None
    settings: dict[str, Any]


def read(own: Mapping[str, Any] | None, where: str) -> Description:
    """Returns the description that a file holds; `where` names it in errors.

    Raises:
      FileError: a value of another type than it should have, or one beyond its limits.
    """
    found = own or {}

    def part(key: str, schema: Any) -> Any:
        return convert(found[key], schema, where, key) if key in found else None

    settings = part("settings", Settings)
    return Description(
        part("model", dict[str, Any]),
        part("metadata", Metadata),
        msgspec.to_builtins(settings) if settings else {},
    )


def model_config(fields: Mapping[str, Any], where: str) -> OneFormerConfig:
    """Returns the architecture of a description; `where` names it in errors.

    Raises:
      FileError: an unknown field, a missing one, one that breaks its rule, or too many layers.
    """
    try:
        config = OneFormerConfig.from_dict(dict(fields))
    except ValueError as error:
        raise FileError(f"{where}: {quoted(str(error), 600)}") from error
    require_few_layers(config, where)
    return config


def require_few_layers(config: OneFormerConfig, where: str) -> None:
    """Raises a FileError for a model of more than `MAX_LAYERS` layers in all its stacks."""
    head = (config.encoder_layers, config.query_init_layers, config.decoder_layers)
    backbone = dataclasses.asdict(config.backbone)
    blocks = backbone.get("depth") or sum(backbone["depths"])
    layers = sum(head) + config.text_layers + blocks
    if layers > MAX_LAYERS:
        raise FileError(f"{where}: a model of {layers:,} layers; at most {MAX_LAYERS}")


def convert(value: Any, schema: Any, where: str, key: str) -> Any:
    """Returns a value of a file as the type `schema`; FileError that names `where` and `key`."""
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        why = quoted(str(error), 300)  # it may hold a key of the file
        raise FileError(f"{where}: {key} has an unexpected value: {why}") from None
