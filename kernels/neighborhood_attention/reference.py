"""Plain-JAX neighbourhood attention by dense products on tiles ("xla"): the reference.

Along each axis a query at position i sees the `kernel_size` nearest positions of its residue class
modulo the dilation. At the borders this window moves inwards, so it never holds fewer (the rule of
NATTEN 0.14).

Gathering the neighbours of each pixel would take kernel_size² times the memory of the keys.
Instead the map is split into residue classes, whose attention is not dilated, and these into tiles.
The queries of a tile attend to one common region of keys in a matrix product, and a mask keeps each
query to its window.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.kernels.recompute import recompute

# Logits of a step, relative to the number of values in the map.
STEP = 1.0


@dataclasses.dataclass(frozen=True)
class Axis:
    """The cut of one axis of the map, known before tracing.

    The padded axis has `dilation` residue classes of `size` positions. Each class is cut into
    `tiles` tiles of `tile` queries, of which the first `front` are padding; the keys of a tile are
    its own positions and `halo` more on either side.

    Attributes:
      length: positions of the map along the axis, at least kernel_size * dilation.
      kernel_size: positions that a query sees, odd.
      dilation: distance between neighbours.
      tiles, tile, front, halo: see above.
    """

    length: int
    kernel_size: int
    dilation: int
    tiles: int
    tile: int
    front: int
    halo: int

    @property
    def size(self) -> int:
        """Positions of the longest residue class; another one may lack the last."""
        return -(-self.length // self.dilation)

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return self.tile + 2 * self.halo

    @property
    def expansion(self) -> float:
        """Logits along this axis over positions: the cost of a query."""
        return self.tiles * self.tile * self.keys * self.dilation / self.length

    @classmethod
    def cut(cls, length: int, kernel_size: int, dilation: int) -> Axis:
        """Finds the cut with the fewest logits.

        A window shifted at the border must stay among the keys of its tile, which reach `halo`
        beyond it: the first and the last tile need more than `halo` real queries.
        """
        whole = cls(length, kernel_size, dilation, 1, -(-length // dilation), 0, 0)
        lacking = whole.size - length // dilation  # in the shortest class
        halo = kernel_size // 2
        cuts = [whole]
        for tile in range(halo + 1, whole.size):
            tiles = -(-whole.size // tile)
            back = (spare := tiles * tile - whole.size) // 2
            if tile - (spare - back) > halo and tile - back - lacking > halo:
                cuts.append(
                    dataclasses.replace(
                        whole, tiles=tiles, tile=tile, front=spare - back, halo=halo
                    )
                )
        return min(cuts, key=lambda cut: (cut.expansion, cut.tiles))

    def mask(self) -> np.ndarray:
        """Marks the keys that a query of a residue class sees: bool [dilation, tiles, tile, keys].

        A padding query sees the keys of the nearest real one.
        """
        tiles = self.tile * np.arange(self.tiles)[:, None] - self.front
        query = (tiles + np.arange(self.tile))[None, :, :, None]
        key = (tiles + np.arange(self.keys) - self.halo)[None, :, None, :]
        count = np.array([len(range(r, self.length, self.dilation)) for r in range(self.dilation)])
        count = count[:, None, None, None]
        query = np.clip(query, 0, count - 1)
        start = np.clip(query - self.kernel_size // 2, 0, count - self.kernel_size)
        return (start <= key) & (key < start + self.kernel_size)

    def offsets(self) -> np.ndarray:
        """Returns float32 [tile, keys, 2 * kernel_size - 1]: one-hot index of key minus query.

        All zero for a pair too far apart to be neighbours.
        """
        key = np.arange(self.keys)[None, :] - self.halo
        index = key - np.arange(self.tile)[:, None] + self.kernel_size - 1
        return (index[..., None] == np.arange(2 * self.kernel_size - 1)).astype(np.float32)


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rpb: jax.Array,
    *,
    kernel_size: int,
    dilation: int,
) -> jax.Array:
    """As `api.neighborhood_attention`, without its checks.

    It does a few heads at a time and keeps no intermediate values, so besides its arguments and
    result it takes a few times the memory of `query`, for gradients too.
    """
    _, height, width, heads, channels = query.shape
    rows = Axis.cut(height, kernel_size, dilation)
    columns = Axis.cut(width, kernel_size, dilation)
    most = STEP * heads * channels / (rows.expansion * columns.expansion)
    group = max(g for g in range(1, heads + 1) if heads % g == 0 and (g <= most or g == 1))

    def split(x):  # [B, H, W, N, D] to [steps, group, B, H, W, D]
        x = jnp.moveaxis(x, 3, 0)
        return x.reshape(heads // group, group, *x.shape[1:])

    @recompute
    def step(*arrays):
        return _attend(*arrays, rows, columns)

    out = jax.lax.map(
        lambda x: step(*x),
        (split(query), split(key), split(value), rpb.reshape(-1, group, *rpb.shape[1:])),
    )
    return jnp.moveaxis(out.reshape(heads, *out.shape[2:]), 0, 3)


def _attend(q, k, v, rpb, rows: Axis, columns: Axis) -> jax.Array:
    """Attends with some heads: q, k, v [N, B, H, W, D] and their rpb to [N, B, H, W, D].

    Letters: i j residue classes, x y tiles, t u queries of a tile, k l keys of a tile. Large arrays
    have one axis of queries t u and one of keys k l: two axes of about ten each would fill an
    accelerator's registers badly.
    """
    q = _cut(q, rows, columns, 0, 0)
    k, v = (_cut(x, rows, columns, rows.halo, columns.halo) for x in (k, v))
    logits = _product("nbpqd,nbpkd->nbpqk", q, k, preferred_element_type=jnp.float32)
    bias = jnp.einsum(
        "npq,tkp,ulq->ntukl",
        rpb.astype(jnp.float32),
        rows.offsets(),
        columns.offsets(),
        precision=jax.lax.Precision.HIGHEST,  # picks values without rounding them
    )
    bias = bias.reshape(-1, 1, 1, 1, 1, 1, *logits.shape[-2:])
    logits = logits * q.shape[-1] ** -0.5 + bias
    # Masks are applied in turn: their product would be a constant as large as the logits.
    for axis, absent in ((rows, (1, 3, 5, 7)), (columns, (0, 2, 4, 6))):
        mask = axis.mask()
        if not mask.all():
            mask = np.expand_dims(mask, absent)  # [i, j, x, y, t, u, k, l], 1 where absent
            mask = jnp.broadcast_to(
                mask, (*mask.shape[:4], rows.tile, columns.tile, rows.keys, columns.keys)
            )
            mask = mask.reshape(*mask.shape[:4], *logits.shape[-2:])
            logits = jnp.where(mask, logits, -jnp.inf)
    attention = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return _join(_product("nbpqk,nbpkd->nbpqd", attention, v), rows, columns)


def _product(letters: str, a: jax.Array, b: jax.Array, **options) -> jax.Array:
    """Forms the einsum of two arrays of 8 axes with i j x y as one axis p; the result has 8 axes.

    XLA's library for products on CPUs ends the process if an operand has 8 axes.
    """
    a_merged, b_merged = (x.reshape(*x.shape[:2], -1, *x.shape[-2:]) for x in (a, b))
    out = jnp.einsum(letters, a_merged, b_merged, **options)
    return out.reshape(*a.shape[:6], *out.shape[-2:])


def _cut(x: jax.Array, rows: Axis, columns: Axis, *halo: int) -> jax.Array:
    """Cuts [N, B, H, W, D] into [N, B, i, j, x, y, t u, D], t and u longer by twice the halo."""
    heads, batch, *_, channels = x.shape
    spare = [axis.size * axis.dilation - axis.length for axis in (rows, columns)]
    x = _pad(_pad(x, 2, 0, spare[0]), 3, 0, spare[1])
    x = x.reshape(heads, batch, rows.size, rows.dilation, columns.size, columns.dilation, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6)
    x = _tiles(_tiles(x, 4, rows, halo[0]), 6, columns, halo[1])
    x = x.swapaxes(5, 6)
    return x.reshape(*x.shape[:6], -1, channels)


def _join(x: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """The inverse of `_cut` without halo."""
    *axes, _, channels = x.shape
    x = x.reshape(*axes, rows.tile, columns.tile, channels).swapaxes(5, 6)
    x = x.reshape(*axes[:4], rows.tiles * rows.tile, columns.tiles * columns.tile, channels)
    down, right = rows.front, columns.front
    x = x[..., down : down + rows.size, right : right + columns.size, :]
    x = x.transpose(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(*axes[:2], rows.size * rows.dilation, columns.size * columns.dilation, channels)
    return x[:, :, : rows.length, : columns.length]


def _tiles(x: jax.Array, at: int, axis: Axis, halo: int) -> jax.Array:
    """Cuts dimension `at`, a residue class, into [tiles, tile + 2 * halo], zeros beyond its ends.

    The overlapping regions are joined from neighbouring blocks of a tile's length, so that neither
    this nor its gradient needs indices.
    """
    blocks = axis.tiles - (-2 * halo // axis.tile)
    before = axis.front + halo
    x = _pad(x, at, before, blocks * axis.tile - before - x.shape[at])
    x = x.reshape(*x.shape[:at], blocks, axis.tile, *x.shape[at + 1 :])
    parts = [
        jax.lax.slice_in_dim(x, i, i + axis.tiles, axis=at) for i in range(blocks - axis.tiles + 1)
    ]
    x = jnp.concatenate(parts, axis=at + 1) if len(parts) > 1 else x
    return jax.lax.slice_in_dim(x, 0, axis.tile + 2 * halo, axis=at + 1)


def _pad(x: jax.Array, at: int, before: int, after: int) -> jax.Array:
    """Pads dimension `at` with zeros."""
    if not before and not after:
        return x
    return jnp.pad(x, [(before, after) if axis == at else (0, 0) for axis in range(x.ndim)])
