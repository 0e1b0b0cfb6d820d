"""Writes segmentations to files: overlays, label maps, COCO's panoptic and result formats."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from pycocotools import mask as coco_mask

from oneformer_jax import files
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.types import TASKS


def write_prediction(
    out_dir: str | os.PathLike[str],
    name: str,
    segmentation: Segmentation,
    *,
    source: str | None = None,
    overlay_size: int = 480,
) -> list[pathlib.Path]:
    """Writes one image's result; a failure leaves the old file.

    Every task has a `NAME_TASK_overlay.png`. It enlarges images whose shorter side has less than
    `overlay_size` pixels by a whole factor, and shrinks very large ones (see `overlay.draw`). Class
    ids in files are the data set's own. Other files:

    * panoptic: `NAME_panoptic.png` and `NAME_panoptic.json` in COCO's panoptic format. A pixel's
      segment id is R + 256 G + 65536 B, 0 is unassigned.
    * semantic: `NAME_semantic.png`, grey values are class ids, in 16 bits if 8 do not suffice; with
      ids above 65,535 an RGB picture, id = R + 256 G + 65536 B.
    * instance: `NAME_instance.json`, a list in COCO's result format, masks run-length encoded.

    Args:
      out_dir: folder, made as needed.
      name: start of the file names; also the image id, as a number if it consists of digits.
      segmentation: a result with its image.
      source: name of the image file, stored in the overlay: see `source_of`.
      overlay_size: pixels.

    Returns:
      The files written.

    Raises:
      ValueError: class ids that no picture can hold.
    """
    out_dir = pathlib.Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    task = segmentation.task
    image_id = int(name) if name.isascii() and name.isdigit() else name
    overlay = segmentation.overlay(min_size=overlay_size)
    pictures: dict[str, np.ndarray] = {f"{name}_{task}_overlay.png": overlay}
    texts: dict[str, Any] = {}
    if task == "panoptic":
        pictures[f"{name}_panoptic.png"] = encode_ids(segmentation.segments)
        texts[f"{name}_panoptic.json"] = coco_panoptic(
            segmentation, f"{name}_panoptic.png", image_id
        )
    elif task == "semantic":
        pictures[f"{name}_semantic.png"] = dataset_ids(segmentation)
    else:
        texts[f"{name}_instance.json"] = list(coco_instances(segmentation, image_id))
    for file, pixels in pictures.items():
        write_png(out_dir / file, pixels, source if pixels is overlay else None)
    for file, content in texts.items():
        files.write_atomically(out_dir / file, json.dumps(content, allow_nan=False))
    return [out_dir / file for file in (*pictures, *texts)]


def write_png(path: str | os.PathLike[str], image: np.ndarray, source: str | None = None) -> None:
    """Writes uint8 [H, W, 3] RGB, or grey [H, W] of 8 or 16 bits, as a PNG with text `source`."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        texts = PngImagePlugin.PngInfo()
        if source is not None:
            texts.add_itxt("Source", source)
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=texts)


def source_of(out_dir: pathlib.Path, name: str) -> str | None:
    """Returns the name of the image file whose results in `out_dir` begin with `name`, or None."""
    for task in TASKS:
        path = out_dir / f"{name}_{task}_overlay.png"
        with contextlib.suppress(Exception), PngImagePlugin.PngImageFile(path) as picture:
            return picture.info.get("Source")  # missing in a file that is not ours
    return None


def encode_ids(segments: np.ndarray) -> np.ndarray:
    """Encodes segment ids int [H, W] below 2**24 as uint8 [H, W, 3]: R + 256 G + 65536 B."""
    return np.stack([segments >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


def coco_panoptic(
    segmentation: Segmentation, file_name: str, image_id: int | str
) -> dict[str, Any]:
    """Returns COCO's panoptic JSON of one image, whose PNG is `file_name`."""
    metadata = segmentation.metadata
    height, width = segmentation.size
    infos = [
        {
            "id": info["id"],
            "category_id": metadata.category_ids[info["category_id"]],
            "isthing": int(info["isthing"]),
            "iscrowd": 0,
            "area": info["area"],
            "bbox": _bounding_box(segmentation.segments == info["id"]),
            "score": round(info["score"], 6),
        }
        for info in segmentation.segments_info
    ]
    categories = [
        {"id": id, "name": name, "isthing": int(thing), "color": list(color)}
        for id, name, thing, color in zip(
            metadata.category_ids,
            metadata.class_names,
            metadata.is_thing,
            metadata.colors,
            strict=True,
        )
    ]
    return {
        "images": [{"id": image_id, "file_name": file_name, "height": height, "width": width}],
        "annotations": [{"image_id": image_id, "file_name": file_name, "segments_info": infos}],
        "categories": categories,
    }


def coco_instances(segmentation: Segmentation, image_id: int | str) -> Iterator[dict[str, Any]]:
    """Yields the entries of COCO's result format, one per mask in their order."""
    for mask, label, score in zip(
        segmentation.masks, segmentation.labels, segmentation.scores, strict=True
    ):
        encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        yield {
            "image_id": image_id,
            "category_id": segmentation.metadata.category_ids[label],
            "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")},
            "bbox": _bounding_box(mask),
            "score": round(float(score), 6),
        }


def _bounding_box(mask: np.ndarray) -> list[int]:
    """[left, top, width, height] of the mask's pixels; zeros if it has none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def dataset_ids(segmentation: Segmentation) -> np.ndarray:
    """The class map with the data set's own ids: uint8 or uint16 [H, W], or its `encode_ids`."""
    metadata = segmentation.metadata
    ids = np.array(metadata.category_ids)
    if ids.min() < 0 or ids.max() >= 1 << 24:
        strange = next(i for i in metadata.category_ids if not 0 <= i < 1 << 24)
        raise ValueError(
            f"the category id {strange} of {metadata.dataset} does not fit into the pixels of a "
            "picture (0 to 16777215): give the categories smaller ids in the dataset's JSON or "
            "the model's metadata.json, or leave the semantic task out"
        )
    if ids.max() > 65_535:
        return encode_ids(ids[segmentation.class_map])
    return ids.astype(np.uint8 if ids.max() < 256 else np.uint16)[segmentation.class_map]
