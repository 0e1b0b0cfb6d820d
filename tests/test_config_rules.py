"""The rules of the config: every key has one, and no absurd value comes through."""

import importlib
import inspect
import pathlib
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import oneformer_jax.kernels.assignment
import oneformer_jax.kernels.ms_deform_attn
import oneformer_jax.kernels.neighborhood_attention
import oneformer_jax.kernels.point_sampling
from oneformer_jax import config_rules, types
from oneformer_jax.app import cli, data
from oneformer_jax.config_rules import RULES
from oneformer_jax.configs import common, synthetic
from oneformer_jax.eval import protocol
from oneformer_jax.input_pipeline import datasets, sources, targets, transforms
from oneformer_jax.models import backbones
from oneformer_jax.rules import Fields, Flag, Integer, Number, Odd, Tuple, Word
from oneformer_jax.train import loop, settings
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "--config=configs/synthetic.py"
FILES = ("ade20k", "cityscapes", "coco", "custom", "mapillary")
VARIANTS = [
    (f, v) for f in FILES for v in importlib.import_module(f"oneformer_jax.configs.{f}").VARIANTS
]


def parse(*arguments):
    """The config that a command line gives; SystemExit if it is refused."""
    argv = ["main.py", *arguments]
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        cli.parse_flags(argv)
        return flags.FLAGS.config


def refusal(capsys, *arguments):
    """Returns what a refused command prints; None if it is accepted."""
    try:
        parse(*arguments)
    except SystemExit as exit_:
        assert exit_.code == 2
        return capsys.readouterr().err
    return None


# ---------------------------------------------------------------- rules and keys


def test_every_key_of_the_base_config_has_a_rule_and_the_other_way_round():
    base = {key for key, _ in config_rules.flat(common.get_base())}
    assert base == set(RULES)


def test_a_key_without_a_rule_is_found():
    config = synthetic.get_config()
    config.optim.momentum = 0.9
    (fault,) = config_rules.find_faults(config)
    assert (fault.key, fault.value) == ("optim.momentum", 0.9)
    assert "no such key" in fault.text


@pytest.mark.parametrize(("file", "variant"), VARIANTS)
def test_every_shipped_config_passes(file, variant):
    config = importlib.import_module(f"oneformer_jax.configs.{file}").get_config(variant)
    if file == "custom":  # the user's own folder
        config.dataset.data_dir = "DIR"
    assert config_rules.find_faults(config) == []


def test_the_words_of_the_rules_are_those_of_the_rooms():
    implementations = {
        "kernels.deform_attn": oneformer_jax.kernels.ms_deform_attn,
        "kernels.neighborhood": oneformer_jax.kernels.neighborhood_attention,
        "kernels.points": oneformer_jax.kernels.point_sampling,
        "kernels.assignment": oneformer_jax.kernels.assignment,
    }
    for key, kernel in implementations.items():
        host = ("scipy",) if key == "kernels.assignment" else ()
        assert RULES[key].words == (*host, "auto", *kernel.IMPLEMENTATIONS), key
    assert RULES["model.backbone.name"].words == backbones.NAMES
    assert RULES["eval.protocol"].words == ("auto", *protocol.PROTOCOLS)
    assert RULES["dataset.train_split"].words == sources.SPLITS
    assert set(RULES["dataset.name"].words) == set(sources.OPTIONS)
    assert config_rules.TASKS == types.TASKS == datasets.TASKS
    assert RULES["data.num_slots"].high == targets.MAX_SLOTS
    assert set(inspect.signature(transforms.AugmentConfig).parameters) == {"crop_size"} | {
        key.rsplit(".", 1)[1] for key in RULES if key.startswith("data.augment.")
    }


def test_the_metrics_of_the_rules_are_those_of_the_protocols():
    found = set()
    for name in protocol.PROTOCOLS:
        info = datasets.dataset_info(name)
        metadata = data.metadata_of(info)
        scored = protocol.Protocol(name)
        for task in scored.tasks:
            found |= set(scored.make_metric(task, metadata).compute())
    assert found == set(RULES["eval.best_metric"].words)


# ---------------------------------------------------------------- the command line

