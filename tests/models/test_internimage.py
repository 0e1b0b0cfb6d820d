"""InternImage against loops in NumPy, its published sizes and the rules that all backbones keep."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.models import backbones, functional
from oneformer_jax.models.backbones.internimage import sample
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import optim
from tests import tiny
from tests.models.test_backbones import (
    array,
    assert_close,
    build,
    gelu,
    image_of,
    jit,
    linear,
    shapes_of,
    value_and_gradients,
)
from tests.models.test_dinat import convolution

SMALL = backbones.InternImageConfig(
    embed_dim=8, depths=(1, 1, 2, 1), groups=(2, 2, 4, 4), norm_after=(0, 1), mlp_ratio=2.0
)


def _layer_norm(x, norm):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * array(norm.scale) + array(norm.bias)


def _bilinear(group, x, y):
    """The value of a map [H, W, D] at a point in pixels, zero outside."""
    height, width, _ = group.shape
    left, top = math.floor(x), math.floor(y)
    value = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(x - column)) * (1 - abs(y - row)) * group[row, column]
    return value


def _sample(value, offsets, shares):
    """[H, W, G, D], [H, W, G, 9, 2], [H, W, G, 9] to [H, W, G, D], the x of a point outermost."""
    out = np.zeros(value.shape)
    for r, c, g in np.ndindex(*value.shape[:3]):
        places = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
        for point, (x, y) in enumerate(places):
            right, down = offsets[r, c, g, point]
            share = shares[r, c, g, point]
            out[r, c, g] += share * _bilinear(value[:, :, g], c + x + right, r + y + down)
    return out


def _dcn(x, dcn):
    height, width, channels = x.shape
    groups = dcn.groups
    value = linear(x, dcn.input_proj).reshape(height, width, groups, -1)
    kernel = array(dcn.dw_conv.kernel)[:, :, 0]
    half = len(kernel) // 2
    padded = np.pad(x, ((half, half), (half, half), (0, 0)))
    y = np.zeros_like(x)
    for r, c in np.ndindex(height, width):
        y[r, c] = (padded[r : r + len(kernel), c : c + len(kernel)] * kernel).sum((0, 1))
    y = gelu(_layer_norm(y + array(dcn.dw_conv.bias), dcn.dw_norm))
    offsets = linear(y, dcn.offset).reshape(height, width, groups, 9, 2)
    shares = np.exp(linear(y, dcn.mask).reshape(height, width, groups, 9))
    shares /= shares.sum(-1, keepdims=True)
    scale = y @ array(dcn.center_feature_scale_proj_weight).T
    scale += array(dcn.center_feature_scale_proj_bias)
    scale = (1 / (1 + np.exp(-scale)))[..., None]
    out = _sample(value, offsets, shares) * (1 - scale) + value * scale
    return linear(out.reshape(height, width, channels), dcn.output_proj)


def _forward(model, image):
    """The four maps of one image [H, W, 3]."""
    stem = model.patch_embed
    x = gelu(_layer_norm(convolution(image, stem.conv1), stem.norm1))
    x = _layer_norm(convolution(x, stem.conv2), stem.norm2)
    outputs = []
    for stage, level in enumerate(model.levels):
        for i, block in enumerate(level.blocks):
            x = x + _layer_norm(_dcn(_layer_norm(x, block.norm1), block.dcn), block.res_post_norm1)
            hidden = gelu(linear(_layer_norm(x, block.norm2), block.mlp.fc1))
            x = x + _layer_norm(linear(hidden, block.mlp.fc2), block.res_post_norm2)
            if stage == 2 and i in SMALL.norm_after:
                x = _layer_norm(x, level.post_norms[SMALL.norm_after.index(i)])
        x = _layer_norm(x, level.norm)
        outputs.append(x)
        if stage < 3:
            x = _layer_norm(convolution(x, level.downsample.conv), level.downsample.norm)
    return outputs


def test_features_equal_loops():
    """Maps of an image whose sides are no multiples of 32: 10 x 17 to 2 x 3."""
    size = (37, 66)
    model = build(SMALL)
    image = image_of(2, *size, 3)
    graphdef, state = nnx.split(model)
    found = jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, image)
    expected = _forward(model, image[1].astype(np.float64))
    for stage, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        stride = 4 * 2**stage
        assert ours.shape == (2, *(math.ceil(n / stride) for n in size), SMALL.channels[stage])
        np.testing.assert_allclose(ours[1], theirs, atol=2e-4 * np.abs(theirs).max())


def _points(height, width, groups, channels):
    rng = np.random.default_rng(0)
    value = rng.normal(size=(2, height * width, groups, channels))
    offsets = 2 * rng.normal(size=(2, height * width, groups, 9, 2))
    return value, offsets, rng.uniform(size=(2, height * width, groups, 9))


def test_the_points_of_a_kernel_go_down_its_columns():
    """Without offsets, point 1 of 9 is the pixel to the left."""
    value = np.arange(12.0, dtype=np.float32).reshape(1, 12, 1, 1)
    shares = np.zeros((1, 12, 1, 9), np.float32)
    shares[..., 1] = 1
    out = sample(value, np.zeros((1, 12, 1, 9, 2), np.float32), shares, (3, 4))
    expected = [[0, 0, 1, 2], [0, 4, 5, 6], [0, 8, 9, 10]]
    np.testing.assert_allclose(out.reshape(3, 4), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (34, 33)], ids=["dense", "gathered"])
def test_samples_and_gradients_equal_the_hat_functions(size):
    """Bilinear sampling as sums over all pixels, which JAX differentiates by itself."""
    height, width = size
    arrays = [jnp.asarray(x, jnp.float32) for x in _points(*size, 18 if height < 9 else 2, 3)]
    row, column = np.divmod(np.arange(height * width), width)

    def hats(value, offsets, shares):
        x = column[:, None, None] + np.repeat([-1, 0, 1], 3) + offsets[..., 0]
        y = row[:, None, None] + np.tile([-1, 0, 1], 3) + offsets[..., 1]
        matrix = 0.0
        for p in range(9):
            along_x = jax.nn.relu(1 - jnp.abs(x[..., p, None] - column))
            along_y = jax.nn.relu(1 - jnp.abs(y[..., p, None] - row))
            matrix += shares[..., p, None] * along_x * along_y
        return jnp.einsum("bqgs,bsgd->bqgd", matrix, value)

    def run(form):
        def loss(*arrays):
            out = form(*arrays)
            return jnp.sum(jnp.sin(out)), out

        gradients, out = jax.jit(jax.grad(loss, range(3), has_aux=True))(*arrays)
        return out, *gradients

    for found, expected in zip(run(lambda *a: sample(*a, size)), run(hats), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_memory_is_a_few_maps():
    """Stage 1 of InternImage-H at 640 pixels: the rows of all samples would be 36 maps."""
    pixels, groups = 160 * 160, 10
    arrays = [
        jax.ShapeDtypeStruct((1, pixels, groups, *rest), jnp.float32)
        for rest in ((32,), (9, 2), (9,))
    ]

    def gradients(*arrays):
        return jax.grad(lambda *a: jnp.sum(jnp.square(sample(*a, (160, 160)))), range(3))(*arrays)

    compiled = jax.jit(gradients).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * 4 * pixels * groups * 32


def test_remat_changes_nothing_but_memory():
    x, results = image_of(2, 3, 5, SMALL.channels[0]), []
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
    found = jit(lambda state: nnx.merge(graphdef, state)(x, jax.random.key(0), 0.9))(state)
    unchanged = np.all(found == x, axis=(1, 2, 3))
    assert 16 < unchanged.sum() < 32  # both branches dropped: 0.81


def test_published_models():
    for config, counts in (
        (OneFormerConfig.published("cityscapes:internimage_huge"), (1114.733, 1097.190)),
        (OneFormerConfig.published("coco:internimage_huge,head=1024"), (1477.467, 1349.100)),
    ):
        assert config.num_queries == 250
        params = functional.abstract(config, training=True).params
        for tree, millions in zip(
            (params, functional.inference_params(params)), counts, strict=True
        ):
            assert round(sum(x.size for x in jax.tree.leaves(tree)) / 1e6, 3) == millions


def test_parameter_names():
    weights, norm, block = ("kernel", "bias"), ("scale", "bias"), "levels/#/blocks/#"
    layers = ("offset", "mask", "input_proj", "output_proj", "dw_conv")
    assert {re.sub(r"\d+", "#", name) for name in shapes_of(SMALL)} == {
        *(f"patch_embed/conv#/{x}" for x in weights),
        *(f"patch_embed/norm#/{x}" for x in norm),
        *(f"{block}/norm#/{x}" for x in norm),
        *(f"{block}/res_post_norm#/{x}" for x in norm),
        *(f"{block}/dcn/{layer}/{x}" for layer in layers for x in weights),
        *(f"{block}/dcn/dw_norm/{x}" for x in norm),
        *(f"{block}/dcn/center_feature_scale_proj_{x}" for x in ("weight", "bias")),
        *(f"{block}/mlp/fc#/{x}" for x in weights),
        *(f"levels/#/norm/{x}" for x in norm),
        *(f"levels/#/post_norms/#/{x}" for x in norm),
        "levels/#/downsample/conv/kernel",
        *(f"levels/#/downsample/norm/{x}" for x in norm),
    }


def test_only_norms_are_exempt_from_decay():
    groups = optim.describe_groups(
        functional.abstract(tiny.model_config(backbone=SMALL), training=True).params
    )
    exempt, decayed = groups["backbone/no_decay"], groups["backbone/decay"]
    assert all(re.search(r"norm[^/]*(/\d)?/(scale|bias)$", name) for name in exempt)
    assert "backbone/levels/2/post_norms/1/scale" in exempt
    assert not any("norm" in name for name in decayed)
    assert "backbone/levels/0/blocks/0/dcn/center_feature_scale_proj_weight" in decayed


def test_initial_values():
    """Every point of a new model lies on its pixel, with the same share, and half is the centre."""

    @jit
    def draw():
        model = backbones.build_backbone(SMALL, rngs=ParamKeys(0))
        return nnx.to_pure_dict(nnx.state(model.levels[0].blocks[0].dcn))

    dcn = draw()
    for name in ("offset", "mask"):
        assert not any(np.any(x) for x in jax.tree.leaves(dcn[name]))
    assert not np.any(dcn["center_feature_scale_proj_weight"])
    bound = math.sqrt(6 / 16)
    assert 0.8 * bound < np.abs(dcn["input_proj"]["kernel"]).max() <= bound
    assert 0.8 / 5 < np.abs(dcn["dw_conv"]["kernel"]).max() <= 1 / 5


def test_names_and_errors():
    config = backbones.backbone_config("internimage_huge", drop_path_rate=0.1)
    assert config.channels == (320, 640, 1280, 2560)
    assert backbones.from_dict(backbones.to_dict(config)) == config
    sizes = {k: v for k, v in backbones.to_dict(SMALL).items() if k != "kind"}
    for fields, message in (
        ({"norm_after": (0, 2)}, "norm_after is .*0 to 1"),
        ({"norm_after": (1, 0)}, "norm_after is .*ascending"),
        ({"dw_kernel_size": 4}, "dw_kernel_size is 4.*odd"),
        ({"groups": (3, 3, 3, 3)}, "embed_dim is 8.*groups"),
    ):
        with pytest.raises(ValueError, match=message):
            backbones.backbone_config("internimage", **(sizes | fields))
