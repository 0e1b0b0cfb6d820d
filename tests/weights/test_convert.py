"""Whole models to other programs' files and back, and what is refused on the way."""

import dataclasses
import functools
import itertools
import json
import pathlib
import pickle
import re
import types

import jax
import numpy as np
import pytest

import oneformer_jax
from oneformer_jax import catalogue, progress
from oneformer_jax.app import modes
from oneformer_jax.models import backbones, functional
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.weights import architecture, convert, files, names
from oneformer_jax.weights.files import FileError
from tests import tiny

BACKBONES = {
    "resnet": dict(depths=(1, 1, 2, 1), stem_width=8),
    "resnet_batch": dict(depths=(1, 1, 2, 1), stem_width=8, norm="batch"),
    "swin": dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=3),
    "dinat": dict(
        embed_dim=8,
        depths=(1, 2, 1, 1),
        num_heads=(1, 1, 2, 2),
        kernel_size=3,
        dilations=((2,), (1, 3), (1,), (1,)),
    ),
    "internimage": dict(
        embed_dim=8, depths=(1, 1, 7, 1), groups=(1, 1, 2, 2), norm_after=(5,), dw_kernel_size=3
    ),
    "convnext": dict(dims=(8, 12, 16, 24), depths=(1, 1, 2, 1)),
}
SETTINGS = {
    "short_edge": 64,
    "max_size": 96,
    "object_mask_threshold": 0.25,
    "overlap_threshold": 0.5,
    "topk": 9,
}


def make_config(kind: str, **fields) -> OneFormerConfig:
    backbone = backbones.backbone_config(kind.split("_")[0], **BACKBONES[kind])
    sizes = dict(backbone=backbone, encoder_points=4, num_heads=1, text_heads=1)
    return tiny.model_config(**(sizes | fields))


def random_weights(config: OneFormerConfig, *, text: bool = True, seed: int = 0):
    """(params, stats) of normal numbers."""
    rng = np.random.default_rng(seed)
    return tuple(
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)
        for tree in functional.abstract(config, training=text)[1:]
    )


def write(path, form, config, params, stats):
    convert.write_model(
        path, form, config, params, stats, metadata=tiny.metadata(), settings=SETTINGS
    )


def assert_identical(found, expected):
    found, expected = dict(names.flatten(found)), dict(names.flatten(expected))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name].view(np.int32), value.view(np.int32)), name


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize(
    ("kind", "form"),
    [(k, f) for k in BACKBONES for f in names.FORMATS if (k, f) != ("internimage", "hugging_face")],
)
def test_round_trip_is_bit_identical(tmp_path, kind, form):
    config = make_config(kind)
    params, stats = random_weights(config)
    path = tmp_path / ("model.pth" if form == "official" else "folder")
    write(path, form, config, params, stats)
    found = convert.read_model(path)
    assert_identical(found.params, params)
    assert_identical(found.stats, stats)
    assert found.config == config
    assert found.metadata == tiny.metadata()
    assert found.settings == SETTINGS
    assert (found.format, found.text) == (form, True)
    assert f"{form} checkpoint" in found.summary()


def test_other_program_in_between(tmp_path):
    config = make_config("swin")
    params, stats = random_weights(config)
    write(tmp_path / "a.pth", "official", config, params, stats)
    first = convert.read_model(tmp_path / "a.pth")
    write(tmp_path / "b", "hugging_face", first.config, first.params, first.stats)
    second = convert.read_model(tmp_path / "b")
    assert_identical(second.params, params)
    assert_identical(second.stats, stats)


def test_without_the_text_branch(tmp_path):
    config = make_config("convnext")
    params, stats = random_weights(config, text=False)
    for form, path in (("official", tmp_path / "a.pth"), ("hugging_face", tmp_path / "b")):
        write(path, form, config, params, stats)
        found = convert.read_model(path)
        assert not found.text
        assert_identical(found.params, params)
        assert "without the text branch" in found.summary()
    # The official criterion keeps its scale even so.
    scale = {"criterion.logit_scale": np.array(2.66, np.float32)}
    path = strip(tmp_path / "a.pth", lambda tensors: tensors | scale)
    found = convert.read_model(path)
    assert not found.text
    assert found.left_out["criterion.logit_scale"].startswith("a scale of the text branch")


