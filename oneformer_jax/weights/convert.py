"""Whole models from and to the files of other programs.

Official checkpoints (`.pth`) and Hugging Face folders are read and written. Every tensor is
accounted for: used, left out for a stated reason, or an error; all errors are reported together,
and nothing is loaded in part.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from oneformer_jax import catalogue, rules
from oneformer_jax.files import FileError, first_few
from oneformer_jax.models import backbones, functional
from oneformer_jax.models.backbones import SwinConfig
from oneformer_jax.models.backbones.swin import relative_position_index
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.progress import logged, progress_log
from oneformer_jax.types import Metadata
from oneformer_jax.weights import architecture, descriptions, files, hugging_face, names, reading
from oneformer_jax.weights.reading import Reading

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
        """Returns a few lines about what was read."""
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
    if not isinstance(backbone := fields.get("backbone", {}), Mapping):
        raise ValueError(
            f"backbone is {rules.shown(backbone)}; it must be a dict of fields of the backbone's "
            "config, as {'dilations': ...}; config takes the name of a whole model"
        )
    found = reading.read_model(path)
    file, shapes = found.file, found.shapes
    where = f"{file.path}: {files.OWN_KEY}"
    own = descriptions.read(file.own, where)
    row: catalogue.Published | None = None
    assumed: tuple[str, ...] = ()
    if isinstance(config, str):
        row = catalogue.named(config)
        config = OneFormerConfig.published(row.name)
    elif config is None and own.model is not None:
        config = descriptions.model_config(_overridden(own.model, fields), where)
    if config is None:
        config, row, assumed = _recognise(found, fields)
    if row is None:
        row = next(iter(architecture.find(config, file.path)), None)
    # The scale belongs to the criterion, which a model without the text branch may have too.
    branch = set(functional.TEXT_PARTS) - {"logit_scale"}
    text = any(name.split(".")[0] in branch for name in shapes)
    settings = own.settings or ({name: getattr(row, name) for name in SETTINGS} if row else {})
    if own.metadata is not None and own.metadata.num_classes != config.num_classes:
        raise FileError(
            f"{where}: metadata has {own.metadata.num_classes} classes, the model has "
            f"{config.num_classes}"
        )
    params, stats, left_out = _read(found, config, text)
    datasets = [
        name for name, count in catalogue.NUM_CLASSES.items() if count == config.num_classes
    ]
    return Model(
        config=config,
        params=params,
        stats=stats,
        metadata=own.metadata,
        dataset=datasets[0] if datasets else None,
        settings=dict(settings),
        format=found.form,
        text=text,
        left_out=left_out,
        published=row.config if row else None,
        assumed=assumed,
    )


def read_architecture(
    path: str | os.PathLike[str], hints: Mapping[str, Any]
) -> tuple[OneFormerConfig, bool]:
    """Reads the architecture of another program's model, but no values of its tensors.

    Args:
      path: see `read_model`.
      hints: fields of `OneFormerConfig` that hold where the file does not tell them.

    Returns:
      The architecture, and whether the text branch is in the file.

    Raises:
      FileError: see `read_model`.
    """
    found = reading.read_model(path)
    text = "text_encoder.positional_embedding" in found.shapes
    where = f"{found.file.path}: {files.OWN_KEY}"
    if (model := descriptions.read(found.file.own, where).model) is not None:
        return descriptions.model_config(model, where), text
    return _recognise(found, {}, hints).config, text


def _recognise(
    found: Reading, given: Mapping[str, Any], hints: Mapping[str, Any] | None = None
) -> architecture.Found:
    file = found.file
    noted = hugging_face.noted(file.config, file.path) if file.config else {}
    return architecture.recognise(
        found.shapes,
        path=file.path,
        given=given,
        noted={**(hints or {}), **noted},
        frozen_norm=_frozen_norm(found),
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
      FileError: the folder `path` has files in it.
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
    for name, leaf in logged(expected.items(), len(expected), "tensors"):
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


# ------------------------------------------------------------------ reading


def _frozen_norm(found: Reading) -> bool:
    """Tells whether a ResNet's norms were constants in training."""
    if found.form == "official":  # batch norm counts its batches there, a frozen one does not
        return not any(name.endswith(".num_batches_tracked") for name in found.tensors)
    # transformers always counts; the published models of two datasets were trained with batch norm.
    classes = found.shapes.get("predictor.class_embed.bias", (0,))[0] - 1
    return classes not in (catalogue.NUM_CLASSES[x] for x in ("cityscapes", "mapillary"))


def _read(found: Reading, config: OneFormerConfig, text: bool) -> tuple[dict, dict, dict[str, str]]:
    """Parameters, statistics and what is left out; one FileError about all that is wrong."""
    _, *trees = functional.abstract(config, training=text)
    expected = dict(leaves(trees))
    arrays, problems = found.arrays(expected, backbones.kind_of(config.backbone))
    left_out, surplus = {}, []
    for name in found.unplaced(expected):
        group = found.groups[name]
        if names.is_derived(name, found.form):
            left_out[name] = "computed or counted, not learned"
        elif not text and group is not None and group.ours == ("logit_scale",):
            left_out[name] = "a scale of the text branch, which is not there"
        else:
            surplus.append(name)
    if surplus:
        problems.append(f"{len(surplus)} tensors belong to no part of it: {first_few(surplus, 10)}")
    if problems:
        kind = type(config.backbone).__name__.removesuffix("Config")
        raise FileError(
            f"{found.file.path} does not hold a whole OneFormer ({kind}, {config.num_queries} "
            f"queries, {config.num_classes} classes); nothing is loaded:\n  "
            + "\n  ".join(problems)
        )

    log, done = progress_log(len(arrays), "tensors"), itertools.count(1)

    def array(path: tuple, _: Any) -> np.ndarray:
        log(next(done))
        return arrays[".".join(str(entry.key) for entry in path)]()

    params, stats = (jax.tree_util.tree_map_with_path(array, tree) for tree in trees)
    return params, stats, left_out


def leaves(trees: Iterable[Mapping]) -> Iterable[tuple[str, Any]]:
    """Gives (our name, leaf) of every array of some nested dicts."""
    for tree in trees:
        yield from names.flatten(tree)


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
