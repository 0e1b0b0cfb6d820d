"""The repository itself: its top level, its requirements, the size of its files."""

import ast
import fnmatch
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    *("oneformer_jax", "configs", "input_pipeline", "kernels", "tests", "docs", "examples"),
    *("main.py", "requirements.txt", "README.md", "Makefile", "pyproject.toml", "LICENSE"),
    *(".ci", ".gitignore"),
}
CODE = ("oneformer_jax", "configs", "input_pipeline", "kernels", "main.py")
MAX_LINES = 520

# Package index name -> the module it installs, where they differ.
MODULE_OF = {
    "absl-py": "absl",
    "array-record": "array_record",
    "huggingface-hub": "huggingface_hub",
    "importlib-resources": "importlib_resources",
    "instant-clip-tokenizer": "instant_clip_tokenizer",
    "ml-collections": "ml_collections",
    "mlflow-skinny": "mlflow",
    "opencv-python-headless": "cv2",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "tensorflow-datasets": "tensorflow_datasets",
}
# Declared although nothing here imports them: TFDS needs the first to find the builders of a
# package, fsspec the next two for buckets, JAX the fourth for programs; exported files run in the
# last.
FOR_OTHERS = {"importlib_resources", "gcsfs", "s3fs", "flatbuffers", "onnxruntime"}
# Extras that nothing in the program imports.
FOR_DEVELOPERS = {"dev", "parity", "peers"}


def requirement_lines() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def parse(requirement: str) -> tuple[str, dict[str, str]]:
    """('name', {'>=': version, '<': version}) of one requirement."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[\w+\])?((?:[<>=!~]+[\w.]+,?)*)", requirement)
    assert match, f"cannot read {requirement!r}"
    bounds = dict(re.findall(r"([<>=!~]+)([\w.]+)", match[2]))
    return re.sub(r"[-_.]+", "-", match[1]).lower(), bounds


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def declared_modules(extras: bool = True) -> set[str]:
    """Modules of requirements.txt, and of the extras that the code imports where it uses them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = project["optional-dependencies"].items() if extras else ()
    lines = [line for extra, tools in found if extra not in FOR_DEVELOPERS for line in tools]
    names = [parse(line)[0] for line in (*requirement_lines(), *lines)]
    return {MODULE_OF.get(name, name) for name in names}


def python_files(*entries: str) -> list[pathlib.Path]:
    paths = [ROOT / entry for entry in entries]
    return [file for p in paths for file in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]


def imported_packages() -> dict[str, str]:
    """Package from elsewhere -> a file that imports it."""
    own = {entry.removesuffix(".py") for entry in CODE}
    found = {}
    for path in python_files(*CODE):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top not in own and top not in sys.stdlib_module_names:
                    found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def top_level() -> set[str]:
    """Names at the top that are, or would be, under version control."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode == 0:  # it refuses a checkout that belongs to another user
            return {path.split("/")[0] for path in result.stdout.split("\0") if path}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text("utf-8").split()]
    names = {entry.name for entry in ROOT.iterdir()} - {".git"}
    return {name for name in names if not any(fnmatch.fnmatch(name, i) for i in ignored)}


def test_top_level_is_fixed():
    assert top_level() == TOP_LEVEL


@pytest.mark.parametrize("requirement", requirement_lines())
def test_requirement_has_both_bounds(requirement):
    _, bounds = parse(requirement)
    assert set(bounds) == {">=", "<"}
    assert version(bounds[">="]) < version(bounds["<"])


def test_development_tools_have_both_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert all(set(parse(tool)[1]) == {">=", "<"} for extra in extras.values() for tool in extra)


def test_every_imported_package_is_declared():
    found = imported_packages()
    missing = {name: where for name, where in found.items() if name not in declared_modules()}
    assert not missing, f"imported but not in requirements.txt or an extra: {missing}"


def test_packages_of_extras_are_imported_in_functions_only():
    optional = declared_modules() - declared_modules(extras=False)
    assert {"gcsfs", "huggingface_hub", "supervision"} <= optional
    for path in python_files(*CODE):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            names = [node.module] if isinstance(node, ast.ImportFrom) else names
            tops = {name.split(".")[0] for name in names if name}
            assert not tops & (optional - {"jax"}), f"{path}: {ast.unparse(node)}"


def test_every_declared_package_is_used():
    assert declared_modules() - set(imported_packages()) - FOR_OTHERS == set()


def test_no_file_outgrows_the_house():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in python_files(*CODE, "tests")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_the_supported_python_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert "(3, 11)" in (ROOT / "Makefile").read_text("utf-8")
