"""Swin and ResNet against loops in NumPy, and the rules that all backbones keep."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from oneformer_jax.models import backbones
from oneformer_jax.models.backbones.resnet import BatchNorm

SWIN = backbones.SwinConfig(
    embed_dim=8, depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 4), window_size=4, mlp_ratio=2.0
)
RESNET = backbones.ResNetConfig(depths=(2, 1, 1, 1), stem_width=4, norm="batch")
CONFIGS = {"swin": SWIN, "resnet": RESNET}


def randomized(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """The same module with every parameter and statistic drawn anew, so that none is 0 or 1."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(module)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        low, high = (0.5, 1.5) if re.search("scale|var", name) else (-0.5, 0.5)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    state = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))
    return nnx.merge(graphdef, state)


def build(config, **options) -> nnx.Module:
    return randomized(backbones.build_backbone(config, rngs=nnx.Rngs(0), **options))


def array(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def image_of(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------------------- Swin, by loops


def layer_norm(x, norm):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * array(norm.scale) + array(norm.bias)


def linear(x, layer):
    return x @ array(layer.kernel) + array(layer.bias)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def swin_block(x, block, window, shift):
    """One block on a map [H, W, C], pixel by pixel, without rolling or partitioning anything."""
    height, width, channels = x.shape
    down, right = (math.ceil(n / window) * window for n in (height, width))
    padded = np.zeros((down, right, channels))
    padded[:height, :width] = layer_norm(x, block.norm1)
    heads = block.attn.num_heads
    qkv = linear(padded, block.attn.qkv).reshape(down, right, 3, heads, channels // heads)
    table = array(block.attn.relative_position_bias_table)

    def region(position, size):
        return 0 if position < size - window else 1 if position < size - shift else 2

    # Where a pixel comes to lie when the map is rolled by -shift.
    rolled = {(r, c): ((r - shift) % down, (c - shift) % right) for r, c in np.ndindex(down, right)}
    attended = np.zeros((height, width, heads, channels // heads))
    for r, c in np.ndindex(height, width):
        y, x_ = rolled[r, c]
        window_of = (y // window, x_ // window)
        keys = [k for k, (a, b) in rolled.items() if (a // window, b // window) == window_of]
        for n in range(heads):
            logits = []
            for key in keys:
                a, b = rolled[key]
                index = (y - a + window - 1) * (2 * window - 1) + (x_ - b + window - 1)
                logit = qkv[r, c, 0, n] @ qkv[*key, 1, n] / math.sqrt(channels // heads)
                logit += table[index, n]
                if shift and (region(y, down), region(x_, right)) != (
                    region(a, down),
                    region(b, right),
                ):
                    logit -= 100
                logits.append(logit)
            shares = np.exp(np.array(logits) - max(logits))
            shares /= shares.sum()
            attended[r, c, n] = sum(
                share * qkv[*key, 2, n] for share, key in zip(shares, keys, strict=True)
            )
    x = x + linear(attended.reshape(x.shape), block.attn.proj)
    hidden = gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1))
    return x + linear(hidden, block.mlp.fc2)


@pytest.mark.parametrize(
    "size", [(5, 7), (8, 4), (3, 2)], ids=["odd", "whole windows", "smaller than a window"]
)
def test_swin_blocks_equal_loops(size):
    stage = build(SWIN).layers[0]
    x = image_of(2, *size, SWIN.embed_dim)
    found = jax.jit(lambda x: stage(x, None))(x)
    for i in range(2):
        expected = np.asarray(x[i], np.float64)
        for block, shift in zip(stage.blocks, (0, 2), strict=True):
            expected = swin_block(expected, block, SWIN.window_size, shift)
        np.testing.assert_allclose(found[i], expected, atol=2e-4)


def test_swin_odd_window_shifts_by_half_rounded_down():
    config = backbones.SwinConfig(
        embed_dim=4, depths=(2, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=3
    )
    stage = build(config).layers[0]
    x = image_of(1, 7, 4, 4)
    expected = swin_block(np.asarray(x[0], np.float64), stage.blocks[0], 3, 0)
    expected = swin_block(expected, stage.blocks[1], 3, 1)
    np.testing.assert_allclose(jax.jit(lambda x: stage(x, None))(x)[0], expected, atol=2e-4)


def test_swin_patch_embedding_pads_below_and_to_the_right():
    layer = build(SWIN).patch_embed
    image = image_of(1, 5, 10, 3)
    padded = np.zeros((8, 12, 3))
    padded[:5, :10] = image[0]
    kernel = array(layer.proj.kernel)
    expected = np.zeros((2, 3, SWIN.embed_dim))
    for r, c in np.ndindex(2, 3):
        patch = padded[4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
        expected[r, c] = (patch[..., None] * kernel).sum((0, 1, 2)) + array(layer.proj.bias)
    np.testing.assert_allclose(layer(image)[0], layer_norm(expected, layer.norm), atol=1e-4)


def test_swin_patch_merging_takes_the_lower_neighbour_first():
    layer = build(SWIN).layers[0].downsample
    x = image_of(1, 3, 5, SWIN.embed_dim)
    padded = np.zeros((4, 6, SWIN.embed_dim))
    padded[:3, :5] = x[0]
    expected = np.zeros((2, 3, 2 * SWIN.embed_dim))
    for r, c in np.ndindex(2, 3):
        i, j = 2 * r, 2 * c
        four = [padded[i, j], padded[i + 1, j], padded[i, j + 1], padded[i + 1, j + 1]]
        merged = layer_norm(np.concatenate(four), layer.norm)
        expected[r, c] = merged @ array(layer.reduction.kernel)
    np.testing.assert_allclose(layer(x)[0], expected, atol=1e-4)


def test_swin_output_norms_touch_only_the_outputs():
    model = build(SWIN)
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    forward = jax.jit(lambda params, image: nnx.merge(graphdef, params)(image))
    image = image_of(1, 32, 32, 3)
    before = forward(params, image)
    params["norm1"] = {"scale": jnp.zeros(16), "bias": jnp.full(16, 3.0)}
    after = forward(params, image)
    assert np.all(np.asarray(after[1]) == 3)
    for i in (0, 2, 3):
        np.testing.assert_array_equal(before[i], after[i])
        assert np.std(before[i]) > 0.1


def test_swin_drop_path_drops_whole_samples_and_rescales():
    config = backbones.SwinConfig(
        embed_dim=8, depths=(1, 1, 1, 2), num_heads=(1, 1, 1, 1), window_size=2, drop_path_rate=0.4
    )
    model = build(config)
    rates = [block.drop_path_rate for layer in model.layers for block in layer.blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])

    block = model.layers[3].blocks[1]
    for name in ("kernel", "bias"):  # leaves the attention's branch alone
        weight = getattr(block.mlp.fc2, name)
        weight[...] = jnp.zeros_like(weight[...])
    x = np.repeat(image_of(1, 2, 2, 64), 600, axis=0)
    run = jax.jit(lambda x, key: block(x, None, key))
    plain = np.asarray(run(x, None) - x)
    dropped = np.asarray(run(x, jax.random.key(0)) - x)
    kept = np.any(dropped != 0, axis=(1, 2, 3))
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.6, rtol=1e-3, atol=1e-4)
    assert abs(kept.mean() - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 600)
    assert not np.array_equal(dropped, np.asarray(run(x, jax.random.key(1)) - x))


def test_swin_drop_path_draws_anew_for_each_branch_and_block():
    config = backbones.SwinConfig(
        embed_dim=4, depths=(4, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2, drop_path_rate=0.5
    )
    stage = build(config).layers[0]
    x = np.repeat(image_of(1, 2, 2, 4), 256, axis=0)
    for block in stage.blocks:
        block.drop_path_rate = 0.5
    out = np.asarray(jax.jit(lambda x, key: stage(x, key))(x, jax.random.key(0)))
    # 8 independent choices give 256 combinations; few of them if any two shared their key.
    assert len(np.unique(out.round(4).reshape(256, -1), axis=0)) > 100


# -------------------------------------------------------------------------------- ResNet, by loops


def convolve(x, kernel, stride):
    """[B, H, W, C] with a square kernel, padded by half of its size."""
    size = kernel.shape[0]
    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = (math.ceil(n / stride) for n in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[-1]))
    for r, c in np.ndindex(height, width):
        patch = padded[:, r * stride : r * stride + size, c * stride : c * stride + size]
        out[:, r, c] = np.einsum("byxi,yxio->bo", patch, kernel)
    return out


def conv_norm(x, layer, stride, train):
    """A convolution and its norm; with `train`, also the new running statistics."""
    x = convolve(x, array(layer.kernel), stride)
    mean, variance = array(layer.norm.mean), array(layer.norm.var)
    running = None
    if train:
        values = x.reshape(-1, x.shape[-1])
        running = (
            0.9 * mean + 0.1 * values.mean(0),
            0.9 * variance + 0.1 * values.var(0, ddof=1),
        )
        mean, variance = values.mean(0), values.var(0)
    x = (x - mean) / np.sqrt(variance + 1e-5)
    return x * array(layer.norm.scale) + array(layer.norm.bias), running


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_resnet_block_equals_loops(norm):
    model = build(backbones.ResNetConfig(depths=(1, 1, 1, 1), stem_width=4, norm=norm))
    block = model.res3[0]
    x = image_of(2, 5, 6, 16)
    train = norm == "batch"
    layers = {"conv1": 1, "conv2": 2, "conv3": 1, "shortcut": 2}
    y, running = np.asarray(x, np.float64), {}
    for name in ("conv1", "conv2", "conv3"):
        y, running[name] = conv_norm(y, getattr(block, name), layers[name], train)
        y = np.maximum(y, 0) if name != "conv3" else y
    shortcut, running["shortcut"] = conv_norm(
        np.asarray(x, np.float64), block.shortcut, layers["shortcut"], train
    )
    np.testing.assert_allclose(block(x, True), np.maximum(y + shortcut, 0), atol=2e-4)
    for name, expected in running.items() if train else ():
        stats = getattr(block, name).norm
        np.testing.assert_allclose(stats.mean[...], expected[0], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(stats.var[...], expected[1], rtol=1e-4, err_msg=name)


def test_resnet_stem_equals_loops():
    stem = build(RESNET).stem
    image = image_of(1, 9, 12, 3)
    x = np.maximum(conv_norm(np.asarray(image, np.float64), stem.conv1, 2, False)[0], 0)
    _, height, width, _ = x.shape
    expected = np.zeros((math.ceil(height / 2), math.ceil(width / 2), 4))
    for r, c in np.ndindex(*expected.shape[:2]):
        window = x[0, max(2 * r - 1, 0) : 2 * r + 2, max(2 * c - 1, 0) : 2 * c + 2]
        expected[r, c] = window.max((0, 1))
    np.testing.assert_allclose(stem(image, False)[0], expected, atol=1e-4)


def test_resnet_strides_are_in_the_three_by_three_convolutions():
    model = nnx.eval_shape(lambda: backbones.build_backbone(RESNET, rngs=nnx.Rngs(0)))
    for stage, stride in ((2, 1), (3, 2), (4, 2), (5, 2)):
        first = getattr(model, f"res{stage}")[0]
        strides = [layer.strides for layer in (first.conv1, first.conv2, first.conv3)]
        assert strides == [1, stride, 1] and first.shortcut.strides == stride
    assert model.res2[1].shortcut is None


def test_batch_norm_statistics_are_those_of_all_devices(mesh8):
    x = image_of(8, 2, 2, 4) + np.arange(8, dtype=np.float32)[:, None, None, None]
    graphdef, params, stats = nnx.split(BatchNorm(4, jnp.float32), nnx.Param, ...)

    @jax.jit
    def run(x):
        norm = nnx.merge(graphdef, params, stats)
        return norm(x, True), norm.mean[...], norm.var[...]

    out, mean, variance = run(jax.device_put(x, NamedSharding(mesh8, PartitionSpec("data"))))
    values = x.reshape(-1, 4)
    np.testing.assert_allclose(mean, 0.1 * values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * values.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(out, (x - values.mean(0)) / values.std(0), atol=1e-4)


def test_batch_norm_of_a_single_value_is_refused():
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 1, 1, 4\)"):
        BatchNorm(4, jnp.float32)(jnp.zeros((1, 1, 1, 4)), True)


# ------------------------------------------------------------------------------- what all must keep


def shapes_of(config) -> dict[str, tuple[type, int]]:
    """ "a/b/c" -> (kind of variable, number of values), without computing any."""
    model = nnx.eval_shape(lambda: backbones.build_backbone(config, rngs=nnx.Rngs(0)))
    return {
        "/".join(map(str, path)): (type(variable), math.prod(variable.shape))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("swin_tiny", {}, 27.521),
        ("swin_large", {}, 195.201),
        ("resnet50", {"norm": "frozen"}, 23.455),
        ("resnet50", {"norm": "batch"}, 23.508),
    ],
)
def test_published_parameter_counts(name, options, millions):
    variables = shapes_of(backbones.backbone_config(name, **options)).values()
    count = sum(size for kind, size in variables if kind is nnx.Param)
    assert round(count / 1e6, 3) == millions


def test_parameter_names_are_the_official_ones():
    def patterns(config, kind):
        names = (n for n, (found, _) in shapes_of(config).items() if found is kind)
        return {re.sub(r"\d+", "#", name) for name in names}

    weights = {"kernel", "bias"}
    norm = {"scale", "bias"}
    block = "layers/#/blocks/#"
    assert patterns(SWIN, nnx.Param) == {
        *(f"patch_embed/proj/{x}" for x in weights),
        *(f"patch_embed/norm/{x}" for x in norm),
        *(f"{block}/norm#/{x}" for x in norm),
        f"{block}/attn/relative_position_bias_table",
        *(f"{block}/attn/{layer}/{x}" for layer in ("qkv", "proj") for x in weights),
        *(f"{block}/mlp/fc#/{x}" for x in weights),
        *(f"layers/#/downsample/norm/{x}" for x in norm),
        "layers/#/downsample/reduction/kernel",
        *(f"norm#/{x}" for x in norm),
    }
    assert patterns(SWIN, nnx.BatchStat) == set()
    convolutions = {"stem/conv#", "res#/#/conv#", "res#/#/shortcut"}
    kernels = {f"{x}/kernel" for x in convolutions}
    affine = {f"{x}/norm/{y}" for x in convolutions for y in norm}
    statistics = {f"{x}/norm/{y}" for x in convolutions for y in ("mean", "var")}
    assert patterns(RESNET, nnx.Param) == kernels | affine
    assert patterns(RESNET, nnx.BatchStat) == statistics
    frozen = backbones.ResNetConfig(depths=(1, 1, 1, 1), norm="frozen")
    assert patterns(frozen, nnx.Param) == kernels
    assert patterns(frozen, nnx.BatchStat) == affine | statistics


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [(64, 96), (37, 50), (5, 130)])
def test_output_sizes(kind, size):
    config = CONFIGS[kind]
    model = build(config, dtype=jnp.bfloat16)
    outputs = jax.eval_shape(model, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
    for out, stride, channels in zip(outputs, (4, 8, 16, 32), config.channels, strict=True):
        assert out.shape == (2, *(math.ceil(n / stride) for n in size), channels)
        assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", CONFIGS)
def test_remat_changes_nothing_but_memory(kind):
    image = image_of(2, 32, 64, 3)

    def results(remat):
        graphdef, params, stats = nnx.split(build(CONFIGS[kind], remat=remat), nnx.Param, ...)

        def loss(params, stats, image, key):
            model = nnx.merge(graphdef, params, stats)
            outputs = model(image, key=key, train=True)
            total = sum(jnp.mean(jnp.sin(out)) for out in outputs)
            return total, (outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        run = jax.value_and_grad(loss, has_aux=True)
        arguments = nnx.to_pure_dict(params), nnx.to_pure_dict(stats), image, jax.random.key(3)
        jaxpr = jax.make_jaxpr(run)(*arguments)
        names = [equation.primitive.name for equation in jaxpr.eqns]
        return jax.jit(run)(*arguments), names, nnx.to_pure_dict(stats)

    plain, names, stats = results(False)
    assert not any("remat" in name or "checkpoint" in name for name in names)
    recomputed, names, _ = results(True)
    assert sum("remat" in name or "checkpoint" in name for name in names) >= sum(SWIN.depths)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), recomputed, plain
    )
    new = jax.tree.leaves(recomputed[0][1][1])
    for before, after in zip(jax.tree.leaves(stats), new, strict=True):
        assert not np.array_equal(before, after)  # every running statistic has moved


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_training_nothing_moves_even_inside_a_transformation(kind):
    model = build(CONFIGS[kind], remat=True)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    image = image_of(1, 32, 32, 3)
    gradient = jax.jit(jax.grad(lambda image: model(image)[3].sum()))(image)
    assert np.all(np.isfinite(gradient)) and np.any(np.asarray(gradient) != 0)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 32, 4)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_not_an_image(kind, shape):
    model = build(CONFIGS[kind])
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\], got shape"):
        model(jnp.zeros(shape))


# --------------------------------------------------------------------------------------- the configs


@pytest.mark.parametrize("config", [*CONFIGS.values(), backbones.backbone_config("swin_large")])
def test_configs_survive_json(config):
    text = json.dumps(backbones.to_dict(config))
    assert backbones.from_dict(json.loads(text)) == config
    assert hash(backbones.from_dict(json.loads(text))) == hash(config)


def test_names_and_overrides():
    config = backbones.backbone_config("swin_tiny", drop_path_rate=0.1)
    assert config == backbones.SwinConfig.tiny(drop_path_rate=0.1)
    assert config.channels == (96, 192, 384, 768)
    assert backbones.backbone_config("resnet101").depths == (3, 4, 23, 3)
    assert backbones.backbone_config("resnet", depths=[1, 1, 1, 1], stem_width=16).channels == (
        64,
        128,
        256,
        512,
    )
    for name in backbones.NAMES:
        sizes = backbones.to_dict(SWIN if "swin" in name else RESNET)
        sizes.pop("kind")
        assert backbones.backbone_config(name, **sizes) in CONFIGS.values()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vit", {}, "'vit'.*swin_tiny, swin_large, resnet50, resnet101, swin, resnet"),
        ("swin_tiny", {"windows": 7}, "swin_tiny: unknown fields.*windows.*window_size"),
        ("swin", {"depths": (1, 1, 1, 1)}, "swin: fields.*embed_dim.*num_heads.*window_size"),
        ("resnet", {}, "resnet: fields.*depths"),
        ("resnet50", {"norm": "group"}, "norm is 'group'.*frozen, batch"),
        ("resnet50", {"stem_width": 0}, "stem_width is 0"),
        ("resnet50", {"depths": (3, 4, 6)}, "depths is .*4 positive"),
        ("resnet50", {"depths": (3, 4, 6, 0)}, "depths is .*4 positive"),
        ("swin_tiny", {"num_heads": (3, 6, 12)}, "num_heads is .*4 positive"),
        ("swin_tiny", {"embed_dim": 100}, "embed_dim is 100.*num_heads"),
        ("swin_tiny", {"window_size": 1}, "window_size is 1.*2 or more"),
        ("swin_tiny", {"mlp_ratio": 0}, "mlp_ratio is 0"),
        ("swin_tiny", {"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
    ],
)
def test_bad_configs(name, fields, message):
    with pytest.raises(ValueError, match=message):
        backbones.backbone_config(name, **fields)


def test_unknown_kind_and_foreign_config():
    with pytest.raises(ValueError, match="unknown backbone kind None.*swin, resnet"):
        backbones.from_dict({"depths": [1, 1, 1, 1]})
    with pytest.raises(ValueError, match="dict is not the config of a backbone"):
        backbones.to_dict({})
