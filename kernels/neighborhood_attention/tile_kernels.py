"""The two TPU kernels of neighbourhood attention: tiles of queries against regions of keys.

A grid step takes a strip of columns (see `strips`) with the blocks of columns around it, and does
its tiles of a few rows one after the other: matrix products and a softmax, whose logits remain in
vector memory. Bias and masks of a tile are slices of arrays that stay there.

A head is narrower than the 128 lanes of a register, so heads lie side by side as in memory. The
queries of a group of heads become the rows of one matrix, each zero outside its head's lanes, so
the product with the keys of all heads gives its own head's logits. Of the products with the values
only the lanes of a row's own head count. Logits have the keys along the rows and the queries along
the lanes, so maxima and sums over the keys are taken between registers.

The backward kernel computes the softmax again instead of keeping its sums. The steps of a group of
heads run in order. Gradients of keys and values are summed in an array of the columns around the
strip. It moves with the strips and writes out the columns that no later strip sees. The gradient of
the bias stays in vector memory. Nothing is atomic, so results do not depend on timing.

Letters: A images times residue classes, R rows and S columns of a class, G groups of heads, C = 128
lanes of the heads of a group, T queries and K keys of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from oneformer_jax.kernels.neighborhood_attention.strips import ROW_BLOCK, Cut, Plan
from oneformer_jax.kernels.tpu_kernels import LANES, SUBLANES, fill_with_zeros, launch

BLOCKED = -1e30  # added to the logit of an unseen key; finite, as a query may see none
TILES_PER_STEP = 8  # of maps that are one strip: several residue classes make a step
# Tiles in the body of a loop if a tile is one stack of heads: their schedules overlap, as those of
# several stacks do.
TILES_PER_BODY = 2
# Rows of a product: each matrix unit gets one part.
ROWS_PER_PRODUCT = 64
# Cores may share the groups of heads; the steps of one add to its arrays, in order.
ORDER = ("parallel", "arbitrary", "arbitrary")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the kernels.

    Attributes:
      plan: the cut of the map.
      scale: factor of the logits.
      vmem_bytes: vector memory of the kernels.
      interpret: as in `pl.pallas_call`; hashable.
    """

    plan: Plan
    scale: float
    vmem_bytes: int
    interpret: object


def table_shape(plan: Plan) -> tuple[int, int, int, int]:
    """Tells a group's bias: offsets of columns, stacks of heads, keys, queries of a stack.

    The keys are those of all rows of the span and of a region's columns.
    """
    stacks = plan.heads_per_group // plan.stack
    keys = plan.rows.span * plan.columns.keys
    return len(set(plan.columns.shifts)), stacks, keys, plan.stack * plan.queries


def vmem_needed(plan: Plan, batch: int, itemsize: int) -> int:
    """Bytes of the backward kernel's arrays, and of a few arrays of a tile's size."""
    step = _classes_per_step(plan, batch)
    strip = step * plan.rows.padded * plan.columns.tile * LANES
    blocks = (5 + 2 * plan.parts) * strip * itemsize  # q, dO, dq, dk, dv and keys, values
    scratch = 2 * plan.parts * strip * (itemsize + 4)
    table = 4 * math.prod(table_shape(plan))
    tile = 4 * plan.stack * plan.queries * plan.keys
    return 2 * blocks + scratch + 4 * table + 8 * tile


