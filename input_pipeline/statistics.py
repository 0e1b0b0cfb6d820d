"""Counts a dataset's annotations: segments, slots needed, crowd and void."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from oneformer_jax.files import first_few
from oneformer_jax.input_pipeline import targets
from oneformer_jax.input_pipeline.annotations.faults import Fault, FaultsError, summary, write
from oneformer_jax.input_pipeline.datasets import TASKS, DatasetInfo
from oneformer_jax.input_pipeline.loader import Source
from oneformer_jax.input_pipeline.records import RecordError, evenly_spread
from oneformer_jax.progress import logged

_SHOWN = 12  # classes that a report lists
_THREADS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Counts over N images before augmentation, which adds no segment.

    Attributes:
      total: number of images in the source, N of which were read.
      sizes: int [N, 2], height and width.
      slots: task -> int [N], target slots that the image needs.
      crowd, void: int [N], pixels of crowd segments, and of no segment.
      class_images: int [K], images with a non-crowd segment of the class.
      class_segments: int [K], such segments.
      broken: position in the source -> fault of a record that could not be read.
      faults: these, and those of the whole annotation file.
      remarks: oddities of the file and of the images read, which are no faults.
      notes: remarks on the whole dataset, a sentence each.
    """

    total: int
    sizes: np.ndarray
    slots: dict[str, np.ndarray]
    crowd: np.ndarray
    void: np.ndarray
    class_images: np.ndarray
    class_segments: np.ndarray
    broken: dict[int, Fault]
    faults: list[Fault]
    remarks: list[Fault]
    notes: tuple[str, ...]

    def write_faults(self, path: str) -> None:
        """Writes all faults and remarks: see `annotations.faults.write`."""
        write(path, self.faults, self.remarks)


