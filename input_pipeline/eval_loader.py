"""Batches for evaluation: every record once, at its test-time size, one padded size a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from oneformer_jax import config_rules
from oneformer_jax.input_pipeline.loader import (
    Batch,
    Source,
    check_processes,
    naming,
    note_broken,
    read_options,
    require,
)
from oneformer_jax.input_pipeline.records import RecordError
from oneformer_jax.input_pipeline.resize import resize_for_test, shortest_edge_size
from oneformer_jax.progress import logged


@dataclasses.dataclass(frozen=True)
class EvalLoaderConfig:
    """Settings of the evaluation loader; ValueError names the config key of a bad value.

    Attributes:
      batch_size: images per process and batch.
      short_edge: test-time length of the short side, in pixels.
      max_size: cap of the long side, in pixels.
      bucket_multiple: padded sides are multiples of this multiple of 32. 32 is the official
        padding; a larger one compiles fewer programs, but the model sees the padding.
      max_buckets: largest number of padded sizes, 0 is no limit; rare sizes join larger ones.
      limit: number of records, evenly spaced, to evaluate; 0 is all.
      tta_short_edges: short sides of further views, each made from the resized image.
      tta_max_size: cap of the long side of the views, in pixels.
      num_threads: reading threads.
      prefetch: batches kept ready.
      skip_broken: leave out records that raise RecordError instead of raising.
    """

    batch_size: int
    short_edge: int
    max_size: int
    bucket_multiple: int = 32
    max_buckets: int = 0
    limit: int = 0
    tta_short_edges: tuple[int, ...] = ()
    tta_max_size: int = 0
    num_threads: int = 2
    prefetch: int = 2
    skip_broken: bool = False

    def __post_init__(self) -> None:
        require(
            self.batch_size >= 1,
            f"eval.batch_size leaves {self.batch_size} images per process; each needs at least 1",
        )
        for key in ("num_threads", "prefetch"):
            value = getattr(self, key)
            require(value >= 1, f"eval loader: {key} is {value}; it must be >= 1")
        keys = ("short_edge", "max_size", "bucket_multiple", "limit", "max_buckets")
        config_rules.require(
            {f"eval.{key}": getattr(self, key) for key in keys}
            | {
                "eval.tta.short_edges": self.tta_short_edges,
                "eval.tta.max_size": self.tta_max_size,
            }
        )
        require(
            not self.tta_short_edges or self.tta_max_size >= 1,
            f"eval.tta.max_size is {self.tta_max_size}; the views of an image need at least 1",
        )


# Padded sizes (height, width) of the images of a batch, then of each of their further views.
Bucket = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _EvalStep:
    """One batch of one process: padded sizes and up to batch_size records."""

    bucket: Bucket
    indices: tuple[int, ...]


def _view_sizes(size: tuple[int, int], config: EvalLoaderConfig) -> Bucket:
    """Test-time sizes of an image of original size (height, width) and of its views."""
    resized = shortest_edge_size(size, config.short_edge, config.max_size)
    return (
        resized,
        *(
            shortest_edge_size(resized, edge, config.tta_max_size)
            for edge in config.tta_short_edges
        ),
    )


def _bucket(size: tuple[int, int], config: EvalLoaderConfig) -> Bucket:
    """Padded sizes of an image of original size (height, width)."""
    multiple = config.bucket_multiple
    return tuple(
        tuple(-(-side // multiple) * multiple for side in sides)
        for sides in _view_sizes(size, config)
    )


def _pixels(buckets: np.ndarray) -> np.ndarray:
    """Pixels of all views of buckets int [..., V, 2]."""
    return buckets.prod(-1).sum(-1)


def _merge_buckets(buckets: dict[Bucket, list[int]], most: int) -> dict[Bucket, list[int]]:
    """Merges buckets, cheapest padding first, until at most `most` remain."""
    sizes = np.array(list(buckets), np.int64)  # [N, V, 2]
    members = list(buckets.values())
    while len(members) > most:
        counts = np.array([len(m) for m in members])
        joint = np.maximum(sizes[:, None], sizes[None])
        added = _pixels(joint) - _pixels(sizes)[:, None]  # per image of a pair's first bucket
        cost = (added * counts[:, None] + (added * counts[:, None]).T).astype(np.float64)
        np.fill_diagonal(cost, np.inf)
        first, second = sorted(np.unravel_index(cost.argmin(), cost.shape))
        sizes[first] = joint[first, second]
        members[first] = sorted(members[first] + members[second])
        sizes = np.delete(sizes, second, axis=0)
        del members[second]
    merged: dict[Bucket, list[int]] = {}
    for size, indices in zip(sizes.tolist(), members, strict=True):
        merged.setdefault(tuple(map(tuple, size)), []).extend(indices)
    return {bucket: sorted(indices) for bucket, indices in merged.items()}


@dataclasses.dataclass(frozen=True)
class _LoadEvalBatch:
    """Maps a planned step to its batch and the broken records that it met."""

    source: Source
    config: EvalLoaderConfig

    def __call__(self, step: _EvalStep) -> tuple[Batch, dict[int, str]]:
        size = self.config.batch_size
        views = [
            {
                "image": np.zeros((size, *padded, 3), np.uint8),
                "image_size": np.tile(np.array(padded, np.int32), (size, 1)),
            }
            for padded in step.bucket
        ]
        batch = {
            **views[0],
            "original_size": np.tile(np.array(step.bucket[0], np.int32), (size, 1)),
            "valid": np.zeros(size, bool),
            "index": np.full(size, -1, np.int32),
            "records": [None] * size,
        }
        if self.config.tta_short_edges:
            batch["views"] = views[1:]
        broken: dict[int, str] = {}
        for row, index in enumerate(step.indices):
            try:
                record = self._read(index, step.bucket)
            except RecordError as error:
                if not self.config.skip_broken:
                    raise
                broken[index] = str(error)
                continue
            for view, image in zip(views, self._images(record["image"]), strict=True):
                height, width = image.shape[:2]
                view["image"][row, :height, :width] = image
                view["image_size"][row] = height, width
            batch["original_size"][row] = record["image"].shape[:2]
            batch["valid"][row] = True
            batch["index"][row] = index
            batch["records"][row] = record
        return batch, broken

    def _images(self, image: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the image at its test-time size, then the views made from it."""
        config = self.config
        resized = resize_for_test(image, config.short_edge, config.max_size)
        yield resized
        for edge in config.tta_short_edges:
            yield resize_for_test(resized, edge, config.tta_max_size)

    def _read(self, index: int, bucket: Bucket) -> Mapping[str, Any]:
        with naming(f"record {index} of {self.source!r}"):
            record = self.source[index]
        shape = record["image"].shape[:2]
        if (np.array(_view_sizes(shape, self.config)) > np.array(bucket)).any():
            raise RecordError(
                f"{record['file_name']}: the image has {shape[0]} x {shape[1]} pixels, not the "
                "size in its dataset; correct the size in the annotation file"
            )
        return record


