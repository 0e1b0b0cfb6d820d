"""The published models: one row per official config, found by the shapes of its tensors.

The tensors of a checkpoint give widths and depths, but neither how the model is applied (dilations,
the size of test images, thresholds) nor how it was trained. `find` gives the published models that
have the same tensors, from which the rest can be taken. The same values stand in the recipes
(`configs/`); a test holds the two together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from oneformer_jax.models import backbones
from oneformer_jax.models.oneformer import NUM_CLASSES, WIDE_HEAD, OneFormerConfig


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
      dataset: "ade20k", "coco", "cityscapes" or "mapillary".
      variant: name of its recipe, as in `configs/DATASET.py:VARIANT`.
      model: the architecture.
      short_edge, max_size: of test images, in pixels.
      object_mask_threshold, overlap_threshold: of the panoptic output.
      topk: number of instances kept.
      file: name of the released file without .pth, "" if none was released.
    """

    dataset: str
    variant: str
    model: OneFormerConfig
    short_edge: int
    max_size: int
    object_mask_threshold: float
    overlap_threshold: float
    topk: int
    file: str

    @property
    def config(self) -> str:
        """The recipe, as the program takes it."""
        return f"configs/{self.dataset}.py:{self.variant}"


def _published(
    dataset: str,
    variant: str,
    num_queries: int,
    short_edge: int,
    max_size: int,
    file: str = "",
    *,
    backbone: str | None = None,
    norm: str | None = None,
    wide: bool = False,
) -> Published:
    head = WIDE_HEAD if wide else {}
    options = {"norm": norm} if norm else {}
    config = backbones.backbone_config(backbone or variant.split(",")[0], **options)
    return Published(
        dataset=dataset,
        variant=variant,
        model=OneFormerConfig(
            NUM_CLASSES[dataset], config, **({"num_queries": num_queries} | head)
        ),
        short_edge=short_edge,
        max_size=max_size,
        object_mask_threshold=0.5 if dataset == "ade20k" else 0.8,
        overlap_threshold=0.8,
        topk=num_queries,
        file=file,
    )


def _ade20k(variant: str, num_queries: int, res: int, file: str = "", **fields) -> Published:
    return _published("ade20k", variant, num_queries, res, 4 * res, file, **fields)


def _coco(variant: str, num_queries: int, file: str = "", **fields) -> Published:
    return _published("coco", variant, num_queries, 800, 1333, file, **fields)


def _cityscapes(variant: str, num_queries: int, file: str = "", **fields) -> Published:
    return _published("cityscapes", variant, num_queries, 1024, 2048, file, **fields)


def _mapillary(variant: str, num_queries: int, file: str = "", **fields) -> Published:
    return _published("mapillary", variant, num_queries, 2048, 2048, file, **fields)


