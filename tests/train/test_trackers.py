"""The writers to Weights & Biases and MLflow, offline."""

import importlib.util
import json
import os

import numpy as np
import pytest

from oneformer_jax.train import observe, trackers

OFF = {"wandb": "", "mlflow": ""}
slow = pytest.mark.slow


def write_a_run(workdir, wanted, first=0):
    writer = observe.make_writer(workdir, first, lambda: trackers.make(workdir, wanted))
    writer.write_hparams({"optim": {"lr": 0.1, "boundaries": (1, 2)}, "name": "x"})
    writer.write_texts(first, {"run/command": "main.py"})
    for step in (first + 1, first + 2):
        values = {"loss": np.float32(step), "absent": None, "bad": float("nan")}
        writer.write_scalars(step, values)
    writer.write_images(first + 2, {"predictions": np.zeros((1, 4, 6, 3), np.uint8)})
    writer.flush()
    writer.close()


@pytest.mark.parametrize("library", trackers.LIBRARIES)
def test_a_missing_library_is_named_with_its_extra(library, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    trackers.check(OFF)
    with pytest.raises(ValueError, match=rf'"oneformer-jax\[{library}\]"'):
        trackers.check(OFF | {library: "project"})


def test_nothing_is_made_that_is_not_wanted(tmp_path):
    assert trackers.make(tmp_path, OFF) == []
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no account:\nlog in")

    monkeypatch.setattr(trackers, "WandbWriter", refuse)
    with pytest.raises(ValueError, match=r"^log\.wandb='p': no account: log in$"):
        trackers.make(tmp_path, OFF | {"wandb": "p"})


@slow
def test_mlflow_gets_scalars_settings_texts_and_pictures(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    wanted = OFF | {"mlflow": "scenes"}
    write_a_run(tmp_path / "run", wanted)
    write_a_run(tmp_path / "run", wanted, first=2)  # goes on in the same run
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("scenes").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss/total")
    assert [(m.step, m.value) for m in history] == [(n, float(n)) for n in (1, 2, 3, 4)]
    assert set(found.data.metrics) == {"loss/total"}
    assert found.data.params == {"optim.lr": "0.1", "optim.boundaries": "(1, 2)", "name": "x"}
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"run", "images"}


@slow
def test_a_server_that_goes_away_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    (writer,) = trackers.make(tmp_path / "run", OFF | {"mlflow": "scenes"})

    def refuse(*_, **__):
        raise mlflow.MlflowException("the server\nis away")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse)
    with caplog.at_level("WARNING"):
        writer.write_scalars(1, {"loss": 1.0})
    assert "MLflow took no log_batch: the server is away" in caplog.text


@slow
def test_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_a_run(tmp_path / "run", OFF | {"wandb": "scenes"})
    first = json.loads((tmp_path / "run" / "trackers.json").read_text())
    write_a_run(tmp_path / "run", OFF | {"wandb": "scenes"}, first=2)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == first
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{first['wandb']}.wandb"))
    assert files
    content = b"".join(file.read_bytes() for file in files)
    for part in (b"loss/total", b"optim.lr", b"main.py", b"predictions"):
        assert part in content, part
