"""The whole model, and the rules that are easy to break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.models import decoder, functional, layers
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.oneformer import ONCE_STORED, OneFormer, OneFormerConfig, normalize_images
from oneformer_jax.types import TASK_TOKENS
from tests import tiny


def test_a_published_model_is_made_by_its_name():
    assert OneFormerConfig.published("ade20k:swin_large,res=640").num_queries == 250
    assert OneFormerConfig.published("coco:swin_large").num_queries == 150
    assert OneFormerConfig.published("cityscapes:resnet50").backbone.norm == "batch"
    assert OneFormerConfig.published("ade20k:swin_tiny", num_queries=100).num_queries == 100
    with pytest.raises(ValueError, match=r"no published model 'kitti:swin_large'.*coco:swin_tiny"):
        OneFormerConfig.published("kitti:swin_large")


def test_config_survives_json():
    import json

    for config in (tiny.model_config(), OneFormerConfig.published("ade20k:swin_large,res=640")):
        assert OneFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # Earlier versions stored with a model how it was run.
    earlier = dict.fromkeys(ONCE_STORED, "nonsense")
    assert OneFormerConfig.from_dict(config.to_dict() | earlier) == config
    with pytest.raises(ValueError, match="model: unknown fields 'widht'; known"):
        OneFormerConfig.from_dict(config.to_dict() | {"widht": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dim": 40}, "model.hidden_dim is 40; it must be a multiple of 32"),
        ({"num_heads": 5}, "model.hidden_dim is 32; it must be a multiple of model.num_heads = 5"),
        ({"num_context": 7}, "model.num_context is 7; it must be below model.num_queries = 7"),
        ({"num_classes": 0}, "model.num_classes is 0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.model_config(**fields)


@pytest.fixture(scope="module")
def model():
    return OneFormer(tiny.model_config(), rngs=ParamKeys(0), training=True)


@pytest.fixture(scope="module")
def inputs():
    batch = tiny.batch()
    return {
        "image": normalize_images(jnp.asarray(batch["image"]), jnp.asarray(batch["image_size"])),
        "task_tokens": jnp.asarray(TASK_TOKENS)[batch["task"]],
        "text_tokens": jnp.asarray(tiny.text_table()),
        "text_ids": jnp.asarray(batch["text_ids"]),
    }


@pytest.fixture(scope="module")
def forward(model):
    """The model as one compiled function of its inputs."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    run = jax.jit(
        lambda params, rest, inputs, key: nnx.merge(graphdef, params, rest)(**inputs, key=key)
    )
    # Parameters are arguments, as in the program: constants would be folded while compiling.
    return lambda inputs, key=None: run(params, rest, inputs, key)


@pytest.fixture(scope="module")
def predictions(forward, inputs):
    return forward(inputs)


def test_shapes_and_dtypes(predictions):
    assert predictions.class_logits.shape == (4, 2, 7, 6)
    assert predictions.mask_embed.shape == (4, 2, 7, 32)
    assert predictions.mask_features.shape == (2, 16, 16, 32)
    assert predictions.queries.shape == predictions.text_queries.shape == (2, 7, 32)
    assert predictions.mask_logits().shape == (2, 7, 16, 16)
    assert float(predictions.logit_scale) == pytest.approx(np.log(1 / 0.07))
    assert {x.dtype for x in jax.tree.leaves(predictions)} == {jnp.dtype("float32")}


def test_the_task_token_is_the_last_query_and_goes_through_the_shared_norm(
    model, inputs, predictions
):
    task = model.task_mlp(inputs["task_tokens"].astype(jnp.float32))
    expected = model.predictor.decoder_norm(task)
    np.testing.assert_allclose(predictions.queries[:, -1], expected, atol=1e-6)


def test_the_task_changes_the_prediction(forward, inputs, predictions):
    other = dict(inputs, task_tokens=jnp.asarray(TASK_TOKENS)[(tiny.batch()["task"] + 1) % 3])
    change = jnp.abs(forward(other).class_logits - predictions.class_logits)
    assert float(change.max(axis=(0, 2, 3)).min()) > 1e-3


def test_context_embeddings_come_last_and_are_not_projected(model, predictions):
    context = model.prompt_ctx.embedding[...]
    for texts in predictions.text_queries:
        np.testing.assert_array_equal(texts[-3:], context)


def test_texts_are_those_of_their_rows_whatever_the_padding(model, inputs, predictions):
    tokens = jnp.pad(inputs["text_tokens"], ((0, 0), (0, 9)))
    for b, row in enumerate(np.asarray(inputs["text_ids"])):
        for slot, text in enumerate(row):
            alone = model.text_projector(model.text_encoder(tokens[text][None]))[0]
            np.testing.assert_allclose(predictions.text_queries[b, slot], alone, atol=1e-5)


