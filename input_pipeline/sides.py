"""Training and validation images of one folder, told apart by a hash of their names."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from oneformer_jax.input_pipeline.records import checked_index

_SEEDS, _HASHES = 1000, 1_000_000  # the most that an error looks through

# Methods of sources that take the position of an image.
_BY_IMAGE = (
    *("annotation", "classes_of", "compact", "examine", "has_things", "image_id", "image_path"),
    *("image_size", "left_out", "name_of", "panoptic_path"),
)


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two splits that are made from one folder.

    The side of an image depends on its name, the share and the seed alone: it stays when other
    images come or go. With a larger share, all images of validation stay there.

    Attributes:
      split: "train" or "validation".
      share: expected share of the images that are for validation, 0 < share < 1.
      seed: another one makes other splits.
    """

    split: str
    share: float
    seed: int

    def __str__(self) -> str:
        return f"validation_share={self.share:g} split_seed={self.seed}"

    def holds(self, name: str) -> bool:
        """Tells whether the image of this name is on this side."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "surrogatepass")).digest()
        below = int.from_bytes(digest[:8]) < self.share * 2**64
        return below == (self.split == "validation")

    def of(self, source: Any) -> SideSource:
        """Returns the images of this side; ValueError if one of the sides would have none.

        Args:
          source: has `name_of(index)` beside the methods of a source.
        """
        names = [source.name_of(index) for index in range(len(source))]
        indices = np.flatnonzero([self.holds(name) for name in names])
        if not 0 < len(indices) < len(names):
            raise ValueError(f"{source!r}: {self._why_not(names, len(indices))}")
        return SideSource(source, indices)

    def _why_not(self, names: list[str], count: int) -> str:
        validation = count if self.split == "validation" else len(names) - count
        empty = "training" if validation else "validation"
        text = f"with {self} none of the {len(names):,} images is for {empty}"
        if len(names) > 1:
            for seed in range(min(_SEEDS, _HASHES // len(names))):
                other = dataclasses.replace(self, seed=seed)
                if 0 < sum(map(other.holds, names)) < len(names):
                    return f"{text}; set split_seed={seed}, which leaves some on both sides"
        return f"{text}; set another validation_share, or 0 and name validation files"


class SideSource:
    """Images of a source, by their positions there; has the methods that the source has."""

    def __init__(self, source: Any, indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        return f"{len(self)} records of {self._source!r}"

    def __getitem__(self, index: int) -> dict:
        return self._source[self._place(index)]

    @property
    def max_pixels(self) -> int:
        return self._source.max_pixels

    @max_pixels.setter
    def max_pixels(self, value: int) -> None:
        self._source.max_pixels = value

    def _place(self, index: int) -> int:
        return int(self._indices[checked_index(index, len(self))])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by pickle before there is a source
            raise AttributeError(name)
        value = getattr(self._source, name)
        if name not in _BY_IMAGE:
            return value
        return lambda index, *args, **options: value(self._place(index), *args, **options)
