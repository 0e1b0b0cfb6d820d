"""The description of a prepared dataset, checked before it is used.

A prepared folder may be a stranger's or damaged. Its three JSON files are read by a schema here:
TFDS would import the classes and open the files named there. The names of record files are made
from a checked name and a number, so none lies outside the folder.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np

from oneformer_jax import remote
from oneformer_jax.files import JSON_LIMIT, FileError, first_few, read_json
from oneformer_jax.input_pipeline.datasets import DatasetInfo

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

T = TypeVar("T")

DESCRIPTION, FEATURES, METADATA = "dataset_info.json", "features.json", "metadata.json"
# 17 bytes a record: enough for 3.9 million records.
_METADATA_LIMIT = 64 << 20

_Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=2**20)]  # OpenCV's limit
_Channel = Annotated[int, msgspec.Meta(ge=0, le=255)]
# Protocol buffers write an int64 as text.
_Count = (
    Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    | Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,10}$")]
)
_Bytes = Annotated[int, msgspec.Meta(ge=0)] | Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,18}$")]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]{1,100}$")]


class _Split(msgspec.Struct, rename="camel"):
    name: _Name
    shard_lengths: list[_Count] = []
    num_bytes: _Bytes = 0
    filepath_template: Literal["{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"] = (
        "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    )


class _Description(msgspec.Struct, rename="camel"):
    name: _Name
    version: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,6}\.[0-9]{1,6}\.[0-9]{1,6}$")]
    file_format: Literal["array_record"]
    splits: list[_Split]


class _Shape(msgspec.Struct):
    dimensions: list[int | str] = []


class _Array(msgspec.Struct):
    dtype: str = ""
    shape: _Shape = msgspec.field(default_factory=_Shape)


class _Sequence(msgspec.Struct):
    feature: _Feature
    length: int | str = ""


class _FeaturesDict(msgspec.Struct):
    features: dict[str, _Feature]


class _Feature(msgspec.Struct, rename="camel"):
    """One of TFDS's feature connectors; all None for a kind that no builder here uses."""

    image: _Array | None = None
    tensor: _Array | None = None
    text: dict[str, Any] | None = None
    sequence: _Sequence | None = None
    features_dict: _FeaturesDict | None = None


class _Table(msgspec.Struct):
    """The fields of `DatasetInfo`."""

    dataset: str
    class_names: Annotated[tuple[str, ...], msgspec.Meta(max_length=65_535)]
    is_thing: tuple[bool, ...]
    colors: tuple[tuple[_Channel, _Channel, _Channel], ...]
    category_ids: tuple[_Int32, ...]
    ignore_label: _Int32


class Facts(msgspec.Struct):
    """Facts about the records of a split or of a file, an entry each."""

    height: list[_Side]
    width: list[_Side]
    has_things: list[bool]


class _Metadata(msgspec.Struct):
    info: _Table
    records: dict[str, Facts]
    fingerprints: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    skipped: list[str] = []


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a prepared dataset.

    Attributes:
      paths: its ArrayRecord files, in order.
      lengths: number of records of each.
      num_bytes: size of all, as the preparation counted it.
      sizes: int32 [N, 2], height and width of the N images.
      has_things: bool [N], True for an image with a thing that is no crowd.
      left_out: reasons why records of the download are missing, a line each.
    """

    paths: tuple[str, ...]
    lengths: tuple[int, ...]
    num_bytes: int
    sizes: np.ndarray
    has_things: np.ndarray
    left_out: tuple[str, ...]

    def missing(self) -> list[str]:
        """Returns the names of its missing files."""
        if self.paths and remote.is_remote(self.paths[0]):
            there = set(remote.names(remote.path_of(self.paths[0]).parent))
            return [name for path in self.paths if (name := path.rpartition("/")[2]) not in there]
        return [os.path.basename(path) for path in self.paths if not os.path.isfile(path)]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared dataset.

    Attributes:
      name, version: those of its TFDS builder.
      splits: by name.
      info: the class table.
      dense: True if its segment maps have the dense form, see `builders.schema`.
      semantic: True if its records carry a semantic map.
      fingerprints: of the annotations of each split.
      skipped: reasons why records of a folder were left out.
    """

    name: str
    version: str
    splits: Mapping[str, Split]
    info: DatasetInfo
    dense: bool
    semantic: bool
    fingerprints: Mapping[str, str]
    skipped: tuple[str, ...]


