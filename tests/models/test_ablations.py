"""The paper's ablations: each switch changes what it says, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax

from oneformer_jax.configs import common
from oneformer_jax.models import functional, losses
from oneformer_jax.models.decoder import TransformerDecoder
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.losses import LossConfig, compute_losses
from oneformer_jax.models.oneformer import OneFormer, OneFormerConfig
from oneformer_jax.train import settings
from oneformer_jax.train import state as states
from oneformer_jax.types import Predictions
from tests import tiny

TEXT = {"text_encoder", "text_projector", "prompt_ctx", "logit_scale"}
QUERY_INIT = {"predictor/class_input_proj", "predictor/class_transformer"}
LOSSES = LossConfig(num_points=16, point_sampling="shared")


@functools.cache
def _shapes(**overrides):
    """Shape of every trained parameter by name."""
    tree = functional.abstract(tiny.model_config(**overrides), training=True).params
    return {name: leaf.shape for name, leaf in tiny.leaves(tree).items()}


def _parts(names):
    """The first two levels of the predictor's names, the first level of the others."""
    return {"/".join(n.split("/")[: 2 if n.startswith("predictor") else 1]) for n in names}


@pytest.mark.parametrize(
    ("overrides", "gone", "new"),
    [
        ({}, set(), set()),
        ({"queries": "no_token"}, set(), set()),
        ({"queries": "zeros"}, set(), set()),
        (
            {"queries": "learned"},
            {"task_mlp"} | QUERY_INIT | TEXT,
            {"predictor/query_feat"},
        ),
        ({"query_loss": "none"}, TEXT, set()),
        ({"query_loss": "classification"}, TEXT, {"query_class"}),
        ({"num_context": 0}, {"prompt_ctx"}, set()),
    ],
)
def test_parameters(overrides, gone, new):
    official, ours = _shapes(), _shapes(**overrides)
    assert _parts(official) - _parts(ours) == gone
    assert _parts(ours) - _parts(official) == new
    common = official.keys() & ours.keys()
    assert {n: official[n] for n in common} == {n: ours[n] for n in common}
    # What the losses alone need is not there for inference.
    tree = functional.inference_params(
        functional.abstract(tiny.model_config(**overrides), training=True).params
    )
    config = tiny.model_config(**overrides)
    model = nnx.eval_shape(lambda: OneFormer(config, rngs=ParamKeys(), training=False))
    assert tiny.leaves(tree).keys() == tiny.leaves(functional.split(model).params).keys()


def test_new_parameters_have_the_shapes_that_their_use_needs():
    assert _shapes(queries="learned")["predictor/query_feat/embedding"] == (7, 32)
    assert _shapes(query_loss="classification")["query_class/kernel"] == (32, tiny.CLASSES + 1)


def test_learned_queries_give_mask2former():
    """216 M in the paper's table of joint training, against 219 M."""
    config = OneFormerConfig.published("ade20k:swin_large,res=640", queries="learned")
    count = sum(x.size for x in jax.tree.leaves(functional.abstract(config, training=True).params))
    assert round(count / 1e6) == 216


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": "text"}, "model.queries is 'text'; .*task, no_token, zeros, learned"),
        ({"query_loss": ""}, "model.query_loss is ''; .*contrastive, classification, none"),
        ({"num_context": -1}, "model.num_context is -1"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.model_config(**fields)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("queries", "no_token"),
        ("queries", "zeros"),
        ("queries", "learned"),
        ("query_loss", "classification"),
        ("query_loss", "none"),
        ("num_queries", 100),
        ("num_context", 0),
    ],
)
def test_one_key_of_the_config_switches_the_model(key, value):
    config = common.get_base()
    official = settings.model_config(config, 133)
    config.model[key] = value
    expected = dataclasses.replace(official, **{key: value})
    assert settings.model_config(config, 133) == expected != official


# ---------------------------------------------------------------- where queries come from


@functools.cache
def _initial_queries(queries: str):
    """(task token after its norm, queries) for two tasks and two images, and the decoder."""
    decoder = TransformerDecoder(tiny.model_config(queries=queries), rngs=ParamKeys(0))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 4, 4, 32)), jnp.float32)
    tasks = jnp.asarray(rng.normal(size=(2, 32)), jnp.float32)
    # Images 0, 0, 1 under the tasks 0, 1, 0.
    images, tasks = images[jnp.array([0, 0, 1])], tasks[jnp.array([0, 1, 0])]
    given = None if queries == "learned" else tasks
    positions = decoder.query_embed.embedding[...]
    found = decoder._initial_queries(images, given, positions, None)
    return np.asarray(decoder.decoder_norm(tasks)), np.asarray(found), decoder


def _differ(a, b):
    """Tells if each row of two [Q, D] differs."""
    return np.abs(a - b).max(-1) > 1e-4


def test_official_queries_start_from_the_task_and_end_with_it():
    token, queries, _ = _initial_queries("task")
    np.testing.assert_allclose(queries[:, -1], token, atol=1e-6)
    assert _differ(queries[0], queries[1]).all()
    assert _differ(queries[0], queries[2])[:-1].all()


def test_without_token_every_query_depends_on_the_image_and_on_the_task():
    token, queries, _ = _initial_queries("no_token")
    assert queries.shape == (3, 7, 32)
    assert _differ(queries[0], queries[1]).all()
    assert _differ(queries[0], queries[2]).all()
    assert _differ(queries[:, -1], token).all()
    # All values of the first self-attention are the task, so the number of queries has no say yet.
    np.testing.assert_allclose(queries[:, :-1], _initial_queries("task")[1][:, :-1], atol=1e-5)


