"""Small layers that several parts of the model share.

Random layers take an explicit `key`; None means deterministic. No layer stores random state, so a
module is a pure function of its parameters and a key.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oneformer_jax.models import initial
from oneformer_jax.models.attention import attend
from oneformer_jax.models.initial import ParamKeys

Key = jax.Array | None

# Keys beyond this number are attended in chunks, so that no [B, heads, Q, S] array is formed.
ATTENTION_CHUNK = 4096


def split_key(key: Key, n: int) -> Sequence[Key] | jax.Array:
    """Returns `n` independent keys, or `n` Nones where `key` is None."""
    return [None] * n if key is None else jax.random.split(key, n)


def dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
    """Zeroes each element with probability `rate` and rescales the rest; identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def drop_path(x: jax.Array, rate: float | jax.Array, key: Key) -> jax.Array:
    """Zeroes whole samples of the leading axis: stochastic depth (arXiv 1603.09382)."""
    if key is None or (not isinstance(rate, jax.Array) and rate == 0):
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), 0)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Any,
    *,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """Convolves [B, H, W, C] for `nnx.Conv`; a 1 x 1 kernel is a product.

    On a processor the product is faster, and above all its gradient.
    """
    groups = feature_group_count
    if kernel.shape[:2] != (1, 1) or groups != 1 or any(map(any, padding)):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, feature_group_count=groups, **options
        )
    down, right = strides
    inputs = (((3,), (0,)), ((), ()))
    return jax.lax.dot_general(
        x[:, ::down, ::right], kernel[0, 0], inputs, precision=options["precision"]
    )


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU, x Φ(x) (arXiv 1606.08415), in float32 inside.

    The backward pass needs `x` alone: automatic differentiation would keep more arrays, and the
    erfc of `jax.nn.gelu` takes a processor longer than erf.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * np.pi) ** -0.5
    slope = _normal_cdf(wide) + wide * density
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def linear(
    inputs: int,
    outputs: int,
    *,
    rngs: ParamKeys,
    dtype: Any = jnp.float32,
    kernel_init: initial.Initializer = initial.torch_kernel,
    bias_init: initial.Initializer | None = None,
) -> nnx.Linear:
    """Returns a Linear with PyTorch's default initialisation of kernel and bias."""
    return nnx.Linear(
        inputs,
        outputs,
        dtype=dtype,
        kernel_init=kernel_init,
        bias_init=bias_init or initial.uniform(inputs**-0.5),
        rngs=rngs,
    )


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis, in float32 inside; its backward pass needs the input alone."""

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """[..., C] to the same, in `dtype`; a `mask` is not supported."""
        if mask is not None:
            raise NotImplementedError("this LayerNorm takes no mask")
        assert self.scale is not None and self.bias is not None
        return _normalize(x, self.scale[...], self.bias[...], self.epsilon).astype(self.dtype)


def layer_norm(
    width: int, *, epsilon: float = 1e-5, rngs: ParamKeys, dtype: Any = jnp.float32
) -> LayerNorm:
    """Returns LayerNorm as PyTorch's: its default epsilon, two-pass variance in float32."""
    return LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    return _standardize(x, epsilon)[0] * scale + bias


