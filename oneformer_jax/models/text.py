"""Text branch: a small causal transformer that encodes the text list. Training only.

The official encoder is CLIP's architecture (arXiv 2103.00020) trained from scratch. It is causal
and reads only the end-of-text position, so texts are cut to the longest one. A dataset has K + 3
distinct texts; they are encoded once a step and gathered per image. The port in Hugging Face's
`transformers` never applies the causal mask; `causal=False` does the same, padding included.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax.models import initial
from oneformer_jax.models.layers import MultiHeadAttention, layer_norm, linear
from oneformer_jax.models.stack import Stack, run

VOCABULARY = 49408  # CLIP's byte-pair vocabulary; its last id ends a text
CONTEXT_LENGTH = 77


class TextMLP(nnx.Module):
    """The feed-forward part of a block, with QuickGELU x·σ(1.702x)."""

    def __init__(self, width: int, num_layers: int, *, rngs, dtype):
        wide = initial.normal((2 * width) ** -0.5)
        deep = initial.normal(width**-0.5 * (2 * num_layers) ** -0.5)
        self.c_fc = linear(width, 4 * width, kernel_init=wide, rngs=rngs, dtype=dtype)
        self.c_proj = linear(4 * width, width, kernel_init=deep, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.c_fc(x)
        return self.c_proj(x * jax.nn.sigmoid(1.702 * x))


class TextBlock(nnx.Module):
    """Pre-norm residual attention block."""

    def __init__(self, width: int, num_heads: int, num_layers: int, *, rngs, dtype):
        self.ln_1 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.attn = MultiHeadAttention(
            width,
            num_heads,
            kernel_init=initial.normal(width**-0.5),
            out_init=initial.normal(width**-0.5 * (2 * num_layers) ** -0.5),
            rngs=rngs,
            dtype=dtype,
        )
        self.ln_2 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.mlp = TextMLP(width, num_layers, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, mask=mask)
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nnx.Module):
    """Holds `resblocks`, as the official parameter names have it."""

    def __init__(
        self, width: int, num_layers: int, num_heads: int, *, rngs, dtype, scan: bool | str
    ):
        blocks = (
            TextBlock(width, num_heads, num_layers, rngs=rngs, dtype=dtype)
            for _ in range(num_layers)
        )
        self.resblocks = Stack(blocks, scan=scan)


class TextEncoder(nnx.Module):
    """Token ids to one vector a text."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        *,
        rngs,
        dtype=jnp.float32,
        causal: bool = True,
        scan: bool | str = False,
    ):
        self.causal = causal
        self.token_embedding = nnx.Embed(
            VOCABULARY, width, embedding_init=initial.normal(0.02), rngs=rngs, dtype=dtype
        )
        self.positional_embedding = nnx.Param(
            initial.normal(0.01)(rngs.params(), (CONTEXT_LENGTH, width))
        )
        self.transformer = TextTransformer(
            width, num_layers, num_heads, rngs=rngs, dtype=dtype, scan=scan
        )
        self.ln_final = layer_norm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [n, T] with T <= 77 -> float32 [n, width] at each text's end (its largest id)."""
        length = tokens.shape[1]
        if length > CONTEXT_LENGTH:
            raise ValueError(f"text tokens are {length} long; the encoder reads {CONTEXT_LENGTH}")
        mask = None
        if self.causal:
            mask = jnp.asarray(np.tril(np.ones((length, length), bool)))
            mask = jnp.broadcast_to(mask, (len(tokens), length, length))
        else:  # every position is attended to, those after the end of the text too
            tokens = jnp.pad(tokens, ((0, 0), (0, CONTEXT_LENGTH - length)))
            length = CONTEXT_LENGTH
        x = self.token_embedding(tokens)
        x = x + self.positional_embedding[:length].astype(x.dtype)
        x, _ = run(lambda x, _, block: (block(x, mask), None), x, self.transformer.resblocks)
        end = jnp.take_along_axis(x, jnp.argmax(tokens, -1)[:, None, None], axis=1)[:, 0]
        return self.ln_final(end.astype(jnp.float32))
