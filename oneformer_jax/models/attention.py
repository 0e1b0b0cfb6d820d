"""Softmax attention that keeps no scores: of its forward pass only arguments and result remain.

The backward pass forms the weights again from the row-wise logarithm of the sum, as in
FlashAttention (arXiv 2205.14135); the sum of the weights times their gradients, which the softmax
needs, is that of the result times its own. Many keys are visited a chunk at a time, in both passes.
No array of scores is ever transposed, which takes a processor longer than the product: where the
queries are summed, the small operand and the result are.

Letters: B batch, Q queries, S keys, N heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Finite, since a chunk of keys may be blocked as a whole.
BLOCKED = jnp.finfo(jnp.float32).min / 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    factor: jax.Array | None,
    key: jax.Array | None,
    rate: float,
    chunk: int,
) -> jax.Array:
    """Attends with a float32 softmax.

    Args:
      q: [B, Q, N, D], scaled.
      k: [B, S, N, D].
      v: [B, S, N, D].
      mask: bool [B or 1, Q or 1, S], True where attended, in every row once at least; or None.
      bias: float32 [R, N, Q, S] to add to the scores; sample i of the batch, a multiple of R, gets
        row i % R. For at most `chunk` keys; or None.
      factor: float32 [B, N, Q, S] for the weights, for at most `chunk` keys; or None.
      key: PRNG key of the dropout on the weights of each chunk; or None.
      rate: share of the weights that are dropped with `key`.
      chunk: keys at a time.

    Returns:
      [B, Q, N, D] in the dtype of `v`.
    """
    return _forward(q, k, v, mask, bias, factor, key, rate, chunk)[0]


def _forward(*arguments: Any) -> tuple[jax.Array, Any]:
    """Returns the result, and what the backward pass takes; the arguments are those of `attend`."""
    q, k, v, mask, bias, factor, key, rate, chunk = arguments
    parts = _chunks(k, v, mask, chunk)

    def visit(part: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns maximum and sum [B, N, Q] of a chunk, and its weighted values [B, N, Q, D]."""
        index, k, v, mask = part
        s = _scores(q, k, mask, bias)
        top = s.max(-1)
        weights = jnp.exp(s - top[..., None])
        kept = _times(weights, _factor(factor, key, rate, index, weights.shape))
        return top, weights.sum(-1), _product(kept.astype(v.dtype), _heads_first(v))

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        top, total, out = visit(part)
        new_top = jnp.maximum(carry[0], top)
        old, new = jnp.exp(carry[0] - new_top), jnp.exp(top - new_top)
        out = carry[2] * old[..., None] + out * new[..., None]
        return (new_top, carry[1] * old + total * new, out), None

    if len(parts[0]) == 1:
        top, total, out = visit(jax.tree.map(lambda x: x[0], parts))
    else:
        rows = q.shape[0], q.shape[2], q.shape[1]
        zeros = jnp.zeros(rows, jnp.float32)
        start = jnp.full(rows, BLOCKED), zeros, jnp.zeros((*rows, q.shape[3]), jnp.float32)
        (top, total, out), _ = jax.lax.scan(add, start, parts)
    out = _heads_first(out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, mask, bias, factor, key, top + jnp.log(total), out)


def _backward(rate: float, chunk: int, kept: Any, gradient: jax.Array) -> tuple:
    q, k, v, mask, bias, factor, key, log_total, out = kept
    # float32 [B, N, Q, 1]
    shared = _heads_first(jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True))
    gradient = gradient.astype(v.dtype)
    rows, columns = _heads_first(gradient), jnp.moveaxis(gradient, 1, 3)
    q_columns = jnp.moveaxis(q, 1, 3)

    def visit(of_q: jax.Array, part: Any) -> tuple[jax.Array, Any]:
        index, k, v, mask = part
        weights = jnp.exp(_scores(q, k, mask, bias) - log_total[..., None])
        dropped = _factor(factor, key, rate, index, weights.shape)
        of_v = _product(columns, _times(weights, dropped).astype(v.dtype))  # [B, N, D, S]
        of_weights = _times(_product(rows, jnp.moveaxis(v, 1, 3)), dropped)
        of_scores = weights * (of_weights - shared)
        of_bias = None if bias is None else _rows(of_scores, bias).sum(0)
        of_scores = of_scores.astype(q.dtype)
        of_k = _product(q_columns, of_scores)
        of_q = of_q + _product(of_scores, _heads_first(k))
        return of_q, (*(jnp.moveaxis(x, 3, 1).astype(k.dtype) for x in (of_k, of_v)), of_bias)

    parts = _chunks(k, v, mask, chunk)
    start = jnp.zeros((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), jnp.float32)
    if len(parts[0]) == 1:
        of_q, (of_k, of_v, of_bias) = visit(start, jax.tree.map(lambda x: x[0], parts))
    else:
        of_q, (of_k, of_v, of_bias) = jax.lax.scan(visit, start, parts)
        of_k, of_v = (_joined(x)[:, : k.shape[1]] for x in (of_k, of_v))
    return _heads_first(of_q).astype(q.dtype), of_k, of_v, None, of_bias, None, None


attend.defvjp(_forward, _backward)


def _chunks(k: jax.Array, v: jax.Array, mask: jax.Array | None, chunk: int) -> tuple[Any, ...]:
    """Cuts the keys: (index [n], k and v [n, B, chunk, N, D], mask [n, B, Q, chunk] or None).

    The keys that fill up the last chunk are blocked.
    """
    keys = k.shape[1]
    count = -(-keys // chunk)
    chunk = keys if count == 1 else chunk
    padding = count * chunk - keys
    if mask is None and padding:
        mask = jnp.ones((1, 1, keys), bool)

    def split(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return jnp.arange(count), split(k, 1), split(v, 1), None if mask is None else split(mask, 2)


def _joined(x: jax.Array) -> jax.Array:
    """[n, B, chunk, ...] to [B, n * chunk, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])


def _factor(
    factor: jax.Array | None,
    key: jax.Array | None,
    rate: float,
    index: jax.Array,
    shape: tuple[int, ...],
) -> jax.Array | None:
    """The factor of a chunk's weights: `factor`, or what dropout draws for it, or None."""
    if key is None:
        return factor
    keep = jax.random.bernoulli(jax.random.fold_in(key, index), 1.0 - rate, shape)
    return jnp.where(keep, 1 / (1.0 - rate), 0.0).astype(jnp.float32)


def _times(weights: jax.Array, factor: jax.Array | None) -> jax.Array:
    return weights if factor is None else weights * factor


def _rows(s: jax.Array, bias: jax.Array) -> jax.Array:
    """[B, N, Q, S] as [B / R, R, N, Q, S]."""
    return s.reshape(-1, len(bias), *s.shape[1:])


def _scores(
    q: jax.Array, k: jax.Array, mask: jax.Array | None, bias: jax.Array | None
) -> jax.Array:
    """float32 [B, N, Q, S]."""
    s = _product(_heads_first(q), jnp.moveaxis(k, 1, 3))
    if bias is not None:
        s = (_rows(s, bias) + bias).reshape(s.shape)
    return s if mask is None else s + jnp.where(mask[:, None], 0.0, BLOCKED)


def _heads_first(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
