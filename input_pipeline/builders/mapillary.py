"""Mapillary Vistas v1.2 as downloaded from mapillary.com/dataset/vistas."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from oneformer_jax.input_pipeline import datasets
from oneformer_jax.input_pipeline.annotations.panoptic import read_panoptic
from oneformer_jax.input_pipeline.builders import official, raw
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource
from oneformer_jax.input_pipeline.files import sha256

_FOLDERS = {"train": "training", "validation": "validation"}
_JSON = "panoptic_2018.json"


class MapillaryPanoptic(official.OfficialBuilder):
    """Mapillary Vistas v1.2, which comes with panoptic annotations."""

    DATASET = "mapillary"
    CLASSES = datasets.MAPILLARY
    EXPECTED: ClassVar[dict[str, int]] = {"train": 18_000, "validation": 2_000}
    RECORDS_PER_SHARD = 100
    FOLDER = "mapillary_vistas"
    LAYOUT = """\
  DIR/
    {training,validation}/images/ID.jpg
    {training,validation}/panoptic/panoptic_2018.json    or in v1.2/panoptic/
    {training,validation}/panoptic/ID.png"""

    @classmethod
    def required(cls, split: str) -> tuple[tuple[str, ...], ...]:
        folder = _FOLDERS[split]
        return ((f"{folder}/images",), _panoptic_jsons(folder))

    @classmethod
    def open_split(cls, root: Path, split: str) -> raw.PanopticJsonSplit:
        folder = _FOLDERS[split]
        images = root / folder / "images"
        json_path = next(
            path for path in (root / name for name in _panoptic_jsons(folder)) if path.exists()
        )
        # The official code does not read names from the JSON: it has its own class names, and finds
        # an image by the name of its PNG.
        content = read_panoptic(json_path, image_names=False)
        notes = check_categories(json_path, content.categories)
        reader = CocoFolderSource(images, json_path.parent, json_path, cls.CLASSES, content)
        return raw.PanopticJsonSplit(
            reader, (images, json_path.parent), sha256(json_path), notes=notes
        )


def _panoptic_jsons(folder: str) -> tuple[str, ...]:
    return (f"{folder}/panoptic/{_JSON}", f"{folder}/v1.2/panoptic/{_JSON}")


def check_categories(json_path: Path, categories: list[dict]) -> tuple[str, ...]:
    """Compares a JSON's categories with the 65 of v1.2.

    The JSON may list more (unlabelled pixels); a segment of one is an error later. Names are not
    compared, and the official code, not the JSON, tells things from stuff.

    Returns:
      Notes on classes that are the other kind in the JSON.

    Raises:
      ValueError: an id is missing.
    """
    kinds = {c.get("id"): bool(c.get("isthing")) for c in categories}
    table = datasets.MAPILLARY
    notes = []
    for id_, name, thing in zip(table.category_ids, table.class_names, table.is_thing, strict=True):
        if id_ not in kinds:
            raise ValueError(
                f"{json_path}: category {id_} ({name}) is missing; these are not the 65 categories "
                "of Mapillary Vistas v1.2"
            )
        if kinds[id_] != thing:
            notes.append(
                f"{json_path} has isthing {int(kinds[id_])} for category {id_} ({name}); it is "
                f"taken for {'a thing' if thing else 'stuff'}, as in the official code"
            )
    return tuple(notes)
