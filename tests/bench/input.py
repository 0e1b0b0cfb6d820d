"""Benchmark of the input pipeline against the plain way, on the COCO recipe.

make bench-input                                      # images of its own, 640 x 480
make bench-input ARGS="--folder=DIR --workers=1,2,4"  # a COCO-panoptic folder (panoptic_train.json)

The plain way (tests/input_pipeline/plain.py) decodes and resizes with PIL, makes one binary mask
per segment and tokenises every text of every image; it makes the same samples, a test says so.
Samples/s per core are samples per second of processor time, so other programs disturb them little;
both ways take turns. The scaling over worker processes is in wall-clock time and needs idle cores.
"""

import argparse
import cProfile
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import pstats
import tempfile
import time
from collections.abc import Iterable

import cv2
import numpy as np
from absl import flags

from oneformer_jax.input_pipeline import loader, records, sources, targets, transforms
from tests.input_pipeline import plain

CROP = (1024, 1024)
NUM_SLOTS, NUM_TEXTS = 100, 134
BATCH = 8
# Functions of the pipeline whose time is shown, callees included; none calls another of them.
STAGES = {
    "decode image": ("decode_image",),
    "decode map": ("decode_dense", "decode_panoptic"),
    "resize image": ("resize_image",),
    "resize map": ("resize_ids",),
    "flip": ("random_flip",),
    "pad": ("pad",),
    "targets": ("make_targets",),
    "texts": ("text_ids",),
    "stack": ("stack",),
}


