"""What a training run starts from: a pre-trained backbone, or a whole model of other classes.

Readers give functions that read arrays by our names; what does not fit the model to be trained is
listed, so that the run can say what starts afresh.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from oneformer_jax.files import first_few
from oneformer_jax.models import functional
from oneformer_jax.weights import convert, files, names
from oneformer_jax.weights.files import FileError

Read = Callable[[], np.ndarray]

# torchvision's names of a ResNet, as tools/convert-torchvision-to-d2.py maps them (spec 2.4).
_TORCHVISION = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)
# Of a classifier, which has no place in a segmentation model: its head and the norm before it.
_CLASSIFIER = r"backbone\.((stem\.)?fc|head|norm|avgpool)\."
# Norms of the four outputs, which classifiers do not have; they start as identities.
_OUTPUT_NORM = r"backbone\.norm[0-3]\."


class Start(NamedTuple):
    """Arrays to start from.

    Attributes:
      arrays: functions that read arrays, by our names.
      fresh: names of the model's arrays that the file does not hold in that shape, and why.
      unused: the file's arrays without a place in the model.
    """

    arrays: dict[str, Read]
    fresh: dict[str, str]
    unused: list[str]


def from_backbone(path: str | os.PathLike[str], expected: Mapping[str, Any], kind: str) -> Start:
    """A pre-trained backbone: ImageNet files of Swin, ConvNeXt, DiNAT and torchvision's ResNet.

    Checkpoints of whole models are taken too; their backbone is used.

    Args:
      path: of the file or folder.
      expected: shapes of the model's arrays by our names.
      kind: of its backbone.

    Raises:
      FileError: a file that cannot be read, or that is not of this backbone: every array of the
        backbone must be there, but for the norms of its outputs.
    """
    file = files.open_tensors(path)
    tensors, form = _backbone_tensors(convert.without_prefix(file.tensors))
    wanted = {name: leaf for name, leaf in expected.items() if name.startswith("backbone.")}
    arrays, _ = convert.read_arrays(file.path, tensors, form, wanted, kind)
    fresh = {
        name: "an output norm, which classifiers lack"
        for name in wanted
        if name not in arrays and re.match(_OUTPUT_NORM, name)
    }
    needed = {name: leaf for name, leaf in wanted.items() if name not in fresh}
    _, problems = convert.read_arrays(file.path, tensors, form, needed, kind)
    unused, surplus = [], []
    for name in tensors:
        group = names.group_of(name, form, form)
        if group is not None and group.ours[0] in arrays:
            continue
        skipped = names.is_derived(name, form) or re.match(_CLASSIFIER, name)
        (unused if skipped else surplus).append(name)
    if surplus:
        problems.append(f"{len(surplus)} tensors have no place: {first_few(surplus, 10)}")
    if problems:
        raise FileError(
            f"init.backbone={file.path} is not of the backbone of this config "
            "(model.backbone.name and overrides):\n  " + "\n  ".join(problems)
        )
    return Start(arrays, fresh, unused)


def _backbone_tensors(
    tensors: Mapping[str, files.Tensor],
) -> tuple[dict[str, files.Tensor], str]:
    """The tensors of a backbone by the names of a whole model, and the format of these names."""
    if any(name.startswith("model.pixel_level_module.") for name in tensors):
        prefix, form = "model.pixel_level_module.encoder.", "hugging_face"
        return {name: t for name, t in tensors.items() if name.startswith(prefix)}, form
    if any(name.startswith("backbone.") for name in tensors):
        return {name: t for name, t in tensors.items() if name.startswith("backbone.")}, "official"
    renamed = {}
    torchvision = "layer1.0.conv1.weight" in tensors
    for name, tensor in tensors.items():
        if torchvision:
            for pattern, replacement in _TORCHVISION:
                name = re.sub(pattern, replacement, name)
        renamed[f"backbone.{name}"] = tensor
    return renamed, "official"


def from_model(path: str | os.PathLike[str], expected: Mapping[str, Any], kind: str) -> Start:
    """Another program's checkpoint of a whole model, as far as its arrays have the same shapes.

    Args:
      path: of an official checkpoint or a Hugging Face folder.
      expected: shapes of the model's arrays by our names.
      kind: of its backbone.

    Raises:
      FileError: a file that cannot be read, or one whose arrays mostly differ.
    """
    file = files.open_tensors(path)
    tensors = convert.without_prefix(file.tensors)
    form = convert.format_of(tensors, file)
    arrays, _ = convert.read_arrays(file.path, tensors, form, expected, kind)
    shapes = convert.our_shapes(tensors, form)
    unused = [
        name
        for name in tensors
        if not names.is_derived(name, form)
        and (group := names.group_of(name, form, form)) is not None
        and group.ours[0] not in expected
    ]
    return fitting(file.path, arrays, shapes, expected, unused)


def from_arrays(path: str, values: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> Start:
    """The same for arrays at hand, those of one of our checkpoints."""

    def reader(value: np.ndarray) -> Read:
        return lambda: np.asarray(value, np.float32)

    shapes = {name: np.shape(value) for name, value in values.items()}
    arrays = {
        name: reader(values[name])
        for name, leaf in expected.items()
        if shapes.get(name) == tuple(leaf.shape)
    }
    unused = [name for name in values if name not in expected]
    return fitting(path, arrays, shapes, expected, unused)


def fitting(
    path: str,
    arrays: dict[str, Read],
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, Any],
    unused: list[str],
) -> Start:
    """A `Start` of `arrays`; FileError unless they are most of the model.

    Args:
      path: of the file, for the message.
      arrays: those that fit.
      shapes: of all arrays of the file, by our names.
      expected: shapes of the model's arrays.
      unused: the file's arrays without a place.
    """
    fresh = {
        name: f"there {list(shapes[name])}, here {list(leaf.shape)}"
        if name in shapes
        else "not in the file"
        for name, leaf in expected.items()
        if name not in arrays
    }
    # The text branch may be missing as a whole; the rest must be mostly there.
    main = {n: leaf for n, leaf in expected.items() if n.split(".")[0] not in functional.TEXT_PARTS}
    total = sum(leaf.size for leaf in main.values())
    taken = sum(leaf.size for name, leaf in main.items() if name in arrays)
    if 2 * taken < total:
        lines = [f"{name} ({fresh[name]})" for name in main if name in fresh]
        raise FileError(
            f"init.checkpoint={path} is of another model: only {taken / total:.0%} of the "
            f"parameters fit that of this config (model.*); these do not: {first_few(lines, 10)}"
        )
    return Start(arrays, fresh, unused)
