"""What every mode needs, made from the flags: devices, data, folders, the network, its weights."""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np
import tensorflow as tf

import config
import datasets
import runtime
from commands.pretrained import load_pretrained
from errors import UsageError, UserError
from input_pipeline import Data
from model import CapsNet
from training.checkpoints import load_weights
from training.distribution import choose_strategy, is_chief
from training.events import replacing_events
from training.folders import Folders, claim

# Modes that write to the run's log folder, or read its events.
MODES_WITH_LOGS = ("test", "reconstruction_test", "tweak_test", "export")


class Session:
    """Devices, data, folders and network for the flags given.

    Args:
        flags: values of the flags.
        argv: the command line.

    Raises:
        UsageError: a flag asks for what this machine does not have.
        UserError: the data set, or the cluster, is not usable.
    """

    def __init__(self, flags, argv):
        self.flags, self.argv = flags, argv
        self.commit = runtime.commit()  # now: it may be another one after an hour of training
        gpu = runtime.has_gpu()
        if flags.precision != "float32" and not gpu:
            raise UsageError(
                "--precision=mixed_bfloat16 is for accelerators and there is none here, "
                "expected --precision=float32, which is several times faster on a CPU"
            )
        if flags.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.strategy = choose_strategy(flags.strategy, runtime.waiting_for_workers())
        self.chief = is_chief(self.strategy)
        self.conv = runtime.fastest_conv() if flags.conv == "auto" else flags.conv
        fast = gpu or self.conv == "dft"
        self.jit = fast if flags.jit == "auto" else flags.jit == "on"
        self.dataset = self._load_dataset()
        self.name = f"multi_{self.dataset.name}" if flags.multi_MNIST else self.dataset.name
        # More images than there are is the same run as all of them.
        self.train_size = flags.train_size if flags.train_size < len(self.dataset.y_train) else 0
        self.train_data, self.test_data, self.validation_data = self._compose()
        self.folders = self._name_folders()
        self.metadata = None  # of the weights, once they are loaded

    def _load_dataset(self):
        """Load the data set, and print what was changed in it."""
        flags = self.flags
        dataset = datasets.load_dataset(
            flags.dataset, data_folder(flags), image_size(flags.image_size), flags.seed
        )
        if flags.multi_MNIST:
            dataset = datasets.remove_ground(dataset)
        if dataset.x_validation is not None:
            count = f"{dataset.name}: {len(dataset.y_validation)} images of its own to validate"
            unused = "" if flags.validation_check else ", which only --validation_check uses"
            dataset = dataset.with_note(count + unused)
        if self.chief and dataset.notes:
            print("\n".join(dataset.notes), flush=True)
        return dataset

    def _compose(self):
        """Return the Data of training, test and validation (sections 5 and 6).

        That of validation is None if the data set has no images for it.
        """
        flags, dataset = self.flags, self.dataset
        size = self.train_size or None
        if flags.multi_MNIST:
            padding = config.MULTI_PADDING
            train_shift = test_shift = flags.multi_shift
        else:
            padding, test_shift = 0, 0
            train_shift = config.MAX_SHIFT if flags.data_deformation else 0
        names, overlap = dataset.class_names, flags.multi_MNIST
        train, labels = dataset.x_train[:size], dataset.y_train[:size]
        ground = None
        if train_shift and not overlap:
            ground = datasets.even_ground(dataset.x_train)
        validation = None
        if dataset.x_validation is not None:
            validation = Data(
                dataset.x_validation, dataset.y_validation, padding, test_shift, overlap, names
            )
        return (
            Data(train, labels, padding, train_shift, overlap, names, ground),
            Data(dataset.x_test, dataset.y_test, padding, test_shift, overlap, names),
            validation,
        )

    def _name_folders(self):
        """Return the Folders of this run."""
        flags = self.flags
        checkpoints = flags.multi_checkpoint_dir if flags.multi_MNIST else flags.checkpoint_dir
        # Results of the pretrained weights do not mix with those of the user's own run.
        logs = f"{self.name}_pretrained" if flags.pretrained else self.name
        return Folders(
            checkpoint=Path(checkpoints, self.name),
            best=Path(flags.val_checkpoint_dir, self.name),
            logs=Path(flags.logdir, logs),
        )

    @property
    def network_config(self):
        """Return the NetworkConfig that the flags give."""
        names = set(config.NetworkConfig._fields) & set(self.flags)
        return config.NetworkConfig(**{name: getattr(self.flags, name) for name in names})

    @functools.cached_property
    def network(self):
        """Return the network, created at the first use; its weights depend on the seed alone."""
        tf.keras.utils.set_random_seed(self.flags.seed)
        with self.strategy.scope():
            return CapsNet(
                self.train_data.canvas_shape(),
                len(self.dataset.class_names),
                **self.network_config._asdict(),
                conv=self.conv,
                initialization=self.flags.initialization,
                dtype=self.flags.precision,
            )

    def digest(self, train_size):
        """Return a fingerprint of the first `train_size` training images, or of all (0)."""
        kept = slice(train_size or None)
        return fingerprint(self.dataset.x_train[kept], self.dataset.y_train[kept])

    def load(self):
        """Restore the weights to examine, and print where they come from.

        Raises:
            UserError: there are none, or they do not fit the network or the classes.
        """
        if self.flags.pretrained:
            folder = self._pretrained_folder()
            self.metadata = load_pretrained(self.network, folder)
        else:
            best = self.flags.validation_check
            folder = self.folders.best if best else self.folders.checkpoint
            self.metadata = load_weights(self.network, folder, print)
            if self.chief and any(getattr(self.flags, mode) for mode in MODES_WITH_LOGS):
                claim(self.folders.logs, self.folders.checkpoint)  # its files are of one run
        training, names = self.metadata["training"], list(self.dataset.class_names)
        if training.get("class_names", names) != names:
            raise UserError(
                f"{folder} was trained on other classes: {training['class_names']} there and "
                f"{names} here; give the --dataset that it was trained on"
            )
        if training["data"] != self.digest(training["train_size"]):
            print("These weights were trained on other images than those of --dataset.")
        averaged = ", averaged over the last steps" if training.get("averaging") else ""
        print(f"Weights of step {self.metadata['step']} from {folder}{averaged}")

    def _pretrained_folder(self):
        """Return the folder of the weights that come with the program for the data set."""
        if self.flags.dataset in datasets.CLASS_NAMES:
            return runtime.ROOT / "pretrained" / self.name
        return runtime.ROOT / "pretrained" / self.flags.dataset.replace(os.sep, "_")

    def show_picture(self, name, picture):
        """Show a picture (H, W, 3) in TensorBoard; it replaces that of an earlier command."""
        with replacing_events(self.folders.logs / "test", name, self.metadata["step"]):
            tf.summary.image(name, picture[None])


def fingerprint(images, labels):
    """Return a fingerprint of images and their labels."""
    digest = hashlib.sha256()
    for part in (images, labels):
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


def image_size(text):
    """Return the (H, W) that a text such as "32x48" says, None if it is empty."""
    return tuple(map(int, text.split("x"))) if text else None


def data_folder(flags):
    """Return the folder of the data sets: by default ./data if it exists, else the program's."""
    if flags["data_dir"].present or os.path.isdir(flags.data_dir):
        return flags.data_dir
    return runtime.ROOT / flags.data_dir
