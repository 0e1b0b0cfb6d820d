"""Writes segmentations to files: overlays, label maps, COCO's panoptic and result formats."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from PIL import Image, PngImagePlugin
from scipy import ndimage

from oneformer_jax import files, remote
from oneformer_jax.eval.pictures.overlay import Drawable
from oneformer_jax.types import TASKS


class Writable(Drawable, Protocol):
    """The part of `segmentation.Segmentation` that is written; see there."""

    @property
    def segments(self) -> np.ndarray | Any: ...
    @property
    def segments_info(self) -> list[dict[str, Any]] | Any: ...
    @property
    def class_map(self) -> np.ndarray | Any: ...
    def overlay(self, image: np.ndarray | None = None, **options: Any) -> np.ndarray: ...
    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]: ...


def write_prediction(
    out_dir: str | os.PathLike[str],
    name: str,
    segmentation: Writable,
    *,
    source: str | None = None,
    made_by: str | None = None,
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
      made_by: fingerprint of what the result is made of, stored there too: see `is_done`.
      overlay_size: pixels.

    Returns:
      The files written.

    Raises:
      ValueError: class ids that no picture can hold, or unlabelled pixels of a ground truth.
    """
    out_dir = remote.path_of(out_dir)
    files.make_folder(out_dir)
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
        texts[f"{name}_instance.json"] = segmentation.to_coco(image_id)
    for file, content in texts.items():
        files.write_atomically(out_dir / file, json.dumps(content, allow_nan=False))
    for file, pixels in reversed(pictures.items()):  # the overlay last: it tells what is done
        known = {"Source": source, "Made-By": made_by} if pixels is overlay else {}
        write_png(out_dir / file, pixels, **{k: v for k, v in known.items() if v is not None})
    return [out_dir / file for file in (*pictures, *texts)]


def write_png(path: str | os.PathLike[str], image: np.ndarray, **texts: str) -> None:
    """Writes uint8 [H, W, 3] RGB, or grey [H, W] of 8 or 16 bits, as a PNG with named texts."""
    path = remote.path_of(path)
    files.make_folder(path.parent)
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG", pnginfo=info)
    files.write_atomically(path, content.getvalue())


def source_of(out_dir: pathlib.Path, name: str) -> str | None:
    """Returns the name of the image file whose results in `out_dir` begin with `name`, or None."""
    texts = (_texts(out_dir / f"{name}_{task}_overlay.png") for task in TASKS)
    return next((found["Source"] for found in texts if "Source" in found), None)


def is_done(out_dir: pathlib.Path, name: str, tasks: Iterable[str], made_by: str) -> bool:
    """Tells whether all results of these tasks are in `out_dir` and have this fingerprint."""
    others = {"panoptic": (".png", ".json"), "instance": (".json",), "semantic": (".png",)}
    return all(
        _texts(out_dir / f"{name}_{task}_overlay.png").get("Made-By") == made_by
        and all((out_dir / f"{name}_{task}{ending}").exists() for ending in others[task])
        for task in tasks
    )


def _texts(path: pathlib.Path) -> dict[str, Any]:
    """Returns the texts of a PNG; none of a file that is missing or another program's."""
    with (
        contextlib.suppress(Exception),
        path.open("rb") as file,
        PngImagePlugin.PngImageFile(file) as picture,
    ):
        return {str(key): value for key, value in picture.info.items()}
    return {}


def encode_ids(segments: np.ndarray) -> np.ndarray:
    """Encodes segment ids int [H, W] below 2**24 as uint8 [H, W, 3]: R + 256 G + 65536 B."""
    return np.stack([segments >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


def coco_panoptic(segmentation: Writable, file_name: str, image_id: int | str) -> dict[str, Any]:
    """Returns COCO's panoptic JSON of one image, whose PNG is `file_name`."""
    metadata = segmentation.metadata
    ids = [info["id"] for info in segmentation.segments_info]
    places = ndimage.find_objects(segmentation.segments, max_label=max(ids, default=0))
    infos = []
    for info in segmentation.segments_info:
        # A ground truth may list a segment without pixels.
        rows, columns = places[info["id"] - 1] or (slice(0, 0), slice(0, 0))
        width, height = columns.stop - columns.start, rows.stop - rows.start
        infos.append(
            {
                "id": info["id"],
                "category_id": metadata.category_ids[info["category_id"]],
                "isthing": int(info["isthing"]),
                "iscrowd": 0,
                "area": info["area"],
                "bbox": [columns.start, rows.start, width, height],
                "score": round(info["score"], 6),
            }
        )
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
    height, width = segmentation.size
    return {
        "images": [{"id": image_id, "file_name": file_name, "height": height, "width": width}],
        "annotations": [{"image_id": image_id, "file_name": file_name, "segments_info": infos}],
        "categories": categories,
    }


def dataset_ids(segmentation: Writable) -> np.ndarray:
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
    if (segmentation.class_map < 0).any():
        raise ValueError(
            "a semantic ground truth with unlabelled pixels has no file: they have no class id"
        )
    if ids.max() > 65_535:
        return encode_ids(ids[segmentation.class_map])
    return ids.astype(np.uint8 if ids.max() < 256 else np.uint16)[segmentation.class_map]
