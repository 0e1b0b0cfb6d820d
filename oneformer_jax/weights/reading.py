"""The reading of a weight file, made once: whose names its tensors have, and what they are by ours.

Conversion (`convert.read_model`) and warm start (`start`) both go by it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from oneformer_jax.files import FileError, first_few
from oneformer_jax.weights import files, names, vit
from oneformer_jax.weights.tensors import Tensor

Read = Callable[[], np.ndarray]

_HF_BACKBONE = "model.pixel_level_module."
# torchvision's names of a ResNet, as tools/convert-torchvision-to-d2.py maps them (spec 2.4).
_TORCHVISION = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


class Reading:
    """The tensors of a file, and the arrays of ours that they make.

    Attributes:
      file: that was opened.
      form: the format whose names the tensors have, one of `names.FORMATS`.
      tensors: by the names that a whole model has in that format.
      groups: the correspondence that each tensor belongs to; None for names beyond the table.
      shapes: of arrays by our names, as far as the tensors make such arrays.
    """

    def __init__(self, file: files.TensorFile, form: str, tensors: Mapping[str, Tensor]):
        self.file, self.form, self.tensors = file, form, tensors
        self.groups = {name: names.group_of(name, form, form) for name in tensors}
        self._made = {
            group: group.our_shapes([tensors[other].shape for other in group.theirs])
            for group in dict.fromkeys(filter(None, self.groups.values()))
            if all(other in tensors for other in group.theirs)
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        for group, shapes in self._made.items():
            self.shapes |= zip(group.ours, shapes or (), strict=shapes is not None)

    def arrays(
        self, expected: Mapping[str, Any], kind: str, optional: str = "(?!)"
    ) -> tuple[dict[str, Read], list[str]]:
        """Returns lazy readers by our names, and one message about all missing, one about misfits.

        The readers raise FileError for values that are not finite.

        Args:
          expected: leaves with the shape of each array, by our names.
          kind: of the model's backbone.
          optional: pattern of names; the messages do not speak of these arrays.
        """
        arrays: dict[str, Read] = {}
        missing: dict[str, None] = {}
        wrong: list[str] = []
        for name, leaf in expected.items():
            group = names.group_of(name, "ours", self.form, kind)
            if group is None:
                raise LookupError(f"the table of names lacks {name}")
            if absent := [other for other in group.theirs if other not in self.tensors]:
                missing |= {} if re.match(optional, name) else dict.fromkeys(absent)
                continue
            parts = [self.tensors[other] for other in group.theirs]
            shapes, index = self._made.get(group), group.ours.index(name)
            problem = ""
            if shapes is None or shapes[index] != tuple(leaf.shape):
                problem = f" {list(leaf.shape)}"
            elif any(part.dtype.kind != "f" for part in parts):
                problem = ", which takes floating-point numbers"
            if not problem:
                arrays[name] = self._reader(group, parts, index)
            elif not re.match(optional, name):
                found = ", ".join(
                    f"{other} {part.dtype.name}{list(part.shape)}"
                    for other, part in zip(group.theirs, parts, strict=True)
                )
                wrong.append(f"{found} for {name}{problem}")
        counted = (("are missing", list(missing)), ("do not fit", wrong))
        problems = [f"{len(x)} tensors {what}: {first_few(x, 10)}" for what, x in counted if x]
        return arrays, problems

    def unplaced(self, placed: Collection[str]) -> list[str]:
        """Lists the tensors that belong to none of the arrays `placed`."""
        return [
            name
            for name, group in self.groups.items()
            if group is None or group.ours[0] not in placed
        ]

    def _reader(self, group: names.Group, parts: Sequence[Tensor], index: int) -> Read:
        def read() -> np.ndarray:
            array = group.to_ours([part.read() for part in parts])[index]
            with np.errstate(over="ignore"):  # float64 beyond float32: infinite, and refused
                array = np.asarray(array, np.float32)
            if wrong := array.size - np.count_nonzero(np.isfinite(array)):
                raise FileError(
                    f"{self.file.path}: {', '.join(group.theirs)} has {wrong:,} values of "
                    f"{array.size:,} that are not finite float32 numbers; the training that wrote "
                    "it had diverged, or the file is damaged: take an earlier checkpoint"
                )
            return array

        return read


def read_model(path: str | os.PathLike[str]) -> Reading:
    """Opens a file or folder of a whole model.

    Raises:
      FileError: a file that cannot be read, or whose names are not those of a OneFormer.
    """
    file, tensors = _open(path)
    if any(name.startswith(_HF_BACKBONE) for name in tensors):
        return Reading(file, "hugging_face", tensors)
    if any(name.startswith("sem_seg_head.predictor.") for name in tensors):
        return Reading(file, "official", tensors)
    raise FileError(
        f"{file.path} is not a OneFormer: none of its {len(tensors)} tensors belongs to a mask "
        f"decoder (they are {first_few(tensors, 3)}). A pre-trained backbone starts a training "
        "run: --config.init.backbone=FILE"
    )


def read_backbone(path: str | os.PathLike[str]) -> Reading:
    """Opens a file of a backbone alone, or that part of a whole model.

    Raises:
      FileError: a file that cannot be read.
    """
    file, tensors = _open(path)
    for mark, prefix, form in (
        (_HF_BACKBONE, f"{_HF_BACKBONE}encoder.", "hugging_face"),
        ("backbone.", "backbone.", "official"),
    ):
        if any(name.startswith(mark) for name in tensors):
            part = {name: t for name, t in tensors.items() if name.startswith(prefix)}
            return Reading(file, form, part)
    if vit.is_vit(tensors):
        found = vit.canonical(tensors, file.path)
        return Reading(file, "official", {f"backbone.{name}": t for name, t in found.items()})
    renamed = {}
    torchvision = "layer1.0.conv1.weight" in tensors
    for name, tensor in tensors.items():
        for pattern, replacement in _TORCHVISION if torchvision else ():
            name = re.sub(pattern, replacement, name)
        renamed[f"backbone.{name}"] = tensor
    return Reading(file, "official", renamed)


def _open(path: str | os.PathLike[str]) -> tuple[files.TensorFile, dict[str, Tensor]]:
    """A file, and its tensors without the "module." that PyTorch's parallel wrappers prepend."""
    file = files.open_tensors(path)
    wrapped = all(name.startswith("module.") for name in file.tensors)
    prefix = "module." if wrapped else ""
    return file, {name.removeprefix(prefix): tensor for name, tensor in file.tensors.items()}
