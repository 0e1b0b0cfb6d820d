"""The assignment kernels: limits, what is compiled for absent devices, and the benchmark."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_assignment as shared
from jax.experimental.pallas import tpu as pltpu

from kernels.assignment import api, bench, gpu_aot, pallas_gpu, pallas_tpu, tpu_aot
from kernels.assignment.cases import PUBLISHED, Case
from kernels.gpu_aot import missing
from kernels.tpu_aot import TARGETS

MIB = 2**20


class TestTpuBlocks:
    """How problems are put together."""

    @pytest.mark.parametrize(
        ("problems", "vmem", "block"),
        [(20, 128, 20), (40, 128, 40), (41, 128, 24), (80, 128, 40), (20, 16, 20), (80, 8, 24)],
    )
    def test_blocks_are_even_and_fit(self, problems, vmem, block):
        assert pallas_tpu.block_size(problems, 100, 250, vmem * MIB) == block
        used = block * 2 * 4 * 104 * 256
        assert used + pallas_tpu.VMEM_RESERVE <= vmem * MIB

    @pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
    def test_every_case_is_one_block(self, case):
        for vmem in (16, 64, 128):  # v4; v5p and v7x; v5e and v6e
            block = pallas_tpu.block_size(case.problems, case.columns, case.rows, vmem * MIB)
            assert block == case.problems

    def test_too_large_problems_are_refused(self):
        with pytest.raises(NotImplementedError, match=r"8 problems of 1500 by 2000 costs.*'xla'"):
            pallas_tpu.block_size(20, 1500, 2000, 16 * MIB)

    def test_several_blocks(self):
        cost, valid = shared.problems("plain")
        cost, valid = np.tile(cost, (2, 1, 1))[:20], np.tile(valid, (2, 1))[:20]
        vmem = pallas_tpu.VMEM_RESERVE + 8 * 2 * 4 * 8 * 128  # of 8 problems
        assert pallas_tpu.block_size(20, 6, 8, vmem) == 8
        assign = functools.partial(pallas_tpu.assign, interpret=True, vmem_bytes=vmem)
        shared.check(cost, valid, jax.jit(functools.partial(api.solve, assign))(cost, valid))

    def test_nothing_is_read_out_of_bounds_or_before_it_is_written(self):
        # Rows beyond those of the costs count as out of bounds, and what no one has written is NaN:
        # `interpret=True` hides both.
        strict = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
        assign = functools.partial(pallas_tpu.assign, interpret=strict)
        cost, valid = (x[:3] for x in shared.problems("chains, all valid"))
        valid[0], valid[1, :3] = False, False
        shared.check(cost, valid, jax.jit(functools.partial(api.solve, assign))(cost, valid))


LIBTPU = "0.0.42.1"  # the version of the figures in docs/kernels.md
RECORDED = json.loads(tpu_aot.RECORDED.read_text("utf-8"))


class TestTpuSchedule:
    """Static issue cycles of the compiled kernel, against the recorded ones."""

    @pytest.mark.parametrize("target", ["v5e", "v5p"])
    def test_cycles(self, target):
        try:
            reports = list(tpu_aot.run(target, PUBLISHED[::3], memory=False))
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
        for found in reports:
            name = {key: found[key] for key in ("libtpu", "target", "sizes")}
            same = [record for record in RECORDED if name.items() <= record.items()]
            if not same:  # another version of the compiler schedules differently
                pytest.skip(f"no recorded cycles for {name}")
            for key in ("step_cycles", "other_cycles"):
                assert found[key] == pytest.approx(same[0][key], rel=0.05), (
                    f"{key} {name}: record with python -m kernels.assignment.bench"
                )

    def test_what_was_recorded(self):
        records = [r for r in RECORDED if r["libtpu"] == LIBTPU]
        recorded = {(r["target"], *r["sizes"]) for r in records}
        assert recorded >= {(target, *case.sizes) for target in TARGETS for case in PUBLISHED}
        # 12 to 13 cycles a problem and step.
        assert all(r["step_cycles"] <= 260 for r in records if r["target"] == "v5e")


class TestGpu:
    """Limits, and compilation for GPUs that are not there."""

    @pytest.mark.parametrize(
        ("options", "columns", "message"),
        [
            (dict(compute_capability="7.5"), 3, r"8\.0 or newer, not '7\.5'"),
            (dict(compute_capability="gfx942"), 3, r"8\.0 or newer, not 'gfx942'"),
            (dict(compute_capability="9.0"), 2049, r"up to 2048 columns .*not 2049"),
        ],
    )
    def test_refusals(self, options, columns, message):
        arguments = (
            jax.ShapeDtypeStruct((1, 2, columns), jnp.float32),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(functools.partial(pallas_gpu.assign, **options), *arguments)

    @pytest.mark.parametrize("target", ["h200", pytest.param("a100", marks=pytest.mark.slow)])
    def test_compiles_without_spills(self, target):
        if what := missing():
            pytest.skip(f"not installed: {what}")
        kernels = gpu_aot.report(PUBLISHED[0], "pallas_gpu", target=target)["solve"]["kernels"]
        (ours,) = [k for k in kernels if k["name"] == "linear_sum_assignment"]
        assert 0 < ours["registers"] <= 128 and ours["spill_bytes"] == 0, ours


GPU = next((d for d in jax.devices() if d.platform == "gpu"), None)


@pytest.mark.skipif(GPU is None, reason="no NVIDIA GPU (or JAX_PLATFORMS=cuda,cpu is not set)")
@pytest.mark.parametrize("name", shared.CASES)
def test_on_device_costs_what_scipys_does(name):
    cost, valid = shared.problems(name)
    run = jax.jit(functools.partial(api.linear_sum_assignment, implementation="pallas_gpu"))
    shared.check(cost, valid, run(*jax.device_put((cost, valid), GPU)))


class TestBench:
    SMALL = Case("test", rows=5, columns=4, problems=3)

    def test_cases(self):
        for kind in ("random", "places", "alike"):
            costs = self.SMALL.costs(kind)
            assert costs.shape == (3, 5, 4) and costs.dtype == np.float32
            assert np.array_equal(costs, self.SMALL.costs(kind))
        with pytest.raises(ValueError, match="unknown kind 'equal' of costs; use one of random"):
            self.SMALL.costs("equal")

    def test_steps(self):
        assert bench.count_steps(self.SMALL, "random", 0) == 0
        assert bench.count_steps(self.SMALL, "random", 1) == 1
        assert bench.count_steps(self.SMALL, "alike", 4) >= 4 + 3 + 2 + 1

    def test_measured_records_and_refusals(self):
        records = [
            record
            for name in ("xla", "scipy", "pallas_tpu")
            for record in bench.measure(self.SMALL, name, ["random"], [2, 4], repeats=1)
        ]
        assert [record["valid"] for record in records] == [2, 4] * 3
        assert all(record["milliseconds"] > 0 for record in records[:4])
        assert all("runs on TPUs" in record["error"] for record in records[4:])

    def test_prediction(self):
        record = dict(target="v5e", step_cycles=100, other_cycles=50, temporary_bytes=10**6)
        (row,) = bench.predict(record, self.SMALL, ["random"], [1])
        assert row["steps"] == 1 and row["milliseconds"] == pytest.approx(1e3 * 150 / 1.5e9)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--sizes", "5x4"], "use any of 150x100"),
            (["--valid", "101"], "use 0 to 100"),
            (["--record"], "--record needs"),
            (["--target=v5e", "--problems", "41"], "cycles are of one block, 1 to 40"),
        ],
    )
    def test_options_that_do_not_fit(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert message in capsys.readouterr().err

    def test_missing_compiler_is_named(self, monkeypatch, capsys):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert bench.main(["--target=v5e", "--sizes", "150x100"]) == 1
        assert 'pip install "jax[tpu]"' in capsys.readouterr().err
