"""`--export`: write the network for use without this program."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import ops
from capsnet import config
from capsnet.errors import UserError
from commands.evaluate import training_seconds
from inputs.appearance import KEY, PLAIN
from model import CapsNet
from runtime.terminal import report_written
from training.checkpoints import METADATA, by_path
from utils import ROOT


def export(session):
    """Write the network to a new folder, with a card that says what it is.

    Raises:
        UserError: the folder is not new, or cannot be written.
    """
    folder, result = Path(session.flags.export), None
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((session.folders.logs / "test.json").read_text("utf-8"))
    metadata = session.metadata | {"seconds": training_seconds(session)}
    if session.appearance != PLAIN:  # checkpoints of earlier versions do not say it
        metadata[KEY] = session.appearance.to_metadata()
    card = model_card(session, metadata, result)
    write_network(session.network, folder, metadata, card, session.digits_per_example)
    names = ("capsnet.keras", "saved_model", "weights.npz", "README.md")
    report_written([folder / name for name in names])


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
        network: CapsNet. It is written with direct convolutions, which run on any machine.
        folder: gets capsnet.keras (needs ops and model to be imported), saved_model (needs only
            TensorFlow), weights.npz (float16, for `load_pretrained`) and README.md.
        metadata: metadata of the checkpoint.
        card: text of README.md.
        digits: K, in each image.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    check_new(folder)
    folder = Path(folder)
    portable = CapsNet(**network.settings | {"conv": "direct"}, dtype="float32")
    portable.set_weights(network.get_weights())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        unfinished = Path(temporary, folder.name)
        archive_with_endpoint(portable, digits).write_out(
            str(unfinished / "saved_model"), verbose=False
        )
        portable.save(unfinished / "capsnet.keras")
        halves = {
            path: value.numpy().astype(np.float16)
            for path, value in by_path(network.variables).items()
        }
        np.savez_compressed(
            unfinished / "weights.npz", **{METADATA: json.dumps(metadata)}, **halves
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        os.replace(unfinished, folder)


def archive_with_endpoint(network, digits):
    """Return an ExportArchive that serves lengths, capsules and reconstructions of images.

    Args:
        network: CapsNet.
        digits: K, how many of the longest capsules are reconstructed.
    """

    def serve(images):
        lengths, capsules = network(images)
        mask = ops.label_mask(ops.longest(lengths, digits), lengths.shape[1])
        return {
            "lengths": lengths,
            "capsules": capsules,
            "reconstructions": network.decoder(capsules, mask),
        }

    archive = keras.export.ExportArchive()
    archive.track(network)
    shape = (None, *network.settings["image_shape"])
    archive.add_endpoint("serve", serve, [tf.TensorSpec(shape, tf.float32, name="images")])
    return archive


def model_card(session, metadata, result):
    """Describe a network in Markdown: its training, what it reaches and how to load it.

    Args:
        session: Session.
        metadata: metadata of the weights, with the seconds of their training.
        result: contents of test.json, or None; quoted if it is of these weights.
    """
    training, (height, width, channels) = metadata["training"], metadata["shape"]["image_shape"]
    tested = result and (result["checkpoint_step"], result["training"])
    if tested == (metadata["step"], training):
        measured = (
            f"{result['error_percent']:.2f}% error ({result['wrong']:,} of "
            f"{result['images']:,} wrong), {result['date'][:10]}, TensorFlow "
            f"{result['versions']['tensorflow']}."
        )
    else:
        measured = "Not measured: these weights were exported without a test."
    duration = f" in {metadata['seconds'] / 60:.0f} minutes" if metadata["seconds"] else ""
    if training.get("initial_weights"):
        duration += ", starting with exported weights"
    settings = metadata["shape"] | training
    if session.flags.multi_MNIST:
        settings.setdefault("multi_shift", config.MULTI_SHIFT)  # not named if it is the default
        measured += "\nA pair of digits is wrong if at least one of them is."
    return (
        (ROOT / "assets" / "model_card.md")
        .read_text("utf-8")
        .format(
            name=session.name,
            parameters=f"{session.network.count_params():,}",
            steps=f"{metadata['step']:,}",
            seconds=duration,
            height=height,
            width=width,
            channels=channels,
            figures=measured,
            dims=metadata["shape"]["digit_dim"],
            shown=session.digits_per_example,
            classes=len(session.class_names),
            names=", ".join(session.class_names),
            overlap=" --multi_MNIST" if session.flags.multi_MNIST else "",
            settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        )
    )
