"""Stacks of layers: applied one after the other, or as a loop whose body is compiled once.

A deep model's layers are mostly equal but for their parameters. Unrolled, a compiler sees each of
them; as a loop it sees one. The parameters stay those of single layers, with the official names:
they are put on top of one another while the program is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from oneformer_jax.models.execution import loops_pay


class Stack(nnx.List):
    """A list of layers, for `run`.

    Attributes:
      remat: whether the activations of each layer are recomputed in the backward pass.
      scan: whether layers that repeat become a loop; "auto" is decided when `run` is traced.
      gather: (index, parameters as a dict) -> the same, whole on every device. The training step
        sets it where it shards parameters: each layer is gathered where it is used, forward and
        backward, and no whole copy outlives it. Its `keeps` is the policy of `jax.checkpoint` that
        recognises what it gathered.
    """

    def __init__(
        self,
        layers: Iterable[nnx.Module],
        *,
        remat: bool = False,
        scan: bool | Literal["auto"] = False,
    ):
        super().__init__(layers)
        self.remat = remat
        self.scan = scan
        self.gather: Any = None


def run(
    step: Callable[..., tuple[Any, Any]],
    x: Any,
    *stacks: Stack,
    items: Any = None,
    updates: bool = False,
) -> tuple[Any, list[Any]]:
    """Applies `x, output = step(x, item, *layers)` for the layers 0, 1, 2... of the stacks.

    With `scan`, layers of equal structure (attributes, shapes, dtypes) that repeat, alone or as a
    sequence, are one `lax.scan` over their parameters, so `step` must depend on nothing of a layer
    but these, and `x` must keep its shapes and dtypes.

    Args:
      step: may close over arrays. `layers` holds one module of each stack.
      x: a tree of arrays.
      stacks: equally long; the first one's `remat` and `scan` count.
      items: a tree of arrays with a leading axis for the layers; `step` gets one slice as `item`.
      updates: whether layers update statistics (`nnx.BatchStat`).

    Returns:
      x, and the outputs in the order of the layers.
    """
    remat, scan = stacks[0].remat, loops_pay(stacks[0].scan)
    indices = range(len(stacks[0]))
    if not scan and not remat and all(stack.gather is None for stack in stacks):
        outputs = []
        for i in indices:
            x, output = step(x, _at(items, i), *(stack[i] for stack in stacks))
            outputs.append(output)
        return x, outputs

    split = {i: [nnx.split(stack[i], nnx.BatchStat, ...) for stack in stacks] for i in indices}

    def layer(x, item, states, i, looped):
        """Runs the layers of index `i`, with the variables `states`, [(statistics, the rest)]."""

        def call(x, item, states):
            modules = []
            for stack, (graphdef, *_), (stats, rest) in zip(stacks, split[i], states, strict=True):
                rest = rest if stack.gather is None else stack.gather(i, nnx.to_pure_dict(rest))
                modules.append(nnx.merge(graphdef, stats, rest))
            x, output = step(x, item, *modules)
            return x, output, [nnx.state(m, nnx.BatchStat) for m in modules] if updates else None

        if remat or any(stack.gather is not None for stack in stacks):
            policy = None if remat else next(s.gather.keeps for s in stacks if s.gather)
            # A loop keeps the compiler from merging the two computations by itself.
            call = jax.checkpoint(call, prevent_cse=not looped, policy=policy)
        return call(x, item, states)

    outputs = []
    new_stats = {}
    states = {i: [(stats, rest) for _, stats, rest in split[i]] for i in indices}
    kinds = [tuple(graphdef for graphdef, *_ in split[i]) for i in indices]
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), states[i]) for i in indices]
    first, period, rounds = find_loop(list(zip(kinds, shapes, strict=True))) if scan else (0, 0, 0)
    i = 0
    while i < indices.stop:
        if i != first or not rounds:
            x, output, stats = layer(x, _at(items, i), states[i], i, looped=False)
            outputs.append(output)
            new_stats[i] = stats
            i += 1
            continue

        def body(x, arrays, first=first, period=period):
            results = []
            for j, (item, state) in enumerate(zip(*arrays, strict=True)):
                x, output, stats = layer(x, item, state, first + j, looped=True)
                results.append((output, stats))
            return x, results

        places = [range(first + j, first + period * rounds, period) for j in range(period)]
        arrays = (
            [jax.tree.map(lambda a, p=p: a[p.start : p.stop : p.step], items) for p in places],
            [jax.tree.map(lambda *a: jnp.stack(a), *(states[k] for k in p)) for p in places],
        )
        x, results = jax.lax.scan(body, x, arrays, length=rounds)
        for k in range(period * rounds):
            output, stats = _at(results[k % period], k // period)
            outputs.append(output)
            new_stats[first + k] = stats
        i = first + period * rounds
    if updates:
        for i, stats in new_stats.items():
            for stack, new in zip(stacks, stats, strict=True):
                nnx.update(stack[i], new)
    return x, outputs


def find_loop(kinds: Sequence[Hashable]) -> tuple[int, int, int]:
    """Finds the loop that leaves the fewest bodies: (first, period, rounds).

    (0, 0, 0) if nothing repeats. Of equally good ones it is the first with the shortest period.
    """
    best, saved = (0, 0, 0), 0
    for first in range(len(kinds)):
        for period in range(1, (len(kinds) - first) // 2 + 1):
            rounds, pattern = 1, kinds[first : first + period]
            while kinds[first + rounds * period :][:period] == pattern:
                rounds += 1
            if period * (rounds - 1) > saved:
                best, saved = (first, period, rounds), period * (rounds - 1)
    return best


def _at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda a: a[index], tree)
