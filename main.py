"""Train, evaluate and predict with OneFormer.

  python main.py --config=configs/synthetic.py --workdir=runs/synthetic --mode=train
  python main.py --config=configs/synthetic.py --workdir=runs/synthetic --mode=eval
  python main.py --workdir=runs/synthetic --mode=predict --image=FILE_OR_FOLDER --task=all
  python main.py --mode=convert --source=FILE_OR_FOLDER --output=runs/converted
  python main.py --mode=prepare --dataset=coco --source=DIR
  python main.py --config=configs/synthetic.py --mode=inspect
  python main.py --config=configs/synthetic.py --config.mesh.topology=v5e:4x4 --mode=compile

Any value of the config is overridden with --config.KEY=VALUE, as in --config.optim.lr=3e-4.
Running the same command again resumes, or skips what is done.

Loader processes import this file again: what is heavy is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from oneformer_jax import config_rules
from oneformer_jax.files import first_few

COMMON = os.path.join("configs", "common.py")  # every key of a config
TASKS = ("panoptic", "instance", "semantic", "all")
FORMATS = ("workdir", "official", "hugging_face")
OFFICIAL = ("coco", "ade20k", "cityscapes", "mapillary")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, FILE.py or FILE.py:VARIANT.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, logs, results and pictures."
)
_MODES = ("train", "eval", "predict", "convert", "prepare", "inspect", "compile", "replay")
WITH_CONFIG = ("train", "eval", "inspect", "compile", "replay")  # modes that read the config
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", None, "eval, predict, replay: the step; the newest when not given.", 0
)
_IMAGE = flags.DEFINE_string("image", None, "predict: an image file or a folder of them.")
_TASK = flags.DEFINE_enum("task", "all", TASKS, "predict: the task, or all three.")
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", None, "predict: largest image that is read; other modes: data.max_pixels.", 1
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "predict, inspect: folder of the results; WORKDIR/predictions or runs/inspection when not "
    "given. convert: what is written.",
)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "convert: an official .pth, a Hugging Face folder or a workdir. prepare: the folder of a "
    "dataset's own files.",
)
_FORMAT = flags.DEFINE_enum("format", "workdir", FORMATS, "convert: what the output is to be.")
_MODEL = flags.DEFINE_string(
    "model", None, "convert: the published model, where tensors do not tell, as coco:swin_large."
)
_DATASET = flags.DEFINE_enum("dataset", None, OFFICIAL, "prepare: the dataset.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "prepare: where the prepared files go.")
_SPLIT = flags.DEFINE_multi_enum(
    "split", ["train", "validation"], ["train", "validation"], "prepare: only this split."
)
_SKIP_BROKEN = flags.DEFINE_bool("skip_broken", False, "prepare: leave out what is broken.")
_LIMIT = flags.DEFINE_integer("limit", 2000, "inspect: images read for the counts; 0: all.", 0)
_SUGGEST = flags.DEFINE_bool("suggest", False, "compile: if it does not fit, look for what does.")
_QUICK = flags.DEFINE_bool("quick", False, "compile: faster, by other programs than a run has.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of this run. Cloud TPU, GKE, SLURM and MPI tell each its place; "
    "elsewhere give the next three, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "distributed: host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "distributed: number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "distributed: number of this one, from 0.")
_STARTUP_TIMEOUT = flags.DEFINE_float(
    "startup_timeout", 300.0, "distributed: seconds in which all processes must have come.", 1.0
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

# What wrong input raises, here and below. Everything else is a fault of the program and is shown
# with its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
DOES_NOT_FIT = 3  # exit code of --mode=compile


def fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------ the command line


def config_argument(argv: Sequence[str]) -> str | None:
    """Value of --config in `argv`, or None."""
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            return match[1] if match[1] is not None else following
    return None


def overridden_keys(argv: Sequence[str]) -> list[str]:
    """Keys that `argv` overrides: "optim.lr" of "--config.optim.lr=3e-4"."""
    matches = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
    return [match[1] for match in matches if match]


def config_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted keys of all values of `config`, groups included."""
    keys = []
    for name, value in config.items():
        keys.append(prefix + name)
        if isinstance(value, ConfigDict):
            keys += config_keys(value, f"{prefix}{name}.")
    return keys


