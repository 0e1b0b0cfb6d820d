"""COCO 2017 panoptic as downloaded from cocodataset.org."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from input_pipeline import datasets
from input_pipeline.builders import raw
from input_pipeline.coco_format import CocoFolderSource
from input_pipeline.files import sha256

_FOLDERS = {"train": "train2017", "validation": "val2017"}


class CocoPanoptic(raw.PanopticBuilder):
    """COCO 2017 with panoptic annotations, and with the original instances where they are there.

    The instance annotation is read for two things: `has_things` of training images, which the
    official training filter asks for, and the `instances` of validation images, for AP.
    """

    DATASET = "coco"
    CLASSES = datasets.COCO
    EXPECTED: ClassVar[dict[str, int]] = {"train": 118_287, "validation": 5_000}
    RECORDS_PER_SHARD = 1000
    FOLDER = "coco"
    INSTANCES = True
    LAYOUT = """\
  DIR/
    {train,val}2017/*.jpg                          train2017.zip, val2017.zip
    annotations/panoptic_{train,val}2017.json      panoptic_annotations_trainval2017.zip
    annotations/panoptic_{train,val}2017/*.png     the zips inside of it (or DIR/panoptic_*2017/)
    annotations/instances_{train,val}2017.json     annotations_trainval2017.zip, optional"""

    @classmethod
    def required(cls, split: str) -> tuple[tuple[str, ...], ...]:
        year = _FOLDERS[split]
        return ((year,), (f"annotations/panoptic_{year}.json",), _panoptic_folders(year))

    @classmethod
    def open_split(cls, root: Path, split: str) -> raw.PanopticJsonSplit:
        year = _FOLDERS[split]
        images, json_path = root / year, root / f"annotations/panoptic_{year}.json"
        pngs = next(
            path for path in (root / name for name in _panoptic_folders(year)) if path.is_dir()
        )
        reader = CocoFolderSource(images, pngs, json_path, cls.CLASSES)
        fingerprint, with_instances, instances, notes = sha256(json_path), None, None, ()
        instance_path = root / f"annotations/instances_{year}.json"
        if instance_path.is_file():
            fingerprint += sha256(instance_path)
            with_instances, instances = read_instances(instance_path, texts=split == "validation")
        else:
            notes = (
                f"there is no {instance_path}: what data.require_things keeps is told from the "
                "panoptic annotation, and records have no original instances",
            )
        return raw.PanopticJsonSplit(
            reader,
            (images, pngs),
            fingerprint,
            with_instances=with_instances,
            instances=instances,
            notes=notes,
        )


def _panoptic_folders(year: str) -> tuple[str, ...]:
    return (f"annotations/panoptic_{year}", f"panoptic_{year}")


def read_instances(path: Path, texts: bool) -> tuple[set[str], dict[str, str] | None]:
    """Reads an instances_*.json.

    Args:
      path: the JSON.
      texts: whether the annotations themselves are wanted.

    Returns:
      Ids of the images with an instance that is no crowd, and image id -> JSON text of a list of
      its instances: category (contiguous class id), iscrowd (bool), area, segmentation (polygons or
      run-length code, as in the JSON). Every image has an entry. None if texts are not
      wanted.

    Raises:
      ValueError: not an instance JSON of COCO.
    """
    # The polygons of the training split would take gigabytes.
    drop = None if texts else lambda d: {k: v for k, v in d.items() if k != "segmentation"}
    try:
        content = json.loads(path.read_bytes(), object_hook=drop)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); is it truncated?") from error
    classes = datasets.COCO.contiguous_ids()
    try:
        of_image: dict[str, list] = {str(image["id"]): [] for image in content["images"]}
        kept = set()
        for annotation in content["annotations"]:
            image_id, crowd = str(annotation["image_id"]), bool(annotation["iscrowd"])
            if not crowd:
                kept.add(image_id)
            if texts:
                of_image[image_id].append(
                    {
                        "category": classes[annotation["category_id"]],
                        "iscrowd": crowd,
                        "area": annotation["area"],
                        "segmentation": annotation["segmentation"],
                    }
                )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not an instance JSON of COCO ({error!r} in its images or annotations)"
        ) from error
    return kept, {k: json.dumps(v) for k, v in of_image.items()} if texts else None
