"""The architecture of init.checkpoint in a run: defaults give way, contradictions are named."""

import dataclasses
import logging

import numpy as np
import pytest
from ml_collections import ConfigDict

from oneformer_jax import catalogue, config_rules
from oneformer_jax.app import data, modes
from oneformer_jax.configs import common
from oneformer_jax.models import backbones
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import checkpoint, descriptions, loop, settings, start
from oneformer_jax.weights import download
from tests import tiny
from tests.weights.test_start import BACKBONES, make, random_tensors, write

SIZES = dict(encoder_points=4, num_heads=1, text_heads=1)  # what tensors alone tell


def config(checkpoint="", **model) -> ConfigDict:
    found = common.get_base()
    found.init.checkpoint = checkpoint
    for key, value in model.items():
        setattr(found.model, key, value)
    return found.lock()


def shaping(model: OneFormerConfig, classes: int = 1) -> OneFormerConfig:
    """A model without what a run chooses for itself."""
    backbone = dataclasses.replace(
        model.backbone,
        **{
            key: getattr(type(model.backbone)(**BACKBONES[backbones.kind_of(model.backbone)]), key)
            for key in start._OF_THE_RUN_IN_BACKBONES
            if hasattr(model.backbone, key)
        },
    )
    return dataclasses.replace(
        model,
        num_classes=classes,
        backbone=backbone,
        encoder_dropout=0.1,
        query_init_dropout=0.1,
    )


def take(given: ConfigDict, workdir=None) -> OneFormerConfig:
    taken = data.with_architecture(given, workdir)
    assert not config_rules.find_faults(taken, but=("dataset",))
    return settings.model_config(taken, 1)


@pytest.mark.parametrize("kind", ["swin", "convnext", "resnet"])
def test_defaults_give_way_to_a_file_of_any_size(tmp_path, kind, caplog):
    model, _ = make(kind, **SIZES)
    given = config(write(tmp_path, random_tensors(model)))
    before = given.to_json()
    with caplog.at_level(logging.INFO, logger="absl"):
        taken = take(given)
    assert shaping(taken) == shaping(model)
    assert given.to_json() == before
    assert "model.hidden_dim=32" in caplog.text and "model.backbone.name='" in caplog.text


def test_a_published_backbone_is_called_by_its_name():
    backbone = backbones.backbone_config("swin_tiny", drop_path_rate=0.05)
    found = start._named_backbone(backbone)
    assert found["model.backbone.name"] == "swin_tiny"
    assert found["model.backbone.overrides"].to_dict() == {"drop_path_rate": 0.05}


def test_a_workdir_gives_every_field(tmp_path):
    model, trees = make("resnet", queries="zeros", text_causal=False)
    params, stats = (zeros(tree) for tree in trees)
    trained = checkpoint.Trained(model.to_dict(), params, stats, tiny.metadata(), {"eval": {}}, 0)
    checkpoint.write_converted(tmp_path / "run", trained)
    taken = take(config(str(tmp_path / "run")))
    assert taken.queries == "zeros" and not taken.text_causal
    assert shaping(taken) == shaping(model)


def zeros(tree):
    if isinstance(tree, dict):
        return {key: zeros(value) for key, value in tree.items()}
    return np.zeros(tree.shape, tree.dtype)


def test_dropout_stays_that_of_the_run(tmp_path):
    model, _ = make("resnet", **SIZES)
    path = write(tmp_path, random_tensors(model))
    assert take(config(path, encoder_dropout=0.3)).encoder_dropout == 0.3


@pytest.mark.parametrize(
    ("key", "value", "there"),
    [
        ("hidden_dim", 64, 32),
        ("mask_dim", 64, 32),
        ("encoder_ffn", 99, 32),
        ("num_heads", 16, None),
    ],
)
def test_a_contradiction_is_an_error_with_both_values(tmp_path, key, value, there):
    model, _ = make("resnet", **SIZES)
    path = write(tmp_path, random_tensors(model))
    with pytest.raises(ValueError) as caught:
        take(config(path, **{key: value}))
    message = str(caught.value)
    if there is None:  # the tensors leave it open, but not with these numbers
        assert "heads" in message
    else:
        assert f"model.{key} is {value}, the checkpoint has {there}" in message
        assert f"init.checkpoint={path}" in message and "\n" not in message


def recipe(name: str) -> ConfigDict:
    """The config of a published model."""
    found = common.get_published(catalogue.named(name))
    found.init.checkpoint = "x"
    return found


