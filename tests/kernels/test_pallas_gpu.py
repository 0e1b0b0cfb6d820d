"""The GPU kernels: their numbers in Pallas's interpreters, their compilation, and on a GPU.

On a machine with an NVIDIA GPU, this compares every kernel with the float64 loop there:

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels/test_pallas_gpu.py -k on_device -q
"""

import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ms_deform_attn as shared
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oneformer_jax.kernels import dispatch
from oneformer_jax.kernels.bench import operation
from oneformer_jax.kernels.bench.gpu import missing
from oneformer_jax.kernels.ms_deform_attn import pallas_gpu
from oneformer_jax.kernels.ms_deform_attn.bench import OPERATION
from oneformer_jax.kernels.ms_deform_attn.reference import ms_deform_attn_gather
from oneformer_jax.kernels.ms_deform_attn.shapes import CallShape
from tests.kernels.common import cotangent, jit

SHAPES = ((2, 3), (4, 5))
JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
needs_mosaic = pytest.mark.skipif(
    JAX_VERSION < (0, 11), reason=f"the Mosaic GPU kernels need jax 0.11, this is {jax.__version__}"
)
BACKENDS = ("triton", pytest.param("mosaic", marks=needs_mosaic))
on_h200 = functools.partial(dispatch.tracing_for, "gpu", "NVIDIA H200")


def output_and_gradients(call, *arguments):
    out, pull_back = jax.vjp(call, *arguments)
    return out, *pull_back(jnp.asarray(cotangent(out.shape), out.dtype))


class Interpreted(shared.MsDeformAttnTests):
    """The tests of every implementation, on kernels that run in the interpreter."""

    backend: str

    def call(self, *arguments, implementation):
        assert implementation == self.implementation
        return pallas_gpu.ms_deform_attn(*arguments, backend=self.backend, interpret=True)

    @pytest.fixture(autouse=True)
    def _interpret(self, monkeypatch):
        # `shared.run` is cached by the name of the implementation, and each class has its own.
        monkeypatch.setattr(shared, "ms_deform_attn", self.call)

    def test_sharded_over_the_batch(self):
        devices = jax.devices("cpu")
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        arguments = shared.make_inputs(SHAPES, batch=2 * len(devices), queries=3)
        spec = PartitionSpec("data")

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        def run(value, *points):
            call = functools.partial(self.call, implementation=self.implementation)
            return call(value, SHAPES, *points)

        out = run(*jax.device_put(arguments, NamedSharding(mesh, spec)))
        expected = shared.loop_reference(arguments[0], SHAPES, *arguments[1:])[0]
        np.testing.assert_allclose(out, expected, atol=1e-5)


class TestTriton(Interpreted):
    implementation, backend = "triton, interpreted", "triton"


@needs_mosaic
class TestMosaic(Interpreted):
    implementation, backend = "mosaic, interpreted", "mosaic"

    def test_remat(self):
        # The interpreter has an effect, which jax.checkpoint refuses; the kernels have none.
        arguments = shared.make_inputs(SHAPES)

        def total(*arguments):
            call = lambda v, s, a: pallas_gpu.ms_deform_attn(v, SHAPES, s, a, backend="mosaic")  # noqa: E731
            return jax.checkpoint(call)(*arguments).sum()

        with on_h200():
            text = str(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*arguments))
        assert "ms_deform_attn_backward" in text

    def test_more_points_than_one_step_takes(self):
        shapes = ((3, 3),)
        self.check(shapes, shared.make_inputs(shapes, batch=1, queries=3, heads=1, points=17))


@pytest.mark.parametrize("backend", BACKENDS)
class TestDeterministic:
    """The gradient of the values from sorted points."""

    def run(self, backend, shapes, arguments):
        @jit
        def run(*arguments):
            return output_and_gradients(
                lambda v, s, a: pallas_gpu.ms_deform_attn(
                    v, shapes, s, a, backend=backend, deterministic=True, interpret=True
                ),
                *arguments,
            )

        return run, run(*arguments)

    def test_agrees_with_the_loop_in_equal_bits(self, backend):
        value, locations, weights = shared.make_inputs(SHAPES, queries=13, width=5)
        locations[0, :, 0, 1] = (1 + 0.5) / 4  # many points of one pixel
        locations[1, 0] = np.nan
        locations[1, 1, 0] = np.inf
        run, found = self.run(backend, SHAPES, (value, locations, weights))
        shared.MsDeformAttnTests().compare(
            found, shared.loop_reference(value, SHAPES, locations, weights)
        )
        for first, second in zip(found, run(value, locations, weights), strict=True):
            np.testing.assert_array_equal(first, second)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_nothing_is_added_in_an_order_that_may_change(self, backend, deterministic):
        # In the interpreter all is in order, so that equal bits alone would prove little.
        def total(value, locations, weights):
            return pallas_gpu.ms_deform_attn(
                value, SHAPES, locations, weights, backend=backend, deterministic=deterministic
            ).sum()

        with on_h200():
            text = str(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*shared.make_inputs(SHAPES)))
        assert "ms_deform_attn_backward" in text
        assert "scatter-add" not in text
        assert ("atomic" in text) == (not deterministic)
        assert ("ms_deform_attn_segment_sum" in text) == deterministic


