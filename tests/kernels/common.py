"""Shared by the tests of all operations: a quick compiler, given gradients, recorded schedules."""

import functools
import json

import jax
import numpy as np
import pytest

from oneformer_jax.kernels.bench import operation

MIB = 2**20
LIBTPU = "0.0.42.1"  # the version of the figures in docs/kernels.md
# Most of the time of these tests is the compiler's, and its care is wasted on small maps.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def cotangent(shape):
    """The gradient that is given to an output."""
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def check_nothing_travels(compiled, allowed=()):
    """A sharded program has none but the allowed collectives."""
    text = compiled.as_text()
    for kind in {"all-gather", "all-reduce", "all-to-all", "collective-permute"} - set(allowed):
        assert kind not in text, f"{kind} in the sharded program"


def recorded(op: operation.Operation) -> list[dict]:
    return json.loads(op.recorded.read_text("utf-8"))


def check_schedules(op: operation.Operation, target, names, *, dtype=None, memory=False):
    """Kernels of published calls take the recorded cycles and, with `memory`, no more of that."""
    try:
        reports = operation.compile_for_tpu(op, target, names, dtype=dtype, memory=memory)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    for found in reports:
        key = {k: found[k] for k in ("libtpu", "target", "implementation", *op.key)}
        same = [record for record in recorded(op) if key.items() <= record.items()]
        if not same:  # another version of the compiler schedules differently
            pytest.skip(f"no recorded cycles for {key}")
        (known,) = same
        hint = f"{key}: record with python -m oneformer_jax.kernels.bench"
        for name in operation.PASSES[: 2 * bool(op.trial.differentiated)]:
            assert found[name]["kernels"] == known[name].get("kernels", 1), hint
            assert found[name]["cycles"] == pytest.approx(known[name]["cycles"], rel=0.05), hint
        for name in (name for name in known if name.endswith("_cycles")):
            assert found[name] == pytest.approx(known[name], rel=0.05), hint
        if memory and "temporary_bytes" in known:
            assert found["temporary_bytes"] <= 1.05 * known["temporary_bytes"], hint
