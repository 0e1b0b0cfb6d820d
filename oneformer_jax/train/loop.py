"""The training loop, top to bottom, and the evaluation of a workdir. Read this file first.

The loop gets its data handed in: it knows batches, not datasets. Everything that is compiled is
made in `state.py`; what is written to disk goes through `checkpoint.py` and `observe.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from oneformer_jax.models import matcher
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import checkpoint, observe, optim, sharding
from oneformer_jax.train import state as states
from oneformer_jax.train.evaluator import Evaluator
from oneformer_jax.types import Metadata

Batch = Mapping[str, Any]


def train(
    config: ConfigDict,
    workdir: str,
    *,
    metadata: Metadata,
    text_table: np.ndarray,
    train_batches: Callable[[int], Iterator[Batch]],
    eval_batches: Callable[[], Iterable[Batch]],
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float | None]:
    """Trains to `config.train.steps`, resuming whatever `workdir` holds; returns the last metrics.

    Args:
      config: see `configs/common.py`.
      workdir: folder of checkpoints, logs, pictures and results; made if it is missing.
      metadata: the classes.
      text_table: int32 [K+3, T], token ids of the dataset's distinct texts.
      train_batches: gives this host's batches from a step on: batch s does not depend on where the
        iteration began.
      eval_batches: gives this host's share of the evaluation batches, from the first on.
      mesh: devices; None makes the mesh of `config.mesh`.

    Raises:
      ValueError: the config, the workdir and the devices do not fit each other.
      observe.NonFiniteLoss: a loss or gradient is not finite; the last checkpoint is intact.
    """
    # ---- Devices, model, step -------------------------------------------------------------------
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batches(config, mesh)
    model = states.model_config(config, metadata.num_classes)
    checkpoint.claim_workdir(workdir, model.to_dict(), config.to_json(indent=1), metadata)
    observe.quiet_libraries()
    rates = states.optim_config(config)
    optimizer = optim.make_optimizer(rates, states.abstract_params(model))
    init = states.make_init(model, optimizer, ema=config.optim.ema_decay > 0)
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    abstract = jax.eval_shape(init, init_key)
    shardings = sharding.state_shardings(abstract, mesh)
    train_step = jax.jit(
        states.make_train_step(
            model,
            states.loss_config(config),
            optimizer,
            text_table,
            accumulate=config.optim.accumulate,
            ema_decay=config.optim.ema_decay,
            mesh=mesh,
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    run_key = jax.device_put(run_key, sharding.replicated(mesh))
    evaluator = Evaluator(config, workdir, metadata, model, mesh)

    # ---- Resume or start ------------------------------------------------------------------------
    checkpoints = checkpoint.Checkpoints(
        workdir,
        keep=config.train.keep,
        keep_best=config.train.keep_best,
        best_metric=config.eval.best_metric,
    )
    steps = config.train.steps
    if (latest := checkpoints.latest_step()) is not None:
        logging.info("Resuming from step %d of %s", latest, workdir)
        target = sharding.with_shardings(abstract, shardings)
        state, position = checkpoints.restore(latest, target)
    else:
        logging.info("Starting in %s on %d %s", workdir, mesh.size, jax.devices()[0].device_kind)
        state, position = jax.jit(init, out_shardings=shardings)(init_key), {"step": 0}
        observe.log_parameters(state["params"])
    first_step = position["step"]
    writer = observe.make_writer(workdir, resume_step=first_step)
    chrono = observe.Chrono(first_step, steps, config.data.batch_size, state=position.get("chrono"))
    profiler = observe.ProfileTrigger(
        workdir, start=config.train.profile_start, steps=config.train.profile_steps
    )

    # ---- Train ----------------------------------------------------------------------------------
    data = train_batches(first_step) if first_step < steps else iter(())
    results: dict[str, float | None] = {}
    window: list[dict] = []  # metrics, on the device, of the steps since the last log
    unchecked: tuple[dict, int, Any] | None = None
    for step in range(first_step + 1, steps + 1):
        with chrono.data():
            batch = dict(next(data))
            index = batch.pop("index")
            batch = sharding.put_batch(batch, mesh)
        profiler.before(step)
        state, metrics = train_step(state, batch, run_key)
        if unchecked is not None:  # one step late, so that the device need not wait for the host
            observe.check_finite(*unchecked)
        unchecked = (metrics, step, index)
        window.append(metrics)
        profiler.after(step, metrics)
        chrono.tick(step)

        last = step == steps
        log_now = last or due(step, config.train.log_every)
        eval_now = last or due(step, config.train.eval_every)
        save_now = last or due(step, config.train.checkpoint_every)
        if log_now or eval_now or save_now:
            # What is not finite is neither saved nor reported.
            observe.check_finite(*unchecked)
            unchecked = None
        if log_now:
            scalars = states.mean_metrics(window)
            window = []
            scalars |= {f"lr/{name}": v for name, v in optim.learning_rates(rates, step - 1).items()}
            scalars |= chrono.scalars(matcher.host_seconds())
            writer.write_scalars(step, scalars)
            writer.flush()
            logging.info("%s", chrono.line(scalars))
        with chrono.pause():
            if eval_now:
                limit = None if last else config.eval.limit or None
                results = evaluator.run(state, step, eval_batches, writer, limit=limit)
            if save_now or eval_now:
                position = {"step": step, "chrono": chrono.state()}
                checkpoints.save(step, state, position, results if eval_now else None)
    profiler.close()
    if hasattr(data, "close"):
        data.close()  # ends loader processes
    checkpoints.close()

    # ---- Report ---------------------------------------------------------------------------------
    if not results:
        results = evaluator.finished(steps) or evaluator.run(state, steps, eval_batches, writer)
    if config.eval.token_table:
        evaluator.token_table(state, steps, eval_batches)
    writer.close()
    evaluator.report(steps)
    return results


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at `step`."""
    return every > 0 and step % every == 0


