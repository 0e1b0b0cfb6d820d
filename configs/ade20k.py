"""ADE20K panoptic: 150 classes (100 things), square crops of 512 to 1280.

  python main.py --config=configs/ade20k.py:swin_large,res=896 --workdir=runs/ade20k \
      --config.dataset.data_dir=DIR --config.init.backbone=FILE

Published on the validation set; mIoU at a single scale and with flips and six scales ("ms"). Not
run here: no number of ours stands beside them yet.

  variant               PQ    AP    mIoU  ms    trained on     FILE
  resnet50              41.9  27.3  47.3  -     8 x A6000      torchvision ResNet-50
  swin_tiny             -     -     -     -     8 x A6000      swin_tiny_patch4_window7_224
  swin_large,res=640    49.8  35.9  57.0  57.7  8 x A6000      1
  swin_large,res=896    51.1  37.6  57.4  58.3  8 x A100 80GB  1
  swin_large,res=1280   51.4  37.8  57.0  57.7  8 x A6000      1
  convnext_large        50.0  36.2  56.6  57.4  8 x A6000      convnext_large_22k_1k_384
  convnext_xlarge       50.1  36.3  57.4  58.8  8 x A100 80GB  convnext_xlarge_22k_1k_384_ema
  dinat_large,res=640   50.5  36.0  58.3  58.4  8 x A6000      2
  dinat_large,res=896   51.2  36.8  58.1  58.6  8 x A100 80GB  2
  dinat_large,res=1280  51.5  37.1  58.3  58.7  8 x A6000      2
  dinat_large,res=1280,pretrain=coco
                        53.4  40.2  58.4  58.8  8 x A6000      3
  internimage_huge      54.5  40.2  60.4  60.8  not known      4
  internimage_huge,head=1024,pretrain=coco
                        55.5  44.2  60.7  60.7  not known      5
  dinov2_base           -     -     -     -     not run        6
  dinov3_base           -     -     -     -     not run        7
  dinov3_large          -     -     -     -     not run        7

  1  swin_large_patch4_window12_384_22kto1k
  2  dinat_large_in22k_in1k_384_11x11
  3  model of configs/coco.py:dinat_large, as --config.init.checkpoint=FILE
  4  internimage_h_jointto22k_384
  5  model of configs/coco.py:internimage_huge,head=1024, as --config.init.checkpoint=FILE
  6  dinov2_vitb14_pretrain of Meta, or the folder dinov2-base of Hugging Face
  7  dinov3_vitb16 or dinov3_vitl16, pretrain_lvd1689m, of Meta or Hugging Face

Without an option the first row of a backbone is taken: swin_large is swin_large,res=640. swin_tiny
has a config, but no published score; those of resnet50 stand in the paper only. Users who trained
swin_large,res=640 anew with the official code report a PQ of 45.6 to 46.5 (its issues 14 and 26).
internimage_huge is from a branch of the official code, with crops of 896; "head=1024" is a head of
four times the width. The rates of dinov2_* and dinov3_* fall from block to block towards the image;
no OneFormer of theirs is published.
"""

from oneformer_jax import catalogue
from oneformer_jax.configs import common

VARIANTS = catalogue.recipes("ade20k")


def get_config(variant: str = "swin_large"):
    backbone, row = common.select("configs/ade20k.py", variant, VARIANTS)
    res = row.short_edge  # also the edge of the crop, which the sizes of training images follow
    c = common.get_published(row)
    c.data.crop_size = (res, res)
    c.data.augment.kind = "unified"
    c.data.augment.short_edge = res
    c.data.augment.max_size = 4 * res
    c.model.dtype = "float32" if backbone == "dinat_large" or row.wide else "bfloat16"
    c.optim.lr = 4e-5 if row.wide else 1e-4
    c.optim.schedule = "poly"
    c.train.steps = 160_000
    if backbone.startswith("dinov"):
        common.fine_tune_transformer(c, backbone)
    if res == 896:  # 678 is the official file's; three quarters of 896 are 672
        c.eval.tta.short_edges = (448, 678, 896, 1120, 1344, 1568)
    return c
