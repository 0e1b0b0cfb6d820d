"""Mapillary Vistas v1.2 panoptic: 65 classes (37 things), crops of 1024 x 1024.

  python main.py --config=configs/mapillary.py:swin_large --workdir=runs/mapillary \
      --config.dataset.data_dir=DIR --config.init.backbone=FILE

Published on the validation set; mIoU at a single scale and with flips and six scales ("ms"); no AP,
since the official evaluation has none here. Not run here: no number of ours stands beside them yet.

  variant                          PQ    mIoU  ms    trained on     FILE
  resnet50                         -     -     -     8 x A6000      torchvision ResNet-50
  swin_large                       46.7  62.9  64.1  8 x A6000      1
  convnext_large                   47.9  63.2  63.8  8 x A6000      2
  convnext_large,for=cityscapes    -     -     -     8 x A6000      2
  convnext_xlarge,for=cityscapes   -     -     -     8 x A100 80GB  3
  dinat_large                      47.8  64.0  64.9  8 x A6000      4
  internimage_huge,head=1024       52.9  67.3  67.5  not known      5

  1  swin_large_patch4_window12_384_22kto1k
  2  convnext_large_22k_1k_384
  3  convnext_xlarge_22k_1k_384_ema
  4  dinat_large_in22k_in1k_384_11x11
  5  internimage_h_jointto22k_384

The published configs never train the instance task: half of the images are semantic, half panoptic.
Only with for=cityscapes (official name cityscapes_pretrain), whose models are what
configs/cityscapes.py:convnext_large,pretrain=mapillary starts from, are all three trained alike.
internimage_huge is from a branch of the official code; "head=1024" is a head of four times the
width.
"""

from oneformer_jax import catalogue
from oneformer_jax.configs import common

VARIANTS = catalogue.of("mapillary")


def get_config(variant: str = "swin_large"):
    backbone, row = common.select("configs/mapillary.py", variant, VARIANTS)
    c = common.get_published(row)
    c.data.num_slots = 250
    c.data.workers = 10
    c.data.crop_size = (1024, 1024)
    c.data.augment.kind = "unified"
    c.data.augment.short_edge = 2048
    c.data.augment.max_size = 8192
    if not row.variant.endswith("for=cityscapes"):
        c.data.semantic_prob = 0.5
        c.data.instance_prob = 0.0
    c.model.dtype = "float32" if backbone == "dinat_large" else "bfloat16"
    c.optim.lr = 2e-5 if row.wide else 1e-4
    c.optim.schedule = "poly"
    c.train.steps = 300_000
    c.train.eval_every = 30_000
    c.eval.tasks = ("panoptic", "semantic")
    c.eval.tta.short_edges = (512, 768, 1024, 1280, 1536, 1792)
    c.eval.tta.max_size = 4096
    return c
