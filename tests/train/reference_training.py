"""Trains the port in PyTorch beside ours: same weights, batches, points and draws, step by step.

The reference is `transformers`' OneFormer, corrected where it departs from the official code, with
torch's AdamW, the official parameter groups and the official schedules. Those are written from the
spec of the official code, by module type and name, and know nothing of `oneformer_jax.train.optim`.

Ours is the compiled training step as it is. What it draws at random is computed once more from its
key, outside of it, and handed to the reference. Each side matches by its own predictions. Each
chooses uncertain points by its own, too, but goes on with those that ours chose: where two of them
are equally uncertain but for rounding, one point more or less would be seen in the loss.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.models import functional, layers, matcher, points
from oneformer_jax.models.backbones import swin
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.losses import LossConfig
from oneformer_jax.models.oneformer import PIXEL_MEAN, PIXEL_STD, OneFormerConfig
from oneformer_jax.train import optim
from oneformer_jax.train import state as states
from oneformer_jax.types import TASK_TOKENS
from oneformer_jax.weights import convert, files, names
from tests.train.recorded_draws import BATCH, NUM_POINTS, Drawn
from tests.weights import torch_reference as reference

torch = reference.torch
nn = torch.nn

from transformers.models.convnext import modeling_convnext  # noqa: E402
from transformers.models.swin import modeling_swin  # noqa: E402

HEIGHT, WIDTH, SLOTS = 64, 96, 6
LR, BACKBONE_MULTIPLIER, WEIGHT_DECAY = 1e-4, 0.1, 0.05
DROP_PATH = 0.5  # of five blocks: rates that both sides hold exactly
# What the training step says besides the losses.
OTHER_METRICS = {"matcher_nonfinite", "grad_norm", "param_norm", "skipped_share"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
      backbone: "swin", "resnet" (frozen norms) or "resnet_batch" (batch norm in training mode).
      draws: whether dropout and drop path act.
      schedule: "poly" or "step".
      steps: optimizer steps.
      seed: of the weights.
    """

    backbone: str
    draws: bool
    schedule: str
    steps: int
    seed: int = 6

    @property
    def kind(self) -> str:
        """The backbone's kind, without its norm."""
        return self.backbone.removesuffix("_batch")


# ------------------------------------------------------------------ the reference


def parameter_groups(model) -> list[dict[str, Any]]:
    """One group for each parameter, as the official trainer builds them (spec 6)."""
    norms = (
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    )
    groups, seen = [], set()
    for module_name, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if not value.requires_grad or value in seen:
                continue
            seen.add(value)
            lr, decay = LR, WEIGHT_DECAY
            if module_name.startswith("model.pixel_level_module.encoder"):  # official: "backbone"
                lr = lr * BACKBONE_MULTIPLIER
            if "relative_position_bias_table" in name or "absolute_pos_embed" in name:
                decay = 0.0
            # The official ConvNeXt has a LayerNorm of its own, which is none of torch's (spec 6).
            own = isinstance(module, modeling_convnext.ConvNextLayerNorm)
            if isinstance(module, (*norms, nn.Embedding)) and not own:
                decay = 0.0
            groups.append({"params": [value], "lr": lr, "weight_decay": decay})
    return groups


def schedule(case: Case) -> Callable[[int], float]:
    """Factor on the rate by the number of updates done, as WarmupPolyLR and WarmupMultiStepLR."""
    if case.schedule == "poly":
        return lambda step: (1 - step / case.steps) ** 0.9
    return lambda step: 0.1 ** sum(step >= boundary for boundary in boundaries(case))


def boundaries(case: Case) -> tuple[int, int]:
    """Steps at which "step" falls: early, so that many steps come after."""
    return case.steps // 3, 2 * case.steps // 3


def in_training(model, case: Case) -> None:
    """Training mode; the norms of a frozen ResNet are constants, in every sense (spec 1.1)."""
    model.train()
    if case.backbone == "resnet":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)


