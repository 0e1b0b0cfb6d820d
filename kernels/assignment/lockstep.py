"""Shortest augmenting paths for many problems at once, as one flat loop that all solvers share.

Rows enter one by one; Dijkstra's algorithm on the reduced costs finds the cheapest chain of
reassignments that ends in a free column (Jonker and Volgenant 1987, Crouse 2016). In nested loops,
problems would wait for each other at the end of every search. Here each problem is a small state
machine, which does one of three things at every step:

  * scan: the nearest open column has an owner. The column is closed, and its owner's costs are read
    next.
  * end of a search: the nearest open column is free. Prices change, and the column goes to the row
    from which it was reached. That row's old column is given away next, unless the row is the one
    that enters: then the next row's costs are read.
  * walk: the column given away goes to the row from which it was reached, and so on.

All three are the same masked vector operations with three reductions over the columns. The solver
supplies `fetch`, which reads the costs of a row.

Letters: P problems, R rows (numbered in the order in which they enter), C columns of at most
`width`, the rest being padding of infinite cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

INFINITY = float("inf")
MAX_CODES = 2**24  # float32 counts without gaps up to here


class State(NamedTuple):
    """The state of all problems, in float32, whole numbers too.

    Per column, [P, width]:
      price: the column's share in the dual problem: 0 for free columns, else at most 0. For every
        row, its own column has the least cost minus price.
      paired: the cost of the column for its owner.
      label: width + owner, or the column's own number if it is free. Two are equal only in a walk,
        where the column given away and the row's new one have the same owner.
      distance: of open columns from the root of the search; infinite for closed ones.
      final: the distance at which a column was closed; infinite for open ones.
      via: the row from which the column was reached.
      entry: the column's cost for that row.
    Per problem, [P, lanes]:
      root: the row that enters.
      row: the row whose costs are read next.
      base: added to its costs; infinite to ignore them.
      walker: the row whose column is given away, -1 in a search.
    """

    price: jax.Array
    paired: jax.Array
    label: jax.Array
    distance: jax.Array
    final: jax.Array
    via: jax.Array
    entry: jax.Array
    root: jax.Array
    row: jax.Array
    base: jax.Array
    walker: jax.Array


def solve(
    fetch: Callable[[jax.Array], jax.Array], count: jax.Array, width: int, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Assigns a column to every row at the least total cost of each problem.

    Args:
      fetch: float32 [P, lanes], a row number per problem -> float32 [P, width], its costs, -1e30 to
        1e30 or infinite. At least as many columns as assigned rows must have finite costs.
      count: float32 [P, lanes], number of rows to assign in each problem. `lanes` is 1, or all
        lanes are equal: TPUs are slow to spread a value over lanes.
      width: columns, a multiple of lanes.
      rows: R.

    Returns:
      float32 [P, width], the owner of each column, -1 if there is none; int32, the steps taken.

    Raises:
      NotImplementedError: too many rows and columns.
    """
    if (codes := (width + rows) * _row_codes(rows)) > MAX_CODES:
        raise NotImplementedError(
            f"linear_sum_assignment: {rows} rows that enter and {width} columns are too many: "
            f"pairs of them need {codes} codes, and float32 has {MAX_CODES}"
        )

    def body(carry):
        state, costs, steps = carry
        state = _step(state, costs, count, rows)
        # Fetching here, not in the next step, overlaps with the rest of this one.
        return state, fetch(state.row), steps + 1

    state = _start(count, width)
    state, _, steps = lax.while_loop(
        lambda carry: jnp.max(count - carry[0].root) > 0,
        body,
        (state, fetch(state.row), jnp.int32(0)),
    )
    return jnp.maximum(state.label - width, -1), steps


def _start(count: jax.Array, width: int) -> State:
    zero = jnp.zeros((count.shape[0], width), jnp.float32)
    none = jnp.zeros_like(count)
    return State(
        price=zero,
        paired=zero,
        label=lax.broadcasted_iota(jnp.int32, zero.shape, 1).astype(jnp.float32),
        distance=zero + INFINITY,
        final=zero + INFINITY,
        via=zero,
        entry=zero,
        root=none,
        row=none,
        base=jnp.where(count > 0, 0.0, INFINITY),
        walker=none - 1,
    )


def _step(state: State, costs: jax.Array, count: jax.Array, rows: int) -> State:
    """Does a step of every problem; `costs` float32 [P, width] belong to the rows `state.row`."""
    s = state
    width, lanes = s.price.shape[1], count.shape[1]
    code_base = float(_row_codes(rows))

    def over_columns(x):  # [P, lanes] -> [P, width]
        if lanes == 1:
            return jnp.broadcast_to(x, s.price.shape)
        return jnp.concatenate([x] * (width // lanes), axis=1)

    def reduce(function, x):  # [P, width] -> [P, lanes]
        return jnp.broadcast_to(function(x, axis=1, keepdims=True), count.shape)

    through = over_columns(s.base) + (costs - s.price)
    better = (through < s.distance) & (s.final == INFINITY)
    distance = jnp.where(better, through, s.distance)
    via = jnp.where(better, over_columns(s.row), s.via)
    entry = jnp.where(better, costs, s.entry)

    # Of equally near columns, the free one with the lowest number comes first.
    walks = over_columns(s.walker) >= 0
    given_away = (s.label == width + over_columns(s.walker)) & (s.final < INFINITY)
    nearest = reduce(jnp.min, distance)
    candidates = (walks & given_away) | (~walks & (distance == over_columns(nearest)))
    codes = s.label * code_base + via
    code = reduce(jnp.min, jnp.where(candidates, codes, float(MAX_CODES)))
    chosen = candidates & (codes == over_columns(code))
    label = jnp.floor(code * (1 / code_base))
    chosen_via = code - label * code_base

    # 0 or 1 instead of masks: a TPU cannot spread masks of few lanes.
    active = jnp.where(s.root < count, 1.0, 0.0)
    walking = jnp.where(s.walker >= 0, active, 0.0)
    scans = jnp.where(label >= width, active - walking, 0.0)
    ends = active - walking - scans
    assigns = ends + walking
    enters = jnp.where(chosen_via == s.root, assigns, 0.0)
    root = s.root + enters
    follows = jnp.where(root < count, enters, 0.0)

    assigned = chosen & (over_columns(assigns) > 0)
    closed = chosen & (over_columns(scans) > 0)
    ended, entered = over_columns(ends) > 0, over_columns(enters) > 0
    near = over_columns(nearest)
    reduced = reduce(jnp.sum, jnp.where(chosen, s.paired - s.price, 0.0))
    return State(
        price=s.price + jnp.where(ended, jnp.minimum(s.final - near, 0.0), 0.0),
        paired=jnp.where(assigned, entry, s.paired),
        label=jnp.where(assigned, width + over_columns(chosen_via), s.label),
        distance=jnp.where(entered | closed, INFINITY, distance),
        final=jnp.where(entered | assigned, INFINITY, jnp.where(closed, near, s.final)),
        via=via,
        entry=entry,
        root=root,
        row=jnp.where(scans > 0, label - width, jnp.where(follows > 0, root, 0.0)),
        base=jnp.where(scans > 0, nearest - reduced, jnp.where(follows > 0, 0.0, INFINITY)),
        walker=jnp.where(assigns > enters, chosen_via, -1.0),
    )


def _row_codes(rows: int) -> int:
    """A power of two above all row numbers."""
    return 1 << max(rows - 1, 1).bit_length()
