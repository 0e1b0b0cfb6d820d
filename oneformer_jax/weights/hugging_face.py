"""config.json of Hugging Face's `transformers`: what it notes, and ours written as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from oneformer_jax.files import FileError
from oneformer_jax.models import backbones
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.types import Metadata
from oneformer_jax.weights import descriptions
from oneformer_jax.weights.architecture import POINTS
from oneformer_jax.weights.pickle_reader import quoted

_STAGES = [f"stage{i}" for i in range(1, 5)]

_Rate = Annotated[float, Meta(ge=0, lt=1)]
_Dilation = Annotated[int, Meta(ge=1, le=4096)]
_Stage = Annotated[list[_Dilation], Meta(max_length=256)]


class _Backbone(msgspec.Struct):
    """Fields of a backbone_config that tensors do not show."""

    model_type: str | None = None
    dilations: Annotated[list[_Stage], Meta(max_length=16)] | None = None
    drop_path_rate: _Rate | None = None
    # What our backbones always have; see `_FIXED`.
    hidden_act: Any = None
    layer_norm_eps: Any = None
    layer_type: Any = None
    downsample_in_first_stage: Any = None
    downsample_in_bottleneck: Any = None


class _Config(msgspec.Struct):
    """Fields of a config.json that tensors do not show."""

    num_attention_heads: Annotated[int, Meta(ge=1, le=1024)] = 8
    dropout: _Rate | None = None
    backbone_config: _Backbone | None = None
    pre_norm: Any = None
    use_task_norm: Any = None
    layer_norm_eps: Any = None
    common_stride: Any = None
    strides: Any = None


# What this model always has, by config and key; no published OneFormer has another value.
_FIXED: dict[str, dict[str, Any]] = {
    "": {
        "pre_norm": False,
        "use_task_norm": True,
        "layer_norm_eps": 1e-5,
        "common_stride": 4,
        "strides": [4, 8, 16, 32],
    },
    "swin": {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "dinat": {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "convnext": {"hidden_act": "gelu"},
    "resnet": {
        "hidden_act": "relu",
        "layer_type": "bottleneck",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    },
}


def noted(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Fields of `OneFormerConfig` that a config.json holds and tensors do not show.

    Raises:
      FileError: the config of another kind of model, or of one that OneFormer never was.
    """
    if (kind := config.get("model_type")) != "oneformer":
        name = f"a {quoted(kind)!r} model" if isinstance(kind, str) else quoted(kind)
        raise FileError(f"{path}: config.json is of {name}, not of a oneformer")
    found = descriptions.convert(config, _Config, path, "config.json")
    _require_fixed(found, "", path)
    # The port knows one number of points.
    fields: dict[str, Any] = {"num_heads": found.num_attention_heads, "encoder_points": POINTS}
    if found.dropout is not None:
        fields |= dict.fromkeys(("encoder_dropout", "query_init_dropout"), found.dropout)
    options: dict[str, Any] = {}
    if (backbone := found.backbone_config) is not None:
        _require_fixed(backbone, backbone.model_type or "", path)
        if backbone.model_type == "dinat" and backbone.dilations is not None:
            options["dilations"] = tuple(map(tuple, backbone.dilations))
        if backbone.drop_path_rate is not None and backbone.model_type in _DROPPING:
            options["drop_path_rate"] = backbone.drop_path_rate
    return fields | {"backbone": options}


_DROPPING = ("swin", "convnext", "dinat")


def _require_fixed(found: msgspec.Struct, kind: str, path: str) -> None:
    for key, expected in _FIXED.get(kind, {}).items():
        value = getattr(found, key, None)
        if value is not None and value != expected:
            shown = quoted(msgspec.json.encode(value).decode())
            raise FileError(
                f"{path}: {kind + ' ' if kind else ''}{key} is {shown} in config.json; no "
                f"published OneFormer has that, and this model computes with {expected}"
            )


def to_config(model: OneFormerConfig, metadata: Metadata, *, training: bool) -> dict[str, Any]:
    """Returns config.json of a model.

    Args:
      model: the architecture.
      metadata: its classes.
      training: whether the text branch is there.

    Raises:
      ValueError: `transformers` has no such architecture.
    """
    if model.encoder_points != POINTS:
        raise ValueError(
            f"transformers' pixel decoder has {POINTS} points per head and level, this one has "
            f"{model.encoder_points}; convert to the official format instead"
        )
    if model.query_init_ffn != model.decoder_ffn:
        raise ValueError(
            f"transformers has one width for both decoders' feed-forward layers, this model has "
            f"{model.query_init_ffn} and {model.decoder_ffn}; convert to the official format"
        )
    if model.encoder_dropout != model.query_init_dropout:
        raise ValueError(
            f"transformers has one dropout, this model has {model.encoder_dropout} and "
            f"{model.query_init_dropout}; convert to the official format"
        )
    labels = {str(i): name for i, name in enumerate(metadata.class_names)}
    return {
        "architectures": ["OneFormerForUniversalSegmentation"],
        "model_type": "oneformer",
        "backbone_config": _backbone_config(model.backbone),
        "num_queries": model.num_queries,
        "hidden_dim": model.hidden_dim,
        "conv_dim": model.hidden_dim,
        "mask_dim": model.mask_dim,
        "num_attention_heads": model.num_heads,
        "encoder_layers": model.encoder_layers,
        "encoder_feedforward_dim": model.encoder_ffn,
        "dropout": model.encoder_dropout,
        "query_dec_layers": model.query_init_layers,
        "decoder_layers": model.decoder_layers + 1,  # theirs counts the prediction before them
        "dim_feedforward": model.decoder_ffn,
        "is_training": training,
        "text_encoder_width": model.text_width,
        "text_encoder_num_layers": model.text_layers,
        "text_encoder_n_ctx": model.num_context,
        "ignore_value": metadata.ignore_label,
        "id2label": labels,
        "label2id": {name: int(i) for i, name in labels.items()},
        "torch_dtype": "float32",
    }


# What a backbone_config holds: fields of ours by their own names, beside the kind and the depths.
_SHARED = ("embed_dim", "num_heads", "mlp_ratio", "drop_path_rate")
_FIELDS = {
    "swin": (*_SHARED, "window_size"),
    "dinat": (*_SHARED, "kernel_size", "dilations"),
    "convnext": ("drop_path_rate",),
    "resnet": (),
}


def _backbone_config(backbone: Any) -> dict[str, Any]:
    fields = backbones.to_dict(backbone)
    kind = fields["kind"]
    if kind not in _FIELDS:
        raise ValueError(
            f"transformers has no backbone {kind!r}; convert to the official format instead"
        )
    other: dict[str, dict[str, Any]] = {
        "swin": {"layer_norm_eps": 1e-5, "patch_size": 4},
        "dinat": {"layer_norm_eps": 1e-5},
        "convnext": {"hidden_sizes": fields.get("dims")},
        "resnet": {
            "embedding_size": fields.get("stem_width"),
            "hidden_sizes": backbone.channels,
            "layer_type": "bottleneck",
        },
    }
    return {
        "model_type": kind,
        "out_features": _STAGES,
        "depths": fields["depths"],
        **{name: fields[name] for name in _FIELDS[kind]},
        **other[kind],
    }
