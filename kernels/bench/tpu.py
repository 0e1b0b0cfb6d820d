"""Compiles for TPUs without having one, and counts the cycles of the compiled kernels.

libtpu (`pip install "jax[tpu]"`) holds the whole compiler, so a machine without a TPU can compile
for one. With its dump flags it also writes the final schedule of every kernel: a list of bundles,
one issued per cycle. Bundles times the trip counts of the loops around them are the kernel's issue
cycles, without waits for memory.

The flags must be in the environment before JAX starts, so reports come from a process of their own
(`process`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oneformer_jax.kernels.bench import process
from oneformer_jax.kernels.chips import TPU_COMPILER, TPUS

# Fields of the reports that depend on XLA's optimisations.
OF_XLA = ("temporary_bytes", "xla_milliseconds")
MISSING = 'libtpu is not installed (pip install "jax[tpu]")'
TARGETS = TPUS


def run(
    module: str, target: str, cases: Sequence[Any], *, memory: bool = True
) -> list[dict[str, Any]]:
    """Runs `module`, with `serve` as its main program, in a process that dumps its schedules.

    Args:
      module: dotted name.
      target: a key of TARGETS.
      cases: passed to the module as JSON, for a report each.
      memory: False skips XLA's own optimisations, which takes half the time and changes nothing
        about the kernels.

    Returns:
      The module's report of each case; without `memory` it lacks the fields `OF_XLA`.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      RuntimeError: the compiler refused (with its message).
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(MISSING)

    def variables(folder: str) -> dict[str, str]:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        found = TPU_COMPILER | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        return found if memory else found | {"JAX_OPTIMIZATION_LEVEL": "O0"}

    reports = process.run(module, {"target": target, "cases": list(cases)}, variables)
    left_out = () if memory else OF_XLA
    return [{k: v for k, v in report.items() if k not in left_out} for report in reports]


def serve(
    request: Mapping[str, Any], report: Callable[[str, Any, pathlib.Path], dict[str, Any]]
) -> None:
    """Runs the main program of a module that `run` starts.

    Args:
      request: of `process.request`.
      report: called with the target, the case and the folder of the case's dumps. The version of
        the compiler and the target are added to its result.
    """
    target, dump = request["target"], pathlib.Path(request["folder"])
    known = {"libtpu": importlib.metadata.version("libtpu"), "target": target}
    found = []
    for case in request["cases"]:
        found.append(known | report(target, case, dump))
        for file in dump.iterdir():
            file.unlink()
    process.answer(request, found)


def schedules(dump: pathlib.Path, kernel: str) -> list[str]:
    """Finds the final bundles of the kernels of a name; the compiler dumps equal ones once."""
    files = sorted(dump.glob(f"*{kernel}*-final_bundles.txt"))
    return [f.read_text(errors="replace") for f in files if "schedule-analysis" not in f.name]


def count_calls(program: str, kernel: str) -> int:
    """Returns the number of calls of the kernels of that name in a compiled program's text."""
    # JAX may put a transformation around the name, "%jvp_kernel_.1"; jax 0.12 appends an operand's
    # name, "%kernel.1.gradient_ref".
    return len(re.findall(rf"%(?:\w+_)?{kernel}_*(?:\.\w+)* = ", program))


def compile_for(target: str, function, arguments):
    """Returns the compiled program of `function` for one chip of `target`."""
    import jax
    from jax.sharding import Mesh, SingleDeviceSharding

    device = _device(target)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        list(arguments),
    )
    # The mesh tells Pallas which chip to compile for.
    mesh = Mesh([device], ("chip",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower().compile()


@functools.cache
def _device(target: str):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=TARGETS[target].one_chip,
        chips_per_host_bounds=[1, 1, 1],
    )
    return topology.devices[0]


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_WHILE = re.compile(r"while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")


def estimated_cycles(program: str) -> int:
    """XLA's own estimate of a program for a TPU, without kernels, loops times their trips.

    The text of the optimised program has the estimates by which the compiler schedules. Their
    accuracy is unknown; they exclude copies that run beside other work.

    Raises:
      ValueError: a loop's condition has no constant trip count.
    """
    own, loops, limits, entry, name = {}, {}, {}, "", ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            own[name], loops[name], limits[name] = 0, [], []
            entry = name if match[1] else entry
        elif name:
            own[name] += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)))
            limits[name] += map(int, re.findall(r"= s32\[\]\S* constant\((\d+)\)", line))
            loops[name] += _WHILE.findall(line)

    def total(name: str) -> int:
        cycles = own[name]
        for condition, body in loops[name]:
            if len(limits[condition]) != 1:
                raise ValueError(f"no trip count for the loop of {body}")
            cycles += limits[condition][0] * total(body)
        return cycles

    return total(entry)


BRANCH_DELAY = 4  # bundles after a branch that still run
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_BRANCH = re.compile(r"sbr\.rel \(!?%(p\d+)_p\d+\) target = \$region(\d+)")
_TRIPS = r"%{}_p\d+ = scmp\.ge\.s32\.totalorder %s\d+_s\d+, (\d+) /\* loop exit test"


def issue_cycles(text: str, tiles: int = 1, steps: float | None = None) -> float:
    """Cycles of a kernel from its final bundles: each bundle times the trips of its loops.

    Code under a condition counts as if it always ran, except loops that only store: they zero an
    array in the first of the `tiles` grid steps that share it.

    Args:
      text: the compiler's dump.
      tiles: see above.
      steps: trips of loops that end by a condition on data.

    Raises:
      ValueError: the text lacks a loop's trip count, and no `steps` were given.
    """
    bundles = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:  # some bundles take several lines
            bundles[-1] += line
    weights = [1.0] * len(bundles)
    for i, bundle in enumerate(bundles):
        for predicate, region in _BRANCH.findall(bundle):
            mark = re.compile(rf"Start region {region}\b")
            start = next((j for j in range(i, -1, -1) if mark.search(bundles[j])), None)
            if start is None:  # forward: a condition
                continue
            end = i + BRANCH_DELAY
            body = "\n".join(bundles[start : end + 1])
            count = re.search(_TRIPS.format(predicate), body)
            if count is None and steps is None:
                raise ValueError(f"no trip count for the loop of region {region}")
            trips = float(count.group(1)) if count else steps
            if " vst " in body and " vld " not in body:
                trips /= tiles
            for j in range(start, end + 1):
                weights[j] *= trips
    return sum(weights)
