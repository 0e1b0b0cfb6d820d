"""The same weights and inputs give the same numbers as `transformers`' OneFormer in PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oneformer_jax
from oneformer_jax.models import functional
from oneformer_jax.models.losses import LossConfig, compute_losses
from oneformer_jax.models.oneformer import PIXEL_MEAN, PIXEL_STD
from oneformer_jax.weights import convert, files, names
from tests import tiny
from tests.weights import torch_reference as reference

# float32 rounding through the whole model, relative to the largest value.
TOLERANCE = 1e-4


def load(model, folder, **fields):
    """Our model of a `transformers` model: config, params, stats."""
    model.save_pretrained(folder)
    found = convert.read_model(folder)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, **fields))


def show(title: str, errors: dict[str, float]) -> None:
    """The largest error, for docs/weights.md; pytest shows it with -s."""
    worst = max(errors, key=errors.get)
    print(f"\n{title}: {errors[worst]:.1e} ({worst})")


def forward(found, given):
    """Backbone features, pixel decoder outputs and predictions, from one program."""
    graph = functional.abstract(found.config, training=found.text).graph

    @jax.jit
    def run(params, stats, image, task_tokens):
        model = functional.merge(graph, params, stats)
        features = model.backbone(image)
        mask_features, maps = model.pixel_decoder(features)
        return features, mask_features, maps, model(image, task_tokens)

    return run(found.params, found.stats, given["image"], given["task_tokens"])


def compare(found, theirs, given) -> dict[str, float]:
    """Relative errors of everything on the way, and of every prediction."""

    def to_last(x):
        return x.detach().permute(0, 2, 3, 1).numpy()

    features, mask_features, maps, ours = forward(found, given)
    errors = {}
    for i, (a, b) in enumerate(zip(features, theirs.encoder_hidden_states, strict=True), 2):
        errors[f"res{i}"] = reference.relative_error(a, to_last(b))
    pixel = theirs.pixel_decoder_hidden_states
    errors["mask_features"] = reference.relative_error(mask_features, to_last(pixel[0]))
    for i, (a, b) in enumerate(zip(maps, pixel[1:], strict=True)):
        errors[f"map{i}"] = reference.relative_error(a, to_last(b))
    errors["queries"] = reference.relative_error(
        ours.queries, theirs.transformer_decoder_contrastive_queries
    )
    final = {
        "class_queries_logits": theirs.class_queries_logits,
        "masks_queries_logits": theirs.masks_queries_logits,
    }
    predictions = [*theirs.auxiliary_predictions, final]
    assert len(predictions) == len(ours.class_logits)
    for n, b in enumerate(predictions):
        errors[f"class{n}"] = reference.relative_error(
            ours.class_logits[n], b["class_queries_logits"]
        )
        errors[f"mask{n}"] = reference.relative_error(
            ours.mask_logits(n), b["masks_queries_logits"]
        )
    return errors


@pytest.mark.parametrize(
    ("kind", "height", "width", "fields"),
    [
        ("swin", 96, 96, {}),
        ("swin", 64, 160, {"window_size": 12}),  # larger than every map but the first
        ("convnext", 160, 64, {}),
        ("resnet", 64, 96, {}),
        ("dinat", 96, 160, {}),
        ("dinat", 160, 64, {"kernel_size": 5}),  # kernels that pass the borders of all maps
    ],
)
def test_every_prediction_agrees(kind, height, width, fields, tmp_path):
    model = reference.make(reference.backbone_config(kind, **fields))
    given = reference.inputs(height, width)
    found = load(model, tmp_path)
    with reference.torch.no_grad():
        theirs = reference.run(model, given)
    errors = compare(found, theirs, given)
    show(f"{kind} {height} x {width}", errors)
    assert max(errors.values()) < TOLERANCE, errors


def test_heads_of_16_channels_are_told_by_the_tensors(tmp_path):
    """An official file without any description, of 128 channels in 8 heads of 4 points."""
    sizes = dict(hidden_dim=128, conv_dim=128, mask_dim=128, num_attention_heads=8)
    sizes |= {"text_encoder_width": 128}
    model = reference.make(reference.backbone_config("resnet"), seed=5, **sizes)
    given = reference.inputs(64, 96, seed=5)
    described = load(model, tmp_path / "theirs")
    convert.write_model(
        tmp_path / "model.pth",
        "official",
        described.config,
        described.params,
        described.stats,
        metadata=tiny.metadata(),
        settings={},
    )
    tensors = files.open_tensors(tmp_path / "model.pth").tensors
    bare = {name: reference.torch.from_numpy(np.array(t.read())) for name, t in tensors.items()}
    reference.torch.save({"model": bare}, tmp_path / "bare.pth")
    found = convert.read_model(tmp_path / "bare.pth")
    assert (found.config.num_heads, found.config.encoder_points) == (8, 4)
    with reference.torch.no_grad():
        theirs = reference.run(model, given)
    errors = compare(found, theirs, given)
    show("8 heads of 16 channels", errors)
    assert max(errors.values()) < TOLERANCE, errors
    # The reading before: 4 heads of 32 channels with 8 points have tensors of the same shapes.
    mistaken = convert.read_model(tmp_path / "bare.pth", num_heads=4)
    assert mistaken.config.encoder_points == 8
    assert max(compare(mistaken, theirs, given).values()) > 0.01


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_transformers_loads_what_we_write(kind, tmp_path):
    """The way back: our folder needs no more than `from_pretrained`, and gives our numbers."""
    original = reference.make(reference.backbone_config(kind), seed=4)
    found = load(original, tmp_path / "theirs")
    convert.write_model(
        tmp_path / "ours",
        "hugging_face",
        dataclasses.replace(found.config, encoder_dropout=0.0, query_init_dropout=0.0),
        found.params,
        found.stats,
        metadata=tiny.metadata(),
        settings={},
    )
    model, report = reference.transformers.OneFormerForUniversalSegmentation.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    left = {name for name in report["missing_keys"] if ".layernorm." not in name}  # of release 5
    assert not left and not report["unexpected_keys"] and not report["mismatched_keys"], report
    assert list(model.config.id2label.values()) == list(tiny.metadata().class_names)
    given = reference.inputs(64, 96)
    with reference.torch.no_grad():
        theirs = reference.run(model.eval(), given)
    errors = compare(found, theirs, given)
    show(f"{kind}, written by us", errors)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("kind", ["swin", "convnext", "resnet", "dinat"])
def test_backbones_agree_on_sizes_that_are_no_multiples_of_32(kind, tmp_path):
    model = reference.make(reference.backbone_config(kind), training=False)
    found = load(model, tmp_path)
    graph = functional.abstract(found.config, training=False).graph
    errors = {}
    for height, width in ((70, 101), (101, 70)):
        image = reference.inputs(height, width)["image"]
        pixels = reference.torch.from_numpy(image).permute(0, 3, 1, 2)
        with reference.torch.no_grad():
            theirs = model.model.pixel_level_module.encoder(pixels).feature_maps
        features = jax.jit(lambda p, s, x: functional.merge(graph, p, s).backbone(x))(
            found.params, found.stats, image
        )
        for i, (a, b) in enumerate(zip(features, theirs, strict=True), 2):
            expected = b.permute(0, 2, 3, 1).numpy()
            errors[f"res{i} of {height} x {width}"] = reference.relative_error(a, expected)
    show(kind, errors)
    assert max(errors.values()) < TOLERANCE, errors


def test_a_whole_image_is_segmented_alike(tmp_path):
    """From pixels to classes, with the padding and the two resizes of logits (spec 5)."""
    torch = reference.torch
    model = reference.make(reference.backbone_config("swin"), training=False, seed=3)
    with torch.no_grad():  # queries of different classes and masks
        decoder = model.model.transformer_module.decoder
        decoder.class_embed.weight.mul_(30)
        model.model.transformer_module.queries_embedder.weight.mul_(30)
        list(decoder.mask_embed.parameters())[-2].mul_(10)  # the last weight
    model.save_pretrained(tmp_path)
    height, width = 70, 101
    segmenter = oneformer_jax.load(
        tmp_path, metadata=tiny.metadata(), short_edge=height, max_size=width
    )
    image = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = segmenter(image, task="semantic")

    pixels = (image - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    padded = np.zeros((96, 128, 3), np.float32)
    padded[:height, :width] = pixels
    task = torch.from_numpy(segmenter.task_tokens("semantic")[None]).float()
    with torch.no_grad():
        outputs = model(pixel_values=torch.from_numpy(padded)[None].permute(0, 3, 1, 2),
                        task_inputs=task)  # fmt: skip
        resize = torch.nn.functional.interpolate
        masks = resize(outputs.masks_queries_logits, (96, 128), mode="bilinear")
        masks = resize(masks[..., :height, :width], (height, width), mode="bilinear")[0].sigmoid()
        classes = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
        scores = torch.einsum("qc,qhw->hwc", classes, masks).numpy()
    given = segmenter.raw(padded[None], segmenter.task_tokens("semantic")[None])
    errors = {
        "class_logits": reference.relative_error(given.class_logits, outputs.class_queries_logits),
        "mask_logits": reference.relative_error(given.mask_logits, outputs.masks_queries_logits),
    }
    show("segmenter", errors)
    assert max(errors.values()) < TOLERANCE
    # Where two classes are as good as equal, rounding may decide.
    best = np.sort(scores, -1)
    clear = best[..., -1] - best[..., -2] > 1e-4 * best.max()
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(ours.class_map[clear], scores.argmax(-1)[clear])
    assert len(np.unique(ours.class_map)) > 1


LOSSES = LossConfig(num_points=64, point_sampling="per_mask")

# One array of every part, by our names.
GRADIENTS = {
    "swin": (
        "backbone.patch_embed.proj.kernel",
        "backbone.layers.2.blocks.1.attn.relative_position_bias_table",
        "backbone.layers.1.blocks.0.attn.qkv.kernel",
        "backbone.layers.2.downsample.reduction.kernel",
        "backbone.norm3.scale",
    ),
    "convnext": (
        "backbone.downsample_layers.0.0.kernel",
        "backbone.stages.2.1.gamma",
        "backbone.stages.0.0.dwconv.kernel",
        "backbone.stages.3.0.pwconv1.kernel",
    ),
    "resnet": (
        "backbone.stem.conv1.kernel",
        "backbone.res4.1.conv2.kernel",
        "backbone.res5.0.shortcut.kernel",
    ),
    "dinat": (
        "backbone.patch_embed.proj.0.kernel",
        "backbone.levels.0.blocks.0.attn.rpb",
        "backbone.levels.2.blocks.1.attn.qkv.kernel",
        "backbone.levels.1.downsample.reduction.kernel",
        "backbone.levels.3.blocks.0.mlp.fc2.bias",
    ),
}
HEAD_GRADIENTS = (
    "pixel_decoder.transformer.level_embed",
    "pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.kernel",
    "pixel_decoder.transformer.encoder.layers.1.self_attn.attention_weights.kernel",
    "pixel_decoder.transformer.encoder.layers.0.self_attn.value_proj.kernel",
    "pixel_decoder.adapter_1.conv.kernel",
    "pixel_decoder.mask_features.kernel",
    "predictor.class_input_proj.kernel",
    "predictor.class_transformer.decoder.layers.0.multihead_attn.k_proj.kernel",
    "predictor.transformer_cross_attention_layers.1.multihead_attn.v_proj.kernel",
    "predictor.transformer_self_attention_layers.2.self_attn.q_proj.kernel",
    "predictor.query_embed.embedding",
    "predictor.level_embed.embedding",
    "predictor.class_embed.kernel",
    "predictor.mask_embed.layers.1.kernel",
    "task_mlp.layers.1.kernel",
    "text_encoder.token_embedding.embedding",
    "text_encoder.positional_embedding",
    "text_encoder.transformer.resblocks.0.attn.k_proj.kernel",
    "text_encoder.transformer.resblocks.1.mlp.c_fc.kernel",
    "text_projector.layers.0.kernel",
    "prompt_ctx.embedding",
    "logit_scale",
)


@pytest.mark.parametrize("kind", list(GRADIENTS))
def test_losses_and_gradients_agree(kind, tmp_path):
    height, width = 96, 128
    model = reference.make(reference.backbone_config(kind), seed=1)
    given = reference.inputs(height, width, seed=1)
    labels = reference.targets(height, width, seed=1)
    found = load(model, tmp_path, text_causal=False)
    graph = functional.abstract(found.config, training=True).graph
    key = jax.random.key(7)

    @jax.jit
    def run(params, stats, given, labels):
        def loss(params):
            predictions = functional.merge(graph, params, stats)(
                given["image"],
                given["task_tokens"],
                text_tokens=given["text_table"],
                text_ids=given["text_ids"],
            )
            return compute_losses(predictions, labels, key, LOSSES)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, terms), gradients = run(found.params, found.stats, given, labels)
    count = found.config.decoder_layers + 1
    recorded = {}
    get_losses = model.criterion.forward

    def criterion(*args, **kwargs):
        result = get_losses(*args, **kwargs)
        recorded.update({name: value.item() for name, value in result.items()})
        return result

    model.criterion.forward = criterion
    with reference.points_of(key, model, labels, count):
        theirs = reference.run(model, given, labels)
    theirs.loss.backward()
    errors = {"loss": reference.relative_error(total, np.float32(theirs.loss.item()))}
    for name, term in terms.items():
        if name != "matcher_nonfinite":
            other = name.replace("loss_ce", "loss_cross_entropy")
            weight = {"ce": 2.0, "mask": 5.0, "dice": 5.0, "contrastive": 0.5}[name.split("_")[1]]
            errors[name] = reference.relative_error(term / weight, np.float32(recorded[other]))
    show(f"{kind}, losses", errors)
    assert max(errors.values()) < 1e-4, errors

    ours = dict(names.flatten(gradients))
    tensors = reference.gradients(model, tmp_path / "gradients")
    errors = {}
    for name in (*GRADIENTS[kind], *HEAD_GRADIENTS):
        group = names.group_of(name, "ours", "hugging_face", kind)
        parts = [tensors[other] for other in group.theirs]
        expected = group.to_ours(parts)[group.ours.index(name)]
        errors[name] = reference.relative_error(ours[name], expected)
    show(f"{kind}, gradients", errors)
    assert max(errors.values()) < 1e-3, errors


def test_the_texts_agree_only_without_the_causal_mask(tmp_path):
    model = reference.make(reference.backbone_config("convnext"), seed=2)
    given = reference.inputs(64, 64, seed=2)
    with reference.torch.no_grad():
        theirs = reference.run(model, given).text_queries
    errors = []
    for causal in (False, True):
        found = load(model, tmp_path / str(causal), text_causal=causal)
        module = functional.merge(
            functional.abstract(found.config, training=True).graph, found.params, found.stats
        )
        table = jnp.asarray(given["text_table"][:, :8])  # cut to the longest text
        ours = module.encode_texts(table, jnp.asarray(given["text_ids"]))
        errors.append(reference.relative_error(ours, theirs))
    assert errors[0] < TOLERANCE
    assert errors[1] > 0.01  # a known difference: the official code applies the mask