class TestLayout:
    """The quad rows, and the order of points, that the kernels get."""

    def test_a_row_holds_the_pixels_around_a_cell(self):
        value = np.arange(1, 7, dtype=np.float32).reshape(1, 6, 1, 1)
        table = pallas_gpu.quad_table(jnp.asarray(value), ((2, 3),))
        assert table.shape == (3 * 4, 4, 1)
        np.testing.assert_array_equal(table[0, :, 0], [0, 0, 0, 1])  # the upper left corner
        np.testing.assert_array_equal(table[5, :, 0], [1, 2, 4, 5])
        np.testing.assert_array_equal(table[11, :, 0], [6, 0, 0, 0])

    def test_rows_and_shares_give_the_samples(self):
        value, locations, weights = shared.make_inputs(SHAPES)
        factor, index = pallas_gpu.quad_points(locations, weights, SHAPES)
        rows = pallas_gpu.quad_table(jnp.asarray(value), SHAPES)[index]
        out = np.einsum("mck,mkcd->md", factor, rows)
        batch, queries, heads = weights.shape[:3]
        out = out.reshape(batch, heads, queries, -1).swapaxes(1, 2).reshape(batch, queries, -1)
        expected = shared.loop_reference(value, SHAPES, locations, weights)[0]
        np.testing.assert_allclose(out, expected, atol=1e-5)

    def test_no_location_leads_out_of_the_rows_of_its_level(self):
        bad = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e9, -0.3, 1.2, 0, 1], np.float32)
        locations = np.stack(np.meshgrid(bad, bad), axis=-1).reshape(1, -1, 1, 1, 1, 2)
        locations = np.broadcast_to(locations, (1, 100, 1, 2, 1, 2))
        factor, index = pallas_gpu.quad_points(locations, np.ones((1, 100, 1, 2, 1)), SHAPES)
        assert np.all(np.isfinite(factor))
        level0, level1 = np.asarray(index).T
        assert (level0.min(), level0.max()) == (0, 3 * 4 - 1)
        assert (level1.min(), level1.max()) == (3 * 4, 3 * 4 + 5 * 6 - 1)
        # Points outside go to rows near them, not all to one, where their additions would queue.
        outside = np.all(np.asarray(factor)[:, :, 0] == 0, axis=1)
        assert outside.sum() > 50 and len(np.unique(level0[outside])) > 6

    def test_sorted_points(self):
        rng = np.random.default_rng(0)
        index = rng.integers(0, 5, (6, 3)).astype(np.int32)
        factor = rng.uniform(0.1, 1, (6, 4, 3)).astype(np.float32)
        factor[2] = 0  # a query outside
        query, shares, starts = pallas_gpu.sorted_points(jnp.asarray(index), factor, 7)
        assert starts[-1] == 15 and starts.shape == (8,)
        for row in range(7):
            expected = [(m, *factor[m, :, k]) for m, k in np.argwhere(index == row) if m != 2]
            part = slice(starts[row], starts[row + 1])
            found = [(m, *share) for m, share in zip(query[part], shares[part], strict=True)]
            np.testing.assert_array_equal(np.array(found), np.array(expected))


