"""Mask logits at the original size of their image, strip by strip, on this host's devices.

Mask logits are enlarged to the padded input, cropped to the image, and resized to the original
size. Both resizes are bilinear, so together they are one matrix per axis, built on the device from
traced sizes. Shapes therefore depend only on the padded input and on a *canvas*: the largest
original size of the batch, each side rounded up to `CANVAS_MULTIPLE`. A data set with many image
sizes compiles a handful of programs.

Images are processed one at a time, in strips of about `STRIP_PIXELS` pixels, so the largest array
on the device is [Q, strip rows, canvas width] for any batch and image height.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

# Sides of the canvas are multiples of this: few programs, at most 127 unused pixels.
CANVAS_MULTIPLE = 128
# Pixels of a strip, unless a single row has more.
STRIP_PIXELS = 1 << 17


def canvas_size(original_size: np.ndarray) -> tuple[int, int]:
    """Returns (height, width) of the canvas for images of original sizes int [B, 2]."""
    height, width = (max(1, -(-side // CANVAS_MULTIPLE)) for side in original_size.max(0).tolist())
    return height * CANVAS_MULTIPLE, width * CANVAS_MULTIPLE


def this_host(*arrays: jax.Array) -> tuple[Any, ...]:
    """Takes this host's rows of batch-sharded arrays; returns them and a mesh of its devices.

    Hosts have images of different sizes and so run different programs, which a program over the
    whole mesh would not allow. The returned arrays share one sharding over the "data" axis of the
    mesh; the mesh is None if one device holds all rows.
    """
    found = []
    for array in arrays:
        if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
            found.append([array])
            continue
        pieces: dict[int, jax.Array] = {}  # keyed by first row, to take replicas once
        for shard in array.addressable_shards:
            if shard.data.shape[1:] != array.shape[1:]:
                raise ValueError(
                    f"logits of shape {array.shape} are sharded over more than the batch axis "
                    f"({array.sharding}); shard the first axis only"
                )
            pieces.setdefault(shard.index[0].start or 0, shard.data)
        found.append([pieces[row] for row in sorted(pieces)])
    most = max(found, key=len)
    if len(most) == 1:
        return *(parts[0] for parts in found), None
    devices = [piece.devices().pop() for piece in most]
    mesh = Mesh(np.array(devices), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    joined = []
    for parts in found:
        if [d for p in parts if isinstance(p, jax.Array) for d in p.devices()] == devices:
            shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
            joined.append(jax.make_array_from_single_device_arrays(shape, sharding, parts))
        else:
            joined.append(jax.device_put(np.concatenate(jax.device_get(parts)), sharding))
    return *joined, mesh


def placement(logits: jax.Array | np.ndarray, mesh: Mesh | None, spec: P) -> Sharding | None:
    """Returns the sharding of what is used with the `logits` and the `mesh` that `this_host` gave.

    Transfers are explicit (`jax.device_put`): the training loop forbids all others.
    """
    if mesh is not None:
        return NamedSharding(mesh, spec)
    if isinstance(logits, jax.Array):
        return SingleDeviceSharding(*logits.devices())
    return None


@dataclasses.dataclass(frozen=True)
class Strips:
    """The strips of one image: `count` of them, each `rows` rows of the canvas.

    `masks(s)` gives float32 [Q, rows, W] mask logits of strip s, and bool [rows, W], False beyond
    the original image.
    """

    count: int
    rows: int
    masks: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def strip_rows(canvas: tuple[int, int]) -> int:
    """Rows of a strip, a divisor of the canvas's."""
    rows = CANVAS_MULTIPLE
    while rows > 1 and rows * canvas[1] > STRIP_PIXELS:
        rows //= 2
    return rows


def mask_strips(
    mask_logits: jax.Array,
    image_size: jax.Array,
    original_size: jax.Array,
    *,
    padded_size: tuple[int, int],
    canvas: tuple[int, int],
    flip: jax.Array | bool = False,
) -> Strips:
    """Resizes the mask logits of one image to its original size.

    Args:
      mask_logits: [Q, h, w] of the padded input.
      image_size, original_size: int [2], may be traced.
      padded_size, canvas: heights and widths.
      flip: True if the input was mirrored: the strips are mirrored back. May be traced.
    """
    weights_y, weights_x = (
        axis_weights(
            canvas[a], mask_logits.shape[1 + a], padded_size[a], image_size[a], original_size[a]
        )
        for a in (0, 1)
    )
    columns = jnp.arange(canvas[1])
    inside = columns < original_size[1]
    mirrored = jnp.where(flip & inside, original_size[1] - 1 - columns, columns)
    weights_x = weights_x[mirrored]
    rows = strip_rows(canvas)

    def masks(strip: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.lax.dynamic_slice_in_dim(weights_y, strip * rows, rows)
        half = jnp.einsum(
            "sy,qyx->qsx", weights, mask_logits.astype(jnp.float32), precision="highest"
        )
        lines = strip * rows + jnp.arange(rows)
        return (
            jnp.einsum("qsx,wx->qsw", half, weights_x, precision="highest"),
            (lines < original_size[0])[:, None] & inside,
        )

    return Strips(canvas[0] // rows, rows, masks)


def axis_weights(
    canvas: int, source: int, padded: int, crop: jax.Array, original: jax.Array
) -> jax.Array:
    """Makes the float32 [canvas, source] that resizes to padded, crops, and resizes to original.

    Rows from `original` on are zero. `crop` and `original` may be traced.
    """

    def taps(
        out_size: int | jax.Array, in_size: int | jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        scale = jnp.asarray(in_size, jnp.float32) / jnp.maximum(out_size, 1)
        position = jnp.maximum((jnp.arange(count) + 0.5) * scale - 0.5, 0.0)
        low = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, in_size - 1)
        return low, jnp.minimum(low + 1, in_size - 1), position - low

    low, high, fraction = taps(padded, source, padded)
    fraction = fraction[:, None]
    enlarge = jax.nn.one_hot(low, source) * (1 - fraction)
    enlarge += jax.nn.one_hot(high, source) * fraction
    low, high, fraction = taps(original, crop, canvas)
    fraction = fraction[:, None]
    # Positions beyond the original lie beyond the crop: clip them, then blank them.
    fraction = jnp.clip(fraction, 0.0, 1.0)
    weights = enlarge[low] * (1 - fraction) + enlarge[high] * fraction
    return jnp.where((jnp.arange(canvas) < original)[:, None], weights, 0.0)
