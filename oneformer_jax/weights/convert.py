"""Whole models from and to the files of other programs.

Official checkpoints (`.pth`) and Hugging Face folders are read and written. Every tensor is
accounted for: used, left out for a stated reason, or an error; all errors are reported together,
and nothing is loaded in part.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from oneformer_jax.files import first_few
from oneformer_jax.models import backbones, functional, published
from oneformer_jax.models.backbones import SwinConfig
from oneformer_jax.models.backbones.swin import relative_position_index
from oneformer_jax.models.oneformer import NUM_CLASSES, OneFormerConfig
from oneformer_jax.types import Metadata
from oneformer_jax.weights import architecture, descriptions, files, hugging_face, names
from oneformer_jax.weights.files import FileError, TensorFile

SETTINGS = descriptions.Settings.__struct_fields__
NO_OBJECT_WEIGHT = 0.1  # of every published model; a buffer of the official criterion


@dataclasses.dataclass(frozen=True)
class Model:
    """A model from a file.

    Attributes:
      config: the architecture.
      params: nested dict of float32 NumPy arrays, as `nnx.to_pure_dict` gives them.
      stats: the same for what is not trained.
      metadata: the classes, if the file holds them.
      dataset: the dataset of the published models with so many classes, or None.
      settings: test size and thresholds (`SETTINGS`) of the published model, or of the run that
        wrote the file; empty if neither is known.
      format: "official" or "hugging_face".
      text: whether the text branch is there.
      left_out: the file's tensors that are not used, and why.
      published: the recipe of the published model that has these tensors, or None.
      assumed: phrases about what nothing tells and all published models have.
    """

    config: OneFormerConfig
    params: dict[str, Any]
    stats: dict[str, Any]
    metadata: Metadata | None
    dataset: str | None
    settings: dict[str, Any]
    format: str
    text: bool
    left_out: dict[str, str]
    published: str | None
    assumed: tuple[str, ...]

    def summary(self) -> str:
        """A few lines about what was read."""
        count = sum(x.size for x in jax.tree.leaves(self.params)) / 1e6
        kind = type(self.config.backbone).__name__.removesuffix("Config")
        lines = [
            f"{self.format} checkpoint: {kind}, {self.config.num_queries} queries, "
            f"{self.config.num_classes} classes, {count:.3f} M parameters "
            f"{'with' if self.text else 'without'} the text branch",
            f"published model: {self.published or 'none has these tensors'}",
        ]
        if self.assumed:
            lines.append(f"assumed, since tensors do not tell: {'; '.join(self.assumed)}")
        for reason in dict.fromkeys(self.left_out.values()):
            left = [name for name, why in self.left_out.items() if why == reason]
            lines.append(f"left out, {reason}: {first_few(left, 3)}")
        return "\n".join(lines)


def read_model(
    path: str | os.PathLike[str],
    *,
    config: OneFormerConfig | str | None = None,
    **fields: Any,
) -> Model:
    """Reads an official checkpoint or a Hugging Face folder.

    Args:
      path: a `.pth`, `.pkl`, `.bin` or `.safetensors` file, or a folder of `transformers`.
      config: the architecture, or the name of a published one ("ade20k:dinat_large,res=1280");
        None recognises it from the tensors.
      **fields: fields of `OneFormerConfig` that tensors do not show, such as `num_heads`;
        `backbone` is a dict of fields of the backbone's config, such as `dilations`.

    Raises:
      FileError: no such file, a damaged one, one of another model, or tensors that are missing,
        unknown or of another shape.
      ValueError: an unknown field, or one that has to be given.
    """
    if config is not None and fields:
        raise ValueError(f"give either config or {', '.join(fields)}, not both")
    file = files.open_tensors(path)
    tensors = without_prefix(file.tensors)
    form = format_of(tensors, file)
    shapes = our_shapes(tensors, form)
    where = f"{file.path}: {files.OWN_KEY}"
    own = descriptions.read(file.own, where)
    found, assumed = None, ()
    if isinstance(config, str):
        found = named(config)
        config = found.model
    elif config is None and own.model is not None:
        config = descriptions.model_config(_overridden(own.model, fields), where)
    if config is None:
        config, found, assumed = architecture.recognise(
            shapes,
            path=file.path,
            given=fields,
            noted=hugging_face.noted(file.config, file.path) if file.config else {},
            frozen_norm=_frozen_norm(tensors, shapes, form),
        )
    if found is None:
        found = next(iter(published.find(config, file.path)), None)
    # The scale belongs to the criterion, which a model without the text branch may have too.
    branch = set(functional.TEXT_PARTS) - {"logit_scale"}
    text = any(name.split(".")[0] in branch for name in shapes)
    params, stats, left_out = _read(file, tensors, form, config, text)
    settings = own.settings or ({name: getattr(found, name) for name in SETTINGS} if found else {})
    if own.metadata is not None and own.metadata.num_classes != config.num_classes:
        raise FileError(
            f"{where}: metadata has {own.metadata.num_classes} classes, the model has "
            f"{config.num_classes}"
        )
    datasets = [name for name, count in NUM_CLASSES.items() if count == config.num_classes]
    return Model(
        config=config,
        params=params,
        stats=stats,
        metadata=own.metadata,
        dataset=datasets[0] if datasets else None,
        settings=dict(settings),
        format=form,
        text=text,
        left_out=left_out,
        published=found.config if found else None,
        assumed=assumed,
    )


def _overridden(described: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a description, with those of the caller in their place."""
    backbone = described.get("backbone")
    if isinstance(backbone, Mapping):
        backbone = {**backbone, **given.get("backbone", {})}
    return {**described, **given, "backbone": backbone}


