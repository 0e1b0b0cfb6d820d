"""The benchmarks' view of an operation: its published calls, and how to time or compile each."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax

from oneformer_jax.kernels import choice, dispatch
from oneformer_jax.kernels.bench import gpu, process, records, tpu
from oneformer_jax.kernels.trial import Trial, with_gradients

Case = TypeVar("Case")

PASSES = ("forward", "backward")
ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation(Generic[Case]):
    """The calls of one operation; the module `kernels.NAME.bench` has its instance.

    Attributes:
      name: name of its folder, and of its kernels: `NAME_forward` and `NAME_backward`.
      cases: the published calls by name.
      dtypes: dtypes of its arrays, the default first.
      key: fields that identify a recorded call, beside the compiler, target and implementation.
      rivals: other libraries' implementations on the host, by name: functions of the arrays.
      cores: target -> cores of the chip that share a kernel's loops; 1 by default.
    """

    name: str
    cases: Mapping[str, Case]
    dtypes: Sequence[str] = ("float32", "bfloat16")
    key: Sequence[str] = ()
    rivals: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    cores: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def trial(self) -> Trial:
        """Its implementations, and their gradients."""
        return choice.load_trial(self.name)

    @property
    def recorded(self) -> pathlib.Path:
        """The file that `--target=TPU --record` writes; tests hold the kernels to it."""
        return ROOT / self.name / "tpu_cycles.json"

    def labels(self, case: Case, dtype: str) -> dict[str, Any]:
        """Columns of a table that tell one call from another."""
        raise NotImplementedError

    def arguments(self, case: Case, batch: int, dtype: str) -> Sequence[jax.ShapeDtypeStruct]:
        """Returns the arrays of a call of `batch` images."""
        raise NotImplementedError

    def static(self, case: Case) -> dict[str, Any]:
        """Returns the other arguments of a call."""
        return {}

    def call(self, case: Case, batch: int, dtype: str) -> choice.Call:
        """Returns the call of `batch` images."""
        arrays = ((x.shape, str(x.dtype)) for x in self.arguments(case, batch, dtype))
        return choice.Call(self.name, tuple(arrays), tuple(sorted(self.static(case).items())))

    def inputs(self, case: Case, batch: int, dtype: str) -> list[Any]:
        """Draws the output's gradient, or None, and the arrays; by default as `Trial` does."""
        return self.trial.drawn_inputs(self.call(case, batch, dtype))

    def least_bytes(self, case: Case, batch: int, dtype: str) -> Mapping[str, int]:
        """Counts the bytes by pass if every array is read or written once; {} if unknown."""
        return {}

    def count(self, target: str, case: Case, program: str, dump: pathlib.Path) -> dict[str, Any]:
        """Reads figures of the compiled kernels from their schedules.

        Returns:
          Per pass {"kernels", "cycles", "milliseconds"}: the number of kernels and their issue
          cycles on one core. Cycles are missing if some kernels are equal: the compiler dumps one.
        """
        found = {}
        for name in PASSES:
            texts = tpu.schedules(dump, f"{self.name}_{name}")
            calls = tpu.count_calls(program, f"{self.name}_{name}")
            if not texts:
                continue
            found[name] = {"kernels": calls}
            if len(texts) == calls:
                cycles = sum(self.cycles(text, case, self.cores.get(target, 1)) for text in texts)
                found[name]["cycles"] = round(cycles)
                found[name]["milliseconds"] = round(1e3 * cycles / tpu.TARGETS[target].clock, 3)
        return found

    def cycles(self, text: str, case: Case, cores: int) -> float:
        """Returns issue cycles of a kernel in its schedule."""
        return tpu.issue_cycles(text)

    def predict(self, record: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
        """Returns the lines of a table for a record of a TPU target: one per pass."""
        shared = {
            key.replace("_bytes", "_megabytes"): value / 1e6 if key.endswith("_bytes") else value
            for key, value in record.items()
            if not isinstance(value, dict)
        }
        passes = [name for name in PASSES if name in record]
        return [{**shared, "pass": name, **record[name]} for name in passes] or [shared]

    def summary(self, found: Sequence[Mapping[str, Any]]) -> str:
        """Returns a line below the table, or ""."""
        return ""


def load(name: str) -> Operation:
    """Returns the operation of one of `choice.OPERATIONS`."""
    return importlib.import_module(f"oneformer_jax.kernels.{name}.bench").OPERATION


# ------------------------------------------------------------------ on this machine's device


def measure(
    operation: Operation, case: Any, implementation: str, *, batch: int, dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """Times a call; returns a record per pass, with {"error"} if the implementation refuses.

    `implementation` is one of the operation's or a rival, `batch` a number of images. With 0
    `repeats` the records have the compiled program's memory alone.
    """
    device = jax.devices()[0]
    known = operation.labels(case, dtype) | {"batch": batch, "implementation": implementation}
    gradient, *arrays = operation.inputs(case, batch, dtype)
    if implementation in operation.rivals:
        run = functools.partial(operation.rivals[implementation], *arrays)
        took = records.median_milliseconds(run, repeats) if repeats else None
        return [{**known, "device": "host", "pass": "forward", "milliseconds": took}]
    call, trial = operation.call(case, batch, dtype), operation.trial
    arrays = jax.device_put([gradient, *arrays], device)
    least = operation.least_bytes(case, batch, dtype)
    passes = {"forward": trial.forward, "forward and backward": trial.with_gradients}
    if gradient is None:
        del passes["forward and backward"]
    found = []
    for name, make in passes.items():
        record = {**known, "device": device.device_kind, "pass": name}
        found.append(record)
        try:
            start = time.perf_counter()
            compiled = jax.jit(make(call, implementation)).lower(*arrays).compile()
        except NotImplementedError as error:
            record["error"] = str(error)
            continue
        record["compile_seconds"] = time.perf_counter() - start
        record["temporary_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        if repeats:
            record["milliseconds"] = records.median_milliseconds(
                lambda: jax.block_until_ready(compiled(*arrays)),  # noqa: B023
                repeats,
            )
            if name in least:
                record["least_gigabytes_per_second"] = least[name] / record["milliseconds"] / 1e6
    return found


# ------------------------------------------------------------------ ahead of time, for others


def compile_for_tpu(
    operation: Operation,
    target: str,
    names: Sequence[str],
    *,
    dtype: str | None = None,
    implementation: str = "pallas_tpu",
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Compiles calls of one image, with their gradients, in a separate process.

    Args:
      operation: the operation.
      target: a key of `tpu.TARGETS`.
      names: names of its cases.
      dtype: the operation's first by default.
      implementation: one of the operation's.
      memory: also report figures that depend on XLA's optimisations; takes several times as long.

    Returns:
      Records of {"libtpu", "target", "implementation"}, the labels, `Operation.count`,
      "temporary_bytes", "xla_milliseconds" (XLA's own estimate, without kernels, if the program's
      text has all trip counts) and "compile_seconds".

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      RuntimeError: the compiler refused (with its message).
    """
    dtype = dtype or operation.dtypes[0]
    cases = [[operation.name, name, dtype, implementation] for name in names]
    return tpu.run(__spec__.name, target, cases, memory=memory)


def tpu_report(target: str, request: Sequence[str], dump: pathlib.Path) -> dict[str, Any]:
    """Returns the record of one call; runs in the separate process."""
    name, case_name, dtype, implementation = request
    operation = load(name)
    case = operation.cases[case_name]
    call, trial = operation.call(case, 1, dtype), operation.trial
    function = trial.with_gradients(call, implementation)
    start = time.perf_counter()
    compiled = tpu.compile_for(target, function, trial.abstract_inputs(call))
    seconds = time.perf_counter() - start
    program = compiled.as_text()
    record = {
        **operation.labels(case, dtype),
        "implementation": implementation,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }
    try:
        cycles = tpu.estimated_cycles(program)
        record["xla_milliseconds"] = round(1e3 * cycles / tpu.TARGETS[target].clock, 3)
    except ValueError:  # the text lacks the trips of a loop
        pass
    return record | operation.count(target, case, program, dump)


def compile_for_gpu(
    operation: Operation,
    target: str,
    name: str,
    implementation: str,
    *,
    dtype: str | None = None,
    batch: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Compiles forward and backward pass of a call for a GPU, in a separate process.

    The backward pass is compiled alone: arguments and the output's gradient in, gradients out.

    `target` is one of `gpu.TARGETS`, `name` one of the operation's cases; `options` are those of
    the implementation's function.

    Returns:
      The result of `gpu.run`, with "forward" and, if it has gradients, "backward" of `gpu.serve`.

    Raises:
      NotImplementedError: the implementation does not run on the target.
      ValueError, RuntimeError: see `gpu.run`.
    """
    if implementation not in operation.trial.implementations:
        raise NotImplementedError(f"{operation.name} has no kernel for GPUs")
    request = {
        "operation": operation.name,
        "case": name,
        "implementation": implementation,
        "dtype": dtype or operation.dtypes[0],
        "batch": batch,
        "options": options,
    }
    # Refuses before a process is started.
    with dispatch.tracing_for("gpu", gpu.chip(target).kinds[0]):
        gpu_report(request, lambda _, function, arguments: jax.eval_shape(function, *arguments))
    return gpu.run(__spec__.name, target, request)


def gpu_report(request: Mapping[str, Any], compile_: Callable) -> dict[str, Any]:
    """Returns the record of one call; runs in the separate process."""
    operation = load(request["operation"])
    call = operation.call(operation.cases[request["case"]], request["batch"], request["dtype"])
    trial = operation.trial
    run = functools.partial(trial.function(call, request["implementation"]), **request["options"])
    found = {"forward": compile_("forward", run, call.abstract)}
    if trial.differentiated:
        both = with_gradients(run, trial.differentiated)
        found["backward"] = compile_(
            "backward", lambda *x: both(*x)[1:], trial.abstract_inputs(call)
        )
    return found


def gpu_rows(report: Mapping[str, Any], labels: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the lines of a table for a result of `compile_for_gpu`: one per pass."""
    rows = []
    for name in (name for name in PASSES if name in report):
        kernels = report[name]["kernels"]
        ends = {
            "pass": name,
            "kernels": len(kernels),
            "registers": max((k["registers"] for k in kernels), default=0),
            "spill_bytes": sum(k["spill_bytes"] for k in kernels),
            "temporary_megabytes": report[name]["temp_bytes"] / 1e6,
            "compile_seconds": report[name]["compile_seconds"],
        }
        rows.append({"target": report["target"], **labels, **ends})
    return rows


if __name__ == "__main__":
    asked = process.request()
    if "cases" in asked:
        tpu.serve(asked, tpu_report)
    else:
        gpu.serve(asked, gpu_report)
