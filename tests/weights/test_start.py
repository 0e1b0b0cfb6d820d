"""Starts of a training run: pre-trained backbones, and models of other classes."""

import logging as python_logging
import pickle

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from oneformer_jax.models import backbones, functional
from oneformer_jax.train import checkpoint, sharding, start
from oneformer_jax.weights import convert, names
from oneformer_jax.weights import start as weights_start
from oneformer_jax.weights.files import FileError
from tests import tiny

BACKBONES = {
    "swin": dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=3),
    "convnext": dict(dims=(8, 12, 16, 24), depths=(1, 1, 2, 1)),
    "dinat": dict(
        embed_dim=8,
        depths=(1, 2, 1, 1),
        num_heads=(1, 1, 2, 2),
        kernel_size=3,
        dilations=((2,), (1, 3), (1,), (1,)),
    ),
    "resnet": dict(depths=(1, 1, 2, 1), stem_width=8),
}


def shapes_of(config):
    return functional.abstract(config, training=True)[1:]


def make(kind: str, **fields):
    backbone = backbones.backbone_config(kind, **BACKBONES[kind])
    config = tiny.model_config(**({"backbone": backbone} | fields))
    return config, shapes_of(config)


def random_tensors(config, seed: int = 0) -> dict[str, np.ndarray]:
    """An official state dict of normal numbers."""
    rng = np.random.default_rng(seed)
    expected = dict(convert.leaves(shapes_of(config)))
    kind = backbones.kind_of(config.backbone)
    tensors = {}
    for name, leaf in expected.items():
        group = names.group_of(name, "ours", "official", kind)
        if name == group.ours[0]:
            arrays = [rng.normal(size=expected[one].shape).astype(np.float32) for one in group.ours]
            tensors |= dict(zip(group.theirs, group.to_theirs(arrays), strict=True))
        assert leaf.dtype == np.float32
    return tensors


def imagenet(kind: str, tensors) -> dict[str, np.ndarray]:
    """The backbone as a classifier's file has it: without prefix and output norms, with a head."""
    found = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
        and not any(name.startswith(f"backbone.norm{i}.") for i in range(4))
    }
    found |= {"head.weight": np.ones((10, 4), np.float32), "norm.bias": np.ones(4, np.float32)}
    if kind == "swin":
        found["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((9, 9), np.int64)
        found["layers.1.blocks.1.attn_mask"] = np.zeros((4, 9, 9), np.float32)
    if kind == "resnet":
        found = {torchvision(name): value for name, value in found.items() if "." in name}
        found |= {"fc.weight": np.ones((10, 4), np.float32)}
        found.pop("head.weight")
        found.pop("norm.bias")
        found["bn1.num_batches_tracked"] = np.int64([3])[0:1]
    return found


def torchvision(name: str) -> str:
    """torchvision's name of one of Detectron2's ResNet tensors."""
    if name.startswith("stem."):
        return name.removeprefix("stem.").replace("conv1.norm", "bn1")
    stage, rest = name.split(".", 1)
    if stage.startswith("res"):
        stage = f"layer{int(stage[3:]) - 1}"
    rest = rest.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    for i in (1, 2, 3):
        rest = rest.replace(f"conv{i}.norm", f"bn{i}")
    return f"{stage}.{rest}"


def write(tmp_path, tensors, key="model"):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({key: tensors} if key else tensors))
    return str(path)


def settings(**init) -> ConfigDict:
    return ConfigDict({"backbone": "", "checkpoint": ""} | init)


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_a_pretrained_backbone(tmp_path, kind):
    config, (params, stats) = make(kind)
    tensors = random_tensors(config)
    # DiNAT's and torchvision's files have no level above the state dict.
    path = write(tmp_path, imagenet(kind, tensors), "model" if kind != "dinat" else "")
    found = start.read_start(settings(backbone=path), params, stats, config.backbone)
    expected = dict(convert.leaves((params, stats)))
    wanted = [name for name in expected if name.startswith("backbone.")]
    fresh = [name for name in wanted if name.split(".")[1] in ("norm0", "norm1", "norm2", "norm3")]
    assert sorted(found.fresh) == sorted(fresh)
    assert sorted(found.arrays) == sorted(set(wanted) - set(fresh))
    for name, read in found.arrays.items():
        group = names.group_of(name, "ours", "official", kind)
        values = group.to_ours([tensors[other] for other in group.theirs])
        np.testing.assert_array_equal(read(), values[group.ours.index(name)], err_msg=name)
    assert found.unused


def test_the_backbone_of_a_whole_model(tmp_path):
    config, (params, stats) = make("swin")
    path = write(tmp_path, random_tensors(config))
    found = start.read_start(settings(backbone=path), params, stats, config.backbone)
    assert all(name.startswith("backbone.") for name in found.arrays)
    assert not found.fresh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("patch_embed.norm.bias"), "1 tensors are missing: backbone.patch_embed"),
        (
            lambda t: t.update({"layers.0.blocks.0.mlp.fc1.bias": np.ones(3, np.float32)}),
            "1 tensors do not fit: backbone.layers.0.blocks.0.mlp.fc1.bias",
        ),
        (
            lambda t: t.update({"layers.0.blocks.1.norm1.bias": np.ones(8, np.float32)}),
            "1 tensors have no place: backbone.layers.0.blocks.1.norm1.bias",
        ),
    ],
)
def test_another_backbone_is_refused(tmp_path, change, message):
    config, (params, stats) = make("swin")
    tensors = imagenet("swin", random_tensors(config))
    change(tensors)
    with pytest.raises(FileError, match=message) as caught:
        start.read_start(
            settings(backbone=write(tmp_path, tensors)), params, stats, config.backbone
        )
    assert "init.backbone=" in str(caught.value)


