"""Shortest augmenting paths for many problems at once, as one flat loop: what all solvers share.

Rows enter one by one; Dijkstra's algorithm on the reduced costs finds the cheapest chain of
reassignments that ends in a free column (Jonker and Volgenant 1987, Crouse 2016). As nested loops,
problems would wait for each other at the end of every search. Here each problem is a small machine
of its own that at every step does one of three things:

  * scan: the nearest open column has an owner. The column is closed, and its owner's costs are
    looked at next.
  * end of a search: the nearest open column is free. Prices change, the column goes to the row
    from which it was reached, and now that row's old column is to be given away (or the row was
    the one that enters, and the next one's costs are looked at next).
  * walk: the column to be given away goes to the row from which it was reached, and so on.

All of them are the same masked vector operations with three reductions over the columns. Only how
the costs of a row are fetched is left to the solver: `fetch`.

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
    """All float32, whole numbers too.

    Per column, [P, width]:
      price: the column's share in the dual problem: 0 for free columns, else at most 0. Of cost
        minus price, no column has less for a row than the row's own.
      paired: the cost of the column for its owner.
      label: width + owner, or the column's own number if it is free. Two are equal only in a walk,
        where the column to be given away and the row's new one have the same owner.
      distance: of open columns from the root of the search; infinite for closed ones.
      final: the distance at which a column was closed; infinite for open ones.
      via: the row from which the column was reached.
      entry: the column's cost for that row.
    Per problem, [P, lanes]:
      root: the row that is to enter.
      row: the row whose costs are looked at next.
      base: what its costs are added to; infinite if they are not to be looked at.
      walker: the row whose column is to be given away, -1 in a search.
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
        1e30 or infinite. There have to be as many columns of finite cost as rows are assigned.
      count: float32 [P, lanes], how many rows of each problem are to be assigned. `lanes` is 1, or
        all lanes hold the same: vector units of TPUs spread a value over many lanes only slowly.
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
        # Fetched here, beside what else is left to do, and not when the next step begins.
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
    """One step of every problem; `costs` float32 [P, width] are those of the rows `state.row`."""
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

    # Among equally near columns a free one comes first, of several that of the lowest number.
    walks = over_columns(s.walker) >= 0
    given_away = (s.label == width + over_columns(s.walker)) & (s.final < INFINITY)
    nearest = reduce(jnp.min, distance)
    candidates = (walks & given_away) | (~walks & (distance == over_columns(nearest)))
    codes = s.label * code_base + via
    code = reduce(jnp.min, jnp.where(candidates, codes, float(MAX_CODES)))
    chosen = candidates & (codes == over_columns(code))
    label = jnp.floor(code * (1 / code_base))
    chosen_via = code - label * code_base

    # What each problem does, as 0 or 1: masks of few lanes cannot be spread on a TPU.
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