def write_model(
    path: str | os.PathLike[str],
    form: str,
    config: OneFormerConfig,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    *,
    metadata: Metadata,
    settings: Mapping[str, Any],
) -> None:
    """Writes an official checkpoint or a Hugging Face folder.

    The text branch is written if `params` has it. What describes the model (architecture, classes,
    test size, thresholds) travels along where neither program reads it, so that `read_model` gives
    everything back.

    Args:
      path: of the file ("official") or the folder ("hugging_face").
      form: one of `names.FORMATS`.
      config: the architecture.
      params: nested dict of arrays.
      stats: the same for what is not trained.
      metadata: the classes.
      settings: test size and thresholds, of which `SETTINGS` are kept.

    Raises:
      FileError: `path` is taken.
      ValueError: an unknown format, arrays of another model, or a model that the format cannot
        hold.
    """
    if form not in names.FORMATS:
        raise ValueError(f"unknown format {form!r}; use one of {', '.join(names.FORMATS)}")
    arrays = dict(names.flatten(params)) | dict(names.flatten(stats))
    text = "text_encoder" in params
    kind = backbones.kind_of(config.backbone)
    _, *trees = functional.abstract(config, training=text)
    expected = dict(leaves(trees))
    if missing := [name for name in expected if name not in arrays]:
        raise ValueError(f"parameters of another model: it lacks {first_few(missing, 10)}")
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in expected.items():
        if np.shape(arrays[name]) != leaf.shape:
            raise ValueError(f"{name} has shape {np.shape(arrays[name])}; expected {leaf.shape}")
        group = names.group_of(name, "ours", form, kind)
        if group is None:
            raise ValueError(f"the {form} format has no name for {name}")
        if name == group.ours[0]:
            values = [np.asarray(arrays[one], np.float32) for one in group.ours]
            tensors |= dict(zip(group.theirs, group.to_theirs(values), strict=True))
    tensors |= _derived(config, tensors, form)
    own = {
        "model": config.to_dict(),
        "metadata": dataclasses.asdict(metadata),
        "settings": {name: settings[name] for name in SETTINGS if name in settings},
    }
    if form == "official":
        files.save_official(path, tensors, own)
    else:
        files.save_hugging_face(
            path, tensors, hugging_face.to_config(config, metadata, training=text), own
        )


def named(name: str) -> published.Published:
    """The published model of a name like "coco:swin_large" or "configs/coco.py:swin_large".

    Raises:
      ValueError: there is none; the message lists them.
    """
    for model in published.MODELS:
        if name in (model.config, f"{model.dataset}:{model.variant}"):
            return model
    known = " | ".join(f"{model.dataset}:{model.variant}" for model in published.MODELS)
    raise ValueError(f"there is no published model {name!r}; there are {known}")


def without_prefix(tensors: Mapping[str, files.Tensor]) -> dict[str, files.Tensor]:
    """Tensors without the "module." that PyTorch's parallel wrappers put before every name."""
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: t for name, t in tensors.items()}


def our_shapes(tensors: Mapping[str, files.Tensor], form: str) -> dict[str, tuple[int, ...]]:
    """Shapes by our names, as far as the tensors make such arrays."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in tensors:
        group = names.group_of(name, form, form)
        if group and name == group.theirs[0] and all(other in tensors for other in group.theirs):
            found = group.our_shapes([tensors[other].shape for other in group.theirs])
            if found is not None:
                shapes |= dict(zip(group.ours, found, strict=True))
    return shapes


# ------------------------------------------------------------------ reading


def format_of(tensors: Mapping[str, Any], file: TensorFile) -> str:
    """The format whose names the tensors have; FileError if they are not of a OneFormer."""
    if any(name.startswith("model.pixel_level_module.") for name in tensors):
        return "hugging_face"
    if any(name.startswith("sem_seg_head.predictor.") for name in tensors):
        return "official"
    raise FileError(
        f"{file.path} is not a OneFormer: none of its {len(tensors)} tensors belongs to a mask "
        f"decoder (they are {first_few(tensors, 3)}). A pre-trained backbone starts a training "
        "run: --config.init.backbone=FILE"
    )


def _frozen_norm(tensors: Mapping[str, Any], shapes: Mapping[str, Any], form: str) -> bool:
    """Whether a ResNet's norms were constants in training."""
    if form == "official":  # batch norm counts its batches there, a frozen one does not
        return not any(name.endswith(".num_batches_tracked") for name in tensors)
    # transformers always counts; the published models of two datasets were trained with batch norm.
    classes = shapes.get("predictor.class_embed.bias", (0,))[0] - 1
    return classes not in (NUM_CLASSES["cityscapes"], NUM_CLASSES["mapillary"])


