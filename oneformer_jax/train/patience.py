"""Early stopping: counts the evaluations since the best one.

Every checkpoint holds the scores of the evaluations before it, in its position, and gets its own
score after it: together they are the history, whatever happened between the starts of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from oneformer_jax.train import reading


class _History(msgspec.Struct):
    metric: str = ""
    scores: list[tuple[int, float | None]] = []


class Patience:
    """Tells when a run has had enough evaluations without a better score than its best.

    Args:
      most: `train.patience`, evaluations without a better score after which a run stops; 0 is off.
      metric: `eval.best_metric`; higher is better. With another one than before, counting begins
        anew.
      position: position of the checkpoint that the run goes on from.

    Raises:
      CheckpointError: the position holds something else.
    """

    def __init__(self, most: int, metric: str, position: Mapping[str, Any]):
        self._most, self._metric = most, metric
        what = f"the earlier evaluations in the checkpoint of step {position.get('step')}"
        found = reading.checked(position.get("evaluations", {}), _History, what)
        self._scores = dict(found.scores) if found.metric == metric else {}

    def note(self, step: int, scores: Mapping[str, float | None] | None) -> None:
        """Adds the scores of the evaluation of `step`, if there are any."""
        if scores is not None:
            score = scores.get(self._metric)
            self._scores[step] = None if score is None or math.isnan(score) else float(score)

    def state(self) -> dict[str, Any]:
        """Returns what the position of a checkpoint stores."""
        return {"metric": self._metric, "scores": [list(pair) for pair in self._scores.items()]}

    def over(self) -> bool:
        """Tells whether the run stops; the same on all processes, which must all call it."""
        return self._most > 0 and reading.any_process(self._waited() >= self._most)

    def _waited(self) -> int:
        """Counts the evaluations after the best one, or all if no score is defined."""
        steps = sorted(self._scores)
        best = self._best()
        return len(steps) if best is None else len(steps) - 1 - steps.index(best)

    def _best(self) -> int | None:
        """The first step of the highest score."""
        defined = [(score, -step) for step, score in self._scores.items() if score is not None]
        return -max(defined)[1] if defined else None

    def __str__(self) -> str:
        best = self._best()
        since = "was not defined" if best is None else f"was best at step {best}"
        after = "" if best is None else f" with {self._scores[best]:.2f}"
        return (
            f"{self._metric} {since}{after}, {self._waited()} evaluations ago: training ends by "
            f"train.patience={self._most}, and goes on if that is raised"
        )
