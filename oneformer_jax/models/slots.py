"""Sums of losses over the slots of the targets that are in use, a few slots at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def sum_over_slots(
    choose: Callable[..., Any],
    losses: Callable[..., tuple[jax.Array, jax.Array]],
    chunk: int,
    matched: jax.Array,
    features: jax.Array,
    queries: jax.Array,
    *parts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sums both mask losses of each prediction over its matched slots, `chunk` slots at a time.

    The chunks after the last slot that any image uses are left out: most slots of most batches are
    empty. The backward pass computes a chunk again, but keeps the points that it chose.

    Args:
      choose: (features, queries [B, c, D], n, *parts of c slots) -> what the backward pass keeps,
        arrays [B, c, ...] without gradient.
      losses: (features, queries, choice, n, *parts) -> two arrays float32 [B, c].
      chunk: slots at a time, c.
      matched: bool [N, B, M].
      features: what all slots read, [B, ...].
      queries: float32 [N, B, M, D].
      parts: arrays [B or 1, M, ...], without gradient.

    Returns:
      float32 [N], twice.
    """
    num_predictions, batch, num_slots = matched.shape
    count = math.ceil(num_slots / chunk)

    def fill(x: jax.Array, axis: int) -> jax.Array:
        """Pads the slots to whole chunks."""
        return jnp.pad(
            x, [(0, count * chunk - num_slots if i == axis else 0) for i in range(x.ndim)]
        )

    matched, queries = fill(matched, 2), fill(queries, 2)
    filled = [fill(x, 1) for x in parts]
    in_use = jnp.any(matched.reshape(-1, count, chunk), axis=(0, 2))
    used = jnp.max(jnp.where(in_use, jnp.arange(1, count + 1), 0))

    def read(x: jax.Array, n: jax.Array, start: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x[n], start, chunk, 1)

    def write(x: jax.Array, value: jax.Array, n: jax.Array, start: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(x, value[None], (n, 0, start, *[0] * (x.ndim - 3)))

    def each_chunk(body: Callable, carry: Any, used: jax.Array, parts: list[jax.Array]) -> Any:
        """Calls `carry = body(carry, n, start, parts)` for the chunks in use of all predictions."""

        rounds = used if count > 1 else 1  # a number that is known is better for a compiler

        def step(i: jax.Array, carry: Any) -> Any:
            n, start = i // rounds, i % rounds * chunk
            slices = [lax.dynamic_slice_in_dim(x, start, chunk, 1) for x in parts]
            return body(carry, n, start, slices)

        return lax.fori_loop(0, num_predictions * rounds, step, carry)

    def empty(like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((num_predictions, batch, count * chunk, *like.shape[2:]), like.dtype)

    def forward(
        features: jax.Array, queries: jax.Array, used: jax.Array, parts: list[jax.Array]
    ) -> tuple[Any, Any]:
        def pair(n: jax.Array, slices: list[jax.Array]) -> Any:
            chunk_queries = jnp.zeros((batch, chunk, queries.shape[-1]), queries.dtype)
            choice = choose(features, chunk_queries, n, *slices)
            return choice, losses(features, chunk_queries, choice, n, *slices)

        first = [lax.slice_in_dim(x, 0, chunk, axis=1) for x in parts]
        kept = jax.tree.map(empty, jax.eval_shape(pair, jnp.int32(0), first))

        def body(carry: Any, n: jax.Array, start: jax.Array, slices: Any) -> Any:
            part = read(queries, n, start)
            choice = choose(features, part, n, *slices)
            found = choice, losses(features, part, choice, n, *slices)
            return jax.tree.map(lambda x, value: write(x, value, n, start), carry, found)

        choice, found = each_chunk(body, kept, used, parts)
        return found, (features, queries, choice, used, parts)

    def backward(kept: Any, gradients: Any) -> tuple:
        features, queries, choice, used, parts = kept

        def body(carry: Any, n: jax.Array, start: jax.Array, slices: Any) -> Any:
            total, query_gradient = carry
            chosen = jax.tree.map(lambda x: read(x, n, start), choice)
            _, pull = jax.vjp(
                lambda features, part: losses(features, part, chosen, n, *slices),
                features,
                read(queries, n, start),
            )
            of_features, of_part = pull(tuple(read(x, n, start) for x in gradients))
            return total + of_features, write(query_gradient, of_part, n, start)

        start = jnp.zeros_like(features), jnp.zeros_like(queries)
        return *each_chunk(body, start, used, parts), None, None

    by_slot = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    by_slot.defvjp(forward, backward)
    first, second = by_slot(features, queries, used, filled)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(matched, x, 0.0), axis=(1, 2))

    return total(first), total(second)
