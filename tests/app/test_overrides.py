"""Overrides of a config among the arguments, and what a mistyped key may have been meant as."""

import pytest

from oneformer_jax.app import cli, overrides
from oneformer_jax.configs import synthetic


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optm.lr", "--config.optim.lr"),
        ("optim.leraning_rate", ""),
        ("learning_rate", "--config.optim.lr"),
        ("solver.learning_rate", "--config.optim.lr"),
        ("img_size", "--config.data.crop_size"),
        ("num_epochs", "--config.train.epochs"),
        ("wd", "--config.optim.weight_decay"),
        ("optim.weigth_decay", "--config.optim.weight_decay"),
        ("lr", "--config.optim.lr"),
        ("model.optim.lr", "--config.optim.lr"),
        ("train.steps.foo", "--config.train.steps"),
        ("xyzzy", ""),
    ],
)
def test_unknown_key_names_the_nearest(override, meant):
    message = overrides.unknown_keys(synthetic.get_config(), ["seed", override])
    assert message.startswith(f"the config has no key '{override}'")
    assert "\n" not in message
    assert (f"did you mean {meant}" in message) if meant else "configs/common.py" in message


def test_a_name_in_two_groups_offers_both():
    message = overrides.unknown_keys(synthetic.get_config(), ["batch_size"])
    assert "--config.data.batch_size" in message
    assert "--config.eval.batch_size" in message


def test_known_keys_pass():
    config = synthetic.get_config()
    known = overrides.config_keys(config)
    assert {"optim.lr", "optim", "model.backbone.name", "seed"} <= set(known)
    assert overrides.unknown_keys(config, known) == ""


def test_overrides_are_found_among_the_arguments():
    argv = ["main.py", "--config", "a.py:b", "--config.optim.lr=1", "-config.seed", "3"]
    argv += ["--noconfig.model.remat", "--configuration=c.py", "--workdir=--config=d.py"]
    assert cli.argument(argv) == "a.py:b"
    assert cli.argument(["main.py", "--config=x.py"]) == "x.py"
    assert cli.argument(["main.py", "--mode=eval"]) is None
    assert overrides.overridden_keys(argv) == ["optim.lr", "seed", "model.remat"]
