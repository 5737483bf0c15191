"""One training step, and the loop around it.

A network that can be trained has:
    outputs(batch, spectra=..., inference=..., step=...): a NamedTuple with scores (B, J),
        predictions (B, K) and correct (B,).
    loss_names, loss_terms(outputs): the terms of the loss; a dict of name to (B,).
    spectra(): what can be computed once between two changes of the weights.
    architecture: dict of the settings that must match for weights to fit.
    variables, trainable_variables, get_weights, set_weights: as a Keras model.
"""

import contextlib
import json
import math
import signal
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from errors import NetworkMismatch, NotFinite, RunMismatch, UserError
from input_pipeline import batches
from training.checkpoints import (
    DAMAGE,
    Checkpoints,
    NoCheckpoints,
    RunState,
    archive_run,
    claim,
    folder_lock,
    saved_steps,
)
from training.distribution import all_equal, barrier, is_chief, sum_over_workers
from training.evaluation import Evaluator
from training.events import EventLog, write_scalars, write_settings
from training.interrupt import Interrupted, StopSignal

AGREEMENT_STEPS = 10  # between two times that workers ask each other whether one is to stop


class Folders(NamedTuple):
    """Where a run writes; each folder is the run's own."""

    checkpoint: Path
    best: Path
    logs: Path


class Progress(NamedTuple):
    """What is known after a step."""

    epoch: int  # from 1
    epochs: int
    step: int
    last_step: int
    images_per_second: float
    seconds_left: float
    losses: dict  # name of a term of the loss -> its mean in this epoch so far
    accuracy: float  # in this epoch so far


class AveragingAdam(keras.optimizers.Adam):
    """Adam with running averages of the weights that soon forget the first ones.

    After t steps their momentum is at most (1 + t) / (10 + t), as in
    `tf.train.ExponentialMovingAverage`.
    """

    @property
    def ema_momentum(self):
        """Return the momentum at the current step."""
        steps = tf.cast(self.iterations, tf.float32)
        return tf.minimum(self.largest_momentum, (1 + steps) / (10 + steps))

    @ema_momentum.setter
    def ema_momentum(self, value):
        self.largest_momentum = value