def forward(settings: Settings, query, key, value, table) -> jax.Array:
    """Attends within each class.

    Args:
      settings: settings of the kernels.
      query, key, value: float32 or bfloat16 [A, R, S, G * C], whole strips.
      table: float32 [G, *table_shape], the bias.

    Returns:
      As `value`.
    """
    p = settings.plan
    specs = _Specs(p, _classes_per_step(p, query.shape[0] // p.classes))
    return pl.pallas_call(
        functools.partial(_forward_kernel, settings=settings),
        name="neighborhood_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=specs.grid(query, p.columns.strips),
            in_specs=[specs.strip, *specs.parts, *specs.parts, *specs.addends],
            out_specs=specs.strip,
            scratch_shapes=[specs.region(key.dtype), specs.region(value.dtype)],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, value.dtype),
        **launch(ORDER, settings.vmem_bytes, settings.interpret),
    )(*_places(p), query, *[key] * p.parts, *[value] * p.parts, table, *_masks(p))


def backward(settings: Settings, query, key, value, table, gradient) -> tuple[jax.Array, ...]:
    """Gradients of `forward` in query, key, value and table; `gradient` is that of its result."""
    p = settings.plan
    specs = _Specs(p, _classes_per_step(p, query.shape[0] // p.classes))
    return pl.pallas_call(
        functools.partial(_backward_kernel, settings=settings),
        name="neighborhood_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            # Extra steps after the last strip write out the columns that it sees.
            grid=specs.grid(query, p.columns.strips + p.parts - 1),
            in_specs=[specs.strip, *specs.parts, *specs.parts, *specs.addends, specs.strip],
            out_specs=[specs.strip, specs.parts[0], specs.parts[0], specs.addends[0]],
            scratch_shapes=[
                specs.region(key.dtype),
                specs.region(value.dtype),
                specs.region(jnp.float32),
                specs.region(jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(key.shape, key.dtype),
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct(table.shape, jnp.float32),
        ],
        **launch(ORDER, settings.vmem_bytes, settings.interpret),
    )(*_places(p), query, *[key] * p.parts, *[value] * p.parts, table, *_masks(p), gradient)


def _classes_per_step(plan: Plan, batch: int) -> int:
    """Images and residue classes of a grid step: several if one has too few tiles."""
    if plan.columns.strips > 1:
        return 1
    most = max(1, TILES_PER_STEP // plan.rows.strips)
    return max(n for n in range(1, most + 1) if batch * plan.classes % n == 0)


def _places(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Tables of the strips of rows, and of columns, int32, flat.

    A table has the strips' masks in classes of either length, then the start of their bias.
    """
    rows = plan.rows.shifts * plan.columns.keys
    columns = np.unique(plan.columns.shifts, return_inverse=True)[1]
    return tuple(
        np.concatenate([cut.masks[0].reshape(-1), starts.reshape(-1)]).astype(np.int32)
        for cut, starts in ((plan.rows, rows), (plan.columns, columns))
    )


def _masks(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Addends of logits for rows, float32 [masks, keys, 1, queries of a stack], and columns."""

    def addend(cut: Cut, queries_before: int, queries_after: int):
        blocked = np.where(cut.masks[1], np.float32(BLOCKED), np.float32(0))
        return np.tile(np.repeat(blocked, queries_after, axis=2), queries_before)

    rows = addend(plan.rows, plan.stack, plan.columns.tile)
    return rows[:, :, None], addend(plan.columns, plan.stack * plan.rows.tile, 1)


def _first_part(plan: Plan, strip):
    """The first block of columns around a strip; past the last strip, up to the last block."""
    columns = plan.columns
    first = jnp.clip(strip - columns.before // columns.tile, 0, columns.strips - plan.parts)
    return first + jnp.maximum(strip - columns.strips + 1, 0)


class _Specs:
    """Blocks of the arrays in a grid of (groups of heads, steps of classes, strips).

    Attributes:
      strip: block of queries.
      parts: blocks of keys: the columns around a strip.
      addends: the bias and the two masks.
    """

    def __init__(self, plan: Plan, step: int):
        self.plan, self.step = plan, step
        last = plan.columns.strips - 1
        shape = (step, plan.rows.padded, plan.columns.tile, LANES)

        def part(i):
            return lambda g, a, x, *_: (a, 0, jnp.minimum(_first_part(plan, x) + i, last), g)

        self.strip = pl.BlockSpec(shape, lambda g, a, x, *_: (a, 0, jnp.minimum(x, last), g))
        self.parts = [pl.BlockSpec(shape, part(i)) for i in range(plan.parts)]
        self.addends = [
            pl.BlockSpec((None, *table_shape(plan)), lambda g, a, x, *_: (g, 0, 0, 0, 0)),
            *(
                pl.BlockSpec(mask.shape, lambda g, a, x, *_, axes=mask.ndim: (0,) * axes)
                for mask in _masks(plan)
            ),
        ]

    def grid(self, query, strips: int) -> tuple[int, int, int]:
        return query.shape[-1] // LANES, query.shape[0] // self.step, strips

    def region(self, dtype):
        """Returns the columns around a strip, of all rows, flat."""
        pixels = self.step * self.plan.rows.padded * self.plan.columns.keys
        return pltpu.VMEM((pixels, LANES), dtype)


class _Tile(NamedTuple):
    """Places of the parts of a tile.

    Attributes:
      index: its class within the step.
      rows: its rows within the strip.
      region: its keys, within those of the strip.
      offset: index of the bias, by offset of columns.
      bias: its keys, within those of the bias.
      row_mask, column_mask: indices of its masks.
    """

    index: Any
    rows: Any
    region: Any
    offset: Any
    bias: Any
    row_mask: Any
    column_mask: Any


def _forward_kernel(row_places, column_places, q_ref, *refs, settings):
    p = settings.plan
    k_parts, v_parts = refs[: p.parts], refs[p.parts : 2 * p.parts]
    *addends, out_ref, k_ref, v_ref = refs[2 * p.parts :]
    step = q_ref.shape[0]
    _join_parts(p, k_parts, k_ref)
    _join_parts(p, v_parts, v_ref)

    def attend(tile: _Tile):
        queries = _load(q_ref, tile)
        keys, values = k_ref[tile.region, :], v_ref[tile.region, :]
        out = jnp.zeros(queries.shape, jnp.float32)
        for n, heads in enumerate(_stacks(p)):
            stacked = _spread(p, queries, heads).astype(keys.dtype)
            shares = _softmax(settings, keys, stacked, _addend(p, addends, tile, n))
            out += _gather(p, _dot(shares.astype(values.dtype), values, 0, 0), heads)
        return lambda: _store(out_ref, tile, out)

    places = row_places, column_places
    _each_tile(p, places, pl.program_id(1) * step, step, pl.program_id(2), attend)


def _backward_kernel(row_places, column_places, q_ref, *refs, settings):
    p = settings.plan
    k_parts, v_parts = refs[: p.parts], refs[p.parts : 2 * p.parts]
    *addends, gradient_ref, d_q_ref, d_k_ref, d_v_ref, d_table_ref = refs[2 * p.parts : -4]
    k_ref, v_ref, d_k_sum, d_v_sum = refs[-4:]
    step = q_ref.shape[0]
    a, strip = pl.program_id(1), pl.program_id(2)

    @pl.when((a == 0) & (strip == 0))
    def _():
        for offset, stack in np.ndindex(d_table_ref.shape[:2]):
            fill_with_zeros(d_table_ref.at[offset, stack], p.columns.keys)

    @pl.when(strip == 0)
    def _():
        fill_with_zeros(d_k_sum, p.columns.keys)
        fill_with_zeros(d_v_sum, p.columns.keys)

    if p.parts > 1:

        @pl.when((strip > 0) & (_first_part(p, strip) != _first_part(p, strip - 1)))
        def _():
            _move_on(p, step, (d_k_sum, d_v_sum))

    def differentiate(tile: _Tile):
        queries, gradient = _load(q_ref, tile), _load(gradient_ref, tile)
        keys, values = k_ref[tile.region, :], v_ref[tile.region, :]
        d_queries = jnp.zeros(queries.shape, jnp.float32)
        d_keys = jnp.zeros(keys.shape, jnp.float32)
        d_values = jnp.zeros(keys.shape, jnp.float32)
        d_tables = []
        for n, heads in enumerate(_stacks(p)):
            stacked = _spread(p, queries, heads).astype(keys.dtype)
            d_out = _spread(p, gradient, heads).astype(values.dtype)
            shares = _softmax(settings, keys, stacked, _addend(p, addends, tile, n))
            d_shares = _dot(values, d_out, 1, 1)
            mean = jnp.sum(shares * d_shares, axis=0, keepdims=True)
            d_logits = shares * (d_shares - mean)
            d_tables.append(d_logits)
            d_logits = d_logits.astype(keys.dtype)
            d_queries += _gather(p, _dot(d_logits, keys, 0, 0), heads)
            d_keys += _dot(d_logits, stacked, 1, 0)
            d_values += _dot(shares.astype(values.dtype), d_out, 1, 0)

        def add():
            _store(d_q_ref, tile, d_queries * settings.scale)
            d_k_sum[tile.region, :] += d_keys * settings.scale
            d_v_sum[tile.region, :] += d_values
            for n, d_table in enumerate(d_tables):
                d_table_ref[tile.offset, n, tile.bias, :] += d_table

        return add

    @pl.when(strip < p.columns.strips)
    def _():
        _join_parts(p, k_parts, k_ref)
        _join_parts(p, v_parts, v_ref)
        _each_tile(p, (row_places, column_places), a * step, step, strip, differentiate)

    def give_up(i, rows, pixels):
        for total, ref in ((d_k_sum, d_k_ref), (d_v_sum, d_v_ref)):
            block = total[pixels, :].reshape(p.rows.tile, p.columns.keys, LANES)
            ref[i, rows] = block[:, : p.columns.tile].astype(ref.dtype)

    _each_row_block(p, step, give_up)


def _each_tile(p: Plan, places, first, step: int, strip, body):
    """Calls body(tile) for all tiles of a strip, in `step` classes from `first` on.

    The body returns a function, called later, that may write.
    """
    rows, columns = p.rows, p.columns
    row_places, column_places = places

    def locate(n) -> _Tile:
        i, y = lax.div(n, rows.strips), lax.rem(n, rows.strips)
        row_class = lax.rem(lax.div(first + i, columns.dilation), rows.dilation)
        column_class = lax.rem(first + i, columns.dilation)
        short_rows = (row_class >= rows.first_short).astype(jnp.int32)
        short_columns = (column_class >= columns.first_short).astype(jnp.int32)
        start = jnp.clip(y * rows.tile - rows.before, 0, rows.last_start) + i * rows.padded
        start = pl.multiple_of(start * columns.keys, ROW_BLOCK * SUBLANES)
        bias = pl.multiple_of(row_places[2 * rows.strips + y], ROW_BLOCK * SUBLANES)
        return _Tile(
            index=i,
            rows=pl.ds(y * rows.tile, rows.tile),
            region=pl.ds(start, p.keys),
            offset=column_places[2 * columns.strips + strip],
            bias=pl.ds(bias, p.keys),
            row_mask=row_places[short_rows * rows.strips + y],
            column_mask=column_places[short_columns * columns.strips + strip],
        )

    count = step * rows.strips
    together = math.gcd(count, TILES_PER_BODY) if len(_stacks(p)) == 1 else 1

    def run(i, _):
        # The compiler does not move loads across writes, so all writes come last.
        tiles = [locate(i * together + j) for j in range(together)]
        for write in [body(tile) for tile in tiles]:
            write()

    lax.fori_loop(0, count // together, run, None)


def _each_row_block(p: Plan, step: int, body):
    """Calls body(class of the step, rows, their pixels in a region of all rows) over a strip."""
    size = p.rows.tile * p.columns.keys

    def run(n, _):
        i, y = lax.div(n, p.rows.strips), lax.rem(n, p.rows.strips)
        rows = pl.ds(y * p.rows.tile, p.rows.tile)
        body(i, rows, pl.ds(pl.multiple_of(n * size, ROW_BLOCK * SUBLANES), size))

    lax.fori_loop(0, step * p.rows.strips, run, None)


def _join_parts(p: Plan, parts, out_ref):
    """Joins blocks of columns, row by row."""

    def join(i, rows, pixels):
        # In float32 a row of a block is exactly a register.
        blocks = [part[i, rows].astype(jnp.float32) for part in parts]
        block = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
        out_ref[pixels, :] = block.reshape(-1, LANES).astype(out_ref.dtype)

    _each_row_block(p, parts[0].shape[0], join)


def _move_on(p: Plan, step: int, refs):
    """Drops the first block of columns, and appends one of zeros."""

    def move(i, rows, pixels):
        for ref in refs:
            block = ref[pixels, :].reshape(p.rows.tile, p.columns.keys, LANES)
            empty = jnp.zeros((p.rows.tile, p.columns.tile, LANES), ref.dtype)
            block = jnp.concatenate([block[:, p.columns.tile :], empty], axis=1)
            ref[pixels, :] = block.reshape(-1, LANES)

    _each_row_block(p, step, move)


def _load(ref, tile: _Tile):
    """Loads a tile, float32 [T, C]."""
    return ref[tile.index, tile.rows].astype(jnp.float32).reshape(-1, LANES)


def _store(ref, tile: _Tile, x):
    ref[tile.index, tile.rows] = x.reshape(-1, *ref.shape[2:]).astype(ref.dtype)


def _addend(p: Plan, addends, tile: _Tile, stack: int):
    """Bias and masks of a stack of heads: [K, heads * T]."""
    table_ref, row_mask_ref, column_mask_ref = addends
    bias = table_ref[tile.offset, stack, tile.bias, :]
    mask = row_mask_ref[tile.row_mask] + column_mask_ref[tile.column_mask]
    return bias + mask.reshape(p.keys, -1)


def _stacks(p: Plan) -> list[range]:
    """The heads of each product."""
    return [range(first, first + p.stack) for first in range(0, p.heads_per_group, p.stack)]


def _head_of_lane(p: Plan):
    lane = lax.broadcasted_iota(jnp.int32, (p.queries, LANES), 1)
    return lane // (LANES // p.heads_per_group)


def _spread(p: Plan, x, heads):
    """Stacks [T, C] once per head, with zeros outside the head's lanes."""
    of_lane = _head_of_lane(p)
    return jnp.concatenate([jnp.where(of_lane == head, x, 0.0) for head in heads], axis=0)


def _gather(p: Plan, x, heads):
    """Takes the lanes of each head from its rows: [heads * T, C] to [T, C], zero elsewhere."""
    of_lane = _head_of_lane(p)
    parts = [
        jnp.where(of_lane == head, x[i * p.queries : (i + 1) * p.queries], 0.0)
        for i, head in enumerate(heads)
    ]
    return sum(parts[1:], parts[0])


def _dot(x, y, x_axis: int, y_axis: int):
    """Multiplies in float32, summing over one axis of each."""

    def product(x):
        return lax.dot_general(
            x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32
        )

    if x_axis == 0:
        return product(x)
    parts = [product(x[i : i + ROWS_PER_PRODUCT]) for i in range(0, len(x), ROWS_PER_PRODUCT)]
    return jnp.concatenate(parts, axis=0)


def _softmax(settings: Settings, keys, queries, addend):
    """Shares of the keys, [K, heads * T], from [K, C], [heads * T, C] and [K, heads * T]."""
    logits = _dot(keys, queries, 1, 1) * settings.scale + addend
    shares = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return shares * (1.0 / jnp.sum(shares, axis=0, keepdims=True))
