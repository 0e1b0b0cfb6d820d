"""Runs the modes of the command line, one function each.

What is heavy is imported where it is used, since loader workers import the program again.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from oneformer_jax import remote
from oneformer_jax.app import data


def train(config: ConfigDict, workdir: str, compiled_step: str = "") -> None:
    """Trains, evaluates and draws: see `oneformer_jax.train.loop.train`."""
    from oneformer_jax.input_pipeline import loader, statistics, tokenizer
    from oneformer_jax.train import loop, start

    # Wrong weights are found before the data is opened or prepared, which takes longer.
    config = data.with_architecture(config, workdir)
    start.check_start(config, workdir)
    source, info = data.open_split(config, config.dataset.train_split)
    config = data.with_steps(config, source)
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
        compiled_step=compiled_step,
    )
    if data.process()[0] == 0:
        try:
            report(workdir)
        except (OSError, ValueError) as error:  # the training itself is done
            logging.warning("there is no report: %s", error)


def report(workdir: str, compare: Sequence[str] = (), output: str | None = None) -> None:
    """Writes the report of a run, or a comparison of runs: see `report.write_report`."""
    from oneformer_jax import report

    print(f"report       {report.write_report(workdir, compare, output)}", flush=True)


def evaluate(config: ConfigDict, workdir: str, which: str | int = "latest") -> None:
    """Evaluates a checkpoint of `workdir`: see `oneformer_jax.train.loop.evaluate_workdir`."""
    from oneformer_jax.train import checkpoint, loop

    checkpoint.find_checkpoint(workdir, which)  # before the data, which takes longer
    source, info = data.open_split(config, config.dataset.eval_split)
    loop.evaluate_workdir(
        config,
        workdir,
        metadata=data.metadata_of(info),
        eval_batches=data.eval_batches(config, source),
        which=which,
    )


# Groups and keys of a config that act in prediction.
PREDICTION_KEYS = ("eval.", "kernels.", "model.dtype", "model.scan_layers")


def predict(
    weights: str,
    image: str,
    task: str,
    output: str | None,
    *,
    which: str | int = "auto",
    threshold: float | None = None,
    overwrite: bool = False,
    max_pixels: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Segments images or a video: see `eval.folder.predict_files`, `eval.video.predict_video`.

    Args:
      weights: what `oneformer_jax.load` takes.
      image, task, threshold, overwrite, max_pixels: see `predict_files`.
      output: folder of the results; None is "predictions" in the workdir `weights`.
      which: see `oneformer_jax.load`.
      settings: overridden keys of a config, by their dotted names, and their values.

    Raises:
      ValueError: a key that does not act in prediction, or the errors of loading and predicting.
    """
    import oneformer_jax
    from oneformer_jax.eval import clips, folder, video
    from oneformer_jax.weights import fetch

    limit: dict[str, Any] = {} if max_pixels is None else {"max_pixels": max_pixels}
    chosen = _prediction_settings(settings or {})
    weights = os.path.expanduser(weights)
    target = output or os.path.join(weights, "predictions")
    is_clip = clips.is_clip(image)
    if is_clip:
        remote.require_local(target, "--output of a video")
        clips.library()  # before the model is loaded
    else:
        found = folder.find_images(image, target)
    path = fetch.local_path(weights)
    if output is None and not remote.is_remote(path) and not os.path.lexists(weights):
        raise ValueError(f"{weights} is no folder of a run: name one for the results, --output=...")
    segmenter = oneformer_jax.load(path, checkpoint=which, **chosen)
    if is_clip:
        if threshold is not None:
            segmenter = functools.partial(segmenter, threshold=threshold)
            limit["min_score"] = threshold
        written = video.predict_video(segmenter, image, target, task, **limit)
        print(f"The video is segmented; {len(written)} results are in {target}:")
        for file in written:
            print(f"  {file}")
        return
    _require_weights(segmenter, weights)
    options = dict(threshold=threshold, overwrite=overwrite)
    report = folder.predict_files(segmenter, found, target, task, **limit, **options)
    skipped = f", {report.skipped} were done already" if report.skipped else ""
    print(f"{report.segmented} of {len(found)} images segmented{skipped}; results: {target}")


