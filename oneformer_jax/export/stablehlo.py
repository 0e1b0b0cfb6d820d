"""StableHLO: a program and its weights in one file, which `load` runs like a `Segmenter`.

The file is a safetensors file: the weights by name, the programs (what `jax.export` serialises) as
bytes, and the description as metadata. There are two programs, since a processor and an accelerator
run their best with different forms of the same sums. The weights are arguments of both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from jax import export

from oneformer_jax import compilation
from oneformer_jax.eval.inputs import as_image
from oneformer_jax.eval.postprocess import segment_batch
from oneformer_jax.eval.predict import Segmenter, tasks_of
from oneformer_jax.eval.prediction import ranked, with_threshold
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.export import description as descriptions
from oneformer_jax.export.description import Description
from oneformer_jax.export.program import (
    Arrays,
    make_program,
    named_weights,
    output_shapes,
    padded_size,
    segmentation_of,
)
from oneformer_jax.files import FileError, first_few, replacing
from oneformer_jax.input_pipeline.resize import resize_to_fit
from oneformer_jax.kernels.dispatch import tracing_for
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.weights import files

ENDING = ".stablehlo"
# Name of a program in the file: (platform that it is traced for, platforms that it runs on).
PROGRAMS = {"program.cpu": ("cpu", ("cpu",)), "program.accelerator": ("tpu", ("cuda", "tpu"))}
WEIGHT = "weights."  # begins the name of each weight in the file
# What a program may ask of the runtime beside StableHLO itself: a check of the batch's size.
CALLS = {"shape_assertion"}
MAX_PROGRAM = 512 << 20  # bytes; those of the largest published models have some megabytes


def write(path: str | os.PathLike[str], segmenter: Segmenter, description: Description) -> None:
    """Writes a model with its weights, for any number of images at a time.

    It computes in the dtype of the segmenter.

    Args:
      path: ends with `ENDING`.
      segmenter: the model.
      description: of `description.describe`.

    Raises:
      ValueError: another ending.
    """
    if pathlib.Path(path).suffix != ENDING:
        raise ValueError(
            f"{path} must end with {ENDING}, by which it is recognised when it is read"
        )
    _require_flatbuffers(path)
    weights = named_weights(segmenter)
    tensors = {WEIGHT + name: value for name, value in weights.items()}
    for name, (traced, platforms) in PROGRAMS.items():
        exported = _export(segmenter, weights, description, traced, platforms)
        tensors[name] = np.frombuffer(exported.serialize(), np.uint8)
    digests = {name: _digest(value) for name, value in tensors.items()}
    texts = msgspec.structs.replace(description, digests=digests).texts()
    pathlib.Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata=texts)


def _require_flatbuffers(path: str | os.PathLike[str]) -> None:
    """Raises a FileError without the package by which JAX writes and reads programs."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise FileError(f'{path} needs flatbuffers: pip install "oneformer-jax[export]"')


def _export(
    segmenter: Segmenter,
    weights: Mapping[str, np.ndarray],
    description: Description,
    traced: str,
    platforms: Sequence[str],
) -> export.Exported:
    execution = Execution(
        dtype=segmenter.execution.dtype,
        scan_layers=traced != "cpu",
        kernels=Kernels(deform_attn="xla", neighborhood="xla"),
    )
    program = make_program(segmenter.config, execution, description)

    def one_by_one(weights: Any, image: jax.Array, image_size: jax.Array) -> Arrays:
        """Runs image after image, which costs a processor nothing."""
        found = jax.lax.map(lambda x: program(weights, x[0][None], x[1][None]), (image, image_size))
        return jax.tree.map(lambda x: x[:, 0], found)

    (batch,) = export.symbolic_shape("batch")
    call = jax.jit(one_by_one if traced == "cpu" else program)
    with tracing_for(traced):
        return export.export(call, platforms=platforms)(*_arguments(weights, description, batch))


