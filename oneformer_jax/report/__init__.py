"""The report of a run: one HTML file that needs no network, from the files of its workdir."""

from oneformer_jax.report.page import write_report

__all__ = ["write_report"]