class EvalLoader:
    """Evaluation batches of one process; every `iter()` is a new pass over all of them.

    Attributes:
      buckets: padded sizes (height, width), those of further views included, in the order of the
        batches, largest first. Each is one compiled program.
      broken: source position -> error of the broken records left out so far.
    """

    def __init__(
        self,
        source: Source,
        config: EvalLoaderConfig,
        steps: Sequence[_EvalStep],
        broken: dict[int, str],
    ):
        self._source = source
        self._config = config
        self._steps = steps
        self.buckets = tuple(dict.fromkeys(size for step in steps for size in step.bucket))
        self.broken = broken

    def __len__(self) -> int:
        """Number of batches, equal on all processes."""
        return len(self._steps)

    @property
    def images(self) -> int:
        """Number of records in one pass of this process, broken ones included."""
        return sum(len(step.indices) for step in self._steps)

    def __iter__(self) -> Iterator[Batch]:
        batches = (
            grain.MapDataset.source(self._steps)
            .map(_LoadEvalBatch(self._source, self._config))
            .to_iter_dataset(read_options(self._config.num_threads, self._config.prefetch))
        )
        iterator = iter(batches)
        try:
            for batch, broken in iterator:
                note_broken(self.broken, broken)
                yield batch
        finally:
            iterator.close()


def eval_loader(
    source: Source,
    config: EvalLoaderConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalLoader:
    """Gives every record once over all processes, in batches of one padded size.

    Images are resized to `short_edge` / `max_size` and padded with zeros on the right and at the
    bottom to a multiple of `bucket_multiple`. Images of the same padded sizes (a bucket) share
    batches, the largest bucket first, so a run that does not fit into memory fails at once. All
    processes get the same number of batches, and the same bucket at the same step; rows whose
    `valid` is False fill a bucket's last batches. A source without `image_size(i)` has every image
    decoded once beforehand.

    Args:
      source: the records.
      config: settings; `config.batch_size` is per process.
      process_index: number of this process among the `process_count` that share the records.

    Returns:
      An iterable, with a length, of dicts: image uint8 [B, Hb, Wb, 3]; image_size int32 [B, 2]
      after the resize; original_size int32 [B, 2]; valid bool [B]; index int32 [B], position in
      `source` (-1 in fillers); records: list of B records as `source` gave them (None in fillers).
      With `tta_short_edges` also views: a list of dicts with image and image_size.

    Raises:
      ValueError: an empty dataset.
      RecordError: a broken record (here or while iterating), unless `config.skip_broken`.
    """
    check_processes(process_index, process_count)
    count = len(source)
    require(
        count > 0,
        "the evaluation dataset is empty; check dataset.data_dir and dataset.eval_split",
    )
    limit = min(config.limit or count, count)
    # Evenly spaced: datasets may list their images in any order.
    chosen = [i * count // limit for i in range(limit)]
    known_sizes = hasattr(source, "image_size")
    if not known_sizes:
        logging.info("decoding %d images to learn their sizes", limit)
    broken: dict[int, str] = {}
    buckets: dict[Bucket, list[int]] = {}
    for index in logged(chosen, limit, "image sizes"):
        try:
            with naming(f"record {index} of {source!r}"):
                size = source.image_size(index) if known_sizes else source[index]["image"].shape[:2]
        except RecordError as error:
            if not config.skip_broken:
                raise
            note_broken(broken, {index: str(error)})
            continue
        buckets.setdefault(_bucket(size, config), []).append(index)

    if config.max_buckets:
        buckets = _merge_buckets(buckets, config.max_buckets)
    steps = []
    size = config.batch_size
    for bucket in sorted(buckets, key=lambda b: (-_pixels(np.array(b)), b)):
        indices = buckets[bucket]
        for first in range(0, len(indices), size * process_count):
            start = first + process_index * size
            steps.append(_EvalStep(bucket, tuple(indices[start : start + size])))
    return EvalLoader(source, config, steps, broken)
