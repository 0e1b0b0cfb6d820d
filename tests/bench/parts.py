"""Profile: the time, operations and memory traffic of each part of the model and of a step.

    python -m tests.bench.parts                      # the sizes that suit this device
    python -m tests.bench.parts --sizes=tiny --repeats=10

Each part is compiled and timed on its own, with what it gets in the model: forward, and forward
with the gradients of its parameters and inputs. FLOPs and bytes are the compiler's count, which
takes a loop's body once and knows nothing of a callback. The last rows are the whole programs; what
they take beyond the sum of the parts is spent between the parts, or not at all where the compiler
fuses them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oneformer_jax.kernels.ms_deform_attn import ms_deform_attn
from oneformer_jax.models import functional
from oneformer_jax.models.losses import LossConfig, compute_losses
from oneformer_jax.models.matcher import match
from oneformer_jax.models.oneformer import normalize_images
from oneformer_jax.train import optim
from oneformer_jax.types import Features, Predictions
from tests.bench.peer_models import SIZES, Ours, Size, task_tokens, write_weights
from tests.bench.peers import chosen, machine, suitable_sizes, timed

# (name, function, arguments, whether it has gradients)
Part = tuple[str, Callable, tuple, bool]


def parts(size: Size, folder: str) -> Iterator[Part]:
    """The parts of the model in `folder`, each with arguments of the run's shapes."""
    ours = Ours(size, folder, training=True)
    config, execution, given = ours.config, ours.execution, ours.given
    graph = functional.abstract(config, execution, training=True).graph
    params, stats = ours.params, ours.stats

    def method(call: Callable) -> Callable:
        """`call(model, *inputs)` as a function of the parameters that it reads and its inputs."""
        return lambda params, *inputs: call(functional.merge(graph, params, stats), *inputs)

    image = jax.jit(normalize_images)(given["image"], given["image_size"])
    tokens = np.broadcast_to(task_tokens(), (size.batch, task_tokens().shape[0]))
    backbone = method(lambda model, x: model.backbone(x))
    yield "backbone", backbone, (params, image), True
    maps = jax.jit(backbone)(params, image)
    decoder = method(lambda model, *maps: model.pixel_decoder(maps))
    yield "pixel decoder", decoder, (params, *maps), True
    mask_features, encoded = jax.jit(decoder)(params, *maps)
    yield (f"of it sampling, x {config.encoder_layers}", *_sampling(config, execution, encoded))

    def predict(model, mask_features, *maps):
        return model.decode(Features(mask_features, maps), tokens)

    yield "decoder", method(predict), (params, mask_features, *encoded), True
    predictions = jax.jit(method(predict))(params, mask_features, *encoded)

    table = given["text_table"]
    table = jnp.asarray(table[:, : int(np.argmax(table, 1).max()) + 1])
    ids = given["text_ids"]

    def texts(model):
        return model.encode_texts(table, ids)

    yield "texts", method(texts), (params,), True
    text_queries = jax.jit(method(texts))(params)

    key, losses = jax.random.key(0), LossConfig(num_points=size.points)

    def loss(class_logits, mask_embed, features, queries, text_queries):
        found = Predictions(
            class_logits,
            mask_embed,
            features,
            queries,
            text_queries=text_queries,
            logit_scale=jnp.float32(2.0),
        )
        return compute_losses(found, ours.batch, key, losses, kernels=execution.kernels)[0]

    inputs = (
        predictions.class_logits,
        predictions.mask_embed,
        mask_features,
        predictions.queries,
        text_queries,
    )
    yield "losses with matching", loss, inputs, True
    count, batch, queries, _ = predictions.class_logits.shape
    costs = jax.random.uniform(key, (count, batch, queries, size.slots))
    yield "of it assignment", lambda c: match(c, given["valid"])[0], (costs,), False

    abstract = functional.abstract(config, training=True).params
    optimizer = optim.make_optimizer(optim.OptimConfig(steps=1000), abstract)
    state = jax.jit(optimizer.init)(params)

    def update(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    yield "optimizer", update, (params, params, state), False

    def forward(params):
        features = functional.encode(ours_graph, params, stats, image)
        found = functional.decode(ours_graph, params, stats, features, tokens)
        return found.class_logits[-1], found.mask_logits()

    ours_graph = functional.abstract(config, execution, training=False).graph
    yield "whole prediction", forward, (params,), False
    step = ours.step.__wrapped__
    yield "whole training step", step, (ours.state, ours.batch, ours.key), False


def _sampling(config: Any, execution: Any, maps: Any) -> tuple[Callable, tuple, bool]:
    """The deformable attention of all encoder layers, at points near to the queries."""
    shapes = tuple(x.shape[1:3] for x in maps)
    batch, heads = len(maps[0]), config.num_heads
    pixels = sum(h * w for h, w in shapes)
    keys = jax.random.split(jax.random.key(1), 3)
    value = jax.random.normal(keys[0], (batch, pixels, heads, config.hidden_dim // heads))
    centres = np.concatenate(
        [
            np.stack(np.meshgrid(np.arange(w) / w, np.arange(h) / h), -1).reshape(-1, 2)
            for h, w in shapes
        ]
    ).astype(np.float32)
    each = (batch, pixels, heads, len(shapes), config.encoder_points)
    near = 0.02 * jax.random.normal(keys[1], (*each, 2)) + centres[None, :, None, None, None]
    weights = jax.random.uniform(keys[2], each)

    def sample(value, locations, weights):
        for _ in range(config.encoder_layers):
            out = ms_deform_attn(
                value, shapes, locations, weights, implementation=execution.kernels.deform_attn
            )
            value = out.reshape(value.shape).astype(value.dtype)
        return value

    return sample, (value.astype(execution.compute_dtype), near, weights), True


def with_gradients(function: Callable) -> Callable:
    """The gradients of the sum of a function's float results in all of its arguments."""

    def total(*arguments):
        found = jax.tree.leaves(function(*arguments))
        return sum(
            jnp.sum(x.astype(jnp.float32)) for x in found if jnp.issubdtype(x.dtype, jnp.floating)
        )

    def gradients(*arguments):
        return jax.grad(total, argnums=tuple(range(len(arguments))))(*arguments)

    return gradients


def measure(function: Callable, arguments: tuple, repeats: int) -> dict[str, float]:
    """Compiles and times a function: medians of `repeats` calls after a first one."""
    compiled = jax.jit(function).lower(*arguments).compile()
    times = timed(lambda: jax.block_until_ready(compiled(*arguments)), repeats)
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return {
        **times,
        "flops": cost.get("flops", 0.0),
        "bytes": cost.get("bytes accessed", 0.0),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def row(name: str, found: dict[str, float], whole: float | None = None) -> str:
    cells = [
        name,
        f"{1e3 * found['wall_seconds']:,.1f} ms",
        f"{1e3 * found['processor_seconds']:,.1f} ms",
        f"{found['flops'] / 1e9:,.2f}",
        f"{found['bytes'] / 1e9:,.2f}",
        f"{found['temporary_bytes'] / 1e6:,.0f} MB",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="", help="of " + ", ".join(SIZES))
    parser.add_argument("--only", default="", help="parts whose name holds this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    sizes = chosen(parser, "sizes", options.sizes or suitable_sizes(), tuple(SIZES))
    print(machine(), flush=True)
    results = []
    for name in sizes:
        print(f"\n| {name} | wall | processor | GFLOP | GB moved | temporary |")
        print("|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            write_weights(SIZES[name], folder)
            for part, function, arguments, differentiable in parts(SIZES[name], folder):
                if options.only not in part:
                    continue
                ways = [(part, function)]
                if differentiable:
                    ways.append((f"{part}, with gradients", with_gradients(function)))
                for way, call in ways:
                    found = measure(call, arguments, options.repeats)
                    results.append({"size": name, "part": way, **found})
                    print(row(way, found), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
