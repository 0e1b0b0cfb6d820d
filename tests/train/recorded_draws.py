"""Hands what our training step has drawn at random to the reference in PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from oneformer_jax.models import points
from oneformer_jax.models.points import Purpose
from tests.weights import torch_reference as reference

torch = reference.torch
nn = torch.nn

from transformers.models.swin import modeling_swin  # noqa: E402

BATCH, NUM_POINTS = 2, 64

draw_points = jax.jit(points.draw_points, static_argnames=("purpose", "batch", "count"))


class Drawn:
    """Hands what ours has drawn in a step to the reference, in the order of use.

    Attributes:
      masks: of dropout and drop path, in the order of the layers.
      key: of the points.
      chosen: by the first candidate of a mask, the uncertain points that ours chose for it.
      matches: found by the reference, by prediction: a list over images of {slot: query}.
      other_points: for how many masks the reference would have chosen otherwise.
    """

    def __init__(self, batch, predictions: int, masks, key):
        self.chosen: dict[bytes, np.ndarray] = {}
        self.other_points = 0
        self.masks = list(masks)
        self.key = key
        self.slots = [np.flatnonzero(valid) for valid in batch["valid"]]
        self.predictions = predictions
        self.prediction = predictions - 1  # the final one comes first
        self.image = None  # of the matcher's draw; None while the losses draw
        self.indices: list = []
        self.matches: dict[int, list[dict[int, int]]] = {}

    def keep(self, x):
        """The next mask, for an array of the reference's."""
        mask = torch.tensor(self.masks.pop(0)).to(x.dtype)
        if mask.shape[0] * mask.shape[1] == x.shape[0] and mask.ndim == x.ndim + 1:
            mask = mask.flatten(0, 1)  # attention weights: images and heads are one axis
        elif mask.shape != x.shape and mask.ndim == x.ndim and mask.shape[1] == x.shape[0]:
            mask = mask.transpose(0, 1)  # the batch is the second axis
        return mask

    def rand(self, *shape, device=None, dtype=None):
        """Stands in for `torch.rand`, of which only the points are left."""

        def draw(purpose, slot, image):
            found = draw_points(self.key, purpose, self.prediction, slot, BATCH, shape[1])
            return np.array(found[image])

        if self.image is not None:
            return torch.from_numpy(draw(Purpose.MATCHING, 0, self.image)[None])
        purpose = Purpose.CANDIDATES if shape[1] == 3 * NUM_POINTS else Purpose.FRESH
        drawn = [
            draw(purpose, int(self.slots[image][column]), image)
            for image, (_, columns) in enumerate(self.indices)
            for column in columns
        ]
        drawn = np.stack(drawn)
        if purpose is Purpose.CANDIDATES:
            self.candidates = drawn
        return torch.from_numpy(drawn)

    def replace_points(self, own):
        """The points of all masks, the uncertain ones first, with the choice of ours."""
        count = int(NUM_POINTS * 0.75)
        ours = np.stack([self.chosen[mask[0].tobytes()] for mask in self.candidates])
        for one, other in zip(own[:, :count].numpy(), ours, strict=True):
            self.other_points += set(map(bytes, one)) != set(map(bytes, other))
        return torch.cat([torch.from_numpy(ours), own[:, count:]], dim=1)

    @contextlib.contextmanager
    def given_to(self, model) -> Iterator[None]:
        """While it lasts, the model reads these draws, and its matches are recorded."""
        criterion = model.criterion
        matching, losses = criterion.matcher.forward, criterion.loss_masks
        choose = criterion.sample_points_using_uncertainty

        def match(masks, classes, mask_labels, class_labels):
            self.indices = []
            for image in range(BATCH):
                if not len(class_labels[image]):  # the official matcher takes this (spec 3)
                    self.indices.append((torch.zeros(0, dtype=torch.int64),) * 2)
                    continue
                one = slice(image, image + 1)
                self.image = image
                self.indices += matching(
                    masks[one], classes[one], mask_labels[one], class_labels[one]
                )
            self.image = None
            self.matches[self.prediction] = [
                {int(self.slots[image][c]): int(r) for r, c in zip(*pair, strict=True)}
                for image, pair in enumerate(self.indices)
            ]
            return self.indices

        def loss_masks(*args, **kwargs):
            result = losses(*args, **kwargs)
            self.prediction = (self.prediction + 1) % self.predictions
            return result

        def dropout(x, p=0.5, training=True, inplace=False):
            return x * self.keep(x) / (1 - p) if training and p > 0 else x

        def drop_path(module, x):
            rate = module.drop_prob
            if not rate or not module.training:
                return x
            return x * self.keep(x).reshape(-1, *[1] * (x.ndim - 1)) / (1 - rate)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(criterion.matcher, "forward", match)
            patch.setattr(criterion, "loss_masks", loss_masks)
            patch.setattr(
                criterion,
                "sample_points_using_uncertainty",
                lambda *args: self.replace_points(choose(*args)),
            )
            patch.setattr(torch, "rand", self.rand)
            patch.setattr(nn.functional, "dropout", dropout)
            patch.setattr(modeling_swin.SwinDropPath, "forward", drop_path)
            yield
        assert not self.masks, f"{len(self.masks)} masks that the reference has no place for"
