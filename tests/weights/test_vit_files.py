"""Files of DINOv2 and DINOv3: official names, packed tensors, masks, licences."""

import dataclasses
import json
import logging as python_logging
import pickle

import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from oneformer_jax.files import FileError
from oneformer_jax.models import backbones, functional
from oneformer_jax.train import start
from oneformer_jax.weights import convert
from tests import tiny

SIZE = dict(embed_dim=16, depth=2, num_heads=2)
DINOV2 = backbones.ViTConfig(**SIZE, mlp_dim=24, positions=2, registers=2, gated=True)
DINOV3 = backbones.ViTConfig(
    **SIZE, mlp_dim=32, patch_size=16, positions=0, registers=4, key_bias=False
)


def official(config, seed=0):
    """An official state dict of normal numbers, written down from its published names."""
    rng = np.random.default_rng(seed)
    width, hidden, patch = config.embed_dim, config.mlp_dim, config.patch_size

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    tensors = {
        "cls_token": draw(1, 1, width),
        "mask_token": draw(1, width),
        "patch_embed.proj.weight": draw(width, 3, patch, patch),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": draw(width),
        "norm.bias": draw(width),
    }
    if config.positions:
        tensors["pos_embed"] = draw(1, 1 + config.positions**2, width)
        tensors["register_tokens"] = draw(1, config.registers, width)
    else:
        tensors["storage_tokens"] = draw(1, config.registers, width)
        tensors["rope_embed.periods"] = (100 ** (np.arange(2) / 2)).astype(np.float32)
    for i in range(config.depth):
        shapes = {"attn.qkv": 3 * width, "attn.proj": width}
        if config.gated:
            shapes |= {"mlp.w12": 2 * hidden}
        else:
            shapes |= {"mlp.fc1": hidden}
        for name, rows in shapes.items():
            tensors[f"blocks.{i}.{name}.weight"] = draw(rows, width)
            tensors[f"blocks.{i}.{name}.bias"] = draw(rows)
        last = "w3" if config.gated else "fc2"
        tensors[f"blocks.{i}.mlp.{last}.weight"] = draw(width, hidden)
        tensors[f"blocks.{i}.mlp.{last}.bias"] = draw(width)
        for name in ("ls1.gamma", "ls2.gamma", "norm1.weight", "norm1.bias"):
            tensors[f"blocks.{i}.{name}"] = draw(width)
        for name in ("norm2.weight", "norm2.bias"):
            tensors[f"blocks.{i}.{name}"] = draw(width)
        if not config.positions:
            mask = np.repeat(np.float32([1, 0, 1]), width)
            tensors[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    return tensors


def read(config, path):
    model = tiny.model_config(backbone=config)
    params, stats = functional.abstract(model, training=True)[1:]
    init = ConfigDict({"backbone": str(path), "checkpoint": ""})
    return start.read_start(init, params, stats, config), dict(convert.leaves((params, stats)))


def write(tmp_path, tensors):
    path = tmp_path / "dino.pth"
    path.write_bytes(pickle.dumps(tensors))
    return path


@pytest.mark.parametrize("config", [DINOV2, DINOV3], ids=["dinov2", "dinov3"])
def test_official_files_are_read_whole(tmp_path, config):
    tensors = official(config)
    found, expected = read(config, write(tmp_path, tensors))
    wanted = {name for name in expected if name.startswith("backbone.")}
    assert {name.split(".")[1] for name in found.fresh} == {"pyramid"}
    assert set(found.arrays) == wanted - set(found.fresh)
    q, k, v = np.split(tensors["blocks.1.attn.qkv.weight"], 3)
    qb, kb, vb = np.split(tensors["blocks.1.attn.qkv.bias"], 3)
    block = "backbone.blocks.1"
    values = {
        f"{block}.attn.q.kernel": q.T,
        f"{block}.attn.k.kernel": k.T,
        f"{block}.attn.v.kernel": v.T,
        f"{block}.attn.q.bias": qb,
        f"{block}.attn.v.bias": vb,
        f"{block}.ls2.gamma": tensors["blocks.1.ls2.gamma"],
        "backbone.patch_embed.proj.kernel": tensors["patch_embed.proj.weight"].transpose(
            2, 3, 1, 0
        ),
        "backbone.cls_token": tensors["cls_token"],
    }
    if config.gated:
        first, second = np.split(tensors["blocks.1.mlp.w12.weight"], 2)
        values |= {f"{block}.mlp.w1.kernel": first.T, f"{block}.mlp.w2.kernel": second.T}
        values |= {f"{block}.attn.k.bias": kb, "backbone.pos_embed": tensors["pos_embed"]}
    else:
        assert f"{block}.attn.k.bias" not in found.arrays
        values["backbone.register_tokens"] = tensors["storage_tokens"]
    for name, value in values.items():
        np.testing.assert_array_equal(found.arrays[name](), value, err_msg=name)
    assert "backbone.mask_token" in found.unused


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DINOV3, lambda t: t.pop("blocks.1.ls1.gamma"), "1 tensors are missing: .*blocks.1.ls1.ga"),
        (
            DINOV3,
            lambda t: t.update({"blocks.0.attn.qkv.bias_mask": np.ones(48, np.float32)}),
            "blocks.0.attn.qkv.bias_mask is not DINOv3's mask",
        ),
        (
            DINOV3,
            lambda t: t.update({"blocks.0.attn.qkv.bias_mask": np.ones(47, np.float32)}),
            "blocks.0.attn.qkv.bias_mask is not DINOv3's mask",
        ),
        (
            DINOV3,
            lambda t: t.update({"rope_embed.periods": np.float32([1, 50])}),
            "rope_embed.periods are not those of rope_base 100.0 and heads of 8 channels",
        ),
        (
            DINOV3,  # a key's bias that nothing masks is no DINOv3
            lambda t: [t.pop(f"blocks.{i}.attn.qkv.bias_mask") for i in range(2)],
            "2 tensors have no place: .*blocks.0.attn.k.bias",
        ),
        (
            DINOV2,
            lambda t: t.update({"blocks.0.attn.qkv.bias": np.ones(47, np.float32)}),
            "no place: backbone.blocks.0.attn.qkv.bias",
        ),
        (
            DINOV2,
            lambda t: t.update({"blocks.0.attn.qkv.bias": np.ones((), np.float32)}),
            "no place: backbone.blocks.0.attn.qkv.bias",
        ),
        (
            dataclasses.replace(DINOV2, positions=3),
            lambda t: None,
            r"backbone.pos_embed float32\[1, 5, 16\] for backbone.pos_embed \[1, 10, 16\]",
        ),
        (dataclasses.replace(DINOV2, gated=False), lambda t: None, "are missing: .*mlp.fc1.weight"),
        (dataclasses.replace(DINOV2, depth=1), lambda t: None, "no place: backbone.blocks.1"),
        (dataclasses.replace(DINOV2, depth=3), lambda t: None, "are missing: backbone.blocks.2"),
        (dataclasses.replace(DINOV2, patch_size=16), lambda t: None, "do not fit: .*patch_embed"),
    ],
)
def test_another_transformer_is_refused(tmp_path, config, change, message):
    tensors = official(DINOV3 if config is DINOV3 else DINOV2)
    change(tensors)
    with pytest.raises(FileError, match=message):
        read(config, write(tmp_path, tensors))


