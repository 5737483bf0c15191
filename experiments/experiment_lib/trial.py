"""One training and test of a network. It resumes where it was stopped, and is never done twice."""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

import model
import utils
from capsnet_core import errors
from capsnet_core.config import SAVE_STEPS
from inputs.pipeline import Examples, Plan
from runtime import machine, terminal
from training.callbacks import Printing
from training.checkpoints import load_weights
from training.evaluation import Evaluator
from training.events import read_scalars
from training.folders import Folders
from training.trainer import Run, Trainer

CLASSES = 10
CHECKS = 2  # times in an epoch that the accuracy is checked
TOLERANCE = 1e-9  # 99.23 / 100 is a little more than 9923 / 10000
# Errors of a training run against which its folder can be removed.
CURED_BY_REMOVAL = (
    errors.DamagedCheckpoints,
    errors.FolderTaken,
    errors.NetworkMismatch,
    errors.NotFinite,
    errors.RunMismatch,
)


class Goal(NamedTuple):
    """An accuracy on held-out images at which training stops, looked at CHECKS times an epoch."""

    accuracy: float
    data: Examples
    plan: Plan


def reaches(accuracy, goal):
    """Return whether an accuracy is as high as a goal, both in [0, 1]."""
    return accuracy > goal - TOLERANCE


def make_network(image_shape, architecture=None, **settings):
    """Create a CNN of an architecture, or else a CapsNet, for MNIST's classes.

    Args:
        image_shape: (H, W, C).
        architecture: see `capsnet_core.networks.CNNConfig`; None for a CapsNet.
        **settings: other settings of the network.
    """
    conv = machine.fastest_conv()
    if architecture:
        return model.CNN(image_shape, CLASSES, architecture, conv=conv, **settings)
    return model.CapsNet(image_shape, CLASSES, conv=conv, **settings)


def run(
    folder, make, train_data, test_data, training, epochs, plan=None, goal=None, more_tests=None
):
    """Train a network and test it, unless both were done before.

    Args:
        folder: where to write; it gets an ending, and training runs that differ in anything never
            share one.
        make: function of no arguments that creates the network.
        train_data: Examples.
        test_data: Examples.
        training: TrainingConfig.
        epochs: to train for, in total.
        plan: Plan of the test, None for that of `Examples.evaluation_plan`.
        goal: Goal, or None.
        more_tests: function of the Evaluator that returns more entries of the result.

    Returns:
        A dict of the result with all that it depends on. In the folder are checkpoint/ (the
        weights), logs/ and result.json (that dict).

    Raises:
        UserError, Interrupted: as `Trainer.fit`.
    """
    keras.utils.set_random_seed(training.seed)
    network = make()
    evaluator = Evaluator(network, jit=True)
    settings = {
        "network": network.config.describe(),
        "training": training._asdict(),
        "epochs": None if goal else epochs,
        "until": [goal.accuracy, CHECKS] if goal else None,
        "data": digest_data(train_data, test_data, plan),
    }
    settings = json.loads(json.dumps(settings))  # tuples as they come back from a file: lists
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(f"{folder}_{key}")
    result = folder / "result.json"
    if result.exists():
        outcome = json.loads(result.read_text())
        if is_final(outcome, epochs, goal):
            return outcome
    try:
        progress = train(
            network, evaluator, train_data, training, folder, settings["data"], epochs, goal
        )
        load_weights(network, folder / "checkpoint", print)
    except CURED_BY_REMOVAL as error:
        raise errors.UserError(
            f"{error}; delete {folder} and give the same command again to start over"
        ) from error
    outcome = settings | progress | measure_accuracy(evaluator, test_data, plan)
    outcome["training_seconds"] = read_scalars(folder / "logs" / "train")[1]
    outcome["parameters"] = count_trained(network, training)
    outcome |= (more_tests(evaluator) if more_tests else {}) | machine.provenance()
    utils.write_json(result, outcome)
    return outcome


def digest_data(train_data, test_data, plan):
    """Return a fingerprint of all data of a trial."""
    digest = hashlib.sha256()
    for data in (train_data, test_data):
        digest.update(np.ascontiguousarray(data.images))
        digest.update(np.ascontiguousarray(data.labels))
        digest.update(repr(data[2:]).encode())
    for part in plan or ():
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


def is_final(outcome, epochs, goal):
    """Return whether a result stays as it is: a goal that was missed may now have more epochs."""
    if goal is None or reaches(outcome["held_out_accuracy"], goal.accuracy):
        return True
    return outcome["trained_epochs"] >= epochs


def train(network, evaluator, data, training, folder, fingerprint, epochs, goal):
    """Train a network, or resume; see `run`.

    Returns:
        dict of the epochs trained, and the accuracy on the held-out images (None without a goal).
    """
    folders = Folders(*(folder / name for name in ("checkpoint", "best", "logs")))
    with terminal.Display() as display:
        run = Run(folders, {"data": fingerprint})
        trainer = Trainer(network, data, training, run, callbacks=[Printing(display)])
        if goal is None:
            trainer.fit(epochs, SAVE_STEPS)
            return {"trained_epochs": epochs, "held_out_accuracy": None}
        for check in range(1, CHECKS * epochs + 1):
            trained = check / CHECKS
            trainer.fit(trained, SAVE_STEPS)
            if trainer.state.step > math.ceil(trained * trainer.steps_per_epoch):
                if check < CHECKS * epochs:
                    continue  # an earlier command has trained further
                trained = trainer.state.step / trainer.steps_per_epoch
            with trainer.averaged():
                reached = evaluator.evaluate(goal.data, goal.plan).accuracy
            display.report(
                f"Held-out accuracy after {terminal.plural(trained, 'epoch')}: {100 * reached:.2f}%"
            )
            if reaches(reached, goal.accuracy):
                break
    return {"trained_epochs": trained, "held_out_accuracy": reached}


def measure_accuracy(evaluator, data, plan):
    """Return the accuracy on a plan of the test data, by default on all of them."""
    plan = data.evaluation_plan() if plan is None else plan
    correct = evaluator.evaluate(data, plan).correct
    wrong = int((~correct).sum())
    return {
        "accuracy": float(correct.mean()),
        "error_percent": 100 * wrong / len(correct),
        "wrong": wrong,
        "images": len(correct),
    }


def count_trained(network, training):
    """Count the parameters; a decoder that has no part in the loss is not trained."""
    count = network.count_params()
    if not training.reconstruction_weight and hasattr(network, "decoder"):
        count -= network.decoder.count_params()
    return count
