"""Compiles neighbourhood attention for TPUs that are not there: cycles, memory and traffic."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

from kernels import tpu_aot
from kernels.neighborhood_attention.shapes import CallShape
from kernels.tpu_aot import TARGETS

# What `bench --target=... --record` measured; a test holds the kernels to it.
RECORDED = pathlib.Path(__file__).with_name("tpu_cycles.json")
# The fields that tell one record from another.
KEY = ("libtpu", "target", "implementation", "map", "heads", "kernel_size", "dilation")


def run(
    target: str,
    calls: Sequence[CallShape],
    *,
    implementation: str = "pallas_tpu",
    memory: bool = True,
) -> Iterator[dict]:
    """Compiles the forward and backward pass of one image each, in a process of its own.

    Args:
      target: a key of TARGETS.
      calls: as of `shapes.ModelShape.calls`.
      implementation: what to compile.
      memory: whether to report memory, traffic and XLA's part, in several times the time.

    Yields:
      {"libtpu", "target"} and what `report` returns, per call.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      RuntimeError: the compiler refused; with its message.
    """
    cases = [dataclasses.asdict(call) | {"implementation": implementation} for call in calls]
    return tpu_aot.run(__spec__.name, target, cases, memory=memory)


def report(target: str, case: dict, dump: pathlib.Path) -> dict:
    """What the compiler says of one image, heads of 32 channels, bfloat16.

    Returns:
      {"map", "heads", "kernel_size", "dilation", "blocks", "implementation"} of the case. Of the
      forward pass with gradients "temporary_bytes", "xla_milliseconds" (what XLA estimates of all
      but the kernels), "compile_seconds", and, unless it has loops, whose bodies XLA counts once,
      "traffic_bytes" (read and written by all its parts, as XLA counts). For the kernels, in
      "forward" and "backward", {"cycles", "milliseconds"}: issue cycles of one core (the two of v4
      and v5p share the groups of heads, and the loops in the schedule are those of one).
    """
    import jax
    import jax.numpy as jnp

    from kernels.neighborhood_attention import api

    implementation = case["implementation"]
    fields = {field.name: case[field.name] for field in dataclasses.fields(CallShape)}
    call = CallShape(**fields)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in call.shapes(batch=1)]
    operation = functools.partial(
        api.neighborhood_attention,
        kernel_size=call.kernel_size,
        dilation=call.dilation,
        implementation=implementation,
    )

    def with_gradients(gradient, *arguments):
        out, pull_back = jax.vjp(operation, *arguments)
        return out, *pull_back(gradient)

    start = time.perf_counter()
    compiled = tpu_aot.compile_for(target, with_gradients, [arguments[0], *arguments])
    seconds = time.perf_counter() - start
    program, clock = compiled.as_text(), TARGETS[target].clock
    result = {
        "map": [call.height, call.width],
        "heads": call.heads,
        "kernel_size": call.kernel_size,
        "dilation": call.dilation,
        "blocks": call.blocks,
        "implementation": implementation,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "xla_milliseconds": round(1e3 * tpu_aot.estimated_cycles(program) / clock, 3),
        "compile_seconds": round(seconds, 1),
    }
    if " while(" not in program:
        result["traffic_bytes"] = round(compiled.cost_analysis()["bytes accessed"])
    if implementation == "pallas_tpu":
        for name in ("forward", "backward"):
            (text,) = tpu_aot.schedules(dump, f"neighborhood_attention_{name}")
            cycles = tpu_aot.issue_cycles(text, tiles=1)
            result[name] = {
                "cycles": round(cycles),
                "milliseconds": round(1e3 * cycles / clock, 3),
            }
    return result


if __name__ == "__main__":
    tpu_aot.serve(report)
