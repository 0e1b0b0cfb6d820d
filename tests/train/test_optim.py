import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oneformer_jax import config_rules
from oneformer_jax.models import backbones, functional
from oneformer_jax.train import optim
from oneformer_jax.train.optim import OptimConfig
from tests import tiny


def nest(names, value=None):
    """Nested dict of 1-element arrays; numeric parts become integer keys, as nnx gives them."""
    tree = {}
    for name in names:
        *parts, leaf = [int(p) if p.isdigit() else p for p in name.split("/")]
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = jnp.ones(2) if value is None else value
    return tree


# One name of each kind that the official optimizer treats on its own.
NO_DECAY_MAIN = {
    "pixel_decoder/input_proj/0/norm/scale",
    "pixel_decoder/transformer/encoder/layers/0/norm1/bias",
    "pixel_decoder/adapter_1/norm/scale",
    "predictor/class_transformer/decoder/norm/scale",
    "predictor/decoder_norm/bias",
    "predictor/query_embed/embedding",
    "predictor/query_feat/embedding",
    "predictor/level_embed/embedding",
    "prompt_ctx/embedding",
    "text_encoder/token_embedding/embedding",
    "text_encoder/transformer/resblocks/0/ln_1/scale",
    "text_encoder/transformer/resblocks/0/ln_2/bias",
    "text_encoder/ln_final/scale",
}
DECAY_MAIN = {
    "pixel_decoder/input_proj/0/conv/bias",
    "pixel_decoder/transformer/level_embed",
    "pixel_decoder/transformer/encoder/layers/0/self_attn/value_proj/kernel",
    "pixel_decoder/transformer/encoder/layers/0/linear1/bias",
    "pixel_decoder/mask_features/kernel",
    "predictor/class_embed/bias",
    "task_mlp/layers/0/kernel",
    "text_encoder/positional_embedding",
    "text_encoder/transformer/resblocks/0/mlp/c_fc/bias",
    "text_projector/layers/0/bias",
    "logit_scale",
}
NO_DECAY_SWIN = {
    "backbone/patch_embed/norm/scale",
    "backbone/layers/0/blocks/1/norm1/bias",
    "backbone/layers/0/blocks/1/attn/relative_position_bias_table",
    "backbone/layers/0/downsample/norm/scale",
    "backbone/norm0/scale",
}
DECAY_SWIN = {
    "backbone/patch_embed/proj/bias",
    "backbone/layers/0/blocks/1/attn/qkv/kernel",
    "backbone/layers/0/blocks/1/attn/qkv/bias",
}
CONVNEXT = {
    "backbone/downsample_layers/0/0/kernel",
    "backbone/downsample_layers/0/1/scale",
    "backbone/stages/0/0/norm/scale",
    "backbone/stages/0/0/norm/bias",
    "backbone/stages/0/0/gamma",
    "backbone/norm0/scale",
}


def test_groups_are_the_official_ones():
    swin = nest(NO_DECAY_MAIN | DECAY_MAIN | NO_DECAY_SWIN | DECAY_SWIN)
    groups = {k: set(v) for k, v in optim.describe_groups(swin).items()}
    assert groups == {
        "main/decay": DECAY_MAIN,
        "main/no_decay": NO_DECAY_MAIN,
        "backbone/decay": DECAY_SWIN,
        "backbone/no_decay": NO_DECAY_SWIN,
    }


def test_convnext_backbone_is_decayed_as_a_whole():
    groups = optim.describe_groups(nest(NO_DECAY_MAIN | CONVNEXT))
    assert set(groups["backbone/decay"]) == CONVNEXT
    assert groups["backbone/no_decay"] == []
    assert set(groups["main/no_decay"]) == NO_DECAY_MAIN


def test_dinat_rpb_is_decayed_and_its_norms_are_not():
    names = {"backbone/levels/0/blocks/0/attn/rpb", "backbone/levels/0/blocks/0/norm1/scale"}
    groups = optim.describe_groups(nest(names))
    assert groups["backbone/decay"] == ["backbone/levels/0/blocks/0/attn/rpb"]
    assert groups["backbone/no_decay"] == ["backbone/levels/0/blocks/0/norm1/scale"]


def test_a_norm_under_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"backbone/stem/bn/scale .*PARAMETER_RULES"):
        optim.describe_groups(nest({"backbone/stem/bn/scale", "backbone/stem/bn/bias"}))


def test_poly_schedule():
    config = OptimConfig(steps=1000, lr=2e-4, schedule="poly")
    schedule = optim.make_schedule(config)
    for step in (0, 1, 500, 999):
        expected = 2e-4 * (1 - step / 1000) ** 0.9
        np.testing.assert_allclose(schedule(jnp.int32(step)), expected, rtol=1e-4)
        rates = optim.learning_rates(config, step)
        assert rates["main"] == pytest.approx(expected)
        assert rates["backbone"] == pytest.approx(expected * 0.1)
    assert schedule(1000) == 0
    assert schedule(1500) == 0


