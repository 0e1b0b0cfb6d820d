"""The training step: accumulation, averages, types, and what it must never hold.

That it does not depend on the mesh is shown in test_loop.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.models.losses import LossConfig
from oneformer_jax.models.matcher import MatcherConfig
from oneformer_jax.models.oneformer import normalize_images
from oneformer_jax.train import optim, settings
from oneformer_jax.train import state as states
from oneformer_jax.train.flops import count_flops
from tests import tiny

LOSSES = LossConfig(num_points=64, point_sampling="shared")
OPTIMIZER = optax.sgd(0.01)


def _config(**overrides):
    overrides = dict(encoder_dropout=0.0, query_init_dropout=0.0) | overrides
    return tiny.model_config(**overrides)


class Toy(nnx.Module):
    """Stands in for OneFormer: parameters, statistics, and randomness from the key it is given."""

    def __init__(self, config, *, rngs, training, execution=None):
        self.weight = nnx.Param(jnp.array([0.5, -0.2, 0.1]))
        self.mean = nnx.BatchStat(jnp.zeros(3))

    def __call__(self, images, task_tokens, *, text_tokens, text_ids, key, train):
        pixels = images.mean(axis=(1, 2))
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * pixels.mean(axis=0)
        return (pixels + jax.random.normal(key, (3,))) @ self.weight[...]


def _toy_losses(predictions, batch, key, config, **options):
    loss = jnp.mean((predictions - batch["task"] - jax.random.uniform(key)) ** 2)
    return loss, {"loss_toy": loss}


def _toy_gradients(weight, batch, key):
    """Computes `Toy` and `_toy_losses`, written out: (loss, gradient), new pixel mean."""
    model_key, point_key = jax.random.split(key)
    pixels = normalize_images(batch["image"], batch["image_size"]).mean(axis=(1, 2))
    noise = jax.random.normal(model_key, (3,))

    def loss(weight):
        difference = (pixels + noise) @ weight - batch["task"] - jax.random.uniform(point_key)
        return jnp.mean(difference**2)

    return jax.value_and_grad(loss)(weight), pixels.mean(axis=0)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_is_the_mean_of_its_micro_batches(accumulate, monkeypatch):
    monkeypatch.setattr(functional, "OneFormer", Toy)
    monkeypatch.setattr(states, "compute_losses", _toy_losses)
    key, batch, decay = jax.random.key(3), tiny.batch(size=8), 0.9
    init = states.make_init(None, OPTIMIZER, ema=True)
    step = states.make_train_step(
        None, None, OPTIMIZER, tiny.text_table(), accumulate=accumulate, ema_decay=decay
    )
    step, state = jax.jit(step), init(0)
    weight, mean, average = np.array([0.5, -0.2, 0.1]), np.zeros(3), np.array([0.5, -0.2, 0.1])
    for number in range(2):
        state, metrics = step(state, batch, key)
        step_key = jax.random.fold_in(key, number)
        keys = [step_key] if accumulate == 1 else jax.random.split(step_key, accumulate)
        losses, gradients = [], []
        for i in range(accumulate):
            part = {name: value[i::accumulate] for name, value in batch.items()}
            (loss, gradient), pixels = _toy_gradients(jnp.array(weight), part, keys[i])
            mean = 0.5 * mean + 0.5 * pixels  # micro-batches move the statistics one by one
            losses.append(loss)
            gradients.append(gradient)
        gradient = np.mean(gradients, axis=0)
        assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
        assert float(metrics["loss_toy"]) == pytest.approx(np.mean(losses), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        weight = weight - 0.01 * gradient
        assert float(metrics["param_norm"]) == pytest.approx(np.linalg.norm(weight), rel=1e-5)
        average = decay * average + (1 - decay) * weight
        np.testing.assert_allclose(state["params"]["weight"], weight, rtol=1e-5)
        np.testing.assert_allclose(state["ema"]["weight"], average, rtol=1e-5)
        np.testing.assert_allclose(state["stats"]["mean"], mean, rtol=1e-5)
        assert int(state["step"]) == number + 1
    assert step._cache_size() == 1


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(skip, monkeypatch):
    """Then "skip" goes on, and "stop" holds the state until the host has noticed."""

    def losses(*given, **options):
        loss, terms = _toy_losses(*given, **options)
        batch = given[1]
        bad = jnp.any(batch["task"] == 99)
        return jnp.where(bad, jnp.nan, loss), terms

    monkeypatch.setattr(functional, "OneFormer", Toy)
    monkeypatch.setattr(states, "compute_losses", losses)
    init = states.make_init(None, OPTIMIZER, ema=True)
    step = jax.jit(
        states.make_train_step(
            None, None, OPTIMIZER, tiny.text_table(), ema_decay=0.9, skip_nonfinite=skip
        )
    )
    key, good = jax.random.key(0), tiny.batch(size=4)
    bad = good | {"task": np.full_like(good["task"], 99)}
    first, metrics = step(init(0), good, key)
    assert metrics["skipped_share"] == 0
    second, metrics = step(first, bad, key)
    assert metrics["skipped_share"] == 1 and not np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["param_norm"])
    third, metrics = step(second, good, key)
    for name in ("params", "stats", "opt", "ema"):
        before, after, later = (tiny.leaves(state[name]) for state in (first, second, third))
        for leaf, value in before.items():
            np.testing.assert_array_equal(after[leaf], value)
        if name != "opt":  # plain gradient descent has no state
            moved = [
                leaf for leaf, value in before.items() if not np.array_equal(later[leaf], value)
            ]
            assert bool(moved) is skip
    assert int(first["step"]) == 1
    assert [int(second["step"]), int(third["step"])] == ([2, 3] if skip else [1, 1])
    assert [bool(s["halted"]) for s in (first, second, third)] == [False, not skip, not skip]
    assert metrics["skipped_share"] == (0 if skip else 1)


def test_means_leave_skipped_steps_out():
    def line(loss, skipped):
        return {"loss": jnp.float32(loss), "skipped_share": jnp.float32(skipped)}

    lines = [line(1, 0), line(np.nan, 1), line(3, 0), line(2, 0)]
    assert states.mean_metrics(lines) == {"loss": 2.0, "skipped_share": 0.25}
    assert np.isnan(states.mean_metrics(lines[1:2])["loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_keeps_the_shapes_and_types_of_the_state(accumulate):
    """Else the second step would be compiled again."""
    optimizer = optim.make_optimizer(
        optim.OptimConfig(steps=9), functional.abstract(_config(), training=True).params
    )
    init = states.make_init(_config(), optimizer, ema=True)
    step = states.make_train_step(
        _config(), LOSSES, optimizer, tiny.text_table(), accumulate=accumulate, ema_decay=0.9
    )
    state = jax.eval_shape(lambda: init(None))
    new, metrics = jax.eval_shape(step, state, tiny.batch(size=4), jax.random.key(0))
    before, after = tiny.leaves(state), tiny.leaves(new)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert (after[name].shape, after[name].dtype) == (leaf.shape, leaf.dtype), name
        assert after[name].weak_type == leaf.weak_type, name
    assert {"loss", "loss_ce", "loss_dice_2", "loss_contrastive", "grad_norm"} <= metrics.keys()
    assert all(value.shape == () for value in metrics.values())


def _shapes(jaxpr):
    """Shapes of all values in a jaxpr and in the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            if hasattr(var, "aval") and hasattr(var.aval, "shape"):
                yield tuple(var.aval.shape)
        for inner in jaxprs_in_params(eqn.params):
            yield from _shapes(inner)


