"""Serves every operation's api: loads an implementation, splits the batch, merges vmap's axis."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

from oneformer_jax.kernels import chips

# Platform and kind of device; "" is not said.
_TRACED_FOR: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar(
    "traced_for", default=("", "")
)
OLDEST_CAPABILITY = 8.0  # Ampere: the oldest that Pallas:Triton compiles for


def platform() -> str:
    """Returns the platform that is traced for: "cpu", "gpu" or "tpu".

    It is that of `tracing_for`, or that of the mesh that the trace was told of
    (`jax.sharding.use_abstract_mesh`), which may stand for devices that are not there, else that of
    the default device.
    """
    return _TRACED_FOR.get()[0] or _of_mesh("platform") or jax.default_backend()


def device_kind() -> str:
    """Returns JAX's name of the device that is traced for; see `platform`."""
    return _TRACED_FOR.get()[1] or _of_mesh("device_kind") or jax.devices()[0].device_kind


def compute_capability() -> str | None:
    """Returns that of the NVIDIA GPU that is traced for, as "9.0"; None for another device."""
    kind, device = device_kind(), jax.devices()[0]
    if kind == device.device_kind:
        return compute_capability_of(device)
    known = (gpu.capability for gpu in chips.GPUS.values() if kind in gpu.kinds)
    return next((".".join(map(str, capability)) for capability in known), None)


def _of_mesh(attribute: str) -> str | None:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, attribute, None)


@contextlib.contextmanager
def tracing_for(name: str, kind: str = "") -> Iterator[None]:
    """Sets `platform` and `device_kind` for what is traced within: programs for other machines."""
    token = _TRACED_FOR.set((name, kind))
    try:
        yield
    finally:
        _TRACED_FOR.reset(token)


def load(package: str, implementation: str, function: str) -> Callable[..., jax.Array]:
    """Loads a function of kernels.PACKAGE.IMPLEMENTATION, which is imported when first used.

    Raises:
      NotImplementedError: the module cannot be imported here.
    """
    try:
        module = importlib.import_module(f"oneformer_jax.kernels.{package}.{implementation}")
    except ImportError as error:
        raise NotImplementedError(
            f"{function}: {implementation!r} cannot be loaded here: {error}"
        ) from error
    return getattr(module, function)


def free_axes(mesh: Mesh | None) -> tuple[Any, tuple[str, ...], int]:
    """Finds the axes of a mesh that are not manual yet; returns the mesh, them and their devices.

    None is the mesh that is set with `jax.set_mesh`, if any.
    """
    ambient = jax.sharding.get_abstract_mesh()
    found = ambient if mesh is None else mesh
    axes = tuple(name for name in found.axis_names if name not in ambient.manual_axes)
    return found, axes, math.prod(found.shape[name] for name in axes)


def split_batch(
    operation: str,
    argument: str,
    call: Callable,
    arrays: int,
    mesh: Mesh | None,
    batch: int,
    *,
    shared: int = 0,
) -> Callable:
    """Returns `call` under a shard_map over all axes of a mesh that are not manual yet.

    Args:
      operation, argument: names for errors.
      call: of so many arrays with the batch as axis 0, like those that it returns.
      arrays: how many arguments `call` has with that axis.
      mesh: None for the one that is set with `jax.set_mesh`, if any.
      batch: size of axis 0.
      shared: how many more arguments `call` has, which all devices have whole; their gradients are
        added up over the devices.

    Raises:
      ValueError: the mesh does not divide the batch.
    """
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    mesh, axes, count = free_axes(mesh)
    if count == 1:
        return call
    if batch % count:
        raise ValueError(
            f"{operation}: {argument} has a batch of {batch} (axis 0), which cannot be split over "
            f"{count} devices (mesh axes {', '.join(axes)}); make it a multiple of {count}"
        )
    spec = PartitionSpec(axes)
    return jax.shard_map(
        call,
        mesh=None if manual else mesh,
        in_specs=(spec,) * arrays + (PartitionSpec(),) * shared,
        out_specs=spec,
        axis_names=set(axes),
        check_vma=False,  # the kernels do not say how their results vary over the mesh
    )


def merge_mapped_axes(call: Callable) -> Callable:
    """Returns `call` of arrays [B, ...], which under `jax.vmap` sees the mapped axis as part of B.

    Kernels count their grid steps and move memory by hand, which JAX cannot batch for them.
    """
    mapped = custom_vmap(call)

    @mapped.def_vmap
    def rule(size, is_mapped, *arguments):
        def merge(x, mapped_already):
            x = x if mapped_already else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = merge_mapped_axes(call)(*jax.tree.map(merge, arguments, tuple(is_mapped)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def check_array(operation: str, name: str, array: jax.Array, axes: str, *dtypes: Any) -> None:
    """Raises a ValueError unless an argument has `axes`, as "[B, P, 2]", and one of the dtypes."""
    count = axes.count(",") + 1
    if array.ndim != count:
        raise ValueError(
            f"{operation}: {name} must have {count} axes {axes}, got shape {array.shape}"
        )
    if array.dtype not in dtypes:
        names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{operation}: {name} must be {names}, got {array.dtype}")


def compute_capability_of(device: jax.Device) -> str | None:
    """Returns "9.0" for an H100 or H200; None for what is not an NVIDIA GPU."""
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def nvidia_capability(operation: str, compute_capability: str | None) -> float:
    """Returns the compute capability of an NVIDIA GPU as a number.

    Raises:
      NotImplementedError: it is no NVIDIA GPU, or older than `OLDEST_CAPABILITY`.
    """
    try:
        capability = float(compute_capability)
    except (TypeError, ValueError):
        capability = None
    if capability is None or capability < OLDEST_CAPABILITY:
        raise NotImplementedError(
            f"{operation}: pallas_gpu needs an NVIDIA GPU of compute capability "
            f"{OLDEST_CAPABILITY} or newer, not {compute_capability!r}; use implementation='xla'"
        )
    return capability
