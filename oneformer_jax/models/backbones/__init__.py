"""Backbones: modules from an image to four maps, chosen by their config.

A backbone is called as `backbone(image, key=None, train=False)` with a normalised float image
[B, H, W, 3] and returns res2, res3, res4, res5: [B, h, w, C] at the strides 4, 8, 16, 32, in the
compute dtype. `key` is the PRNG key of the stochastic depth; None is deterministic. Only batch norm
asks for `train`. The config has `channels`, the four numbers of channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from oneformer_jax.models.backbones import convnext, dinat, internimage, resnet, swin, vit
from oneformer_jax.models.backbones.convnext import ConvNeXt, ConvNeXtConfig
from oneformer_jax.models.backbones.dinat import DiNAT, DinatConfig
from oneformer_jax.models.backbones.internimage import InternImage, InternImageConfig
from oneformer_jax.models.backbones.resnet import ResNet, ResNetConfig
from oneformer_jax.models.backbones.swin import Swin, SwinConfig
from oneformer_jax.models.backbones.vit import ViT, ViTConfig
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.rules import require_names, shown

BackboneConfig = (
    SwinConfig | ConvNeXtConfig | DinatConfig | InternImageConfig | ResNetConfig | ViTConfig
)

# kind: (config, module). The kind names a family in JSON, and a config without defaults of size.
_KINDS = {
    "swin": (SwinConfig, Swin),
    "convnext": (ConvNeXtConfig, ConvNeXt),
    "dinat": (DinatConfig, DiNAT),
    "internimage": (InternImageConfig, InternImage),
    "resnet": (ResNetConfig, ResNet),
    "vit": (ViTConfig, ViT),
}

PUBLISHED: dict[str, BackboneConfig] = {
    name: config
    for module in (swin, convnext, dinat, internimage, resnet, vit)
    for name, config in module.PUBLISHED.items()
}

NAMES = (*PUBLISHED, *_KINDS)


def backbone_config(name: str, **overrides: Any) -> BackboneConfig:
    """Returns the config of a backbone by name.

    Args:
      name: one of `NAMES`: a published size ("swin_tiny", "dinov2_base_registers"...), or a kind
        ("swin", "vit"...), whose fields without a default must all be in `overrides`.
      overrides: fields of the config, see `SwinConfig` and its like.

    Raises:
      ValueError: an unknown name or field, a missing field, or a value that a field can't have.
    """
    if name not in NAMES:
        raise ValueError(f"unknown backbone {name!r}; use one of {', '.join(NAMES)}")
    published = PUBLISHED.get(name)
    fields = dataclasses.fields(published or _KINDS[name][0])
    known = tuple(f.name for f in fields)
    needed = () if published else tuple(f.name for f in fields if f.default is dataclasses.MISSING)
    require_names(f"backbone {name}", overrides, known, needed)
    return (
        dataclasses.replace(published, **overrides) if published else _KINDS[name][0](**overrides)
    )


def build_backbone(
    config: BackboneConfig,
    *,
    rngs: ParamKeys,
    execution: Execution = Execution(),
) -> Swin | ConvNeXt | DiNAT | InternImage | ResNet | ViT:
    """Returns the module of a config.

    Args:
      config: see `backbone_config`.
      rngs: of the initial parameters.
      execution: how it is run; its dtype is that of the outputs, too.
    """
    _, module = _KINDS[kind_of(config)]
    return module(config, rngs=rngs, execution=execution)


def to_dict(config: BackboneConfig) -> dict[str, Any]:
    """Returns plain values for JSON: the fields and "kind"; `from_dict` is the inverse."""
    return {"kind": kind_of(config), **dataclasses.asdict(config)}


def from_dict(fields: dict[str, Any]) -> BackboneConfig:
    """Reads what `to_dict` wrote; ValueError for what is unknown, missing or absurd."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"backbone is {shown(fields)}; it must be fields with values")
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"unknown backbone kind {shown(kind)}; use one of {', '.join(_KINDS)}")
    return backbone_config(kind, **fields)


def kind_of(config: BackboneConfig) -> str:
    """Returns the family that a config belongs to: "swin", "resnet"..."""
    for kind, (config_class, _) in _KINDS.items():
        if isinstance(config, config_class):
            return kind
    raise ValueError(f"{type(config).__name__} is not the config of a backbone")
