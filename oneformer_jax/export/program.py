"""Makes the function that is exported: from images to logits, or to maps.

Post-processing runs on the device as a whole here; `eval.postprocess` finishes it on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.eval.postprocess import (
    choose_pairs,
    number_segments,
    run_heads,
    segment_infos,
    things_metadata,
)
from oneformer_jax.eval.predict import STRIDE, Segmenter
from oneformer_jax.eval.segmentation import Instances, Segmentation
from oneformer_jax.eval.strips import canvas_size
from oneformer_jax.export.description import Description
from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.oneformer import OneFormerConfig, normalize_images
from oneformer_jax.types import TASK_TOKENS, task_id

Arrays = dict[str, jax.Array]
# (weights by name, image uint8 [B, H, W, 3], image_size int32 [B, 2]) -> outputs by name
Program = Callable[[Mapping[str, jax.Array], jax.Array, jax.Array], Arrays]


def named_weights(segmenter: Segmenter) -> dict[str, np.ndarray]:
    """Returns the parameters and statistics of a model by dotted names, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(segmenter.variables)
    return {_name(path): np.asarray(jax.device_get(value)) for path, value in leaves}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path[1:], simple=True, separator=".")


def padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the height and width that the model sees: multiples of its stride."""
    height, width = (-(-side // STRIDE) * STRIDE for side in size)
    return height, width


def make_program(
    config: OneFormerConfig, execution: Execution, description: Description
) -> Program:
    """Makes the function that is exported.

    Its image has any content outside of `image_size` (height, width), which is not looked at. The
    outputs are those of `output_shapes`.

    Args:
      config: the architecture.
      execution: how it is run.
      description: task, size and what comes out.
    """
    graph, *trees = functional.abstract(config, execution, training=False)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tuple(trees))
    names = [_name(path) for path, _ in leaves]
    height, width = description.size
    padded = padded_size(description.size)
    tokens = TASK_TOKENS[task_id(description.task)]

    def program(
        weights: Mapping[str, jax.Array], image: jax.Array, image_size: jax.Array
    ) -> Arrays:
        model = (graph, *jax.tree.unflatten(structure, [weights[name] for name in names]))
        batch = image.shape[0]
        image = jnp.pad(image, ((0, 0), (0, padded[0] - height), (0, padded[1] - width), (0, 0)))
        features = functional.encode(*model, normalize_images(image, image_size))
        predictions = functional.decode(
            *model, features, jnp.broadcast_to(tokens, (batch, *tokens.shape))
        )
        logits = predictions.class_logits[-1], predictions.mask_logits()
        if not description.postprocess:
            return dict(class_logits=logits[0], mask_logits=logits[1])
        return _maps(*logits, image_size, description)

    return program


def output_shapes(description: Description) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns (shape without the batch, dtype) of each output of the program.

    Logits: `class_logits`, the last class is "no object", and `mask_logits` of the padded image.
    Maps are zero, or any class, beyond the image's size:
      panoptic: `segments` with the ids 1 to `count`, and of each id at index id - 1 `category_id`,
        `isthing`, `score` and `area`.
      instance: `masks`, `labels` and `scores` of the best pairs, of which `valid` marks those that
        count.
      semantic: `class_map`.
    """
    queries, classes = description.num_queries, description.metadata.num_classes
    height, width = description.size
    if not description.postprocess:
        padded = padded_size(description.size)
        return {
            "class_logits": ((queries, classes + 1), "float32"),
            "mask_logits": ((queries, padded[0] // 4, padded[1] // 4), "float32"),
        }
    if description.task == "semantic":
        return {"class_map": ((height, width), "int32")}
    if description.task == "panoptic":
        return {
            "segments": ((height, width), "int32"),
            "count": ((), "int32"),
            "category_id": ((queries,), "int32"),
            "isthing": ((queries,), "bool"),
            "score": ((queries,), "float32"),
            "area": ((queries,), "int32"),
        }
    pairs = _pairs(description)
    return {
        "masks": ((pairs, height, width), "bool"),
        "labels": ((pairs,), "int32"),
        "scores": ((pairs,), "float32"),
        "valid": ((pairs,), "bool"),
    }


def _pairs(description: Description) -> int:
    most = description.num_queries * description.metadata.num_classes
    return min(description.thresholds.topk, most)


def _maps(
    class_logits: jax.Array, mask_logits: jax.Array, image_size: jax.Array, about: Description
) -> Arrays:
    tables = run_heads(
        class_logits,
        mask_logits,
        image_size,
        image_size,
        jnp.float32(about.thresholds.object_mask_threshold),
        task=about.task,
        padded_size=padded_size(about.size),
        canvas=canvas_size(np.array([about.size])),
        topk=_pairs(about),
        mesh=None,
    )
    height, width = about.size
    if about.task == "semantic":
        return dict(class_map=tables["class_map"][:, :height, :width].astype(jnp.int32))
    finish = _panoptic if about.task == "panoptic" else _instance
    return jax.vmap(lambda tables: finish(tables, about))(tables)


def _panoptic(tables: Arrays, about: Description) -> Arrays:
    found = number_segments(tables, about.metadata, about.thresholds, jnp)
    ids = found.pop("ids")
    height, width = about.size
    winner = tables["winner"][:height, :width].astype(jnp.int32)
    return dict(segments=jnp.where(winner < 0, 0, ids[jnp.maximum(winner, 0)]), **found)


def _instance(tables: Arrays, about: Description) -> Arrays:
    labels, scores, valid = choose_pairs(tables, about.metadata, about.thresholds, jnp)
    height, width = about.size
    masks = jnp.unpackbits(tables["bits"], axis=-1)[:, :height, :width].astype(bool)
    return dict(masks=masks[tables["queries"]], labels=labels, scores=scores, valid=valid)


def segmentation_of(
    maps: Mapping[str, np.ndarray], image: np.ndarray, about: Description
) -> Segmentation:
    """Returns the outputs of one image, with post-processing, as a `Segmentation`."""
    height, width = image.shape[:2]
    metadata = about.metadata
    values: dict[str, Any]
    if about.task == "semantic":
        values = dict(class_map=maps["class_map"][:height, :width])
    elif about.task == "panoptic":
        segments = maps["segments"][:height, :width]
        values = dict(segments=segments, segments_info=segment_infos(maps))
    else:
        valid = maps["valid"]
        found = Instances(
            maps["masks"][valid, :height, :width], maps["scores"][valid], maps["labels"][valid]
        )
        values = dict(instances=found)
        if about.thresholds.ade_instance_remap:
            metadata = things_metadata(metadata)
    return Segmentation(about.task, metadata, image=image, **values)
