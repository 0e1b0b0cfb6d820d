"""The training state and the compiled training step.

State is a plain nested dict {step, halted, params, stats, opt[, ema]}; the module's structure is
closed over and merged with the parameters inside the differentiated function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.losses import LossConfig, compute_losses
from oneformer_jax.models.oneformer import OneFormerConfig, normalize_images
from oneformer_jax.train import fsdp, optim, settings, sharding
from oneformer_jax.types import TASK_TOKENS, Batch, layout

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Training:
    """Parts of training that config and mesh fix: the loop runs it, compile mode compiles it.

    Attributes:
      model: the architecture.
      execution: how it is run.
      init: seed -> state of step 0, on the devices; the same on any mesh.
      state: the abstract state, with shardings: for restore and for compilation.
      step: the compiled-on-demand step (state, batch, key) -> (state, metrics); donates the state.
    """

    model: OneFormerConfig
    execution: Execution
    init: Callable[[int], State]
    state: State
    step: Any

    @property
    def shardings(self) -> State:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def make_training(
    config: ConfigDict, num_classes: int, text_table: np.ndarray, mesh: jax.sharding.Mesh
) -> Training:
    """Puts together the training that `config` describes, on `mesh`, without compiling anything.

    Args:
      config: see `configs/common.py`.
      num_classes: of the dataset.
      text_table: int32 [K+3, T], the distinct texts.
      mesh: see `sharding.make_mesh`.
    """
    model, execution = settings.model_config(config, num_classes), settings.execution(config)
    rates, params = settings.optim_config(config), functional.abstract(model, training=True).params
    optimizer = optim.make_optimizer(rates, params)
    init = make_init(model, optimizer, ema=config.optim.ema_decay > 0)
    abstract = jax.eval_shape(lambda: init(None))
    shardings = sharding.state_shardings(abstract, mesh)
    step = make_train_step(
        model,
        settings.loss_config(config),
        optimizer,
        text_table,
        execution=execution,
        accumulate=config.optim.accumulate,
        ema_decay=config.optim.ema_decay,
        skip_nonfinite=config.train.on_nonfinite == "skip",
        frozen=optim.frozen(rates, params) if rates.freeze else None,
        mesh=mesh,
        param_shardings=shardings["params"] if mesh.shape["fsdp"] > 1 else None,
    )
    return Training(
        model,
        execution,
        lambda seed: sharding.put_state(init(seed), shardings),
        sharding.with_shardings(abstract, shardings),
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
    )


def abstract_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> Batch:
    """Describes the config's training batch: `jax.ShapeDtypeStruct` with sharding for arrays."""
    height, width = config.data.crop_size
    sizes = {
        "B": config.data.batch_size,
        "H": height,
        "W": width,
        "M": config.data.num_slots,
        "R": config.model.num_queries - config.model.num_context,
    }
    arrays = layout(Batch, sizes)
    return sharding.with_shardings(arrays, dict.fromkeys(arrays, sharding.batch_sharding(mesh)))


def abstract_eval_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Makes the abstract (image, image_size, task tokens) of a batch at the largest padded size."""
    size = sharding.round_up(config.eval.batch_size, mesh.size)
    height, width = (
        sharding.round_up(side, config.eval.bucket_multiple)
        for side in (config.eval.short_edge, config.eval.max_size)
    )
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return (
        jax.ShapeDtypeStruct((size, height, width, 3), jnp.uint8, sharding=split),
        jax.ShapeDtypeStruct((size, 2), jnp.int32, sharding=split),
        jax.ShapeDtypeStruct(TASK_TOKENS.shape[1:], jnp.int32, sharding=whole),
    )


def abstract_key(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """Returns the run's PRNG key, as the training step takes it."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def make_init(
    config: OneFormerConfig, optimizer: optax.GradientTransformation, *, ema: bool
) -> Callable[[int | None], State]:
    """Makes a function from a seed to the state of step 0, on the host; None: traced zeros."""

    def init(seed: int | None) -> State:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            _, params, stats = functional.init(config, seed, training=True)
            state = {
                "step": jnp.zeros((), jnp.int32),
                "halted": jnp.zeros((), jnp.bool_),
                "params": params,
                "stats": stats,
                "opt": optimizer.init(params),
            }
        return state | ({"ema": params} if ema else {})

    return init


