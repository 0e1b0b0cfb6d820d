"""Hostile files: each is opened in a process of its own, which must end soon with one line."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.weights.attacks_folders import ATTACKS

CHILD = pathlib.Path(__file__).with_name("child.py")
MEGABYTES = 700  # of a process that has 40 after its imports
SECONDS = 10


def opened(path: pathlib.Path) -> dict:
    """What `child.py` says about a file."""
    run = subprocess.run(
        [sys.executable, str(CHILD), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_hostile_file_is_refused_in_one_line(name, tmp_path):
    make, message = ATTACKS[name]
    path = make(tmp_path)
    found = opened(path)
    assert found.get("error") == "FileError", found
    assert re.search(message, found["message"]), found["message"]
    assert str(path)[:-1] in found["message"]
    assert found["message"].isprintable() and len(found["message"]) < 1000, found["message"]
    assert found["megabytes"] < MEGABYTES, found
    assert found["seconds"] < SECONDS, found
