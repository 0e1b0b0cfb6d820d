"""Identities of segments that follow them from frame to frame of a video.

Per class, the segments of a frame are assigned to those of the past frames so that the sum of their
IoU is largest. A past segment is compared where it was and where its motion would have brought it,
so two objects that pass each other keep their identities.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage, optimize

from oneformer_jax.eval.segmentation import bounding_box

# Identities are pixels of a panoptic PNG: R + 256 G + 65536 B.
_IDENTITIES = 1 << 24
# How much less a match counts for each frame in which its segment was missing.
_FORGETTING = 0.05
# Two segments of a frame with at least this IoU are one object.
_REPEATED = 0.7
# Of the new motion in the average of all.
_NEWEST = 0.5
# If a segment grows or shrinks by more, its centre tells no motion: it was hidden, split or merged.
_SAME_SIZE = 1.5


class Patch(NamedTuple):
    """The smallest box around a mask's pixels: bool `mask` [h, w] at (`top`, `left`)."""

    top: int
    left: int
    mask: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray) -> Patch:
        """Cuts the box out of a mask, bool [H, W]; an empty mask gives an empty patch."""
        left, top, right, bottom = bounding_box(mask)
        # A copy, or the whole frame would be kept.
        return cls(top, left, mask[top:bottom, left:right].copy())

    def moved(self, down: int, right: int) -> Patch:
        """Returns the patch at another place, in pixels from here."""
        return Patch(self.top + down, self.left + right, self.mask)

    def overlap(self, other: Patch) -> int:
        """Counts the common pixels."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = min(self.top + len(self.mask), other.top + len(other.mask))
        right = min(self.left + self.mask.shape[1], other.left + other.mask.shape[1])
        if bottom <= top or right <= left:
            return 0
        parts = (
            patch.mask[top - patch.top : bottom - patch.top, left - patch.left : right - patch.left]
            for patch in (self, other)
        )
        return int(np.count_nonzero(np.logical_and(*parts)))


def patches(segments: np.ndarray, ids: Sequence[int]) -> list[Patch]:
    """Cuts the segments `ids` (small numbers from 1 on) out of a map int [H, W]."""
    boxes = ndimage.find_objects(segments, max_label=max(ids, default=0))
    empty = (slice(0, 0), slice(0, 0))
    places = [boxes[id_ - 1] or empty for id_ in ids]
    return [
        Patch(rows.start, columns.start, segments[rows, columns] == id_)
        for id_, (rows, columns) in zip(ids, places, strict=True)
    ]


def distinct(found: Sequence[Patch], labels: Sequence[int]) -> list[int]:
    """Lists the positions of the segments that do not repeat an earlier one of their class.

    A model may find an object twice; the two would exchange their identities at every frame.
    """
    kept: list[int] = []
    for i, patch in enumerate(found):
        if all(labels[i] != labels[k] or _iou(patch, found[k]) < _REPEATED for k in kept):
            kept.append(i)
    return kept


def _iou(first: Patch, second: Patch) -> float:
    common = first.overlap(second)
    both = np.count_nonzero(first.mask) + np.count_nonzero(second.mask) - common
    return common / max(1, int(both))


class Identity(NamedTuple):
    """One object of the video.

    Attributes:
      id: unique in the video, 1 to 16777215.
      number: counts the objects of the class from 0.
    """

    id: int
    number: int


@dataclasses.dataclass
class _Track:
    identity: Identity
    patch: Patch
    area: int
    center: np.ndarray  # float [2], (row, column)
    seen: int  # the last frame with it
    motion: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))  # pixels a frame

    def follow(self, patch: Patch, frame: int) -> None:
        area, center = _measure(patch)
        if area < _SAME_SIZE * self.area and self.area < _SAME_SIZE * area:
            newest = (center - self.center) / (frame - self.seen)
            self.motion += _NEWEST * (newest - self.motion)
        self.patch, self.area, self.center, self.seen = patch, area, center, frame


class Tracker:
    """Gives the segments of each frame their identities.

    It remembers segments of the last frames only, so a video may have any length.
    """

    def __init__(self, first: int = 1, *, min_iou: float = 0.2, memory: int = 8):
        """Starts without objects.

        Args:
          first: the lowest id; smaller ones are left to others. After 16777215 ids begin again.
          min_iou: a segment that overlaps less with a past one is another object.
          memory: a segment that is missing for this many frames is forgotten.
        """
        self._first, self._min_iou, self._memory = first, min_iou, memory
        self._frame = self._made = 0
        self._tracks: dict[int, list[_Track]] = {}
        self._numbers: collections.Counter[int] = collections.Counter()

    def update(self, found: Sequence[Patch], labels: Sequence[int]) -> list[Identity]:
        """Takes the segments of the next frame.

        Args:
          found: the segments.
          labels: class of each.

        Returns:
          The identity of each, which no other segment of the frame has.
        """
        self._frame += 1
        identities: dict[int, Identity] = {}
        for label in dict.fromkeys([*self._tracks, *labels]):
            tracks = [t for t in self._tracks.get(label, ()) if self._age(t) <= self._memory]
            mine = [i for i, other in enumerate(labels) if other == label]
            scores = self._scores(tracks, [found[i] for i in mine])
            for row, column in zip(
                *optimize.linear_sum_assignment(scores, maximize=True), strict=True
            ):
                if scores[row, column] > 0:
                    tracks[row].follow(found[mine[column]], self._frame)
                    identities[mine[column]] = tracks[row].identity
            for i in mine:
                if i not in identities:
                    identities[i] = self._new(label)
                    area_center = _measure(found[i])
                    tracks.append(_Track(identities[i], found[i], *area_center, self._frame))
            if tracks:
                self._tracks[label] = tracks
            else:
                self._tracks.pop(label, None)
        return [identities[i] for i in range(len(labels))]

    def _age(self, track: _Track) -> int:
        """Frames since the segment was seen: 1 if it was in the last one."""
        return self._frame - track.seen

    def _new(self, label: int) -> Identity:
        id_ = self._first + self._made % (_IDENTITIES - self._first)
        self._made += 1
        number = self._numbers[label]
        self._numbers[label] += 1
        return Identity(id_, number)

    def _scores(self, tracks: Sequence[_Track], found: Sequence[Patch]) -> np.ndarray:
        """IoU of past and new segments, less for those long missing; 0 is no match."""
        scores = np.zeros((len(tracks), len(found)))
        areas = [int(np.count_nonzero(patch.mask)) for patch in found]
        for row, track in enumerate(tracks):
            age = self._age(track)
            shifts = {(0, 0), tuple(np.rint(age * track.motion).astype(int).tolist())}
            places = [track.patch.moved(*shift) for shift in shifts]
            for column, (patch, area) in enumerate(zip(found, areas, strict=True)):
                if min(area, track.area) < self._min_iou * max(area, track.area):
                    continue
                common = max(place.overlap(patch) for place in places)
                iou = common / max(1, area + track.area - common)
                if iou >= self._min_iou:
                    scores[row, column] = iou * (1 - _FORGETTING) ** (age - 1)
        return scores


def _measure(patch: Patch) -> tuple[int, np.ndarray]:
    """Area and centre, (row, column)."""
    rows, columns = patch.mask.sum(1), patch.mask.sum(0)
    area = int(rows.sum())
    if not area:
        return 0, np.array([patch.top, patch.left], float)
    return area, np.array(
        [
            patch.top + rows @ np.arange(len(rows)) / area,
            patch.left + columns @ np.arange(len(columns)) / area,
        ]
    )
