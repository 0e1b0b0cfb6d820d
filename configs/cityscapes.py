"""Cityscapes panoptic: 19 classes (8 things), crops of 512 x 1024, whole images at test time.

  python main.py --config=configs/cityscapes.py:convnext_large --workdir=runs/cityscapes \
      --config.dataset.data_dir=DIR --config.init.backbone=FILE

With pretrain=mapillary it is --config.init.checkpoint=FILE, a model of configs/mapillary.py.
Published on the validation set; mIoU at a single scale and with flips and six scales ("ms"). Not
run here: no number of ours stands beside them yet.

  variant                              PQ    AP    mIoU  ms    trained on     FILE
  resnet50                             -     -     -     -     8 x A6000      torchvision ResNet-50
  swin_large                           67.2  45.6  83.0  84.4  8 x A6000      1
  convnext_large                       68.5  46.5  83.0  84.0  8 x A6000      2
  convnext_large,pretrain=mapillary    70.1  48.7  84.6  85.2  8 x A6000      3
  convnext_xlarge                      68.4  46.7  83.6  84.6  8 x A100 80GB  4
  convnext_xlarge,pretrain=mapillary   69.7  48.9  84.5  85.8  8 x A100 80GB  5
  dinat_large                          67.6  45.6  83.1  84.0  8 x A6000      6
  internimage_huge                     70.6  50.6  85.1  85.7  not known      7
  internimage_huge,head=1024,pretrain=mapillary
                                       -     -     -     -     not known      8

  1  swin_large_patch4_window12_384_22kto1k
  2  convnext_large_22k_1k_384
  3  model of configs/mapillary.py:convnext_large,for=cityscapes
  4  convnext_xlarge_22k_1k_384_ema
  5  model of configs/mapillary.py:convnext_xlarge,for=cityscapes
  6  dinat_large_in22k_224 (neighbourhoods of 7 x 7)
  7  internimage_h_jointto22k_384
  8  model of configs/mapillary.py:internimage_huge

resnet50 has a config, but no published score. internimage_huge is from a branch of the official
code; "head=1024" is a head of four times the width, trained on crops of 896 x 896 and tested at a
short edge of 896.
"""

from oneformer_jax.configs import common

VARIANTS = {
    "resnet50": {"queries": 150},
    "swin_large": {"queries": 250},
    "convnext_large": {"queries": 250},
    "convnext_large,pretrain=mapillary": {"queries": 250},
    "convnext_xlarge": {"queries": 250},
    "convnext_xlarge,pretrain=mapillary": {"queries": 250},
    "dinat_large": {"backbone": "dinat_large_7x7", "queries": 250, "dtype": "float32"},
    "internimage_huge": {"queries": 250},
    "internimage_huge,head=1024,pretrain=mapillary": {"queries": 250, "wide": True, "lr": 4e-5},
}


def get_config(variant: str = "swin_large"):
    backbone, row = common.select("configs/cityscapes.py", variant, VARIANTS)
    c = common.get_base()
    c.dataset.name = "cityscapes"
    c.dataset.data_dir = "data"
    c.data.num_slots = 150
    c.data.crop_size = (512, 1024)
    c.data.augment.kind = "unified"
    c.data.augment.short_edge = 1024
    c.data.augment.max_size = 4096
    c.model.backbone.name = row.get("backbone", backbone)
    if backbone == "resnet50":
        c.model.backbone.overrides = {"norm": "batch"}
    c.model.num_queries = row["queries"]
    c.model.dtype = row.get("dtype", "bfloat16")
    if backbone == "internimage_huge":
        c.model.remat = True
    c.optim.lr = row.get("lr", 1e-4)
    c.optim.schedule = "poly"
    c.train.steps = 90_000
    c.eval.short_edge = 1024
    c.eval.max_size = 2048
    c.eval.tta.max_size = 4096
    c.eval.topk = row["queries"]
    if row.get("wide"):
        common.widen_head(c)
        c.data.crop_size = (896, 896)
        c.data.augment.short_edge = c.eval.short_edge = 896
        c.data.augment.max_size = c.eval.max_size = 3584
        c.eval.tta.short_edges = (448, 678, 896, 1120, 1344, 1568)  # 678 as in configs/ade20k.py
        c.eval.tta.max_size = 6272
    return c
