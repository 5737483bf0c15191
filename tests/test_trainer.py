"""The loop and its steps, against a training run written out by hand in float64."""

import functools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from engine import (
    CLASSES,
    SCALARS,
    Calls,
    TinyNetwork,
    blobs,
    crash,
    events,
    folders_in,
    network,
    same,
    state,
    trainer_in,
)

from capsnet_core.config import TrainingConfig
from capsnet_core.errors import FolderInUse, FolderTaken, NotFinite, RunMismatch
from inputs import datasets
from inputs.pipeline import Examples, batches
from model import CapsNet
from training.callbacks import Printing
from training.checkpoints import Checkpoints, load_weights, read_metadata, saved_steps
from training.evaluation import Evaluation, Evaluator
from training.events import EventLog, write_texts
from training.interrupt import Interrupted
from training.trainer import Device, Run, Trainer

ROOT = Path(__file__).parent.parent

# --- A training run by hand -----------------------------------------------------------------------


class HandStep(NamedTuple):
    """What a step of the training run by hand leaves."""

    gradients: list
    weights: list
    averages: list
    entropy: float
    reconstruction: float
    accuracy: float
    learning_rate: float


def examples(data, index, shift):
    """Compose inputs (N, 64) in float64 and labels (N,), one after the other."""
    pixels = [
        data.images[number].astype(np.float64).ravel() / 255 + 0.01 * sum(moved)
        for number, moved in zip(index[:, 0], shift[:, 0], strict=True)
    ]
    return np.array(pixels), data.labels[index[:, 0]]


def losses_by_hand(weights, x, labels):
    """Return the means of both losses and of the correct examples, from the weights alone."""
    kernel, bias, logits, logit_bias, pixels, pixel_bias = weights
    hidden = tf.tanh(x @ kernel + bias)
    scores = hidden @ logits + logit_bias
    entropies = [
        tf.math.log(tf.reduce_sum(tf.exp(score))) - score[label]
        for score, label in zip(scores, labels, strict=True)
    ]
    errors = tf.reduce_sum((hidden @ pixels + pixel_bias - x) ** 2, axis=1)
    correct = [int(np.argmax(score)) == label for score, label in zip(scores, labels, strict=True)]
    n = len(labels)
    return tf.add_n(entropies) / n, tf.reduce_sum(errors) / n, sum(correct) / n


