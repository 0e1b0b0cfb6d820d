"""The rule of every config key, and of keys that depend on each other: the one place for both.

The command line checks a whole config by it before anything else happens, `train.loop` for those
who use Python, and the dataclasses made of a config check their own part. A leaf, as `rules` is, so
that all of them may import it, and quick: it needs neither JAX nor NumPy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from oneformer_jax.files import did_you_mean, first_few
from oneformer_jax.rules import (
    Fields,
    Flag,
    Integer,
    Line,
    Matching,
    Number,
    Rule,
    Tuple,
    Word,
    faults,
    refuse,
    shown,
)

TASKS = ("panoptic", "instance", "semantic")
BACKBONES = (
    *("swin_tiny", "swin_large", "convnext_large", "convnext_xlarge"),
    *("dinat_large", "dinat_large_wide", "dinat_large_7x7", "internimage_huge"),
    *("resnet50", "resnet101"),
    *(f"dinov2_{size}" for size in ("small", "base", "large", "giant")),
    *(f"dinov2_{size}_registers" for size in ("small", "base", "large", "giant")),
    *(f"dinov3_{size}" for size in ("small", "base", "large", "small_plus", "huge_plus", "7b")),
    *("swin", "convnext", "dinat", "internimage", "resnet", "vit"),
)
# Top-level parts of the model, by the names of its parameters.
PARTS = (
    *("backbone", "pixel_decoder", "predictor", "task_mlp", "query_class"),
    *("text_encoder", "text_projector", "prompt_ctx", "logit_scale"),
)
# The metrics of all protocols, by task; some protocols have fewer.
METRICS = {
    "panoptic": tuple(
        f"{name}{part}" for part in ("", "_things", "_stuff") for name in ("PQ", "SQ", "RQ")
    ),
    "instance": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "semantic": (
        *("mIoU", "fwIoU", "mACC", "pACC"),
        *("iIoU", "IoU_category", "iIoU_category"),
    ),
}
DATASETS = (
    *("synthetic", "coco_folder", "coco_instances", "semantic_folder"),
    *("coco", "ade20k", "cityscapes", "mapillary"),
)


def _good_template(text: str) -> bool:
    fields = re.findall(r"{.*?}|[{}]", text)
    plain = text.isascii() and html.unescape(text) == text  # CLIP would rewrite anything else
    return plain and "{CLS}" in fields and not set(fields) - {"{CLS}", "{TYPE}"}


_PROBABILITY = Number(0, 1)
_DROPOUT = Number(0, 1, below=True)
_WEIGHT = Number(0, 10_000)
_FACTORS = Tuple(Number(0, 100, above=True), 2, 2, "range")
_SIDE = Integer(8, 65_536, note=", in pixels")
_WIDTH = Integer(1, 16_384)
_HIDDEN = Integer(1, 65_536)
_HEADS = Integer(1, 1024)
_LAYERS = Integer(1, 100)
_STEPS = 100_000_000
_SELDOM = 1_000_000_000  # more than any run has: never
_INTERVAL = Integer(0, _SELDOM, note=" (0: at the end only)")
_FILE = Line("the path of a file", empty=True)
_WEIGHTS = Matching(
    "a path, a name of the hub, or an address without a password (~/.netrc is read)",
    empty=True,
    test=lambda text: re.match(r"\w+://[^/]*@", text) is None,
)

_PROJECT = Matching(
    "a name of up to 128 letters, digits, spaces and ._-",
    empty=True,
    test=lambda text: re.fullmatch(r"\w[\w .-]{0,127}", text) is not None,
)

RULES: dict[str, Rule] = {
    "seed": Integer(0, 2**32 - 1),
    "dataset.name": Word(DATASETS),
    "dataset.data_dir": Line("the folder of the dataset"),
    "dataset.train_split": Word(("train", "validation")),
    "dataset.eval_split": Word(("train", "validation")),
    "dataset.options": Fields("oneformer_jax.input_pipeline.sources.open_source"),
    "data.batch_size": Integer(1, 65_536),
    "data.crop_size": Tuple(
        Integer(32, 16_384, multiple=32), 2, 2, note=", (height, width): 32 is the coarsest stride"
    ),
    "data.num_slots": Integer(1, 255, note=", since the map of target slots is 8 bits deep"),
    "data.workers": Integer(0, 1024),
    "data.threads": Integer(1, 1024),
    "data.prefetch": Integer(1, 1024),
    "data.semantic_prob": _PROBABILITY,
    "data.instance_prob": _PROBABILITY,
    "data.only_task": Word(("", *TASKS)),
    "data.text_template": Matching(
        "plain ASCII that must hold {CLS}, for the name of the class, may hold {TYPE}, for thing "
        "or stuff, and has no other braces",
        test=_good_template,
    ),
    "data.skip_broken": Flag(),
    "data.max_pixels": Integer(1, 2**33),
    "data.require_things": Flag(),
    "data.augment.kind": Word(("unified", "lsj", "none")),
    "data.augment.lsj_scale": _FACTORS,
    "data.augment.short_edge": _SIDE,
    "data.augment.scale": _FACTORS,
    "data.augment.max_size": _SIDE,
    "data.augment.color": Flag(),
    "data.augment.brightness": Number(0, 255),
    "data.augment.contrast": _FACTORS,
    "data.augment.saturation": _FACTORS,
    "data.augment.hue": Integer(0, 180),
    "data.augment.flip_prob": _PROBABILITY,
    "model.backbone.name": Word(BACKBONES),
    "model.backbone.overrides": Fields("the backbones' configs in oneformer_jax.models.backbones"),
    "model.num_queries": Integer(1, 10_000),
    "model.num_context": Integer(0, 10_000),
    "model.hidden_dim": Integer(32, 16_384, multiple=32, note=" (GroupNorm has 32 groups)"),
    "model.mask_dim": _WIDTH,
    "model.num_heads": _HEADS,
    "model.encoder_layers": _LAYERS,
    "model.encoder_ffn": _HIDDEN,
    "model.encoder_points": Integer(1, 64),
    "model.encoder_dropout": _DROPOUT,
    "model.query_init_layers": _LAYERS,
    "model.query_init_ffn": _HIDDEN,
    "model.query_init_dropout": _DROPOUT,
    "model.decoder_layers": _LAYERS,
    "model.decoder_ffn": _HIDDEN,
    "model.queries": Word(("task", "no_token", "zeros", "learned")),
    "model.query_loss": Word(("contrastive", "classification", "none")),
    "model.text_width": _WIDTH,
    "model.text_layers": _LAYERS,
    "model.text_heads": _HEADS,
    "model.text_causal": Flag(),
    "model.dtype": Word(("float32", "bfloat16")),
    "model.remat": Flag(),
    "model.scan_layers": Flag(other="auto"),
    "kernels.deform_attn": Word(("auto", "xla", "pallas_tpu", "pallas_gpu")),
    "kernels.neighborhood": Word(("auto", "xla", "pallas_tpu")),
    "kernels.points": Word(("auto", "xla", "pallas_tpu")),
    "kernels.assignment": Word(("scipy", "auto", "xla", "pallas_tpu", "pallas_gpu")),
    "kernels.calibrate": Flag(),
    "init.backbone": _WEIGHTS,
    "init.checkpoint": _WEIGHTS,
    "loss.class_weight": _WEIGHT,
    "loss.mask_weight": _WEIGHT,
    "loss.dice_weight": _WEIGHT,
    "loss.contrastive_weight": _WEIGHT,
    "loss.no_object_weight": _WEIGHT,
    "loss.num_points": Integer(1, 1_000_000),
    "loss.oversample_ratio": Number(1, 100),
    "loss.importance_ratio": _PROBABILITY,
    "loss.point_sampling": Word(("per_mask", "shared")),
    "loss.replica_groups": Integer(1, 65_536),
    "matcher.class_cost": _WEIGHT,
    "matcher.mask_cost": _WEIGHT,
    "matcher.dice_cost": _WEIGHT,
    "optim.lr": Number(0, 10, above=True),
    "optim.backbone_multiplier": Number(0, 1000),
    "optim.layer_decay": Number(0, 1, above=True, note=" (1 is off)"),
    "optim.freeze": Tuple(
        Matching(
            f"one of {', '.join(PARTS)}, or a part of one, as backbone.blocks.0",
            test=lambda name: re.split(r"[./]", name)[0] in PARTS,
        ),
        *(0, 100, "distinct"),
    ),
    "optim.weight_decay": Number(0, 10),
    "optim.b1": Number(0, 1, below=True),
    "optim.b2": Number(0, 1, below=True),
    "optim.eps": Number(0, 1, above=True),
    "optim.schedule": Word(("poly", "step")),
    "optim.power": Number(0, 100),
    "optim.boundaries": Tuple(Number(0, _STEPS, above=True), 0, 100, "ascending"),
    "optim.decay_factor": Number(0, 10, above=True),
    "optim.warmup_steps": Integer(0, _STEPS),
    "optim.warmup_factor": _PROBABILITY,
    "optim.clip_norm": Number(0, 1_000_000, note=" (0 is off)"),
    "optim.accumulate": Integer(1, 65_536),
    "optim.ema_decay": Number(0, 1, below=True, note=" (0 is off)"),
    "train.steps": Integer(1, _STEPS),
    "train.epochs": Number(0, 1_000_000, note=" (0: train.steps counts)"),
    "train.log_every": Integer(1, _SELDOM),
    "train.eval_every": _INTERVAL,
    "train.checkpoint_every": _INTERVAL,
    "train.keep": Integer(1, _SELDOM, note=": at least the last one must stay"),
    "train.keep_best": Integer(0, _SELDOM),
    "train.patience": Integer(0, _SELDOM, note=" (0 is off)"),
    "train.pictures": Integer(0, 1000),
    "train.on_nonfinite": Word(("stop", "skip")),
    "train.profile_start": Integer(0, _STEPS, note=" (0 is off)"),
    "train.profile_steps": Integer(1, 10_000),
    "eval.batch_size": Integer(1, 65_536),
    "eval.tasks": Tuple(Word(TASKS), 1, 3, "distinct"),
    "eval.short_edge": _SIDE,
    "eval.max_size": _SIDE,
    "eval.bucket_multiple": Integer(32, 65_536, multiple=32),
    "eval.max_buckets": Integer(0, _SELDOM, note=" (0 is no limit)"),
    "eval.limit": Integer(0, _SELDOM, note=" (0 is all images)"),
    "eval.protocol": Word(("auto", "coco", "ade20k", "cityscapes", "mapillary")),
    "eval.instance_ids": Word(("auto", "contiguous", "thing")),
    "eval.instance_json": _FILE,
    "eval.tta.enabled": Flag(),
    "eval.tta.short_edges": Tuple(_SIDE, 0, 100),
    "eval.tta.max_size": Integer(0, 65_536, note=" (0: 7 times eval.short_edge)"),
    "eval.tta.flip": Flag(),
    "eval.object_mask_threshold": _PROBABILITY,
    "eval.overlap_threshold": _PROBABILITY,
    "eval.topk": Integer(1, 1_000_000),
    "eval.instance_max_iou": _PROBABILITY,
    "eval.best_metric": Word(tuple(f"{t}/{name}" for t in TASKS for name in METRICS[t])),
    "eval.token_table": Flag(),
    "mesh.data": Integer(1, 1_000_000, other=-1, note=" (-1: all that are left)"),
    "mesh.fsdp": Integer(1, 1_000_000, other=-1, note=" (-1: all that are left)"),
    "mesh.topology": Matching(
        "KIND:SHAPE, as v5e:4x4 or h100:8",
        empty=True,
        test=lambda text: re.fullmatch(r"\w+:\d{1,6}(x\d{1,6}){0,3}", text) is not None,
    ),
    "mesh.slices": Integer(1, 10_000),
    "log.wandb": _PROJECT,
    "log.mlflow": _PROJECT,
    "compilation_cache": Line("the path of a folder", empty=True),
}


# Keys of earlier versions, and the keys that took their place.
RENAMED = {
    "model.sampling": "kernels.deform_attn",
    "model.neighborhood": "kernels.neighborhood",
    "loss.point_kernel": "kernels.points",
    "matcher.backend": "kernels.assignment",
    "matcher.implementation": "kernels.assignment",
}


def upgrade(config: Any) -> str:
    """Moves the values of renamed keys, in place, to the keys that took their place.

    A value that stands under the new key already, and differs from the default, is kept.

    Args:
      config: a ConfigDict, or nested dicts, written for this or an earlier version.

    Returns:
      One line that names the old keys and the new ones, or "" if nothing was moved.
    """
    unlocked = getattr(config, "unlocked", contextlib.nullcontext)
    found: dict[str, Any] = {}
    with unlocked():
        for old in RENAMED:
            group, name = old.split(".")
            values = config.get(group)
            if hasattr(values, "items") and name in values:
                found[old] = values[name]
                del values[name]
        if not found:
            return ""
        new = {RENAMED[old]: value for old, value in found.items() if not old.startswith("matcher")}
        if any(old.startswith("matcher") for old in found):
            on_host = found.get("matcher.backend", "host") == "host"
            word = "scipy" if on_host else found.get("matcher.implementation", "auto")
            new["kernels.assignment"] = word
        if not hasattr(config.get("kernels"), "items"):
            config["kernels"] = type(config)()
        for key, value in new.items():
            name = key.split(".")[1]
            if config["kernels"].get(name, "auto") in ("auto", "scipy"):
                config["kernels"][name] = value
    moved = ", ".join(f"{old} (now {RENAMED[old]})" for old in found)
    return f"keys of an earlier version are read: {moved}"


@dataclasses.dataclass(frozen=True)
class Relation:
    """A rule for the value of `keys[0]` that depends on those of the other keys.

    Attributes:
      keys: whose values, in this order, `holds` takes.
      holds: tells whether they go together; called only if each value satisfies its own rule.
      text: completes "it must ..."; {0}, {1}... are the values.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    text: str


