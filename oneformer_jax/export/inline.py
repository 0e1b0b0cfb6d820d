"""A traced function as a flat sequence of plain operations, which converters to ONNX know.

Calls (of jitted functions, of those with gradients of their own, of recomputed ones) are replaced
by what they call, hints to the compiler by their argument, and two operations by equal ones that
the converter has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# Name of a call: the parameter that holds what it calls.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
# The converter declares all other results of a loop as int32.
LOOPED = (jnp.float32, jnp.int32)
HINTS = ("optimization_barrier", "stop_gradient")


def inlined(function: Callable[..., Sequence[jax.Array]], *arguments: Any) -> Callable[..., list]:
    """Returns the function, traced for arguments of these shapes and dtypes, in plain operations.

    Args:
      function: of arrays, to a tuple of arrays.
      arguments: `jax.ShapeDtypeStruct`s.
    """
    traced = jax.make_jaxpr(function)(*arguments)
    return functools.partial(_run, traced.jaxpr, traced.consts)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        results = _apply(equation, [read(v) for v in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _apply(equation: JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
    name = equation.primitive.name
    if name in HINTS:
        return inputs
    if name in CALLS:
        return _run(*_opened(equation.params[CALLS[name]]), *inputs)
    if name in FORMS:
        return [FORMS[name](*inputs, **equation.params)]
    if name == "scan" and any(v.aval.dtype not in LOOPED for v in equation.outvars):
        return _unrolled(inputs, **equation.params)
    params = {key: _flat(value) for key, value in equation.params.items()}
    found = equation.primitive.bind(*inputs, **params)
    return found if equation.primitive.multiple_results else [found]


def _opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _flat(value: Any) -> Any:
    """Inlines the body of a loop, too."""
    if not isinstance(value, ClosedJaxpr):
        return value
    return jax.make_jaxpr(functools.partial(_run, value.jaxpr, value.consts))(*value.in_avals)


def _unrolled(
    inputs: Sequence[Any],
    *,
    jaxpr: ClosedJaxpr,
    length: int,
    num_consts: int,
    num_carry: int,
    reverse: bool,
    **_: Any,
) -> list[Any]:
    """Runs the steps of a loop one after another."""
    consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
    sequences = inputs[num_consts + num_carry :]
    steps = []
    for i in reversed(range(length)) if reverse else range(length):
        items = [jax.lax.index_in_dim(x, i, keepdims=False) for x in sequences]
        found = _run(jaxpr.jaxpr, jaxpr.consts, *consts, *carry, *items)
        carry = found[:num_carry]
        steps.append(found[num_carry:])
    steps = steps[::-1] if reverse else steps
    return [*carry, *(_stack(*results, axis=0) for results in zip(*steps, strict=True))]


def _stack(*arrays: jax.Array, axis: int) -> jax.Array:
    return jax.lax.concatenate([jax.lax.expand_dims(x, (axis,)) for x in arrays], axis)


def _window_maximum(
    x: jax.Array,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> jax.Array:
    """Takes the maximum of shifted copies: the converter loses the padding of a pooling."""
    if any(step != 1 for step in (*base_dilation, *window_dilation)):
        raise NotImplementedError("a dilated pooling has no form for ONNX")
    least = np.array(np.finfo(x.dtype).min, x.dtype)
    x = jax.lax.pad(x, least, [(low, high, 0) for low, high in padding])
    counts = [
        (side - window) // stride + 1
        for side, window, stride in zip(x.shape, window_dimensions, window_strides, strict=True)
    ]
    shifted = (
        jax.lax.slice(
            x,
            start,
            [s + (n - 1) * d + 1 for s, n, d in zip(start, counts, window_strides, strict=True)],
            window_strides,
        )
        for start in itertools.product(*map(range, window_dimensions))
    )
    return functools.reduce(jax.lax.max, shifted)


# Operations that the converter lacks or gets wrong, in ones that it has.
FORMS = {"stack": _stack, "reduce_window_max": _window_maximum}