def write_folder(root: pathlib.Path, count: int) -> None:
    """A COCO-panoptic folder of `count` images of 640 x 480 with 12 segments each.

    Smooth noise at five scales, which compresses to about 90 kB, and segments with wavy borders.
    """
    height, width, segments = 480, 640, 12
    for folder in ("images", "panoptic"):
        (root / folder).mkdir(parents=True)
    names = coco_categories()
    content = {"images": [], "annotations": [], "categories": names}
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    for number in range(count):
        rng = np.random.default_rng(number)

        def noise(step, channels, rng=rng):
            grid = rng.normal(size=(height // step + 2, width // step + 2, channels))
            grid = grid.astype(np.float32)
            return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)

        amplitudes = {64: 30, 16: 18, 4: 10, 2: 8, 1: 3}
        image = 128 + sum(amplitude * noise(step, 3) for step, amplitude in amplitudes.items())
        image = np.clip(image, 0, 255).astype(np.uint8)
        centres = rng.random((segments, 2)) * (height, width)
        shift = 12 * noise(24, 2)
        distance = [
            (rows + shift[..., 0] - y) ** 2 + (columns + shift[..., 1] - x) ** 2 for y, x in centres
        ]
        ids = rng.choice(2**24 - 1, segments, replace=False).astype(np.int32) + 1
        panoptic = ids[np.argmin(distance, 0)]
        name = f"{number:012d}"
        jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
        (root / "images" / f"{name}.jpg").write_bytes(jpeg.tobytes())
        (root / "panoptic" / f"{name}.png").write_bytes(records.encode_panoptic(panoptic))
        content["images"].append({"id": number, "file_name": f"{name}.jpg"})
        content["annotations"].append(
            {
                "image_id": number,
                "file_name": f"{name}.png",
                "segments_info": [
                    {
                        "id": int(i),
                        "category_id": names[rng.integers(len(names))]["id"],
                        "area": int((panoptic == i).sum()),
                    }
                    for i in ids
                ],
            }
        )
    (root / "panoptic_train.json").write_text(json.dumps(content))


def coco_categories() -> list[dict]:
    """The "categories" of COCO panoptic."""
    info = sources.datasets.dataset_info("coco")
    return [
        {"id": i, "name": name, "isthing": int(thing)}
        for i, name, thing in zip(info.category_ids, info.class_names, info.is_thing, strict=True)
    ]


def open_both(root: pathlib.Path, data_dir: str) -> dict[str, sources.TfdsSource]:
    """The folder read as it is, and prepared as records."""
    options = {"root": root, "validation_json": "", "name": "bench"}
    return {
        kind: sources.open_source(
            "coco_folder",
            data_dir=data_dir,
            split="train",
            options={**options, "prepare": kind == "prepared"},
        )[0]
        for kind in ("folder", "prepared")
    }


def settings(**changes) -> loader.LoaderConfig:
    return loader.LoaderConfig(
        batch_size=BATCH,
        num_slots=NUM_SLOTS,
        num_texts=NUM_TEXTS,
        augment=transforms.AugmentConfig("lsj", crop_size=CROP),
        **{"num_workers": 0, "num_threads": 1, "prefetch": 1, **changes},
    )


# ------------------------------------------------------------------------ one core


def make_plain_samples(folder: plain.PlainFolder, numbers: Iterable[int]) -> None:
    """Samples of these numbers, in batches, the plain way: masks are not stacked over images."""
    samples = []
    for number in numbers:
        rng = np.random.default_rng((0, number))
        index = number % len(folder.annotations)
        samples.append(plain.lsj_sample(folder, index, rng, CROP, NUM_TEXTS))
        if len(samples) == BATCH:
            for key in ("image", "tokens"):
                np.stack([sample[key] for sample in samples])
            samples = []


def compare(folder: plain.PlainFolder, opened: dict, rounds: int) -> None:
    ways = {"plain": functools.partial(make_plain_samples, folder)}
    for kind, source in opened.items():
        ways[kind] = functools.partial(make_samples, source)
    times = {name: [] for name in ways}
    for round_ in range(1 + rounds):
        numbers = range(round_ * BATCH, (round_ + 1) * BATCH)  # of the same random draws
        for name, make in ways.items():
            start = time.process_time()
            make(numbers)
            if round_:  # the first opens files and fills tables
                times[name].append(time.process_time() - start)
    print(f"\n{'one core':<12}{'ms/sample':>10}{'samples/s':>11}{'ratio':>7}")
    for name, values in times.items():
        seconds = np.mean(values) / BATCH
        ratio = np.mean(times["plain"]) / np.mean(values)
        print(f"{name:<12}{1e3 * seconds:>10.2f}{1 / seconds:>11.0f}{ratio:>7.1f}")


def make_samples(source, numbers: Iterable[int]) -> None:
    """Samples of these numbers, in batches: what a loader does, step by step in this thread."""
    config = settings()
    samples = []
    for number in numbers:
        rng = np.random.default_rng((0, number))
        record = transforms.augment(rng, source.compact(number % len(source)), config.augment)
        task = targets.sample_task(rng, config.semantic_prob, config.instance_prob)
        target = targets.make_targets(
            record["panoptic"], record["segments"], task, NUM_SLOTS, source.info.is_thing
        )
        ids = targets.text_ids(
            target.classes, target.valid, task, NUM_TEXTS, source.info.num_classes
        )
        samples.append((record["image"], target.segment_map, ids))
        if len(samples) == BATCH:
            for values in zip(*samples, strict=True):
                np.stack(values)
            samples = []


def show_stages(opened: dict, count: int) -> None:
    print("\nshare of each stage, % of the time of a sample")
    shares = {}
    for kind, source in opened.items():
        make_samples(source, range(BATCH))
        profile = cProfile.Profile()
        profile.runcall(make_samples, source, range(count))
        stats = pstats.Stats(profile)
        cumulative: dict[str, float] = {}
        for (_, _, name), (_, _, _, seconds, _) in stats.stats.items():
            cumulative[name] = cumulative.get(name, 0.0) + seconds
        total = cumulative["make_samples"]
        shares[kind] = {
            stage: 100 * sum(cumulative.get(name, 0.0) for name in names) / total
            for stage, names in STAGES.items()
        }
        shares[kind]["read files, rest"] = 100 - sum(shares[kind].values())
    print(f"{'':<18}" + "".join(f"{kind:>10}" for kind in shares))
    for stage in next(iter(shares.values())):
        print(f"{stage:<18}" + "".join(f"{share[stage]:>10.1f}" for share in shares.values()))


# ------------------------------------------------------------------------ worker processes


def memory_mib(pid: int) -> tuple[float, float]:
    """Proportional and private memory of a process (Linux)."""
    found = {"Pss": 0.0, "Private_Clean": 0.0, "Private_Dirty": 0.0}
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in found:
            found[key] = int(rest.split()[0]) / 1024
    return found["Pss"], found["Private_Clean"] + found["Private_Dirty"]


def processor_seconds(pids: Iterable[int]) -> float:
    """Processor time that the processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def scale(source, kind: str, counts: list[int], steps: int) -> None:
    """Wall-clock rate with so many "workers" (processes) or "threads" of this process."""
    cores = len(os.sched_getaffinity(0))
    print(
        f"\n{kind}, wall clock, load {os.getloadavg()[0]:.1f} before\n"
        f"{'':>48}{'processor ms/sample':>18}{'MiB per worker':>21}\n"
        f"{'':>7}{'1st batch':>14}{'samples/s':>13}{'of linear':>13}{'workers':>12}{'main':>8}"
        f"{'shared split':>13}{'private':>8}"
    )
    base = 0.0
    for count in counts:
        if count > cores:
            print(f"{count:>7}  not measured: this machine has {cores} cores")
            continue
        start = time.perf_counter()
        changes = {f"num_{kind}": count, "prefetch": max(2, count)}
        batches = loader.train_loader(source, settings(**changes), source.info)
        next(batches)
        first = time.perf_counter() - start
        for _ in range(2 * count):  # what was ready before the measurement
            next(batches)
        pids = [process.pid for process in multiprocessing.active_children()]
        start = np.array([time.perf_counter(), processor_seconds(pids), time.process_time()])
        for _ in range(steps * count):
            next(batches)
        end = np.array([time.perf_counter(), processor_seconds(pids), time.process_time()])
        seconds, worker, own = (end - start) / (steps * count * BATCH)
        memory = "".join(
            f"{mib:>10.0f}" for mib in np.mean([memory_mib(pid) for pid in pids] or [()], 0)
        )
        batches.close()
        base = base or 1 / (seconds * count)
        print(
            f"{count:>7}{first:>12.1f} s{1 / seconds:>13.0f}{1 / (seconds * count * base):>13.2f}"
            f"{1e3 * worker:>12.2f}{1e3 * own:>8.2f}{memory}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", help="a COCO-panoptic folder instead of images of its own")
    parser.add_argument("--images", type=int, default=64, help="number of own images")
    parser.add_argument("--rounds", type=int, default=16, help=f"batches of {BATCH} timed per way")
    parser.add_argument("--workers", default="1,2,4,8", help="numbers of them, or nothing")
    parser.add_argument("--steps", type=int, default=20, help="batches timed per worker")
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain passes them on to its workers
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, OpenCV "
        f"{cv2.__version__}; large-scale jitter to {CROP[0]} x {CROP[1]}, {NUM_TEXTS} texts"
    )
    with tempfile.TemporaryDirectory() as data_dir:
        root = pathlib.Path(options.folder or pathlib.Path(data_dir, "own"))
        if not options.folder:
            write_folder(root, options.images)
        opened = open_both(root, data_dir)
        folder = plain.PlainFolder(root / "images", root / "panoptic", root / "panoptic_train.json")
        print(f"{len(folder.annotations)} images of {root if options.folder else '640 x 480'}")
        compare(folder, opened, options.rounds)
        show_stages(opened, 8 * BATCH)
        if options.workers:
            counts = [int(number) for number in options.workers.split(",")]
            print(f"\nprepared records, batches of {BATCH}, {len(os.sched_getaffinity(0))} cores")
            for kind in ("workers", "threads"):
                scale(opened["prepared"], kind, counts, options.steps)


if __name__ == "__main__":
    main()
