import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from oneformer_jax.configs import common
from oneformer_jax.models import functional
from oneformer_jax.train import optim, settings, sharding
from tests import tiny


@pytest.fixture(scope="module", autouse=True)
def eight_devices():
    assert len(jax.devices()) == 8, "these tests need 8 devices; see tests/conftest.py"


def test_mesh_fills_in_the_free_axis():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(sharding.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(sharding.make_mesh(data=4, fsdp=-1).shape) == {"data": 4, "fsdp": 2}
    assert dict(sharding.make_mesh(data=1, devices=jax.devices()[:1]).shape) == {
        "data": 1,
        "fsdp": 1,
    }
    assert set(sharding.make_mesh().axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("data", "fsdp", "message"),
    [
        (-1, 3, r"mesh.fsdp 3 does not divide the 8 devices; use one of 1, 2, 4, 8"),
        (5, -1, r"mesh.data 5 does not divide the 8 devices"),
        (2, 2, r"mesh.data 2 x mesh.fsdp 2 = 4, but there are 8 devices; set mesh.data=-1"),
        (0, 1, r"mesh.data is 0"),
        (-1, -2, r"mesh.fsdp is -2"),
        (-1, -1, r"mesh.fsdp is -1; it must .* while mesh.data is -1"),
    ],
)
def test_bad_mesh_names_the_key(data, fsdp, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(data, fsdp)


def test_batches_and_micro_batches_divide_over_the_devices():
    mesh = sharding.make_mesh(fsdp=2)
    sharding.check_batches(16, 2, mesh)
    message = r"^data.batch_size 12 is not divisible by 8 devices; use 8 or 16$"
    with pytest.raises(ValueError, match=message):
        sharding.check_batches(12, 1, mesh)
    message = r"^data.batch_size / optim.accumulate \(6/2\) = 3 .* 8 devices; use 8$"
    with pytest.raises(ValueError, match=message):
        sharding.check_batches(6, 2, mesh)
    with pytest.raises(ValueError, match=r"^data.batch_size is 0; it must"):
        sharding.check_batches(0, 1, mesh)


def test_put_batch_splits_over_all_devices():
    mesh = sharding.make_mesh(fsdp=4)
    batch = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3), "task": np.arange(16)}
    with jax.transfer_guard("disallow"):
        placed = sharding.put_batch(batch, mesh)
    assert placed["image"].sharding == sharding.batch_sharding(mesh)
    assert placed["image"].sharding.shard_shape((16, 3)) == (2, 3)
    assert placed["image"].dtype == jnp.uint8
    np.testing.assert_array_equal(placed["image"], batch["image"])
    np.testing.assert_array_equal(placed["task"], batch["task"])


def test_parameter_rules():
    mesh = sharding.make_mesh(fsdp=4)

    def spec(name, *shape, **settings):
        return sharding.parameter_spec(name, shape, mesh, **settings)

    assert spec("a/mlp/kernel", 256, 1024) == P(None, "fsdp")
    assert spec("a/mlp/kernel", 1024, 256) == P("fsdp", None)
    assert spec("a/proj/kernel", 512, 512) == P(None, "fsdp")  # of equal ones the last
    assert spec("conv/kernel", 3, 3, 256, 255) == P(None, None, "fsdp", None)
    assert spec("conv/kernel", 333, 333) == P()  # nothing divides
    assert spec("norm/scale", 1024) == P()  # small
    assert spec("norm/scale", 1024, min_size=1024) == P("fsdp")
    assert spec("attn/relative_position_bias_table", 529 * 4, 48) == P()
    assert sharding.parameter_spec("k", (1024, 1024), sharding.make_mesh()) == P()  # fsdp=1
    own = ((r"special", P("fsdp", None)), (r".", sharding.LARGEST))
    assert spec("special/kernel", 256, 1024, rules=own) == P("fsdp", None)
    with pytest.raises(ValueError, match=r"does not fit parameter special/kernel .*\(254, 1024\)"):
        spec("special/kernel", 254, 1024, rules=own)
    with pytest.raises(ValueError, match="no sharding rule matches parameter other"):
        spec("other", 256, 1024, rules=own[:1])


