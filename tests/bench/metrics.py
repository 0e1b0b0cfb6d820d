"""Benchmark: PQ and mIoU beside plain ways to compute them; memory of the post-processing.

python -m tests.bench.metrics              # 100 images of 640 x 480
python -m tests.bench.metrics --images=20 --height=1024 --width=2048
python -m tests.bench.metrics --memory     # of the compiled programs; runs nothing
"""

import argparse
import functools
import platform
import time
import types
from collections.abc import Callable, Iterable

import cv2
import jax
import numpy as np

from oneformer_jax.eval import postprocess
from oneformer_jax.eval.metrics.iou import MeanIoU
from oneformer_jax.eval.metrics.pq import PanopticQuality
from oneformer_jax.types import TASKS

CLASSES = 133
THINGS = 80


def smooth_labels(rng, height: int, width: int, count: int) -> np.ndarray:
    """int32 [height, width] of 0..count-1: regions with curved outlines."""
    coarse = rng.normal(size=(count, 6, 8)).astype(np.float32)
    fields = [cv2.resize(f, (width, height), interpolation=cv2.INTER_CUBIC) for f in coarse]
    return np.argmax(fields, axis=0).astype(np.int32)


def make_images(count: int, height: int, width: int, seed: int = 0):
    """(panoptic prediction, semantic prediction, record) of images with about 20 segments each.

    As in COCO, ids are colours, some pixels are void and some segments crowds. The prediction is
    the truth, displaced by some pixels, with some classes and some regions wrong.
    """
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        labels = smooth_labels(rng, height, width, 26)
        ids = np.concatenate([[0], rng.choice(256**3 - 1, 25, replace=False) + 1])
        classes = rng.integers(0, CLASSES, 26)
        truth = ids[labels].astype(np.int32)
        segments = [
            dict(
                id=int(ids[n]),
                category=int(classes[n]),
                iscrowd=bool(classes[n] < THINGS and rng.random() < 0.05),
                area=int((labels == n).sum()),
            )
            for n in np.unique(labels)
            if n
        ]
        guess = np.roll(labels, rng.integers(-9, 10, 2), axis=(0, 1))
        other = smooth_labels(rng, height, width, 12)
        guess = np.where(other < 3, 26 + other, guess)
        found = np.where(rng.random(29) < 0.9, np.append(classes, [1, 90, 100]), 5)
        info = [dict(id=int(n), category_id=int(found[n])) for n in np.unique(guess) if n]
        images.append(
            (
                types.SimpleNamespace(segments=guess, segments_info=info),
                types.SimpleNamespace(class_map=found[guess].astype(np.int32)),
                dict(panoptic=truth, segments=segments, image_id=str(number)),
            )
        )
    return images


def pq_by_definition(images, cached: bool = False) -> np.ndarray:
    """IoU sum, TP, FP and FN, [4, K]: a Python loop over pairs of segments, from the definition.

    `cached` makes every mask once and compares segments of equal class only.
    """
    table = np.zeros((4, CLASSES))
    for prediction, _, record in images:
        void = record["panoptic"] == 0
        make = functools.cache if cached else lambda function: function
        true = make(lambda i, ids=record["panoptic"]: ids == i)
        guessed = make(lambda i, ids=prediction.segments: ids == i)
        matched = set()
        for t in record["segments"]:
            hit = False
            for p in prediction.segments_info:
                same = t["category"] == p["category_id"] and not t["iscrowd"]
                if cached and not same:
                    continue
                a, b = true(t["id"]), guessed(p["id"])
                common = np.count_nonzero(a & b)
                union = t["area"] + np.count_nonzero(b) - common - np.count_nonzero(b & void)
                if same and common and common / union > 0.5:
                    table[:2, t["category"]] += common / union, 1
                    matched.add(p["id"])
                    hit = True
            if not hit and not t["iscrowd"]:
                table[3, t["category"]] += 1
        crowds = {s["category"]: s["id"] for s in record["segments"] if s["iscrowd"]}
        for p in prediction.segments_info:
            if p["id"] in matched:
                continue
            b = guessed(p["id"])
            free = np.count_nonzero(b & void)
            if p["category_id"] in crowds:
                free += np.count_nonzero(b & true(crowds[p["category_id"]]))
            if free / np.count_nonzero(b) <= 0.5:
                table[2, p["category_id"]] += 1
    return table


def pq_by_definition_cached(images) -> np.ndarray:
    return pq_by_definition(images, cached=True)


