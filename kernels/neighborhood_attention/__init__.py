"""Dilated neighbourhood attention (NAT, arXiv 2204.07143, and DiNAT, arXiv 2209.15001)."""

from oneformer_jax.kernels.neighborhood_attention.api import IMPLEMENTATIONS, neighborhood_attention

__all__ = ["IMPLEMENTATIONS", "neighborhood_attention"]
