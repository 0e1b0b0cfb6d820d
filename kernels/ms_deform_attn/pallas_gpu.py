"""Multi-scale deformable attention on NVIDIA GPUs ("pallas_gpu"): choice of kernels, and layout.

Two sets of Pallas kernels do the work:

| backend | GPUs (compute capability) | jax | design |
|---|---|---|---|
| "mosaic" | Hopper 9.0, Blackwell 10.x | 0.11, 0.12 | quad rows, `pallas_mosaic_gpu.py` |
| "triton" | Ampere 8.0 and newer | 0.10 to 0.12 | gathers by pointers, `pallas_triton.py` |

The default is "mosaic" where it runs, else "triton", which upstream calls deprecated. The choice is
made before any compiler call, because Mosaic's compiler aborts the process for GPUs older than
Hopper, and fails for 12.x. It is unknown which is faster on Hopper: "mosaic" reads whole quad rows,
but builds tables of 4 times the size of the values; "triton" reads the values directly, with fewer
instructions. Other GPUs have plain JAX ("xla") alone.

None of this has yet run on a GPU. It has been compiled for sm_80, sm_89, sm_90a and sm_100a
(`kernels.bench`) and run in Pallas's interpreters. Run `tests/kernels/test_pallas_gpu.py -k
on_device` first on a machine with a GPU.

The gradient of a value is a sum over all points that read its pixel. By default the kernels use
atomic adds, whose order, and so whose last bits, change from run to run. With `deterministic=True`
the points are sorted by pixel (`sorted_points`), and one block adds a pixel's points in order:
equal bits in every run. A pixel with very many points is then slow, as its sum is not divided.

Letters: B batch, Q queries, S pixels, N heads, L levels, P points, D head width; K = L * P points
of a query, M = B * N * Q queries of all images and heads.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from oneformer_jax.kernels import dispatch
from oneformer_jax.kernels.ms_deform_attn.reference import (
    SpatialShapes,
    cell_coordinates,
    split_levels,
)

Backend = Literal["mosaic", "triton"]

MAX_WIDTH = 128
_MOSAIC_GENERATIONS = (9, 10)
_MOSAIC_JAX = (0, 11)


def backend_for(compute_capability: str | None, jax_version: str = jax.__version__) -> Backend:
    """Chooses the kernels for a GPU.

    Args:
      compute_capability: such as "9.0"; None for a device without one.
      jax_version: the version of jax.

    Raises:
      NotImplementedError: no kernel here runs on such a device.
    """
    capability = dispatch.nvidia_capability("ms_deform_attn", compute_capability)
    if int(capability) in _MOSAIC_GENERATIONS and _has_mosaic(jax_version):
        return "mosaic"
    return "triton"


def _has_mosaic(jax_version: str) -> bool:
    return tuple(int(part) for part in jax_version.split(".")[:2]) >= _MOSAIC_JAX


class _Call(NamedTuple):
    """The static arguments of a call."""

    spatial_shapes: SpatialShapes
    backend: Backend
    deterministic: bool
    interpret: bool


def ms_deform_attn(
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    deterministic: bool = False,
    backend: Backend | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `api.ms_deform_attn`, without its checks, on an NVIDIA GPU.

    Under `jax.vmap` the new axis joins the batch. A sharded jit cannot partition the kernels: call
    inside `jax.shard_map` with check_vma=False.

    Args:
      value: float32 or bfloat16 [B, S, N, D], D of at most 128.
      deterministic: give gradients of equal bits in every run; costs a sort of all points.
      backend: None for that of the GPU that is traced for (see `backend_for`).
      interpret: run the kernels in Pallas's interpreter, on any device; needs `backend`.

    Raises:
      NotImplementedError: the device, the version of jax, the head width, the dtype or the size is
        not supported.
      ValueError: an unknown backend, or none for the interpreter.
    """
    shapes = tuple(spatial_shapes)
    _check_limits(value, shapes, sampling_locations)
    call = _Call(shapes, _checked_backend(backend, interpret), deterministic, interpret)
    out = _attend(call, value, sampling_locations, attention_weights)
    return out.reshape(*out.shape[:2], -1)


def _checked_backend(backend: Backend | None, interpret: bool) -> Backend:
    if backend not in (None, "mosaic", "triton"):
        raise ValueError(f"ms_deform_attn: unknown backend {backend!r}; use 'mosaic' or 'triton'")
    if interpret and backend is None:
        raise ValueError("ms_deform_attn: interpret=True needs backend='mosaic' or 'triton'")
    if backend == "mosaic" and not _has_mosaic(jax.__version__):
        raise NotImplementedError(
            "ms_deform_attn: backend='mosaic' needs jax 0.11 or newer, not "
            f"{jax.__version__}; use backend='triton'"
        )
    if interpret:
        return backend
    capability = dispatch.compute_capability()
    best = backend_for(capability)
    if backend == "mosaic" != best:
        raise NotImplementedError(
            "ms_deform_attn: backend='mosaic' needs a GPU of compute capability 9.0 or 10.x, not "
            f"{capability}; use backend='triton'"
        )
    return backend or best


