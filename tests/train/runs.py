"""A tiny run that tests share: its config, and its training batches."""

import numpy as np

from oneformer_jax.configs import common
from tests import tiny

STEPS, BATCH = 6, 8
BEST = "semantic/mIoU"
SETTINGS = {
    "data.batch_size": BATCH,
    "model.backbone.name": "resnet",
    "model.backbone.overrides": {"depths": (1, 1, 1, 1), "stem_width": 8, "norm": "batch"},
    "model.num_queries": 7,
    "model.num_context": 3,
    "model.hidden_dim": 32,
    "model.mask_dim": 32,
    "model.num_heads": 4,
    "model.encoder_layers": 1,
    "model.encoder_ffn": 32,
    "model.query_init_layers": 1,
    "model.query_init_ffn": 32,
    "model.decoder_layers": 1,
    "model.decoder_ffn": 32,
    "model.text_width": 32,
    "model.text_layers": 1,
    "model.text_heads": 2,
    "loss.num_points": 64,
    "kernels.assignment": "xla",  # programs that call back to the host are not kept for later runs
    "optim.lr": 1e-3,
    "optim.ema_decay": 0.5,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": 2,
    "train.checkpoint_every": 2,
    "train.keep": 2,
    "train.pictures": 2,
    "eval.batch_size": 2,
    "eval.object_mask_threshold": 0.1,
    "eval.topk": 20,
    "eval.best_metric": BEST,
}


def make_config(**overrides):
    config = common.get_base()
    config.update_from_flattened_dict(SETTINGS)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config.lock()


class Batches:
    """Training batches from a step on, as the loader gives them; counts what it was asked for.

    Args:
      spoil: step -> function that changes the batch, raises, or returns None to end the data.
    """

    def __init__(self, spoil=None):
        self.spoil = spoil or {}
        self.starts, self.steps, self.closed = [], [], False

    def __call__(self, start):
        self.starts.append(start)
        self._next = start
        return self

    def __iter__(self):
        return self

    def __next__(self):
        self._next += 1
        batch = tiny.batch(seed=self._next, size=BATCH)
        batch["index"] = np.arange(BATCH) + 100 * self._next
        if self._next in self.spoil and self.spoil[self._next](batch) is None:
            raise StopIteration
        self.steps.append(self._next)
        return batch

    def close(self):
        self.closed = True
