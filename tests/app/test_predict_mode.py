"""The mode that predicts, and the model that the package loads: of a run with a tiny model."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import oneformer_jax
from oneformer_jax.app import modes
from oneformer_jax.configs import synthetic
from oneformer_jax.models import functional
from oneformer_jax.models.execution import Kernels
from oneformer_jax.train import checkpoint, descriptions
from tests import tiny


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with an untrained tiny model and the checkpoints of steps 3 and 5."""
    path = tmp_path_factory.mktemp("run")
    model, metadata = tiny.model_config(), tiny.metadata()
    settings = synthetic.get_config()
    settings.eval.short_edge = settings.eval.max_size = 64
    descriptions.claim_workdir(path, model.to_dict(), settings.to_json(), metadata)
    rng = np.random.default_rng(0)  # in NumPy, because compiling the initialisation takes longer
    params, stats = (
        jax.tree.map(lambda x: rng.normal(0.5, 0.1, x.shape).astype(x.dtype), part)
        for part in functional.abstract(model, training=True)[1:]
    )
    state = {"step": np.int32(0), "params": params, "stats": stats, "opt": {}}
    with checkpoint.Checkpoints(path) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, state, {"step": step})
    return path


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_predict_writes_every_task(workdir, image_file, tmp_path, capsys):
    run = functools.partial(
        modes.predict, str(workdir), str(image_file), "all", str(tmp_path / "out"), which=3
    )
    run()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"picture_{task}_overlay.png" for task in oneformer_jax.TASKS} <= names
    assert len(json.loads((tmp_path / "out" / "picture_panoptic.json").read_text())) > 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"1 of 1 images segmented; results: {tmp_path / 'out'}"
    run()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("0 of 1 images segmented, 1 were done already")


