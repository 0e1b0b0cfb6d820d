"""Point sampling on TPUs ("pallas_tpu"): inputs and outputs of the kernels of `band_rows`.

XLA finds the 2 x 2 pixels of every point and their shares. If 128 channels of a map do not fit into
the chip's memory, the map is split into bands of rows. Every band runs over all points, but adds
only to those that start in its rows.

Letters: B images, P points, D channels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from oneformer_jax.kernels import dispatch, tpu_kernels
from oneformer_jax.kernels.point_sampling import band_rows
from oneformer_jax.kernels.point_sampling.band_rows import LANES, VMEM_RESERVE


def forward(
    features: jax.Array, points: jax.Array, *, interpret=False, vmem_bytes: int | None = None
) -> jax.Array:
    """As `reference.forward`.

    Args:
      features: float32 or bfloat16 [B, h, w, D].
      points: float32 [B, P, 2].
      interpret: True or `pltpu.InterpretParams()` runs the kernel on any device, slowly.
      vmem_bytes: vector memory to plan for; by default that of the chip compiled for.

    Raises:
      NotImplementedError: the device is no TPU, or two rows of the map exceed its memory.
    """
    vmem_bytes = tpu_kernels.vector_memory("sample_features", vmem_bytes, interpret)
    _, height, width, depth = features.shape
    packed = features.dtype == jnp.bfloat16
    features = _padded(features, even=packed)
    columns = features.shape[2]
    tile = band_rows.tile_size(points.shape[1])
    places = _places(points, height, width, tile)
    out = 0
    for start, stop in bands(features.shape[1], columns, features.dtype.itemsize, vmem_bytes):
        table = features[:, start:stop].reshape(len(points), -1, features.shape[-1])
        index, *shares = _of_band(*places, start, stop, columns)
        if packed:
            index, weights = _pairs(index, *shares, table.shape[1], columns)
        else:
            weights = _products(*shares)
        out += dispatch.merge_mapped_axes(
            functools.partial(
                band_rows.forward,
                points=points.shape[1],
                width=columns,
                tile=tile,
                vmem_bytes=vmem_bytes,
                interpret=interpret,
            )
        )(index, weights, table)
    return out[..., :depth]


def backward(
    points: jax.Array,
    gradient: jax.Array,
    like: jax.ShapeDtypeStruct,
    *,
    interpret=False,
    vmem_bytes: int | None = None,
) -> jax.Array:
    """As `reference.backward`, with `interpret` and `vmem_bytes` of `forward`."""
    vmem_bytes = tpu_kernels.vector_memory("sample_features", vmem_bytes, interpret)
    _, height, width, depth = like.shape
    rows, columns = max(height, 2), max(width, 2)
    tile = band_rows.tile_size(points.shape[1])
    places = _places(points, height, width, tile)
    gradient = jnp.pad(gradient.astype(jnp.float32), ((0, 0), (0, 0), (0, -depth % LANES)))
    parts = bands(rows, columns, 4, vmem_bytes)
    out = None
    for start, stop in parts:
        index, *shares = _of_band(*places, start, stop, columns)
        pixels = (stop - start) * columns
        band = dispatch.merge_mapped_axes(
            functools.partial(
                band_rows.backward,
                # Neighbouring bands share a row; its two gradients are added before rounding.
                dtype=like.dtype if len(parts) == 1 else jnp.float32,
                pixels=pixels + -pixels % 16,
                width=columns,
                tile=tile,
                vmem_bytes=vmem_bytes,
                interpret=interpret,
            )
        )(index, _products(*shares), gradient)
        band = band[:, :pixels].reshape(len(points), stop - start, columns, -1)
        if out is None:
            out = jnp.pad(band, ((0, 0), (0, rows - stop), (0, 0), (0, 0)))
        else:
            out = out.at[:, start:stop].add(band)
    return out[:, :height, :width, :depth].astype(like.dtype)


def bands(height: int, width: int, itemsize: int, vmem_bytes: int) -> list[tuple[int, int]]:
    """Returns (first, end) rows of the bands; each begins with the last row of the one before.

    Args:
      height, width: size of the map, at least 2 each.
      itemsize: bytes of a channel of a pixel.
      vmem_bytes: vector memory of the chip.

    Raises:
      NotImplementedError: two rows are too large.
    """
    row_bytes = width * LANES * itemsize
    free = max(vmem_bytes - VMEM_RESERVE, 0)
    most = free // row_bytes
    if most < 2:
        raise NotImplementedError(
            f"sample_features: 'pallas_tpu' needs {2 * row_bytes} bytes for two rows of a map of "
            f"width {width}, but {free} of {vmem_bytes} bytes of vector memory are free; use 'xla'"
        )
    count = -(-(height - 1) // (most - 1))
    step = -(-(height - 1) // count)
    return [(start, min(start + step, height - 1) + 1) for start in range(0, height - 1, step)]


def _padded(features: jax.Array, even: bool) -> jax.Array:
    """Pads to at least 2 x 2 pixels (2 x 4 if rows must be even), and whole 128 channels."""
    _, height, width, depth = features.shape
    columns = max(width + width % 2, 4) if even else max(width, 2)
    padding = (max(2 - height, 0), columns - width, -depth % LANES)
    return jnp.pad(features, ((0, 0), *((0, n) for n in padding)))


def _places(points, height: int, width: int, tile: int):
    """Finds the 2 x 2 pixels of each point, all within the (padded) map.

    The share of a pixel that a point does not touch is 0.

    Returns:
      (row, column) of the upper left pixel, int32 [B, P] each, then (shares of both rows, shares of
      both columns), float32 [B, 2, P] each. Points without shares pad P to whole tiles.
    """
    points = jnp.pad(
        points, ((0, 0), (0, -points.shape[1] % tile), (0, 0)), constant_values=jnp.nan
    )
    left, across = _along(points[..., 0], width)
    top, down = _along(points[..., 1], height)
    return top, left, down, across


def _along(coordinate, size: int):
    """Finds the first of two pixels on an axis, int32 [B, P], and the shares of both, [B, 2, P]."""
    place = coordinate * size - 0.5
    inside = (place > -1) & (place < size)  # False for NaN
    place = jnp.where(inside, place, 0.0)
    first = jnp.clip(jnp.floor(place), 0, max(size - 2, 0))
    shares = jnp.stack([jnp.maximum(1 - jnp.abs(place - first - i), 0.0) for i in (0, 1)], axis=1)
    return first.astype(jnp.int32), jnp.where(inside[:, None], shares, 0.0)


def _of_band(top, left, down, across, start: int, stop: int, width: int):
    """Pixel, shares of rows and shares of columns of all points in the rows `start` to `stop` - 1.

    Points without a share in the band get pixels far from those of their neighbours, so that the
    gradient need not do them one by one.
    """
    live = (top >= start) & (top < stop - 1) & (down > 0).any(1) & (across > 0).any(1)
    rank = jnp.arange(top.shape[1]) % band_rows.GROUP
    aside = jnp.minimum(2 * rank, (stop - start - 1) * width - 2)
    index = jnp.where(live, (top - start) * width + left, aside)
    return index, jnp.where(live[:, None], down, 0.0), across


def _products(down, across) -> jax.Array:
    """Weights of all pixels of both rows: [B, 2, P], [B, N, P] -> [B, 2 * N, P]."""
    products = down[:, :, None] * across[:, None]
    return products.reshape(len(down), -1, products.shape[-1])


def _pairs(index, down, across, pixels: int, width: int):
    """Forms pairs of neighbours: index of the first of two pairs, weights of all 8 pixels."""
    pair = jnp.minimum(index // 2, (pixels - width) // 2 - 2)
    offset = index - 2 * pair  # of the first pixel with a share, within the pairs
    spread = [
        jnp.where(offset == i, across[:, 0], 0.0) + jnp.where(offset == i - 1, across[:, 1], 0.0)
        for i in range(4)
    ]
    return pair, _products(down, jnp.stack(spread, axis=1))
