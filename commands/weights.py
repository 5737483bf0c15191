"""Weights of a command: they say which network they are for, so no flag of it is needed."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import keras

import model
import utils
from capsnet_core.errors import NoPretrainedWeights, PretrainedMismatch, UsageError, UserError
from capsnet_core.metadata import complete, differences
from capsnet_core.networks import NETWORKS, config_from
from commands.data import load_data, run_folders, run_name
from inputs.appearance import PLAIN, appearance_from
from training.checkpoints import METADATA, load_weights, newest_metadata
from training.folders import claim

FILE = "weights.npz"
# Modes that write to the run's log folder, or read its events.
MODES_WITH_LOGS = ("test", "reconstruction_test", "tweak_test", "export")


class Weights(NamedTuple):
    """A network with the weights that a command examines."""

    network: keras.Model
    metadata: dict  # see `capsnet_core.metadata`
    folder: Path

    @property
    def training(self):
        """Return the settings of the training run."""
        return self.metadata["training"]

    @property
    def class_names(self):
        """Return the names of the classes, or their numbers if the weights do not name them."""
        numbers = map(str, range(self.network.config.n_classes))
        return tuple(self.training["class_names"] or numbers)

    @property
    def digits_per_example(self):
        """Return K."""
        return 2 if self.training["multi_MNIST"] else 1


def weights_folder(flags):
    """Return the folder of the weights to examine."""
    if flags.pretrained:
        return utils.ROOT / "pretrained" / run_name(flags)
    folders = run_folders(flags)
    return folders.best if flags.validation_check else folders.checkpoint


def load(flags, devices):
    """Build the network that the weights of a command are for, load them, and print whose they are.

    Raise UserError if there are none, they are damaged, or a flag contradicts them.
    """
    folder, values = weights_folder(flags), {}
    if flags.pretrained:
        metadata, values = read_exported(folder)
    else:
        metadata = newest_metadata(folder)
    config = config_of(metadata, folder)
    refuse_contradictions(flags, config, folder)
    training = metadata["training"]
    network = build_network(
        config, flags.seed, devices, training["initialization"], training["freeze"]
    )
    if flags.pretrained:
        assign(network.variables, values, folder)
    else:
        metadata = load_weights(network, folder, print)
        if devices.chief and any(getattr(flags, mode) for mode in MODES_WITH_LOGS):
            folders = run_folders(flags)
            claim(folders.logs, folders.checkpoint)  # its files are of one run
    averaged = ", averaged over the last steps" if metadata["training"].get("averaging") else ""
    print(f"Weights of step {metadata['step']} from {folder}{averaged}")
    return Weights(network, metadata, folder)


def build_network(config, seed, devices, initialization=None, freeze=()):
    """Build a network of a config; its first weights depend on the seed alone.

    `initialization` is None if other weights follow; for `freeze` see `freeze_parts`.
    """
    options = {"conv": devices.conv, "dtype": devices.precision}
    if initialization:
        options["initialization"] = initialization
    keras.utils.set_random_seed(seed)
    with devices.strategy.scope():
        network = model.build(config, **options)
    freeze_parts(network, freeze)
    return network


def freeze_parts(network, names):
    """Leave these parts out of training. Raise UsageError if one is unknown, or none is left."""
    parts = network.parts()
    if not set(names) < set(parts):
        unknown = ", ".join(map(repr, sorted(set(names) - set(parts))))
        problem = f"the network has no {unknown}" if unknown else "nothing is left to train"
        raise UsageError(f"--freeze: {problem}, expected some of {', '.join(parts)}")
    for name in names:
        parts[name].trainable = False


def config_of(metadata, folder):
    """Return the config of a network. Raise UserError if this version has no such network."""
    try:
        return config_from(metadata["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} holds a network that this version does not know ({error}), expected one of "
            f"{', '.join(NETWORKS)}"
        ) from None


def refuse_contradictions(flags, config, folder):
    """Raise UserError if a flag of the network is given and the weights are of another network."""
    own = {field.name for field in config.settings()}
    settings = {field.name for kind in NETWORKS.values() for field in kind.settings()}
    for name in ("network", *sorted(settings)):
        here, there = getattr(flags, name), getattr(config, name, None)
        if flags[name].present and here != there:
            have = f"have {name}={there}" if name in own else f"are of network={config.network}"
            raise UserError(
                f"--{name}={here} is given, and the weights in {folder} {have}; leave the flag "
                "out, or take other weights"
            )


def check_data(weights, data):
    """Compare the data set of a command with that of its weights, and print if it is another one.

    Raise UserError if the classes or the size of the images are others, some test images were
    trained on, or the images were not inverted in training.
    """
    folder, training, dataset = weights.folder, weights.training, data.dataset
    trained_names, names = training["class_names"], list(dataset.class_names)
    if trained_names not in (None, names):
        raise UserError(
            f"{folder} was trained on other classes: {trained_names} there and "
            f"{names} here; give the --dataset that it was trained on, or train again if only "
            "their order differs"
        )
    config, shape = weights.network.config, data.test.canvas_shape()
    here = {"image_shape": shape, "n_classes": len(names)}
    there = {name: getattr(config, name) for name in here}
    if different := differences(there, here):
        raise UserError(
            f"{folder} was trained on other images: {different}; give the --dataset and the "
            "--image_size that it was trained with"
        )
    if dataset.inverted and not training["inverted"]:
        raise UserError(
            f"{folder} was trained on dark ink on a light ground, and this "
            "version inverts these images; train again"
        )
    check_unseen(folder, training, data)
    if not data.trained(training):
        print("These weights were trained on images that differ from those of --dataset.")


def check_unseen(folder, training, data):
    """Raise UserError if weights were trained on test images that the seed draws in this command.

    Which images it draws depends on the files as well. `training` is that of the weights.
    """
    name, seed = data.dataset.name, data.dataset.held_out_seed
    earlier = training["held_out_seed"]
    if seed is None or earlier is None or training.get("dataset") != name:
        return
    if earlier != seed:
        raise UserError(
            f"{folder}: some test images that seed {seed} draws were trained on; "
            f"give --seed={earlier}"
        )
    if not data.trained(training):
        raise UserError(
            f"{folder}: the images of {name} have changed since the training, so other test "
            "images are drawn, and some were trained on; restore them, or train again"
        )


def appearance_of(flags, weights):
    """Return how the training images of weights look.

    Weights of earlier versions do not say it; then it is measured, if the data set is there.
    """
    kept = appearance_from(weights.metadata)
    if kept:
        return kept
    try:
        data = load_data(flags, print)
    except UserError as error:
        print(
            f"These weights do not say how their training images look, and the data set cannot "
            f"be read ({error}): each file is resized whole."
        )
        return PLAIN
    check_data(weights, data)
    return data.appearance()


# --- Exported weights -----------------------------------------------------------------------------


def load_network(folder, **options):
    """Rebuild an exported network with its weights.

    Args:
        folder: see `find_exported`.
        **options: conv, dtype and the like, see `capsnet_core.base.Network`.
    """
    folder = find_exported(folder)
    metadata, values = read_exported(folder)
    network = model.build(config_of(metadata, folder), **options)
    assign(network.variables, values, folder)
    return network


def read_exported(folder):
    """Read exported weights: their metadata, and the values by the paths of their variables.

    Raises:
        NoPretrainedWeights: there are none.
        UserError: they are damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        available = sorted(p.parent.name for p in path.parent.parent.glob(f"*/{FILE}"))
        raise NoPretrainedWeights(path.parent.name, ", ".join(available))
    try:
        with utils.open_npz(path) as file:
            values = {name: file[name] for name in file.files}
        return complete(json.loads(str(values.pop(METADATA)))), values
    except (KeyError, *utils.NPZ_ERRORS) as error:
        raise UserError(
            f"{path} is damaged, or not an export ({error}); put back the original"
        ) from None


