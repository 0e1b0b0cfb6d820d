"""Trains, evaluates and predicts with OneFormer.

  python main.py --config=synthetic --workdir=runs/synthetic --mode=train
  python main.py --config=configs/synthetic.py --workdir=runs/synthetic --mode=eval
  python main.py --workdir=runs/synthetic --mode=predict --image=FILE_OR_FOLDER --task=all
  python main.py --workdir=runs/synthetic --mode=demo
  python main.py --mode=convert --source=FILE_OR_FOLDER --output=runs/converted
  python main.py --mode=export --weights=X --format=onnx --size=512x512 --task=panoptic --output=X
  python main.py --mode=prepare --dataset=coco --source=DIR
  python main.py --mode=import --format=labelme --source=DIR --data_dir=NEW_DIR
  python main.py --config=configs/synthetic.py --mode=inspect
  python main.py --config=configs/synthetic.py --config.mesh.topology=v5e:4x4 --mode=compile
  python main.py --config=configs/synthetic.py --mode=calibrate
  python main.py --workdir=runs/a --mode=report --compare=runs/b

--config takes a file, configs/coco.py:swin_large, or the name of one that is shipped,
coco:swin_large. Any value is overridden with --config.KEY=VALUE, as in --config.optim.lr=3e-4.
Running the same command again resumes, or skips what is done.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import oneformer_jax
from oneformer_jax import config_rules
from oneformer_jax.app import modes, overrides
from oneformer_jax.files import did_you_mean, first_few

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"  # those that are shipped
TASKS = (*config_rules.TASKS, "all")
FORMATS = ("workdir", "official", "hugging_face")
PROGRAMS = ("stablehlo", "onnx")  # formats of exports
TOOLS = ("labelme", "cvat", "yolo", "label_studio", "mask_folders")  # of labelling
OFFICIAL = ("coco", "ade20k", "cityscapes", "mapillary")

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config: FILE.py, NAME of a shipped one, or either with :VARIANT.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, logs, results and pictures."
)
_MODES = {
    "train": "train --config in --workdir, with evaluations and pictures; the default",
    "eval": "evaluate a checkpoint of --workdir",
    "predict": "segment --image with the model of --workdir or --weights",
    "demo": "serve a page that segments images with the model of --workdir or --weights",
    "convert": "turn --source into --output: weights of one program into those of another",
    "export": "write the model of --workdir or --weights as a StableHLO or ONNX program",
    "prepare": "write the files of --dataset in --source as records",
    "import": "turn a labelling tool's export in --source into the COCO layout",
    "inspect": "count, check and draw the training data of --config",
    "compile": "compile a run for accelerators that are not here, and tell whether it fits",
    "replay": "run a recorded step of bad numbers again",
    "calibrate": "measure the kernels of --config on the device that is here",
    "report": "write the report.html of --workdir, or compare it with other runs",
}
# Flags that a mode needs, but for "workdir" and "config", which the others need.
_NEEDS = {
    "predict": ("image",),
    "demo": (),
    "convert": ("source", "output"),
    "export": ("output", "size"),
    "prepare": ("dataset", "source"),
    "import": ("source",),
    "inspect": ("config",),
    "compile": ("config",),
    "calibrate": ("config",),
    "report": ("workdir",),
}
# What Ctrl-C leaves behind.
_STOPPED = {
    "train": "; the same command goes on from the last checkpoint",
    "prepare": "; the same command goes on from the last finished file",
    "predict": "; the same command goes on from the last finished file",
    "import": "; nothing was written",
}
# Modes that read the config.
WITH_CONFIG = ("train", "eval", "inspect", "compile", "replay", "calibrate")
_MODE = flags.DEFINE_enum("mode", "train", tuple(_MODES), "What to do.")
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "predict, demo, export: a workdir, an official .pth, a Hugging Face folder, "
    "OWNER/NAME@REVISION of the hub, or an address (https, gs, s3).",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "eval, predict, demo, export: a step, latest or best; replay: a recorded step. When not given: "
    "the latest, but predict, demo and export take the best where there are scores.",
)
_IMAGE = flags.DEFINE_string(
    "image", None, "predict: an image, a folder of them, a video, or '*.png'."
)
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "predict, demo: keep segments whose score is above this.", 0.0, 1.0
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "predict: segment again what is done.")
_TASK = flags.DEFINE_enum("task", "all", TASKS, "predict: the task, or all three; export: one.")
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    None,
    "predict, demo: largest image that is read; other modes: data.max_pixels.",
    1,
)
_COMPARE = flags.DEFINE_multi_string("compare", [], "report: the workdir of another run")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "demo: address; 0.0.0.0 is open to the network.")
_PORT = flags.DEFINE_integer("port", 7860, "demo: port of the page.", 1, 65535)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "predict, inspect: folder of the results; WORKDIR/predictions or runs/inspection when not "
    "given. convert, export, report: what is written.",
)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "convert: a workdir, an official .pth, a Hugging Face folder, OWNER/NAME@REVISION of the hub, "
    "or an address (https, gs, s3). prepare, import: the folder of a dataset's own files, or of a "
    "labelling tool's export.",
)
_FORMAT = flags.DEFINE_enum(
    "format",
    None,
    FORMATS + PROGRAMS + TOOLS,
    "convert, export: what the output is to be. import: what is read.",
)
_SIZE = flags.DEFINE_string("size", None, "export: height x width of the images, as 512x1024.")
_POSTPROCESS = flags.DEFINE_bool("postprocess", False, "export: give final maps, not logits.")
_MODEL = flags.DEFINE_string(
    "model", None, "convert: the published model, where tensors do not tell, as coco:swin_large."
)
_PUSH = flags.DEFINE_string(
    "push", None, "convert to hugging_face: the model on the hub, OWNER/NAME, where it goes."
)
_LICENSE = flags.DEFINE_string(
    "license", "", "convert, export: licence of the weights, as apache-2.0; it goes with them."
)
_DATASET = flags.DEFINE_enum("dataset", None, OFFICIAL, "prepare: the dataset.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "prepare, import: where the files go.")
_SPLIT = flags.DEFINE_multi_enum(
    "split", ["train", "validation"], ["train", "validation"], "prepare: only this split"
)
_SKIP_BROKEN = flags.DEFINE_bool("skip_broken", False, "prepare: leave out what is broken.")
_LIMIT = flags.DEFINE_integer("limit", 2000, "inspect: images read for the counts; 0: all.", 0)
_SUGGEST = flags.DEFINE_bool("suggest", False, "compile: if it does not fit, look for what does.")
_QUICK = flags.DEFINE_bool("quick", False, "compile: faster, by other programs than a run has.")
_SAVE = flags.DEFINE_string("save", "", "compile: file for the compiled training step.")
_COMPILED = flags.DEFINE_string(
    "compiled",
    "",
    "train: FILE@SHA256, a compiled training step, as --mode=compile --save gave it.",
)
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
flags.DEFINE_bool("version", False, "Show the version and end.")

# What wrong input raises, here and below. Everything else is a fault of the program and is shown
# with its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
DOES_NOT_FIT = 3  # exit code of --mode=compile


def fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------ the command line


def argument(argv: Sequence[str], flag: str = "config") -> str | None:
    """Returns the value of a flag in `argv`, or None."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(rf"--?{flag}(?:=(.*))?", word, re.DOTALL):
            return match[1] if match[1] is not None else following
    return None


