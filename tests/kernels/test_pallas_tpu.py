"""The TPU kernels: their numbers in Pallas' interpreters, their plan, and their static cycles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ms_deform_attn as shared
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oneformer_jax.kernels.bench.tpu import TARGETS
from oneformer_jax.kernels.ms_deform_attn import api, pallas_tpu, quad_rows
from oneformer_jax.kernels.ms_deform_attn.bench import OPERATION
from oneformer_jax.kernels.ms_deform_attn.shapes import PUBLISHED
from tests.kernels.common import (
    LIBTPU,
    MIB,
    check_nothing_travels,
    check_schedules,
    cotangent,
    jit,
    recorded,
)

# Table rows beyond the numbers that the kernels may read count as reads out of bounds, and what no
# one has written is NaN: `interpret=True` hides both.
STRICT = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")


class TestInterpreted(shared.MsDeformAttnTests):
    """The tests of every implementation."""

    implementation = "pallas_tpu"

    @pytest.fixture(autouse=True)
    def _interpret(self, monkeypatch):
        call = functools.partial(pallas_tpu.ms_deform_attn, interpret=True)
        monkeypatch.setattr(api, "load", {"pallas_tpu": call}.get)

    def test_sharded_over_the_batch(self):
        # As for the others, but the api must be told of the mesh.
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        shapes = self.SHAPES[:1]
        arguments = shared.make_inputs(shapes, batch=8)
        sharding = NamedSharding(mesh, PartitionSpec("data"))

        @jit
        def run(*arguments):
            def call(value, locations, weights):
                return shared.ms_deform_attn(
                    value, shapes, locations, weights, implementation="pallas_tpu", mesh=mesh
                )

            out, pull_back = jax.vjp(call, *arguments)
            return out, *pull_back(jnp.asarray(cotangent(out.shape)))

        compiled = run.lower(*jax.device_put(arguments, sharding)).compile()
        results = compiled(*jax.device_put(arguments, sharding))
        self.compare(results, shared.loop_reference(arguments[0], shapes, *arguments[1:]))
        check_nothing_travels(compiled)


def check(shapes, arguments, **options):
    """Output and gradients of the interpreted kernels against the loop in float64."""

    @jit
    def run(*arguments):
        out, pull_back = jax.vjp(
            lambda v, s, a: pallas_tpu.ms_deform_attn(v, shapes, s, a, **options), *arguments
        )
        return out, *pull_back(jnp.asarray(cotangent(out.shape)))

    shared.MsDeformAttnTests().compare(
        run(*arguments), shared.loop_reference(arguments[0], shapes, *arguments[1:])
    )


def test_nothing_is_read_out_of_bounds_or_before_it_is_written():
    shapes = ((2, 3), (4, 5))
    value, locations, weights = shared.make_inputs(shapes, batch=1, queries=3)
    locations[0, 0, 0, 0] = np.nan
    locations[0, 1, :, :, 0] = 3e38
    locations[0, 2, 0] = 0.25  # the points of a level share a row
    check(shapes, (value, locations, weights), interpret=STRICT)


@pytest.mark.parametrize(
    ("width", "points", "queries"),
    [
        (40, 5, 5),  # two groups of channels, two groups of points
        pytest.param(3, 33, 3, marks=pytest.mark.slow),  # more samples than lanes
        (3, 1, 130),  # two tiles
    ],
)
def test_widths_points_and_tiles(width, points, queries):
    shapes = ((3, 4),)
    arguments = shared.make_inputs(
        shapes, batch=1, heads=1, width=width, points=points, queries=queries
    )
    check(shapes, arguments, interpret=True)


def test_split_into_passes():
    shapes = ((4, 5), (9, 7))
    rows = 48  # of the 80 of the larger level, backward
    vmem = quad_rows.VMEM_RESERVE + 2 * rows * quad_rows.ROW_BYTES
    assert len(pallas_tpu.plan(shapes, 2, vmem, copies=2)) == 3
    check(shapes, shared.make_inputs(shapes, batch=1), interpret=True, vmem_bytes=vmem)


class TestPlan:
    """How tables are split to fit."""

    @pytest.mark.parametrize("copies", [1, 2])
    @pytest.mark.parametrize("shape", PUBLISHED, ids=lambda s: s.name)
    @pytest.mark.parametrize("vmem", [16, 64, 128])
    def test_every_published_shape_has_one(self, shape, vmem, copies):
        shapes = shape.spatial_shapes
        passes = pallas_tpu.plan(shapes, shape.points, vmem * MIB, copies)
        if vmem >= 64:
            assert len(passes) == 1
        seen = [(b.level, y) for bands in passes for b in bands for y in range(b.start, b.stop)]
        assert seen == [(level, y) for level, (h, _) in enumerate(shapes) for y in range(h + 1)]
        for bands in passes:
            rows = sum((b.stop - b.start) * (shapes[b.level][1] + 1) for b in bands) + 1
            used = copies * rows * quad_rows.ROW_BYTES
            assert used + quad_rows.VMEM_RESERVE <= vmem * MIB
            assert len(bands) * shape.points <= quad_rows.MAX_SAMPLES

    def test_many_levels_take_several_passes(self):
        assert [len(p) for p in pallas_tpu.plan(((2, 2),) * 5, 16, 64 * MIB, 1)] == [2, 2, 1]

    def test_a_map_too_wide_is_refused(self):
        with pytest.raises(NotImplementedError, match=r"one row of level 0 .*(2, 30000).*'xla'"):
            pallas_tpu.plan(((2, 30000),), 4, 16 * MIB, copies=2)


def test_tile_pads_little():
    for queries in (1, 130, 5376, 8400, 21504):
        tile = quad_rows.tile_size(queries, samples=12)
        assert tile % 128 == 0 and tile <= quad_rows.MAX_TILE
        assert -queries % tile < max(128, 0.03 * queries)


QUICK = [("v5e", (512, 512)), ("v5e", (640, 640)), ("v5p", (512, 512))]
ALL = [(target, shape.image_size) for target in ("v5e", "v5p") for shape in PUBLISHED]


class TestSchedule:
    """Static issue cycles of the compiled kernels, against the recorded ones."""

    def check(self, target, image, memory):
        check_schedules(OPERATION, target, ["x".join(map(str, image))], memory=memory)

    @pytest.mark.parametrize(("target", "image"), QUICK)
    def test_two_shapes(self, target, image):
        self.check(target, image, memory=False)

    @pytest.mark.slow
    @pytest.mark.parametrize(("target", "image"), ALL)
    def test_every_published_shape(self, target, image):
        self.check(target, image, memory=True)

    def test_what_was_recorded_is_what_was_promised(self):
        """v5e at 1024 x 1024; what the tests need, and every target once, is there."""
        records = [r for r in recorded(OPERATION) if r["libtpu"] == LIBTPU]
        (found,) = [r for r in records if r["target"] == "v5e" and r["image"] == [1024, 1024]]
        assert found["forward"]["milliseconds"] <= 2.2
        assert found["backward"]["milliseconds"] <= 4.0
        assert found["temporary_bytes"] <= 600e6
        there = {(r["target"], tuple(r["image"])) for r in records}
        assert there >= {*ALL, *((target, (1024, 1024)) for target in TARGETS)}
