"""Floating-point operations of a traced function, counted on its jaxpr.

Only matrix products and convolutions count, as is usual for utilisation; a multiply-add is two.
Loops of known length count in full and Pallas kernels by their cost estimate, whereas XLA's own
estimate sees the body of a loop once and nothing in a kernel.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import jaxprs_in_params


def count_flops(jaxpr: Any) -> float:
    """FLOPs of one call over all devices, recomputation (`remat`) included.

    A loop of unknown length counts once.

    Args:
      jaxpr: `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`.
    """
    return sum(_equation_flops(equation) for equation in _open(jaxpr).eqns)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _equation_flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        # The zeros that dilate an input are not multiplied.
        spread = math.prod(params["lhs_dilation"])
        out = math.prod(equation.outvars[0].aval.shape)
        return 2.0 * out * math.prod(kernel) / outputs / spread
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        return float(estimate.flops) if estimate is not None else 0.0
    inner = [count_flops(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner, default=0.0)
    if name == "shard_map":  # inner shapes are those of one device
        sizes = params["mesh"].shape
        return sum(inner) * math.prod(sizes[axis] for axis in params["newly_manual_axes"])
    return sum(inner)
