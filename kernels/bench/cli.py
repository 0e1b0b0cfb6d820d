"""Times the implementations of an operation at its published calls.

    python -m oneformer_jax.kernels.bench ms_deform_attn                # on this device
    python -m oneformer_jax.kernels.bench ms_deform_attn --target=v5e   # compile for another

On a device: the median time by pass, the temporary memory and the time to compile. Ahead of time:
static issue cycles (TPU), or registers and spills (GPU), and memory; nothing is timed.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from oneformer_jax.kernels import choice
from oneformer_jax.kernels.bench import gpu, operation, records, tpu


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m oneformer_jax.kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operation", choices=choice.OPERATIONS)
    parser.add_argument("--target", choices=[*tpu.TARGETS, *gpu.TARGETS])
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="may hold *; default: all")
    parser.add_argument("--implementations", nargs="+", metavar="NAME")
    parser.add_argument("--dtype", help="default: the first of the operation")
    parser.add_argument("--batch", type=_at_least(1), default=1, help="images (TPU: always 1)")
    parser.add_argument("--repeats", type=_at_least(0), default=20, help="0: memory only")
    parser.add_argument("--json", type=pathlib.Path, help="also write the records to this file")
    parser.add_argument(
        "--record", action="store_true", help="store a TPU target's cycles for the tests"
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="TPU targets: cycles only, in half the time"
    )
    options = parser.parse_args(arguments)
    op = operation.load(options.operation)
    for name in ("record", "no_memory"):
        if getattr(options, name) and options.target not in tpu.TARGETS:
            parser.error(f"--{name.replace('_', '-')} needs a --target that is a TPU")
    patterns = options.cases or ["*"]
    if unknown := [p for p in patterns if not fnmatch.filter(op.cases, p)]:
        parser.error(f"--cases {' '.join(unknown)}: use any of {' '.join(op.cases)}")
    if options.dtype not in (None, *op.dtypes):
        parser.error(f"--dtype {options.dtype}: use one of {' '.join(op.dtypes)}")
    known = [*op.trial.implementations, *(() if options.target else op.rivals)]
    if unknown := [name for name in options.implementations or () if name not in known]:
        parser.error(f"--implementations {' '.join(unknown)}: use any of {' '.join(known)}")
    options.cases = [name for name in op.cases if any(fnmatch.fnmatch(name, p) for p in patterns)]
    options.dtype = options.dtype or op.dtypes[0]
    if not options.implementations:
        kernels = {"pallas_tpu"} if options.target in tpu.TARGETS else {"pallas_gpu", "xla"}
        options.implementations = [n for n in known if not options.target or n in kernels]
    try:
        found = list(_found(op, options))
        print(records.table(found))
        if line := op.summary(found):
            print(line)
        if options.json is not None:
            records.write(options.json, found)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


def _found(op: operation.Operation, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the lines of the table that the options ask for."""
    if options.target in tpu.TARGETS:
        for implementation in options.implementations:
            reports = operation.compile_for_tpu(
                op,
                options.target,
                options.cases,
                dtype=options.dtype,
                implementation=implementation,
                memory=not options.no_memory,
            )
            if options.record:
                records.keep(op.recorded, reports, ("libtpu", "target", "implementation", *op.key))
            for name, report in zip(options.cases, reports, strict=True):
                yield from op.predict(report, op.cases[name])
        return
    settings = {"batch": options.batch, "dtype": options.dtype}
    for name, implementation in itertools.product(options.cases, options.implementations):
        if options.target:
            report = operation.compile_for_gpu(op, options.target, name, implementation, **settings)
            labels = op.labels(op.cases[name], options.dtype) | {"implementation": implementation}
            yield from operation.gpu_rows(report, labels)
        else:
            yield from operation.measure(
                op, op.cases[name], implementation, repeats=options.repeats, **settings
            )
