"""A Swin-T that has seen one scene often enough to be sure of it."""

import jax
import numpy as np

from oneformer_jax.models import functional
from oneformer_jax.models.backbones import backbone_config
from oneformer_jax.models.losses import LossConfig
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import optim, state
from tests import tiny

STEPS = 80
CONFIG = OneFormerConfig(
    num_classes=tiny.CLASSES, backbone=backbone_config("swin_tiny"), num_queries=24
)
CLASSES = (3, 4, 0, 2)  # of the segments 1 to 4


def scene(side):
    """Sky and road with a cat and a car before them: uint8 image [S, S, 3], segments [S, S]."""
    eighth = side // 8
    segments = np.ones((side, side), np.uint8)
    segments[5 * eighth :] = 2
    segments[eighth : 4 * eighth, eighth : 3 * eighth] = 3
    segments[3 * eighth : 7 * eighth, 4 * eighth : 7 * eighth] = 4
    colors = np.array(tiny.metadata().colors)[[CLASSES[s - 1] for s in range(1, 5)]]
    noise = np.random.default_rng(0).integers(-20, 20, (side, side, 3))
    return np.clip(colors[segments - 1] + noise, 0, 255).astype(np.uint8), segments


def train(side=128):
    """(params, stats) after `STEPS` steps on the scene and its mirror image."""
    image, segments = scene(side)
    batch = tiny.batch(size=2, side=side)
    slots, texts = batch["valid"].shape[1], CONFIG.num_queries - CONFIG.num_context
    batch |= {
        "image": np.stack([image, image[:, ::-1]]),
        "segment_map": np.stack([segments, segments[:, ::-1]]),
        "classes": np.tile(np.pad(CLASSES, (0, slots - len(CLASSES))), (2, 1)).astype(np.int32),
        "valid": np.tile(np.arange(slots) < len(CLASSES), (2, 1)),
        "text_ids": np.tile(np.arange(texts) % tiny.CLASSES, (2, 1)).astype(np.int32),
        "task": np.zeros(2, np.int32),
    }
    _, params, stats = functional.init(CONFIG, 0, training=True)
    optimizer = optim.make_optimizer(optim.OptimConfig(steps=10000), params)
    losses = LossConfig(num_points=1024)
    step = state.make_train_step(CONFIG, losses, optimizer, tiny.text_table())
    step = jax.jit(step, donate_argnums=0)
    now = {"step": np.int32(0), "halted": np.bool_(False), "params": params, "stats": stats}
    now["opt"] = jax.jit(optimizer.init)(params)
    for i in range(STEPS):
        now, _ = step(now, batch, jax.random.key(i))
    return functional.inference_params(now["params"]), now["stats"]
