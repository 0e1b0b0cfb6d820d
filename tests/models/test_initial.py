"""Initial parameters: their distributions, and that they depend on the seed and the order alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.models import functional, initial
from tests import tiny

SHAPE = (3, 3, 40, 60)  # [..., in, out]: fans of 360 and 540


def draw(seed=0, count=0):
    return initial.Draw(seed, count)


def test_a_parameter_has_the_same_numbers_every_time_and_others_have_others():
    first = draw(3, 5).normal((100,))
    assert np.array_equal(first, draw(3, 5).normal((100,)))
    for other in (draw(3, 6), draw(4, 5), draw(5, 3)):
        assert np.abs(np.corrcoef(first, other.normal((100,)))[0, 1]) < 0.4
    keys = initial.ParamKeys(7)
    assert [keys.params() for _ in range(3)] == [initial.Draw(7, n) for n in range(3)]


@pytest.mark.parametrize(
    ("init", "deviation", "largest"),
    [
        (initial.normal(0.02), 0.02, None),
        (initial.uniform(0.3), 0.3 / 3**0.5, 0.3),
        (initial.xavier, (2 / 900) ** 0.5, (6 / 900) ** 0.5),
        (initial.packed_xavier, (1 / 900) ** 0.5, (3 / 900) ** 0.5),
        (initial.c2_xavier, (1 / 360) ** 0.5, (3 / 360) ** 0.5),
        (initial.torch_kernel, (1 / 1080) ** 0.5, 360**-0.5),
        (initial.variance_scaling(2.0, "fan_out", "normal"), (2 / 540) ** 0.5, None),
    ],
)
def test_the_distributions(init, deviation, largest):
    numbers = init(draw(), SHAPE, jnp.float32)
    assert numbers.shape == SHAPE and numbers.dtype == np.float32
    assert abs(numbers.mean()) < 4 * deviation / numbers.size**0.5
    assert numbers.std() == pytest.approx(deviation, rel=0.02)
    if largest is None:  # normal: fourth moment 3
        assert ((numbers / deviation) ** 4).mean() == pytest.approx(3, rel=0.1)
    else:
        assert np.abs(numbers).max() == pytest.approx(largest, rel=0.001)
        assert np.abs(numbers).max() <= largest


@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_variances_are_those_of_flax(mode, distribution):
    ours = initial.variance_scaling(1.7, mode, distribution)(draw(), SHAPE, jnp.float32)
    theirs = nnx.initializers.variance_scaling(1.7, mode, distribution)(jax.random.key(0), SHAPE)
    assert ours.std() == pytest.approx(float(theirs.std()), rel=0.03)


def test_constants():
    assert np.array_equal(initial.zeros(draw(), (2,), jnp.float32), [0, 0])
    assert np.array_equal(initial.constant(1.0)(draw(), (2,), jnp.bfloat16), [1, 1])


def test_without_a_seed_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(initial.Draw, "_generator", None)
    abstract = functional.abstract(tiny.model_config(), training=True)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract.params))


def test_a_model_depends_on_its_seed_alone():
    config = tiny.model_config()
    first, again, other = (functional.init(config, s, training=True) for s in (0, 0, 1))
    abstract = functional.abstract(config, training=True)
    same, differs = 0, 0
    for name, leaf in tiny.leaves(first.params).items():
        expected = tiny.leaves(abstract.params)[name]
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype), name
        assert np.array_equal(leaf, tiny.leaves(again.params)[name]), name
        equal = np.array_equal(leaf, tiny.leaves(other.params)[name])
        assert not equal or np.ptp(leaf) == 0 or name.endswith("sampling_offsets/bias"), name
        same, differs = same + equal, differs + (not equal)
    assert same > 20 and differs > 20


def test_prediction_starts_from_the_numbers_of_training():
    """The text branch comes last, so that a model without it has the same other parameters."""
    config = tiny.model_config()
    with_text = functional.inference_params(functional.init(config, 0, training=True).params)
    without = functional.init(config, 0, training=False).params
    for name, leaf in tiny.leaves(without).items():
        assert np.array_equal(leaf, tiny.leaves(with_text)[name]), name
