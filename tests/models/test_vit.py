"""Vision transformers against NumPy, their sizes, their four maps and what they keep in memory."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.models import backbones
from oneformer_jax.models.backbones import vit
from oneformer_jax.models.initial import ParamKeys
from tests.models.test_backbones import array, build, gelu, image_of, jit, linear

LEARNED = backbones.ViTConfig(
    embed_dim=16, depth=2, num_heads=2, mlp_dim=24, positions=3, registers=2, antialias=True
)
ROTARY = backbones.ViTConfig(
    *(16, 2, 2, 24),
    patch_size=16,
    positions=0,
    registers=3,
    gated=True,
    key_bias=False,
    norm_epsilon=1e-5,
)


# ------------------------------------------------------------------------- in NumPy, token by token


def norm(x, layer, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * array(layer.scale) + array(layer.bias)


def turned(x, row, column, grid):
    """One head's query or key [D] of the patch at (row, column)."""
    quarter = len(x) // 4
    out = x.copy()
    for axis, (place, size) in enumerate(((row, grid[0]), (column, grid[1]))):
        for i in range(quarter):
            angle = 2 * math.pi * ((place + 0.5) / size * 2 - 1) / 100 ** (i / quarter)
            a = axis * quarter + i
            b = a + 2 * quarter
            out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def forward(model, image):
    """The normalised tokens [T, C] of an image [H, W, 3]."""
    config, patch = model.config, model.config.patch_size
    grid = tuple(-(-n // patch) for n in image.shape[:2])
    padded = np.zeros((grid[0] * patch, grid[1] * patch, 3))
    padded[: image.shape[0], : image.shape[1]] = image
    kernel, bias = array(model.patch_embed.proj.kernel), array(model.patch_embed.proj.bias)
    x = [
        np.einsum(
            "yxi,yxio->o",
            padded[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch],
            kernel,
        )
        + bias
        for r, c in np.ndindex(grid)
    ]
    first = array(model.cls_token)[0]
    if config.positions:
        table = array(model.pos_embed)[0]
        first, side = first + table[:1], config.positions
        how = config.position_offset, config.antialias
        rows, columns = (vit.cubic_matrix(side, n, *how) for n in grid)
        table = table[1:].reshape(side, side, -1)
        x = x + np.einsum("rj,ck,jkd->rcd", rows, columns, table).reshape(len(x), -1)
    x = np.concatenate([first, array(model.register_tokens)[0], x])
    heads, width = config.num_heads, config.embed_dim // config.num_heads
    prefix = len(x) - grid[0] * grid[1]
    for block in model.blocks:
        y = norm(x, block.norm1, config.norm_epsilon)
        k = y @ array(block.attn.k.kernel)
        k = k if block.attn.k.bias is None else k + array(block.attn.k.bias)
        q, v = linear(y, block.attn.q), linear(y, block.attn.v)
        q, k, v = (z.reshape(len(x), heads, width) for z in (q, k, v))
        if not config.positions:
            for index, (row, column) in enumerate(np.ndindex(grid)):
                for head in range(heads):
                    for z in (q, k):
                        place = (prefix + index, head)
                        z[place] = turned(z[place], row, column, grid)
        scores = np.einsum("qnd,snd->nqs", q, k) / math.sqrt(width)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        y = linear(np.einsum("nqs,snd->qnd", shares, v).reshape(x.shape), block.attn.proj)
        x = x + array(block.ls1.gamma) * y
        y = norm(x, block.norm2, config.norm_epsilon)
        if config.gated:
            gate = linear(y, block.mlp.w1)
            y = linear(gate / (1 + np.exp(-gate)) * linear(y, block.mlp.w2), block.mlp.w3)
        else:
            y = linear(gelu(linear(y, block.mlp.fc1)), block.mlp.fc2)
        x = x + array(block.ls2.gamma) * y
    return norm(x, model.norm, config.norm_epsilon)


@pytest.mark.parametrize(
    ("config", "size"), [(LEARNED, (60, 30)), (ROTARY, (40, 70))], ids=["learned", "rotary"]
)
def test_tokens_equal_loops(config, size):
    model, image = build(config), image_of(1, *size, 3)
    found = jit(lambda image: model.tokens(image)[0][0])(image)
    np.testing.assert_allclose(found[0], forward(model, image[0]), atol=2e-4)


def test_positions_are_taken_as_they_are_on_their_own_grid():
    table = jnp.asarray(image_of(9, 4))
    np.testing.assert_array_equal(vit.interpolate_positions(table, (3, 3), 0.1, False), table)
    other = vit.interpolate_positions(table, (2, 4), 0.1, False)
    rows, columns = vit.cubic_matrix(3, 2, 0.1, False), vit.cubic_matrix(3, 4, 0.1, False)
    expected = np.einsum("rj,ck,jkd->rcd", rows, columns, np.reshape(table, (3, 3, 4)))
    np.testing.assert_allclose(other, expected.reshape(8, 4), atol=1e-5)
    np.testing.assert_allclose(rows.sum(1), 1)


# ------------------------------------------------------------------------------------ the four maps


def test_maps_of_a_patch_of_14_lie_at_the_strides_of_the_others():
    """A map that is linear in the place on the image stays so, at the places of strides 4 to 32."""
    old, new = 37, 33  # a side of 518 pixels
    place = (np.arange(old) + 0.5) * 14
    found = vit.resample_matrix(old, new, 14 / 16) @ place
    inner = slice(1, new - 1)
    np.testing.assert_allclose(found[inner], ((np.arange(new) + 0.5) * 16)[inner])
    np.testing.assert_array_equal(vit.resample_matrix(5, 5, 1.0), np.eye(5))
    np.testing.assert_allclose(vit.resample_matrix(old, new, 14 / 16).sum(1), 1)


def test_the_pyramid_enlarges_and_takes_maxima():
    layer = build(ROTARY).pyramid
    x = image_of(1, 3, 5, 16)
    fine, eighth, same, half = jit(lambda x: layer([x] * 4))(x)
    assert [m.shape for m in (fine, eighth, same, half)] == [
        *((1, 12, 20, 4), (1, 6, 10, 8)),
        *((1, 3, 5, 16), (1, 2, 3, 16)),
    ]
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(half[0, 1, 1], x[0, 2, 2:4].max(0))
    # Each pixel of the deconvolution sees one pixel of the map.
    parts = (x[0, 1, 2] @ array(layer.eighth.proj.kernel) + array(layer.eighth.proj.bias)).reshape(
        2, 2, 8
    )
    np.testing.assert_allclose(eighth[0, 2:4, 4:6], parts, atol=1e-5)


def test_maps_come_from_the_last_block_or_from_four_depths():
    image = image_of(1, 64, 64, 3)
    for maps, moved in (("last", 4), ("depths", 1)):
        config = dataclasses.replace(ROTARY, depth=4, maps=maps)
        graph, params = nnx.split(build(config))
        params = nnx.to_pure_dict(params)
        run = jit(lambda p, graph=graph: nnx.merge(graph, p)(image))
        before = run(params)
        params["blocks"][3]["ls2"]["gamma"] = jnp.zeros(16)
        after = run(params)
        changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == [False] * (4 - moved) + [True] * moved


def test_loops_and_recomputation_change_nothing():
    image, results = image_of(2, 32, 48, 3), []
    for options in ({"scan_layers": False}, {"scan_layers": True, "remat": True}):
        graph, params = nnx.split(build(dataclasses.replace(ROTARY, drop_path_rate=0.5), **options))

        def loss(params, graph=graph):
            maps = nnx.merge(graph, params)(image, jax.random.key(1))
            return sum(jnp.mean(jnp.sin(x)) for x in maps)

        results.append(jax.jit(jax.value_and_grad(loss))(nnx.to_pure_dict(params)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


# ------------------------------------------------------------------------------------------- sizes

# Of the files of transformers, without the mask token and with the published sizes.
COUNTS = {
    "dinov2_small": 22_056_192,
    "dinov2_base": 86_579_712,
    "dinov2_large": 304_367_616,
    "dinov2_giant": 1_136_479_232,
    "dinov2_small_registers": 22_057_728,
    "dinov2_base_registers": 86_582_784,
    "dinov2_large_registers": 304_371_712,
    "dinov2_giant_registers": 1_136_485_376,
    "dinov3_small": 21_596_160,
    "dinov3_base": 85_659_648,
    "dinov3_large": 303_128_576,
    "dinov3_small_plus": 28_692_480,
    "dinov3_huge_plus": 840_591_360,
    "dinov3_7b": 6_716_030_976,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    config = backbones.backbone_config(name)
    model = nnx.eval_shape(lambda: backbones.build_backbone(config, rngs=ParamKeys()))
    sizes = {path: math.prod(x.shape) for path, x in nnx.to_flat_state(nnx.state(model))}
    assert sum(size for path, size in sizes.items() if path[0] != "pyramid") == COUNTS[name]


def test_every_size_has_a_count():
    assert set(COUNTS) == {name for name in backbones.NAMES if name.startswith("dino")}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_no_square_of_all_tokens_is_formed_at_1024_pixels(platform, monkeypatch):
    monkeypatch.setattr(vit.dispatch, "platform", lambda: platform)
    config = dataclasses.replace(ROTARY, depth=1)
    graph, params = nnx.split(
        nnx.eval_shape(lambda: backbones.build_backbone(config, rngs=ParamKeys()))
    )
    image = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32)

    def loss(params, image):
        return sum(jnp.sum(x) for x in nnx.merge(graph, params)(image))

    tokens = 64 * 64 + 4
    shapes = {
        tuple(variable.aval.shape)
        for jaxpr in all_jaxprs(jax.make_jaxpr(jax.grad(loss))(nnx.to_pure_dict(params), image))
        for equation in jaxpr.eqns
        for variable in equation.outvars
    }
    scores = [shape for shape in shapes if tokens in shape and max(shape) == tokens]
    assert any(len(shape) == 4 for shape in scores)
    assert not [shape for shape in shapes if sum(size >= tokens for size in shape) > 1]


def all_jaxprs(closed):
    """A jaxpr and all that its equations call."""
    waiting = [closed.jaxpr]
    while waiting:
        jaxpr = waiting.pop()
        yield jaxpr
        waiting += [
            getattr(value, "jaxpr", value)
            for equation in jaxpr.eqns
            for leaf in equation.params.values()
            for value in (leaf if isinstance(leaf, list | tuple) else [leaf])
            if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
        ]
