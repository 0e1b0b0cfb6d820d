"""TFDS builder for any folder in the COCO-panoptic format.

Preparing pays if a dataset is read often: the records lie in a few large files, and the segment
maps have a form that decodes fast. Every record is checked as it is written.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from oneformer_jax.input_pipeline.annotations import faults
from oneformer_jax.input_pipeline.annotations.faults import Fault
from oneformer_jax.input_pipeline.builders import schema
from oneformer_jax.input_pipeline.builders.local import LocalBuilder
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource
from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.files import sha256
from oneformer_jax.input_pipeline.records import RecordError, SegmentTable, encode_dense
from oneformer_jax.input_pipeline.sides import Side, SideSource

FAULTS = "faults.txt"  # beside the folder of the version


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """The paths of one split.

    Attributes:
      images_dir: folder of the image files.
      panoptic_dir: folder of the panoptic PNGs.
      json_path: the COCO-panoptic JSON.
      side: the part of its images that the split has; None is all.
    """

    images_dir: str
    panoptic_dir: str
    json_path: str
    side: Side | None = None

    def open(self, info: DatasetInfo, *, skip_broken: bool) -> CocoFolderSource | SideSource:
        """Opens the folder itself; see `CocoFolderSource` for the arguments and errors."""
        paths = (self.images_dir, self.panoptic_dir, self.json_path)
        source = CocoFolderSource(*paths, info, skip_broken=skip_broken)
        return self.side.of(source) if self.side else source

    def fingerprint(self) -> str:
        """Returns SHA-256 of the JSON, to notice annotations that changed since a preparation."""
        return sha256(self.json_path)


@dataclasses.dataclass(eq=False, repr=False)  # TFDS logs it, and a class table is long
class CocoFolderConfig(tfds.core.BuilderConfig):
    """One dataset; `name` keeps several apart in one data directory.

    Attributes:
      name: letters, digits, "_", "-" and "."; part of the path of the prepared files.
      splits: the folders of each split.
      info: class table of all splits.
      skip_broken: leave out broken records and list them, instead of failing.
    """

    splits: dict[str, FolderSplit] = dataclasses.field(default_factory=dict)
    info: DatasetInfo | None = None
    skip_broken: bool = False

    def __post_init__(self):
        if not self.splits or self.info is None:
            raise ValueError(f"coco_folder dataset {self.name!r} needs splits and a class table")


class CocoFolder(LocalBuilder):
    """A folder of images, a folder of panoptic PNGs and a COCO-panoptic JSON per split.

    Prepare it with `input_pipeline.sources.prepare`. The stored metadata are the class table, the
    fingerprints of the JSON files and the list of records that were left out.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images with panoptic annotations, from a COCO-panoptic-format folder.",
            features=schema.features(dense=True),
            metadata=schema.metadata(self.builder_config.info),
            disable_shuffling=True,  # record i is annotation i of the JSON
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        self.info.metadata.update(records={}, fingerprints={}, skipped=[])
        generators = {}
        for split, folder in config.splits.items():
            source = folder.open(config.info, skip_broken=config.skip_broken)
            side = f" {folder.side}" if folder.side else ""
            self.info.metadata["fingerprints"][split] = folder.fingerprint() + side
            generators[split] = self._generate_examples(split, source, folder)
        return generators

    def _generate_examples(
        self, split: str, source: CocoFolderSource | SideSource, folder: FolderSplit
    ) -> Iterator[tuple[int, dict]]:
        broken: list[Fault] = []
        remarks: list[Fault] = []
        written = 0
        for index in range(len(source)):
            try:
                record, found = source.examine(index)
            except RecordError as error:
                left_out = source.left_out(index)  # all faults; the error has the first
                broken += left_out or [Fault(error.kind, str(error))]
                continue
            written += 1
            broken += source.left_out(index)
            remarks += found
            segments = SegmentTable.from_dicts(record["segments"])
            schema.note_record(
                self.info.metadata, split, record["image"].shape, segments, source.info
            )
            yield (
                index,
                schema.example(
                    source.image_path(index).read_bytes(),
                    encode_dense(record["panoptic"], segments),
                    segments,
                    image_id=record["image_id"],
                    file_name=record["file_name"],
                ),
            )
        if not written or (broken and not self.builder_config.skip_broken):
            path = Path(self.data_dir).parent / FAULTS
            faults.write(path, broken)
            none = "; none of its records can be read" if not written else ""
            raise faults.error(
                f"{folder.json_path}{none}; it",
                broken,
                f"All are listed in {path}. Repair them, or set skip_broken to leave them out.",
            )
        for fault in broken:
            logging.warning("left out: %s", fault.message)
        for note in (*source.notes, *faults.summary(remarks)):
            logging.warning("%s", note)
        self.info.metadata["skipped"].extend(fault.message for fault in broken)
