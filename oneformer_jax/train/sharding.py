"""Device mesh, the batch's layout on it, and the rules that shard the training state.

Two mesh axes: "data" holds copies of the model, "fsdp" splits its parameters, moments and averages.
The batch is split over both. The axes are in Auto mode: the compiler partitions the step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oneformer_jax import config_rules

AXES = ("data", "fsdp")
BATCH_SPEC = PartitionSpec(AXES)

# Values of a sharding rule besides a PartitionSpec.
REPLICATE = PartitionSpec()
LARGEST = "largest"  # split the largest dimension that mesh.fsdp divides

# Splitting smaller parameters is not worth the collectives: 64 Ki elements, 256 KiB of float32.
MIN_SHARDED_SIZE = 2**16

# Regular expression on parameter names (re.search) -> PartitionSpec or LARGEST; first match wins.
# Arrays below MIN_SHARDED_SIZE are always replicated.
SHARDING_RULES: tuple[tuple[str, PartitionSpec | str], ...] = (
    (r"relative_position_bias_table$", REPLICATE),  # gathered by a constant index in every block
    (r".", LARGEST),
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of shape [data, fsdp] over all devices.

    "data" goes over several TPU slices first, so parameters are gathered within a slice, and only
    sums of gradients cross the data-centre network.

    Args:
      data: devices along "data"; -1 takes all that fsdp leaves.
      fsdp: devices along "fsdp"; -1 takes all that data leaves.
      devices: default `jax.devices()`, of all hosts.

    Raises:
      ValueError: the sizes do not give the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    config_rules.require({"mesh.data": data, "mesh.fsdp": fsdp})
    if data == -1 or fsdp == -1:
        key, given = ("mesh.fsdp", fsdp) if data == -1 else ("mesh.data", data)
        if count % given:
            divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise ValueError(
                f"{key} {given} does not divide the {count} devices; use one of {divisors}"
            )
        data, fsdp = (count // given, given) if data == -1 else (given, count // given)
    if data * fsdp != count:
        raise ValueError(
            f"mesh.data {data} x mesh.fsdp {fsdp} = {data * fsdp}, but there are {count} devices; "
            "set mesh.data=-1 to use them all"
        )
    types = (AxisType.Auto,) * 2
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return jax.make_mesh((data, fsdp), AXES, axis_types=types, devices=devices)
    if data % slices:
        raise ValueError(
            f"mesh.fsdp {fsdp} does not divide the {count // slices} devices of a slice; "
            "parameters are sharded within a slice only"
        )
    shape = mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp), (slices, 1), devices=devices, allow_split_physical_axes=True
    )
    return Mesh(shape, AXES, axis_types=types)


def check_batches(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError, with good sizes, unless batch, micro-batches and devices divide."""
    config_rules.require({"data.batch_size": batch_size, "optim.accumulate": accumulate})
    size, count = batch_size // accumulate, mesh.size
    if size % count:
        key = "data.batch_size"
        if accumulate > 1:
            key += f" / optim.accumulate ({batch_size}/{accumulate}) ="
        below = size // count * count
        sizes = f"{below} or {below + count}" if below else f"{count}"
        raise ValueError(f"{key} {size} is not divisible by {count} devices; use {sizes}")


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every array of a batch: the first axis over all devices."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, REPLICATE)


def put_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Puts a PRNG key, the same on all processes, on the whole mesh."""
    return jax.jit(lambda key: key, out_shardings=replicated(mesh))(key)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch of numpy arrays [B_host, ...] on the devices as arrays [B, ...].

    Each host passes the part of its own devices; B is the sum over the hosts.
    """
    sharding = batch_sharding(mesh)
    # With several processes JAX counts these as implicit; here they are meant.
    with jax.transfer_guard("allow"):
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
        )


def put_state(state: Any, shardings: Any) -> Any:
    """Puts a state of host arrays, the same in every process, on the devices.

    The arrays are copied, because the training step takes over their memory.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(
            values.shape, sharding, lambda index: np.array(values[index])
        )

    return jax.tree.map(put, state, shardings)


def parameter_spec(
    name: str,
    shape: Sequence[int],
    mesh: Mesh,
    *,
    rules: Sequence[tuple[str, PartitionSpec | str]] = SHARDING_RULES,
    min_size: int = MIN_SHARDED_SIZE,
) -> PartitionSpec:
    """Chooses a parameter's sharding by the rules; replicated if small or indivisible.

    Raises:
      ValueError: no rule matches, or a rule's PartitionSpec does not fit the shape.
    """
    rule = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
    if rule is None:
        raise ValueError(
            f"no sharding rule matches parameter {name}; end the rules with ('.', ...)"
        )
    if int(np.prod(shape, dtype=np.int64)) < min_size:
        return REPLICATE
    if rule != LARGEST:
        try:
            NamedSharding(mesh, rule).shard_shape(tuple(shape))
        except ValueError as error:
            raise ValueError(
                f"the sharding rule {rule} does not fit parameter {name} of shape "
                f"{tuple(shape)} on mesh {dict(mesh.shape)}"
            ) from error
        return rule
    ways = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not divisible:
        return REPLICATE
    # Of equal dimensions the last, which is the output dimension of every kernel.
    axis = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape))))


def state_shardings(
    abstract_state: Mapping[str, Any],
    mesh: Mesh,
    *,
    rules: Sequence[tuple[str, PartitionSpec | str]] = SHARDING_RULES,
    min_size: int = MIN_SHARDED_SIZE,
) -> dict[str, Any]:
    """Shardings of a training state {step, halted, params, stats, opt[, ema]}.

    Parameters and their averages ("ema") follow the rules. A moment (a leaf of "opt" with a
    parameter's shape, and its name at the end of the path) follows that parameter. The rest is
    replicated.

    Args:
      abstract_state: the state's shapes and dtypes.
      mesh: see `make_mesh`.
      rules, min_size: see `parameter_spec`.

    Returns:
      A tree of NamedSharding of the structure of `abstract_state`.
    """
    specs = {
        _name(path): (
            leaf.shape,
            parameter_spec(_name(path), leaf.shape, mesh, rules=rules, min_size=min_size),
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state["params"])
    }

    def spec(path, leaf) -> PartitionSpec:
        part, *keys = _name(path).split("/")
        if part in ("params", "ema"):
            starts = [0]
        elif part == "opt":
            starts = range(len(keys))
        else:
            starts = []
        for start in starts:
            shape, found = specs.get("/".join(keys[start:]), (None, REPLICATE))
            if shape == leaf.shape:
                return found
        return REPLICATE

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), abstract_state
    )


def with_shardings(abstract_state: Any, shardings: Any) -> Any:
    """Makes a tree of ShapeDtypeStruct with shardings: for restore, compile and memory check."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state,
        shardings,
    )


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
