"""Point sampling as `oneformer_jax.kernels.calibrate` tries it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from oneformer_jax.kernels.choice import Call
from oneformer_jax.kernels.point_sampling import IMPLEMENTATIONS, api
from oneformer_jax.kernels.trial import Trial


class PointSampling(Trial):
    """Arrays: features and points of `sample_features`."""

    implementations = IMPLEMENTATIONS
    differentiated = (0,)

    def function(self, call: Call, candidate: str) -> Callable[..., jax.Array]:
        return functools.partial(api.sample, candidate)

    def inputs(self, call: Call, rng: np.random.Generator) -> list[np.ndarray]:
        """Uniform points, some beyond the map."""
        (features, _), (points, _) = call.arrays
        return [
            rng.standard_normal(features, np.float32),
            1.1 * rng.random(points, np.float32) - 0.05,
        ]


TRIAL = PointSampling()