@pytest.mark.parametrize("form", ["{}/", "{}/../{name}", "~/{name}"])
def test_a_workdir_in_any_form_takes_its_predictions(
    workdir, image_file, tmp_path, form, monkeypatch, capsys
):
    copy = shutil.copytree(workdir, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    modes.predict(form.format(copy, name="run"), str(image_file), "semantic", None)
    assert "1 of 1 images segmented" in capsys.readouterr().out
    assert (copy / "predictions" / "picture_semantic_overlay.png").exists()


def test_predict_has_a_limit_of_pixels(workdir, image_file, tmp_path):
    with pytest.raises(ValueError, match=r"40 x 60 pixels .*data\.max_pixels, 2,399.*--max_pixels"):
        modes.predict(str(workdir), str(image_file), "all", str(tmp_path / "o"), max_pixels=2399)


def test_predict_without_that_checkpoint(workdir, image_file, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint 4; there are 3, 5, and the words latest"):
        modes.predict(str(workdir), str(image_file), "all", str(tmp_path / "o"), which="4")
    with pytest.raises(ValueError, match=r"no checkpoint of .* has scores yet"):
        modes.predict(str(workdir), str(image_file), "all", str(tmp_path / "o"), which="best")


def test_predict_takes_the_best_checkpoint_where_scores_exist(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    with checkpoint.Checkpoints(copy, keep=5, best_metric="panoptic/PQ") as checkpoints:
        checkpoints.record(3, {"panoptic/PQ": 50.0})
    found = {
        which: checkpoint.find_checkpoint(copy, which)[1].name
        for which in ("auto", "best", "latest", "5", 3)
    }
    assert found == {"auto": "3", "best": "3", "latest": "5", "5": "5", 3: "3"}
    assert checkpoint.find_checkpoint(workdir, "auto")[1].name == "5"  # without scores
    assert checkpoint.find_checkpoint(copy / "checkpoints" / "5", "best")[1].name == "5"


def test_predict_without_the_image_does_not_load_the_model(tmp_path):
    missing = tmp_path / "nowhere.jpg"
    with pytest.raises(ValueError, match=f"{missing}: there is no such image"):
        modes.predict(str(tmp_path / "no model"), str(missing), "all", str(tmp_path / "o"))


def test_settings_of_a_config_act_in_prediction(workdir, image_file, tmp_path, monkeypatch):
    from oneformer_jax.eval import folder

    seen = []

    def spy(segmenter, *_, **options):
        seen.append((segmenter, options))
        return folder.Report((), 1, 0)

    monkeypatch.setattr(folder, "predict_files", spy)
    run = functools.partial(modes.predict, str(workdir), str(image_file), "all", str(tmp_path))
    run(
        threshold=0.25,
        settings={
            "eval.short_edge": 32,
            "eval.object_mask_threshold": 0.125,
            "eval.bucket_multiple": 64,
            "eval.batch_size": 3,
            "kernels.deform_attn": "xla",
            "model.dtype": "bfloat16",
        },
    )
    ((segmenter, options),) = seen
    assert segmenter.test_size == (32, 64) and segmenter.postprocess.object_mask_threshold == 0.125
    assert (segmenter.bucket_multiple, segmenter.batch_size) == (64, 3)
    assert options["threshold"] == 0.25
    assert segmenter.execution == oneformer_jax.Execution(
        dtype="bfloat16", kernels=Kernels(deform_attn="xla")
    )
    refused = ("model.num_queries", "optim.lr", "data.batch_size", "eval.limit", "eval.tta.flip")
    for key in refused:
        with pytest.raises(ValueError, match=rf"--config\.{key} "):
            run(settings={key: 1})
    with pytest.raises(ValueError, match=r"eval\.bucket_multiple is 48"):
        run(settings={"eval.bucket_multiple": 48})


# ------------------------------------------------------------------ the public package


def test_load_gives_a_segmenter(workdir):
    segmenter = oneformer_jax.load(workdir, object_mask_threshold=0.25)
    assert isinstance(segmenter, oneformer_jax.Segmenter)
    assert segmenter.test_size == (64, 64)
    assert segmenter.postprocess.object_mask_threshold == 0.25
    assert segmenter.postprocess.topk == synthetic.get_config().eval.topk
    assert segmenter.metadata == tiny.metadata()
    segmentation = segmenter(np.zeros((40, 60, 3), np.uint8), task="semantic")
    assert isinstance(segmentation, oneformer_jax.Segmentation)
    assert segmentation.class_map.shape == (40, 60)


def test_load_runs_a_model_as_told_or_in_the_dtype_of_its_training(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    settings["model"] |= {"dtype": "bfloat16", "remat": True}
    (copy / "config.json").write_text(json.dumps(settings))
    how = oneformer_jax.Execution(scan_layers=True)
    assert oneformer_jax.load(workdir).execution == oneformer_jax.Execution()
    assert oneformer_jax.load(copy).execution == oneformer_jax.Execution(dtype="bfloat16")
    assert oneformer_jax.load(copy, execution=how).execution == how
    kernels = {"deform_attn": "xla"}
    one, other = (
        oneformer_jax.load(copy, kernels=kernels, **rest).execution
        for rest in ({}, {"dtype": "float32", "execution": how})
    )
    assert one == oneformer_jax.Execution(dtype="bfloat16", kernels=Kernels(**kernels))
    assert other == dataclasses.replace(how, kernels=Kernels(**kernels))
    with pytest.raises(
        ValueError, match=r"kernels: unknown fields 'deform' \(did you mean 'deform_"
    ):
        oneformer_jax.load(copy, kernels={"deform": "xla"})
    with pytest.raises(ValueError, match=r"kernels is 'xla'; it must be fields with values"):
        oneformer_jax.load(copy, kernels="xla")
    settings["model"]["dtype"] = "int8"
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"model\.dtype is 'int8'; it must be one of float32, bf"):
        oneformer_jax.load(copy)


def test_load_refuses_what_it_does_not_know(workdir, tmp_path):
    with pytest.raises(ValueError, match="objectmask"):
        oneformer_jax.load(workdir, objectmask=0.25)
    with pytest.raises(ValueError, match="accepted are a workdir"):
        oneformer_jax.load(tmp_path)
    with pytest.raises(ValueError, match=r"tta is True; it must be fields with values"):
        oneformer_jax.load(workdir, tta=True)
    with pytest.raises(
        ValueError, match=r"unknown fields 'short_edge' \(did you mean 'short_edges'"
    ):
        oneformer_jax.load(workdir, tta={"short_edge": (32,)})
    (tmp_path / "model.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is no workdir, so it has no checkpoint 5"):
        oneformer_jax.load(tmp_path / "model.pth", checkpoint=5)


def test_the_public_names():
    for name in oneformer_jax.__all__:
        assert getattr(oneformer_jax, name) is not None
    assert dir(oneformer_jax) == sorted(oneformer_jax.__all__)
    assert dataclasses.is_dataclass(oneformer_jax.OneFormerConfig)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = oneformer_jax.Trainer
