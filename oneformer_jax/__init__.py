"""OneFormer in JAX: one model for panoptic, instance and semantic segmentation.

    import oneformer_jax
    segmenter = oneformer_jax.load("runs/synthetic")  # or a .pth, a folder or a name of the HF hub
    segmentation = segmenter(image, task="panoptic")  # image: uint8 [H, W, 3], RGB
    segmentation.overlay()
    segmenter(image, task="all")  # {"panoptic": ..., "instance": ..., "semantic": ...}

The names load when they are first used, so that importing the package does not start JAX.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from oneformer_jax.eval.predict import Segmenter
    from oneformer_jax.eval.segmentation import Segmentation
    from oneformer_jax.export.stablehlo import ExportedSegmenter
    from oneformer_jax.models.execution import Execution
    from oneformer_jax.models.oneformer import OneFormer, OneFormerConfig
    from oneformer_jax.types import TASKS, Metadata
    from oneformer_jax.weights.convert import Model

__version__ = "0.2.0"

__all__ = [
    "TASKS",
    "Execution",
    "Metadata",
    "OneFormer",
    "OneFormerConfig",
    "Segmentation",
    "Segmenter",
    "classes_of",
    "load",
]


def load(
    path: str | os.PathLike[str],
    config: OneFormerConfig | str | None = None,
    *,
    metadata: Metadata | str | None = None,
    checkpoint: str | int = "auto",
    execution: Execution | None = None,
    mesh: Mesh | None = None,
    **overrides: Any,
) -> Segmenter | ExportedSegmenter:
    """Loads a `Segmenter` from a trained workdir, an official checkpoint or a Hugging Face model.

    Of an exported `.stablehlo` file it makes an `ExportedSegmenter`, which is called alike.

    Of other programs' files, the architecture is recognised from the tensors, the classes from
    their number, and thresholds, test size and dilations from the published model that has the same
    tensors (see docs/weights.md). Compiled programs are kept on disk, where JAX has been told or in
    the user's folder of caches, so that the next process starts fast.

    Args:
      path: a workdir or a folder `workdir/checkpoints/<step>`; an official `.pth`; a folder of
        `transformers` (config.json, model.safetensors), or its name on the hub; an address of a
        file (https, gs, s3): see `weights.fetch.local_path`.
      config: not for workdirs: the architecture, or the name of a published model such as
        "ade20k:dinat_large,res=1280", where the tensors alone do not tell.
      metadata: not for workdirs: the classes, or the name of a dataset.
      checkpoint: of a workdir: a step, "latest", "best" (by the run's `eval.best_metric`), or
        "auto": the best if there are scores, else the latest.
      execution: how the model is run. None is `Execution()`, but a workdir's model is run in the
        dtype of its training.
      mesh: devices to run on, see `Segmenter`.
      **overrides: `short_edge`, `max_size`, `tta` (a dict, see `TtaConfig.from_settings`),
        `bucket_multiple`, `max_buckets`, `batch_size` and fields of `PostprocessConfig` (such as
        `object_mask_threshold`) that replace the run's or the published ones; `dtype`,
        `scan_layers` and `kernels` (a dict, as `{"deform_attn": "xla"}`) that replace those of
        `execution`; not for workdirs, fields of `OneFormerConfig` that tensors do not show (such as
        `num_heads`, or `backbone={"dilations": ...}`).

    Raises:
      ValueError: no trained model at `path`, a damaged one or one that does not fit, an unknown
        override, or something that has to be given.
    """
    import dataclasses

    from oneformer_jax import compilation
    from oneformer_jax.eval.predict import Segmenter
    from oneformer_jax.models import functional
    from oneformer_jax.models.execution import Execution
    from oneformer_jax.models.oneformer import OneFormerConfig
    from oneformer_jax.train.checkpoint import load_for_inference
    from oneformer_jax.weights import convert, fetch, files

    compilation.keep_programs()
    path = fetch.local_path(path)
    if os.path.splitext(path)[1] in (".stablehlo", ".onnx"):
        from oneformer_jax.export import stablehlo

        step = None if checkpoint == "auto" else checkpoint
        options = dict(
            config=config, metadata=metadata, checkpoint=step, execution=execution, mesh=mesh
        )
        given = [name for name, value in (options | overrides).items() if value is not None]
        if given:
            raise ValueError(
                f"{path} is an exported model, which is as it is; leave out {given[0]}"
            )
        return stablehlo.load(path)
    if not files.is_foreign(path):
        if config is not None or metadata is not None:
            given = "config" if config is not None else "metadata"
            raise ValueError(f"{path} is a workdir, which holds its own {given}; leave it out")
        trained = load_for_inference(path, checkpoint=checkpoint)
        dtype = trained.settings["model"].get("dtype", Execution.dtype)
        return Segmenter.from_settings(
            OneFormerConfig.from_dict(trained.model),
            trained.params,
            trained.stats,
            trained.metadata,
            trained.settings["eval"],
            execution=execution or Execution(dtype=dtype),
            mesh=mesh,
            **overrides,
        )
    if checkpoint != "auto":
        raise ValueError(
            f"{path} is no workdir, so it has no checkpoint {checkpoint}; leave it out"
        )
    fields = {f.name for f in dataclasses.fields(OneFormerConfig)}
    architecture = {name: value for name, value in overrides.items() if name in fields}
    overrides = {name: value for name, value in overrides.items() if name not in fields}
    found = convert.read_model(path, config=config, **architecture)
    return Segmenter.from_settings(
        found.config,
        functional.inference_params(found.params),
        found.stats,
        classes_of(found, path, metadata),
        found.settings,
        execution=execution or Execution(),
        mesh=mesh,
        **overrides,
    )


def classes_of(
    model: Model, path: str | os.PathLike[str], given: Metadata | str | None = None
) -> Metadata:
    """Finds the classes of another program's model: given, in the file, or by their number.

    Args:
      model: from `weights.convert.read_model`.
      path: of the file, for the message.
      given: the classes, or the name of a dataset.

    Raises:
      ValueError: an unknown dataset, or a number of classes that no known dataset has.
    """
    import dataclasses

    from oneformer_jax.input_pipeline import datasets
    from oneformer_jax.types import Metadata

    if isinstance(given, Metadata):
        return given
    if given is None and model.metadata is not None:
        return model.metadata
    name = given or model.dataset
    if name is None:
        raise ValueError(
            f"{path} has {model.config.num_classes} classes, which no known dataset has; give "
            "metadata (names, colours, things), a Metadata or the name of a dataset"
        )
    return Metadata(**dataclasses.asdict(datasets.dataset_info(name)))


def __getattr__(name: str) -> Any:
    if name in ("OneFormer", "OneFormerConfig"):
        from oneformer_jax.models import oneformer as module
    elif name == "Execution":
        from oneformer_jax.models import execution as module
    elif name == "Segmentation":
        from oneformer_jax.eval import segmentation as module
    elif name == "Segmenter":
        from oneformer_jax.eval import predict as module
    elif name in ("TASKS", "Metadata"):
        from oneformer_jax import types as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
