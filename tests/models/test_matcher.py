"""The matching cost against its formula, both ways to solve the assignment against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from oneformer_jax.kernels.assignment import api, xla
from oneformer_jax.models import matcher
from oneformer_jax.models.matcher import MatcherConfig, match

ASSIGNMENTS = ("scipy", "xla")


def _case(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A named problem set: cost float32 [N, B, Q, M] and valid bool [B, M]."""
    rng = np.random.default_rng(sum(map(ord, name)))
    slots = 11 if name.startswith("more slots") else 6
    cost = rng.normal(size=(3, 4, 8, slots)).astype(np.float32) * 5
    valid = rng.random((4, slots)) < 0.6
    if name.endswith("all valid"):
        valid[:] = True
    elif name == "none valid":
        valid[:] = False
    elif name == "more slots, one image full":
        valid[:2] = True
        valid[2] = [True] * 8 + [False] * 3
    elif name == "ties":
        cost = rng.integers(0, 3, cost.shape).astype(np.float32)
    elif name == "constant":
        cost[:] = 1.5
    elif name == "large":
        cost[0, 0, :, 0] = 9e4
    elif name == "nan":
        cost[rng.random(cost.shape) < 0.3] = np.nan
        cost[1, 1] = np.nan
    elif name == "infinite":
        cost[rng.random(cost.shape) < 0.3] = np.inf
        cost[rng.random(cost.shape) < 0.2] = -np.inf
        cost[2, 0] = np.inf
    return cost, valid


CASES = (
    "plain",
    "all valid",
    "none valid",
    "ties",
    "constant",
    "large",
    "nan",
    "infinite",
    "more slots",
    "more slots, all valid",
    "more slots, one image full",
)


_match = jax.jit(match, static_argnames="assignment")


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("name", CASES)
def test_assignment_costs_what_scipys_does(name, assignment):
    cost, valid = _case(name)
    # One compilation per solver and shape; a raising callback would fail here.
    indices, matched, nonfinite = map(np.asarray, _match(cost, valid, assignment=assignment))
    assert indices.dtype == np.int32 and matched.dtype == bool
    assert nonfinite == (~np.isfinite(cost) & valid[:, None, :]).sum()
    repaired = np.clip(np.where(np.isnan(cost), 100.0, cost), -1e5, 1e5).astype(np.float64)
    for n, b in np.ndindex(cost.shape[:2]):
        problem = repaired[n, b][:, valid[b]]
        expected = problem[linear_sum_assignment(problem)].sum()
        slots = np.flatnonzero(matched[n, b])
        queries = indices[n, b, slots]
        assert valid[b, slots].all()
        assert len(slots) == min(valid[b].sum(), cost.shape[2])
        assert len(set(queries)) == len(queries)
        assert not indices[n, b][~matched[n, b]].any()
        np.testing.assert_allclose(repaired[n, b, queries, slots].sum(), expected, rtol=1e-6)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_large_random_problems(assignment):
    rng = np.random.default_rng(7)
    cost = rng.random((2, 2, 60, 40)).astype(np.float32)
    valid = rng.random((2, 40)) < 0.9
    indices, matched, _ = map(np.asarray, _match(cost, valid, assignment=assignment))
    for n, b in np.ndindex(2, 2):
        problem = cost[n, b][:, valid[b]].astype(np.float64)
        slots = np.flatnonzero(matched[n, b])
        found = cost[n, b, indices[n, b, slots], slots].astype(np.float64).sum()
        np.testing.assert_allclose(found, problem[linear_sum_assignment(problem)].sum(), rtol=1e-5)


def _mesh(shape):
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_every_shard_solves_its_own_images(assignment, monkeypatch):
    rng = np.random.default_rng(8)
    cost = rng.normal(size=(2, 8, 6, 4)).astype(np.float32)
    valid = rng.random((8, 4)) < 0.8
    shapes = []
    solve = matcher._solve_with_scipy

    def spy(cost, valid):
        shapes.append(cost.shape)
        return solve(cost, valid)

    monkeypatch.setattr(matcher, "_solve_with_scipy", spy)
    mesh = _mesh((4, 2))
    axes = jax.sharding.PartitionSpec(None, ("data", "fsdp"))
    sharded = jax.device_put(cost, jax.sharding.NamedSharding(mesh, axes))
    program = jax.jit(lambda c, v: match(c, v, assignment=assignment, mesh=mesh))
    indices, matched, _ = jax.block_until_ready(program(sharded, valid))
    # One call per shard with all its problems; none at all if the device solves.
    assert shapes == ([(2, 1, 6, 4)] * 8 if assignment == "scipy" else [])
    monkeypatch.undo()
    alone = _match(cost, valid, assignment="scipy")
    np.testing.assert_array_equal(matched, alone[1])
    np.testing.assert_array_equal(indices, alone[0])


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="batch of 6 images cannot be split over 8 devices"):
        match(jnp.zeros((1, 6, 3, 2)), jnp.ones((6, 2), bool), mesh=_mesh((8, 1)))


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"kernels\.assignment is 'gpu'; it must be one of scipy"):
        match(jnp.zeros((1, 6, 3, 2)), jnp.ones((6, 2), bool), assignment="gpu")


def test_a_kernel_is_named_and_never_replaced(monkeypatch):
    cost = np.random.default_rng(10).normal(size=(2, 8, 6, 4)).astype(np.float32)
    valid = np.ones((8, 4), bool)
    shapes = []

    def recording(implementation):
        assert implementation == "pallas_tpu"

        def assign(cost, *rest):
            shapes.append(cost.shape)
            return xla.assign(cost, *rest)

        return assign

    monkeypatch.setattr(api, "load", recording)
    options = dict(assignment="pallas_tpu")
    indices, _, _ = jax.jit(lambda c, v: match(c, v, mesh=_mesh((4, 2)), **options))(cost, valid)
    # Each device solves the problems of its own image.
    assert shapes == [(2, 4, 6)]
    monkeypatch.undo()
    np.testing.assert_array_equal(indices, _match(cost, valid, assignment="scipy")[0])
    with pytest.raises(NotImplementedError, match="'pallas_tpu' runs on TPUs"):
        match(jnp.asarray(cost), jnp.asarray(valid), **options)


def test_cost_is_the_official_formula():
    rng = np.random.default_rng(9)
    batch, queries, slots, num_points, classes = 2, 5, 3, 20, 4
    class_logits = rng.normal(size=(batch, queries, classes + 1)).astype(np.float32)
    mask_logits = rng.normal(size=(batch, queries, num_points)).astype(np.float32) * 4
    labels = rng.integers(0, classes, (batch, slots)).astype(np.int32)
    targets = rng.random((batch, slots, num_points)).astype(np.float32)
    config = MatcherConfig(class_cost=2.0, mask_cost=5.0, dice_cost=3.0)
    found = jax.jit(matcher.matching_cost, static_argnums=4)(
        class_logits, mask_logits, labels, targets, config
    )
    for b, q, m in np.ndindex(batch, queries, slots):
        x, t = mask_logits[b, q].astype(np.float64), targets[b, m].astype(np.float64)
        exponentials = np.exp(class_logits[b, q].astype(np.float64))
        entropy = np.mean(t * np.log1p(np.exp(-x)) + (1 - t) * np.log1p(np.exp(x)))
        s = 1 / (1 + np.exp(-x))
        dice = 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)
        probability = exponentials[labels[b, m]] / exponentials.sum()
        expected = 5 * entropy - 2 * probability + 3 * dice
        np.testing.assert_allclose(found[b, q, m], expected, rtol=1e-5, atol=1e-5)
