"""What the tests of the command line share: few images, small networks, and typed commands."""

import contextlib
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from commands.session import Session

import main
from inputs import datasets
from model import CapsNet
from training.checkpoints import Checkpoints, RunState

ROOT = Path(__file__).parent.parent
DATA = f"--data_dir={ROOT / 'data'}"
NETWORK = ["--n_conv=8", "--n_primary=2", "--digit_dim=4"]
FAST = [DATA, *NETWORK, "--jit=off"]
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


def save_checkpoint(folder, network, description=None, step=15, last_step=15, **training):
    """Write a checkpoint of a network that was never trained, and return its metadata.

    Args:
        folder: of the checkpoints.
        network: CapsNet.
        description: what else is saved with the weights, see `Trainer`.
        step: of the checkpoint.
        last_step: of the run.
        **training: settings of the run that are not the default ones.
    """
    optimizer = keras.optimizers.Adam(name="adam")
    optimizer.build(network.trainable_variables)
    metadata = {
        "shape": network.architecture,
        "training": RUN | training,
        "step": step,
        "last_step": last_step,
        **(description or {}),
    }
    checkpoints = Checkpoints(folder, network, optimizer, n_sums=4)
    checkpoints.save(RunState(step=step, sums=np.zeros(4)), metadata)
    return metadata


def first_images(dataset, n_train, n_test):
    """Return a Dataset of the first images only."""
    return dataset._replace(
        x_train=dataset.x_train[:n_train],
        y_train=dataset.y_train[:n_train],
        x_test=dataset.x_test[:n_test],
        y_test=dataset.y_test[:n_test],
    )


def make_session(*words, network=None, **training):
    """Return the Session of a command line, as if the weights of a run had been loaded.

    Args:
        *words: the command line.
        network: CapsNet instead of the one that the flags give, or None.
        **training: settings of the run that are not the default ones.
    """
    argv = ["main.py", *last_values(words)]
    session = Session(main.parse(argv), argv)
    if network is not None:
        session.network = network
    session.metadata = {
        "shape": session.network.architecture,
        "training": RUN | training,
        "step": 15,
        "last_step": 15,
    }
    return session


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
