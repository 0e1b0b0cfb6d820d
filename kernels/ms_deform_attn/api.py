"""The one door to multi-scale deformable attention: checks, choice of implementation, sharding."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oneformer_jax.kernels import choice, dispatch
from oneformer_jax.kernels.ms_deform_attn.dense import ms_deform_attn_dense
from oneformer_jax.kernels.ms_deform_attn.reference import (
    SpatialShapes,
    ms_deform_attn_chunks,
    ms_deform_attn_gather,
)

# A query's row of the dense matrix, float32 over all pixels of all levels, may take 4 KiB per head:
# 1024 pixels, which square images of up to 216 pixels have at the strides 32, 16 and 8. Beyond
# that the matrix, which grows with the square of the pixels, costs more memory than it saves time.
DENSE_MAX_ROW_BYTES = 4096


IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")


# The forms of "xla", of which `xla_form` takes one.
XLA_FORMS = {
    "dense": ms_deform_attn_dense,
    "chunks": ms_deform_attn_chunks,
    "gather": ms_deform_attn_gather,
}


def xla_form(spatial_shapes: SpatialShapes) -> str:
    """Chooses matrix products for small maps, else gathers in the platform's best form."""
    if fits_dense(spatial_shapes):
        return "dense"
    return "chunks" if dispatch.platform() == "cpu" else "gather"


def fits_dense(spatial_shapes: SpatialShapes) -> bool:
    """Tells whether maps are small enough for the dense form."""
    return 4 * sum(h * w for h, w in spatial_shapes) <= DENSE_MAX_ROW_BYTES


def load(implementation: str) -> Callable[..., jax.Array]:
    """Returns the function of an implementation, or of one of its forms, as "xla/gather"."""
    name, _, form = implementation.partition("/")
    if name == "xla":
        return XLA_FORMS[form] if form else _xla
    run = dispatch.load("ms_deform_attn", name, "ms_deform_attn")
    return functools.partial(run, backend=form) if form else run


def _xla(value, spatial_shapes, sampling_locations, attention_weights):
    run = XLA_FORMS[xla_form(spatial_shapes)]
    return run(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    implementation: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Sums weighted bilinear samples from several maps (Deformable DETR, arXiv 2010.04159).

    Pixel i of an axis of n pixels has its centre at (i + 0.5) / n; outside of the map the value is
    zero (the convention of PyTorch's `grid_sample` with zero padding and align_corners False). A
    NaN location counts as outside. The result is differentiable in `value`, `sampling_locations`
    and `attention_weights`; sampling, sums and the scatter of the value's gradient are float32.

    Letters: B batch, Q queries, S pixels, N heads, L levels, P points, D head width.

    Args:
      value: float32 or bfloat16 [B, S, N, D]; the levels' maps, flattened by rows, one after
        another: S = sum of h * w.
      spatial_shapes: L static pairs (h, w).
      sampling_locations: float32 [B, Q, N, L, P, 2], (x, y) over the map of its level: 0 is the
        left or upper edge, 1 the right or lower edge.
      attention_weights: float32 or bfloat16 [B, Q, N, L, P].
      implementation: "xla" (plain JAX, any device), "pallas_tpu", "pallas_gpu", or "auto" (see
        `oneformer_jax.kernels.choice`). A named one is never replaced by another one.
      mesh: the mesh over all of whose axes the batch is split. Each device then works on its own
        images, without communication. The compiler splits "xla" by itself, but not the kernels:
        under a sharded `jit` they need the mesh, here or set by `jax.set_mesh`. Axes that are
        already manual, as within a `shard_map` of the caller, are left alone.

    Returns:
      [B, Q, N * D] in the dtype of `value`.

    Raises:
      ValueError: shapes that do not fit together, a wrong dtype, an unknown implementation, or a
        batch that the mesh does not divide.
      NotImplementedError: the named implementation does not take this case; says which limit.
    """
    shapes = _check(value, spatial_shapes, sampling_locations, attention_weights)
    arrays = (value, sampling_locations, attention_weights)
    implementation = choice.choose(
        "ms_deform_attn", implementation, IMPLEMENTATIONS, arrays, mesh=mesh, spatial_shapes=shapes
    )
    run = load(implementation)

    def call(value, locations, weights):
        return run(value, shapes, locations, weights)

    if mesh is not None or not implementation.startswith("xla"):
        call = dispatch.split_batch("ms_deform_attn", "value", call, 3, mesh, value.shape[0])
    return call(*arrays)


def _check(value, spatial_shapes, sampling_locations, attention_weights) -> SpatialShapes:
    """The shapes as a tuple of int pairs; ValueError if the arguments do not fit together."""
    check, half = functools.partial(dispatch.check_array, "ms_deform_attn"), jnp.bfloat16
    check("value", value, "[B, S, N, D]", jnp.float32, half)
    check("sampling_locations", sampling_locations, "[B, Q, N, L, P, 2]", jnp.float32)
    check("attention_weights", attention_weights, "[B, Q, N, L, P]", jnp.float32, half)
    try:
        shapes = tuple((operator.index(h), operator.index(w)) for h, w in spatial_shapes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"ms_deform_attn: spatial_shapes must be static pairs (h, w), got {spatial_shapes!r}"
        ) from error
    if not shapes or min(min(shape) for shape in shapes) < 1:
        raise ValueError(
            f"ms_deform_attn: spatial_shapes must hold positive sizes, got {spatial_shapes!r}"
        )
    pixels = sum(h * w for h, w in shapes)
    if value.shape[1] != pixels:
        raise ValueError(
            f"ms_deform_attn: value has {value.shape[1]} pixels (axis 1) but "
            f"spatial_shapes {shapes} add up to {pixels}"
        )
    batch, _, heads, _ = value.shape
    _, queries, _, _, points, _ = sampling_locations.shape
    expected = (batch, queries, heads, len(shapes), points, 2)
    if sampling_locations.shape != expected:
        raise ValueError(
            f"ms_deform_attn: sampling_locations must be {expected} for value {value.shape} and "
            f"{len(shapes)} spatial_shapes, got {sampling_locations.shape}"
        )
    if attention_weights.shape != expected[:-1]:
        raise ValueError(
            f"ms_deform_attn: attention_weights must be {expected[:-1]} for sampling_locations "
            f"{sampling_locations.shape}, got {attention_weights.shape}"
        )
    return shapes
