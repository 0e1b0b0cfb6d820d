"""Opens files of tensors, each in a process of its own, and reads everything: `python child.py`.

Takes paths from standard input, one a line. Answers each with a line of JSON: the error and its
message or the number of tensors, seconds of processor time, and the peak of memory in MB; or what
the process died of. The processes are forked after the imports, and JAX is not among these, so that
a process starts at once.
"""

import json
import os
import pathlib
import resource
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
SECONDS = 60  # until a process is killed


def main() -> None:
    from oneformer_jax.weights import files  # noqa: F401, for all processes

    for line in sys.stdin:
        ours, theirs = os.pipe()
        process = os.fork()
        if not process:
            signal.alarm(SECONDS)
            with os.fdopen(theirs, "w") as answer:
                json.dump(opened(line.removesuffix("\n")), answer)
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours) as answer:
            text = answer.read()
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(text if status == 0 else json.dumps({"died of": status}), flush=True)


def opened(path: str) -> dict:
    from oneformer_jax.weights import files
    from tests.peak_memory import peak_bytes

    found = {}
    try:
        tensors = files.open_tensors(path).tensors
        for tensor in tensors.values():
            assert tensor.read().shape == tensor.shape
        found["tensors"] = len(tensors)
    except Exception as error:
        found |= {"error": type(error).__name__, "message": str(error)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    return found | {"seconds": used.ru_utime + used.ru_stime, "megabytes": peak_bytes() >> 20}


if __name__ == "__main__":
    main()