class Reference:
    """The port, corrected, with its optimizer."""

    def __init__(self, model, case: Case, patch: pytest.MonkeyPatch):
        self.model, self.kind = model, case.kind
        reference.correct_the_port(patch, model)
        in_training(model, case)
        self.dtype = next(model.parameters()).dtype
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model), lr=LR, betas=(0.9, 0.999), eps=1e-8
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(case))

    def step(self, batch, texts, drawn: Drawn) -> dict[str, float]:
        """One update; the weighted losses by our names."""
        height, width = batch["image"].shape[1:3]
        image = (batch["image"] - np.float64(PIXEL_MEAN)) / np.float64(PIXEL_STD)
        for pixels, (rows, columns) in zip(image, batch["image_size"], strict=True):
            pixels[rows:], pixels[:, columns:] = 0, 0
        masks, classes = [], []
        for ids, labels, slots in zip(
            batch["segment_map"], batch["classes"], drawn.slots, strict=True
        ):
            found = [torch.from_numpy(ids == slot + 1) for slot in slots]
            empty = torch.zeros((0, height, width), dtype=self.dtype)
            masks.append(torch.stack(found).to(self.dtype) if found else empty)
            classes.append(torch.from_numpy(labels[slots]).long())
        recorded = {}
        weigh = self.model.get_loss_dict

        def get_loss_dict(**arguments):
            terms = weigh(**arguments)
            recorded.update({name: value.item() for name, value in terms.items()})
            return terms

        with drawn.given_to(self.model), pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.model, "get_loss_dict", get_loss_dict)
            outputs = self.model(
                pixel_values=torch.from_numpy(image).to(self.dtype).permute(0, 3, 1, 2),
                task_inputs=torch.from_numpy(TASK_TOKENS[batch["task"]]).to(self.dtype),
                text_inputs=torch.from_numpy(texts[batch["text_ids"]]).long(),
                mask_labels=masks,
                class_labels=classes,
            )
            self.optimizer.zero_grad()
            outputs.loss.backward()
            self.optimizer.step()
            self.scheduler.step()
        recorded["loss"] = outputs.loss.item()
        return {name.replace("cross_entropy", "ce"): value for name, value in recorded.items()}

    def arrays(self, expected) -> dict[str, np.ndarray]:
        """Parameters and statistics by our names."""
        blocks = [m for m in self.model.modules() if isinstance(m, modeling_swin.SwinLayer)]
        corrected = [block.mlp for block in blocks]
        for block in blocks:  # under the names that it had
            block.mlp = block.mlp[0]
        found = arrays_of(self.model, expected, self.kind)
        for block, mlp in zip(blocks, corrected, strict=True):
            block.mlp = mlp
        return found


