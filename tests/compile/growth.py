"""Counts what one device sends in a training step, on meshes of more and more devices.

  python -m tests.compile.growth cpu:8 cpu:64 cpu:256
  python -m tests.compile.growth v5e:2x4 v5e:8x8 v5e:16x16 v5e:2x4/2      (needs libtpu; /2: slices)

The tiny model of the tests is compiled with one image for each device and its parameters split over
four. Nothing is run, so the devices of the CPU need not exist.
"""

import sys

import jax
import pytest

import tests.conftest  # noqa: F401 - chooses the CPU before jax is imported
from oneformer_jax.compile import hlo, topologies
from oneformer_jax.models import functional
from oneformer_jax.train import settings, sharding
from oneformer_jax.train import state as states
from tests import tiny
from tests.compile import test_compile
from tests.train.runs import make_config


def collectives(name: str) -> tuple[int, int, list[hlo.Collective]]:
    """(number of slices, of all devices, what a training step communicates on them)."""
    topology, _, slices = name.partition("/")
    kind, _, count = topology.partition(":")
    if kind == "cpu":
        devices = jax.devices()[: int(count)]
        assert len(devices) == int(count), f"{name}: set JAX_NUM_CPU_DEVICES"
    else:
        devices = topologies.open_topology(topology, int(slices or 1)).devices
    config = make_config(**test_compile.SMALL | {"data__batch_size": len(devices)})
    mesh = sharding.make_mesh(-1, config.mesh.fsdp, devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        training = states.make_training(config, tiny.CLASSES, tiny.text_table(), mesh)
        batch, key = states.abstract_batch(config, mesh), states.abstract_key(mesh)
        compiled = training.step.lower(training.state, batch, key).compile()
    found = hlo.Program(compiled.as_text(), len(devices)).collectives()
    return int(slices or 1), len(devices), found


def sent(found: list[hlo.Collective], *, on_tpu: bool = False) -> dict[str, float]:
    """Bytes that a device sends within its slice, by what they are.

    Raises:
      AssertionError: something else is sent, such as masks, feature maps or points.
    """
    size = test_compile.parameter_bytes(make_config(**test_compile.SMALL))
    rest = test_compile.check_collectives(found, size, on_tpu=on_tpu)
    total = sum(c.sent for c in found if c.kind not in (hlo.HOST, hlo.SLICES))
    return {"parameters, gradients, sums": rest, "contrastive features": total - rest}


def sent_between_slices(found: list[hlo.Collective]) -> float:
    """Bytes that a device hands over to the network between slices.

    Raises:
      AssertionError: they are neither sums, all together no more than the gradients of all
        parameters, nor the contrastive features of the device's image.
    """
    crossing = [c for c in found if c.kind == hlo.SLICES]
    assert {c.name for c in crossing} == {"ALL_REDUCE", "ALL_GATHER"}, crossing
    features = [c for c in crossing if c.name == "ALL_GATHER"]
    assert all(c.elements == test_compile.FEATURES for c in features), features
    config = settings.model_config(make_config(**test_compile.SMALL), tiny.CLASSES)
    params = functional.abstract(config, training=True).params
    # All devices encode the same texts: what is summed are the gradients of these.
    del params["text_encoder"]["token_embedding"]
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    sums = sum(c.sent for c in crossing if c.name == "ALL_REDUCE")
    assert 0 < sums <= gradients, (sums, gradients)
    return sums + sum(c.sent for c in features)


def check(amounts: dict[int, dict[str, float]]) -> None:
    """AssertionError if more is sent on more devices, or more features for an image of the batch.

    The share (n - 1) / n of a ring comes closer to 1. The features of the whole batch are compared,
    so they grow with it: those of queries and of texts are gathered, and so are their gradients.
    """
    rest, features = "parameters, gradients, sums", "contrastive features"
    least = amounts[min(amounts)][rest]
    for devices, parts in amounts.items():
        assert parts[rest] < 1.2 * least, (devices, amounts)
        assert parts[features] <= 4 * 4 * test_compile.FEATURES * devices, (devices, amounts)


def main(*names: str) -> None:
    if any(name.startswith("cpu:") for name in names):
        count = max(int(name.partition(":")[2]) for name in names if name.startswith("cpu:"))
        jax.config.update("jax_num_cpu_devices", count)
    amounts = {}
    with pytest.MonkeyPatch.context() as patch:
        test_compile.patch_shardings(patch)
        for name in names:
            slices, devices, found = collectives(name)
            amounts[devices] = sent(found, on_tpu=not name.startswith("cpu:"))
            parts = [f"{part} {int(size):,} bytes" for part, size in amounts[devices].items()]
            if slices > 1:
                size = sent_between_slices(found)
                parts.append(f"between slices {int(size):,} bytes")
            kinds = [
                f"{kind} {times} times, {int(size):,} bytes"
                for kind, (times, size) in hlo.sent_by_kind(found).items()
            ]
            print(f"{name}, {devices} devices: {'; '.join(parts)} ({'; '.join(kinds)})", flush=True)
    check(amounts)
    print("what a device sends does not grow")


if __name__ == "__main__":
    main(*sys.argv[1:])
