"""What the tests of the command line share: few images, small networks, and typed commands."""

import contextlib
import io
import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import main
from capsnet_core.metadata import complete
from commands.data import load_data
from commands.devices import choose_devices
from commands.train import frozen, make_trainer, network_config
from commands.weights import Weights, build_network, load
from inputs import datasets
from model import CapsNet
from training.checkpoints import Checkpoints, RunState

ROOT = Path(__file__).parent.parent
DATA = f"--data_dir={ROOT / 'data'}"
NETWORK = ["--n_conv=8", "--n_primary=2", "--digit_dim=4"]
QUICK = [DATA, "--jit=off"]
FAST = [*QUICK, *NETWORK]
TRAINING = ["--train_size=300", "--batch_size=20", "--learning_rate=0.01", "--epoch=1"]
SMALL = [*FAST, *TRAINING]  # 15 steps
PICTURES = {
    *(f"samples/{name}.png" for name in ("samples_arrange", "reconstruction")),
    *(f"samples/recon_samples_{mask}_label_arrange.png" for mask in ("with", "without")),
    *(f"tweak/tweak_result_{dim}.png" for dim in range(4)),
    "tweak/overview.png",
    "tweak/sweep.gif",
}
# Settings of a run that the commands read.
RUN = {
    "seed": 0,
    "reconstruction_weight": 0.0005,
    "averaging": 0.0,
    "train_size": 0,
    "data": "",
}
load_all = datasets.load_dataset


class Result(NamedTuple):
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    err: str


def last_values(words):
    """Return the words of a command line with the last value of each flag, which overrides it."""
    flags = {str(word).removeprefix("--no").lstrip("-").split("=")[0]: str(word) for word in words}
    return list(flags.values())


def run(folder, *words):
    """Run a command line in a folder. See `last_values`."""
    words = last_values(words)
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.main(["main.py", *map(str, words)])
    finally:
        os.chdir(before)
    return Result(code, out.getvalue(), err.getvalue())


def assert_refused(result, code, *words):
    """Check that a command was refused in a single line on standard error with these words."""
    assert result.code == code
    assert re.fullmatch(r"main\.py: [^\n]+\n", result.err)
    for word in words:
        assert word in result.err


