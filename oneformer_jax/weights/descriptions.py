"""Descriptions of models in files: our own beside the weights, checked before they are used.

A number of a file can ask for a model that no machine holds, so each has a limit: an order of
magnitude above the published models, and low enough that a model of the limits is refused for its
missing tensors within seconds.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from oneformer_jax.files import FileError, did_you_mean
from oneformer_jax.models.backbones import (
    ConvNeXtConfig,
    DinatConfig,
    InternImageConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)
from oneformer_jax.models.oneformer import ONCE_STORED, OneFormerConfig
from oneformer_jax.types import Metadata
from oneformer_jax.weights.pickle_reader import quoted

# Of one stack, and of all: published models have up to 32 and 73. A layer takes some 60 ms before
# the first tensor is read.
MAX_LAYERS, MAX_ALL_LAYERS = 128, 160

_BACKBONES = {
    "swin": SwinConfig,
    "convnext": ConvNeXtConfig,
    "dinat": DinatConfig,
    "internimage": InternImageConfig,
    "resnet": ResNetConfig,
    "vit": ViTConfig,
}
_LAYERS = ("encoder_layers", "query_init_layers", "decoder_layers", "text_layers")
# The most that a whole number of a field may be; widths have the last limit.
_MOST = {
    "num_classes": 65_535,
    "num_queries": 10_000,
    "num_context": 10_000,
    "window_size": 32,
    "kernel_size": 63,
    "dw_kernel_size": 63,
    "num_heads": 1024,
    "text_heads": 1024,
    "groups": 1024,
    "encoder_points": 64,
    "dilations": 4096,
    **dict.fromkeys(("patch_size", "positions", "registers"), 256),
    **dict.fromkeys(("depth", "depths", "norm_after", *_LAYERS), MAX_LAYERS),
}
_MAY_BE_ZERO = ("num_context", "norm_after", "positions", "registers", *_LAYERS)
_MOST_WIDTH = 32_768

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
        return _convert(found[key], schema, where, key) if key in found else None

    settings = part("settings", Settings)
    return Description(
        part("model", dict[str, Any]),
        part("metadata", Metadata),
        msgspec.to_builtins(settings) if settings else {},
    )


def model_config(fields: Mapping[str, Any], where: str) -> OneFormerConfig:
    """Returns the architecture of a description.

    Raises:
      FileError: an unknown field, a missing one, one of another type, or one beyond its limits.
    """
    backbone = fields.get("backbone")
    backbone = backbone if isinstance(backbone, Mapping) else {}
    kind = backbone.get("kind")
    if not isinstance(kind, str) or kind not in _BACKBONES:
        raise FileError(
            f"{where}: model.backbone.kind is {quoted(kind)}; known are {', '.join(_BACKBONES)}"
        )
    fields = {name: value for name, value in fields.items() if name not in ONCE_STORED}
    check_fields(fields, where)
    try:
        return OneFormerConfig.from_dict({**fields, "backbone": dict(backbone)})
    except (ValueError, TypeError) as error:  # TypeError: a field is missing
        raise FileError(f"{where}: {error}") from error


def check_fields(fields: Mapping[str, Any], where: str, kind: str | None = None) -> None:
    """Checks names, types and sizes of fields of `OneFormerConfig`; "backbone" may hold a dict.

    Args:
      fields: some or all of them.
      where: the file, for the message.
      kind: of the backbone, if its fields do not say it.

    Raises:
      FileError: the first that is wrong, with its key and value.
    """
    _check(fields, OneFormerConfig, where, "model")
    backbone = fields.get("backbone")
    if isinstance(backbone, Mapping):
        rest = {name: value for name, value in backbone.items() if name != "kind"}
        _check(rest, _BACKBONES[kind or backbone["kind"]], where, "model.backbone")
        layers = sum(fields.get(name, 0) for name in _LAYERS) + sum(rest.get("depths", ()))
        layers += rest.get("depth", 0)
        if layers > MAX_ALL_LAYERS:
            raise FileError(f"{where}: a model of {layers:,} layers; at most {MAX_ALL_LAYERS}")


def _check(fields: Mapping[str, Any], config: type, where: str, key: str) -> None:
    types = typing.get_type_hints(config)
    for name, value in fields.items():
        if name not in types:
            near = did_you_mean(name[:100], types)
            raise FileError(f"{where}: unknown model field {key}.{quoted(name)}{near}")
        if name != "backbone":
            _convert(value, types[name], where, f"{key}.{name}")
            least = 0 if types[name] in (float, bool) or name in _MAY_BE_ZERO else 1
            _bound(value, (least, _MOST.get(name, _MOST_WIDTH)), where, f"{key}.{name}")


def _convert(value: Any, schema: Any, where: str, key: str) -> Any:
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        why = quoted(str(error), 300)  # it may hold a key of the file
        raise FileError(f"{where}: {key} has an unexpected value: {why}") from None


def _bound(value: Any, limits: tuple[int, int], where: str, key: str) -> None:
    if isinstance(value, list | tuple):
        if len(value) > MAX_LAYERS:
            raise FileError(f"{where}: {key} has {len(value):,} values, more than {MAX_LAYERS}")
        for one in value:
            _bound(one, limits, where, key)
    elif isinstance(value, str) and len(value) > 100:
        raise FileError(f"{where}: {key} is {quoted(value)}, no word of a model")
    elif isinstance(value, int | float) and not limits[0] <= value <= limits[1]:
        shown = quoted(str(value))
        raise FileError(f"{where}: {key} is {shown}; expected {limits[0]} to {limits[1]:,}")
