"""The assignment kernels: limits, and what is compiled for absent devices."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_assignment as shared
from jax.experimental.pallas import tpu as pltpu

from oneformer_jax.kernels.assignment import api, pallas_gpu, pallas_tpu
from oneformer_jax.kernels.assignment.bench import OPERATION
from oneformer_jax.kernels.assignment.shapes import PUBLISHED
from oneformer_jax.kernels.bench import operation
from oneformer_jax.kernels.bench.gpu import missing
from oneformer_jax.kernels.bench.tpu import TARGETS
from tests.kernels.common import LIBTPU, MIB, check_schedules, recorded


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


class TestTpuSchedule:
    """Static issue cycles of the compiled kernel, against the recorded ones."""

    @pytest.mark.parametrize("target", ["v5e", "v5p"])
    def test_cycles(self, target):
        check_schedules(OPERATION, target, ["150x100-random-20", "250x250-random-20"])

    def test_what_was_recorded(self):
        records = [r for r in recorded(OPERATION) if r["libtpu"] == LIBTPU]
        found = {(r["target"], *r["sizes"]) for r in records}
        assert found >= {(target, *case.sizes) for target in TARGETS for case in PUBLISHED}
        # 12 to 13 cycles a problem and step.
        assert all(r["step_cycles"] <= 260 for r in records if r["target"] == "v5e")


class TestGpu:
    """Limits, and compilation for GPUs that are not there."""

    @pytest.mark.parametrize(
        ("capability", "columns", "message"),
        [
            ("7.5", 3, r"8\.0 or newer, not '7\.5'"),
            ("gfx942", 3, r"8\.0 or newer, not 'gfx942'"),
            ("9.0", 2049, r"up to 2048 columns .*not 2049"),
        ],
    )
    def test_refusals(self, capability, columns, message, monkeypatch):
        gpu = types.SimpleNamespace(
            platform="gpu", device_kind="a GPU", compute_capability=capability
        )
        monkeypatch.setattr(jax, "devices", lambda: [gpu])
        arguments = (
            jax.ShapeDtypeStruct((1, 2, columns), jnp.float32),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(pallas_gpu.assign, *arguments)

    @pytest.mark.parametrize("target", ["h200", pytest.param("a100", marks=pytest.mark.slow)])
    def test_compiles_without_spills(self, target):
        if what := missing():
            pytest.skip(f"not installed: {what}")
        found = operation.compile_for_gpu(OPERATION, target, "150x100-random-20", "pallas_gpu")
        kernels = found["forward"]["kernels"]
        (ours,) = [k for k in kernels if k["name"] == "linear_sum_assignment"]
        assert 0 < ours["registers"] <= 128 and ours["spill_bytes"] == 0, ours


GPU = next((d for d in jax.devices() if d.platform == "gpu"), None)


@pytest.mark.skipif(GPU is None, reason="no NVIDIA GPU (or JAX_PLATFORMS=cuda,cpu is not set)")
@pytest.mark.parametrize("name", shared.CASES)
def test_on_device_costs_what_scipys_does(name):
    cost, valid = shared.problems(name)
    run = jax.jit(functools.partial(api.linear_sum_assignment, implementation="pallas_gpu"))
    shared.check(cost, valid, run(*jax.device_put((cost, valid), GPU)))
