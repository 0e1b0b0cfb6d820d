"""Steps on one device and on meshes of eight: the same losses and gradients up to rounding.

From one state a step gives the same on every mesh. Left to run, meshes drift apart, as does any run
whose numbers are rounded in another way: Adam turns a gradient that is nothing but rounding into a
whole step, and near ties in matching or among uncertain points fall to either side. So that drift
is compared with that of one device whose parameters were changed in their last bit.
"""

import functools

import jax
import numpy as np
import optax
import pytest

from oneformer_jax.train import sharding
from oneformer_jax.train import state as states
from tests import tiny
from tests.train.runs import make_config

pytestmark = pytest.mark.slow

STEPS = 3
# Relative to a loss; to the largest entry of a parameter's gradient, which kinks of ReLU and the
# sampling move more; to the largest entry of all, for gradients that are zero but for rounding (of
# a bias before a normalisation, or of attention keys).
LOSS, GRADIENT, ZERO = 5e-6, 5e-4, 1e-7


class Runner:
    """Training steps on a mesh, from and to states on the host; small parameters are split too."""

    def __init__(self, config, mesh):
        with pytest.MonkeyPatch.context() as patch:
            shard = functools.partial(sharding.state_shardings, min_size=64)
            patch.setattr(sharding, "state_shardings", shard)
            self.training = states.make_training(config, tiny.CLASSES, tiny.text_table(), mesh)
        self._mesh, self._key = mesh, sharding.put_key(jax.random.key(2), mesh)

    def init(self):
        return jax.device_get(self.training.init(1))

    def step(self, state):
        """(next state, metrics); each step has a batch of its own."""
        batch = tiny.batch(seed=int(state["step"]), size=8)
        found = self.training.step(
            jax.device_put(state, self.training.shardings),
            sharding.put_batch(batch, self._mesh),
            self._key,
        )
        return jax.device_get(found)

    def run(self, state):
        """The losses of the steps from `state` on."""
        losses = []
        for _ in range(STEPS):
            state, metrics = self.step(state)
            losses.append(metrics["loss"])
        return np.array(losses)


@functools.cache
def alone(sampling):
    """Runner on one device, its states from the initial one on, and the metrics of each step."""
    config = make_config(loss__point_sampling=sampling)
    runner = Runner(config, sharding.make_mesh(devices=jax.devices()[:1]))
    trace, metrics = [runner.init()], []
    for _ in range(STEPS):
        state, found = runner.step(trace[-1])
        trace.append(state)
        metrics.append(found)
    return config, runner, trace, metrics


def gradients(before, after, b1=0.9):
    """Reads the gradients of a step from Adam's first moments."""
    old, new = (tiny.leaves(optax.tree.get(state["opt"], "mu")) for state in (before, after))
    return {name: (new[name] - b1 * old[name]) / (1 - b1) for name in new}


@functools.cache
def drift_alone(sampling):
    """The largest change of each loss where every parameter is moved to the next float32."""
    _, runner, trace, metrics = alone(sampling)
    rng, changes = np.random.default_rng(0), []
    for _ in range(3):
        params = jax.tree.map(
            lambda x: np.nextafter(x, rng.choice(np.float32([-np.inf, np.inf]), x.shape)),
            trace[0]["params"],
        )
        losses = runner.run({**trace[0], "params": params})
        changes.append(np.abs(losses / [m["loss"] for m in metrics] - 1))
    return np.max(changes, axis=0)


@pytest.mark.parametrize(
    ("sampling", "data", "fsdp"),
    [("shared", 8, 1), ("shared", 4, 2), ("shared", 1, 8), ("per_mask", 4, 2)],
)
def test_all_meshes_give_the_same(sampling, data, fsdp):
    config, _, trace, metrics = alone(sampling)
    runner = Runner(config, sharding.make_mesh(data, fsdp))
    for name, value in tiny.leaves(runner.init()).items():
        np.testing.assert_array_equal(value, tiny.leaves(trace[0])[name], err_msg=name)
    for before, after, expected in zip(trace, trace[1:], metrics, strict=False):
        state, found = runner.step(before)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            rel = GRADIENT if name == "grad_norm" else LOSS
            assert found[name] == pytest.approx(value, rel=rel, abs=1e-6), name
        wanted, actual = gradients(before, after), gradients(before, state)
        largest = max(np.abs(value).max() for value in wanted.values())
        for name, value in wanted.items():
            atol = GRADIENT * np.abs(value).max() + ZERO * largest
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=atol, err_msg=name)
    drift = np.abs(runner.run(trace[0]) / [m["loss"] for m in metrics] - 1)
    limit = 10 * np.maximum.accumulate(np.maximum(drift_alone(sampling), 1e-6))
    assert (drift < limit).all(), (drift, limit)
