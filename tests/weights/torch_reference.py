"""`transformers`' OneFormer with random weights: what the parity tests compare with.

Nothing is left at zero, so no path through the model is silent. Its text encoder never applies the
causal mask and reads all 77 positions, so our side is made with `text_causal=False`. It cannot run
a DiNAT: it asks for an old NATTEN, and release 5 hands it transposed arrays. Both are mended here
by a dense neighbourhood attention written from the rule (spec 1.1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from oneformer_jax.models import points
from oneformer_jax.models.points import Purpose
from oneformer_jax.weights import files

torch = pytest.importorskip(
    "torch", reason="PyTorch is missing: `make test-all` installs it (group parity)"
)
transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: `make test-all` installs it (group parity)"
)

from transformers.models.dinat import modeling_dinat  # noqa: E402
from transformers.models.oneformer import modeling_oneformer  # noqa: E402
from transformers.models.swin import modeling_swin  # noqa: E402

STAGES = ["stage1", "stage2", "stage3", "stage4"]
CLASSES = 5
TEXTS = 9


def backbone_config(kind: str, **fields):
    """Config of a small backbone of `transformers`; `fields` replace some of its sizes."""
    common = {"out_features": STAGES, "depths": [1, 1, 2, 1]}
    if kind == "swin":
        sizes = {"embed_dim": 16, "num_heads": [1, 2, 4, 8], "window_size": 4}
        sizes |= {"drop_path_rate": 0.0}
        return transformers.SwinConfig(**(common | sizes | fields))
    if kind == "convnext":
        sizes = {"hidden_sizes": [16, 24, 32, 48]}
        return transformers.ConvNextConfig(**(common | sizes | fields))
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [32, 64, 128, 256]}
        sizes |= {"layer_type": "bottleneck"}
        return transformers.ResNetConfig(**(common | sizes | fields))
    if kind == "dinat":
        sizes = {"embed_dim": 16, "num_heads": [1, 2, 4, 8], "kernel_size": 3, "mlp_ratio": 2.0}
        sizes |= {"dilations": [[3], [1], [1, 2], [1]], "drop_path_rate": 0.0}
        return transformers.DinatConfig(**(common | sizes | fields))
    raise ValueError(kind)


def _neighbours(length: int, kernel_size: int, dilation: int):
    """int64 [length, k]: what a position sees along an axis, and the index of the bias for it."""
    positions = []
    for i in range(length):
        members = np.arange(i % dilation, length, dilation)
        start = np.clip(i // dilation - kernel_size // 2, 0, len(members) - kernel_size)
        positions.append(members[start : start + kernel_size])
    positions = np.stack(positions)
    bias = (positions - np.arange(length)[:, None]) // dilation + kernel_size - 1
    return torch.from_numpy(positions), torch.from_numpy(bias)


def _rows(x, rows, columns):
    """[B, N, H, W, D] at row neighbour a of each pixel and all column neighbours, for each a."""
    for a in range(rows.shape[1]):
        yield a, x[:, :, rows[:, a]][:, :, :, columns]  # [B, N, H, W, k, D]


def _dense_logits(query, key, rpb, kernel_size, dilation):
    query, key = (x.permute(0, 3, 2, 1, 4) for x in (query, key))  # from [B, W, H, N, D]
    rows, row_bias = _neighbours(query.shape[2], kernel_size, dilation)
    columns, column_bias = _neighbours(query.shape[3], kernel_size, dilation)
    logits = []
    for a, part in _rows(key, rows, columns):
        bias = rpb[:, row_bias[:, a, None, None], column_bias[None]]  # [N, H, W, k]
        logits.append(torch.einsum("bnhwd,bnhwkd->bnhwk", query, part) + bias)
    return torch.cat(logits, -1)


def _dense_sums(attention, value, kernel_size, dilation):
    value = value.permute(0, 3, 2, 1, 4)
    rows, _ = _neighbours(value.shape[2], kernel_size, dilation)
    columns, _ = _neighbours(value.shape[3], kernel_size, dilation)
    weights = attention.split(kernel_size, -1)
    return sum(
        torch.einsum("bnhwk,bnhwkd->bnhwd", weights[a], part)
        for a, part in _rows(value, rows, columns)
    )


modeling_dinat.natten2dqkrpb = _dense_logits
modeling_dinat.natten2dav = _dense_sums
modeling_dinat.requires_backends = lambda *unused: None


def make(backbone, *, seed: int = 0, training: bool = True, **fields):
    """A small model in evaluation mode, its parameters and statistics random."""
    sizes = dict(
        num_queries=12,
        text_encoder_n_ctx=12 - TEXTS,
        hidden_dim=64,
        conv_dim=64,
        mask_dim=64,
        num_attention_heads=2,
        encoder_layers=2,
        encoder_feedforward_dim=96,
        query_dec_layers=2,
        dim_feedforward=80,
        decoder_layers=4,
        text_encoder_width=64,
        text_encoder_num_layers=2,
        train_num_points=64,
        dropout=0.0,  # a model with a text branch would drop out in evaluation too
        is_training=training,
        id2label={i: str(i) for i in range(CLASSES)},
    )
    config = transformers.OneFormerConfig(backbone_config=backbone, **(sizes | fields))
    torch.manual_seed(seed)
    model = transformers.OneFormerForUniversalSegmentation(config).eval()
    randomise(model)
    return model


def randomise(model) -> None:
    """Adds noise to everything that is learned or counted, variances kept positive."""
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if not x.is_floating_point() or "empty_weight" in name:
                continue
            x.add_(torch.randn(x.shape) * 0.05)
            if name.endswith("running_var"):
                x.abs_().add_(0.5)


def inputs(height, width, *, batch: int = 2, seed: int = 0, texts: int = TEXTS) -> dict:
    """image float32 [B, H, W, 3]; task_tokens [B, 77], text_table [4, 77], text_ids [B, T]."""
    rng = np.random.default_rng(seed)
    task = np.zeros((batch, 77), np.int32)
    task[:, :6] = (49406, 518, 10549, 533, 34572, 49407)
    task[1::2, :7] = (49406, 518, 10549, 533, 29119, 1550, 49407)
    table = np.zeros((4, 77), np.int32)
    for length, row in enumerate(table, 3):
        row[0], row[1:length], row[length] = 49406, rng.integers(300, 40000, length - 1), 49407
    return {
        "image": rng.normal(size=(batch, height, width, 3)).astype(np.float32),
        "task_tokens": task,
        "text_table": table,
        "text_ids": rng.integers(0, 4, (batch, texts)).astype(np.int32),
    }


def targets(height: int, width: int, *, batch: int = 2, slots: int = 6, seed: int = 0) -> dict:
    """Rectangles as an id map: segment_map uint8 [B, H, W], classes int32 and valid bool [B, M]."""
    rng = np.random.default_rng(seed)
    segment_map = np.zeros((batch, height, width), np.uint8)
    classes = np.zeros((batch, slots), np.int32)
    valid = np.zeros((batch, slots), bool)
    for b in range(batch):
        count = 2 + b
        for slot in range(count):
            y, x = rng.integers(0, height - 16), rng.integers(0, width - 16)
            segment_map[b, y : y + 40, x : x + 40] = slot + 1
        classes[b, :count] = rng.integers(0, CLASSES, count)
        valid[b] = [(segment_map[b] == slot + 1).any() for slot in range(slots)]
    classes[~valid] = 0
    return {"segment_map": segment_map, "classes": classes, "valid": valid}


def run(model, given: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray] | None = None):
    """The model's outputs; with `labels` also its loss, which `backward` differentiates."""
    arguments: dict[str, Any] = {
        "pixel_values": torch.from_numpy(given["image"]).permute(0, 3, 1, 2),
        "task_inputs": torch.from_numpy(given["task_tokens"]).float(),
    }
    if model.config.is_training:
        texts = given["text_table"][given["text_ids"]]
        arguments["text_inputs"] = torch.from_numpy(texts).long()
    if labels is not None:
        masks, classes = [], []
        for segment_map, ids, valid in zip(*labels.values(), strict=True):
            slots = np.flatnonzero(valid)
            stack = np.stack([segment_map == slot + 1 for slot in slots])
            masks.append(torch.from_numpy(stack.astype(np.float32)))
            classes.append(torch.from_numpy(ids[slots]).long())
        arguments |= {"mask_labels": masks, "class_labels": classes}
    return model(**arguments, output_hidden_states=True, output_auxiliary_logits=True)


