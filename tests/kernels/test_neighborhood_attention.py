"""Neighbourhood attention: each implementation against the rule in loops, in float64."""

import functools
import itertools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oneformer_jax.kernels.neighborhood_attention import (
    IMPLEMENTATIONS,
    api,
    neighborhood_attention,
)
from oneformer_jax.kernels.neighborhood_attention.reference import Axis
from oneformer_jax.kernels.neighborhood_attention.shapes import (
    HEAD_DIM,
    HEADS,
    PUBLISHED,
)
from oneformer_jax.models.backbones.dinat import PUBLISHED as PUBLISHED_DINATS
from tests.kernels.common import check_nothing_travels, cotangent, jit

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def window(position: int, length: int, kernel_size: int, dilation: int) -> list[int]:
    """Positions seen along one axis: the nearest of the residue class, as many at the borders."""
    kin = [p for p in range(length) if (p - position) % dilation == 0]
    start = kin.index(position) - kernel_size // 2
    start = min(max(start, 0), len(kin) - kernel_size)
    return kin[start : start + kernel_size]


def loop_reference(query, key, value, rpb, kernel_size, dilation):
    """The rule, pixel by pixel, in float64.

    Returns the output [B, H, W, N, D] and the gradients of sum(output * cotangent(output.shape)).
    """
    arrays = [np.asarray(x, np.float64) for x in (query, key, value, rpb)]
    query, key, value, rpb = arrays
    _, height, width, _, channels = query.shape
    scale = channels**-0.5
    out, cot = np.zeros(query.shape), cotangent(query.shape).astype(np.float64)
    grads = [np.zeros_like(x) for x in arrays]
    for r, c in np.ndindex(height, width):
        rows = np.array(window(r, height, kernel_size, dilation))
        columns = np.array(window(c, width, kernel_size, dilation))
        here = np.ix_(range(len(query)), rows, columns)
        bias = np.ix_(
            range(len(rpb)),
            (rows - r) // dilation + kernel_size - 1,
            (columns - c) // dilation + kernel_size - 1,
        )
        q, g = query[:, r, c], cot[:, r, c]  # [B, N, D]
        logits = np.einsum("bnd,bijnd->bnij", q * scale, key[here]) + rpb[bias]
        shares = np.exp(logits - logits.max((2, 3), keepdims=True))
        shares /= shares.sum((2, 3), keepdims=True)
        out[:, r, c] = np.einsum("bnij,bijnd->bnd", shares, value[here])
        d_shares = np.einsum("bnd,bijnd->bnij", g, value[here])
        d_logits = shares * (d_shares - (shares * d_shares).sum((2, 3), keepdims=True))
        grads[0][:, r, c] = scale * np.einsum("bnij,bijnd->bnd", d_logits, key[here])
        grads[1][here] += scale * np.einsum("bnij,bnd->bijnd", d_logits, q)
        grads[2][here] += np.einsum("bnij,bnd->bijnd", shares, g)
        grads[3][bias] += d_logits.sum(0)
    return out, *grads


