"""Descriptions of models from strangers' files: absurd ones are refused by name, and at once."""

import dataclasses
import json
import re
import time

import pytest

from oneformer_jax import catalogue
from oneformer_jax.models import backbones
from oneformer_jax.models.oneformer import OneFormerConfig
from tests import tiny

BACKBONES = {
    name: backbones.backbone_config(name)
    for name in (
        *("swin_tiny", "convnext_large", "dinat_large", "internimage_huge", "resnet50"),
        "dinov2_small",
    )
}
FIELDS = [(name, f.name) for name, c in BACKBONES.items() for f in dataclasses.fields(c)]
MODEL = [f.name for f in dataclasses.fields(OneFormerConfig) if f.name != "backbone"]

# As JSON has them; the last ones are more layers, heads and windows than any memory holds.
ABSURD = (
    *(None, True, -1, -1.0, 0.5, float("nan"), float("inf"), 1e30, "", "3", "nonsense", "a\nb"),
    *({}, {"a": 1}, [], [1], [1] * 3, [1] * 5, [0] * 4, [-1] * 4, [None] * 4, [1.5] * 4, ["1"] * 4),
    *([True] * 4, [[1]] * 4, [[-1]] * 4, [[10**9]] * 4, [10**5] * 4, [10**9] * 4, [[[1]]] * 4),
    *(10**5, 10**9, 10**400, [10**400] * 4),
)
ACCEPTED = {
    **dict.fromkeys(("encoder_dropout", "query_init_dropout", "drop_path_rate"), (0.5,)),
    **dict.fromkeys(("layer_scale_init", "position_offset", "norm_epsilon"), (0.5,)),
    **dict.fromkeys(("text_causal", "antialias", "gated", "qkv_bias", "key_bias"), (True,)),
    "norm_after": ([], [1]),
}


def check(field, absurd, make):
    """`make` refuses an absurd value of `field` by name within a second."""
    for value in absurd:
        if any(value is good or value == good for good in ACCEPTED.get(field, ())):
            make(value)
            continue
        start = time.process_time()
        with pytest.raises(ValueError, match=rf"\b{field} is ") as error:
            make(value)
        assert time.process_time() - start < 1
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("field", MODEL)
def test_an_absurd_field_of_a_model_is_refused(field):
    described = tiny.model_config().to_dict()
    check(field, ABSURD, lambda value: OneFormerConfig.from_dict(described | {field: value}))


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_an_absurd_field_of_a_backbone_is_refused(name, field):
    described = backbones.to_dict(BACKBONES[name])
    check(field, ABSURD, lambda value: backbones.from_dict(described | {field: value}))


@pytest.mark.parametrize("config", BACKBONES.values(), ids=BACKBONES)
def test_every_field_of_a_backbone_has_a_rule(config):
    assert set(config.RULES) == {f.name for f in dataclasses.fields(config)}


@pytest.mark.parametrize("row", catalogue.MODELS, ids=lambda row: row.name)
def test_published_models_are_far_from_the_bounds(row):
    model = OneFormerConfig.published(row.name)
    assert OneFormerConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    for field in ("decoder_layers", "encoder_layers", "text_layers", "hidden_dim", "num_queries"):
        dataclasses.replace(model, **{field: 4 * getattr(model, field)})
    backbone = model.backbone
    if not hasattr(backbone, "dilations"):
        dataclasses.replace(backbone, depths=tuple(4 * n for n in backbone.depths))


def test_a_name_that_is_unknown_or_missing_is_told():
    described = tiny.model_config().to_dict()
    for change, message in (
        ({"hiden_dim": 64}, r"unknown fields 'hiden_dim' \(did you mean 'hidden_dim'\?\)"),
        ({"backbone": None}, "backbone is None; it must be fields with values"),
        ({"backbone": []}, r"backbone is \[\]; it must be fields with values"),
        ({"backbone": {}}, "unknown backbone kind None"),
        ({"backbone": {"kind": []}}, r"unknown backbone kind \[\]"),
        ({"backbone": {"kind": "swin"}}, "backbone swin: fields depths, embed_dim, num_heads"),
        (
            {"backbone": {"kind": "resnet", "depth": [1] * 4}},
            r"backbone resnet: unknown fields 'depth' \(did you mean 'depths'\?\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            OneFormerConfig.from_dict(described | change)
    for name in ("backbone", "num_classes"):
        left = {key: value for key, value in described.items() if key != name}
        with pytest.raises(ValueError, match=f"model: fields {name} must be given"):
            OneFormerConfig.from_dict(left)
    for value in (None, [], "swin", 3):
        with pytest.raises(ValueError, match="it must be fields with values"):
            OneFormerConfig.from_dict(value)


def test_all_wrong_fields_are_told_together():
    described = tiny.model_config().to_dict()
    wrong = {"decoder_layers": 10**9, "num_heads": 0, "query_loss": "none at all"}
    with pytest.raises(ValueError) as error:
        OneFormerConfig.from_dict(described | wrong)
    assert re.findall(r"model\.(\w+) is", str(error.value)) == [
        "num_heads",
        "decoder_layers",
        "query_loss",
    ]
