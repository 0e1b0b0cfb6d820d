"""Recomputation in the backward pass that no other recomputation around it undoes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function of arrays so that its forward pass keeps the arguments only.

    Unlike `jax.checkpoint` it also works inside of a `jax.checkpoint` with a policy, which would
    decide about every value in `function`. In return, `function` must not close over differentiated
    arrays, and has no forward-mode derivative.
    """
    wrapped = jax.custom_vjp(function)

    def forward(*args):
        return function(*args), args

    def backward(args, gradient):
        # The barrier keeps the compiler from merging the second computation with the first.
        args, gradient = jax.lax.optimization_barrier((args, gradient))
        return jax.vjp(function, *args)[1](gradient)

    wrapped.defvjp(forward, backward)
    return wrapped
