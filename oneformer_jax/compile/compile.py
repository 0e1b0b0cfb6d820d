"""Compile mode: the real programs of a run, compiled for accelerators that this machine lacks.

The training step and the two steps of prediction are those of `loop.train`, with the same
shardings. The report tells those that fit into memory; `suggest` looks for settings that fit.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from oneformer_jax.compilation import release_memory
from oneformer_jax.compile import hlo, topologies
from oneformer_jax.compile.topologies import Topology
from oneformer_jax.kernels import chips
from oneformer_jax.models import functional
from oneformer_jax.models.execution import kernels_noted
from oneformer_jax.train import compiled, settings, sharding
from oneformer_jax.train import state as states
from oneformer_jax.train.flops import count_flops

GIB = 2**30
LARGEST = 8  # buffers listed for each program
# Compiler options for a quick answer: the program is slower, and needs other memory. Newer versions
# of JAX have the levels only.
QUICK: Mapping[str, Any] = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": "O0"}
)
TRIM_SECONDS = 1.0  # between returns of free memory, 0.15 s each in a process of 5 GiB
MAX_FSDP = 16  # most devices over which `suggest` shards a parameter


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of one compiled program.

    Attributes:
      name: "training step", "encoding step" or "decoding step".
      fits: True if it was compiled within the memory of a device, resident state included.
      memory: name -> bytes on one device, in the order of printing; without "temporaries" and
        "program" if it does not fit.
      peak: bytes that one device needs; a lower bound if it does not fit.
      limit: bytes that one device has, or None if unknown.
      flops: matrix products and convolutions of one call, over all devices.
      images: images of one call, over all devices.
      sent: kind of communication -> (times, bytes that one device sends) per call.
      collectives: all communications; empty if it does not fit.
      buffers: the largest arrays; empty if it does not fit.
      seconds: time of tracing and compiling, beside other programs.
      quick: compiled with the least effort: the program of a run may need more or less memory.
      kernels: what runs where the config says "auto", as "point_sampling xla".
      program: the compiled program, if it was.
    """

    name: str
    fits: bool
    memory: dict[str, int]
    peak: int
    limit: int | None
    flops: float
    images: int
    sent: dict[str, tuple[int, float]]
    collectives: tuple[hlo.Collective, ...]
    buffers: tuple[hlo.Buffer, ...]
    seconds: float
    quick: bool = False
    kernels: tuple[str, ...] = ()
    program: jax.stages.Compiled | None = dataclasses.field(default=None, repr=False)


# ------------------------------------------------------------------ compiling


def compile_programs(
    config: ConfigDict,
    topology: Topology,
    *,
    num_classes: int,
    text_table: np.ndarray,
    quick: bool = False,
    predict: bool = True,
) -> list[Report]:
    """Compiles the training step and, at the largest padded size, the two steps of prediction.

    The tasks share the encoding step; the decoding step is for one task. Without `predict` only the
    training step is compiled.

    With `quick` the compiler takes a fraction of the time and makes other programs than a run has.
    The run's may need less memory, as they are fused more, or more, as they use free memory.

    Raises:
      ValueError: the config and the devices do not fit each other.
    """
    _check_matcher(config, topology)
    mesh = _mesh(config, topology)
    sharding.check_batches(config.data.batch_size, config.optim.accumulate, mesh)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as beside,
        # The mesh tells kernels for which chip they are compiled.
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    ):
        training = states.make_training(config, num_classes, text_table, mesh)
        state = training.state
        batch = states.abstract_batch(config, mesh)
        parts = {
            "parameters": _bytes_per_device((state["params"], state["stats"])),
            "optimizer": _bytes_per_device(state["opt"]),
            "averages": _bytes_per_device(state.get("ema", {})),
            "batch": _bytes_per_device(batch),
        }
        steps = _trace_prediction(config, training, mesh, topology, quick) if predict else ()
        # The compiler works on these while one core traces the training step.
        prediction = [beside.submit(step) for step in steps]
        train = _trace(
            "training step",
            training.step,
            (state, batch, states.abstract_key(mesh)),
            parts,
            topology,
            config.data.batch_size,
            quick=quick,
        )()
        return [train, *(report.result() for report in prediction)]


