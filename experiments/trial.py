"""One training and test of a network of an experiment, which goes on where it was stopped."""

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CHECKS = 2  # of the accuracy at which to stop, in an epoch
sys.path.insert(0, str(ROOT))

import utils


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def positive(text, most=math.inf):
    if not re.fullmatch(r"\d+", text) or not 1 <= int(text) <= most:
        bound = f" to {most}" * (most < math.inf)
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1{bound}")
    return int(text)


def reaches(accuracy, enough):
    """Whether an accuracy is enough; 99.23 / 100 is a little more than 9923 / 10000."""
    return accuracy > enough - 1e-9


def some_of(names):
    """The type of a flag that takes some of these names, with commas between them."""

    def parse(text):
        words = text.split(",")
        if set(words) - set(names) or len(set(words)) < len(words):
            raise argparse.ArgumentTypeError(f"{text!r}, expected some of {','.join(names)}, each once")
        return words

    return parse


@functools.cache
def commit():
    """The commit of the program when it began."""
    import main

    return main.commit()


def start():
    """Import TensorFlow as main.py does: big buffers kept, remarks kept off the terminal."""
    utils.keep_big_buffers()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import main

    commit()
    with main.without_remarks():
        import tensorflow as tf

        import model

        tf.config.list_physical_devices()
        tf.get_logger().setLevel("ERROR")
    return tf, model


def run(folder, make, train_data, test_data, how, epochs, plan=None, until=None):
    """Train a network and test it; what was done before is not done again.

    Args:
        folder: where to, but for an ending: trainings that differ in anything never share one.
        make: function of no arguments -> network.
        train_data, test_data: model.Data.
        how: model.Training.
        epochs: to train for, in all.
        plan: of the test, if it is not `test_data.evaluation_plan()`.
        until: (accuracy, data, plan): held-out training images, and the accuracy on them at which,
            looked at CHECKS times an epoch, training stops; or None.

    Returns:
        dict: accuracy, wrong, images, epochs, seconds of training, parameters, and what it was; and
        the folder, in which are checkpoint/ (the weights), logs/ and result.json (that dict).

    Raises:
        utils.UserError, model.Interrupted: as the Trainer.
    """
    tf, model = start()
    import main

    digest = hashlib.sha256()
    for data in (train_data, test_data):
        digest.update(np.ascontiguousarray(data.images))
        digest.update(np.ascontiguousarray(data.labels))
        digest.update(repr(data[2:]).encode())
    for part in plan or ():
        digest.update(np.ascontiguousarray(part))
    digest = digest.hexdigest()[:16]
    tf.keras.utils.set_random_seed(how.seed)
    network = make()
    wanted = json.loads(json.dumps({
        "network": model.shape_of(network), "training": how._asdict(),
        "epochs": None if until else epochs,
        "until": until and [until[0], CHECKS], "data": digest}))
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(f"{folder}_{key}")
    result = folder / "result.json"
    if result.exists():
        outcome = json.loads(result.read_text())
        # One that was not good enough may now have more epochs.
        if not until or reaches(outcome["held_out_accuracy"], until[0]) or (
                outcome["trained_epochs"] >= epochs):
            return outcome, folder
    folders = model.Folders(*(folder / name for name in ("checkpoint", "best", "logs")))
    reached = None
    remedy = f"the same command goes on from what is in {folder}, without that folder it begins anew"
    with main.Display() as display, without_flags(remedy):
        trainer = model.Trainer(network, train_data, None, how, folders, {"data": digest},
                                report=display.report)
        if until:
            enough, held_out, held_out_plan = until
            forward = model.compile_forward(network, held_out, True)
        done = [part / CHECKS for part in range(1, CHECKS * epochs + 1)] if until else [epochs]
        for trained in done:
            trainer.fit(trained, on_step=display.step)
            if until and trainer.step == math.ceil(trained * trainer.steps_per_epoch):
                with trainer.averaged():
                    reached = model.evaluate(forward, held_out, held_out_plan)["accuracy"]
                display.report(f"Held-out accuracy after {trained:g} epoch{'s' * (trained != 1)}: "
                               f"{100 * reached:.2f}%")
                if reaches(reached, enough):
                    break
    model.load_weights(network, folders.checkpoint, print)
    found = model.evaluate(model.compile_forward(network, test_data, True), test_data,
                           test_data.evaluation_plan() if plan is None else plan)
    wrong = int((~found["correct"]).sum())
    # What has no part in the loss is not trained, and not counted.
    unused = 0 if how.reconstruction_weight or not hasattr(network, "decoder") else (
        network.decoder.count_params())
    outcome = wanted | {
        "accuracy": found["accuracy"], "error_percent": 100 * wrong / len(found["correct"]),
        "wrong": wrong, "images": len(found["correct"]), "trained_epochs": trained,
        "held_out_accuracy": reached,
        "training_seconds": model.read_scalars(folders.logs / "train")[1],
        "parameters": network.count_params() - unused, "machine": main.machine(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__},
    }
    utils.write_json(result, outcome)
    return outcome, folder


@contextlib.contextmanager
def without_flags(remedy):
    """Leave out of errors what they advise of main.py's flags; if nothing is left, give a remedy."""
    try:
        yield
    except utils.UserError as error:
        what, *advice = re.split("; |, or ", str(error))
        kept = [part for part in advice if "--" not in part]
        if kept == advice:
            raise
        raise utils.UserError(f"{what}; {', or '.join(kept) or remedy}") from None


def report_errors(program, function):
    """The exit code of a function, with one line for what goes wrong, as main.py does it."""
    tf, model = start()
    import main

    try:
        return function()
    except (utils.UserError, OSError, MemoryError, tf.errors.OpError) as error:
        print(f"{program}: {main.problem(error)}", file=sys.stderr)
        return 1
    except model.Interrupted as stop:
        print("Stopped, and saved. To go on: the same command again.", file=sys.stderr)
        return 128 + stop.args[0]
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
