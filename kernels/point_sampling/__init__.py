"""Bilinear sampling of maps at points (PointRend, arXiv 1912.08193)."""

from oneformer_jax.kernels.point_sampling.api import IMPLEMENTATIONS, sample_features
from oneformer_jax.kernels.point_sampling.reference import corners, find_cells, take

__all__ = ["IMPLEMENTATIONS", "corners", "find_cells", "sample_features", "take"]
