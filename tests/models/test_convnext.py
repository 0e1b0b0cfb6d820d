"""ConvNeXt against loops in NumPy, its published sizes and the rules that all backbones keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.models import backbones, functional
from oneformer_jax.train import optim
from tests import tiny
from tests.models.test_backbones import array, build, gelu, image_of, jit, linear

SMALL = backbones.ConvNeXtConfig(depths=(1, 2, 1, 1), dims=(6, 8, 10, 12))


def _layer_norm(x, norm):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * array(norm.scale) + array(norm.bias)


def _block(x, block):
    """One block on a map [H, W, C], the depthwise convolution pixel by pixel."""
    height, width, _ = x.shape
    kernel = array(block.dwconv.kernel)[:, :, 0]  # [7, 7, C]
    padded = np.pad(x, ((3, 3), (3, 3), (0, 0)))
    y = np.zeros_like(x)
    for r in range(height):
        for c in range(width):
            y[r, c] = (padded[r : r + 7, c : c + 7] * kernel).sum((0, 1))
    y = linear(_layer_norm(y + array(block.dwconv.bias), block.norm), block.pwconv1)
    return x + array(block.gamma) * linear(gelu(y), block.pwconv2)


def _patches(x, layer, size):
    """Convolution of [H, W, C] with stride and kernel `size`, what is left over dropped."""
    height, width = (n // size for n in x.shape[:2])
    kernel = array(layer.kernel)
    out = np.zeros((height, width, kernel.shape[-1]))
    for r in range(height):
        for c in range(width):
            patch = x[r * size : (r + 1) * size, c * size : (c + 1) * size]
            out[r, c] = np.einsum("ijk,ijko->o", patch, kernel)
    return out + array(layer.bias)


def _forward(model, image):
    """The four maps of one image [H, W, 3]."""
    stem, norm = model.downsample_layers[0]
    x = _layer_norm(_patches(image, stem, 4), norm)
    outputs = []
    for stage in range(4):
        if stage:
            norm, shrink = model.downsample_layers[stage]
            x = _patches(_layer_norm(x, norm), shrink, 2)
        for block in model.stages[stage]:
            x = _block(x, block)
        outputs.append(_layer_norm(x, getattr(model, f"norm{stage}")))
    return outputs


@pytest.mark.parametrize("size", [(64, 32), (45, 70)])
def test_features_equal_loops(size):
    model = build(SMALL)
    image = image_of(1, *size, 3)
    graphdef, state = nnx.split(model)
    found = jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, image)
    expected = _forward(model, image[0].astype(np.float64))
    for stage, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        stride = 4 * 2**stage
        assert ours.shape == (1, size[0] // stride, size[1] // stride, SMALL.dims[stage])
        np.testing.assert_allclose(ours[0], theirs, atol=2e-4 * np.abs(theirs).max())


def test_remat_and_drop_path():
    image = image_of(4, 32, 32, 3)

    def outputs(key, **options):
        graphdef, state = nnx.split(build(SMALL, **options))
        return jit(lambda state, x: nnx.merge(graphdef, state)(x, key=key))(state, image)

    plain, again = outputs(None), outputs(None, remat=True)
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    dropped = outputs(jax.random.key(0))
    # The first block is never dropped, so res2 stays as it is; later ones are, per sample.
    np.testing.assert_allclose(dropped[0], plain[0], atol=1e-4)
    assert not np.allclose(dropped[3], plain[3], atol=1e-3)


def test_every_parameter_of_the_backbone_is_decayed():
    """Its LayerNorm class is none of torch's, so the official optimizer does not exempt it."""
    params = functional.abstract(tiny.model_config(backbone=SMALL), training=True).params
    groups = optim.describe_groups(params)
    assert not groups["backbone/no_decay"]
    names = {name.removeprefix("backbone/") for name in groups["backbone/decay"]}
    assert {"downsample_layers/0/1/scale", "stages/1/1/gamma", "norm3/bias"} <= names


def test_names_and_errors():
    assert backbones.from_dict(backbones.to_dict(SMALL)) == SMALL
    assert backbones.backbone_config("convnext_large").dims == (192, 384, 768, 1536)
    with pytest.raises(ValueError, match="dims is \\(1, 2\\)"):
        backbones.backbone_config("convnext", depths=(1, 1, 1, 1), dims=(1, 2))
    with pytest.raises(ValueError, match="at least 32 x 32"):
        build(SMALL)(jnp.zeros((1, 16, 64, 3)))
