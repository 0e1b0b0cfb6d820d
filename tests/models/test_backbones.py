"""Swin and ResNet against loops in NumPy, and the rules that all backbones keep."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from oneformer_jax.models import backbones
from oneformer_jax.models.backbones.resnet import BatchNorm, ConvNorm, FrozenNorm
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.stack import run

SWIN = backbones.SwinConfig(
    embed_dim=8, depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 4), window_size=4, mlp_ratio=2.0
)
RESNET = backbones.ResNetConfig(depths=(1, 1, 1, 1), stem_width=4, norm="batch")
DINAT = backbones.DinatConfig(
    embed_dim=8,
    depths=(2, 1, 1, 1),
    num_heads=(2, 2, 4, 4),
    kernel_size=3,
    dilations=((1, 2), (1,), (3,), (1,)),
)
INTERNIMAGE = backbones.InternImageConfig(
    embed_dim=8, depths=(1, 1, 2, 1), groups=(2, 2, 4, 4), norm_after=(0,), mlp_ratio=2.0
)
VIT = backbones.ViTConfig(
    embed_dim=8, depth=4, num_heads=2, mlp_dim=16, positions=3, maps="depths", drop_path_rate=0.2
)
CONFIGS = {"swin": SWIN, "dinat": DINAT, "internimage": INTERNIMAGE, "resnet": RESNET, "vit": VIT}

# Most of the time of these tests is the compiler's, and its care is wasted on maps of 8 x 8.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def build(config, *, seed: int = 0, **options) -> nnx.Module:
    """A backbone whose parameters and statistics are all drawn, none of them 0 or 1."""
    how = Execution(**options)
    model = nnx.eval_shape(
        lambda: backbones.build_backbone(config, rngs=ParamKeys(), execution=how)
    )
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        low, high = (0.5, 1.5) if re.search("scale|var", name) else (-0.5, 0.5)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    state = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))
    return nnx.merge(graphdef, state)


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
    ("size", "window"),
    [((5, 7), 4), ((8, 4), 4), ((3, 2), 4), ((7, 4), 3)],
    ids=["odd map", "whole windows", "map smaller than a window", "odd window"],
)
def test_swin_blocks_equal_loops(size, window):
    config = dataclasses.replace(SWIN, window_size=window)
    stage = build(config).layers[0]
    x = image_of(2, *size, config.embed_dim)
    found = jit(lambda x: stage(x, None))(x)
    for i in range(2):
        expected = np.asarray(x[i], np.float64)
        for block, shift in zip(stage.blocks, (0, window // 2), strict=True):
            expected = swin_block(expected, block, window, shift)
        np.testing.assert_allclose(found[i], expected, atol=2e-4)


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
    np.testing.assert_allclose(jit(layer)(image)[0], layer_norm(expected, layer.norm), atol=1e-4)


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
    np.testing.assert_allclose(jit(layer)(x)[0], expected, atol=1e-4)


def test_swin_output_norms_touch_only_the_outputs():
    model = build(dataclasses.replace(SWIN, depths=(1, 1, 1, 1)))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    forward = jit(lambda params, image: nnx.merge(graphdef, params)(image))
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
    rates = [rate for layer in model.layers for rate in layer.rates]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])

    block = model.layers[3].blocks[1]
    for name in ("kernel", "bias"):  # leaves the attention's branch alone
        weight = getattr(block.mlp.fc2, name)
        weight[...] = jnp.zeros_like(weight[...])
    x = np.repeat(image_of(1, 2, 2, 64), 600, axis=0)
    run = jit(lambda x, key: block(x, None, key, rates[-1]))
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
    stage.rates = (0.5,) * 4
    out = np.asarray(jit(lambda x, key: stage(x, key))(x, jax.random.key(0)))
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
    graphdef, state = nnx.split(block)

    @jit
    def run(state, x):
        block = nnx.merge(graphdef, state)
        return block(x, True), nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))

    out, stats = run(nnx.to_pure_dict(state), x)
    np.testing.assert_allclose(out, np.maximum(y + shortcut, 0), atol=2e-4)
    for name, expected in running.items() if train else ():
        found = stats[name]["norm"]
        np.testing.assert_allclose(found["mean"], expected[0], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found["var"], expected[1], rtol=1e-4, err_msg=name)


def test_resnet_stem_equals_loops():
    stem = build(RESNET).stem
    image = image_of(1, 9, 12, 3)
    x = np.maximum(conv_norm(np.asarray(image, np.float64), stem.conv1, 2, False)[0], 0)
    _, height, width, _ = x.shape
    expected = np.zeros((math.ceil(height / 2), math.ceil(width / 2), 4))
    for r, c in np.ndindex(*expected.shape[:2]):
        window = x[0, max(2 * r - 1, 0) : 2 * r + 2, max(2 * c - 1, 0) : 2 * c + 2]
        expected[r, c] = window.max((0, 1))
    np.testing.assert_allclose(jit(lambda x: stem(x, False))(image)[0], expected, atol=1e-4)


def test_resnet_strides_are_in_the_three_by_three_convolutions():
    config = backbones.ResNetConfig(depths=(2, 1, 1, 1), stem_width=4)
    model = nnx.eval_shape(lambda: backbones.build_backbone(config, rngs=ParamKeys()))
    for stage, stride in ((2, 1), (3, 2), (4, 2), (5, 2)):
        first = getattr(model, f"res{stage}")[0]
        strides = [layer.strides for layer in (first.conv1, first.conv2, first.conv3)]
        assert strides == [1, stride, 1] and first.shortcut.strides == stride
    assert model.res2[1].shortcut is None and model.res2[1].conv2.strides == 1


def test_batch_norm_statistics_are_those_of_all_devices(mesh8):
    x = image_of(8, 2, 2, 4) + np.arange(8, dtype=np.float32)[:, None, None, None]
    graphdef, state = nnx.split(BatchNorm(4, jnp.float32))
    state = nnx.to_pure_dict(state)

    @jit
    def run(x):
        norm = nnx.merge(graphdef, state)
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
    model = nnx.eval_shape(lambda: backbones.build_backbone(config, rngs=ParamKeys()))
    return {
        "/".join(map(str, path)): (type(variable), math.prod(variable.shape))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("swin_tiny", {}, 27.521),
        ("swin_large", {}, 195.201),
        ("dinat_large", {}, 199.610),
        ("dinat_large_7x7", {}, 199.409),
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
    model = build(config, dtype="bfloat16")
    outputs = jax.eval_shape(model, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
    for out, stride, channels in zip(outputs, (4, 8, 16, 32), config.channels, strict=True):
        assert out.shape == (2, *(math.ceil(n / stride) for n in size), channels)
        assert out.dtype == jnp.bfloat16


def value_and_gradients(module, function):
    """(params, stats) -> ((loss, (outputs, new stats)), gradients) of `function(module)`."""
    graphdef, params, stats = nnx.split(module, nnx.Param, ...)

    def loss(params, stats):
        merged = nnx.merge(graphdef, params, stats)
        outputs = function(merged)
        total = sum(jnp.mean(jnp.sin(out)) for out in jax.tree.leaves(outputs))
        return total, (outputs, nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat)))

    states = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    return jax.value_and_grad(loss, has_aux=True), states


def assert_close(expected, found):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), expected, found
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_remat_recomputes_every_block(kind):
    image = image_of(2, 32, 64, 3)
    for remat in (False, True):
        model = build(CONFIGS[kind], remat=remat)
        run, states = value_and_gradients(model, lambda m: m(image, jax.random.key(3), True))
        names = [e.primitive.name for e in jax.make_jaxpr(run)(*states).eqns]
        found = sum(name in ("remat2", "checkpoint", "remat") for name in names)
        blocks = CONFIGS[kind].depth if kind == "vit" else sum(CONFIGS[kind].depths)
        assert found == (blocks if remat else 0)


def test_remat_changes_nothing_but_memory_in_a_swin_stage():
    x, results = image_of(2, 5, 8, SWIN.embed_dim), []
    for remat in (False, True):
        stage = build(SWIN, remat=remat).layers[0]
        run, states = value_and_gradients(stage, lambda m: m(x, jax.random.key(3)))
        results.append(jit(run)(*states))
    assert_close(*results)
    gradients = results[1][1]
    gradients.pop("downsample")  # not part of the stage's call
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradients))


def test_remat_changes_nothing_but_memory_in_a_resnet_block():
    x, results = image_of(2, 4, 6, 16), []
    for remat in (False, True):
        value, states = value_and_gradients(
            build(RESNET, remat=remat).res3,
            lambda blocks: run(lambda x, _, block: (block(x, True), None), x, blocks, updates=True),
        )
        results.append(jit(value)(*states))
    assert_close(*results)


@pytest.mark.parametrize("remat", [False, True])
def test_every_running_statistic_moves_in_training(remat):
    graphdef, state = nnx.split(build(RESNET, remat=remat))

    @jit
    def run(state):
        model = nnx.merge(graphdef, state)
        model(image_of(2, 32, 64, 3), train=True)
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, state), nnx.BatchStat)))
    after = jax.tree.leaves(run(nnx.to_pure_dict(state)))
    assert len(before) == len(after) == 2 * (1 + 4 * 4)
    for old, new in zip(before, after, strict=True):
        assert not np.any(old == new)


def test_without_training_nothing_moves_even_inside_a_transformation():
    model = build(RESNET, remat=True)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    jax.make_jaxpr(jax.grad(lambda image: model(image)[3].sum()))(image_of(1, 32, 32, 3))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 32, 4)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_not_an_image(kind, shape):
    model = build(CONFIGS[kind])
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\], got shape"):
        model(jnp.zeros(shape))


def test_initial_values():
    @jit
    def draw():
        rngs, dtype = ParamKeys(0), jnp.float32
        config = dataclasses.replace(SWIN, embed_dim=64, window_size=8)
        model = backbones.build_backbone(config, rngs=rngs)
        block = model.layers[0].blocks[0]
        layer = ConvNorm("batch", 8, 64, 3, 1, rngs=rngs, dtype=dtype)
        return {
            "linear": (block.attn.qkv.kernel[...], block.mlp.fc2.kernel[...]),
            "table": block.attn.relative_position_bias_table[...],
            "bias": (block.attn.qkv.bias[...], block.norm1.bias[...]),
            "scale": (block.norm1.scale[...], layer.norm.scale[...]),
            "patches": (model.patch_embed.proj.kernel[...], model.patch_embed.proj.bias[...]),
            "convolution": layer.kernel[...],
        }

    def assert_normal(x, deviation):
        assert abs(np.std(x) / deviation - 1) < 5 / math.sqrt(2 * x.size)
        assert np.abs(x).max() > 2.5 * deviation  # not cut at two deviations

    found = jax.tree.map(np.asarray, draw())
    for x in (*found["linear"], found["table"]):
        assert_normal(x, 0.02)
    assert_normal(found["convolution"], math.sqrt(2 / (9 * 64)))
    assert not any(map(np.any, found["bias"])) and all(np.all(x == 1) for x in found["scale"])
    for x in found["patches"]:  # uniform in ±1/sqrt(4 * 4 * 3)
        assert 0.9 * 48**-0.5 < np.abs(x).max() <= 48**-0.5
    x = image_of(1, 2, 2, 64)
    for norm in (BatchNorm(64, jnp.float32), FrozenNorm(64, jnp.float32)):
        np.testing.assert_allclose(norm(x, False), x, rtol=1e-4)
