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


@pytest.fixture(scope="module")
def opened():
    """A function from the path of a file to what `child.py` says about it."""
    command = [sys.executable, str(CHILD)]
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, **streams) as process:

        def ask(path: pathlib.Path) -> dict:
            print(path, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_hostile_file_is_refused_in_one_line(name, tmp_path, opened):
    make, message = ATTACKS[name]
    path = make(tmp_path)
    found = opened(path)
    assert found.get("error") == "FileError", found
    assert re.search(message, found["message"]), found["message"]
    assert str(path)[:-1] in found["message"]
    assert found["message"].isprintable() and len(found["message"]) < 1000, found["message"]
    assert found["megabytes"] < MEGABYTES, found
    assert found["seconds"] < SECONDS, found
