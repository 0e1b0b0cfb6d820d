"""Runs a module in a process of its own: compilers read where their dumps go when they start.

`run` starts the module with a request; its main program takes it by `request`, and gives its result
to `answer`. All pass JSON.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any


def run(
    module: str,
    request: Mapping[str, Any],
    variables: Callable[[str], Mapping[str, str]],
    timeout: float | None = None,
) -> Any:
    """Returns the answer of a module's main program.

    Args:
      module: dotted name.
      request: its "target" is named in errors; the main program gets a "folder" with it.
      variables: makes environment variables of the folder's path.
      timeout: seconds.

    Raises:
      RuntimeError: the process failed (with its output), or took longer.
    """
    target = request["target"]
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps({**request, "folder": folder})
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, text],
                env=os.environ | variables(folder),
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"compiling for {target} took over {timeout} s") from error
        if done.returncode:
            raise RuntimeError(
                f"compiling for {target} failed (exit code {done.returncode}):\n"
                f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        return json.loads(pathlib.Path(folder, "answer.json").read_text("utf-8"))


def request() -> dict[str, Any]:
    """Returns the request for which this process was started."""
    return json.loads(sys.argv[1])


def answer(request: Mapping[str, Any], result: Any) -> None:
    """Gives the result to `run`."""
    pathlib.Path(request["folder"], "answer.json").write_text(json.dumps(result), "utf-8")
