"""Multi-scale deformable attention: each implementation against a loop in float64."""

import functools
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oneformer_jax.configs import synthetic
from oneformer_jax.kernels.ms_deform_attn import IMPLEMENTATIONS, api, ms_deform_attn, reference
from oneformer_jax.kernels.ms_deform_attn.dense import ms_deform_attn_dense
from oneformer_jax.kernels.ms_deform_attn.reference import (
    ms_deform_attn_chunks,
    ms_deform_attn_gather,
)
from oneformer_jax.kernels.ms_deform_attn.shapes import PUBLISHED, SMALL_DEFAULT, CallShape
from tests.kernels.common import check_nothing_travels, cotangent, jit


def loop_reference(value, shapes, locations, weights):
    """The definition, point by point, in float64.

    Returns the output [B, Q, N*D] and the gradients of sum(output * cotangent(output.shape)) in
    value, locations and weights.
    """
    value, locations, weights = (np.asarray(x, np.float64) for x in (value, locations, weights))
    batch, _, heads, width = value.shape
    _, queries, _, levels, points, _ = locations.shape
    out = np.zeros((batch, queries, heads, width))
    grads = [np.zeros_like(x) for x in (value, locations, weights)]
    cot = cotangent((batch, queries, heads * width)).astype(np.float64)
    cot = cot.reshape(batch, queries, heads, width)
    starts = np.cumsum([0] + [h * w for h, w in shapes])
    for b, q, n, l, p in np.ndindex(batch, queries, heads, levels, points):
        h, w = shapes[l]
        x = locations[b, q, n, l, p, 0] * w - 0.5
        y = locations[b, q, n, l, p, 1] * h - 0.5
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        x0, y0 = math.floor(x), math.floor(y)
        a, g = weights[b, q, n, l, p], cot[b, q, n]
        for row, share_y, slope_y in ((y0, y0 + 1 - y, -1), (y0 + 1, y - y0, 1)):
            for column, share_x, slope_x in ((x0, x0 + 1 - x, -1), (x0 + 1, x - x0, 1)):
                if not (0 <= row < h and 0 <= column < w):
                    continue
                pixel = starts[l] + row * w + column
                v = value[b, pixel, n]
                out[b, q, n] += a * share_x * share_y * v
                grads[0][b, pixel, n] += a * share_x * share_y * g
                grads[1][b, q, n, l, p, 0] += a * slope_x * w * share_y * (v @ g)
                grads[1][b, q, n, l, p, 1] += a * share_x * slope_y * h * (v @ g)
                grads[2][b, q, n, l, p] += share_x * share_y * (v @ g)
    return out.reshape(batch, queries, -1), *grads


def make_inputs(
    shapes, *, batch=2, queries=5, heads=2, width=3, points=2, low=-0.4, high=1.4, seed=0
):
    """Random arguments; by default about half of the points lie outside of the maps."""
    rng = np.random.default_rng(seed)
    pixels = sum(h * w for h, w in shapes)
    value = rng.normal(size=(batch, pixels, heads, width)).astype(np.float32)
    locations = rng.uniform(low, high, (batch, queries, heads, len(shapes), points, 2))
    weights = rng.dirichlet(np.ones(len(shapes) * points), (batch, queries, heads))
    weights = weights.reshape(locations.shape[:-1]).astype(np.float32)
    return value, locations.astype(np.float32), weights


@functools.partial(jit, static_argnums=(0, 1))
def run(implementation, shapes, value, locations, weights):
    """Output and the three gradients."""
    out, pull_back = jax.vjp(
        lambda v, s, a: ms_deform_attn(v, shapes, s, a, implementation=implementation),
        value,
        locations,
        weights,
    )
    return out, *pull_back(jnp.asarray(cotangent(out.shape), out.dtype))