def strip(path: pathlib.Path, change=lambda tensors: tensors, **beside) -> pathlib.Path:
    """A pickle of the state dict as another program leaves it: without our own description."""
    tensors = {name: t.read() for name, t in files.open_tensors(path).tensors.items()}
    out = path.with_name(f"{path.stem}_stripped.pkl")
    out.write_bytes(pickle.dumps({"model": change(tensors), **beside}))
    return out


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_the_architecture_is_recognised_from_the_tensors(tmp_path, kind):
    fields = dict(num_queries=9, num_context=4, encoder_ffn=48, query_init_ffn=40, decoder_ffn=56)
    config = make_config(kind, hidden_dim=64, mask_dim=32, num_heads=2, **fields)
    config = dataclasses.replace(config, text_width=128, text_heads=2, text_layers=2)
    params, stats = random_weights(config)
    write(tmp_path / "a.pth", "official", config, params, stats)
    path = strip(tmp_path / "a.pth", optimizer={"lr": 0.1}, iteration=7, author="somebody")
    given = {}
    if kind == "dinat":
        with pytest.raises(ValueError, match="its tensors do not tell its dilations; give them"):
            convert.read_model(path)
        given = {"backbone": {"dilations": config.backbone.dilations}}
    found = convert.read_model(path, **given)
    # Drop path does not show, and is that of the published models.
    assert found.config == config
    assert found.metadata is None and found.published is None and found.dataset is None
    assert_identical(found.params, params)


def test_prefix_of_a_wrapped_model(tmp_path):
    config = make_config("resnet")
    params, stats = random_weights(config)
    write(tmp_path / "a.pth", "official", config, params, stats)
    path = strip(tmp_path / "a.pth", lambda t: {f"module.{name}": x for name, x in t.items()})
    assert_identical(convert.read_model(path).params, params)


def test_heads_that_tensors_do_not_tell(tmp_path):
    config = make_config("resnet", num_heads=2)  # of 16 channels
    params, stats = random_weights(config)
    write(tmp_path / "a.pth", "official", config, params, stats)
    path = strip(tmp_path / "a.pth")
    found = convert.read_model(path)  # 4 points, the rule of all published models
    assert found.config == config
    assert "4 points per head and level, so 2 heads of 16 channels" in found.summary()
    assert convert.read_model(path, num_heads=2).config == config
    assert convert.read_model(path, config=config).config == config
    with pytest.raises(ValueError, match="give num_heads"):
        convert.read_model(path, num_heads=5)
    with pytest.raises(ValueError, match=r"unknown fields 'num_head' .did you mean 'num_heads'"):
        convert.read_model(path, num_head=2)
    with pytest.raises(ValueError, match="not both"):
        convert.read_model(path, config=config, num_heads=2)


# ------------------------------------------------------------------ the published models

COUNTS = {  # tensors with text branch and criterion, by backbone and norm (spec 2)
    ("swin_large", None): 775,
    ("swin_tiny", None): 607,
    ("convnext_large", None): 766,
    ("dinat_large", None): 831,
    ("internimage_huge", None): 1753,
    ("resnet50", "frozen"): 683,
    ("resnet50", "batch"): 736,
}


@functools.cache
def abstract_arrays(config):
    """Shapes of a model's arrays by name; models of a dataset share them."""
    return dict(convert.leaves(functional.abstract(config, training=True)[1:]))


@pytest.mark.parametrize("form", names.FORMATS)
def test_every_published_model_has_every_name(form):
    seen = set()
    for row in catalogue.MODELS:
        config = OneFormerConfig.published(row.name)
        backbone = config.backbone
        if (key := (backbone, config.hidden_dim)) in seen:
            continue  # classes and queries change shapes, not names
        seen.add(key)
        kind = backbones.kind_of(backbone)
        if (kind, form) == ("internimage", "hugging_face"):
            continue  # transformers has no such backbone
        theirs = {}
        for name in abstract_arrays(config):
            group = names.group_of(name, "ours", form, kind)
            assert group is not None, name
            for other in group.theirs:
                # The way back leads to the same arrays.
                assert names.group_of(other, form, form) == group
            assert theirs.setdefault(group.theirs, group.ours) == group.ours
        tensors = {other: None for group in theirs for other in group}
        assert len(tensors) == sum(map(len, theirs))
        expected = COUNTS.get((row.variant.split(",")[0], getattr(backbone, "norm", None)))
        if form == "official" and expected:
            assert len(tensors) + len(convert._derived(config, tensors, form)) == expected


