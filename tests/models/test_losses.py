"""The losses against a NumPy reference in float64 on explicit masks and explicit mask logits."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from oneformer_jax.models import losses
from oneformer_jax.models.execution import Kernels
from oneformer_jax.models.losses import LossConfig, compute_losses
from oneformer_jax.models.points import Purpose, draw_points
from oneformer_jax.types import Predictions

N, B, Q, K, D, M = 2, 8, 7, 4, 6, 5
MAP_SIZE, IMAGE_SIZE = (6, 5), (24, 20)
MODES = ("per_mask", "shared")
# Compiling takes longer than running here.
COMPILE_FAST = {"xla_backend_optimization_level": 0}
# Query classes, which only an ablation has, are tested with it.
FIELDS = [f.name for f in dataclasses.fields(Predictions) if f.name != "query_class_logits"]


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """The five slots of these tests need two chunks, the second of them filled up."""
    monkeypatch.setattr(losses, "SLOTS_AT_A_TIME", 3)


def _config(mode: str, **changes) -> LossConfig:
    groups = 1 if mode == "per_mask" else 2
    base = LossConfig(num_points=18, point_sampling=mode, replica_groups=groups)
    return dataclasses.replace(base, **changes)


def _inputs(seed: int = 0) -> tuple[Predictions, dict]:
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    predictions = Predictions(
        class_logits=normal(N, B, Q, K + 1),
        mask_embed=normal(N, B, Q, D),
        mask_features=normal(B, *MAP_SIZE, D),
        queries=normal(B, Q, D),
        text_queries=normal(B, Q, D),
        logit_scale=jnp.float32(np.log(1 / 0.07)),
    )
    height, width = IMAGE_SIZE
    blocks = rng.integers(0, M + 1, (B, height // 4, width // 4))
    segment_map = np.kron(blocks, np.ones((4, 4))).astype(np.uint8)
    valid = np.array([[(segment_map[b] == m + 1).any() for m in range(M)] for b in range(B)])
    valid[-1] = False
    valid[0, 2] = False
    for b, m in zip(*np.nonzero(~valid), strict=True):
        segment_map[b][segment_map[b] == m + 1] = 0
    return predictions, dict(
        segment_map=jnp.asarray(segment_map),
        classes=jnp.asarray(np.where(valid, rng.integers(0, K, (B, M)), 0), jnp.int32),
        valid=jnp.asarray(valid),
    )


@functools.cache
def _program(mode: str):
    """Loss, terms and gradient of one configuration, compiled once for all tests."""

    def loss(predictions, targets, key):
        return compute_losses(predictions, targets, key, _config(mode))

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=COMPILE_FAST)


# --- the reference ----------------------------------------------------------------------------


def _bilinear(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """image [H, W] at where [P, 2]: the sum over all pixels of value times hat functions."""
    height, width = image.shape
    x, y = where[:, :1] * width - 0.5, where[:, 1:] * height - 0.5
    columns = np.maximum(1 - np.abs(x - np.arange(width)), 0)
    rows = np.maximum(1 - np.abs(y - np.arange(height)), 0)
    return np.einsum("ph,hw,pw->p", rows, image.astype(np.float64), columns)


def _softplus(x):
    return np.logaddexp(0, x)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _dice(x, t):
    return 1 - (2 * (_sigmoid(x) * t).sum() + 1) / (_sigmoid(x).sum() + t.sum() + 1)


def _entropy(x, t):
    return np.mean(t * _softplus(-x) + (1 - t) * _softplus(x))


def _logit_map(arrays, n, b, q):
    return np.einsum("d,hwd->hw", arrays["mask_embed"][n, b, q], arrays["mask_features"][b])


def _to_numpy(predictions, targets):
    arrays = {name: np.asarray(getattr(predictions, name), np.float64) for name in FIELDS}
    return arrays, {name: np.asarray(value) for name, value in targets.items()}


def _choose(arrays, targets, key, config):
    """Matched (slot, query) pairs and their loss points: {(n, b): [(m, q, points [P, 2])]}."""
    shared = config.point_sampling == "shared"

    @functools.cache
    def draw(purpose, n, slot, count):
        n, slot = (0, 0) if shared else (n, slot)
        batch = len(targets["valid"])
        return np.asarray(draw_points(key, purpose, n, slot, batch, count), np.float64)

    choice = {}
    for n, b in np.ndindex(arrays["class_logits"].shape[:2]):
        slots = np.flatnonzero(targets["valid"][b])
        where = draw(Purpose.MATCHING, n, 0, config.num_points)[b]
        cost = np.zeros((Q, len(slots)))
        for q, (i, m) in ((q, pair) for q in range(Q) for pair in enumerate(slots)):
            exponentials = np.exp(arrays["class_logits"][n, b, q])
            probability = exponentials[targets["classes"][b, m]] / exponentials.sum()
            x = _bilinear(_logit_map(arrays, n, b, q), where)
            t = _bilinear(targets["segment_map"][b] == m + 1, where)
            cost[q, i] = 5 * _entropy(x, t) - 2 * probability + 5 * _dice(x, t)
        choice[n, b] = []
        for q, i in zip(*linear_sum_assignment(cost), strict=True):
            m = slots[i]
            candidates = draw(Purpose.CANDIDATES, n, m, config.num_candidates)[b]
            uncertainty = np.abs(_bilinear(_logit_map(arrays, n, b, q), candidates))
            uncertain = candidates[np.argsort(uncertainty)[: config.num_uncertain]]
            fresh = draw(Purpose.FRESH, n, m, config.num_fresh)[b]
            choice[n, b].append((m, q, np.concatenate([uncertain, fresh])))
    return choice


def _log_softmax(x):
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def _reference(arrays, targets, choice, config):
    """The weighted terms for a given matching and given points."""
    batch, groups = len(targets["valid"]), config.replica_groups
    num_masks = max(targets["valid"].sum(), groups)
    terms = {}
    for n in range(N):
        mask = dice = 0.0
        labels = np.full((batch, Q), K)
        for b in range(batch):
            for m, q, where in choice[n, b]:
                labels[b, q] = targets["classes"][b, m]
                x = _bilinear(_logit_map(arrays, n, b, q), where)
                t = _bilinear(targets["segment_map"][b] == m + 1, where)
                mask += _entropy(x, t)
                dice += _dice(x, t)
        log_p = _log_softmax(arrays["class_logits"][n])
        entropy = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        weight = np.where(labels == K, 0.1, 1.0)
        means = [
            (entropy[part] * weight[part]).sum() / weight[part].sum()
            for part in np.split(np.arange(batch), groups)
        ]
        suffix = "" if n == N - 1 else f"_{n}"
        terms["loss_ce" + suffix] = 2 * np.mean(means)
        terms["loss_mask" + suffix] = 5 * mask / num_masks
        terms["loss_dice" + suffix] = 5 * dice / num_masks
    v, t = (
        x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in (arrays["queries"].reshape(batch, -1), arrays["text_queries"].reshape(batch, -1))
    )
    similarity = min(np.exp(arrays["logit_scale"]), 100) * v @ t.T
    image, text = _log_softmax(similarity), _log_softmax(similarity.T)
    terms["loss_contrastive"] = -0.5 * (np.diag(image).mean() + np.diag(text).mean())
    return terms


# --- value and gradient -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_terms_and_gradients_equal_the_reference(mode):
    config, key = _config(mode), jax.random.key(3)
    predictions, targets = _inputs()
    (total, terms), gradient = _program(mode)(predictions, targets, key)

    arrays, plain = _to_numpy(predictions, targets)
    choice = _choose(arrays, plain, key, config)
    expected = _reference(arrays, plain, choice, config)
    assert set(terms) == {*expected, "matcher_nonfinite"}
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(total, sum(expected.values()), rtol=2e-5)
    assert terms["matcher_nonfinite"] == 0

    # Central differences in float64 along a random direction, matching and points held fixed.
    rng = np.random.default_rng(1)
    for name in FIELDS:
        direction = rng.normal(size=arrays[name].shape)
        ends = [
            sum(
                _reference(
                    {**arrays, name: arrays[name] + e * direction}, plain, choice, config
                ).values()
            )
            for e in (1e-5, -1e-5)
        ]
        found = (np.asarray(getattr(gradient, name), np.float64) * direction).sum()
        np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_masks", [0, 1])
def test_few_targets(mode, num_masks):
    """No target: mask losses are 0. Fewer targets than groups: the sum is divided by the groups."""
    config, key = _config(mode), jax.random.key(4)
    predictions, targets = _inputs()
    valid = np.zeros((B, M), bool)
    valid[1, :num_masks] = True
    targets["valid"] = jnp.asarray(valid)
    (_, terms), gradient = _program(mode)(predictions, targets, key)
    arrays, plain = _to_numpy(predictions, targets)
    expected = _reference(arrays, plain, _choose(arrays, plain, key, config), config)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)
    assert (terms["loss_mask"] == 0) == (num_masks == 0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_both_samplings_estimate_the_same_losses():
    predictions, targets = _inputs()
    samples = {}
    for mode in MODES:
        runs = [_program(mode)(predictions, targets, jax.random.key(s))[0][1] for s in range(40)]
        samples[mode] = {
            name: np.array([run[name] for run in runs])
            for name in ("loss_mask", "loss_dice", "loss_mask_0", "loss_dice_0")
        }
    for name, a in samples["per_mask"].items():
        b = samples["shared"][name]
        error = np.sqrt((a.var() + b.var()) / len(a))
        assert 0 < error < 0.05 * a.mean()
        assert abs(a.mean() - b.mean()) < 4 * error, name


def test_costs_that_are_not_finite_are_counted():
    predictions, targets = _inputs()
    broken = predictions.mask_embed.at[0, 0, 3].set(jnp.nan)
    (_, terms), _ = _program("shared")(
        dataclasses.replace(predictions, mask_embed=broken), targets, jax.random.key(0)
    )
    assert terms["matcher_nonfinite"] == np.asarray(targets["valid"])[0].sum() > 0
    assert np.isfinite(terms["loss_mask"])


# --- shapes and devices -----------------------------------------------------------------------


def _equations(jaxpr):
    """All equations of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _holds_map(shape, count, size):
    """Tells if an array of `shape` holds a value per each of `count` things and pixel of a map."""
    height, width = size
    rest = list(shape)
    for wanted in ([count, height, width], [count, height * width]):
        if all(rest.count(x) >= wanted.count(x) for x in wanted):
            return True
    return False


