"""Traffic of a device in a step: nothing large, and no more on 256 devices than on 8."""

import pathlib
import subprocess
import sys

import pytest

from tests.compile.test_compile import needs_libtpu

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("cpu:8", "cpu:64", "cpu:256"),
        pytest.param(("v5e:2x4", "v5e:8x8", "v5e:16x16", "v5e:2x4/2"), marks=needs_libtpu),
    ],
)
def test_what_a_device_sends_does_not_grow_with_their_number(names):
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile.growth", *names],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" devices: ") == len(names)
    assert "does not grow" in done.stdout