@contextlib.contextmanager
def listing_faults(folder: str) -> Iterator[str]:
    """Makes the folder, yields the path of its faults.txt, and writes a FaultsError there."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "faults.txt")
    try:
        yield path
    except FaultsError as error:
        write(path, error.faults)
        raise ValueError(f"{error}\nAll faults are listed in {path}") from None


def collect(source: Source, info: DatasetInfo, limit: int = 2000) -> Statistics:
    """Counts at most `limit` images (0: all), evenly spread; FaultsError if none can be read."""
    total = len(source)
    indices = evenly_spread(total, limit or total)
    examine = getattr(source, "examine", None)
    read = getattr(source, "compact", source.__getitem__)

    def count(index: int) -> Fault | tuple[tuple, list[Fault]]:
        try:
            record, remarks = examine(index) if examine else (read(index), [])
        except RecordError as error:
            return Fault(error.kind, str(error))
        return _count(record, info), remarks

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(logged(pool.map(count, indices), len(indices), "images read"))
    broken = {i: part for i, part in zip(indices, found, strict=True) if isinstance(part, Fault)}
    read_parts = [part for part in found if not isinstance(part, Fault)]
    faults = [*getattr(source, "faults", ()), *broken.values()]
    if not read_parts:
        first = next(iter(broken.values())).message
        raise FaultsError(f"none of {len(indices)} images can be read, the first: {first}", faults)
    rows = [row for row, _ in read_parts]
    remarks = [*getattr(source, "remarks", ()), *(r for _, some in read_parts for r in some)]
    sizes, slots, crowd, void, classes = (np.array(column) for column in zip(*rows, strict=True))
    return Statistics(
        total=total,
        sizes=sizes,
        slots={task: slots[:, i] for i, task in enumerate(TASKS)},
        crowd=crowd,
        void=void,
        class_images=(classes > 0).sum(0),
        class_segments=classes.sum(0),
        broken=broken,
        faults=faults,
        remarks=remarks,
        notes=tuple(getattr(source, "notes", ())),
    )


def remarks(source: Source, info: DatasetInfo, limit: int = 1000) -> list[str]:
    """Compares the annotations with the class list; returns a sentence for each difference.

    Looks at the annotations alone, of at most `limit` records, spread evenly. A source without
    `classes_of` gives no sentence.
    """
    classes_of = getattr(source, "classes_of", None)
    if classes_of is None:
        return []
    indices = evenly_spread(len(source), limit)

    def look(index: int):
        try:
            return classes_of(index)
        except RecordError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(logged(pool.map(look, indices), len(indices), "annotations"))
    broken = [item for item in found if isinstance(item, str)]
    seen = np.unique(np.concatenate([[], *(item for item in found if not isinstance(item, str))]))
    looked = f"the {len(found):,} annotations looked at" + (
        f" (of {len(source):,})" if len(found) < len(source) else ""
    )
    lines = []
    unseen = np.setdiff1d(np.arange(info.num_classes), seen)
    if len(unseen) and len(broken) < len(found):
        names = first_few((info.class_names[k].strip() for k in unseen), _SHOWN)
        lines.append(
            f"{len(unseen):,} of {info.num_classes:,} classes occur in none of {looked}: {names}. "
            "A model cannot learn them"
        )
    if (seen < 0).any():
        lines.append(f"{looked} have categories that the list of classes lacks")
    if broken:
        lines.append(
            f"{len(broken):,} of {looked} are broken; --mode=inspect lists them. The first: "
            f"{broken[0]}"
        )
    return lines


def _count(record, info: DatasetInfo):
    """Counts one record: size, slots by task, crowd and void pixels, segments by class."""
    panoptic, segments = record["panoptic"], record["segments"]
    crowd = [s["id"] for s in segments if s["iscrowd"]]
    classes = np.zeros(info.num_classes, int)
    slots = []
    for task in range(len(TASKS)):
        target = targets.make_targets(panoptic, segments, task, targets.MAX_SLOTS, info.is_thing)
        slots.append(int(target.valid.sum()) + target.dropped)
        if task == targets.PANOPTIC:
            np.add.at(classes, target.classes[target.valid], 1)
    return (
        panoptic.shape,
        slots,
        int(np.isin(panoptic, crowd).sum()) if crowd else 0,
        int(np.count_nonzero(panoptic == 0)),
        classes,
    )


def report(statistics: Statistics, info: DatasetInfo, num_slots: int, num_texts: int) -> str:
    """Writes the statistics as text, with advice where the settings do not fit the data."""
    found = statistics
    count, pixels = len(found.sizes), found.sizes.prod(1).sum()
    void, crowd = (f"{part.sum() / pixels:.1%}" for part in (found.void, found.crowd))
    sampled = "" if count + len(found.broken) == found.total else f", {count} of them read"
    edges = [f"{v.min()} to {v.max()}" for v in (found.sizes.min(1), found.sizes.max(1))]
    seen = np.flatnonzero(found.class_images)
    lines = [
        f"{found.total} images{sampled}; short side {edges[0]}, long side {edges[1]} pixels",
        f"{info.num_classes} classes ({sum(info.is_thing)} things), {len(seen)} of them seen",
        f"void {void} of the pixels; crowd {crowd}, in {np.count_nonzero(found.crowd)} images",
        "",
        f"{'slots needed per image':<24}{'mean':>8}{'median':>8}{'95 %':>8}{'most':>8}"
        f"{f'above {num_slots}':>14}",
    ]
    for task, slots in found.slots.items():
        above = np.count_nonzero(slots > num_slots)
        lines.append(
            f"  {task:<22}{slots.mean():>8.1f}{np.median(slots):>8.0f}"
            f"{np.percentile(slots, 95):>8.0f}{slots.max():>8}{above:>7} images"
        )
    most = max(int(slots.max()) for slots in found.slots.values())
    if most > num_slots:
        enough = min(most, targets.MAX_SLOTS)
        lines.append(
            f"data.num_slots is {num_slots}: fuller images keep their largest segments; "
            f"--config.data.num_slots={enough} would keep {'all' if enough == most else 'more'}"
        )
    else:
        lines.append(f"data.num_slots is {num_slots}: enough for every image")
    if most > num_texts:
        lines.append(
            f"an image needs {most} texts, but model.num_queries - model.num_context leaves "
            f"{num_texts}: raise model.num_queries"
        )
    order = seen[np.argsort(-found.class_segments[seen], kind="stable")]
    frequent = first_few(
        (
            f"{info.class_names[k].strip()} {found.class_segments[k]} in {found.class_images[k]}"
            for k in order
        ),
        _SHOWN,
    )
    lines += ["", f"segments by class (images): {frequent}"]
    unseen = [
        n for n, images in zip(info.class_names, found.class_images, strict=True) if not images
    ]
    if unseen:
        lines.append(f"never seen: {first_few((name.strip() for name in unseen), _SHOWN)}")
    lines += ["", *found.notes] if found.notes else []
    if found.remarks:
        lines += ["", f"odd, but read ({len(found.remarks):,}):"]
        lines += [f"  {line}" for line in summary(found.remarks)]
    if found.faults:
        lines += [
            "",
            f"faults ({len(found.faults):,}), which end a training without data.skip_broken=True:",
        ]
        lines += [f"  {line}" for line in summary(found.faults)]
    return "\n".join(lines)