def _check_limits(value, shapes, locations):
    batch, _, heads, width = value.shape
    if not 1 <= width <= MAX_WIDTH:
        raise NotImplementedError(
            f"ms_deform_attn: pallas_gpu takes a head width of 1 to {MAX_WIDTH}, not {width} "
            f"(value {value.shape}); use implementation='xla'"
        )
    if value.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"ms_deform_attn: pallas_gpu takes values of float32 or bfloat16, not {value.dtype}; "
            "use implementation='xla'"
        )
    # Kernels index arrays in int32. The largest are the quad rows, the corners' shares and the
    # output.
    quads = 4 * width * batch * heads * _rows(shapes)
    largest = max(quads, 2 * locations.size, locations.shape[1] * batch * heads * width)
    if largest >= 2**31:
        raise NotImplementedError(
            f"ms_deform_attn: pallas_gpu takes arrays of less than 2**31 numbers, not {largest} "
            f"(value {value.shape}, sampling_locations {locations.shape}); split the batch"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, value, locations, weights) -> jax.Array:
    """[B, Q, N, D]."""
    return dispatch.merge_mapped_axes(functools.partial(_forward, call))(value, locations, weights)


def _attend_forward(call, value, locations, weights):
    # The gradient forms tables and points again: they are several times as large as the arguments.
    return _attend(call, value, locations, weights), (value, locations, weights)


def _attend_backward(call, arguments, gradient):
    backward = dispatch.merge_mapped_axes(functools.partial(_backward, call))
    gradients = backward(*arguments, gradient)
    return tuple(g.astype(x.dtype) for g, x in zip(gradients, arguments, strict=True))


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(call: _Call, value, locations, weights):
    """[B, Q, N, D] in the dtype of `value`."""
    kernels = _kernels(call.backend)
    if call.backend == "triton":
        return kernels.forward(
            value, call.spatial_shapes, locations, weights, interpret=call.interpret
        )
    factor, index = quad_points(locations, weights, call.spatial_shapes)
    table = quad_table(value, call.spatial_shapes)
    out = kernels.quad_sum(index, factor, table, interpret=call.interpret)
    batch, queries, heads = weights.shape[:3]
    return jnp.swapaxes(out.reshape(batch, heads, queries, -1), 1, 2)


def _backward(call: _Call, value, locations, weights, gradient):
    """Gradients in value (float32), locations and weights."""
    kernels = _kernels(call.backend)
    points = functools.partial(quad_points, spatial_shapes=call.spatial_shapes)
    rows_gradient = jnp.swapaxes(gradient, 1, 2).reshape(-1, gradient.shape[-1])
    if call.backend == "triton":
        d_value, d_locations, d_weights = kernels.backward(
            value,
            call.spatial_shapes,
            locations,
            weights,
            gradient,
            scatter=not call.deterministic,
            interpret=call.interpret,
        )
        if d_value is not None:
            return d_value, d_locations, d_weights
        factor, index = points(locations, weights)
    else:
        factor, pull_back, index = jax.vjp(points, locations, weights, has_aux=True)
        d_factor, d_table = kernels.quad_sum_gradients(
            index,
            factor,
            quad_table(value, call.spatial_shapes),
            rows_gradient,
            scatter=not call.deterministic,
            interpret=call.interpret,
        )
        d_locations, d_weights = pull_back(d_factor)
    if call.deterministic:
        rows = value.shape[0] * value.shape[2] * _rows(call.spatial_shapes)
        d_table = kernels.segment_sum(
            *sorted_points(index, factor, rows), rows_gradient, interpret=call.interpret
        )
    # The table is linear in the values.
    to_value = jax.linear_transpose(
        functools.partial(quad_table, spatial_shapes=call.spatial_shapes),
        jax.ShapeDtypeStruct(value.shape, jnp.float32),
    )
    return *to_value(d_table), d_locations, d_weights


def _kernels(backend: Backend):
    # Imported here: upstream may move both APIs, and a CPU needs neither.
    if backend == "triton":
        from oneformer_jax.kernels.ms_deform_attn import pallas_triton as kernels
    else:
        from oneformer_jax.kernels.ms_deform_attn import pallas_mosaic_gpu as kernels
    return kernels


