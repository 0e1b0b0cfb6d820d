"""Neighbourhood attention against the rule in loops, its gradient, memory and refusals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from oneformer_jax.models.backbones.neighborhood import Axis, neighborhood_attention


def window(position: int, length: int, kernel_size: int, dilation: int) -> list[int]:
    """Positions seen along one axis: the nearest of the residue class, as many at the borders."""
    kin = [p for p in range(length) if (p - position) % dilation == 0]
    start = kin.index(position) - kernel_size // 2
    start = min(max(start, 0), len(kin) - kernel_size)
    return kin[start : start + kernel_size]


def attend(query, key, value, rpb, kernel_size, dilation):
    """The rule on float64 [B, H, W, N, D], pixel by pixel."""
    _, height, width, heads, channels = query.shape
    out = np.zeros(query.shape)
    for r, c in np.ndindex(height, width):
        rows = window(r, height, kernel_size, dilation)
        columns = window(c, width, kernel_size, dilation)
        here = np.ix_(range(len(query)), rows, columns)
        for n in range(heads):
            logits = np.einsum(
                "bd,bijd->bij", query[:, r, c, n] / np.sqrt(channels), key[here][..., n, :]
            )
            for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
                down, right = ((row - r) // dilation, (column - c) // dilation)
                logits[:, i, j] += rpb[n, down + kernel_size - 1, right + kernel_size - 1]
            shares = np.exp(logits - logits.max((1, 2), keepdims=True))
            shares /= shares.sum((1, 2), keepdims=True)
            out[:, r, c, n] = np.einsum("bij,bijd->bd", shares, value[here][..., n, :])
    return out


def dense(query, key, value, rpb, *, kernel_size, dilation):
    """The same as products over the whole map, with what JAX differentiates by itself."""
    batch, height, width, heads, channels = query.shape
    edge = 2 * kernel_size - 1
    index = np.full((height, width, height, width), edge * edge)  # its last entry blocks
    for r, c in np.ndindex(height, width):
        for row in window(r, height, kernel_size, dilation):
            for column in window(c, width, kernel_size, dilation):
                down, right = (row - r) // dilation, (column - c) // dilation
                index[r, c, row, column] = (down + kernel_size - 1) * edge + right + kernel_size - 1
    table = jnp.pad(rpb.reshape(heads, -1), ((0, 0), (0, 1)), constant_values=-jnp.inf)
    bias = table[:, index.reshape(height * width, -1)]
    query, key, value = (x.reshape(batch, -1, heads, channels) for x in (query, key, value))
    logits = jnp.einsum("bqnd,bknd->bnqk", query, key) * channels**-0.5 + bias
    out = jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(logits), value)
    return out.reshape(batch, height, width, heads, channels)


def inputs(batch, height, width, heads, channels, kernel_size, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(batch, height, width, heads, channels)) for _ in range(3)]
    return [*arrays, rng.normal(size=(heads, *(2 * kernel_size - 1,) * 2))]


def run(arrays, kernel_size, dilation, dtype=jnp.float32):
    *qkv, rpb = arrays
    function = functools.partial(neighborhood_attention, kernel_size=kernel_size, dilation=dilation)
    return jax.jit(function)(*(jnp.asarray(x, dtype) for x in qkv), jnp.asarray(rpb, jnp.float32))


@pytest.mark.parametrize(
    ("height", "width", "kernel_size", "dilation"),
    [
        (3, 3, 3, 1),  # everything sees everything
        (20, 17, 3, 1),  # many tiles, not a whole number of them
        (14, 13, 3, 2),  # residue classes of unequal size
        (23, 29, 5, 2),  # and tiles within them
        (10, 25, 5, 2),  # one tile by several
        (31, 24, 7, 1),
        (22, 41, 11, 1),
        (13, 40, 3, 4),
    ],
)
def test_equals_the_rule_in_loops(height, width, kernel_size, dilation):
    arrays = inputs(2, height, width, 2, 4, kernel_size)
    expected = attend(*arrays, kernel_size, dilation)
    np.testing.assert_allclose(run(arrays, kernel_size, dilation), expected, atol=2e-5)


def test_every_cut_keeps_every_window():
    """Axis alone, for all lengths: its masks hold the rule's positions, each seen from its tile."""
    cut_up = 0
    for kernel_size, dilation in itertools.product((3, 5, 7, 11), (1, 2, 3, 5)):
        smallest = kernel_size * dilation
        for length in range(smallest, smallest + 40):
            axis = Axis.cut(length, kernel_size, dilation)
            cut_up += axis.tiles > 1
            mask = axis.mask()
            assert np.all(mask.sum(-1) == kernel_size)
            for position in range(length):
                step, residue = divmod(position, dilation)
                tile, place = divmod(step + axis.front, axis.tile)
                first = tile * axis.tile - axis.front - axis.halo
                seen = (first + np.flatnonzero(mask[residue, tile, place])) * dilation + residue
                assert seen.tolist() == window(position, length, kernel_size, dilation)
    assert cut_up > 200


