"""Texts beside the tensors: config.json, our own description, and what nothing tells."""

import dataclasses
import json
import time

import numpy as np
import pytest

from oneformer_jax.files import parse_json
from oneformer_jax.models import functional
from oneformer_jax.models.backbones import DinatConfig, InternImageConfig
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.weights import architecture, convert, descriptions, hugging_face, start
from oneformer_jax.weights.files import FileError
from tests.weights.test_convert import make_config, random_weights, strip, write


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model in both formats: (official file, folder, config)."""
    path = tmp_path_factory.mktemp("saved")
    config = make_config("swin")
    weights = random_weights(config)
    write(path / "model.pth", "official", config, *weights)
    write(path / "folder", "hugging_face", config, *weights)
    return path / "model.pth", path / "folder", config


def described(folder, saved, change) -> None:
    """A folder whose oneformer_jax.json went through `change`."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved[1] / name).read_bytes())
    own = json.loads((saved[1] / "oneformer_jax.json").read_text())
    change(own)
    (folder / "oneformer_jax.json").write_text(json.dumps(own))


def put(value, *keys):
    def change(own):
        for key in keys[:-1]:
            own = own[key]
        own[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put(10**9, "model", "decoder_layers"),
            "model.decoder_layers is 1000000000; it must be an integer from 1 to 100",
        ),
        (put(10**5, "model", "decoder_layers"), "model.decoder_layers is 100000"),
        (put(-1, "model", "encoder_layers"), "model.encoder_layers is -1"),
        (put(10**9, "model", "hidden_dim"), "model.hidden_dim is 1000000000"),
        (put(-32, "model", "hidden_dim"), "model.hidden_dim is -32"),
        (put(1.5, "model", "num_heads"), "model.num_heads is 1.5; it must be an integer"),
        (put("8", "model", "num_heads"), "model.num_heads is '8'; it must be an integer"),
        (put(0, "model", "num_heads"), "model.num_heads is 0; it must be an integer from 1 to"),
        (put(None, "model", "num_queries"), "model.num_queries is None; it must be an integer"),
        (
            put([1] * 9, "model", "backbone", "depths"),
            "SwinConfig: depths is .*a tuple of 4 values",
        ),
        (
            put([1, 1, 10**9, 1], "model", "backbone", "depths"),
            r"SwinConfig: depths is \(1, 1, 1000000000, 1\); it must be",
        ),
        (put([1] * 10**5, "model", "backbone", "num_heads"), "num_heads is .*a tuple of 4 values"),
        (
            put([[1]] * 4, "model", "backbone", "num_heads"),
            r"num_heads is \(\(1,\), .*; it must be",
        ),
        (put(10**5, "model", "backbone", "window_size"), "window_size is 100000; it must be"),
        (put(-8, "model", "backbone", "embed_dim"), "embed_dim is -8; it must be"),
        (put(1e300, "model", "backbone", "mlp_ratio"), "mlp_ratio is 1e.300; it must be"),
        (
            put("vit\x1b[2J", "model", "backbone", "kind"),
            r"unknown backbone kind 'vit\\x1b\[2J'; use one of swin",
        ),
        (put("v" * 10**6, "model", "backbone", "kind"), "unknown backbone kind 'vvv.*use one of"),
        (put([], "model", "backbone", "kind"), r"unknown backbone kind \[\]"),
        (put("swin", "model", "backbone"), "backbone is 'swin'; it must be fields with values"),
        (
            put(1, "model", "backbone", "depth"),
            "swin: unknown fields 'depth' .did you mean 'depths'",
        ),
        (
            put(1, "model", "decoder_layer"),
            "model: unknown fields 'decoder_layer' .did you mean 'decoder_layers'",
        ),
        (put(1, "model", "d" * 10**6), "model: unknown fields 'ddd.*known are num_classes"),
        (
            lambda own: own["model"].update(dict.fromkeys(map(str, range(10**5)), 1)),
            "model: unknown fields '0', .*and 99,995 more; known are num_classes",
        ),
        (put([], "model"), "model has an unexpected value"),
        (lambda own: own["model"].pop("num_classes"), "num_classes"),
        (lambda own: own["model"]["backbone"].pop("embed_dim"), "embed_dim"),
        (put(5, "metadata"), "metadata has an unexpected value"),
        (put(["a"], "metadata", "class_names"), "metadata has an unexpected value|class names"),
        (put("red", "metadata", "colors"), "metadata has an unexpected value"),
        (
            put([[256, 0, 0]] * 5, "metadata", "colors"),
            "metadata .*colors has values beyond 0 to 255",
        ),
        (
            put([[0, -1, 0]] * 5, "metadata", "colors"),
            "metadata .*colors has values beyond 0 to 255",
        ),
        (put(1.5, "metadata", "ignore_label"), "metadata has an unexpected value"),
        (put(-5, "settings", "short_edge"), "settings has an unexpected value.*short_edge"),
        (put(10**9, "settings", "topk"), "settings has an unexpected value.*topk"),
        (put(2, "settings", "overlap_threshold"), "settings has an unexpected value.*overlap"),
        (put(1, "settings", "short"), "settings has an unexpected value.*short"),
    ],
)
def test_a_description_that_cannot_be_is_refused_soon_with_its_key(
    tmp_path, saved, change, message
):
    described(tmp_path, saved, change)
    begin = time.process_time()
    with pytest.raises(FileError, match=message) as caught:
        convert.read_model(tmp_path)
    assert time.process_time() - begin < 10
    assert str(tmp_path) in str(caught.value)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