def demo(
    weights: str,
    host: str,
    port: int,
    *,
    which: str | int = "auto",
    threshold: float | None = None,
    max_pixels: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Serves a page that segments images: see `demo.page.serve`; the others as for `predict`."""
    import oneformer_jax
    from oneformer_jax.demo import page

    chosen = _prediction_settings(settings or {})
    page.check()  # before the model is loaded
    segmenter = oneformer_jax.load(weights, checkpoint=which, **chosen)
    _require_weights(segmenter, weights)
    page.serve(segmenter, host, port, threshold=threshold, max_pixels=max_pixels)


def _require_weights(segmenter: Any, path: str) -> None:
    """Raises a ValueError for a model of an exported file, whose program is as it is."""
    import oneformer_jax

    if not isinstance(segmenter, oneformer_jax.Segmenter):
        raise ValueError(f"{path} is an exported program; name the weights that it was made from")


def _prediction_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turns overridden keys of a config into settings of `oneformer_jax.load`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        if key in ("eval.limit", "eval.tasks", "eval.protocol") or key.startswith("eval.tta"):
            raise ValueError(f"--config.{key} is for evaluation; it does nothing in prediction")
        if group == "kernels":
            found.setdefault("kernels", {})[name] = value
        elif group == "eval" or key in ("model.dtype", "model.scan_layers"):
            found[name] = value
        else:
            raise ValueError(
                f"--config.{key} does nothing in prediction, which takes the model and its "
                f"settings from the weights; these keys act: {', '.join(PREDICTION_KEYS)}"
            )
    return found


def convert(
    source: str,
    output: str,
    form: str = "workdir",
    model: str | None = None,
    push: str | None = None,
    license: str = "",
) -> None:
    """Converts weights between this program's workdirs and the files of other programs.

    With `push`, a name on the Hugging Face hub, the written folder goes there, too.
    """
    import oneformer_jax
    from oneformer_jax.app import publish
    from oneformer_jax.train import checkpoint
    from oneformer_jax.weights import convert, fetch, files

    if form != "workdir":
        remote.require_local(output, f"--output with --format={form}")
    if push:
        publish.check(push, form)
    path = fetch.local_path(source)
    if files.is_foreign(path):
        found = convert.read_model(path, config=model)
        print(found.summary())
        trained = checkpoint.Trained(
            found.config.to_dict(),
            found.params,
            found.stats,
            oneformer_jax.classes_of(found, path),
            {"eval": found.settings},
            step=0,
        )
    elif model:
        raise ValueError(
            f"{path} is a workdir, which holds its own model; leave out --model={model}"
        )
    else:
        trained = checkpoint.load_for_inference(path)
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
    print(f"{fetch.shown(source)} is converted to {output}")
    if push:
        print(publish.push(output, push, trained, path, license))


def export(
    source: str,
    output: str,
    form: str,
    task: str,
    size: tuple[int, int],
    postprocess: bool = False,
    license: str = "",
    *,
    which: str | int = "auto",
) -> None:
    """Writes a model as a program of "stablehlo" or "onnx": see `oneformer_jax.export`."""
    import oneformer_jax
    from oneformer_jax.export import description, onnx_model, stablehlo

    segmenter = oneformer_jax.load(source, checkpoint=which)
    _require_weights(segmenter, source)
    about = description.describe(
        task=task,
        size=size,
        postprocess=postprocess,
        num_queries=segmenter.config.num_queries,
        metadata=segmenter.metadata,
        thresholds=segmenter.postprocess,
        license=license,
        made_by=f"OneFormer-JAX {oneformer_jax.__version__}",
    )
    {"stablehlo": stablehlo, "onnx": onnx_model}[form].write(output, segmenter, about)
    print(f"{source} is exported for the {task} task to {output}")


def prepare(
    dataset: str,
    source: str,
    data_dir: str,
    splits: Sequence[str] = ("train", "validation"),
    skip_broken: bool = False,
) -> None:
    """Writes a downloaded dataset as records: see `input_pipeline.builders.preparation`."""
    from oneformer_jax.input_pipeline.builders import preparation

    remote.require_local(source, "--source of --mode=prepare")
    remote.require_local(data_dir, "--data_dir of --mode=prepare")
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
    remote.require_local(output, "--output of --mode=inspect")
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

    replay.find_record(workdir, step)  # before the data, which takes longer
    config = data.with_architecture(config, workdir)
    source, info = data.open_split(config, config.dataset.train_split)
    config = data.with_steps(config, source)
    texts = tokenizer.text_table(info.class_names, config.data.text_template)
    settings = dict(metadata=data.metadata_of(info), text_table=texts)
    print(replay.replay(config, workdir, step=step, **settings))


def compile_programs(config: ConfigDict, **options: bool | str) -> bool:
    """Compiles a run's programs ahead of time: see `compile.run` for the options; whether they fit.

    Needs no dataset where the classes are known by its name.
    """
    from oneformer_jax.compile import compile, topologies

    compile.spare_the_host()
    config = data.with_architecture(config)
    return compile.run(
        config,
        **_classes(config),
        topology=topologies.open_topology(config.mesh.topology, config.mesh.slices),
        **options,
    )


def calibrate(config: ConfigDict) -> None:
    """Prints which kernels are right and fastest here: see `train.kernel_choice.table`."""
    from oneformer_jax.train import kernel_choice

    config = data.with_architecture(config)
    print(kernel_choice.table(config, **_classes(config)))


def _classes(config: ConfigDict) -> dict[str, Any]:
    """Returns the number of classes and the texts, without a dataset where its name tells them."""
    from oneformer_jax.input_pipeline import datasets, tokenizer

    try:
        info = datasets.dataset_info(config.dataset.name)
    except ValueError:
        info = data.open_split(config, config.dataset.train_split)[1]
    texts = tokenizer.text_table(info.class_names, config.data.text_template)
    return {"num_classes": len(info.class_names), "text_table": texts}
