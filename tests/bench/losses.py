"""Benchmark: time and memory of the losses and their gradient, by point sampling and matcher.

python -m tests.bench.losses                 # the sizes of the COCO recipe on this device
python -m tests.bench.losses --small         # the synthetic default
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.kernels.bench.records import median_milliseconds
from oneformer_jax.models.execution import Kernels
from oneformer_jax.models.losses import LossConfig, compute_losses
from oneformer_jax.types import Predictions

# predictions, images, queries, classes, slots, side of the image, width, points
COCO = dict(n=10, b=2, q=150, k=133, m=100, side=1024, d=256, points=12544)
SMALL = dict(n=4, b=16, q=24, k=13, m=16, side=128, d=64, points=512)


def inputs(n, b, q, k, m, side, d, points, dtype, segments=20):
    """Random predictions and blocks of `segments` targets an image."""
    keys = jax.random.split(jax.random.key(0), 5)
    h = side // 4
    predictions = Predictions(
        class_logits=jax.random.normal(keys[0], (n, b, q, k + 1)),
        mask_embed=jax.random.normal(keys[1], (n, b, q, d)),
        mask_features=jax.random.normal(keys[2], (b, h, h, d)).astype(dtype),
        queries=jax.random.normal(keys[3], (b, q, d)),
        text_queries=jax.random.normal(keys[4], (b, q, d)),
        logit_scale=jnp.asarray(2.66),
    )
    count = min(segments, m)
    blocks = np.random.default_rng(0).integers(0, count + 1, (b, 8, 8))
    targets = {
        "segment_map": jnp.asarray(blocks.repeat(side // 8, 1).repeat(side // 8, 2), jnp.uint8),
        "classes": jnp.asarray(np.arange(m) % k, jnp.int32)[None].repeat(b, 0),
        "valid": jnp.asarray(np.arange(m) < count)[None].repeat(b, 0),
    }
    return predictions, targets


def measure(
    predictions, targets, config: LossConfig, kernels: Kernels, repeats: int
) -> tuple[float, float]:
    """Median milliseconds of loss and gradient, and MiB of temporary memory."""

    def loss(predictions, targets, key):
        return compute_losses(predictions, targets, key, config, kernels=kernels)[0]

    args = (predictions, targets, jax.random.key(1))
    step = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    took = median_milliseconds(lambda: jax.block_until_ready(step(*args)), repeats)
    return took, step.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    sizes = SMALL if options.small else COCO
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {sizes}")
    print(f"{'sampling':<10}{'matcher':<9}{'features':<10}{'ms':>9}{'MiB':>9}")
    for dtype in ("float32",) if options.small else ("float32", "bfloat16"):
        predictions, targets = inputs(**sizes, dtype=dtype)
        for sampling in ("per_mask", "shared"):
            for solver in ("scipy", "xla"):
                config = LossConfig(num_points=sizes["points"], point_sampling=sampling)
                kernels = Kernels(assignment=solver)
                ms, memory = measure(predictions, targets, config, kernels, options.repeats)
                print(f"{sampling:<10}{solver:<9}{dtype:<10}{ms:>9.1f}{memory:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
