"""The training loop, top to bottom, and the evaluation of a workdir. Read this file first.

The loop gets its data handed in: it knows batches, not datasets. Everything that is compiled is
made in `state.py`; what is written to disk goes through `checkpoint.py` and `observe.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from oneformer_jax.kernels import calibrate, chips
from oneformer_jax.models import matcher
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import (
    checkpoint,
    compiled,
    dashboards,
    descriptions,
    kernel_choice,
    observe,
    optim,
    settings,
    sharding,
    start,
    trackers,
)
from oneformer_jax.train import state as states
from oneformer_jax.train.evaluator import Batches, Evaluator, metric_names
from oneformer_jax.train.flops import count_flops
from oneformer_jax.train.patience import Patience
from oneformer_jax.train.replay import ImageIds, Watch
from oneformer_jax.train.runtime import folders
from oneformer_jax.train.runtime.distributed import compile_everywhere, wait_for_all
from oneformer_jax.train.runtime.preemption import Preempted, Preemption
from oneformer_jax.train.runtime.workdir import check_room, differing_classes, hold
from oneformer_jax.types import LoadedBatch, Metadata


def train(
    config: ConfigDict,
    workdir: str,
    *,
    metadata: Metadata,
    text_table: np.ndarray,
    train_batches: Callable[[int], Iterator[LoadedBatch]],
    eval_batches: Batches,
    image_ids: ImageIds | None = None,
    mesh: jax.sharding.Mesh | None = None,
    compiled_step: str = "",
) -> dict[str, float | None]:
    """Trains to `config.train.steps`, resuming whatever `workdir` holds; returns the last metrics.

    With `config.train.patience` it may end earlier: see `patience.Patience`.

    Args:
      config: see `configs/common.py`.
      workdir: folder of checkpoints, logs, pictures and results; made if it is missing.
      metadata: the classes.
      text_table: int32 [K+3, T], token ids of the dataset's distinct texts.
      train_batches: gives this host's batches from a step on: batch s does not depend on where the
        iteration began.
      eval_batches: gives this host's share of the evaluation batches, of an even sample of as many
        images as it is called with (0: all).
      image_ids: positions in the training data -> image ids, to name the images of a bad batch.
      mesh: devices; None makes the mesh of `config.mesh`.
      compiled_step: file of the training step and its digest, see `compiled.take`; "" compiles it.

    Raises:
      ValueError: the config, the workdir and the devices do not fit each other, another run is in
        the workdir, it cannot be written, or the training data ended.
      observe.NonFiniteLoss: a loss or gradient is not finite; the last good state is kept.
      Preempted: SIGTERM or SIGINT (Ctrl-C) came; the state is saved.
    """
    started = time.monotonic()
    workdir = os.fspath(folders.locate(workdir))
    # ---- Settings: what is wrong with them is said before anything is written -------------------
    config = settings.checked(config)  # but for the data, which is handed in
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batches(config.data.batch_size, config.optim.accumulate, mesh)
    check_best_metric(config, metadata)
    trackers.check(config.log)
    model = settings.model_config(config, metadata.num_classes)
    rates = settings.optim_config(config)
    evaluator = Evaluator(config, workdir, metadata, model, mesh)
    profiler = observe.ProfileTrigger(
        workdir, start=config.train.profile_start, steps=config.train.profile_steps
    )
    watch = Watch(workdir, config.train.on_nonfinite, image_ids)
    observe.quiet_libraries()
    steps = config.train.steps
    make = functools.partial(states.make_training, config, metadata.num_classes, text_table, mesh)
    taken = None
    if compiled_step:
        taken = compiled.take(compiled_step, make(), config, mesh, text_table)

    # Whatever ends the run: the stack ends the loader and waits for a save in the background.
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(workdir))
        descriptions.claim_workdir(workdir, model.to_dict(), config.to_json(indent=1), metadata)
        preemption = stack.enter_context(Preemption(mesh))
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(
                workdir,
                keep=config.train.keep,
                keep_best=config.train.keep_best,
                best_metric=config.eval.best_metric if config.train.keep_best else None,
            )
        )

        def saved() -> None:
            calibrate.withdraw()  # what ends the run is no kernel's fault
            checkpoints.wait_until_finished()

        preemption.rest(saved)

        # ---- Is anything left to do? ------------------------------------------------------------
        latest = checkpoints.latest_step()
        patience = _patience(config, checkpoints, latest)
        stopped = patience.over()
        trained = latest is not None and (latest >= steps or stopped)
        results = evaluator.finished(latest, whole=True) if trained else None
        tabulate = config.eval.token_table and not (trained and evaluator.has_token_table(latest))
        if results is not None and not tabulate:
            logging.info("%s is trained to step %d and evaluated: nothing to do", workdir, latest)
            if stopped:
                logging.info("%s", patience)
            evaluator.report(latest)
            return results

        # ---- Resume or start --------------------------------------------------------------------
        training = make()
        if taken:
            training = dataclasses.replace(training, step=taken.step)
        _, run_key = jax.random.split(jax.random.key(config.seed))
        if latest is not None:
            newest = latest
            latest, state, position = checkpoints.restore_newest(training.state)
            results = results if latest == newest else None
            patience = _patience(config, checkpoints, latest)  # it may be an earlier one
            logging.info("Resuming from step %d of %s", latest, workdir)
        else:
            kind = jax.devices()[0].device_kind
            logging.info("Starting in %s on %d %s", workdir, mesh.size, kind)
            state, position = training.init(config.seed), {}
            found = start.read_start(
                config.init, training.state["params"], training.state["stats"], model.backbone
            )
            if found is not None:
                start.log_start(found, config.init.backbone or config.init.checkpoint)
                state = start.apply_start(found, state)
            logging.info("Parameters:\n%s", observe.parameter_overview(state["params"]))
        check_room(workdir, state)
        first_step = latest or 0
        make_trackers = functools.partial(trackers.make, workdir, config.log)
        writer = observe.make_writer(workdir, first_step, make_trackers)
        stack.callback(writer.close)
        if not first_step:
            writer.write_hparams(dashboards.compared(config.to_dict()))
        writer.write_texts(first_step, dashboards.texts(config.to_json(indent=1)))
        rate = chips.peak_flops(mesh.devices.flat[0])
        chrono = observe.Chrono(
            first_step,
            steps,
            config.data.batch_size,
            state=position.get("chrono"),
            peak_flops=rate and rate * mesh.size,
            started=started,
        )
        abstract = (training.state, states.abstract_batch(config, mesh), states.abstract_key(mesh))
        choose_kernels = kernel_choice.chooser(
            training.execution.kernels, mesh, workdir, gradients=True
        )
        if choose_kernels is not None and first_step < steps and not taken:
            choose_kernels(training.step, *abstract)
        if rate and taken:
            chrono.set_step_flops(taken.flops)
        elif rate:
            traced = training.step.trace(*abstract)
            chrono.set_step_flops(count_flops(traced.jaxpr))
        stack.callback(profiler.close)
        run_key = sharding.put_key(run_key, mesh)

        def evaluate(step: int, limit: int = 0, counts: bool = True) -> dict[str, float | None]:
            with preemption.at_rest(saved), chrono.pause("evaluation"):
                scores = evaluator.run(state, step, eval_batches, writer, limit=limit)
                if counts:  # not beside scores of the same step on a sample
                    checkpoints.record(step, scores)
                    patience.note(step, scores)
            return scores

        def place(step: int) -> dict[str, Any]:
            return {"step": step, "chrono": chrono.state(), "evaluations": patience.state()}

        # ---- Train ------------------------------------------------------------------------------
        # A transfer that nobody asked for would make every step wait: it is an error.
        stack.enter_context(jax.transfer_guard("disallow"))
        if 0 < first_step < steps and due(first_step, config.train.eval_every):
            # An earlier start saved this step, but was stopped before its evaluation was done.
            scored = checkpoints.scores_of(first_step) is not None
            if not scored or evaluator.finished(first_step) is None:
                results = evaluate(first_step, config.eval.limit)
                results = None if config.eval.limit else results
            preemption.rest(saved)
        stopped = first_step < steps and patience.over()
        steps = first_step if stopped else steps
        data = train_batches(first_step) if first_step < steps else iter(())
        close_data = getattr(data, "close", lambda: None)  # ends loader processes
        stack.callback(close_data)
        window: list[dict] = []  # metrics, on the device, of the steps since the last log
        for step in range(first_step + 1, steps + 1):
            with chrono.data():
                try:
                    batch = next(data, None)
                except Exception:
                    # A signal to the whole process group ends loader processes too. (With several
                    # hosts, others may be ahead by a step: then the last checkpoint has to do.)
                    if not preemption.came() or step == first_step + 1 or jax.process_count() > 1:
                        raise
                    watch.check(state)
                    checkpoints.save(step - 1, state, place(step - 1))
                    saved()
                    raise Preempted(step - 1) from None
                if batch is None:
                    raise ValueError(
                        f"the training data ended before step {step} of train.steps = {steps}; "
                        "train_batches must give batches without end"
                    )
                arrays = {name: value for name, value in batch.items() if name != "index"}
                arrays = sharding.put_batch(arrays, mesh)
            if step == first_step + 1:
                if taken:
                    wait_for_all("the training step compiled")
                else:
                    name = "the training step"
                    compile_everywhere(training.step, state, arrays, run_key, name=name)
                logging.info("Step %d begins after %.0f s", step, time.monotonic() - started)
            profiler.before(step)
            state, metrics = training.step(state, arrays, run_key)
            preemption.wake()  # the first step is compiled: from now on there is something to lose
            watch.check(state)  # of the step before, so that the device need not wait for us
            watch.add(step, metrics, batch)
            window.append(metrics)
            profiler.after(step, metrics)
            chrono.tick(step)

            last = step == steps
            stop = preemption.poll() and not last
            log_now = last or due(step, config.train.log_every)
            eval_now = last or due(step, config.train.eval_every)
            save_now = eval_now or stop or due(step, config.train.checkpoint_every)
            if log_now or save_now:
                watch.check(state)  # what is not finite is neither saved nor reported
            if log_now:
                scalars = states.mean_metrics(window)
                window = []
                rates_now = optim.learning_rates(rates, step - 1)
                scalars |= {f"lr/{name}": value for name, value in rates_now.items()}
                scalars |= chrono.scalars(matcher.host_seconds())
                writer.write_scalars(step, scalars)
                writer.flush()
                logging.info("%s", chrono.line(scalars))
            if save_now:  # before the evaluation: whatever ends that, this step is not lost
                with chrono.pause("checkpoint"):
                    checkpoints.save(step, state, place(step))
            if stop:
                saved()
                raise Preempted(step)
            if eval_now:
                results = evaluate(step, 0 if last else config.eval.limit)
                stopped = not last and patience.over()
                if stopped:
                    steps, results = step, None if config.eval.limit else results
                    break
        profiler.close()
        report_omissions(data)
        close_data()

        # ---- Report -----------------------------------------------------------------------------
        last_step = max(first_step, steps)
        if stopped:
            logging.info("%s", patience)
        if results is None:  # evaluated on a sample, or by an earlier start, but not as asked now
            results = evaluate(last_step, counts=not stopped)
        preemption.rest(saved)
        if tabulate:
            with chrono.pause("evaluation"):
                evaluator.token_table(state, last_step, eval_batches)
        saved()
        logging.info("%s", chrono.summary())
        evaluator.report(last_step)
        return results


def _patience(
    config: ConfigDict, checkpoints: checkpoint.Checkpoints, step: int | None
) -> Patience:
    """Returns the history of the run's scores up to the evaluation of a checkpoint."""
    position = {} if step is None else checkpoints.position_of(step)
    patience = Patience(config.train.patience, config.eval.best_metric, position)
    if step is not None:
        patience.note(step, checkpoints.scores_of(step))
    return patience