class MsDeformAttnTests:
    """Every implementation must pass these; a subclass names one."""

    implementation: str
    SHAPES = ((2, 3), (4, 5), (7, 6))
    NAMES = ("output", "d value", "d sampling_locations", "d attention_weights")

    def compare(self, found, expected, tolerance=1e-5):
        """Output and gradients; the tolerance is relative to the largest entry of each."""
        for name, a, b in zip(self.NAMES, found, expected, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            scale = max(1.0, np.abs(b).max())
            np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=name)

    def check(self, shapes, arguments):
        """Output and gradients against the loop."""
        self.compare(
            run(self.implementation, shapes, *arguments),
            loop_reference(arguments[0], shapes, *arguments[1:]),
        )

    def test_odd_sizes_and_points_outside(self):
        self.check(self.SHAPES, make_inputs(self.SHAPES))

    def test_single_level_single_image(self):
        self.check(((3, 4),), make_inputs(((3, 4),), batch=1))

    def test_one_pixel_maps_and_single_point(self):
        shapes = ((1, 1), (1, 5))
        self.check(shapes, make_inputs(shapes, points=1, heads=1))

    def test_every_point_out_of_range(self):
        for low, high in ((1.6, 9.0), (-9.0, -0.6)):
            arguments = make_inputs(self.SHAPES, low=low, high=high)
            for array in run(self.implementation, self.SHAPES, *arguments):
                assert not np.any(array)

    def test_exactly_on_pixels(self):
        # A power of two, so that the centres are exact in float32; borders are included. At a
        # centre the slope is that of the cell to the right and below.
        shapes = ((4, 8),)
        value, locations, weights = make_inputs(shapes, queries=32, heads=1)
        rows, columns = np.divmod(np.arange(32), 8)
        locations[..., 0] = ((columns + 0.5) / 8)[None, :, None, None, None]
        locations[..., 1] = ((rows + 0.5) / 4)[None, :, None, None, None]
        self.check(shapes, (value, locations, weights))
        weights[..., 0], weights[..., 1] = 1, 0
        out = run(self.implementation, shapes, value, locations, weights)[0]
        np.testing.assert_array_equal(out, value[:, :, 0])

    def test_all_points_on_one_pixel(self):
        # Every contribution to the value's gradient collides.
        shapes = ((4, 4),)
        value, locations, weights = make_inputs(shapes, queries=64)
        locations[...] = (1 + 0.5) / 4
        self.check(shapes, (value, locations, weights))

    def test_not_finite_locations_count_as_outside(self):
        value, locations, weights = make_inputs(self.SHAPES)
        locations[0, 0, :, :, :, 0] = np.nan
        locations[0, 1, :, :, 0, 1] = np.inf
        locations[1, 2, 0] = -np.inf
        locations[1, 3, 1, 2] = 3e38
        self.check(self.SHAPES, (value, locations, weights))

    def test_bfloat16_values(self):
        value, locations, weights = make_inputs(self.SHAPES)
        value = jnp.asarray(value, jnp.bfloat16)
        out, d_value, d_locations, d_weights = run(
            self.implementation, self.SHAPES, value, locations, weights
        )
        assert (out.dtype, d_value.dtype) == (jnp.bfloat16, jnp.bfloat16)
        assert (d_locations.dtype, d_weights.dtype) == (jnp.float32, jnp.float32)
        exact = loop_reference(value, self.SHAPES, locations, weights)[0]
        # Only the last rounding may be seen: half a unit of 8 significant bits.
        np.testing.assert_array_less(
            np.abs(np.asarray(out, np.float64) - exact), np.abs(exact) * 2**-8 + 1e-6
        )

    def test_bfloat16_weights_are_used_in_float32(self):
        value, locations, weights = make_inputs(((3, 4),), batch=1)
        half = jnp.asarray(weights, jnp.bfloat16)
        found = run(self.implementation, ((3, 4),), value, locations, half)
        expected = run(self.implementation, ((3, 4),), value, locations, half.astype(jnp.float32))
        assert found[3].dtype == jnp.bfloat16
        self.compare((*found[:3], expected[3]), expected)

    def test_bfloat16_value_gradient_is_summed_in_float32(self):
        # 512 contributions of 1/512: a running sum in bfloat16 would stop growing at 1/2.
        shapes, n = ((2, 2),), 512
        value = jnp.ones((1, 4, 1, 1), jnp.bfloat16)
        locations = jnp.full((1, n, 1, 1, 1, 2), 0.25)
        weights = jnp.full((1, n, 1, 1, 1), 1 / n)

        @jit
        def gradient(value):
            def total(value):
                out = ms_deform_attn(
                    value, shapes, locations, weights, implementation=self.implementation
                )
                return out.astype(jnp.float32).sum()

            return jax.grad(total)(value)

        np.testing.assert_allclose(np.asarray(gradient(value), np.float32).ravel(), [1, 0, 0, 0])

    def test_vmap(self):
        shapes = self.SHAPES[:2]
        sets = [make_inputs(shapes, seed=seed) for seed in range(2)]
        stacked = [jnp.stack(x) for x in zip(*sets, strict=True)]
        batched = jax.vmap(functools.partial(run, self.implementation, shapes))(*stacked)
        for i, arguments in enumerate(sets):
            self.compare(
                [x[i] for x in batched], loop_reference(arguments[0], shapes, *arguments[1:])
            )

    def test_remat(self):
        shapes = self.SHAPES[:2]
        arguments = make_inputs(shapes)

        @jit
        def run_rematerialised(*arguments):
            call = jax.checkpoint(
                lambda v, s, a: ms_deform_attn(v, shapes, s, a, implementation=self.implementation)
            )
            out, pull_back = jax.vjp(call, *arguments)
            return out, *pull_back(jnp.asarray(cotangent(out.shape)))

        self.compare(
            run_rematerialised(*arguments),
            loop_reference(arguments[0], shapes, *arguments[1:]),
        )

    def test_sharded_over_the_batch(self):
        devices = jax.devices()
        assert len(devices) > 1, "tests/conftest.py asks for several CPU devices"
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        shapes = self.SHAPES[:2]
        arguments = make_inputs(shapes, batch=len(devices))
        placed = jax.device_put(arguments, sharding)
        compiled = run.lower(self.implementation, shapes, *placed).compile()
        results = compiled(*placed)
        self.compare(results, loop_reference(arguments[0], shapes, *arguments[1:]))
        for name, array in zip(self.NAMES, results, strict=True):
            assert array.sharding.is_equivalent_to(sharding, array.ndim), name
        # Images are independent: no device needs anything of another one.
        check_nothing_travels(compiled)