ABSURD = (
    *("-7", "0", "1000000000", "1e30", "-1.5", "nan", "inf", "-inf"),
    *("", "nonsense", "two\nlines", "nul\0", "x" * 5000, "None", "True", "maybe"),
    *("()", "(1,)", "(1,2,3)", "(-1,-2)", "(2.0,1.0)", "('','x')", "(True,None)", "(1", "{}"),
)
# The values among them that mean something, by key.
ZERO = ("0",)
PROJECTS = ("", "0", "1000000000", "1e30", "nan", "inf", "nonsense", "None", "True", "maybe")
ACCEPTED = {
    "seed": ("0", "1000000000"),
    "dataset.options": ("{}",),  # the defaults
    "data.workers": ZERO,  # reads in threads
    "data.semantic_prob": ZERO,
    "data.instance_prob": ZERO,
    "data.only_task": ("",),  # all
    "data.augment.brightness": ZERO,
    "data.augment.hue": ZERO,
    "data.augment.flip_prob": ZERO,
    "model.backbone.overrides": ("{}",),
    "model.num_context": ZERO,
    "model.scan_layers": ("True",),
    "model.encoder_dropout": ZERO,
    "model.query_init_dropout": ZERO,
    "loss.class_weight": ZERO,  # one of the losses is left out
    "loss.mask_weight": ZERO,
    "loss.dice_weight": ZERO,
    "loss.contrastive_weight": ZERO,
    "loss.no_object_weight": ZERO,
    "loss.importance_ratio": ZERO,
    "matcher.class_cost": ZERO,  # one of the costs is left out
    "matcher.mask_cost": ZERO,
    "matcher.dice_cost": ZERO,
    "optim.backbone_multiplier": ZERO,  # a frozen backbone
    "optim.weight_decay": ZERO,
    "optim.b1": ZERO,
    "optim.b2": ZERO,
    "data.max_pixels": ("1000000000",),  # satellite images
    "optim.power": ZERO,  # a constant rate
    "optim.boundaries": ("()", "(1,)", "(1,2,3)", "{}"),  # steps; {} is an empty tuple here
    "optim.freeze": ("()", "{}"),  # nothing
    "optim.warmup_steps": ZERO,
    "optim.warmup_factor": ZERO,
    "optim.clip_norm": ZERO,
    "optim.ema_decay": ZERO,
    "train.log_every": ("1000000000",),  # never
    "train.eval_every": ("0", "1000000000"),
    "train.checkpoint_every": ("0", "1000000000"),
    "train.keep": ("1000000000",),  # all
    "train.keep_best": ("0", "1000000000"),
    "train.patience": ("0", "1000000000"),
    "train.pictures": ZERO,
    "train.profile_start": ZERO,
    "train.epochs": ZERO,
    "eval.max_buckets": ("0", "1000000000"),
    "eval.limit": ("0", "1000000000"),
    "eval.tta.short_edges": ("()", "{}"),  # the official sizes
    "eval.tta.max_size": ZERO,
    "eval.object_mask_threshold": ZERO,
    "eval.overlap_threshold": ZERO,
    "eval.instance_max_iou": ZERO,
    "mesh.topology": ("",),
    "log.wandb": PROJECTS,
    "log.mlflow": PROJECTS,
}
PATHS = {"init.backbone", "init.checkpoint", "eval.instance_json", "compilation_cache"}
FLAGS = {key for key, rule in RULES.items() if isinstance(rule, Flag) and not rule.other}


def accepted(key, value):
    """Tells if a value of `ABSURD` means something."""
    if key in PATHS or key == "dataset.data_dir":
        return value.isprintable() and len(value) < 5000 and (value != "" or key in PATHS)
    if key in FLAGS:
        return value in ("0", "True")
    return value in ACCEPTED.get(key, ())