@pytest.mark.parametrize("mode", MODES)
def test_no_array_holds_all_masks_or_all_mask_logits(mode):
    queries, slots, image, small = 23, 17, (52, 44), (13, 11)
    array = jax.ShapeDtypeStruct
    predictions = Predictions(
        class_logits=array((4, 2, queries, 6), jnp.float32),
        mask_embed=array((4, 2, queries, 7), jnp.float32),
        mask_features=array((2, *small, 7), jnp.bfloat16),
        queries=array((2, queries, 7), jnp.float32),
        text_queries=array((2, queries, 7), jnp.float32),
        logit_scale=array((), jnp.float32),
    )
    targets = dict(
        segment_map=array((2, *image), jnp.uint8),
        classes=array((2, slots), jnp.int32),
        valid=array((2, slots), jnp.bool_),
    )
    config = LossConfig(num_points=29, point_sampling=mode)

    def equations_of(loss):
        program = jax.value_and_grad(loss, has_aux=True)
        jaxpr = jax.make_jaxpr(program)(predictions, targets, jax.random.key(0))
        return list(_equations(jaxpr.jaxpr))

    def shapes_of(equations):
        return {v.aval.shape for e in equations for v in e.outvars}

    equations = equations_of(lambda p, t, k: compute_losses(p, t, k, config))
    shapes = shapes_of(equations)
    assert len(shapes) > 50
    for size in (image, small):
        for count in (queries, slots):
            assert not [s for s in shapes if _holds_map(s, count, size)]
    # The walk sees what it looks for: maps of a few slots where they are meant to be ...
    assert any(_holds_map(s, losses.SLOTS_AT_A_TIME, small) for s in shapes) == (mode == "per_mask")

    # ... and the maps of all queries in a program that does form them.
    def wasteful(p, t, k):
        maps = jax.lax.map(lambda e: jnp.einsum("bqd,bhwd->bqhw", e, p.mask_features), p.mask_embed)
        return maps.sum(), None

    assert any(_holds_map(s, queries, small) for s in shapes_of(equations_of(wasteful)))

    # The backward pass keeps the choice of points instead of making it again.
    made = [
        e
        for e in equations
        if e.primitive.name == "top_k"
        or (e.primitive.name == "bitcast_convert_type" and e.params["new_dtype"] == jnp.int32)
    ]
    assert len(made) == 1


