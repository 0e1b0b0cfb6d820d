"""Random damage to prepared datasets: their JSON, their record files, their examples.

    python -m tests.fuzz.test_fuzz_records TARGET COUNT SEED

Each target runs in a child process with a limit of memory, because the reader of the files is C++,
and every case has a limit of time. Allowed are what the loader handles: RecordError for a record,
ValueError and OSError for a description; what is read without an error must be what was written.
"""

import contextlib
import copy
import faulthandler
import functools
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile

import pytest

from tests.peak_memory import peak_bytes

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS, MEMORY = 10, 3 << 30

TARGETS = ("description", "files", "examples")
ODD_VALUES = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**40, -(2**63), 0.5, 1e308, "", "0",
    "-1",
    "train", "../../x", "/etc/passwd", "\x00", "\ud800", "9" * 12, "x" * 5000, [], {}, [[]],
    [None], [0] * 1000, {"": {}}, {"pythonClassName": "os.system"},
)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "count", [200, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_random_damage_is_refused_in_a_known_way(target, count):
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.test_fuzz_records", target, str(count), "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert result.returncode == 0, f"{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
    read, refused = map(int, result.stdout.split()[-2:])
    assert read + refused >= count and refused > count // 4, result.stdout


# -------------------------------------------------------------------------------- the child


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Changes bits, overwrites, cuts, removes, repeats or moves parts of `data`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        first = rng.randrange(len(data) or 1)
        size = min(rng.choice((1, 4, 30, 500, 65_536)), len(data) - first)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[first] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[first : first + size] = rng.randbytes(size)
        elif kind == 2:
            del data[first:]
        elif kind == 3:
            del data[first : first + size]
        elif kind == 4:
            data[first:first] = data[first : first + size]
        elif kind == 5:
            data[first : first + size] = rng.choice((b"\0", b"\xff")) * size
        elif kind == 6:
            data = data[first:] + data[:first]
    return bytes(data)


def damaged_json(rng: random.Random, content) -> str:
    """Replaces, removes, repeats or moves values of a JSON document, or damages its text."""
    if rng.randrange(4) == 0:
        return damaged_bytes(rng, json.dumps(content).encode()).decode("latin-1")
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(content))
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 2:
            other, other_key = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                holder[key] = copy.deepcopy(other[other_key])
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return json.dumps(content)


def _places(content):
    """Every (list or dict, index or key) in a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _child(target: str, count: int, seed: int) -> None:
    from oneformer_jax.input_pipeline import prepared, sources
    from oneformer_jax.input_pipeline.array_records import RecordFiles
    from oneformer_jax.input_pipeline.records import RecordError
    from tests.input_pipeline import prepared_scenes

    rng = random.Random(seed)
    outcomes = {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepared_scenes.make(temporary)
        path = prepared_scenes.train_file(folder)
        source = sources.TfdsSource(folder, "train")
        source[0]  # loads what reading needs
        names = (prepared.DESCRIPTION, prepared.FEATURES, prepared.METADATA)
        texts = {name: (folder / name).read_text() for name in names}
        written, records = path.read_bytes(), prepared_scenes.read_records(path)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

        def description():
            name = rng.choice(names)
            text = damaged_json(rng, json.loads(texts[name]))
            (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
            try:
                yield ValueError, lambda: len(sources.TfdsSource(folder, "train"))
            finally:
                (folder / name).write_text(texts[name])

        def files():
            path.write_bytes(damaged_bytes(rng, written))
            damaged = RecordFiles([str(path)], [len(records)])
            for index, record in enumerate(records):
                yield RecordError, functools.partial(_read, damaged, index, record)

        def examples():
            data = damaged_bytes(rng, rng.choice(records))
            source._files = _OneRecord(data)
            yield RecordError, lambda: source[0]
            yield RecordError, lambda: source.compact(0)

        cases = {"description": description, "files": files, "examples": examples}[target]
        for number in range(count):
            faulthandler.dump_traceback_later(SECONDS, exit=True)  # also out of C++
            for allowed, case in cases():
                try:
                    case()
                    outcomes["read"] += 1
                except (allowed, OSError):
                    outcomes["refused"] += 1
                except BaseException:
                    print(f"{target} {number} of seed {seed}", file=sys.stderr)
                    raise
        faulthandler.cancel_dump_traceback_later()
    print(peak_bytes() >> 20, "MB", *outcomes.values())


def _read(files, index: int, expected: bytes) -> None:
    assert files[index] == expected, "a damaged record was read"


class _OneRecord:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.data

    def where(self, index):
        return "here"


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
