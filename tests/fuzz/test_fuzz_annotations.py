"""Mutated annotation files: a clear error or a right reading, in bounded time and memory.

The quick suite tries a few hundred of each reader; `make test-all` 10,000, in a child process
whose memory is limited.
"""

import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

import pytest

from tests.input_pipeline import annotation_cases as cases

READERS = ("panoptic", "instances", "truth", "filter")
_MEMORY = 3 << 30  # address space of a child, most of it libraries
_SECONDS = 10  # for one file
_TOKENS = [
    b"NaN", b"-Infinity", b"null", b"true", b'"x"', b"[]", b"{}", b"-1", b"1e999", b"1e308", b"0",
    b"99999999999999999999", b"1.5", b"[[[[", b'"\\u0000"', b'"\\ud800"', b"\xff", b",", b"]", b"}",
]  # fmt: skip


def _values(rng: random.Random):
    return rng.choice(
        [*cases.SPOILED.values(), "", "NaN", "\0", "1" * 5000, [1, [2, [3]]], [[1, 2]], {"id": 1},
         0, 1, 2, 7, -0.0, 1e9, -1e9, 1 << 24, 1 << 31, 1 << 63, False, [[0, 0, 1e7, 1e7] * 3]]
    )  # fmt: skip


def mutated(content: dict, rng: random.Random) -> bytes:
    """A few values replaced, moved or removed, or the text itself damaged."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(cases.places(content))
        if not places:
            break
        path = rng.choice(places)
        if rng.random() < 0.2:  # a value from somewhere else
            value = content
            for key in rng.choice(places):
                value = value[key]
        else:
            value = _values(rng)
        content = cases.spoiled(content, path, value)
    data = cases.dump(content).encode()
    if rng.random() < 0.4:
        for _ in range(rng.choice((1, 1, 3))):
            at, length = rng.randrange(len(data)), rng.choice((0, 1, 5))
            token = rng.choice(_TOKENS) if rng.random() < 0.7 else rng.randbytes(3)
            data = data[:at] + token + data[at + length :]
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))]
    return data


def read(reader: str, folder: pathlib.Path, file: pathlib.Path) -> str:
    """Reads all that a program would; "read" or "refused". Other errors than ours get out."""
    from oneformer_jax.eval.metrics.instance_json import InstanceAnnotations
    from oneformer_jax.input_pipeline.builders.coco import images_with_instances
    from oneformer_jax.input_pipeline.records import RecordError
    from oneformer_jax.types import Metadata

    shape = (cases.HEIGHT, cases.WIDTH)
    try:
        if reader == "filter":
            images_with_instances(file)
        elif reader == "truth":
            metadata = Metadata("two", ("cat", "dog"), (True, True), ((0, 0, 0),) * 2, (7, 30))
            truth = InstanceAnnotations(file, metadata)
            truth.masks("1", shape), truth.masks("2", shape)
        else:
            for skip_broken in (False, True):
                source = cases.opened(reader, folder, file, skip_broken=skip_broken)
                for index in range(len(source)):
                    source.has_things(index)
                    try:
                        record = source[index]
                    except RecordError as error:
                        assert "\n" not in str(error) and len(str(error)) < 2000
                        continue
                    for segment in record["segments"]:
                        assert segment["area"] == (record["panoptic"] == segment["id"]).sum() > 0
    except ValueError as error:
        assert str(file) in str(error) and len(str(error)) < 5000, error
        return "refused"
    return "read"


def run(reader: str, count: int, seed: int) -> dict[str, int]:
    """Tries `count` mutations in this process; an AssertionError has the file that failed."""
    counts = {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        cases.make_pictures(folder)
        content = cases.panoptic() if reader == "panoptic" else cases.instances()
        for number in range(count):
            data = mutated(content, random.Random(f"{seed} {number}"))
            file = folder / "annotations.json"
            file.write_bytes(data)
            start = time.process_time()
            try:
                counts[read(reader, folder, file)] += 1
            except BaseException as error:
                raise AssertionError(f"{reader}, mutation {number}: {data!r}") from error
            seconds = time.process_time() - start
            assert seconds < _SECONDS, f"{reader}, mutation {number}, {seconds} s: {data!r}"
    return counts


def _in_a_child(reader: str, count: int, seed: int, timeout: float) -> dict[str, int]:
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.test_fuzz_annotations",
        reader,
        str(count),
        str(seed),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("reader", READERS)
def test_a_few_mutations_end_in_a_reading_or_a_clear_error(reader):
    counts = _in_a_child(reader, 300, seed=0, timeout=300)
    assert min(counts.values()) > 5, counts


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_ten_thousand_mutations_end_in_a_reading_or_a_clear_error(reader):
    counts = _in_a_child(reader, 10_000, seed=1, timeout=3000)
    assert sum(counts.values()) == 10_000


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
