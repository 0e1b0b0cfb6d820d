"""config.json of Hugging Face's `transformers`: what it notes, and ours written as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oneformer_jax.models import backbones
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.types import Metadata
from oneformer_jax.weights.torch_pickle import FileError

_STAGES = [f"stage{i}" for i in range(1, 5)]


def noted(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Fields of `OneFormerConfig` that a config.json holds and tensors do not show.

    Raises:
      FileError: the config of another kind of model, or of one that OneFormer never was.
    """
    if config.get("model_type") != "oneformer":
        raise FileError(
            f"{path}: config.json is of a {config.get('model_type')!r} model, not a oneformer"
        )
    for key, expected in (("pre_norm", False), ("use_task_norm", True)):
        if config.get(key, expected) != expected:
            raise FileError(
                f"{path}: {key} is {config[key]} in config.json; no published OneFormer has that, "
                "and this model cannot compute it"
            )
    fields: dict[str, Any] = {"num_heads": config.get("num_attention_heads", 8)}
    if "dropout" in config:
        fields |= dict.fromkeys(("encoder_dropout", "query_init_dropout"), config["dropout"])
    backbone, options = config.get("backbone_config") or {}, {}
    if backbone.get("model_type") == "dinat" and "dilations" in backbone:
        options["dilations"] = tuple(map(tuple, backbone["dilations"]))
    if "drop_path_rate" in backbone and backbone.get("model_type") in ("swin", "convnext", "dinat"):
        options["drop_path_rate"] = backbone["drop_path_rate"]
    return fields | {"backbone": options}


def to_config(model: OneFormerConfig, metadata: Metadata, *, training: bool) -> dict[str, Any]:
    """config.json of a model.

    Args:
      model: the architecture.
      metadata: its classes.
      training: whether the text branch is there.

    Raises:
      ValueError: `transformers` has no such architecture.
    """
    if model.encoder_points != 4:
        raise ValueError(
            f"transformers' pixel decoder has 4 points per head and level, this one has "
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


def _backbone_config(backbone: Any) -> dict[str, Any]:
    fields = backbones.to_dict(backbone)
    kind = fields["kind"]
    common = {"model_type": kind, "out_features": _STAGES, "depths": list(fields["depths"])}
    if kind in ("swin", "dinat"):
        common |= {
            "embed_dim": fields["embed_dim"],
            "num_heads": list(fields["num_heads"]),
            "mlp_ratio": fields["mlp_ratio"],
            "drop_path_rate": fields["drop_path_rate"],
            "layer_norm_eps": 1e-5,
        }
    if kind == "swin":
        return common | {"window_size": fields["window_size"], "patch_size": 4}
    if kind == "dinat":
        dilations = [list(stage) for stage in fields["dilations"]]
        return common | {"kernel_size": fields["kernel_size"], "dilations": dilations}
    if kind == "convnext":
        return common | {
            "model_type": "convnext",
            "hidden_sizes": list(fields["dims"]),
            "drop_path_rate": fields["drop_path_rate"],
        }
    if kind == "resnet":
        return common | {
            "embedding_size": fields["stem_width"],
            "hidden_sizes": list(backbone.channels),
            "layer_type": "bottleneck",
        }
    raise ValueError(
        f"transformers has no backbone {kind!r}; convert to the official format instead"
    )