def _in_the_run(boundaries: tuple[float, ...], steps: int) -> bool:
    # Before rounding: in a run of a few steps two fractions may well fall on one step.
    places = [b * steps if b < 1 else b for b in boundaries]
    return all(0 < place < steps for place in places) and places == sorted(set(places))


RELATIONS = (
    Relation(
        ("model.hidden_dim", "model.num_heads"),
        lambda width, heads: width % heads == 0,
        "be a multiple of model.num_heads = {1}",
    ),
    Relation(
        ("model.text_width", "model.text_heads"),
        lambda width, heads: width % heads == 0,
        "be a multiple of model.text_heads = {1}",
    ),
    Relation(
        ("model.num_context", "model.num_queries"),
        lambda context, queries: context < queries,
        "be below model.num_queries = {1}",
    ),
    Relation(
        ("data.instance_prob", "data.semantic_prob"),
        lambda instance, semantic: instance + semantic <= 1 + 1e-9,
        "be at most 1 with data.semantic_prob = {1} together; the rest is the panoptic task",
    ),
    Relation(
        ("loss.replica_groups", "data.batch_size", "optim.accumulate"),
        lambda groups, size, parts: size % parts or size // parts % groups == 0,
        "divide the images that a step sees at once, data.batch_size / optim.accumulate = {1}/{2}",
    ),
    Relation(
        ("loss.class_weight", "loss.mask_weight", "loss.dice_weight", "loss.contrastive_weight"),
        lambda *weights: any(weights),
        "be above 0 while the other weights are 0: without a loss nothing is trained",
    ),
    Relation(
        ("matcher.class_cost", "matcher.mask_cost", "matcher.dice_cost"),
        lambda *costs: any(costs),
        "be above 0 while the other two costs are 0: without a cost nothing is matched",
    ),
    Relation(
        ("optim.boundaries", "train.steps"),
        _in_the_run,
        "be positive, ascending and below train.steps = {1}; below 1 they are shares of it",
    ),
    Relation(
        ("optim.accumulate", "data.batch_size"),
        lambda parts, size: size % parts == 0,
        "divide data.batch_size = {1}",
    ),
    Relation(
        ("init.checkpoint", "init.backbone"),
        lambda checkpoint, backbone: not (checkpoint and backbone),
        "be empty while init.backbone is given, or the other way round: a whole model brings its "
        "own backbone",
    ),
    Relation(
        ("eval.tta.max_size", "eval.tta.short_edges"),
        lambda most, edges: not most or not edges or most >= max(edges),
        "be 0 or at least the largest of eval.tta.short_edges = {1}",
    ),
    Relation(
        ("eval.best_metric", "eval.tasks", "train.keep_best", "train.patience"),
        lambda metric, tasks, *uses: not any(uses) or metric.split("/")[0] in tasks,
        "be a metric of eval.tasks = {1}; or set train.keep_best=0 and train.patience=0",
    ),
    Relation(
        ("mesh.fsdp", "mesh.data"),
        lambda fsdp, data: not fsdp == data == -1,
        "be a number of devices while mesh.data is -1: one of the two must be given",
    ),
    Relation(
        ("mesh.slices", "mesh.topology"),
        lambda slices, topology: slices == 1 or topology,
        "be 1 without mesh.topology: in a run the devices tell",
    ),
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong value of a config: `key` is `value`, but it must `text`."""

    key: str
    value: Any
    text: str

    def __str__(self) -> str:
        return f"{self.key} is {shown(self.value)}; it must {self.text}"

    @property
    def shown(self) -> str:
        """The value as a command has it: a plain text without quotes."""
        text = shown(self.value)
        plain = isinstance(self.value, str) and text[1:-1] == self.value != ""
        return self.value if plain else text


def find_faults(config: Mapping[str, Any], but: tuple[str, ...] = ()) -> list[Fault]:
    """Lists every wrong, missing or unknown value of a whole config, at most one for a key.

    Args:
      config: a ConfigDict from `configs.common.get_base()`, or nested dicts of its keys.
      but: groups that are not looked at, as "dataset".
    """
    values = {k: v for k, v in flat(config) if k.split(".")[0] not in but}
    wanted = {key: rule for key, rule in RULES.items() if key.split(".")[0] not in but}
    found = _broken(values, wanted)
    for key in values:
        if key in RENAMED:
            found[key] = f"be left out: its place is {RENAMED[key]} now"
        elif key not in RULES:
            near = did_you_mean(key, RULES)
            found[key] = f"be left out: configs/common.py has no such key{near}"
    return [Fault(key, values.get(key), text) for key, text in found.items()]


def check(config: Mapping[str, Any], but: tuple[str, ...] = ()) -> None:
    """Raises a ValueError with a line for each of the first wrong values; see `find_faults`."""
    if found := find_faults(config, but):
        raise ValueError(first_few(found, 10, "\n"))


def require(values: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the values of these keys, "optim.lr" and so on, are accepted."""
    refuse("", values, _broken(values, {key: RULES[key] for key in values}))


def require_fields(group: str, fields: Any, but: tuple[str, ...] = ()) -> None:
    """Raises a ValueError unless the fields of a dataclass are accepted as the keys of a group.

    Args:
      group: as "model": the field `dtype` is the key "model.dtype".
      fields: the dataclass; its fields are keys of the group, but for those in `but`.
      but: fields that have other rules.
    """
    names = [f.name for f in dataclasses.fields(fields) if f.name not in but]
    require({f"{group}.{name}": getattr(fields, name) for name in names})


def _broken(values: Mapping[str, Any], wanted: Mapping[str, Rule]) -> dict[str, str]:
    found = faults(values, wanted)
    for relation in RELATIONS:
        if any(key in found or key not in values for key in relation.keys):
            continue
        given = [values[key] for key in relation.keys]
        if not relation.holds(*given):
            found[relation.keys[0]] = relation.text.format(*given)
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key not in RULES and hasattr(value, "items"):
            yield from flat(value, f"{key}.")
        else:
            yield key, value