@pytest.mark.parametrize("point_sampling", ["per_mask", "shared"])
def test_the_training_step_holds_no_stack_of_masks(point_sampling):
    """Neither [targets, H, W] nor [B, Q, H/4, W/4], forward or backward."""
    queries, slots, side = 23, 19, 128  # sizes that nothing else has
    # Two heads: with more, attention weights at 1/8 would be as large as masks at 1/4.
    config = _config(num_queries=queries, num_heads=2)
    losses = LossConfig(num_points=40, point_sampling=point_sampling)
    on_device = Execution(kernels=Kernels(assignment="xla"))
    batch = tiny.batch(size=2, side=side, slots=slots)
    batch["text_ids"] = np.zeros((2, config.num_texts), np.int32)
    step = states.make_train_step(config, losses, OPTIMIZER, tiny.text_table(), execution=on_device)
    init = states.make_init(config, OPTIMIZER, ema=False)
    state = jax.eval_shape(lambda: init(None))
    shapes = set(_shapes(jax.make_jaxpr(step)(state, batch, jax.random.key(0)).jaxpr))
    assert (2, side, side) in shapes  # the id map itself
    assert (2, queries, side // 8 * (side // 8)) in shapes  # masks of the attention, at 1/8
    h = side // 4
    for shape in shapes:
        size = int(np.prod(shape))
        assert size < 2 * queries * h * h or queries not in shape, shape
        assert size < slots * side * side or slots not in shape, shape
    full = {(side, side), (h, h), (side * side,), (h * h,)}
    for shape in shapes:
        tails = {shape[-2:], shape[-1:], shape[-3:-1], shape[-2:-1]}
        if tails & full:
            assert not {queries, slots} & set(shape), shape


def test_loss_config_reads_every_key():
    from oneformer_jax.configs import common

    config = common.get_base()
    config.loss.num_points = 99
    config.matcher.class_cost = 7.0
    found = settings.loss_config(config)
    assert found == dataclasses.replace(
        LossConfig(),
        num_points=99,
        point_sampling=config.loss.point_sampling,
        matcher=MatcherConfig(class_cost=7.0),
    )


def test_base_config_is_the_published_coco_resnet50():
    from oneformer_jax.configs import common
    from oneformer_jax.models.oneformer import OneFormerConfig

    assert settings.model_config(common.get_base(), 133) == OneFormerConfig.published(
        "coco:resnet50"
    )


def test_a_frozen_backbone_stays_as_it_is_and_costs_no_backward_pass(monkeypatch):
    """Its statistics stay, too, and no path is dropped; the rest moves."""

    def losses(predictions, batch, key, config, **options):
        loss = jnp.mean(jnp.sin(predictions.mask_features)) + jnp.mean(predictions.class_logits**2)
        return loss, {}

    monkeypatch.setattr(states, "compute_losses", losses)
    config, batch, key = _config(query_loss="none"), tiny.batch(side=32), jax.random.key(0)
    _, params, stats = tiny.random_model(config, training=True)
    rates = optim.OptimConfig(steps=10, lr=1e-3, freeze=("backbone",))
    optimizer = optim.make_optimizer(rates, params)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "halted": jnp.zeros((), jnp.bool_),
        "params": params,
        "stats": stats,
        "opt": optimizer.init(params),
    }

    def make(frozen):
        return states.make_train_step(config, LOSSES, optimizer, tiny.text_table(), frozen=frozen)

    frozen = optim.frozen(rates, params)
    costs = [
        count_flops(jax.make_jaxpr(make(still))(state, batch, key).jaxpr)
        for still in (None, frozen)
    ]
    assert costs[1] < 0.8 * costs[0]
    step = jax.jit(make(frozen), compiler_options={"xla_backend_optimization_level": 0})
    new, metrics = step(state, batch, key)
    assert float(metrics["grad_norm"]) > 0
    for name, before in tiny.leaves(params).items():
        same = np.array_equal(before, tiny.leaves(new["params"])[name])
        assert same or not name.startswith("backbone/"), name
    assert not np.array_equal(
        params["pixel_decoder"]["mask_features"]["kernel"],
        new["params"]["pixel_decoder"]["mask_features"]["kernel"],
    )
    jax.tree.map(np.testing.assert_array_equal, stats, new["stats"])