def arrays_of(model, expected, kind: str) -> dict[str, np.ndarray]:
    """Returns the arrays of our names; only `save_pretrained` knows its names of a file."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = files.open_tensors(folder).tensors
        for name in expected:
            group = names.group_of(name, "ours", "hugging_face", kind)
            parts = [np.array(tensors[other].read()) for other in group.theirs]
            found[name] = group.to_ours(parts)[group.ours.index(name)]
    return found


# ------------------------------------------------------------------ ours


class Ours:
    """The training step of `oneformer_jax.train`, compiled."""

    def __init__(self, config: OneFormerConfig, params, stats, case: Case, texts, dtype):
        self.config, self.execution = config, Execution(scan_layers=True)
        # Not by the constructor, which takes no dtype that a run should not have.
        object.__setattr__(self.execution, "dtype", dtype)
        settings = optim.OptimConfig(
            steps=case.steps,
            lr=LR,
            backbone_multiplier=BACKBONE_MULTIPLIER,
            weight_decay=WEIGHT_DECAY,
            schedule=case.schedule,
            boundaries=boundaries(case) if case.schedule == "step" else (),
        )
        params, stats = jax.tree.map(jnp.asarray, (params, stats))
        optimizer = optim.make_optimizer(settings, params)
        self.state = {
            "step": jnp.zeros((), jnp.int32),
            "halted": jnp.zeros((), jnp.bool_),
            "params": params,
            "stats": stats,
            "opt": optimizer.init(params),
        }
        losses = LossConfig(num_points=NUM_POINTS, point_sampling="per_mask")
        step = states.make_train_step(
            self.config, losses, optimizer, texts, execution=self.execution
        )
        self._step = jax.jit(step, donate_argnums=0)
        self.key = jax.random.key(11)
        self._masks = jax.jit(self._trace_masks)

    def step(self, batch, drawn: Drawn) -> dict[str, float]:
        """One update; the weighted losses. `drawn` learns of the points that were chosen."""
        choose = points.choose_uncertain

        def record(candidates, chosen):
            pairs = zip(*(x.reshape(-1, *x.shape[2:]) for x in (candidates, chosen)), strict=True)
            self.chosen.update({mask[0].tobytes(): np.array(points) for mask, points in pairs})

        def choose_and_record(logits, candidates, count):
            chosen = choose(logits, candidates, count)
            jax.debug.callback(record, candidates, chosen)
            return chosen

        self.chosen = drawn.chosen
        with pytest.MonkeyPatch.context() as patch:  # acts while the step is traced
            patch.setattr(points, "choose_uncertain", choose_and_record)
            self.state, metrics = self._step(self.state, batch, self.key)
        jax.effects_barrier()
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def drawn(self, batch) -> Drawn:
        """Returns what the coming step will draw."""
        key = jax.random.fold_in(self.key, self.state["step"])
        model_key, point_key = jax.random.split(key)
        masks = jax.device_get(self._masks(self.state["params"], self.state["stats"], model_key))
        return Drawn(batch, self.config.decoder_layers + 1, masks, point_key)

    def _trace_masks(self, params, stats, key) -> list[jax.Array]:
        """The masks of dropout and drop path, in the order of the layers.

        The layers are not looped over here, so that every mask is a value of this program. Nothing
        else is: the compiler removes the model.
        """
        masks = []

        def record(draw):
            def call(x, rate, key):
                if key is None or rate == 0:
                    return x
                kept = draw(jnp.ones_like(x), rate, key) > 0
                masks.append(kept)
                return x

            return call

        unrolled = Execution(scan_layers=False)
        object.__setattr__(unrolled, "dtype", self.execution.dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "dropout", record(layers.dropout))
            patch.setattr(
                swin, "drop_path", record(lambda x, *rest: layers.drop_path(x[:, :1, :1, 0], *rest))
            )
            graph = functional.abstract(self.config, unrolled, training=True).graph
            model = functional.merge(graph, params, stats)
            image = jnp.zeros((BATCH, HEIGHT, WIDTH, 3), params["logit_scale"].dtype)
            model(image, jnp.zeros((BATCH, 77), jnp.int32), key=key, train=True)
        return masks

    def arrays(self) -> dict[str, np.ndarray]:
        state = jax.device_get(self.state)
        return dict(names.flatten(state["params"])) | dict(names.flatten(state["stats"]))


# ------------------------------------------------------------------ both


def make_batch(step: int) -> dict[str, np.ndarray]:
    """A batch as the loader yields it: rectangles, sometimes none; padded in every other step."""
    rng = np.random.default_rng([5, step])
    size = np.full((BATCH, 2), (HEIGHT, WIDTH), np.int32)
    if step % 2:
        size[1] = HEIGHT - 9, WIDTH - 21
    segment_map = np.zeros((BATCH, HEIGHT, WIDTH), np.uint8)
    classes = np.zeros((BATCH, SLOTS), np.int32)
    valid = np.zeros((BATCH, SLOTS), bool)
    for image in range(BATCH):
        count = 0 if (step + image) % 7 == 3 else int(rng.integers(1, SLOTS + 1))
        for slot in range(count):
            y, x = rng.integers(0, HEIGHT - 24), rng.integers(0, WIDTH - 40)
            segment_map[image, y : y + 20, x : x + 30] = slot + 1
        segment_map[image, size[image, 0] :], segment_map[image, :, size[image, 1] :] = 0, 0
        valid[image, :count] = [(segment_map[image] == s + 1).any() for s in range(count)]
        classes[image, :count] = rng.integers(0, reference.CLASSES, count)
    classes[~valid] = 0
    return {
        "image": rng.integers(0, 256, (BATCH, HEIGHT, WIDTH, 3)).astype(np.uint8),
        "image_size": size,
        "segment_map": segment_map,
        "classes": classes,
        "valid": valid,
        "text_ids": rng.integers(0, reference.CLASSES + 3, (BATCH, reference.TEXTS)).astype(
            np.int32
        ),
        "task": rng.integers(0, 3, BATCH).astype(np.int32),
    }


def make_texts() -> np.ndarray:
    """int32 [K+3, 77]: texts of several lengths, padded with 0 (spec 4.5)."""
    rng = np.random.default_rng(2)
    table = np.zeros((reference.CLASSES + 3, 77), np.int32)
    for i, row in enumerate(table):
        length = 3 + i % 4
        row[0], row[1:length], row[length] = 49406, rng.integers(300, 40000, length - 1), 49407
    return table


def make_models(case: Case) -> tuple[Any, OneFormerConfig]:
    """The port's model, not corrected, and the config of ours."""
    draws = {"drop_path_rate": DROP_PATH if case.draws else 0.0}
    fields = draws if case.kind in ("swin", "dinat") else {}
    dropout = 0.1 if case.draws else 0.0
    model = reference.make(
        reference.backbone_config(case.kind, **fields),
        seed=case.seed,
        dropout=dropout,
        train_num_points=NUM_POINTS,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = convert.read_model(folder).config
    if case.backbone == "resnet_batch":
        fields = {"norm": "batch"}
    return model, dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, **fields),
        text_causal=True,
        encoder_dropout=dropout,
        query_init_dropout=dropout,
    )


