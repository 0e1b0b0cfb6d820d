"""OneFormer on one screen: backbone, pixel decoder, task token, decoder, text branch.

Source: "OneFormer: One Transformer to Rule Universal Image Segmentation", arXiv 2211.06220, and the
official PyTorch code. Attribute paths follow the official parameter names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax import catalogue, config_rules, rules
from oneformer_jax.models import backbones, initial
from oneformer_jax.models.decoder import TransformerDecoder
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import MLP, Key, linear, split_key
from oneformer_jax.models.pixel_decoder import PixelDecoder
from oneformer_jax.models.text import CONTEXT_LENGTH, TextEncoder
from oneformer_jax.rules import Integer
from oneformer_jax.types import Features, Predictions

# RGB statistics of ImageNet on 0..255 values.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

# Fields of `Execution` with which earlier versions stored a model.
ONCE_STORED = ("dtype", "remat", "scan_layers", "sampling", "neighborhood")


@dataclasses.dataclass(frozen=True)
class OneFormerConfig:
    """Architecture of a OneFormer; the defaults are those of every published model.

    How it is run is an `Execution`.

    Attributes:
      num_classes: K, without "no object".
      backbone: config of a backbone, see `oneformer_jax.models.backbones`.
      num_queries: Q; the task token is the last of them.
      num_context: learned context embeddings that fill the text list up to Q; 0 is none.
      queries: where the object queries come from. "task" (official): Q-1 copies of the task token,
        updated by the query initialisation, and the token itself. "no_token": Q copies, the token
        itself is no query. "zeros": as "task", but the copies are zeros. "learned": Q parameters,
        as in Mask2Former; no task token, no query initialisation, no loss on the queries.
      query_loss: what the queries that enter the decoder are trained with. "contrastive"
        (official): with the text branch. "classification": query j tells the class of text j.
      hidden_dim: D; a multiple of 32 (GroupNorm) and of `num_heads`.
      text_causal: whether a text's tokens see only those before them, as in the official code. In
        the port in `transformers` all 77 positions see each other.
    """

    num_classes: int
    backbone: Any
    num_queries: int = 150
    num_context: int = 16
    hidden_dim: int = 256
    mask_dim: int = 256
    num_heads: int = 8
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    encoder_points: int = 4
    encoder_dropout: float = 0.1
    query_init_layers: int = 2
    query_init_ffn: int = 2048
    query_init_dropout: float = 0.1
    decoder_layers: int = 9
    decoder_ffn: int = 2048
    queries: str = "task"
    query_loss: str = "contrastive"
    text_width: int = 256
    text_layers: int = 6
    text_heads: int = 4
    text_causal: bool = True

    def __post_init__(self):
        classes = {"num_classes": self.num_classes}
        rules.require("model.", classes, {"num_classes": Integer(1, 65_535)})
        backbones.kind_of(self.backbone)
        config_rules.require_fields("model", self, but=("num_classes", "backbone"))

    @property
    def num_texts(self) -> int:
        """Length of an image's text list."""
        return self.num_queries - self.num_context

    @property
    def has_task(self) -> bool:
        """Tells whether the model is conditioned on the task."""
        return self.queries != "learned"

    @classmethod
    def published(cls, name: str, **overrides: Any) -> OneFormerConfig:
        """Finds a model of the catalogue, such as "coco:swin_large"; see `catalogue.MODELS`.

        Raises:
          ValueError: there is no such model; or an override that the model cannot have.
        """
        row = catalogue.named(name)
        backbone = backbones.backbone_config(row.backbone, **row.backbone_options)
        fields = {"num_classes": catalogue.NUM_CLASSES[row.dataset], "backbone": backbone}
        return cls(**(fields | row.head | overrides))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON; `from_dict` is the inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"backbone": backbones.to_dict(self.backbone)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> OneFormerConfig:
        """Returns the config that `to_dict` wrote, also in an earlier version (see `ONCE_STORED`).

        Raises:
          ValueError: names what is unknown, missing or absurd.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"the model is {rules.shown(fields)}; it must be fields with values")
        fields = {name: value for name, value in fields.items() if name not in ONCE_STORED}
        known = tuple(f.name for f in dataclasses.fields(cls))
        rules.require_names("model", fields, known, needed=("num_classes", "backbone"))
        return cls(**(fields | {"backbone": backbones.from_dict(fields["backbone"])}))


class OneFormer(nnx.Module):
    """The whole model. What only losses need (the text branch) exists only with `training`."""

    def __init__(
        self,
        config: OneFormerConfig,
        *,
        rngs: ParamKeys,
        training: bool,
        execution: Execution = Execution(),
    ):
        how = dict(rngs=rngs, execution=execution)
        self.backbone = backbones.build_backbone(config.backbone, **how)
        self.pixel_decoder = PixelDecoder(config, config.backbone.channels, **how)
        self.predictor = TransformerDecoder(config, **how)
        # float32 always: its inputs are raw token ids, which bfloat16 would round.
        self.has_task = config.has_task
        if self.has_task:
            self.task_mlp = MLP([CONTEXT_LENGTH, config.hidden_dim, config.hidden_dim], rngs=rngs)
        self.query_loss = config.query_loss if training and self.has_task else "none"
        if self.query_loss == "classification":
            self.query_class = linear(config.hidden_dim, config.num_classes + 1, rngs=rngs)
        if self.query_loss == "contrastive":
            self.text_encoder = TextEncoder(
                config.text_width,
                config.text_layers,
                config.text_heads,
                rngs=rngs,
                dtype=execution.compute_dtype,
                causal=config.text_causal,
                scan=execution.scan_layers,
            )
            self.text_projector = MLP(
                [config.text_width, config.hidden_dim, config.hidden_dim], rngs=rngs
            )
            self.num_context = config.num_context
            if self.num_context:
                init = dict(embedding_init=initial.normal(), rngs=rngs)
                self.prompt_ctx = nnx.Embed(self.num_context, config.hidden_dim, **init)
            self.logit_scale = nnx.Param(jnp.asarray(-np.log(0.07), jnp.float32))

    def __call__(
        self,
        image: jax.Array,
        task_tokens: jax.Array,
        *,
        text_tokens: jax.Array | None = None,
        text_ids: jax.Array | None = None,
        key: Key = None,
        train: bool = False,
    ) -> Predictions:
        """Predicts masks and classes for every query.

        Args:
          image: float32 [B, H, W, 3], normalised (`normalize_images`); H and W multiples of 32.
          task_tokens: int32 [B, 77], rows of `types.TASK_TOKENS`.
          text_tokens: int32 [K+3, T], the dataset's distinct texts. A template that names the type
            of a segment has K more, see `text_classes`.
          text_ids: int32 [B, num_texts], rows of `text_tokens`; needed for what the loss on the
            queries compares.
          key: PRNG key of dropout and drop path; None is deterministic.
          train: whether the backbone is trained: it drops paths by the key, and batch norm (if it
            has any) uses and updates batch statistics.
        """
        *encoder_keys, query_key = split_key(key, 3)
        features = self.encode(image, keys=encoder_keys, train=train)
        predictions = self.decode(features, task_tokens, key=query_key)
        if text_ids is None or self.query_loss == "none":
            return predictions
        if self.query_loss == "classification":
            logits = self.query_class(predictions.queries[:, : text_ids.shape[1]])
            return dataclasses.replace(predictions, query_class_logits=logits)
        return dataclasses.replace(
            predictions,
            text_queries=self.encode_texts(text_tokens, text_ids),
            logit_scale=self.logit_scale[...],
        )

    def encode(
        self, image: jax.Array, *, keys: Sequence[Key] = (None, None), train: bool = False
    ) -> Features:
        """Runs the backbone and the pixel decoder; `keys` are theirs, see `__call__`."""
        backbone_key, encoder_key = keys
        maps = self.backbone(image, key=backbone_key if train else None, train=train)
        mask_features, maps = self.pixel_decoder(maps, encoder_key)
        return Features(mask_features, tuple(maps))

    def decode(self, features: Features, task_tokens: jax.Array, *, key: Key = None) -> Predictions:
        """Predicts from the features of a batch under a task for each image, see `__call__`."""
        task = self.task_mlp(task_tokens.astype(jnp.float32)) if self.has_task else None
        class_logits, mask_embed, queries = self.predictor(
            features.mask_features, features.maps, task, key
        )
        return Predictions(class_logits, mask_embed, features.mask_features, queries)

    def encode_texts(self, text_tokens: jax.Array, text_ids: jax.Array) -> jax.Array:
        """Encodes the text lists, and adds the context embeddings: float32 [B, Q, D].

        Each distinct text is encoded once and gathered per image. The context
        embeddings are not projected.
        """
        table = self.text_projector(self.text_encoder(text_tokens))
        if not self.num_context:
            return table[text_ids]
        context = self.prompt_ctx.embedding[...]
        context = jnp.broadcast_to(context, (len(text_ids), *context.shape))
        return jnp.concatenate([table[text_ids], context], axis=1)


def normalize_images(image: jax.Array, image_size: jax.Array) -> jax.Array:
    """Normalises uint8 RGB [B, H, W, 3] to float32, zero outside `image_size` [B, 2] (h, w)."""
    _, height, width, _ = image.shape
    mean, std = jnp.asarray(PIXEL_MEAN), jnp.asarray(PIXEL_STD)
    rows = jnp.arange(height)[None, :, None] < image_size[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < image_size[:, 1, None, None]
    return jnp.where((rows & columns)[..., None], (image - mean) / std, 0.0)
