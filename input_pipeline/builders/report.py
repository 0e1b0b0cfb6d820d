"""Reports on the preparation of a split: counts, missing files, faults."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow_datasets as tfds

from oneformer_jax.input_pipeline.annotations import faults
from oneformer_jax.input_pipeline.annotations.faults import Fault

REPORT = "prepare_report.json"
_SHOWN_MESSAGES = 10


@dataclasses.dataclass
class SplitReport:
    """Counts and faults of one prepared split.

    Attributes:
      expected: number of records that the dataset has.
      listed: number of records that the download names.
      written: number of records written.
      with_things: number of records that the training filter (`data.require_things`) keeps.
      files, bytes: number of record files and their size.
      complete: True if the split can be used.
      missing: a line for every record with a missing file.
      broken: every record that cannot be read, and every annotation that was left out.
      notes: other remarks.
    """

    expected: int
    listed: int
    written: int = 0
    with_things: int = 0
    files: int = 0
    bytes: int = 0
    complete: bool = False
    missing: list[str] = dataclasses.field(default_factory=list)
    broken: list[Fault] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def left_out(self) -> list[str]:
        """Returns a line for every reason why records are missing."""
        found = [*self.missing, *(fault.message for fault in self.broken)]
        if self.listed != self.expected:
            found.insert(
                0, f"the download has {self.listed:,} records, the dataset {self.expected:,}"
            )
        return found

    def lines(self, split: str) -> list[str]:
        """Returns the report as text."""
        lines = [
            f"{split}: {self.written:,} of {self.expected:,} records in {self.files} files "
            f"({tfds.core.units.Size(self.bytes)}), {self.with_things:,} with things"
            + ("" if self.complete else "; NOT COMPLETE")
        ]
        lines += [f"  note: {note}" for note in self.notes]
        found = self.left_out()[: -len(self.broken) or None]
        lines += [f"  {line}" for line in found[:_SHOWN_MESSAGES]]
        if len(found) > _SHOWN_MESSAGES:
            lines.append(f"  and {len(found) - _SHOWN_MESSAGES:,} more, see {REPORT}")
        return lines + [f"  {line}" for line in faults.summary(self.broken)]

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON, with the number of broken records of each kind."""
        groups = faults.by_kind(self.broken)
        return {
            **dataclasses.asdict(self),
            "broken": [fault.message for fault in self.broken],
            "kinds": {kind: len(messages) for kind, messages in groups.items()},
        }
