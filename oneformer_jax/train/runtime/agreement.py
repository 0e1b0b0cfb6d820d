"""Agreement of a run's processes: what must be the same is compared before they compute together.

Processes that differ would hang in their first collective, or train on with other numbers. The
comparison goes through the key-value store of JAX's coordination service, which needs no device.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import msgspec

# JAX has no public way to its store.
from jax._src import distributed as jax_distributed

from oneformer_jax import compilation, rules
from oneformer_jax.files import first_few, parse_json

CLOCK_SECONDS = 5.0  # most by which clocks may differ
# JAX ends all processes when one is lost for 100 s, without a name; we say it before.
MOST_SECONDS = 60.0
# Keys of a config that may differ: paths and loads of a host.
OF_A_HOST = {
    "compilation_cache",
    "data.prefetch",
    "data.threads",
    "data.workers",
    "dataset.data_dir",
}
_LAST_SECONDS = 3.0  # that process 0 leaves the others for their end
_SHOWN = 6  # differences and processes in a message


class DisagreementError(ValueError):
    """The processes of a run differ in what must be the same, or one of them is silent."""


class _Verdict(msgspec.Struct):
    """The end of a comparison: what is wrong, or "", and whether all processes took part."""

    problem: str
    complete: bool


class _Report(msgspec.Struct):
    """The description that a process gives of itself: its host, and JSON by name."""

    host: str
    facts: dict[str, str]


def facts_of(config: Mapping[str, Any], command: Mapping[str, Any]) -> dict[str, Any]:
    """Collects what the processes must share: versions, source, the config and flags by name."""
    flags = {f"--{name}": value for name, value in command.items()}
    python = {"python": platform.python_version()}
    settings = rules.flattened(config).items()
    configured = {f"--config.{key}": v for key, v in settings if key not in OF_A_HOST}
    return python | compilation.ingredients() | flags | configured


def device_facts() -> dict[str, Any]:
    """Describes this process's devices; JAX looks for them now, if it has not yet."""
    kinds = collections.Counter(device.device_kind for device in jax.local_devices())
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return {"devices": devices, "runtime": jax.devices()[0].client.platform_version}


def agree(
    topic: str, facts: Mapping[str, Any], *, timeout: float, hosts: Mapping[int, str] | None = None
) -> None:
    """Compares `facts` and the clock with those of the other processes, which call it too.

    Args:
      topic: a name that was not used before in this run.
      facts: JSON by name.
      timeout: seconds to wait for the others.
      hosts: names by process, as far as known, for one that does not answer.

    Raises:
      DisagreementError: on every process, the same line: who differs in what, or is silent. After
        a silence the process can only end: see `_end_without_the_others`.
    """
    store, place = jax_distributed.global_state.client, jax_distributed.global_state
    if place.num_processes == 1:
        return
    timeout = min(timeout, MOST_SECONDS)
    texts = {name: json.dumps(value, default=str) for name, value in facts.items()}
    report = msgspec.json.encode(_Report(socket.gethostname(), texts)).decode()
    store.key_value_set(f"{topic}/report/{place.process_id}", report)
    if place.process_id == 0:
        verdict, present = _judge(topic, timeout, dict(hosts or {}))
        store.key_value_set(f"{topic}/verdict", msgspec.json.encode(verdict).decode())
    else:
        deadline = time.monotonic() + timeout + 10
        if _get(f"{topic}/now", deadline - time.monotonic()) is not None:
            store.key_value_set(f"{topic}/time/{place.process_id}", str(time.time()))
        answer = _get(f"{topic}/verdict", deadline - time.monotonic())
        silence = "process 0, which compares the processes, does not answer: look at its log"
        verdict, present = _Verdict(silence, False), []
        if answer is not None:
            verdict = parse_json(answer, _Verdict, "the verdict of process 0")
            store.key_value_set(f"{topic}/read/{place.process_id}", "")
    if verdict.problem:
        for process in present:  # the store ends with process 0
            _get(f"{topic}/read/{process}", 5)
        if not verdict.complete:
            atexit.register(_end_without_the_others, wait=place.process_id == 0)
        raise DisagreementError(verdict.problem)