def test_gradients_equal_those_of_the_dense_form():
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs(2, 12, 19, 4, 4, 3)]

    def gradients(form):
        def loss(*arrays):
            return jnp.sum(jnp.sin(form(*arrays, kernel_size=3, dilation=2)))

        return jax.jit(jax.grad(loss, range(4)))(*arrays)

    for found, expected in zip(gradients(neighborhood_attention), gradients(dense), strict=True):
        assert np.any(np.asarray(expected) != 0)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_bfloat16_keeps_a_float32_softmax():
    # Logits of about 300 apart by 1: in bfloat16, whose step there is 2, they would be equal.
    query = np.ones((1, 3, 3, 1, 4))
    value = np.arange(9.0).reshape(1, 3, 3, 1, 1) * np.ones(4)
    rpb = 300 + np.arange(25.0).reshape(1, 5, 5)
    arrays = [query, query, value, rpb]
    found = run(arrays, 3, 1, jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), attend(*arrays, 3, 1), atol=0.05)


@pytest.mark.parametrize(
    ("side", "dilation"), [(160, 1), (220, 20)], ids=["tiles", "residue classes"]
)
def test_memory_is_a_few_maps(side, dilation):
    """Stage 1 of DiNAT-L at 640 pixels: k * k gathered keys alone would be 121 maps."""
    shape = jax.ShapeDtypeStruct((1, side, side, 6, 32), jnp.float32)
    rpb = jax.ShapeDtypeStruct((6, 21, 21), jnp.float32)

    def forward(*arrays):
        return neighborhood_attention(*arrays, kernel_size=11, dilation=dilation)

    def gradients(*arrays):
        return jax.grad(lambda *a: jnp.sum(jnp.square(forward(*a))), range(4))(*arrays)

    of_map = 4 * side * side * 6 * 32
    for function, maps in ((forward, 8), (gradients, 12)):
        compiled = jax.jit(function).lower(shape, shape, shape, rpb).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < maps * of_map
        assert len(compiled.as_text()) < 2e6  # no mask or index of the map's size within


def test_a_sharded_batch_stays_where_it_is(mesh8):
    arrays = inputs(8, 9, 12, 2, 4, 3)
    expected = run(arrays, 3, 1)
    sharding = NamedSharding(mesh8, PartitionSpec("data"))
    *qkv, rpb = [x.astype(np.float32) for x in arrays]
    step = jax.jit(functools.partial(neighborhood_attention, kernel_size=3, dilation=1))
    qkv = [jax.device_put(x, sharding) for x in qkv]
    compiled = step.lower(*qkv, rpb).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    found = step(*qkv, rpb)
    assert found.sharding.is_equivalent_to(sharding, found.ndim)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_refusals():
    *qkv, rpb = inputs(1, 5, 9, 2, 4, 3)
    with pytest.raises(ValueError, match=r"5 x 9 has no neighbourhood of 3 .*pad its sides to 6"):
        neighborhood_attention(*qkv, rpb, kernel_size=3, dilation=2)
    with pytest.raises(ValueError, match=r"rpb has shape \(2, 4, 5\).*\[2 heads, 5, 5\]"):
        neighborhood_attention(*qkv, rpb[:, 1:], kernel_size=3)
