"""Keeps what was measured for the user, by device and versions, and what ended a process.

A file per environment (kind of device, versions, source of the kernels) holds every outcome. Before
a candidate is tried, a marker file beside it names it. Its process holds a lock on the marker, and
the system frees the lock when the process ends, however it ends: a marker without a lock tells the
next start that its candidate ended or hung a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

LARGEST = 16 << 20  # bytes of a file that is read
FORMAT = 1
# Settings of the compilers, which are not in their versions.
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a candidate.

    Attributes:
      milliseconds: of the call, or None.
      error: relative to the largest entry of an array, or None.
      fault: "" if it is right, else what is wrong.
    """

    milliseconds: float | None = None
    error: float | None = None
    fault: str = ""

    @classmethod
    def read(cls, value: Any) -> Outcome:
        """Makes one of parsed JSON; ValueError for anything else."""
        milliseconds, error, fault = value
        numbers = [x for x in (milliseconds, error) if x is not None]
        if not all(type(x) in (int, float) and x >= 0 for x in numbers) or type(fault) is not str:
            raise ValueError(f"an outcome is {value!r}")
        if not fault and milliseconds is None:
            raise ValueError("a right candidate has no time")
        return cls(milliseconds, error, fault)


Outcomes = dict[str, dict[str, Outcome]]  # key of a call -> candidate -> outcome


def environment_of(device: jax.Device) -> dict[str, str]:
    """Names all that a measurement depends on, beside the call."""
    found = {"format": str(FORMAT), "device": device.device_kind, "source": source_digest()}
    for name in ("jax", "jaxlib"):
        found[name] = importlib.metadata.version(name)
    found["runtime"] = device.client.platform_version  # names libtpu's or CUDA's version
    found["precision"] = str(jax.config.jax_default_matmul_precision)
    return found | {name: os.environ.get(name, "") for name in ENVIRONMENT}


@functools.cache
def source_digest() -> str:
    """Returns a digest of the source of all kernels."""
    root = pathlib.Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# Markers of this process, for `withdraw`.
_MARKERS: set[pathlib.Path] = set()


def withdraw() -> None:
    """Removes this process's markers: it ends now for a reason that is no candidate's."""
    for path in tuple(_MARKERS):
        _remove(path)


def _remove(marker: pathlib.Path) -> None:
    marker.unlink(missing_ok=True)
    _MARKERS.discard(marker)


class Store:
    """The outcomes of one environment, in a folder that is made as needed."""

    def __init__(
        self, folder: str | os.PathLike[str], environment: Mapping[str, str], log: Callable
    ):
        """Reads what is there.

        Args:
          folder: of the user's measurements.
          environment: see `environment_of`.
          log: takes a line about a file that cannot be used.
        """
        text = json.dumps(dict(environment), sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.environment = dict(environment)
        self.path = pathlib.Path(folder).expanduser() / f"{name}.json"
        self._log = log
        self._usable = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._outcomes = self._read()
            self._convict()
        except OSError as error:
            self._give_up(error)

    @property
    def outcomes(self) -> Outcomes:
        """Outcomes by call and candidate, also those of earlier processes."""
        return self._outcomes

    def keep(self, key: str, candidate: str, outcome: Outcome) -> None:
        """Adds an outcome, and writes the file with what other processes have added meanwhile."""
        import fcntl  # not on Windows, which has no accelerator of JAX's

        self._outcomes.setdefault(key, {})[candidate] = outcome
        if not self._usable:
            return
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(self.path.with_suffix(".lock"), "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
                for other, found in self._read().items():
                    self._outcomes[other] = found | self._outcomes.get(other, {})
                calls = {
                    key: {name: dataclasses.astuple(outcome) for name, outcome in found.items()}
                    for key, found in self._outcomes.items()
                }
                text = json.dumps({"environment": self.environment, "calls": calls}, indent=1)
                temporary.write_text(text, "utf-8")
                temporary.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._give_up(error)

    @contextlib.contextmanager
    def trying(self, key: str, candidate: str) -> Iterator[Callable[[str], None]]:
        """Marks a candidate as tried; a process that ends in the context convicts it.

        Yields a function that adds to the marker how the process ends. What ends it in Python, and
        SIGTERM, convicts nobody.
        """
        import fcntl

        marker = self.path.with_suffix(f".{uuid.uuid4().hex[:8]}.trying")
        with contextlib.ExitStack() as stack:

            def write(fault: str) -> None:
                if not self._usable:
                    return
                record = {"call": key, "candidate": candidate, "fault": fault}
                try:
                    file.seek(0)
                    file.write(json.dumps(record).encode())
                    file.truncate()
                except OSError as error:  # the disk is full; the process still has to end
                    self._give_up(error)

            if self._usable:
                try:
                    _MARKERS.add(marker)
                    stack.callback(_remove, marker)
                    file = stack.enter_context(open(marker, "xb", buffering=0))
                    fcntl.flock(file, fcntl.LOCK_EX)  # not every file system has locks
                except OSError as error:
                    self._give_up(error)
            write("ended the process of an earlier start")
            stack.enter_context(_withdrawing())
            yield write

    def _read(self) -> Outcomes:
        """Reads the file; {} if there is none, or it is damaged, which is said."""
        try:
            with open(self.path, "rb") as file:
                data = file.read(LARGEST + 1)
        except FileNotFoundError:
            return {}
        try:
            if len(data) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            found = json.loads(data)
            if found["environment"] != self.environment:
                raise ValueError("it is of other versions than its name")
            return {
                key: {name: Outcome.read(value) for name, value in outcomes.items()}
                for key, outcomes in found["calls"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._log(f"{self.path} is damaged ({error}): it is ignored, and kernels are measured")
            self.path.unlink(missing_ok=True)
            return {}

    def _convict(self) -> None:
        """Makes outcomes of the markers that processes have left behind."""
        import fcntl

        for marker in self.path.parent.glob(f"{self.path.stem}.*.trying"):
            with contextlib.suppress(FileNotFoundError), open(marker, "rb+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its process lives
                with contextlib.suppress(ValueError, TypeError, KeyError):  # cut off in writing
                    record = json.loads(file.read(LARGEST))
                    call, candidate, fault = (
                        str(record[name]) for name in ("call", "candidate", "fault")
                    )
                    self.keep(call, candidate, Outcome(fault=fault))
                marker.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        self._usable = False
        self._outcomes = getattr(self, "_outcomes", {})
        self._log(
            f"{self.path.parent} cannot be written ({error.strerror or error}): which kernels are "
            "fastest is measured again at the next start"
        )


@contextlib.contextmanager
def _withdrawing() -> Iterator[None]:
    """Withdraws the markers when SIGTERM, which nobody else handles, ends the process."""
    plain = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )

    def end(number: int, _: object) -> None:
        withdraw()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if plain:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if plain:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
