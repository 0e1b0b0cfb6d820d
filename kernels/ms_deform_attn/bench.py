"""The published calls of multi-scale deformable attention, for `oneformer_jax.kernels.bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from oneformer_jax.kernels.bench import tpu
from oneformer_jax.kernels.bench.operation import Operation
from oneformer_jax.kernels.ms_deform_attn import (
    IMPLEMENTATIONS,
    ms_deform_attn,
    pallas_gpu,
    quad_rows,
)
from oneformer_jax.kernels.ms_deform_attn.reference import ms_deform_attn_gather
from oneformer_jax.kernels.ms_deform_attn.shapes import PUBLISHED, CallShape


class MsDeformAttn(Operation[CallShape]):
    """Arrays: value, sampling locations and attention weights of `ms_deform_attn`."""

    def labels(self, case: CallShape, dtype: str) -> dict[str, Any]:
        return {"image": list(case.image_size), "dtype": dtype}

    def arguments(self, case: CallShape, batch: int, dtype: str) -> list[jax.ShapeDtypeStruct]:
        sizes = case.shapes(batch)
        dtypes = {"value": jnp.dtype(dtype)}
        return [jax.ShapeDtypeStruct(s, dtypes.get(n, jnp.float32)) for n, s in sizes.items()]

    def inputs(self, case: CallShape, batch: int, dtype: str) -> list[jax.Array]:
        """Arrays with points a few pixels around their query, as in a trained model."""
        value, locations, weights = super().inputs(case, batch, dtype)
        axes = [[(jnp.arange(n) + 0.5) / n for n in (w, h)] for h, w in case.spatial_shapes]
        centres = jnp.concatenate([jnp.stack(jnp.meshgrid(*a), -1).reshape(-1, 2) for a in axes])
        sizes = jnp.array([(w, h) for h, w in case.spatial_shapes], jnp.float32)[:, None]
        return [value, centres[None, :, None, None, None] + 4 / sizes * locations, weights]

    def call(self, case: CallShape, implementation: str) -> Callable[..., jax.Array]:
        return lambda value, locations, weights: ms_deform_attn(
            value, case.spatial_shapes, locations, weights, implementation=implementation
        )

    def least_bytes(self, case: CallShape, batch: int, dtype: str) -> dict[str, int]:
        value, locations, _ = self.arguments(case, batch, dtype)
        values = value.size * value.dtype.itemsize
        points = locations.size // 2 * 12
        forward = 2 * values + points  # the output is as large as the value
        return {"forward": forward, "forward and backward": forward + 3 * values + 2 * points}

    def cycles(self, text: str, case: CallShape, cores: int) -> float:
        """Cycles of one core: the two of v4 and v5p share the heads; the loops are one core's."""
        return tpu.issue_cycles(text, -(-case.pixels // quad_rows.tile_size(case.pixels, 12)))

    def gpu_call(
        self, case: CallShape, implementation: str, capability: str, **options: Any
    ) -> Callable[..., jax.Array]:
        """As `call`; options are `backend` and `deterministic` of `pallas_gpu.ms_deform_attn`."""
        if implementation == "xla":
            return lambda value, *points: ms_deform_attn_gather(value, case.spatial_shapes, *points)
        best = pallas_gpu.backend_for(capability)
        backend = options.get("backend") or best
        if backend not in ("mosaic", "triton"):
            raise ValueError(f"bench: unknown backend {backend!r}; use mosaic or triton")
        if backend == "mosaic" != best:
            raise NotImplementedError(
                f"bench: Mosaic GPU of jax {jax.__version__} does not run on a GPU of compute "
                f"capability {capability}; use backend='triton'"
            )
        return lambda value, *points: pallas_gpu.ms_deform_attn(
            value, case.spatial_shapes, *points, **{**options, "backend": backend}
        )


OPERATION = MsDeformAttn(
    name="ms_deform_attn",
    implementations=IMPLEMENTATIONS,
    cases={"x".join(map(str, shape.image_size)): shape for shape in PUBLISHED},
    differentiated=(0, 1, 2),
    key=("image",),
)