@contextlib.contextmanager
def points_of(key, model, labels: Mapping[str, np.ndarray], num_predictions: int) -> Iterator[None]:
    """Lets the criterion draw the points that our losses draw from `key` ("per_mask")."""
    criterion, matcher = model.criterion, model.criterion.matcher
    slots = [np.flatnonzero(valid) for valid in labels["valid"]]
    batch = len(slots)
    state = {"prediction": num_predictions - 1, "image": 0, "indices": None}
    matching, losses = matcher.forward, criterion.loss_masks

    def match(*args, **kwargs):
        state["image"] = 0
        state["indices"] = matching(*args, **kwargs)
        return state["indices"]

    def loss_masks(*args, **kwargs):
        result = losses(*args, **kwargs)
        # The final prediction comes first, then the others in their order.
        state["prediction"] = (state["prediction"] + 1) % num_predictions
        return result

    def rand(*shape, device=None):
        n = state["prediction"]
        if state["image"] < batch:  # the matcher draws once for every image
            image, state["image"] = state["image"], state["image"] + 1
            drawn = points.draw_points(key, Purpose.MATCHING, n, 0, batch, shape[1])[image][None]
            return torch.from_numpy(np.array(drawn))
        candidates = shape[1] == int(criterion.num_points * criterion.oversample_ratio)
        purpose = Purpose.CANDIDATES if candidates else Purpose.FRESH
        drawn = [
            points.draw_points(key, purpose, n, int(slots[b][j]), batch, shape[1])[b]
            for b, (_, columns) in enumerate(state["indices"])
            for j in columns
        ]
        return torch.from_numpy(np.stack(drawn))

    patch = pytest.MonkeyPatch()
    patch.setattr(matcher, "forward", match)
    patch.setattr(criterion, "loss_masks", loss_masks)
    patch.setattr(torch, "rand", rand)
    try:
        yield
    finally:
        patch.undo()


