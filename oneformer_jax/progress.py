"""Logs how far something with many images is, and how long the rest takes; a leaf, as `files`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from absl import logging

T = TypeVar("T")


def progress_log(
    total: int | None, what: str = "images", say: Callable[[str], None] | None = None
) -> Callable[[int], None]:
    """Makes a function of the number done, which logs it with rate and remaining time.

    The first line comes after 10 s, later ones every 30 s; none at the end.

    Args:
      total: how many there are; None if that is not known.
      what: their name.
      say: receives the lines; None is the log.
    """
    start = time.monotonic()
    due = start + 10.0

    def log(done: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due or done == total or not done:
            return
        due = now + 30.0
        rate = done / (now - start)
        if total is None or done > total:  # an estimate that was too low
            line = f"{done:,} {what}, {rate:.1f} a second"
        else:
            left = duration((total - done) / rate)
            line = f"{done:,} of {total:,} {what}, {rate:.1f} a second, {left} left"
        if say is None:
            logging.info("%s", line)
        else:
            say(line)

    return log


def logged(items: Iterable[T], total: int, what: str = "images") -> Iterator[T]:
    """Gives the items of a loop, and logs how far it is; see `progress_log`."""
    log = progress_log(total, what)
    for done, item in enumerate(items):
        log(done)
        yield item


def duration(seconds: float) -> str:
    """Formats a time: "45 s", "3 min 5 s", "2 h 3 min" or "2 d 3 h"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
