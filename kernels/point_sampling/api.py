"""The one door to point sampling: checks, choice of implementation, sharding."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oneformer_jax.kernels import choice, dispatch

IMPLEMENTATIONS = ("xla", "pallas_tpu")


def load(implementation: str):
    """Loads the module with `forward` and `backward` of an implementation, when first used."""
    name = "reference" if implementation == "xla" else implementation
    return importlib.import_module(f"oneformer_jax.kernels.point_sampling.{name}")


def sample_features(
    features: jax.Array,
    points: jax.Array,
    *,
    implementation: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Reads feature vectors at points, bilinear, with zeros outside of the map.

    Pixel i of an axis of n pixels has its centre at (i + 0.5) / n (the convention of PyTorch's
    `grid_sample` with zero padding and align_corners False). A NaN point counts as outside. The
    result is differentiable in the features; no gradient flows to the points. All sums are float32,
    also that of the gradient.

    Args:
      features: float32 or bfloat16 [B, h, w, D].
      points: float32 [B, P, 2], (x, y) over the map: 0 is the left or upper edge, 1 the right or
        lower edge.
      implementation: "xla" (plain JAX, any device), "pallas_tpu", or "auto" (see
        `oneformer_jax.kernels.choice`). A named one is never replaced by another one.
      mesh: the mesh over all of whose axes the batch is split. Each device then works on its own
        images, without communication. The compiler splits "xla" by itself, but not the kernels:
        under a sharded `jit` they need the mesh, here or set by `jax.set_mesh`. Axes that are
        already manual, as within a `shard_map` of the caller, are left alone.

    Returns:
      float32 [B, P, D].

    Raises:
      ValueError: shapes that do not fit together, a wrong dtype, an unknown implementation, or a
        batch that the mesh does not divide.
      NotImplementedError: the named implementation does not take this case; says which limit.
    """
    _check(features, points)
    implementation = choice.choose(
        "point_sampling", implementation, IMPLEMENTATIONS, (features, points), mesh=mesh
    )
    call = functools.partial(sample, implementation)
    if mesh is not None or implementation != "xla":
        call = dispatch.split_batch("sample_features", "features", call, 2, mesh, features.shape[0])
    return call(features, points)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sample(implementation: str, features, points):
    """Returns `sample_features` of checked arguments by an implementation."""
    return load(implementation).forward(features, points)


def _sample_forward(implementation, features, points):
    # The empty slice tells the backward pass the shape and dtype without keeping the features.
    return sample(implementation, features, points), (points, features[..., :0])


def _sample_backward(implementation, residuals, gradient):
    points, empty = residuals
    like = jax.ShapeDtypeStruct((*empty.shape[:-1], gradient.shape[-1]), empty.dtype)
    return load(implementation).backward(points, gradient, like), jnp.zeros_like(points)


sample.defvjp(_sample_forward, _sample_backward)


def _check(features, points) -> None:
    check = functools.partial(dispatch.check_array, "sample_features")
    check("features", features, "[B, h, w, D]", jnp.float32, jnp.bfloat16)
    check("points", points, "[B, P, 2]", jnp.float32)
    for name, array in (("features", features), ("points", points)):
        if not all(array.shape):
            raise ValueError(f"sample_features: {name} is empty, of shape {array.shape}")
    if points.shape != (features.shape[0], points.shape[1], 2):
        raise ValueError(
            f"sample_features: points must be ({features.shape[0]}, P, 2) for features "
            f"{features.shape}, got {points.shape}"
        )
