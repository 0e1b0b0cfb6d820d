"""COCO panoptic: 133 classes (80 things), crops of 1024 x 1024 with large-scale jitter.

  python main.py --config=configs/coco.py:swin_large --workdir=runs/coco \
      --config.dataset.data_dir=DIR --config.init.backbone=FILE

Published on val2017, AP on instances derived from the panoptic annotation. Not run here: no number
of ours stands beside them yet.

  variant      PQ    things stuff  AP    mIoU  epochs  trained on     FILE
  resnet50     51.5  -      -      42.5  61.2  50      8 x A6000      torchvision ResNet-50
  swin_tiny    -     -      -      -     -     50      8 x A6000      swin_tiny_patch4_window7_224
  swin_large   57.9  64.4   48.0   49.0  67.4  100     8 x A100 80GB  1
  dinat_large  58.0  64.3   48.4   49.2  68.1  100     8 x A100 80GB  2
  internimage_huge,head=1024
               60.0  67.1   49.2   52.0  68.8  100     not known      3
  dinov3_base  -     -      -      -     -     50      not run        4
  dinov3_large
               -     -      -      -     -     50      not run        4

  1  swin_large_patch4_window12_384_22kto1k
  2  dinat_large_in22k_in1k_384_11x11
  3  internimage_h_jointto22k_384
  4  dinov3_vitb16 or dinov3_vitl16, pretrain_lvd1689m, of Meta or Hugging Face

swin_tiny has a config, but no published score; those of resnet50 stand in the paper only. The
second step of swin_large's schedule comes after 99.7 % of the run, probably a slip of the published
config; it is kept. internimage_huge is from a branch of the official code; "head=1024" is a head of
four times the width. The rates of dinov3_* fall from block to block towards the image; no OneFormer
of theirs is published.
"""

from oneformer_jax import catalogue
from oneformer_jax.configs import common

STEPS_PER_EPOCH = 7375  # 118,000 images in batches of 16
VARIANTS = catalogue.recipes("coco")
# The steps at which the rate falls: of a run of 50 epochs, else of 100.
BOUNDARIES = {
    "resnet50": (327_778, 355_092),
    "swin_tiny": (327_778, 355_092),
    "swin_large": (655_556, 735_184),
    "dinat_large": (655_556, 710_184),
    "internimage_huge": (655_556, 735_184),
    "dinov3_base": (327_778, 355_092),
    "dinov3_large": (327_778, 355_092),
}


def get_config(variant: str = "swin_large"):
    backbone, row = common.select("configs/coco.py", variant, VARIANTS)
    transformer = backbone.startswith("dinov")
    small = backbone in ("resnet50", "swin_tiny")
    c = common.get_published(row)
    c.data.require_things = True
    c.model.dtype = "bfloat16" if small else "float32"
    c.optim.lr = 4e-5 if row.wide else 1e-4
    c.train.steps = (50 if small or transformer else 100) * STEPS_PER_EPOCH
    # As fractions, so that a shorter run is the same schedule.
    c.optim.boundaries = tuple(step / c.train.steps for step in BOUNDARIES[backbone])
    if transformer:
        common.fine_tune_transformer(c, backbone)
    return c
