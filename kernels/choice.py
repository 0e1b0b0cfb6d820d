"""Chooses what runs where an api is called with "auto", and notes such calls while one traces.

What the device itself has shown (`oneformer_jax.kernels.calibrate`) comes first. Without it the
static preference holds: the Pallas kernels on the TPUs for which their schedules are recorded
(`tpu_cycles.json` beside each), plain JAX elsewhere.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oneformer_jax.kernels import chips, dispatch

OPERATIONS = ("ms_deform_attn", "neighborhood_attention", "point_sampling", "assignment")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operation, with the share of one device.

    Attributes:
      operation: name of its folder.
      arrays: shape and dtype of each argument.
      static: names and values of the other arguments.
    """

    operation: str
    arrays: tuple[tuple[tuple[int, ...], str], ...]
    static: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        arrays = [f"{dtype}[{','.join(map(str, shape))}]" for shape, dtype in self.arrays]
        static = [f"{name}={value}".replace(" ", "") for name, value in self.static]
        return " ".join(arrays + static)

    def key(self, gradients: bool) -> str:
        """Returns a text that no other call has, nor this one if its gradients count or not."""
        return json.dumps([self.operation, self.arrays, self.static, gradients])

    @classmethod
    def of_key(cls, key: str) -> Call:
        """Returns the call of a `key`; ValueError for another text."""
        try:
            operation, arrays, static, _ = json.loads(key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key!r} is the key of no call") from error
        if operation not in OPERATIONS:
            raise ValueError(f"{key!r} is of no known operation")
        return cls(operation, _tuples(arrays), _tuples(static))

    @property
    def abstract(self) -> list[jax.ShapeDtypeStruct]:
        """The arguments, without numbers."""
        return [jax.ShapeDtypeStruct(shape, jnp.dtype(name)) for shape, name in self.arrays]


def _tuples(value: Any) -> Any:
    """Makes tuples of lists, at all depths."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


Table = dict[str, str]  # `Call.key` -> what runs


@dataclasses.dataclass
class Notes:
    """The "auto" calls of what is traced in `noting`.

    Attributes:
      gradients: whether the gradients of the calls are taken.
      table: what is known. None: the static preference chooses.
      calls: call -> how often it is made.
      chosen: call -> what was taken; those that `table` lacks take "xla".
    """

    gradients: bool
    table: Table | None
    calls: dict[Call, int] = dataclasses.field(default_factory=dict)
    chosen: dict[Call, str] = dataclasses.field(default_factory=dict)

    @property
    def missing(self) -> list[Call]:
        """Those that `table` lacks."""
        known = {} if self.table is None else self.table
        return [call for call in self.calls if call.key(self.gradients) not in known]


_NOTES: contextvars.ContextVar[Notes | None] = contextvars.ContextVar("notes", default=None)
# What `calibrate` has found in this process: with the other processes, and alone.
TABLES: dict[bool, Table] = {True: {}, False: {}}


@contextlib.contextmanager
def noting(*, gradients: bool = False, table: Table | None = None) -> Iterator[Notes]:
    """Notes every "auto" call that is traced in the context, in this thread; see `Notes`."""
    notes = Notes(gradients, table)
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def choose(
    operation: str,
    implementation: str,
    implementations: Sequence[str],
    arrays: Sequence[jax.Array],
    *,
    shared: int = 0,
    mesh: Mesh | None = None,
    **static: Any,
) -> str:
    """Chooses what runs: the named implementation, or for "auto" what is best on the device.

    Args:
      operation: name of its folder.
      implementation: one of `implementations`, or "auto".
      implementations: names of all.
      arrays: the checked arguments; all but the last `shared` have the batch as axis 0.
      shared: how many arguments all devices have whole.
      mesh: as for `dispatch.split_batch`.
      **static: the other arguments, hashable and the same in JSON.

    Raises:
      ValueError: another name.
    """
    if implementation != "auto":
        if implementation not in implementations:
            raise ValueError(
                f"{operation}: unknown implementation {implementation!r}; "
                f"use one of {', '.join(implementations)}, or auto for the fastest"
            )
        return implementation
    call = _describe(operation, arrays, shared, mesh, static)
    if call is None:
        return "xla"
    notes = _NOTES.get()
    if notes is None:
        return _known(call) or preferred(call)
    if notes.table is None:
        chosen = preferred(call)
    else:
        chosen = notes.table.get(call.key(notes.gradients), "xla")
    notes.calls[call] = notes.calls.get(call, 0) + 1
    notes.chosen[call] = chosen
    return chosen


def _describe(
    operation: str,
    arrays: Sequence[jax.Array],
    shared: int,
    mesh: Mesh | None,
    static: Mapping[str, Any],
) -> Call | None:
    """Describes one device's share; None where kernels have none: no numbers, or no whole share."""
    _, _, count = dispatch.free_axes(mesh)
    shapes = [tuple(x.shape) for x in arrays]
    split = len(arrays) - shared
    if any(0 in shape for shape in shapes) or any(shape[0] % count for shape in shapes[:split]):
        return None
    shapes[:split] = [(shape[0] // count, *shape[1:]) for shape in shapes[:split]]
    names = [str(x.dtype) for x in arrays]
    return Call(operation, tuple(zip(shapes, names, strict=True)), tuple(sorted(static.items())))


def _known(call: Call) -> str | None:
    """Returns what this process found for a call outside of `noting`, if it is for its device."""
    if not any(TABLES.values()) or dispatch.device_kind() != jax.local_devices()[0].device_kind:
        return None
    keys = [call.key(gradients) for gradients in (True, False)]
    found = (TABLES[everywhere].get(key) for key in keys for everywhere in (True, False))
    return next(filter(None, found), None)


def preferred(call: Call) -> str:
    """Returns the static preference for a call on the device that is traced for."""
    kind = dispatch.device_kind()
    targets = [name for name, chip in chips.TPUS.items() if kind in chip.kinds]
    if not recorded_targets(call.operation).intersection(targets):
        return "xla"
    return "xla" if _refused(call, "pallas_tpu", kind) else "pallas_tpu"


@functools.cache
def recorded_targets(operation: str) -> frozenset[str]:
    """Returns the TPUs, keys of `chips.TPUS`, with recorded schedules of an operation's kernels."""
    path = pathlib.Path(__file__).with_name(operation) / "tpu_cycles.json"
    records = json.loads(path.read_text("utf-8"))
    return frozenset(r["target"] for r in records if r["implementation"] == "pallas_tpu")


@functools.cache
def _refused(call: Call, candidate: str, kind: str) -> bool:
    """Tells whether a kernel refuses a call, or its gradients, on a kind of device."""
    del kind  # the trace asks for it; the cache must know
    trial = load_trial(call.operation)
    try:
        jax.eval_shape(trial.with_gradients(call, candidate), *trial.abstract_inputs(call))
    except NotImplementedError:
        return True
    return False


def load_trial(operation: str) -> Any:
    """Returns the `trial.Trial` of an operation, which is imported when first used."""
    return importlib.import_module(f"oneformer_jax.kernels.{operation}.trial").TRIAL
