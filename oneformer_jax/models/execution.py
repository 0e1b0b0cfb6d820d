"""Settings for running a model: precision, recomputation, loops, kernels. Never stored."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from oneformer_jax import config_rules, files
from oneformer_jax.kernels import calibrate, choice, dispatch


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Implementation of each operation that has several.

    "auto" is what the device has shown to be right and fastest, or else a static preference (see
    `oneformer_jax.kernels.choice`). A named implementation is never replaced by another one.

    Attributes:
      deform_attn: of deformable attention (pixel decoder, InternImage), see
        `oneformer_jax.kernels.ms_deform_attn`.
      neighborhood: of DiNAT's attention, see `oneformer_jax.kernels.neighborhood_attention`.
      points: of reading features at points (losses), see `oneformer_jax.kernels.point_sampling`.
      assignment: of matching queries and targets: "scipy", a callback to the host, or one of
        `oneformer_jax.kernels.assignment`, on the device.
      calibrate: whether an accelerator is asked for the fastest before a program is compiled, see
        `chooser`.
    """

    deform_attn: str = "auto"
    neighborhood: str = "auto"
    points: str = "auto"
    assignment: str = "scipy"
    calibrate: bool = True

    def __post_init__(self) -> None:
        config_rules.require_fields("kernels", self)


@dataclasses.dataclass(frozen=True)
class Execution:
    """Settings for running a model; `OneFormerConfig` is what it is.

    Attributes:
      dtype: compute dtype of the matrix products, "float32" or "bfloat16"; parameters, softmax,
        norm statistics, coordinates and the task token are float32 always.
      remat: recompute blocks in the backward pass instead of keeping their activations.
      scan_layers: run layers that repeat as loops, which are compiled once (`models.stack`). "auto"
        does so on accelerators, whose compilers gain; on a CPU loops cost a quarter of the time.
      kernels: the implementations.
    """

    dtype: str = "float32"
    remat: bool = False
    scan_layers: bool | Literal["auto"] = "auto"
    kernels: Kernels = Kernels()

    def __post_init__(self) -> None:
        config_rules.require_fields("model", self, but=("kernels",))

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a dtype."""
        return jnp.dtype(self.dtype)


@contextlib.contextmanager
def kernels_noted() -> Iterator[set[str]]:
    """Gives a set that holds, after the context, what runs in the "auto" calls traced in it.

    An element is an operation and its implementation, as "point_sampling xla".
    """
    found: set[str] = set()
    with choice.noting() as notes:
        yield found
    found |= {f"{call.operation} {chosen}" for call, chosen in notes.chosen.items()}


def loops_pay(scan: bool | Literal["auto"]) -> bool:
    """Resolves `Execution.scan_layers` for the platform that is traced for."""
    return dispatch.platform() != "cpu" if scan == "auto" else scan


def chooser(
    kernels: Kernels, mesh: Mesh | None = None, **options: Any
) -> Callable[..., None] | None:
    """Makes the function that chooses a program's "auto" kernels before it is compiled.

    Args:
      kernels: the implementations; None is returned if they are not to be calibrated.
      mesh: the devices that the programs run on; if they are of several processes, all of these
        must call the function.
      **options: of `oneformer_jax.kernels.calibrate.Chooser`.
    """
    if not kernels.calibrate:
        return None
    everywhere = mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1
    return calibrate.Chooser(files.user_cache() / "kernels", everywhere=everywhere, **options)