class TestGuards:
    """Nothing that cannot run reaches a compiler, which might abort the process."""

    @pytest.mark.parametrize(
        ("capability", "version", "backend"),
        [
            ("8.0", "0.12.0", "triton"),
            ("8.9", "0.12.0", "triton"),
            ("9.0", "0.10.2", "triton"),
            ("9.0", "0.11.2", "mosaic"),
            ("9.0", "0.12.0.1", "mosaic"),
            ("10.0", "0.12.0.1", "mosaic"),
            ("12.0", "0.12.0.1", "triton"),
        ],
    )
    def test_backend_by_compute_capability(self, capability, version, backend):
        assert pallas_gpu.backend_for(capability, version) == backend

    @pytest.mark.parametrize("capability", [None, "7.5", "gfx942"])
    def test_no_backend(self, capability):
        with pytest.raises(NotImplementedError, match=rf"8\.0 or newer, not {capability!r}.*'xla'"):
            pallas_gpu.backend_for(capability)

    def test_mosaic_is_refused_where_it_would_abort(self, monkeypatch):
        a100 = types.SimpleNamespace(platform="gpu", device_kind="A100", compute_capability="8.0")
        monkeypatch.setattr(jax, "devices", lambda: [a100])
        monkeypatch.setattr(jax, "__version__", "0.12.0")
        value, *points = shared.make_inputs(SHAPES)
        with pytest.raises(NotImplementedError, match=r"'mosaic' needs a GPU .* 9\.0.*not 8\.0"):
            pallas_gpu.ms_deform_attn(value, SHAPES, *points, backend="mosaic")
        monkeypatch.setattr(jax, "__version__", "0.10.2")
        with pytest.raises(NotImplementedError, match=r"'mosaic' needs jax 0\.11.*not 0\.10\.2"):
            pallas_gpu.ms_deform_attn(value, SHAPES, *points, backend="mosaic", interpret=True)

    def test_a_cpu_is_refused(self, monkeypatch):
        cpu = jax.devices("cpu")[0]
        monkeypatch.setattr(jax, "devices", lambda: [cpu])
        value, *points = shared.make_inputs(SHAPES)
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU of compute capability"):
            pallas_gpu.ms_deform_attn(value, SHAPES, *points)

    @pytest.mark.parametrize(
        ("sizes", "dtype", "message"),
        [
            (dict(width=129), jnp.float32, "head width of 1 to 128, not 129"),
            (dict(width=8), jnp.float16, "float32 or bfloat16, not float16"),
            (dict(width=128, batch=2**20), jnp.float32, r"less than 2\*\*31 numbers"),
        ],
    )
    def test_limits(self, sizes, dtype, message):
        batch, width = sizes.get("batch", 1), sizes["width"]
        value = jax.ShapeDtypeStruct((batch, 26, 2, width), dtype)
        points = jax.ShapeDtypeStruct((batch, 3, 2, 2, 4), jnp.float32)
        locations = jax.ShapeDtypeStruct((*points.shape, 2), jnp.float32)
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(
                lambda *x: pallas_gpu.ms_deform_attn(x[0], SHAPES, *x[1:], backend="triton"),
                *(value, locations, points),
            )

    def test_unknown_backend(self):
        value, *points = shared.make_inputs(SHAPES)
        with pytest.raises(ValueError, match=r"interpret=True needs backend"):
            pallas_gpu.ms_deform_attn(value, SHAPES, *points, interpret=True)
        with pytest.raises(ValueError, match=r"unknown backend 'cuda'"):
            pallas_gpu.ms_deform_attn(value, SHAPES, *points, backend="cuda")