def test_step_schedule_with_fractions_and_absolute_boundaries():
    # The official COCO schedule: steps 327,778 and 355,092 of 368,750.
    config = OptimConfig(steps=368_750, schedule="step", boundaries=(0.5, 327_778, 355_092))
    assert config.boundary_steps == (184_375, 327_778, 355_092)
    schedule = jax.jit(optim.make_schedule(config))
    for step, factor in (
        (0, 1.0),
        (184_374, 1.0),
        (184_375, 0.1),
        (327_777, 0.1),
        (327_778, 0.01),
        (355_092, 0.001),
    ):
        np.testing.assert_allclose(schedule(step), 1e-4 * factor, rtol=1e-5)
        assert optim.learning_rates(config, step)["main"] == pytest.approx(1e-4 * factor)
    tiny = OptimConfig(steps=2, schedule="step", boundaries=(0.889, 0.963))
    assert optim.learning_rates(tiny, 1)["main"] == pytest.approx(1e-4)
    constant = optim.make_schedule(OptimConfig(steps=10, schedule="step", boundaries=()))
    assert constant(9) == pytest.approx(1e-4)


def test_warmup_multiplies_the_schedule():
    config = OptimConfig(steps=100, lr=1.0, schedule="poly", warmup_steps=10, warmup_factor=0.2)
    schedule = optim.make_schedule(config)
    for step, factor in ((0, 0.2), (5, 0.6), (10, 1.0), (50, 1.0)):
        np.testing.assert_allclose(schedule(step), factor * (1 - step / 100) ** 0.9, rtol=1e-5)


def hand_adamw(param, grads, config, *, multiplier, decay):
    """AdamW as torch's documentation states it, in float64."""
    p, m, v = np.float64(param), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        lr = config.lr * multiplier * (1 - (t - 1) / config.steps) ** config.power
        p = p - lr * (config.weight_decay if decay else 0.0) * p
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g * g
        m_hat, v_hat = m / (1 - config.b1**t), v / (1 - config.b2**t)
        p = p - lr * m_hat / (np.sqrt(v_hat) + config.eps)
    return p


def test_adamw_steps_match_hand_computation():
    config = OptimConfig(steps=10, lr=0.1, weight_decay=0.05, schedule="poly")
    cases = {
        "predictor/class_embed/kernel": (1.0, True),
        "predictor/decoder_norm/scale": (1.0, False),
        "backbone/layers/0/mlp/kernel": (0.1, True),
        "backbone/norm0/scale": (0.1, False),
    }
    params = nest(cases, jnp.float32(3.0))
    optimizer = optim.make_optimizer(config, jax.eval_shape(lambda: params))
    grads = (0.5, -0.02, 1.5)

    @jax.jit
    def step(params, state, gradient):
        tree = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
        updates, state = optimizer.update(tree, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in grads:
        params, state = step(params, state, gradient)
    found = dict(zip(optim.parameter_names(params), jax.tree.leaves(params), strict=True))
    values = set()
    for name, (multiplier, decay) in cases.items():
        expected = hand_adamw(3.0, grads, config, multiplier=multiplier, decay=decay)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)
        values.add(float(expected))
    assert len(values) == 4  # the four groups really differ


def test_clipping_acts_on_the_global_norm_and_keeps_the_state_structure():
    params = {"a": {"kernel": jnp.zeros(1)}, "b": {"kernel": jnp.zeros(1)}}
    grads = {"a": {"kernel": jnp.array([3.0])}, "b": {"kernel": jnp.array([4.0])}}
    moments = {}
    structures = set()
    for clip in (0.0, 1.0, 100.0):
        optimizer = optim.make_optimizer(OptimConfig(steps=10, clip_norm=clip), params)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        moments[clip] = float(optax.tree.get(state, "mu")["a"]["kernel"][0])
        structures.add(jax.tree.structure(state))
    assert moments[0.0] == pytest.approx(0.3)
    assert moments[1.0] == pytest.approx(0.1 * 3 / 5)
    assert moments[100.0] == pytest.approx(0.3)
    assert len(structures) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, r"optim.schedule is 'cosine'; it must be one of poly, step"),
        ({"lr": 0.0}, r"optim.lr is 0.0"),
        ({"steps": 0}, r"train.steps is 0"),
        ({"boundaries": (0.9, 0.5)}, r"optim.boundaries is \(0.9, 0.5\)"),
        ({"boundaries": (0.5, 50)}, r"optim.boundaries is \(0.5, 50\)"),
        ({"boundaries": (200,)}, r"optim.boundaries .* below train.steps = 100"),
        (
            {"clip_norm": -1.0},
            r"optim.clip_norm is -1.0; it must be .* \(0 is off\)",
        ),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{"steps": 100, **settings})


