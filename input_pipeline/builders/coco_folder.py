"""TFDS builder for any folder in the COCO-panoptic format.

Preparing pays where a dataset is read often: the records lie in a few large files, and the segment
maps are stored in the form that decodes fast. Every record is checked while it is written.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from input_pipeline.builders import schema
from input_pipeline.coco_format import CocoFolderSource
from input_pipeline.datasets import DatasetInfo
from input_pipeline.files import sha256
from input_pipeline.records import RecordError, encode_dense

_SHOWN_ERRORS = 20


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """Where one split lies.

    Attributes:
      images_dir: folder of the image files.
      panoptic_dir: folder of the panoptic PNGs.
      json_path: the COCO-panoptic JSON.
    """

    images_dir: str
    panoptic_dir: str
    json_path: str

    def fingerprint(self) -> str:
        """SHA-256 of the JSON: tells whether the annotations changed since a preparation."""
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


class CocoFolder(tfds.core.GeneratorBasedBuilder):
    """A folder of images, a folder of panoptic PNGs and a COCO-panoptic JSON per split.

    Prepare it with `input_pipeline.sources.prepare`. The metadata stored beside the records are the
    class table, the fingerprints of the JSON files and the list of records that were left out.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

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
            source = CocoFolderSource(
                folder.images_dir, folder.panoptic_dir, folder.json_path, config.info
            )
            self.info.metadata["fingerprints"][split] = folder.fingerprint()
            generators[split] = self._generate_examples(split, source, folder)
        return generators

    def _generate_examples(
        self, split: str, source: CocoFolderSource, folder: FolderSplit
    ) -> Iterator[tuple[int, dict]]:
        broken: list[str] = []
        for index in range(len(source)):
            try:
                record = source[index]
            except RecordError as error:
                broken.append(str(error))
                continue
            segments = source.segments(index)
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
        if len(broken) == len(source):
            raise ValueError(
                f"all {len(source)} records of {folder.json_path} are broken; the first: "
                f"{broken[0]}"
            )
        if broken and not self.builder_config.skip_broken:
            raise ValueError(_broken_message(broken, folder.json_path))
        for message in broken:
            logging.warning("left out: %s", message)
        self.info.metadata["skipped"].extend(broken)


def _broken_message(broken: list[str], json_path: str) -> str:
    lines = "\n  ".join(broken[:_SHOWN_ERRORS])
    more = f"\n  and {len(broken) - _SHOWN_ERRORS} more" if len(broken) > _SHOWN_ERRORS else ""
    return (
        f"{len(broken)} broken record(s) in {json_path}:\n  {lines}{more}\n"
        "Repair them, or set skip_broken to leave them out."
    )
