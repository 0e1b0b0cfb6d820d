"""Multi-scale deformable attention on TPUs ("pallas_tpu"): tables, indices, and their gradients.

XLA builds the inputs of the kernels of `quad_rows`: a table per level with one row per cell between
4 pixels, the row of every sampling point, and its position within the cell. A border of zeros makes
edge cells like all others. If the tables of a head do not fit into the chip's memory, several
passes read them by levels, and a level that is too large by bands of rows.

Letters: B batch, Q queries, S all pixels of all levels, N heads, L levels, P points, D head width,
G groups of 32 channels of a head, K samples (levels times points).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from oneformer_jax.kernels import dispatch, tpu_kernels
from oneformer_jax.kernels.ms_deform_attn import quad_rows
from oneformer_jax.kernels.ms_deform_attn.reference import (
    SpatialShapes,
    cell_coordinates,
    split_levels,
)


@dataclasses.dataclass(frozen=True)
class Band:
    """The rows of cells `start` to `stop` - 1 of a level; a map of height h has h + 1 of them."""

    level: int
    start: int
    stop: int


Pass = tuple[Band, ...]  # the tables in memory together


@dataclasses.dataclass(frozen=True)
class Settings:
    spatial_shapes: SpatialShapes
    vmem_bytes: int
    interpret: object  # hashable: False, True or pltpu.InterpretParams


def ms_deform_attn(
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    interpret=False,
    vmem_bytes: int | None = None,
) -> jax.Array:
    """As `api.ms_deform_attn`, without its checks.

    Args:
      interpret: True or `pltpu.InterpretParams()` runs the kernels on any device, slowly.
      vmem_bytes: vector memory to plan for; by default that of the chip compiled for.

    Raises:
      NotImplementedError: the device is no TPU, or a row of cells exceeds its memory.
    """
    vmem_bytes = tpu_kernels.vector_memory("ms_deform_attn", vmem_bytes, interpret)
    settings = Settings(spatial_shapes, vmem_bytes, interpret)
    points = sampling_locations.shape[4]
    out = 0
    for first in range(0, points, quad_rows.MAX_SAMPLES):
        part = slice(first, first + quad_rows.MAX_SAMPLES)
        out += _attend(
            settings, value, sampling_locations[..., part, :], attention_weights[..., part]
        )
    return out.astype(value.dtype)


def plan(shapes: SpatialShapes, points: int, vmem_bytes: int, copies: int) -> list[Pass]:
    """Splits the tables into passes that fit.

    Args:
      shapes: (h, w) per level.
      points: sampling points per level.
      vmem_bytes: vector memory of the chip.
      copies: number of arrays of a table's size in memory: 1 forward, 2 backward.

    Raises:
      NotImplementedError: one row of cells is too large.
    """
    budget = (vmem_bytes - quad_rows.VMEM_RESERVE) // (copies * quad_rows.ROW_BYTES)
    passes, current, used = [], [], 0
    for level, (h, w) in enumerate(shapes):
        most = (budget // quad_rows.SUBLANES * quad_rows.SUBLANES - 1) // (w + 1)  # rows of cells
        if most < 1:
            raise NotImplementedError(
                f"ms_deform_attn: 'pallas_tpu' needs {copies * quad_rows.ROW_BYTES * (w + 9)} "
                f"bytes for one row of level {level} of spatial_shapes {shapes}, but "
                f"{max(budget, 0) * copies * quad_rows.ROW_BYTES} of {vmem_bytes} bytes of vector "
                "memory are free; use 'xla'"
            )
        whole = Band(level, 0, h + 1)
        rows = _rows(shapes, whole)
        fits = h + 1 <= most
        full = _padded(used + rows) > budget or (len(current) + 1) * points > quad_rows.MAX_SAMPLES
        if current and (full or not fits):
            passes.append(tuple(current))
            current, used = [], 0
        if fits:
            current.append(whole)
            used += rows
        else:
            height = -(-(h + 1) // -(-(h + 1) // most))  # bands of about equal height
            passes += [
                (Band(level, start, min(start + height, h + 1)),)
                for start in range(0, h + 1, height)
            ]
    if current:
        passes.append(tuple(current))
    return passes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, value, locations, weights) -> jax.Array:
    """float32 [B, Q, N * D]."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    tile = _tile(locations)
    cells, points = _samples(settings.spatial_shapes, tile, locations, weights)
    out = 0
    passes = plan(settings.spatial_shapes, locations.shape[4], settings.vmem_bytes, copies=1)
    for bands in passes:
        out += _forward(
            settings,
            tile,
            *_select(settings.spatial_shapes, bands, cells, points),
            _table(settings.spatial_shapes, bands, value),
        )
    # [B * N * G, 32, Q] -> [B, Q, N * D]
    out = out.reshape(batch, heads, -1, out.shape[-1])[:, :, :width, :queries]
    return out.transpose(0, 3, 1, 2).reshape(batch, queries, heads * width)


