"""`--export`: write the network for use without this program."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from capsnet_core.errors import UserError
from capsnet_core.metadata import complete_training
from commands.data import run_folders, run_name
from commands.reports import training_seconds
from commands.weights import appearance_of
from inputs.appearance import KEY, PLAIN
from model import build
from runtime.terminal import report_written
from training.checkpoints import METADATA, by_path
from utils import ROOT


def export(flags, weights):
    """Write the network to a new folder, with a card that says what it is.

    Raise UserError if the folder is not new, or cannot be written.
    """
    folder, logs, result = Path(flags.export), run_folders(flags).logs, None
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((logs / "test.json").read_text("utf-8"))
    metadata = weights.metadata | {"seconds": training_seconds(weights.metadata, logs)}
    appearance = appearance_of(flags, weights)
    if appearance != PLAIN:  # checkpoints of earlier versions do not say it
        metadata[KEY] = appearance.to_metadata()
    card = model_card(run_name(flags), weights, metadata, result)
    write_network(weights.network, folder, metadata, card, weights.digits_per_example)
    names = (keras_file(weights.network), "saved_model", "weights.npz", "README.md")
    report_written([folder / name for name in names])


def keras_file(network):
    """Return the name of the file that Keras loads."""
    return f"{network.config.network}.keras"


def check_new(folder):
    """Raise UserError if a folder exists and is not empty, or is a file."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists already, expected a new or empty folder; give another name"
        )


def write_network(network, folder, metadata, card, digits=1):
    """Write a network to a new folder, all of it or nothing.

    Args:
        network: it is written with direct convolutions, which run on any machine.
        folder: gets capsnet.keras or cnn.keras (needs ops and model to be imported), saved_model
            (needs only TensorFlow), weights.npz (float16, for `load_network`) and README.md.
        metadata: that of the weights.
        card: text of README.md.
        digits: K, in each image.
    """
    check_new(folder)
    folder = Path(folder)
    portable = build(network.config, initialization=network.initialization)
    portable.set_weights(network.get_weights())
    shape = (None, *network.config.image_shape)

    def serve(images):
        return portable.serve(images, digits)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        unfinished = Path(temporary, folder.name)
        archive = keras.export.ExportArchive()
        archive.track(portable)
        archive.add_endpoint("serve", serve, [tf.TensorSpec(shape, tf.float32, name="images")])
        archive.write_out(str(unfinished / "saved_model"), verbose=False)
        portable.save(unfinished / keras_file(network))
        halves = {
            path: value.numpy().astype(np.float16)
            for path, value in by_path(network.variables).items()
        }
        np.savez_compressed(
            unfinished / "weights.npz", **{METADATA: json.dumps(metadata)}, **halves
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        os.replace(unfinished, folder)


def model_card(name, weights, metadata, result):
    """Describe a network in Markdown: its training run, what it reaches and how to load it.

    Args:
        name: of the run.
        weights: Weights.
        metadata: that of the weights, with the seconds of their training run.
        result: contents of test.json, or None; quoted if it is of these weights.
    """
    training, config = metadata["training"], weights.network.config
    height, width, channels = config.image_shape
    pairs = training["multi_MNIST"]
    duration = f" in {metadata['seconds'] / 60:.0f} minutes" if metadata["seconds"] else ""
    if training["initial_weights"]:
        duration += ", starting with exported weights"
    settings = metadata["shape"] | training
    rows = {key: value for key, value in settings.items() if value not in (None, [], "")}
    template = ROOT / "assets" / f"model_card_{config.network}.md"
    return template.read_text("utf-8").format(
        name=name,
        parameters=f"{weights.network.count_params():,}",
        steps=f"{metadata['step']:,}",
        seconds=duration,
        height=height,
        width=width,
        channels=channels,
        figures=measured(metadata, result),
        dims=settings.get("digit_dim"),
        shown=weights.digits_per_example,
        classes=config.n_classes,
        names=", ".join(weights.class_names),
        overlap=" --multi_MNIST" if pairs else "",
        settings="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )


def measured(metadata, result):
    """Say what a test measured, if `result` is the test.json of weights of this metadata."""
    tested = result and (result["checkpoint_step"], complete_training(result["training"]))
    pairs = "\nA pair of digits is wrong if at least one of them is."
    ending = pairs if metadata["training"]["multi_MNIST"] else ""
    if tested != (metadata["step"], metadata["training"]):
        return f"Not measured: these weights were exported without a test.{ending}"
    return (
        f"{result['error_percent']:.2f}% error ({result['wrong']:,} of "
        f"{result['images']:,} wrong), {result['date'][:10]}, TensorFlow "
        f"{result['versions']['tensorflow']}.{ending}"
    )
