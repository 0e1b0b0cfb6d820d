"""Compiles the TPU kernels for TPUs that are not there, and counts their cycles."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

from kernels import tpu_aot
from kernels.tpu_aot import TARGETS

# What `bench --target=... --record` measured; a test holds the kernels to it.
RECORDED = pathlib.Path(__file__).with_name("tpu_cycles.json")


def run(target: str, images: Sequence[tuple[int, int]], *, memory: bool = True) -> Iterator[dict]:
    """Compiles the forward and backward pass of one image each, in a process of its own.

    Args:
      target: a key of TARGETS.
      images: (height, width), as in `shapes.PUBLISHED`.
      memory: whether to report the temporary memory, in twice the time.

    Yields:
      {"libtpu", "target"} and what `report` returns, per image.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      RuntimeError: the compiler refused; with its message.
    """
    return tpu_aot.run(__spec__.name, target, images, memory=memory)


def run_compile_seconds(target: str, images: Sequence[tuple[int, int]]) -> Iterator[dict]:
    """What it takes to compile each kernel by itself, without a schedule being written.

    Args:
      target: a key of TARGETS whose chip holds all tables of a head.
      images: (height, width), as in `shapes.PUBLISHED`.

    Yields:
      {"libtpu", "target", "image", "forward", "backward"}, per image: seconds of processor time of
      all threads to trace, lower and compile a program that is the kernel alone.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      RuntimeError: the compiler refused; with its message.
    """
    cases = [{"compile_seconds": list(image)} for image in images]
    return tpu_aot.run(__spec__.name, target, cases, dump=False)


def compile_seconds(target: str, image: tuple[int, int]) -> dict:
    """What `run_compile_seconds` yields of one image."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu

    from kernels.ms_deform_attn import pallas_tpu, quad_rows, shapes

    call = next(shape for shape in shapes.PUBLISHED if shape.image_size == tuple(image))
    levels = tuple(pallas_tpu.Band(i, 0, h + 1) for i, (h, _) in enumerate(call.spatial_shapes))
    samples = len(levels) * call.points
    tile = quad_rows.tile_size(call.pixels, samples)

    def arguments(value, locations, weights):
        places = pallas_tpu._samples(call.spatial_shapes, tile, locations, weights)
        cells, points = pallas_tpu._select(call.spatial_shapes, levels, *places)
        table = pallas_tpu._table(call.spatial_shapes, levels, value)
        gradient = jnp.zeros((table.shape[0], quad_rows.CHANNELS, cells.shape[-1]), jnp.float32)
        return quad_rows.scalar_order(cells, tile), cells, points, table, gradient

    inputs = [jax.ShapeDtypeStruct(size, jnp.float32) for size in call.shapes(batch=1).values()]
    order, cells, points, table, gradient = jax.eval_shape(arguments, *inputs)

    def kernel(run, *arrays):
        vmem = pltpu.get_tpu_info().vmem_capacity_bytes
        return run(*arrays, levels=len(levels), tile=tile, vmem_bytes=vmem, interpret=False)

    return {
        "image": list(image),
        "forward": tpu_aot.compile_cpu_seconds(
            target, functools.partial(kernel, quad_rows.forward), [order, points, table]
        ),
        "backward": tpu_aot.compile_cpu_seconds(
            target,
            functools.partial(kernel, quad_rows.backward),
            [order, cells, points, table, gradient],
        ),
    }


def _answer(target: str, case, dump: pathlib.Path) -> dict:
    if isinstance(case, dict):
        return compile_seconds(target, tuple(case["compile_seconds"]))
    return report(target, tuple(case), dump)


def report(target: str, image: tuple[int, int], dump: pathlib.Path) -> dict:
    """What the compiler says of one image, 8 heads of 32 channels, float32.

    Returns:
      {"image", "forward", "backward", "temporary_bytes", "compile_seconds"}: per direction
      {"kernels", "cycles", "milliseconds"}, how many kernels there are (one per pass over the
      tables) and their issue cycles on one core (the two of v4 and v5p share the heads, and the
      loops in the schedule are those of one), without cycles if some of the kernels are equal; and
      the temporary memory and the time to compile of the whole operation with its gradients.
    """
    import jax
    import jax.numpy as jnp

    from kernels.ms_deform_attn import pallas_tpu, quad_rows, shapes

    call = next(shape for shape in shapes.PUBLISHED if shape.image_size == tuple(image))
    sizes = call.shapes(batch=1)
    arguments = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes.values()]

    def operation(value, locations, weights):
        return pallas_tpu.ms_deform_attn(value, call.spatial_shapes, locations, weights)

    def with_gradients(*arguments):
        out, pull_back = jax.vjp(operation, *arguments)
        return out, *pull_back(out)

    start = time.perf_counter()
    compiled = tpu_aot.compile_for(target, with_gradients, arguments)
    seconds = time.perf_counter() - start
    result = {
        "image": list(image),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }
    program = compiled.as_text()
    tiles = -(-call.pixels // quad_rows.tile_size(call.pixels, 12))
    for name in ("forward", "backward"):
        found = tpu_aot.schedules(dump, f"ms_deform_attn_{name}")
        calls = tpu_aot.count_calls(program, f"ms_deform_attn_{name}")
        result[name] = {"kernels": calls}
        if len(found) == calls:  # of equal kernels the compiler dumps one
            cycles = sum(tpu_aot.issue_cycles(text, tiles) for text in found)
            result[name]["cycles"] = round(cycles)
            result[name]["milliseconds"] = round(1e3 * cycles / TARGETS[target].clock, 3)
    return result


if __name__ == "__main__":
    tpu_aot.serve(_answer)