def relative_error(ours, theirs) -> float:
    """Largest difference over the largest absolute value of theirs."""
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs.detach() if hasattr(theirs, "detach") else theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def gradients(model, folder) -> dict[str, np.ndarray]:
    """The gradients under the names that a file gives the parameters; 0 where there is none.

    They are written as if they were the parameters, since only `save_pretrained` knows the names.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    model.save_pretrained(folder)
    return {name: tensor.read() for name, tensor in files.open_tensors(folder).tensors.items()}


def correct_the_port(patch: pytest.MonkeyPatch, model) -> None:
    """Makes the port compute what the official code does (by the spec of it)."""

    def text_layer(self, hidden_states, key_padding_mask=None):
        # Spec 0.1 and 1.7: the port stores the causal mask and never applies it.
        length = hidden_states.shape[0]
        mask = torch.full((length, length), -torch.inf).triu(1)
        y = self.layer_norm1(hidden_states)
        y = self.self_attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        hidden_states = hidden_states + y
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))

    patch.setattr(modeling_oneformer.OneFormerTextTransformerLayer, "forward", text_layer)
    # Spec 1.1: both branches of a Swin block have drop path; the port's second one has none.
    for block in model.modules():
        if isinstance(block, modeling_swin.SwinLayer):
            block.mlp = torch.nn.Sequential(block.mlp, block.drop_path)
