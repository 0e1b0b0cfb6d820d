"""Sums over the slots in use against all slots at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.models.slots import sum_over_slots

N, B, M, D, P = 3, 2, 10, 4, 6


def choose(features, queries, n, targets):
    logits = jnp.einsum("bcd,bpd->bcp", queries, features)
    return jnp.abs(logits) < 1 + n


def losses(features, queries, choice, n, targets):
    logits = jnp.einsum("bcd,bpd->bcp", queries, features)
    first = jnp.sum(jnp.where(choice, jnp.tanh(logits) * targets, 0.0), axis=-1)
    return first, jnp.sum(logits**2, axis=-1) * (n + 1)


def used(*slots):
    """bool [N, B, M]: these slots of the second image, in all predictions but the first."""
    matched = np.zeros((N, B, M), bool)
    matched[1:, 1, list(slots)] = True
    return matched


def plain(matched, features, queries, targets):
    sums = []
    for n in range(N):
        kept = jax.lax.stop_gradient(choose(features, queries[n], n, targets))
        pair = losses(features, queries[n], kept, n, targets)
        sums.append([jnp.sum(jnp.where(matched[n], x, 0.0)) for x in pair])
    return tuple(jnp.asarray(x) for x in zip(*sums, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 4, M])
@pytest.mark.parametrize(
    "matched",
    [used(), used(0), used(2, 3), used(M - 1), used(*range(M)), np.ones((N, B, M), bool)],
    ids=["none", "first", "middle", "last", "one image", "all"],
)
def test_sums_and_gradients_are_those_of_all_slots(chunk, matched):
    rng = np.random.default_rng(0)
    features, queries, targets, weights = (
        rng.normal(size=size).astype(np.float32)
        for size in ((B, P, D), (N, B, M, D), (B, M, P), (2, N))
    )

    def total(function):
        def call(features, queries):
            found = function(features, queries)
            return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

        return jax.jit(jax.grad(call, argnums=(0, 1), has_aux=True))(features, queries)

    want, want_sums = total(lambda f, q: plain(matched, f, q, targets))
    got, got_sums = total(
        lambda f, q: sum_over_slots(choose, losses, chunk, jnp.asarray(matched), f, q, targets)
    )
    for ours, theirs in zip((*got, *got_sums), (*want, *want_sums), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert bool(np.any(got[1])) == bool(matched.any())


def test_chunks_without_a_slot_in_use_are_not_computed():
    calls = []

    def counted(features, queries, choice, n, targets):
        jax.debug.callback(lambda n: calls.append(int(n)), n)
        return losses(features, queries, choice, n, targets)

    arrays = (jnp.ones((B, P, D)), jnp.ones((N, B, M, D)), jnp.ones((B, M, P)))
    found = sum_over_slots(choose, counted, 4, jnp.asarray(used(5)), *arrays)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]  # two of three chunks, of each prediction
