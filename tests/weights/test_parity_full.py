"""Parity of two published models at full size; minutes long, and about 6 GB of memory."""

import jax
import pytest

from oneformer_jax.models import functional
from oneformer_jax.weights import convert
from tests.weights import torch_reference as reference

BACKBONES = {
    "swin": dict(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12),
    "dinat": dict(
        embed_dim=192,
        depths=[3, 4, 18, 5],
        num_heads=[6, 12, 24, 48],
        kernel_size=11,
        dilations=[
            [1, 20, 1],
            [1, 5, 1, 10],
            [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
            [1, 2, 1, 2, 1],
        ],
    ),
}
SIZE = 512


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "recipe"), [("swin", "swin_large"), ("dinat", "dinat_large")])
def test_full_size_logits_agree(kind, recipe, tmp_path):
    model = reference.make(
        reference.backbone_config(kind, **BACKBONES[kind]),
        training=False,
        num_queries=150,
        text_encoder_n_ctx=16,
        hidden_dim=256,
        conv_dim=256,
        mask_dim=256,
        num_attention_heads=8,
        encoder_layers=6,
        encoder_feedforward_dim=1024,
        dim_feedforward=2048,
        decoder_layers=10,
        id2label={i: str(i) for i in range(133)},
    )
    given = reference.inputs(SIZE, SIZE, batch=1)
    model.save_pretrained(tmp_path)
    found = convert.read_model(tmp_path)
    assert found.published == f"configs/coco.py:{recipe}"
    with reference.torch.no_grad():
        theirs = reference.run(model, given)
    expected = {
        "class": theirs.class_queries_logits.numpy(),
        "mask": theirs.masks_queries_logits.numpy(),
    }
    del model, theirs

    graph = functional.abstract(found.config, training=False).graph

    @jax.jit
    def run(params, stats, image, task_tokens):
        predictions = functional.merge(graph, params, stats)(image, task_tokens)
        return {"class": predictions.class_logits[-1], "mask": predictions.mask_logits()}

    ours = run(found.params, found.stats, given["image"], given["task_tokens"])
    errors = {name: reference.relative_error(ours[name], expected[name]) for name in expected}
    print(kind, errors)  # shown with -s, for the docs
    assert max(errors.values()) < 1e-4, errors
