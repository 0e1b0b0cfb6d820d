"""Records of prepared datasets, read from ArrayRecord files one by one.

ArrayRecord keeps checksums of the records and of each file's index, so reading notices damage.
Every failure becomes a RecordError that names the file and the record.
"""

from __future__ import annotations

import bisect
import itertools
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oneformer_jax import remote
from oneformer_jax.input_pipeline import images, prepared
from oneformer_jax.input_pipeline.records import (
    RecordError,
    checked_index,
    count_pixels,
    decode_dense,
    decode_image,
    decode_labels,
    decode_panoptic,
    keep_visible,
    make_record,
    with_ids,
)

_WAY_OUT = (
    "restore the file, prepare the dataset again, or set data.skip_broken=True to leave out the "
    "records that cannot be read"
)


class RecordFiles:
    """The records of a list of ArrayRecord files, as bytes, numbered over all of them.

    Each file is opened when first needed. Threads may share an object; it can be pickled.

    Args:
      paths: the files.
      lengths: number of records that each must have.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int]):
        self._paths, self._lengths = tuple(paths), tuple(lengths)
        self._ends = tuple(itertools.accumulate(lengths))
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict:
        return {"paths": self._paths, "lengths": self._lengths}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def where(self, index: int) -> str:
        """Names the file of record `index`, and the record's number in it, for messages."""
        file, position = self._place(index)
        return f"{self._paths[file]}, record {position}"

    def __getitem__(self, index: int) -> bytes:
        """Record `index`; RecordError if it or its file is missing or damaged."""
        file, position = self._place(checked_index(index, len(self)))
        reader = self._readers.get(file) or self._open(file)
        try:
            (data,) = reader.read([position])
        except Exception as error:  # from C++: RuntimeError, ValueError, MemoryError, ...
            raise RecordError(f"{self.where(index)}: {_reason(error)}; {_WAY_OUT}") from error
        return data

    def _place(self, index: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file] - self._lengths[file])

    def _open(self, file: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if file in self._readers:  # opened by another thread meanwhile
                return self._readers[file]
            path = self._paths[file]
            try:
                # Opening a pipe would wait for its writer.
                if not remote.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
                    raise RecordError(f"{path} is not a regular file; {_WAY_OUT}")
                reader = ArrayRecordReader(
                    path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
                )
                if not reader.ok():
                    reader.close()  # raises what is wrong
            except RecordError:
                raise
            except OSError as error:
                raise RecordError(
                    f"{path} cannot be read ({error.strerror}); {_WAY_OUT}"
                ) from error
            except Exception as error:  # from C++, as above
                raise RecordError(f"{path}: {_reason(error)}; {_WAY_OUT}") from error
            if reader.num_records() != self._lengths[file]:
                raise RecordError(
                    f"{path} has {reader.num_records():,} records, but {prepared.DESCRIPTION} "
                    f"says {self._lengths[file]:,}: it is damaged or from another preparation; "
                    f"{_WAY_OUT}"
                )
            self._readers[file] = reader
            return reader


def _reason(error: Exception) -> str:
    return f"damaged ({(str(error) or type(error).__name__).splitlines()[0][:200]})"


class TfdsSource:
    """Reads a split of a prepared dataset (`builders.schema`).

    Args:
      builder_dir: the folder with dataset_info.json, or a prepared TFDS builder.
      split: name of a split.

    Attributes:
      info: the class table.
      left_out: reasons why records of the download are missing, a line each.
      max_pixels: limit of the pixels of an image or map.

    Raises:
      FileNotFoundError: nothing is prepared there.
      ValueError: its description is damaged or of another kind of dataset; the split is unknown or
        empty.
    """

    max_pixels = images.MAX_PIXELS

    def __init__(self, builder_dir: str | os.PathLike, split: str):
        self._dir = str(getattr(builder_dir, "data_dir", builder_dir))
        self._split = split
        described = prepared.read(self._dir)
        if split not in described.splits:
            raise ValueError(
                f"{self._dir} has no split {split!r}; it has {', '.join(sorted(described.splits))}"
            )
        found = described.splits[split]
        if not sum(found.lengths):
            raise ValueError(f"split {split!r} of {self._dir} is empty")
        self._dense, self._semantic = described.dense, described.semantic
        self._files = RecordFiles(found.paths, found.lengths)
        self._sizes, self._has_things = found.sizes, found.has_things
        self.info, self.left_out = described.info, found.left_out

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"TfdsSource({self._dir!r}, {self._split!r}, {len(self)} records)"

    def has_things(self, index: int) -> bool:
        """Tells from the metadata whether image `index` has a thing that is no crowd."""
        return bool(self._has_things[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """Returns the height and width of image `index`; reads no image."""
        height, width = self._sizes[index].tolist()
        return height, width

    def __getitem__(self, index: int) -> dict:
        """Record `index`, in the order of writing; RecordError if it is broken."""
        return self._record(index, compact=False)

    def compact(self, index: int) -> dict:
        """As `source[index]`, but a compact record (see `records`)."""
        return self._record(index, compact=True)

    def _record(self, index: int, *, compact: bool) -> dict:
        from oneformer_jax.input_pipeline.builders import schema

        index = checked_index(index, len(self))
        data = self._files[index]
        where = self._files.where(index)
        example = schema.parse(data, where, semantic=self._semantic)
        where = f"{where} ({example.file_name})"
        segments = example.segments
        segments.check(self.info.num_classes, where)
        decode = decode_dense if self._dense else decode_panoptic
        panoptic = decode(example.panoptic_png, segments, where, self.max_pixels)
        if compact:
            segments = segments.numbered()
        else:
            if example.semantic_png is None:  # ADE20K keeps its annotated areas
                pixels = count_pixels(panoptic, segments)
                panoptic, segments = keep_visible(panoptic, segments, pixels)
            panoptic = with_ids(panoptic, segments)
        record = make_record(
            decode_image(example.image, where, self.max_pixels),
            panoptic,
            segments,
            image_id=example.image_id,
            file_name=example.file_name,
            where=where,
        )
        if example.semantic_png is not None and not compact:
            record["semantic"] = self._semantic_map(example.semantic_png, record, where)
        return record

    def _semantic_map(self, png: bytes, record: Mapping[str, Any], where: str) -> np.ndarray:
        stored = decode_labels(png, where, self.max_pixels)  # class id + 1, 0 unlabelled
        if stored.shape != record["panoptic"].shape or stored.max() > self.info.num_classes:
            raise RecordError(
                f"{where}: the semantic map, {stored.shape} with values up to {stored.max()}, does "
                f"not fit the image, {record['panoptic'].shape}, and the {self.info.num_classes} "
                "classes; prepare the dataset again"
            )
        return stored.astype(np.int32) - 1  # 0 becomes VOID
