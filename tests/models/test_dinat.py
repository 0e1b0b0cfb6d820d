"""DiNAT against loops in NumPy, its published sizes and the rules that all backbones keep."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.models import backbones, functional
from oneformer_jax.models.backbones.dinat import DILATIONS
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import optim, sharding
from tests import tiny
from tests.kernels.test_neighborhood_attention import loop_reference
from tests.models.test_backbones import (
    array,
    assert_close,
    build,
    gelu,
    image_of,
    jit,
    layer_norm,
    linear,
    shapes_of,
    value_and_gradients,
)

SMALL = backbones.DinatConfig(
    embed_dim=8,
    depths=(2, 1, 1, 1),
    num_heads=(2, 2, 4, 4),
    kernel_size=3,
    dilations=((1, 3), (2,), (1,), (2,)),
)


def convolution(x, layer):
    """3 x 3 with stride 2 and padding 1 on a map [H, W, C], pixel by pixel."""
    height, width, _ = x.shape
    kernel = array(layer.kernel)
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((math.ceil(height / 2), math.ceil(width / 2), kernel.shape[-1]))
    for r, c in np.ndindex(*out.shape[:2]):
        patch = padded[2 * r : 2 * r + 3, 2 * c : 2 * c + 3]
        out[r, c] = np.einsum("ijk,ijko->o", patch, kernel[: len(patch), : patch.shape[1]])
    return out if layer.bias is None else out + array(layer.bias)


def _block(x, block, kernel_size, dilation):
    height, width, channels = x.shape
    edge = kernel_size * dilation
    padded = np.zeros((max(height, edge), max(width, edge), channels))
    padded[:height, :width] = layer_norm(x, block.norm1)
    heads = block.attn.num_heads
    qkv = linear(padded, block.attn.qkv).reshape(1, *padded.shape[:2], 3, heads, -1)
    out = loop_reference(*np.moveaxis(qkv, 3, 0), array(block.attn.rpb), kernel_size, dilation)[0]
    x = x + linear(out[0, :height, :width].reshape(x.shape), block.attn.proj)
    return x + linear(gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)


def _forward(model, image):
    """The four maps of one image [H, W, 3]."""
    stem = model.patch_embed
    x = layer_norm(convolution(convolution(image, stem.proj[0]), stem.proj[1]), stem.norm)
    outputs = []
    for stage, dilations in enumerate(SMALL.dilations):
        level = model.levels[stage]
        for block, dilation in zip(level.blocks, dilations, strict=True):
            x = _block(x, block, SMALL.kernel_size, dilation)
        outputs.append(layer_norm(x, getattr(model, f"norm{stage}")))
        if stage < 3:
            x = layer_norm(convolution(x, level.downsample.reduction), level.downsample.norm)
    return outputs


@pytest.mark.parametrize("size", [(32, 64), (45, 70)])
def test_features_equal_loops(size):
    """The maps are 8 x 16 to 1 x 2 and 12 x 18 to 2 x 3: some smaller than the neighbourhood."""
    model = build(SMALL)
    image = image_of(2, *size, 3)
    graphdef, state = nnx.split(model)
    found = jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, image)
    expected = _forward(model, image[1].astype(np.float64))
    for stage, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        stride = 4 * 2**stage
        assert ours.shape == (2, *(math.ceil(n / stride) for n in size), SMALL.channels[stage])
        np.testing.assert_allclose(ours[1], theirs, atol=2e-4 * np.abs(theirs).max())


def test_remat_changes_nothing_but_memory():
    x, results = image_of(2, 5, 8, SMALL.embed_dim), []
    for remat in (False, True):
        level = build(SMALL, remat=remat).levels[0]
        run, parts = value_and_gradients(level, lambda m: m(x, jax.random.key(3)))
        results.append(jit(run)(*parts))
    assert_close(*results)
    gradients = results[1][1]
    gradients.pop("downsample")  # not part of the level's call
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradients))


def test_drop_path_drops_whole_samples():
    config = dataclasses.replace(SMALL, drop_path_rate=0.9)
    model = build(config)
    rates = [rate for level in model.levels for rate in level.rates]
    np.testing.assert_allclose(rates, np.linspace(0, 0.9, 5))
    graphdef, state = nnx.split(model.levels[3].blocks[0])
    x = image_of(32, 2, 3, config.channels[3])
    found, full = (
        jit(lambda state, key: nnx.merge(graphdef, state)(x, key, 0.9))(state, key)
        for key in (jax.random.key(0), None)
    )
    unchanged = np.all(found == x, axis=(1, 2, 3))
    assert 16 < unchanged.sum() < 32  # both branches dropped: 0.81
    assert not np.any(np.all(np.isclose(full, x), axis=(1, 2, 3)))


def test_published_models():
    expected = {"ade20k": (11, "base"), "cityscapes": (7, "7x7")}
    for dataset, (kernel_size, table) in expected.items():
        variant = "dinat_large,res=640" if dataset == "ade20k" else "dinat_large"
        config = OneFormerConfig.published(f"{dataset}:{variant}")
        assert config.num_queries == 250
        assert config.backbone.kernel_size == kernel_size
        assert config.backbone.dilations == DILATIONS[table]
    assert OneFormerConfig.published("coco:dinat_large").num_queries == 150
    wide = OneFormerConfig.published("ade20k:dinat_large,res=1280")
    assert (wide.num_queries, wide.backbone.kernel_size) == (250, 11)
    assert wide.backbone.dilations[0] == (1, 28, 1)


def test_parameter_names_are_the_official_ones():
    weights, norm, block = ("kernel", "bias"), ("scale", "bias"), "levels/#/blocks/#"
    assert {re.sub(r"\d+", "#", name) for name in shapes_of(SMALL)} == {
        *(f"patch_embed/proj/#/{x}" for x in weights),
        *(f"patch_embed/norm/{x}" for x in norm),
        *(f"{block}/norm#/{x}" for x in norm),
        f"{block}/attn/rpb",
        *(f"{block}/attn/{layer}/{x}" for layer in ("qkv", "proj") for x in weights),
        *(f"{block}/mlp/fc#/{x}" for x in weights),
        "levels/#/downsample/reduction/kernel",
        *(f"levels/#/downsample/norm/{x}" for x in norm),
        *(f"norm#/{x}" for x in norm),
    }


def test_only_norms_are_exempt_from_decay_and_everything_has_a_sharding(mesh8):
    params = functional.abstract(tiny.model_config(backbone=SMALL), training=True).params
    groups = optim.describe_groups(params)
    assert groups["backbone/no_decay"]
    for name in groups["backbone/no_decay"]:
        assert re.search(r"norm\d?/(scale|bias)$", name)
    assert not any("norm" in name for name in groups["backbone/decay"])
    assert "backbone/levels/0/blocks/1/attn/rpb" in groups["backbone/decay"]
    for name in groups["backbone/decay"]:
        sharding.parameter_spec(name, (8, 8), mesh8)


def test_names_and_errors():
    config = backbones.backbone_config("dinat_large", drop_path_rate=0.1)
    assert backbones.from_dict(backbones.to_dict(config)) == config
    sizes = {k: v for k, v in backbones.to_dict(SMALL).items() if k != "kind"}
    for fields, message in (
        ({"dilations": [[1, 3], [2], [1]]}, "dilations is .*a tuple of 4 values"),
        ({"dilations": [[1, 3, 1], [2], [1], [2]]}, r"each block.*\(2, 1, 1, 1\)"),
        ({"dilations": [[1, 0], [2], [1], [2]]}, "dilations is .*an integer from 1 to"),
        ({"dilations": [1, 2, 3, 4]}, "dilations is .*each a tuple"),
        ({"kernel_size": 4}, "kernel_size is 4.*odd"),
        ({"embed_dim": 9}, "embed_dim is 9.*even"),
        ({"num_heads": (3, 3, 3, 3)}, "embed_dim is 8.*num_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            backbones.backbone_config("dinat", **(sizes | fields))
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        build(SMALL)(jnp.zeros((1, 16, 64, 4)))
