"""The GPU kernels: their numbers in Pallas's interpreters, their compilation, and on a GPU.

On a machine with an NVIDIA GPU, this compares every kernel with the float64 reference there:

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels/test_pallas_gpu.py -k on_device -q
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ms_deform_attn as shared
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels.ms_deform_attn import gpu_aot, pallas_gpu

SHAPES = ((2, 3), (4, 5))
JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
needs_mosaic = pytest.mark.skipif(
    JAX_VERSION < (0, 11), reason=f"the Mosaic GPU kernels need jax 0.11, this is {jax.__version__}"
)


class Interpreted(shared.MsDeformAttnTests):
    """The tests of every implementation, on kernels that run in the interpreter."""

    backend: str
    deterministic = False

    @pytest.fixture(autouse=True)
    def _interpret(self, monkeypatch):
        def call(*arguments, implementation):
            assert implementation == self.implementation
            return pallas_gpu.ms_deform_attn(
                *arguments,
                backend=self.backend,
                deterministic=self.deterministic,
                interpret=True,
            )

        # `shared.run` is cached by the name of the implementation, and each class has its own.
        monkeypatch.setattr(shared, "ms_deform_attn", call)


class TestTriton(Interpreted):
    implementation, backend = "triton in interpret mode", "triton"

@needs_mosaic
class TestMosaic(Interpreted):
    implementation, backend = "mosaic in interpret mode", "mosaic"
