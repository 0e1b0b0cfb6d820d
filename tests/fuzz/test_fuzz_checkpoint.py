"""Mutated runs of strangers: no crash, no hang, no error but the one that names the file."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MEGABYTES = 1500


def mutate(kind: str, count: int, folder: pathlib.Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.checkpoint_mutations", kind, "0", str(count), folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, f"died of {run.returncode}\n{run.stderr[-3000:]}"
    found = json.loads(run.stdout.splitlines()[-1])
    print(f"\n{kind}: {found['read']} read, {found['refused']} refused, {found['megabytes']} MB")
    assert not found["faults"], "\n".join(f"{i}: {text}" for i, text in found["faults"][:5])
    assert found["read"] and found["refused"], "the mutations try nothing"
    assert found["megabytes"] < MEGABYTES


@pytest.mark.parametrize(("kind", "count"), [("small", 300), ("whole", 50)])
def test_some_mutations(kind, count, tmp_path):
    mutate(kind, count, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("small", 10_000), ("whole", 400)])
def test_many_mutations(kind, count, tmp_path):
    mutate(kind, count, tmp_path)
