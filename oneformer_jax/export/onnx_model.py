"""ONNX by jax2onnx, for one image at a time, with the description in its metadata."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.eval.predict import Segmenter
from oneformer_jax.export.description import Description
from oneformer_jax.export.inline import inlined
from oneformer_jax.export.program import make_program, named_weights, output_shapes
from oneformer_jax.files import replacing
from oneformer_jax.kernels.dispatch import tracing_for
from oneformer_jax.models.execution import Execution, Kernels

ENDING = ".onnx"
INPUTS = ("image", "image_size")
MOST = (1 << 31) - 1  # bytes of a protocol buffer


def write(path: str | os.PathLike[str], segmenter: Segmenter, description: Description) -> None:
    """Writes a model, in float32, for a batch of one image.

    Args:
      path: ends with `ENDING`.
      segmenter: the model.
      description: of `description.describe`.

    Raises:
      ValueError: another ending, a missing package, or a model that ONNX or the converter can't
        hold.
    """
    if pathlib.Path(path).suffix != ENDING:
        raise ValueError(f"{path} must end with {ENDING}")
    weights = named_weights(segmenter)
    _require_room(sum(value.nbytes for value in weights.values()))
    try:
        import jax2onnx
    except ImportError as error:
        raise ValueError(
            f"the export to ONNX needs jax2onnx ({error}): pip install 'oneformer-jax[export]'"
        ) from error

    execution = Execution(scan_layers=False, kernels=Kernels(deform_attn="xla", neighborhood="xla"))
    program = make_program(segmenter.config, execution, description)
    outputs = list(output_shapes(description))
    shapes = [
        jax.ShapeDtypeStruct((1, *description.size, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
    ]

    shapes += [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in weights.values()]

    def call(image: jax.Array, image_size: jax.Array, *values: jax.Array) -> tuple[jax.Array, ...]:
        found = program(dict(zip(weights, values, strict=True)), image, image_size)
        return tuple(found[name] for name in outputs)

    with tracing_for("cpu"):
        plain = inlined(call, *shapes)
    try:
        with _quiet():
            model: Any = jax2onnx.to_onnx(
                lambda *inputs: tuple(plain(*inputs)),
                shapes,
                model_name="oneformer",
                input_names=[*INPUTS, *weights],
                output_names=outputs,
            )
    except NotImplementedError as error:
        raise ValueError(
            f"the converter to ONNX cannot do a part of this model: {error}; "
            "export with --format=stablehlo"
        ) from error
    _hold(model, weights)
    _forget_shapes(model.graph)
    for name, text in description.texts().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, text
    _require_room(model.ByteSize())
    pathlib.Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _require_room(size: int) -> None:
    if size > MOST:
        raise ValueError(
            f"an ONNX file holds less than 2 GiB, and this one has {size / 2**30:.1f}: export "
            "with --format=stablehlo, or for a smaller --size"
        )


def _hold(model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Turns the inputs that are weights into values of the model.

    As constants of the traced function they would be computed with while it is converted: a bias
    for each window of a map is many times the bias.
    """
    from onnx import numpy_helper

    inputs = model.graph.input
    for value in [one for one in inputs if one.name in weights]:
        inputs.remove(value)
        model.graph.initializer.append(numpy_helper.from_array(weights[value.name], value.name))


def _forget_shapes(graph: Any) -> None:
    """Removes the shapes of intermediate values, which the runtime finds by itself.

    The converter states those of some broadcasts wrongly, and a runtime that reuses buffers by them
    fails, or computes with other values.
    """
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_shapes(attribute.g)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the converter about other plugins and unknown shapes."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