class XlaTests(MsDeformAttnTests):
    """One of the functions among which "xla" chooses by size and platform."""

    function: object

    @pytest.fixture(autouse=True)
    def _function(self, monkeypatch):
        # `run` is cached by the name of the implementation, and each class has its own.
        monkeypatch.setattr(
            sys.modules[__name__],
            "ms_deform_attn",
            lambda *arguments, implementation: self.function(*arguments),
        )


class TestGather(XlaTests):
    implementation = "xla, gather"
    function = staticmethod(ms_deform_attn_gather)


class TestChunks(XlaTests):
    implementation = "xla, chunks"
    function = staticmethod(ms_deform_attn_chunks)

    @pytest.fixture(autouse=True)
    def _several_chunks(self, monkeypatch):
        """Chunks of 3 queries, in most tests with a last one that is not full."""

        def chunked(value, shapes, locations, weights):
            row_bytes = 4 * value.shape[0] * locations.shape[2] * 4 * locations.shape[4]
            monkeypatch.setattr(reference, "CHUNK_BYTES", 3 * row_bytes * value.shape[-1])
            return ms_deform_attn_chunks(value, shapes, locations, weights)

        self.function = chunked

    def test_rows_of_few_queries_are_in_memory_at_a_time(self):
        sizes = CallShape("512", (512, 512)).shapes(batch=1)
        arguments = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes.values()]
        shapes = CallShape("512", (512, 512)).spatial_shapes

        def run(*arguments):
            return ms_deform_attn_chunks(arguments[0], shapes, *arguments[1:])

        with_gradients = jax.jit(lambda *a: jax.vjp(run, *a)[1](run(*a)))
        memory = with_gradients.lower(*arguments).compile().memory_analysis()
        # All rows of the three levels are 264 MB.
        assert memory.temp_size_in_bytes < 60e6


class TestDense(XlaTests):
    implementation = "xla, dense"
    function = staticmethod(ms_deform_attn_dense)

    def test_no_rows_are_gathered_or_scattered(self):
        value, locations, weights = make_inputs(self.SHAPES)

        def total(value):
            return ms_deform_attn_dense(value, self.SHAPES, locations, weights).sum()

        text = str(jax.make_jaxpr(jax.grad(total))(value))
        assert "gather" not in text and "scatter" not in text


