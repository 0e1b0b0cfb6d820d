"""DINOv2 and DINOv3 against `transformers` in PyTorch: files, features, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.models import backbones
from oneformer_jax.models.backbones import vit
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.weights import names, start
from tests.models.test_backbones import jit

torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")

WIDTH, DEPTH, HEADS = 64, 3, 4
_COMMON = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS)
_OURS = dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_dim=4 * WIDTH)
_V3 = dict(_COMMON, intermediate_size=96, num_register_tokens=4, layer_norm_eps=1e-5)
_OUR_V3 = _OURS | dict(
    mlp_dim=96, patch_size=16, positions=0, registers=4, key_bias=False, norm_epsilon=1e-5
)
# (class of the model, its config, ours); `transformers` adds no offset to the grid of positions.
FAMILIES = {
    "dinov2": ("Dinov2", dict(_COMMON, image_size=70), _OURS | dict(positions=5)),
    "dinov2 gated": (
        "Dinov2",
        dict(_COMMON, image_size=70, use_swiglu_ffn=True),
        _OURS | dict(positions=5, gated=True, mlp_dim=176),
    ),
    "dinov2 with registers": (
        "Dinov2WithRegisters",
        dict(_COMMON, image_size=70, patch_size=14),
        _OURS | dict(positions=5, registers=4, antialias=True),
    ),
    "dinov3": ("DINOv3ViT", _V3, _OUR_V3),
    "dinov3 gated": (
        "DINOv3ViT",
        dict(_V3, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False),
        _OUR_V3 | dict(gated=True, qkv_bias=False),
    ),
}
# In patches: the size of the learned positions, fewer, and more.
GRIDS = ((5, 5), (4, 3), (6, 9))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model of theirs with random weights, and ours with the same, read from its folder."""
    name, fields, ours = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(attn_implementation="eager", **fields)
    theirs = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # nothing stays at zero or one
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    folder = tmp_path_factory.mktemp("folder")
    theirs.save_pretrained(folder)
    backbone = backbones.ViTConfig(position_offset=0.0, **ours)
    return theirs, *load(backbone, folder)


def load(config, path):
    """Our backbone, its graph and parameters, from a file: what it lacks is drawn."""
    model = backbones.build_backbone(config, rngs=ParamKeys(0))
    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(state)
    expected = {f"backbone.{name}": leaf for name, leaf in names.flatten(state)}
    found = start.from_backbone(path, expected, config)
    assert {name.split(".")[1] for name in found.fresh} == {"pyramid"}

    def fill(tree, prefix):
        if isinstance(tree, dict):
            return {key: fill(value, f"{prefix}.{key}") for key, value in tree.items()}
        return jnp.asarray(found.arrays[prefix]()) if prefix in found.arrays else tree

    return graph, fill(state, "backbone"), found


def image_of(grid, patch):
    shape = (2, grid[0] * patch, grid[1] * patch, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def relative(found, expected):
    expected = expected.detach().numpy()
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("grid", GRIDS)
def test_features_are_those_of_transformers(pair, grid):
    theirs, graph, params, _ = pair
    image = image_of(grid, theirs.config.patch_size)
    with torch.no_grad():
        expected = theirs(torch.tensor(image.transpose(0, 3, 1, 2))).last_hidden_state
    (found,), size = jit(lambda p: nnx.merge(graph, p).tokens(image))(params)
    assert (int(size[0]), int(size[1])) == grid
    error = relative(found, expected)
    print(f"{type(theirs).__name__} {grid}: features {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("grid", GRIDS[1:])
def test_gradients_are_those_of_transformers(pair, grid):
    theirs, graph, params, _ = pair
    image = image_of(grid, theirs.config.patch_size)
    theirs.zero_grad()
    expected = theirs(torch.tensor(image.transpose(0, 3, 1, 2))).last_hidden_state
    (expected * torch.cos(torch.arange(expected.numel()).reshape(expected.shape))).sum().backward()

    def loss(params):
        (tokens,), _ = nnx.merge(graph, params).tokens(image)
        return jnp.sum(tokens * jnp.cos(jnp.arange(tokens.size).reshape(tokens.shape)))

    gradients = jit(jax.grad(loss))(params)
    by_name = dict(names.flatten(gradients))
    parameters = dict(theirs.named_parameters())
    checks = {
        "cls_token": "embeddings.cls_token",
        "patch_embed.proj.kernel": "embeddings.patch_embeddings",
        "blocks.0.attn.q.kernel": "0.attention.q_proj.weight",
        "blocks.1.attn.k.kernel": "1.attention.k_proj.weight",
        "blocks.2.attn.v.kernel": "2.attention.v_proj.weight",
        "blocks.0.ls1.gamma": "0.layer_scale1.lambda1",
        "blocks.1.norm2.scale": "1.norm2.weight",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
    }
    errors = []
    for ours, other in checks.items():
        match = [n for n in parameters if other in n and not n.endswith("bias")]
        if not match:
            continue
        value = parameters[match[0]].grad
        if ours.endswith("kernel"):
            value = value.T if value.ndim == 2 else value.permute(2, 3, 1, 0)
        errors.append(relative(by_name[ours], value))
    print(f"{type(theirs).__name__} {grid}: gradients {max(errors):.1e}")
    assert max(errors) < 1e-3
    assert len(errors) >= 8


def test_the_folder_of_another_number_of_heads_is_refused(pair, tmp_path):
    theirs, graph, _, _ = pair
    theirs.save_pretrained(tmp_path)
    config = nnx.merge(graph, pair[2]).config
    with pytest.raises(ValueError, match=r"num_attention_heads is 4 .*, num_heads is 2"):
        load(dataclasses.replace(config, num_heads=2), tmp_path)


@pytest.mark.parametrize(("offset", "antialias"), [(0.0, False), (0.1, False), (0.0, True)])
@pytest.mark.parametrize(("old", "new"), [(5, 3), (5, 4), (5, 5), (5, 8), (37, 16), (37, 64)])
def test_positions_are_interpolated_as_pytorch_does(old, new, offset, antialias):
    table = np.random.default_rng(0).normal(size=(1, 4, old, old)).astype(np.float32)
    how = dict(mode="bicubic", antialias=antialias)
    how |= {"scale_factor": ((new + offset) / old,) * 2} if offset else {"size": (new, new)}
    expected = torch.nn.functional.interpolate(torch.tensor(table), **how)
    matrix = vit.cubic_matrix(old, new, offset, antialias)
    found = np.einsum("ij,bcjk,lk->bcil", matrix, table, matrix)
    np.testing.assert_allclose(found, expected, atol=2e-5)
