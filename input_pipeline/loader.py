"""Batches for training, read with Grain; `eval_loader` makes those for evaluation.

The records of a step's global batch, and every random number drawn for them, are a pure function
of (seed, step). They do not depend on the number of processes, workers or threads, and no random
state needs a checkpoint: `train_loader(..., start_step=s)` starts at batch s at once.

A *source* is any object with `len(source)` and `source[i] -> record` (`input_pipeline.sources`),
picklable if worker processes read it. Optional methods: `has_things(i) -> bool` (needed for
`require_things`), `image_size(i) -> (height, width)` (spares evaluation a pass over the images) and
`compact(i)` (the compact form of the record, which is faster to read).
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags, logging

from oneformer_jax import config_rules
from oneformer_jax.input_pipeline import targets, transforms, workers
from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.records import RecordError

Batch = dict[str, Any]


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """Settings of the training loader; ValueError names the config key of a bad value.

    Attributes:
      batch_size: images per process and step (global batch / number of processes).
      num_slots: M, target slots per image, at most 255.
      num_texts: texts per image: number of queries less the learned context embeddings.
      augment: augmentation and size of the training images, multiples of 32.
      seed: of data order, augmentation and task choice, 0 <= seed < 2**32.
      semantic_prob: probability of the semantic task.
      instance_prob: probability of the instance task; the rest is panoptic.
      text_types: texts tell things from stuff (`tokenizer.names_type`).
      num_workers: loader processes; 0 reads in threads of this process.
      num_threads: reading threads without worker processes.
      prefetch: batches kept ready by each worker (at least 2) or by all threads together. Host
        memory is about max(num_workers, 1) * (prefetch + 1) batches, with workers in /dev/shm.
      skip_broken: replace a record that raises RecordError by the next good one instead of raising.
      require_things: leave out records without a non-crowd thing, as official COCO training does.
    """

    batch_size: int
    num_slots: int
    num_texts: int
    augment: transforms.AugmentConfig
    num_workers: int
    num_threads: int
    prefetch: int
    seed: int = 0
    semantic_prob: float = 0.33
    instance_prob: float = 0.33
    text_types: bool = False
    skip_broken: bool = False
    require_things: bool = False

    def __post_init__(self) -> None:
        require(
            self.batch_size >= 1,
            f"data.batch_size leaves {self.batch_size} images per process; each needs at least 1",
        )
        require(
            self.num_texts >= 0,
            f"model.num_queries - model.num_context is {self.num_texts}; it cannot be negative",
        )
        config_rules.require(
            {
                "seed": self.seed,
                "data.crop_size": self.augment.crop_size,
                "data.num_slots": self.num_slots,
                "data.semantic_prob": self.semantic_prob,
                "data.instance_prob": self.instance_prob,
                "data.workers": self.num_workers,
                "data.threads": self.num_threads,
                "data.prefetch": self.prefetch,
                "data.skip_broken": self.skip_broken,
                "data.require_things": self.require_things,
            }
        )


def check_processes(process_index: int, process_count: int) -> None:
    require(
        0 <= process_index < process_count,
        f"process_index {process_index} is not in [0, process_count = {process_count})",
    )


def read_options(num_threads: int, prefetch: int) -> grain.ReadOptions:
    # Grain's defaults (16 threads, 500 elements) would hold gigabytes of batches.
    return grain.ReadOptions(num_threads=min(num_threads, prefetch), prefetch_buffer_size=prefetch)


@dataclasses.dataclass
class _LoadTrainBatch:
    """Maps (step, record numbers of the global batch) to this process's batch and its report."""

    source: Source
    kept: np.ndarray  # int64: source positions of the records that take part
    config: LoaderConfig
    info: DatasetInfo
    process_index: int
    broken: dict[int, str] = dataclasses.field(default_factory=dict)  # known to this worker

    def __call__(self, step: int, numbers: np.ndarray) -> tuple[Batch, dict[str, Any]]:
        size = self.config.batch_size
        # Contiguous blocks: the batches of the processes, concatenated, are the global batch.
        first = self.process_index * size
        report = {"broken": {}, "dropped": 0}
        samples = []
        for offset in range(first, first + size):
            epoch = (step * len(numbers) + offset) // len(self.kept)
            samples.append(self._sample(epoch, int(numbers[offset]), report))
        return {key: np.stack([s[key] for s in samples]) for key in samples[0]}, report

    def _read(self, number: int, report: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        """The record (number-th of those kept), or the next one after it that is not broken."""
        read = getattr(self.source, "compact", self.source.__getitem__)
        for i in range(len(self.kept)):
            index = int(self.kept[(number + i) % len(self.kept)])
            if index not in self.broken:
                try:
                    with naming(f"record {index} of {self.source!r}"):
                        return index, read(index)
                except RecordError as error:
                    if not self.config.skip_broken:
                        raise
                    self.broken[index] = str(error)
            report["broken"][index] = self.broken[index]
        raise RecordError(
            f"all {len(self.kept)} training records are broken, the last one: {self.broken[index]}"
        )

    def _sample(self, epoch: int, number: int, report: dict[str, Any]) -> Batch:
        config = self.config
        # One generator per position in the global order. The substitute of a broken record uses the
        # broken one's generator, so that an epoch does not have the same sample twice.
        rng = np.random.default_rng((config.seed, epoch, int(self.kept[number])))
        index, record = self._read(number, report)
        with naming(f"record {index} ({record['file_name']})"):
            sample, dropped = self._make_sample(rng, record)
        report["dropped"] += dropped
        return {**sample, "index": np.int32(index)}

    def _make_sample(
        self, rng: np.random.Generator, record: Mapping[str, Any]
    ) -> tuple[Batch, int]:
        """Augments a record and makes its targets; also returns the number of segments left out."""
        config = self.config
        record = transforms.augment(rng, record, config.augment)
        task = targets.sample_task(rng, config.semantic_prob, config.instance_prob)
        target = targets.make_targets(
            record["panoptic"], record["segments"], task, config.num_slots, self.info.is_thing
        )
        num_classes = len(self.info.class_names)
        types = self.info.is_thing if config.text_types else None
        sample = {
            "image": record["image"],
            "image_size": np.array(record["image"].shape[:2], np.int32),
            "segment_map": target.segment_map,
            "classes": target.classes,
            "valid": target.valid,
            "text_ids": targets.text_ids(
                target.classes, target.valid, task, config.num_texts, num_classes, types
            ),
            "task": np.int32(task),
        }
        return sample, target.dropped


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Adds the record's name to errors; a ValueError becomes a RecordError, as data causes it."""
    try:
        yield
    except RecordError:
        raise
    except (ValueError, OSError) as error:
        raise RecordError(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"while reading {where}")
        raise


class TrainIterator(Iterator[Batch]):
    """Endless training batches; `position` belongs into a checkpoint.

    Attributes:
      position: step of the next batch, the `start_step` of a loader that continues here.
      broken: source position -> error, of the broken records skipped so far.
      dropped_segments: segments left out so far because an image had more than `num_slots`.
    """

    def __init__(self, batches: grain.DatasetIterator, position: int, with_workers: bool):
        # Dropping this object or leaving the interpreter ends the workers too, and drops them at
        # once: during the interpreter's teardown Grain cannot free their shared memory.
        self._batches = [batches]
        self._close = weakref.finalize(self, _close_and_drop, self._batches)
        self._to_start = with_workers
        self.position = position
        self.broken: dict[int, str] = {}
        self.dropped_segments = 0

    def __next__(self) -> Batch:
        if not self._batches:
            raise ValueError("the training iterator is closed; make a new one with train_loader")
        try:
            batch, report = self._read()
        except RuntimeError as error:
            died = workers.explain(error)
            if died is None:
                raise
            raise died from None
        self.position += 1
        self.dropped_segments += report["dropped"]
        note_broken(self.broken, report["broken"])
        return batch

    def _read(self) -> tuple[Batch, dict[str, Any]]:
        batches = self._batches[0]
        if not self._to_start:
            return next(batches)
        self._to_start = False
        return workers.call_shielded(lambda: next(batches))

    def close(self) -> None:
        """Ends the reading threads or worker processes."""
        self._close()


def _close_and_drop(batches: list[grain.DatasetIterator]) -> None:
    batches.pop().close()


def note_broken(known: dict[int, str], found: Mapping[int, str]) -> None:
    for index in sorted(found.keys() - known.keys()):
        known[index] = found[index]
        logging.warning("skipped broken record %d: %s", index, found[index])


def _with_things(source: Source, count: int) -> np.ndarray:
    if not hasattr(source, "has_things"):
        raise ValueError(
            f"data.require_things is on, but {type(source).__name__} cannot tell which images have "
            "things without decoding them (it has no has_things(i)); set data.require_things=False"
        )
    return np.flatnonzero([source.has_things(i) for i in range(count)])


def training_images(source: Source, require_things: bool) -> np.ndarray:
    """Returns the positions in `source` that an epoch has, int [N].

    Args:
      source: the records.
      require_things: leave out images without a thing that is no crowd.

    Raises:
      ValueError: there is none, or the source cannot tell.
    """
    count = len(source)
    require(
        count > 0,
        "the training dataset is empty; check dataset.data_dir and dataset.train_split",
    )
    kept = _with_things(source, count) if require_things else np.arange(count)
    require(
        len(kept) > 0,
        f"none of the {count} training images has a non-crowd thing; set data.require_things=False",
    )
    return kept


def train_loader(
    source: Source,
    config: LoaderConfig,
    info: DatasetInfo,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
) -> TrainIterator:
    """Gives the endless batches of this process, from step `start_step` on.

    Every epoch has its own random order; every batch is complete and may span two epochs. With
    `config.num_workers` > 0 the caller's main module needs the usual `if __name__ == "__main__"`
    guard, because the workers are spawned.

    Args:
      source: the records.
      config: settings; `config.batch_size` is per process.
      info: class names and thing flags.
      process_index: number of this process among the `process_count` that share the global batch.
      start_step: step of the first batch; earlier ones are not read.

    Returns:
      An iterator of dicts of NumPy arrays: `oneformer_jax.types.LoadedBatch`, with B = batch_size,
      M = num_slots, R = num_texts and [H, W] = crop_size.

    Raises:
      ValueError: an empty dataset, or `require_things` with a source that cannot tell.
      RecordError: (while iterating) a broken record, unless `config.skip_broken`.
      workers.WorkerError: (while iterating) a worker process died.
    """
    check_processes(process_index, process_count)
    require(start_step >= 0, f"start_step is {start_step}; it must be >= 0")
    kept = training_images(source, config.require_things)
    load = _LoadTrainBatch(source, kept, config, info, process_index)
    batches = (
        grain.MapDataset.range(len(kept))
        .seed(config.seed)
        .shuffle()
        .repeat(None)
        .batch(config.batch_size * process_count, drop_remainder=True)
        .map_with_index(load)[start_step:]
    )
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain passes its flags on to the workers
            flags.FLAGS.mark_as_parsed()
        # A worker reads in its main thread. Grain buffers a worker's batches twice: in its queue,
        # and in the thread of this process that empties the queue.
        batches = batches.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
            grain.MultiprocessingOptions(config.num_workers, max(config.prefetch // 2, 1)),
            worker_init_fn=workers.start,
        )
    else:
        batches = batches.to_iter_dataset(read_options(config.num_threads, config.prefetch))
    return TrainIterator(iter(batches), start_step, config.num_workers > 0)
