"""Start-up of several processes: finds this one's place, names missing ones, starts JAX's service.

JAX aborts the process if others do not come in time, without naming them. So the processes call the
roll beforehand, on the port after the coordinator's. Those that came then compare what must be the
same on all: see `agreement.py`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import socket
import time
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import jax
import msgspec
from absl import logging
from orbax.checkpoint import multihost

from oneformer_jax import compilation
from oneformer_jax.files import first_few, parse_json
from oneformer_jax.train.runtime import agreement

# Ports of jax.distributed on Cloud TPU and GKE; SLURM's follows from the job's number.
_TPU_PORT = 8476
_SLURM_PORTS = 4096
# Longer than any compilation; JAX itself notices a process that is lost meanwhile.
_COMPILATION_SECONDS = 6 * 3600
_LONGEST = 1 << 16  # bytes of a message of the roll

T = TypeVar("T")
_meetings: collections.Counter[str] = collections.Counter()  # of all processes, by name


class DistributedError(ValueError):
    """The processes of a run did not all join."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among those of its run.

    Attributes:
      process: its number.
      count: number of processes.
      coordinator: "host:port" of process 0, or None if only JAX can find it.
      source: origin of these values.
      hosts: names of the hosts by process, if known.
    """

    process: int
    count: int
    coordinator: str | None
    source: str
    hosts: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.process < self.count:
            raise DistributedError(
                f"process {self.process} of {self.count} ({self.source}) cannot exist: processes "
                f"are numbered 0 to {self.count - 1}"
            )
        if self.coordinator and not re.fullmatch(r".+:\d+", self.coordinator):
            raise DistributedError(
                f"the coordinator {self.coordinator!r} ({self.source}) is not host:port"
            )


def find_place(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place | None:
    """Finds the place in flags, JAX_*, GKE and Cloud TPU, SLURM or MPI, in this order.

    Returns:
      None if only JAX's own detection can tell.

    Raises:
      DistributedError: a flag is given, but flags and JAX_* together lack a part; or one is wrong.
    """
    explicit = {
        "--coordinator, JAX_COORDINATOR_ADDRESS": coordinator
        or environment.get("JAX_COORDINATOR_ADDRESS"),
        "--num_processes, JAX_NUM_PROCESSES": _first(
            num_processes, environment.get("JAX_NUM_PROCESSES")
        ),
        "--process_id, JAX_PROCESS_ID": _first(process_id, environment.get("JAX_PROCESS_ID")),
    }
    missing = [name for name, value in explicit.items() if value is None]
    if not missing:
        address, count, number = explicit.values()
        return Place(_whole(number), _whole(count), str(address), "flags or JAX_*")
    if len(missing) < len(explicit) and any(
        value is not None for value in (coordinator, num_processes, process_id)
    ):
        raise DistributedError(f"the settings of several processes lack {'; '.join(missing)}")
    names = tuple(environment.get("TPU_WORKER_HOSTNAMES", "").split(","))
    if "TPU_WORKER_ID" in environment and names[0]:
        slices = _whole(environment.get("MEGASCALE_NUM_SLICES", 1))
        number = _whole(environment["TPU_WORKER_ID"])
        number += _whole(environment.get("MEGASCALE_SLICE_ID", 0)) * len(names)
        # Each slice knows its own hosts only; the coordinator is in the first one.
        first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).split(":")[0]
        known = names if slices == 1 else ()
        return Place(number, len(names) * slices, f"{first}:{_TPU_PORT}", "TPU_WORKER_*", known)
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        first = first_host(environment.get("SLURM_STEP_NODELIST", ""))
        port = 65535 - 2 * _SLURM_PORTS + _whole(environment.get("SLURM_JOB_ID", 0)) % _SLURM_PORTS
        return Place(
            _whole(environment["SLURM_PROCID"]),
            _whole(environment["SLURM_NTASKS"]),
            f"{first}:{port}" if first else None,
            "SLURM",
        )
    if "OMPI_COMM_WORLD_RANK" in environment:
        number, count = (environment[f"OMPI_COMM_WORLD_{name}"] for name in ("RANK", "SIZE"))
        return Place(_whole(number), _whole(count), None, "MPI")
    return None


def _first(*values):
    return next((value for value in values if value is not None), None)


def _whole(value: str | int) -> int:
    try:
        return int(value)
    except ValueError:
        raise DistributedError(f"{value!r} is not a number of processes or of a process") from None


def first_host(nodes: str) -> str:
    """Returns first name in a SLURM list: "node007" of "node[007-012,20],other3"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],\-]+))?", nodes)
    return match[1] + (match[2] or "") if match else ""


def start(
    place: Place | None, timeout: float = 300.0, facts: Mapping[str, Any] | None = None
) -> None:
    """Joins the other processes; first logs the place of this one, as joining may hang.

    Args:
      place: from `find_place`; None leaves everything to JAX's detection.
      timeout: seconds to wait for all processes.
      facts: JSON by name that all processes must have the same, see `agreement.facts_of`.

    Raises:
      DistributedError: processes are missing after that time; the message names them.
      DisagreementError: they differ, in `facts`, their devices or their clocks.
    """
    host, hosts = socket.gethostname(), {}
    if place is None:
        logging.info("On %s: joining the other processes by JAX's detection", host)
        with _warning_before(timeout, f"{host} still waits for the other processes"):
            jax.distributed.initialize(initialization_timeout=round(timeout))
    else:
        where = place.coordinator or "an address that JAX finds"
        logging.info(
            "Process %d of %d on %s (%s): joining the others at %s, for at most %.0f s",
            *(place.process, place.count, host, place.source, where, timeout),
        )
        explicit = {}
        if place.coordinator:
            began = time.monotonic()
            hosts = call_roll(place, timeout)
            timeout = max(timeout - (time.monotonic() - began), 10.0)
            if place.source.startswith("flags"):
                explicit = dict(
                    coordinator_address=place.coordinator,
                    num_processes=place.count,
                    process_id=place.process,
                )
        with _warning_before(timeout, f"process {place.process} still waits for the others"):
            jax.distributed.initialize(**explicit, initialization_timeout=round(timeout))
    agreement.agree("settings", facts or {}, timeout=timeout, hosts=hosts)
    agreement.agree("devices", agreement.device_facts(), timeout=timeout, hosts=hosts)
    logging.info(
        "Process %d of %d on %s: %d of %d devices are its own (%s)",
        *(jax.process_index(), jax.process_count(), host),
        *(jax.local_device_count(), jax.device_count(), jax.devices()[0].device_kind),
    )