def train_by_hand(weights, data, config, steps):
    """Train with Adam as its paper has it, on the objective of the tool; return the HandSteps."""
    weights = [np.float64(w) for w in weights]
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    averages, history, n = None, [], len(data.labels)
    steps_per_epoch = math.ceil(n / config.batch_size)
    for t in range(steps):
        plan = data.training_plan(config.seed, t // steps_per_epoch)
        batch = slice(t % steps_per_epoch * config.batch_size, None)
        rows = [part[batch][: config.batch_size] for part in plan]
        variables = [tf.Variable(w) for w in weights]
        with tf.GradientTape() as tape:
            entropy, reconstruction, accuracy = losses_by_hand(variables, *examples(data, *rows))
            objective = entropy + config.reconstruction_weight * reconstruction
        gradients = [g.numpy() for g in tape.gradient(objective, variables)]
        rate = config.learning_rate * config.decay_rate ** (t / config.decay_steps)
        for i, g in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            # The order of computation at the end of section 2 of Adam's paper.
            corrected = rate * math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
            weights[i] = weights[i] - corrected * first[i] / (np.sqrt(second[i]) + 1e-7)
        momentum = min(config.averaging, (1 + t) / (10 + t))
        averages = [
            momentum * a + (1 - momentum) * w
            for a, w in zip(averages or weights, weights, strict=True)
        ]
        if not config.averaging:
            averages = list(weights)
        history.append(
            HandStep(
                gradients, list(weights), averages, float(entropy), float(reconstruction),
                accuracy, rate,
            )
        )  # fmt: skip
    return history


SETTINGS = {
    "default": {"learning_rate": 0.01},
    "other": {
        "seed": 4,
        "batch_size": 7,
        "learning_rate": 0.02,
        "decay_rate": 0.5,
        "decay_steps": 3,
        "reconstruction_weight": 0.2,
        "averaging": 0.3,
    },
    "no averages": {"learning_rate": 0.01, "averaging": 0.0},
}


class Trained(NamedTuple):
    """A training run of two epochs, step by step, and the same by hand."""

    trainer: Trainer
    progress: list
    weights: list  # after each step
    validated: list  # weights of the network during each validation
    hand: list
    folder: Path


@pytest.fixture(scope="module", params=SETTINGS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    progress, weights, validated = [], [], []

    def watched(data, plan):
        validated.append(trainer.network.get_weights())
        return evaluate(data, plan)

    def on_step(step):
        progress.append(step)
        weights.append(trainer.network.get_weights())

    trainer = trainer_in(
        folder,
        jit=request.param == "other",
        on_train_batch_end=on_step,
        **SETTINGS[request.param],
    )
    start, evaluate = trainer.network.get_weights(), trainer.evaluator.evaluate
    trainer.evaluator.evaluate = watched
    trainer.fit(2, 500)
    hand = train_by_hand(start, trainer.data, trainer.config, trainer.state.step)
    return Trained(trainer, progress, weights, validated, hand, folder)


def assert_weights(actual, expected, tolerance=1e-4):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def test_every_step_ends_with_the_weights_of_adam_on_the_objective_by_hand(trained):
    assert (
        len(trained.weights)
        == len(trained.hand)
        == 2 * math.ceil(45 / trained.trainer.config.batch_size)
    )
    for actual, step in zip(trained.weights, trained.hand, strict=True):
        assert_weights(actual, step.weights)


def test_the_events_of_training_are_the_losses_and_rates_of_the_training_by_hand(trained):
    logged, config = events(trained.folder / "logs"), trained.trainer.config
    expected = {
        "loss/entropy": [step.entropy for step in trained.hand],
        "loss/reconstruction": [step.reconstruction for step in trained.hand],
        "loss/total": [
            step.entropy + config.reconstruction_weight * step.reconstruction
            for step in trained.hand
        ],
        "accuracy": [step.accuracy for step in trained.hand],
        "learning_rate": [step.learning_rate for step in trained.hand],
    }
    assert {tag for run, tag in logged if run == "train"} == set(expected)
    for tag, values in expected.items():
        assert [step for step, _ in logged["train", tag]] == list(range(1, len(values) + 1))
        np.testing.assert_allclose([v for _, v in logged["train", tag]], values, rtol=1e-4)


def test_progress_has_the_means_over_the_examples_of_the_epoch_so_far(trained):
    size, steps = trained.trainer.config.batch_size, trained.trainer.steps_per_epoch
    for number, progress in enumerate(trained.progress):
        begin = number // steps * steps
        counts = [min(size, 45 - size * k) for k in range(number - begin + 1)]
        part = trained.hand[begin : number + 1]
        for name in ("entropy", "reconstruction"):
            mean = np.average([getattr(step, name) for step in part], weights=counts)
            assert progress.losses[name] == pytest.approx(mean, rel=1e-4)
        assert list(progress.losses) == ["entropy", "reconstruction"]
        mean = np.average([step.accuracy for step in part], weights=counts)
        assert progress.accuracy == pytest.approx(mean, abs=1e-6)
        assert (progress.epoch, progress.epochs) == (1 + number // steps, 2)
        assert (progress.step, progress.last_step) == (number + 1, 2 * steps)


def test_the_averaged_weights_are_validated_and_loaded_but_not_trained_on(trained):
    steps = trained.trainer.steps_per_epoch
    ends = [trained.hand[steps - 1], trained.hand[-1]]
    for actual, step in zip(trained.validated, ends, strict=True):
        assert_weights(actual, step.averages)
    net = network(seed=7)
    load_weights(net, trained.folder / "checkpoint", print)
    assert_weights(net.get_weights(), ends[-1].averages)
    assert_weights(trained.trainer.network.get_weights(), ends[-1].weights)
    apart = np.abs(ends[-1].weights[0] - ends[-1].averages[0]).max()
    assert (apart > 1e-4) == (trained.trainer.config.averaging > 0)
    with trained.trainer.averaged():
        assert_weights(trained.trainer.network.get_weights(), ends[-1].averages)
    assert_weights(trained.trainer.network.get_weights(), ends[-1].weights)


def test_validation_is_that_of_the_averages_on_the_unshifted_validation_images(trained):
    logged, data, config = events(trained.folder / "logs"), blobs(9, seed=1), trained.trainer.config
    x, steps = data.images.reshape(9, 64) / 255, trained.trainer.steps_per_epoch
    totals = []
    for epoch, step in enumerate((steps, 2 * steps)):
        entropy, reconstruction, accuracy = losses_by_hand(
            trained.hand[step - 1].averages, x, data.labels
        )
        totals.append(float(entropy + config.reconstruction_weight * reconstruction))
        expected = (totals[-1], entropy, reconstruction, accuracy)
        for tag, value in zip(SCALARS, expected, strict=True):
            assert logged["validation", tag][epoch] == (step, pytest.approx(float(value), rel=1e-4))
    assert trained.trainer.state.best_loss == pytest.approx(min(totals), rel=1e-4)
    assert saved_steps(trained.folder / "best") == [steps * (1 + int(np.argmin(totals)))]


def first_moments(optimizer):
    return [v.numpy() for v in optimizer.variables if v.path.endswith("_momentum")]


@pytest.mark.parametrize("weight, number", [(0.0005, 0), (0.3, 5)])
def test_a_capsule_network_gets_the_gradient_of_margin_plus_weighted_reconstruction(
    tmp_path, weight, number
):
    data = blobs(45)
    keras.utils.set_random_seed(1)
    net = CapsNet((8, 8, 1), 3, 3, 2, 3, 4, 2, 3, (6,))
    net.digits.W.assign(10 * net.digits.W)  # longer capsules, and so larger gradients
    config = TrainingConfig(batch_size=8, reconstruction_weight=weight)
    trainer = Trainer(net, data, config, Run(folders_in(tmp_path)), device=Device(jit=False))
    plan = data.training_plan(0, 0)
    rows = plan.take(slice(8 * number, 8 * number + 8))  # the last batch has 5 examples
    (whole,) = batches(data, rows, len(rows.index))
    with tf.GradientTape() as tape:
        outputs = net.outputs(whole)
        margin, reconstruction = outputs.margin_loss, outputs.reconstruction_loss
        objective = tf.reduce_mean(margin) + weight * tf.reduce_mean(reconstruction)
    expected = tape.gradient(objective, [v.value for v in net.trainable_variables])
    batch = next(iter(batches(data, plan, 8, start=number)))
    metrics = trainer.train_step(batch).numpy()
    means = [np.mean(values) for values in (margin, reconstruction, outputs.correct)]
    np.testing.assert_allclose(metrics, means, rtol=1e-4)
    assert len(rows.index) == (5 if number else 8)
    for moment, gradient in zip(first_moments(trainer.optimizer), expected, strict=True):
        largest = np.abs(gradient).max()
        assert largest > 0
        np.testing.assert_allclose(10 * moment, gradient, rtol=0, atol=1e-4 * largest)


class SeedNetwork(TinyNetwork):
    """A network whose entropy is the seed that it gets, as one number."""

    def outputs(self, batch, seed=None):
        outputs = super().outputs(batch)
        number = tf.cast(100 * seed[0] + seed[1], tf.float32)
        return outputs._replace(entropy=0 * outputs.entropy + number)


def test_the_seed_of_a_step_is_that_of_the_run_with_the_number_of_the_step_also_after_resuming(
    tmp_path,
):
    for steps in (4, 12):
        trainer_in(tmp_path, net=SeedNetwork(), validation=False, seed=3).fit(steps / 6, 500)
    logged = events(tmp_path / "logs")
    assert [value for _, value in logged["train", "loss/entropy"]] == list(range(300, 312))


# --- The end of an epoch --------------------------------------------------------------------------


def test_the_end_of_an_epoch_draws_validates_keeps_the_best_flushes_and_saves(
    tmp_path, monkeypatch
):
    calls, evaluations, picture = [], [], np.arange(48, dtype=np.uint8).reshape(4, 4, 3)

    def noting(name, function):
        @functools.wraps(function)
        def wrapper(*arguments):
            calls.append(name)
            return function(*arguments)

        return wrapper

    def save(self, state, metadata, save=Checkpoints.save):
        calls.append(f"save {self.folder.name} {state.step} {metadata['step']}")
        save(self, state, metadata)

    def draw(epoch):
        calls.append(f"draw {epoch}")
        tf.summary.image("drawn", picture[None])

    def summarize(validation):
        evaluations.append((validation.step, len(validation.evaluation.labels)))
        tf.summary.scalar("extra", 7.0)

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(EventLog, "flush", noting("flush", EventLog.flush))
    monkeypatch.setattr(Evaluator, "evaluate", noting("validate", Evaluator.evaluate))
    first = Calls(on_test_end=lambda _: calls.append("first"))
    last = {"on_epoch_end": draw, "on_test_end": noting("last", summarize)}
    trainer_in(tmp_path, callbacks=[first], **last).fit(4 / 3, 5)
    assert calls == [
        "flush",
        "save checkpoint 5 5",
        *("draw 1", "validate", "first", "last", "save best 6 6"),
        *("flush", "save checkpoint 6 6"),
        *("flush", "save checkpoint 8 8"),
    ]
    assert saved_steps(tmp_path / "checkpoint") == [8, 6]
    assert evaluations == [(6, 9)]
    logged = events(tmp_path / "logs")
    assert logged["validation", "extra"] == [(6, 7.0)]
    ((step, (width, height, png)),) = logged["validation", "drawn"]
    assert (step, width, height) == (6, b"4", b"4")
    np.testing.assert_array_equal(tf.io.decode_png(png), picture)


def test_settings_and_texts_are_written_once_at_the_start_of_a_run_and_pictures_after_an_epoch(
    tmp_path,
):
    def write(step):
        if step == 0:
            write_texts({"command": "typed"})

    for epochs in (0.5, 1):
        trainer_in(
            tmp_path,
            settings={"data": "digest"},
            validation=False,
            on_train_begin=write,
            on_epoch_end=lambda epoch: tf.summary.scalar("drawn", epoch),
            on_test_end=lambda _: pytest.fail("there is no validation"),
        ).fit(epochs, 500)
    logged = events(tmp_path / "logs")
    assert logged["train", "command"] == [(0, b"typed")]
    assert logged["train", "drawn"] == [(6, 1)]
    assert {run for run, _ in logged} == {"train"} and not (tmp_path / "best").exists()
    files = list((tmp_path / "logs").glob("events.out.tfevents.*.hparams"))
    assert len(files) == 1
    (content,) = (path.read_bytes() for path in files)
    for name in (b"reconstruction_weight", b"units", b"['a', 'b', 'c']"):
        assert name in content
    assert b"digest" not in content


def fake_evaluations(trainer, losses):
    """Let validation find these (entropy, reconstruction) losses, one after the other."""
    losses = iter(losses)

    def evaluate(data, plan):
        assert not plan.shift.any() and len(plan.index) == 9
        entropy, reconstruction = next(losses)
        return Evaluation(
            scores=np.zeros((9, 3)),
            predictions=np.zeros((9, 1)),
            labels=np.zeros((9, 1)),
            correct=np.ones(9, bool),
            losses={"entropy": entropy, "reconstruction": reconstruction},
        )

    trainer.evaluator.evaluate = evaluate


def printing(lines):
    """A callback that appends what a run prints to `lines`."""
    display = SimpleNamespace(report=lines.append, show_step=lambda progress: None)
    return Printing(display, "FOLDER")


def test_the_best_weights_have_the_lowest_total_loss_not_the_lowest_of_one_term(tmp_path):
    lines, steps = [], []
    trainer = trainer_in(
        tmp_path,
        reconstruction_weight=0.01,
        callbacks=[printing(lines)],
        on_train_batch_end=lambda _: steps.append(saved_steps(tmp_path / "best")),
    )
    # The totals are nan, 1.2, 1.4, 1.2, nan, 0.9: what is not a number is never the best.
    found = [(math.nan, 0), (0.7, 50), (0.4, 100), (0.2, 100), (math.nan, 0), (0.8, 10)]
    fake_evaluations(trainer, found)
    trainer.fit(6, 500)
    assert steps[5::6] == [[], [], [12], [12], [12], [12]]
    assert saved_steps(tmp_path / "best") == [36]
    assert ["the best so far" in line for line in lines] == [False, True] + [False] * 3 + [True]
    assert lines[1] == ("Validation after step 12: loss 1.20000, accuracy 100.00%, the best so far")
    assert read_metadata(tmp_path / "best", 36)["step"] == 36
    lines.clear()
    resumed = trainer_in(tmp_path, reconstruction_weight=0.01, callbacks=[printing(lines)])
    fake_evaluations(resumed, [(0.95, 0), (0.85, 0)])  # a resumed run knows the best loss
    resumed.fit(7, 500)
    assert resumed.state.best_loss == pytest.approx(0.9)
    assert saved_steps(tmp_path / "best") == [36]
    assert lines == [
        "Resuming from step 36 (FOLDER).",
        "Validation after step 42: loss 0.95000, accuracy 100.00%",
    ]
    resumed.fit(8, 500)
    assert saved_steps(tmp_path / "best") == [48]


# --- Progress -------------------------------------------------------------------------------------


def test_speed_leaves_out_the_first_step_of_an_epoch_and_says_how_long_the_rest_takes(
    tmp_path, monkeypatch
):
    class Clock:
        readings = iter([10, 12, 13, 17, 17.5, 18, *(150, 151, 152, 153, 154, 155)])

        @classmethod
        def perf_counter(cls):
            return next(cls.readings)

    monkeypatch.setattr("training.progress.time", Clock)
    seen = []
    trainer_in(tmp_path, validation=False, on_train_batch_end=seen.append).fit(2, 500)
    # Steps a second; the clock is read after each step. The first ones compile or wait for a batch.
    speeds = [None, 1 / 2, 2 / 3, 3 / 7, 4 / 7.5, 5 / 8, None, 1, 1, 1, 1, 1]
    for step, (progress, speed) in enumerate(zip(seen, speeds, strict=True), 1):
        if speed is None:
            assert progress.images_per_second is progress.seconds_left is None
            continue
        assert progress.images_per_second == pytest.approx(8 * speed)
        assert progress.seconds_left == pytest.approx((12 - step) / speed)


# --- Interrupted and resumed ----------------------------------------------------------------------


def test_after_a_crash_the_means_of_the_epoch_continue_and_the_run_ends_as_if_there_was_none(
    tmp_path, finished_run
):
    seen = []
    crash(trainer_in(tmp_path, description={"note": "bright"}), 4, save_steps=3)
    assert saved_steps(tmp_path / "checkpoint") == [3]
    assert read_metadata(tmp_path / "checkpoint", 3)["note"] == "bright"
    trainer = trainer_in(tmp_path, description={"note": "dark"}, on_train_batch_end=seen.append)
    trainer.fit(2, 5)
    assert trainer.resumed_step == 3
    assert [progress.step for progress in seen] == list(range(4, 13))
    for one, other in zip(seen, finished_run.progress[3:], strict=True):
        assert one.losses == other.losses and one.accuracy == other.accuracy
    assert same(state(trainer), finished_run.state)
    assert events(tmp_path / "logs") == events(finished_run.folder / "logs")
    # A description may differ from that of the beginning.
    metadata = read_metadata(tmp_path / "checkpoint", 12)
    assert list(metadata) == ["shape", "training", "note", "step", "last_step"]
    (best,) = saved_steps(tmp_path / "best")
    assert metadata["note"] == read_metadata(tmp_path / "best", best)["note"] == "dark"


def test_another_seed_gives_another_order_from_the_same_weights(tmp_path, finished_run):
    seen = []
    trainer = trainer_in(tmp_path, validation=False, seed=1, on_train_batch_end=seen.append)
    assert same(trainer.network.get_weights(), trainer_in(tmp_path).network.get_weights())
    trainer.fit(1 / 6, 500)
    assert seen[0].losses != finished_run.progress[0].losses


def test_a_run_stopped_before_its_first_checkpoint_starts_over_without_double_events(
    tmp_path, finished_run
):
    crash(trainer_in(tmp_path), 4)
    assert not saved_steps(tmp_path / "checkpoint")
    trainer = trainer_in(tmp_path)
    trainer.fit(2, 5)
    assert trainer.resumed_step is None and same(state(trainer), finished_run.state)
    assert events(tmp_path / "logs") == events(finished_run.folder / "logs")


@pytest.mark.parametrize("number, step", [(signal.SIGTERM, 3), (signal.SIGINT, 6)])
def test_a_signal_saves_after_the_running_step_and_leaves_the_old_handlers(tmp_path, number, step):
    """After step 6, the end of an epoch, the run is validated first."""

    def send(progress):
        if progress.step == step:
            signal.raise_signal(number)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as caught:
        trainer_in(tmp_path, on_train_batch_end=send).fit(2, 500)
    assert caught.value.number == number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert saved_steps(tmp_path / "checkpoint") == [step]
    assert saved_steps(tmp_path / "best") == ([6] if step == 6 else [])
    validated = events(tmp_path / "logs").get(("validation", "accuracy"), [])
    assert [number for number, _ in validated] == ([6] if step == 6 else [])


def test_with_an_accelerator_a_step_starts_before_the_last_result_is_read(tmp_path, finished_run):
    order = []
    trainer = trainer_in(tmp_path, on_train_batch_end=lambda at: order.append(at.step))
    step = trainer.train_step
    trainer.steps_ahead = 1

    def train_step(batch):
        order.append("start")
        return step(batch)

    trainer.train_step = train_step
    trainer.fit(2, 5)
    # Before a checkpoint (steps 5, 6, 10 and 12) all results are read.
    assert order[:10] == ["start", "start", 1, "start", 2, "start", 3, "start", 4, 5]
    assert order[10:] == ["start", 6, "start", "start", 7, "start", 8, "start", 9, 10] + [
        "start", "start", 11, 12,
    ]  # fmt: skip
    assert same(state(trainer), finished_run.state)
    assert events(tmp_path / "logs") == events(finished_run.folder / "logs")


def test_a_signal_with_results_pending_reads_and_logs_them_before_it_saves(tmp_path):
    trainer = trainer_in(
        tmp_path,
        validation=False,
        on_train_batch_end=lambda at: at.step == 2 and signal.raise_signal(15),
    )
    trainer.steps_ahead = 1
    with pytest.raises(Interrupted):
        trainer.fit(2, 500)
    assert saved_steps(tmp_path / "checkpoint") == [3]
    assert [step for step, _ in events(tmp_path / "logs")["train", "accuracy"]] == [1, 2, 3]
    assert trainer.state.sums[-1] == 3 * 8


def test_more_epochs_resume_and_no_more_epochs_change_nothing(run_copy, finished_run):
    def times():
        return {p: p.stat().st_mtime_ns for p in run_copy.rglob("*[!k]") if p.is_file()}

    trainer, before = trainer_in(run_copy), times()  # without the files NAME.lock
    assert trainer.fit(2, 5) is False and trainer.state.step == 12
    assert times() == before and same(state(trainer), finished_run.state)
    began = []
    longer = trainer_in(run_copy, on_train_begin=began.append)
    assert longer.fit(13 / 6, 5)
    assert longer.resumed_step == 12 and began == [12] and longer.state.step == 13
    steps = [step for step, _ in events(run_copy / "logs")["train", "accuracy"]]
    assert steps == list(range(1, 14))


def test_one_trainer_may_train_in_parts_of_epochs_and_ends_as_in_one_go(tmp_path, finished_run):
    epochs, began = [], []
    trainer = trainer_in(
        tmp_path,
        on_train_batch_end=lambda at: epochs.append((at.epoch, at.epochs)),
        on_train_begin=began.append,
    )
    for part, step in (0.5, 3), (1.1, 7), (2, 12):  # an epoch has 6 steps
        assert trainer.fit(part, 500)
        assert trainer.state.step == step and saved_steps(tmp_path / "checkpoint")[0] == step
    assert not trainer.fit(2, 500)
    assert same(state(trainer), finished_run.state)
    assert epochs == [(1, 1)] * 3 + [(1, 2)] * 3 + [(2, 2)] * 6 and began == [0, 3, 7]
    assert events(tmp_path / "logs") == events(finished_run.folder / "logs")
    # But it does not start over.
    with pytest.raises(ValueError, match="at step 12 and cannot start over, expected a new one"):
        trainer.fit(3, 500, restart=True)
    assert saved_steps(tmp_path / "checkpoint") == [12, 7]
    for path in (tmp_path / "checkpoint").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="cannot start over"):
        trainer.fit(3, 500)


# The child trains until it is killed.
CHILD = """
import os, pathlib, sys
root, folder = map(pathlib.Path, sys.argv[1:])
sys.path[:0] = [str(root), str(root / "tests")]
import engine
def kill(progress):
    if progress.step == 11:
        os.kill(os.getpid(), 9)
engine.trainer_in(folder, on_train_batch_end=kill).fit(2, 5)
"""


def test_a_run_killed_in_the_middle_of_an_epoch_ends_bit_for_bit_as_one_that_was_not(
    tmp_path, finished_run
):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, ROOT, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    saves, logs = tmp_path / "checkpoint", tmp_path / "logs"
    # What a kill while saving, and one while events are cut, leave.
    (saves / "ckpt-7.data-00000-of-00001").write_bytes(b"half")
    (logs / "train" / ".events.out.tfevents.1.half").write_bytes(b"half")
    assert saved_steps(saves) == [10, 6]
    resumed = trainer_in(tmp_path)
    resumed.network.set_weights([0 * w for w in resumed.network.get_weights()])
    resumed.fit(2, 5)
    assert resumed.resumed_step == 10 and same(state(resumed), finished_run.state)
    assert events(logs) == events(finished_run.folder / "logs")
    for name in ("checkpoint", "best"):
        assert {*os.listdir(tmp_path / name)} == {*os.listdir(finished_run.folder / name)}
    assert not [path for path in logs.rglob(".*")]


# --- Other settings, other runs -------------------------------------------------------------------


def test_an_unfinished_run_of_other_settings_is_refused_until_it_is_archived(tmp_path):
    crash(trainer_in(tmp_path, settings={"dataset": "a"}), 7)
    lines = []
    trainer = trainer_in(
        tmp_path, settings={"dataset": "b"}, learning_rate=0.5, on_message=lines.append
    )
    with pytest.raises(RunMismatch) as caught:
        trainer.fit(2, 500)
    error = caught.value
    assert (error.folder, error.step, error.last_step) == (tmp_path / "checkpoint", 6, 12)
    assert error.differences == (
        "dataset is a there and b here, learning_rate is 0.001 there and 0.5 here"
    )
    assert saved_steps(tmp_path / "checkpoint") == [6, 5] and not lines
    trainer.fit(1, 500, restart=True)
    assert trainer.resumed_step is None
    assert lines == [f"Moved the earlier run aside: {tmp_path}/checkpoint.1, {tmp_path}/logs.1"]
    for name, saved in ("checkpoint", [6]), ("checkpoint.1", [6, 5]), ("best.1", [6]):
        assert saved_steps(tmp_path / name) == saved
    datasets = [
        read_metadata(tmp_path / f"checkpoint{end}", 6)["training"]["dataset"] for end in ("", ".1")
    ]
    assert datasets == ["b", "a"]
    assert len(events(tmp_path / "logs")["train", "accuracy"]) == 6
    assert len(events(tmp_path / "logs.1")["train", "accuracy"]) == 7


def test_a_finished_run_of_other_settings_is_archived_under_the_first_free_number(run_copy):
    (run_copy / "logs.1").mkdir()
    lines = []
    trainer = trainer_in(run_copy, validation=False, on_message=lines.append, seed=3)
    start = trainer.network.get_weights()
    trainer.fit(1 / 6, 500)
    assert trainer.resumed_step is None
    assert lines == [f"Moved the earlier run aside: {run_copy}/checkpoint.2, {run_copy}/logs.2"]
    assert saved_steps(run_copy / "checkpoint.2") == [12, 10]
    assert saved_steps(run_copy / "checkpoint") == [1]
    assert not (run_copy / "checkpoint.1").exists()
    assert len(events(run_copy / "logs.2")["train", "accuracy"]) == 12
    # It started from its own weights: Adam's first step is of the learning rate at most.
    for one, other in zip(trainer.network.get_weights(), start, strict=True):
        assert np.abs(one - other).max() < 0.0011


def test_restart_in_an_empty_folder_just_starts(tmp_path):
    lines = []
    trainer = trainer_in(tmp_path, validation=False, on_message=lines.append)
    assert trainer.fit(1 / 6, 500, restart=True)
    assert not lines and saved_steps(tmp_path / "checkpoint") == [1]


def test_a_second_run_in_a_folder_is_refused_while_the_first_trains_and_not_after(tmp_path):
    second = trainer_in(tmp_path, validation=False)
    refused = []

    def on_step(progress):
        own = second.run
        for name in own.folders._fields:  # each folder has a lock of its own
            others = {
                field: tmp_path / "elsewhere" / field
                for field in own.folders._fields
                if field != name
            }
            second.run = own._replace(folders=own.folders._replace(**others))
            with pytest.raises(FolderInUse) as caught:
                second.fit(1, 500)
            refused.append(caught.value.folder)
        second.run = own

    trainer_in(tmp_path, validation=False, on_train_batch_end=on_step).fit(1 / 6, 500)
    assert refused == [tmp_path / name for name in ("checkpoint", "best", "logs")]
    assert second.state.step == 0 and second.fit(1 / 3, 500) and second.resumed_step == 1


def test_the_events_and_best_weights_of_another_run_are_not_touched(run_copy):
    for name in ("logs", "best"):
        assert (run_copy / name / "run").read_text() == "../checkpoint\n"
        other = trainer_in(run_copy)
        folders = other.run.folders._replace(
            checkpoint=run_copy / "elsewhere",
            **{"logs": run_copy / "new"} if name == "best" else {},
        )
        other.run = other.run._replace(folders=folders)
        other.checkpoints.folder = folders.checkpoint
        before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
        with pytest.raises(FolderTaken) as caught:
            other.fit(2, 500)
        assert caught.value.folder == run_copy / name
        assert caught.value.owner.resolve() == run_copy / "checkpoint"
        assert before == {path: path.read_bytes() for path in before}


def test_without_its_best_weights_a_run_takes_the_next_ones_as_best(run_copy):
    for path in (run_copy / "best").iterdir():
        path.unlink()
    trainer = trainer_in(run_copy)
    fake_evaluations(trainer, [(1e6, 0)])
    trainer.fit(3, 500)
    assert saved_steps(run_copy / "best") == [18] and trainer.state.best_loss == 1e6


def test_the_best_weights_of_a_run_whose_checkpoints_were_deleted_stay_until_the_next_ones(
    run_copy,
):
    for path in (run_copy / "checkpoint").iterdir():
        path.unlink()
    seen = []
    # Another network: what is in the folder does not fit it.
    trainer = trainer_in(
        run_copy,
        net=network(units=5),
        on_train_batch_end=lambda _: seen.append(saved_steps(run_copy / "best")),
    )
    trainer.fit(1, 500)
    assert seen == [[12]] * 6 and saved_steps(run_copy / "best") == [6]
    assert read_metadata(run_copy / "best", 6)["shape"]["units"] == 5


# --- Numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("spoiled, saved, named", [(4, 3, 5), (12, 9, 12)])
def test_numbers_that_are_not_finite_stop_the_training_and_are_never_saved(
    tmp_path, spoiled, saved, named
):
    def spoil(progress):
        if progress.step == spoiled:
            kernel = trainer.network.hidden.kernel
            kernel.assign(kernel * math.nan)

    trainer = trainer_in(tmp_path, validation=False, on_train_batch_end=spoil)
    what = "a weight is" if named == 12 else "the loss is"
    with pytest.raises(NotFinite, match=f"{what} not finite at step {named};") as caught:
        trainer.fit(2, 3)
    assert caught.value.step == named
    assert saved_steps(tmp_path / "checkpoint")[0] == saved


# --- It learns ------------------------------------------------------------------------------------


def test_a_small_capsule_network_learns_3000_digits_and_reads_nine_of_ten_unseen_ones(tmp_path):
    mnist = datasets.load_dataset("mnist", ROOT / "data")
    data = Examples(mnist.x_train[:3000], mnist.y_train[:3000], 0, 2)
    unseen = Examples(mnist.x_test[:1000], mnist.y_test[:1000])
    keras.utils.set_random_seed(0)
    net = CapsNet(
        (28, 28, 1), 10, n_conv=24, n_primary=4, digit_dim=8, decoder_units=(64, 128), conv="dft"
    )
    config = TrainingConfig(batch_size=20, learning_rate=0.003)
    run = Run(folders_in(tmp_path))
    Trainer(net, data, config, run, device=Device(jit=False)).fit(2, 500)
    evaluation = Evaluator(net, jit=False).evaluate(unseen, unseen.evaluation_plan())
    assert len(evaluation.correct) == 1000 and evaluation.accuracy >= 0.9
    # It sees what it reads: its reconstructions are better than the mean training image.
    pixels = unseen.images / 255
    blank = np.square(pixels - data.images.mean(axis=0) / 255).sum(axis=(1, 2, 3)).mean()
    assert evaluation.losses["reconstruction"] < 0.9 * blank


def test_the_classes_of_the_tiny_network_are_those_of_its_data():
    assert blobs(6).class_names == CLASSES and set(blobs(6).labels) == {0, 1, 2}
