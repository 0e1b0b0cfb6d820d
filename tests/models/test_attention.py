"""Attention whose gradients are written out, against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.models.attention import BLOCKED, attend

B, Q, S, N, D = 4, 7, 24, 2, 8
RATE = 0.3


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(B, n, N, D)), jnp.float32) for n in (Q, S, S))
    mask = rng.random((B, Q, S)) < 0.6
    mask[..., 3] = True
    return q, k, v, jnp.asarray(mask)


def dropped(key, chunk):
    """Draws the factors that dropout gives the weights of all chunks."""
    parts = [
        jax.random.bernoulli(jax.random.fold_in(key, i), 1 - RATE, (B, N, Q, chunk))
        for i in range(-(-S // chunk))
    ]
    return jnp.concatenate(parts, axis=-1)[..., :S] / (1 - RATE)


def plain(q, k, v, mask, bias, factor):
    scores = jnp.einsum("bqhd,bshd->bhqs", q, k)
    if bias is not None:
        scores = scores + jnp.tile(bias, (B // len(bias), 1, 1, 1))
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, BLOCKED)
    weights = jax.nn.softmax(scores)
    return jnp.einsum("bhqs,bshd->bqhd", weights if factor is None else weights * factor, v)


def check(ours, reference, *inputs):
    """Values and gradients of all inputs."""
    weigh = jnp.asarray(np.random.default_rng(1).normal(size=(B, Q, N, D)), jnp.float32)
    indices = tuple(range(len(inputs)))
    np.testing.assert_allclose(ours(*inputs), reference(*inputs), atol=2e-6)
    got = jax.grad(lambda *x: jnp.sum(weigh * ours(*x)), indices)(*inputs)
    want = jax.grad(lambda *x: jnp.sum(weigh * reference(*x)), indices)(*inputs)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
        assert np.any(b)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [S, 100, 6, 5, 1])
def test_values_and_gradients_whatever_the_chunk(chunk, masked):
    q, k, v, mask = arrays()
    mask = mask if masked else None
    check(
        lambda *x: attend(*x, mask, None, None, None, 0.0, chunk),
        lambda *x: plain(*x, mask, None, None),
        *(q, k, v),
    )


@pytest.mark.parametrize("rows", [1, 2, B])
def test_a_bias_and_its_gradient(rows):
    q, k, v, mask = arrays()
    bias = jax.random.normal(jax.random.key(2), (rows, N, Q, S))
    check(
        lambda q, k, v, bias: attend(q, k, v, mask, bias, None, None, 0.0, S),
        lambda q, k, v, bias: plain(q, k, v, mask, bias, None),
        *(q, k, v, bias),
    )


def test_a_given_factor_of_the_weights():
    q, k, v, mask = arrays()
    factor = dropped(jax.random.key(3), S)
    check(
        lambda *x: attend(*x, mask, None, factor, None, 0.0, S),
        lambda *x: plain(*x, mask, None, factor),
        *(q, k, v),
    )


@pytest.mark.parametrize("chunk", [4, 5])
def test_the_backward_pass_draws_the_dropout_of_the_forward_pass(chunk):
    q, k, v, mask = arrays()
    key = jax.random.key(4)
    check(
        lambda *x: attend(*x, mask, None, None, key, RATE, chunk),
        lambda *x: plain(*x, mask, None, dropped(key, chunk)),
        *(q, k, v),
    )


def test_bfloat16_stays_bfloat16():
    q, k, v, mask = arrays()
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))

    def total(*x):
        return jnp.sum(attend(*x, mask, None, None, None, 0.0, 5).astype(jnp.float32))

    out = attend(q, k, v, mask, None, None, None, 0.0, 5)
    assert out.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.grad(total, (0, 1, 2))(q, k, v)} == {jnp.dtype(jnp.bfloat16)}
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(
        out.astype(np.float32), plain(*wide, mask, None, None), atol=3e-2, rtol=3e-2
    )


def test_no_scores_are_kept_for_the_backward_pass():
    q, k, v, mask = arrays()
    _, pull = jax.vjp(lambda *x: attend(*x, mask, None, None, None, 0.0, S), q, k, v)
    shapes = {x.shape for x in jax.tree.leaves(pull)}
    assert (B, Q, N, D) in shapes and (B, N, Q, S) not in shapes
