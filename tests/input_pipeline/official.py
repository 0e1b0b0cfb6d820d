"""Miniature downloads of the official datasets: their folder trees, with a handful of images."""

import json
import pathlib

import cv2
import numpy as np
import pytest

from oneformer_jax.input_pipeline import datasets, records, sources
from oneformer_jax.input_pipeline.builders import preparation

NAMES = tuple(preparation.BUILDERS)
COUNTS = {"train": 5, "validation": 3}
SHAPE = (20, 30)


def make(dataset, folder: pathlib.Path) -> pathlib.Path:
    """Writes the download of `dataset` into `folder`: COUNTS records per split."""
    return {"coco": coco, "ade20k": ade20k, "cityscapes": cityscapes, "mapillary": mapillary}[
        dataset
    ](folder)


def shrink(monkeypatch, dataset, per_file=2, **expected):
    """Makes the builder expect a miniature, in several files."""
    builder = preparation.builder_class(dataset)
    monkeypatch.setattr(builder, "EXPECTED", {**COUNTS, **expected})
    monkeypatch.setattr(builder, "RECORDS_PER_SHARD", per_file)


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*SHAPE, 3), np.uint8)


def write(path: pathlib.Path, data) -> None:
    """Writes a JSON value, bytes, or the pixels of an image (RGB, grey or 16-bit)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif isinstance(data, np.ndarray):
        assert cv2.imwrite(str(path), data[..., ::-1] if data.ndim == 3 else data)
    else:
        path.write_text(json.dumps(data))


def categories(info: datasets.DatasetInfo) -> list[dict]:
    return [
        {"id": id_, "name": name, "isthing": int(thing)}
        for id_, name, thing in zip(info.category_ids, info.class_names, info.is_thing, strict=True)
    ]


def _panoptic_json(info, names, stuff, thing):
    """A COCO-panoptic JSON and its PNGs: stuff 70000, a thing 300 and a crowd 16000000.

    Every third image has the stuff alone.
    """
    content = {"images": [], "annotations": [], "categories": categories(info)}
    maps = {}
    for number, (id_, name) in enumerate(names):
        panoptic = np.full(SHAPE, 70_000, np.int32)
        panoptic[:2] = 0
        if number % 3 != 2:
            panoptic[5:10, 5:15], panoptic[12:15, 20:28] = 300, 16_000_000
        of_class = {70_000: stuff, 300: thing, 16_000_000: thing}
        content["images"].append({"id": id_, "file_name": f"{name}.jpg"})
        content["annotations"].append(
            {
                "image_id": id_,
                "file_name": f"{name}.png",
                "segments_info": [
                    {
                        "id": i,
                        "category_id": of_class[i],
                        "area": int((panoptic == i).sum()),
                        "iscrowd": int(i == 16_000_000),
                    }
                    for i in np.unique(panoptic).tolist()
                    if i
                ],
            }
        )
        maps[name] = records.encode_panoptic(panoptic)
    return content, maps


def coco(root):
    """Person, person crowd, and rug-merged; the original instances differ from the panoptic ones.

    By them, images 1, 2 and 4 of a split have something that is no crowd, image 0 a crowd only.
    """
    for split, year in (("train", "train2017"), ("validation", "val2017")):
        first = {"train": 100, "validation": 200}[split]
        ids = range(first, first + COUNTS[split])
        content, maps = _panoptic_json(datasets.COCO, [(i, f"{i:012d}") for i in ids], 200, 1)
        write(root / f"annotations/panoptic_{year}.json", content)
        for number, (name, png) in zip(ids, maps.items(), strict=True):
            write(root / year / f"{name}.jpg", image(number))
            write(root / f"annotations/panoptic_{year}/{name}.png", png)
        square = [[5.0, 5.0, 15.0, 5.0, 15.0, 10.0, 5.0, 10.0]]
        instances = [
            {"image_id": first, "iscrowd": 1, "category_id": 1, "area": 24.0,
             "segmentation": {"size": list(SHAPE), "counts": [600]}},
            *({"image_id": i, "iscrowd": 0, "category_id": 90, "area": 50.5,
               "segmentation": square} for i in ids if i - first in (1, 2, 4)),
        ]  # fmt: skip
        for number, instance in enumerate(instances):
            instance.update(id=number + 1, bbox=[5, 5, 10, 5])
        write(
            root / f"annotations/instances_{year}.json",
            {"images": content["images"], "annotations": instances, "categories": []},
        )
    return root


def mapillary(root, panoptic="panoptic"):
    for split, folder in (("train", "training"), ("validation", "validation")):
        names = [(f"{folder}-{n}", f"{folder}-{n}") for n in range(COUNTS[split])]
        content, maps = _panoptic_json(datasets.MAPILLARY, names, 14, 56)
        # The real JSON may spell the names in its own way and list unlabelled pixels.
        content["categories"] = [
            {**c, "name": f"class {c['id']}"} for c in content["categories"]
        ] + [{"id": 66, "name": "Unlabeled", "isthing": 0}]
        write(root / folder / panoptic / "panoptic_2018.json", content)
        for number, (name, png) in enumerate(maps.items()):
            write(root / folder / "images" / f"{name}.jpg", image(number))
            write(root / folder / panoptic / f"{name}.png", png)
    return root


def ade20k(root):
    """Wall, a bed by number, and a chair that only the semantic map has."""
    root = root / "ADEChallengeData2016"
    for split, folder in (("train", "training"), ("validation", "validation")):
        for number in range(COUNTS[split]):
            name = f"ADE_{split[:5]}_{number:08d}"
            semantic = np.ones(SHAPE, np.uint8)  # wall
            semantic[5:10, 5:15], semantic[:2] = 8, 0  # bed, unlabelled
            semantic[15:, :4] = 20  # chair
            instance = np.zeros((*SHAPE, 3), np.uint8)
            instance[5:10, 4:15] = 1, 7, 0  # category 1 is bed; larger than in the semantic map
            write(root / f"images/{folder}/{name}.jpg", image(number))
            write(root / f"annotations/{folder}/{name}.png", semantic)
            write(root / f"annotations_instance/{folder}/{name}.png", instance)
    write(root / "objectInfo150.txt", b"Idx\tRatio\n")
    return root


def cityscapes(root):
    """Road, two cars, a group of cars, a trailer, ego vehicle; in two cities."""
    for split, folder in (("train", "train"), ("validation", "val")):
        for number in range(COUNTS[split]):
            city = ("aachen", "zurich")[number % 2]
            name = f"{city}_{number:06d}_000019"
            ids = np.full(SHAPE, 7, np.uint16)
            ids[18:] = 1
            ids[5:10, 5:15], ids[5:10, 15:20] = 26_000, 26_001
            ids[12:14, 20:28], ids[12:14, :4] = 26, 30_000
            write(root / f"leftImg8bit/{folder}/{city}/{name}_leftImg8bit.png", image(number))
            write(root / f"gtFine/{folder}/{city}/{name}_gtFine_instanceIds.png", ids)
            write(root / f"gtFine/{folder}/{city}/{name}_gtFine_polygons.json", {})
    return root


class Job:
    """A miniature download and its preparation, for a test."""

    def __init__(self, tmp_path, monkeypatch):
        self.data_dir = tmp_path / "data"
        self.lines = []
        self._tmp_path, self._monkeypatch = tmp_path, monkeypatch

    def make(self, dataset, **expected):
        self.dataset = dataset
        self.root = make(dataset, self._tmp_path / "download")
        shrink(self._monkeypatch, dataset, **expected)
        builder = preparation.builder_class(dataset)
        self.folder = self.data_dir / builder.name / str(builder.VERSION)
        return self

    def prepare(self, **options):
        self.lines.clear()
        return preparation.prepare(
            self.dataset, self.root, self.data_dir, log=self.lines.append, **options
        )

    def fail(self, error=ValueError, **options):
        """The message of a preparation that fails."""
        with pytest.raises(error) as raised:
            self.prepare(**options)
        return str(raised.value)

    def open(self, split="train", **options):
        return sources.open_source(
            self.dataset, data_dir=self.data_dir, split=split, options=options
        )[0]

    def report(self, split="train"):
        return json.loads((self.folder / preparation.REPORT).read_text())["splits"][split]

    def file(self, pattern):
        """The first file of that name; "train" comes before "val"."""
        return sorted(self.root.rglob(pattern))[0]

    def records(self, split="train"):
        """Everything that is written of a split."""
        return {path.name: path.read_bytes() for path in self.folder.glob(f"*-{split}.array_*")}
