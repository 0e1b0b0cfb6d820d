"""Test-time augmentation of the semantic task: averages several sizes, mirrored too.

As in the official code, the views are made from the image resized for the test, each is segmented
at the original size, and the class scores are averaged with equal weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax import config_rules
from oneformer_jax.eval.postprocess import class_dtype
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.strips import canvas_size, mask_strips, placement, strip_rows, this_host
from oneformer_jax.rules import require_names
from oneformer_jax.types import Metadata

# The official sizes, in quarters of the test's short edge.
_QUARTERS = (2, 3, 4, 5, 6, 7)
# The official cap of the long edge on ADE20K, in the test's short edges.
_MAX_SIZE_FACTOR = 7
# Pixels of the sides of a view, whatever the test's short edge.
_LEAST, _MOST = 8, 65_536


@dataclasses.dataclass(frozen=True)
class TtaConfig:
    """The views of an image.

    Attributes:
      short_edges: shorter side of each view, in pixels.
      max_size: cap of the longer side, in pixels.
      flip: also segment each view mirrored.
    """

    short_edges: tuple[int, ...]
    max_size: int
    flip: bool = True

    def __post_init__(self) -> None:
        config_rules.require_fields("eval.tta", self)
        if not self.short_edges or not self.max_size:
            raise ValueError("the views of an image need sizes: see `from_settings` for defaults")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], short_edge: int) -> TtaConfig:
        """Makes the views of `eval.tta`.

        Args:
          settings: may have `short_edges` (none: 0.5, 0.75, ... 1.75 times `short_edge`),
            `max_size` (0: 7 times `short_edge`) and `flip`. `enabled` is for the evaluation.
          short_edge: the test's shorter side.

        Raises:
          ValueError: another setting, or a wrong value.
        """
        require_names("eval.tta", settings, ("short_edges", "max_size", "flip", "enabled"), ())
        official = (min(max(short_edge * q // 4, _LEAST), _MOST) for q in _QUARTERS)
        return cls(
            short_edges=tuple(settings.get("short_edges") or official),
            max_size=settings.get("max_size") or min(_MAX_SIZE_FACTOR * short_edge, _MOST),
            flip=settings.get("flip", True),
        )


def with_mirrored(
    views: Iterable[Mapping[str, Any]], flip: bool
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields (view, False) and, with `flip`, (mirrored view, True) of each view.

    A view is {image uint8 [B, H, W, 3], image_size [B, 2]}. An image is mirrored within its own
    size: padding stays at the right.
    """
    for view in views:
        yield dict(view), False
        if flip:
            image = np.zeros_like(view["image"])
            for row, (height, width) in enumerate(view["image_size"]):
                image[row, :height, :width] = view["image"][row, :height, :width][:, ::-1]
            yield {**view, "image": image}, True


class SemanticScores:
    """Sums the class scores of the views of a batch, on the devices that hold their logits.

    The scores take K numbers per pixel of the canvas (see `strips`): 160 MB for Cityscapes.

    Args:
      original_size: int [B, 2].
      metadata: the K classes.
    """

    def __init__(self, original_size: np.ndarray, metadata: Metadata):
        self._original_size = np.asarray(original_size, np.int32)
        self._metadata = metadata
        self._total: jax.Array | None = None

    def add(
        self,
        class_logits: jax.Array,
        mask_logits: jax.Array,
        image_size: np.ndarray,
        padded_size: tuple[int, int],
        *,
        flip: bool,
    ) -> None:
        """Adds a view, mirrored if `flip`; for the arguments see `postprocess.segment_images`."""
        class_logits, mask_logits, mesh = this_host(class_logits, mask_logits)
        canvas = canvas_size(self._original_size)
        if self._total is None:
            rows = strip_rows(canvas)
            shape = (
                *(len(class_logits), canvas[0] // rows),
                *(self._metadata.num_classes, rows, canvas[1]),
            )
            self._total = _zeros(shape, None if mesh is None else NamedSharding(mesh, P("data")))
        arrays = (class_logits, mask_logits, np.asarray(image_size, np.int32), self._original_size)
        self._total = _add(
            self._total,
            *jax.device_put(arrays, placement(class_logits, mesh, P("data"))),
            jax.device_put(np.array(flip), placement(class_logits, mesh, P())),
            padded_size=tuple(int(s) for s in padded_size),
            canvas=canvas,
            mesh=mesh,
        )

    def result(self, images: Sequence[np.ndarray | None] | None = None) -> Iterator[Segmentation]:
        """Segments the batch by the highest sum at each pixel; keeps `images` in the results."""
        best = jax.device_get(_best(self._total))
        for b, (height, width) in enumerate(self._original_size):
            yield Segmentation(
                "semantic",
                self._metadata,
                class_map=best[b, :height, :width].astype(np.int32),
                image=None if images is None else images[b],
            )


@functools.partial(jax.jit, static_argnames=("shape", "sharding"))
def _zeros(shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    zeros = jnp.zeros(shape, jnp.float32)
    return zeros if sharding is None else jax.lax.with_sharding_constraint(zeros, sharding)


@functools.partial(
    jax.jit, static_argnames=("padded_size", "canvas", "mesh"), donate_argnames="total"
)
def _add(
    total: jax.Array,
    class_logits: jax.Array,
    mask_logits: jax.Array,
    image_size: jax.Array,
    original_size: jax.Array,
    flip: jax.Array,
    *,
    padded_size: tuple[int, int],
    canvas: tuple[int, int],
    mesh: Mesh | None,
) -> jax.Array:
    """Adds the scores of a view to `total` float32 [B, strips, K, rows, W], in place."""

    def batch(flip: jax.Array, total: jax.Array, *rows: jax.Array) -> jax.Array:
        def image(b: jax.Array, total: jax.Array) -> jax.Array:
            class_logits, mask_logits, image_size, original_size = (x[b] for x in rows)
            probabilities = jax.nn.softmax(class_logits.astype(jnp.float32), axis=-1)[:, :-1]
            strips = mask_strips(
                mask_logits,
                image_size,
                original_size,
                padded_size=padded_size,
                canvas=canvas,
                flip=flip,
            )

            def strip(s: jax.Array, total: jax.Array) -> jax.Array:
                masks = jax.nn.sigmoid(strips.masks(s)[0])
                scores = jnp.einsum("qc,qsw->csw", probabilities, masks, precision="highest")
                return total.at[b, s].add(scores)

            return jax.lax.fori_loop(0, strips.count, strip, total)

        return jax.lax.fori_loop(0, len(total), image, total)

    if mesh is not None:
        batch = jax.shard_map(
            batch, mesh=mesh, in_specs=(P(), *[P("data")] * 5), out_specs=P("data")
        )
    return batch(flip, total, class_logits, mask_logits, image_size, original_size)


@jax.jit
def _best(total: jax.Array) -> jax.Array:
    """Classes [B, Hc, Wc] of float32 [B, strips, K, rows, W]."""
    best = total.argmax(2).astype(class_dtype(total.shape[2]))
    return best.reshape(len(best), -1, best.shape[-1])


def program_count() -> int:
    """Returns the number of programs that this process has compiled to add views."""
    return _add._cache_size()  # type: ignore[attr-defined]
