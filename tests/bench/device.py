"""All that a GPU or TPU is needed for, in order of worth, within a budget of seconds.

    python -m tests.bench.device --budget=480 --output=runs/device
    python -m tests.bench.device --dry               # the same on a processor, as small as can be

1. which device it is; 2. the on-device tests of every kernel; 3. calibration of every operation at
its published calls; 4. the peers' table at Swin-T and Swin-L, where they are installed; 5. a
training of the synthetic default with its scores.

Each step is a process of its own that is ended when its seconds are over. OUTPUT/device.json is
written anew after every result, and OUTPUT/STEP.log as the step goes, so that a run that is cut off
keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from oneformer_jax.files import FileError, read_json, write_atomically

ROOT = pathlib.Path(__file__).resolve().parents[2]
GRACE_SECONDS = 3.0  # between SIGTERM and SIGKILL
LEAST_SECONDS = 5.0  # less are not enough for a step
TAIL = 40  # lines of a log that the JSON keeps
ENDED = 75  # exit code of a process that gave up a kernel, and goes on without it when started anew


@dataclasses.dataclass(frozen=True)
class Step:
    """A process of the run.

    Attributes:
      name: of its log, and in the JSON.
      command: what follows "python".
      share: the most of the seconds that are left.
      result: reads what the process wrote, also if it was cut off.
      needs: a package without which the step is left out.
    """

    name: str
    command: Sequence[str]
    share: float = 1.0
    result: Callable[[], Any] = lambda: None
    needs: str = ""


def steps(output: pathlib.Path, dry: bool) -> Iterator[Step]:
    """Yields the steps, most worth first."""
    here = ("-m", __spec__.name, f"--output={output}", *(("--dry",) if dry else ()))
    yield Step("device", (*here, "--step=device"), 0.25, _json(output / "facts.json"))
    tests = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/kernels", "-k", "on_device")
    yield Step("on_device_tests", tests, 0.4)
    found = output / "calibration.json"
    yield Step("calibration", (*here, "--step=calibration"), 0.5, _json(found))
    for size in ("tiny",) if dry else ("swin_t_1024", "swin_l_1024"):
        found = output / f"{size}.json"
        peers = ("-m", "tests.bench.peers", f"--sizes={size}", "--rounds=1", f"--json={found}")
        peers += ("--works=forward", "--repeats=1") if dry else ()
        yield Step(f"peers_{size}", peers, 0.5, _json(found), needs="transformers")
    run = output / "synthetic"
    command = ["main.py", "--config=synthetic", f"--workdir={run}", "--mode=train"]
    if dry:
        scenes = {"size": 64, "train_examples": 4, "validation_examples": 2}
        tiny = {"dataset.options": scenes, "dataset.data_dir": output / "data"}
        tiny |= {"data.crop_size": (64, 64), "data.batch_size": 2, "train.steps": 1}
        tiny |= {"eval.token_table": False, "eval.batch_size": 2, "eval.short_edge": 64}
        tiny |= {"eval.max_size": 64, "train.pictures": 0}
        command += [f"--config.{key}={value}" for key, value in tiny.items()]
    yield Step("training", command, 1.0, lambda: _scores(run))


def _json(path: pathlib.Path) -> Callable[[], Any]:
    return lambda: read_json(path)


def _scores(run: pathlib.Path) -> dict[str, Any]:
    """The results of the last evaluation, the last line of the log of metrics, and the kernels."""
    paths = sorted(run.glob("eval/*/results.json"), key=lambda path: int(path.parent.name))
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    kernels = run / "kernels.json"
    return {
        "results": read_json(paths[-1]) if paths else None,
        "metrics": json.loads(lines[-1]) if lines else None,
        "kernels": read_json(kernels) if kernels.exists() else None,
    }


# ------------------------------------------------------------------ the run


def carry_out(
    every: Sequence[Step], output: pathlib.Path, budget: float, **facts: Any
) -> dict[str, Any]:
    """Runs the steps one after the other; returns the record, which is also in device.json.

    Args:
      every: the steps.
      output: folder of the record and the logs.
      budget: seconds for all of them.
      **facts: written into the record.
    """
    end = time.monotonic() + budget
    record: dict[str, Any] = {**facts, "budget_seconds": budget, "steps": []}
    for step in every:
        found = {"name": step.name, "command": ["python", *map(str, step.command)]}
        record["steps"].append(found)
        left = end - time.monotonic()
        if step.needs and importlib.util.find_spec(step.needs) is None:
            found["verdict"] = f"left out: {step.needs} is not installed"
        elif left < LEAST_SECONDS:
            found["verdict"] = "left out: no time was left"
        else:
            found |= _run(step, output, left * step.share)
        write_atomically(output / "device.json", json.dumps(record, indent=1) + "\n")
        print(f"{step.name}: {found['verdict']}", flush=True)
    return record


def leave_at_signals() -> None:
    """Lets signals end a step with this process; a background job of a shell ignores SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def _run(step: Step, output: pathlib.Path, seconds: float) -> dict[str, Any]:
    """Runs a step, again as long as it gives up kernels; returns what is known of it."""
    start = time.monotonic()
    log = output / f"{step.name}.log"
    log.unlink(missing_ok=True)
    code: int | None = ENDED
    while code == ENDED and (left := seconds - (time.monotonic() - start)) > 0:
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, step.command)],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            code = _wait(process, left)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "code": code}
    found["verdict"] = "done" if code == 0 else f"failed with exit code {code}"
    if code is None:
        found["verdict"] = f"cut off after {seconds:.0f} s"
    try:
        found["result"] = step.result()
    except (FileError, OSError, ValueError, LookupError) as error:
        found["result"] = None
        found["no_result"] = str(error)
    text = log.read_text("utf-8", errors="replace")
    return found | {"tail": text.splitlines()[-TAIL:]}


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Waits for a process, and ends it and all that it started when its seconds are over: None."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return None
    finally:  # also where this process is interrupted
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ------------------------------------------------------------------ the processes


