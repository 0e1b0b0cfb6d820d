"""Settings for running a model: precision, recomputation, loops, kernels. Never stored."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from oneformer_jax import config_rules
from oneformer_jax.kernels import dispatch


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Implementation of each operation that has several.

    "auto" is the fastest that a recorded benchmark supports on the device. A named implementation
    is never replaced by another one.

    Attributes:
      deform_attn: of deformable attention (pixel decoder, InternImage), see
        `oneformer_jax.kernels.ms_deform_attn`.
      neighborhood: of DiNAT's attention, see `oneformer_jax.kernels.neighborhood_attention`.
      points: of reading features at points (losses), see `oneformer_jax.kernels.point_sampling`.
      assignment: of matching queries and targets: "scipy", a callback to the host, or one of
        `oneformer_jax.kernels.assignment`, on the device.
    """

    deform_attn: str = "auto"
    neighborhood: str = "auto"
    points: str = "auto"
    assignment: str = "scipy"

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


def loops_pay(scan: bool | Literal["auto"]) -> bool:
    """Resolves `Execution.scan_layers` for the platform that is traced for."""
    return dispatch.platform() != "cpu" if scan == "auto" else scan
