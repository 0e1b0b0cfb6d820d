"""From a labelling tool's export to a sheet of training samples."""

import pytest
from PIL import Image

from oneformer_jax.app import cli, modes
from oneformer_jax.configs import custom
from oneformer_jax.input_pipeline import importers
from tests.input_pipeline import exports


def test_the_command_line_knows_every_format():
    assert tuple(importers.FORMATS) == cli.TOOLS


@pytest.mark.parametrize("form", cli.TOOLS)
def test_an_export_is_imported_and_inspected(form, tmp_path, capsys):
    root, out = exports.MAKERS[form](tmp_path / "export"), tmp_path / "data"
    modes.import_data(form, str(root), str(out))
    printed = capsys.readouterr().out
    assert f"--mode=inspect --config.dataset.data_dir={out}" in printed
    config = custom.get_config("small,data=instances")
    config.dataset.data_dir = str(out)
    if "validation_share=" in printed:
        config.dataset.options.validation_json = ""
    config.data.crop_size = (64, 64)
    config.data.batch_size = 2
    modes.inspect_data(config.lock(), str(tmp_path / "sheet"), count=2)
    assert "2 classes (2 things)" in capsys.readouterr().out
    assert (tmp_path / "sheet" / "faults.txt").read_text().count(": 0") == 2
    with Image.open(tmp_path / "sheet" / "samples.png") as picture:
        assert picture.width > 100
