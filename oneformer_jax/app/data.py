"""From a config to sources, loaders and the classes of a dataset."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

from absl import logging
from ml_collections import ConfigDict

from oneformer_jax import config_rules


def with_architecture(config: ConfigDict, workdir: str | None = None) -> ConfigDict:
    """Takes the architecture of `init.checkpoint`: see `train.start.take_architecture`."""
    from oneformer_jax.configs import common
    from oneformer_jax.train import start

    return start.take_architecture(config, common.get_base(), workdir)


def open_split(config: ConfigDict, split: str, **how: bool):
    """Returns source and table of one split of the config's dataset; prepares it if need be."""
    from oneformer_jax.input_pipeline import sources

    dataset, options = config.dataset, dict(config.dataset.options)
    if "skip_broken" in sources.OPTIONS.get(dataset.name, {}):  # one switch, also of preparation
        options.setdefault("skip_broken", config.data.skip_broken)
    return sources.open_source(
        dataset.name,
        data_dir=dataset.data_dir,
        split=split,
        options=options,
        max_pixels=config.data.max_pixels,
        **how,
    )


def metadata_of(info):
    """Returns the model's view of a dataset's table: the same fields in a type of its own."""
    from oneformer_jax.types import Metadata

    return Metadata(**dataclasses.asdict(info))


def process() -> tuple[int, int]:
    """Returns the index of this process, and how many there are."""
    import jax

    return jax.process_index(), jax.process_count()


def with_steps(config: ConfigDict, source) -> ConfigDict:
    """Returns the config with `train.steps` for `train.epochs` passes over the training images."""
    if not config.train.epochs:
        return config
    from oneformer_jax.input_pipeline import loader

    images = len(loader.training_images(source, config.data.require_things))
    config = config.copy_and_resolve_references()
    config.train.steps = max(1, round(config.train.epochs * images / config.data.batch_size))
    logging.info(
        "train.epochs=%g of %d images in batches of %d are %d steps",
        *(config.train.epochs, images, config.data.batch_size, config.train.steps),
    )
    return config


def train_loader_config(config: ConfigDict):
    from oneformer_jax.input_pipeline import loader, tokenizer, transforms

    data = config.data
    semantic, instance = task_probabilities(data)
    return loader.LoaderConfig(
        batch_size=data.batch_size // process()[1],  # the loop checks that it divides
        num_slots=data.num_slots,
        num_texts=config.model.num_queries - config.model.num_context,
        augment=transforms.AugmentConfig(crop_size=data.crop_size, **data.augment),
        seed=config.seed,
        semantic_prob=semantic,
        instance_prob=instance,
        text_types=tokenizer.names_type(data.text_template),
        num_workers=data.workers,
        num_threads=data.threads,
        prefetch=data.prefetch,
        skip_broken=data.skip_broken,
        require_things=data.require_things,
    )


def task_probabilities(data: ConfigDict) -> tuple[float, float]:
    """Probabilities of the semantic and of the instance task; the rest is panoptic."""
    config_rules.require({"data.only_task": data.only_task})
    if not data.only_task:
        return data.semantic_prob, data.instance_prob
    return float(data.only_task == "semantic"), float(data.only_task == "instance")


def eval_batches(config: ConfigDict, source) -> Callable[[int], Iterable[dict]]:
    """Gives, at every call, one pass over an even sample of the evaluation split (0: all of it)."""
    import jax

    from oneformer_jax.input_pipeline import eval_loader
    from oneformer_jax.train import evaluator

    tta = evaluator.tta_config(config)
    devices, processes = jax.device_count(), process()[1]
    settings = eval_loader.EvalLoaderConfig(
        batch_size=-(-config.eval.batch_size // devices) * devices // processes,
        short_edge=config.eval.short_edge,
        max_size=config.eval.max_size,
        bucket_multiple=config.eval.bucket_multiple,
        max_buckets=config.eval.max_buckets,
        tta_short_edges=tta.short_edges if tta else (),
        tta_max_size=tta.max_size if tta else 0,
        skip_broken=config.data.skip_broken,
    )
    return functools.cache(
        lambda limit: eval_loader.eval_loader(
            source, dataclasses.replace(settings, limit=limit), *process()
        )
    )
