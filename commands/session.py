"""What every mode needs, made from the flags: devices, data, folders, the network, its weights."""

import functools
import hashlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import config
import datasets
import runtime
from commands import appearance
from commands.pretrained import load_pretrained, pretrained_metadata
from errors import UsageError, UserError
from input_pipeline import Data
from model import CapsNet
from training.checkpoints import load_weights, newest_metadata
from training.distribution import choose_strategy, is_chief
from training.events import replacing_events
from training.folders import Folders, claim
from usage import parse_size

# Modes that write to the run's log folder, or read its events.
MODES_WITH_LOGS = ("test", "reconstruction_test", "tweak_test", "export")


class Session:
    """Devices, data, folders and network for the flags given.

    Args:
        flags: values of the flags.
        argv: the command line.

    Raises:
        UsageError: a flag asks for what this machine does not have.
        UserError: the cluster is not usable.
    """

    def __init__(self, flags, argv):
        self.flags, self.argv = flags, argv
        self.commit = runtime.commit()  # now: it may be another one after an hour of training
        gpu = runtime.has_gpu()
        if flags.precision != "float32" and not runtime.multiplies_bfloat16():
            units = " or ".join(runtime.BFLOAT16_UNITS.values())
            raise UsageError(
                f"--precision={flags.precision} needs an accelerator or a processor with {units}, "
                "and there is none here, expected --precision=float32"
            )
        if flags.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.strategy = choose_strategy(flags.strategy, runtime.waiting_for_workers())
        self.chief = is_chief(self.strategy)
        self.conv = runtime.fastest_conv() if flags.conv == "auto" else flags.conv
        fast = gpu or self.conv == "dft"
        self.jit = fast if flags.jit == "auto" else flags.jit == "on"
        name = datasets.dataset_name(flags.dataset)
        self.name = f"multi_{name}" if flags.multi_MNIST else name
        self.folders = self._name_folders()
        self.metadata = None  # that of the weights, once they are loaded

    @functools.cached_property
    def dataset(self):
        """Return the data set, read at the first use; print what was changed in it.

        Raises:
            UserError: it is not usable.
        """
        flags = self.flags
        dataset = datasets.load_dataset(
            flags.dataset, data_folder(flags), parse_size(flags.image_size), flags.seed
        )
        if flags.multi_MNIST:
            dataset = datasets.remove_ground(dataset)
        if dataset.x_validation is not None:
            use = "choose the best weights"
            if not flags.validation_check:
                use = "are only used with --validation_check"
            dataset = dataset.with_note(f"its {len(dataset.y_validation)} validation images {use}")
        if self.chief and dataset.notes:
            print("\n".join(f"{dataset.name}: {note}" for note in dataset.notes), flush=True)
        return dataset

    @functools.cached_property
    def train_size(self):
        """Return how many training images are used, 0 if all are."""
        # More images than there are is the same run as all of them.
        return self.flags.train_size if self.flags.train_size < len(self.dataset.y_train) else 0

    @functools.cached_property
    def train_data(self):
        """Return the Data of training (sections 5 and 6)."""
        size, dataset = self.train_size or None, self.dataset
        data = self._compose(dataset.x_train[:size], dataset.y_train[:size])
        if self.flags.multi_MNIST or not self.flags.data_deformation:
            return data
        return data._replace(
            max_shift=self.flags.fractional_shift or config.MAX_SHIFT, ground=datasets.even_ground(dataset.x_train)
        )

    @functools.cached_property
    def test_data(self):
        """Return the Data of the test."""
        return self._compose(self.dataset.x_test, self.dataset.y_test)

    @functools.cached_property
    def validation_data(self):
        """Return the Data of the data set's own images for validation, None if it has none."""
        if self.dataset.x_validation is None:
            return None
        return self._compose(self.dataset.x_validation, self.dataset.y_validation)

    def _compose(self, images, labels):
        """Return the Data of images, each as it is or overlapping another one."""
        names = self.dataset.class_names
        if self.flags.multi_MNIST:
            shift = self.flags.multi_shift
            return Data(images, labels, config.MULTI_PADDING, shift, True, names)
        return Data(images, labels, class_names=names)

    @property
    def digits_per_example(self):
        """Return K."""
        return 2 if self.flags.multi_MNIST else 1

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
        return self._make_network(self.train_data.canvas_shape(), len(self.dataset.class_names))

    def _make_network(self, image_shape, n_classes):
        keras.utils.set_random_seed(self.flags.seed)
        with self.strategy.scope():
            return CapsNet(
                image_shape,
                n_classes,
                **self.network_config._asdict(),
                conv=self.conv,
                initialization=self.flags.initialization,
                w_stddev=self.flags.w_stddev,
                gradient=self.flags.routing_gradient,
                target=self.flags.target,
                dtype=self.flags.precision,
            )

    def digest(self, train_size):
        """Return a fingerprint of the first `train_size` training images, or of all (0)."""
        kept = slice(train_size or None)
        return fingerprint(self.dataset.x_train[kept], self.dataset.y_train[kept])

    def has_images_of(self, training):
        """Tell whether a run, given by its settings, trained on the images of --dataset."""
        return training["data"] == self.digest(training["train_size"])

    def load(self):
        """Restore the weights to examine, and print where they come from.

        Raises:
            UserError: there are none, or they do not fit the network or the classes.
        """
        needs_data = any(getattr(self.flags, mode) for mode in config.MODES_WITH_DATA)
        if not needs_data:
            self._fit_network_to_weights()
        if self.flags.pretrained:
            self.metadata = load_pretrained(self.network, self.weights_folder)
        else:
            self.metadata = load_weights(self.network, self.weights_folder, print)
            if self.chief and any(getattr(self.flags, mode) for mode in MODES_WITH_LOGS):
                claim(self.folders.logs, self.folders.checkpoint)  # its files are of one run
        if needs_data:
            self._compare_data()
        averaged = ", averaged over the last steps" if self._trained("averaging") else ""
        print(f"Weights of step {self.metadata['step']} from {self.weights_folder}{averaged}")

    @property
    def weights_folder(self):
        """Return the folder of the weights to examine."""
        if self.flags.pretrained:
            return runtime.ROOT / "pretrained" / self.name
        return self.folders.best if self.flags.validation_check else self.folders.checkpoint

    def _fit_network_to_weights(self):
        """Create the network for the images and classes that its weights are for."""
        read = pretrained_metadata if self.flags.pretrained else newest_metadata
        shape = read(self.weights_folder)["shape"]
        if "network" not in vars(self) and {"image_shape", "n_classes"} <= set(shape):
            self.network = self._make_network(shape["image_shape"], shape["n_classes"])

    def _trained(self, name):
        """Return a setting that the loaded weights were trained with, None if it is not known."""
        return self.metadata["training"].get(name)

    def _compare_data(self):
        """Compare the data set with that of the weights.

        Raises:
            UserError: the classes are others, some test images were trained on, or the images were
                not inverted in training.
        """
        trained_names, names = self._trained("class_names"), list(self.dataset.class_names)
        if trained_names not in (None, names):
            raise UserError(
                f"{self.weights_folder} was trained on other classes: {trained_names} there and "
                f"{names} here; give the --dataset that it was trained on, or train again if only "
                "their order differs"
            )
        if self.dataset.inverted and not self._trained("inverted"):
            raise UserError(
                f"{self.weights_folder} was trained on dark ink on a light ground, and this "
                "version inverts these images; train again"
            )
        training = self.metadata["training"]
        self.check_unseen(self.weights_folder, training)
        if not self.has_images_of(training):
            print("These weights were trained on images that differ from those of --dataset.")

    def check_unseen(self, folder, training):
        """Check that weights were not trained on test images that the seed draws in this session.

        Which images it draws depends on the files as well.

        Args:
            folder: folder of the weights.
            training: settings of their training.

        Raises:
            UserError: they were.
        """
        name, seed = self.dataset.name, self.dataset.held_out_seed
        earlier = training.get("held_out_seed")
        if seed is None or earlier is None or training.get("dataset") != name:
            return
        if earlier != seed:
            raise UserError(
                f"{folder}: some test images that seed {seed} draws were trained on; "
                f"give --seed={earlier}"
            )
        if not self.has_images_of(training):
            raise UserError(
                f"{folder}: the images of {name} have changed since the training, so other test "
                "images are drawn, and some were trained on; restore them, or train again"
            )

    @functools.cached_property
    def class_names(self):
        """Return the names of the classes of the loaded weights."""
        names = self._trained("class_names") or datasets.CLASS_NAMES.get(self._trained("dataset"))
        return tuple(names or self.dataset.class_names)

    @functools.cached_property
    def appearance(self):
        """Return how the training images of the loaded weights look.

        Weights of earlier versions do not say it; then it is measured, if the data set is there.
        """
        kept = appearance.appearance_from(self.metadata)
        if kept:
            return kept
        try:
            data = self.train_data
        except UserError as error:
            print(
                f"These weights do not say how their training images look, and the data set cannot "
                f"be read ({error}): each file is resized whole."
            )
            return appearance.PLAIN
        self._compare_data()
        return appearance.measure_appearance(data, self.dataset.inverted, self.dataset.subtracted)

    def show_picture(self, name, picture):
        """Show a picture (H, W, 3) in TensorBoard; it replaces that of an earlier command."""
        with replacing_events(self.folders.logs / "test", name, self.metadata["step"]):
            tf.summary.image(name, picture[None])


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
    found = runtime.here_or_in_program(flags.data_dir, flags.dataset)
    return found or runtime.ROOT / flags.data_dir
