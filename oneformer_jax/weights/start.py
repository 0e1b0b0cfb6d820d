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

from oneformer_jax.files import FileError, first_few
from oneformer_jax.models import functional
from oneformer_jax.weights import names, reading
from oneformer_jax.weights.reading import Read

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
    """Reads a pre-trained backbone: ImageNet files of Swin, ConvNeXt, DiNAT, torchvision's ResNet.

    Checkpoints of whole models are taken too; their backbone is used.

    Args:
      path: of the file or folder.
      expected: shapes of the model's arrays by our names.
      kind: of its backbone.

    Raises:
      FileError: a file that cannot be read, or that is not of this backbone: every array of the
        backbone must be there, but for the norms of its outputs.
    """
    found = reading.read_backbone(path)
    wanted = {name: leaf for name, leaf in expected.items() if name.startswith("backbone.")}
    arrays, problems = found.arrays(wanted, kind, optional=_OUTPUT_NORM)
    fresh = {
        name: "an output norm, which classifiers lack"
        for name in wanted
        if name not in arrays and re.match(_OUTPUT_NORM, name)
    }
    unused, surplus = [], []
    for name in found.unplaced(arrays):
        skipped = names.is_derived(name, found.form) or re.match(_CLASSIFIER, name)
        (unused if skipped else surplus).append(name)
    if surplus:
        problems.append(f"{len(surplus)} tensors have no place: {first_few(surplus, 10)}")
    if problems:
        raise FileError(
            f"init.backbone={found.file.path} is not of the backbone of this config "
            "(model.backbone.name and overrides):\n  " + "\n  ".join(problems)
        )
    return Start(arrays, fresh, unused)


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