def _attend_forward(settings, value, locations, weights):
    # The backward pass builds the tables again: they are 4 times as large as the values.
    return _attend(settings, value, locations, weights), (value, locations, weights)


def _attend_backward(settings, residuals, gradient):
    value, locations, weights = residuals
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    shapes = settings.spatial_shapes
    tile = _tile(locations)
    cells, points = _samples(shapes, tile, locations, weights)

    # [B, Q, N * D] -> [B * N * G, 32, Q], padded with zeros
    gradient = gradient.reshape(batch, queries, heads, width).transpose(0, 2, 3, 1)
    padding = (_padded_width(width) - width, points.shape[-1] - queries)
    gradient = jnp.pad(gradient, ((0, 0), (0, 0), *((0, n) for n in padding)))
    gradient = gradient.reshape(-1, quad_rows.CHANNELS, gradient.shape[-1])

    value = value.astype(jnp.float32)  # makes the sums of its gradient float32
    d_value, d_levels = 0, {}
    for bands in plan(shapes, locations.shape[4], settings.vmem_bytes, copies=2):
        table, pull_back = jax.vjp(functools.partial(_table, shapes, bands), value)
        d_chosen, d_table = _backward(
            settings, tile, len(bands), *_select(shapes, bands, cells, points), table, gradient
        )
        d_value += pull_back(d_table)[0]
        d_chosen = d_chosen.reshape(points.shape[0], -1, *d_chosen.shape[1:]).sum(1)
        d_levels[bands[0].level] = d_levels.get(bands[0].level, 0) + d_chosen
    d_points = jnp.concatenate(list(d_levels.values()), axis=2)  # passes follow the levels
    _, pull_back = jax.vjp(
        lambda locations, weights: _samples(shapes, tile, locations, weights)[1], locations, weights
    )
    return d_value.astype(residuals[0].dtype), *pull_back(d_points)


_attend.defvjp(_attend_forward, _attend_backward)


def _samples(shapes: SpatialShapes, tile: int, locations, weights) -> tuple[jax.Array, jax.Array]:
    """Finds the table row of every sampling point, and its position in the cell.

    Returns:
      int32 [B * N, K, Q] in 0..(h+1)*(w+1)-1 for all locations, and float32 [B * N, 3, K, Q]:
      fraction along x, along y, weight. Points of weight 0 pad Q to whole tiles.
    """
    batch, queries, heads, levels, points = weights.shape
    padding = ((0, 0),) * 4 + ((0, -queries % tile),)
    # Queries last: they fill the lanes.
    locations = jnp.pad(jnp.moveaxis(locations, 1, -2), (*padding, (0, 0)))
    weights = jnp.pad(jnp.moveaxis(weights, 1, -1).astype(jnp.float32), padding)
    rows, places = [], []
    for level, (h, w) in enumerate(shapes):
        cell, fraction, weight = cell_coordinates(
            locations[:, :, level], weights[:, :, level], (h, w)
        )
        rows.append((cell[..., 1] + 1) * (w + 1) + cell[..., 0] + 1)
        places.append(jnp.stack([fraction[..., 0], fraction[..., 1], weight], axis=2))
    rows = jnp.concatenate(rows, axis=2).reshape(batch * heads, levels * points, -1)
    places = jnp.concatenate(places, axis=3).reshape(batch * heads, 3, levels * points, -1)
    return rows, places