def unknown_keys(config: ConfigDict, overrides: Iterable[str]) -> str:
    """One line about the `overrides` that are no keys of `config`, or "" if all are.

    Each is given with the keys that it may have been meant as: those with the same last name in
    another group first, then those of similar spelling.
    """
    keys = config_keys(config)
    messages = []
    for override in overrides:
        # An element, as in crop_size[0], belongs to its key.
        if re.sub(r"\[.*", "", override) in keys:
            continue
        last = override.rsplit(".", 1)[-1]
        near = [key for key in keys if key.rsplit(".", 1)[-1] == last]
        near += [k for k in difflib.get_close_matches(override, keys, 3, 0.7) if k not in near]
        hint = ", ".join(f"--config.{key}" for key in near[:3])
        messages.append(
            f"the config has no key {override!r}"
            + (f" (did you mean {hint}?)" if hint else f" (all keys are in {COMMON})")
        )
    return "; ".join(messages)


def wrong_values(config: ConfigDict, path: str, overrides: Sequence[str]) -> str:
    """A line for each of the first wrong values of `config`, or "" if there are none.

    Args:
      config: with the overrides.
      path: of the config file, to which the values belong that are not overridden.
      overrides: keys that are.
    """
    lines = []
    for fault in config_rules.find_faults(config):
        overridden = any(re.sub(r"\[.*", "", key) == fault.key for key in overrides)
        source = "--config." if overridden else f"{path}: "
        lines.append(f"{source}{fault.key}={fault.shown}: it must {fault.text}")
    return first_few(lines, 10, "\n")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl flags and the config; a mistake ends the program with one line and code 2."""
    path = config_argument(argv)
    overrides = overridden_keys(argv)
    if overrides and path is None:
        fail(f"--config.{overrides[0]} overrides a config, but there is no --config=FILE", 2)
    if path is not None and not pathlib.Path(path.split(":")[0]).is_file():
        files = sorted(set(pathlib.Path("configs").glob("[!_]*.py")) - {pathlib.Path(COMMON)})
        here = f"; here are {', '.join(map(str, files))}" if files else ""
        fail(f"--config={path}: there is no such file{here}", 2)
    try:
        rest, message = flags.FLAGS(argv), ""
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        if not overrides and not isinstance(error, flags.Error):
            raise  # the config file itself is at fault
        message = str(error).strip()
        if "Error whilst parsing config file" in message:  # and then its whole traceback
            fail(f"--config={path}: {message.splitlines()[-1]}", 2)
        message = message.replace("\n", "\\n")  # of the value
        message = message if len(message) < 500 else f"{message[:500]}..."
        if not any(key in message for key in overrides) and not isinstance(error, flags.Error):
            message = f"--config.{first_few(overrides)}: {message}"
    if overrides:
        # Loaded once more, without the overrides, to say what the parser does not.
        defaults = flags.FLAGS["config"].parser.parse(path)
        message = unknown_keys(defaults, overrides) or message
    if path is not None and not message and _MODE.value in WITH_CONFIG:
        message = wrong_values(_CONFIG.value, path, overrides)
    if message:
        fail(message, 2)
    return rest


# ------------------------------------------------------------------------ the modes


def run_train(config: ConfigDict, workdir: str) -> None:
    """Trains, evaluates and draws: see `oneformer_jax.train.loop.train`."""
    from input_pipeline import loader, statistics, tokenizer
    from oneformer_jax.train import loop

    source, info = open_split(config, config.dataset.train_split)
    if process()[0] == 0:
        for remark in statistics.remarks(source, info):
            logging.warning("%s", remark)
    # Opened now: what is wrong with it should be said before hours of training.
    evaluation, _ = open_split(config, config.dataset.eval_split)
    settings = train_loader_config(config)
    loop.train(
        config,
        workdir,
        metadata=metadata_of(info),
        text_table=tokenizer.text_table(info.class_names, config.data.text_template),
        train_batches=lambda start_step: loader.train_loader(
            source, settings, info, *process(), start_step
        ),
        eval_batches=eval_batches(config, evaluation),
        image_ids=lambda positions: [str(source[i]["image_id"]) for i in positions],
    )


def run_eval(config: ConfigDict, workdir: str, step: int | None = None) -> None:
    """Evaluates a checkpoint of `workdir`: see `oneformer_jax.train.loop.evaluate_workdir`."""
    from oneformer_jax.train import loop

    source, info = open_split(config, config.dataset.eval_split)
    loop.evaluate_workdir(
        config,
        workdir,
        metadata=metadata_of(info),
        eval_batches=eval_batches(config, source),
        checkpoint_step=step,
    )


def run_predict(
    workdir: str,
    image: str,
    task: str = "all",
    output: str | None = None,
    step: int | None = None,
    max_pixels: int | None = None,
) -> None:
    """Segments an image or a folder of images: see `oneformer_jax.eval.predict.predict_files`."""
    import oneformer_jax
    from oneformer_jax.eval import predict
    from oneformer_jax.train.checkpoint import CHECKPOINT_FOLDER

    output = output or os.path.join(workdir, "predictions")
    path = workdir if step is None else os.path.join(workdir, CHECKPOINT_FOLDER, str(step))
    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    written = predict.predict_files(oneformer_jax.load(path), image, output, task, **limit)
    print(f"{len(written)} files are in {output}:")
    for file in written:
        print(f"  {file}")


def run_convert(source: str, output: str, form: str = "workdir", model: str | None = None) -> None:
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


def run_prepare(
    dataset: str,
    source: str,
    data_dir: str,
    splits: Sequence[str] = ("train", "validation"),
    skip_broken: bool = False,
) -> None:
    """Writes a downloaded dataset as records: see `input_pipeline.builders.preparation`."""
    from input_pipeline.builders import preparation

    preparation.prepare(
        dataset,
        source,
        data_dir,
        splits=tuple(dict.fromkeys(splits)),
        skip_broken=skip_broken,
        log=functools.partial(print, flush=True),
    )


def run_inspect(config: ConfigDict, output: str | None = None, count=12, limit=2000) -> None:
    """Draws `count` training samples; counts what `limit` images hold (0: all); lists faults."""
    from input_pipeline import loader, statistics, tokenizer
    from oneformer_jax.eval import inspection

    output = output or os.path.join("runs", "inspection")
    with statistics.listing_faults(output) as listing:
        source, info = open_split(config, config.dataset.train_split, for_inspection=True)
        found = statistics.collect(source, info, limit)
        found.write_faults(listing)
    settings = dataclasses.replace(train_loader_config(config), num_workers=0, skip_broken=True)
    print(statistics.report(found, info, settings.num_slots, settings.num_texts))
    print(f"\nAll faults and oddities are listed in {listing}")
    texts = tokenizer.detokenize(tokenizer.text_table(info.class_names, config.data.text_template))
    batches, samples = loader.train_loader(source, settings, info), []
    while len(samples) < count:
        batch = next(batches)
        for i, index in enumerate(batch["index"]):
            parts = {key: batch[key][i] for key in inspection.BATCH_KEYS}
            parts["texts"] = [texts[t] for t in batch["text_ids"][i]]
            samples.append(inspection.Sample(**parts, name=source[index]["file_name"]))
    batches.close()
    path = inspection.write(samples[:count], metadata_of(info), output)
    print(f"The first {count} training samples are drawn in {path}")


def run_replay(config: ConfigDict, workdir: str, step: int | None = None) -> None:
    """Runs a step of bad numbers again: see `oneformer_jax.train.replay.replay`."""
    from input_pipeline import tokenizer
    from oneformer_jax.train import replay

    _, info = open_split(config, config.dataset.train_split)
    texts = tokenizer.text_table(info.class_names, config.data.text_template)
    settings = dict(metadata=metadata_of(info), text_table=texts)
    print(replay.replay(config, workdir, step=step, **settings))


def run_compile(config: ConfigDict, **options: bool) -> bool:
    """Compiles a run's programs ahead of time: see `compile.run` for the options; whether they fit.

    Needs no dataset where the classes are known by its name.
    """
    from input_pipeline import datasets, tokenizer
    from oneformer_jax.train import accelerators, compile

    compile.spare_the_host()
    try:
        info = datasets.dataset_info(config.dataset.name)
    except ValueError:
        info = open_split(config, config.dataset.train_split)[1]
    return compile.run(
        config,
        num_classes=len(info.class_names),
        text_table=tokenizer.text_table(info.class_names, config.data.text_template),
        topology=accelerators.open_topology(config.mesh.topology, config.mesh.slices),
        **options,
    )


# ------------------------------------------------------------------------ from config to data


def open_split(config: ConfigDict, split: str, **how: bool):
    """Source and table of one split of the config's dataset; prepares it if need be."""
    from input_pipeline import sources

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
    """The model's view of a dataset's table: the same fields in a type of its own."""
    from oneformer_jax.types import Metadata

    return Metadata(**dataclasses.asdict(info))