def pq_by_unique_pairs(images) -> np.ndarray:
    """As `pq_by_definition`, the way of panopticapi: one sort of all pixels, then Python dicts."""
    table = np.zeros((4, CLASSES))
    for prediction, _, record in images:
        codes = record["panoptic"].astype(np.uint64) << np.uint64(24)
        codes |= prediction.segments.astype(np.uint64)
        pairs = {}
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
            pairs[int(code) >> 24, int(code) & 0xFFFFFF] = int(count)
        areas = {}
        for (_, p), count in pairs.items():
            areas[p] = areas.get(p, 0) + count
        true = {s["id"]: s for s in record["segments"]}
        found = {s["id"]: s["category_id"] for s in prediction.segments_info}
        hits, matched = set(), set()
        for (t, p), common in pairs.items():
            if t not in true or p not in found or true[t]["iscrowd"]:
                continue
            if true[t]["category"] != found[p]:
                continue
            iou = common / (true[t]["area"] + areas[p] - common - pairs.get((0, p), 0))
            if iou > 0.5:
                table[:2, found[p]] += iou, 1
                hits.add(t)
                matched.add(p)
        crowds = {s["category"]: s["id"] for s in record["segments"] if s["iscrowd"]}
        for t, segment in true.items():
            if t not in hits and not segment["iscrowd"]:
                table[3, segment["category"]] += 1
        for p, c in found.items():
            if p not in matched:
                free = pairs.get((0, p), 0) + pairs.get((crowds.get(c), p), 0)
                if free / areas[p] <= 0.5:
                    table[2, c] += 1
    return table


def pq_ours(images) -> np.ndarray:
    metric = PanopticQuality([c < THINGS for c in range(CLASSES)])
    for prediction, _, record in images:
        metric.update(prediction, record)
    return np.array([metric.iou_sum, metric.tp, metric.fp, metric.fn])


def confusion_by_classes(images) -> np.ndarray:
    """Hits, true and predicted pixels int [3, K]: a mask and a histogram per class of the truth."""
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for _, prediction, record in images:
        truth = np.full(record["panoptic"].shape, -1)
        for s in record["segments"]:
            truth[record["panoptic"] == s["id"]] = s["category"]
        for c in np.unique(truth[truth >= 0]):
            confusion[c] += np.bincount(prediction.class_map[truth == c], minlength=CLASSES)
    return np.stack([np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)])


def confusion_ours(images) -> np.ndarray:
    metric = MeanIoU(CLASSES)
    for _, prediction, record in images:
        metric.update(prediction, record)
    return np.stack(metric.totals())


def seconds(function: Callable, images: Iterable, repeats: int) -> tuple[float, np.ndarray]:
    """Best of `repeats` wall times, and the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(images)
        times.append(time.perf_counter() - start)
    return min(times), result


def print_memory(queries: int = 250) -> None:
    """MB of temporary memory of the post-processing of one image, by task and size."""
    sizes = (  # classes, padded input, canvas
        ("Cityscapes", 19, (1024, 2048), (1024, 2048)),
        ("Mapillary Vistas", 65, (2048, 2048), (3072, 4096)),
    )
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {queries} queries; MB")
    for name, classes, padded, canvas in sizes:
        found = {}
        spec = jax.ShapeDtypeStruct
        for task in TASKS:
            program = postprocess.run_heads.lower(
                spec((1, queries, classes + 1), np.float32),
                spec((1, queries, padded[0] // 4, padded[1] // 4), np.float32),
                spec((1, 2), np.int32),
                spec((1, 2), np.int32),
                spec((), np.float32),
                task=task,
                padded_size=padded,
                canvas=canvas,
                topk=queries,
                mesh=None,
            ).compile()
            found[task] = program.memory_analysis().temp_size_in_bytes
        found["[Q, H, W] float32"] = 4 * queries * canvas[0] * canvas[1]
        shown = ", ".join(f"{what} {size / 1e6:.0f}" for what, size in found.items())
        print(f"{name}, {canvas[1]} x {canvas[0]}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.memory:
        return print_memory()
    images = make_images(options.images, options.height, options.width)
    segments = np.mean([len(record["segments"]) for *_, record in images])
    print(
        f"{options.images} images of {options.width} x {options.height}, {segments:.1f} true "
        f"segments each; numpy {np.__version__}, {platform.machine()}, best of {options.repeats}"
    )
    for title, ways in (
        ("PQ", (pq_by_definition, pq_by_definition_cached, pq_by_unique_pairs, pq_ours)),
        ("mIoU", (confusion_by_classes, confusion_ours)),
    ):
        found = {way.__name__: seconds(way, images, options.repeats) for way in ways}
        ours, expected = found[ways[-1].__name__]
        for name, (time_taken, result) in found.items():
            np.testing.assert_allclose(result, expected, rtol=1e-9)
            print(
                f"{title:<6}{name:<24}{1e3 * time_taken / len(images):>9.2f} ms/image"
                f"{time_taken / ours:>8.1f} x ours"
            )


if __name__ == "__main__":
    main()