def _read(
    file: TensorFile,
    tensors: Mapping[str, files.Tensor],
    form: str,
    config: OneFormerConfig,
    text: bool,
) -> tuple[dict, dict, dict[str, str]]:
    """Parameters, statistics and what is left out; one FileError about all that is wrong."""
    _, *trees = functional.abstract(config, training=text)
    expected = dict(leaves(trees))
    arrays, problems = read_arrays(
        file.path, tensors, form, expected, backbones.kind_of(config.backbone)
    )
    left_out, surplus = {}, []
    for name in tensors:
        group = names.group_of(name, form, form)
        if names.is_derived(name, form):
            left_out[name] = "computed or counted, not learned"
        elif not text and group is not None and group.ours == ("logit_scale",):
            left_out[name] = "a scale of the text branch, which is not there"
        elif group is None or group.ours[0] not in expected:
            surplus.append(name)
    if surplus:
        problems.append(f"{len(surplus)} tensors belong to no part of it: {first_few(surplus, 10)}")
    if problems:
        kind = type(config.backbone).__name__.removesuffix("Config")
        raise FileError(
            f"{file.path} does not hold a whole OneFormer ({kind}, {config.num_queries} queries, "
            f"{config.num_classes} classes); nothing is loaded:\n  " + "\n  ".join(problems)
        )

    def fill(tree: Mapping, prefix: str = "") -> dict:
        return {
            key: fill(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else arrays[f"{prefix}{key}"]()
            for key, value in tree.items()
        }

    params, stats = map(fill, trees)
    return params, stats, left_out


def leaves(trees: Iterable[Mapping]) -> Iterable[tuple[str, Any]]:
    for tree in trees:
        yield from names.flatten(tree)


def read_arrays(
    path: str,
    tensors: Mapping[str, files.Tensor],
    form: str,
    expected: Mapping[str, Any],
    kind: str,
) -> tuple[dict[str, Any], list[str]]:
    """Functions that read our arrays, by name, and sentences about those that are not there.

    They raise FileError for values that are not finite.

    Args:
      path: of the file, for messages.
      tensors: of the file.
      form: its format.
      expected: shapes by our names.
      kind: of the model's backbone.
    """
    arrays: dict[str, Any] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for name, leaf in expected.items():
        group = names.group_of(name, "ours", form, kind)
        if group is None:
            raise LookupError(f"the table of names lacks {name}")
        absent = [other for other in group.theirs if other not in tensors]
        missing += [other for other in absent if other not in missing]
        if absent:
            continue
        parts = [tensors[other] for other in group.theirs]
        shapes = group.our_shapes([part.shape for part in parts])
        index = group.ours.index(name)
        found = ", ".join(
            f"{other} {part.dtype.name}{list(part.shape)}"
            for other, part in zip(group.theirs, parts, strict=True)
        )
        if shapes is None or shapes[index] != tuple(leaf.shape):
            wrong.append(f"{found} for {name} {list(leaf.shape)}")
        elif any(part.dtype.kind != "f" for part in parts):
            wrong.append(f"{found} for {name}, which takes floating-point numbers")
        else:
            arrays[name] = _reader(path, group, parts, index)
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {first_few(missing, 10)}")
    if wrong:
        problems.append(f"{len(wrong)} tensors do not fit: {first_few(wrong, 10)}")
    return arrays, problems


def _reader(path: str, group: names.Group, parts: list[files.Tensor], index: int):
    def read() -> np.ndarray:
        array = group.to_ours([part.read() for part in parts])[index]
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused
            array = np.asarray(array, np.float32)
        if wrong := array.size - np.count_nonzero(np.isfinite(array)):
            raise FileError(
                f"{path}: {', '.join(group.theirs)} has {wrong:,} values of {array.size:,} that "
                "are not finite float32 numbers; the training that wrote it had diverged, or the "
                "file is damaged: take an earlier checkpoint"
            )
        return array

    return read


# ------------------------------------------------------------------ writing


def _derived(
    config: OneFormerConfig, tensors: Mapping[str, np.ndarray], form: str
) -> dict[str, np.ndarray]:
    """The buffers that the official state dict holds beside what is learned."""
    derived: dict[str, np.ndarray] = {}
    if "criterion.logit_scale" in tensors:
        weight = np.ones(config.num_classes + 1, np.float32)
        weight[-1] = NO_OBJECT_WEIGHT
        derived["criterion.empty_weight"] = weight
    backbone = config.backbone
    if form == "official" and isinstance(backbone, SwinConfig):
        index = relative_position_index(backbone.window_size).astype(np.int64)
        for stage, depth in enumerate(backbone.depths):
            for block in range(depth):
                name = f"backbone.layers.{stage}.blocks.{block}.attn.relative_position_index"
                derived[name] = index
    if form == "hugging_face" or getattr(backbone, "norm", None) == "batch":
        for name in tensors:
            if name.endswith(".running_mean"):
                counter = name.removesuffix("running_mean") + "num_batches_tracked"
                derived[counter] = np.zeros((), np.int64)
    return derived
