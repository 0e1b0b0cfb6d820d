"""Your own data: panoptic, instance or semantic annotations. See docs/custom_dataset.md.

  python main.py --config=configs/custom.py --workdir=runs/mine --config.dataset.data_dir=DIR
  python main.py --config=configs/custom.py:swin_tiny,data=semantic --workdir=runs/mine ...

Models, the first part of the variant:

  small       (default) 9 M parameters without texts, trained from scratch at 320 x 320: fits a few
              dozen images in minutes on one GPU; a first check that data and classes are right.
  resnet50, swin_tiny, swin_large   the published sizes at 512 x 512.
  dinov2_small, dinov2_base, dinov3_base, dinov3_large
              for fine-tuning from Meta's files with few images, at 512 x 512: add
              --config.init.backbone=FILE, and to keep the backbone as it is
              --config.optim.freeze=backbone. Not run here with their files.

Annotations, after a comma:

  data=panoptic   (default) a COCO-panoptic folder; trains all three tasks.
  data=instances  a COCO instance JSON; trains the instance task alone.
  data=semantic   a PNG of class values per image; trains the semantic task alone.

The others start from random parameters, with learning rates for that. To fine-tune add
--config.init.checkpoint=PATH and see the page.
"""

from oneformer_jax.configs import common

TRANSFORMERS = ("dinov2_small", "dinov2_base", "dinov3_base", "dinov3_large")
MODELS = ("small", "resnet50", "swin_tiny", "swin_large", *TRANSFORMERS)
# Options of the dataset, see input_pipeline.sources.open_source; paths are relative to data_dir.
DATA = {
    "panoptic": {
        "root": "",  # folder of the dataset if it is not data_dir
        "train_images": "images",
        "train_panoptic": "panoptic",
        "train_json": "panoptic_train.json",
        "validation_images": "images",
        "validation_panoptic": "panoptic",
        "validation_json": "panoptic_val.json",
        "validation_share": 0.0,  # 0.1: a tenth of the training images, without validation files
        "split_seed": 0,
        "prepare": False,  # True writes TFDS records into data_dir, which are read faster
    },
    "instances": {
        "root": "",
        "train_images": "images",
        "train_json": "instances_train.json",
        "validation_images": "images",
        "validation_json": "instances_val.json",
        "validation_share": 0.0,
        "split_seed": 0,
        "crowd_as_instances": False,  # True for tools that write iscrowd 1 for every mask
    },
    "semantic": {
        "root": "",
        "train_images": "images/train",
        "train_labels": "labels/train",
        "validation_images": "images/validation",
        "validation_labels": "labels/validation",
        "validation_share": 0.0,
        "split_seed": 0,
        "classes": "classes.txt",  # a line for each class: its pixel value, then its name
        "ignore_label": (255,),  # values of unlabelled pixels; -1: there are none
        "label_suffix": ".png",  # end of a map's name in the place of the image's ".jpg"
    },
}
VARIANTS = {f"{model},data={data}": (model, data) for model in MODELS for data in DATA}


def get_config(variant: str = "small"):
    _, (variant, data) = common.select("configs/custom.py", variant, VARIANTS)
    c = common.get_base()
    c.dataset.options = DATA[data]
    if data == "panoptic":
        c.dataset.name = "coco_folder"
    elif data == "instances":
        c.dataset.name = "coco_instances"
        c.data.only_task = "instance"
        c.data.require_things = True  # images without instances teach nothing but "no object"
        c.eval.tasks = ("instance",)
        c.eval.best_metric = "instance/AP"
    else:
        c.dataset.name = "semantic_folder"
        c.data.only_task = "semantic"
        c.eval.tasks = ("semantic",)
        c.eval.best_metric = "semantic/mIoU"
    c.data.batch_size = 16
    c.data.workers = 2
    # No large-scale jitter down to a tenth: without pretraining it costs more than it gives.
    c.data.augment.kind = "lsj"
    c.data.augment.lsj_scale = (0.5, 1.5)
    c.data.num_slots = 100

    side = 320 if variant == "small" else 512
    c.data.crop_size = (side, side)
    c.eval.short_edge = side
    c.eval.max_size = side if variant == "small" else 2 * side
    c.eval.bucket_multiple = side if variant == "small" else 64
    c.model.backbone.name = "resnet50" if variant == "small" else variant
    if variant in ("small", "resnet50"):
        # Statistics of a pretrained model are what "frozen" freezes: from scratch they are trained.
        c.model.backbone.overrides = {"norm": "batch"}
    if variant == "small":
        c.model.backbone.overrides.stem_width = 32
        c.model.num_queries = 100
        c.model.hidden_dim = 128
        c.model.mask_dim = 128
        c.model.encoder_layers = 3
        c.model.encoder_ffn = 512
        c.model.encoder_dropout = 0.0
        c.model.query_init_ffn = 512
        c.model.query_init_dropout = 0.0
        c.model.decoder_layers = 6
        c.model.decoder_ffn = 512
        c.model.text_width = 128
        c.model.text_layers = 3
        c.model.text_heads = 2
        c.loss.num_points = 4096

    c.optim.lr = 4e-4 if variant == "small" else 1e-4
    c.optim.backbone_multiplier = 1.0  # 0.1 is for pretrained backbones
    c.optim.schedule = "poly"
    c.optim.warmup_steps = 200
    c.train.steps = 3000 if variant == "small" else 40_000
    c.train.eval_every = 1000 if variant == "small" else 5000
    c.train.checkpoint_every = 500
    if variant in TRANSFORMERS:
        common.fine_tune_transformer(c, variant)
        c.train.steps = 10_000
        c.train.eval_every = 1000
    c.eval.topk = 100
    c.eval.object_mask_threshold = 0.5
    return c
