"""The TPU kernels of neighbourhood attention: numbers in Pallas' interpreters, plans and cycles."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_neighborhood_attention as shared
from jax.experimental.pallas import tpu as pltpu

from oneformer_jax.kernels.neighborhood_attention import api, pallas_tpu, strips, tile_kernels
from oneformer_jax.kernels.neighborhood_attention.bench import OPERATION
from oneformer_jax.kernels.neighborhood_attention.shapes import HEAD_DIM, PUBLISHED
from tests.kernels.common import LIBTPU, MIB, check_schedules, cotangent, jit, recorded

STRICT = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")


class TestInterpreted(shared.NeighborhoodAttentionTests):
    """The tests of every implementation."""

    implementation = "pallas_tpu"
    mesh_is_given = True  # nobody else can split a kernel

    @pytest.fixture(autouse=True)
    def _interpret(self, monkeypatch):
        call = functools.partial(pallas_tpu.neighborhood_attention, interpret=True)
        monkeypatch.setattr(api, "load", {"pallas_tpu": call}.get)


@pytest.mark.parametrize(("height", "width", "dilation"), [(11, 65, 2), (7, 9, 2)])
def test_nothing_is_read_out_of_bounds_or_before_it_is_written(height, width, dilation):
    arrays = shared.make_inputs(height, width, 3)

    @jit
    def run(*arrays):
        out, pull_back = jax.vjp(
            functools.partial(
                pallas_tpu.neighborhood_attention,
                kernel_size=3,
                dilation=dilation,
                interpret=STRICT,
            ),
            *arrays,
        )
        return out, *pull_back(jnp.asarray(cotangent(out.shape)))

    expected = shared.loop_reference(*arrays, 3, dilation)
    shared.NeighborhoodAttentionTests().compare(run(*arrays), expected)


class TestStrips:
    """The cut of an axis, alone."""

    @pytest.mark.parametrize("block", [strips.ROW_BLOCK, strips.SUBLANES])
    def test_every_region_holds_the_windows_of_its_strip(self, block):
        cut_up = 0
        for kernel_size, dilation in itertools.product((3, 11, 17), (1, 3)):
            smallest = kernel_size * dilation
            for length in range(smallest, smallest + 40 + 8 * dilation):
                for cut in strips.cuts(length, kernel_size, dilation, block, [block]):
                    cut_up += cut.strips > 1
                    self.check(cut)
        assert cut_up > 100

    def check(self, cut: strips.Cut):
        kinds, masks = cut.masks
        bias = cut.bias()
        assert np.all(cut.starts % cut.block == 0)
        assert np.all((cut.starts >= 0) & (cut.starts + cut.keys <= cut.padded))
        for residue in {0, cut.first_short % cut.dilation, cut.dilation - 1}:
            for step, position in enumerate(range(residue, cut.length, cut.dilation)):
                strip, query = divmod(step, cut.tile)
                short = int(residue >= cut.first_short)
                start = cut.starts[strip]
                seen = start + np.flatnonzero(~masks[kinds[short, strip], :, query])
                expected = shared.window(position, cut.length, cut.kernel_size, cut.dilation)
                assert (seen * cut.dilation + residue).tolist() == expected
                index = bias[cut.shifts[strip] + seen - start, query].argmax(-1)
                assert index.tolist() == (seen - step + cut.kernel_size - 1).tolist()

    def test_the_tests_cut_both_axes(self):
        """The shapes of the shared tests go through what large maps go through."""
        plan = strips.plan(19, 71, 3, 2, 4)
        assert (plan.rows.strips, plan.columns.strips, plan.parts) > (1, 3, 1)
        assert plan.rows.first_short == plan.columns.first_short == 1


class TestPlan:
    @pytest.mark.parametrize("shape", PUBLISHED, ids=lambda shape: shape.name)
    def test_every_published_shape_has_one(self, shape):
        """Within the vector memory of a v5p or v7x, in float32."""
        for call in shape.calls():
            plan = strips.plan(
                call.height, call.width, call.kernel_size, call.dilation, strips.LANES // HEAD_DIM
            )
            assert tile_kernels.vmem_needed(plan, 2, 4) < 60 * MIB, call

    def test_what_is_too_large_is_refused(self):
        def attend(height, width, kernel_size, channels=32, **options):
            arrays = [
                jax.ShapeDtypeStruct((1, height, width, 1, channels), jnp.float32),
                jax.ShapeDtypeStruct((1, 2 * kernel_size - 1, 2 * kernel_size - 1), jnp.float32),
            ]
            call = functools.partial(
                pallas_tpu.neighborhood_attention, kernel_size=kernel_size, dilation=1, **options
            )
            jax.eval_shape(lambda x, rpb: call(x, x, x, rpb), *arrays)

        with pytest.raises(NotImplementedError, match=r"up to 128 channels.*have 130; use 'xla'"):
            attend(3, 3, 3, channels=130, interpret=True)
        with pytest.raises(NotImplementedError, match=r"up to 768 keys.*kernel_size 31 has.*'xla'"):
            attend(62, 62, 31, interpret=True)
        message = r"needs \d+ bytes .*dilation 1 on a map of 5000 x 40, but the chip has 16777216"
        with pytest.raises(NotImplementedError, match=message):
            attend(5000, 40, 3, interpret=True, vmem_bytes=16 * MIB)


# The quick tests take a map in strips and one in residue classes.
QUICK = [("v5e", 0), ("v5e", 1), ("v5p", 0)]
TRAINING = PUBLISHED[0].calls()


class TestSchedule:
    """Static issue cycles of the compiled kernels, against the recorded ones."""

    def check(self, target, call, memory):
        name = f"1024x1024-{call.heads}-{call.dilation}"
        check_schedules(OPERATION, target, [name], memory=memory)

    @pytest.mark.parametrize(("target", "index"), QUICK)
    def test_two_maps(self, target, index):
        self.check(target, TRAINING[index], memory=False)

    @pytest.mark.slow
    @pytest.mark.parametrize("call", TRAINING, ids=lambda c: f"{c.height}-{c.heads}-{c.dilation}")
    @pytest.mark.parametrize("target", ["v5e", "v5p"])
    def test_every_map_of_the_training_crop(self, target, call):
        self.check(target, call, memory=True)

    def test_what_was_recorded_is_there(self):
        """Every map for v5e, and what the quick tests need for other targets."""
        records = [r for r in recorded(OPERATION) if r["libtpu"] == LIBTPU and "forward" in r]
        found = {(r["target"], r["map"][0], r["heads"], r["dilation"]) for r in records}
        expected = {("v5e", call) for call in TRAINING} | {(t, TRAINING[i]) for t, i in QUICK}
        assert found >= {(t, call.height, call.heads, call.dilation) for t, call in expected}
