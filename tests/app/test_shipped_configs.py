"""Configs of the package by name, and the version."""

import pathlib
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import oneformer_jax
from oneformer_jax.app import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("given", "variant"),
    [
        ("--config=coco:swin_tiny", "swin_tiny"),
        ("--config=configs/coco.py:swin_tiny", "swin_tiny"),
        ("--config=synthetic", None),
    ],
)
def test_shipped_configs_are_found_by_name_and_by_file(given, variant, monkeypatch):
    argv = ["main.py", given, "--config.seed=7", "--mode=compile"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
        cli.parse_flags(argv)
        config = flags.FLAGS.config
    assert config.seed == 7
    expected = "swin_tiny" if variant else "resnet"
    assert config.model.backbone.name == expected


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = cli.with_config_file(["main.py", "--mode=train", "--config", "ade20k:swin_large", "--x"])
    assert argv[:2] == ["main.py", "--mode=train"] and argv[3:] == ["--x"]
    path = argv[2].removeprefix("--config=").removesuffix(":swin_large")
    assert pathlib.Path(path).read_text() == (ROOT / "configs" / "ade20k.py").read_text()
    assert "common" not in cli.shipped_configs() and "coco" in cli.shipped_configs()


@pytest.mark.parametrize(
    ("name", "hint"), [("cocoo", "did you mean 'coco'"), ("zzz", "shipped are ade20k, cityscapes")]
)
def test_an_unknown_config_names_the_nearest_or_all(name, hint, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.with_config_file(["main.py", f"--config={name}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"--config={name}: there is no such file" in error and hint in error


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.parse_flags(["main.py", "--version"])
    assert not exit_.value.code
    assert capsys.readouterr().out == f"oneformer-jax {oneformer_jax.__version__}\n"
