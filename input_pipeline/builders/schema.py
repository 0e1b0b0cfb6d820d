"""The one schema of all prepared panoptic datasets, and what is stored beside the records.

Feature names follow TFDS's own coco/2017_panoptic. Images stay as compressed as they came. The
segment map is a PNG in one of two forms, told apart by its channels:
  3 channels: COCO's form, id = R + 256 G + 65536 B;
  1 channel ("dense"): 0 is void and v is segment v - 1 of `panoptic_objects`; it decodes about
    three times as fast. 8 bits, or 16 in images with more than 255 segments.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from input_pipeline.datasets import DatasetInfo
from input_pipeline.records import SegmentTable

OBJECTS = "panoptic_objects"
# PNG of class id + 1, 0 unlabelled; only in datasets whose semantic annotation is one of its own.
SEMANTIC = "semantic_image"
# What the metadata keeps about every record, besides the records themselves.
FACTS = ("height", "width", "has_things")


def features(*, dense: bool, semantic: bool = False) -> tfds.features.FeaturesDict:
    """The schema, with a dense or a COCO-form segment map, with or without a semantic map."""
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


def is_dense(feature_dict: Mapping) -> bool:
    """Whether the segment maps of a dataset with these features are in the dense form."""
    return feature_dict["panoptic_image"].shape[-1] == 1


def skip_decoding(feature_dict: Mapping) -> dict:
    """Decoders that leave all images compressed: OpenCV decodes them faster than TFDS would."""
    keys = ("image", "panoptic_image", SEMANTIC)
    return {key: tfds.decode.SkipDecoding() for key in keys if key in feature_dict}


def example(
    image: bytes,
    panoptic_png: bytes,
    segments: SegmentTable,
    *,
    image_id: str,
    file_name: str,
    semantic_png: bytes | None = None,
) -> dict:
    """One example as `features` wants it."""
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


def segment_table(objects: Mapping[str, np.ndarray]) -> SegmentTable:
    """The segments of a stored example."""
    return SegmentTable.from_lists(
        objects["id"], objects["label"], objects["is_crowd"], objects["area"]
    )


def metadata(info: DatasetInfo) -> tfds.core.MetadataDict:
    """What is stored beside the records: the class table.

    While a builder generates, it adds "records" (`note_record`) and further JSON values.
    """
    return tfds.core.MetadataDict(info=dataclasses.asdict(info))


def note_record(
    stored: dict, split: str, shape: tuple[int, ...], segments: SegmentTable, info: DatasetInfo
) -> None:
    """Appends the facts of a split's next record: what a loader asks before it reads any image.

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
    facts["has_things"].append(
        any(info.is_thing[k] for k in segments.categories[segments.crowd == 0])
    )


def info_from_metadata(stored: Mapping) -> DatasetInfo:
    """The class table that `metadata` stored."""
    table = dict(stored["info"])
    return DatasetInfo(
        dataset=table["dataset"],
        class_names=tuple(table["class_names"]),
        is_thing=tuple(table["is_thing"]),
        colors=tuple(tuple(color) for color in table["colors"]),
        category_ids=tuple(table["category_ids"]),
        ignore_label=table["ignore_label"],
    )
