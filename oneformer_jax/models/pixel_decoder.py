"""Pixel decoder: a multi-scale deformable transformer encoder and one feature-pyramid step.

The official `MSDeformAttnPixelDecoder` (Deformable DETR, arXiv 2010.04159; Mask2Former,
arXiv 2112.01527). Padding is not masked, as in the official model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax.kernels.ms_deform_attn import ms_deform_attn
from oneformer_jax.models import initial, layers
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import Key, layer_norm, linear, split_key
from oneformer_jax.models.stack import Stack, run


def conv(
    inputs: int, outputs: int, size: int, *, bias: bool, init, rngs: ParamKeys, dtype=jnp.float32
) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        padding=size // 2,
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        conv_general_dilated=layers.convolve,
        rngs=rngs,
    )


def group_norm(width: int, *, rngs: ParamKeys, dtype=jnp.float32) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        width, num_groups=32, epsilon=1e-5, dtype=dtype, use_fast_variance=False, rngs=rngs
    )


class ConvNorm(nnx.Module):
    """Convolution and GroupNorm(32); attribute names of the official `adapter_1`, `layer_1`."""

    def __init__(self, inputs, outputs, size, *, bias, init, rngs: ParamKeys, dtype=jnp.float32):
        self.conv = conv(inputs, outputs, size, bias=bias, init=init, rngs=rngs, dtype=dtype)
        self.norm = group_norm(outputs, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class MSDeformAttn(nnx.Module):
    """Multi-scale deformable attention: every query reads a few learned points of every level."""

    def __init__(
        self,
        width,
        num_heads,
        num_levels,
        num_points,
        *,
        rngs,
        dtype=jnp.float32,
        implementation: str = "auto",
    ):
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.implementation = implementation
        samples = num_heads * num_levels * num_points
        # Offsets and weights stay float32: they are coordinates and a softmax.
        self.sampling_offsets = linear(
            width, samples * 2, kernel_init=initial.zeros, bias_init=self._offset_bias, rngs=rngs
        )
        self.attention_weights = linear(
            width, samples, kernel_init=initial.zeros, bias_init=initial.zeros, rngs=rngs
        )
        init = dict(kernel_init=initial.xavier, bias_init=initial.zeros)
        self.value_proj = linear(width, width, **init, rngs=rngs, dtype=dtype)
        self.output_proj = linear(width, width, **init, rngs=rngs, dtype=dtype)

    def _offset_bias(self, key, shape, dtype=jnp.float32):
        """Head h looks along the angle 2πh/heads; its points lie at 1, 2, 3... pixels."""
        angle = np.arange(self.num_heads) * (2.0 * np.pi / self.num_heads)
        direction = np.stack([np.cos(angle), np.sin(angle)], -1)
        direction /= np.abs(direction).max(-1, keepdims=True)
        steps = np.arange(1, self.num_points + 1)
        bias = direction[:, None, None, :] * steps[None, None, :, None]
        bias = np.broadcast_to(bias, (self.num_heads, self.num_levels, self.num_points, 2))
        return jnp.asarray(bias.reshape(shape), dtype)

    def __call__(self, query, value, spatial_shapes, reference) -> jax.Array:
        """query, value [B, S, D]; reference [S, 2] (x, y in 0..1) -> [B, S, D]."""
        batch, length, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        query = query.astype(jnp.float32)
        offsets = self.sampling_offsets(query).reshape(batch, length, heads, levels, points, 2)
        sizes = jnp.asarray([(w, h) for h, w in spatial_shapes], jnp.float32)
        locations = reference[None, :, None, None, None] + offsets / sizes[:, None]
        weights = self.attention_weights(query).reshape(batch, length, heads, levels * points)
        weights = jax.nn.softmax(weights, axis=-1).reshape(batch, length, heads, levels, points)
        value = self.value_proj(value).reshape(batch, length, heads, -1)
        sampled = ms_deform_attn(
            value, spatial_shapes, locations, weights, implementation=self.implementation
        )
        return self.output_proj(sampled)


class EncoderLayer(nnx.Module):
    """Deformable self-attention and a feed-forward block, each followed by its LayerNorm."""

    def __init__(self, config, *, rngs, dtype=jnp.float32, implementation: str = "auto"):
        width = config.hidden_dim
        self.dropout_rate = config.encoder_dropout
        self.self_attn = MSDeformAttn(
            width,
            config.num_heads,
            3,
            config.encoder_points,
            rngs=rngs,
            dtype=dtype,
            implementation=implementation,
        )
        self.norm1 = layer_norm(width, rngs=rngs, dtype=dtype)
        init = dict(kernel_init=initial.xavier, rngs=rngs, dtype=dtype)
        self.linear1 = linear(width, config.encoder_ffn, **init)
        self.linear2 = linear(config.encoder_ffn, width, **init)
        self.norm2 = layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, x, positions, spatial_shapes, reference, key: Key = None) -> jax.Array:
        keys = split_key(key, 3)

        def drop(y, i):
            return layers.dropout(y, self.dropout_rate, keys[i])

        attended = self.self_attn(x + positions, x, spatial_shapes, reference)
        x = self.norm1(x + drop(attended, 0))
        hidden = drop(jax.nn.relu(self.linear1(x)), 1)
        return self.norm2(x + drop(self.linear2(hidden), 2))


class DeformableEncoder(nnx.Module):
    """The stack of encoder layers over the flattened levels."""

    def __init__(self, config, *, rngs, execution: Execution):
        options = dict(dtype=execution.compute_dtype, implementation=execution.kernels.deform_attn)
        layers = (EncoderLayer(config, rngs=rngs, **options) for _ in range(config.encoder_layers))
        self.layers = Stack(layers, remat=execution.remat, scan=execution.scan_layers)

    def __call__(self, maps, level_embed, key: Key = None) -> list[jax.Array]:
        """Three maps [B, h_l, w_l, D], coarse to fine, to three of the same shapes.

        `level_embed` [3, D] is added to the positions (not to the maps).
        """
        spatial_shapes = tuple(x.shape[1:3] for x in maps)
        batch, _, _, width = maps[0].shape
        x = jnp.concatenate([m.reshape(batch, -1, width) for m in maps], 1)
        sine = jnp.concatenate(
            [layers.sine_positions(h, w, width).reshape(-1, width) for h, w in spatial_shapes]
        )
        # Once for each image: so its gradient is summed over the pixels before the images, and over
        # a mesh it travels as three rows.
        level_embed = jnp.broadcast_to(level_embed, (batch, *level_embed.shape))

        def add_levels(level_embed):
            rows = [
                jnp.broadcast_to(level_embed[:, level, None], (batch, h * w, width))
                for level, (h, w) in enumerate(spatial_shapes)
            ]
            return (sine + jnp.concatenate(rows, axis=1)).astype(maps[0].dtype)

        reference = jnp.concatenate([_pixel_centres(h, w) for h, w in spatial_shapes])

        def step(x, layer_key, layer):
            positions = add_levels(level_embed)
            return layer(x, positions, spatial_shapes, reference, layer_key), None

        keys = None if key is None else jax.random.split(key, len(self.layers))
        x, _ = run(step, x, self.layers, items=keys)
        ends = np.cumsum([h * w for h, w in spatial_shapes])[:-1]
        return [
            part.reshape(batch, h, w, width)
            for part, (h, w) in zip(jnp.split(x, ends, axis=1), spatial_shapes, strict=True)
        ]


def _pixel_centres(height: int, width: int) -> jax.Array:
    """Normalised (x, y) of each pixel's centre, float32 [height * width, 2]."""
    y, x = jnp.meshgrid(
        (jnp.arange(height, dtype=jnp.float32) + 0.5) / height,
        (jnp.arange(width, dtype=jnp.float32) + 0.5) / width,
        indexing="ij",
    )
    return jnp.stack([x.ravel(), y.ravel()], -1)