def test_a_backbone_of_another_kind_is_refused(tmp_path):
    tensors = imagenet("convnext", random_tensors(make("convnext")[0]))
    config, (params, stats) = make("swin")
    with pytest.raises(FileError, match="is not of the backbone of this config"):
        start.read_start(
            settings(backbone=write(tmp_path, tensors)), params, stats, config.backbone
        )


def test_a_model_of_other_classes(tmp_path):
    path = write(tmp_path, random_tensors(make("resnet", num_classes=3)[0]))
    config, (params, stats) = make("resnet")
    found = start.read_start(settings(checkpoint=path), params, stats, config.backbone)
    assert found.fresh == {
        "predictor.class_embed.kernel": "there [32, 4], here [32, 6]",
        "predictor.class_embed.bias": "there [4], here [6]",
    }
    total = len(dict(convert.leaves((params, stats))))
    assert len(found.arrays) == total - 2


def test_a_model_without_text_branch(tmp_path):
    tensors = {
        name: value
        for name, value in random_tensors(make("resnet")[0]).items()
        if not name.startswith(("text_", "prompt_ctx", "criterion"))
    }
    config, (params, stats) = make("resnet")
    path = write(tmp_path, tensors)
    found = start.read_start(settings(checkpoint=path), params, stats, config.backbone)
    assert set(found.fresh.values()) == {"not in the file"}
    assert {name.split(".")[0] for name in found.fresh} == set(functional.TEXT_PARTS)


def test_a_wholly_different_model_is_refused(tmp_path):
    path = write(tmp_path, random_tensors(make("swin")[0]))
    config, (params, stats) = make("resnet")
    with pytest.raises(FileError, match=r"init\.checkpoint=.*only \d+% of the parameters fit"):
        start.read_start(settings(checkpoint=path), params, stats, config.backbone)


def test_both_or_nothing(tmp_path):
    config, (params, stats) = make("resnet")
    assert start.read_start(settings(), params, stats, config.backbone) is None
    with pytest.raises(ValueError, match="must be empty while"):
        start.read_start(settings(backbone="a", checkpoint="b"), params, stats, config.backbone)
    with pytest.raises(FileError, match="nowhere does not exist"):
        start.read_start(
            settings(backbone=str(tmp_path / "nowhere")), params, stats, config.backbone
        )


def test_one_of_our_workdirs(tmp_path):
    config, trees = make("convnext", num_classes=3)
    rng = np.random.default_rng(0)
    params, stats = (
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree) for tree in trees
    )
    # A dataset of three classes.
    metadata = tiny.metadata()
    fields = {
        name: getattr(metadata, name)[:3]
        for name in ("class_names", "is_thing", "colors", "category_ids")
    }
    metadata = type(metadata)(dataset="three", **fields)
    trained = checkpoint.Trained(config.to_dict(), params, stats, metadata, {"eval": {}}, 0)
    checkpoint.write_converted(tmp_path / "run", trained)
    _, (params5, stats5) = make("convnext")
    path = str(tmp_path / "run")
    found = start.read_start(settings(checkpoint=path), params5, stats5, config.backbone)
    assert set(found.fresh) == {"predictor.class_embed.kernel", "predictor.class_embed.bias"}
    name = "backbone.stages.0.0.gamma"
    np.testing.assert_array_equal(found.arrays[name](), dict(names.flatten(params))[name])


def test_the_state_takes_the_arrays_where_they_lie(mesh8, caplog):
    template = {"a": {0: np.zeros((16, 8), np.float32)}, "b": np.ones(3, np.float32)}
    shards = sharding.state_shardings({"params": template, "stats": {}, "ema": template}, mesh8)
    state = jax.device_put({"params": template, "stats": {}, "ema": template}, shards)
    value = np.arange(128, dtype=np.float32).reshape(16, 8)
    reads = []

    def read():
        reads.append(1)
        return value

    found = weights_start.Start({"a.0": read}, {"b": "not in the file"}, ["head.weight"])
    with caplog.at_level(python_logging.INFO, logger="absl"):
        start.log_start(found, "file.pth")
    assert "file.pth: 1 arrays are taken" in caplog.text
    assert "1 start afresh (not in the file): b" in caplog.text
    assert "head.weight" in caplog.text
    new = start.apply_start(found, state)
    for part in ("params", "ema"):
        np.testing.assert_array_equal(new[part]["a"][0], value)
        np.testing.assert_array_equal(new[part]["b"], template["b"])
        assert new[part]["a"][0].sharding == state[part]["a"][0].sharding
    assert len(reads) == 1