def test_a_transformer_is_no_swin(tmp_path):
    path = write(tmp_path, official(DINOV2))
    swin = backbones.backbone_config("swin_tiny")
    with pytest.raises(FileError, match="is not of the backbone of this config"):
        read(swin, path)


def folder(tmp_path, config_json, readme=None):
    """A Hugging Face folder of DINOv3, from the official tensors."""
    renamed = {}
    for name, value in official(DINOV3).items():
        if "mask" in name or "rope" in name:
            continue
        name = name.replace("storage_tokens", "embeddings.register_tokens")
        name = name.replace("cls_token", "embeddings.cls_token")
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings")
        name = name.replace("blocks.", "layer.").replace("mlp.fc1", "mlp.up_proj")
        name = name.replace("mlp.fc2", "mlp.down_proj").replace("attn.proj", "attention.o_proj")
        for i in (1, 2):
            name = name.replace(f"ls{i}.gamma", f"layer_scale{i}.lambda1")
        if "attn.qkv" in name:
            for letter, part in zip("qkv", np.split(value, 3), strict=True):
                other = name.replace("attn.qkv", f"attention.{letter}_proj")
                if other != f"{other.split('attention')[0]}attention.k_proj.bias":
                    renamed[other] = np.ascontiguousarray(part)
        else:
            renamed[name] = value
    safetensors.numpy.save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    return tmp_path


