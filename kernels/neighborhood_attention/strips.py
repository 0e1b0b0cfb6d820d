"""The cut of a map for the TPU kernel.

The map is split into residue classes modulo the dilation, whose attention is not dilated. Each axis
of a class is cut into strips of queries, and each strip sees a region of keys, which holds the
windows of all its queries. Strips and regions start at multiples of a block, so no data moves
within registers. Regions end with the axis, so windows that move inwards at a border stay in view,
and axes are padded to whole blocks only.

    kernel_size 5, blocks of 2      positions   0 1 2 3 4 5 6 7 8 9
                                    strips     [0 1|2 3|4 5|6 7|8 9]
                                    regions of [0 1 2 3 4 5]            strips 0 and 1
                                                   [2 3 4 5 6 7]        strip 2
                                                       [4 5 6 7 8 9]    strips 3 and 4

The view of a query, and the offset between strip and region, differ between a few kinds of strips:
those near the borders, and all others. Everything is known before tracing.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from oneformer_jax.kernels.tpu_kernels import LANES, SUBLANES, round_up

# Blocks of columns of the map are of SUBLANES, the rows of a register, along which they lie.
ROW_BLOCK = 2  # rows of the map: 2 x 8 pixels fill a register of bfloat16
MAX_QUERIES = 512  # of a tile
MAX_KEYS = 768


@dataclasses.dataclass(frozen=True)
class Cut:
    """The cut of one axis of the map.

    Attributes:
      length: positions of the map along the axis, at least kernel_size * dilation.
      kernel_size: positions that a query sees, odd.
      dilation: distance between neighbours.
      block: positions of a block.
      tile: queries of a strip, in whole blocks; `padded` for an axis in one piece.
    """

    length: int
    kernel_size: int
    dilation: int
    block: int
    tile: int

    @property
    def size(self) -> int:
        """Positions of the longest residue class; another one may lack the last."""
        return -(-self.length // self.dilation)

    @property
    def first_short(self) -> int:
        """The first residue class that is short by one position, or `dilation`."""
        return self.length % self.dilation or self.dilation

    @property
    def padded(self) -> int:
        """Positions of a class in memory: whole strips."""
        return round_up(self.size, self.tile)

    @property
    def strips(self) -> int:
        return self.padded // self.tile

    @property
    def before(self) -> int:
        """Most positions of a region before its strip, and after it.

        One more than the windows need if some classes end one position earlier.
        """
        has_short = self.first_short < self.dilation
        return round_up(self.kernel_size // 2 + has_short, self.block)

    @property
    def keys(self) -> int:
        """Positions of a region."""
        return min(self.padded, self.tile + 2 * self.before)

    @property
    def last_start(self) -> int:
        """Start of the last region."""
        return max(0, round_up(self.size, self.block) - self.keys)

    @property
    def starts(self) -> np.ndarray:
        """int [strips]: start of the region of each strip."""
        return np.clip(np.arange(self.strips) * self.tile - self.before, 0, self.last_start)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Returns int [strips]: start of a strip's region less that of the strip, at most 0."""
        return self.starts - np.arange(self.strips) * self.tile

    @functools.cached_property
    def span(self) -> int:
        """Keys of a region, and those before it that the offsets shift into view."""
        return self.keys - int(self.offsets.min())

    def bias(self) -> np.ndarray:
        """Marks each key's offset from each query: float32 [span, tile, 2 * kernel_size - 1].

        Zero for a key that no query sees. The keys of a strip's region start at its `shifts`.
        """
        key = np.arange(self.span)[:, None] + self.offsets.min()
        index = key - np.arange(self.tile) + self.kernel_size - 1
        return (index[..., None] == np.arange(2 * self.kernel_size - 1)).astype(np.float32)

    @property
    def shifts(self) -> np.ndarray:
        """int [strips]: the first key of a region within the span."""
        return self.offsets - self.offsets.min()

    @functools.cached_property
    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Makes strips' indices of masks, int [2, strips], and masks, bool [kinds, keys, tile].

        Row 1 of the indices is for classes that are short by a position. A mask is True for a key
        that the query does not see; a padding query sees all.
        """
        kinds = np.zeros((2, self.strips), int)
        seen: dict[bytes, tuple[int, np.ndarray]] = {}
        for short in range(2 if self.first_short < self.dilation else 1):
            count = self.size - short
            for strip, start in enumerate(self.starts):
                query = strip * self.tile + np.arange(self.tile)
                key = start + np.arange(self.keys)[:, None]
                window = np.clip(query - self.kernel_size // 2, 0, count - self.kernel_size)
                blocked = (key < window) | (key >= window + self.kernel_size)
                blocked &= query < count
                kinds[short, strip] = seen.setdefault(blocked.tobytes(), (len(seen), blocked))[0]
        return kinds, np.stack([blocked for _, blocked in seen.values()])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cut of a map for the kernel.

    Attributes:
      rows, columns: the axes.
      heads_per_group: heads whose channels share the lanes of a register.
    """

    rows: Cut
    columns: Cut
    heads_per_group: int

    @property
    def queries(self) -> int:
        """Queries of a tile, padding included."""
        return self.rows.tile * self.columns.tile

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return self.rows.keys * self.columns.keys

    @property
    def parts(self) -> int:
        """Blocks of columns in a region, each as wide as a strip."""
        return self.columns.keys // self.columns.tile

    @property
    def stack(self) -> int:
        """Heads of a group in one product: enough to fill the lanes once, if possible."""
        fitting = [n for n in range(1, self.heads_per_group + 1) if self.heads_per_group % n == 0]
        return max(n for n in fitting if n == 1 or n * self.queries <= LANES)

    @property
    def classes(self) -> int:
        return self.rows.dilation * self.columns.dilation

    @property
    def cost(self) -> float:
        """Rows through the matrix units for a group of heads, forward and backward."""
        height = self.stack * self.queries
        lanes, passes = -(-self.keys // LANES), -(-height // LANES)
        streamed = 5 * height * lanes + 2 * self.keys * passes
        loaded = LANES // 4 * (5 * lanes + 2 * passes)
        tiles = self.rows.strips * self.columns.strips * self.classes
        return tiles * (streamed + loaded) * (self.heads_per_group // self.stack)


def cuts(length: int, kernel_size: int, dilation: int, block: int, tiles: list[int]) -> list[Cut]:
    """Lists the cuts: the axis as a whole, and in strips of each size that needs several."""
    size = round_up(-(-length // dilation), block)
    whole = Cut(length, kernel_size, dilation, block, size)
    found = [dataclasses.replace(whole, tile=tile) for tile in tiles if tile < size]
    return [whole, *(cut for cut in found if cut.keys < cut.padded)]


@functools.lru_cache(maxsize=256)
def plan(
    height: int, width: int, kernel_size: int, dilation: int, heads_per_group: int
) -> Plan | None:
    """Finds the plan of least cost; None if the neighbourhood is too large for any."""
    rows = cuts(height, kernel_size, dilation, ROW_BLOCK, list(range(2, 17, ROW_BLOCK)))
    columns = cuts(width, kernel_size, dilation, SUBLANES, [SUBLANES])
    plans = [Plan(r, c, heads_per_group) for r in rows for c in columns]
    fitting = [plan for plan in plans if plan.queries <= MAX_QUERIES and plan.keys <= MAX_KEYS]
    return min(fitting, key=lambda plan: plan.cost, default=None)
