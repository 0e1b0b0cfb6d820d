"""Transformer decoder: query initialisation from the task token, then masked attention.

The official `ContrastiveMultiScaleMaskedTransformerDecoder` (OneFormer, arXiv 2211.06220, on
Mask2Former's decoder). What looks odd in it is kept, since released weights depend on it: the
query-initialisation transformer attends with keys "position + feature" and values "position".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from oneformer_jax.models import initial, layers
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import (
    MLP,
    Key,
    MultiHeadAttention,
    layer_norm,
    linear,
    split_key,
)
from oneformer_jax.models.pixel_decoder import conv
from oneformer_jax.models.stack import Stack, run


class QueryInitLayer(nnx.Module):
    """Self-attention, cross-attention and feed-forward, post-norm (DETR's decoder layer)."""

    def __init__(self, config, *, rngs, dtype):
        width, self.dropout_rate = config.hidden_dim, config.query_init_dropout
        attention = dict(dropout_rate=self.dropout_rate, rngs=rngs, dtype=dtype)
        self.self_attn = MultiHeadAttention(width, config.num_heads, **attention)
        self.multihead_attn = MultiHeadAttention(width, config.num_heads, **attention)
        init = dict(kernel_init=initial.xavier, rngs=rngs, dtype=dtype)
        self.linear1 = linear(width, config.query_init_ffn, **init)
        self.linear2 = linear(config.query_init_ffn, width, **init)
        self.norm1 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.norm2 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.norm3 = layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, x, query_positions, keys, values, key: Key = None) -> jax.Array:
        """x [B, Q-1, D], query_positions [Q-1, D], keys and values [B or 1, S, D]."""
        k = split_key(key, 6)

        def drop(y, i):
            return layers.dropout(y, self.dropout_rate, k[i])

        q = x + query_positions
        x = self.norm1(x + drop(self.self_attn(q, q, x, dropout_key=k[0]), 1))
        attended = self.multihead_attn(x + query_positions, keys, values, dropout_key=k[2])
        x = self.norm2(x + drop(attended, 3))
        hidden = drop(jax.nn.relu(self.linear1(x)), 4)
        return self.norm3(x + drop(self.linear2(hidden), 5))


class QueryInitDecoder(nnx.Module):
    def __init__(self, config, *, rngs, execution: Execution):
        options = dict(rngs=rngs, dtype=execution.compute_dtype)
        blocks = (QueryInitLayer(config, **options) for _ in range(config.query_init_layers))
        self.layers = Stack(blocks, remat=execution.remat, scan=execution.scan_layers)
        self.norm = layer_norm(config.hidden_dim, rngs=rngs)


class QueryInit(nnx.Module):
    """The official `class_transformer`: turns copies of the task token into queries."""

    def __init__(self, config, *, rngs, execution: Execution):
        self.decoder = QueryInitDecoder(config, rngs=rngs, execution=execution)

    def __call__(self, features, task, query_positions, key: Key = None) -> jax.Array:
        """features [B, h, w, D], task [B, D], query_positions [n, D] -> float32 [B, n, D]."""
        batch, height, width, dim = features.shape
        sine = layers.sine_positions(height, width, dim).reshape(1, -1, dim)
        values = sine.astype(features.dtype)
        keys = values + features.reshape(batch, -1, dim)
        x = jnp.broadcast_to(task[:, None], (batch, *query_positions.shape)).astype(features.dtype)
        query_positions = query_positions.astype(features.dtype)

        def step(x, block_key, block):
            return block(x, query_positions, keys, values, block_key), None

        blocks = self.decoder.layers
        block_keys = None if key is None else jax.random.split(key, len(blocks))
        x, _ = run(step, x, blocks, items=block_keys)
        return self.decoder.norm(x.astype(jnp.float32))


class CrossAttentionLayer(nnx.Module):
    def __init__(self, width, num_heads, level: int, *, rngs, dtype):
        """`level` is the index of the map that it attends to."""
        self.level = level
        self.multihead_attn = MultiHeadAttention(width, num_heads, rngs=rngs, dtype=dtype)
        self.norm = layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, x, query_positions, keys, values, mask) -> jax.Array:
        attended = self.multihead_attn(x + query_positions, keys, values, mask=mask)
        return self.norm(x + attended)


class SelfAttentionLayer(nnx.Module):
    def __init__(self, width, num_heads, *, rngs, dtype):
        self.self_attn = MultiHeadAttention(width, num_heads, rngs=rngs, dtype=dtype)
        self.norm = layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, x, query_positions) -> jax.Array:
        q = x + query_positions
        return self.norm(x + self.self_attn(q, q, x))


class FFNLayer(nnx.Module):
    def __init__(self, width, hidden, *, rngs, dtype):
        init = dict(kernel_init=initial.xavier, rngs=rngs, dtype=dtype)
        self.linear1 = linear(width, hidden, **init)
        self.linear2 = linear(hidden, width, **init)
        self.norm = layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, x) -> jax.Array:
        return self.norm(x + self.linear2(jax.nn.relu(self.linear1(x))))