def process() -> tuple[int, int]:
    """Index of this process, and how many there are."""
    import jax

    return jax.process_index(), jax.process_count()


def train_loader_config(config: ConfigDict):
    from input_pipeline import loader, tokenizer, transforms

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

    from input_pipeline import eval_loader
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


# ------------------------------------------------------------------------ start


def start_jax(compilation_cache: str = "") -> None:
    """Joins the other processes, if asked to, and keeps compiled programs for the next run."""
    import jax

    from oneformer_jax.train import distributed, observe

    observe.quiet_libraries()
    explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or any(value is not None for value in explicit):
        distributed.start(distributed.find_place(os.environ, *explicit), _STARTUP_TIMEOUT.value)
    if compilation_cache or not jax.config.jax_compilation_cache_dir:
        default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "oneformer_jax"
        folder = pathlib.Path(compilation_cache or default).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def require_flags(**values: object) -> None:
    for name, value in values.items():
        if not value:
            fail(f"--mode={_MODE.value} needs --{name}=...", 2)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        fail(f"{argv[1]!r} is not a flag; flags begin with --", 2)
    mode, config = _MODE.value, _CONFIG.value
    if mode == "convert":
        require_flags(source=_SOURCE.value, output=_OUTPUT.value)
    elif mode == "prepare":
        require_flags(dataset=_DATASET.value, source=_SOURCE.value)
    elif mode in ("inspect", "compile"):
        require_flags(config=config)
    else:
        require_flags(workdir=_WORKDIR.value)
        require_flags(**({"image": _IMAGE.value} if mode == "predict" else {"config": config}))
    try:
        if mode == "prepare":  # without JAX
            return run_prepare(
                _DATASET.value, _SOURCE.value, _DATA_DIR.value, _SPLIT.value, _SKIP_BROKEN.value
            )
        start_jax(config.compilation_cache if config else "")
        if mode == "train":
            run_train(config, _WORKDIR.value)
        elif mode == "compile":
            options = {"try_others": _SUGGEST.value, "quick": _QUICK.value}
            sys.exit(0 if run_compile(config, **options) else DOES_NOT_FIT)
        elif mode == "replay":
            run_replay(config, _WORKDIR.value, _CHECKPOINT.value)
        elif mode == "eval":
            run_eval(config, _WORKDIR.value, _CHECKPOINT.value)
        elif mode == "convert":
            run_convert(_SOURCE.value, _OUTPUT.value, _FORMAT.value, _MODEL.value)
        elif mode == "inspect":
            run_inspect(config, _OUTPUT.value, limit=_LIMIT.value)
        else:
            where = (_WORKDIR.value, _IMAGE.value, _TASK.value, _OUTPUT.value, _CHECKPOINT.value)
            run_predict(*where, _MAX_PIXELS.value)
    except KeyboardInterrupt:
        saved = "finished file" if mode == "prepare" else "checkpoint"
        fail(f"stopped; the same command goes on from the last {saved}", 130)
    except USER_ERRORS as error:
        if _DEBUG.value:
            raise
        fail(f"{error} (--debug shows the traceback)", 1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
