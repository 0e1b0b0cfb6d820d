"""Training targets of one image: its task, its segments under that task, its texts.

They equal those of the official mappers (paper: arXiv 2211.06220, section 3). The ground truth is
one map of slots instead of a stack of masks, because the targets of an image never overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from oneformer_jax.input_pipeline.datasets import TASKS

MAX_SLOTS = 255  # the slot map is uint8 and 0 means "no segment"
PANOPTIC, INSTANCE, SEMANTIC = (TASKS.index(t) for t in ("panoptic", "instance", "semantic"))


class Targets(NamedTuple):
    """Targets of one image under one task.

    Attributes:
      segment_map: uint8 [H, W]; 0 = no segment, i + 1 = slot i.
      classes: int32 [M], contiguous class ids, 0 where invalid.
      valid: bool [M].
      dropped: number of segments left out, those beyond M.
    """

    segment_map: np.ndarray
    classes: np.ndarray
    valid: np.ndarray
    dropped: int


def sample_task(rng: np.random.Generator, semantic_prob: float, instance_prob: float) -> int:
    """Draws a task id: semantic below `semantic_prob`, then instance, else panoptic."""
    u = rng.random()
    if u < semantic_prob:
        return SEMANTIC
    return INSTANCE if u < semantic_prob + instance_prob else PANOPTIC


def make_targets(
    panoptic: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    task: int,
    num_slots: int,
    is_thing: Sequence[bool],
) -> Targets:
    """Derives the targets of an augmented image.

    Crowd segments, segments without a pixel left and ids that `segments` lacks are background.
    Semantic: one slot per class (things included) in order of first appearance; instance: one per
    thing segment; panoptic: one per segment. Of more than `num_slots`, the largest are kept.

    Args:
      panoptic: int32, uint16 or (fastest) uint8 [H, W] segment ids, 0 = void.
      segments: dicts with `id`, `category` (contiguous class id) and `iscrowd`.
      task: index into TASKS.
      num_slots: M, 1 to 255.
      is_thing: per class.
    """
    if not 1 <= num_slots <= MAX_SLOTS:
        raise ValueError(f"data.num_slots is {num_slots}; it must be between 1 and {MAX_SLOTS}")
    # Id 0 is void, whatever the annotation calls it.
    candidates = [s for s in segments if not s["iscrowd"] and s["id"] > 0]
    if task == INSTANCE:
        candidates = [s for s in candidates if is_thing[s["category"]]]
    numbers, counts, keys = _count_pixels(panoptic, [s["id"] for s in candidates])
    areas = counts[keys]

    # Group the segments with pixels into targets.
    groups: dict[int, list[int]] = {}
    for position, (segment, area) in enumerate(zip(candidates, areas, strict=True)):
        if area:
            key = segment["category"] if task == SEMANTIC else position
            groups.setdefault(key, []).append(position)
    members = list(groups.values())
    dropped = max(len(members) - num_slots, 0)
    if dropped:
        sizes = np.array([areas[m].sum() for m in members])
        kept = np.sort(np.argsort(-sizes, kind="stable")[:num_slots])
        members = [members[i] for i in kept]

    classes = np.zeros(num_slots, np.int32)
    valid = np.zeros(num_slots, bool)
    slots = np.zeros(len(counts), np.uint8)
    for slot, positions in enumerate(members):
        classes[slot] = candidates[positions[0]]["category"]
        valid[slot] = True
        slots[keys[positions]] = slot + 1
    segment_map = cv2.LUT(numbers, slots) if numbers.dtype == np.uint8 else slots.take(numbers)
    return Targets(segment_map, classes, valid, dropped)


def _count_pixels(
    panoptic: np.ndarray, ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a map of small numbers, the pixels of each number, and the number of each of `ids`.

    A uint8 map already is a map of 256 numbers, which OpenCV counts fast.
    """
    if panoptic.dtype == np.uint8:
        counts = cv2.calcHist([panoptic], [0], None, [256], [0, 256]).reshape(-1)
        return panoptic, counts, np.array(ids, np.intp)
    # One pass over the pixels maps id -> position in `ids` + 1. The table is one longer than the
    # largest id, so that clipping sends larger (unknown) and negative ids to 0.
    table = np.zeros(max(ids, default=0) + 2, np.uint16)
    keys = np.arange(1, len(ids) + 1)
    table[np.array(ids, np.intp)] = keys
    numbers = table.take(panoptic, mode="clip")
    return numbers, np.bincount(numbers.reshape(-1), minlength=len(ids) + 1), keys


def text_ids(
    classes: np.ndarray,
    valid: np.ndarray,
    task: int,
    num_texts: int,
    num_classes: int,
    is_thing: Sequence[bool] | None = None,
) -> np.ndarray:
    """Rows of the text table (`tokenizer.text_table`) for an image's text list.

    "a photo with a {class}" in order of class id, once per target of that class, cut to
    `num_texts`; the remaining entries are the padding text of the task.

    Texts with the type of a segment (paper, table 6) say "thing" if the task tells the segments of
    the class apart: under instance, and under panoptic for things.

    Args:
      classes: int32 [M] class ids of the targets.
      valid: bool [M].
      task: index into TASKS.
      num_texts: number of queries less the learned context embeddings.
      num_classes: K.
      is_thing: per class, if texts name the type; the table then has 2K + 3 rows.

    Returns:
      int32 [num_texts].
    """
    ids = np.full(num_texts, num_classes + task, np.int32)
    present = np.sort(classes[valid])[:num_texts]
    if is_thing is not None:
        distinct = np.asarray(is_thing)[present] & (task != SEMANTIC)
        present = present + np.where(distinct, num_classes + len(TASKS), 0)
    ids[: len(present)] = present
    return ids