def shipped_configs() -> list[str]:
    """Returns the names of the configs in the package."""
    return sorted(f.stem for f in CONFIGS.glob("[!_]*.py") if f.name != "common.py")


def with_config_file(argv: Sequence[str]) -> list[str]:
    """Returns `argv`, in which the name of a shipped config has become the path of its file.

    A mistake ends the program with one line and code 2.
    """
    given = argument(argv)
    if given is None or pathlib.Path(given.split(":")[0]).is_file():
        return list(argv)
    name, colon, variant = given.partition(":")
    if name not in shipped_configs():
        hint = (
            did_you_mean(name, shipped_configs()) or f"; shipped are {', '.join(shipped_configs())}"
        )
        fail(f"--config={given}: there is no such file{hint}", 2)
    found = f"--config={CONFIGS / name}.py{colon}{variant}"
    position = next(i for i, word in enumerate(argv) if re.match(r"--?config(=|$)", word))
    return [*argv[:position], found, *argv[position + 1 + (argv[position].find("=") < 0) :]]


def help_text() -> str:
    """Returns what --help shows: modes and flags, a line or two for each."""
    lines = [__doc__.strip(), "", "Modes:"]
    lines += [f"  {name:<10}{text}" for name, text in _MODES.items()]
    lines += ["", "Flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        default = "" if flag.default in (None, False, []) else f" (default: {flag.default_as_str})"
        lines += textwrap.wrap(
            f"--{flag.name}: {' '.join(flag.help.split())}{default}",
            98,
            initial_indent="  ",
            subsequent_indent="      ",
        )
    return "\n".join(lines)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl flags and the config; a mistake ends the program with one line and code 2."""
    if "--version" in argv:
        print(f"oneformer-jax {oneformer_jax.__version__}")
        sys.exit(0)
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
        print(help_text())
        sys.exit(0)
    if (
        argument(argv, "mode") in ("predict", "demo")
        and argument(argv) is None
        and overrides.overridden_keys(argv)
    ):
        # They act on the settings of the weights: the config only tells their types.
        argv = [argv[0], f"--config={CONFIGS / 'custom.py'}", *argv[1:]]
    argv = with_config_file(argv)
    path = argument(argv)
    changed = overrides.overridden_keys(argv)
    if changed and path is None:
        fail(f"--config.{changed[0]} overrides a config, but there is no --config=FILE", 2)
    try:
        rest, message = flags.FLAGS(argv), ""
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        if not changed and not isinstance(error, flags.Error):
            raise  # the config file itself is at fault
        message = str(error).strip()
        if "Error whilst parsing config file" in message:  # and then its whole traceback
            fail(f"--config={path}: {message.splitlines()[-1]}", 2)
        message = message.replace("\n", "\\n")  # of the value
        message = message if len(message) < 500 else f"{message[:500]}..."
        if not any(key in message for key in changed) and not isinstance(error, flags.Error):
            message = f"--config.{first_few(changed)}: {message}"
    if changed:
        # Loaded once more, without the overrides, to say what the parser does not.
        defaults = flags.FLAGS["config"].parser.parse(path)
        message = overrides.unknown_keys(defaults, changed) or message
    if path is not None and not message and _MODE.value in WITH_CONFIG:
        if line := config_rules.upgrade(_CONFIG.value):
            logging.warning("%s: %s", path, line)
        message = overrides.wrong_values(_CONFIG.value, path, changed)
    if message:
        fail(message, 2)
    return rest


# ------------------------------------------------------------------------ start


def start_jax(config: ConfigDict | None = None) -> None:
    """Joins the other processes, if asked to, and keeps compiled programs for the next run."""
    from oneformer_jax import compilation
    from oneformer_jax.train import observe
    from oneformer_jax.train.runtime import agreement, distributed

    observe.quiet_libraries()
    explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or any(value is not None for value in explicit):
        command = {flag.name: flag.value for flag in (_MODE, _WORKDIR, _CHECKPOINT, _COMPILED)}
        facts = agreement.facts_of(config.to_dict() if config else {}, command)
        place = distributed.find_place(os.environ, *explicit)
        distributed.start(place, _STARTUP_TIMEOUT.value, facts)
    compilation.keep_programs(config.compilation_cache if config else "")


def check_flags(mode: str) -> None:
    """Ends the program if the mode lacks a flag, or a flag is given that does nothing in it."""
    for name in _NEEDS.get(mode, ("workdir", "config")):
        if not flags.FLAGS[name].value:
            fail(f"--mode={mode} needs --{name}=...", 2)
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        acts_in = modes_of(flag)
        if flag.present and acts_in and mode not in acts_in:
            fail(f"--{flag.name} belongs to --mode={' or '.join(acts_in)}, not to --mode={mode}", 2)


def modes_of(flag: flags.Flag) -> list[str]:
    """Lists the modes in which a flag acts, as its help tells before a colon; [] for all."""
    heads = re.findall(r"(?:^|[.;>]:? )([a-z_, ]+): ", flag.help)  # "<a|b>: " begins an enum's
    return [word for head in heads for word in re.split(",? ", head) if word in _MODES]


def path_of(flag: flags.FlagHolder[str | None]) -> str:
    """Returns a path with "~" expanded, which shells do not after a "="; "" if it is not given."""
    return os.path.expanduser(flag.value or "")


def chosen_weights() -> str:
    """Returns --workdir or --weights, of which one must be given."""
    if bool(_WORKDIR.value) == bool(_WEIGHTS.value):
        fail(f"--mode={_MODE.value} needs --workdir=... or --weights=..., and not both", 2)
    return path_of(_WEIGHTS) or path_of(_WORKDIR)


def prediction_paths() -> tuple[str, str | None]:
    """Returns the weights to predict with, and where the results go; None: into their workdir."""
    weights = chosen_weights()
    if not _OUTPUT.value and (_WEIGHTS.value or os.path.isfile(weights)):
        fail("--mode=predict with other weights than a run's needs --output=FOLDER", 2)
    return weights, path_of(_OUTPUT) or None


def chosen_format(formats: Sequence[str], default: str = "") -> str:
    """Returns --format, which must be one of the mode's."""
    found = _FORMAT.value or default
    if found not in formats:
        fail(f"--mode={_MODE.value} needs --format={' or '.join(formats)}", 2)
    return found


def image_size() -> tuple[int, int]:
    """Returns (height, width) of --size."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", _SIZE.value)
    if not match:
        fail(f"--size={_SIZE.value}: it must be a height and a width, as 512x1024", 2)
    return int(match[1]), int(match[2])


def chosen_call(mode: str, config: ConfigDict | None) -> Callable[[], bool | None]:
    """Returns the call of a mode with its flags; wrong ones end the program with code 2."""
    bind = functools.partial
    which = _CHECKPOINT.value
    workdir, output = path_of(_WORKDIR), path_of(_OUTPUT)
    source, data_dir = path_of(_SOURCE), path_of(_DATA_DIR)
    if mode == "train":
        return bind(modes.train, config, workdir, _COMPILED.value)
    if mode == "eval":
        return bind(modes.evaluate, config, workdir, which or "latest")
    if mode == "replay":
        if which is not None and not which.isdecimal():
            fail(f"--checkpoint={which}: replay takes the number of a recorded step", 2)
        return bind(modes.replay, config, workdir, int(which) if which else None)
    if mode == "compile":
        choices: dict[str, Any] = {
            "try_others": _SUGGEST.value,
            "quick": _QUICK.value,
            "save": _SAVE.value,
        }
        return bind(modes.compile_programs, config, **choices)
    if mode == "calibrate":
        return bind(modes.calibrate, config)
    if mode == "inspect":
        return bind(modes.inspect_data, config, output or None, limit=_LIMIT.value)
    if mode == "report":
        others = [os.path.expanduser(path) for path in _COMPARE.value]
        return bind(modes.report, workdir, others, output or None)
    if mode == "prepare":
        how = (_SPLIT.value, _SKIP_BROKEN.value)
        return bind(modes.prepare, _DATASET.value, source, data_dir, *how)
    if mode == "import":
        return bind(modes.import_data, chosen_format(TOOLS), source, data_dir)
    if mode == "convert":
        form, published = chosen_format(FORMATS, "workdir"), (_PUSH.value, _LICENSE.value)
        return bind(modes.convert, source, output, form, _MODEL.value, *published)
    if mode == "export":
        weights, form, size = chosen_weights(), chosen_format(PROGRAMS), image_size()
        if _TASK.value == "all":
            fail("--mode=export needs --task=panoptic, instance or semantic", 2)
        chosen = (_TASK.value, size, _POSTPROCESS.value, _LICENSE.value)
        return bind(modes.export, weights, output, form, *chosen, which=which or "auto")
    keys = [overrides.key_of(override) for override in overrides.overridden_keys(sys.argv)]
    options: dict[str, Any] = {
        "which": which or "auto",
        "threshold": _THRESHOLD.value,
        "max_pixels": _MAX_PIXELS.value,
        "settings": {key: overrides.value_of(config, key) for key in keys},
    }
    if mode == "demo":
        return bind(modes.demo, chosen_weights(), _HOST.value, _PORT.value, **options)
    weights, target = prediction_paths()
    places = (weights, path_of(_IMAGE), _TASK.value, target)
    return bind(modes.predict, *places, overwrite=_OVERWRITE.value, **options)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        fail(f"{argv[1]!r} is not a flag; flags begin with --", 2)
    mode, config = _MODE.value, _CONFIG.value
    check_flags(mode)
    call = chosen_call(mode, config)
    try:
        if mode not in ("prepare", "import", "report"):  # these need no JAX
            start_jax(config)
        if call() is False:  # of --mode=compile alone
            sys.exit(DOES_NOT_FIT)
    except KeyboardInterrupt:
        fail(f"stopped{_STOPPED.get(mode, '')}", 130)
    except USER_ERRORS as error:
        if _DEBUG.value:
            raise
        fail(f"{error} (--debug shows the traceback)", 1)


def run() -> None:
    """Runs the program: `main.py` and the installed command `oneformer-jax`."""
    app.run(main, flags_parser=parse_flags)
