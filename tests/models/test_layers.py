"""Attention, positions and resizing against straightforward NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.models import layers
from oneformer_jax.models.initial import ParamKeys


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _qkv(seed, batch=2, queries=5, keys=11, heads=2, dim=4):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, queries, heads, dim)).astype(np.float32)
    k, v = (rng.normal(size=(batch, keys, heads, dim)).astype(np.float32) for _ in range(2))
    mask = rng.random((batch, queries, keys)) < 0.5
    mask[:, 0] = False
    mask[:, 0, -1] = True  # a row whose early chunks are blocked as a whole
    mask[..., -1] |= ~mask.any(-1)
    return q, k, v, mask


@pytest.mark.parametrize("chunk", [64, 11, 4, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_chunks_is_softmax_attention(chunk, masked):
    q, k, v, mask = _qkv(0)
    mask = mask if masked else None
    scores = np.einsum("bqhd,bshd->bhqs", q, k) / 2.0
    if masked:
        scores = np.where(mask[:, None], scores, -np.inf)
    expected = np.einsum("bhqs,bshd->bqhd", _softmax(scores), v)
    found = layers.attention(q, k, v, mask=mask, chunk=chunk)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attention_gradients_do_not_depend_on_the_chunk():
    q, k, v, mask = _qkv(1)

    def loss(q, k, v, chunk):
        return jnp.sum(jnp.sin(layers.attention(q, k, v, mask=mask, chunk=chunk)))

    whole = jax.grad(loss, (0, 1, 2))(q, k, v, 64)
    parts = jax.grad(loss, (0, 1, 2))(q, k, v, 4)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_attention_dropout_keeps_the_mean_in_one_and_in_many_chunks():
    q, k, v, _ = _qkv(2, keys=64)
    expected = layers.attention(q, k, v)
    for chunk in (64, 16):
        run = jax.jit(
            jax.vmap(
                lambda key, chunk=chunk: layers.attention(
                    q, k, v, dropout_rate=0.3, key=key, chunk=chunk
                )
            )
        )
        samples = run(jax.random.split(jax.random.key(0), 2000))
        assert float(samples.std(0).max()) > 0.05
        np.testing.assert_allclose(samples.mean(0), expected, atol=0.05)


def test_multi_head_attention_broadcasts_keys():
    module = layers.MultiHeadAttention(8, 2, rngs=ParamKeys(0))
    query = jax.random.normal(jax.random.key(0), (3, 4, 8))
    key, value = jax.random.normal(jax.random.key(1), (2, 1, 6, 8))
    repeated = [jnp.repeat(x, 3, 0) for x in (key, value)]
    np.testing.assert_allclose(module(query, key, value), module(query, *repeated), atol=1e-6)


def test_attention_width_must_divide():
    with pytest.raises(ValueError, match="width 10 is not divisible by 4 heads"):
        layers.MultiHeadAttention(10, 4, rngs=ParamKeys(0))


def _gradients(function, *inputs):
    weigh = jnp.asarray(np.random.default_rng(9).normal(size=function(*inputs).shape), jnp.float32)
    indices = tuple(range(len(inputs)))
    return jax.grad(lambda *x: jnp.sum(weigh * function(*x)), indices)(*inputs)


def test_gelu_and_its_gradient_are_the_exact_ones():
    x = jnp.asarray(np.linspace(-12, 12, 2001), jnp.float32)
    np.testing.assert_allclose(layers.gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    for ours, theirs in zip(
        _gradients(layers.gelu, x),
        _gradients(lambda x: jax.nn.gelu(x, approximate=False), x),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert layers.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_layer_norm_and_its_gradients():
    rng = np.random.default_rng(0)
    x, scale, bias = (
        jnp.asarray(rng.normal(2, 3, size=size), jnp.float32) for size in ((2, 3, 16), 16, 16)
    )

    def ours(x, scale, bias):
        module = layers.layer_norm(16, rngs=ParamKeys(0))
        module.scale, module.bias = nnx.Param(scale), nnx.Param(bias)
        return module(x)

    def plain(x, scale, bias):
        variance = jnp.var(x, axis=-1, keepdims=True)
        x = (x - jnp.mean(x, axis=-1, keepdims=True)) / jnp.sqrt(variance + 1e-5)
        return x * scale + bias

    np.testing.assert_allclose(ours(x, scale, bias), plain(x, scale, bias), atol=1e-5)
    for a, b in zip(
        _gradients(ours, x, scale, bias), _gradients(plain, x, scale, bias), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_of_any_size_and_stride(size, strides):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 10, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 4, 6)), jnp.float32)
    padding = ((size // 2, size // 2),) * 2
    options = dict(
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=1, precision=None
    )

    def ours(x, kernel):
        return layers.convolve(x, kernel, strides, padding, **options)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-5)
    for a, b in zip(_gradients(ours, x, kernel), _gradients(plain, x, kernel), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_sine_positions_follow_the_formula():
    height, width, dim = 3, 5, 16
    found = np.asarray(layers.sine_positions(height, width, dim))
    features = dim // 2
    for r in range(height):
        for c in range(width):
            for axis, (place, size) in enumerate([(r, height), (c, width)]):
                angle = (place + 1) / (size + 1e-6) * 2 * np.pi
                for i in range(features):
                    t = 10000 ** (2 * (i // 2) / features)
                    expected = np.sin(angle / t) if i % 2 == 0 else np.cos(angle / t)
                    value = found[r, c, axis * features + i]
                    assert value == pytest.approx(expected, abs=1e-5)


def _bilinear(x, size):
    """Half-pixel bilinear resize without antialiasing, one output pixel at a time."""
    height, width = x.shape[1:3]
    out = np.zeros((x.shape[0], *size, x.shape[3]))
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * height / size[0] - 0.5, 0), height - 1)
            z = min(max((j + 0.5) * width / size[1] - 0.5, 0), width - 1)
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, height - 1), min(z0 + 1, width - 1)
            fy, fz = y - y0, z - z0
            top = x[:, y0, z0] * (1 - fz) + x[:, y0, z1] * fz
            low = x[:, y1, z0] * (1 - fz) + x[:, y1, z1] * fz
            out[:, i, j] = top * (1 - fy) + low * fy
    return out


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (1, 1), (16, 24), (3, 5), (8, 8)])
def test_resize_bilinear(size):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(layers.resize_bilinear(x, size), _bilinear(x, size), atol=1e-5)


def test_dropout_and_drop_path():
    x = jnp.ones((1000, 8))
    assert layers.dropout(x, 0.5, None) is x
    assert layers.drop_path(x, 0.5, None) is x
    y = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert y.mean() == pytest.approx(1.0, abs=0.05)
    z = np.asarray(layers.drop_path(x, 0.25, jax.random.key(0)))
    assert (z == z[:, :1]).all()
    assert z.mean() == pytest.approx(1.0, abs=0.1)


def test_linear_layers_have_pytorchs_bounds():
    module = layers.linear(16, 400, rngs=ParamKeys(0))
    for value in (module.kernel, module.bias):
        assert float(jnp.abs(value[...]).max()) == pytest.approx(0.25, rel=0.02)