def write_facts(path: pathlib.Path) -> None:
    """Writes which devices there are, and the versions."""
    import jax

    from oneformer_jax.kernels.calibrate import environment_of

    device = jax.local_devices()[0]
    facts = {**environment_of(device), "devices": jax.device_count(), "platform": device.platform}
    write_atomically(path, json.dumps(facts, indent=1) + "\n")
    print(f"{facts['devices']} x {facts['device']}")


def calibrate(output: pathlib.Path, dry: bool) -> None:
    """Tries every candidate at the published calls; calibration.json has all lines so far."""
    from oneformer_jax.kernels import calibrate

    rows: list[Mapping[str, Any]] = []
    device_store = calibrate.open_store(output / "kernels", print)
    for call, differentiated in published_calls(dry):
        calibrate.try_calls([call], differentiated, device_store, 3600.0)
        rows += calibrate.known_rows(call, differentiated, device_store)
        write_atomically(output / "calibration.json", json.dumps({"table": rows}, indent=1) + "\n")
    print(calibrate.as_text(rows))


def published_calls(dry: bool) -> list[tuple[Any, bool]]:
    """Lists the "auto" calls of an image, and that their gradients are taken; dry: the smallest.

    The operations take turns, so that a run that is cut off has some of each.
    """
    from oneformer_jax.kernels import choice
    from oneformer_jax.kernels.bench import operation

    by_operation = []
    for op in map(operation.load, choice.OPERATIONS):
        calls = [op.call(case, 1, dtype) for case in op.cases.values() for dtype in op.dtypes]
        if dry:
            calls = [min(calls, key=lambda call: sum(x.size for x in call.abstract))]
        by_operation.append(list(dict.fromkeys(calls)))
    longest = max(map(len, by_operation))
    return [(calls[i], True) for i in range(longest) for calls in by_operation if i < len(calls)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/device"))
    parser.add_argument("--dry", action="store_true", help="on a processor, as small as can be")
    parser.add_argument("--only", default="", help="names of steps, with commas between")
    parser.add_argument("--step", choices=("device", "calibration"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if options.step == "device":
        write_facts(output / "facts.json")
        return 0
    if options.step == "calibration":
        calibrate(output, options.dry)
        return 0
    if options.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:  # the tests take a processor where nothing is said
        os.environ.setdefault("JAX_PLATFORMS", "")
    every = list(steps(output, options.dry))
    names = [step.name for step in every]
    chosen = options.only.split(",") if options.only else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--only {','.join(unknown)}: use some of {','.join(names)}")
    leave_at_signals()
    record = carry_out(
        [step for step in every if step.name in chosen], output, options.budget, dry=options.dry
    )
    print(f"All of it is in {output / 'device.json'}")
    return 0 if all(step["verdict"].startswith(("done", "left")) for step in record["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
