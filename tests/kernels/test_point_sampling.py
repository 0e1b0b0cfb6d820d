"""Point sampling: each implementation against a loop in float64."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oneformer_jax.kernels.point_sampling import (
    api,
    band_rows,
    bench,
    pallas_tpu,
    sample_features,
)
from oneformer_jax.kernels.point_sampling.shapes import PUBLISHED, CallShape
from oneformer_jax.kernels.tpu_kernels import ROW_BYTES
from tests.kernels.common import (
    LIBTPU,
    MIB,
    check_nothing_travels,
    check_schedules,
    cotangent,
    jit,
    recorded,
)

# `interpret=True` hides reads out of bounds and of what no one has written.
STRICT = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")


def loop_reference(features, points):
    """The definition, point by point, in float64.

    Returns the output [B, P, D] and the gradient of sum(output * cotangent) in the features.
    """
    features, points = np.asarray(features, np.float64), np.asarray(points, np.float64)
    batch, height, width, depth = features.shape
    out = np.zeros((batch, points.shape[1], depth))
    gradient = np.zeros_like(features)
    given = cotangent(out.shape).astype(np.float64)
    for b, p in np.ndindex(out.shape[:2]):
        x, y = points[b, p, 0] * width - 0.5, points[b, p, 1] * height - 0.5
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        left, top = math.floor(x), math.floor(y)
        for row, share_y in ((top, top + 1 - y), (top + 1, y - top)):
            for column, share_x in ((left, left + 1 - x), (left + 1, x - left)):
                if 0 <= row < height and 0 <= column < width:
                    out[b, p] += share_y * share_x * features[b, row, column]
                    gradient[b, row, column] += share_y * share_x * given[b, p]
    return out, gradient


def make_inputs(height, width, *, batch=2, points=40, depth=5, low=-0.4, high=1.4, seed=0):
    """Random arguments; by default about half of the points lie outside of the map."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(batch, height, width, depth)).astype(np.float32)
    return features, rng.uniform(low, high, (batch, points, 2)).astype(np.float32)


@functools.partial(jit, static_argnums=(0,), static_argnames=("mesh",))
def run(implementation, features, points, mesh=None):
    """Output and gradient in the features."""
    out, pull_back = jax.vjp(
        lambda f: sample_features(f, points, implementation=implementation, mesh=mesh), features
    )
    return out, *pull_back(jnp.asarray(cotangent(out.shape)))


def compare(found, expected, tolerances=(1e-5, 1e-5)):
    """Output and gradient; the tolerances are relative to the largest entry of each."""
    for name, a, b, tolerance in zip(
        ("output", "gradient"), found, expected, tolerances, strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=name)


