"""Compiles the GPU implementations for a GPU that is not there, and reports what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kernels import gpu_aot
from kernels.ms_deform_attn import pallas_gpu
from kernels.ms_deform_attn.reference import ms_deform_attn_gather


def report(
    batch: int,
    spatial_shapes: Sequence[tuple[int, int]],
    queries: int,
    heads: int,
    width: int,
    points: int,
    dtype="bfloat16",
    *,
    target: str = "h200",
    backend: str | None = None,
    deterministic: bool = False,
) -> dict:
    """Compiles forward and backward pass for a GPU and reports registers, spills and memory.

    The backward pass is compiled alone: arguments and the output's gradient in, gradients out.

    Args:
      batch, spatial_shapes, queries, heads, width, points: sizes of the call; points per level.
      dtype: of the values, float32 or bfloat16.
      target: one of `kernels.gpu_aot.TARGETS`.
      backend: "mosaic", "triton", "xla" (the plain reference), or None for what
        `pallas_gpu.ms_deform_attn` takes on the target.
      deterministic: as for `pallas_gpu.ms_deform_attn`.

    Returns:
      {"target", "device_kind", "compute_capability", "jax", "backend", "deterministic", "forward",
      "backward"}, the last two as of `kernels.gpu_aot.serve`. Our kernels are called
      `ms_deform_attn_...`.

    Raises:
      ValueError: an unknown target or backend.
      NotImplementedError: the backend does not run on the target.
      RuntimeError: the CUDA packages are missing, or the compiler failed; its output is the text.
    """
    capability = gpu_aot.compute_capability(target)
    best = pallas_gpu.backend_for(capability)
    if backend not in (None, "mosaic", "triton", "xla"):
        raise ValueError(f"gpu_aot: unknown backend {backend!r}; use mosaic, triton or xla")
    if backend == "mosaic" and best != "mosaic":
        raise NotImplementedError(
            f"gpu_aot: Mosaic GPU of jax {jax.__version__} does not run on {target} "
            f"(compute capability {capability}); use backend='triton'"
        )
    request = dict(
        batch=batch,
        spatial_shapes=[list(shape) for shape in spatial_shapes],
        queries=queries,
        heads=heads,
        width=width,
        points=points,
        dtype=jnp.dtype(dtype).name,
        backend=backend or best,
        deterministic=deterministic,
    )
    return gpu_aot.run(__spec__.name, target, request)


def _compile_both(request: dict, compile_: Callable) -> dict:
    """In the process of its own: what `report` returns."""
    shapes = tuple((h, w) for h, w in request["spatial_shapes"])
    backend, dtype = request["backend"], jnp.dtype(request["dtype"])
    head = (request["batch"], request["queries"], request["heads"])
    pixels = sum(h * w for h, w in shapes)
    arguments = (
        jax.ShapeDtypeStruct((request["batch"], pixels, request["heads"], request["width"]), dtype),
        jax.ShapeDtypeStruct((*head, len(shapes), request["points"], 2), jnp.float32),
        jax.ShapeDtypeStruct((*head, len(shapes), request["points"]), jnp.float32),
    )
    gradient = jax.ShapeDtypeStruct((*head[:2], request["heads"] * request["width"]), dtype)

    def forward(value, locations, weights):
        if backend == "xla":
            return ms_deform_attn_gather(value, shapes, locations, weights)
        return pallas_gpu.ms_deform_attn(
            value,
            shapes,
            locations,
            weights,
            deterministic=request["deterministic"],
            backend=backend,
        )

    def backward(value, locations, weights, gradient):
        return jax.vjp(forward, value, locations, weights)[1](gradient)

    return {
        "backend": backend,
        "deterministic": request["deterministic"],
        "forward": compile_("forward", forward, arguments),
        "backward": compile_("backward", backward, (*arguments, gradient)),
    }


if __name__ == "__main__":
    gpu_aot.serve(_compile_both)
