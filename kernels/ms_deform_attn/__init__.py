"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159)."""

from oneformer_jax.kernels.ms_deform_attn.api import IMPLEMENTATIONS, ms_deform_attn

__all__ = ["IMPLEMENTATIONS", "ms_deform_attn"]