@pytest.mark.parametrize("key", RULES)
def test_an_absurd_value_is_one_line_that_names_the_key(key, capsys):
    for value in ABSURD:
        message = refusal(capsys, CONFIG, f"--config.{key}={value}")
        if accepted(key, value):
            assert message is None, (value, message)
            continue
        assert message is not None, f"--config.{key}={value!r} is accepted"
        assert message.startswith("error: ") and message.count("\n") == 1, (value, message)
        assert key in message, (value, message)
        assert len(message) < 600, value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=nan"], "--config.optim.lr=nan: it must be a number > 0 and <= 10"),
        (["train.on_nonfinite=Stop"], "it must be one of stop, skip (did you mean 'stop'?)"),
        (["data.crop_size=(30,64)"], "--config.data.crop_size=(30, 64): .* (use (32, 64))"),
        (["eval.tasks=('panoptik',)"], "(did you mean 'panoptic'?)"),
        (["eval.tasks=('panoptic','panoptic')"], "distinct"),
        (["data.augment.lsj_scale=(2.0,1.0)"], "low <= high"),
        (["data.semantic_prob=0.7"], "data.semantic_prob = 0.7"),
        (["optim.accumulate=3"], "optim.accumulate=3: it must divide data.batch_size = 16"),
        (["loss.replica_groups=5"], "loss.replica_groups=5: it must divide"),
        (["loss.replica_groups=8", "optim.accumulate=4"], "loss.replica_groups=8: it must divide"),
        (["model.num_heads=3"], "model.hidden_dim=64: it must be a multiple of model.num_heads"),
        (["model.text_heads=3"], "model.text_width=64: it must be a multiple of model.text_heads"),
        (["model.num_context=24"], "model.num_context=24: it must be below model.num_queries"),
        (["optim.boundaries=(0.5,0.2)"], "optim.boundaries=(0.5, 0.2): it must be"),
        (["optim.boundaries=(0.5,700)"], "below train.steps = 600"),
        (["matcher.backend=device"], "no key 'matcher.backend' .* --config.kernels.assignment?"),
        (["model.sampling=xla"], "no key 'model.sampling' .* mean --config.kernels.deform_attn?"),
        (["model.scan_layers=yes"], "model.scan_layers=yes: it must be auto, True or False"),
        (["kernels.assignment=scypi"], "(did you mean 'scipy'?)"),
        (["init.backbone=a", "init.checkpoint=b"], "--config.init.checkpoint=b: it must be empty"),
        (["eval.tasks=('semantic',)"], "eval.best_metric=panoptic/PQ: it must be a metric of"),
        (["mesh.data=-1", "mesh.fsdp=-1"], "mesh.fsdp=-1: it must"),
        (["mesh.slices=2"], "without mesh.topology"),
        (["eval.tta.short_edges=(64,96)", "eval.tta.max_size=80"], "largest of eval.tta.short"),
        (["data.text_template={CLS} {NAME}"], "data.text_template={CLS} {NAME}: it must"),
        (["data.text_template=a &amp; {CLS}"], "data.text_template=a &amp; {CLS}: it must"),
        (["data.crop_size[5]=3"], "--config.data.crop_size[5]: tuple index out of range"),
        (["=3"], "no key ''"),
        ([f"{c}_cost=0" for c in ("matcher.class", "matcher.mask", "matcher.dice")], "other two"),
    ],
)
def test_a_wrong_value_is_told_with_the_way_out(overrides, message, capsys):
    found = refusal(capsys, CONFIG, *(f"--config.{override}" for override in overrides))
    for part in message.split(" .* "):
        assert part in found
    assert found.count("\n") == 1


@pytest.mark.parametrize("key", ["init.checkpoint", "init.backbone"])
@pytest.mark.parametrize("value", ["https://me:SECRET@host/a.pth", "https://host/a.pth?key=SECRET"])
def test_what_is_secret_in_an_address_is_not_told(key, value, capsys):
    both = {"init.checkpoint": "x", "init.backbone": "y"} | {key: value}
    found = refusal(capsys, CONFIG, *(f"--config.{name}={one}" for name, one in both.items()))
    assert "SECRET" not in found
    if "@" in value:
        assert f"--config.{key}='https://...@host/a.pth'" in found and "~/.netrc" in found


def test_all_wrong_values_are_told_together(capsys):
    wrong = ("optim.lr=nan", "optim.b1=2", "seed=-1", "train.steps=0")
    lines = refusal(capsys, CONFIG, *(f"--config.{o}" for o in wrong)).splitlines()
    found = [line.removeprefix("error: ").split("=")[0] for line in lines]
    assert found == [f"--config.{key}" for key in ("seed", "optim.lr", "optim.b1", "train.steps")]

    many = [f"--config.{key}=-7" for key, r in RULES.items() if isinstance(r, Integer | Number)]
    lines = refusal(capsys, CONFIG, *many).splitlines()
    assert len(lines) == 11
    assert lines[-1] == f"and {len(many) - 10} more"


def test_modes_that_read_no_config_do_not_check_it():
    parse("--mode=predict", CONFIG, "--config.optim.lr=nan")


def test_values_of_a_config_file_are_checked_and_the_file_is_named(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from oneformer_jax.configs import synthetic\n"
        "def get_config():\n"
        "    c = synthetic.get_config()\n"
        "    c.optim.lr = float('nan')\n"
        "    c.train.steps = True\n"
        "    c.model.dtype = None\n"
        "    c.eval.tasks = ('panoptik',)\n"
        "    c.optim.lrr = 3\n"
        "    return c\n"
    )
    found = refusal(capsys, f"--config={file}", "--config.optim.b1=7").splitlines()
    assert found == [
        f"error: {file}: model.dtype=None: it must be one of float32, bfloat16",
        f"{file}: optim.lr=nan: it must be a number > 0 and <= 10",
        "--config.optim.b1=7.0: it must be a number >= 0 and < 1",
        f"{file}: train.steps=True: it must be an integer from 1 to 100,000,000",
        f"{file}: eval.tasks=('panoptik',): it must be a tuple of 1 to 3 distinct values, each one "
        "of panoptic, instance, semantic (did you mean 'panoptic'?)",
        f"{file}: optim.lrr=3: it must be left out: configs/common.py has no such key (did you "
        "mean 'optim.lr'?)",
    ]