def _arguments(weights: Mapping[str, Any], description: Description, batch: Any) -> tuple:
    """Shapes and dtypes of a program's arguments."""
    shape = jax.ShapeDtypeStruct
    return (
        {name: shape(value.shape, value.dtype) for name, value in weights.items()},
        shape((batch, *description.size, 3), np.uint8),
        shape((batch, 2), np.int32),
    )


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


class ExportedSegmenter:
    """A model of a StableHLO file, with the call of a `Segmenter`.

    An image of another size is resized, keeping its aspect, until it fits into the exported size,
    by the filter of the test; zeros fill up the rest, as in every batch. The result has the image's
    own size. A file with post-processing takes only images that fit without resizing.
    """

    def __init__(
        self,
        description: Description,
        weights: Mapping[str, np.ndarray],
        program: export.Exported,
        path: str,
    ):
        """Copies the weights to the default device."""
        self.description = description
        self.metadata = description.metadata
        self._weights = jax.device_put(dict(weights))
        self._program = compilation.Program(
            jax.jit(program.call), f"the program of {path}", looks_at=slice(1, 2)
        )
        self._path = path

    def __call__(
        self,
        image: Any,
        task: str | Sequence[str] | None = None,
        *,
        threshold: float | None = None,
    ) -> Segmentation | dict[str, Segmentation] | list[Any]:
        """Segments one image, or a list of images.

        Args:
          image: see `Segmenter.__call__`.
          task: that of the file; None is the same.
          threshold: see `Segmenter.__call__`; not of a file that gives maps.

        Returns:
          As `Segmenter` does.

        Raises:
          ValueError: another task, another kind of image, or a size that needs resizing, or a
            threshold, although the file gives maps.
        """
        if isinstance(image, (list, tuple)):
            return [self(one, task, threshold=threshold) for one in image]
        about = self.description
        task = about.task if task is None else task
        if tasks_of(task) != (about.task,):
            raise ValueError(
                f"{self._path} is exported for the task {about.task!r}, not for {task!r}; export "
                "the model for each task"
            )
        if threshold is not None and (about.postprocess or about.task == "semantic"):
            raise ValueError(
                f"threshold: {self._path} gives "
                + ("final maps" if about.postprocess else "a class for each pixel, without scores")
            )
        thresholds = with_threshold(about.thresholds, threshold)
        image = as_image(image)
        view = resize_to_fit(image, about.size)
        if about.postprocess and view is not image:
            raise ValueError(
                f"image has {image.shape[0]} x {image.shape[1]} pixels, the maps of {self._path} "
                f"{about.size[0]} x {about.size[1]}: resize it to {view.shape[0]} x "
                f"{view.shape[1]}, or export without --postprocess"
            )
        padded = np.zeros((1, *about.size, 3), np.uint8)
        padded[0, : view.shape[0], : view.shape[1]] = view
        view_size = np.array([view.shape[:2]], np.int32)
        found = self.run(padded, view_size)
        if about.postprocess:
            result = segmentation_of({k: v[0] for k, v in found.items()}, image, about)
        else:
            (result,) = segment_batch(
                found["class_logits"],
                found["mask_logits"],
                view_size,
                np.array([image.shape[:2]]),
                padded_size(about.size),
                task=about.task,
                config=thresholds,
                metadata=self.metadata,
                images=[image],
            )
        result = ranked(result, threshold)
        return result if isinstance(task, str) else {about.task: result}

    def run(self, image: np.ndarray, image_size: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the program on uint8 [B, H, W, 3] of the exported size and int32 [B, 2].

        Returns:
          The outputs by name, see `program.output_shapes`.

        Raises:
          ValueError: other shapes; or the runtime refuses the program.
        """
        height, width = self.description.size
        if image.shape[1:] != (height, width, 3) or image_size.shape != (len(image), 2):
            raise ValueError(
                f"images have shape {list(image.shape)} and sizes {list(image_size.shape)}; "
                f"expected [B, {height}, {width}, 3] and [B, 2]"
            )
        try:
            return jax.device_get(
                self._program(
                    self._weights, np.asarray(image, np.uint8), np.asarray(image_size, np.int32)
                )
            )
        except Exception as error:  # whatever a stranger's program makes the runtime raise
            raise FileError(f"{self._path}: its program does not run: {_short(error)}") from error


def load(path: str | os.PathLike[str]) -> ExportedSegmenter:
    """Reads a file of `write`.

    Its parts are compared with their sums, and the program's arguments and results with the
    description. What the program computes is not checked: it is code, and needs the same trust.

    Raises:
      FileError: it is missing, damaged, of another version or for another platform, or its parts do
        not belong together.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix != ENDING:
        raise FileError(
            f"{path} is no {ENDING} file; onnxruntime runs .onnx files (docs/export.md)"
        )
    tensors = files.open_safetensors(path)
    try:
        texts = safetensors.safe_open(path, "numpy").metadata()
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise FileError(f"{path} is damaged ({_short(error)})") from error
    about = descriptions.read(texts, str(path))
    names = {*PROGRAMS, *(name for name in tensors if name.startswith(WEIGHT))}
    if set(tensors) != names or set(about.digests) != names:
        odd = sorted((set(tensors) ^ names) | (set(about.digests) ^ names))
        raise FileError(f"{path} lacks, or has too many of these parts: {first_few(odd)}")
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    chosen = next((name for name, (_, runs) in PROGRAMS.items() if platform in runs), None)
    if chosen is None:
        raise FileError(f"{path} has programs for cpu, cuda and tpu, and this is {platform}")
    arrays = {}
    for name in names - set(PROGRAMS) | {chosen}:
        arrays[name] = tensors[name].read()
        if _digest(arrays[name]) != about.digests[name]:
            raise FileError(
                f"{path} is damaged: {name[:100]!r} does not have its sum; fetch it again"
            )
    data = arrays.pop(chosen)
    weights = {name.removeprefix(WEIGHT): value for name, value in arrays.items()}
    return ExportedSegmenter(about, weights, _program(data, weights, about, path), str(path))


def _program(
    data: np.ndarray, weights: Mapping[str, np.ndarray], about: Description, path: pathlib.Path
) -> export.Exported:
    """Reads a program; FileError unless its arguments and results are those of the description."""
    _require_flatbuffers(path)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size > MAX_PROGRAM:
        raise FileError(f"{path}: its program is no text of bytes, or has over {MAX_PROGRAM:,}")
    try:
        found = export.deserialize(bytearray(data.tobytes()))
        text = found.mlir_module()
        results = jax.tree.unflatten(found.out_tree, found.out_avals)
        arguments = jax.tree.unflatten(found.in_tree, found.in_avals)
        given = {name: (tuple(x.shape[1:]), str(np.dtype(x.dtype))) for name, x in results.items()}
    except Exception as error:  # the reader checks little, and raises what it comes upon
        raise FileError(f"{path}: its program cannot be read: {_short(error)}") from error
    (batch,) = export.symbolic_shape("batch")
    expected = ((*_arguments(weights, about, batch),), {})
    same = jax.tree.structure(arguments) == jax.tree.structure(expected) and all(
        (_fixed(a.shape), a.dtype) == (_fixed(b.shape), b.dtype)
        for a, b in zip(jax.tree.leaves(arguments), jax.tree.leaves(expected), strict=True)
    )
    if not same or given != output_shapes(about):
        raise FileError(f"{path}: its program has other arguments or results than it describes")
    calls = re.findall(r"custom_call(?: @(\w+)\()?", text)
    if unknown := sorted(set(calls) - CALLS):
        names = first_few(name or "one without a name" for name in unknown)
        raise FileError(f"{path}: its program calls what no export of this program does: {names}")
    return found


def _fixed(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in shape)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