class Trainer:
    """Trains a network and keeps its checkpoints and events; see `fit`.

    Args:
        network: see the top of this file.
        data: Data to train on.
        config: TrainingConfig.
        folders: Folders.
        metadata: dict of what else a resumed run must share with its beginning.
        validation: Data that the best weights are chosen by, or None.
        jit: whether XLA compiles the step.
        strategy: tf.distribute.Strategy in whose scope the network was created, or None.
        report: takes a line of text for the user.
        draw: function of no arguments, called after each epoch; returns pictures by tag for
            TensorBoard. The network has its averaged weights then.
        summarize: takes the Evaluation of `validation`, and writes more summaries of it.
    """

    def __init__(
        self,
        network,
        data,
        config,
        folders,
        metadata,
        validation=None,
        jit=True,
        strategy=None,
        report=print,
        draw=dict,
        summarize=lambda evaluation: None,
    ):
        self.network, self.data, self.config = network, data, config
        self.folders, self.validation, self.report = folders, validation, report
        self.strategy = strategy or tf.distribute.get_strategy()
        self.chief = is_chief(self.strategy)
        self.draw = draw if self.chief else dict
        self.summarize = summarize if self.chief else lambda evaluation: None
        # Steps to start before the result of one is read, so an accelerator never waits for Python.
        self.steps_ahead = 1 if tf.config.list_logical_devices("GPU") else 0
        self.steps_per_epoch = math.ceil(len(data.labels) / config.batch_size)
        self.metadata = {
            "shape": network.architecture,
            "training": config._asdict() | metadata,
        }
        schedule = keras.optimizers.schedules.ExponentialDecay(
            config.learning_rate, config.decay_steps, config.decay_rate
        )
        with self.strategy.scope():
            self.optimizer = AveragingAdam(
                schedule,
                name="adam",
                use_ema=config.averaging > 0,
                ema_momentum=config.averaging,
            )
            self.optimizer.build(network.trainable_variables)
        self.train_step = self._compile(jit)
        self.evaluator = Evaluator(network, jit, self.strategy) if validation else None
        n_sums = len(network.loss_names) + 2  # also: correct examples, examples
        self.state = RunState(step=0, sums=np.zeros(n_sums))
        self.resumed_step = None  # of the checkpoint that training resumed from
        kind = Checkpoints if self.chief else NoCheckpoints
        self.checkpoints = kind(folders.checkpoint, network, self.optimizer, n_sums)
        self.best = kind(folders.best, network, self.optimizer, n_sums, keep=1)

    def _compile(self, jit):
        """Compile a training step: batch -> (means of the loss terms, share of correct examples).

        The weights of a batch make its losses means over the whole batch, wherever its parts are.
        """
        network, variables = self.network, self.network.trainable_variables

        def gradients(batch):
            weight = batch[-1]
            with tf.GradientTape() as tape:
                step = tf.cast(self.optimizer.iterations, tf.int32)
                outputs = network.outputs(batch, step=step)
                terms = {
                    name: tf.reduce_sum(weight * tf.cast(term, tf.float32))
                    for name, term in network.loss_terms(outputs).items()
                }
                loss = self.config.total_loss(terms)
            correct = tf.reduce_sum(weight * tf.cast(outputs.correct, tf.float32))
            values = [v.value for v in variables]
            return tape.gradient(loss, values), tf.stack([*terms.values(), correct])

        def step(batch):
            values, metrics = gradients(batch)
            self.optimizer.apply(values, variables)  # sums them over all replicas
            return metrics

        if self.strategy is tf.distribute.get_strategy():  # one device: all in one program
            return tf.function(step, jit_compile=jit, autograph=False)
        gradients = tf.function(gradients, jit_compile=jit, autograph=False)

        def step_of_all(batch):
            return self.strategy.reduce("SUM", self.strategy.run(step, (batch,)), axis=None)

        return tf.function(step_of_all, autograph=False)

    def fit(self, epochs, save_steps, restart=False, on_step=None, on_resume=None, texts=None):
        """Train until `epochs` epochs are done, resuming from the last checkpoint if there is one.

        Args:
            epochs: in total, including those of earlier calls; of a fraction, the first steps.
            save_steps: steps between checkpoints; one is written after each epoch as well.
            restart: archive an earlier run and start over.
            on_step: called after each step with a Progress.
            on_resume: called with the step of the checkpoint that training resumes from.
            texts: dict of name to text for TensorBoard.

        Returns:
            False if all epochs were done before.

        Raises:
            RunMismatch: an unfinished run of other settings is there.
            NotFinite: the loss or a weight is not finite.
            FolderInUse, FolderTaken: the folders belong to another run.
            UserError: a folder cannot be written, or workers differ in settings or data.
            Interrupted: a signal came; the state is saved.
        """
        self._check_agreement(epochs, save_steps)
        last_step = math.ceil(epochs * self.steps_per_epoch)
        with contextlib.ExitStack() as stack:
            if self.chief:
                for folder in self.folders:
                    stack.enter_context(folder_lock(folder))
            stop = stack.enter_context(StopSignal())
            self._resume(restart)
            if self.state.step >= last_step:
                return False
            if self.resumed_step and on_resume:
                on_resume(self.resumed_step)
            log = stack.enter_context(self._open_folders(texts or {}))
            while self.state.step < last_step:
                self._train_epoch(last_step, save_steps, log, stop, on_step)
            return True

    def _train_epoch(self, last_step, save_steps, log, stop, on_step):
        """Train to the end of the epoch, or to `last_step`."""
        epoch, start = divmod(self.state.step, self.steps_per_epoch)
        plan = self.data.training_plan(self.config.seed, epoch)
        speed, pending_steps = Speedometer(), []

        def record_steps(left):
            """Read the results of the pending steps, all but the last `left`."""
            while len(pending_steps) > left:
                step, metrics = pending_steps.pop(0)
                self._record_step(step, metrics.numpy().astype(np.float64), log)
                if on_step:
                    on_step(self._progress(step, last_step, speed.count_step()))

        for batch in batches(self.data, plan, self.config.batch_size, start, self.strategy):
            metrics = self.train_step(batch)
            self.state.step += 1
            pending_steps.append((self.state.step, metrics))
            end_of_epoch = self.state.step % self.steps_per_epoch == 0
            last = self.state.step == last_step
            saving = end_of_epoch or last or self.state.step % save_steps == 0
            record_steps(left=0 if saving else self.steps_ahead)
            stopping = self._stopping(stop)
            if stopping:
                record_steps(left=0)
            if end_of_epoch:
                self._end_epoch(last_step, log)
            if saving or stopping:
                self._save(last_step, log)
            if stopping:
                raise Interrupted(stop.number or signal.SIGTERM)
            if last:
                return

    def _record_step(self, step, metrics, log):
        """Check the result of a step, add it to the sums of the epoch, and log it."""
        if not np.isfinite(metrics).all():
            raise NotFinite("the loss is", step)
        config, done = self.config, (step - 1) % self.steps_per_epoch * self.config.batch_size
        examples = min(config.batch_size, len(self.data.labels) - done)
        self.state.sums += np.append(metrics, 1) * examples
        losses = self._by_name(metrics)
        rate = config.learning_rate * config.decay_rate ** ((step - 1) / config.decay_steps)
        log.write_step(step, config.total_loss(losses), losses, metrics[-1], rate)

    def _by_name(self, values):
        """Return the terms of the loss, which come first in `values`, by their names."""
        return dict(zip(self.network.loss_names, values, strict=False))

    def _progress(self, step, last_step, steps_per_second):
        means = self.state.sums / self.state.sums[-1]
        return Progress(
            epoch=math.ceil(step / self.steps_per_epoch),
            epochs=math.ceil(last_step / self.steps_per_epoch),
            step=step,
            last_step=last_step,
            images_per_second=steps_per_second * self.config.batch_size,
            seconds_left=(last_step - step) / steps_per_second,
            losses=self._by_name(means),
            accuracy=means[-2],
        )

    def _stopping(self, stop):
        """Tell whether to stop after this step; several workers all stop together."""
        asked = stop.number is not None
        if self.strategy.cluster_resolver is None:
            return asked
        if self.state.step % AGREEMENT_STEPS:
            return False
        return sum_over_workers(self.strategy, int(asked)) > 0

    def _end_epoch(self, last_step, log):
        """Draw examples, validate, and keep the best weights, before the epoch's checkpoint."""
        self.state.sums = np.zeros_like(self.state.sums)
        step, data = self.state.step, self.validation
        with self.averaged():
            with log.writing("validation" if data else "train", step):
                for tag, picture in self.draw().items():
                    tf.summary.image(tag, picture[None])
            if not data:
                return
            evaluation = self.evaluator.evaluate(data, data.evaluation_plan())
        loss = self.config.total_loss(evaluation.losses)
        improved = loss < self.state.best_loss
        self.report(
            f"Validation after step {step}: loss {loss:.5f}, accuracy "
            f"{100 * evaluation.accuracy:.2f}%{', the best so far' if improved else ''}"
        )
        self.state.best_loss = min(loss, self.state.best_loss)
        with log.writing("validation", step):
            write_scalars(loss, evaluation.losses, evaluation.accuracy)
            self.summarize(evaluation)
        if improved:
            self.best.save(self.state, self._metadata(last_step))

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

    def _metadata(self, last_step):
        return self.metadata | {"step": self.state.step, "last_step": last_step}

    def _save(self, last_step, log):
        """Write a checkpoint, unless a weight is not finite."""
        if not all(np.isfinite(array).all() for array in self.network.get_weights()):
            raise NotFinite("a weight is", self.state.step)
        log.flush()
        self.checkpoints.save(self.state, self._metadata(last_step))

    def _check_agreement(self, epochs, save_steps):
        """Raise UserError if workers were started with different settings."""
        own = zlib.crc32(json.dumps([self.metadata, epochs, save_steps]).encode())
        if not all_equal(self.strategy, own):
            raise UserError(
                "the workers were started with different settings or different data, "
                "expected the same everywhere; nothing was changed"
            )

    def _resume(self, restart):
        """Restore the newest intact checkpoint of this run; the chief says which that is."""
        if self.chief:
            self._resume_or_archive(restart)
        step = sum_over_workers(self.strategy, self.state.step)  # the others have 0
        if step and not self.chief:
            self._restore(step)
        barrier(self.strategy)  # only then may the chief change what is in the folders

    def _resume_or_archive(self, restart):
        folder, settings = (
            self.folders.checkpoint,
            self.metadata["shape"] | self.metadata["training"],
        )
        if restart:
            metadata, state = None, None
            archiving = bool(saved_steps(folder))
        else:
            metadata, different, state = self.checkpoints.restore_newest(settings, self.report)
            archiving = different != ""
            if archiving and metadata["step"] < metadata["last_step"]:
                raise RunMismatch(folder, metadata["step"], metadata["last_step"], different)
        if state:
            self.state, self.resumed_step = state, state.step
        if archiving:
            ending = archive_run(self.folders)
            self.report(
                f"Moved the earlier run aside: {folder}{ending}, {self.folders.logs}{ending}"
            )

    def _restore(self, step):
        """Restore the checkpoint that the chief resumes from."""
        try:
            self.state = self.checkpoints.restore(step)
        except (*DAMAGE, NetworkMismatch):
            raise UserError(
                f"{self.folders.checkpoint} does not hold the checkpoint of step {step}, from "
                "which the chief resumes; all workers need the same folder, on a disk that they "
                "share"
            ) from None
        self.resumed_step = step

    def _open_folders(self, texts):
        """Clear what came after the step to resume from; return the EventLog."""
        validation = self.validation is not None
        if not self.chief:
            return EventLog(None, validation=validation)
        claim(self.folders.logs, self.folders.checkpoint)
        self.checkpoints.prepare(self.resumed_step)
        if validation:
            claim(self.folders.best, self.folders.checkpoint)
            best_step = self.best.newest_intact_step(self.report)
            if best_step is None:  # the next validation has the best weights there are
                self.state.best_loss = math.inf
            self.best.prepare(best_step)
        log = EventLog(self.folders.logs, self.resumed_step, validation)
        if self.state.step == 0:
            write_settings(self.folders.logs, self.metadata["shape"] | self.metadata["training"])
            log.write_texts(texts)
        return log


class Speedometer:
    """Measures steps a second, without the first one, which compiles or waits for its batch."""

    def __init__(self):
        self._began, self._steps, self._first = time.perf_counter(), 0, True

    def count_step(self):
        """Count a step and return the steps a second."""
        self._steps += 1
        now = time.perf_counter()
        speed = self._steps / (now - self._began)
        if self._first:
            self._began, self._steps, self._first = now, 0, False
        return speed