class TestChoice:
    """The rule by size, and the door's refusals."""

    @pytest.fixture
    def arguments(self):
        return make_inputs(((2, 3), (4, 5)))

    def chosen(self, monkeypatch, shape: CallShape, implementation):
        calls = []
        for name in api.XLA_FORMS:
            monkeypatch.setitem(api.XLA_FORMS, name, lambda *_, name=name: calls.append(name))
        sizes = shape.shapes(batch=1)
        ms_deform_attn(
            jax.ShapeDtypeStruct(sizes["value"], jnp.float32),
            shape.spatial_shapes,
            jax.ShapeDtypeStruct(sizes["sampling_locations"], jnp.float32),
            jax.ShapeDtypeStruct(sizes["attention_weights"], jnp.float32),
            implementation=implementation,
        )
        return calls

    @pytest.mark.parametrize("implementation", ["auto", "xla"])
    @pytest.mark.parametrize(("platform", "large"), [("cpu", "chunks"), ("tpu", "gather")])
    def test_default_goes_by_size_and_platform(self, monkeypatch, implementation, platform, large):
        monkeypatch.setattr(api.dispatch, "platform", lambda: platform)
        assert self.chosen(monkeypatch, SMALL_DEFAULT, implementation) == ["dense"]
        for shape in PUBLISHED:
            assert self.chosen(monkeypatch, shape, implementation) == [large], shape.name

    def test_the_platform_is_that_of_the_mesh_that_is_traced_for(self):
        assert api.dispatch.platform() == "cpu"
        assert api.dispatch.compute_capability() is None
        for platform, kind, capability in (
            ("tpu", "TPU v5 lite", None),
            ("gpu", "NVIDIA H100 80GB HBM3", "9.0"),
            ("gpu", "NVIDIA A100-SXM4-40GB", "8.0"),
            ("gpu", "a GPU of another maker", None),
        ):
            device = SimpleNamespace(platform=platform, device_kind=kind)
            mesh = SimpleNamespace(abstract_device=device)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax.sharding, "get_abstract_mesh", lambda mesh=mesh: mesh)
                assert api.dispatch.platform() == platform
                assert api.dispatch.device_kind() == kind
                assert api.dispatch.compute_capability() == capability

    @pytest.mark.parametrize("shape", [SMALL_DEFAULT, *PUBLISHED], ids=lambda s: s.name)
    @pytest.mark.parametrize(
        "function", [ms_deform_attn_gather, ms_deform_attn_dense, ms_deform_attn_chunks]
    )
    def test_real_shapes_trace(self, shape, function):
        sizes = shape.shapes(batch=2)
        out = jax.eval_shape(
            lambda v, s, a: function(v, shape.spatial_shapes, s, a),
            jax.ShapeDtypeStruct(sizes["value"], jnp.bfloat16),
            jax.ShapeDtypeStruct(sizes["sampling_locations"], jnp.float32),
            jax.ShapeDtypeStruct(sizes["attention_weights"], jnp.float32),
        )
        assert out.shape == (2, shape.pixels, shape.heads * shape.head_dim)
        assert out.dtype == jnp.bfloat16

    def test_small_default_is_that_of_the_config(self):
        c = synthetic.get_config()
        assert SMALL_DEFAULT.image_size == c.data.crop_size
        assert SMALL_DEFAULT.heads == c.model.num_heads
        assert SMALL_DEFAULT.heads * SMALL_DEFAULT.head_dim == c.model.hidden_dim
        assert SMALL_DEFAULT.points == c.model.encoder_points

    def test_call_shape_refuses_sizes_off_the_stride(self):
        with pytest.raises(ValueError, match=r"odd.*multiples of 32"):
            CallShape("odd", (100, 64))

    def test_pixels_of_a_known_size(self):
        shape = CallShape("512", (512, 512))
        assert shape.spatial_shapes == ((16, 16), (32, 32), (64, 64))
        assert shape.pixels == 5376

    def test_unknown_implementation(self, arguments):
        value, locations, weights = arguments
        with pytest.raises(ValueError, match=r"'cuda'.*xla, pallas_tpu, pallas_gpu"):
            ms_deform_attn(value, ((2, 3), (4, 5)), locations, weights, implementation="cuda")

    @pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "xla"])
    def test_a_kernel_on_another_device_is_refused(self, arguments, name):
        value, locations, weights = arguments
        with pytest.raises(NotImplementedError, match=name):
            ms_deform_attn(value, ((2, 3), (4, 5)), locations, weights, implementation=name)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(shapes=((2, 3), (4, 4))), r"value has 26 pixels.*add up to 22"),
            (dict(shapes=((26, 1),)), r"sampling_locations must be .*1 spatial_shapes.*got"),
            (dict(shapes=((2, 3), (4.0, 5))), r"spatial_shapes must be static pairs"),
            (dict(shapes=((2, 3), (4, 5, 1))), r"spatial_shapes must be static pairs"),
            (dict(shapes=()), r"spatial_shapes must hold positive"),
            (dict(shapes=((2, 3), (0, 5))), r"spatial_shapes must hold positive"),
            (dict(value=lambda x: x[0]), r"value must have 4 axes"),
            (dict(value=lambda x: x[:1]), r"sampling_locations must be \(1, 5"),
            (dict(value=lambda x: x[:, :, :1]), r"sampling_locations must be \(2, 5, 1"),
            (dict(value=lambda x: x.astype(np.float16)), r"value must be float32 or bfloat16.*16"),
            (dict(locations=lambda x: x[..., 0]), r"sampling_locations must have 6 axes"),
            (
                dict(locations=lambda x: x[..., :1]),
                r"sampling_locations must be \(2, 5, 2, 2, 2, 2",
            ),
            (
                dict(locations=lambda x: jnp.asarray(x, jnp.bfloat16)),
                r"sampling_locations must be float32, got bfloat16",
            ),
            (dict(weights=lambda x: x[:, :4]), r"attention_weights must be \(2, 5.*got \(2, 4"),
            (dict(weights=lambda x: x.astype(np.int32)), r"attention_weights must be.*int32"),
        ],
    )
    def test_arguments_that_do_not_fit(self, arguments, change, message):
        value, locations, weights = arguments
        keep = lambda x: x  # noqa: E731
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(
                change.get("value", keep)(value),
                change.get("shapes", ((2, 3), (4, 5))),
                change.get("locations", keep)(locations),
                change.get("weights", keep)(weights),
            )