class PointSamplingTests:
    """Every implementation must pass these; a subclass names one."""

    implementation: str

    def check(self, features, points):
        compare(run(self.implementation, features, points), loop_reference(features, points))

    def test_odd_sizes_and_points_outside(self):
        self.check(*make_inputs(7, 5))

    def test_one_pixel_one_image_one_point(self):
        self.check(*make_inputs(1, 1, batch=1, points=1))

    def test_one_row(self):
        self.check(*make_inputs(1, 6, batch=1))

    def test_every_point_out_of_range(self):
        for low, high in ((1.6, 9.0), (-9.0, -0.6)):
            for array in run(self.implementation, *make_inputs(7, 5, low=low, high=high)):
                assert not np.any(array)

    def test_exactly_on_pixels(self):
        # Powers of two, so that the centres are exact in float32; borders are included.
        features, points = make_inputs(4, 8, points=32)
        rows, columns = np.divmod(np.arange(32), 8)
        points[...] = np.stack([(columns + 0.5) / 8, (rows + 0.5) / 4], axis=-1)
        out, _ = run(self.implementation, features, points)
        np.testing.assert_array_equal(out, features.reshape(out.shape))
        self.check(features, points)

    def test_all_points_on_one_pixel(self):
        features, points = make_inputs(7, 5)
        points[...] = (2.5 / 5, 3.5 / 7)
        self.check(features, points)

    def test_points_that_are_not_finite_read_nothing(self):
        features, points = make_inputs(7, 5)
        points[0, 0] = np.nan
        points[0, 1, 1] = np.inf
        points[1, 2, 0] = -np.inf
        points[1, 3] = 3e38
        out, _ = run(self.implementation, features, points)
        assert not np.any(out[0, :2]) and not np.any(out[1, 2:4])
        self.check(features, points)

    def test_bfloat16_features(self):
        features, points = make_inputs(6, 7)
        features = jnp.asarray(features, jnp.bfloat16)
        out, gradient = run(self.implementation, features, points)
        assert (out.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
        # Sums are float32; of the gradient the last rounding is seen.
        compare((out, gradient), loop_reference(features, points), (1e-5, 2**-8))

    def test_bfloat16_gradient_is_summed_in_float32(self):
        # 1000 points share a pixel: a bfloat16 sum of ones would stop at 256.
        features = jnp.ones((1, 2, 2, 4), jnp.bfloat16)
        points = jnp.full((1, 1000, 2), 0.25)

        @jit
        def gradient(features):
            call = functools.partial(sample_features, implementation=self.implementation)
            return jax.grad(lambda f: call(f, points).sum())(features)

        np.testing.assert_allclose(np.asarray(gradient(features), np.float32)[0, 0, 0], 1000)

    def test_no_gradient_flows_to_the_points(self):
        features, points = make_inputs(7, 5)
        call = functools.partial(sample_features, implementation=self.implementation)
        assert not np.any(jit(jax.grad(lambda p: call(features, p).sum()))(points))

    def test_vmap(self):
        features, points = (
            np.stack(arrays)
            for arrays in zip(*(make_inputs(7, 5, seed=seed) for seed in range(2)), strict=True)
        )
        call = functools.partial(run, self.implementation)
        found = jax.vmap(call)(features, points)
        for i in range(2):
            compare([x[i] for x in found], loop_reference(features[i], points[i]))
        found = jax.vmap(lambda p: call(features[0], p))(points)
        compare([x[1] for x in found], loop_reference(features[0], points[1]))

    def test_remat(self):
        features, points = make_inputs(7, 5)

        @jit
        def call(features):
            read = jax.checkpoint(
                lambda f: sample_features(f, points, implementation=self.implementation)
            )
            out, pull_back = jax.vjp(read, features)
            return out, *pull_back(jnp.asarray(cotangent(out.shape)))

        compare(call(features), loop_reference(features, points))

    def test_sharded_over_the_batch(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        arguments = make_inputs(5, 4, batch=8, points=6)
        placed = jax.device_put(arguments, sharding)
        # The compiler splits "xla" by itself.
        given = None if self.implementation == "xla" else mesh
        compiled = run.lower(self.implementation, *placed, mesh=given).compile()
        found = compiled(*placed)
        compare(found, loop_reference(*arguments))
        assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in found)
        check_nothing_travels(compiled)


class TestXla(PointSamplingTests):
    implementation = "xla"


def interpreted(interpret=True, **options):
    """The module `pallas_tpu` with its kernels in an interpreter."""
    options |= {"interpret": interpret}
    return types.SimpleNamespace(
        forward=functools.partial(pallas_tpu.forward, **options),
        backward=functools.partial(pallas_tpu.backward, **options),
    )


class TestPallasTpu(PointSamplingTests):
    implementation = "pallas_tpu"

    @pytest.fixture(autouse=True)
    def _interpret(self, monkeypatch):
        monkeypatch.setattr(api, "load", {"pallas_tpu": interpreted()}.get)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
class TestKernels:
    """Behaviour that only the TPU kernels have."""

    def check(self, features, points, forward=None, **options):
        kernels = interpreted(**options)

        @jit
        def call(features, points):
            out = (forward or kernels.forward)(features, points)
            given = jnp.asarray(cotangent(out.shape))
            like = jax.ShapeDtypeStruct(features.shape, features.dtype)
            return out, kernels.backward(points, given, like)

        tolerances = (1e-5, 1e-5 if features.dtype == jnp.float32 else 2**-8)
        compare(call(features, points), loop_reference(features, points), tolerances)

    def test_nothing_is_read_out_of_bounds_or_before_it_is_written(self, dtype):
        features, points = make_inputs(4, 6, batch=1, points=70)
        points[0, :3] = [[np.nan, 0.5], [3e38, 0.5], [0.999, 0.999]]
        points[0, 40:44] = 0.25  # a step that shares pixels
        # The strict interpreter cannot read bfloat16 rows as the kernel does, in pairs.
        loose = None if dtype == jnp.float32 else interpreted().forward
        self.check(jnp.asarray(features, dtype), points, forward=loose, interpret=STRICT)

    def test_several_tiles_and_groups_of_channels(self, dtype):
        features, points = make_inputs(9, 11, batch=1, points=1100, depth=130)
        self.check(jnp.asarray(features, dtype), points)

    def test_bands(self, dtype):
        features, points = make_inputs(9, 8, batch=2, points=50)
        row_bytes = 8 * band_rows.LANES * jnp.dtype(dtype).itemsize
        vmem = band_rows.VMEM_RESERVE + 4 * row_bytes
        assert len(pallas_tpu.bands(9, 8, jnp.dtype(dtype).itemsize, vmem)) == 3
        vmem = max(vmem, band_rows.VMEM_RESERVE + 4 * 8 * ROW_BYTES)
        self.check(jnp.asarray(features, dtype), points, vmem_bytes=vmem)


class TestBands:
    """How a map is split to fit."""

    @pytest.mark.parametrize("size", [(2, 2), (9, 7), (256, 256), (256, 512), (320, 320)])
    @pytest.mark.parametrize("vmem", [16, 64, 128])
    def test_every_row_pair_is_in_one_band(self, size, vmem):
        height, width = size
        found = pallas_tpu.bands(height, width, 4, vmem * MIB)
        assert [row for start, stop in found for row in range(start, stop - 1)] == list(
            range(height - 1)
        )
        rows = max(stop - start for start, stop in found)
        assert rows * width * ROW_BYTES + band_rows.VMEM_RESERVE <= vmem * MIB
        if size == (256, 256):  # of a 1024 x 1024 image
            assert len(found) == {16: 6, 64: 1, 128: 1}[vmem]

    def test_a_map_too_wide_is_refused(self):
        with pytest.raises(NotImplementedError, match=r"two rows of a map of width 30000.*'xla'"):
            pallas_tpu.bands(4, 30000, 4, 16 * MIB)


def test_tile_pads_little():
    for points in (1, 130, 12544, 40768, 53312):
        tile = band_rows.tile_size(points)
        assert tile % 128 == 0 and tile <= band_rows.MAX_TILE
        assert -points % tile < max(128, 0.03 * points)


def test_steps_that_share_pixels_are_found():
    # Pixels of the 2 x 2 of neighbours on a map of width 20: up to one row and column apart.
    apart = {0, 1, 19, 20, 21}
    for distance in range(60):
        index = np.full((1, 1, band_rows.GROUP, 128), 0) + 100 * np.arange(band_rows.GROUP)[:, None]
        index[0, 0, 13, 5] = index[0, 0, 9, 5] + distance
        found = np.asarray(band_rows._share_pixels(jnp.asarray(index), 20))
        assert found.sum() == found[0, 0, 5] == (distance in apart), distance
    index[0, 0, 16] = index[0, 0, 15]  # in different steps
    assert not np.any(band_rows._share_pixels(jnp.asarray(index), 20))


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(features=np.zeros((2, 4, 5))), r"features must have 4 axes"),
            (dict(features=np.zeros((2, 4, 5, 3), np.float16)), r"features must be float32 or"),
            (dict(features=np.zeros((2, 0, 5, 3), np.float32)), r"features is empty"),
            (dict(points=np.zeros((2, 4), np.float32)), r"points must have 3 axes"),
            (dict(points=np.zeros((2, 4, 2), np.int32)), r"points must be float32, got int32"),
            (dict(points=np.zeros((1, 4, 2), np.float32)), r"points must be \(2, P, 2\)"),
            (dict(points=np.zeros((2, 4, 3), np.float32)), r"points must be \(2, P, 2\)"),
            (dict(implementation="cuda"), r"unknown implementation 'cuda'"),
        ],
    )
    def test_that_do_not_fit(self, change, message):
        arguments = {
            "features": np.zeros((2, 4, 5, 3), np.float32),
            "points": np.zeros((2, 4, 2), np.float32),
        }
        with pytest.raises(ValueError, match=message):
            sample_features(**(arguments | change))

    def test_a_kernel_refuses_other_devices(self):
        features, points = make_inputs(4, 5)
        with pytest.raises(NotImplementedError, match="runs on TPUs"):
            sample_features(features, points, implementation="pallas_tpu")

    def test_batch_that_does_not_divide(self, mesh8):
        with pytest.raises(ValueError, match=r"features has a batch of 2 .*8 devices"):
            sample_features(*make_inputs(4, 5), mesh=mesh8)


