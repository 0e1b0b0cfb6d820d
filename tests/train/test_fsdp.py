"""Gathering of parameters, and the policy that must recognise what it emits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax.kernels.recompute import recompute
from oneformer_jax.train import fsdp


@pytest.fixture
def split(mesh8):
    return NamedSharding(mesh8, P(None, mesh8.axis_names))


def layer(kernel, x):
    """A product with a kernel, and a `custom_vjp` that gathers nothing."""
    return recompute(jnp.tanh)(jnp.sin(x @ kernel))


def asked_of_the_policy(function, argnums):
    """[(primitive, whether it is kept)] while a function of (kernel, x) is differentiated."""
    asked = []

    def spy(primitive, *args, **params):
        kept = fsdp.keeps_all_but_gathered(primitive, *args, **params)
        asked.append((primitive.name, kept))
        return kept

    gradient = jax.grad(jax.checkpoint(function, policy=spy), argnums=argnums)
    program = jax.make_jaxpr(gradient)(jnp.ones((4, 16)), jnp.ones((2, 4)))
    return asked, str(program)


@pytest.mark.parametrize("summed", [False, True])
def test_the_policy_refuses_what_gathering_emits_and_nothing_else(split, summed):
    def loss(kernel, x):
        return layer(fsdp.gather_parameter(kernel, split, summed=summed), x).sum()

    asked, program = asked_of_the_policy(loss, argnums=(0, 1))
    assert [name for name, kept in asked if not kept] == ["sharding_constraint"] * 2
    assert {"sin", "dot_general"} <= {name for name, kept in asked if kept}
    # Gathered forward and again backward; then the gradient is summed, or not, and split.
    assert program.count("= sharding_constraint") == 2 + 2 + (2 if summed else 1)


def test_the_policy_recognises_a_gathered_parameter_that_is_not_trained(split):
    """Without a tangent the rule of `gather_parameter` is not yet replaced by its forward pass."""

    def loss(kernel, x):
        kernel = recompute(jnp.tanh)(fsdp.gather_parameter(kernel, split))
        return layer(kernel, x).sum()

    asked, _ = asked_of_the_policy(loss, argnums=1)
    rules = [kept for name, kept in asked if name == "custom_vjp_call"]
    assert rules == [False, True]  # gathering is refused, another rule of its kind is not
    assert all(kept for name, kept in asked if name != "custom_vjp_call")


@pytest.mark.parametrize("summed", [False, True])
def test_the_forward_pass_keeps_no_gathered_parameter(split, summed):
    def kept(policy):
        def apply(kernel, x):
            return layer(fsdp.gather_parameter(kernel, split, summed=summed), x)

        checked = jax.checkpoint(apply, policy=policy)
        tree = jax.eval_shape(
            lambda *a: jax.vjp(checked, *a)[1], jnp.ones((4, 16)), jnp.ones((2, 4))
        )
        return [leaf.shape for leaf in jax.tree.leaves(tree)].count((4, 16))

    assert kept(fsdp.keeps_all_but_gathered) == 1  # the parameter as it is split
    assert kept(jax.checkpoint_policies.everything_saveable) >= 1


def test_a_gathered_parameter_has_its_values_and_its_gradient(split):
    kernel = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    expected = jax.grad(lambda k: layer(k, x).sum())(kernel)
    for summed in (False, True):
        found = jax.jit(
            jax.grad(lambda k, s=summed: layer(fsdp.gather_parameter(k, split, summed=s), x).sum())
        )(jax.device_put(kernel, split))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert found.sharding.is_equivalent_to(split, 2)