def check_batches(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """ValueError that names the key if batches, micro-batches and devices do not divide."""
    size, parts = config.data.batch_size, config.optim.accumulate
    if parts < 1 or size % parts:
        raise ValueError(f"optim.accumulate {parts} does not divide data.batch_size {size}")
    name = (
        "data.batch_size"
        if parts == 1
        else f"data.batch_size / optim.accumulate ({size}/{parts}) ="
    )
    sharding.check_batch(size // parts, mesh, name)
    sharding.check_batch(config.eval.batch_size, mesh, "eval.batch_size")


def evaluate_workdir(
    config: ConfigDict,
    workdir: str,
    *,
    metadata: Metadata,
    eval_batches: Callable[[], Iterable[Batch]],
    checkpoint_step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float | None]:
    """Evaluates a checkpoint of `workdir` (None: the newest) and writes its results and pictures.

    Raises:
      CheckpointError: the workdir has no such checkpoint, or other classes than `metadata`.
    """
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    observe.quiet_libraries()
    path = workdir
    if checkpoint_step is not None:
        path = os.path.join(workdir, checkpoint.CHECKPOINT_FOLDER, str(checkpoint_step))
    trained = checkpoint.load_for_inference(path)
    if trained.metadata != metadata:
        raise checkpoint.CheckpointError(
            f"{workdir} was trained on the classes of {trained.metadata.dataset}, which are not "
            f"those of the dataset of this config ({metadata.dataset})"
        )
    model = OneFormerConfig.from_dict(trained.model)
    evaluator = Evaluator(config, workdir, metadata, model, mesh)
    state = jax.device_put(
        {"params": trained.params, "stats": trained.stats}, sharding.replicated(mesh)
    )
    writer = observe.make_writer(os.path.join(workdir, "eval"))
    results = evaluator.run(state, trained.step, eval_batches, writer)
    if config.eval.token_table:
        evaluator.token_table(state, trained.step, eval_batches)
    writer.close()
    evaluator.report(trained.step)
    return results
