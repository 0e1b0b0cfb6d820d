"""Types shared by every room of the house, and the legend of axis letters.

Letters: B batch, H W image, h w = H/4 W/4, Q queries, K classes (without "no object"), M target
slots, R texts of an image, N predictions (decoder layers + 1), L levels, P points, D width,
T tokens.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Annotated, TypedDict

import jax
import numpy as np

# A task's index in this tuple is its id in a batch.
TASKS = ("panoptic", "instance", "semantic")
# Unlabelled pixels of a map of class ids: never a class, whatever value files have for them.
VOID = -1


def _task_tokens() -> np.ndarray:
    """CLIP byte-pair ids of "The task is {task}", zero padded to the context length of 77."""
    start = (49406, 518, 10549, 533)
    end = 49407
    words = {"panoptic": (1072, 24755), "instance": (34572,), "semantic": (29119, 1550)}
    table = np.zeros((len(TASKS), 77), np.int32)
    for row, task in zip(table, TASKS, strict=True):
        ids = (*start, *words[task], end)
        row[: len(ids)] = ids
    return table


# int32 [3, 77]; the model's task token is an MLP of these raw ids.
TASK_TOKENS = _task_tokens()


def task_id(task: str) -> int:
    """Finds `task` in `TASKS`; ValueError that lists the tasks for an unknown name."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    return TASKS.index(task)


Array = jax.Array | np.ndarray


class Batch(TypedDict):
    """A training batch: the loader makes it, the step takes it, compile mode takes its shapes.

    Each array is annotated with its dtype and axes, from which `layout` makes the shapes.

    Attributes:
      image: uint8 [B, H, W, 3], RGB; padding fills it up on the right and at the bottom.
      image_size: int32 [B, 2], (height, width) without padding.
      segment_map: uint8 [B, H, W], the target slot of a pixel plus 1; 0 is void.
      classes: int32 [B, M], class ids of the target slots.
      valid: bool [B, M], the target slots in use.
      text_ids: int32 [B, R], rows of the table of the dataset's distinct texts.
      task: int32 [B], indices in `TASKS`.
    """

    image: Annotated[Array, "uint8", "BHW3"]
    image_size: Annotated[Array, "int32", "B2"]
    segment_map: Annotated[Array, "uint8", "BHW"]
    classes: Annotated[Array, "int32", "BM"]
    valid: Annotated[Array, "bool", "BM"]
    text_ids: Annotated[Array, "int32", "BR"]
    task: Annotated[Array, "int32", "B"]


class LoadedBatch(Batch):
    """A `Batch` as the loader gives it, for the host.

    Attributes:
      index: int32 [B], positions of the records in the source.
    """

    index: Annotated[Array, "int32", "B"]


def layout(kind: type, sizes: Mapping[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of a kind of batch.

    Args:
      kind: `Batch` or `LoadedBatch`.
      sizes: of each axis letter.
    """
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        dtype, axes = hint.__metadata__
        shape = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in axes)
        found[name] = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a batch before the model is told the task; arrays of the compute dtype.

    Attributes:
      mask_features: [B, h, w, D] at stride 4.
      maps: three [B, h_l, w_l, D] at the strides 32, 16 and 8, which the queries attend to.
    """

    mask_features: jax.Array
    maps: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """Outputs of the model for a batch; all arrays are float32 except `mask_features`.

    The mask logits of prediction n are einsum("bqd,bhwd->bqhw", mask_embed[n], mask_features).
    Training never forms them; see `mask_logits`.

    Attributes:
      class_logits: [N, B, Q, K+1]; the last of N is the final one, the last class "no object".
      mask_embed: [N, B, Q, D].
      mask_features: [B, h, w, D] at stride 4.
      queries: [B, Q, D], the queries that enter the decoder; the contrastive loss compares them.
      text_queries: [B, Q, D] of the text branch, or None without it (outside training).
      logit_scale: scalar, logarithm of the contrastive scale, or None without the text branch.
      query_class_logits: [B, num_texts, K+1], what the first of `queries` say of the classes of the
        text list, or None unless the model is trained with that loss.
    """

    class_logits: jax.Array
    mask_embed: jax.Array
    mask_features: jax.Array
    queries: jax.Array
    text_queries: jax.Array | None = None
    logit_scale: jax.Array | None = None
    query_class_logits: jax.Array | None = None

    def mask_logits(self, n: int = -1) -> jax.Array:
        """Forms the mask logits of prediction `n`, float32 [B, Q, h, w] (inference only: large)."""
        return jax.numpy.einsum(
            "bqd,bhwd->bqhw",
            self.mask_embed[n],
            self.mask_features,
            preferred_element_type=jax.numpy.float32,
        )


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The classes of a dataset, in the order of the model's class ids.

    Names and kinds (`classes`) tell whether two datasets are the same to a model; the rest is how
    one dataset's files and pictures show them.

    Attributes:
      dataset: name of the dataset.
      class_names: K names.
      is_thing: K flags; False is stuff.
      colors: K RGB triples in 0..255.
      category_ids: K ids as the dataset's own annotation files number them.
      ignore_label: value of void pixels in the dataset's semantic maps; within the program: VOID.
    """

    dataset: str
    class_names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    colors: tuple[tuple[int, int, int], ...]
    category_ids: tuple[int, ...]
    ignore_label: int = 255

    def __post_init__(self) -> None:
        for field in ("is_thing", "colors", "category_ids"):
            found = len(getattr(self, field))
            if found != self.num_classes:
                raise ValueError(
                    f"metadata of {self.dataset}: {self.num_classes} class names, {found} {field}"
                )
        if any(not 0 <= value <= 255 for color in self.colors for value in color):
            raise ValueError(f"metadata of {self.dataset}: colors has values beyond 0 to 255")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def classes(self) -> list[str]:
        """Lists the classes as "NAME (thing)" or "NAME (stuff)": equal lists, equal models."""
        return [
            f"{name} ({'thing' if thing else 'stuff'})"
            for name, thing in zip(self.class_names, self.is_thing, strict=True)
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)