@pytest.mark.parametrize("mode", MODES)
def test_eight_devices_compute_the_same_loss(mode):
    assert len(jax.devices()) >= 8
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    predictions, targets = _inputs()
    # The single device solves the matching on the host: all solvers must give one loss.
    kernels = Kernels(assignment={"per_mask": "scipy", "shared": "xla"}[mode])
    config, key = _config(mode), jax.random.key(5)

    def place(path, x):
        axes = ("data", "fsdp")
        name = str(path[-1])
        spec = (None, axes) if "class_logits" in name or "mask_embed" in name else (axes,)
        spec = jax.sharding.PartitionSpec(*spec) if x.ndim else jax.sharding.PartitionSpec()
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(place, (predictions, targets))
    program = jax.jit(lambda p, t: compute_losses(p, t, key, config, kernels=kernels, mesh=mesh))
    program = program.lower(*placed).compile(COMPILE_FAST)
    total, terms = program(*placed)
    (expected, expected_terms), _ = _program(mode)(predictions, targets, key)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for name, value in expected_terms.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    # Only the contrast needs other devices' images: B x Q x D numbers, fewer than the candidates.
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program.as_text())
    sizes = [np.prod([int(x) for x in shape.split(",")]) for shape in gathered]
    assert sizes and max(sizes) <= B * Q * D < B * config.num_candidates