def test_the_published_names_of_the_specification():
    # One of each line of the specification's table of names (2.1, 2.2).
    listed = (
        "sem_seg_head.pixel_decoder.input_proj.0.0.weight",
        "sem_seg_head.pixel_decoder.input_proj.2.1.bias",
        "sem_seg_head.pixel_decoder.transformer.level_embed",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.self_attn.sampling_offsets.weight",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.norm2.bias",
        "sem_seg_head.pixel_decoder.mask_features.bias",
        "sem_seg_head.pixel_decoder.adapter_1.norm.weight",
        "sem_seg_head.pixel_decoder.layer_1.weight",
        "sem_seg_head.predictor.class_transformer.decoder.layers.1.multihead_attn.in_proj_weight",
        "sem_seg_head.predictor.class_transformer.decoder.layers.0.self_attn.out_proj.bias",
        "sem_seg_head.predictor.class_transformer.decoder.norm.weight",
        "sem_seg_head.predictor.transformer_self_attention_layers.8.self_attn.in_proj_bias",
        "sem_seg_head.predictor.transformer_cross_attention_layers.8.norm.weight",
        "sem_seg_head.predictor.transformer_ffn_layers.8.linear2.weight",
        "sem_seg_head.predictor.decoder_norm.bias",
        "sem_seg_head.predictor.query_embed.weight",
        "sem_seg_head.predictor.level_embed.weight",
        "sem_seg_head.predictor.class_input_proj.bias",
        "sem_seg_head.predictor.class_embed.weight",
        "sem_seg_head.predictor.mask_embed.layers.2.weight",
        "task_mlp.layers.0.weight",
        "text_encoder.positional_embedding",
        "text_encoder.token_embedding.weight",
        "text_encoder.transformer.resblocks.5.attn.in_proj_weight",
        "text_encoder.transformer.resblocks.5.ln_2.bias",
        "text_encoder.transformer.resblocks.0.mlp.c_proj.weight",
        "text_encoder.ln_final.weight",
        "text_projector.layers.1.bias",
        "prompt_ctx.weight",
        "criterion.logit_scale",
        "backbone.patch_embed.proj.weight",
        "backbone.layers.2.blocks.17.attn.relative_position_bias_table",
        "backbone.layers.2.downsample.reduction.weight",
        "backbone.norm3.bias",
        "backbone.downsample_layers.0.1.weight",
        "backbone.downsample_layers.3.1.bias",
        "backbone.stages.2.26.gamma",
        "backbone.stages.0.0.dwconv.weight",
        "backbone.patch_embed.proj.1.bias",
        "backbone.levels.2.blocks.17.attn.rpb",
        "backbone.levels.0.blocks.0.mlp.fc1.weight",
        "backbone.levels.1.downsample.norm.weight",
        "backbone.stem.conv1.norm.running_var",
        "backbone.res5.0.shortcut.weight",
        "backbone.res4.22.conv3.norm.running_mean",
        "backbone.patch_embed.norm1.1.weight",
        "backbone.levels.2.blocks.31.res_post_norm2.0.bias",
        "backbone.levels.0.blocks.0.dcn.dw_conv.0.weight",
        "backbone.levels.0.blocks.0.dcn.dw_conv.1.1.weight",
        "backbone.levels.0.blocks.0.dcn.offset.weight",
        "backbone.levels.3.blocks.5.dcn.center_feature_scale_proj_bias",
        "backbone.levels.2.post_norms.4.0.weight",
        "backbone.levels.2.downsample.conv.weight",
        "backbone.levels.2.downsample.norm.1.weight",
        "backbone.levels.3.norm.0.weight",
    )
    for name in listed:
        assert names.group_of(name, "official", "official") is not None, name


def test_a_published_model_is_found_by_name_and_by_file():
    model = catalogue.named("ade20k:swin_large,res=896")
    assert model.short_edge == 896
    assert catalogue.named("configs/ade20k.py:swin_large,res=896") is model
    with pytest.raises(ValueError, match=r"no published model 'ade20k:swin_huge'.*coco:swin_large"):
        catalogue.named("ade20k:swin_huge")


def abstract_shapes(config):
    return {name: tuple(leaf.shape) for name, leaf in abstract_arrays(config).items()}