class TestAheadOfTime:
    """Compilation for GPUs that are not there."""

    def report(self, target="h200", **options):
        return operation.compile_for_gpu(OPERATION, target, "512x512", "pallas_gpu", **options)

    def ours(self, part):
        kernels = {k["name"]: k for k in part["kernels"] if k["name"].startswith("ms_deform_attn")}
        for kernel in kernels.values():
            assert kernel["spill_bytes"] == 0 and kernel["stack_bytes"] == 0, kernel
            # 512 threads of a multiprocessor or more, to hide the time that loads take.
            assert 0 < kernel["registers"] <= 128, kernel
        return set(kernels)

    # Without a GPU, XLA compiles a sort of its own in place of CUB's, slowly.
    @pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_h200(self, backend, deterministic):
        if what := missing():
            pytest.skip(f"not installed: {what}")
        report = self.report(target="h200", backend=backend, deterministic=deterministic)
        assert self.ours(report["forward"]) == {"ms_deform_attn_forward"}
        expected = {"ms_deform_attn_backward"}
        if deterministic:
            expected.add("ms_deform_attn_segment_sum")
        assert self.ours(report["backward"]) == expected
        # Arguments and results of 18 MB; the quad rows of the values and their gradient are 11 and
        # 23 MB, the shares of the corners and their gradient 8 MB each.
        assert report["backward"]["temp_bytes"] < 80e6

    @pytest.mark.parametrize(("target", "capability"), [("a100", r"8\.0"), ("l4", r"8\.9")])
    def test_mosaic_is_refused_where_it_would_abort(self, target, capability, monkeypatch):
        monkeypatch.setattr(pallas_gpu, "_has_mosaic", lambda _: True)
        with pytest.raises(NotImplementedError, match=rf"needs a GPU of .*not {capability}"):
            self.report(target=target, backend="mosaic")

    def test_unknown_names(self):
        with pytest.raises(ValueError, match=r"unknown target 'v100'; use one of a100"):
            self.report(target="v100")
        with pytest.raises(ValueError, match=r"unknown backend 'cuda'"):
            self.report(backend="cuda")

    def test_missing_packages_are_named(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "jax-cuda12-plugin" in missing()
        with pytest.raises(RuntimeError, match="pip install jax-cuda12-plugin"):
            self.report()


GPU = next((d for d in jax.devices() if d.platform == "gpu"), None)


@pytest.mark.skipif(GPU is None, reason="no NVIDIA GPU (or JAX_PLATFORMS=cuda,cpu is not set)")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
class TestOnDevice:
    """`-k on_device`: the kernels on a GPU, against the float64 loop and plain JAX."""

    TOLERANCES = (1e-5, 1e-4, 1e-4, 1e-4)  # of the largest entry; output, then gradients

    @pytest.fixture(autouse=True)
    def _supported(self, backend):
        best = pallas_gpu.backend_for(dispatch.compute_capability_of(GPU))
        if backend == "mosaic" != best:
            pytest.skip(f"the Mosaic GPU kernels need a GPU of 9.0 or 10.x, not {GPU}")

    def run(self, backend, deterministic, shapes, arguments):
        @jax.jit
        def run(*arguments):
            return output_and_gradients(
                lambda v, s, a: pallas_gpu.ms_deform_attn(
                    v, shapes, s, a, backend=backend, deterministic=deterministic
                ),
                *arguments,
            )

        return run(*jax.device_put(arguments, GPU))

    def compare(self, found, expected, tolerances):
        for name, a, b, tolerance in zip(
            shared.MsDeformAttnTests.NAMES, found, expected, tolerances, strict=True
        ):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("width", [8, 24, 32, 64, 128])
    def test_on_device_against_float64(self, backend, deterministic, width, dtype):
        shapes = ((3, 4), (7, 6), (16, 13))
        value, locations, weights = shared.make_inputs(
            shapes, queries=61, heads=3, width=width, points=4
        )
        locations[0, :20, 0] = (2 + 0.5) / 7  # on a pixel of level 1, and many on one
        locations[1, 0] = np.nan
        locations[1, 1, 1, :, 0] = np.inf
        value = jnp.asarray(value, dtype)
        found = self.run(backend, deterministic, shapes, (value, locations, weights))
        expected = shared.loop_reference(value, shapes, locations, weights)
        self.compare(found, expected, self.TOLERANCES if dtype == jnp.float32 else (1e-2,) * 4)

    def test_on_device_all_points_on_one_pixel(self, backend, deterministic):
        shapes = ((4, 4),)
        value, locations, weights = shared.make_inputs(shapes, queries=1000, width=32)
        locations[...] = (1 + 0.5) / 4
        found = self.run(backend, deterministic, shapes, (value, locations, weights))
        expected = shared.loop_reference(value, shapes, locations, weights)
        self.compare(found, expected, self.TOLERANCES)

    def test_on_device_real_shape(self, backend, deterministic):
        shape = CallShape("512", (512, 512))
        arguments = shared.make_inputs(
            shape.spatial_shapes,
            queries=shape.pixels,
            heads=8,
            width=32,
            points=4,
            low=-0.1,
            high=1.1,
        )
        run = functools.partial(self.run, backend, deterministic, shape.spatial_shapes, arguments)
        found = run()

        @jax.jit
        def plain(*arguments):
            return output_and_gradients(
                lambda v, s, a: ms_deform_attn_gather(v, shape.spatial_shapes, s, a), *arguments
            )

        self.compare(found, plain(*jax.device_put(arguments, GPU)), self.TOLERANCES)
        if deterministic:
            for _ in range(3):
                for first, again in zip(found, run(), strict=True):
                    np.testing.assert_array_equal(first, again)
