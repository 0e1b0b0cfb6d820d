"""No matrix product has operands of many axes, wherever a CPU may run it.

XLA's library for products on CPUs (YNNPACK) takes fewer than 8 axes, and ends the process beyond.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from oneformer_jax.eval import postprocess, tta
from oneformer_jax.kernels.ms_deform_attn.dense import ms_deform_attn_dense
from oneformer_jax.kernels.neighborhood_attention import neighborhood_attention
from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.models.losses import LossConfig
from oneformer_jax.train import state as states
from oneformer_jax.types import TASKS
from tests import tiny
from tests.models.test_backbones import DINAT, INTERNIMAGE, RESNET, SWIN
from tests.models.test_convnext import SMALL as CONVNEXT

# One below what is known to fail, less one for a `vmap` around everything.
MOST_AXES = 6

BACKBONES = {
    "swin": SWIN,
    "resnet": RESNET,
    "convnext": CONVNEXT,
    "dinat": DINAT,
    "internimage": INTERNIMAGE,
}


def product_ranks(jaxpr) -> Iterator[int]:
    """Axes of the operands of all products in a jaxpr and in the jaxprs inside it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            yield from (len(operand.aval.shape) for operand in equation.invars)
        for inner in jaxprs_in_params(equation.params):
            yield from product_ranks(inner)


def check(function, *arguments, differentiate: bool = False) -> None:
    """Asserts it of a function and, with `differentiate`, of its gradient for all arguments."""
    traced = [jax.make_jaxpr(function)(*arguments)]
    if differentiate:

        def gradient(*arguments):
            out, pull_back = jax.vjp(function, *arguments)
            return pull_back(jnp.ones_like(out))

        traced.append(jax.make_jaxpr(gradient)(*arguments))
    for jaxpr in traced:
        ranks = list(product_ranks(jaxpr))
        assert ranks, "no product was found: this checks nothing"
        assert max(ranks) <= MOST_AXES


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_products_are_found_inside_of_everything():
    @jax.custom_vjp
    def product(a, b):
        return jnp.einsum("abcdefgi,abcdefgi->abcdefg", a, b)

    product.defvjp(lambda a, b: (product(a, b), (a, b)), lambda saved, g: saved)

    def loop(a, b):
        def step(carry, _):
            return jax.lax.cond(carry.sum() > 0, jax.checkpoint(product), product, a, b), None

        return jax.lax.scan(step, jnp.zeros((1,) * 7), length=2)[0]

    jaxpr = jax.make_jaxpr(jax.jit(loop))(*[array(*[1] * 8)] * 2)
    assert set(product_ranks(jaxpr)) == {8}
    with pytest.raises(AssertionError):
        check(loop, *[array(*[1] * 8)] * 2)


@pytest.mark.parametrize(("scan_layers", "point_sampling"), [(True, "per_mask"), (False, "shared")])
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_training_step(kind, scan_layers, point_sampling):
    config = tiny.model_config(backbone=BACKBONES[kind])
    how = Execution(scan_layers=scan_layers, remat=True, kernels=Kernels(assignment="xla"))
    losses = LossConfig(num_points=16, point_sampling=point_sampling)
    optimizer = optax.sgd(0.1)
    step = states.make_train_step(config, losses, optimizer, tiny.text_table(), execution=how)
    init = states.make_init(config, optimizer, ema=False)
    check(step, jax.eval_shape(lambda: init(None)), tiny.batch(), jax.random.key(0))


@pytest.mark.parametrize("kind", BACKBONES)
def test_prediction(kind):
    config = tiny.model_config(backbone=BACKBONES[kind])
    graph, *state = functional.abstract(config, training=False)
    programs = functional.programs(graph)
    image = array(2, 64, 64, 3, dtype=jnp.uint8)
    check(programs.encode, *state, image, np.full((2, 2), 64))
    features = jax.eval_shape(programs.encode, *state, image, np.full((2, 2), 64))
    check(programs.decode, *state, features, np.zeros(77, np.int32))


SIZES = dict(padded_size=(64, 64), canvas=(128, 128), mesh=None)
LOGITS = (array(2, 7, 6), array(2, 7, 16, 16), *[array(2, 2, dtype=jnp.int32)] * 2)


@pytest.mark.parametrize("task", TASKS)
def test_post_processing(task):
    run = functools.partial(postprocess.run_heads, task=task, topk=5, **SIZES)
    check(run, *LOGITS, array())


def test_views_of_an_image():
    total, flip = array(2, 1, 5, 128, 128), array(dtype=bool)
    check(functools.partial(tta._add, **SIZES), total, *LOGITS, flip)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_neighborhood_attention(kernel_size, dilation):
    """Maps of several tiles along both axes: all axes that there can be are there."""
    maps = [array(2, 36, 38, 4, 8)] * 3
    rpb = array(4, *[2 * kernel_size - 1] * 2)
    attend = functools.partial(
        neighborhood_attention, kernel_size=kernel_size, dilation=dilation, implementation="xla"
    )
    check(attend, *maps, rpb, differentiate=True)


def test_dense_deformable_attention():
    shapes = ((4, 5), (8, 10))
    check(
        lambda value, at, weights: ms_deform_attn_dense(value, shapes, at, weights),
        array(2, 100, 4, 8),
        array(2, 7, 4, 2, 3, 2),
        array(2, 7, 4, 2, 3),
        differentiate=True,
    )
