"""The training loop, top to bottom, and the evaluation of a workdir. Read this file first.

The loop gets its data handed in: it knows batches, not datasets. Everything that is compiled is
made in `state.py`; what is written to disk goes through `checkpoint.py` and `observe.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from oneformer_jax.models import backbones, matcher
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import checkpoint, observe, optim, sharding, start
from oneformer_jax.train import state as states
from oneformer_jax.train.evaluator import Evaluator, metric_names
from oneformer_jax.types import Metadata

Batch = Mapping[str, Any]


def train(
    config: ConfigDict,
    workdir: str,
    *,
    metadata: Metadata,
    text_table: np.ndarray,
    train_batches: Callable[[int], Iterator[Batch]],
    eval_batches: Callable[[int], Iterable[Batch]],
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
      eval_batches: gives this host's share of the evaluation batches, of an even sample of as many
        images as it is called with (0: all).
      mesh: devices; None makes the mesh of `config.mesh`.

    Raises:
      ValueError: the config, the workdir and the devices do not fit each other, or the training
        data ended.
      observe.NonFiniteLoss: a loss or gradient is not finite; the last checkpoint is intact.
    """
    # ---- Settings: what is wrong with them is said before anything is written -------------------
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batches(config, mesh)
    check_train(config, metadata)
    model = states.model_config(config, metadata.num_classes)
    losses, rates = states.loss_config(config), states.optim_config(config)
    evaluator = Evaluator(config, workdir, metadata, model, mesh)
    profiler = observe.ProfileTrigger(
        workdir, start=config.train.profile_start, steps=config.train.profile_steps
    )
    checkpoint.claim_workdir(workdir, model.to_dict(), config.to_json(indent=1), metadata)
    observe.quiet_libraries()
    steps = config.train.steps

    # Whatever ends the run: the stack ends the loader and waits for a save in the background.
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(
                workdir,
                keep=config.train.keep,
                keep_best=config.train.keep_best,
                best_metric=config.eval.best_metric if config.train.keep_best else None,
            )
        )

        # ---- Is anything left to do? ------------------------------------------------------------
        latest = checkpoints.latest_step()
        trained = latest is not None and latest >= steps
        results = evaluator.finished(latest) if trained else None
        tabulate = config.eval.token_table and not (trained and evaluator.has_token_table(latest))
        if results is not None and not tabulate:
            logging.info("%s is trained to step %d and evaluated: nothing to do", workdir, latest)
            evaluator.report(latest)
            return results

        # ---- Resume or start --------------------------------------------------------------------
        optimizer = optim.make_optimizer(rates, states.abstract_params(model))
        init = states.make_init(model, optimizer, ema=config.optim.ema_decay > 0)
        init_key, run_key = jax.random.split(jax.random.key(config.seed))
        abstract = jax.eval_shape(init, init_key)
        shardings = sharding.state_shardings(abstract, mesh)
        if latest is not None:
            logging.info("Resuming from step %d of %s", latest, workdir)
            target = sharding.with_shardings(abstract, shardings)
            state, position = checkpoints.restore(latest, target)
        else:
            kind = jax.devices()[0].device_kind
            logging.info("Starting in %s on %d %s", workdir, mesh.size, kind)
            # It runs once, so on a CPU compiling it without optimisation is what saves time.
            options = {"xla_backend_optimization_level": 0} if mesh_is_cpu(mesh) else None
            init = jax.jit(init, out_shardings=shardings, compiler_options=options)
            state, position = init(init_key), {"step": 0}
            family = backbones.kind_of(model.backbone)
            found = start.read_start(config.init, abstract["params"], abstract["stats"], family)
            if found is not None:
                start.log_start(found, config.init.backbone or config.init.checkpoint)
                state = start.apply_start(found, state)
            observe.log_parameters(state["params"])
        first_step = position["step"]
        writer = observe.make_writer(workdir, resume_step=first_step)
        stack.callback(writer.close)
        elapsed = position.get("chrono")
        chrono = observe.Chrono(first_step, steps, config.data.batch_size, state=elapsed)
        stack.callback(profiler.close)
        train_step = jax.jit(
            states.make_train_step(
                model,
                losses,
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

        # ---- Train ------------------------------------------------------------------------------
        data = train_batches(first_step) if first_step < steps else iter(())
        close_data = getattr(data, "close", lambda: None)  # ends loader processes
        stack.callback(close_data)
        window: list[dict] = []  # metrics, on the device, of the steps since the last log
        unchecked: tuple[dict, int, Any] | None = None
        for step in range(first_step + 1, steps + 1):
            with chrono.data():
                batch = next(data, None)
                if batch is None:
                    raise ValueError(
                        f"the training data ended before step {step} of train.steps = {steps}; "
                        "train_batches must give batches without end"
                    )
                arrays = {name: value for name, value in batch.items() if name != "index"}
                arrays = sharding.put_batch(arrays, mesh)
            profiler.before(step)
            state, metrics = train_step(state, arrays, run_key)
            if unchecked is not None:  # one step late, so that the device need not wait for us
                observe.check_finite(*unchecked)
            unchecked = (metrics, step, batch.get("index"))
            window.append(metrics)
            profiler.after(step, metrics)
            chrono.tick(step)

            last = step == steps
            log_now = last or due(step, config.train.log_every)
            eval_now = last or due(step, config.train.eval_every)
            save_now = eval_now or due(step, config.train.checkpoint_every)
            if log_now or save_now:
                # What is not finite is neither saved nor reported.
                observe.check_finite(*unchecked)
                unchecked = None
            if log_now:
                scalars = states.mean_metrics(window)
                window = []
                rate = optim.learning_rates(rates, step - 1)
                scalars |= {f"lr/{name}": value for name, value in rate.items()}
                scalars |= chrono.scalars(matcher.host_seconds())
                writer.write_scalars(step, scalars)
                writer.flush()
                logging.info("%s", chrono.line(scalars))
            with chrono.pause():
                if eval_now:
                    limit = 0 if last else config.eval.limit
                    results = evaluator.run(state, step, eval_batches, writer, limit=limit)
                if save_now:
                    position = {"step": step, "chrono": chrono.state()}
                    checkpoints.save(step, state, position, results if eval_now else None)
        profiler.close()
        report_omissions(data)
        close_data()

        # ---- Report -----------------------------------------------------------------------------
        last_step = max(first_step, steps)
        if results is None:  # trained by an earlier start, but not evaluated as asked now
            results = evaluator.run(state, last_step, eval_batches, writer)
        if tabulate:
            evaluator.token_table(state, last_step, eval_batches)
        checkpoints.wait_until_finished()
        evaluator.report(last_step)
        return results


def report_omissions(data: Iterator[Batch]) -> None:
    """Says what the loader left out, if it counts that: broken records, segments without a slot."""
    if broken := getattr(data, "broken", None):
        listed = "\n".join(f"  record {index}: {message}" for index, message in broken.items())
        logging.warning("%d broken records were skipped:\n%s", len(broken), listed)
    if dropped := getattr(data, "dropped_segments", 0):
        logging.warning("%d segments found no target slot: raise data.num_slots", dropped)


def mesh_is_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


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


def check_train(config: ConfigDict, metadata: Metadata) -> None:
    """ValueError that names the key if `config.train` or the metric of keep-best makes no sense."""
    for name, least in (("log_every", 1), ("eval_every", 0), ("checkpoint_every", 0)):
        if config.train[name] < least:
            meaning = " (0: at the end only)" if least == 0 else ""
            raise ValueError(
                f"train.{name} is {config.train[name]}; use {least} or more steps{meaning}"
            )
    names = metric_names(config, metadata)
    best = config.eval.best_metric
    if config.train.keep_best > 0 and best not in names:
        raise ValueError(
            f"eval.best_metric {best!r} is not among the metrics of eval.tasks: "
            f"{', '.join(names)}; use one of these, or train.keep_best=0"
        )


def evaluate_workdir(
    config: ConfigDict,
    workdir: str,
    *,
    metadata: Metadata,
    eval_batches: Callable[[int], Iterable[Batch]],
    checkpoint_step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float | None]:
    """Evaluates a checkpoint of `workdir` (None: the newest) and writes its results and pictures.

    Raises:
      CheckpointError: the workdir has no such checkpoint, or other classes than `metadata`.
      ValueError: `config.eval` and the devices do not fit each other.
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
    with contextlib.closing(observe.make_writer(os.path.join(workdir, "eval"))) as writer:
        results = evaluator.run(state, trained.step, eval_batches, writer)
    if config.eval.token_table:
        evaluator.token_table(state, trained.step, eval_batches)
    evaluator.report(trained.step)
    return results
