"""Records of the benchmarks: printed as a table, and kept in a file for the tests."""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def median_milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Times `call`, which must block until done: the median, after two calls to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def write(path: pathlib.Path, records: Iterable[dict]) -> None:
    """Writes records as a JSON list, one a line."""
    lines = [json.dumps(record) for record in records]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Formats records as Markdown, one line each, with a column for every key; None is empty."""
    columns = list(dict.fromkeys(key for record in records for key in record))

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.3g}" if value < 100 else f"{value:.0f}"
        return " x ".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(record.get(key)) for key in columns] for record in records]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keep(path: pathlib.Path, found: Iterable[dict], key: Sequence[str]) -> None:
    """Merges records into a JSON file; a newer record updates the one with equal fields `key`."""
    identity = lambda record: [record[name] for name in key]  # noqa: E731
    old = json.loads(path.read_text("utf-8")) if path.exists() else []
    new = {str(identity(record)): record for record in old}
    for record in found:
        name = str(identity(record))
        new[name] = {**new.get(name, {}), **record}
    write(path, sorted(new.values(), key=identity))
