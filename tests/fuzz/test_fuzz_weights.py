"""Mutated files of weights: no crash, no hang, no error but the one that names the file."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from oneformer_jax import files
from oneformer_jax.files import FileError
from oneformer_jax.weights import descriptions
from tests.fuzz import weights_mutations

CORPUS = pathlib.Path(__file__).with_name("corpus_weights")
SOME, MANY, AT_ONCE = 200, 10_000, 2_500


def mutate(reader: str, count: int, folder: pathlib.Path) -> None:
    for first in range(0, count, AT_ONCE):
        run = subprocess.run(
            [
                *(sys.executable, weights_mutations.__file__, reader),
                *(str(first), str(min(count, AT_ONCE)), str(folder)),
            ],
            capture_output=True,
            text=True,
            timeout=1200,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"},
        )
        left = sorted(folder.iterdir())
        assert run.returncode == 0, f"died of {run.returncode}: {left}\n{run.stderr[-3000:]}"
        found = json.loads(run.stdout)
        print(f"\n{reader} from {first}: {found['read']} read, {found['refused']} refused")
        assert not found["faults"], "\n".join(f"{i}: {text}" for i, text in found["faults"][:5])
        assert found["read"] and found["refused"], "the mutations try nothing"
        assert found["megabytes"] < weights_mutations.MEGABYTES, found["megabytes"]


@pytest.mark.parametrize("reader", list(weights_mutations.READERS))
def test_some_mutations(reader, tmp_path):
    mutate(reader, SOME, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reader", list(weights_mutations.READERS))
def test_many_mutations(reader, tmp_path):
    mutate(reader, MANY, tmp_path)


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_a_description_that_was_found_by_mutation_is_refused(path):
    with pytest.raises(FileError, match=path.name) as caught:
        found = descriptions.read(files.read_json(path), str(path))
        descriptions.model_config(found.model, str(path))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
