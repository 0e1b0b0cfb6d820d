"""The calls in the losses of the COCO recipe, which sample the mask features of an image."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CallShape:
    """One call, without its batch axis.

    Attributes:
      name: purpose of the points.
      points: number of points.
      size: (height, width) of the map, a quarter of the image.
      depth: channels.
    """

    name: str
    points: int
    size: tuple[int, int] = (256, 256)
    depth: int = 256


MATCHING = CallShape("matching", 12544)
# 3 x 12544 candidates and 3136 fresh points, shared by the masks of an image.
LOSSES = CallShape("losses", 40768)
PUBLISHED = (MATCHING, LOSSES)
