"""Faults of a dataset: collected, counted by kind, and reported together."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from oneformer_jax.files import first_few, write_atomically

_SHOWN = 5  # of each kind, in a summary


class Fault(NamedTuple):
    """One fault of the data.

    Attributes:
      kind: a phrase that faults of one cause share, such as "segment id that is listed twice".
      message: one line that names the file, the annotation, the value and what to do.
    """

    kind: str
    message: str


class FaultsError(ValueError):
    """A file with faults; the message has the first few, `faults` has all."""

    def __init__(self, message: str, faults: Sequence[Fault]):
        super().__init__(message)
        self.faults = tuple(faults)


def error(subject: str, faults: Sequence[Fault], way_out: str) -> FaultsError:
    """Makes one error of all faults of a file.

    Args:
      subject: beginning of the message, names the file.
      faults: at least one.
      way_out: end of the message, says what to do.
    """
    if len(faults) == 1:
        return FaultsError(f"{faults[0].message}.\n{way_out}", faults)
    shown = first_few((f"  {fault.message}" for fault in faults), _SHOWN, "\n")
    return FaultsError(f"{subject} has {len(faults):,} faults:\n{shown}\n{way_out}", faults)


def first_message(faults: Sequence[Fault]) -> str:
    """Returns the message of the first of an image's faults, and how many more there are."""
    more = f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else ""
    return faults[0].message + more


def check_annotations(source: Any, skip_broken: bool) -> None:
    """Raises FaultsError for the `faults` of a source, or logs them; also logs its remarks.

    Args:
      source: may have `faults`, `notes`, `remarks` and `sample_remarks()`.
      skip_broken: True if the source leaves out annotations with faults.
    """
    found = getattr(source, "faults", [])
    if found and not skip_broken:
        raise error(
            "the annotation file",
            found,
            "Correct the annotations (--mode=inspect lists all faults), or set "
            "data.skip_broken=True to leave them out.",
        )
    lines = [f"left out: {line}" for line in summary(found, shown=3)]
    lines += getattr(source, "notes", ())
    lines += summary(getattr(source, "remarks", ()), shown=3)
    if hasattr(source, "sample_remarks"):
        sampled = summary(source.sample_remarks(), shown=3)
        lines += [f"in a sample of the images: {line}" for line in sampled]
    for line in lines:
        logging.warning("%s", line)


def by_kind(faults: Iterable[Fault]) -> dict[str, list[str]]:
    """Groups the messages by kind, the most frequent kind first."""
    groups = collections.defaultdict(list)
    for fault in faults:
        groups[fault.kind].append(fault.message)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def summary(faults: Iterable[Fault], shown: int = _SHOWN) -> list[str]:
    """Writes the count of each kind and its first few messages, as lines."""
    lines = []
    for kind, messages in by_kind(faults).items():
        lines.append(f"{len(messages):,} x {kind}")
        lines += [f"  {message}" for message in messages[:shown]]
        if len(messages) > shown:
            lines.append(f"  and {len(messages) - shown:,} more")
    return lines


def write(
    path: str | os.PathLike[str], faults: Sequence[Fault], remarks: Sequence[Fault] = ()
) -> None:
    """Writes a text file of all faults and remarks: the counts, then each kind's messages."""
    lines = []
    for title, found in (("faults", faults), ("odd, but read", remarks)):
        groups = by_kind(found)
        lines.append(f"{title}: {len(found):,}")
        lines += [f"{len(messages):>9,} x {kind}" for kind, messages in groups.items()]
        for kind, messages in groups.items():
            lines += ["", f"{kind}:", *(f"  {message}" for message in messages)]
        lines.append("")
    write_atomically(path, "\n".join(lines))
