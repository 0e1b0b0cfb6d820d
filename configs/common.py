"""Every default of the program, each with its meaning: the only place where defaults live.

A config file starts from `get_base()` and sets what differs. The config is locked when the program
starts, so a mistyped override is an error. The values that each key accepts stand in
`oneformer_jax/config_rules.py`; a new key needs a rule there. Published values are those of the
official code (github.com/SHI-Labs/OneFormer), which override its own file defaults in every recipe.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from oneformer_jax import catalogue


def select(file: str, variant: str, rows: Mapping[str, Any]) -> tuple[str, Any]:
    """Returns the backbone and the row of a variant like "swin_large,res=896".

    Args:
      file: of the recipes, for the message.
      variant: the backbone, then options in any order. Of the rows that have them all, the first is
        taken.
      rows: by variant.

    Raises:
      ValueError: no row fits; the message lists them all.
    """
    backbone, *options = (part.strip() for part in variant.split(","))
    for name, row in rows.items():
        known, *others = name.split(",")
        if known == backbone and set(options) <= set(others):
            return backbone, row
    raise ValueError(f"{file} has no variant {variant!r}; it has {' | '.join(rows)}")


def get_published(row: catalogue.Published) -> ConfigDict:
    """Adds to the base config what the catalogue has about a model: architecture, size at the test.

    How it is trained is left to the recipe.
    """
    c = get_base()
    c.dataset.name = row.dataset
    c.dataset.data_dir = "data"
    c.model.backbone.name = row.backbone
    c.model.backbone.overrides = row.backbone_options
    c.model.update(row.head)
    c.model.remat = row.backbone == "internimage_huge"
    c.eval.short_edge = row.short_edge
    c.eval.max_size = row.max_size
    c.eval.object_mask_threshold = row.object_mask_threshold
    c.eval.overlap_threshold = row.overlap_threshold
    c.eval.topk = row.topk
    return c


def fine_tune_transformer(c: ConfigDict, backbone: str) -> None:
    """Sets the optimizer for a DINOv2 or DINOv3: its rates fall from block to block."""
    c.model.backbone.overrides.maps = "last"  # or "depths"
    c.model.dtype = "bfloat16"
    c.model.remat = not backbone.endswith(("small", "base"))
    c.optim.backbone_multiplier = 1.0
    c.optim.layer_decay = 0.65 if c.model.remat else 0.75
    c.optim.warmup_steps = 500


def get_base() -> ConfigDict:
    """Returns the base config: the COCO recipe of the official R-50 model, without a dataset."""
    c = ConfigDict()
    c.seed = 0  # of initialisation, data order, augmentation, dropout and loss points

    c.dataset = ConfigDict()
    # "synthetic", "coco_folder"; prepared beforehand: "coco", "ade20k", "cityscapes", "mapillary".
    c.dataset.name = "coco_folder"
    c.dataset.data_dir = ""  # where the dataset is read from, or (synthetic) prepared into
    c.dataset.train_split = "train"
    c.dataset.eval_split = "validation"
    # Options of the source: see oneformer_jax.input_pipeline.sources.open_source.
    c.dataset.options = ConfigDict(convert_dict=False)

    c.data = ConfigDict()
    c.data.batch_size = 16  # images per step over all devices
    c.data.crop_size = (1024, 1024)  # (height, width) of a training image
    c.data.num_slots = 100  # target slots per image; the largest segments are kept
    c.data.workers = 4  # loader processes per host; 0 reads in threads of the main process
    c.data.threads = 4  # reading threads where there are no workers
    c.data.prefetch = 4  # batches that a worker, or the threads together, keep ready
    c.data.semantic_prob = 0.33  # share of images trained with the semantic task
    c.data.instance_prob = 0.33  # share with the instance task; the rest is panoptic
    c.data.only_task = ""  # trains this one of the three tasks alone, whatever the shares above
    # Text of a segment: {CLS} is its class; {TYPE} is "thing" where the task tells instances of the
    # class apart, else "stuff".
    c.data.text_template = "a photo with a {CLS}"
    # Largest image or label map that is read, by its header; the default is 16,384 x 16,384.
    c.data.max_pixels = 1 << 28
    c.data.skip_broken = False  # skip, count and list broken records instead of stopping
    c.data.require_things = False  # drop training images without a non-crowd thing
    c.data.augment = ConfigDict()
    c.data.augment.kind = "lsj"  # "lsj" (COCO), "unified" (all others) or "none"
    c.data.augment.lsj_scale = (0.1, 2.0)  # range of the large-scale jitter
    c.data.augment.short_edge = 640  # unified: base of the short edge
    c.data.augment.scale = (0.5, 2.0)  # unified: 16 steps between these multiples of the base
    c.data.augment.max_size = 2560  # unified: cap of the long edge
    c.data.augment.color = True  # unified: colour jitter as in SSD, within these bounds:
    c.data.augment.brightness = 32.0  # largest offset in grey levels
    c.data.augment.contrast = (0.5, 1.5)  # range of the factor
    c.data.augment.saturation = (0.5, 1.5)
    c.data.augment.hue = 18  # largest shift in steps of 2 degrees
    c.data.augment.flip_prob = 0.5

    c.model = ConfigDict()
    c.model.backbone = ConfigDict()
    c.model.backbone.name = "resnet50"  # see oneformer_jax.models.backbones
    c.model.backbone.overrides = ConfigDict(convert_dict=False)  # fields of the backbone's config
    c.model.num_queries = 150  # the task token is the last of them
    c.model.num_context = 16  # learned context embeddings beside the texts; 0 is none
    c.model.hidden_dim = 256
    c.model.mask_dim = 256
    c.model.num_heads = 8
    c.model.encoder_layers = 6  # of the pixel decoder
    c.model.encoder_ffn = 1024
    c.model.encoder_points = 4  # sampling points per head and level
    c.model.encoder_dropout = 0.1
    c.model.query_init_layers = 2
    c.model.query_init_ffn = 2048
    c.model.query_init_dropout = 0.1
    c.model.decoder_layers = 9  # masked-attention layers; one more prediction is made before them
    c.model.decoder_ffn = 2048
    # Where the object queries come from: "task" (official) or, for ablations, "no_token" (the task
    # token is no query), "zeros" (they do not start from it), "learned" (Mask2Former's: no task,
    # and no loss on the queries).
    c.model.queries = "task"
    # Loss on the queries that enter the decoder: "contrastive" (official, with the text branch),
    # "classification" (each query tells the class of its text) or "none".
    c.model.query_loss = "contrastive"
    c.model.text_width = 256
    c.model.text_layers = 6
    c.model.text_heads = 4
    c.model.text_causal = True  # False: as in transformers' port, whose causal mask never acts
    # How the model is run, which is not stored with it:
    c.model.dtype = "float32"  # compute dtype of the matrix products: "float32" or "bfloat16"
    c.model.remat = False  # recompute backbone blocks and transformer layers in the backward pass
    # Layers that repeat are loops, each compiled once: True, False, or "auto", on accelerators.
    c.model.scan_layers = FieldReference("auto", field_type=object)

    # Implementations of the operations that have several; "auto" is the fastest that is right on
    # the device itself, which the first start finds out (docs/kernels.md).
    c.kernels = ConfigDict()
    c.kernels.deform_attn = "auto"  # deformable attention: or "xla", "pallas_tpu", "pallas_gpu"
    c.kernels.neighborhood = "auto"  # DiNAT's attention: or "xla", "pallas_tpu"
    c.kernels.points = "auto"  # reading features at points: or "xla", "pallas_tpu"
    # Matching: "scipy" in a callback to the host, or, on the device, "auto", "xla", "pallas_tpu",
    # "pallas_gpu".
    c.kernels.assignment = "scipy"
    # False: "auto" takes the Pallas kernels on TPUs and plain JAX elsewhere, and nothing is tried.
    c.kernels.calibrate = True

    # What training starts from instead of random parameters; at most one of the two.
    c.init = ConfigDict()
    # Each a path, a model of the Hugging Face hub or an address, see docs/weights.md.
    c.init.backbone = ""  # a pre-trained backbone
    # A whole model: defaults of c.model give way to its architecture; other classes start afresh.
    c.init.checkpoint = ""

    c.loss = ConfigDict()
    c.loss.class_weight = 2.0
    c.loss.mask_weight = 5.0
    c.loss.dice_weight = 5.0
    c.loss.contrastive_weight = 0.5  # of the loss that model.query_loss names
    c.loss.no_object_weight = 0.1
    c.loss.num_points = 12544
    c.loss.oversample_ratio = 3.0
    c.loss.importance_ratio = 0.75
    # "per_mask": every mask draws its own points (official). "shared": the masks of an image share
    # the candidates, which leaves no gather per mask; each estimate keeps its distribution.
    c.loss.point_sampling = "shared"
    # The official trainer averages the class loss per GPU and then over GPUs: 8 groups of 2 images
    # reproduce its 8 GPUs on any mesh. 1 is one weighted mean over the batch.
    c.loss.replica_groups = 1

    c.matcher = ConfigDict()
    c.matcher.class_cost = 2.0
    c.matcher.mask_cost = 5.0
    c.matcher.dice_cost = 5.0

    c.optim = ConfigDict()
    c.optim.lr = 1e-4
    c.optim.backbone_multiplier = 0.1
    # A block of the backbone learns at this share of the rate of the block after it; 1 is off.
    c.optim.layer_decay = 1.0
    # Parts that stay as they start, as ("backbone", "text_encoder") or ("backbone.blocks.0",).
    # "backbone" leaves out what no pre-trained file holds: output norms and a ViT's pyramid.
    c.optim.freeze = ()
    c.optim.weight_decay = 0.05
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.schedule = "step"  # "poly" or "step"
    c.optim.power = 0.9  # poly
    c.optim.boundaries = (0.889, 0.963)  # step: shares of the run (below 1) or steps
    c.optim.decay_factor = 0.1  # step
    c.optim.warmup_steps = 0  # official: none in effect
    c.optim.warmup_factor = 0.0  # the rate rises linearly from this share of it
    c.optim.clip_norm = 0.0  # 0 is off; the official 0.01 never acted (its iterator was consumed)
    # Micro-batches per step. The contrastive loss, the counts that losses are divided by and batch
    # norm see one micro-batch.
    c.optim.accumulate = 1
    c.optim.ema_decay = 0.0  # 0 is off; else an average of the parameters that evaluation uses

    c.train = ConfigDict()
    c.train.steps = 368_750
    c.train.epochs = 0.0  # passes over the training images, in place of steps; 0: steps count
    c.train.log_every = 50
    c.train.eval_every = 5_000
    c.train.checkpoint_every = 5_000
    c.train.keep = 3  # newest checkpoints kept
    c.train.keep_best = 1  # best checkpoints kept beside them, by eval.best_metric
    # Evaluations without a better eval.best_metric after which training stops; 0 is off.
    c.train.patience = 0
    c.train.pictures = 4  # held-out images drawn at each evaluation
    # What a loss or gradient that is not finite does: "stop" writes the good state and its batch
    # for --mode=replay; "skip" leaves out the update, up to ten times in a row.
    c.train.on_nonfinite = "stop"
    c.train.profile_start = 0  # step at which a profile is taken; 0 is off
    c.train.profile_steps = 3

    c.eval = ConfigDict()
    c.eval.batch_size = 8  # over all devices; rounded up to a multiple of their number
    c.eval.tasks = ("panoptic", "instance", "semantic")  # each metric comes from its own task's run
    c.eval.short_edge = 800
    c.eval.max_size = 1333
    # Images are padded to multiples of this; each padded size is one more compiled program. 32 is
    # the official padding, larger multiples show the model more of it.
    c.eval.bucket_multiple = 32
    # Padded sizes at most; 0 is no limit. Rare sizes join larger ones, which shows the model more
    # padding; common sizes keep the official one.
    c.eval.max_buckets = 0
    c.eval.limit = 0  # images evaluated while training, an even sample of the split; 0 is all
    # Metrics: "coco", "ade20k", "cityscapes" or "mapillary"; "auto" goes by dataset.name.
    c.eval.protocol = "auto"
    # Labels of instances while they are scored: "contiguous" or (official on ADE20K) "thing", their
    # position among the things; "auto" goes by the protocol.
    c.eval.instance_ids = "auto"
    c.eval.instance_json = ""  # original instances_*.json as truth of AP; empty: the panoptic truth
    # Test-time augmentation of the semantic task.
    c.eval.tta = ConfigDict()
    c.eval.tta.enabled = False
    c.eval.tta.short_edges = ()  # empty: 0.5, 0.75, ... 1.75 times eval.short_edge
    c.eval.tta.max_size = 0  # cap of the long edge; 0: 7 times eval.short_edge
    c.eval.tta.flip = True  # each size mirrored as well
    c.eval.object_mask_threshold = 0.8
    c.eval.overlap_threshold = 0.8
    c.eval.topk = 150
    # Drops an instance that overlaps a better one by a larger IoU; 1 (official) drops none.
    c.eval.instance_max_iou = 1.0
    c.eval.best_metric = "panoptic/PQ"
    c.eval.token_table = False  # after training: every metric under every task token

    # Where training is followed beside WORKDIR; empty is off. See docs/metrics.md.
    c.log = ConfigDict()
    c.log.wandb = ""  # project of Weights & Biases
    c.log.mlflow = ""  # experiment of MLflow

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices along the batch; -1 is all that are left
    c.mesh.fsdp = 1  # devices over which parameters and optimizer state are sharded
    # --mode=compile: the accelerators to compile for, as "v5e:4x4"; empty is those of this machine.
    c.mesh.topology = ""
    c.mesh.slices = 1  # of that topology; in a run the devices tell

    c.compilation_cache = ""  # folder of compiled programs; empty is the user's cache folder
    return c
