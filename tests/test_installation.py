"""The wheel holds the package and nothing else, and works away from the checkout."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a wheel is made of; a copy, because a build leaves folders in the tree that it builds.
SOURCES = ("oneformer_jax", "configs", "input_pipeline", "kernels")
SOURCES += ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")
BUILDERS = ("pip", "setuptools", "wheel")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir")


def run(*command, cwd, **environment):
    """Output of a command; the test fails with all that it printed if the command does."""
    known = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run(
        command, cwd=cwd, env=known | environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if missing := [name for name in BUILDERS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} missing: pip install 'oneformer-jax[dev]' has it")
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder))
    run(*PIP, "wheel", *options, str(tree), cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An otherwise empty folder with the package in it, as site-packages would hold it."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-compile", "--target", str(folder))
    run(*PIP, "install", *options, str(wheel), cwd=folder)
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_nothing_beside_it(wheel):
    package = ROOT / "oneformer_jax"
    expected = {
        (pathlib.Path(folder) / name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if not name.endswith(".pyc")
    }
    found = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in found if name.split("/")[0].endswith(".dist-info")}
    assert found - info == expected
    assert any(name.startswith("oneformer_jax/kernels/") for name in found)  # through the link
    assert len({name.split("/")[0] for name in info}) == 1


CHILD = """
import pathlib, sys
import oneformer_jax
here = pathlib.Path(oneformer_jax.__file__).parents[1]
from oneformer_jax.kernels.ms_deform_attn import ms_deform_attn
from oneformer_jax.app import cli
from absl import flags
sys.argv = ["oneformer-jax", "--config=coco:swin_large", "--mode=inspect", "--config.seed=7"]
cli.parse_flags(sys.argv)
config = flags.FLAGS.config
print(here, oneformer_jax.__version__, ms_deform_attn.__name__, config.dataset.name, config.seed)
strays = [m for m in ("kernels", "configs", "input_pipeline") if m in sys.modules]
assert not strays, strays
"""


def test_the_installed_package_works_from_another_folder(installed, wheel, tmp_path):
    options = {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    version = wheel.stem.split("-")[1]
    printed = run(sys.executable, "-c", CHILD, cwd=tmp_path, **options).split()
    assert printed == [str(installed), version, "ms_deform_attn", "coco", "7"]
    command = installed / "bin" / "oneformer-jax"
    printed = run(sys.executable, str(command), "--version", cwd=tmp_path, **options)
    assert printed == f"oneformer-jax {version}\n"
