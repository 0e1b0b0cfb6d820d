"""Opens a file of tensors in a process of its own and reads everything: `python child.py FILE`.

Prints JSON: the error and its message or the number of tensors, seconds of processor time, and the
peak of memory in MB. JAX is not imported, so that a process starts in a fraction of a second.
"""

import json
import pathlib
import resource
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


def main(path: str) -> None:
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
    found |= {"seconds": used.ru_utime + used.ru_stime, "megabytes": peak_bytes() >> 20}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
