"""Loops over layers give what the layers give one after the other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oneformer_jax.kernels import dispatch
from oneformer_jax.kernels.recompute import recompute
from oneformer_jax.models import backbones
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.stack import Stack, find_loop, run
from oneformer_jax.train import fsdp


class Layer(nnx.Module):
    """Affine map and running mean; `shift` makes it another kind of layer."""

    def __init__(self, seed: int, shift: int = 0, width: int = 4):
        rng = np.random.default_rng(seed)
        self.shift = shift
        self.kernel = nnx.Param(jnp.asarray(rng.normal(size=(width, width)), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(width))

    def __call__(self, x, scale, update=False):
        if update:
            self.mean[...] = 0.5 * self.mean[...] + x.mean(0)
        y = jnp.roll(jnp.tanh(x @ self.kernel[...]), self.shift, axis=-1)
        return x + scale * y


SHIFTS = (2, 0, 1, 0, 1, 0, 1, 3)  # a loop of three rounds of two layers, from the second on
X = np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32)
SCALES = np.linspace(0.1, 1, len(SHIFTS)).astype(np.float32)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("", (0, 0, 0)),
        ("a", (0, 0, 0)),
        ("abc", (0, 0, 0)),
        ("aa", (0, 1, 2)),
        ("abbbb", (1, 1, 4)),
        ("ababab", (0, 2, 3)),
        ("cabababd", (1, 2, 3)),
        ("abcabcabc", (0, 3, 3)),
        ("abcaabcaab", (0, 4, 2)),  # DiNAT's dilations end like this
        ("aabb", (0, 1, 2)),
    ],
)
def test_where_a_sequence_repeats(kinds, expected):
    assert find_loop(kinds) == expected


def outcome(scan, *, remat=False, gather=None, jit=True):
    """Result, outputs, statistics and gradients of two stacks of unequal layers."""
    stacks = []
    for seed in (0, 100):
        stack = Stack((Layer(seed + i, s) for i, s in enumerate(SHIFTS)), remat=remat, scan=scan)
        stack.gather = gather
        stacks.append(stack)
    graphdef, params, stats = nnx.split(tuple(stacks), nnx.Param, ...)
    stats = nnx.to_pure_dict(stats)

    def step(x, scale, first, second):
        y = second(first(x, scale, update=True), scale)
        return y, (y.sum(), first.shift)

    def loss(params):
        merged = nnx.merge(graphdef, params, stats)
        x, outputs = run(step, jnp.asarray(X), *merged, items=SCALES, updates=True)
        kept = [o for o, _ in outputs], nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))
        return (x**2).mean() + sum(o for o, _ in outputs), (x, *kept)

    function = jax.value_and_grad(loss, has_aux=True)
    return (jax.jit(function) if jit else function)(nnx.to_pure_dict(params))


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("remat", [False, True])
def test_a_loop_equals_its_layers(remat):
    found, expected = outcome(True, remat=remat), outcome(False)
    assert_close(found, expected)
    (_, (_, outputs, stats)), gradients = found
    assert len(outputs) == len(SHIFTS)
    for i in range(len(SHIFTS)):
        assert np.any(stats[0][i]["mean"] != 0)
        assert np.any(gradients[1][i]["kernel"] != 0)


def test_a_repeated_layer_is_traced_once():
    def products(scan):
        stack = Stack((Layer(i, s) for i, s in enumerate(SHIFTS)), scan=scan)
        graphdef, state = nnx.split(stack)

        def apply(state):
            layers = nnx.merge(graphdef, state)
            return run(lambda x, s, layer: (layer(x, s), None), X, layers, items=SCALES)[0]

        return str(jax.make_jaxpr(apply)(state)).count("dot_general")

    assert products(False) == 8
    assert products(True) == 4


def test_layers_of_other_shapes_do_not_share_a_loop():
    stack = Stack([Layer(0), Layer(1), Layer(2, width=4)], scan=True)
    stack[1].kernel[...] = jnp.eye(4)
    stack[2] = Layer(2, width=1)
    x, _ = run(
        lambda x, _, layer: (layer(x[..., : layer.kernel.shape[0]], 1.0), None),
        jnp.asarray(X),
        stack,
    )
    assert x.shape == (3, 1)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_loops_are_for_accelerators_unless_asked_for(platform, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: platform)

    def loops(scan):
        stack = Stack((Layer(i) for i in range(4)), scan=scan)
        call = lambda x: run(lambda x, _, layer: (layer(x, 1.0), None), x, stack)[0]  # noqa: E731
        return str(jax.make_jaxpr(call)(jnp.ones((2, 4)))).count("scan[")

    assert [loops(scan) for scan in (True, False)] == [1, 0]
    assert loops("auto") == (platform != "cpu")


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_are_gathered_layer_by_layer(scan):
    seen = []

    class Gather:
        keeps = staticmethod(fsdp.keeps_all_but_gathered)

        def __call__(self, index, params):
            seen.append((index, jax.tree.map(jnp.shape, params)))
            return params

    assert_close(outcome(scan, gather=Gather()), outcome(False))
    layers = {index for index, _ in seen}
    assert layers == (set(range(8)) if not scan else {0, 1, 2, 7})
    assert all(shapes == {"kernel": (4, 4)} for _, shapes in seen)


BACKBONES = {
    "swin": dict(
        embed_dim=8, depths=(1, 1, 5, 1), num_heads=(2, 2, 4, 4), window_size=4, drop_path_rate=0.2
    ),
    "convnext": dict(dims=(8, 8, 8, 8), depths=(1, 1, 3, 1), drop_path_rate=0.2),
    "dinat": dict(
        embed_dim=8,
        depths=(1, 1, 5, 1),
        num_heads=(2, 2, 4, 4),
        kernel_size=3,
        dilations=((1,), (1,), (1, 2, 1, 2, 3), (1,)),
        drop_path_rate=0.2,
    ),
    "internimage": dict(
        embed_dim=8, depths=(1, 1, 5, 1), groups=(2, 2, 4, 4), norm_after=(1, 3), drop_path_rate=0.2
    ),
    "resnet": dict(depths=(1, 1, 4, 1), stem_width=4, norm="batch"),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_backbones(kind):
    """Equal maps, in training, from equal parameters; fewer products in the program."""
    config = backbones.backbone_config(kind, **BACKBONES[kind])
    image = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    outputs, products = [], []
    for scan in (False, True):
        model = backbones.build_backbone(
            config, rngs=ParamKeys(0), execution=Execution(scan_layers=scan)
        )
        graphdef, state = nnx.split(model)

        def apply(state, image, graphdef=graphdef):
            model = nnx.merge(graphdef, state)
            maps = model(image, key=jax.random.key(1), train=True)
            return maps, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        lowered = jax.jit(apply).lower(state, image)
        outputs.append(lowered.compile()(state, image))
        text = lowered.as_text()
        products.append(len(re.findall(r"stablehlo\.(?:convolution|dot_general)", text)))
    assert_close(*outputs)
    assert products[1] < products[0]


class Wide(nnx.Module):
    """Two products with a wide array between them, which is read in a recomputed part."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.up = nnx.Param(jnp.asarray(rng.normal(size=(4, 32)), jnp.float32))
        self.down = nnx.Param(jnp.asarray(rng.normal(size=(32, 4)), jnp.float32))

    def __call__(self, x):
        hidden = recompute(lambda x, up: jnp.tanh(jnp.sin(x @ up)))(x, self.up[...])
        return x + jnp.cos(hidden) @ self.down[...]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_what_the_forward_pass_keeps(remat, scan):
    """Neither gathered parameters nor, with `remat`, activations; and what `recompute` hides."""
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    class Gather:
        keeps = staticmethod(fsdp.keeps_all_but_gathered)

        def __call__(self, index, params):
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), params)

    stack = Stack((Wide(i) for i in range(3)), remat=remat, scan=scan)
    stack.gather = Gather()
    graphdef, params = nnx.split(stack)

    def apply(params):
        layers = nnx.merge(graphdef, params)
        return run(lambda x, _, layer: (layer(x), None), jnp.asarray(X), layers)[0]

    kept = jax.eval_shape(lambda p: jax.vjp(apply, p)[1], nnx.to_pure_dict(params))
    sizes = [(3 if scan and len(x.shape) == 3 else 1, x.shape[-2:]) for x in jax.tree.leaves(kept)]

    def layers_with(shape):
        return sum(count for count, found in sizes if found == shape)

    # The parameters themselves, once, and not whole: both of a layer are gathered forward, gathered
    # again backward, and their gradients constrained in turn.
    assert layers_with((4, 32)) == layers_with((32, 4)) == 3
    program = str(jax.make_jaxpr(jax.grad(lambda p: apply(p).sum()))(nnx.to_pure_dict(params)))
    assert program.count("= sharding_constraint") == 3 * 2 * (1 if scan else 3)
    # The argument of the cosine, or its derivative: `recompute` hides the others.
    assert layers_with((3, 32)) <= (0 if remat else 2 * 3)