# Blocks of each kind; a parameter, and the blocks before it and its own.
DEPTHS = {
    "swin_tiny": {
        "patch_embed/proj/kernel": 0,
        "layers/0/blocks/0/norm1/scale": 1,
        "layers/0/downsample/reduction/kernel": 2,
        "layers/3/blocks/1/attn/qkv/kernel": 12,
        "norm0/scale": 13,
    },
    "convnext_large": {
        "downsample_layers/0/1/scale": 0,
        "downsample_layers/1/1/kernel": 3,
        "stages/2/26/gamma": 33,
        "norm3/bias": 37,
    },
    "dinat_large": {"patch_embed/proj/0/kernel": 0, "levels/1/blocks/0/attn/rpb": 4},
    "internimage_huge": {"patch_embed/conv1/kernel": 0, "levels/0/norm/scale": 6},
    "resnet50": {"stem/conv1/kernel": 0, "res3/0/shortcut/kernel": 4, "res5/2/conv3/kernel": 16},
    "dinov2_small": {
        "pos_embed": 0,
        "blocks/0/ls1/gamma": 1,
        "blocks/11/mlp/fc1/bias": 12,
        "norm/scale": 13,
        "pyramid/eighth/proj/kernel": 13,
    },
    "dinov3_small_plus": {"register_tokens": 0, "cls_token": 0, "blocks/3/mlp/w3/kernel": 4},
}


@pytest.mark.parametrize("name", DEPTHS)
def test_layer_decay_knows_the_place_of_every_parameter(name):
    config = tiny.model_config(backbone=backbones.backbone_config(name))
    params = functional.abstract(config, training=False).params
    depths, most = optim.backbone_depths(params)
    every = [n for n in optim.parameter_names(params) if n.startswith("backbone/")]
    assert set(depths) == set(every)
    for parameter, depth in DEPTHS[name].items():
        assert depths[f"backbone/{parameter}"] == depth, parameter
    assert set(depths.values()) >= set(range(most))  # ResNet has nothing after its last block


def test_layer_decay_refuses_a_name_that_it_does_not_know():
    with pytest.raises(ValueError, match="place of the parameter backbone/extra/kernel is unknown"):
        optim.backbone_depths(nest({"backbone/blocks/0/norm1/scale", "backbone/extra/kernel"}))


NAMES = (
    "backbone/patch_embed/proj/kernel",
    "backbone/blocks/0/norm1/scale",
    "backbone/blocks/1/norm1/scale",
    "backbone/pyramid/norm/scale",
    "text_encoder/ln_final/scale",
    "predictor/class_embed/kernel",
)


def updates_of(**settings):
    """Share of the base rate with which each parameter moves, without weight decay."""
    params = nest(NAMES)
    config = OptimConfig(steps=10, lr=1.0, schedule="poly", weight_decay=0.05, **settings)
    optimizer = optim.make_optimizer(config, params)
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    decayed = {"backbone/patch_embed/proj/kernel", "predictor/class_embed/kernel"}
    return {
        name: round(-float(leaf[0]) / (1.05 if name in decayed else 1.0), 3)
        for name, leaf in zip(optim.parameter_names(params), jax.tree.leaves(updates), strict=True)
    }


def test_the_rate_falls_from_block_to_block_towards_the_image():
    rates = updates_of(layer_decay=0.5, backbone_multiplier=0.8)
    assert [rates[name] for name in NAMES] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        (("backbone",), NAMES[:3]),
        (("backbone", "backbone.pyramid"), NAMES[:4]),
        (("backbone.blocks.1", "text_encoder"), (NAMES[2], NAMES[4])),
        (("backbone/blocks/0/",), NAMES[1:2]),
    ],
)
def test_frozen_parts_do_not_move(freeze, still):
    rates = updates_of(freeze=freeze, backbone_multiplier=1.0)
    assert {name for name, rate in rates.items() if rate == 0} == set(still)
    assert all(rates[name] == 1 for name in set(NAMES) - set(still))


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("bakbone",), r"optim.freeze is \('bakbone',\); .* each one of backbone, pixel_decoder"),
        (("task_mlp",), r"begins with 'task_mlp'; the parts of this model are backbone, predictor"),
        (("backbone.block",), r"'backbone.block' \(did you mean 'backbone.blocks'"),
        (
            ("backbone", "backbone.pyramid", "text_encoder", "predictor"),
            "nothing is left to train",
        ),
    ],
)
def test_what_cannot_be_frozen_is_told(freeze, message):
    with pytest.raises(ValueError, match=message):
        updates_of(freeze=freeze)


def test_the_rule_of_frozen_parts_knows_every_part():
    found = set()
    for loss in ("contrastive", "classification"):
        found |= set(functional.abstract(tiny.model_config(query_loss=loss), training=True).params)
    assert found == set(config_rules.PARTS)
