"""Minimum-cost assignment of many small problems at once (Jonker and Volgenant 1987)."""

from oneformer_jax.kernels.assignment.api import IMPLEMENTATIONS, linear_sum_assignment

__all__ = ["IMPLEMENTATIONS", "linear_sum_assignment"]