@pytest.mark.parametrize(
    ("dataset", "variant", "path", "found"),
    [
        ("coco", "swin_large", "anything.pth", "coco:swin_large"),
        ("ade20k", "swin_large,res=640", "x.pth", "ade20k:swin_large,res=640"),
        (
            *("ade20k", "swin_large,res=640"),
            "dir/1280x1280_250_16_swin_l_oneformer_ade20k_160k.pth",
            "ade20k:swin_large,res=1280",
        ),
        ("cityscapes", "resnet50", "x.pth", "cityscapes:resnet50"),
        ("coco", "dinat_large", "x.pth", "coco:dinat_large"),
        ("cityscapes", "dinat_large", "x.pth", "cityscapes:dinat_large"),
        (
            *("ade20k", "dinat_large,res=1280"),
            "1280x1280_250_16_dinat_l_oneformer_ade20k_160k.pth",
            "ade20k:dinat_large,res=1280",
        ),
    ],
)
def test_published_settings_follow_from_tensors_and_file_name(dataset, variant, path, found):
    model = OneFormerConfig.published(f"{dataset}:{variant}")
    frozen = getattr(model.backbone, "norm", "frozen") == "frozen"
    config, row, _ = architecture.recognise(
        abstract_shapes(model), path=path, given={}, noted={}, frozen_norm=frozen
    )
    assert config == model
    assert f"{row.dataset}:{row.variant}" == found


def test_dilations_of_an_ambiguous_file_have_to_be_given():
    model = OneFormerConfig.published("ade20k:dinat_large,res=1280")
    with pytest.raises(ValueError, match="fits several published models whose dilations differ"):
        architecture.recognise(abstract_shapes(model), path="x.pth", given={}, noted={})


# ------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file of a small Swin without our own description, and its tensors."""
    path = tmp_path_factory.mktemp("good") / "a.pth"
    config = make_config("swin")
    write(path, "official", config, *random_weights(config))
    path = strip(path)
    return path, {name: t.read() for name, t in files.open_tensors(path).tensors.items()}


def changed(tmp_path, tensors) -> pathlib.Path:
    path = tmp_path / "changed.pkl"
    path.write_bytes(pickle.dumps({"model": tensors}))
    return path


def test_all_problems_are_reported_together(good, tmp_path):
    tensors = dict(good[1])
    del tensors["sem_seg_head.predictor.decoder_norm.bias"]
    del tensors["text_encoder.transformer.resblocks.0.attn.in_proj_weight"]
    name = "sem_seg_head.predictor.class_embed.weight"
    tensors[name] = tensors[name][:, :-1]
    tensors["sem_seg_head.predictor.query_feat.weight"] = np.zeros((7, 32), np.float32)
    tensors["task_mlp.layers.0.bias"] = tensors["task_mlp.layers.0.bias"].astype(np.int32)
    with pytest.raises(FileError) as caught:
        convert.read_model(changed(tmp_path, tensors))
    message = str(caught.value)
    for part in (
        "changed.pkl",
        "nothing is loaded",
        "2 tensors are missing: ",
        "sem_seg_head.predictor.decoder_norm.bias",
        "text_encoder.transformer.resblocks.0.attn.in_proj_weight",
        "2 tensors do not fit: ",
        f"{name} float32[6, 31] for predictor.class_embed.kernel [32, 6]",
        "which takes floating-point numbers",
        "1 tensors belong to no part of it: sem_seg_head.predictor.query_feat.weight",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    "name",
    [
        "sem_seg_head.predictor.query_embed.weight",
        "sem_seg_head.pixel_decoder.mask_features.weight",
        "backbone.layers.1.blocks.1.mlp.fc1.weight",
        "prompt_ctx.weight",
        "criterion.logit_scale",
    ],
)
def test_one_missing_tensor(good, tmp_path, name):
    tensors = {n: x for n, x in good[1].items() if n != name}
    with pytest.raises(FileError, match=r"changed\.pkl"):
        convert.read_model(changed(tmp_path, tensors))