def make_train_step(
    config: OneFormerConfig,
    losses: LossConfig,
    optimizer: optax.GradientTransformation,
    text_table: np.ndarray,
    *,
    execution: Execution = Execution(),
    accumulate: int = 1,
    ema_decay: float = 0.0,
    skip_nonfinite: bool = False,
    frozen: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    param_shardings: Any = None,
) -> Callable[[State, Batch, jax.Array], tuple[State, dict]]:
    """Makes the step (state, batch, key) -> (state, metrics), to be compiled, donating state.

    Args:
      config: the architecture.
      losses: the losses.
      optimizer: optax transformation over the parameters.
      text_table: int32 [K+3, T], the distinct texts.
      execution: how the model is run, and the kernels of the losses.
      accumulate: micro-batches; gradients and metrics are their means. The contrastive loss
        compares the images of a micro-batch.
      ema_decay: decay of the averaged parameters; 0 keeps none.
      skip_nonfinite: leave out the update of a step whose loss or gradient is not finite, and go
        on. Else such a step sets "halted": it and all after it leave everything else as it was, so
        that the last good state is there when the host notices.
      frozen: Booleans in the structure of the parameters: those that get no gradient. What only
        their gradients need is not computed. A backbone that is frozen as a whole normalises by
        its statistics, keeps them, and drops no paths.
      mesh: mesh whose axes shard the batch; the matcher runs per shard.
      param_shardings: how the parameters are split over the mesh; None: they are not.

    Returns:
      A pure function. `key` is the run's key; the step number is folded in. Metrics are float32
      scalars: `loss`, its terms, `grad_norm`, `param_norm`, `skipped_share` (1 if the update was
      left out).
    """
    graph = functional.abstract(config, execution, training=True).graph
    train = not (frozen and optim.holds_backbone(frozen))

    def loss_fn(params, stats, batch, key):
        if frozen is not None:
            params = jax.tree.map(
                lambda x, stays: jax.lax.stop_gradient(x) if stays else x, params, frozen
            )
        if param_shardings is None:
            model = functional.merge(graph, params, stats)
        else:
            model = fsdp.merge_gathered(graph, params, stats, param_shardings)
        model_key, point_key = jax.random.split(key)
        with functional.on_mesh(mesh):
            predictions = model(
                normalize_images(batch["image"], batch["image_size"]),
                jnp.asarray(TASK_TOKENS)[batch["task"]],
                text_tokens=jnp.asarray(text_table),
                text_ids=batch["text_ids"],
                key=model_key,
                train=train,
            )
        loss, terms = compute_losses(
            predictions, batch, point_key, losses, kernels=execution.kernels, mesh=mesh
        )
        return loss, ({"loss": loss} | terms, functional.split(model).stats)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(params, stats, batch, key):
        if accumulate == 1:
            (_, (metrics, stats)), grads = grad_fn(params, stats, batch, key)
            return grads, metrics, stats

        def micro(stats, part):
            (_, (metrics, stats)), grads = grad_fn(params, stats, part[0], part[1])
            return stats, (grads, metrics)

        def accumulate_one(carry, part):
            stats, total = carry
            stats, update = micro(stats, part)
            return (stats, jax.tree.map(jnp.add, total, update)), None

        parts = (split_batch(batch, accumulate), jax.random.split(key, accumulate))
        stats, first = micro(stats, jax.tree.map(lambda x: x[0], parts))
        rest = jax.tree.map(lambda x: x[1:], parts)
        (stats, total), _ = jax.lax.scan(accumulate_one, (stats, first), rest)
        grads, metrics = jax.tree.map(lambda x: x / accumulate, total)
        return grads, metrics, stats

    def train_step(state: State, batch: Batch, key: jax.Array) -> tuple[State, dict]:
        key = jax.random.fold_in(key, state["step"])
        params = state["params"]
        grads, metrics, stats = gradients(params, state["stats"], batch, key)
        updates, opt = optimizer.update(grads, state["opt"], params)
        new = {"params": optax.apply_updates(params, updates), "stats": stats, "opt": opt}
        if ema_decay:
            new["ema"] = jax.tree.map(
                lambda old, p: old + (1 - ema_decay) * (p - old), state["ema"], new["params"]
            )
        metrics["grad_norm"] = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        good &= ~state["halted"]
        new = {
            name: jax.tree.map(lambda n, o: jnp.where(good, n, o), tree, state[name])
            for name, tree in new.items()
        }
        if skip_nonfinite:
            new |= {"step": state["step"] + 1, "halted": state["halted"]}
        else:
            new |= {"step": jnp.where(good, state["step"] + 1, state["step"]), "halted": ~good}
        # Of the new parameters: an update that overflows is noticed before it is saved.
        metrics["param_norm"] = optax.tree.norm(new["params"])
        metrics["skipped_share"] = 1.0 - good.astype(jnp.float32)
        return new, metrics

    return train_step


def split_batch(batch: Batch, parts: int) -> Batch:
    """Cuts [B, ...] into [parts, B / parts, ...], every parts-th image: none changes device."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1), batch
    )


def mean_metrics(metrics: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Means over the steps, `skipped_share` apart without skipped ones; waits for the device."""
    fetched = jax.device_get(list(metrics))
    skipped = [m["skipped_share"] for m in fetched]
    fetched = [m for m, skip in zip(fetched, skipped, strict=True) if not skip] or fetched
    means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
    return means | {"skipped_share": float(np.mean(skipped))}
