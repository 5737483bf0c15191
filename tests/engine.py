"""A tiny network without capsules, its data and its Trainer, for the tests of `training/`."""

import contextlib
import dataclasses
from typing import ClassVar, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from capsnet_core.config import TrainingConfig
from inputs.pipeline import Examples
from training.callbacks import Callback
from training.folders import Folders
from training.trainer import Device, Run, Trainer

SCALARS = ["loss/total", "loss/entropy", "loss/reconstruction", "accuracy"]
CLASSES = ("a", "b", "c")


class Outputs(NamedTuple):
    """What `TinyNetwork` computes from a batch."""

    scores: tf.Tensor
    predictions: tf.Tensor
    correct: tf.Tensor
    entropy: tf.Tensor
    reconstruction: tf.Tensor


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """What describes a `TinyNetwork`."""

    loss_terms: ClassVar[tuple] = ("entropy", "reconstruction")

    units: int = 4

    def describe(self):
        return {"network": "tiny", "units": self.units, "classes": list(CLASSES)}


class TinyNetwork(keras.Model):
    """A hidden layer, one layer that classifies and one that reconstructs the image from it."""

    def __init__(self, units=4):
        super().__init__()
        self.config = TinyConfig(units)
        self.hidden = keras.layers.Dense(units, "tanh", name="hidden")
        self.logits = keras.layers.Dense(len(CLASSES), name="logits")
        self.pixels = keras.layers.Dense(64, name="pixels")
        self.hidden.build((None, 64))
        self.logits.build((None, units))
        self.pixels.build((None, units))
        self.built = True

    def outputs(self, batch, seed=None):
        return self.outputs_by(self.hidden.kernel.value, batch)

    def outputs_by(self, kernel, batch):
        digits, shift, labels, _ = batch
        moved = tf.cast(digits[:, 0], tf.float32) / 255 + 0.01 * tf.cast(
            tf.reduce_sum(shift, axis=2)[..., None, None], tf.float32
        )
        x = tf.reshape(moved, (-1, 64))
        hidden = tf.tanh(x @ kernel + self.hidden.bias)
        scores = self.logits(hidden)
        predictions = tf.argmax(scores, axis=1, output_type=tf.int32)[:, None]
        return Outputs(
            scores=scores,
            predictions=predictions,
            correct=predictions[:, 0] == tf.cast(labels[:, 0], tf.int32),
            entropy=tf.nn.sparse_softmax_cross_entropy_with_logits(labels[:, 0], scores),
            reconstruction=tf.reduce_sum(tf.square(self.pixels(hidden) - x), axis=1),
        )

    def loss_terms(self, outputs):
        return {"entropy": outputs.entropy, "reconstruction": outputs.reconstruction}

    def inference(self, compile_part):
        return TinyInference(self)


class TinyInference:
    """A `TinyNetwork` that prepares twice its kernel, and halves it again, without rounding."""

    def __init__(self, network):
        self.network = network

    def prepare(self):
        return 2 * self.network.hidden.kernel

    def outputs(self, batch, prepared):
        return self.network.outputs_by(prepared / 2, batch)


def blobs(n, overlap=False, seed=0):
    """Images 8×8 of three classes, each a bright corner in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 60, (n, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * (label // 2) :][:4, 4 * (label % 2) :][:, :4] += 180
    return Examples(images, labels, 2 if overlap else 0, 1, overlap, CLASSES)


def network(seed=0, **settings):
    keras.utils.set_random_seed(seed)
    return TinyNetwork(**settings)


def folders_in(folder):
    return Folders(folder / "checkpoint", folder / "best", folder / "logs")


class Calls(Callback):
    """A Callback whose methods are these functions."""

    def __init__(self, **functions):
        assert all(hasattr(Callback, name) for name in functions)
        vars(self).update(functions)


def trainer_in(
    folder,
    n=45,
    validation=True,
    settings=None,
    description=None,
    net=None,
    strategy=None,
    jit=False,
    callbacks=(),
    **config,
):
    """A Trainer of 45 examples in batches of 8, the last of 5, with 9 others to validate.

    A name that begins with "on_" is a function that its callback of that name calls.
    """
    calls = {name: config.pop(name) for name in list(config) if name.startswith("on_")}
    with (strategy or tf.distribute.get_strategy()).scope():
        net = net or network()
    return Trainer(
        net,
        blobs(n),
        TrainingConfig(**{"batch_size": 8, "decay_steps": 5} | config),
        Run(folders_in(folder), settings or {}, description or {}),
        blobs(9, seed=1) if validation else None,
        Device(strategy, jit),
        [*callbacks, Calls(**calls)],
    )


def state(trainer):
    """All that a step changes: weights and the optimizer's variables."""
    return [v.numpy() for v in (*trainer.network.variables, *trainer.optimizer.variables)]


def same(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def events(folder):
    """What TensorBoard reads: {(run, tag): [(step, value)]}; a repeated step appears twice.

    Sorted by step: files of one second are read in the order of their names, where 10 precedes 9.
    """
    values = {}
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        reader = EventAccumulator(str(run), size_guidance={"tensors": 0}, purge_orphaned_data=False)
        reader.Reload()
        for tag in reader.Tags()["tensors"]:
            values[run.name, tag] = [
                (event.step, tensor_util.make_ndarray(event.tensor_proto).tolist())
                for event in sorted(reader.Tensors(tag), key=lambda event: event.step)
            ]
    return values


class Crash(Exception):
    """A fault on purpose, in the middle of a training run."""


def crash(trainer, step, save_steps=5):
    """Train until a fault after a step."""

    def fail(progress):
        if progress.step == step:
            raise Crash

    trainer.callbacks = [*trainer.callbacks, Calls(on_train_batch_end=fail)]
    with contextlib.suppress(Crash):
        trainer.fit(2, save_steps)
        raise AssertionError("the training did not stop")