def test_a_file_of_another_model(tmp_path):
    path = changed(tmp_path, {"layers.0.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(FileError, match=r"is not a OneFormer.*--config\.init\.backbone=FILE"):
        convert.read_model(path)


def test_a_config_that_the_file_is_not(good):
    other = make_config("swin", num_queries=11)
    with pytest.raises(FileError, match=r"query_embed\.weight float32\[7, 32\]"):
        convert.read_model(good[0], config=other)


def test_reading_and_writing_tell_how_far_they_are(good, tmp_path, monkeypatch, caplog):
    clock = itertools.count(0, 40)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    caplog.set_level("INFO")
    found = convert.read_model(good[0])
    assert re.search(r"2 of \d+ tensors, .* left", caplog.text)
    caplog.clear()
    write(tmp_path / "b.pth", "official", found.config, found.params, found.stats)
    assert re.search(r"2 of \d+ tensors, .* left", caplog.text)


def test_half_precision_is_read_as_float32(good, tmp_path):
    floats = {n: x.astype(np.float16) if x.dtype == np.float32 else x for n, x in good[1].items()}
    params = convert.read_model(changed(tmp_path, floats)).params
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_what_transformers_cannot_hold(tmp_path):
    for fields, message in (
        (dict(encoder_points=2), "4 points"),
        (dict(query_init_ffn=48), "one width for both"),
        (dict(encoder_dropout=0.3), "one dropout"),
    ):
        config = make_config("resnet", **fields)
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "folder", "hugging_face", config, *random_weights(config))
        assert not (tmp_path / "folder").exists()


def test_writing_what_is_not_there(tmp_path):
    config = make_config("resnet")
    params, stats = random_weights(config)
    with pytest.raises(ValueError, match="unknown format 'pth'"):
        write(tmp_path / "a.pth", "pth", config, params, stats)
    with pytest.raises(ValueError, match="parameters of another model: it lacks task_mlp"):
        part = {name: x for name, x in params.items() if name != "task_mlp"}
        write(tmp_path / "a.pth", "official", config, part, stats)
    with pytest.raises(ValueError, match=r"class_embed\.\w+ has shape"):
        write(tmp_path / "a.pth", "official", make_config("resnet", num_classes=6), params, stats)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the program and the public API


def test_load_takes_other_programs_files(good, tmp_path):
    segmenter = oneformer_jax.load(
        good[0], metadata=tiny.metadata(), short_edge=64, max_size=64, topk=5
    )
    assert segmenter.test_size == (64, 64)
    assert segmenter.postprocess.topk == 5
    found = segmenter(np.zeros((40, 60, 3), np.uint8), task="semantic")
    assert found.class_map.shape == (40, 60)
    with pytest.raises(ValueError, match="has 5 classes, which no known dataset has"):
        oneformer_jax.load(good[0])
    with pytest.raises(ValueError, match="unknown setting 'top'"):
        oneformer_jax.load(good[0], metadata=tiny.metadata(), top=5)


def test_classes_by_their_number_and_by_name(tmp_path):
    config = make_config("resnet", num_classes=19)
    write(tmp_path / "a.pth", "official", config, *random_weights(config))
    found = convert.read_model(strip(tmp_path / "a.pth"))
    assert oneformer_jax.classes_of(found, "a.pth").dataset == "cityscapes"
    assert oneformer_jax.classes_of(found, "a.pth", "coco").dataset == "coco"
    with pytest.raises(ValueError, match="imagenet"):
        oneformer_jax.classes_of(found, "a.pth", "imagenet")


def test_the_program_converts_in_every_direction(tmp_path, capsys):
    config = make_config("convnext")
    params, stats = random_weights(config)
    write(tmp_path / "a.pth", "official", config, params, stats)
    paths = {name: str(tmp_path / name) for name in ("run", "b.pth", "hf", "run2")}
    modes.convert(str(tmp_path / "a.pth"), paths["run"])
    modes.convert(paths["run"], paths["hf"], "hugging_face")
    with pytest.raises(ValueError, match=r"is a workdir, .* leave out --model=coco:swin_large"):
        modes.convert(paths["run"], paths["hf"], "hugging_face", "coco:swin_large")
    modes.convert(paths["hf"], paths["b.pth"], "official")
    modes.convert(paths["b.pth"], paths["run2"], "workdir")
    assert "official checkpoint: ConvNeXt" in capsys.readouterr().out
    assert_identical(convert.read_model(paths["b.pth"]).params, params)
    segmenter = oneformer_jax.load(paths["run2"])
    assert segmenter.metadata == tiny.metadata()
    assert segmenter.test_size == (64, 96)
    with pytest.raises(ValueError, match="holds its own metadata"):
        oneformer_jax.load(paths["run2"], metadata="coco")
    with pytest.raises(ValueError, match=re.escape(f"{paths['run']} exists and is not")):
        modes.convert(paths["hf"], paths["run"])
    assert json.loads((tmp_path / "run" / "model.json").read_text())["num_classes"] == 5
