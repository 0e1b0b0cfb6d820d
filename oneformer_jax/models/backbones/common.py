"""What the backbones share: the base of their configs, and recomputation of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

STRIDES = (4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class StagedConfig:
    """Base of a backbone's config: sequences become tuples, and there are four stages.

    Attributes:
      depths: number of blocks in each of the four stages.
    """

    depths: tuple[int, ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON and config overrides have it
                object.__setattr__(self, field.name, tuple(value))
        self.require_stages("depths")

    def require(self, ok: bool, field: str, rule: str) -> None:
        """ValueError that names the field and the rule, unless `ok`."""
        if not ok:
            value = getattr(self, field)
            raise ValueError(f"{type(self).__name__}: {field} is {value!r}: it must {rule}")

    def require_stages(self, field: str) -> None:
        value = getattr(self, field)
        ok = isinstance(value, tuple) and len(value) == len(STRIDES)
        ok = ok and all(isinstance(n, int) and n > 0 for n in value)
        self.require(ok, field, f"hold {len(STRIDES)} positive integers, one for each stage")


def check_image(image: jax.Array) -> None:
    """ValueError unless `image` is [B, H, W, 3]."""
    if image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(f"a backbone's image must be [B, H, W, 3], got shape {image.shape}")


def call(module: nnx.Module, *args: Any, remat: bool, updates: bool = False) -> Any:
    """`module(*args)`; with `remat` its activations are recomputed in the backward pass.

    Args:
      module: a module without random state, called with positional arguments.
      args: arrays, None or Python booleans.
      remat: whether to recompute.
      updates: whether the call updates statistics. They are then carried out of the recomputed
        function, since the module's own variables can't be changed from within it.
    """
    if not remat:
        return module(*args)
    graphdef, stats, rest = nnx.split(module, nnx.BatchStat, ...)
    static = {i: a for i, a in enumerate(args) if isinstance(a, bool)}
    arrays = {i: a for i, a in enumerate(args) if i not in static}

    @jax.checkpoint
    def run(stats, rest, arrays):
        copy: Callable = nnx.merge(graphdef, stats, rest)
        out = copy(*({**static, **arrays}[i] for i in range(len(args))))
        return out, nnx.state(copy, nnx.BatchStat) if updates else None

    out, stats = run(stats, rest, arrays)
    if updates:
        nnx.update(module, stats)
    return out