# ---------------------------------------------------------------- earlier versions


def test_a_config_file_of_an_earlier_version_is_read(tmp_path, capsys, caplog):
    file = tmp_path / "mine.py"
    file.write_text(
        "from oneformer_jax.configs import synthetic\n"
        "def get_config():\n"
        "    c = synthetic.get_config()\n"
        "    c.model.sampling = 'pallas_tpu'\n"
        "    c.model.scan_layers = False\n"
        "    c.matcher.backend = 'device'\n"
        "    return c\n"
    )
    found = parse(f"--config={file}")
    (line,) = [m for m in caplog.messages if "earlier version" in m]
    assert str(file) in line
    assert "model.sampling (now kernels.deform_attn)" in line
    assert "matcher.backend (now kernels.assignment)" in line
    assert found.kernels.deform_attn == "pallas_tpu" and found.kernels.assignment == "auto"
    assert found.model.scan_layers is False
    assert "sampling" not in found.model and "backend" not in found.matcher
    stored = {"matcher": {"backend": "device"}, "kernels": 5}  # as a stranger's file may have it
    assert config_rules.upgrade(stored) and stored["kernels"] == {"assignment": "auto"}
    # On the command line they are errors, also where the file has them.
    message = refusal(capsys, f"--config={file}", "--config.model.sampling=xla")
    assert "no key 'model.sampling' (did you mean --config.kernels.deform_attn?)" in message


@pytest.mark.parametrize(
    ("old", "assignment"),
    [
        ({}, "scipy"),
        ({"matcher.backend": "host", "matcher.implementation": "auto"}, "scipy"),
        ({"matcher.backend": "device"}, "auto"),
        ({"matcher.backend": "device", "matcher.implementation": "pallas_gpu"}, "pallas_gpu"),
    ],
)
def test_old_keys_move_to_their_new_places(old, assignment):
    config = synthetic.get_config()
    for key, value in old.items():
        config.matcher[key.split(".")[1]] = value
    given = config.lock().copy_and_resolve_references()
    found = settings.checked(config)
    assert found.kernels.assignment == assignment
    assert config == given  # the caller's own is left alone
    assert found.is_locked


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize("entry", ["train", "evaluate_workdir"])
def test_the_loop_checks_a_config_before_anything_else(entry, tmp_path):
    config = synthetic.get_config()
    config.optim.ema_decay = float("nan")
    config.train.pictures = -1
    config.dataset.data_dir = ""  # the loop reads no dataset
    given = {"metadata": tiny.metadata(), "eval_batches": None}
    if entry == "train":
        given |= {"text_table": None, "train_batches": None}
    with pytest.raises(ValueError, match=r"optim\.ema_decay is nan.*\n.*train\.pictures is -1"):
        getattr(loop, entry)(config, str(tmp_path / "run"), **given)
    assert not (tmp_path / "run").exists()


# Values of other kinds, which a config made in Python may hold.
KINDS = {
    int: (True, 1.0, "1", None, [1], 10**400, -(10**400)),
    float: (True, "1", None, [1.0], 1j, 10**400, float("nan"), float("-inf")),
    bool: (0, 1, "True", None, 0.5),
    str: (None, 3, True, b"auto", ["auto"], "\n", " "),
    tuple: (None, 3, "text", {}, (None, None), ((1, 2), (3, 4)), ("\n",), (float("nan"),)),
}


@pytest.mark.parametrize("key", [key for key, r in RULES.items() if not isinstance(r, Fields)])
def test_values_of_another_kind_are_refused_in_python(key):
    flat = dict(config_rules.flat(synthetic.get_config()))
    kind = bool if isinstance(RULES[key], Flag) else type(flat[key])
    for value in KINDS[kind]:
        with pytest.raises(ValueError, match=key) as error:
            config_rules.require({key: value})
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_ends_of_a_range_are_in_it_or_out_as_it_says():
    for key, rule in RULES.items():
        if isinstance(rule, Integer):
            steps = range(rule.low, rule.high + 1, rule.multiple)
            assert rule.accepts(steps[0]) and rule.accepts(steps[-1]), key
            assert not rule.accepts(rule.low - 1) or rule.other == rule.low - 1, key
            assert not rule.accepts(rule.high + 1), key
        elif isinstance(rule, Number):
            assert rule.accepts(rule.low) != rule.above, key
            assert rule.accepts(rule.high) != rule.below, key
            assert rule.accepts((rule.low + rule.high) / 2), key
    assert Odd(3, 9).accepts(3) and not Odd(3, 9).accepts(4)
    ascending = Tuple(Integer(0, 9), 0, 3, "ascending")
    assert ascending.accepts((1, 2)) and not ascending.accepts((1, 1))
    assert Word(("a",)).fault("b") == "be one of a"
