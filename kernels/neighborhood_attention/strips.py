"""How the TPU kernel cuts a map.

The map is split into residue classes modulo the dilation, whose attention is not dilated. Each axis
of a class is cut into strips of queries, and each strip sees a region of keys, which holds the
windows of all its queries. Strips and regions start at multiples of a block, so that no data moves
within registers; regions end where the axis ends, so that windows which move inwards at a border
stay in view and nothing is padded but to whole blocks.

    kernel_size 5, blocks of 2      positions   0 1 2 3 4 5 6 7 8 9
                                    strips     [0 1|2 3|4 5|6 7|8 9]
                                    regions of [0 1 2 3 4 5]            strips 0 and 1
                                                   [2 3 4 5 6 7]        strip 2
                                                       [4 5 6 7 8 9]    strips 3 and 4

What a query sees of its region differs between a few kinds of strips: those near the borders and
the one for all others; and so does the offset between the two. All of it is known before tracing.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

LANES = 128
SUBLANES = 8  # rows of a register: columns of the map, which lie there, come in such blocks
ROW_BLOCK = 2  # rows of the map: 2 x 8 pixels fill a register of bfloat16
MAX_QUERIES = 512  # of a tile
MAX_KEYS = 768


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one axis of the map is cut.

    Attributes:
      length: positions of the map along the axis, at least kernel_size * dilation.
      kernel_size: positions that a query sees, odd.
      dilation: distance between neighbours.
      block: positions of a block.
      tile: queries of a strip, whole blocks; `padded` if the axis is not cut.
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
        """The first residue class that is short by one position; `dilation` if none is."""
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
        """Positions of a region before its strip, if there are so many; as many come after it.

        One more than the windows have, if there are classes that end one position earlier.
        """
        has_short = self.first_short < self.dilation
        return round_up(self.kernel_size // 2 + has_short, self.block)

    @property
    def keys(self) -> int:
        """Positions of a region."""
        return min(self.padded, self.tile + 2 * self.before)

    @property
    def last_start(self) -> int:
        """Where the last region starts."""
        return max(0, round_up(self.size, self.block) - self.keys)

    @property
    def starts(self) -> np.ndarray:
        """int [strips]: where the region of each strip starts."""
        return np.clip(np.arange(self.strips) * self.tile - self.before, 0, self.last_start)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int [strips]: from where a strip starts to where its region does: 0 or before it."""
        return self.starts - np.arange(self.strips) * self.tile

    @functools.cached_property
    def span(self) -> int:
        """Keys of a region and those before it that the offsets shift into view."""
        return self.keys - int(self.offsets.min())

    def bias(self) -> np.ndarray:
        """float32 [span, tile, 2 * kernel_size - 1]: what a query of a strip adds to a key.

        One-hot, zero for a key that no query sees. The keys of a strip's region are those from
        `shifts` of the strip on.
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
        """Which mask a strip has, int [2, strips], and the masks, bool [kinds, keys, tile].

        The first index is 1 for classes that are short by a position. A mask is true for a key
        that the query does not see; a query that does not exist sees all.
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
    """How a map is cut for the kernel.

    Attributes:
      rows, columns: the axes.
      heads_per_group: heads whose channels share the lanes of a register.
    """

    rows: Cut
    columns: Cut
    heads_per_group: int

    @property
    def queries(self) -> int:
        """Queries of a tile with those that do not exist."""
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
        """Heads of a group that are done in one product: they fill the lanes once, if they can."""
        fitting = [n for n in range(1, self.heads_per_group + 1) if self.heads_per_group % n == 0]
        return max(n for n in fitting if n == 1 or n * self.queries <= LANES)

    @property
    def classes(self) -> int:
        return self.rows.dilation * self.columns.dilation

    @property
    def cost(self) -> float:
        """Rows that pass the matrix units for a group of heads, forward and backward."""
        height = self.stack * self.queries
        lanes, passes = -(-self.keys // LANES), -(-height // LANES)
        streamed = 5 * height * lanes + 2 * self.keys * passes
        loaded = LANES // 4 * (5 * lanes + 2 * passes)
        tiles = self.rows.strips * self.columns.strips * self.classes
        return tiles * (streamed + loaded) * (self.heads_per_group // self.stack)


def cuts(length: int, kernel_size: int, dilation: int, block: int, tiles: list[int]) -> list[Cut]:
    """The axis as a whole, and with strips of each of the sizes that need several of them."""
    size = round_up(-(-length // dilation), block)
    whole = Cut(length, kernel_size, dilation, block, size)
    found = [dataclasses.replace(whole, tile=tile) for tile in tiles if tile < size]
    return [whole, *(cut for cut in found if cut.keys < cut.padded)]


@functools.lru_cache(maxsize=256)
def plan(
    height: int, width: int, kernel_size: int, dilation: int, heads_per_group: int
) -> Plan | None:
    """The plan of least cost; None if the neighbourhood is too large for any."""
    rows = cuts(height, kernel_size, dilation, ROW_BLOCK, list(range(2, 17, ROW_BLOCK)))
    columns = cuts(width, kernel_size, dilation, SUBLANES, [SUBLANES])
    plans = [Plan(r, c, heads_per_group) for r in rows for c in columns]
    fitting = [plan for plan in plans if plan.queries <= MAX_QUERIES and plan.keys <= MAX_KEYS]
    return min(fitting, key=lambda plan: plan.cost, default=None)
