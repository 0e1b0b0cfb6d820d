"""Arranges TensorBoard: groups of tags, a layout, and the settings by which runs compare."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.util import tensor_util

from oneformer_jax.train.tensorboard import SummaryWriter

# Charts of the page "Custom scalars": category -> title -> patterns of tags.
_CHARTS = {
    "Losses": {
        "total": ("loss/total",),
        "terms": ("loss/(ce|mask|dice|contrastive)",),
        "layers of the decoder": ("loss_layers/.*",),
    },
    "Scores": {
        "panoptic quality": ("panoptic/PQ", "panoptic/PQ_things", "panoptic/PQ_stuff"),
        "average precision": ("instance/AP", "instance/AP50"),
        "mean IoU": ("semantic/mIoU",),
    },
    "Time": {
        "images per second": ("time/images_per_second",),
        "seconds of a step": ("time/step_seconds", "time/data_seconds"),
        "share of the time that trains": ("time/goodput",),
    },
}
_LAYER = re.compile(r"loss_(\w+_\d+)")
_TERM = re.compile(r"loss_(\w+)")
_NORM = re.compile(r"(\w+)_norm")


def tag_of(name: str) -> str:
    """Returns the tag of a scalar: "loss/total", "loss_layers/ce_0", "norm/grad", "health/...".

    Names with a group of their own, such as "time/eta_seconds", stay.
    """
    if "/" in name:
        return name
    if name == "loss":
        return "loss/total"
    for pattern, group in ((_LAYER, "loss_layers"), (_TERM, "loss"), (_NORM, "norm")):
        if match := pattern.fullmatch(name):
            return f"{group}/{match[1]}"
    return f"health/{name}"


def layout() -> summary_pb2.Summary:
    """Makes the summary that opens "Custom scalars" on losses, scores and time."""
    charts = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=category,
                chart=[
                    layout_pb2.Chart(
                        title=title,
                        multiline=layout_pb2.MultilineChartContent(
                            tag=[f"^{pattern}$" for pattern in patterns]
                        ),
                    )
                    for title, patterns in charts.items()
                ],
            )
            for category, charts in _CHARTS.items()
        ]
    )
    # TensorBoard's own function for this imports TensorFlow.
    entry = summary_pb2.Summary.Value(
        tag=custom_scalar.CONFIG_SUMMARY_TAG,
        tensor=tensor_util.make_tensor_proto(np.array(charts.SerializeToString(), object)),
        metadata=custom_scalar.create_summary_metadata(),
    )
    return summary_pb2.Summary(value=[entry])


class RunWriter(SummaryWriter):
    """Writes the events of a run: tags in groups, and a layout for "Custom scalars"."""

    def __init__(self, logdir: str | os.PathLike[str], resume_step: int | None = None):
        super().__init__(logdir, resume_step)
        self._write_summary(0, layout())

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        super().write_scalars(step, {tag_of(name): value for name, value in scalars.items()})


def compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config that the page "HParams" compares: all but places."""
    kept = {}
    for key, value in config.items():
        if key == "dataset":
            value = {name: inner for name, inner in value.items() if name != "data_dir"}
        if key != "compilation_cache":
            kept[key] = value
    return kept


def texts(config_json: str) -> dict[str, str]:
    """Returns what the page "Text" shows of a run: the command, the versions, the config."""
    import jax

    command = shlex.join([sys.argv[0], *sys.argv[1:]])
    own = sys.modules[__name__.split(".")[0]].__version__
    versions = [f"oneformer_jax {own}", f"jax {jax.__version__}"]
    versions += [f"Python {sys.version.split()[0]}", jax.devices()[0].device_kind]
    return {
        "run/command": f"    {command}",
        "run/versions": ", ".join(versions),
        "run/config": "\n".join(f"    {line}" for line in config_json.splitlines()),
    }