class DeformableTransformer(nnx.Module):
    """Holds `level_embed` and `encoder`, as the official parameter names have it."""

    def __init__(self, config, *, rngs, execution: Execution):
        self.level_embed = nnx.Param(rngs.params().normal((3, config.hidden_dim)))
        self.encoder = DeformableEncoder(config, rngs=rngs, execution=execution)

    def __call__(self, maps, key: Key = None) -> list[jax.Array]:
        return self.encoder(maps, self.level_embed, key)


class PixelDecoder(nnx.Module):
    """Backbone maps to mask features at stride 4 and three maps for the masked attention."""

    def __init__(self, config, channels, *, rngs: ParamKeys, execution: Execution = Execution()):
        """`channels` are those of res2..res5; `config` is the OneFormerConfig."""
        width, how = config.hidden_dim, dict(rngs=rngs, dtype=execution.compute_dtype)
        self.input_proj = nnx.List(  # res5, res4, res3
            ConvNorm(c, width, 1, bias=True, init=initial.xavier, **how) for c in channels[:0:-1]
        )
        self.transformer = DeformableTransformer(config, rngs=rngs, execution=execution)
        fill = initial.c2_xavier
        self.adapter_1 = ConvNorm(channels[0], width, 1, bias=False, init=fill, **how)
        self.layer_1 = ConvNorm(width, width, 3, bias=False, init=fill, **how)
        self.mask_features = conv(width, config.mask_dim, 1, bias=True, init=fill, **how)

    def __call__(self, features, key: Key = None) -> tuple[jax.Array, list[jax.Array]]:
        """Maps res2..res5 [B, H/s, W/s, C_s] to features of stride 4 and of strides 32, 16, 8.

        Returns:
          mask features [B, H/4, W/4, mask_dim] and the maps [1/32, 1/16, 1/8] of width D.
        """
        res2, *rest = features
        maps = [project(x) for project, x in zip(self.input_proj, rest[::-1], strict=True)]
        maps = self.transformer(maps, key)
        lateral = self.adapter_1(res2)
        fine = lateral + layers.resize_bilinear(maps[-1], lateral.shape[1:3])
        return self.mask_features(jax.nn.relu(self.layer_1(fine))), maps
