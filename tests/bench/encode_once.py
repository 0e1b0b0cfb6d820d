"""Benchmark: three tasks evaluated together, beside three evaluations of one task each.

python -m tests.bench.encode_once                       # configs/coco.py:resnet50
python -m tests.bench.encode_once --config=coco:swin_tiny --images=2

Both run the same code on the same images in turn: together an image is encoded once and decoded
three times, apart it is encoded for each task. Random parameters; made-up images and truth.
"""

import argparse
import importlib
import statistics
import time

import jax
import numpy as np

from oneformer_jax.eval.evaluate import evaluate
from oneformer_jax.eval.postprocess import PostprocessConfig
from oneformer_jax.eval.predict import STRIDE
from oneformer_jax.eval.predictor import Predictor
from oneformer_jax.input_pipeline.resize import resize_for_test
from oneformer_jax.models import functional
from oneformer_jax.train import settings as train_settings
from oneformer_jax.train.evaluator import postprocess_config
from oneformer_jax.types import TASKS, Metadata
from tests.bench import metrics

PARTS = ("predict", "postprocess", "metrics", "total")


def make_batches(count: int, height: int, width: int, test_size: tuple[int, int]) -> list[dict]:
    """Batches of one image, brought to the test size and padded, with its truth."""
    rng = np.random.default_rng(0)
    batches = []
    for _, _, record in metrics.make_images(count, height, width):
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        resized = resize_for_test(image, *test_size)
        size = resized.shape[:2]
        padded = np.zeros((1, *(-(-side // STRIDE) * STRIDE for side in size), 3), np.uint8)
        padded[0, : size[0], : size[1]] = resized
        batches.append(
            dict(
                image=padded,
                image_size=np.array([size], np.int32),
                original_size=np.array([[height, width]], np.int32),
                valid=np.ones(1, bool),
                records=[record],
            )
        )
    return batches


def make_metadata() -> Metadata:
    count, things = metrics.CLASSES, metrics.THINGS
    return Metadata(
        dataset="coco",
        class_names=tuple(f"class {k}" for k in range(count)),
        is_thing=tuple(k < things for k in range(count)),
        colors=((0, 0, 0),) * count,
        category_ids=tuple(range(1, count + 1)),
    )


def measure(call) -> dict[str, float]:
    """Seconds of `call`, which gives evaluation results: their parts, all, and of all cores."""
    start, cpu = time.perf_counter(), time.process_time()
    results = call()
    seconds = {part: sum(result.seconds[part] for result in results) for part in PARTS}
    wall = time.perf_counter() - start
    return seconds | {"total": wall, "processor": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="coco:resnet50", help="recipe, FILE:VARIANT")
    parser.add_argument("--short_edge", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    file, *variant = options.config.split(":")
    config = importlib.import_module(f"oneformer_jax.configs.{file}").get_config(*variant)
    if options.short_edge:
        config.eval.short_edge = options.short_edge
    model = train_settings.model_config(config, metrics.CLASSES)
    graph, *state = functional.init(model, 0, training=False)
    predictor = Predictor(functional.programs(graph), *jax.device_put(state))
    test_size = (config.eval.short_edge, config.eval.max_size)
    batches = make_batches(options.images, options.height, options.width, test_size)
    postprocess: PostprocessConfig = postprocess_config(config)
    settings = dict(metadata=make_metadata(), postprocess=postprocess)

    def together():
        return [evaluate(predictor, batches, **settings)]

    def apart():
        return [evaluate(predictor, batches, outputs=(task,), **settings) for task in TASKS]

    # Compiles everything, and shows that the scores are the same.
    (all_tasks,) = together()
    single = {name: value for result in apart() for name, value in result.metrics.items()}
    assert all_tasks.metrics == single, "encoded once, the scores are others"

    rounds = [(measure(together), measure(apart)) for _ in range(options.rounds)]
    shape = "x".join(map(str, batches[0]["image"].shape[1:3]))
    print(
        f"{options.config}, {options.images} images of {options.width} x {options.height}, padded "
        f"{shape}, {jax.devices()[0].device_kind}: seconds, medians of {options.rounds} rounds"
    )
    print(f"{'':<12}{'together':>10}{'apart':>10}{'ratio':>8}")
    for part in (*PARTS, "processor"):
        once, thrice = (statistics.median(r[i][part] for r in rounds) for i in (0, 1))
        print(f"{part:<12}{once:>10.2f}{thrice:>10.2f}{once / thrice:>8.2f}")


if __name__ == "__main__":
    main()
