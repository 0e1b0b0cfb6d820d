"""Chooses before a program is compiled: traces it, measures what is new, tells all processes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from oneformer_jax.kernels import choice
from oneformer_jax.kernels.bench import records
from oneformer_jax.kernels.calibrate import attempt
from oneformer_jax.kernels.calibrate.store import Outcome, Store, environment_of
from oneformer_jax.kernels.choice import Call

LIMIT_SECONDS = 60.0  # of a process, for all that it measures
LEAST_SECONDS = 2.0  # less are not enough to compile a candidate
Row = dict[str, Any]


def measures() -> bool:
    """Tells whether this process measures: on processors the kernels would only be interpreted."""
    return jax.local_devices()[0].platform != "cpu"


def candidates(call: Call) -> list[str]:
    """Names what may run a call on this process's device, plain JAX first."""
    return choice.load_trial(call.operation).candidates(call, jax.local_devices()[0])


def fastest(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> str:
    """Returns the fastest right candidate, or the first of `names` if none is right."""
    right = [name for name in names if name in outcomes and not outcomes[name].fault]
    return min(right, key=lambda name: outcomes[name].milliseconds, default=names[0])


def known_rows(call: Call, gradients: bool, store: Store) -> list[Row]:
    """Returns the lines of the table for a call; none if there is but one candidate."""
    names = candidates(call)
    if len(names) == 1:
        return []
    outcomes = store.outcomes.get(call.key(gradients), {})
    chosen = fastest(outcomes, names)
    late = f"not tried: the {LIMIT_SECONDS:.0f} s were over; the next start goes on"
    rows = []
    for name in names:
        outcome = outcomes.get(name, Outcome(fault=late))
        verdict = outcome.fault or "slower"
        if name == chosen:
            verdict = "chosen" if not outcome.fault else f"chosen, as no other is right: {verdict}"
        row = {"operation": call.operation, "call": str(call), "gradients": gradients}
        row |= {"candidate": name}
        row |= {"milliseconds": outcome.milliseconds, "error": outcome.error, "verdict": verdict}
        rows.append(row)
    return rows


def open_store(folder: str | os.PathLike[str], log: Callable[[str], Any]) -> Store:
    """Returns what is known in a folder of devices like this process's."""
    return Store(folder, environment_of(jax.local_devices()[0]), log)


def try_calls(calls: Sequence[Call], gradients: bool, store: Store, seconds: float) -> None:
    """Tries the candidates of calls that the store lacks, and keeps the outcomes in it.

    Args:
      calls: most important first.
      gradients: whether their gradients are compared and timed, too.
      store: the user's outcomes.
      seconds: in which all must be done.
    """
    end = time.monotonic() + seconds
    for call in calls:
        key = call.key(gradients)
        known = store.outcomes.get(key, {})
        untried = [name for name in candidates(call) if name not in known]
        left = end - time.monotonic()
        if not untried or left < LEAST_SECONDS:
            continue
        limit = min(attempt.COMPILE_SECONDS, left)
        try:
            attempts = attempt.Attempts(call, gradients, jax.local_devices()[0], limit)
        except (attempt.TooLong, jax.errors.JaxRuntimeError) as error:
            why = f"not tried: the reference failed ({attempt.one_line(error)})"
            for name in untried:
                store.keep(key, name, Outcome(fault=why))
            continue
        for name in untried:
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                break
            with store.trying(key, name) as mark:
                outcome = attempts.attempt(name, min(attempt.COMPILE_SECONDS, left), mark)
                store.keep(key, name, outcome)


_BUDGET = [LIMIT_SECONDS]  # what is left of it in this process
_STORES: dict[str, Store] = {}


class Chooser:
    """Chooses the kernels of programs before they are compiled; see the package's docstring.

    choose = Chooser(folder)
    choose(program, *arguments)  # a result of jax.jit; only candidates are run
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        gradients: bool = False,
        everywhere: bool = False,
        log: Callable[[str], Any] = print,
        report: Callable[[dict[str, str], list[Row]], Any] | None = None,
        wait: Callable[[], Any] = lambda: None,
    ):
        """Measures nothing yet.

        Args:
          folder: what the user's earlier processes have found, and this one will.
          gradients: the programs take gradients of the calls.
          everywhere: the programs run on the devices of all processes together, and all call this:
            process 0 decides and the others are told.
          log: takes the table, and lines.
          report: takes the environment and the lines of each program's table, in process 0.
          wait: waits until all processes have come, longer than a collective does.
        """
        self._folder = os.fspath(folder)
        self._gradients = gradients
        self._shared = everywhere and jax.process_count() > 1
        self._decides = not self._shared or jax.process_index() == 0
        self._log, self._report, self._wait = log, report, wait
        self._recalled = False

    def __call__(self, program: Any, *arguments: Any) -> None:
        """Traces a jitted function with the kernels that are best for it; it keeps the trace."""
        if not measures():
            return
        with jax.transfer_guard("allow"):
            if not self._recalled:
                self._table.update(self._from_first(self._recall))
                self._recalled = True
            notes = self._traced(program, arguments)
            calls = sorted(notes.missing, key=lambda call: self._worth(notes, call))
            if calls:
                self._table.update(self._from_first(lambda: self._decide(calls)))
            again = [c for c in calls if self._table[c.key(self._gradients)] != notes.chosen[c]]
            if again:
                program.clear_cache()
                self._traced(program, arguments)
        if self._decides:
            self._tell(notes.calls, measured=bool(calls))

    @property
    def _table(self) -> choice.Table:
        return choice.TABLES[self._shared]

    @property
    def _store(self) -> Store:
        if self._folder not in _STORES:
            _STORES[self._folder] = open_store(self._folder, self._log)
        return _STORES[self._folder]

    def _traced(self, program: Any, arguments: Sequence[Any]) -> choice.Notes:
        with choice.noting(gradients=self._gradients, table=self._table) as notes:
            program.trace(*arguments)
        return notes

    def _worth(self, notes: choice.Notes, call: Call) -> tuple[float, str]:
        """Sorts calls by the numbers that they read, most first, alike in every process."""
        numbers = sum(math.prod(shape) for shape, _ in call.arrays)
        return -notes.calls[call] * numbers, call.key(self._gradients)

    def _recall(self) -> choice.Table:
        """Returns the choices for all calls whose every candidate has been tried."""
        found = {}
        for key, outcomes in self._store.outcomes.items():
            try:
                names = candidates(Call.of_key(key))
            except (LookupError, TypeError, ValueError):  # no call of these versions
                continue
            if set(names) <= set(outcomes):
                found[key] = fastest(outcomes, names)
        return found

    def _decide(self, calls: Sequence[Call]) -> choice.Table:
        """Tries what is unknown of the calls; returns the choices."""
        several = [call for call in calls if len(candidates(call)) > 1]
        start = time.monotonic()
        try_calls(several, self._gradients, self._store, _BUDGET[0])
        _BUDGET[0] -= time.monotonic() - start
        keys = {call: call.key(self._gradients) for call in calls}
        known = self._store.outcomes
        return {key: fastest(known.get(key, {}), candidates(call)) for call, key in keys.items()}

    def _from_first(self, make: Callable[[], choice.Table]) -> choice.Table:
        """Returns what `make` returns in the process that decides."""
        text = json.dumps(make()).encode() if self._decides else b""
        if self._shared:
            self._wait()
            size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
            padded = np.zeros(size, np.uint8)
            padded[: len(text)] = np.frombuffer(text, np.uint8)
            text = np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes()
        return json.loads(text)

    def _tell(self, calls: Mapping[Call, int], measured: bool) -> None:
        """Logs and reports the table of a program."""
        rows = [row for call in calls for row in known_rows(call, self._gradients, self._store)]
        if not rows:
            return
        if measured:
            self._log(f"Kernels, measured on this device:\n{records.table(rows)}")
        else:
            picks = [r for r in rows if r["verdict"].startswith("chosen")]
            names = dict.fromkeys(f"{r['operation']} {r['candidate']}" for r in picks)
            self._log(f"Kernels, as measured before ({self._store.path}): {', '.join(names)}")
        if self._report is not None:
            self._report(self._store.environment, rows)