def make_pair(case: Case, dtype: str, patch: pytest.MonkeyPatch) -> tuple[Reference, Ours]:
    """Both sides, with the same weights."""
    model, config = make_models(case)
    theirs = Reference(model, case, patch)
    trees = functional.abstract(config, training=True)[1:]
    arrays = theirs.arrays(dict(convert.leaves(trees)))

    def fill(tree, prefix=""):
        return {
            key: fill(value, f"{prefix}{key}.") if isinstance(value, dict) else arrays[prefix + key]
            for key, value in tree.items()
        }

    texts = make_texts()
    used = int((texts > 0).sum(-1).max())
    return theirs, Ours(config, *map(fill, trees), case, texts[:, :used], dtype)


def other_matches(cost, query_of, matches) -> list[float]:
    """How much more the reference's matches cost than ours, by our costs, where they are others.

    Args:
      cost: [N, B, Q, M] of ours.
      query_of: [N, B, M] of ours, -1 for no match.
      matches: `Drawn.matches`.

    Returns:
      For each image and prediction whose matches differ, the difference relative to the sum.
    """
    more = []
    for prediction, images in matches.items():
        for image, theirs in enumerate(images):
            ours = {s: int(q) for s, q in enumerate(query_of[prediction, image]) if q >= 0}
            if theirs != ours:
                table = np.asarray(cost[prediction, image], np.float64)
                sums = [sum(table[q, s] for s, q in match.items()) for match in (theirs, ours)]
                more.append(abs(sums[0] - sums[1]) / abs(sums[1]))
    return more


def train(case: Case, dtype: str = "float32") -> dict[str, Any]:
    """Trains both sides and compares them.

    Returns:
      Plain values for JSON.
      losses: for each step the largest relative difference of a loss, and its name.
      matches: how many there were.
      other_matches: for each step in which matches differ, [step, `other_matches`].
      other_points: for how many masks the reference would have chosen other uncertain points.
      parameters: after ten and after all steps, {name: the largest difference over the largest
        value}, statistics included.
      moved: {name: how far they have moved from the start}, likewise.
    """
    texts = make_texts()
    solved = []
    solve = matcher._solve_with_scipy

    def record(cost, valid):
        solved.append((np.array(cost), solve(cost, valid)))
        return solved[-1][1]

    result: dict[str, Any] = {"losses": [], "matches": 0, "other_matches": [], "other_points": 0}
    result["parameters"] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matcher, "_solve_with_scipy", record)
        theirs, ours = make_pair(case, dtype, patch)
        start = theirs.arrays(ours.arrays())
        for step in range(case.steps):
            batch = make_batch(step)
            drawn = ours.drawn(batch)
            found = ours.step(batch, drawn)
            expected = theirs.step(batch, texts, drawn)
            assert set(found) - set(expected) == OTHER_METRICS
            errors = {
                name: abs(found[name] - value) / max(abs(value), 1e-6)
                for name, value in expected.items()
            }
            worst = max(errors, key=errors.get)
            result["losses"].append((errors[worst], worst))
            result["matches"] += sum(len(m) for images in drawn.matches.values() for m in images)
            if more := other_matches(*solved[step], drawn.matches):
                result["other_matches"].append((step, more))
            result["other_points"] += drawn.other_points
            if step + 1 in (10, case.steps):
                theirs_now, ours_now = theirs.arrays(start), ours.arrays()
                result["parameters"][step + 1] = {
                    name: reference.relative_error(ours_now[name], theirs_now[name])
                    for name in start
                }
        result["moved"] = {
            name: reference.relative_error(start[name], theirs_now[name]) for name in start
        }
    return result