# --- the contrastive loss and the configuration -----------------------------------------------


_contrast = jax.jit(jax.value_and_grad(losses.contrastive_loss, (0, 1, 2)))


def test_contrast_of_one_image_is_zero():
    x = np.ones((1, 3, 2), np.float32)
    value, gradients = _contrast(x, x, np.float32(2.0))
    assert value == 0
    assert not any(np.asarray(g).any() for g in gradients)


def test_contrastive_scale_is_limited():
    x = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
    y = x[::-1].copy()
    limit, below = (_contrast(x, y, np.float32(np.log(s)))[0] for s in (100.0, 90.0))
    assert abs(limit - below) > 1
    for scale in (np.log(100.0) + 1, 1000.0):
        value, (*_, gradient) = _contrast(x, y, np.float32(scale))
        np.testing.assert_allclose(value, limit, rtol=1e-4)
        assert gradient == 0


def test_contrast_of_zero_queries_has_a_finite_gradient():
    x = np.zeros((2, 3, 2), np.float32)
    _, gradients = _contrast(x, x, np.float32(1.0))
    assert all(np.isfinite(g).all() for g in gradients)


def test_without_text_there_is_no_contrastive_term():
    predictions, targets = _inputs()
    predictions = dataclasses.replace(predictions, text_queries=None, logit_scale=None)
    _, terms = jax.eval_shape(
        lambda p, t: compute_losses(p, t, jax.random.key(0), _config("shared")),
        predictions,
        targets,
    )
    assert "loss_contrastive" not in terms and "loss_dice_0" in terms


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(point_sampling="all"),
            r"loss\.point_sampling is 'all'; it must be one of per_mask",
        ),
        (dict(num_points=0), r"loss\.num_points is 0"),
        (dict(oversample_ratio=0.5), r"loss\.oversample_ratio is 0.5"),
        (dict(importance_ratio=1.5), r"loss\.importance_ratio is 1.5"),
        (dict(replica_groups=0), r"loss\.replica_groups is 0"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes)


def test_the_kernel_of_points_is_named_and_never_replaced():
    given = (*_inputs(), jax.random.key(0), _config("shared"))
    with pytest.raises(NotImplementedError, match="sample_features: 'pallas_tpu' runs on TPUs"):
        compute_losses(*given, kernels=Kernels(points="pallas_tpu"))


def test_inputs_that_do_not_fit_are_refused():
    predictions, targets = _inputs()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"loss\.replica_groups is 3, which does not divide"):
        compute_losses(predictions, targets, key, LossConfig(replica_groups=3))
    with pytest.raises(ValueError, match="segment_map has dtype int32; it must be uint8"):
        wide = {**targets, "segment_map": targets["segment_map"].astype(jnp.int32)}
        compute_losses(predictions, wide, key, LossConfig())
    with pytest.raises(ValueError, match="classes holds 3 images, the predictions 8"):
        compute_losses(
            predictions, {**targets, "classes": targets["classes"][:3]}, key, LossConfig()
        )