def _rows(spatial_shapes: SpatialShapes) -> int:
    """Quad rows of one image and head: a cell between pixels, or between a pixel and the border."""
    return sum((h + 1) * (w + 1) for h, w in spatial_shapes)


def quad_table(value: jax.Array, spatial_shapes: SpatialShapes) -> jax.Array:
    """Builds the quad rows: row (y, x) of a level holds the pixels (y, x) to (y + 1, x + 1).

    y is -1..h-1 and x is -1..w-1; pixels outside are zero, so zero padding needs no masks.

    Args:
      value: [B, S, N, D].
      spatial_shapes: L pairs (h, w).

    Returns:
      [B * N * rows, 4, D] in the dtype of `value`; the corners are (y, x), (y, x + 1), (y + 1, x),
      (y + 1, x + 1). Images are outermost, then heads, levels, y and x.
    """
    batch, _, heads, width = value.shape
    levels = []
    for (h, w), pixels in zip(spatial_shapes, split_levels(value, spatial_shapes), strict=True):
        pixels = jnp.moveaxis(pixels.reshape(batch, h, w, heads, width), 3, 1)
        pixels = jnp.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        quads = [
            pixels[:, :, y : y + h + 1, x : x + w + 1] for y, x in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
        levels.append(jnp.stack(quads, axis=4).reshape(batch, heads, -1, 4, width))
    return jnp.concatenate(levels, axis=2).reshape(-1, 4, width)


def quad_points(
    locations: jax.Array, weights: jax.Array, spatial_shapes: SpatialShapes
) -> tuple[jax.Array, jax.Array]:
    """Finds the quad row of each point, and the shares of its corners in the result.

    Args:
      locations: float32 [B, Q, N, L, P, 2].
      weights: float32 or bfloat16 [B, Q, N, L, P].
      spatial_shapes: L pairs (h, w).

    Returns:
      factor float32 [M, 4, K], 0 for points outside, and index int32 [M, K], a row of `quad_table`
      for every location.
    """
    batch, _, heads = weights.shape[:3]
    locations, weights = jnp.swapaxes(locations, 1, 2), jnp.swapaxes(weights, 1, 2)
    start = _rows(spatial_shapes) * jnp.arange(batch * heads, dtype=jnp.int32)
    start = start.reshape(batch, heads, 1, 1)
    factors, indices = [], []
    for level, (h, w) in enumerate(spatial_shapes):
        at = locations[:, :, :, level]
        cell, fraction, weight = cell_coordinates(
            at, weights[:, :, :, level].astype(jnp.float32), (h, w)
        )
        # Points outside go to the nearest row, not all to one: they add zeros to its gradient, but
        # additions to one row wait for each other.
        size = jnp.array([w, h], jnp.float32)
        pixel = jnp.nan_to_num(lax.stop_gradient(at)) * size - 0.5
        nearest = jnp.clip(pixel, -1, size - 1).astype(jnp.int32)
        outside = jnp.any((pixel <= -1) | (pixel >= size), axis=-1, keepdims=True)
        x, y = jnp.moveaxis(jnp.where(outside, nearest, cell), -1, 0)
        indices.append(start + (y + 1) * (w + 1) + (x + 1))
        start += (h + 1) * (w + 1)
        along_x, along_y = ((1 - f, f) for f in jnp.moveaxis(fraction, -1, 0))
        factors.append(
            jnp.stack([weight * share_y * share_x for share_y in along_y for share_x in along_x], 3)
        )
    index, factor = jnp.concatenate(indices, axis=3), jnp.concatenate(factors, axis=4)
    return factor.reshape(-1, 4, index.shape[-1]), index.reshape(-1, index.shape[-1])


def sorted_points(
    index: jax.Array, factor: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts the points by the row that they read; points of one row keep a fixed order.

    Args:
      index: int32 [M, K], in 0..rows-1.
      factor: float32 [M, 4, K]. Points whose factors are all zero are left out.
      rows: rows of the table.

    Returns:
      query int32 [M * K] and factor float32 [M * K, 4] of each point, and starts int32 [rows + 1],
      the start of each row's points; omitted points are at the end.
    """
    points = index.shape[1]
    row = jnp.where(jnp.any(factor != 0, axis=1), index, rows).reshape(-1)
    row, order = lax.sort((row, lax.iota(jnp.int32, row.size)), num_keys=1, is_stable=True)
    starts = jnp.searchsorted(row, jnp.arange(rows + 1, dtype=jnp.int32)).astype(jnp.int32)
    factor = jnp.swapaxes(factor, 1, 2).reshape(-1, 4)
    return order // points, factor.at[order].get(mode="promise_in_bounds"), starts
