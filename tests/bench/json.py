"""Time and memory of opening annotation files as large as COCO's.

  python -m tests.bench.json [--scale=1.0] [--keep=FOLDER]

Makes a panoptic JSON (118,000 images, 900,000 segments) and an instance JSON (118,000 images,
860,000 annotations of 44 numbers, one in a hundred a run-length code), opens each in a process of
its own, and prints the processor time and the peak of resident memory. `--keep` leaves the files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import resource
import subprocess
import sys
import tempfile

import numpy as np

from tests.peak_memory import peak_bytes

IMAGES, SEGMENTS, INSTANCES, POINTS = 118_000, 900_000, 860_000, 22
HEIGHT, WIDTH = 480, 640
READERS = ("imports", "panoptic", "instances", "truth")


def _images(count: int) -> list[str]:
    return [
        json.dumps(
            {
                "license": 3,
                "file_name": f"{i:012d}.jpg",
                "coco_url": f"http://images.cocodataset.org/train2017/{i:012d}.jpg",
                "height": HEIGHT,
                "width": WIDTH,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{i:010d}_8e8f5c6e0f_z.jpg",
                "id": i,
            }
        )
        for i in range(count)
    ]


def _categories() -> str:
    rows = [{"id": i, "name": f"class {i}", "isthing": int(i < 81)} for i in range(1, 134)]
    return json.dumps(rows)


def _write(path: pathlib.Path, images: list[str], annotations) -> None:
    with open(path, "w") as file:
        file.write('{"categories": ' + _categories() + ', "images": [' + ", ".join(images))
        file.write('], "annotations": [')
        for number, row in enumerate(annotations):
            file.write(", " * (number > 0) + row)
        file.write("]}")


def make_panoptic(path: pathlib.Path, scale: float) -> None:
    images, segments = int(IMAGES * scale), int(SEGMENTS * scale)
    rng = np.random.default_rng(0)
    owners = np.sort(np.concatenate([np.arange(images), rng.integers(images, size=segments)]))
    ends = np.searchsorted(owners[:segments], np.arange(images), "right")
    columns = [rng.integers(1, 1 << 24, segments), rng.integers(1, 134, segments)]
    ids, categories = (column.tolist() for column in columns)

    def rows():
        start = 0
        for image, end in enumerate(ends.tolist()):
            infos = [
                {
                    "id": ids[s],
                    "category_id": categories[s],
                    "iscrowd": 0,
                    "bbox": [s % 600, s % 400, s % 77, s % 55],
                    "area": 20 + s % 5000,
                }
                for s in range(start, end)
            ]
            start = end
            name = f"{image:012d}.png"
            yield json.dumps({"segments_info": infos, "file_name": name, "image_id": image})

    _write(path, _images(images), rows())


def make_instances(path: pathlib.Path, scale: float) -> None:
    images, count = int(IMAGES * scale), int(INSTANCES * scale)
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    code = {"size": [HEIGHT, WIDTH], "counts": [100, *[5, 475] * 200]}
    code["counts"].append(HEIGHT * WIDTH - sum(code["counts"]))

    def rows():
        for i in range(count):
            radius = float(np.exp(rng.normal(3.2, 1.0)).clip(2, 200))
            ring = radius * (1 + rng.uniform(-0.2, 0.2, POINTS))
            x = np.clip(rng.uniform(0, WIDTH) + ring * np.cos(angles), 0, WIDTH)
            y = np.clip(rng.uniform(0, HEIGHT) + ring * np.sin(angles), 0, HEIGHT)
            crowd = i % 100 == 0
            yield json.dumps(
                {
                    "segmentation": code
                    if crowd
                    else [np.stack([x, y], 1).ravel().round(2).tolist()],
                    "area": round(3 * radius**2, 4),
                    "iscrowd": int(crowd),
                    "image_id": int(rng.integers(images)),
                    "bbox": [float(x.min()), float(y.min()), radius, radius],
                    "category_id": i % 80 + 1,
                    "id": i,
                }
            )

    _write(path, _images(images), rows())


def read(reader: str, folder: pathlib.Path) -> int:
    """Opens a file as training or evaluation would; what is imported is the baseline."""
    from oneformer_jax.eval.metrics.instance_json import InstanceAnnotations
    from oneformer_jax.input_pipeline.coco_format import CocoFolderSource
    from oneformer_jax.input_pipeline.coco_instances import CocoInstanceSource
    from oneformer_jax.types import Metadata

    if reader == "panoptic":
        return len(CocoFolderSource(folder, folder, folder / "panoptic.json"))
    if reader == "instances":
        return len(CocoInstanceSource(folder, folder / "instances.json"))
    if reader == "truth":
        ids = tuple(range(1, 134))
        names = tuple(f"class {i}" for i in ids)
        metadata = Metadata("bench", names, (True,) * 133, ((0, 0, 0),) * 133, ids)
        return InstanceAnnotations(folder / "instances.json", metadata) is not None
    return 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of COCO's size")
    parser.add_argument("--keep", help="folder in which the files are made once, and kept")
    parser.add_argument("--read", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.read:
        read(options.read, pathlib.Path(options.keep))
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(used.ru_utime + used.ru_stime, peak_bytes() / 2**20)
        return
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in (("panoptic", make_panoptic), ("instances", make_instances)):
            path = folder / f"{name}.json"
            if not path.is_file():
                make(path, options.scale)
            print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
        print(f"{'':<12}{'processor s':>12}{'peak MiB':>10}")
        for reader in READERS:
            command = [sys.executable, "-m", "tests.bench.json", f"--read={reader}"]
            result = subprocess.run(
                [*command, f"--keep={folder}"], check=True, capture_output=True, text=True
            )
            seconds, peak = map(float, result.stdout.split()[-2:])
            print(f"{reader:<12}{seconds:>12.1f}{peak:>10.0f}")


if __name__ == "__main__":
    main()