def _select(shapes: SpatialShapes, bands: Pass, cells, points) -> tuple[jax.Array, jax.Array]:
    """Selects the samples of a pass, with rows of its table; others get a row of zeros."""
    count = cells.shape[1] // len(shapes)
    chosen = []
    first = 0
    for band in bands:
        w = shapes[band.level][1]
        rows = cells[:, band.level * count : (band.level + 1) * count] - band.start * (w + 1)
        size = _rows(shapes, band)
        if size < (shapes[band.level][0] + 1) * (w + 1):  # then the band is the whole pass
            rows = jnp.where((rows >= 0) & (rows < size), rows, size)
        chosen.append(rows + first)
        first += size
    levels = slice(bands[0].level * count, (bands[-1].level + 1) * count)
    return jnp.concatenate(chosen, axis=1), points[:, :, levels]


def _table(shapes: SpatialShapes, bands: Pass, value) -> jax.Array:
    """[B, S, N, D] -> float32 [B * N * G, R, 128]; at least the last row is zero."""
    batch, _, heads, width = value.shape
    levels = split_levels(value.astype(jnp.float32), shapes)
    tables = []
    for band in bands:
        h, w = shapes[band.level]
        x = levels[band.level].transpose(0, 2, 1, 3)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, _padded_width(width) - width)))
        x = x.reshape(batch * heads, h, w, -1, quad_rows.CHANNELS).transpose(0, 3, 1, 2, 4)
        x = x.reshape(-1, h, w, quad_rows.CHANNELS)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, band.start : band.stop + 1]
        height = band.stop - band.start
        x = jnp.concatenate(
            [x[:, dy : dy + height, dx : dx + w + 1] for dy, dx in quad_rows.CORNERS], axis=-1
        )
        tables.append(x.reshape(x.shape[0], -1, quad_rows.LANES))
    table = jnp.concatenate(tables, axis=1)
    rows = table.shape[1]
    return jnp.pad(table, ((0, 0), (0, _padded(rows) - rows), (0, 0)))


def _rows(shapes: SpatialShapes, band: Band) -> int:
    return (band.stop - band.start) * (shapes[band.level][1] + 1)


def _padded(rows: int) -> int:
    """Rows of a table: one of zeros at least, and a multiple of 8."""
    return (rows // quad_rows.SUBLANES + 1) * quad_rows.SUBLANES


def _tile(locations) -> int:
    """Tile size for both directions and all passes, whose padding must agree."""
    _, queries, _, levels, points, _ = locations.shape
    return quad_rows.tile_size(queries, min(levels * points, quad_rows.MAX_SAMPLES))


def _padded_width(width: int) -> int:
    return tpu_kernels.round_up(width, quad_rows.CHANNELS)


def _forward(settings: Settings, tile: int, cells, points, table) -> jax.Array:
    order = quad_rows.scalar_order(cells, tile)
    return dispatch.merge_mapped_axes(
        functools.partial(
            quad_rows.forward,
            tile=tile,
            vmem_bytes=settings.vmem_bytes,
            interpret=settings.interpret,
        )
    )(order, points, table)


def _backward(settings: Settings, tile: int, levels: int, cells, points, table, gradient):
    order = quad_rows.scalar_order(2 * cells, tile)
    return dispatch.merge_mapped_axes(
        functools.partial(
            quad_rows.backward,
            levels=levels,
            tile=tile,
            vmem_bytes=settings.vmem_bytes,
            interpret=settings.interpret,
        )
    )(order, cells, points, table, gradient)
