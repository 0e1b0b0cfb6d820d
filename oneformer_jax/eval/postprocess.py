"""Turns class and mask logits into panoptic, instance and semantic segmentations.

The rules are those of the official evaluation (arXiv 2211.06220 and its repository): mask logits
are resized to the original size (see `strips`), and only then thresholded. The largest array on the
device is [Q, strip rows, canvas width] (in the semantic head also [K, strip rows, canvas width]);
only the instance head holds a bit per query and pixel of the image. Steps that depend on the order
of the queries (merging stuff, numbering segments) run on the host, on [Q] tables.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from pycocotools import mask as coco_mask

from oneformer_jax import config_rules
from oneformer_jax.eval.segmentation import Instances, Segmentation
from oneformer_jax.eval.strips import canvas_size, mask_strips, placement, this_host
from oneformer_jax.rules import Flag, Number, require
from oneformer_jax.types import Metadata, task_id

Tables = dict[str, jax.Array]  # what the device gives of an image
Fetched = Mapping[str, np.ndarray]  # the same, on the host
Head = Callable[[jax.Array, jax.Array], Any]  # (masks, inside the image) of a strip -> arrays
PerStrip = Callable[[Head], Any]  # a head -> its arrays for all strips, stacked

# Rules of the fields of `PostprocessConfig` that are not keys of a config.
_RULES = {
    "instance_score_threshold": Number(0, 1),
    "things_only_instances": Flag(),
    "ade_instance_remap": Flag(),
}


@dataclasses.dataclass(frozen=True)
class PostprocessConfig:
    """Thresholds of the three heads; the defaults are the official COCO values.

    Attributes:
      object_mask_threshold: panoptic; a query counts only if its best class is above this
        probability (official: 0.8; 0.5 on ADE20K).
      overlap_threshold: panoptic; a segment is dropped if the other queries leave it less than this
        share of its own mask.
      topk: instance; number of best (query, class) pairs, things and stuff together, at most Q*K.
      things_only_instances: instance; drop stuff, after the top-k as the official code does.
      instance_score_threshold: instance; drop pairs whose class probability is not above this. The
        evaluation uses 0; the official demo uses its object mask threshold.
      instance_max_iou: instance; drop an instance whose mask overlaps one of a higher score, of any
        class, with a larger intersection over union. 1 (official) drops none.
      ade_instance_remap: instance; number the classes by their position among the things, as the
        official ADE20K instance annotations do. The result's `metadata` is then that of the things.
    """

    object_mask_threshold: float = 0.8
    overlap_threshold: float = 0.8
    topk: int = 150
    things_only_instances: bool = True
    instance_score_threshold: float = 0.0
    instance_max_iou: float = 1.0
    ade_instance_remap: bool = False

    def __post_init__(self) -> None:
        config_rules.require_fields("eval", self, but=tuple(_RULES))
        require("postprocess ", vars(self), _RULES)
        if self.ade_instance_remap and not self.things_only_instances:
            raise ValueError(
                "postprocess ade_instance_remap numbers things only: set things_only_instances too"
            )


def segment_images(
    class_logits: jax.Array,
    mask_logits: jax.Array,
    image_size: np.ndarray,
    original_size: np.ndarray,
    padded_size: tuple[int, int],
    *,
    task: str,
    config: PostprocessConfig,
    metadata: Metadata,
    images: Sequence[np.ndarray | None] | None = None,
) -> Iterator[Segmentation]:
    """Segments a batch of images; the host finishes the results one at a time.

    An image's instance masks may take hundreds of megabytes, so callers should finish one image
    before they take the next.

    The logits may be arrays of NumPy or JAX, on one device or sharded over a mesh along the batch:
    each device then segments its own images. With several hosts every host gets the images whose
    logits it holds, and passes the sizes of those alone.

    Args:
      class_logits: [B, Q, K+1], the last class is "no object".
      mask_logits: [B, Q, h, w], covering the padded input.
      image_size: int [B, 2], height and width of each image within the padded input.
      original_size: int [B, 2], height and width of each result.
      padded_size: height and width of the padded input, the same for the batch.
      task: one of `TASKS`.
      config: thresholds.
      metadata: the K classes.
      images: B uint8 [H, W, 3] original images (or None) to keep in the results.

    Returns:
      An iterator over B segmentations, in order.

    Raises:
      ValueError: unknown task, or shapes that do not fit together.
    """
    task_id(task)
    image_size = np.asarray(image_size, np.int32)
    original_size = np.asarray(original_size, np.int32)
    if class_logits.shape[-1] != metadata.num_classes + 1:
        raise ValueError(
            f"class logits have {class_logits.shape[-1]} entries, but {metadata.dataset} has "
            f"{metadata.num_classes} classes and one 'no object': model and data set do not belong "
            "together"
        )
    class_logits, mask_logits, mesh = this_host(class_logits, mask_logits)
    batch = class_logits.shape[0]
    for name, array in (("image_size", image_size), ("original_size", original_size)):
        if array.shape != (batch, 2):
            raise ValueError(f"{name} has shape {array.shape}; expected ({batch}, 2)")
    if (image_size > np.asarray(padded_size)).any():
        raise ValueError(f"image_size {image_size.max(0)} exceeds padded_size {tuple(padded_size)}")
    if images is not None and len(images) != batch:
        raise ValueError(f"{len(images)} images for a batch of {batch}")

    rows = (class_logits, mask_logits, image_size, original_size)
    threshold = np.float32(config.object_mask_threshold)
    tables = run_heads(
        *jax.device_put(rows, placement(class_logits, mesh, P("data"))),
        jax.device_put(threshold, placement(class_logits, mesh, P())),
        task=task,
        padded_size=tuple(int(s) for s in padded_size),
        canvas=canvas_size(original_size),
        topk=min(config.topk, class_logits.shape[1] * metadata.num_classes),
        mesh=mesh,
    )
    # The device's results are small (a map, or a bit per mask pixel), so they are fetched at once.
    tables = jax.device_get(tables)
    return (
        _finish(
            {name: values[b] for name, values in tables.items()},
            tuple(original_size[b].tolist()),
            task,
            config,
            metadata,
            None if images is None else images[b],
        )
        for b in range(batch)
    )


def _finish(
    tables: Fetched,
    size: tuple[int, int],
    task: str,
    config: PostprocessConfig,
    metadata: Metadata,
    image: np.ndarray | None,
) -> Segmentation:
    """Makes the result of an image, of `size`, from what the device gave."""
    height, width = size
    if task == "semantic":
        class_map = tables["class_map"][:height, :width].astype(np.int32)
        return Segmentation(task, metadata, class_map=class_map, image=image)
    if task == "panoptic":
        found = number_segments(tables, metadata, config, np)
        ids = np.append(found["ids"], np.int32(0))  # the last entry is for winner -1
        segments, infos = ids[tables["winner"][:height, :width]], segment_infos(found)
        return Segmentation(task, metadata, segments=segments, segments_info=infos, image=image)
    labels, scores, valid = choose_pairs(tables, metadata, config, np)
    if config.ade_instance_remap:
        metadata = things_metadata(metadata)
    bits = tables["bits"][tables["queries"][valid], :height]
    masks = np.unpackbits(bits, axis=-1, count=width).view(bool)
    instances = Instances(masks, scores[valid], labels[valid])
    if config.instance_max_iou < 1:
        instances = _without_duplicates(instances, config.instance_max_iou)
    return Segmentation(task, metadata, instances=instances, image=image)


def segment_batch(*args: Any, **options: Any) -> list[Segmentation]:
    """As `segment_images`, but returns a list."""
    return list(segment_images(*args, **options))


def program_count() -> int:
    """Returns the number of programs that this process has compiled for post-processing."""
    return run_heads._cache_size()  # type: ignore[attr-defined]


@functools.partial(jax.jit, static_argnames=("task", "padded_size", "canvas", "topk", "mesh"))
def run_heads(
    class_logits: jax.Array,
    mask_logits: jax.Array,
    image_size: jax.Array,
    original_size: jax.Array,
    threshold: jax.Array,
    *,
    task: str,
    padded_size: tuple[int, int],
    canvas: tuple[int, int],
    topk: int,
    mesh: Mesh | None,
) -> Tables:
    """Runs the device's part for a batch: a dict of arrays [B, ...]; see the three heads."""

    def image(threshold: jax.Array, row: tuple[jax.Array, ...]) -> Tables:
        class_logits, mask_logits, image_size, original_size = row
        probabilities = jax.nn.softmax(class_logits.astype(jnp.float32), axis=-1)
        strips = mask_strips(
            mask_logits, image_size, original_size, padded_size=padded_size, canvas=canvas
        )

        def per_strip(head: Head) -> Any:
            return jax.lax.map(lambda s: head(*strips.masks(s)), jnp.arange(strips.count))

        if task == "panoptic":
            return _panoptic_tables(probabilities, per_strip, canvas, threshold)
        if task == "instance":
            return _instance_tables(probabilities, per_strip, canvas, topk)
        return _semantic_tables(probabilities, per_strip, canvas)

    def batch(threshold: jax.Array, rows: tuple[jax.Array, ...]) -> Tables:
        return jax.lax.map(functools.partial(image, threshold), rows)

    if mesh is not None:
        batch = jax.shard_map(batch, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    return batch(threshold, (class_logits, mask_logits, image_size, original_size))


def _panoptic_tables(
    probabilities: jax.Array, per_strip: PerStrip, canvas: tuple[int, int], threshold: jax.Array
) -> Tables:
    """winner int16 [Hc, Wc] (query, or -1) and the [Q] tables that decide which segments stay."""
    scores, labels = probabilities.max(-1), probabilities.argmax(-1)
    keep = (labels != probabilities.shape[-1] - 1) & (scores > threshold)
    queries = jnp.arange(scores.shape[0])[:, None, None]

    def head(masks: jax.Array, inside_image: jax.Array) -> Tables:
        probability = jax.nn.sigmoid(masks)
        ranked = jnp.where(keep[:, None, None], scores[:, None, None] * probability, -1.0)
        winner = ranked.argmax(0)
        won = (winner == queries) & inside_image
        own = (probability >= 0.5) & inside_image
        taken = won & own
        return dict(
            winner=jnp.where(taken.any(0), winner, -1).astype(jnp.int16),
            won=won.sum((1, 2)),
            own=own.sum((1, 2)),
            taken=taken.sum((1, 2)),
        )

    strips = per_strip(head)
    areas = {name: strips[name].sum(0) for name in ("won", "own", "taken")}
    winner = strips["winner"].reshape(canvas)
    return dict(winner=winner, scores=scores, labels=labels, keep=keep, **areas)


def number_segments(
    tables: Mapping[str, Any], metadata: Metadata, config: PostprocessConfig, xp: Any
) -> dict[str, Any]:
    """Drops the covered queries, merges stuff of a class, numbers the rest in their order.

    Args:
      tables: of Q queries of an image: won, own, taken, labels, scores and keep.
      metadata: the K classes.
      config: thresholds.
      xp: `numpy`, or `jax.numpy` in a program.

    Returns:
      `ids` int32 [Q], the segment of each query, 0 for none; `count` int32, of segments; and of
      each segment, at index id - 1 of [Q]: `category_id` int32, `isthing` bool, `score` float32 and
      `area` int32.
    """
    won, own, taken = (tables[name] for name in ("won", "own", "taken"))
    # On a device float32 decides as float64 does up to masks of some millions of pixels.
    enough = won / xp.maximum(own, 1) >= config.overlap_threshold
    kept = tables["keep"] & (xp.minimum(xp.minimum(won, own), taken) > 0) & enough
    label = xp.minimum(tables["labels"], metadata.num_classes - 1).astype(np.int32)
    isthing = xp.asarray(metadata.is_thing, bool)[label]
    order = xp.arange(len(kept))
    # Stuff belongs to the first kept query of its class, a thing to itself.
    first = xp.where(isthing, order, (kept & (label[:, None] == label)).argmax(1))
    new = kept & (first == order)
    ids = xp.where(kept, xp.cumsum(new.astype(np.int32))[first], 0).astype(np.int32)
    member = kept & (ids == order[:, None] + 1)  # [segment, query]
    founder, used = member.argmax(1), member.any(1)
    return dict(
        ids=ids,
        count=new.sum().astype(np.int32),
        category_id=xp.where(used, label[founder], 0),
        isthing=used & isthing[founder],
        score=xp.where(member, tables["scores"], 0.0).max(1),
        area=xp.where(member, taken, 0).sum(1).astype(np.int32),
    )


def segment_infos(found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Lists the segments of `number_segments` as `Segmentation.segments_info`."""
    return [
        dict(
            id=i + 1,
            category_id=int(found["category_id"][i]),
            isthing=bool(found["isthing"][i]),
            score=float(found["score"][i]),
            area=int(found["area"][i]),
        )
        for i in range(int(found["count"]))
    ]


def _instance_tables(
    probabilities: jax.Array, per_strip: PerStrip, canvas: tuple[int, int], topk: int
) -> Tables:
    """The top-k (query, class) pairs and, per query, the mask's bits and mean probability."""
    classes = probabilities.shape[-1] - 1
    scores, index = jax.lax.top_k(probabilities[:, :classes].reshape(-1), topk)

    def head(masks: jax.Array, inside_image: jax.Array) -> Tables:
        mask = (masks > 0) & inside_image
        return dict(
            bits=jnp.packbits(mask, axis=-1),
            pixels=mask.sum((1, 2)),
            total=jnp.where(mask, jax.nn.sigmoid(masks), 0.0).sum((1, 2)),
        )

    strips = per_strip(head)
    bits = jnp.moveaxis(strips["bits"], 0, 1).reshape(-1, canvas[0], canvas[1] // 8)
    quality = strips["total"].sum(0) / (strips["pixels"].sum(0) + 1e-6)
    return dict(
        scores=scores, labels=index % classes, queries=index // classes, bits=bits, quality=quality
    )


def choose_pairs(
    tables: Mapping[str, Any], metadata: Metadata, config: PostprocessConfig, xp: Any
) -> tuple[Any, Any, Any]:
    """Returns labels int32, scores float32 and bool, the pairs that count, of the top-k: [N] each.

    Args:
      tables: of an image: scores, labels and queries [N], quality [Q].
      metadata, config, xp: see `number_segments`.
    """
    labels = tables["labels"].astype(np.int32)
    valid = tables["scores"] > config.instance_score_threshold
    things = np.asarray(metadata.is_thing, bool)
    if config.things_only_instances:
        valid &= xp.asarray(things)[labels]
    if config.ade_instance_remap:
        labels = xp.asarray(np.maximum(np.cumsum(things) - 1, 0), np.int32)[labels]
    return labels, tables["scores"] * tables["quality"][tables["queries"]], valid


def _without_duplicates(found: Instances, max_iou: float) -> Instances:
    """Keeps the instances that overlap no kept one of a higher score by more than `max_iou`."""
    order = np.argsort(-found.scores, kind="stable")
    encoded = [coco_mask.encode(np.asfortranarray(found.masks[i], np.uint8)) for i in order]
    overlaps = np.reshape(coco_mask.iou(encoded, encoded, [0] * len(encoded)), (len(order),) * 2)
    kept: list[int] = []
    for i in range(len(order)):
        if not (overlaps[i, kept] > max_iou).any():
            kept.append(i)
    return found.take(np.sort(order[kept]))


def things_metadata(metadata: Metadata) -> Metadata:
    """Returns `metadata` with the things only, in order."""
    columns: dict[str, Any] = {
        name: tuple(itertools.compress(getattr(metadata, name), metadata.is_thing))
        for name in ("class_names", "is_thing", "colors", "category_ids")
    }
    return dataclasses.replace(metadata, **columns)


def class_dtype(num_classes: int) -> jnp.dtype:
    """Returns the dtype of maps of class ids that leave the device: two bytes if they suffice."""
    return jnp.int16 if num_classes <= 1 << 15 else jnp.int32


# Classes whose scores a strip holds at once; more would take gigabytes.
_CLASSES_AT_ONCE = 1024


def _semantic_tables(
    probabilities: jax.Array, per_strip: PerStrip, canvas: tuple[int, int]
) -> Tables:
    """class_map [Hc, Wc], of the dtype `class_dtype`."""
    probabilities = probabilities[:, :-1]

    def best(masks: jax.Array, start: int, stop: int) -> tuple[jax.Array, jax.Array]:
        """Returns the highest score of these classes at each pixel, and the first class with it."""
        part = probabilities[:, start:stop]
        sums = jnp.einsum("qc,qsw->csw", part, masks, precision="highest")
        return sums.max(0), start + sums.argmax(0)

    def head(masks: jax.Array, inside_image: jax.Array) -> jax.Array:
        del inside_image  # the host cuts the canvas
        masks, classes = jax.nn.sigmoid(masks), probabilities.shape[1]
        highest, winner = best(masks, 0, min(classes, _CLASSES_AT_ONCE))
        for start in range(_CLASSES_AT_ONCE, classes, _CLASSES_AT_ONCE):
            score, index = best(masks, start, min(classes, start + _CLASSES_AT_ONCE))
            winner = jnp.where(score > highest, index, winner)
            highest = jnp.maximum(score, highest)
        return winner.astype(class_dtype(classes))

    return dict(class_map=per_strip(head).reshape(canvas))