def test_zero_queries_know_the_task_from_the_token_alone():
    token, queries, _ = _initial_queries("zeros")
    np.testing.assert_allclose(queries[:, -1], token, atol=1e-6)
    np.testing.assert_allclose(queries[0, :-1], queries[1, :-1], atol=1e-6)
    assert _differ(queries[0], queries[2])[:-1].all()
    assert _differ(queries[0], _initial_queries("task")[1][0])[:-1].all()


def test_learned_queries_are_parameters():
    _, queries, decoder = _initial_queries("learned")
    expected = np.broadcast_to(decoder.query_feat.embedding[...], queries.shape)
    np.testing.assert_array_equal(queries, expected)


# ---------------------------------------------------------------- the training step


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        ({}, {"loss_contrastive"}),
        ({"queries": "no_token"}, {"loss_contrastive"}),
        ({"queries": "zeros"}, {"loss_contrastive"}),
        ({"num_context": 0}, {"loss_contrastive"}),
        ({"query_loss": "classification"}, {"loss_query_class"}),
        ({"query_loss": "none"}, set()),
        ({"queries": "learned"}, set()),
    ],
)
def test_terms_of_the_training_step(overrides, terms):
    config = tiny.model_config(**overrides)
    optimizer = optax.sgd(0.1)
    step = states.make_train_step(config, LOSSES, optimizer, tiny.text_table())
    init = states.make_init(config, optimizer, ema=False)
    state = jax.eval_shape(lambda: init(None))
    batch = tiny.batch()
    batch["text_ids"] = np.zeros((2, config.num_texts), np.int32)
    new, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
    assert {"loss_contrastive", "loss_query_class"} & metrics.keys() == terms
    assert tiny.leaves(new).keys() == tiny.leaves(state).keys()


def test_a_model_with_learned_queries_does_not_hear_the_task():
    config = tiny.model_config(queries="learned")
    model = nnx.eval_shape(lambda: OneFormer(config, rngs=ParamKeys(), training=True))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logits(params, rest, tasks):
        return nnx.merge(graphdef, params, rest)(jnp.zeros((2, 64, 64, 3)), tasks).class_logits

    trees = (nnx.to_pure_dict(params), nnx.to_pure_dict(rest))
    traced = jax.make_jaxpr(logits)(*trees, np.zeros((2, 77), np.int32)).jaxpr
    tasks = traced.invars[-1]
    assert tasks.aval.shape == (2, 77)
    assert not any(var is tasks for eqn in traced.eqns for var in eqn.invars)


def test_without_context_texts_fill_the_whole_list():
    config = tiny.model_config(num_context=0)
    assert config.num_texts == config.num_queries == 7
    ids = np.zeros((2, 7), np.int32)

    def encode():
        model = OneFormer(config, rngs=ParamKeys(0), training=True)
        return model.encode_texts(jnp.asarray(tiny.text_table()), jnp.asarray(ids))

    assert jax.eval_shape(encode).shape == (2, 7, 32)


# ---------------------------------------------------------------- the losses


def test_classes_of_texts():
    # Two classes, three padding texts, and the two classes as things.
    found = losses.text_classes(jnp.arange(7), num_classes=2)
    np.testing.assert_array_equal(found, [0, 1, 2, 2, 2, 0, 1])


def _loss_inputs():
    rng = np.random.default_rng(1)
    normal = functools.partial(rng.normal)
    shapes = {
        "class_logits": (1, 2, 7, 6),
        "mask_embed": (1, 2, 7, 4),
        "mask_features": (2, 8, 8, 4),
        "queries": (2, 7, 4),
        "text_queries": (2, 7, 4),
        "query_class_logits": (2, 4, 6),
    }
    arrays = {n: jnp.asarray(normal(size=shape), jnp.float32) for n, shape in shapes.items()}
    batch = tiny.batch(side=32)
    targets = {name: batch[name] for name in ("segment_map", "classes", "valid")}
    targets["text_ids"] = np.array([[0, 3, 5, 7], [4, 4, 9, 6]], np.int32)
    return Predictions(**arrays, logit_scale=jnp.float32(1.0)), targets


def test_weight_and_value_of_the_losses_on_the_queries():
    predictions, targets = _loss_inputs()

    @functools.partial(jax.jit, static_argnums=0)
    def terms(weight):
        config = dataclasses.replace(LOSSES, contrastive_weight=weight)
        return compute_losses(predictions, targets, jax.random.key(0), config)

    total, half = terms(0.5)
    names = ("loss_contrastive", "loss_query_class")
    # Rows 5 to 7 of the table are padding, which counts a tenth; row 9 is class 1 as a thing.
    labels = np.array([[0, 3, 5, 5], [4, 4, 1, 5]])
    entropy = -np.take_along_axis(
        log_softmax(np.asarray(predictions.query_class_logits, np.float64), -1),
        labels[..., None],
        -1,
    )[..., 0]
    weight = np.where(labels == tiny.CLASSES, 0.1, 1.0)
    expected = 0.5 * (weight * entropy).sum() / weight.sum()
    assert float(half["loss_query_class"]) == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(
        sum(float(v) for n, v in half.items() if n.startswith("loss_")), rel=1e-6
    )
    _, double = terms(1.0)
    _, none = terms(0.0)
    for name, value in half.items():
        factor = 2 if name in names else 1
        assert float(double[name]) == pytest.approx(factor * float(value), rel=1e-6), name
    assert all(float(none[name]) == 0 for name in names)
    assert float(half["loss_contrastive"]) > 0
