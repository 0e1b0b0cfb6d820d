"""Reading maps at points and choosing points, against explicit masks and sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.models import points
from oneformer_jax.models.points import Purpose


def bilinear(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """image [H, W, ...] at where [P, 2], zeros outside: by padding, unlike the code under test."""
    height, width = image.shape[:2]
    padded = np.pad(image.astype(np.float64), [(2, 2), (2, 2)] + [(0, 0)] * (image.ndim - 2))
    out = []
    for px, py in where.astype(np.float64):
        x = np.clip(px * width - 0.5, -2, width) + 2
        y = np.clip(py * height - 0.5, -2, height) + 2
        i, j = min(int(y), height + 2), min(int(x), width + 2)
        a, b = y - i, x - j
        top = (1 - b) * padded[i, j] + b * padded[i, j + 1]
        bottom = (1 - b) * padded[i + 1, j] + b * padded[i + 1, j + 1]
        out.append((1 - a) * top + a * bottom)
    return np.stack(out)


def some_points(rng, *shape):
    """Points inside, far outside, and on the borders of [0, 1]²."""
    where = rng.uniform(-0.4, 1.4, (*shape, 2)).astype(np.float32)
    where[..., :4, :] = [[0, 0], [1, 1], [0.5, 1.0], [-3, 7]]
    return where


def test_target_values_equal_those_of_explicit_masks():
    rng = np.random.default_rng(0)
    segment_map = rng.integers(0, 5, (2, 9, 7)).astype(np.uint8)
    segment_map[segment_map == 4] = 255
    slots = np.array([0, 254, 2, 200])
    where = some_points(rng, 2, len(slots), 40)
    read = jax.jit(lambda m, *rest: points.read_targets(points.pack_targets(m), *rest))
    own = read(segment_map, where, slots)
    shared = read(segment_map, where[:, :1], slots)
    for b in range(2):
        for c, slot in enumerate(slots):
            mask = segment_map[b] == slot + 1
            np.testing.assert_allclose(own[b, c], bilinear(mask, where[b, c]), atol=1e-5)
            np.testing.assert_allclose(shared[b, c], bilinear(mask, where[b, 0]), atol=1e-5)
    assert np.asarray(own[:, :3]).max() > 0.9
    assert not np.asarray(own[:, 3]).any()
    assert not np.asarray(read(segment_map, np.full((2, 1, 3, 2), np.nan, np.float32), slots)).any()


def test_maps_are_read_at_their_own_points():
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(2, 3, 5, 6)).astype(np.float32)
    where = some_points(rng, 2, 3, 20)
    values = jax.jit(points.read_maps)(maps, where)
    for b, c in np.ndindex(2, 3):
        np.testing.assert_allclose(values[b, c], bilinear(maps[b, c], where[b, c]), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 17, 50])
def test_keep_uncertain_agrees_with_sorting(count):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(3, 2, 50)).astype(np.float32) * np.float32(10) ** rng.integers(
        -30, 30, (3, 2, 50)
    ).astype(np.float32)
    kept, weight = jax.jit(points.keep_uncertain, static_argnums=1)(logits, count)
    order = np.argsort(np.abs(logits), axis=-1)[..., :count]
    expected = np.zeros(logits.shape, bool)
    np.put_along_axis(expected, order, True, axis=-1)
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(weight, np.ones((3, 2)))


def test_keep_uncertain_with_ties_keeps_the_total_weight():
    logits = jnp.asarray([[0.0, -0.0, 0.0, 0.0], [3.0, -2.0, 2.0, 1.0]])
    kept, weight = points.keep_uncertain(logits, 2)
    np.testing.assert_array_equal(kept, [[True] * 4, [False, True, True, True]])
    np.testing.assert_allclose(kept.sum(-1) * weight, [2, 2], rtol=1e-6)


def test_choose_uncertain_returns_the_points_of_the_smallest_logits():
    logits = jnp.asarray([[3.0, -0.5, 2.0, -1.0]])
    where = jnp.arange(8.0).reshape(1, 4, 2)
    chosen = np.asarray(points.choose_uncertain(logits, where, 2))
    assert {tuple(p) for p in chosen[0]} == {(2.0, 3.0), (6.0, 7.0)}


def test_drawn_points_depend_on_every_argument_and_are_uniform():
    key = jax.random.key(0)
    base = points.draw_points(key, Purpose.CANDIDATES, 1, 2, 3, 400)
    assert base.shape == (3, 400, 2) and base.dtype == jnp.float32
    assert base.min() >= 0 and base.max() < 1
    np.testing.assert_allclose(np.mean(base, axis=(0, 1)), 0.5, atol=0.05)
    np.testing.assert_allclose(np.var(base, axis=(0, 1)), 1 / 12, atol=0.01)
    for arguments in (
        (jax.random.key(1), Purpose.CANDIDATES, 1, 2),
        (key, Purpose.FRESH, 1, 2),
        (key, Purpose.CANDIDATES, 0, 2),
        (key, Purpose.CANDIDATES, 1, 0),
    ):
        assert not np.array_equal(base, points.draw_points(*arguments, 3, 400))
    mapped = jax.vmap(lambda slot: points.draw_points(key, Purpose.CANDIDATES, 1, slot, 3, 400))
    np.testing.assert_array_equal(mapped(jnp.arange(3))[2], base)
