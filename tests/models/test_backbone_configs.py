"""Backbones by name: sizes, overrides, JSON, refusals, and which kernels they are told to use."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from oneformer_jax.models import backbones
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.models.initial import ParamKeys

CONFIGS = {
    "swin": backbones.SwinConfig(
        embed_dim=8, depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 4), window_size=4, mlp_ratio=2.0
    ),
    "dinat": backbones.DinatConfig(
        embed_dim=8,
        depths=(2, 1, 1, 1),
        num_heads=(2, 2, 4, 4),
        kernel_size=3,
        dilations=((1, 2), (1,), (3,), (1,)),
    ),
    "internimage": backbones.InternImageConfig(
        embed_dim=8, depths=(1, 1, 2, 1), groups=(2, 2, 4, 4), norm_after=(1,), mlp_ratio=2.0
    ),
    "resnet": backbones.ResNetConfig(depths=(2, 1, 1, 1), stem_width=4, norm="batch"),
    "vit": backbones.ViTConfig(embed_dim=16, depth=4, num_heads=2, mlp_dim=32),
}


@pytest.mark.parametrize("config", [*CONFIGS.values(), backbones.backbone_config("swin_large")])
def test_configs_survive_json(config):
    text = json.dumps(backbones.to_dict(config))
    assert backbones.from_dict(json.loads(text)) == config
    assert hash(backbones.from_dict(json.loads(text))) == hash(config)


def test_names_and_overrides():
    config = backbones.backbone_config("swin_tiny", drop_path_rate=0.1)
    tiny = backbones.backbone_config("swin_tiny")
    assert config == dataclasses.replace(tiny, drop_path_rate=0.1) != tiny
    assert config.channels == (96, 192, 384, 768)
    assert backbones.backbone_config("resnet101").depths == (3, 4, 23, 3)
    assert backbones.backbone_config("resnet", depths=[1, 1, 1, 1], stem_width=16).channels == (
        64,
        128,
        256,
        512,
    )
    for name in backbones.NAMES:
        kind = next((kind for kind in CONFIGS if name.startswith(kind)), None)
        if kind in (None, "vit"):  # ConvNeXt and the vision transformers have their own tests
            continue
        sizes = backbones.to_dict(CONFIGS[kind])
        sizes.pop("kind")
        assert backbones.backbone_config(name, **sizes) in CONFIGS.values()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "mobilenet",
            {},
            "'mobilenet'.*swin_tiny, swin_large, convnext_large.*swin, convnext, dinat.*resnet",
        ),
        ("swin_tiny", {"windows": 7}, "swin_tiny: unknown fields.*windows.*window_size"),
        ("swin", {"depths": (1, 1, 1, 1)}, "swin: fields.*embed_dim.*num_heads.*window_size"),
        ("resnet", {}, "resnet: fields.*depths"),
        ("resnet50", {"norm": "group"}, "norm is 'group'.*frozen, batch"),
        ("resnet50", {"stem_width": 0}, "stem_width is 0"),
        ("resnet50", {"depths": (3, 4, 6)}, "depths is .*4 values, each an integer"),
        ("resnet50", {"depths": (3, 4, 6, 0)}, "depths is .*4 values, each an integer"),
        (
            "swin_tiny",
            {"num_heads": (3, 6, 12)},
            "num_heads is .*4 values, each an integer",
        ),
        ("swin_tiny", {"embed_dim": 100}, "embed_dim is 100.*num_heads"),
        ("swin_tiny", {"window_size": 1}, "window_size is 1; .*from 2 to 64"),
        ("swin_tiny", {"mlp_ratio": 0}, "mlp_ratio is 0"),
        ("swin_tiny", {"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ("vit", {"depth": 3}, "vit: fields embed_dim, num_heads, mlp_dim must be given"),
        ("dinov2_small", {"num_heads": 5}, "embed_dim is 384.*multiple of num_heads = 5"),
        ("dinov3_small", {"num_heads": 64}, "embed_dim is 384.*times 4, for rotary positions"),
        ("dinov3_small", {"maps": "first"}, "maps is 'first'.*last, depths"),
    ],
)
def test_bad_configs(name, fields, message):
    with pytest.raises(ValueError, match=message):
        backbones.backbone_config(name, **fields)


def test_unknown_kind_and_foreign_config():
    with pytest.raises(
        ValueError,
        match=r"unknown backbone kind None.*swin, convnext, dinat, internimage, resnet, vit",
    ):
        backbones.from_dict({"depths": [1, 1, 1, 1]})
    with pytest.raises(ValueError, match="dict is not the config of a backbone"):
        backbones.to_dict({})


@pytest.mark.parametrize(
    ("kind", "option", "find"),
    [
        ("dinat", "neighborhood", lambda block: block.attn.implementation),
        ("internimage", "deform_attn", lambda block: block.dcn.implementation),
    ],
)
def test_a_named_implementation_reaches_every_block(kind, option, find):
    """And is never replaced: the kernel runs on TPUs only."""
    how = Execution(kernels=Kernels(**{option: "pallas_tpu"}))
    model = nnx.eval_shape(
        lambda: backbones.build_backbone(CONFIGS[kind], rngs=ParamKeys(), execution=how)
    )
    blocks = [block for level in model.levels for block in level.blocks]
    assert [find(block) for block in blocks] == ["pallas_tpu"] * 5
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(NotImplementedError, match="'pallas_tpu' runs on TPUs"):
        jax.eval_shape(lambda model, image: model(image), model, image)