class TestMesh:
    """The api splits the batch over a mesh, given or set, for whatever does not split itself."""

    SHAPES = ((2, 3), (4, 5))

    @pytest.fixture(autouse=True)
    def local_batches(self, monkeypatch):
        """The batch sizes that the implementation sees."""
        seen = []

        def record(value, *others):
            seen.append(value.shape[0])
            return ms_deform_attn_gather(value, *others)

        monkeypatch.setattr(api, "load", lambda name: record)
        return seen

    def run(self, batch, **options):
        value, locations, weights = make_inputs(self.SHAPES, batch=batch)
        out = jax.jit(lambda v, s, a: ms_deform_attn(v, self.SHAPES, s, a, **options))(
            value, locations, weights
        )
        expected = ms_deform_attn_gather(value, self.SHAPES, locations, weights)
        np.testing.assert_allclose(out, expected, atol=1e-6)

    def test_given(self, mesh8, local_batches):
        self.run(16, mesh=mesh8)
        assert local_batches == [2]

    def test_set_for_a_kernel(self, mesh8, local_batches):
        with jax.set_mesh(mesh8):
            self.run(8, implementation="pallas_tpu")
            self.run(3, implementation="xla")  # XLA splits what it can by itself
        assert local_batches == [1, 3]

    def test_within_a_shard_map(self, mesh8, local_batches):
        value, locations, weights = make_inputs(self.SHAPES, batch=8)
        spec = PartitionSpec(("data", "fsdp"))

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=mesh8, in_specs=spec, out_specs=spec, check_vma=False
        )
        def call(*arguments):
            value, locations, weights = arguments
            return ms_deform_attn(
                value, self.SHAPES, locations, weights, implementation="pallas_tpu"
            )

        call(value, locations, weights)
        assert local_batches == [1]

    def test_half_manual(self, local_batches):
        mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        value, locations, weights = make_inputs(self.SHAPES, batch=8)
        spec = PartitionSpec("data")

        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            axis_names={"data"},
            check_vma=False,
        )
        def call(value, locations, weights):
            return ms_deform_attn(
                value, self.SHAPES, locations, weights, implementation="pallas_tpu"
            )

        out = call(value, locations, weights)
        assert local_batches == [1]
        expected = ms_deform_attn_gather(value, self.SHAPES, locations, weights)
        np.testing.assert_allclose(out, expected, atol=1e-6)

    def test_batch_that_does_not_divide(self, mesh8):
        with pytest.raises(ValueError, match=r"a batch of 6 .*8 devices \(mesh axes data"):
            self.run(6, mesh=mesh8)
