"""AdamW with the parameter groups and the schedules of the official recipe.

The official trainer builds one torch parameter group per parameter; `PARAMETER_RULES` does the same
by name. Three of its habits are deliberately missing: its gradient clipping, which never acted (see
`OptimConfig.clip_norm`), its replacement of non-finite gradients (NaN by 0, infinities by +-1e5;
our loop stops and names the term instead), and its loss scaling (bfloat16 needs none).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oneformer_jax import config_rules
from oneformer_jax.files import did_you_mean


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer; the defaults are those of `configs/common.py`.

    Attributes:
      steps: optimizer steps of the whole run; the poly schedule ends there at zero.
      lr: base learning rate.
      backbone_multiplier: factor on the learning rate of every parameter of the backbone.
      layer_decay: a further factor for each block of the backbone that comes after a parameter, see
        `backbone_depths`; 1 is off.
      freeze: parts that stay as they start, as "text_encoder" or "backbone.blocks.0"; see `frozen`.
      weight_decay: decoupled decay as in torch: a step subtracts lr * weight_decay * parameter,
        with the current learning rate, backbone factor included. `PARAMETER_RULES` exempts some.
      b1, b2, eps: Adam's moments and denominator.
      schedule: "poly": lr * (1 - step / steps) ** power. "step": lr * decay_factor for each
        boundary reached; without boundaries the rate is constant.
      power: exponent of "poly".
      boundaries: of "step", ascending; a number below 1 is a fraction of `steps`, others are steps.
      decay_factor: of "step".
      warmup_steps: steps over which a linear factor rises from `warmup_factor` to 1, on top of the
        schedule. The official configs ask for 10 steps at factor 1.0 or none: no effect either way.
      warmup_factor: factor at the start of the warm-up.
      clip_norm: largest global norm of the gradients; 0 turns clipping off. The official configs
        say 0.01, but their trainer exhausts the parameter iterator before it clips, so that value
        never acted: a run that clips at 0.01 follows another recipe.
    """

    steps: int
    lr: float = 1e-4
    backbone_multiplier: float = 0.1
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    schedule: str = "step"
    power: float = 0.9
    boundaries: tuple[float, ...] = (0.889, 0.963)
    decay_factor: float = 0.1
    warmup_steps: int = 0
    warmup_factor: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self):
        for name in ("boundaries", "freeze"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        keys = {f"optim.{f.name}": getattr(self, f.name) for f in dataclasses.fields(self)}
        keys["train.steps"] = keys.pop("optim.steps")
        config_rules.require(keys)

    @property
    def boundary_steps(self) -> tuple[int, ...]:
        """The boundaries as steps."""
        return tuple(round(b * self.steps) if b < 1 else round(b) for b in self.boundaries)


def _rate(config: OptimConfig, step: Any, xp: Any) -> Any:
    """Base learning rate after `step` updates, with the functions of `xp` (numpy or jax.numpy)."""
    if config.schedule == "poly":
        factor = xp.maximum(1.0 - step / config.steps, 0.0) ** config.power
    else:
        factor = config.decay_factor ** xp.sum(step >= xp.asarray(config.boundary_steps))
    if config.warmup_steps:
        alpha = xp.minimum(step / config.warmup_steps, 1.0)
        factor = factor * (config.warmup_factor * (1.0 - alpha) + alpha)
    return config.lr * factor


def make_schedule(config: OptimConfig) -> optax.Schedule:
    """Returns the base learning rate (float32 scalar) as a function of the updates already done.

    The backbone's rate is this times `config.backbone_multiplier` and the layer decay. The values
    are those of the official WarmupPolyLR and WarmupMultiStepLR with linear warm-up; past the last
    step "poly" stays at zero.
    """
    return lambda count: _rate(config, jnp.asarray(count, jnp.float32), jnp)


def learning_rates(config: OptimConfig, step: int) -> dict[str, float]:
    """Rates of "main" and "backbone" after `step` updates, computed on the host, for the log.

    The backbone's is that of its last block; 0 if it is frozen.
    """
    rate = float(_rate(config, step, np))
    trained = BACKBONE not in config.freeze
    return {"main": rate, "backbone": rate * config.backbone_multiplier * trained}


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """A rule on the weight decay of the parameters whose name matches `pattern` (re.search).

    Attributes:
      pattern: regular expression on names like "backbone/layers/0/blocks/1/norm1/scale".
      decay: True if weight decay applies.
      why: the reason in the official optimizer.
      only_if: the rule holds only if some parameter's name matches this.
    """

    pattern: str
    decay: bool
    why: str
    only_if: str | None = None


# First match wins. A parameter without a rule is decayed, as in the official optimizer: all other
# biases, the pixel decoder's level_embed, positional_embedding, logit_scale, DiNAT's rpb.
PARAMETER_RULES = (
    ParameterRule(
        r"^backbone/",
        decay=True,
        why="ConvNeXt brings its own LayerNorm class, which the list of torch norms does not hold",
        only_if=r"^backbone/downsample_layers/",
    ),
    ParameterRule(
        r"(^|/)([^/]*norm[^/]*(/\d+)?|ln_1|ln_2|ln_final)/(scale|bias)$",
        decay=False,
        why="torch LayerNorm, GroupNorm and BatchNorm",
    ),
    ParameterRule(
        r"(^|/)(query_embed|query_feat|level_embed|prompt_ctx|token_embedding)/embedding$",
        decay=False,
        why="torch nn.Embedding",
    ),
    ParameterRule(
        r"(^|/)relative_position_bias_table$",
        decay=False,
        why="Swin's table, exempt by its name",
    ),
    ParameterRule(
        r"^backbone/(cls_token|pos_embed|register_tokens|blocks/.*/(bias|gamma))$",
        decay=False,
        why="DINOv2's optimizer leaves out biases and layer scales, that of ViTDet positions",
        only_if=r"^backbone/cls_token$",
    ),
)

# Any parameter whose official module name contains "backbone" learns at the multiplied rate.
BACKBONE_PATTERN = r"backbone"
BACKBONE = "backbone"
# Parts of a backbone that no pre-trained file holds: they come after its last block.
OUTPUTS_PATTERN = r"^backbone/(norm[0-3]|pyramid)/"
# A block's stage and index, by the names of every backbone; and what else belongs to a stage.
_BLOCK = re.compile(
    r"^backbone/(?:(?:layers|levels|stages)/(\d+)/(?:blocks/)?|res(\d+)/|blocks/)(\d+)/"
)
_IN_STAGE = re.compile(r"^backbone/(layers|levels|downsample_layers)/(\d+)/")
_BEFORE = re.compile(r"^backbone/(patch_embed|stem|cls_token|pos_embed|register_tokens)(/|$)")
_AFTER = re.compile(r"^backbone/(norm\d?|pyramid)/")


def parameter_names(params: Any) -> list[str]:
    """Names the leaves of `params`, as "backbone/layers/0/norm/scale", in leaf order."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def _decays(params: Any) -> list[bool]:
    """Flags the leaves of `params` that are decayed; ValueError for a norm without a rule."""
    names = parameter_names(params)
    rules = [
        rule
        for rule in PARAMETER_RULES
        if rule.only_if is None or any(re.search(rule.only_if, name) for name in names)
    ]
    decays = []
    for name in names:
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
        # Only norm layers have a "scale". A norm with a new name would silently be decayed.
        if rule is None and name.rsplit("/", 1)[-1] == "scale":
            raise ValueError(
                f"parameter {name} belongs to a norm layer, but no rule of PARAMETER_RULES in "
                "oneformer_jax/train/optim.py says whether it is decayed; add one, or call the "
                "layer 'norm'"
            )
        decays.append(True if rule is None else rule.decay)
    return decays


def describe_groups(params: Any) -> dict[str, list[str]]:
    """Returns the names of the parameters in each group.

    Args:
      params: nested dict of arrays or of their abstract shapes.

    Returns:
      {"main/decay", "main/no_decay", "backbone/decay", "backbone/no_decay"} -> names.
    """
    kinds = {True: "decay", False: "no_decay"}
    groups = {f"{part}/{kind}": [] for part in ("main", "backbone") for kind in kinds.values()}
    for name, decay in zip(parameter_names(params), _decays(params), strict=True):
        part = "backbone" if re.search(BACKBONE_PATTERN, name) else "main"
        groups[f"{part}/{kinds[decay]}"].append(name)
    return groups


def backbone_depths(params: Any) -> tuple[dict[str, int], int]:
    """Counts the blocks before each parameter of the backbone, as layer-wise decay needs it.

    The embedding of patches, the stem and positions have 0, the first block 1, the last block their
    number, and what comes after it (output norms, a ViT's pyramid) one more. A change of
    resolution counts as a part of the block before it.

    Args:
      params: nested dict with the names of the parameters.

    Returns:
      Depths by name, and the largest.

    Raises:
      ValueError: a parameter whose place is unknown.
    """
    names = [name for name in parameter_names(params) if name.startswith(f"{BACKBONE}/")]
    blocks = {name: found for name in names if (found := _BLOCK.match(name))}
    places = {
        name: (int(found[1] or found[2] or 0), int(found[3])) for name, found in blocks.items()
    }
    order = {place: depth for depth, place in enumerate(sorted(set(places.values())), 1)}
    depths = {}
    for name in names:
        if name in places:
            depths[name] = order[places[name]]
        elif found := _IN_STAGE.match(name):
            # Of a stage's end; only ConvNeXt's `downsample_layers` stand before their stage.
            stage = int(found[2]) - (found[1] == "downsample_layers")
            depths[name] = max((d for (s, _), d in order.items() if s <= stage), default=0)
        elif _BEFORE.match(name):
            depths[name] = 0
        elif _AFTER.match(name):
            depths[name] = len(order) + 1
        else:
            raise ValueError(
                f"optim.layer_decay: the place of the parameter {name} is unknown; add it to the "
                "patterns in oneformer_jax/train/optim.py"
            )
    return depths, len(order) + 1


def frozen(config: OptimConfig, params: Any) -> Any:
    """Tells which parameters `config.freeze` holds still.

    An entry freezes all names that it begins, part by part. "backbone" leaves out what no
    pre-trained file holds (`OUTPUTS_PATTERN`): an entry of its own freezes that, too.

    Args:
      config: settings.
      params: nested dict with the names of the parameters.

    Returns:
      Booleans in the structure of `params`.

    Raises:
      ValueError: an entry that begins no name, or entries that leave nothing to train.
    """
    names = parameter_names(params)
    flags = [False] * len(names)
    for entry in config.freeze:
        start = entry.replace(".", "/").strip("/")
        found = [f"{name}/".startswith(f"{start}/") for name in names]
        if not any(found):
            parts = {".".join(n.split("/")[:k]) for n in names for k in range(1, n.count("/") + 1)}
            raise ValueError(
                f"optim.freeze: no parameter's name begins with {entry!r}"
                f"{did_you_mean(entry, sorted(parts))}; the parts of this model are "
                f"{', '.join(sorted({name.split('/')[0] for name in names}))}"
            )
        if start == BACKBONE:
            found = [
                f and not re.match(OUTPUTS_PATTERN, n) for f, n in zip(found, names, strict=True)
            ]
        flags = [a or b for a, b in zip(flags, found, strict=True)]
    if all(flags):
        raise ValueError(f"optim.freeze is {config.freeze}; nothing is left to train")
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def holds_backbone(frozen: Any) -> bool:
    """Tells whether the result of `frozen` holds the whole backbone, but for its outputs."""
    names, flags = parameter_names(frozen), jax.tree.leaves(frozen)
    return all(
        flag
        for name, flag in zip(names, flags, strict=True)
        if name.startswith(f"{BACKBONE}/") and not re.match(OUTPUTS_PATTERN, name)
    )


def _scale_each(multipliers: Any) -> optax.GradientTransformation:
    """Multiplies every update by the float of the same place in `multipliers`."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u, m: u if m == 1.0 else u * m, updates, multipliers), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config: OptimConfig, abstract_params: Any) -> optax.GradientTransformation:
    """Makes AdamW as torch computes it, with the groups of `PARAMETER_RULES`.

    The state holds the two moments as trees of the parameters' structure, and step counters. No
    setting of `config` changes its structure, so a run may resume with another learning rate,
    schedule, clipping or frozen part; frozen parameters have moments, too.

    Args:
      config: settings.
      abstract_params: nested dict with the names of the parameters (values are not read).
    """
    treedef = jax.tree.structure(abstract_params)
    decay = jax.tree.unflatten(treedef, _decays(abstract_params))
    depths, most = ({}, 0) if config.layer_decay == 1 else backbone_depths(abstract_params)
    names, still = (
        parameter_names(abstract_params),
        jax.tree.leaves(frozen(config, abstract_params)),
    )
    rates = [
        (config.backbone_multiplier if re.search(BACKBONE_PATTERN, name) else 1.0)
        * config.layer_decay ** (most - depths.get(name, most))
        * (not stays)
        for name, stays in zip(names, still, strict=True)
    ]
    base = make_schedule(config)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay),
        _scale_each(jax.tree.unflatten(treedef, rates)),
        optax.scale_by_schedule(lambda count: -base(count)),
    )