class TestSchedule:
    """Static issue cycles of the compiled kernels, against the recorded ones."""

    @pytest.mark.parametrize("dtype", bench.OPERATION.dtypes)
    def test_one_call(self, dtype):
        check_schedules(bench.OPERATION, "v5e", ["losses"], dtype=dtype, memory=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", bench.OPERATION.dtypes)
    @pytest.mark.parametrize("call", [shape.name for shape in PUBLISHED])
    @pytest.mark.parametrize("target", ["v5e", "v5p"])
    def test_every_call(self, target, call, dtype):
        check_schedules(bench.OPERATION, target, [call], dtype=dtype, memory=True)

    def test_the_kernels_take_less_than_three_percent_of_a_step(self):
        """v5e, all calls of a step, of 34 ms an image (docs/performance.md)."""
        ours = ("v5e", LIBTPU)
        records = [r for r in recorded(bench.OPERATION) if (r["target"], r["libtpu"]) == ours]
        for dtype in bench.OPERATION.dtypes:
            matching, losses = (
                next(r for r in records if r["dtype"] == dtype and r["call"] == shape.name)
                for shape in PUBLISHED
            )
            passes = (matching["forward"], losses["forward"], losses["backward"])
            assert sum(p["milliseconds"] for p in passes) < 0.03 * 34
            assert losses["temporary_bytes"] < 4e6

    def test_rare_loops_count_as_often_as_they_run(self):
        text = """
     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s2_s0 = sadd.s32 1, %s2_s0 } /* Start region 7 */
   0x2 LB: >> { %4 = vld  ;;  %5 = vst [vmem:[%s1_s0] sm:$0xff] %v0 } /* Start region 5 */
   0x3 LB: >>> { %6 = vld } /* Start region 3 */
   0x4   : >>> { %p1_p1 = scmp.ge.s32.totalorder %s4_s1, 32 /* loop exit test */ }
   0x5   : >>> { %9 = sbr.rel (!%p1_p1) target = $region3 }
   0x6   : >> { %p4_p1 = scmp.ge.s32.totalorder %s3_s1, 4 /* loop exit test */ }
   0x7   : >> { %9 = sbr.rel (!%p4_p1) target = $region5 }
   0x8   : >> {}
   0x9   : >> {}
   0xa   : >> {}
   0xb   : >> {}
   0xc   : > { %p8_p2 = scmp.ge.s32.totalorder %s2_s0, 2 /* loop exit test */ }
   0xd   : > { %7 = sbr.rel (!%p8_p2) target = $region7 }
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   :  {}
"""
        shape = CallShape("", 256, (256, 256), 128)  # one tile of 8 groups
        frequent = 1 + 2 * (1 + 4 * 7 + 2 + 4)
        shared = 1 - (1 - 9 / 65536) ** 112
        expected = frequent + shared * 256 * (3 + 4)
        assert bench.uniform_cycles(text, shape) == pytest.approx(expected)