def test_the_deepest_description_that_passes_is_refused_within_seconds(tmp_path, saved):
    def change(own, depth=descriptions.MAX_LAYERS - 13):
        own["model"] |= dict.fromkeys(("encoder_layers", "query_init_layers", "text_layers"), 1)
        own["model"] |= {"decoder_layers": 10, "backbone": own["model"]["backbone"]}
        own["model"]["backbone"]["depths"] = [1, 1, depth - 3 - 64, 65]

    described(tmp_path, saved, change)
    begin = time.process_time()
    with pytest.raises(FileError, match="tensors are missing"):
        convert.read_model(tmp_path)
    assert time.process_time() - begin < 30
    described(tmp_path, saved, lambda own: change(own, descriptions.MAX_LAYERS))
    with pytest.raises(FileError, match="a model of 173 layers; at most 160"):
        convert.read_model(tmp_path)


def test_a_value_of_many_levels_is_refused_whatever_their_number():
    described = json.dumps(make_config("swin").to_dict() | {"num_heads": "DEEP"})
    for depth in range(1, 1200, 3):
        text = described.replace('"DEEP"', "[" * depth + "]" * depth)
        with pytest.raises(FileError, match=r"num_heads is|nested too deeply"):
            descriptions.model_config(parse_json(text), "a.json")


def test_classes_of_another_number_than_the_models_are_refused(tmp_path, saved):
    def change(own):
        for key in ("class_names", "is_thing", "colors", "category_ids"):
            own["metadata"][key] *= 2

    described(tmp_path, saved, change)
    with pytest.raises(FileError, match="metadata has 10 classes, the model has 5"):
        convert.read_model(tmp_path)


def test_fields_of_the_caller_replace_those_of_the_description(saved):
    path, _, config = saved
    found = convert.read_model(path, text_causal=False, backbone={"drop_path_rate": 0.1})
    assert not found.config.text_causal and found.config.backbone.drop_path_rate == 0.1
    assert (
        dataclasses.replace(found.config, text_causal=config.text_causal, backbone=config.backbone)
        == config
    )
    with pytest.raises(FileError, match=r"unknown fields 'text_casual' .did you mean"):
        convert.read_model(path, text_casual=False)


@pytest.mark.parametrize("own", [True, False])
def test_a_backbone_of_the_caller_that_is_no_dict_is_refused(saved, tmp_path, own):
    path = saved[0] if own else strip(saved[0])
    with pytest.raises(ValueError, match="backbone is 'swin_large'; it must be a dict of fields"):
        convert.read_model(path, backbone="swin_large")