NOTED = {"model_type": "dinov3_vit", "num_attention_heads": 2, "layer_norm_eps": 1e-6}


def test_a_folder_holds_the_same_arrays_as_the_official_file(tmp_path):
    theirs, _ = read(DINOV3, folder(tmp_path, NOTED))
    ours, _ = read(DINOV3, write(tmp_path, official(DINOV3)))
    assert set(theirs.arrays) == set(ours.arrays)
    for name, value in ours.arrays.items():
        np.testing.assert_array_equal(theirs.arrays[name](), value(), err_msg=name)


def test_a_whole_model_of_ours_keeps_its_transformer(tmp_path):
    config = tiny.model_config(backbone=DINOV3)
    _, params, stats = tiny.random_model(config)
    how = dict(metadata=tiny.metadata(), settings={})
    path = tmp_path / "model.pth"
    convert.write_model(path, "official", config, params, stats, **how)
    found = convert.read_model(path)
    assert found.config == config
    read_back = dict(convert.leaves((found.params, found.stats)))
    for name, value in convert.leaves((params, stats)):
        np.testing.assert_array_equal(read_back[name], value, err_msg=name)
    with pytest.raises(ValueError, match=r"hugging_face format has no name for backbone\.blocks"):
        convert.write_model(tmp_path / "x", "hugging_face", config, params, stats, **how)


@pytest.mark.parametrize(
    ("noted", "message"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads is 4 in config.json, num_heads is 2"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05 in config.json, norm_epsilon is 1e-06"),
        ({"rope_theta": 10.0}, "rope_theta is 10.0 in config.json, rope_base is 100.0 here"),
        ({"hidden_act": "relu"}, "hidden_act is relu in config.json, gelu here"),
        ({"num_attention_heads": "two"}, "config.json has an unexpected value: .*`int"),
    ],
)
def test_what_config_json_says_otherwise_is_refused(tmp_path, noted, message):
    with pytest.raises(FileError, match=message):
        read(DINOV3, folder(tmp_path, NOTED | noted))


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (
            "---\nlicense: other\nlicense_name: dinov3-license\n# x\n---\n# DINOv3",
            "other dinov3-license (README.md)",
        ),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0 (README.md)"),
        pytest.param("---\nlicense: mit\n---\n" + "x" * (1 << 20), "mit (README.md)", id="long"),
        ("license: mine\n", "the DINOv3 License, if this is the released file"),
        (None, "the DINOv3 License, if this is the released file"),
        ("---\nlicense: \x1b[2Jred\n---\n", r"'\x1b[2Jred' (README.md)"),
    ],
)
def test_the_licence_is_told_when_a_file_is_loaded(tmp_path, caplog, readme, licence):
    found, _ = read(DINOV3, folder(tmp_path, NOTED, readme))
    with caplog.at_level(python_logging.INFO, logger="absl"):
        start.log_start(found, "file")
    assert f"licence: {licence}" in caplog.text


def test_the_licence_of_an_official_dinov2_is_told(tmp_path):
    found, _ = read(DINOV2, write(tmp_path, official(DINOV2)))
    assert found.licence.startswith("Apache-2.0")
