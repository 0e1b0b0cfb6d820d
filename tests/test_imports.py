"""Who may import whom: the walls of the house, read from the source of every module."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A room is a module or package; a module belongs to the longest name here that its own starts with.
# room: (rooms of this repository it may import, packages from elsewhere it may import)
RULES = {
    "main": (
        "oneformer_jax oneformer_jax.types oneformer_jax.train oneformer_jax.eval"
        " oneformer_jax.eval.evaluate oneformer_jax.weights input_pipeline input_pipeline.datasets"
        " configs configs.common",
        "absl jax ml_collections",
    ),
    "oneformer_jax": (
        "oneformer_jax.types oneformer_jax.models oneformer_jax.train oneformer_jax.eval"
        " oneformer_jax.weights input_pipeline.datasets",
        "jax",  # for annotations; importing the package must not load it, see below
    ),
    "oneformer_jax.weights": (
        "oneformer_jax.weights oneformer_jax.models oneformer_jax.types",
        "flax jax msgspec numpy safetensors",
    ),
    "oneformer_jax.train": (
        "oneformer_jax.train oneformer_jax.eval oneformer_jax.eval.evaluate oneformer_jax.models"
        " oneformer_jax.types oneformer_jax.weights",
        "absl clu etils flax jax ml_collections msgspec numpy optax orbax PIL tensorboard"
        " tensorstore",
    ),
    "oneformer_jax.eval": (
        "oneformer_jax.eval oneformer_jax.models oneformer_jax.types input_pipeline.images"
        " input_pipeline.annotations",
        "absl cv2 flax jax numpy PIL pycocotools scipy",
    ),
    "oneformer_jax.eval.evaluate": (
        "oneformer_jax.eval oneformer_jax.models oneformer_jax.types",
        "absl jax ml_collections numpy",
    ),
    "oneformer_jax.models": (
        "oneformer_jax.models oneformer_jax.types kernels",
        "flax jax numpy scipy",
    ),
    "oneformer_jax.types": ("", "jax numpy"),
    "oneformer_jax.files": ("", "msgspec"),
    "oneformer_jax.rules": ("oneformer_jax.files", ""),
    "oneformer_jax.config_rules": ("oneformer_jax.files oneformer_jax.rules", ""),
    "kernels": ("kernels", "jax numpy"),
    "kernels.assignment.bench": ("kernels", "jax numpy scipy"),  # SciPy is the rival
    # How an image file becomes an array, the same in training, evaluation and prediction.
    "input_pipeline.images": ("oneformer_jax.files", "cv2 numpy PIL"),
    # Annotation files, the truth of training and of evaluation.
    "input_pipeline.annotations": (
        "input_pipeline.annotations oneformer_jax.files",
        "msgspec numpy pycocotools",
    ),
    # Tables only: the public API may read the classes of a dataset in them.
    "input_pipeline.datasets": ("", "numpy"),
    "input_pipeline": (
        "input_pipeline input_pipeline.annotations input_pipeline.datasets input_pipeline.images",
        "absl array_record cv2 etils grain importlib_resources instant_clip_tokenizer msgspec numpy"
        " PIL pycocotools tensorflow_datasets",
    ),
    "configs": ("configs.common", "ml_collections"),
    "configs.common": ("", "ml_collections"),
    "tests": (None, None),  # not checked, and nobody may import it
}

# Rooms that import nothing but each other, and that every other room but kernels may import.
LEAVES = {"oneformer_jax.files", "oneformer_jax.rules", "oneformer_jax.config_rules"}

OURS = {room.split(".")[0] for room in RULES}
FOLDERS = ("oneformer_jax", "configs", "input_pipeline", "kernels")


def room_of(module: str) -> str:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in RULES:
            return name
    raise KeyError(f"{module} is in no room of RULES")


def imported_modules(source: str, module: str, is_package: bool = False):
    """(line, dotted name) of every import in `source`, wherever it stands.

    Includes imports inside functions, relative ones, and constant `import_module("name")` calls.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            constant = node.args and isinstance(node.args[0], ast.Constant)
            if name in ("import_module", "__import__") and constant:
                yield node.lineno, str(node.args[0].value)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One sentence for every import of `source` that RULES forbids to `module`."""
    room = room_of(module)
    rooms, packages = (set(allowed.split()) for allowed in RULES[room])
    rooms |= LEAVES - {room} if room.split(".")[0] != "kernels" else set()
    found = []
    for line, name in imported_modules(source, module, is_package):
        top = name.split(".")[0]
        if top in OURS:
            allowed, target = rooms, room_of(name)
        elif top in sys.stdlib_module_names:
            continue
        else:
            allowed, target = packages, top
        if target not in allowed:
            found.append(f"{module}, line {line}: {room} may not import {target} ({name})")
    return found


def source_files() -> list[pathlib.Path]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [ROOT / "main.py", *files]


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_import_is_allowed():
    files = source_files()
    assert len(files) > 30, "the tree was not found"
    found = []
    for path in files:
        is_package = path.name == "__init__.py"
        found += violations(path.read_text("utf-8"), module_name(path), is_package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("oneformer_jax.models.decoder", "import optax", "optax"),
        ("oneformer_jax.models.losses", "from clu import metrics", "clu"),
        ("oneformer_jax.models.text", "from oneformer_jax import train", "oneformer_jax.train"),
        ("oneformer_jax.models.text", "from ..eval import metrics", "oneformer_jax.eval"),
        ("oneformer_jax.models.text", "from oneformer_jax import OneFormer", "oneformer_jax"),
        ("oneformer_jax.eval.predict", "from ml_collections import ConfigDict", "ml_collections"),
        ("oneformer_jax.eval.metrics", "import oneformer_jax.train.loop", "oneformer_jax.train"),
        ("oneformer_jax.types", "from oneformer_jax.models import layers", "oneformer_jax.models"),
        ("kernels.ms_deform_attn.api", "from flax import nnx", "flax"),
        ("kernels.ms_deform_attn.api", "import oneformer_jax.types", "oneformer_jax.types"),
        ("input_pipeline.loader", "def f():\n    import jax.numpy as jnp", "jax"),
        ("input_pipeline.loader", "from oneformer_jax.types import TASKS", "oneformer_jax.types"),
        ("input_pipeline.loader", "importlib.import_module('flax.nnx')", "flax"),
        ("input_pipeline.loader", "import tensorflow as tf", "tensorflow"),
        ("oneformer_jax.train.loop", "import input_pipeline.loader", "input_pipeline"),
        ("oneformer_jax.train.observe", "import tensorflow", "tensorflow"),
        ("configs.ade20k", "from configs import coco", "configs"),
        ("configs.ade20k", "import numpy", "numpy"),
        ("oneformer_jax.train.loop", "import main", "main"),
        ("oneformer_jax.eval.predict", "from tests import conftest", "tests"),
    ],
)
def test_a_forbidden_import_is_found(module, source, target):
    (message,) = violations(source, module)
    assert f"may not import {target} " in message
    assert message.startswith(f"{module}, line {source.count(chr(10)) + 1}:")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("main", "from oneformer_jax.train import loop"),
        ("oneformer_jax.models.decoder", "from kernels.ms_deform_attn import api"),
        ("oneformer_jax.models.decoder", "from . import layers"),
        ("oneformer_jax.models.backbones.swin", "from ..layers import MLP"),
        ("oneformer_jax.eval.evaluate", "from ml_collections import ConfigDict"),
        ("configs.coco", "from configs import common"),
        ("input_pipeline.loader", "import json, grain"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert violations(source, module) == []


def test_a_package_resolves_its_relative_imports():
    source = "from .swin import Swin"
    (name,) = [n for _, n in imported_modules(source, "oneformer_jax.models.backbones", True)]
    assert name == "oneformer_jax.models.backbones.swin.Swin"


def test_the_public_package_is_lazy():
    # `import oneformer_jax` and main.py's own imports (each loader worker repeats them) must not
    # pay for JAX; Grain itself is allowed to load it.
    code = (
        "import sys, oneformer_jax, main; print([m for m in ('jax', 'flax', 'grain', 'cv2') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