def _trace_prediction(
    config: ConfigDict,
    training: states.Training,
    mesh: jax.sharding.Mesh,
    topology: Topology,
    quick: bool,
) -> Iterator[Callable[[], Report]]:
    """Yields the two steps of prediction, each traced on demand; see `_trace`."""
    state = training.state
    programs = functional.programs(
        functional.abstract(training.model, training.execution, training=False).graph, mesh
    )
    params = functional.inference_params(state.get("ema", state["params"]))
    image, image_size, task_tokens = states.abstract_eval_batch(config, mesh)
    features = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=image.sharding),
        jax.eval_shape(programs.encode.jitted, params, state["stats"], image, image_size),
    )
    encoder = {name: params[name] for name in functional.ENCODER_PARTS}
    decoder = {name: tree for name, tree in params.items() if name not in encoder}
    whole = _bytes_per_device(
        {name: state[name] for name in state if name not in ("step", "halted")}
    )
    for name, program, read, arguments in (
        ("encoding step", programs.encode.jitted, (encoder, state["stats"]), (image, image_size)),
        ("decoding step", programs.decode.jitted, decoder, (features, task_tokens)),
    ):
        parts = {
            "parameters": _bytes_per_device(read),
            "rest of the state": whole - _bytes_per_device(read),
            "batch": _bytes_per_device(arguments),
        }
        yield _trace(
            name,
            program,
            (params, state["stats"], *arguments),
            parts,
            topology,
            image.shape[0],
            resident=parts["rest of the state"],
            quick=quick,
        )


def _check_matcher(config: ConfigDict, topology: Topology) -> None:
    on_gpu = topology.devices[0].platform == "gpu"
    if on_gpu and jax.default_backend() != "gpu" and config.kernels.assignment == "scipy":
        raise ValueError(
            f"kernels.assignment is 'scipy': JAX cannot compile a callback for {topology.name} "
            "without these GPUs. Add --config.kernels.assignment=auto; nothing else of the step "
            "changes"
        )


def spare_the_host() -> None:
    """Sets up a process that only compiles."""
    # A program for another machine's device cannot be read back, and one that was cannot be saved.
    jax.config.update("jax_enable_compilation_cache", False)

    # Each of the compiler's threads has its own pool of memory, whose free part is of no use to the
    # others, so it goes back to the system regularly. Two pools for all threads would save 5 % of
    # the memory, but cost up to half as much time again, as threads wait for each other.
    def give_back() -> None:
        while True:
            time.sleep(TRIM_SECONDS)
            release_memory()

    threading.Thread(target=give_back, name="release memory", daemon=True).start()


def _mesh(config: ConfigDict, topology: Topology) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, topology.devices)


def num_eval_sizes(config: ConfigDict) -> int:
    """Bounds the padded sizes for images of any shape: two compiled programs each."""
    # One side is at short_edge and the other anywhere up to max_size, or one is at max_size and the
    # other anywhere up to short_edge.
    multiple = config.eval.bucket_multiple
    return 2 * sharding.round_up(config.eval.max_size, multiple) // multiple - 1


