"""Damaged image files: read, or refused with one error, whatever is in them."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
MAX_PIXELS = 1 << 22

CHILD = """
import resource, sys, time
import numpy as np
from oneformer_jax.input_pipeline import images
from tests.fuzz import test_fuzz_images as fuzz
seed, count = map(int, sys.argv[1:])
seeds = fuzz.corpus()
rng = np.random.default_rng(seed)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000,) * 2)
outcomes = {"read": 0, "refused": 0}
for number in range(count):
    data = fuzz.mutated(rng, seeds)
    print(number, data[:40].hex(), file=sys.stderr)
    start = time.monotonic()
    for read in (images.decode_image, images.decode_samples, images.read_size):
        try:
            found = read(data, "fuzz", max_pixels=fuzz.MAX_PIXELS)
        except images.ImageError as error:
            assert str(error).startswith("fuzz: ") and "\\n" not in str(error), repr(error)
            assert "memory" not in str(error), repr(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        if read is images.decode_image:
            assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
            assert found.shape[:2] == images.read_size(data, "fuzz")
        elif read is images.decode_samples:
            assert found.dtype in (np.uint8, np.uint16) and found.shape[2:] in ((), (3,))
    assert time.monotonic() - start < 10, "ten seconds for one file"
print(outcomes["read"], outcomes["refused"])
"""


def corpus():
    """Whole files of all kinds, from which mutations start."""
    from tests.input_pipeline import test_image_files

    return [data for _, data, _ in test_image_files.FILES.values()]


def mutated(rng, seeds):
    """One of the `seeds` with bytes changed, cut out, doubled, or joined to another one."""
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.integers(1, 6)):
        # Most of a file is pixels: half of the changes go to its head.
        end = min(len(data), 300) if rng.random() < 0.5 else len(data)
        at = int(rng.integers(max(1, end)))
        length = int(rng.integers(1, 64))
        match rng.integers(6):
            case 0:
                data[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = rng.bytes(length)
            case 5:
                other = seeds[rng.integers(len(seeds))]
                data[at:] = other[int(rng.integers(len(other))) :]
        if not data:
            break
    return bytes(data)


def run(seed, count):
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(seed), str(count)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=1200,
    )
    last = result.stderr.decode(errors="replace")[-2000:]
    assert result.returncode == 0, f"code {result.returncode}: {last}"
    return [int(word) for word in result.stdout.split()[-2:]]


def test_200_mutations_are_read_or_refused():
    read, refused = run(0, 200)
    assert read + refused == 600 and read > 20 and refused > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_10000_mutations_are_read_or_refused(seed):
    read, refused = run(seed, 1000)
    assert read + refused == 3000


def test_mutations_are_the_same_every_time():
    seeds = [bytes(range(200)), b"abc" * 50]
    first, second = (mutated(np.random.default_rng(3), seeds) for _ in range(2))
    assert first == second
