"""Neighbourhood attention on TPUs ("pallas_tpu"): XLA's part, and gradients.

XLA splits the map into residue classes modulo the dilation and lays out the bias by pairs of query
and key. The kernels of `tile_kernels` do the rest, on maps cut by `strips`.

Letters: B batch, H W map, N heads, D head width; A images times residue classes, R rows and S
columns of a class, G groups of heads, C = 128 lanes of the heads of a group.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from oneformer_jax.kernels import tpu_kernels
from oneformer_jax.kernels.neighborhood_attention import tile_kernels
from oneformer_jax.kernels.neighborhood_attention.strips import MAX_KEYS, Plan, plan
from oneformer_jax.kernels.neighborhood_attention.tile_kernels import Settings
from oneformer_jax.kernels.tpu_kernels import LANES

NARROWEST = 32  # lanes of the narrowest head


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rpb: jax.Array,
    *,
    kernel_size: int,
    dilation: int,
    interpret=False,
    vmem_bytes: int | None = None,
) -> jax.Array:
    """As `api.neighborhood_attention`, without its checks.

    Args:
      interpret: True or `pltpu.InterpretParams()` runs the kernels on any device, slowly.
      vmem_bytes: vector memory to plan for; by default that of the chip compiled for.

    Raises:
      NotImplementedError: the device is no TPU, or heads, neighbourhood or map are too large.
    """
    vmem_bytes = tpu_kernels.vector_memory("neighborhood_attention", vmem_bytes, interpret)
    batch, height, width, _, channels = query.shape
    if channels > LANES:
        raise NotImplementedError(
            f"neighborhood_attention: 'pallas_tpu' takes heads of up to {LANES} channels, but "
            f"those of query have {channels}; use 'xla'"
        )
    padded = max(NARROWEST, 1 << (channels - 1).bit_length())
    found = plan(height, width, kernel_size, dilation, LANES // padded)
    if found is None:
        raise NotImplementedError(
            f"neighborhood_attention: 'pallas_tpu' takes tiles of up to {MAX_KEYS} keys, but every "
            f"tile for kernel_size {kernel_size} has more; use 'xla'"
        )
    needed = tile_kernels.vmem_needed(found, batch, query.dtype.itemsize)
    if needed > vmem_bytes:
        raise NotImplementedError(
            f"neighborhood_attention: 'pallas_tpu' needs {needed} bytes of vector memory for "
            f"kernel_size {kernel_size} and dilation {dilation} on a map of {height} x {width}, "
            f"but the chip has {vmem_bytes}; use 'xla'"
        )
    return _attend(Settings(found, channels**-0.5, vmem_bytes, interpret), query, key, value, rpb)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, query, key, value, rpb) -> jax.Array:
    p = settings.plan
    qkv = [_classes(p, x) for x in (query, key, value)]
    return _map(p, tile_kernels.forward(settings, *qkv, _table(p, rpb)), query.shape)


def _attend_forward(settings, *arrays):
    return _attend(settings, *arrays), arrays


def _attend_backward(settings, arrays, gradient):
    *qkv, rpb = arrays
    p = settings.plan
    table, pull_back = jax.vjp(functools.partial(_table, p), rpb)
    # Splitting again instead of keeping the parts leaves one copy of each alive.
    *d_qkv, d_table = tile_kernels.backward(
        settings, *(_classes(p, x) for x in qkv), table, _classes(p, gradient)
    )
    return *(_map(p, x, gradient.shape) for x in d_qkv), *pull_back(d_table)


_attend.defvjp(_attend_forward, _attend_backward)


def _classes(p: Plan, x: jax.Array) -> jax.Array:
    """Brings [B, H, W, N, D] into [A, R, S, G * C]; pads the map, the heads and channels with 0."""
    batch, height, width, heads, _ = x.shape
    rows, columns = p.rows, p.columns
    groups = -(-heads // p.heads_per_group)
    x = _pad(x, {3: groups * p.heads_per_group, 4: LANES // p.heads_per_group})
    x = x.reshape(batch, height, width, groups * LANES)
    x = _pad(x, {1: rows.padded * rows.dilation, 2: columns.padded * columns.dilation})
    x = x.reshape(
        batch, rows.padded, rows.dilation, columns.padded, columns.dilation, groups * LANES
    )
    x = x.transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, rows.padded, columns.padded, groups * LANES)


def _map(p: Plan, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_classes`."""
    batch, height, width, heads, channels = shape
    x = x.reshape(batch, p.rows.dilation, p.columns.dilation, *x.shape[1:])
    x = x.transpose(0, 3, 1, 4, 2, 5)
    x = x.reshape(batch, x.shape[1] * x.shape[2], -1, x.shape[-1])[:, :height, :width]
    x = x.reshape(batch, height, width, -1, LANES // p.heads_per_group)
    return x[:, :, :, :heads, :channels]


def _table(p: Plan, rpb: jax.Array) -> jax.Array:
    """The bias: float32 [G, *tile_kernels.table_shape]."""
    heads, edge, _ = rpb.shape
    groups = -(-heads // p.heads_per_group)
    rpb = _pad(rpb.astype(jnp.float32), {0: groups * p.heads_per_group})
    offsets = sorted(set(p.columns.shifts))
    columns = p.columns.bias()
    columns = np.stack([columns[first : first + p.columns.keys] for first in offsets])
    # Letters: g groups, s stacks, n heads; o offsets, t u queries, k l keys, of rows and columns.
    table = jnp.einsum(
        "gsnpq,ktp,oluq->gosklntu",
        rpb.reshape(groups, -1, p.stack, edge, edge),
        p.rows.bias(),
        columns,
        precision=lax.Precision.HIGHEST,  # picks values without rounding them
    )
    return table.reshape(groups, *tile_kernels.table_shape(p))


def _pad(x: jax.Array, sizes: dict[int, int]) -> jax.Array:
    """Pads the end of some axes with zeros, up to a size."""
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(back for _, back in widths) else x
