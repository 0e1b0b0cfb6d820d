"""The shapes of multi-scale deformable attention in OneFormer's pixel decoder.

A call has one query per pixel of the strides 32, 16 and 8, 8 heads of 32 channels and 4 points.
Image sizes are those of the published recipes: training crops, and test images padded to a multiple
of 32.
"""

from __future__ import annotations

import dataclasses

STRIDES = (32, 16, 8)


@dataclasses.dataclass(frozen=True)
class CallShape:
    """One call, without its batch axis.

    Attributes:
      name: the source of the shape.
      image_size: (height, width) in pixels, multiples of the largest stride.
      heads: number of attention heads.
      head_dim: channels per head.
      points: sampling points per head and level.
    """

    name: str
    image_size: tuple[int, int]
    heads: int = 8
    head_dim: int = 32
    points: int = 4

    def __post_init__(self):
        if any(size < 1 or size % STRIDES[0] for size in self.image_size):
            raise ValueError(
                f"image_size {self.image_size} of {self.name} must be multiples of {STRIDES[0]}"
            )

    @property
    def spatial_shapes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) per level, coarsest first."""
        height, width = self.image_size
        return tuple((height // stride, width // stride) for stride in STRIDES)

    @property
    def pixels(self) -> int:
        """S, which is also the number of queries Q."""
        return sum(h * w for h, w in self.spatial_shapes)

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Returns array shapes by argument name of `ms_deform_attn` for `batch` images."""
        points = (batch, self.pixels, self.heads, len(STRIDES), self.points)
        return {
            "value": (batch, self.pixels, self.heads, self.head_dim),
            "sampling_locations": (*points, 2),
            "attention_weights": points,
        }


SMALL_DEFAULT = CallShape("configs/synthetic.py", (128, 128), heads=4, head_dim=16)

PUBLISHED = (
    CallShape("ADE20K 512", (512, 512)),
    CallShape("ADE20K 640", (640, 640)),
    CallShape("ADE20K 896", (896, 896)),
    CallShape("ADE20K 1280", (1280, 1280)),
    CallShape("COCO and Mapillary training crop", (1024, 1024)),
    CallShape("COCO test, 800 x 1333 padded", (800, 1344)),
    CallShape("Cityscapes training crop", (512, 1024)),
    CallShape("Cityscapes test", (1024, 2048)),
)
