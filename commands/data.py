"""The data set of a command, and what is trained on and tested of it."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from capsnet_core import config
from inputs import datasets
from inputs.appearance import measure_appearance
from inputs.pipeline import Examples, split_validation
from inputs.readers.dataset import Dataset
from runtime.command_line import parse_size
from training.folders import Folders


class CommandData(NamedTuple):
    """A data set, and how a command uses it."""

    dataset: Dataset
    train_size: int  # training images that are used; 0: all
    train: Examples  # those of training (sections 5 and 6), without what is held out
    validation: Examples | None  # to choose the best weights by
    test: Examples
    held_out: bool  # whether the images for validation are held out of the training images

    @property
    def class_names(self):
        """Return the names of the classes."""
        return self.dataset.class_names

    def appearance(self):
        """Return how the training images look."""
        dataset = self.dataset
        return measure_appearance(self.train, dataset.inverted, dataset.subtracted, dataset.white)

    def digest(self, train_size, seed):
        """Return a fingerprint of `train_size` training images that a seed draws, or of all (0)."""
        return fingerprint(*datasets.training_images(self.dataset, train_size, seed))

    def trained(self, training):
        """Return whether a run, given by its settings, trained on these training images."""
        size = training["train_size"]
        if training["data"] == self.digest(size, training["seed"]):
            return True
        # Earlier versions took the first images of every data set.
        first = fingerprint(self.dataset.x_train[:size], self.dataset.y_train[:size])
        return size > 0 and training["data"] == first


def load_data(flags, report):
    """Load the data set of a command as CommandData, and report what was changed in it.

    Raise UserError if it is not usable.
    """
    dataset = datasets.load_dataset(
        flags.dataset, data_folder(flags), parse_size(flags.image_size), flags.seed
    )
    if flags.multi_MNIST:
        dataset = datasets.remove_background(dataset)
    if dataset.x_validation is not None:
        use = "choose the best weights"
        if not flags.validation_check:
            use = "are only used with --validation_check"
        dataset = dataset.with_note(f"its {len(dataset.y_validation)} validation images {use}")
    for note in dataset.notes:
        report(f"{dataset.name}: {note}")
    # More images than there are is the same run as all of them.
    train_size = flags.train_size if flags.train_size < len(dataset.y_train) else 0
    images = datasets.training_images(dataset, train_size, flags.seed)
    train = compose(flags, dataset, *images)
    if flags.data_deformation and not flags.multi_MNIST:
        background = datasets.even_background(dataset.x_train)
        train = train._replace(max_shift=config.MAX_SHIFT, background=background)
    validation, held_out = None, False
    if flags.validation_check and dataset.x_validation is not None:
        validation = compose(flags, dataset, dataset.x_validation, dataset.y_validation)
    elif flags.validation_check and flags.train:
        trained, others = split_validation(len(train.labels), flags.seed)
        train, validation, held_out = train.subset(trained), train.subset(others), True
    test = compose(flags, dataset, dataset.x_test, dataset.y_test)
    return CommandData(dataset, train_size, train, validation, test, held_out)


def compose(flags, dataset, images, labels):
    """Return the Examples of images, each as it is or overlapping another one."""
    names = dataset.class_names
    if flags.multi_MNIST:
        return Examples(images, labels, config.MULTI_PADDING, flags.multi_shift, True, names)
    return Examples(images, labels, class_names=names)


def fingerprint(*arrays):
    """Return a fingerprint of arrays, such as images and their labels."""
    digest = hashlib.sha256()
    for part in arrays:
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


def data_folder(flags):
    """Return the folder of the data sets: ./data if this one is in it, else the program's."""
    if flags["data_dir"].present:
        return flags.data_dir
    found = utils.find_in_cwd_or_repo(flags.data_dir, flags.dataset)
    return found or utils.ROOT / flags.data_dir


def run_name(flags):
    """Return the name of the folders of a run."""
    name = datasets.dataset_name(flags.dataset)
    return f"multi_{name}" if flags.multi_MNIST else name


def run_folders(flags):
    """Return the Folders of a run."""
    name = run_name(flags)
    checkpoints = flags.multi_checkpoint_dir if flags.multi_MNIST else flags.checkpoint_dir
    # Results of the pretrained weights do not mix with those of the user's own run.
    logs = f"{name}_pretrained" if flags.pretrained else name
    return Folders(
        checkpoint=Path(checkpoints, name),
        best=Path(flags.val_checkpoint_dir, name),
        logs=Path(flags.logdir, logs),
    )