def folder_of(
    builder: type[tfds.core.DatasetBuilder], data_dir: str | os.PathLike[str], *config: str
) -> Path:
    """Names the folder of a builder's prepared files.

    Asking a builder would make TFDS read the folder unchecked.
    """
    return remote.path_of(data_dir).joinpath(builder.name, *config, str(builder.VERSION))


def read(folder: str | os.PathLike[str]) -> Prepared:
    """Reads and checks the description of a prepared dataset; opens no record file.

    Raises:
      FileNotFoundError: nothing is prepared there.
      FileError: a file of the description is missing, damaged, too large, or disagrees with
        another; or another project wrote the dataset. The message names the file.
    """
    folder = remote.path_of(folder)
    remote.check(folder)
    if not (folder / DESCRIPTION).exists():
        way_out = "call oneformer_jax.input_pipeline.sources.prepare first"
        if remote.is_remote(folder):
            way_out = "prepare it in a folder of this machine, and copy it there"
        raise FileNotFoundError(
            f"no prepared dataset in {folder} (a prepared one has {DESCRIPTION}); {way_out}"
        )
    description = _read(folder / DESCRIPTION, _Description, JSON_LIMIT)
    dense, semantic = _form(folder)
    metadata = _read(folder / METADATA, _Metadata, _METADATA_LIMIT)
    try:
        info = DatasetInfo(**msgspec.structs.asdict(metadata.info))
    except ValueError as error:
        raise _damaged(folder / METADATA, f"its class table is wrong: {error}") from None
    splits = {}
    for split in description.splits:
        if split.name in splits:
            raise _damaged(folder / DESCRIPTION, f"lists the split {split.name!r} twice")
        splits[split.name] = _split(folder, description.name, split, metadata)
    return Prepared(
        name=description.name,
        version=description.version,
        splits=splits,
        info=info,
        dense=dense,
        semantic=semantic,
        fingerprints=metadata.fingerprints,
        skipped=tuple(metadata.skipped),
    )


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the whole metadata.json, unknown keys included; `read` checks it."""
    path = remote.path_of(folder) / METADATA
    return _read(path, dict[str, Any], _METADATA_LIMIT)


def _read(path: Path, schema: type[T], limit: int) -> T:
    try:
        return read_json(path, schema, limit=limit)
    except FileError as error:
        raise _damaged(path, str(error).removeprefix(f"{path} ")) from None


def _damaged(path: Path, reason: str) -> FileError:
    return FileError(
        f"{path} {reason}. Fetch the prepared dataset again, or delete {path.parent} and prepare it"
    )


def _form(folder: Path) -> tuple[bool, bool]:
    """Tells the form of the records from features.json: (dense, semantic)."""
    found = _read(folder / FEATURES, _Feature, JSON_LIMIT)
    for known, form in _known_features():
        if found == known:
            return form
    names = sorted(found.features_dict.features) if found.features_dict else []
    raise _damaged(
        folder / FEATURES,
        "does not describe the records of a builder of input_pipeline.builders; it has "
        f"{first_few(names, 8) or 'no features'}",
    )


@functools.cache
def _known_features() -> list[tuple[_Feature, tuple[bool, bool]]]:
    from oneformer_jax.input_pipeline.builders import schema

    known = []
    for dense, semantic in itertools.product((False, True), repeat=2):
        content = schema.features(dense=dense, semantic=semantic).to_json()["content"]
        features_dict = msgspec.convert(content, _FeaturesDict)
        known.append((_Feature(features_dict=features_dict), (dense, semantic)))
    return known


def _split(folder: Path, dataset: str, split: _Split, metadata: _Metadata) -> Split:
    lengths = tuple(map(int, split.shard_lengths))
    if split.name not in metadata.records:
        raise _damaged(folder / METADATA, f'has no entry "records" of the split {split.name!r}')
    facts = metadata.records[split.name]
    counts = {len(facts.height), len(facts.width), len(facts.has_things), sum(lengths)}
    if len(counts) > 1:
        raise _damaged(
            folder / METADATA,
            f"has {len(facts.height):,} heights, {len(facts.width):,} widths and "
            f"{len(facts.has_things):,} has_things of the split {split.name!r}, which has "
            f"{sum(lengths):,} records in {DESCRIPTION}",
        )
    return Split(
        paths=tuple(
            f"{folder}/{dataset}-{split.name}.array_record-{shard:05d}-of-{len(lengths):05d}"
            for shard in range(len(lengths))
        ),
        lengths=lengths,
        num_bytes=int(split.num_bytes),
        sizes=np.array([facts.height, facts.width], np.int32).T,
        has_things=np.array(facts.has_things, bool),
        left_out=tuple(metadata.left_out.get(split.name, ())),
    )
