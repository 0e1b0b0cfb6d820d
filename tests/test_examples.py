"""The notebooks run, cell by cell, on small models."""

import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def execute(path, folder, monkeypatch, **environment):
    """Runs a notebook in an empty folder; returns it with its outputs."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    return notebook


def outputs(notebook, kind):
    """Contents of a MIME type among the outputs of the cells."""
    found = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return [output["data"][kind] for output in found if kind in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert notebook.cells[0].cell_type == "markdown"


@pytest.mark.slow
def test_predict_and_fine_tune(tmp_path, monkeypatch):
    """The model that the second one trains for a few steps is the first one's, too."""
    small = dict(WORKDIR=tmp_path / "run", FOLDER=tmp_path / "data", STEPS=3, IMAGES=6)
    tuned = execute(ROOT / "examples" / "fine_tune.ipynb", tmp_path, monkeypatch, **small)
    assert len(outputs(tuned, "image/png")) == 3
    predicted = execute(
        ROOT / "examples" / "predict.ipynb", tmp_path, monkeypatch, WEIGHTS=tmp_path / "run"
    )
    assert len(outputs(predicted, "image/png")) == 2
    assert (tmp_path / "output" / "scene_panoptic.json").is_file()


@pytest.mark.slow
def test_the_task_token(tmp_path, monkeypatch):
    scenes = '{"size": 64, "train_examples": 8, "validation_examples": 4}'
    small = dict(WORKDIR=tmp_path / "runs", STEPS=2, SCENES=scenes)
    shown = execute(ROOT / "examples" / "task_token.ipynb", tmp_path, monkeypatch, **small)
    assert len(outputs(shown, "image/png")) == 2
    (table,) = [
        output["text"]
        for cell in shown.cells
        for output in cell.get("outputs", ())
        if "PQ_stuff" in output.get("text", "")
    ]
    assert len(table.splitlines()) == 4