def test_inference_builds_no_text_branch(inputs, model, predictions):
    graph = OneFormer(tiny.model_config(), rngs=ParamKeys(0), training=False)
    names = set(nnx.to_pure_dict(nnx.state(graph)))
    assert names == {"backbone", "pixel_decoder", "predictor", "task_mlp"}
    graphdef, state = nnx.split(graph)
    run = jax.jit(lambda state, i, t: nnx.merge(graphdef, state)(i, t))
    found = run(state, inputs["image"], inputs["task_tokens"])
    assert found.text_queries is None
    assert found.logit_scale is None
    # Same seed, same order of parameters: the shared part equals the training model's.
    np.testing.assert_allclose(found.class_logits, predictions.class_logits, atol=1e-5)


def test_query_initialisation_attends_to_positions_with_keys_of_features(model):
    """Values are the position embedding alone: constant features leave a value that features
    cannot change, which is what the released weights expect."""
    layer = model.predictor.class_transformer
    task, positions = jnp.ones((1, 32)), jnp.zeros((2, 32))
    features = jax.random.normal(jax.random.key(0), (1, 4, 4, 32))
    attention = layer.decoder.layers[0].multihead_attn
    sine = layers.sine_positions(4, 4, 32).reshape(1, 16, 32)
    seen = []
    original = type(attention).__call__

    def spy(self, query, key, value, **kwargs):
        seen.append((key, value))
        return original(self, query, key, value, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(attention), "__call__", spy)
        layer(features, task, positions)
    key, value = seen[1]  # the first call is the self-attention
    np.testing.assert_allclose(value, sine, atol=1e-6)
    np.testing.assert_allclose(key, sine + features.reshape(1, 16, 32), atol=1e-6)


def test_attention_mask():
    features = jnp.asarray([[[[1.0], [-1.0]], [[2.0], [-3.0]]]])  # [1, 2, 2, 1]
    embed = jnp.asarray([[[1.0], [-1.0], [0.0]]])
    found = decoder.attention_mask(embed, features)
    expected = [[True, False, True, False], [False, True, False, True], [True] * 4]
    np.testing.assert_array_equal(found[0], expected)
    # A query that sees nothing sees everything.
    nothing = decoder.attention_mask(jnp.asarray([[[1.0]]]), -jnp.ones((1, 2, 2, 1)))
    assert bool(nothing.all())
    grad = jax.grad(lambda e: decoder.attention_mask(e, features).astype(float).sum())(embed)
    assert not np.asarray(grad).any()


def test_masks_of_layer_i_come_from_the_prediction_before_it_at_the_right_level(
    model, inputs, predictions, monkeypatch
):
    graphdef, state = nnx.split(model)
    original, shapes = decoder.attention_mask, []

    @jax.jit
    def embeds(state, inputs):
        seen = []

        def spy(embed, features):
            seen.append(embed)
            shapes.append(features.shape[1:3])
            return original(embed, features)

        monkeypatch.setattr(decoder, "attention_mask", spy)
        nnx.merge(graphdef, state)(**inputs)
        return seen

    for n, embed in enumerate(embeds(state, inputs)):
        np.testing.assert_allclose(embed, predictions.mask_embed[n], atol=1e-5)
    assert shapes == [(2, 2), (4, 4), (8, 8)]


def test_dropout_needs_a_key_and_changes_the_output(forward, inputs, predictions):
    dropped = forward(inputs, jax.random.key(0))
    assert float(jnp.abs(dropped.queries - predictions.queries).max()) > 1e-3


def test_remat_and_bfloat16(model, inputs, predictions):
    _, params, rest = nnx.split(model, nnx.Param, ...)

    def run(**overrides):
        how = dict(rngs=ParamKeys(), training=True, execution=Execution(**overrides))
        other = nnx.eval_shape(lambda: OneFormer(tiny.model_config(), **how))
        graphdef = nnx.graphdef(other)
        forward = jax.jit(lambda params, rest, inputs: nnx.merge(graphdef, params, rest)(**inputs))
        return forward(params, rest, inputs)

    remat = run(remat=True)
    np.testing.assert_allclose(remat.class_logits, predictions.class_logits, atol=1e-5)
    half = run(dtype="bfloat16")
    assert half.mask_features.dtype == jnp.bfloat16
    assert half.class_logits.dtype == jnp.float32
    error = jnp.abs(half.class_logits[0] - predictions.class_logits[0]).mean()
    assert float(error) < 0.1
    # The task token stays float32: bfloat16 would round its ids.
    np.testing.assert_allclose(half.queries[:, -1], predictions.queries[:, -1], atol=1e-5)


def test_normalize_images():
    image = jnp.full((1, 4, 4, 3), 128, jnp.uint8)
    found = np.asarray(normalize_images(image, jnp.asarray([[2, 3]])))
    expected = (128 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(found[0, :2, :3], np.broadcast_to(expected, (2, 3, 3)), rtol=1e-5)
    assert not found[0, 2:].any()
    assert not found[0, :, 3:].any()


@pytest.mark.parametrize("kernel", ["pallas_tpu", "pallas_gpu"])
def test_a_named_kernel_is_never_replaced(kernel, inputs):
    how = Execution(kernels=Kernels(deform_attn=kernel))
    model = functional.abstract(tiny.model_config(), how, training=False)
    with pytest.raises(NotImplementedError, match=kernel):
        jax.eval_shape(
            lambda p, s: functional.encode(model.graph, p, s, inputs["image"]), *model[1:]
        )
