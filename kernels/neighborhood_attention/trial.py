"""Neighbourhood attention as `oneformer_jax.kernels.calibrate` tries it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from oneformer_jax.kernels.choice import Call
from oneformer_jax.kernels.neighborhood_attention import IMPLEMENTATIONS, api
from oneformer_jax.kernels.trial import Trial


class NeighborhoodAttention(Trial):
    """Arrays: query, key, value and rpb of `neighborhood_attention`."""

    implementations = IMPLEMENTATIONS
    differentiated = (0, 1, 2, 3)
    rounded = True

    def function(self, call: Call, candidate: str) -> Callable[..., jax.Array]:
        return functools.partial(api.load(candidate), **dict(call.static))


TRIAL = NeighborhoodAttention()
