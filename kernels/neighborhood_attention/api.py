"""The one door to neighbourhood attention: checks, choice of implementation, sharding."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oneformer_jax.kernels import choice, dispatch
from oneformer_jax.kernels.neighborhood_attention import reference

IMPLEMENTATIONS = ("xla", "pallas_tpu")


def load(implementation: str) -> Callable[..., jax.Array]:
    """Returns the function of an implementation."""
    if implementation == "xla":
        return reference.neighborhood_attention
    return dispatch.load("neighborhood_attention", implementation, "neighborhood_attention")


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rpb: jax.Array,
    *,
    kernel_size: int,
    dilation: int = 1,
    implementation: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Attends from each pixel to the kernel_size x kernel_size pixels around it.

    Along each axis a query at position i sees the positions of its residue class, p = i modulo the
    dilation, and among them the `kernel_size` nearest; at the borders this window moves inwards, so
    it never holds fewer. The rule is that of NATTEN 0.14. The result is differentiable in all four
    arrays; logits, softmax and sums are float32. Products of float32 arrays follow
    `jax.default_matmul_precision`, as all products of JAX do: on a TPU they are rounded to bfloat16
    unless it says otherwise.

    Letters: B batch, H W map, N heads, D head width.

    Args:
      query: float32 or bfloat16 [B, H, W, N, D]; it is scaled by D**-0.5 here.
      key: as `query`.
      value: as `query`.
      rpb: float32 or bfloat16 [N, 2 * kernel_size - 1, 2 * kernel_size - 1], what is added to the
        logit of a key at (rows, columns) = index - (kernel_size - 1) from the query, in steps of
        the dilation.
      kernel_size: edge of the neighbourhood, odd.
      dilation: distance between neighbours.
      implementation: "xla" (plain JAX, any device), "pallas_tpu", or "auto" (see
        `oneformer_jax.kernels.choice`). A named one is never replaced by another one.
      mesh: the mesh over all of whose axes the batch is split. Each device then works on its own
        images; only the gradient of `rpb` is added up. The compiler splits "xla" by itself, but not
        the kernel: under a sharded `jit` it needs the mesh, here or set by `jax.set_mesh`. Axes
        that are already manual, as within a `shard_map` of the caller, are left alone.

    Returns:
      [B, H, W, N, D] in the dtype of `value`.

    Raises:
      ValueError: shapes that do not fit together, a wrong dtype, a map smaller than the
        neighbourhood (pad it), an unknown implementation, or a batch that the mesh does not divide.
      NotImplementedError: the named implementation does not take this case; says which limit.
    """
    _check(query, key, value, rpb, kernel_size, dilation)
    implementation = choice.choose(
        "neighborhood_attention",
        implementation,
        IMPLEMENTATIONS,
        (query, key, value, rpb),
        shared=1,
        mesh=mesh,
        kernel_size=kernel_size,
        dilation=dilation,
    )
    run = load(implementation)

    def call(*arrays):
        return run(*arrays, kernel_size=kernel_size, dilation=dilation)

    if mesh is not None or implementation != "xla":
        call = dispatch.split_batch(
            "neighborhood_attention", "query", call, 3, mesh, query.shape[0], shared=1
        )
    return call(query, key, value, rpb)


def _check(query, key, value, rpb, kernel_size, dilation) -> None:
    for name, number in (("kernel_size", kernel_size), ("dilation", dilation)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(
                f"neighborhood_attention: {name} must be a positive integer, got {number!r}"
            )
    if kernel_size % 2 == 0:
        raise ValueError(f"neighborhood_attention: kernel_size must be odd, got {kernel_size}")
    arrays = {"query": query, "key": key, "value": value, "rpb": rpb}
    for name, array in arrays.items():
        axes = "[N, 2k-1, 2k-1]" if name == "rpb" else "[B, H, W, N, D]"
        dispatch.check_array("neighborhood_attention", name, array, axes, jnp.float32, jnp.bfloat16)
    for name in ("key", "value"):
        if (arrays[name].shape, arrays[name].dtype) != (query.shape, query.dtype):
            raise ValueError(
                f"neighborhood_attention: {name} must be {query.dtype} {query.shape} as query is, "
                f"got {arrays[name].dtype} {arrays[name].shape}"
            )
    _, height, width, heads, _ = query.shape
    if min(height, width) < kernel_size * dilation:
        raise ValueError(
            f"neighborhood_attention: query is a map of {height} x {width} (axes 1 and 2), which "
            f"has no neighbourhood of {kernel_size} pixels in steps of {dilation}: pad its sides "
            f"to {kernel_size * dilation} or more"
        )
    expected = (heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
    if rpb.shape != expected:
        raise ValueError(
            f"neighborhood_attention: rpb must be {expected} for the {heads} heads of query "
            f"and kernel_size {kernel_size}, got {rpb.shape}"
        )