def _bytes_per_device(tree: Any) -> int:
    """Memory of abstract arrays with shardings on one device, without padding."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _trace(
    name: str,
    function: Any,
    arguments: tuple[Any, ...],
    parts: Mapping[str, int],
    topology: Topology,
    images: int,
    *,
    resident: int = 0,
    quick: bool,
) -> Callable[[], Report]:
    """Traces `function`; returns a function that compiles it, in any thread.

    Other arrays take `resident` bytes of every device.
    """
    start = time.perf_counter()
    with kernels_noted() as noted:
        traced = function.trace(*arguments)
    kernels = tuple(sorted(noted))
    flops = count_flops(traced.jaxpr)
    lowered = traced.lower()
    tracing = time.perf_counter() - start

    def compile_it() -> Report:
        start = time.perf_counter()
        memory = {part: size for part, size in parts.items() if size}
        try:
            options = {**topology.options, **(QUICK if quick else {})}
            program = lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            sizes = topologies.out_of_memory(error)
            if sizes is None:
                raise
            need, limit = sizes[0], sizes[1] or topology.memory
            # The compiler names either all of the program's memory or only its temporaries.
            need = max(need, (limit or 0) + 1)
            spent = tracing + time.perf_counter() - start
            known = (name, False, memory, need, limit, flops, images)
            return Report(*known, {}, (), (), spent, quick, kernels)
        stats = program.memory_analysis()
        text = hlo.Program(program.as_text(), len(topology.devices))
        peak = _program_memory(stats, topology)
        peak += stats.generated_code_size_in_bytes + resident
        memory["activations and temporaries"] = peak - (
            sum(memory.values()) + stats.generated_code_size_in_bytes
        )
        memory["program"] = stats.generated_code_size_in_bytes
        collectives = text.collectives()
        return Report(
            name=name,
            fits=topology.memory is None or peak <= topology.memory,
            memory={part: size for part, size in memory.items() if size},
            peak=peak,
            limit=topology.memory,
            flops=flops,
            images=images,
            sent=hlo.sent_by_kind(collectives),
            collectives=tuple(collectives),
            buffers=tuple(text.largest_buffers(LARGEST)),
            seconds=tracing + time.perf_counter() - start,
            quick=quick,
            kernels=kernels,
            program=program,
        )

    return compile_it


def _program_memory(stats: Any, topology: Topology) -> int:
    """Bytes of one device for arguments, results and temporaries, without code."""
    if topology.devices[0].platform == "tpu":
        # The figure that its compiler compares with the memory. The size of the temporaries adds
        # up arrays that never coexist, and exceeds the memory even for programs that fit.
        return stats.peak_memory_in_bytes
    # On other devices the temporaries are one piece of memory, with gaps.
    return (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )


# ------------------------------------------------------------------ the report


def describe(config: ConfigDict, topology: Topology, reports: list[Report]) -> str:
    """Formats the report for a screen."""
    mesh = _mesh(config, topology)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    each = "" if topology.memory is None else f", {_gib(topology.memory)} each"
    lines = [f"{topology.name}: {mesh.size} devices ({topology.kind}), mesh {axes}{each}"]
    for report in reports:
        lines += ["", *_describe_one(report, topology)]
    if kernels := sorted({kernel for report in reports for kernel in report.kernels}):
        lines += [
            "",
            f"kernels: {', '.join(kernels)}. This is the static preference: a run asks its device "
            "at the first start",
        ]
    lines += [
        "",
        "programs: 1 training step; 1 encoding and 1 decoding step for each padded size of the "
        f"images (at most {num_eval_sizes(config)} with these eval.short_edge, max_size and "
        "bucket_multiple)",
    ]
    return "\n".join(lines)


def _describe_one(report: Report, topology: Topology) -> Iterator[str]:
    yield f"{report.name}: {verdict(report)}   ({report.seconds:.0f} s to compile)"
    yield "  memory of a device   " + ", ".join(
        f"{part} {_gib(size)}" for part, size in report.memory.items()
    )
    rate = chips.peak_flops(topology.devices[0])
    flops = (
        f"  FLOPs                {_si(report.flops)} a call of {report.images} images, "
        f"{_si(report.flops / report.images)} an image"
    )
    if rate:
        seconds = report.flops / (rate * len(topology.devices))
        flops += f"; {1e3 * seconds:.3g} ms at the peak rate of {_si(rate)}/s a device"
    yield flops
    if not report.fits and not report.buffers:
        return
    sent = ", ".join(
        f"{kind} {_mib(size)} in {count}" for kind, (count, size) in report.sent.items()
    )
    yield f"  sent by a device     {sent or 'nothing'}"
    yield "  largest buffers"
    for buffer in report.buffers:
        times = f" x {buffer.count}" if buffer.count > 1 else ""
        place = buffer.source or buffer.name or "(the compiler's own)"
        yield f"    {_mib(buffer.bytes):>12}{times:<6} {buffer.shape}  {place}"


def verdict(report: Report) -> str:
    """Returns "fits, 9.1 of 15.8 GiB, 6.7 GiB free" and the like."""
    if report.limit is None:
        return f"compiled, {_gib(report.peak)}"
    used = f"{_gib(report.peak)} of {_gib(report.limit)}"
    if report.fits:
        how = "fits as compiled with --quick" if report.quick else "fits"
        return f"{how}, {used}, {_gib(report.limit - report.peak)} free"
    if report.quick:
        return f"MAY NOT FIT, {used} as compiled with --quick: compile without --quick to know"
    return f"DOES NOT FIT, {used}, {_gib(report.peak - report.limit)} too much"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**16 else f"{size / 2**10:,.2f} KiB"


def _si(value: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}FLOP"
    return f"{value:.3g} FLOP"


# ------------------------------------------------------------------ advice


def candidates(config: ConfigDict, num_devices: int) -> Iterator[dict[str, Any]]:
    """Yields overrides that lower the memory of a step, cheapest first.

    Sharding costs communication, and recomputation about a third of the step's time. Accumulation
    changes the pairs of the contrastive loss, and a smaller batch changes the recipe.
    """
    fsdp = max(n for n in range(1, min(num_devices, MAX_FSDP) + 1) if num_devices % n == 0)
    shard = {"mesh.data": -1, "mesh.fsdp": fsdp} if fsdp > config.mesh.fsdp else {}
    remat = {} if config.model.remat else {"model.remat": True}
    if shard:
        yield shard
    if remat:
        yield remat
    if shard and remat:
        yield shard | remat
    size, parts = config.data.batch_size, config.optim.accumulate
    for count in range(parts + 1, size // num_devices + 1):
        if size % count == 0 and (size // count) % num_devices == 0:
            yield shard | remat | {"optim.accumulate": count}
    for smaller in range(size - num_devices, 0, -num_devices):
        if smaller % parts == 0 and (smaller // parts) % num_devices == 0:
            yield shard | remat | {"data.batch_size": smaller}


def advice(config: ConfigDict, topology: Topology) -> str:
    """Lists settings to try if a step does not fit."""
    options = [as_flags(c) for c in candidates(config, len(topology.devices))]
    if not options:
        return "no setting lowers its memory further on these devices: use more or larger ones"
    return "--suggest tries, one after the other:\n  " + "\n  ".join(options)


def as_flags(overrides: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def suggest(
    config: ConfigDict,
    topology: Topology,
    *,
    num_classes: int,
    text_table: np.ndarray,
    quick: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Returns the first of `candidates` with which all programs compile and fit, or None."""
    for overrides in candidates(config, len(topology.devices)):
        trial = ConfigDict(copy.deepcopy(config.to_dict()))
        trial.update_from_flattened_dict(overrides)
        reports = compile_programs(
            trial, topology, num_classes=num_classes, text_table=text_table, quick=quick
        )
        worst = next((r for r in reports if not r.fits), reports[0])
        log(f"{as_flags(overrides)}\n  {worst.name}: {verdict(worst)}")
        if worst.fits:
            return overrides
    return None


