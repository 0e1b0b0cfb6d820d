"""The model on its devices: encodes a batch once, decodes it for each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax import files
from oneformer_jax.models.functional import Programs
from oneformer_jax.types import TASK_TOKENS, TASKS, Features, task_id


class Predictor:
    """The model's parameters and programs on a mesh.

        features = predictor.encode(batch)
        for task in tasks:
            class_logits, mask_logits = predictor.decode(features, task)

    All processes must call it, each with its own share of the batch.
    """

    def __init__(
        self,
        programs: Programs,
        params: Mapping[str, Any],
        stats: Mapping[str, Any],
        mesh: Mesh | None = None,
    ):
        """Copies the task tokens to the devices.

        Args:
          programs: from `functional.programs`, made for `mesh`.
          params, stats: nested dicts of arrays on the devices.
          mesh: devices; a batch is split over all axes. None is the default device.
        """
        self.programs = programs
        self.mesh = mesh
        self._state = (params, stats)
        self._tokens = {
            task: self._put(tokens, P()) for task, tokens in zip(TASKS, TASK_TOKENS, strict=True)
        }

    def encode(self, batch: Mapping[str, Any]) -> Features:
        """Encodes a batch into features on the devices.

        Args:
          batch: `image` uint8 [B, H, W, 3] and `image_size` int [B, 2]; H and W multiples of 32.

        Raises:
          ValueError: a batch that the devices do not divide.
        """
        size = len(batch["image"]) * jax.process_count()
        if self.mesh is not None and size % self.mesh.size:
            raise ValueError(
                f"a batch of {size} images is not divisible by the {self.mesh.size} devices of the "
                "mesh; fill it up"
            )
        return self.programs.encode(*self._state, *self._put_batch(batch))

    def compile(self, shape: tuple[int, int, int]) -> None:
        """Compiles the programs for batches of so many images, of this height and width.

        Another thread may do it while the model runs; but what must be measured before it is
        compiled (`Program.prepare`) waits for its turn.
        """
        if self.programs.encode.prepare is not None and jax.default_backend() != "cpu":
            return
        batch = {
            "image": np.zeros((*shape, 3), np.uint8),
            "image_size": np.tile(np.array(shape[1:], np.int32), (shape[0], 1)),
        }
        program = self.programs.encode.compile(*self._state, *self._put_batch(batch))
        features = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=None if self.mesh is None else x.sharding
            ),
            program.out_info,
        )
        self.programs.decode.compile(*self._state, features, self._tokens[TASKS[0]])

    def decode(self, features: Features, task: str) -> tuple[jax.Array, jax.Array]:
        """Decodes for a task: class logits float32 [B, Q, K+1], mask logits float32 [B, Q, h, w].

        Every device keeps those of its own images. ValueError for an unknown task.
        """
        return self.programs.decode(*self._state, features, self._tokens[TASKS[task_id(task)]])

    def _put_batch(self, batch: Mapping[str, Any]) -> list[jax.Array]:
        split = P() if self.mesh is None else P(self.mesh.axis_names)
        return [self._put(batch[name], split) for name in ("image", "image_size")]

    def _put(self, array: np.ndarray, spec: P) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(np.asarray(array))
        sharding = NamedSharding(self.mesh, spec)
        # With several processes JAX counts this as implicit; here it is meant.
        with jax.transfer_guard("allow"):
            return jax.make_array_from_process_local_data(sharding, np.asarray(array))


def real_sizes(view: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Image sizes of a view of a batch and original sizes, int [B, 2] each.

    Fillers take the size of a real image, so that the results' shapes are those of real ones.
    """
    valid = np.asarray(batch["valid"], bool)
    source = np.where(valid, np.arange(len(valid)), valid.argmax())
    return np.asarray(view["image_size"])[source], np.asarray(batch["original_size"])[source]


def matching(values: Any, expected: Any, path: str = "") -> Any:
    """Takes the part of the nested dict `values` that `expected` has.

    Raises:
      ValueError: a parameter is missing or has another shape; `path` begins its name.
    """
    if not isinstance(expected, Mapping):
        if np.shape(values) != expected.shape:
            raise ValueError(
                f"parameter {path} has shape {np.shape(values)}, but the model expects "
                f"{expected.shape}: these are parameters of another model"
            )
        return values
    missing = set(expected) - set(values if isinstance(values, Mapping) else ())
    if missing:
        listed = (f"{path}/{name}".lstrip("/") for name in sorted(missing, key=str))
        names = files.first_few(listed, 3)
        raise ValueError(f"the model expects parameters {names}: these are of another model")
    return {
        name: matching(values[name], inner, f"{path}/{name}".lstrip("/"))
        for name, inner in expected.items()
    }
