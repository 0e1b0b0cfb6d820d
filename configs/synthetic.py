"""The embedded default: rendered scenes and a small model that trains on a laptop's CPU.

  python main.py --config=configs/synthetic.py --workdir=runs/synthetic --mode=train
  python main.py --config=configs/synthetic.py:vit --workdir=runs/vit --mode=train

The second has a small vision transformer for the ResNet, also from random parameters.

A demonstration of the whole program, not a benchmark. See the README for what it reaches.
"""

from oneformer_jax.configs import common

VARIANTS = {
    "resnet": {"depths": (1, 1, 1, 1), "stem_width": 16, "norm": "batch"},
    "vit": {
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
        "mlp_dim": 512,
        "patch_size": 16,
        "positions": 0,
        "registers": 4,
        "key_bias": False,
        "maps": "last",
    },
}


def get_config(variant: str = "resnet"):
    backbone, overrides = common.select("configs/synthetic.py", variant, VARIANTS)
    c = common.get_base()
    c.dataset.name = "synthetic"
    c.dataset.data_dir = "data/synthetic"
    # Image size in pixels and numbers of scenes; another seed renders other scenes.
    c.dataset.options = {
        "size": 128,
        "train_examples": 3000,
        "validation_examples": 200,
        "seed": 0,
    }

    c.data.batch_size = 16
    c.data.crop_size = (128, 128)
    c.data.num_slots = 16
    c.data.workers = 0
    c.data.augment.kind = "none"

    c.model.backbone.name = backbone
    c.model.backbone.overrides = overrides
    c.model.num_queries = 24
    c.model.num_context = 4
    c.model.hidden_dim = 64
    c.model.mask_dim = 64
    c.model.num_heads = 4
    c.model.encoder_layers = 2
    c.model.encoder_ffn = 128
    c.model.encoder_dropout = 0.0
    c.model.query_init_ffn = 128
    c.model.query_init_dropout = 0.0
    c.model.decoder_layers = 3
    c.model.decoder_ffn = 128
    c.model.text_width = 64
    c.model.text_layers = 2
    c.model.text_heads = 2

    c.loss.num_points = 512
    c.loss.point_sampling = "shared"

    c.optim.lr = 1e-3
    c.optim.backbone_multiplier = 1.0
    c.optim.schedule = "poly"
    c.optim.warmup_steps = 50

    c.train.steps = 600
    c.train.eval_every = 300
    c.train.checkpoint_every = 150
    c.train.log_every = 20

    c.eval.batch_size = 16
    c.eval.short_edge = 128
    c.eval.max_size = 128
    c.eval.object_mask_threshold = 0.5
    c.eval.topk = 24
    c.eval.token_table = True
    return c