def compile_everywhere(function: Any, *arguments: Any, name: str) -> None:
    """Compiles a jitted function, and waits until all processes have, so that none runs it alone.

    Compiling may take longer than a collective waits: on CPUs JAX gives up after 30 s.

    Args:
      function, arguments: see `compilation.compile_now`.
      name: name of the program.
    """
    compilation.compile_now(function, *arguments, name=name)
    wait_for_all(f"{name} compiled")


def wait_for_all(what: str) -> None:
    """Waits until all processes have called this, for hours if need be.

    Args:
      what: names the meeting; all processes have the meetings of a name in the same order.
    """
    if jax.process_count() > 1:
        _meetings[what] += 1
        wait = multihost.get_barrier_sync_fn()
        key = f"oneformer_jax: {what}, {_meetings[what]}"
        wait(key=key, timeout_ms=1000 * _COMPILATION_SECONDS)


def _warning_before(timeout: float, text: str) -> contextlib.AbstractContextManager:
    """Logs `text` shortly before JAX gives up, as it then aborts the process."""
    message = f"{text}; in 2 s JAX ends this process. Did all start with the same command?"
    return compilation.said_after(max(timeout - 2, 0.1), logging.error, message)


# ------------------------------------------------------------------ the roll


class _Caller(msgspec.Struct):
    """A process that calls: its number, how many it counts, and the name of its host."""

    process: Annotated[int, msgspec.Meta(ge=1)]
    count: int
    host: str

    def __post_init__(self):
        if self.process >= self.count:
            raise ValueError(f"process {self.process} of {self.count}")


class _Answer(msgspec.Struct):
    """The answer of process 0: what is wrong, or ""."""

    problem: str


def _send(connection: socket.socket, message: msgspec.Struct) -> None:
    connection.sendall(msgspec.json.encode(message) + b"\n")


def _receive(connection: socket.socket, kind: type[T]) -> T:
    """Reads a line of JSON that anybody on the network may have sent."""
    with connection.makefile("rb") as file:
        return parse_json(file.readline(_LONGEST), kind)


def call_roll(place: Place, timeout: float) -> dict[int, str]:
    """Waits until every process has called; a DistributedError names missing or double ones.

    Returns:
      Host by process, on process 0; elsewhere nothing.
    """
    host, _, port = place.coordinator.rpartition(":")
    if place.count == 1:
        return {}
    if place.process == 0:
        return _keep_roll(place, int(port) + 1, timeout)
    _answer_roll(place, host.strip("[]"), int(port) + 1, timeout)
    return {}


def _keep_roll(place: Place, port: int, timeout: float) -> dict[int, str]:
    deadline = time.monotonic() + timeout
    present = {0: socket.gethostname()}
    problem = ""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port), backlog=place.count))
        except OSError as error:
            raise DistributedError(
                f"process 0 cannot listen on port {port} ({error.strerror}): another run may use "
                "it; choose another port for the coordinator"
            ) from error
        callers = []
        while len(present) < place.count and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            stack.enter_context(connection)
            connection.settimeout(10)
            try:
                caller = _receive(connection, _Caller)
            except (OSError, ValueError):
                continue  # a stranger on the network
            number, name = caller.process, caller.host
            callers.append(connection)
            if caller.count != place.count:
                problem = f"{name} counts {caller.count} processes and process 0 {place.count}"
            elif number in present:
                problem = f"{present[number]} and {name} are both process {number}"
            present[number] = name
        missing = [n for n in range(place.count) if n not in present]
        if missing and not problem:
            problem = _who_is_missing(place, missing, timeout)
        for connection in callers:
            with contextlib.suppress(OSError):
                _send(connection, _Answer(problem))
    if problem:
        raise DistributedError(problem)
    return present


def _who_is_missing(place: Place, missing: list[int], timeout: float) -> str:
    names = (f"{number} ({place.hosts[number]})" if place.hosts else number for number in missing)
    return (
        f"after {timeout:.0f} s {len(missing)} of {place.count} processes have not come: "
        f"{first_few(names, 16)}. Look at the logs of these hosts"
    )


def _answer_roll(place: Place, host: str, port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    # Process 0 answers a little after its time is over.
    patience = deadline + 15
    me = _Caller(place.process, place.count, socket.gethostname())
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.settimeout(max(patience - time.monotonic(), 0.1))
                _send(connection, me)
                problem = _receive(connection, _Answer).problem
                break
        except (OSError, ValueError) as error:  # not started yet, or gone before it answered
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"process {place.process}: process 0 cannot be reached at {host}, port {port}, "
                    f"for {timeout:.0f} s ({error}). Look at that host's log; is the port open?"
                ) from error
            time.sleep(0.2)
    if problem:
        raise DistributedError(f"process {place.process}: {problem}")
