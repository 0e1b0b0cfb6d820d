"""The TFDS entry point of the builders of official datasets."""

from __future__ import annotations

from pathlib import Path

from oneformer_jax.input_pipeline.builders import preparation, raw


class OfficialBuilder(raw.PanopticBuilder, skip_registration=True):
    """A `raw.PanopticBuilder` that prepares itself."""

    def download_and_prepare(self, **options) -> Path:
        """Writes the records; the options are those of `preparation.prepare_builder`."""
        return preparation.prepare_builder(self, **options)