def test_the_recipe_of_a_published_model_is_its_architecture(monkeypatch, caplog):
    for row in catalogue.MODELS:
        model = OneFormerConfig.published(row.name)
        monkeypatch.setattr(start, "_architecture", lambda *_, model=model: (model, True))
        with caplog.at_level(logging.INFO, logger="absl"):
            assert take(recipe(row.name)) == dataclasses.replace(model, num_classes=1), row.name
    assert not caplog.text


@pytest.mark.parametrize(
    ("run", "pretrained"),
    [
        ("ade20k:dinat_large,res=1280,pretrain=coco", "coco:dinat_large"),
        ("ade20k:internimage_huge,head=1024,pretrain=coco", "coco:internimage_huge,head=1024"),
        *(
            (
                f"cityscapes:convnext_{size},pretrain=mapillary",
                f"mapillary:convnext_{size},for=cityscapes",
            )
            for size in ("large", "xlarge")
        ),
    ],
)
def test_the_recipes_that_begin_with_another_model_do(monkeypatch, run, pretrained):
    model = OneFormerConfig.published(pretrained)
    monkeypatch.setattr(start, "_architecture", lambda *_: (model, True))
    assert take(recipe(run)) == dataclasses.replace(OneFormerConfig.published(run), num_classes=1)


def test_another_backbone_is_a_contradiction(tmp_path):
    path = write(tmp_path, random_tensors(make("swin", **SIZES)[0]))
    given = config(path)
    with given.unlocked():
        given.model.backbone.name = "swin_tiny"
    with pytest.raises(ValueError, match=r"model\.backbone has embed_dim=96, the checkpoint has 8"):
        take(given)
    given.model.backbone.name = "convnext_large"
    with pytest.raises(ValueError, match="is a convnext, the checkpoint has a swin"):
        take(given)


def test_a_run_may_differ_in_queries_layers_and_texts(tmp_path, caplog):
    path = write(tmp_path, random_tensors(make("resnet", **SIZES)[0]))
    own = dict(num_queries=20, decoder_layers=2, text_width=64)
    with caplog.at_level(logging.WARNING, logger="absl"):
        taken = take(config(path, **own))
    assert {key: getattr(taken, key) for key in own} == own
    assert "model.num_queries is 20, the checkpoint has 7" in caplog.text
    assert "model.decoder_layers is 2, the checkpoint has 3" in caplog.text


def test_a_file_without_texts_tells_nothing_about_them(tmp_path, caplog):
    tensors = random_tensors(make("resnet", num_queries=40, **SIZES)[0])
    tensors = {k: v for k, v in tensors.items() if not k.startswith(("text_", "prompt_ctx"))}
    with caplog.at_level(logging.WARNING, logger="absl"):
        taken = take(config(write(tmp_path, tensors), text_layers=3, num_context=4))
    assert (taken.num_queries, taken.text_layers, taken.num_context) == (40, 3, 4)
    assert not caplog.text


def test_what_no_tensor_shows_is_no_contradiction(tmp_path, caplog):
    path = write(tmp_path, random_tensors(make("resnet", **SIZES)[0]))
    own = dict(text_heads=2, text_causal=False, queries="zeros")
    with caplog.at_level(logging.WARNING, logger="absl"):
        taken = take(config(path, **own))
    assert {key: getattr(taken, key) for key in own} == own
    assert not caplog.text


def test_what_tensors_do_not_tell_is_as_the_config_has_it(tmp_path):
    fields = dict(SIZES, num_heads=2, encoder_points=2)
    path = write(tmp_path, random_tensors(make("dinat", **fields)[0]))
    given = config(path, num_heads=2, encoder_points=2)
    with pytest.raises(ValueError, match="dilations"):  # of no published size
        take(given)
    given.model.backbone.name = "dinat"
    with given.unlocked():
        given.model.backbone.overrides = BACKBONES["dinat"]
    taken = take(given)
    assert taken.backbone.dilations == BACKBONES["dinat"]["dilations"]
    assert (taken.num_heads, taken.encoder_points) == (2, 2)


def test_without_a_checkpoint_the_config_is_as_it_was():
    given = config()
    assert data.with_architecture(given) is given