def run(
    config: ConfigDict,
    *,
    num_classes: int,
    text_table: np.ndarray,
    topology: Topology,
    try_others: bool = False,
    quick: bool = False,
    save: str = "",
    log: Callable[[str], None] = print,
) -> bool:
    """Compiles, prints the report and the advice; returns True if everything fits as configured.

    Then the training step is written to `save`, if that names a file; the first process does it.

    Raises:
      ValueError: the config and the devices do not fit each other, or the step cannot be saved.
    """
    config = settings.checked(config)
    if save:
        if quick:
            raise ValueError("--quick makes other programs than a run has: save without it")
        compiled.check_target(save, config)
    options = dict(num_classes=num_classes, text_table=text_table, quick=quick)
    reports = compile_programs(config, topology, **options)
    log(describe(config, topology, reports))
    if all(report.fits for report in reports):
        if save and jax.process_index() == 0:
            log(f"\n{_save(save, config, topology, reports[0], num_classes, text_table)}")
        return True
    log(f"\nnot saved in {save}, since it does not fit\n" if save else "")
    if not try_others:
        log(advice(config, topology))
    elif (found := suggest(config, topology, **options, log=log)) is not None:
        log(f"\nfits with {as_flags(found)}")
    else:
        log("\nnone of the settings tried fits: use more or larger devices")
    return False


def _save(
    path: str,
    config: ConfigDict,
    topology: Topology,
    report: Report,
    num_classes: int,
    text_table: np.ndarray,
) -> str:
    """Saves the training step and says how it is taken."""
    mesh = _mesh(config, topology)
    training = states.make_training(config, num_classes, text_table, mesh)
    figures = dict(flops=report.flops, seconds=report.seconds)
    digest = compiled.save(path, report.program, training, config, mesh, text_table, **figures)
    size = os.path.getsize(os.path.expanduser(path))
    return (
        f"saved the training step, {_mib(size)}; a training on {topology.name} with these settings "
        f"takes it with\n  --compiled={path}@{digest}"
    )
