"""Recomputation in the backward pass that no other recomputation around it undoes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, of whose forward pass only the arguments are kept.

    As `jax.checkpoint`, but it holds inside of one with a policy too: there the policy would decide
    about every value in `function`. In return, `function` must not close over arrays that are
    differentiated, and there is no forward-mode derivative.
    """
    wrapped = jax.custom_vjp(function)

    def forward(*args):
        return function(*args), args

    def backward(args, gradient):
        # Behind the barrier the compiler cannot take the second computation for the first.
        args, gradient = jax.lax.optimization_barrier((args, gradient))
        return jax.vjp(function, *args)[1](gradient)

    wrapped.defvjp(forward, backward)
    return wrapped