def assign(variables, values, folder):
    """Give variables the values of their paths; nothing is changed if one does not fit.

    Raise UserError if a value is missing or has another shape.
    """
    for variable in variables:
        found = values[variable.path].shape if variable.path in values else None
        if found != tuple(variable.shape):
            raise UserError(
                f"{Path(folder) / FILE} is damaged: {variable.path} has the shape {found}, "
                f"expected {tuple(variable.shape)}; put back the original"
            )
    for variable in variables:
        variable.assign(values[variable.path])


def find_exported(folder):
    """Return a folder of exported weights, which may be named from the program's folder.

    Raise UserError if there are no weights in it.
    """
    found = utils.find_in_cwd_or_repo(folder, FILE)
    if found is None:
        raise UserError(f"no {FILE} in {folder}, expected a folder that --export wrote")
    return found


# --- Weights that a training run starts with ------------------------------------------------------


def start_with(network, class_names, folder):
    """Give a network the weights of an export, or what of them fits its images and classes.

    With the same images and classes all weights are kept. Else the layers below the classes are
    kept, and of the classes those whose names occur in both.

    Return the metadata of the weights, and in words what was kept. Raise PretrainedMismatch if they
    belong to a network of other layers, UserError if they are missing or damaged.
    """
    metadata, values = read_exported(folder)
    earlier = config_of(metadata, folder)
    there = metadata["training"]["class_names"] or [None] * earlier.n_classes
    same_images = tuple(earlier.image_shape) == tuple(network.config.image_shape)
    if earlier.image_shape[2:] == network.config.image_shape[2:]:
        adapted = {"image_shape": network.config.image_shape, "n_classes": len(class_names)}
        earlier = dataclasses.replace(earlier, **adapted)
    if different := differences(earlier.describe(), network.config.describe()):
        raise PretrainedMismatch(Path(folder) / FILE, different)
    if same_images and there in ([None] * len(class_names), list(class_names)):
        assign(network.variables, values, folder)
        return metadata, "all of them are kept"
    kept = network.feature_layers()
    assign([variable for layer in kept for variable in layer.variables], values, folder)
    shared = [name for name in class_names if name in there] if same_images else []
    for variable in network.class_variables() if shared else ():
        value = variable.numpy()
        for name in shared:
            value[class_names.index(name)] = values[variable.path][there.index(name)]
        variable.assign(value)
    text = f"{', '.join(layer.name for layer in kept)} are kept"
    if shared and network.class_variables():
        pairs = (f"{name} ({there.index(name)} → {class_names.index(name)})" for name in shared)
        text += f", and the capsules of {', '.join(pairs)}"
    return metadata, f"{text}; the rest starts with new weights"
