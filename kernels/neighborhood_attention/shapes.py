"""The shapes of neighbourhood attention in DiNAT-L.

Its four stages have maps at the strides 4, 8, 16 and 32, with 6, 12, 24 and 48 heads of 32 channels
and 3, 4, 18 and 5 blocks. Image sizes and dilations are those of the published recipes.
"""

from __future__ import annotations

import collections
import dataclasses

STRIDES = (4, 8, 16, 32)
HEADS = (6, 12, 24, 48)
HEAD_DIM = 32

# Dilation of every block, by stage.
DILATIONS = {
    # 11 x 11 neighbours: COCO, Mapillary, ADE20K at 640 and 896 pixels
    "base": (
        (1, 20, 1),
        (1, 5, 1, 10),
        (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5),
        (1, 2, 1, 2, 1),
    ),
    # 11 x 11 neighbours: ADE20K at 1280 pixels
    "wide": (
        (1, 28, 1),
        (1, 7, 1, 14),
        (1, 3, 1, 5, 1, 5, 1, 7, 1, 3, 1, 5, 1, 5, 1, 7, 1, 7),
        (1, 3, 1, 3, 1),
    ),
    # 7 x 7 neighbours: Cityscapes
    "7x7": (
        (1, 18, 1),
        (1, 5, 1, 9),
        (1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4),
        (1, 2, 1, 2, 1),
    ),
}


@dataclasses.dataclass(frozen=True)
class CallShape:
    """One call, without its batch axis.

    Attributes:
      height, width: size of the map, padded to the neighbourhood by the backbone.
      heads: number of heads, of 32 channels each.
      kernel_size, dilation: those of the neighbourhood.
      blocks: number of the backbone's blocks that make this call.
    """

    height: int
    width: int
    heads: int
    kernel_size: int
    dilation: int
    blocks: int = 1

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of query, key, value and rpb for `batch` images."""
        edge = 2 * self.kernel_size - 1
        qkv = (batch, self.height, self.width, self.heads, HEAD_DIM)
        return [qkv, qkv, qkv, (self.heads, edge, edge)]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A DiNAT-L on images of one size.

    Attributes:
      name: the recipe.
      image_size: (height, width) in pixels.
      kernel_size: edge of the neighbourhood.
      dilations: one for every block, by stage.
    """

    name: str
    image_size: tuple[int, int]
    kernel_size: int = 11
    dilations: tuple[tuple[int, ...], ...] = DILATIONS["base"]

    def calls(self) -> list[CallShape]:
        """Returns every distinct call, with the number of blocks that make it."""
        found = []
        for stride, heads, dilations in zip(STRIDES, HEADS, self.dilations, strict=True):
            for dilation, blocks in collections.Counter(dilations).items():
                least = self.kernel_size * dilation
                height, width = (max(-(-size // stride), least) for size in self.image_size)
                found.append(CallShape(height, width, heads, self.kernel_size, dilation, blocks))
        return found


PUBLISHED = (
    ModelShape("COCO and Mapillary training crop", (1024, 1024)),
    ModelShape("COCO test, 800 x 1333 padded", (800, 1344)),
    ModelShape("ADE20K 640", (640, 640)),
    ModelShape("ADE20K 896", (896, 896)),
    ModelShape("ADE20K 1280", (1280, 1280), dilations=DILATIONS["wide"]),
    ModelShape("Cityscapes training crop", (512, 1024), 7, DILATIONS["7x7"]),
    ModelShape("Cityscapes test", (1024, 2048), 7, DILATIONS["7x7"]),
)