def files(folder):
    """Return all files but locks and claims of folders; events without time and process."""
    return {
        re.sub(r"(tfevents)\..*\.", r"\1.", str(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != "run"
    }


def small_network(image_shape=(28, 28, 1), n_classes=10, **options):
    """Return a CapsNet of the sizes in NETWORK."""
    return CapsNet(image_shape, n_classes, n_conv=8, n_primary=2, digit_dim=4, **options)


def varied_network(image_shape=(28, 28, 1)):
    """Return an untrained CapsNet whose predictions are of many classes, often wrong."""
    network, stream = small_network(image_shape), np.random.default_rng(7)
    for variable in network.variables:
        scale = 0.3 if variable.path.endswith("digit_capsules/W") else 0.1
        variable.assign(stream.normal(0, scale, variable.shape))
    return network


def save_checkpoint(
    folder, network, description=None, step=15, last_step=15, shape=None, **training
):
    """Write a checkpoint of a network that was never trained, and return its metadata.

    Args:
        folder: of the checkpoints.
        network: CapsNet.
        description: what else is saved with the weights, see `Trainer`.
        step: of the checkpoint.
        last_step: of the run.
        shape: another description than that of the network's config, or None.
        **training: settings of the run that are not the default ones.
    """
    optimizer = keras.optimizers.Adam(name="adam")
    optimizer.build(network.trainable_variables)
    metadata = {
        "shape": shape or network.config.describe(),
        "training": RUN | training,
        "step": step,
        "last_step": last_step,
        **(description or {}),
    }
    n_sums = len(network.config.loss_terms) + 2
    checkpoints = Checkpoints(folder, network, optimizer, n_sums)
    checkpoints.save(RunState(step=step, sums=np.zeros(n_sums)), metadata)
    return metadata


def save_exported(folder, network, **training):
    """Write weights.npz as an export has it, and return the values, rounded to float16.

    Args:
        folder: a new folder.
        network: of any kind.
        **training: settings of the run that are not the default ones.
    """
    halves = {v.path: v.numpy().astype(np.float16) for v in network.variables}
    metadata = {"shape": network.config.describe(), "training": RUN | training, "step": 15}
    folder.mkdir(parents=True)
    np.savez(folder / "weights.npz", facts=json.dumps(metadata | {"seconds": None}), **halves)
    return {path: half.astype(np.float32) for path, half in halves.items()}


def write_events(path, *points):
    """Write an event file of the total loss: (seconds, step), …"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for seconds, step in points:
            event = tf.compat.v1.Event(wall_time=seconds, step=step)
            tensor = tf.make_tensor_proto(1.0, tf.float32)
            event.summary.value.add(tag="loss/total", tensor=tensor)
            writer.write(event.SerializeToString())


def first_images(dataset, n_train, n_test):
    """Return a Dataset of the first images only."""
    return dataset._replace(
        x_train=dataset.x_train[:n_train],
        y_train=dataset.y_train[:n_train],
        x_test=dataset.x_test[:n_test],
        y_test=dataset.y_test[:n_test],
    )


class Command:
    """A command line, and what its modes are given.

    Args:
        *words: the command line. See `last_values`.
    """

    def __init__(self, *words):
        self.argv = ["main.py", *last_values(words)]
        self.flags = main.parse(self.argv)
        self.devices = choose_devices(self.flags)

    @cached_property
    def data(self):
        """The CommandData."""
        return load_data(self.flags, print)

    @property
    def config(self):
        """The config of the network that --train makes."""
        return network_config(self.flags, self.data)

    def network(self):
        """The network that --train makes, with first weights."""
        flags = self.flags
        first = flags.initialization, frozen(flags)
        return build_network(self.config, flags.seed, self.devices, *first)

    def trainer(self, report=print):
        """The Trainer that --train makes."""
        return make_trainer(self.flags, self.config, self.devices, self.data, report)

    def load(self):
        """The Weights that the other modes examine."""
        return load(self.flags, self.devices)


def weights_of(network, **training):
    """Return the Weights of a network, as if they had been loaded from a checkpoint.

    Args:
        network: of any kind.
        **training: settings of the run that are not the default ones.
    """
    metadata = {
        "shape": network.config.describe(),
        "training": RUN | training,
        "step": 15,
        "last_step": 15,
    }
    return Weights(network, complete(metadata), Path("checkpoint/mnist"))


class Story:
    """Commands typed one after another in one folder: their results, and the files after each."""

    def __init__(self, folder):
        self.folder, self.results, self.files = folder, {}, {}

    def type(self, name, *words):
        """Run a command, which must succeed."""
        self.results[name] = run(self.folder, *words)
        self.files[name] = files(self.folder)
        assert self.results[name].code == 0, self.results[name]


def compose_slowly(images, plan, padding):
    """Shift and overlay digits image by image: (N, H', W', C) float32."""
    height, width, channels = images.shape[1:]
    size = (len(plan.index), height + 2 * padding, width + 2 * padding, channels)
    canvas = np.zeros(size, np.float32)
    for number, (index, shift) in enumerate(zip(plan.index, plan.shift, strict=True)):
        for image, (down, right) in zip(images[index], shift, strict=True):
            y, x = padding + down, padding + right
            canvas[number, y : y + height, x : x + width] += image / np.float32(255)
    return np.minimum(canvas, 1)


def decode(network, capsules, classes):
    """Reconstruct one capsule of each image: (N, J, D), (N,) -> (N, H, W, C)."""
    chosen = np.zeros_like(capsules)
    chosen[np.arange(len(classes)), classes] = capsules[np.arange(len(classes)), classes]
    every = np.ones((len(classes), 1, capsules.shape[1]), np.float32)
    return network.decoder(chosen, every).numpy()[:, 0]