def test_state_follows_its_parameters():
    mesh = sharding.make_mesh(fsdp=2)
    params = {
        "layers": {
            0: {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)},
            1: {"kernel": jnp.ones((32, 8))},
        }
    }
    optimizer = optim.make_optimizer(optim.OptimConfig(steps=10), params)

    def init():
        return {
            "step": jnp.int32(0),
            "params": params,
            "stats": {"bn": {"mean": jnp.zeros((32, 32))}},
            "opt": optimizer.init(params),
            "ema": params,
        }

    abstract = jax.eval_shape(init)
    shardings = sharding.state_shardings(abstract, mesh, min_size=256)
    specs = jax.tree.map(lambda s: s.spec, shardings)
    expected = {
        "layers": {
            0: {"kernel": P(None, "fsdp"), "bias": P()},
            1: {"kernel": P("fsdp", None)},
        }
    }
    assert specs["params"] == specs["ema"] == expected
    assert optax.tree.get(specs["opt"], "mu") == expected
    assert optax.tree.get(specs["opt"], "nu") == expected
    assert specs["stats"]["bn"]["mean"] == P()  # statistics are never split
    assert specs["step"] == P()
    state = jax.jit(init, out_shardings=shardings)()
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    kernel = state["params"]["layers"][0]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 16)
    target = sharding.with_shardings(abstract, shardings)
    assert target["params"]["layers"][1]["kernel"].sharding.spec == P("fsdp", None)
    assert target["step"].dtype == jnp.int32


def test_parameter_whose_name_ends_like_another_ones():
    """The longest matching name decides: "head/kernel" inside "a/head/kernel" is another one."""
    mesh = sharding.make_mesh(fsdp=2)
    params = {"head": {"kernel": jnp.ones((4, 8))}, "a": {"head": {"kernel": jnp.ones((8, 4))}}}
    abstract = jax.eval_shape(lambda: {"params": params, "opt": {"mu": params}})
    specs = jax.tree.map(lambda s: s.spec, sharding.state_shardings(abstract, mesh, min_size=1))
    assert specs["opt"]["mu"] == specs["params"]
    assert specs["params"]["a"]["head"]["kernel"] == P("fsdp", None)
    assert specs["params"]["head"]["kernel"] == P(None, "fsdp")


GOLDEN = pathlib.Path(__file__).parent / "golden"
RECORDED = {
    "sharding_coco_resnet50.tsv": ("resnet50", None),
    "sharding_dinov2_small.tsv": ("dinov2_small", "backbone"),
    "sharding_dinov3_base.tsv": ("dinov3_base", "backbone"),
}


@pytest.mark.parametrize("file", RECORDED)
def test_parameters_are_sharded_as_recorded(file):
    """Name, shape and spec of each parameter over 8 devices; a change must be meant.

    `python -m tests.train.test_sharding` writes the files anew.
    """
    assert sharding_table(*RECORDED[file]) == (GOLDEN / file).read_text()


def sharding_table(backbone: str, part: str | None) -> str:
    mesh = sharding.make_mesh(data=1, fsdp=8)
    config = common.get_base()
    config.model.backbone.name = backbone
    params = functional.abstract(settings.model_config(config, 133), training=True).params
    params = {part: params[part]} if part else params
    found = sharding.state_shardings({"params": params}, mesh)["params"]
    specs = {name: s.spec for name, s in tiny.leaves(found).items()}
    rows = ["parameter\tshape\tspec"]
    for name, leaf in tiny.leaves(params).items():
        axes = ",".join(str(axis) for axis in specs[name]) or "replicated"
        rows.append(f"{name}\t{','.join(map(str, leaf.shape))}\t{axes}")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    import tests.conftest  # noqa: F401 - sets the number of devices

    GOLDEN.mkdir(exist_ok=True)
    for file, given in RECORDED.items():
        (GOLDEN / file).write_text(sharding_table(*given))
