"""The assignment: each implementation against SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import optimize

from oneformer_jax.kernels.assignment import api, linear_sum_assignment, pallas_gpu, pallas_tpu, xla
from tests.kernels.common import check_nothing_travels

ROWS, COLUMNS, MORE_COLUMNS = 8, 6, 11


def problems(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A named set of 12 problems: cost float32 [12, 8, M], valid bool [12, M]."""
    rng = np.random.default_rng(sum(map(ord, name)))
    columns = MORE_COLUMNS if name.startswith("more columns") else COLUMNS
    cost = rng.normal(size=(12, ROWS, columns)).astype(np.float32) * 5
    valid = rng.random((12, columns)) < 0.6
    if name.endswith("all valid"):
        valid[:] = True
    elif name == "none valid":
        valid[:] = False
    elif name == "one valid":
        valid[:] = np.eye(columns, dtype=bool)[np.arange(12) % columns]
    elif name == "more columns, some full":
        valid[:4] = True
        valid[4] = np.arange(columns) < ROWS
    elif name == "ties":
        cost = rng.integers(0, 3, cost.shape).astype(np.float32)
    elif name == "equal":
        cost[:] = 1.5
    elif name == "equal rows":
        cost[:] = cost[:, :1]
    elif name == "equal columns":
        cost[:] = cost[:, :, :1]
    elif name == "chains":  # every column wants the same rows in the same order
        cost = cost[:, :1] + np.sort(cost[:, :, :1], axis=1) + 0.01 * cost
    elif name == "clipped":
        cost[rng.random(cost.shape) < 0.5] = 1e5
        cost[0] = 1e5
    elif name == "huge":
        cost *= 1e28
    elif name == "not finite":
        cost[rng.random(cost.shape) < 0.3] = np.inf
        cost[rng.random(cost.shape) < 0.2] = -np.inf
        cost[rng.random(cost.shape) < 0.2] = np.nan
    elif name == "not valid, not finite":
        cost = np.where(valid[:, None], cost, np.nan)
    return cost, valid


CASES = (
    *("plain", "all valid", "none valid", "one valid", "ties", "equal", "equal rows"),
    *("equal columns", "chains, all valid", "clipped", "huge", "not finite"),
    *("not valid, not finite", "more columns", "more columns, all valid"),
    "more columns, some full",
)


def check(cost, valid, row_of):
    """`row_of` is an assignment of as many columns as possible at the least cost."""
    cost, row_of = np.asarray(cost), np.asarray(row_of)
    assert row_of.shape == valid.shape and row_of.dtype == np.int32
    finite = np.clip(np.where(np.isnan(cost), 1e30, cost), -1e30, 1e30).astype(np.float64)
    for c, v, rows in zip(finite, valid, row_of, strict=True):
        given = np.flatnonzero(rows >= 0)
        assert v[given].all() and not (rows < -1).any()
        assert len(given) == min(v.sum(), len(c))
        assert len(set(rows[given])) == len(given) and (rows[given] < len(c)).all()
        expected = c[:, v][optimize.linear_sum_assignment(c[:, v])].sum()
        scale = max(1.0, np.abs(c[:, v]).max(initial=0))
        assert abs(c[rows[given], given].sum() - expected) <= 1e-6 * scale, (rows, expected)


@functools.cache
def jitted(implementation: str):
    return jax.jit(functools.partial(linear_sum_assignment, implementation=implementation))


class AssignmentTests:
    """Every implementation must pass these; a subclass names one."""

    implementation: str

    def run(self, cost, valid):
        return jitted(self.implementation)(cost, valid)

    @pytest.mark.parametrize("name", CASES)
    def test_costs_what_scipys_does(self, name):
        cost, valid = problems(name)
        check(cost, valid, self.run(cost, valid))

    def test_sizes_of_registers(self):
        rng = np.random.default_rng(1)
        cost = rng.normal(size=(3, 130, 9)).astype(np.float32)
        valid = rng.random((3, 9)) < 0.8
        check(cost, valid, self.run(cost, valid))

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (2, 5, 1)])
    def test_single_rows_and_columns(self, shape):
        cost = np.random.default_rng(2).normal(size=shape).astype(np.float32)
        valid = np.ones((shape[0], shape[2]), bool)
        check(cost, valid, self.run(cost, valid))

    @pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (2, 3, 0)])
    def test_nothing_to_assign(self, shape):
        found = self.run(np.zeros(shape, np.float32), np.ones((shape[0], shape[2]), bool))
        assert found.shape == (shape[0], shape[2]) and (np.asarray(found) == -1).all()

    def test_the_choice_is_that_of_every_implementation(self):
        for name in ("ties", "equal", "chains, all valid"):
            cost, valid = problems(name)
            expected = jitted("xla")(cost, valid)
            np.testing.assert_array_equal(self.run(cost, valid), expected)
            # Problems do not see each other.
            np.testing.assert_array_equal(self.run(cost[::-1], valid[::-1]), expected[::-1])

    def test_vmap(self):
        sets = [problems(name) for name in ("plain", "ties")]
        cost, valid = (np.stack(x) for x in zip(*sets, strict=True))
        for c, v, found in zip(cost, valid, jax.vmap(self.run)(cost, valid), strict=True):
            check(c, v, found)
        # One set of valid columns for both.
        shared = jax.vmap(self.run, in_axes=(0, None))(cost, valid[0])
        for c, found in zip(cost, shared, strict=True):
            check(c, valid[0], found)

    def test_the_gradient_stops_at_the_costs(self):
        cost, valid = problems("all valid")

        @jax.jit
        @jax.grad
        def gradient(cost):
            row_of = self.run(jnp.sin(cost), valid)
            return jnp.sum(jnp.take_along_axis(cost, row_of[:, None, :], axis=1))

        found = np.asarray(gradient(cost))
        assert set(np.unique(found)) == {0, 1} and found.sum() == row_count(valid)

    def test_sharded_over_the_problems(self, mesh8):
        cost, valid = problems("all valid")
        cost, valid = np.tile(cost, (2, 1, 1)), np.tile(valid, (2, 1))
        sharding = NamedSharding(mesh8, PartitionSpec(("data", "fsdp")))
        run = jax.jit(
            functools.partial(linear_sum_assignment, implementation=self.implementation, mesh=mesh8)
        )
        placed = jax.device_put((cost, valid), sharding)
        compiled = run.lower(*placed).compile()
        found = compiled(*placed)
        check(cost, valid, found)
        assert found.sharding.is_equivalent_to(sharding, found.ndim)
        # Problems are independent: no device needs anything of another one.
        check_nothing_travels(compiled)