def _end_without_the_others(wait: bool) -> None:
    """Ends the process, with code 1, before JAX's own end.

    That would wait for the silent process, and then abort this one.
    """
    if wait:  # JAX aborts those that lose process 0
        time.sleep(_LAST_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _judge(topic: str, timeout: float, hosts: dict[int, str]) -> tuple[_Verdict, list[int]]:
    """Reads all reports, as process 0: the verdict, and the other processes that answered."""
    store, count = jax_distributed.global_state.client, jax_distributed.global_state.num_processes
    deadline = time.monotonic() + timeout
    facts = {}
    for process in range(count):
        text = _get(f"{topic}/report/{process}", deadline - time.monotonic())
        if text is not None:
            report = parse_json(text, _Report, f"the report of process {process}")
            hosts[process], facts[process] = report.host, report.facts
    present = [process for process in facts if process]
    if silent := [process for process in range(count) if process not in facts]:
        store.key_value_set(f"{topic}/now", "")
        problem = (
            f"{_named(silent, hosts)} joined, but did not report versions and settings within "
            f"{timeout:.0f} s: look at the log there; it hangs, or has another version of this code"
        )
        return _Verdict(problem, False), present
    ahead, asked = {0: 0.0}, time.time()
    store.key_value_set(f"{topic}/now", "")
    for process in present:
        text = _get(f"{topic}/time/{process}", timeout)
        if text is None:
            problem = f"{_named([process], hosts)} does not answer any more: look at the log there"
            return _Verdict(problem, False), present
        read, now = float(text), time.time()
        # It was read between these two moments of this clock.
        ahead[process] = max(read - now, 0.0) + min(read - asked, 0.0)
    return _Verdict(differences(facts, ahead, hosts), True), present


def differences(
    facts: Mapping[int, Mapping[str, str]], ahead: Mapping[int, float], hosts: Mapping[int, str]
) -> str:
    """Describes in one line who differs in what from the majority; "" if nobody does.

    Args:
      facts: JSON by process, then by name.
      ahead: seconds by which the clock of each process is ahead of that of process 0.
      hosts: names of the processes' hosts.
    """
    odd: dict[tuple[int, ...], list[str]] = collections.defaultdict(list)  # by who
    split = []  # without a majority
    names = dict.fromkeys(name for of_one in facts.values() for name in of_one)
    for name in names:
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for process, of_one in facts.items():
            groups[of_one.get(name, "null")].append(process)
        if len(groups) == 1:
            continue
        usual = max(groups, key=lambda value: len(groups[value]))
        if 2 * len(groups[usual]) > len(facts):
            for value, who in groups.items():
                if value != usual:
                    text = f"{name} ({_short(value)}, elsewhere {_short(usual)})"
                    odd[tuple(who)].append(text)
        else:
            shares = (f"{_short(value)} on {_named(who, hosts)}" for value, who in groups.items())
            split.append(f"{name} ({first_few(shares, _SHOWN)})")
    middle = sorted(ahead.values())[(len(ahead) - 1) // 2]
    for process, seconds in ahead.items():
        if abs(late := seconds - middle) > CLOCK_SECONDS:
            way = "ahead of" if late > 0 else "behind"
            odd[(process,)].append(f"the clock ({abs(late):.0f} s {way} the others)")
    lines = [
        f"{_named(who, hosts)} differ{'s' if len(who) == 1 else ''} in {first_few(what, _SHOWN)}"
        for who, what in odd.items()
    ]
    if split:
        lines.insert(0, f"the processes differ in {first_few(split, _SHOWN)}")
    if not lines:
        return ""
    return f"{first_few(lines, _SHOWN, '; ')}. Give all hosts the same code, command and time"


def _named(processes: Iterable[int], hosts: Mapping[int, str]) -> str:
    names = [f"{n} ({hosts[n]})" if n in hosts else str(n) for n in processes]
    return f"process{'' if len(names) == 1 else 'es'} {first_few(names, _SHOWN)}"


def _short(value: str) -> str:
    """Shortens JSON for a message."""
    text = "nothing" if value in ("null", '""') else value.strip('"')
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def _get(key: str, seconds: float) -> str | None:
    """Waits for a key of the store; None if it does not come in time."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        milliseconds = max(round(1000 * seconds), 1)
        return jax_distributed.global_state.client.blocking_key_value_get(key, milliseconds)
    return None