# ------------------------------------------------------------------ config.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("bert", "model_type"), "is of a 'bert' model"),
        (put(["oneformer"], "model_type"), "is of a list, not of a oneformer"),
        (put(10**9, "num_attention_heads"), r"unexpected value.*num_attention_heads"),
        (put("8", "num_attention_heads"), r"unexpected value.*num_attention_heads"),
        (put(0, "num_attention_heads"), r"unexpected value.*num_attention_heads"),
        (put(3, "num_attention_heads"), "are not those of 3 levels, 3 heads and 4 points"),
        (put(-0.5, "dropout"), r"unexpected value.*dropout"),
        (put(2, "backbone_config", "drop_path_rate"), "unexpected value.*drop_path_rate"),
        (put([], "backbone_config"), "unexpected value.*backbone_config"),
        (put(True, "pre_norm"), "pre_norm is true in config.json"),
        (put(False, "use_task_norm"), "use_task_norm is false"),
        (put(1e-6, "layer_norm_eps"), "layer_norm_eps is 1e-6"),
        (put([8, 16, 32, 64], "strides"), r"strides is \[8,16,32,64\]"),
        (put(8, "common_stride"), "common_stride is 8"),
        (put("relu", "backbone_config", "hidden_act"), 'swin hidden_act is "relu"'),
        (put(1e-12, "backbone_config", "layer_norm_eps"), "swin layer_norm_eps is"),
    ],
)
def test_a_config_that_this_model_cannot_compute_is_refused_with_its_key(
    tmp_path, saved, change, message
):
    described(tmp_path, saved, lambda own: None)
    (tmp_path / "oneformer_jax.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=message) as caught:
        convert.read_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", ["resnet", "dinat"])
@pytest.mark.parametrize("value", [10**9, -1, [1], "a", [[10**9]], [[1]] * 99])
def test_dilations_and_strides_of_a_config(kind, value):
    key = {"dinat": "dilations", "resnet": "downsample_in_bottleneck"}[kind]
    config = {"model_type": "oneformer", "backbone_config": {"model_type": kind, key: value}}
    with pytest.raises(FileError, match=key):
        hugging_face.noted(config, "a")


# ------------------------------------------------------------------ what tensors do not tell


def recognised(config, **fields):
    shapes = {
        name: tuple(leaf.shape)
        for name, leaf in convert.leaves(functional.abstract(config, training=True)[1:])
    }
    return architecture.recognise(shapes, path="x.pth", given=fields, noted={})


def test_what_is_assumed_is_said(saved):
    found = convert.read_model(strip(saved[0]))
    (line,) = [x for x in found.summary().splitlines() if x.startswith("assumed, since")]
    for phrase in (
        "4 points per head and level, so 1 heads of 32 channels",
        "queries made from the task token",
        "text heads of 32 channels, so 1",
        "text tokens that see those before them",
        "a dropout of 0.1",
        "a drop path rate of 0.3",
    ):
        assert phrase in line, line
    assert convert.read_model(saved[0]).assumed == ()  # our own description tells everything
    told = dict(num_heads=1, queries="task", text_heads=1, text_causal=True, encoder_dropout=0.0)
    told |= {"backbone": {"drop_path_rate": 0.1}}
    assert convert.read_model(strip(saved[0]), **told).assumed == ()


def test_a_config_tells_heads_and_rates(saved, tmp_path):
    described(tmp_path, saved, lambda own: None)
    (tmp_path / "oneformer_jax.json").unlink()
    found = convert.read_model(tmp_path)
    assert all("points" not in x and "drop" not in x for x in found.assumed), found.assumed


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_the_bias_of_the_attention_tells_the_heads(heads):
    config = make_config("convnext", hidden_dim=128, num_heads=heads)
    assert recognised(config).config.num_heads == heads


def test_the_points_follow_from_heads_that_are_given():
    config = make_config("convnext", hidden_dim=64, num_heads=2, encoder_points=8)
    assert recognised(config).config.num_heads == 4  # as every published model would have it
    assert recognised(config, num_heads=2).config.encoder_points == 8
    assert recognised(config, encoder_points=8).config.num_heads == 2
    for fields in (dict(num_heads=5), dict(num_heads=2, encoder_points=3)):
        with pytest.raises(ValueError, match=r"x\.pth: the pixel decoder has 48 attention weights"):
            recognised(config, **fields)
    with pytest.raises(ValueError, match=r"model\.num_heads is 0"):
        recognised(config, num_heads=0)
    with pytest.raises(ValueError, match=r"model\.num_heads is '2'; it must be"):
        recognised(config, num_heads="2")


def test_assumptions_of_the_backbones():
    internimage = make_config("internimage")
    assert isinstance(internimage.backbone, InternImageConfig)
    assumed = "; ".join(recognised(internimage).assumed)
    assert "a norm after every sixth block" in assumed and "kernels of 3 x 3" in assumed
    dinat = make_config("dinat")
    assert isinstance(dinat.backbone, DinatConfig)
    given = {"dilations": dinat.backbone.dilations}
    assert "dilations" not in "; ".join(recognised(dinat, backbone=given).assumed)
    published = recognised(OneFormerConfig.published("coco:dinat_large"))
    assert "the dilations of the published model" in published.assumed
    resnet = "; ".join(recognised(make_config("resnet")).assumed)
    assert "norms that are constants" in resnet and "strides in the 3 x 3" in resnet


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("backbone.layers.0.blocks.0.attn.relative_position_bias_table", (10**12, 0)),
        ("backbone.layers.0.blocks.0.attn.relative_position_bias_table", (199 * 199, 1)),
        ("backbone.patch_embed.norm.scale", (10**9,)),
        ("predictor.query_embed.embedding", (0, 32)),
        ("predictor.query_embed.embedding", (10**6, 32)),
        ("pixel_decoder.mask_features.bias", ()),
        ("text_encoder.positional_embedding", (77,)),
        ("pixel_decoder.transformer.encoder.layers.0.self_attn.attention_weights.bias", (7,)),
    ],
)
def test_shapes_that_no_model_has_are_refused_soon(name, shape):
    config = make_config("swin")
    trees = functional.abstract(config, training=True)[1:]
    shapes = {key: tuple(leaf.shape) for key, leaf in convert.leaves(trees)} | {name: shape}
    with pytest.raises(FileError, match=r"x\.pth"):
        architecture.recognise(shapes, path="x.pth", given={}, noted={})


