"""Small annotation files in which every key is set, and ways to spoil one value."""

import copy
import json

import cv2
import numpy as np

from oneformer_jax.input_pipeline.coco_format import CocoFolderSource
from oneformer_jax.input_pipeline.coco_instances import CocoInstanceSource

MISSING = object()
SHAPE = HEIGHT, WIDTH = 32, 48

# Values that no number of these files may have, and some that a few of them may.
SPOILED = {
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
    "text": "1",
    "fraction": 1.5,
    "null": None,
    "list": [],
    "object": {},
    "true": True,
    "negative": -1,
    "2**40": 2**40,
    "2**70": 2**70,
    "1e300": 1e300,
    "missing": MISSING,
}


def panoptic():
    return {
        "categories": [
            {"id": 7, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
            {"id": 30, "name": "ground", "isthing": 0, "color": [4, 5, 6]},
        ],
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)
        ],
        "annotations": [
            {
                "image_id": i,
                "file_name": f"{i}.png",
                "segments_info": [
                    {"id": 1, "category_id": 7, "iscrowd": 0, "area": 100},
                    {"id": 2, "category_id": 30, "iscrowd": 0, "area": HEIGHT * WIDTH - 100},
                ],
            }
            for i in (1, 2)
        ],
    }


def instances():
    square = [8.0, 8.0, 18.0, 8.0, 18.0, 18.0, 8.0, 18.0]
    code = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
    return {
        "categories": [{"id": 7, "name": "cat"}, {"id": 30, "name": "dog"}],
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)
        ],
        "annotations": [
            {
                "id": 10 * image + k,
                "image_id": image,
                "category_id": 7,
                "iscrowd": 0,
                "area": 100.0,
                "segmentation": copy.deepcopy(segmentation),
            }
            for image in (1, 2)
            for k, segmentation in enumerate(([square], code))
        ],
    }


def places(value, path=()):
    """Paths of all values of a JSON, containers included, without its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def spoiled(content, path, value):
    """A copy of a JSON with another value, or none, at a path."""
    content = copy.deepcopy(content)
    at = content
    for key in path[:-1]:
        at = at[key]
    if value is MISSING:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return content


def dump(content):
    return json.dumps(content)  # with NaN and Infinity, as Python writes them


def make_pictures(folder):
    """Writes the images and the PNGs that the files name; a PNG has 100 pixels of id 1."""
    ids = np.full((*SHAPE, 3), (0, 0, 2), np.uint8)
    ids[4:14, 4:14] = (0, 0, 1)
    for i in (1, 2):
        cv2.imwrite(str(folder / f"{i}.jpg"), np.full((*SHAPE, 3), 90, np.uint8))
        cv2.imwrite(str(folder / f"{i}.png"), ids)
    return folder


def opened(kind, pictures, path, **options):
    """The source that reads a file of the kind "panoptic" or "instances"."""
    if kind == "panoptic":
        return CocoFolderSource(pictures, pictures, path, **options)
    return CocoInstanceSource(pictures, path, **options)