def row_count(valid):
    return np.minimum(valid.sum(axis=1), ROWS).sum()


class TestXla(AssignmentTests):
    implementation = "xla"

    def test_real_sizes(self):
        rng = np.random.default_rng(3)
        cost = rng.random((4, 150, 100)).astype(np.float32)
        valid = rng.random((4, 100)) < [[0.2], [0.9], [1.0], [0.5]]
        check(cost, valid, jax.jit(linear_sum_assignment)(cost, valid))

    def test_problems_do_not_wait_for_each_other(self):
        # The steps of a batch are those of its longest problem, not the sum of longest searches.
        cost, _ = problems("chains, all valid")
        order = np.tile(np.arange(COLUMNS, dtype=np.int32), (12, 1))
        count = np.arange(12, dtype=np.int32) % (COLUMNS + 1)
        steps = jax.jit(lambda *x: xla.assign_and_count(*x)[1])
        cost = cost.swapaxes(1, 2)
        alone = [int(steps(*(x[p : p + 1] for x in (cost, order, count)))) for p in range(12)]
        assert int(steps(cost, order, count)) == max(alone)
        assert len(set(alone)) > 5 and alone[0] == 0 and alone[1] == 1


def interpreted(monkeypatch, name, assign):
    """Has the api take `assign` for an implementation."""
    assign = functools.partial(assign, interpret=True)
    monkeypatch.setattr(api, "load", {name: assign, "xla": xla.assign}.__getitem__)


class TestPallasTpu(AssignmentTests):
    implementation = "pallas_tpu"

    @pytest.fixture(autouse=True)
    def _interpret(self, monkeypatch):
        interpreted(monkeypatch, self.implementation, pallas_tpu.assign)


class TestPallasGpu(AssignmentTests):
    implementation = "pallas_gpu"

    @pytest.fixture(autouse=True)
    def _interpret(self, monkeypatch):
        interpreted(monkeypatch, self.implementation, pallas_gpu.assign)


class TestDoor:
    """Arguments that the api refuses."""

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            (((3, 2), (3,)), {}, ValueError, r"cost must have 3 axes \[B, Q, M\], got .*\(3, 2\)"),
            (
                ((2, 3, 4), (2, 3)),
                {},
                ValueError,
                r"valid must be \(2, 4\) .*got \(2, 3\)",
            ),
            (
                ((2, 3, 4), (1, 4)),
                {},
                ValueError,
                r"valid must be \(2, 4\) .*got \(1, 4\)",
            ),
            (
                ((2, 3, 4), (2, 4)),
                dict(implementation="cuda"),
                ValueError,
                r"unknown implementation 'cuda'; use one of xla, pallas_tpu, pallas_gpu",
            ),
            (
                ((2, 3, 4), (2, 4)),
                dict(implementation="pallas_tpu"),
                NotImplementedError,
                r"'pallas_tpu' runs on TPUs",
            ),
            (
                ((2, 3, 4), (2, 4)),
                dict(implementation="pallas_gpu"),
                NotImplementedError,
                r"pallas_gpu needs an NVIDIA GPU of compute capability 8\.0",
            ),
            (
                ((1, 4000, 3000), (1, 3000)),
                dict(implementation="xla"),
                NotImplementedError,
                r"3000 rows that enter and 4000 columns are too many",
            ),
        ],
    )
    def test_refusals(self, arguments, options, error, message):
        cost, valid = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(arguments, (jnp.float32, bool), strict=True)
        )
        with pytest.raises(error, match=message):
            jax.eval_shape(functools.partial(linear_sum_assignment, **options), cost, valid)

    @pytest.mark.parametrize(
        ("dtypes", "message"),
        [
            ((jnp.bfloat16, bool), "cost must be float32, got bfloat16"),
            ((jnp.float32, jnp.int32), "valid must be bool, got int32"),
        ],
    )
    def test_dtypes(self, dtypes, message):
        with pytest.raises(ValueError, match=message):
            linear_sum_assignment(jnp.ones((1, 2, 2), dtypes[0]), jnp.ones((1, 2), dtypes[1]))

    def test_a_batch_that_does_not_divide(self, mesh8):
        with pytest.raises(ValueError, match=r"cost has a batch of 6 .*8 devices \(mesh axes data"):
            linear_sum_assignment(jnp.ones((6, 2, 2)), jnp.ones((6, 2), bool), mesh=mesh8)
