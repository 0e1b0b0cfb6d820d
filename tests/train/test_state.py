"""The compiled training step: meshes, accumulation, averages, and what it must never hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oneformer_jax.models.losses import LossConfig
from oneformer_jax.models.matcher import MatcherConfig
from oneformer_jax.train import sharding
from oneformer_jax.train import state as states
from oneformer_jax.types import TASK_TOKENS
from tests import tiny

LOSSES = LossConfig(num_points=64, point_sampling="shared")
# Plain gradient descent: Adam would turn rounding of tiny gradients into steps of full size.
OPTIMIZER = optax.sgd(0.01)


def _config(**overrides):
    overrides = dict(encoder_dropout=0.0, query_init_dropout=0.0) | overrides
    return tiny.model_config(**overrides)


@pytest.fixture(scope="module")
def initial():
    init = states.make_init(_config(), OPTIMIZER, ema=False)
    return jax.device_get(jax.jit(init)(jax.random.key(0)))


def _steps(mesh, initial, batch, *, count=2, losses=LOSSES, **options):
    step = states.make_train_step(
        _config(), losses, OPTIMIZER, tiny.text_table(), mesh=mesh, **options
    )
    shardings = sharding.state_shardings(initial, mesh, min_size=64)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    state = jax.device_put(initial, shardings)
    history = []
    for _ in range(count):
        state, metrics = step(state, sharding.put_batch(batch, mesh), jax.random.key(1))
        history.append(jax.device_get(metrics))
    assert step._cache_size() == 1, "the training step was compiled again"
    return jax.device_get(state), history


@pytest.fixture(scope="module")
def one_device(initial):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return _steps(mesh, initial, tiny.batch(size=8))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_losses_and_parameters_do_not_depend_on_the_mesh(shape, initial, one_device):
    state, history = _steps(sharding.make_mesh(*shape), initial, tiny.batch(size=8))
    for found, expected in zip(history, one_device[1], strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    for name, value in tiny.leaves(one_device[0]["params"]).items():
        np.testing.assert_allclose(
            tiny.leaves(state["params"])[name], value, atol=2e-5, err_msg=name
        )


def test_the_step_is_counted_and_the_statistics_move(initial, one_device):
    assert int(one_device[0]["step"]) == 2
    before, after = tiny.leaves(initial["stats"]), tiny.leaves(one_device[0]["stats"])
    assert before.keys() == after.keys()
    assert len(before) > 0
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_accumulated_gradients_are_the_mean_of_the_micro_batches(initial):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = tiny.batch(size=4)
    state, history = _steps(mesh, initial, batch, count=1, accumulate=2)
    parts = states.split_batch(batch, 2)
    # Micro-batch i draws its points with the i-th key: the parts are run by hand with the same.
    step = states.make_train_step(_config(), LOSSES, OPTIMIZER, tiny.text_table())
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), 0), 2)
    fold_in, losses, updates, stats = jax.random.fold_in, [], [], initial["stats"]
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[i], parts)
        with pytest.MonkeyPatch.context() as patch:
            # The outermost fold_in of a step is that of its number.
            patch.setattr(jax.random, "fold_in", lambda key, data, i=i: keys[i])
            patch.setattr(states, "compute_losses", _with_real_fold_in(patch, fold_in))
            new, metrics = step({**initial, "stats": stats}, part, jax.random.key(1))
        losses.append(float(metrics["loss"]))
        updates.append(tiny.leaves(jax.tree.map(jnp.subtract, new["params"], initial["params"])))
        stats = new["stats"]
    assert float(history[0]["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    found = tiny.leaves(jax.tree.map(jnp.subtract, state["params"], initial["params"]))
    for name, update in found.items():
        expected = (updates[0][name] + updates[1][name]) / 2
        np.testing.assert_allclose(update, expected, atol=2e-5, err_msg=name)


def _with_real_fold_in(patch, fold_in):
    original = states.compute_losses

    def compute(*args, **kwargs):
        patch.setattr(jax.random, "fold_in", fold_in)
        return original(*args, **kwargs)

    return compute


def test_averaged_parameters(initial):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    start = initial | {"ema": initial["params"]}
    state, _ = _steps(mesh, start, tiny.batch(size=2), count=1, ema_decay=0.9)
    before, after, ema = (
        tiny.leaves(x) for x in (initial["params"], state["params"], state["ema"])
    )
    for name, value in ema.items():
        expected = 0.9 * before[name] + 0.1 * after[name]
        np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=name)


def _shapes(jaxpr):
    """Shapes of all values in a jaxpr and in the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            if hasattr(var, "aval") and hasattr(var.aval, "shape"):
                yield tuple(var.aval.shape)
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from _shapes(inner)


@pytest.mark.parametrize("point_sampling", ["per_mask", "shared"])
def test_the_training_step_holds_no_stack_of_masks(point_sampling):
    """Neither [targets, H, W] nor [B, Q, H/4, W/4], forward or backward."""
    queries, slots, side = 23, 19, 128  # sizes that nothing else has
    config = _config(num_queries=queries)
    losses = LossConfig(
        num_points=40, point_sampling=point_sampling, matcher=MatcherConfig(backend="device")
    )
    batch = tiny.batch(size=2, side=side, slots=slots)
    batch["text_ids"] = np.zeros((2, config.num_texts), np.int32)
    step = states.make_train_step(config, losses, OPTIMIZER, tiny.text_table())
    init = states.make_init(config, OPTIMIZER, ema=False)
    state = jax.eval_shape(init, jax.random.key(0))
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


def test_prediction_leaves_the_text_branch_out(initial):
    predict = states.make_predict_step(_config())
    batch = tiny.batch()
    tokens = TASK_TOKENS[batch["task"]]
    predictions = jax.jit(predict)(
        initial["params"], initial["stats"], batch["image"], batch["image_size"], tokens
    )
    assert predictions.class_logits.shape == (4, 2, 7, 6)
    assert predictions.text_queries is None
    assert set(initial["params"]) - set(states.inference_params(initial["params"])) == set(
        states.TEXT_PARAMS
    )


def test_loss_config_reads_every_key():
    from configs import common

    config = common.get_base()
    config.loss.num_points = 99
    config.matcher.backend = "device"
    found = states.loss_config(config)
    assert found == dataclasses.replace(
        LossConfig(),
        num_points=99,
        point_sampling=config.loss.point_sampling,
        matcher=MatcherConfig(backend="device"),
    )


def test_base_config_is_the_published_coco_resnet50():
    from configs import common
    from oneformer_jax.models.oneformer import OneFormerConfig

    assert states.model_config(common.get_base(), 133) == OneFormerConfig.resnet50("coco")
