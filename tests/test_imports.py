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
    "main": ("app", "absl"),
    "__main__": ("app", ""),  # python -m oneformer_jax
    "": ("types models train eval weights export input_pipeline.datasets", "jax"),  # the public API
    "app": (
        "app demo train compile eval weights export report types input_pipeline"
        " input_pipeline.datasets"
        " input_pipeline.eval_loader configs configs.common",
        "absl jax ml_collections",
    ),
    # A program is traced for other machines than this one, so it names their platform to kernels.
    "export": (
        "export eval models weights types kernels input_pipeline.resize",
        "jax jax2onnx msgspec numpy onnx safetensors",
    ),
    "report": ("report configs.common", "msgspec"),
    "demo": ("demo eval types input_pipeline.images", "cv2 gradio numpy PIL"),
    "compile": ("compile train models types kernels.chips", "absl jax ml_collections numpy"),
    "train": (
        "train eval eval.evaluate models types weights kernels.chips kernels.calibrate",
        "absl clu etils flax jax ml_collections mlflow msgspec numpy optax orbax PIL tensorboard"
        " tensorstore wandb",
    ),
    "weights": (
        "weights models types",
        "absl filelock flax fsspec huggingface_hub jax msgspec numpy requests safetensors tqdm",
    ),
    "eval": (
        "eval models types input_pipeline.images input_pipeline.resize input_pipeline.annotations"
        " input_pipeline.eval_loader",
        "absl av cv2 flax jax numpy PIL pycocotools scipy supervision",
    ),
    "eval.evaluate": ("eval models types", "absl jax ml_collections numpy"),
    "models": ("models types kernels kernels.calibrate", "flax jax numpy scipy"),
    "types": ("", "jax numpy"),
    "catalogue": ("", ""),
    "compilation": ("", "absl jax"),
    "files": ("remote", "msgspec"),
    "remote": ("", "etils fsspec"),
    "progress": ("", "absl"),
    "rules": ("files", ""),
    "config_rules": ("files rules", ""),
    "kernels": ("kernels kernels.chips", "jax numpy"),
    "kernels.chips": ("", ""),
    "kernels.calibrate": ("kernels kernels.calibrate kernels.chips", "jax numpy"),
    "kernels.calibrate.__main__": ("app", ""),  # the command reads a config of the program
    "kernels.assignment.bench": ("kernels kernels.chips", "jax numpy scipy"),  # SciPy is the rival
    # How an image file becomes an array, the same in training, evaluation and prediction.
    "input_pipeline.images": ("files", "cv2 numpy PIL"),
    # The size of an image at the test, the same in evaluation and prediction.
    "input_pipeline.resize": ("", "cv2 numpy PIL"),
    # Batches of one padded size, the same in evaluation and in the prediction of a folder.
    "input_pipeline.eval_loader": (
        "input_pipeline input_pipeline.resize input_pipeline.images",
        "absl grain numpy",
    ),
    # Annotation files: the truth of training and of evaluation.
    "input_pipeline.annotations": ("input_pipeline.annotations", "msgspec numpy pycocotools"),
    # Tables only: the public API may read the classes of a dataset in them.
    "input_pipeline.datasets": ("", "numpy"),
    "input_pipeline": (
        "input_pipeline input_pipeline.datasets input_pipeline.images input_pipeline.resize"
        " input_pipeline.annotations input_pipeline.eval_loader",
        "absl array_record cv2 etils grain importlib_resources instant_clip_tokenizer msgspec numpy"
        " PIL pycocotools tensorflow_datasets yaml",
    ),
    "configs": ("configs.common", "ml_collections"),
    "configs.common": ("", "ml_collections"),
    "tests": (None, None),  # not checked, and nobody may import it
}

# Rooms that import nothing but each other, and that every other room but kernels may import.
LEAVES = {"catalogue", "compilation", "files", "progress", "remote", "rules", "config_rules"}

PACKAGE = "oneformer_jax"
FOLDERS = (PACKAGE, "configs", "input_pipeline", "kernels")


def room_of(module: str) -> str:
    """The room of a module; "kernels", "configs" and "input_pipeline" alone are nobody's names."""
    if module == PACKAGE:
        return ""
    parts = module.removeprefix(f"{PACKAGE}.").split(".")
    if not module.startswith(f"{PACKAGE}.") and parts[0] not in ("main", "tests"):
        return module
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in RULES:
            return name
    return ""  # a name that the public API exports


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
        if top == PACKAGE or top in ("main", "tests"):
            allowed, target = rooms, room_of(name)
        elif top in sys.stdlib_module_names:
            continue
        else:
            allowed, target = packages, top
        if target not in allowed and not (room == "app" and not target):
            who, whom = (room or "the public API"), (target or "the public API")
            found.append(f"{module}, line {line}: {who} may not import {whom} ({name})")
    return found


