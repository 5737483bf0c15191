"""The training loop: when to log, validate, save and stop."""

import contextlib
import math
import signal
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from capsnet_core.errors import NotFinite
from capsnet_core.metadata import complete
from inputs.pipeline import batches
from training.callbacks import Validation
from training.checkpoints import Checkpoints, RunState, saved_steps
from training.distribution import is_chief, sum_over_workers
from training.evaluation import Evaluator
from training.events import EventLog, write_scalars, write_settings
from training.folders import Folders, claim, run_lock
from training.interrupt import Interrupted, StopSignal
from training.progress import Progress, Speedometer
from training.resume import check_agreement, resume
from training.step import compile_step, learning_rate, make_optimizer

AGREEMENT_STEPS = 10  # between the votes of several workers on whether to stop


class Run(NamedTuple):
    """Where a training run writes, and what it saves with its weights."""

    folders: Folders
    settings: dict = {}  # what a resumed run must share with its beginning, besides the config
    description: dict = {}  # what may be another in a resumed run


class Device(NamedTuple):
    """What computes."""

    strategy: tf.distribute.Strategy | None = None  # in whose scope the network was created
    jit: bool = True  # whether XLA compiles the step


class FitContext(NamedTuple):
    """What the steps of one call of `fit` share."""

    last_step: int
    save_steps: int
    log: EventLog
    stop: StopSignal


