"""Prepares an official dataset: turns its download into ArrayRecord files and a report.

The files of a split are written one by one, each under a temporary name until it is complete, so
an interrupted preparation can resume. dataset_info.json, which readers follow, names complete
splits only. The folder of the dataset holds

  coco_panoptic-train.array_record-00000-of-00119, ...   the records
  dataset_info.json, features.json, metadata.json        TFDS's description; see `_Store`
  prepare_report.json                                    counts, missing files, broken records
  .shards/                                               facts about each file, to resume from
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tensorflow_datasets as tfds

from oneformer_jax.files import FileError, read_json, write_atomically
from oneformer_jax.input_pipeline import prepared
from oneformer_jax.input_pipeline.annotations import faults
from oneformer_jax.input_pipeline.annotations.faults import Fault
from oneformer_jax.input_pipeline.builders import raw, schema
from oneformer_jax.input_pipeline.builders.report import REPORT, SplitReport
from oneformer_jax.input_pipeline.files import exclusive, sync, writing
from oneformer_jax.input_pipeline.records import RecordError, decode_image, encode_dense
from oneformer_jax.progress import progress_log

BUILDERS = {
    "coco": "CocoPanoptic",
    "ade20k": "Ade20kPanoptic",
    "cityscapes": "CityscapesPanoptic",
    "mapillary": "MapillaryPanoptic",
}
_FORMAT = tfds.core.FileFormat.ARRAY_RECORD
_MAX_THREADS = 16

# A record without its arrays, its serialised example, (height, width) of its image.
_Encoded = tuple[raw.RawRecord, bytes, tuple[int, int]]
_REPORT_LIMIT = 1 << 30  # bytes: it has a line for each missing file

Log = Callable[[str], None]


class _Report(msgspec.Struct):
    splits: dict[str, Any] = {}


class _ShardFacts(prepared.Facts):
    """Facts about a finished file: its records, its size, what was left out or odd.

    `remarks` has, by kind, how many there are and the first.
    """

    bytes: int = 0
    left_out: int = 0
    remarks: dict[str, tuple[int, str]] = msgspec.field(default_factory=dict)


def builder_class(dataset: str) -> type[raw.PanopticBuilder]:
    """Finds the builder of "coco", "ade20k", "cityscapes" or "mapillary"; else a ValueError."""
    if dataset not in BUILDERS:
        raise ValueError(f"there is no builder of {dataset!r}, only of {', '.join(BUILDERS)}")
    module = importlib.import_module(f"{__package__}.{dataset}")
    return getattr(module, BUILDERS[dataset])


def prepare(
    dataset: str,
    source: str | os.PathLike,
    data_dir: str | os.PathLike,
    *,
    splits: Sequence[str] = ("train", "validation"),
    skip_broken: bool = False,
    log: Log = print,
) -> Path:
    """Prepares a dataset by name; see `prepare_builder`."""
    known, data_dir = builder_class(dataset), Path(data_dir).expanduser()
    folder = prepared.folder_of(known, data_dir)
    if (folder / prepared.DESCRIPTION).exists():
        prepared.read(folder)  # checks the files before the builder lets TFDS read them
    builder = known(source=source, data_dir=data_dir)
    return prepare_builder(builder, splits=splits, skip_broken=skip_broken, log=log)


def prepare_builder(
    builder: raw.PanopticBuilder,
    *,
    splits: Sequence[str] = ("train", "validation"),
    skip_broken: bool = False,
    log: Log = print,
) -> Path:
    """Writes the records of a download; resumes an interrupted preparation.

    Complete splits are kept. Missing files and wrong counts are reported before anything is
    written, broken records after all others are written.

    Args:
      builder: an official dataset's builder, with the download as its `source`.
      splits: the splits to prepare; other prepared ones stay.
      skip_broken: leave out missing or broken records instead of failing.
      log: receives the lines of progress and the report.

    Returns:
      The folder of the prepared files, for `sources.TfdsSource`.

    Raises:
      FileNotFoundError: the source has another layout.
      ValueError: an annotation file is wrong; missing or broken records; the folder was prepared
        from another download; or no source, no such split.
      OSError: the records cannot be written, e.g. because the disk is full.
    """
    if builder.source is None:
        raise ValueError(f"{builder.DATASET}: a builder that prepares needs source=FOLDER")
    for split in splits:
        if split not in builder.EXPECTED:
            raise ValueError(f"unknown split {split!r}; known are {', '.join(builder.EXPECTED)}")
    root = builder.find_root(builder.source, splits)
    log(f"reading the lists of {root}")
    raw_splits = {split: builder.open_split(root, split) for split in splits}
    target = Path(builder.data_dir)
    with exclusive(target.parent, waiting=lambda: log("another process prepares; waiting")):
        target.mkdir(exist_ok=True)
        reports = {
            split: SplitReport(
                expected=builder.EXPECTED[split],
                listed=len(raw_split),
                missing=list(raw_split.missing.values()),
                notes=list(raw_split.notes),
            )
            for split, raw_split in raw_splits.items()
        }
        try:
            store = _Store(builder, target)
            for split in filter(store.has, splits):
                store.describe(split, reports[split])
            _check(reports, skip_broken, target)
            for split, raw_split in raw_splits.items():
                if not len(raw_split):
                    raise ValueError(f"{root} has no record of the {split} split")
            for split, raw_split in raw_splits.items():
                work = _SplitWork(store, split, raw_split, reports[split], log)
                work.run(skip_broken)
            _check(reports, skip_broken, target)
        finally:
            _write_report(builder, root, target, reports, log)
    return target


def _check(reports: dict[str, SplitReport], skip_broken: bool, target: Path) -> None:
    """Raises ValueError if records are missing or broken, unless that is allowed."""
    found = [
        f"{split} ({len(report.left_out()):,})"
        for split, report in reports.items()
        if report.left_out()
    ]
    if found and not skip_broken:
        raise ValueError(
            f"not prepared: something is missing or broken in {', '.join(found)}, listed in "
            f"{target / REPORT}. Repair the download and run the same command again, which keeps "
            "finished files; or add --skip_broken to leave those records out"
        )


def _write_report(
    builder: raw.PanopticBuilder,
    root: Path,
    target: Path,
    reports: dict[str, SplitReport],
    log: Log,
) -> None:
    path = target / REPORT
    try:  # a split of an earlier command keeps its entry
        earlier = read_json(path, _Report, limit=_REPORT_LIMIT).splits
    except FileError:  # none, or a damaged one
        earlier = {}
    content = {
        "dataset": builder.DATASET,
        "version": str(builder.version),
        "source": str(root.resolve()),
        "splits": {**earlier, **{k: v.to_json() for k, v in reports.items()}},
    }
    log(f"{builder.DATASET} in {target}")
    for split, report in reports.items():
        for line in report.lines(split):
            log(f"  {line}")
    try:
        write_atomically(path, json.dumps(content, indent=1))
    except OSError as error:  # raising would hide the error that led here
        log(f"the report could not be written: {error}")


class _Store:
    """The prepared folder: its splits and their metadata.

    The metadata: `info`, the class table; and for each split `records`, the facts that a loader
    needs before it reads an image; `fingerprints` of the annotations; `left_out`, reasons why
    records are missing.
    """

    def __init__(self, builder: raw.PanopticBuilder, target: Path):
        self.builder, self.target = builder, target
        self.shards = target / ".shards"
        self.shards.mkdir(exist_ok=True)
        self.metadata: dict[str, Any] = {
            **schema.metadata(builder.CLASSES),
            "records": {},
            "fingerprints": {},
            "left_out": {},
        }
        self.splits: dict[str, tfds.core.SplitInfo] = {}
        if (target / "dataset_info.json").is_file():
            found = prepared.read(target)
            self.metadata.update(prepared.read_metadata(target))
            for split, files in found.splits.items():
                self._enter(split, list(files.lengths), files.num_bytes)

    def template(self, split: str) -> tfds.core.ShardedFileTemplate:
        return tfds.core.ShardedFileTemplate(
            data_dir=self.target,
            dataset_name=self.builder.name,
            split=split,
            filetype_suffix=_FORMAT.file_suffix,
        )

    def has(self, split: str) -> bool:
        """Tells whether a split is complete: it is listed, and all of its files exist."""
        return split in self.splits and all(
            Path(path).is_file() for path in self.splits[split].filepaths
        )

    def describe(self, split: str, report: SplitReport) -> None:
        """Fills the report of a complete split from the folder."""
        info = self.splits[split]
        report.complete = True
        report.written, report.bytes = info.num_examples, int(info.num_bytes)
        report.files = len(info.shard_lengths)
        report.with_things = sum(self.metadata["records"][split]["has_things"])

    def add(self, split: str, lengths: list[int], num_bytes: int) -> None:
        self._enter(split, lengths, num_bytes)
        self._write()

    def _enter(self, split: str, lengths: list[int], num_bytes: int) -> None:
        self.splits[split] = tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths,
            num_bytes=num_bytes,
            filename_template=self.template(split),
        )

    def remove(self, split: str) -> None:
        """Removes a split from the description, before its files change."""
        if self.splits.pop(split, None) is not None:
            self._write()

    def _write(self) -> None:
        description = self.target / "dataset_info.json"
        if not self.splits:
            description.unlink(missing_ok=True)
            return
        info = self.builder.info
        if info.file_format != _FORMAT:  # reading a dataset_info.json has set it
            info.set_file_format(_FORMAT, override=True)
        info.set_splits(tfds.core.SplitDict(list(self.splits.values())))
        info.metadata.clear()
        info.metadata.update(self.metadata)
        folder = self.shards / "description"
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed preparation
        folder.mkdir()
        info.write_to_directory(folder)
        written = [path for path in folder.iterdir() if path.name != description.name]
        for path in (*written, folder / description.name):  # last the one that readers look for
            sync(path)
            os.replace(path, self.target / path.name)
        folder.rmdir()


class _SplitWork:
    """Writes the files of one split."""

    def __init__(
        self, store: _Store, split: str, raw_split: raw.RawSplit, report: SplitReport, log: Log
    ):
        self._store, self._split, self._raw = store, split, raw_split
        self._report, self._log = report, log
        builder = store.builder
        size = builder.RECORDS_PER_SHARD
        self._shards = [
            range(first, min(first + size, len(raw_split)))
            for first in range(0, len(raw_split), size)
        ]
        self._paths = [
            Path(path) for path in store.template(split).sharded_filepaths(len(self._shards))
        ]
        self._plan = {"fingerprint": raw_split.fingerprint, "files": len(self._shards)}
        self._features = builder.info.features
        self._name = f"{builder.DATASET} {split}"
        self._done = 0

    def run(self, skip_broken: bool) -> None:
        store, split, report = self._store, self._split, self._report
        if store.has(split) and store.metadata["fingerprints"].get(split) != self._raw.fingerprint:
            raise ValueError(
                f"the {split} split in {store.target} was prepared from other annotations or files "
                "than the source has now; delete that folder to prepare it again, or choose "
                "another --data_dir"
            )
        if store.has(split) and not store.metadata["left_out"].get(split):
            self._log(f"{self._name}: complete already")
            return
        with writing(store.target):
            store.remove(split)
            report.complete = False
            self._begin()
            finished = [self._facts(shard) for shard in range(len(self._shards))]
            to_do = [
                [index for index in indices if not done and index not in self._raw.missing]
                for indices, done in zip(self._shards, finished, strict=True)
            ]
            total = sum(map(len, to_do))
            self._progress = progress_log(total, f"records of {self._name}", self._log)
            facts: list[_ShardFacts] = []
            pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS))
            try:
                encode = functools.partial(self._encode, skip_broken=skip_broken)
                for shard, done in enumerate(finished):
                    facts.append(done or self._write_shard(shard, pool.map(encode, to_do[shard])))
            finally:
                pool.shutdown(cancel_futures=True)
                report.files, report.bytes = len(facts), sum(f.bytes for f in facts)
                report.written = sum(len(f.height) for f in facts)
                report.with_things = sum(sum(f.has_things) for f in facts)
                report.notes += _remark_notes(facts)
            if not report.written:
                raise ValueError(
                    f"none of the {len(self._raw):,} records of {split} can be read; the first: "
                    f"{report.left_out()[0] if report.left_out() else 'the download lists none'}"
                )
            if report.broken and not skip_broken:
                return
            store.metadata["records"][split] = {
                key: list(itertools.chain.from_iterable(getattr(f, key) for f in facts))
                for key in schema.FACTS
            }
            store.metadata["fingerprints"][split] = self._raw.fingerprint
            store.metadata["left_out"][split] = report.left_out()
            store.add(split, [len(f.height) for f in facts], report.bytes)
            store.describe(split, report)

    def _begin(self) -> None:
        """Removes the remains of a preparation of other files."""
        plan = self._store.shards / f"{self._split}.json"
        with contextlib.suppress(FileError):  # none, or a damaged one
            if read_json(plan) == self._plan:
                return
        stem = f"{self._store.builder.name}-{self._split}.{_FORMAT.file_suffix}-"
        leftovers = [
            *self._store.target.glob(f"{stem}*"),
            *self._store.shards.glob(f"{self._split}-*.json"),
        ]
        if leftovers:
            self._log(f"{self._name}: the download has changed; starting anew")
        for path in leftovers:
            path.unlink()
        write_atomically(plan, json.dumps(self._plan))

    def _facts_path(self, shard: int) -> Path:
        return self._store.shards / f"{self._split}-{shard:05d}.json"

    def _facts(self, shard: int) -> _ShardFacts | None:
        """Facts of a finished file, or None if it must be written (again).

        A file that left records out is written again: they may be repaired now.
        """
        try:
            facts = read_json(self._facts_path(shard), _ShardFacts)
        except FileError:  # none, or damaged ones
            return None
        path, records = self._paths[shard], len(self._shards[shard])
        whole = {len(getattr(facts, key)) for key in schema.FACTS} == {records}
        written = path.is_file() and path.stat().st_size == facts.bytes
        return facts if whole and written and not facts.left_out else None

    def _write_shard(self, shard: int, results: Iterable[_Encoded | Fault]) -> _ShardFacts:
        facts = _ShardFacts([], [], [])
        remarks: list[Fault] = []
        examples = []
        for result in results:
            self._done += 1
            self._progress(self._done)
            if isinstance(result, Fault):
                self._report.broken.append(result)
                continue
            record, example, shape = result
            self._report.broken += record.left_out
            facts.left_out += len(record.left_out)
            remarks += record.remarks
            examples.append((len(examples), example))
            for key, value in zip(schema.FACTS, (*shape, record.has_things), strict=True):
                getattr(facts, key).append(value)
        groups = faults.by_kind(remarks)
        facts.remarks = {kind: (len(found), found[0]) for kind, found in groups.items()}
        path, facts_path = self._paths[shard], self._facts_path(shard)
        facts_path.unlink(missing_ok=True)
        # Neither TFDS nor `_begin` takes this name for a finished file's.
        temporary = self._store.shards / f"{self._split}-{shard:05d}.incomplete"
        try:
            with writing(path.parent, RuntimeError):
                tfds.core.ExampleWriter(_FORMAT).write(str(temporary), examples)
            sync(temporary)
            facts.bytes = temporary.stat().st_size
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        write_atomically(facts_path, msgspec.json.encode(facts))
        return facts

    def _encode(self, index: int, skip_broken: bool) -> _Encoded | Fault:
        """Serialises a record; returns it with the size of its image, or its fault."""
        try:
            record = self._raw.read(index, skip_broken=skip_broken)
            classes = self._store.builder.CLASSES.num_classes
            record.segments.check(classes, record.where)
            shape = decode_image(record.image, record.where).shape[:2]
            if shape != record.panoptic.shape:
                raise RecordError(
                    f"{record.where}: the image has {shape[0]} x {shape[1]} pixels (height x "
                    f"width), its annotation {record.panoptic.shape[0]} x "
                    f"{record.panoptic.shape[1]}"
                )
        except RecordError as error:
            return Fault(error.kind, str(error))
        example = schema.example(
            record.image,
            encode_dense(record.panoptic, record.segments),
            record.segments,
            image_id=record.image_id,
            file_name=record.file_name,
            semantic_png=record.semantic,
        )
        parts = dataclasses.replace(record, image=b"", panoptic=np.zeros((0, 0), np.int32))
        return parts, self._features.serialize_example(example), shape


def _remark_notes(facts: Sequence[_ShardFacts]) -> list[str]:
    """A line for each kind of remark about the records of all files."""
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for found in facts:
        for kind, (count, example) in found.remarks.items():
            counts[kind] = counts.get(kind, 0) + count
            examples.setdefault(kind, example)
    return [f"{count:,} x {kind}, as {examples[kind]}" for kind, count in counts.items()]