class TransformerDecoder(nnx.Module):
    """Queries from the task token, refined by masked attention, with a prediction at each step."""

    def __init__(self, config, *, rngs: ParamKeys, execution: Execution = Execution()):
        width, heads, dtype = config.hidden_dim, config.num_heads, execution.compute_dtype
        normal = initial.normal()
        self.query_embed = nnx.Embed(config.num_queries, width, embedding_init=normal, rngs=rngs)
        self.level_embed = nnx.Embed(3, width, embedding_init=normal, rngs=rngs)
        self.queries = config.queries
        if self.queries == "learned":
            self.query_feat = nnx.Embed(config.num_queries, width, embedding_init=normal, rngs=rngs)
        else:
            fill = dict(bias=True, init=initial.c2_xavier)
            self.class_input_proj = conv(config.mask_dim, width, 1, **fill, rngs=rngs, dtype=dtype)
            self.class_transformer = QueryInit(config, rngs=rngs, execution=execution)
        count, options = config.decoder_layers, dict(rngs=rngs, dtype=dtype)
        how = dict(remat=execution.remat, scan=execution.scan_layers)
        self.transformer_cross_attention_layers = Stack(
            (CrossAttentionLayer(width, heads, i % 3, **options) for i in range(count)), **how
        )
        self.transformer_self_attention_layers = Stack(
            (SelfAttentionLayer(width, heads, **options) for _ in range(count)), **how
        )
        self.transformer_ffn_layers = Stack(
            (FFNLayer(width, config.decoder_ffn, **options) for _ in range(count)), **how
        )
        self.decoder_norm = layer_norm(width, rngs=rngs)  # shared by task token and predictions
        self.class_embed = linear(width, config.num_classes + 1, rngs=rngs)
        self.mask_embed = MLP([width, width, width, config.mask_dim], rngs=rngs)

    def __call__(
        self,
        mask_features: jax.Array,
        maps: tuple[jax.Array, ...],
        task: jax.Array | None,
        key: Key = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs the decoder.

        Args:
          mask_features: [B, h, w, mask_dim] at stride 4.
          maps: three [B, h_l, w_l, D] at strides 32, 16, 8.
          task: float32 [B, D], the output of the task MLP; None with "learned" queries.
          key: PRNG key of the dropout in the query initialisation, or None.

        Returns:
          class logits [N, B, Q, K+1], mask embeddings [N, B, Q, mask_dim] (N = layers + 1) and the
          queries [B, Q, D] that enter the decoder; all float32.
        """
        dtype = mask_features.dtype
        positions = self.query_embed.embedding[...]
        queries = self._initial_queries(mask_features, task, positions, key)

        width = queries.shape[-1]
        values, keys, pyramid = [], [], []
        for level, x in enumerate(maps):
            height, columns = x.shape[1:3]
            x = x.reshape(x.shape[0], -1, width) + self.level_embed.embedding[level].astype(dtype)
            sine = layers.sine_positions(height, columns, width).reshape(-1, width)
            values.append(x)
            keys.append(x + sine.astype(dtype))
            # Mask logits are linear in the features, so resizing the features once per level
            # equals resizing the logits of every query in every layer.
            pyramid.append(
                jax.lax.stop_gradient(layers.resize_bilinear(mask_features, (height, columns)))
            )

        query_positions = positions.astype(dtype)

        def step(carry, _, cross_attention, self_attention, ffn):
            x, mask_embed = carry
            level = cross_attention.level
            mask = attention_mask(mask_embed, pyramid[level])
            x = cross_attention(x, query_positions, keys[level], values[level], mask)
            x = ffn(self_attention(x, query_positions))
            prediction = self._predict(x)
            return (x, prediction[1]), prediction

        x = queries.astype(dtype)
        first = self._predict(x)
        _, predictions = run(
            step,
            (x, first[1]),
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
        )
        class_logits, mask_embed = (jnp.stack(p) for p in zip(first, *predictions, strict=True))
        return class_logits, mask_embed, queries

    def _initial_queries(self, mask_features, task, positions, key: Key) -> jax.Array:
        """The queries float32 [B, Q, D] that enter the decoder; `positions` [Q, D]."""
        if self.queries == "learned":
            shape = (mask_features.shape[0], *positions.shape)
            return jnp.broadcast_to(self.query_feat.embedding[...], shape)
        task = self.decoder_norm(task)
        features = self.class_input_proj(mask_features)
        if self.queries == "no_token":
            return self.class_transformer(features, task, positions, key)
        start = jnp.zeros_like(task) if self.queries == "zeros" else task
        initial = self.class_transformer(features, start, positions[:-1], key)
        return jnp.concatenate([initial, task[:, None]], axis=1)

    def _predict(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.decoder_norm(x.astype(jnp.float32))
        return self.class_embed(x), self.mask_embed(x)


def attention_mask(mask_embed: jax.Array, features: jax.Array) -> jax.Array:
    """Masks attention per query: bool [B, Q, h_l * w_l] from mask_embed and resized features.

    True where the predicted mask is at least 0.5; a row without any such place is all True. No
    gradient flows through it.
    """
    logits = jnp.einsum(
        "bqd,bhwd->bqhw",
        jax.lax.stop_gradient(mask_embed).astype(features.dtype),
        features,
        preferred_element_type=jnp.float32,
    )
    allowed = (logits >= 0).reshape(*logits.shape[:2], -1)
    return allowed | ~allowed.any(-1, keepdims=True)
