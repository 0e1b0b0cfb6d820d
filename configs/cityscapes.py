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
  dinov3_large                         -     -     -     -     not run        9

  1  swin_large_patch4_window12_384_22kto1k
  2  convnext_large_22k_1k_384
  3  model of configs/mapillary.py:convnext_large,for=cityscapes
  4  convnext_xlarge_22k_1k_384_ema
  5  model of configs/mapillary.py:convnext_xlarge,for=cityscapes
  6  dinat_large_in22k_224 (neighbourhoods of 7 x 7)
  7  internimage_h_jointto22k_384
  8  model of configs/mapillary.py:internimage_huge
  9  dinov3_vitl16, pretrain_lvd1689m, of Meta or Hugging Face

resnet50 has a config, but no published score. internimage_huge is from a branch of the official
code; "head=1024" is a head of four times the width, trained on crops of 896 x 896 and tested at a
short edge of 896. The rates of dinov3_large fall from block to block towards the image; no such
OneFormer is published.
"""

from oneformer_jax import catalogue
from oneformer_jax.configs import common

VARIANTS = catalogue.recipes("cityscapes")


def get_config(variant: str = "swin_large"):
    backbone, row = common.select("configs/cityscapes.py", variant, VARIANTS)
    c = common.get_published(row)
    c.data.num_slots = 150
    c.data.crop_size = (896, 896) if row.wide else (512, 1024)
    c.data.augment.kind = "unified"
    c.data.augment.short_edge = row.short_edge
    c.data.augment.max_size = 4 * row.short_edge
    c.model.dtype = "float32" if backbone == "dinat_large" else "bfloat16"
    c.optim.lr = 4e-5 if row.wide else 1e-4
    c.optim.schedule = "poly"
    c.train.steps = 90_000
    c.eval.tta.max_size = 4096
    if backbone.startswith("dinov"):
        common.fine_tune_transformer(c, backbone)
    if row.wide:
        c.eval.tta.short_edges = (448, 678, 896, 1120, 1344, 1568)  # 678 as in configs/ade20k.py
        c.eval.tta.max_size = 6272
    return c
