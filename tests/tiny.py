"""The smallest OneFormer that has every part, for tests."""

import jax
import numpy as np

from oneformer_jax.models import backbones, functional
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.types import Metadata

CLASSES = 5


def model_config(**overrides) -> OneFormerConfig:
    backbone = backbones.backbone_config("resnet", depths=(1, 1, 1, 1), stem_width=8, norm="batch")
    fields = dict(
        num_classes=CLASSES,
        backbone=backbone,
        num_queries=7,
        num_context=3,
        hidden_dim=32,
        mask_dim=32,
        num_heads=4,
        encoder_layers=1,
        encoder_ffn=32,
        query_init_layers=1,
        query_init_ffn=32,
        decoder_layers=3,
        decoder_ffn=32,
        text_width=32,
        text_layers=1,
        text_heads=2,
    )
    return OneFormerConfig(**(fields | overrides))


def random_model(
    config: OneFormerConfig, execution: Execution = Execution(), *, training: bool = False
) -> functional.Split:
    """A model of random NumPy arrays that all matter: to initialise one is to compile."""
    graph, *trees = functional.abstract(config, execution, training=training)
    rng = np.random.default_rng(0)

    def fill(x):
        values = rng.uniform(0.02, 0.2, x.shape)
        return values.astype(x.dtype)

    params, stats = jax.tree.map(fill, tuple(trees))
    params = jax.tree.map(lambda x: x - x.dtype.type(0.11) if x.ndim > 1 else x, params)
    return functional.Split(graph, params, stats)


def metadata() -> Metadata:
    """Three things, then two kinds of stuff."""
    return Metadata(
        dataset="tiny",
        class_names=("cat", "dog", "car", "sky", "road"),
        is_thing=(True, True, True, False, False),
        colors=((220, 20, 60), (0, 80, 200), (250, 170, 30), (70, 130, 180), (128, 64, 128)),
        category_ids=(1, 2, 3, 11, 12),
    )


def text_table() -> np.ndarray:
    """int32 [K+3, 6]: made-up texts that end with the largest id at different places."""
    table = np.zeros((CLASSES + 3, 6), np.int32)
    for i, row in enumerate(table):
        length = 2 + i % 3
        row[0] = 49406
        row[1 : 1 + length] = 1000 + 10 * i + np.arange(length)
        row[1 + length] = 49407
    return table


def batch(seed: int = 0, size: int = 2, side: int = 64, slots: int = 6) -> dict[str, np.ndarray]:
    """A training batch of rectangles, as the loader yields it."""
    rng = np.random.default_rng(seed)
    segment_map = np.zeros((size, side, side), np.uint8)
    classes = np.zeros((size, slots), np.int32)
    valid = np.zeros((size, slots), bool)
    for b in range(size):
        count = int(rng.integers(1, slots))
        for slot in range(count):
            y, x = rng.integers(0, side - 8, 2)
            segment_map[b, y : y + 24, x : x + 24] = slot + 1
        classes[b, :count] = rng.integers(0, CLASSES, count)
        valid[b, :count] = [(segment_map[b] == slot + 1).any() for slot in range(count)]
    classes[~valid] = 0
    return {
        "image": rng.integers(0, 256, (size, side, side, 3)).astype(np.uint8),
        "image_size": np.full((size, 2), side, np.int32),
        "segment_map": segment_map,
        "classes": classes,
        "valid": valid,
        "text_ids": rng.integers(0, CLASSES + 3, (size, 4)).astype(np.int32),
        "task": rng.integers(0, 3, size).astype(np.int32),
    }


def leaves(tree) -> dict[str, jax.Array]:
    """A nested dict flattened to "a/b/c" names."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
