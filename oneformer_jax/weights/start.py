"""Starts a training run from weights: a pre-trained backbone, or a whole model of other classes.

Readers give functions that read arrays by our names; what does not fit the model to be trained is
listed, so that the run can say what starts afresh.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from oneformer_jax.files import FileError, first_few, open_regular
from oneformer_jax.models import backbones, functional
from oneformer_jax.models.backbones import BackboneConfig
from oneformer_jax.weights import names, reading, vit
from oneformer_jax.weights.pickle_reader import quoted
from oneformer_jax.weights.reading import Read

_MAX_README = 1 << 20  # bytes that are looked at

# Of a classifier, which has no place in a segmentation model: its head and the norm before it.
_CLASSIFIER = r"backbone\.((stem\.)?fc|head|norm|avgpool|classifier)\."
# Of the pre-training of DINOv2 and DINOv3.
_PRETRAINING = r"backbone\.(mask_token$|(local_)?cls_norm\.)"
# Norms of the four outputs, which start as identities, and the layers that make four maps of one.
_OUTPUTS = r"backbone\.(norm[0-3]|pyramid)\."
# Of the released files, where a folder does not tell by itself.
_LICENCES = {
    "DINOv2": "Apache-2.0, if this is the released file",
    "DINOv3": "the DINOv3 License, if this is the released file "
    "(https://ai.meta.com/resources/models-and-libraries/dinov3-license): read it before you share "
    "or sell what is trained from it",
}


class Start(NamedTuple):
    """Arrays to start from.

    Attributes:
      arrays: functions that read arrays, by our names.
      fresh: names of the model's arrays that the file does not hold in that shape, and why.
      unused: the file's arrays without a place in the model.
      licence: of the file, as far as it is known.
    """

    arrays: dict[str, Read]
    fresh: dict[str, str]
    unused: list[str]
    licence: str = "not told by the file; see where it was released"


def from_backbone(
    path: str | os.PathLike[str], expected: Mapping[str, Any], backbone: BackboneConfig
) -> Start:
    """Reads a pre-trained backbone.

    Files of ImageNet are taken (Swin, ConvNeXt, DiNAT, torchvision's ResNet), of DINOv2 and DINOv3,
    and checkpoints of whole models, whose backbone is used.

    Args:
      path: of the file or folder.
      expected: shapes of the model's arrays by our names.
      backbone: config of its backbone.

    Raises:
      FileError: a file that cannot be read, or that is not of this backbone: every array of the
        backbone must be there, but for those that make its outputs (norms, a ViT's pyramid).
    """
    found = reading.read_backbone(path)
    kind = backbones.kind_of(backbone)
    wanted = {name: leaf for name, leaf in expected.items() if name.startswith("backbone.")}
    arrays, problems = found.arrays(wanted, kind, optional=_OUTPUTS)
    problems += vit.contradictions(found.file.config, found.tensors, backbone, found.file.path)
    fresh = {
        name: "of the outputs, which a pre-trained backbone lacks"
        for name in wanted
        if name not in arrays and re.match(_OUTPUTS, name)
    }
    unused, surplus = [], []
    for name in found.unplaced(arrays):
        skipped = names.is_derived(name, found.form) or any(
            re.match(pattern, name) for pattern in (_CLASSIFIER, _PRETRAINING)
        )
        (unused if skipped else surplus).append(name)
    if surplus:
        problems.append(f"{len(surplus)} tensors have no place: {first_few(surplus, 10)}")
    if problems:
        raise FileError(
            f"init.backbone={found.file.path} is not of the backbone of this config "
            "(model.backbone.name and overrides):\n  " + "\n  ".join(problems)
        )
    family = ("DINOv2" if backbone.positions else "DINOv3") if kind == "vit" else ""
    licence = _told_licence(found.file.path) or _LICENCES.get(family)
    return Start(arrays, fresh, unused, *([licence] if licence else []))


def _told_licence(path: str) -> str:
    """Reads the licence at the head of a folder's README.md, "" if there is none."""
    page = os.path.join(path, "README.md")
    if not os.path.isfile(page):
        return ""
    with open_regular(page) as file:
        text = file.read(_MAX_README).decode("utf-8", "replace")
    head = re.match(r"---\s*\n(.*?)\n---", text, re.S)
    told = dict(re.findall(r"^(license\w*):[ \t]*(\S.*?)[ \t]*$", head[1], re.M)) if head else {}
    words = [told[key] for key in ("license", "license_name", "license_link") if key in told]
    return f"{quoted(' '.join(words), 200)} (README.md)" if words else ""


def from_model(path: str | os.PathLike[str], expected: Mapping[str, Any], kind: str) -> Start:
    """Reads another program's whole model, as far as its arrays have the same shapes.

    Args:
      path: of an official checkpoint or a Hugging Face folder.
      expected: shapes of the model's arrays by our names.
      kind: of its backbone.

    Raises:
      FileError: a file that cannot be read, or one whose arrays mostly differ.
    """
    found = reading.read_model(path)
    arrays, _ = found.arrays(expected, kind)
    unused = [
        name
        for name in found.unplaced(expected)
        if found.groups[name] is not None and not names.is_derived(name, found.form)
    ]
    return fitting(found.file.path, arrays, found.shapes, expected, unused)


def from_arrays(path: str, values: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> Start:
    """Returns the same for arrays in memory, those of one of our checkpoints."""

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
    """Returns a `Start` of `arrays`; FileError unless they are most of the model.

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
