"""Downloads of official datasets, from which builders read their records.

Each dataset has its own `PanopticBuilder`, which knows the folder tree of the download and turns a
split of it into a `RawSplit`. `builders.preparation` does the rest.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from oneformer_jax.input_pipeline.annotations.faults import Fault
from oneformer_jax.input_pipeline.builders import schema
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource
from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.files import found_in, read_file
from oneformer_jax.input_pipeline.records import RecordError, SegmentTable, with_ids

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclasses.dataclass(frozen=True)
class RawRecord:
    """One annotated image with its panoptic map.

    Attributes:
      image: the image file's bytes.
      where: path of the image, for messages.
      panoptic: int32 [H, W] of segment ids, 0 = void.
      segments: its segments; areas as the official annotation counts them.
      image_id: id in the dataset.
      file_name: name of the image file.
      has_things: True if the training filter of the dataset keeps the image.
      semantic: PNG of class id + 1, 0 unlabelled; only with a separate semantic annotation.
      left_out: faults of annotations that are not in the record.
      remarks: oddities of the annotation that are no faults.
    """

    image: bytes
    where: str
    panoptic: np.ndarray
    segments: SegmentTable
    image_id: str
    file_name: str
    has_things: bool
    semantic: bytes | None = None
    left_out: Sequence[Fault] = ()
    remarks: Sequence[Fault] = ()


class RawSplit(abc.ABC):
    """The records of one split of a download, in a fixed order; safe to read from threads.

    Attributes:
      names: one name per record, for messages.
      missing: record number -> its missing files.
      fingerprint: changes with the annotations or the list of files.
      notes: remarks for users on the reading of the split.
    """

    names: Sequence[str]
    missing: Mapping[int, str]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @abc.abstractmethod
    def read(self, index: int, *, skip_broken: bool = False) -> RawRecord:
        """Reads record `index`; RecordError if it is broken.

        With `skip_broken` broken annotations are left out singly if the format allows it.
        """


class PanopticBuilder(tfds.core.DatasetBuilder, skip_registration=True):
    """A TFDS builder that starts from the files of a dataset's own site.

    Its records (`schema.features`) are read with `sources.TfdsSource`, or with TFDS itself
    (`as_data_source`). Neither needs TensorFlow.

    Args:
      source: folder of the download, needed only by `download_and_prepare`.
      data_dir: folder below which the prepared files lie.

    Attributes:
      DATASET: name of the dataset in commands and configs.
      CLASSES: its class table.
      EXPECTED: number of records of each split.
      RECORDS_PER_SHARD: records per file; an interruption loses at most one file per thread.
      FOLDER: usual name of the download's folder; `source` may also be its parent.
      LAYOUT: the folder tree, for messages.
      SEMANTIC: True if the records carry a semantic map.
    """

    VERSION = tfds.core.Version("1.0.0")
    DATASET: ClassVar[str]
    CLASSES: ClassVar[DatasetInfo]
    EXPECTED: ClassVar[dict[str, int]]
    RECORDS_PER_SHARD: ClassVar[int]
    FOLDER: ClassVar[str]
    LAYOUT: ClassVar[str]
    SEMANTIC: ClassVar[bool] = False

    def __init__(self, *, source: str | os.PathLike | None = None, **kwargs):
        self.source = source
        super().__init__(**kwargs)

    @classmethod
    @abc.abstractmethod
    def required(cls, split: str) -> tuple[tuple[str, ...], ...]:
        """Paths below the download that a split needs, one of each tuple."""

    @classmethod
    @abc.abstractmethod
    def open_split(cls, root: Path, split: str) -> RawSplit:
        """Opens a split in `root`, which has all `required` paths; ValueError for wrong content."""

    @classmethod
    def find_root(cls, source: str | os.PathLike, splits: Sequence[str]) -> Path:
        """Finds the folder of the download: `source`, or `FOLDER` in it; or a FileNotFoundError."""
        source = Path(source).expanduser()
        lacking = {}
        for root in (source, source / cls.FOLDER):
            lacking[root] = [
                options
                for split in splits
                for options in cls.required(split)
                if not any((root / option).exists() for option in options)
            ]
            if not lacking[root]:
                return root
        # The user meant the one that lacks less.
        root = min(lacking, key=lambda folder: len(lacking[folder]))
        wanted = ", ".join(" or ".join(options) for options in lacking[root])
        archives = sorted(
            path.name
            for options in lacking[root]
            for option in options
            for path in (Path(f"{root / option}{ending}") for ending in _ARCHIVES)
            if path.is_file()
        )
        unpack = f" Unpack {', '.join(archives)} first." if archives else ""
        raise FileNotFoundError(
            f"{root} is not the {cls.DATASET} download: it lacks {wanted}.{unpack}\n"
            f"Expected:\n{cls.LAYOUT}\nFound: {found_in(root)}\n"
            "If you have only one split, name it with --split"
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.DATASET}: images with panoptic annotations.",
            features=schema.features(dense=True, semantic=self.SEMANTIC),
            metadata=schema.metadata(self.CLASSES),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager, download_config=None):
        # An abstract method of TFDS; `official.OfficialBuilder` replaces its caller.
        raise NotImplementedError("download_and_prepare writes the records")

    def _as_dataset(self, split, decoders=None, read_config=None, shuffle_files=False):
        # An abstract method of TFDS for tf.data, which would need TensorFlow.
        raise NotImplementedError("ArrayRecord files are read with as_data_source")


def list_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Maps the stem, without `suffix`, of the files of `folder` that end in it to their path."""
    return {
        name.removesuffix(suffix): folder / name
        for name in os.listdir(folder)
        if name.endswith(suffix) and not name.startswith(".")
    }


