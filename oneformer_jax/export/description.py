"""Describes an exported file to its readers, and checks the description when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import msgspec
from msgspec import Meta

from oneformer_jax.eval.postprocess import PostprocessConfig
from oneformer_jax.files import FileError, parse_json
from oneformer_jax.models.oneformer import PIXEL_MEAN, PIXEL_STD
from oneformer_jax.rules import Integer, require
from oneformer_jax.types import Metadata, task_id

FORMAT = "oneformer_jax.export"
VERSION = 1
UNKNOWN_LICENSE = "not stated; ask those who made the weights"

# Pixels of a side: published test sizes end at 2048.
SIDE = Integer(32, 8192)
_Side = Annotated[int, Meta(ge=SIDE.low, le=SIDE.high)]
_Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
_Text = Annotated[str, Meta(max_length=10_000)]


class Description(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The description of an exported program.

    Attributes:
      format, version: of this description.
      task: one of `types.TASKS`, which is part of the program.
      size: height and width of the images.
      postprocess: whether the program gives maps, else logits.
      num_queries: Q.
      metadata: the classes.
      thresholds: of the post-processing.
      mean, std: RGB statistics on 0..255 values, which the program normalises with.
      license: of the weights.
      made_by: versions.
      digests: SHA-256 of each part of the file, where the format has parts.
    """

    format: str = FORMAT
    version: int = VERSION
    task: Literal["panoptic", "instance", "semantic"]
    size: tuple[_Side, _Side]
    postprocess: bool
    num_queries: Annotated[int, Meta(ge=1, le=10_000)]
    metadata: Metadata
    thresholds: PostprocessConfig
    mean: tuple[_Number, _Number, _Number] = PIXEL_MEAN
    std: tuple[_Number, _Number, _Number] = PIXEL_STD
    license: _Text = UNKNOWN_LICENSE
    made_by: _Text = ""
    digests: dict[str, str] = msgspec.field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        """Returns each field as JSON."""
        return {name: json.dumps(value) for name, value in msgspec.to_builtins(self).items()}


def describe(
    *,
    task: str,
    size: tuple[int, int],
    postprocess: bool,
    num_queries: int,
    metadata: Metadata,
    thresholds: PostprocessConfig,
    license: str,
    made_by: str,
) -> Description:
    """Returns the description of a new file.

    Raises:
      ValueError: an unknown task, an impossible size, or a setting that the program cannot do.
    """
    task_id(task)
    if postprocess and thresholds.instance_max_iou < 1:
        raise ValueError(
            "eval.instance_max_iou is not 1, and an exported program keeps duplicates: export "
            "without --postprocess, or set it to 1"
        )
    require(
        "size ", dict(zip(("height", "width"), size, strict=True)), dict(height=SIDE, width=SIDE)
    )
    return Description(
        task=task,  # type: ignore[arg-type]
        size=size,
        postprocess=postprocess,
        num_queries=num_queries,
        metadata=metadata,
        thresholds=thresholds,
        license=license or UNKNOWN_LICENSE,
        made_by=f"{made_by}, jax {jax.__version__}",
    )


def read(texts: Mapping[str, str] | None, where: str) -> Description:
    """Reads what `Description.texts` gave; `where` names the file in errors.

    Raises:
      FileError: it is missing, of a newer version, or holds a wrong value.
    """
    fields = {}
    for name, text in (texts or {}).items():
        fields[name] = parse_json(text, Any, f"{where}: {name[:100]!r}")  # type: ignore[arg-type]
    if fields.get("format") != FORMAT:
        raise FileError(f"{where} is no exported model of this program (it has no format {FORMAT})")
    if fields.get("version") != VERSION:
        raise FileError(
            f"{where} has the version {str(fields.get('version'))[:20]!r} of the format; this "
            f"program reads version {VERSION}: export the model again"
        )
    try:
        found = msgspec.convert(fields, Description)
    except msgspec.ValidationError as error:
        raise FileError(f"{where} holds an unexpected value: {str(error)[:300]}") from None
    if found.metadata.num_classes > 65_535:
        raise FileError(
            f"{where}: metadata has {found.metadata.num_classes:,} classes, over 65,535"
        )
    return found
