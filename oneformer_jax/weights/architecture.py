"""The architecture that a set of tensors belongs to.

Widths, depths, heads by relative-position tables, windows, kernels, queries and classes are read
off the shapes, so sizes that were never published are recognised too. What shapes cannot tell is,
in this order: given by the caller, noted in the file's own config, taken from the published model
with the same tensors, or the rule that all published models follow. What comes from such a rule is
said, see `Found`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from oneformer_jax import catalogue, config_rules, rules
from oneformer_jax.catalogue import Published
from oneformer_jax.files import FileError
from oneformer_jax.models import backbones
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.weights import descriptions

Shapes = Mapping[str, tuple[int, ...]]

LEVELS = 3  # of the pixel decoder's attention
POINTS = 4  # per head and level; the official code and the port know no other number
TEXT_HEAD_WIDTH = 64  # channels of a head of the text encoder; the port knows no other number

# An array that only one kind of backbone has.
_MARKS = {
    "swin": "backbone.layers.0.blocks.0.attn.relative_position_bias_table",
    "convnext": "backbone.stages.0.0.dwconv.kernel",
    "dinat": "backbone.levels.0.blocks.0.attn.rpb",
    "resnet": "backbone.stem.conv1.kernel",
    "internimage": "backbone.levels.0.blocks.0.dcn.dw_conv.kernel",
}

# Fields without which the others cannot be read off the shapes.
_READ_EARLY = ("num_heads", "encoder_points", "num_context")


class Found(NamedTuple):
    """Describes the architecture of a set of arrays.

    Attributes:
      config: the architecture.
      published: the published model that it is, or None.
      assumed: phrases about what neither tensors nor the file's config nor the caller tell.
    """

    config: OneFormerConfig
    published: Published | None
    assumed: tuple[str, ...]


def recognise(
    shapes: Shapes,
    *,
    path: str,
    given: Mapping[str, Any],
    noted: Mapping[str, Any],
    frozen_norm: bool = True,
) -> Found:
    """Returns the architecture of a set of arrays.

    Args:
      shapes: by our names, see `names.py`.
      path: of the file, for messages; its name may be that of a released file.
      given: fields of `OneFormerConfig` from the caller; "backbone" may hold fields of its config.
      noted: the same from the file's own config; `given` goes before it.
      frozen_norm: whether a ResNet's norms were constants in training.

    Raises:
      FileError: the tensors are not those of a OneFormer, or of one beyond all sizes.
      ValueError: a field that is unknown, or that the caller has to give.
    """
    rules.require_names(
        path, given, tuple(field.name for field in dataclasses.fields(OneFormerConfig)), ()
    )
    reader = _Reader(shapes, path)
    kind = reader.kind()
    fields = {k: v for k, v in {**noted, **given}.items() if k != "backbone"}
    options = {**noted.get("backbone", {}), **given.get("backbone", {})}
    backbone = getattr(reader, f"read_{kind}")()
    told = {"backbone": dict(options), **fields}
    if kind == "resnet" and "norm" not in options:
        options["norm"] = "frozen" if frozen_norm else "batch"
    dilated = kind != "dinat" or "dilations" in options
    if not dilated:  # they come last: the published model is found without them
        options["dilations"] = tuple((1,) * depth for depth in backbone["depths"])
    try:
        early = {f"model.{name}": fields[name] for name in _READ_EARLY if name in fields}
        config_rules.require(early)
        made = backbones.backbone_config(kind, **(backbone | options))
        config = OneFormerConfig(backbone=made, **(reader.head(fields) | fields))
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error
    descriptions.require_few_layers(config, path)
    matches = find(config, path)
    if not dilated:
        made = dataclasses.replace(made, dilations=_dilations(matches, path))
        config = dataclasses.replace(config, backbone=made)
    text = "text_encoder.positional_embedding" in shapes
    return Found(config, matches[0] if matches else None, _assumed(config, told, text))


def _assumed(config: OneFormerConfig, told: Mapping[str, Any], text: bool) -> tuple[str, ...]:
    """Phrases about what only a rule tells; `told` has the fields of the caller and the config."""
    found = []

    def assume(phrase: str, *fields: str, of: Mapping[str, Any] = told) -> None:
        if not any(field in of for field in fields):
            found.append(phrase)

    width = config.hidden_dim // config.num_heads
    assume(
        f"{config.encoder_points} points per head and level, so {config.num_heads} heads of "
        f"{width} channels",
        *("num_heads", "encoder_points"),
    )
    assume("queries made from the task token", "queries")
    if text:
        width = config.text_width // config.text_heads
        assume(f"text heads of {width} channels, so {config.text_heads}", "text_heads")
        assume(
            "text tokens that see those before them" if config.text_causal else "no text mask",
            "text_causal",
        )
    assume(f"a dropout of {config.encoder_dropout}", "encoder_dropout", "query_init_dropout")
    backbone, options = config.backbone, told["backbone"]
    kind = backbones.kind_of(backbone)
    if kind == "dinat":
        assume("the dilations of the published model", "dilations", of=options)
    if kind == "internimage":
        assume("deformable kernels of 3 x 3")
        if backbone.norm_after:
            assume("a norm after every sixth block of the third stage", "norm_after", of=options)
    if kind == "resnet":
        norms = {"frozen": "norms that are constants in training", "batch": "batch norms"}
        assume(norms[backbone.norm], "norm", of=options)
        assume("strides in the 3 x 3 convolutions")
    else:
        assume(f"a drop path rate of {backbone.drop_path_rate}", "drop_path_rate", of=options)
    return tuple(found)


def _dilations(matches: tuple[Published, ...], path: str) -> Any:
    found = {OneFormerConfig.published(row.name).backbone.dilations for row in matches}
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise FileError(
            f"{path} has a DiNAT of no published size, and its tensors do not tell its dilations; "
            f"give them: backbone={{'dilations': ((1, 2, 1), ...)}}, one number a block"
        )
    names = ", ".join(row.name for row in matches)
    raise FileError(
        f"{path} fits several published models whose dilations differ ({names}); give one, as in "
        'load(..., config="ade20k:dinat_large,res=640") or backbone={"dilations": ...}, or keep '
        "the name of the released file"
    )


# What does not show in the tensors, or (the text branch) may be missing from them.
_NOT_IN_TENSORS = {
    "query_loss",
    *("num_context", "text_width", "text_layers", "text_heads", "text_causal"),
    *("encoder_dropout", "query_init_dropout"),
    *("norm", "drop_path_rate", "layer_scale_init", "dilations"),
}


def _shown(config: OneFormerConfig) -> dict[str, Any]:
    """The fields of an architecture that its tensors show."""
    fields = config.to_dict()
    fields |= {f"backbone.{name}": value for name, value in fields.pop("backbone").items()}
    return {
        name: value
        for name, value in fields.items()
        if name.removeprefix("backbone.") not in _NOT_IN_TENSORS
    }


@functools.cache
def _all_shown() -> list[tuple[Published, dict[str, Any]]]:
    return [(row, _shown(OneFormerConfig.published(row.name))) for row in catalogue.MODELS]


def find(config: OneFormerConfig, file: str = "") -> tuple[Published, ...]:
    """Finds the published models that have an architecture's tensors, in the catalogue's order.

    Args:
      config: an architecture. Compared are the fields that tensors show: neither dropout, drop
        path, dilations, the kind of the ResNet's norm, nor the text branch.
      file: name of the file, with or without folder and ending. If it is that of one of the
        models found, only this one is given.
    """
    wanted = _shown(config)
    found = tuple(row for row, shown in _all_shown() if shown == wanted)
    name = file.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".pth")
    return tuple(row for row in found if name and row.file == name) or found


class _Reader:
    """Reads sizes off the shapes of arrays; FileError names what is missing."""

    def __init__(self, shapes: Shapes, path: str):
        self.shapes, self.path = shapes, path

    def size(self, name: str, axis: int = 0) -> int:
        shape = self.shapes.get(name)
        if shape is None or not -len(shape) <= axis < len(shape):
            raise FileError(
                f"{self.path} is not a OneFormer, or lacks a part of it: there is no {name}"
                + (f" of that rank ({shape})" if shape is not None else "")
            )
        if 0 in shape:
            raise FileError(f"{self.path} is not a OneFormer: {name} is empty ({list(shape)})")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """Counts the names "pattern" with {} = 0, 1, 2... that are present."""
        number = 0
        while pattern.format(number) in self.shapes:
            number += 1
        if not number:
            raise FileError(
                f"{self.path} is not a OneFormer, or lacks a part of it: there is no "
                f"{pattern.format(0)}"
            )
        return number

    def kind(self) -> str:
        found = [kind for kind, mark in _MARKS.items() if mark in self.shapes]
        if len(found) != 1:
            raise FileError(
                f"{self.path} holds {'no' if not found else 'more than one'} backbone of the kinds "
                f"{', '.join(_MARKS)}"
            )
        return found[0]

    def head(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of everything but the backbone; some may be `known`."""
        encoder = "pixel_decoder.transformer.encoder.layers"
        queries = "predictor.class_transformer.decoder.layers"
        samples = self.size(f"{encoder}.0.self_attn.attention_weights.bias")
        heads, points = self.sampling(samples, known)
        fields = {
            "num_classes": self.size("predictor.class_embed.bias") - 1,
            "num_queries": self.size("predictor.query_embed.embedding"),
            "hidden_dim": self.size("predictor.query_embed.embedding", 1),
            "mask_dim": self.size("pixel_decoder.mask_features.bias"),
            "num_heads": heads,
            "encoder_layers": self.count(f"{encoder}.{{}}.norm1.scale"),
            "encoder_ffn": self.size(f"{encoder}.0.linear1.bias"),
            "encoder_points": points,
            "query_init_layers": self.count(f"{queries}.{{}}.norm1.scale"),
            "query_init_ffn": self.size(f"{queries}.0.linear1.bias"),
            "decoder_layers": self.count("predictor.transformer_ffn_layers.{}.norm.scale"),
            "decoder_ffn": self.size("predictor.transformer_ffn_layers.0.linear1.bias"),
        }
        if "text_encoder.positional_embedding" in self.shapes:
            text = self.size("text_encoder.positional_embedding", 1)
            fields |= {
                # A model without context embeddings has to be announced: they may just be missing.
                "num_context": 0
                if known.get("num_context") == 0
                else self.size("prompt_ctx.embedding"),
                "text_width": text,
                "text_layers": self.count("text_encoder.transformer.resblocks.{}.ln_1.scale"),
                "text_heads": max(1, text // TEXT_HEAD_WIDTH),
            }
        else:  # of no meaning without the text branch, but less than the queries
            fields["num_context"] = min(16, fields["num_queries"] - 1)
        return fields

    def sampling(self, samples: int, known: Mapping[str, Any]) -> tuple[int, int]:
        """Finds (heads, points) of the pixel decoder's attention with so many weights a query."""
        heads, points = known.get("num_heads"), known.get("encoder_points")
        if heads is None:
            points = points or POINTS
            heads = samples // (LEVELS * points)
        elif points is None:
            points = samples // (LEVELS * heads)
        if heads * points * LEVELS != samples:
            raise FileError(
                f"{self.path}: the pixel decoder has {samples} attention weights a query, which "
                f"are not those of {LEVELS} levels, {heads} heads and {points} points; give "
                "num_heads"
            )
        return heads, points

    def read_swin(self) -> dict[str, Any]:
        table = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"
        edge = math.isqrt(self.size(table.format(0)))
        return self._transformer("backbone.layers") | {
            "num_heads": tuple(self.size(table.format(stage), 1) for stage in range(4)),
            "window_size": (edge + 1) // 2,
        }

    def read_dinat(self) -> dict[str, Any]:
        table = "backbone.levels.{}.blocks.0.attn.rpb"
        return self._transformer("backbone.levels") | {
            "num_heads": tuple(self.size(table.format(stage)) for stage in range(4)),
            "kernel_size": (self.size(table.format(0), 1) + 1) // 2,
        }

    def _transformer(self, prefix: str) -> dict[str, Any]:
        width = self.size("backbone.patch_embed.norm.scale")
        ratio = self.size(f"{prefix}.0.blocks.0.mlp.fc1.bias") / width
        return {
            "embed_dim": width,
            "depths": self._depths(f"{prefix}.{{}}.blocks.{{{{}}}}.norm1.scale"),
            "mlp_ratio": ratio,
        }

    def read_internimage(self) -> dict[str, Any]:
        block = "backbone.levels.{}.blocks.0"
        width = self.size("backbone.patch_embed.norm2.scale")
        norms = "backbone.levels.2.post_norms.{}.scale"
        count = self.count(norms) if norms.format(0) in self.shapes else 0
        return {
            "embed_dim": width,
            "depths": self._depths("backbone.levels.{}.blocks.{{}}.norm1.scale"),
            "groups": tuple(
                self.size(f"{block}.dcn.mask.bias".format(stage)) // 9 for stage in range(4)
            ),
            # Tensors tell how many there are; as published, each follows six blocks.
            "norm_after": tuple(6 * i + 5 for i in range(count)),
            "dw_kernel_size": self.size(f"{block}.dcn.dw_conv.kernel".format(0)),
            "mlp_ratio": self.size(f"{block}.mlp.fc1.bias".format(0)) / width,
        }

    def _depths(self, pattern: str) -> tuple[int, ...]:
        return tuple(self.count(pattern.format(stage)) for stage in range(4))

    def read_convnext(self) -> dict[str, Any]:
        return {
            "dims": tuple(self.size(f"backbone.norm{stage}.scale") for stage in range(4)),
            "depths": self._depths("backbone.stages.{}.{{}}.gamma"),
        }

    def read_resnet(self) -> dict[str, Any]:
        return {
            "stem_width": self.size("backbone.stem.conv1.kernel", 3),
            "depths": tuple(
                self.count(f"backbone.res{stage}.{{}}.conv1.kernel") for stage in range(2, 6)
            ),
        }