class LabelMapSplit(RawSplit):
    """Images and label maps that share their names.

    Every name in any of the folders is a record, `missing` if another folder lacks it.

    Args:
      files: kind of file -> {name -> path}; "image" is one of the kinds.
      convert: (kind -> bytes of the maps, name -> panoptic map, segments); RecordError if broken.
      classes: the class table.
      semantic: kind of file with the separate semantic annotation, if any.
    """

    def __init__(
        self,
        files: Mapping[str, Mapping[str, Path]],
        convert: Callable[[Mapping[str, bytes], str], tuple[np.ndarray, SegmentTable]],
        classes: DatasetInfo,
        semantic: str | None = None,
    ):
        self._files, self._convert, self._semantic = files, convert, semantic
        self._is_thing = classes.is_thing
        self.names = sorted(set().union(*files.values()))
        self.missing = {}
        for index, name in enumerate(self.names):
            lacking = [kind for kind, paths in files.items() if name not in paths]
            if lacking:
                self.missing[index] = f"{name}: has no {' and no '.join(lacking)} file"
        listing = "\n".join(self.names).encode()
        self.fingerprint = hashlib.sha256(listing).hexdigest()

    def read(self, index: int, *, skip_broken: bool = False) -> RawRecord:
        del skip_broken  # a map has no parts to leave out
        name = self.names[index]
        image_path = self._files["image"][name]
        maps = {k: read_file(paths[name]) for k, paths in self._files.items() if k != "image"}
        panoptic, segments = self._convert(maps, name)
        return RawRecord(
            image=read_file(image_path),
            where=str(image_path),
            panoptic=panoptic,
            segments=segments,
            image_id=name,
            file_name=image_path.name,
            has_things=segments.has_things(self._is_thing),
            semantic=maps.get(self._semantic),
        )


class PanopticJsonSplit(RawSplit):
    """A COCO-panoptic JSON with its images and PNGs.

    Args:
      folder: the reader of the JSON.
      folders: the folders of the images and of the PNGs.
      fingerprint: of the JSON files.
      with_instances: ids of the images that the training filter keeps; None keeps those with a
        non-crowd thing in the panoptic annotation.
      notes: see `RawSplit`.
    """

    def __init__(
        self,
        folder: CocoFolderSource,
        folders: Sequence[Path],
        fingerprint: str,
        *,
        with_instances: Collection[str] | None = None,
        notes: tuple[str, ...] = (),
    ):
        self._folder, self._with_instances = folder, with_instances
        self.fingerprint, self.notes = fingerprint, (*notes, *folder.notes)
        self.names = [folder.image_id(index) for index in range(len(folder))]
        self.missing = {}
        present = {path: set(os.listdir(path)) for path in folders}
        for index in range(len(folder)):
            try:
                paths = (folder.image_path(index), folder.panoptic_path(index))
            except RecordError as error:
                self.missing[index] = str(error)
                continue
            lacking = [
                str(path)
                for path in paths
                # The listing lacks names with a folder in them.
                if path.name not in present.get(path.parent, ()) and not path.is_file()
            ]
            if lacking:
                self.missing[index] = (
                    f"{' and '.join(lacking)}: no such file, but the JSON lists it"
                )

    def read(self, index: int, *, skip_broken: bool = False) -> RawRecord:
        folder = self._folder
        image_path, image_id = folder.image_path(index), folder.image_id(index)
        numbers, segments, remarks = folder.annotation(index, skip_broken=skip_broken)
        if self._with_instances is None:
            has_things = segments.has_things(folder.info.is_thing)
        else:
            has_things = image_id in self._with_instances
        return RawRecord(
            image=read_file(image_path),
            where=str(image_path),
            panoptic=with_ids(numbers, segments),
            segments=segments,
            image_id=image_id,
            file_name=image_path.name,
            has_things=has_things,
            left_out=folder.left_out(index),
            remarks=remarks,
        )
