"""The one table of published models: recipes, the search for the model of a file, docs read it.

Recipes of backbones that no published OneFormer has stand in a second table.

A leaf of plain data, so that `configs/` may import it. Tensors tell widths and depths of a model,
but neither how it is applied (dilations, the size of test images, thresholds) nor how it was
trained. How it is applied stands here; how it was trained, in the recipe of the same name.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

NUM_CLASSES = {"ade20k": 150, "coco": 133, "cityscapes": 19, "mapillary": 65}

# What the published InternImage-H models of width 1024 change.
WIDE_HEAD = {
    "hidden_dim": 1024,
    "mask_dim": 1024,
    "num_heads": 32,
    "encoder_ffn": 4096,
    "query_init_ffn": 4096,
    "decoder_ffn": 4096,
    "text_width": 1024,
    "text_heads": 16,
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model, or one of `UNPUBLISHED`.

    Attributes:
      dataset: "ade20k", "coco", "cityscapes" or "mapillary".
      variant: name of its recipe, as in `configs/DATASET.py:VARIANT`.
      num_queries: of the model.
      short_edge, max_size: of test images, in pixels.
      file: name of the released file without .pth, "" if none was released.
      backbone: its published size.
      norm: of a ResNet: "batch" where its norms were trained, "" where they were constants.
      wide: whether the head is that of width 1024, `WIDE_HEAD`.
      overlap_threshold: of the panoptic output.
    """

    dataset: str
    variant: str
    num_queries: int
    short_edge: int
    max_size: int
    file: str
    backbone: str
    norm: str
    wide: bool
    overlap_threshold: float = 0.8

    @property
    def name(self) -> str:
        """The name by which users call it, "coco:swin_large"."""
        return f"{self.dataset}:{self.variant}"

    @property
    def config(self) -> str:
        """The recipe's file and variant."""
        return f"configs/{self.dataset}.py:{self.variant}"

    @property
    def object_mask_threshold(self) -> float:
        """Least score of a query in the panoptic output."""
        return 0.5 if self.dataset == "ade20k" else 0.8

    @property
    def topk(self) -> int:
        """Number of instances kept."""
        return self.num_queries

    @property
    def head(self) -> dict[str, int]:
        """Fields of the model in which it differs from the default, without the backbone."""
        return {"num_queries": self.num_queries} | (WIDE_HEAD if self.wide else {})

    @property
    def backbone_options(self) -> dict[str, Any]:
        """Fields of the backbone in which it differs from its published size."""
        return {"norm": self.norm} if self.norm else {}


def _model(
    dataset: str,
    variant: str,
    num_queries: int,
    file: str = "",
    *,
    res: int = 0,
    backbone: str = "",
    norm: str = "",
    wide: bool = False,
) -> Published:
    """Fills in what follows; `res` is another short edge, with a long one of up to four times."""
    sizes = (res, 4 * res) if res else _SIZES[dataset]
    backbone = backbone or variant.split(",")[0]
    return Published(dataset, variant, num_queries, *sizes, file, backbone, norm, wide)


# Short edge and longest side of test images.
_SIZES = {"coco": (800, 1333), "cityscapes": (1024, 2048), "mapillary": (2048, 2048)}
_ade20k, _coco, _cityscapes, _mapillary = (
    functools.partial(_model, dataset) for dataset in ("ade20k", "coco", "cityscapes", "mapillary")
)

MODELS = (
    _ade20k("resnet50", 150, res=512),
    _ade20k("swin_tiny", 150, res=512),
    _ade20k("swin_large,res=640", 250, "250_16_swin_l_oneformer_ade20k_160k", res=640),
    _ade20k("swin_large,res=896", 250, "896x896_250_16_swin_l_oneformer_ade20k_160k", res=896),
    _ade20k("swin_large,res=1280", 250, "1280x1280_250_16_swin_l_oneformer_ade20k_160k", res=1280),
    _ade20k("convnext_large", 250, "250_16_convnext_l_oneformer_ade20k_160k", res=640),
    _ade20k("convnext_xlarge", 250, "250_16_convnext_xl_oneformer_ade20k_160k", res=640),
    _ade20k("dinat_large,res=640", 250, "250_16_dinat_l_oneformer_ade20k_160k", res=640),
    _ade20k("dinat_large,res=896", 250, "896x896_250_16_dinat_l_oneformer_ade20k_160k", res=896),
    _ade20k(
        "dinat_large,res=1280",
        250,
        "1280x1280_250_16_dinat_l_oneformer_ade20k_160k",
        res=1280,
        backbone="dinat_large_wide",
    ),
    _ade20k(
        "dinat_large,res=1280,pretrain=coco",
        150,
        "coco_pretrain_1280x1280_150_16_dinat_l_oneformer_ade20k_160k",
        res=1280,
        backbone="dinat_large_wide",
    ),
    _ade20k(
        "internimage_huge", 250, "896x896_250_16_intern_image_h_oneformer_ade20k_160k", res=896
    ),
    _ade20k(
        "internimage_huge,head=1024,pretrain=coco",
        250,
        "coco_pretrain_896x896_250_16_intern_image_h_oneformer_ade20k_160k",
        res=896,
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
    _cityscapes("internimage_huge,head=1024,pretrain=mapillary", 250, res=896, wide=True),
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

# Vision transformers at the published sizes of images.
UNPUBLISHED = (
    _ade20k("dinov2_base", 150, res=512),
    _ade20k("dinov3_base", 150, res=512),
    _ade20k("dinov3_large", 250, res=640),
    _coco("dinov3_base", 150),
    _coco("dinov3_large", 150),
    _cityscapes("dinov3_large", 250),
)


def of(dataset: str) -> dict[str, Published]:
    """Returns the published models of a dataset by variant."""
    return {model.variant: model for model in MODELS if model.dataset == dataset}


def recipes(dataset: str) -> dict[str, Published]:
    """Returns every recipe of a dataset by variant: the published models first."""
    others = {model.variant: model for model in UNPUBLISHED if model.dataset == dataset}
    return of(dataset) | others


def named(name: str) -> Published:
    """Returns the published model of a name like "coco:swin_large" or "configs/coco.py:swin_large".

    Raises:
      ValueError: there is none; the message lists them.
    """
    for model in MODELS:
        if name in (model.name, model.config):
            return model
    known = " | ".join(model.name for model in MODELS)
    raise ValueError(f"there is no published model {name!r}; there are {known}")
