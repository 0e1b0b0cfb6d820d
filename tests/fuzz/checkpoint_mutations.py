"""Mutates a run's folder and reads it.

python -m tests.fuzz.checkpoint_mutations KIND FIRST COUNT FOLDER

KIND "small" mutates the small files (descriptions, names of arrays, digests, scores) and reads each
by its own reader; "whole" mutates any file, or a key of the array store, and reads the whole run.
Digests are made anew, as a stranger would. Runs in a process of its own. Mutation number i is
always the same. Prints JSON: how many were read, how many refused, and each fault with its number:
an exception of another kind, a message of many lines, more than 10 s; and the memory used.
"""

import json
import pathlib
import random
import shutil
import sys
import time

import tests.conftest  # noqa: F401 - before jax is imported
from oneformer_jax.train import checkpoint, descriptions, reading, seals, stores
from oneformer_jax.train.checkpoint import CheckpointError, Checkpoints
from tests import tiny
from tests.peak_memory import peak_bytes
from tests.train.test_stores import VALUES, put, zarray

SECONDS, LINES = 10, 2
MODEL = tiny.model_config().to_dict()
VALUES_OF_JSON = (
    *(
        None,
        True,
        "",
        "x" * 300,
        "../../etc/passwd",
        [],
        {},
        [[]],
        -1,
        0,
        1,
        1.5,
        2**31,
        2**63,
        1e300,
    ),
    *(10**12, "NaN", "file:///etc/", "<f8", "|O", [10**9] * 3, {"id": "blosc"}),
)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Changes bits, cuts, doubles, or replaces a piece."""
    data = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = data[place : place + length]
        elif kind == 3:
            data[place : place + length] = rng.randbytes(length)
        else:
            data[place:place] = rng.choice(
                (b"9" * 20, b"[" * 2000, b"-", b'"', b"}", b"\0", b"NaN")
            )
    return bytes(data)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replaces, removes or doubles a value anywhere in the JSON."""
    value = json.loads(data)
    places = []

    def visit(inner):
        items = inner.items() if isinstance(inner, dict) else enumerate(inner)
        for key, below in list(items):
            places.append((inner, key))
            if isinstance(below, dict | list):
                visit(below)

    visit(value)
    for _ in range(rng.randint(1, 2)):
        parent, key = rng.choice(places)
        kind = rng.randrange(4)
        if isinstance(parent, list) and key >= len(parent):
            continue
        if kind == 0:
            parent.pop(key) if isinstance(parent, list) else parent.pop(key, None)
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(("kvstore", "driver", "x", "shape", str(key)))] = rng.choice(
                VALUES_OF_JSON
            )
        elif kind == 2 and isinstance(parent, list):
            parent.extend([parent[key]] * rng.choice((1, 5000)))
        else:
            parent[key] = rng.choice(VALUES_OF_JSON)
    return json.dumps(value).encode()


def mutate(data: bytes, rng: random.Random) -> bytes:
    try:
        if rng.random() < 0.6:
            return mutate_json(data, rng)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError):
        pass
    return mutate_text(data, rng)


def make_run(folder: pathlib.Path) -> pathlib.Path:
    descriptions.claim_workdir(folder, MODEL, '{"eval": {"topk": 10}}', tiny.metadata())
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"params": VALUES, "stats": {"empty": {}}}, {"step": 1})
        checkpoints.record(1, {"panoptic/PQ": 41.5, "instance/AP": 3.25})
    return folder


def seal_of(folder: pathlib.Path) -> None:
    try:
        seals.check(folder)
    except seals.SealError as error:
        raise CheckpointError(str(error)) from error


def scores_of(folder: pathlib.Path) -> None:
    try:
        seals.read_scores(folder)
    except seals.SealError as error:
        raise CheckpointError(str(error)) from error


def tree_of(folder: pathlib.Path) -> None:
    with reading.reporting_damage(folder):
        stores.describe(folder / "state")


SMALL = {
    "model.json": descriptions.read_model,
    "config.json": descriptions.read_config,
    "metadata.json": descriptions.read_metadata,
    "checkpoints/1/SHA256SUMS": seal_of,
    "checkpoints/1/scores.json": scores_of,
    "checkpoints/1/state/_METADATA": tree_of,
}


def small(run: pathlib.Path, rng: random.Random) -> None:
    name = rng.choice([*SMALL, ".zarray"])
    if name == ".zarray":
        with reading.reporting_damage(run):
            stores.parse_zarray(mutate(zarray(), rng), "params.w/.zarray")
        return
    path = run / name
    before = path.read_bytes()
    path.write_bytes(mutate(before, rng))
    try:
        SMALL[name](path.parent if "scores" in name or "SHA" in name else _folder(path))
    finally:
        path.write_bytes(before)


def _folder(path: pathlib.Path) -> pathlib.Path:
    return path.parent.parent if path.parent.name == "state" else path.parent


def whole(run: pathlib.Path, rng: random.Random) -> None:
    work = run.with_name("work")
    shutil.copytree(run, work)
    folder = work / "checkpoints" / "1"
    try:
        if rng.random() < 0.3:
            put(work, "params.w/.zarray", mutate(zarray(), rng))
        elif rng.random() < 0.3:
            chunk = b"\x28\xb5\x2f\xfd" + rng.randbytes(rng.choice((1, 8, 200)))
            put(work, rng.choice(("params.w/0.0", "params.b/0")), chunk)
        else:
            path = rng.choice([p for p in sorted(work.rglob("*")) if p.is_file()])
            path.write_bytes(mutate(path.read_bytes(), rng))
        if rng.random() < 0.9:
            (folder / seals.SEAL_FILE).unlink(missing_ok=True)
            seals.write(folder)
        checkpoint.load_for_inference(work)
    finally:
        shutil.rmtree(work)


def main(kind: str, first: int, count: int, place: str) -> None:
    run = make_run(pathlib.Path(place) / "run")
    found = {"read": 0, "refused": 0, "faults": []}
    for number in range(first, first + count):
        begun = time.process_time()
        try:
            {"small": small, "whole": whole}[kind](run, random.Random(number))
            found["read"] += 1
        except CheckpointError as error:
            found["refused"] += 1
            if str(error).count("\n") >= LINES:
                found["faults"].append((number, f"many lines: {error}"))
        except BaseException as error:
            found["faults"].append((number, repr(error)[:500]))
        if (
            time.process_time() - begun > SECONDS
        ):  # others may keep the processor busy; a hang is for the timeout
            found["faults"].append((number, "took too long"))
    found["megabytes"] = peak_bytes() >> 20
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