MODELS = (
    _ade20k("resnet50", 150, 512),
    _ade20k("swin_tiny", 150, 512),
    _ade20k("swin_large,res=640", 250, 640, "250_16_swin_l_oneformer_ade20k_160k"),
    _ade20k("swin_large,res=896", 250, 896, "896x896_250_16_swin_l_oneformer_ade20k_160k"),
    _ade20k("swin_large,res=1280", 250, 1280, "1280x1280_250_16_swin_l_oneformer_ade20k_160k"),
    _ade20k("convnext_large", 250, 640, "250_16_convnext_l_oneformer_ade20k_160k"),
    _ade20k("convnext_xlarge", 250, 640, "250_16_convnext_xl_oneformer_ade20k_160k"),
    _ade20k("dinat_large,res=640", 250, 640, "250_16_dinat_l_oneformer_ade20k_160k"),
    _ade20k("dinat_large,res=896", 250, 896, "896x896_250_16_dinat_l_oneformer_ade20k_160k"),
    _ade20k(
        "dinat_large,res=1280",
        250,
        1280,
        "1280x1280_250_16_dinat_l_oneformer_ade20k_160k",
        backbone="dinat_large_wide",
    ),
    _ade20k(
        "dinat_large,res=1280,pretrain=coco",
        150,
        1280,
        "coco_pretrain_1280x1280_150_16_dinat_l_oneformer_ade20k_160k",
        backbone="dinat_large_wide",
    ),
    _ade20k("internimage_huge", 250, 896, "896x896_250_16_intern_image_h_oneformer_ade20k_160k"),
    _ade20k(
        "internimage_huge,head=1024,pretrain=coco",
        250,
        896,
        "coco_pretrain_896x896_250_16_intern_image_h_oneformer_ade20k_160k",
        wide=True,
    ),
    _coco("resnet50", 150),
    _coco("swin_tiny", 150),
    _coco("swin_large", 150, "150_16_swin_l_oneformer_coco_100ep"),
    _coco("dinat_large", 150, "150_16_dinat_l_oneformer_coco_100ep"),
    _coco(
        "internimage_huge,head=1024",
        250,
        "250_16_intern_image_h_oneformer_coco_100ep_1024",
        wide=True,
    ),
    _cityscapes("resnet50", 150, norm="batch"),
    _cityscapes("swin_large", 250, "250_16_swin_l_oneformer_cityscapes_90k"),
    _cityscapes("convnext_large", 250, "250_16_convnext_l_oneformer_cityscapes_90k"),
    _cityscapes(
        "convnext_large,pretrain=mapillary",
        250,
        "mapillary_pretrain_250_16_convnext_l_oneformer_cityscapes_90k",
    ),
    _cityscapes("convnext_xlarge", 250, "250_16_convnext_xl_oneformer_cityscapes_90k"),
    _cityscapes(
        "convnext_xlarge,pretrain=mapillary",
        250,
        "mapillary_pretrain_250_16_convnext_xl_oneformer_cityscapes_90k",
    ),
    _cityscapes(
        "dinat_large",
        250,
        "250_16_dinat_l_oneformer_cityscapes_90k",
        backbone="dinat_large_7x7",
    ),
    _cityscapes("internimage_huge", 250, "250_16_intern_image_h_oneformer_cityscapes_90k"),
    _published(
        "cityscapes", "internimage_huge,head=1024,pretrain=mapillary", 250, 896, 3584, wide=True
    ),
    _mapillary("resnet50", 150, norm="batch"),
    _mapillary("swin_large", 250, "250_16_swin_l_oneformer_mapillary_300k"),
    _mapillary("convnext_large", 250, "250_16_convnext_l_oneformer_mapillary_300k"),
    _mapillary(
        "convnext_large,for=cityscapes",
        250,
        "mapillary_pretrain_250_16_convnext_l_oneformer_mapillary_300k",
    ),
    _mapillary(
        "convnext_xlarge,for=cityscapes",
        250,
        "mapillary_pretrain_250_16_convnext_xl_oneformer_mapillary_300k",
    ),
    _mapillary("dinat_large", 250, "250_16_dinat_l_oneformer_mapillary_300k"),
    _mapillary(
        "internimage_huge,head=1024",
        250,
        "250_16_intern_image_h_oneformer_mapillary_300k_1024",
        wide=True,
    ),
)

# What does not show in the tensors, or (the text branch) may be missing from them.
_NOT_IN_TENSORS = {
    "query_loss",
    *("num_context", "text_width", "text_layers", "text_heads", "text_causal"),
    *("encoder_dropout", "query_init_dropout"),
    *("norm", "drop_path_rate", "layer_scale_init", "dilations"),
}


def _shapes(config: OneFormerConfig) -> dict[str, Any]:
    """The fields of an architecture that its tensors show."""
    fields = config.to_dict()
    fields |= {f"backbone.{name}": value for name, value in fields.pop("backbone").items()}
    return {
        name: value
        for name, value in fields.items()
        if name.removeprefix("backbone.") not in _NOT_IN_TENSORS
    }


def find(config: OneFormerConfig, file: str = "") -> tuple[Published, ...]:
    """The published models that have the tensors of an architecture, in the order of `MODELS`.

    Args:
      config: an architecture. Compared are the fields that tensors show: neither dropout, drop
        path, dilations, the kind of the ResNet's norm, nor the text branch.
      file: name of the file, with or without folder and ending. If it is that of one of the
        models found, only this one is given.
    """
    wanted = _shapes(config)
    found = tuple(model for model in MODELS if _shapes(model.model) == wanted)
    name = file.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".pth")
    return tuple(model for model in found if name and model.file == name) or found
