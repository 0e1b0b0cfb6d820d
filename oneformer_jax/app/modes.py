"""Runs the modes of the command line, one function each.

What is heavy is imported where it is used, since loader workers import the program again.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence

from absl import logging
from ml_collections import ConfigDict

from oneformer_jax.app import data


def train(config: ConfigDict, workdir: str) -> None:
    """Trains, evaluates and draws: see `oneformer_jax.train.loop.train`."""
    from oneformer_jax.input_pipeline import loader, statistics, tokenizer
    from oneformer_jax.train import loop

    source, info = data.open_split(config, config.dataset.train_split)
    if data.process()[0] == 0:
        for remark in statistics.remarks(source, info):
            logging.warning("%s", remark)
    # Opened now: what is wrong with it should be said before hours of training.
    evaluation, _ = data.open_split(config, config.dataset.eval_split)
    settings = data.train_loader_config(config)
    loop.train(
        config,
        workdir,
        metadata=data.metadata_of(info),
        text_table=tokenizer.text_table(info.class_names, config.data.text_template),
        train_batches=lambda start_step: loader.train_loader(
            source, settings, info, *data.process(), start_step
        ),
        eval_batches=data.eval_batches(config, evaluation),
        image_ids=lambda positions: [str(source[i]["image_id"]) for i in positions],
    )


def evaluate(config: ConfigDict, workdir: str, step: int | None = None) -> None:
    """Evaluates a checkpoint of `workdir`: see `oneformer_jax.train.loop.evaluate_workdir`."""
    from oneformer_jax.train import loop

    source, info = data.open_split(config, config.dataset.eval_split)
    loop.evaluate_workdir(
        config,
        workdir,
        metadata=data.metadata_of(info),
        eval_batches=data.eval_batches(config, source),
        checkpoint_step=step,
    )


def predict(
    workdir: str,
    image: str,
    task: str = "all",
    output: str | None = None,
    step: int | None = None,
    max_pixels: int | None = None,
) -> None:
    """Segments images or a video: see `eval.predict.predict_files`, `eval.video.predict_video`."""
    import oneformer_jax
    from oneformer_jax.eval import clips, predict, video
    from oneformer_jax.train.checkpoint import CHECKPOINT_FOLDER

    output = output or os.path.join(workdir, "predictions")
    path = workdir if step is None else os.path.join(workdir, CHECKPOINT_FOLDER, str(step))
    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    if clips.is_clip(image):
        clips.library()  # before the model is loaded
        written = video.predict_video(oneformer_jax.load(path), image, output, task, **limit)
    else:
        written = predict.predict_files(oneformer_jax.load(path), image, output, task, **limit)
    print(f"{len(written)} files are in {output}:")
    for file in written:
        print(f"  {file}")


def convert(source: str, output: str, form: str = "workdir", model: str | None = None) -> None:
    """Converts weights between this program's workdirs and the files of other programs."""
    import oneformer_jax
    from oneformer_jax.train import checkpoint
    from oneformer_jax.weights import convert, files

    if files.is_foreign(source):
        found = convert.read_model(source, config=model)
        print(found.summary())
        trained = checkpoint.Trained(
            found.config.to_dict(),
            found.params,
            found.stats,
            oneformer_jax.classes_of(found, source),
            {"eval": found.settings},
            step=0,
        )
    else:
        trained = checkpoint.load_for_inference(source)
    if form == "workdir":
        checkpoint.write_converted(output, trained)
    else:
        convert.write_model(
            output,
            form,
            oneformer_jax.OneFormerConfig.from_dict(trained.model),
            trained.params,
            trained.stats,
            metadata=trained.metadata,
            settings=trained.settings["eval"],
        )
    print(f"{source} is converted to {output}")


def prepare(
    dataset: str,
    source: str,
    data_dir: str,
    splits: Sequence[str] = ("train", "validation"),
    skip_broken: bool = False,
) -> None:
    """Writes a downloaded dataset as records: see `input_pipeline.builders.preparation`."""
    from oneformer_jax.input_pipeline.builders import preparation

    preparation.prepare(
        dataset,
        source,
        data_dir,
        splits=tuple(dict.fromkeys(splits)),
        skip_broken=skip_broken,
        log=functools.partial(print, flush=True),
    )


def import_data(form: str, source: str, data_dir: str) -> None:
    """Imports a labelling tool's export: see `input_pipeline.importers.import_export`."""
    from oneformer_jax.input_pipeline import importers

    print(importers.import_export(form, source, data_dir))


def inspect_data(config: ConfigDict, output: str | None = None, count=12, limit=2000) -> None:
    """Draws `count` training samples; counts what `limit` images hold (0: all); lists faults."""
    from oneformer_jax.eval.pictures import inspection
    from oneformer_jax.input_pipeline import loader, statistics, tokenizer

    output = output or os.path.join("runs", "inspection")
    with statistics.listing_faults(output) as listing:
        source, info = data.open_split(config, config.dataset.train_split, for_inspection=True)
        found = statistics.collect(source, info, limit)
        found.write_faults(listing)
    settings = dataclasses.replace(
        data.train_loader_config(config), num_workers=0, skip_broken=True
    )
    print(statistics.report(found, info, settings.num_slots, settings.num_texts))
    print(f"\nAll faults and oddities are listed in {listing}")
    table = tokenizer.text_table(info.class_names, config.data.text_template)
    texts = tokenizer.detokenize(table)
    batches, samples = loader.train_loader(source, settings, info), []
    while len(samples) < count:
        batch = next(batches)
        for i, index in enumerate(batch["index"]):
            parts = {key: batch[key][i] for key in inspection.BATCH_KEYS}
            parts["texts"] = [texts[t] for t in batch["text_ids"][i]]
            samples.append(inspection.Sample(**parts, name=source[index]["file_name"]))
    batches.close()
    path = inspection.write(samples[:count], data.metadata_of(info), output)
    print(f"The first {count} training samples are drawn in {path}")


def replay(config: ConfigDict, workdir: str, step: int | None = None) -> None:
    """Runs a step of bad numbers again: see `oneformer_jax.train.replay.replay`."""
    from oneformer_jax.input_pipeline import tokenizer
    from oneformer_jax.train import replay

    _, info = data.open_split(config, config.dataset.train_split)
    texts = tokenizer.text_table(info.class_names, config.data.text_template)
    settings = dict(metadata=data.metadata_of(info), text_table=texts)
    print(replay.replay(config, workdir, step=step, **settings))


def compile_programs(config: ConfigDict, **options: bool) -> bool:
    """Compiles a run's programs ahead of time: see `compile.run` for the options; whether they fit.

    Needs no dataset where the classes are known by its name.
    """
    from oneformer_jax.compile import compile, topologies
    from oneformer_jax.input_pipeline import datasets, tokenizer

    compile.spare_the_host()
    try:
        info = datasets.dataset_info(config.dataset.name)
    except ValueError:
        info = data.open_split(config, config.dataset.train_split)[1]
    return compile.run(
        config,
        num_classes=len(info.class_names),
        text_table=tokenizer.text_table(info.class_names, config.data.text_template),
        topology=topologies.open_topology(config.mesh.topology, config.mesh.slices),
        **options,
    )