class Trainer:
    """Trains a network and keeps its checkpoints and events; see `fit`.

    Args:
        network: `training.network.Network`.
        data: Examples to train on.
        config: TrainingConfig.
        run: Run.
        validation: Examples to choose the best weights by, or None.
        device: Device, None for the default one.
        callbacks: Callbacks, called in this order; the attribute is a list.

    Attributes:
        state: RunState.
        resumed_step: step of the checkpoint that training resumed from, None at the start of a run.
        train_step: takes a batch, see `training.step.compile_step`.
        evaluator: Evaluator, None without `validation`.
        checkpoints: Checkpoints of the last steps.
        best: Checkpoints of the weights with the lowest validation loss.
    """

    def __init__(self, network, data, config, run, validation=None, device=None, callbacks=()):
        strategy, jit = device or Device()
        self.network, self.data, self.config, self.run = network, data, config, run
        self.validation, self.callbacks = validation, list(callbacks)
        self.strategy = strategy or tf.distribute.get_strategy()
        self.chief = is_chief(self.strategy)
        # Steps to start before the result of one is read, so an accelerator never waits for Python.
        self.steps_ahead = 1 if tf.config.list_logical_devices("GPU") else 0
        self.steps_per_epoch = math.ceil(len(data.labels) / config.batch_size)
        self.metadata = complete(
            {"shape": network.config.describe(), "training": config._asdict() | run.settings}
        )
        with self.strategy.scope():
            self.optimizer = make_optimizer(config, network.trainable_variables)
        self.train_step = compile_step(network, self.optimizer, config, self.strategy, jit)
        self.evaluator = Evaluator(network, jit, self.strategy) if validation else None
        n_sums = len(network.config.loss_terms) + 2  # also: correct examples, examples
        self.state = RunState(step=0, sums=np.zeros(n_sums))
        self.resumed_step = None
        self.checkpoints = Checkpoints(run.folders.checkpoint, network, self.optimizer, n_sums)
        self.best = Checkpoints(run.folders.best, network, self.optimizer, n_sums, keep=1)

    def fit(self, epochs, save_steps, restart=False):
        """Train until `epochs` epochs are done, resuming from the last checkpoint if there is one.

        Args:
            epochs: in total, including those of earlier calls; of a fraction, the first steps.
            save_steps: steps between checkpoints; one is written after each epoch as well.
            restart: archive an earlier run and start over; for a Trainer that has not trained.

        Returns:
            False if all epochs were done before.

        Raises:
            RunMismatch: an unfinished run of other settings is there.
            NetworkMismatch: a checkpoint of this run lacks a variable, or its shape differs.
            DamagedCheckpoints: there are checkpoints, and all are damaged.
            NotFinite: the loss or a weight is not finite.
            FolderInUse, FolderTaken: the folders belong to another run.
            UserError: a folder cannot be written, or workers differ in settings or data.
            Interrupted: a signal came; the state is saved.
            ValueError: this Trainer has trained, and there is no checkpoint to resume from.
        """
        check_agreement(self.strategy, [self.metadata, epochs, save_steps])
        last_step = math.ceil(epochs * self.steps_per_epoch)
        with contextlib.ExitStack() as stack:
            if self.chief:
                stack.enter_context(run_lock(self.run.folders, self._report))
            stop = stack.enter_context(StopSignal())
            self._resume(restart)
            if self.state.step >= last_step:
                return False
            log = stack.enter_context(self._open_folders())
            self._begin(log)
            context = FitContext(last_step, save_steps, log, stop)
            while self.state.step < last_step:
                self._train_epoch(context)
            return True

    def _begin(self, log):
        """Write the settings of a new run, and tell the callbacks at which step training begins."""
        step = self.state.step
        if self.chief and step == 0:
            settings = self.metadata["shape"] | self.metadata["training"]
            write_settings(self.run.folders.logs, settings)
        with log.writing("train", step):
            for callback in self.callbacks:
                callback.on_train_begin(step)

    def _report(self, text):
        """Give the callbacks a line of text for the user."""
        for callback in self.callbacks:
            callback.on_message(text)

    # --- Steps ------------------------------------------------------------------------------------

    def _train_epoch(self, context):
        """Train to the end of the epoch, or to the last step."""
        epoch, start = divmod(self.state.step, self.steps_per_epoch)
        plan = self.data.training_plan(self.config.seed, epoch)
        speedometer, pending = Speedometer(), []
        for batch in batches(self.data, plan, self.config.batch_size, start, self.strategy):
            metrics = self.train_step(batch)
            self.state.step += 1
            pending.append((self.state.step, metrics))
            end_of_epoch = self.state.step % self.steps_per_epoch == 0
            last = self.state.step == context.last_step
            saving = end_of_epoch or last or self.state.step % context.save_steps == 0
            self._read_results(pending, 0 if saving else self.steps_ahead, speedometer, context)
            stopping = self._stopping(context.stop)
            if stopping:
                self._read_results(pending, 0, speedometer, context)
            if end_of_epoch:
                self._end_epoch(context)
            if saving or stopping:
                self._save(context)
            if stopping:
                raise Interrupted(context.stop.number or signal.SIGTERM)
            if last:
                return

    def _read_results(self, pending, left, speedometer, context):
        """Check, sum, log and report the results of pending steps, all but the last `left`."""
        while len(pending) > left:
            step, metrics = pending.pop(0)
            metrics = metrics.numpy().astype(np.float64)
            if not np.isfinite(metrics).all():
                raise NotFinite("the loss is", step)
            self.state.sums += np.append(metrics, 1) * self._batch_examples(step)
            losses = self._by_name(metrics)
            total, rate = self.config.total_loss(losses), learning_rate(self.config, step)
            context.log.write_step(step, total, losses, metrics[-1], rate)
            progress = self._progress(step, context.last_step, speedometer.count_step())
            for callback in self.callbacks:
                callback.on_train_batch_end(progress)

    def _batch_examples(self, step):
        """Return the number of examples in the batch of a step."""
        done = (step - 1) % self.steps_per_epoch * self.config.batch_size
        return min(self.config.batch_size, len(self.data.labels) - done)

    def _by_name(self, values):
        """Return the terms of the loss, which come first in `values`, by their names."""
        return dict(zip(self.network.config.loss_terms, values, strict=False))

    def _progress(self, step, last_step, speed):
        """Return the Progress after a step; the speed is in steps a second, or None."""
        means = self.state.sums / self.state.sums[-1]
        return Progress(
            epoch=math.ceil(step / self.steps_per_epoch),
            epochs=math.ceil(last_step / self.steps_per_epoch),
            step=step,
            last_step=last_step,
            images_per_second=speed and speed * self.config.batch_size,
            seconds_left=speed and (last_step - step) / speed,
            losses=self._by_name(means),
            accuracy=means[-2],
        )

    def _stopping(self, stop):
        """Return whether to stop after this step; several workers all stop together."""
        asked = stop.number is not None
        if self.strategy.cluster_resolver is None:
            return asked
        if self.state.step % AGREEMENT_STEPS:
            return False
        return sum_over_workers(self.strategy, int(asked)) > 0

    # --- The end of an epoch ----------------------------------------------------------------------

    def _end_epoch(self, context):
        """Validate and keep the best weights, before the epoch's checkpoint."""
        self.state.sums = np.zeros_like(self.state.sums)
        events = "validation" if self.validation else "train"
        with self.averaged(), context.log.writing(events, self.state.step):
            for callback in self.callbacks:
                callback.on_epoch_end(self.state.step // self.steps_per_epoch)
            improved = self._validate() if self.validation else False
        if improved and self.chief:
            self.best.save(self.state, self._metadata_at(context.last_step))

    def _validate(self):
        """Evaluate the validation data; return whether the loss is the lowest so far."""
        data = self.validation
        evaluation = self.evaluator.evaluate(data, data.evaluation_plan())
        loss = self.config.total_loss(evaluation.losses)
        improved = loss < self.state.best_loss
        write_scalars(loss, evaluation.losses, evaluation.accuracy)
        validation = Validation(self.state.step, loss, evaluation, improved)
        for callback in self.callbacks:
            callback.on_test_end(validation)
        if improved:
            self.state.best_loss = loss
        return improved

    @contextlib.contextmanager
    def averaged(self):
        """Give the network the averages of its weights, if they are kept, within the context."""
        weights = self.network.get_weights()
        self.optimizer.finalize_variable_values(self.network.trainable_variables)
        try:
            yield
        finally:
            self.network.set_weights(weights)

    # --- Saving and resuming ----------------------------------------------------------------------

    def _metadata_at(self, last_step):
        """Return the metadata of a checkpoint of this step."""
        steps = {"step": self.state.step, "last_step": last_step}
        return self.metadata | self.run.description | steps

    def _save(self, context):
        """Write a checkpoint, unless a weight is not finite or another worker writes it."""
        if not all(np.isfinite(array).all() for array in self.network.get_weights()):
            raise NotFinite("a weight is", self.state.step)
        context.log.flush()  # first: a resumed run cuts events, but cannot restore lost ones
        if self.chief:
            self.checkpoints.save(self.state, self._metadata_at(context.last_step))

    def _resume(self, restart):
        """Restore the run that is in the folders, if there is one."""
        folders = self.run.folders
        if self.state.step and (restart or not saved_steps(folders.checkpoint)):
            raise ValueError(
                f"this Trainer is at step {self.state.step} and cannot start over, expected a new "
                f"one, or a checkpoint in {folders.checkpoint} to resume from"
            )
        state = resume(
            self.checkpoints, folders, self.metadata, self.strategy, restart, self._report
        )
        if state:
            self.state, self.resumed_step = state, state.step

    def _open_folders(self):
        """Delete what came after the step to resume from; return the EventLog."""
        validation, folders = self.validation is not None, self.run.folders
        if not self.chief:
            return EventLog(None, validation=validation)
        claim(folders.logs, folders.checkpoint)
        self.checkpoints.prepare(self.resumed_step)
        if validation:
            claim(folders.best, folders.checkpoint)
            self._open_best()
        return EventLog(folders.logs, self.state.step, validation)

    def _open_best(self):
        """Prepare the folder of the best weights; if they are lost, the next ones are the best."""
        if self.resumed_step is None:  # the first validation replaces weights of an earlier run
            self.best.prepare(max(saved_steps(self.run.folders.best), default=None))
            return
        step = self.best.newest_intact_step(self._report)
        if step is None:
            self.state.best_loss = math.inf
        self.best.prepare(step)