def test_a_run_that_has_begun_keeps_its_architecture_without_the_file(tmp_path):
    model, _ = make("resnet", **SIZES)
    path = write(tmp_path, random_tensors(model))
    given = config(path)
    first = data.with_architecture(given, str(tmp_path / "run"))
    descriptions.claim_workdir(
        tmp_path / "run",
        settings.model_config(first, tiny.CLASSES).to_dict(),
        first.to_json(),
        tiny.metadata(),
    )
    (tmp_path / "weights.pkl").unlink()
    again = data.with_architecture(given, str(tmp_path / "run"))
    assert again.model.to_dict() == first.model.to_dict()
    with pytest.raises(ValueError, match="does not exist"):
        data.with_architecture(given, str(tmp_path / "other"))


def test_the_loader_and_the_loop_get_the_architecture_of_the_checkpoint(tmp_path, monkeypatch):
    from oneformer_jax.configs import synthetic

    model, _ = make("resnet", num_queries=11, **SIZES)
    given = synthetic.get_config()
    given.model = common.get_base().model
    given.dataset.data_dir = str(tmp_path / "data")
    given.dataset.options.update(size=64, train_examples=4, validation_examples=2)
    given.init.checkpoint = write(tmp_path, random_tensors(model))
    seen = {}

    def train(taken, workdir, *, train_batches, **_):
        batch = next(train_batches(0))
        seen.update(texts=batch["text_ids"].shape[1], queries=taken.model.num_queries)

    monkeypatch.setattr(loop, "train", train)
    given.data.batch_size, given.data.crop_size = 2, (64, 64)
    modes.train(given.lock(), str(tmp_path / "run"))
    assert seen == {"texts": 11 - 3, "queries": 11}


@pytest.mark.parametrize(
    ("key", "file", "message"),
    [
        ("backbone", "nowhere.pth", r"init\.backbone: .*nowhere\.pth does not exist"),
        ("checkpoint", "nowhere.pth", r"init\.checkpoint: .*nowhere\.pth does not exist"),
        ("backbone", "convnext", r"init\.backbone=.* is not of the backbone of this config"),
        ("checkpoint", "convnext", "is a resnet, the checkpoint has a convnext"),
        ("backbone", "https://127.0.0.1:9/swin.pth", r"init\.backbone: https://127\.0\.0\.1:9/"),
        ("checkpoint", "https://127.0.0.1:9/x.pth", r"init\.checkpoint: https://127\.0\.0\.1:9/"),
    ],
)
def test_wrong_weights_are_found_before_the_data(tmp_path, monkeypatch, key, file, message):
    def kept_out(*_, **__):
        pytest.fail("the data was opened")

    monkeypatch.setattr(data, "open_split", kept_out)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "pause", lambda _: None)
    given = tiny_resnet()
    if file == "convnext":
        file = write(tmp_path, random_tensors(make("convnext", **SIZES)[0]))
    elif "://" not in file:
        file = str(tmp_path / file)
    given.init[key] = file
    with pytest.raises(ValueError, match=message):
        modes.train(given.lock(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def tiny_resnet() -> ConfigDict:
    given = common.get_base()
    given.model.backbone.name = "resnet"
    given.model.backbone.overrides = {**BACKBONES["resnet"], "norm": "batch"}
    return given


def test_weights_that_do_not_fit_a_begun_folder_are_found_before_the_data(tmp_path, monkeypatch):
    """Its architecture stays; before the first checkpoint the file is still read."""
    monkeypatch.setattr(data, "open_split", lambda *_, **__: pytest.fail("the data was opened"))
    run = tmp_path / "run"
    model, trees = make("resnet", **SIZES)
    descriptions.claim_workdir(run, model.to_dict(), tiny_resnet().to_json(), tiny.metadata())
    other, other_trees = make("convnext", hidden_dim=96, mask_dim=48)
    params, stats = (zeros(tree) for tree in other_trees)
    trained = checkpoint.Trained(other.to_dict(), params, stats, tiny.metadata(), {"eval": {}}, 0)
    checkpoint.write_converted(tmp_path / "other", trained)
    given = config(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"init\.checkpoint=.*other is of another model"):
        modes.train(given, str(run))
    # A run that resumes reads no file.
    params, stats = (zeros(tree) for tree in trees)
    with checkpoint.Checkpoints(run) as checkpoints:
        checkpoints.save(3, {"step": np.int32(3), "params": params, "stats": stats}, {"step": 3})
    start.check_start(config(str(tmp_path / "nowhere.pth")), run)