def make_inputs(height, width, kernel_size, *, batch=1, heads=2, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, height, width, heads, channels)] * 3
    shapes.append((heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.partial(jit, static_argnums=(0, 1, 2))
def run(implementation, kernel_size, dilation, *arrays):
    """Output and the four gradients."""
    out, pull_back = jax.vjp(
        functools.partial(
            neighborhood_attention,
            kernel_size=kernel_size,
            dilation=dilation,
            implementation=implementation,
        ),
        *arrays,
    )
    return out, *pull_back(jnp.asarray(cotangent(out.shape), out.dtype))


class NeighborhoodAttentionTests:
    """Every implementation must pass these; a subclass names one."""

    implementation: str
    NAMES = ("output", "d query", "d key", "d value", "d rpb")

    def compare(self, found, expected, tolerances=(1e-5, 1e-4)):
        """Output and gradients; the tolerances are relative to the largest entry of each."""
        for name, a, b in zip(self.NAMES, found, expected, strict=True):
            tolerance = tolerances[name != "output"]
            np.testing.assert_allclose(
                np.asarray(a, np.float64),
                np.asarray(b, np.float64),
                rtol=0,
                atol=tolerance * np.abs(b).max(),
                err_msg=name,
            )

    def check(self, arrays, kernel_size, dilation):
        found = run(self.implementation, kernel_size, dilation, *arrays)
        self.compare(found, loop_reference(*arrays, kernel_size, dilation))

    @pytest.mark.parametrize(
        ("height", "width", "kernel_size", "dilation"),
        [
            (3, 3, 3, 1),  # everything sees everything
            (15, 45, 3, 1),  # several tiles along both axes
            (19, 71, 3, 2),  # and residue classes of unequal size
            (10, 15, 5, 2),  # as small as can be, along one axis
            (7, 41, 7, 1),
            (22, 23, 11, 2),
        ],
    )
    def test_equals_the_rule_in_loops(self, height, width, kernel_size, dilation):
        self.check(make_inputs(height, width, kernel_size), kernel_size, dilation)

    @pytest.mark.parametrize(("heads", "channels"), [(5, 32), (1, 40), (3, 64)])
    def test_heads_and_widths(self, heads, channels):
        arrays = make_inputs(6, 9, 3, batch=2, heads=heads, channels=channels)
        self.check(arrays, 3, 2)

    def test_bfloat16(self):
        *qkv, rpb = make_inputs(6, 9, 3, channels=32)
        qkv = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
        found = run(self.implementation, 3, 1, *qkv, rpb)
        assert [x.dtype for x in found] == [jnp.bfloat16] * 4 + [jnp.float32]
        self.compare(found, loop_reference(*qkv, rpb, 3, 1), tolerances=(1e-2, 1e-2))

    def test_bfloat16_keeps_a_float32_softmax(self):
        # Logits of about 300 apart by 1: in bfloat16, whose step there is 2, they would be equal.
        query = np.ones((1, 3, 3, 1, 4))
        value = np.arange(9.0).reshape(1, 3, 3, 1, 1) * np.ones(4)
        rpb = 300 + np.arange(25.0).reshape(1, 5, 5)
        qkv = [jnp.asarray(x, jnp.bfloat16) for x in (query, query, value)]
        found = run(self.implementation, 3, 1, *qkv, rpb.astype(np.float32))[0]
        exact = loop_reference(query, query, value, rpb, 3, 1)[0]
        np.testing.assert_allclose(found.astype(np.float32), exact, atol=0.05)

    def test_bfloat16_bias(self):
        arrays = make_inputs(3, 4, 3)
        half = jnp.asarray(arrays[3], jnp.bfloat16)
        found = run(self.implementation, 3, 1, *arrays[:3], half)
        expected = run(self.implementation, 3, 1, *arrays[:3], half.astype(jnp.float32))
        assert found[4].dtype == jnp.bfloat16
        self.compare(found[:4] + expected[4:], expected)

    def test_vmap(self):
        sets = [make_inputs(6, 9, 3, seed=seed) for seed in range(2)]
        stacked = [jnp.stack(x) for x in zip(*sets, strict=True)]
        batched = jax.vmap(functools.partial(run, self.implementation, 3, 2))(*stacked)
        for i, arrays in enumerate(sets):
            self.compare([x[i] for x in batched], loop_reference(*arrays, 3, 2))

    def test_remat(self):
        arrays = make_inputs(6, 9, 3)

        @jit
        def run_rematerialised(*arrays):
            call = jax.checkpoint(
                functools.partial(
                    neighborhood_attention,
                    kernel_size=3,
                    dilation=2,
                    implementation=self.implementation,
                )
            )
            out, pull_back = jax.vjp(call, *arrays)
            return out, *pull_back(jnp.asarray(cotangent(out.shape)))

        self.compare(run_rematerialised(*arrays), loop_reference(*arrays, 3, 2))

    mesh_is_given = False

    def test_sharded_over_the_batch(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        arrays = make_inputs(3, 4, 3, batch=8)
        placed = [*jax.device_put(arrays[:3], split), jax.device_put(arrays[3], whole)]

        @jit
        def run(*arrays):
            out, pull_back = jax.vjp(
                functools.partial(
                    neighborhood_attention,
                    kernel_size=3,
                    implementation=self.implementation,
                    mesh=mesh if self.mesh_is_given else None,
                ),
                *arrays,
            )
            return out, *pull_back(jnp.asarray(cotangent(out.shape)))

        compiled = run.lower(*placed).compile()
        results = compiled(*placed)
        self.compare(results, loop_reference(*arrays, 3, 1))
        for name, array in zip(self.NAMES[:4], results[:4], strict=True):
            assert array.sharding.is_equivalent_to(split, array.ndim), name
        # Images are independent; only the gradient of the bias is added up.
        check_nothing_travels(compiled, allowed=["all-reduce"])


# Height, width, kernel, dilation, batch, heads, channels. The first few once ended the process.
SWEEP = [
    (12, 16, 3, 2, 2, 4, 8),
    (12, 16, 3, 2, 3, 4, 32),
    (18, 24, 3, 3, 2, 4, 8),
    (24, 32, 3, 2, 2, 4, 8),
]
for i, (kernel_size, dilation) in enumerate(itertools.product((3, 5, 7), (1, 2, 3))):
    edge, others = kernel_size * dilation, (1 + i % 3, (4, 1, 6, 3)[i % 4], 8)
    SWEEP.append((edge + 1, edge + 4, kernel_size, dilation, *others))
    SWEEP.append((2 * edge + 1, edge + 9, kernel_size, dilation, *others))


def sweep() -> None:
    """Checks the default implementation in all cases; prints each one before it runs."""
    for case in SWEEP:
        print(*case, flush=True)
        height, width, kernel_size, dilation, batch, heads, channels = case
        arrays = make_inputs(
            height, width, kernel_size, batch=batch, heads=heads, channels=channels
        )
        found = run("auto", kernel_size, dilation, *arrays)
        expected = loop_reference(*arrays, kernel_size, dilation)
        NeighborhoodAttentionTests().compare(found, expected)


def test_no_batch_kernel_or_dilation_ends_the_process():
    """In a process of its own: XLA's failed checks are signals, which end pytest itself."""
    code = "from tests.kernels.test_neighborhood_attention import sweep; sweep()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cases = done.stdout.splitlines()
    assert done.returncode == 0, f"in case {cases[-1:]}: {done.stderr[-3000:]}"
    assert len(cases) == len(SWEEP)


class TestXla(NeighborhoodAttentionTests):
    implementation = "xla"

    @pytest.mark.parametrize(
        ("side", "dilation"), [(160, 1), (220, 20)], ids=["tiles", "residue classes"]
    )
    def test_memory_is_a_few_maps(self, side, dilation):
        """Stage 1 of DiNAT-L at 640 pixels: k * k gathered keys alone would be 121 maps."""
        shape = jax.ShapeDtypeStruct((1, side, side, 6, 32), jnp.float32)
        rpb = jax.ShapeDtypeStruct((6, 21, 21), jnp.float32)

        def forward(*arrays):
            return neighborhood_attention(
                *arrays, kernel_size=11, dilation=dilation, implementation="xla"
            )

        def gradients(*arrays):
            return jax.grad(lambda *a: jnp.sum(jnp.square(forward(*a))), range(4))(*arrays)

        of_map = 4 * side * side * 6 * 32
        for function, maps in ((forward, 8), (gradients, 12)):
            compiled = jax.jit(function).lower(shape, shape, shape, rpb).compile()
            assert compiled.memory_analysis().temp_size_in_bytes < maps * of_map
            assert len(compiled.as_text()) < 2e6  # no mask or index of the map's size within

    def test_every_cut_keeps_every_window(self):
        """Axis alone, for all lengths: its masks hold the rule's positions, seen from its tile."""
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
                    seen = first + np.flatnonzero(mask[residue, tile, place])
                    seen = seen * dilation + residue
                    assert seen.tolist() == window(position, length, kernel_size, dilation)
        assert cut_up > 200


class TestDoor:
    """The default, the mesh, and what is refused."""

    @pytest.fixture
    def arrays(self):
        return make_inputs(5, 9, 3)

    def test_nothing_but_xla_is_a_default(self, arrays, monkeypatch):
        chosen = []
        monkeypatch.setattr(api, "load", lambda name: chosen.append(name) or (lambda *a, **k: a[0]))
        for backend in ("cpu", "tpu", "gpu"):
            monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
            neighborhood_attention(*arrays, kernel_size=3)
        assert chosen == ["xla"] * 3

    def test_mesh_of_the_context(self, mesh8, monkeypatch):
        batches = []

        def record(query, *others, **options):
            batches.append(query.shape[0])
            return query

        monkeypatch.setattr(api, "load", lambda name: record)
        arrays = make_inputs(3, 4, 3, batch=16)
        for implementation in IMPLEMENTATIONS:
            call = functools.partial(
                neighborhood_attention, kernel_size=3, implementation=implementation
            )
            with jax.set_mesh(mesh8):
                jax.jit(call)(*arrays)
        assert batches == [16, 2]  # XLA splits what it can by itself

    def test_a_batch_that_does_not_divide(self, mesh8):
        arrays = make_inputs(3, 4, 3, batch=6)
        with pytest.raises(ValueError, match=r"query has a batch of 6 .*8 devices \(mesh axes da"):
            neighborhood_attention(*arrays, kernel_size=3, mesh=mesh8)

    def test_a_kernel_on_another_device(self, arrays):
        with pytest.raises(NotImplementedError, match="'pallas_tpu' runs on TPUs"):
            neighborhood_attention(*arrays, kernel_size=3, implementation="pallas_tpu")

    def test_unknown_implementation(self, arrays):
        with pytest.raises(ValueError, match=r"'pallas_gpu'; use one of xla, pallas_tpu, or auto"):
            neighborhood_attention(*arrays, kernel_size=3, implementation="pallas_gpu")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(kernel_size=4), "kernel_size must be odd, got 4"),
            (dict(kernel_size=3.0), r"kernel_size must be a positive integer, got 3\.0"),
            (dict(dilation=0), "dilation must be a positive integer, got 0"),
            (dict(dilation=2), r"query is a map of 5 x 9 .*of 3 pixels.* of 2: pad its sides to 6"),
            (dict(query=lambda x: x[0]), r"query must have 5 axes .*got shape \(5, 9, 2, 4\)"),
            (dict(key=lambda x: x[:, :4]), r"key must be .*\(1, 5, 9, 2, 4\).*\(1, 4, 9, 2, 4\)"),
            (dict(value=lambda x: jnp.asarray(x, "bfloat16")), "value must be float32.*bfloat16"),
            (dict(query=lambda x: x.astype(np.float16)), "query must be float32 or bf.*float16"),
            (dict(rpb=lambda x: x[:, 1:]), r"rpb must be \(2, 5, 5\) .*got \(2, 4, 5\)"),
            (dict(rpb=lambda x: x.astype(np.int32)), "rpb must be float32 or bfloat16, got int32"),
        ],
    )
    def test_arguments_that_do_not_fit(self, arrays, options, message):
        for i, name in enumerate(("query", "key", "value", "rpb")):
            arrays[i] = options.pop(name, lambda x: x)(arrays[i])
        with pytest.raises(ValueError, match=message):
            neighborhood_attention(*arrays, **(dict(kernel_size=3) | options))

    def test_real_shapes_are_those_of_the_backbone(self):
        config = PUBLISHED_DINATS["dinat_large"]
        assert config.num_heads == HEADS
        assert {c // n for c, n in zip(config.channels, HEADS, strict=True)} == {HEAD_DIM}

    @pytest.mark.parametrize("shape", PUBLISHED, ids=lambda shape: shape.name)
    def test_real_shapes_trace(self, shape):
        for call in shape.calls():
            arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in call.shapes(batch=2)]
            out = jax.eval_shape(
                functools.partial(
                    neighborhood_attention, kernel_size=call.kernel_size, dilation=call.dilation
                ),
                *arrays,
            )
            assert (out.shape, out.dtype) == (arrays[0].shape, jnp.bfloat16)
