"""The one schema of all prepared panoptic datasets, and their metadata.

Feature names follow TFDS's own coco/2017_panoptic. Images keep their original compression. The
segment map is a PNG in one of two forms, told apart by its channels:
  3 channels: COCO's form, id = R + 256 G + 65536 B;
  1 channel ("dense"): 0 is void and v is segment v - 1 of `panoptic_objects`; it decodes about
    three times as fast. 8 bits, or 16 in images with more than 255 segments.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.records import RecordError, SegmentTable

OBJECTS = "panoptic_objects"
# PNG of class id + 1, 0 unlabelled; only in datasets with a separate semantic annotation.
SEMANTIC = "semantic_image"
# Facts about every record in the metadata.
FACTS = ("height", "width", "has_things")


def features(*, dense: bool, semantic: bool = False) -> tfds.features.FeaturesDict:
    """Makes the schema, with a dense or COCO-form segment map, with or without a semantic map."""
    extra = {SEMANTIC: tfds.features.Image(shape=(None, None, 1))} if semantic else {}
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image/filename": tfds.features.Text(),
            "image/id": tfds.features.Text(),
            "panoptic_image": tfds.features.Image(shape=(None, None, 1 if dense else 3)),
            OBJECTS: tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "label": np.int64,  # contiguous class id; names are in the metadata
                    "is_crowd": np.bool_,
                }
            ),
            **extra,
        }
    )


def example(
    image: bytes,
    panoptic_png: bytes,
    segments: SegmentTable,
    *,
    image_id: str,
    file_name: str,
    semantic_png: bytes | None = None,
) -> dict:
    """Makes an example for `features`."""
    return {
        **({SEMANTIC: io.BytesIO(semantic_png)} if semantic_png else {}),
        "image": io.BytesIO(image),
        "image/filename": file_name,
        "image/id": image_id,
        "panoptic_image": io.BytesIO(panoptic_png),
        OBJECTS: {
            "id": segments.ids,
            "area": segments.areas,
            "label": segments.categories,
            "is_crowd": segments.crowd.astype(bool),
        },
    }


@dataclasses.dataclass(frozen=True)
class Example:
    """A stored example; images keep their original compression."""

    image: bytes
    panoptic_png: bytes
    semantic_png: bytes | None
    segments: SegmentTable
    image_id: str
    file_name: str


def parse(data: bytes, where: str, *, semantic: bool) -> Example:
    """Reads a serialised example of `features`.

    TFDS's own parser does not check the record, which may be damaged, or have another schema than
    its folder's description.

    Args:
      data: the serialised tf.train.Example.
      where: name of the record in messages.
      semantic: True if it must have a semantic map.

    Raises:
      RecordError: no such example, or fields are missing or of another type or number.
    """
    try:
        fields = tf_example_pb2.Example.FromString(data).features.feature
    except Exception as error:  # DecodeError, whose class depends on protobuf's runtime
        raise RecordError(
            f"{where}: not a serialised example ({error}); prepare the dataset again"
        ) from error
    try:
        objects = [
            _integers(fields, f"{OBJECTS}/{key}") for key in ("id", "label", "is_crowd", "area")
        ]
        if len(set(map(len, objects))) > 1:
            raise ValueError(
                f"fields of {OBJECTS} have {[len(values) for values in objects]} values"
            )
        for key, values in zip(("is_crowd", "area"), objects[2:], strict=True):
            if min(values, default=0) < 0 or (key == "is_crowd" and max(values, default=0) > 1):
                raise ValueError(f"{OBJECTS}/{key} is out of range")
        return Example(
            image=_text(fields, "image"),
            panoptic_png=_text(fields, "panoptic_image"),
            semantic_png=_text(fields, SEMANTIC) if semantic else None,
            segments=SegmentTable.from_lists(*objects),
            image_id=_text(fields, "image/id").decode(),
            file_name=_text(fields, "image/filename").decode(),
        )
    except ValueError as error:
        raise RecordError(
            f"{where}: not a record of this dataset ({error}); prepare the dataset again"
        ) from error


def _field(fields: Mapping[str, Any], key: str, kind: str) -> Sequence[Any]:
    if key not in fields:
        raise ValueError(f"no field {key}")
    found = fields[key].WhichOneof("kind")
    if found != kind:
        raise ValueError(f"field {key} is a {found}, not a {kind}")
    return getattr(fields[key], kind).value


def _text(fields: Mapping[str, Any], key: str) -> bytes:
    values = _field(fields, key, "bytes_list")
    if len(values) != 1:
        raise ValueError(f"field {key} has {len(values)} values, not 1")
    return values[0]


def _integers(fields: Mapping[str, Any], key: str) -> Sequence[int]:
    return _field(fields, key, "int64_list")


def metadata(info: DatasetInfo) -> tfds.core.MetadataDict:
    """Makes the metadata stored beside the records: the class table.

    A builder that generates adds "records" (`note_record`) and further JSON values.
    """
    return tfds.core.MetadataDict(info=dataclasses.asdict(info))


def note_record(
    stored: dict, split: str, shape: tuple[int, ...], segments: SegmentTable, info: DatasetInfo
) -> None:
    """Appends the facts of a split's next record, which a loader needs before it reads images.

    Args:
      stored: the builder's metadata, with an entry "records".
      split: name of the split.
      shape: (height, width, ...) of the image.
      segments: its segments.
      info: the class table.
    """
    facts = stored["records"].setdefault(split, {key: [] for key in FACTS})
    facts["height"].append(shape[0])
    facts["width"].append(shape[1])
    facts["has_things"].append(segments.has_things(info.is_thing))
