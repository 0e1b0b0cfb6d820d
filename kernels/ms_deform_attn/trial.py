"""Deformable attention as `oneformer_jax.kernels.calibrate` tries it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
import numpy as np

from oneformer_jax.kernels import dispatch
from oneformer_jax.kernels.choice import Call
from oneformer_jax.kernels.ms_deform_attn import IMPLEMENTATIONS, api
from oneformer_jax.kernels.trial import Trial


class MsDeformAttn(Trial):
    """Arrays: value, sampling locations and attention weights of `ms_deform_attn`."""

    implementations = IMPLEMENTATIONS
    differentiated = (0, 1, 2)

    def candidates(self, call: Call, device: jax.Device) -> list[str]:
        """As for all, and the other forms of plain JAX, and Triton's kernels beside Mosaic's."""
        from oneformer_jax.kernels.ms_deform_attn import pallas_gpu

        shapes = dict(call.static)["spatial_shapes"]
        forms = [form for form in api.XLA_FORMS if form != api.xla_form(shapes)]
        if not api.fits_dense(shapes):
            forms.remove("dense")
        first, *kernels = super().candidates(call, device)
        capability = dispatch.compute_capability_of(device)
        with contextlib.suppress(NotImplementedError):  # its refusal is a verdict of the table
            if "pallas_gpu" in kernels and pallas_gpu.backend_for(capability) == "mosaic":
                kernels.append("pallas_gpu/triton")
        return [first, *kernels, *(f"xla/{form}" for form in forms)]

    def function(self, call: Call, candidate: str) -> Callable[..., jax.Array]:
        shapes = dict(call.static)["spatial_shapes"]
        run = api.load(candidate)
        return lambda value, *points, **options: run(value, shapes, *points, **options)

    def reference(self, call: Call) -> Callable[..., jax.Array]:
        return self.function(call, "xla/gather")

    def inputs(self, call: Call, rng: np.random.Generator) -> list[np.ndarray]:
        """Points all over the maps and a little beyond, weights that add up to 1.

        No point is near the border of a cell, where the gradient of its location jumps.
        """
        (value, _), (locations, _), (weights, _) = call.arrays
        sizes = np.array([(w, h) for h, w in dict(call.static)["spatial_shapes"]], np.float32)
        sizes = sizes[:, None]  # [L, 1, 2]
        pixels = np.floor(rng.random(locations, np.float32) * (sizes + 3)) - 1.5
        pixels += 0.1 + 0.8 * rng.random(locations, np.float32)
        drawn = rng.standard_exponential(weights, np.float32)
        drawn /= drawn.sum(axis=(-2, -1), keepdims=True)
        return [rng.standard_normal(value, np.float32), pixels / sizes, drawn]


TRIAL = MsDeformAttn()