def report_omissions(data: Iterator[LoadedBatch]) -> None:
    """Says what the loader left out, if it counts that: broken records, segments without a slot."""
    if broken := getattr(data, "broken", None):
        listed = "\n".join(f"  record {index}: {message}" for index, message in broken.items())
        logging.warning("%d broken records were skipped:\n%s", len(broken), listed)
    if dropped := getattr(data, "dropped_segments", 0):
        logging.warning("%d segments found no target slot: raise data.num_slots", dropped)


def due(step: int, every: int) -> bool:
    """Tells whether something that happens every `every` steps (0: never) happens at `step`."""
    return every > 0 and step % every == 0


def check_best_metric(config: ConfigDict, metadata: Metadata) -> None:
    """Raises a ValueError unless the best metric is one of these classes and their protocol."""
    names = metric_names(config, metadata)
    best = config.eval.best_metric
    if (config.train.keep_best or config.train.patience) and best not in names:
        raise ValueError(
            f"eval.best_metric {best!r} is not among the metrics of eval.tasks: "
            f"{', '.join(names)}; use one of these, or train.keep_best=0 and train.patience=0"
        )


def evaluate_workdir(
    config: ConfigDict,
    workdir: str,
    *,
    metadata: Metadata,
    eval_batches: Batches,
    which: str | int = "latest",
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float | None]:
    """Evaluates a checkpoint of `workdir` and writes its results and pictures.

    `which` one it is: see `checkpoint.find_checkpoint`.

    Raises:
      CheckpointError: the workdir has no such checkpoint, or other classes than `metadata`.
      ValueError: wrong values in `config`.
    """
    config = settings.checked(config)
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    observe.quiet_libraries()
    workdir = os.fspath(folders.locate(workdir))
    trained = checkpoint.load_for_inference(workdir, checkpoint=which)
    if differing := differing_classes(trained.metadata, metadata):
        raise checkpoint.CheckpointError(
            f"{workdir} was trained on the classes of {trained.metadata.dataset}, which are not "
            f"those of the dataset of this config ({metadata.dataset}): {differing}"
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
