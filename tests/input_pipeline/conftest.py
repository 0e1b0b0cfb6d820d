"""A tiny COCO-panoptic-format folder, made anew for each test."""

import json
import types

import cv2
import numpy as np
import pytest

from oneformer_jax.input_pipeline import records

CATEGORIES = [
    {"id": 30, "name": "ground", "isthing": 0},
    {"id": 7, "name": "cat", "isthing": 1},
    {"id": 12, "name": "dog", "isthing": 1},
    {"id": 45, "name": "sky", "isthing": 0},
]


@pytest.fixture
def coco_folder(tmp_path):
    """images/, panoptic/, panoptic_train.json (4 images) and panoptic_val.json (2 images).

    Attributes: root, json (split -> content), write(split) after changing the content,
    image(index) and panoptic(index) -> path of a training file. Image 2 has neither thing nor void.
    """
    root = tmp_path / "animals"
    (root / "images").mkdir(parents=True)
    (root / "panoptic").mkdir()
    rng = np.random.default_rng(5)
    folder = types.SimpleNamespace(root=root, json={})

    def write(split):
        path = root / f"panoptic_{'val' if split == 'validation' else split}.json"
        path.write_text(json.dumps(folder.json[split]))
        return path

    for split, numbers in (("train", range(4)), ("validation", range(4, 6))):
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        for number in numbers:
            height, width = 24 + number, 40
            stuff, cat, dogs = 70_000 + number, 300, 16_000_000
            panoptic = np.full((height, width), stuff, np.int32)
            segments = [{"id": stuff, "category_id": 30, "iscrowd": 0}]
            if number != 2:
                panoptic[:4] = 0
                panoptic[6:14, 5:15] = cat
                panoptic[10:20, 20:38] = dogs
                segments.append({"id": dogs, "category_id": 12, "iscrowd": 1})
                segments.append({"id": cat, "category_id": 7, "iscrowd": 0})
            for segment in segments:
                segment["area"] = int((panoptic == segment["id"]).sum())
            image = rng.integers(0, 256, (height, width, 3), np.uint8)
            name = f"{number:04d}"
            cv2.imwrite(str(root / "images" / f"{name}.jpg"), image)
            (root / "panoptic" / f"{name}.png").write_bytes(records.encode_panoptic(panoptic))
            content["images"].append(
                {"id": 100 + number, "file_name": f"{name}.jpg", "height": height, "width": width}
            )
            content["annotations"].append(
                {"image_id": 100 + number, "file_name": f"{name}.png", "segments_info": segments}
            )
        folder.json[split] = content
        write(split)
    folder.write = write
    folder.image = lambda index: root / "images" / f"{index:04d}.jpg"
    folder.panoptic = lambda index: root / "panoptic" / f"{index:04d}.png"
    return folder
