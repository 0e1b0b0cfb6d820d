"""What a user sees while many images are worked on."""

from unittest import mock

import pytest
from absl import logging

from oneformer_jax.eval import progress


def lines(monkeypatch, total, *moments):
    """The lines for pairs (seconds since the start, number done)."""
    seconds = iter([100.0, *(100.0 + moment for moment, _ in moments)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    log = progress.progress_log(total)
    with mock.patch.object(logging, "info") as said:
        for _, done in moments:
            log(done)
    return [call.args[0] % call.args[1:] for call in said.call_args_list]


def test_rate_and_remaining_time_are_logged_now_and_then(monkeypatch):
    found = lines(monkeypatch, 100, (5, 1), (20, 10), (30, 15), (55, 50), (99, 100))
    assert found == [
        "10 of 100 images, 0.5 a second, 3 min 0 s left",
        "50 of 100 images, 0.9 a second, 55 s left",
    ]


def test_without_a_total_the_number_is_logged(monkeypatch):
    assert lines(monkeypatch, None, (20, 0), (21, 42)) == ["42 images, 2.0 a second"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7380, "2 h 3 min")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