def _standardize(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(x - mean) / deviation and 1 / deviation, float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * inverse, inverse


def _normalize_backward(
    epsilon: float, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale = kept
    standard, inverse = _standardize(x, epsilon)
    of_standard = gradient * scale
    mean = jnp.mean(of_standard, axis=-1, keepdims=True)
    along = jnp.mean(of_standard * standard, axis=-1, keepdims=True)
    of_x = (inverse * (of_standard - mean - standard * along)).astype(x.dtype)
    axes = tuple(range(x.ndim - 1))
    return of_x, jnp.sum(gradient * standard, axes), jnp.sum(gradient, axes)


_normalize.defvjp(
    lambda x, scale, bias, epsilon: (_normalize(x, scale, bias, epsilon), (x, scale)),
    _normalize_backward,
)


class MLP(nnx.Module):
    """Linear layers with ReLU between them (the task, mask and text-projection heads)."""

    def __init__(self, widths: Sequence[int], *, rngs: ParamKeys, dtype: Any = jnp.float32):
        """`widths` lists the input, the hidden and the output widths."""
        self.layers = nnx.List(
            linear(i, o, dtype=dtype, rngs=rngs) for i, o in itertools.pairwise(widths)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., widths[0]] -> [..., widths[-1]]."""
        for i, layer in enumerate(self.layers):
            x = layer(jax.nn.relu(x) if i else x)
        return x


def once_per_shard(x: jax.Array, batch: int) -> jax.Array:
    """Copies [1, ...] to [n, ...], once for each of n parts of the batch; keeps [B, ...].

    What the copies are multiplied with then gets the sum of its gradient on each device first, and
    that small sum travels. With one copy for all, the gradient of the product would: a feature map.
    The parts are those of the mesh that the trace was told of (`jax.sharding.use_abstract_mesh`);
    without a mesh it is one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.size
    if x.shape[0] != 1 or parts == 1 or batch % parts:
        return x
    return jnp.broadcast_to(x, (parts, *x.shape[1:]))


class MultiHeadAttention(nnx.Module):
    """Multi-head attention with separate query, key and value inputs, as PyTorch's module."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        rngs: ParamKeys,
        dtype: Any = jnp.float32,
        dropout_rate: float = 0.0,
        kernel_init: initial.Initializer = initial.packed_xavier,
        out_init: initial.Initializer = initial.xavier,
    ):
        if width % num_heads:
            raise ValueError(f"attention width {width} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate

        def projection(init: initial.Initializer) -> nnx.Linear:
            return linear(
                width, width, dtype=dtype, kernel_init=init, bias_init=initial.zeros, rngs=rngs
            )

        self.q_proj = projection(kernel_init)
        self.k_proj = projection(kernel_init)
        self.v_proj = projection(kernel_init)
        self.out_proj = projection(out_init)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        dropout_key: Key = None,
    ) -> jax.Array:
        """Attends from [B, Q, D] to keys and values [B, S, D]; returns [B, Q, D].

        Args:
          query: [B, Q, D].
          key: [B, S, D], or [1, S, D] for all samples alike.
          value: [B, S, D], or [1, S, D].
          mask: bool [B, Q, S], True where the query may attend; None attends everywhere. Every row
            needs at least one True.
          dropout_key: key of the dropout on the attention weights; None is deterministic.
        """

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_heads, -1)

        batch = query.shape[0]

        def project(projection: nnx.Linear, x: jax.Array) -> jax.Array:
            x = heads(projection(once_per_shard(x, batch)))
            copies = (x.shape[0], batch // x.shape[0], *x.shape[1:])
            return jnp.broadcast_to(x[:, None], copies).reshape(batch, *x.shape[1:])

        q = heads(self.q_proj(query))
        k, v = project(self.k_proj, key), project(self.v_proj, value)
        out = attention(q, k, v, mask=mask, dropout_rate=self.dropout_rate, key=dropout_key)
        return self.out_proj(out.reshape(query.shape))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    key: Key = None,
    chunk: int = ATTENTION_CHUNK,
) -> jax.Array:
    """Attends by scaled dot products, with a float32 softmax, in the memory of one chunk.

    Args:
      q: [B, Q, heads, d].
      k: [B, S, heads, d].
      v: [B, S, heads, d].
      mask: bool [B, Q, S], True where attended; None attends everywhere.
      dropout_rate: share of attention weights zeroed when `key` is given.
      key: PRNG key or None.
      chunk: number of keys of a chunk.

    Returns:
      [B, Q, heads, d] in the dtype of `v`.
    """
    factor = None
    if dropout_rate == 0:
        key = None
    if key is not None and k.shape[1] <= chunk:
        batch, queries, heads, _ = q.shape
        ones = jnp.ones((batch, heads, queries, k.shape[1]), jnp.float32)
        factor, key = dropout(ones, dropout_rate, key), None
    return attend(q * q.shape[-1] ** -0.5, k, v, mask, None, factor, key, dropout_rate, chunk)


def sine_positions(height: int, width: int, dim: int) -> jax.Array:
    """Returns sine position embedding of a map, float32 [height, width, dim] (arXiv 2005.12872).

    Normalised to 2π, temperature 10000; the first half of the channels encodes the row, the second
    the column; even channels are sines, odd ones cosines.
    """
    features = dim // 2
    frequency = 10000.0 ** (2 * (np.arange(features) // 2) / features)

    def axis(size: int) -> jax.Array:  # on the host: the map is a broadcast of two small tables
        position = np.arange(1, size + 1) / (size + 1e-6) * (2 * np.pi)
        angle = position[:, None] / frequency
        table = np.where(np.arange(features) % 2 == 0, np.sin(angle), np.cos(angle))
        return jnp.asarray(table, jnp.float32)

    rows = jnp.broadcast_to(axis(height)[:, None], (height, width, features))
    columns = jnp.broadcast_to(axis(width)[None], (height, width, features))
    return jnp.concatenate([rows, columns], -1)


def resize_bilinear(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes [B, H, W, C] bilinearly to `size`: half-pixel centres, no antialiasing.

    Shrinking by an even factor reads the two central rows and columns of each cell only, which is
    what the general formula reduces to.
    """
    for axis, new in ((1, size[0]), (2, size[1])):
        old = x.shape[axis]
        factor, rest = divmod(old, new)
        if old == new:
            continue
        if rest == 0 and factor % 2 == 0:
            first, second = (
                jax.lax.slice_in_dim(x, start, None, factor, axis)
                for start in (factor // 2 - 1, factor // 2)
            )
            x = (first + second) * jnp.asarray(0.5, x.dtype)
        else:
            shape = (*x.shape[:axis], new, *x.shape[axis + 1 :])
            x = jax.image.resize(x, shape, "bilinear", antialias=False).astype(x.dtype)
    return x