def source_files() -> dict[str, pathlib.Path]:
    """Module name -> file; the rooms at the top are read through their links in the package."""
    found = {"main": ROOT / "main.py"}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            name = ".".join(parts if parts[0] == PACKAGE else (PACKAGE, *parts))
            found[name] = path
    return found


def circles(modules: dict[str, pathlib.Path]) -> list[list[str]]:
    """Modules that import each other in a ring, also for annotations alone or inside a function."""
    graph = {}
    for module, path in modules.items():
        names = imported_modules(path.read_text("utf-8"), module, path.name == "__init__.py")
        targets = set()
        for _, name in names:
            while name and name not in modules:
                name = name.rpartition(".")[0]
            # A package that a submodule's name goes through is not meant by it.
            if name and name != module and name != PACKAGE:
                targets.add(name)
        graph[module] = targets
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_every_import_is_allowed():
    files = source_files()
    assert len(files) > 150, "the tree was not found"
    found = []
    for module, path in files.items():
        is_package = path.name == "__init__.py"
        found += violations(path.read_text("utf-8"), module, is_package)
    assert not found, "\n".join(found)


def test_no_modules_import_each_other_in_a_ring():
    found = circles(source_files())
    assert not found, "\n".join(" -> ".join(ring) for ring in found)


def test_a_ring_is_found(tmp_path):
    files = {}
    for name, other in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")):
        files[f"oneformer_jax.{name}"] = tmp_path / f"{name}.py"
        files[f"oneformer_jax.{name}"].write_text(
            f"def f():\n    from oneformer_jax import {other}"
        )
    (ring,) = circles(files)
    assert [name[-1] for name in ring] == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("models.decoder", "import optax", "optax"),
        ("models.losses", "from clu import metrics", "clu"),
        ("models.text", "from oneformer_jax import train", "train"),
        ("models.text", "from ..eval import metrics", "eval"),
        ("models.text", "from oneformer_jax import OneFormer", "the public API"),
        ("models.decoder", "from kernels.ms_deform_attn import api", "kernels"),
        ("eval.predict", "from ml_collections import ConfigDict", "ml_collections"),
        ("eval.metrics", "import oneformer_jax.train.loop", "train"),
        ("types", "from oneformer_jax.models import layers", "models"),
        ("kernels.ms_deform_attn.api", "from flax import nnx", "flax"),
        ("kernels.ms_deform_attn.api", "import oneformer_jax.types", "types"),
        ("input_pipeline.loader", "def f():\n    import jax.numpy as jnp", "jax"),
        ("input_pipeline.loader", "from oneformer_jax.types import TASKS", "types"),
        ("input_pipeline.loader", "importlib.import_module('flax.nnx')", "flax"),
        ("input_pipeline.loader", "import tensorflow as tf", "tensorflow"),
        ("train.loop", "import oneformer_jax.input_pipeline.loader", "input_pipeline"),
        ("train.observe", "import tensorflow", "tensorflow"),
        ("configs.ade20k", "from oneformer_jax.configs import coco", "configs"),
        ("configs.ade20k", "import numpy", "numpy"),
        ("train.loop", "import main", "main"),
        ("train.loop", "from oneformer_jax.app import cli", "app"),
        ("eval.predict", "from tests import conftest", "tests"),
        ("eval.predict", "from oneformer_jax.export import stablehlo", "export"),
        ("export.program", "from oneformer_jax.train import checkpoint", "train"),
    ],
)
def test_a_forbidden_import_is_found(module, source, target):
    module = f"oneformer_jax.{module}"
    (message,) = violations(source, module)
    assert f"may not import {target} " in message
    assert message.startswith(f"{module}, line {source.count(chr(10)) + 1}:")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("app.modes", "from oneformer_jax.train import loop"),
        ("models.decoder", "from oneformer_jax.kernels.ms_deform_attn import api"),
        ("models.decoder", "from . import layers"),
        ("models.backbones.swin", "from ..layers import MLP"),
        ("eval.evaluate", "from ml_collections import ConfigDict"),
        ("configs.coco", "from oneformer_jax.configs import common"),
        ("input_pipeline.loader", "import json, grain"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert violations(source, f"oneformer_jax.{module}") == []


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


def test_what_windows_lacks_is_imported_where_it_is_used():
    """Prediction imports most of the package, and must work there."""
    for module, path in source_files().items():
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {"fcntl", "resource", "pwd", "grp", "termios"} & set(names), module
