"""The problems of a training step, for tests and benchmarks.

A step of OneFormer matches the queries of 10 predictions (9 layers and the one before them) of each
image with the image's segments. These are the problems of two images on a device.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call.

    Attributes:
      name: the model of these sizes.
      rows: queries.
      columns: slots for segments.
      kind: kind of costs, see `costs`.
      valid: columns of each problem that hold a segment.
      problems: number of problems in one call.
    """

    name: str
    rows: int
    columns: int
    kind: str = "places"
    valid: int = 20
    problems: int = 20

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The shape of the costs."""
        return self.problems, self.rows, self.columns

    def costs(self, seed: int = 0) -> np.ndarray:
        """Returns random costs, float32 [problems, rows, columns].

        Kind "random": independent, with few conflicts. "places": distances between points of a
        plane, as in a trained model, where segments want the queries near them. "alike": all
        columns want the same rows in nearly the same order, the worst case.
        """
        rng = np.random.default_rng(seed)
        if self.kind == "random":
            costs = rng.normal(size=self.sizes)
        elif self.kind == "places":
            rows, columns = (rng.random((self.problems, n, 2)) for n in self.sizes[1:])
            costs = 10 * np.linalg.norm(rows[:, :, None] - columns[:, None], axis=-1)
        elif self.kind == "alike":
            costs = rng.normal(size=(self.problems, self.rows, 1)) + 0.01 * rng.normal(
                size=self.sizes
            )
        else:
            raise ValueError(f"unknown kind {self.kind!r} of costs; use one of {', '.join(KINDS)}")
        return costs.astype(np.float32)


KINDS = ("random", "places", "alike")
PUBLISHED = (
    Case("COCO", rows=150, columns=100),
    Case("ADE20K and larger backbones", rows=250, columns=100),
    Case("Cityscapes", rows=250, columns=150),
    Case("Mapillary Vistas", rows=250, columns=250),
)