def test_more_layers_than_any_model_has_are_refused_soon():
    config = make_config("swin")
    trees = functional.abstract(config, training=True)[1:]
    shapes = {key: tuple(leaf.shape) for key, leaf in convert.leaves(trees)}
    shapes |= {f"predictor.transformer_ffn_layers.{i}.norm.scale": (32,) for i in range(10**5)}
    with pytest.raises(FileError, match=r"model\.decoder_layers is 100000"):
        architecture.recognise(shapes, path="x.pth", given={}, noted={})


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    config = make_config("swin")
    params, stats = random_weights(config)
    write(tmp_path / "a.pth", "official", config, params, stats)
    name = "task_mlp.layers.0.bias"

    def spoil(tensors):
        spoilt = tensors[name].astype(np.float64)
        spoilt[3:5] = value
        return tensors | {name: spoilt}

    path = strip(tmp_path / "a.pth", spoil)
    message = rf"a_stripped\.pkl: {name} has 2 values of 32 that are not finite"
    with pytest.raises(FileError, match=message):
        convert.read_model(path)
    expected = dict(convert.leaves(functional.abstract(config, training=True)[1:]))
    found = start.from_model(path, expected, "swin")
    with pytest.raises(FileError, match=message):
        found.arrays[name]()


def test_how_a_model_was_run_is_not_read_from_a_description_of_an_earlier_version():
    config = make_config("swin")
    earlier = config.to_dict() | {"dtype": "bfloat16", "remat": True}
    assert descriptions.model_config(json.loads(json.dumps(earlier)), "a.pth") == config
