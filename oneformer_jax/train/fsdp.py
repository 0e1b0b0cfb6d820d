"""Parameters that are split over the devices, gathered where they are used.

Each layer of a stack is gathered forward and again backward, so that no whole copy outlives it: the
forward pass keeps everything but what `gather_parameter` makes, and `keeps_all_but_gathered`
recognises that.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from oneformer_jax.models import functional
from oneformer_jax.models.oneformer import OneFormer
from oneformer_jax.models.stack import Stack
from oneformer_jax.train import sharding


def merge_gathered(graph: nnx.GraphDef, params: dict, stats: dict, shardings: dict) -> OneFormer:
    """Returns the model with parameters that are whole on every device where they are used.

    Those of a `Stack` are gathered layer by layer, in its loop, all others at once.
    """
    structure = functional.merge(graph, params, stats)
    stacks = {path: node for path, node in nnx.iter_graph(structure) if isinstance(node, Stack)}

    def whole(path, x, split):
        names = tuple(entry.key for entry in path)
        if any(names[: len(stack)] == stack for stack in stacks):
            return x
        return gather_parameter(x, split, summed=names[0] in functional.TEXT_PARTS)

    params = jax.tree_util.tree_map_with_path(whole, params, shardings)
    model = functional.merge(graph, params, stats)
    for path in stacks:
        stack, split = model, shardings
        for name in path:
            stack = stack[name] if isinstance(name, int) else getattr(stack, name)
            split = split[name]
        stack.gather = GatherLayer(split, summed=path[0] in functional.TEXT_PARTS)
    return model


def gather_parameter(
    x: jax.Array, split: jax.sharding.NamedSharding, *, summed: bool = False
) -> jax.Array:
    """Returns a parameter, whole on every device; its gradient is split again, as `split` says.

    Left to itself, XLA now and then gathers the feature maps of all devices instead of a kernel.

    Args:
      x: the parameter.
      split: how it lies on the devices.
      summed: whether the gradient is first summed over the devices. The texts are the same on all
        of them: there a gradient that is to be split would split the work, and each layer would be
        communicated.
    """

    def constrain(x: jax.Array, *steps: jax.sharding.NamedSharding) -> jax.Array:
        for step in steps:
            x = jax.lax.with_sharding_constraint(x, step)
        return x

    if split.is_fully_replicated:
        return x
    whole = sharding.replicated(split.mesh)
    # The first step matters in a loop, where `x` is a part of an array of the compiler's making.
    forward = (split, whole)
    backward = (whole, split) if summed else (split,)
    gather = jax.custom_vjp(lambda x: constrain(x, *forward))
    gather.defvjp(lambda x: (constrain(x, *forward), None), lambda _, g: (constrain(g, *backward),))
    return gather(x)


def keeps_all_but_gathered(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keeps everything but what `gather_parameter` made: a policy of `jax.checkpoint`."""
    del args
    if primitive.name == "custom_vjp_call":
        inner = params["call_jaxpr"].eqns
        return not (inner and inner[-1].primitive.name == "sharding_constraint")
    return primitive.name != "sharding_constraint"


class GatherLayer:
    """(index, parameters) -> whole parameters of one layer of a stack; see `Stack.gather`."""

    keeps = staticmethod(keeps_all_but_gathered)

    def __init__(self, shardings: dict, *, summed: bool):
        self.shardings = shardings
        self.summed = summed

    def __call__(self, index: int, params: dict) -> dict:
        return jax.tree.map(
            lambda x, split: gather_parameter(x, split, summed=self.summed),
            params,
            self.shardings[index],
        )
