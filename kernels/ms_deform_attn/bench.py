"""The published calls of multi-scale deformable attention, for `oneformer_jax.kernels.bench`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.kernels.bench import tpu
from oneformer_jax.kernels.bench.operation import Operation
from oneformer_jax.kernels.ms_deform_attn import quad_rows
from oneformer_jax.kernels.ms_deform_attn.shapes import PUBLISHED, CallShape


class MsDeformAttn(Operation[CallShape]):
    """Arrays: value, sampling locations and attention weights of `ms_deform_attn`."""

    def labels(self, case: CallShape, dtype: str) -> dict[str, Any]:
        return {"image": list(case.image_size), "dtype": dtype}

    def arguments(self, case: CallShape, batch: int, dtype: str) -> list[jax.ShapeDtypeStruct]:
        sizes = case.shapes(batch)
        dtypes = {"value": jnp.dtype(dtype)}
        return [jax.ShapeDtypeStruct(s, dtypes.get(n, jnp.float32)) for n, s in sizes.items()]

    def static(self, case: CallShape) -> dict[str, Any]:
        return {"spatial_shapes": case.spatial_shapes}

    def inputs(self, case: CallShape, batch: int, dtype: str) -> list[Any]:
        """Draws points a few pixels around their query, as in a trained model."""
        gradient, value, locations, weights = super().inputs(case, batch, dtype)
        axes = [[(np.arange(n) + 0.5) / n for n in (w, h)] for h, w in case.spatial_shapes]
        centres = np.concatenate([np.stack(np.meshgrid(*a), -1).reshape(-1, 2) for a in axes])
        sizes = np.array([(w, h) for h, w in case.spatial_shapes])[:, None]
        steps = np.random.default_rng(1).standard_normal(locations.shape)
        locations = centres[None, :, None, None, None] + 4 / sizes * steps
        return [gradient, value, locations.astype(np.float32), weights]

    def least_bytes(self, case: CallShape, batch: int, dtype: str) -> dict[str, int]:
        value, locations, _ = self.arguments(case, batch, dtype)
        values = value.size * value.dtype.itemsize
        points = locations.size // 2 * 12
        forward = 2 * values + points  # the output is as large as the value
        return {"forward": forward, "forward and backward": forward + 3 * values + 2 * points}

    def cycles(self, text: str, case: CallShape, cores: int) -> float:
        """Cycles of one core: the two of v4 and v5p share the heads; the loops are one core's."""
        return tpu.issue_cycles(text, -(-case.pixels // quad_rows.tile_size(case.pixels, 12)))


OPERATION = MsDeformAttn(
    name="ms_deform_attn",
    cases={"x".join(map(str, shape.image_size)): shape for shape in PUBLISHED},
    key=("image",),
)
