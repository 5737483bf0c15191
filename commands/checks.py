"""Check the values of the flags, and fill in those of a recipe."""

import itertools
import os

from capsnet_core import config
from capsnet_core.errors import UsageError
from capsnet_core.networks import NETWORKS
from inputs import datasets
from runtime import command_line

LARGEST_SIDE = 1024  # pixels of --image_size


def check(values, rows, written):
    """Fill in the values of a recipe. Raise UsageError if a value is wrong or two contradict.

    Args:
        values: values of the flags.
        rows: name, default, bounds and help of each flag.
        written: names of the flags that are written to.
    """
    refuse_empty(values, rows)
    for name in written:
        value = getattr(values, name)
        if value.encode(errors="ignore").decode() != value:  # Python keeps odd bytes as surrogates
            raise UsageError(
                f"--{name}={value} is not in UTF-8, expected a name that is: "
                "TensorFlow cannot write to others"
            )
    check_dataset(values)
    refuse_bad_size(values)
    fill_in(values)
    check_network(values)
    check_combinations(values)
    check_weights(values)


def refuse_empty(values, rows):
    """Raise UsageError if a name is empty."""
    for name, default, *_ in rows:
        value = getattr(values, name)
        if isinstance(default, str) and not value and (default or values[name].present):
            raise UsageError(f"--{name} is empty, expected a value")


def check_dataset(values):
    """Raise UsageError if the data set is unknown and no weights take its place."""
    dataset = values.dataset
    files = dataset.endswith(".npz") or os.path.isdir(dataset)
    if dataset not in datasets.CLASS_NAMES and not files and not weights_suffice(values):
        raise UsageError(
            f"--dataset={dataset} is unknown, or no such folder, expected {datasets.FORMS}"
        )


def refuse_bad_size(values):
    """Raise UsageError if --image_size is given and is not a size."""
    sides = command_line.parse_size(values.image_size)
    given = values["image_size"].present
    if given and not (sides and all(1 <= side <= LARGEST_SIDE for side in sides)):
        raise UsageError(
            f"--image_size={values.image_size}, expected height and width in pixels, 1 to "
            f"{LARGEST_SIDE}, such as 32x48"
        )


def weights_suffice(values):
    """Return whether no mode needs the data set, and there are weights under its name."""
    if any(getattr(values, mode) for mode in config.MODES_WITH_DATA):
        return False
    name = datasets.dataset_name(values.dataset)
    folder = values.multi_checkpoint_dir if values.multi_MNIST else values.checkpoint_dir
    if values.validation_check:
        folder = values.val_checkpoint_dir
    return os.path.isdir(os.path.join(folder, f"multi_{name}" if values.multi_MNIST else name))


def fill_in(values):
    """Give flags that are not given the values of the recipe, or of MultiMNIST's schedule."""
    preset = config.RECIPES[values.recipe]
    if values.multi_MNIST and values.recipe == "authors":
        preset = preset | config.AUTHORS_MULTI_MNIST
    elif values.multi_MNIST and values.recipe == "default":
        preset = config.MULTI_MNIST
    if values.network == "cnn":
        preset = preset | {"reconstruction_weight": 0.0}
        if values.multi_MNIST:
            preset = preset | {"architecture": "multi"}
    for name, value in preset.items():
        if not values[name].present:
            setattr(values, name, value)


def check_network(values):
    """Raise UsageError if a flag needs another network than the one that is given."""
    if not (values.train or values["network"].present):
        return  # the weights say which network they are for
    own = {field.name for field in NETWORKS[values.network].settings()}
    for name, kind in NETWORKS.items():
        for field in kind.settings():
            if values[field.name].present and field.name not in own:
                raise UsageError(
                    f"--{field.name} is a setting of --network={name}, and the network is "
                    f"{values.network}"
                )
    capsules = ("reconstruction_test", "tweak_test")
    needing = [mode for mode in capsules if getattr(values, mode)]
    if values["reconstruction_weight"].present:
        needing.append("reconstruction_weight")
    if values.network != "capsnet" and needing:
        raise UsageError(f"--{needing[0]} needs capsules, and --network={values.network} has none")


def check_combinations(values):
    """Raise UsageError if flags contradict each other."""
    if values.recipe == "long" and values.multi_MNIST:
        raise UsageError("--recipe=long is for single digits, without --multi_MNIST")
    if values["multi_shift"].present and not values.multi_MNIST:
        raise UsageError("--multi_shift needs --multi_MNIST")
    if values.restart and not values.train:
        raise UsageError("--restart starts training over and needs --train")
    if values.multi_test_pairs > 1 and not (values.multi_MNIST and values.test):
        raise UsageError("--multi_test_pairs needs --multi_MNIST and --test")
    checkpoints = "multi_checkpoint_dir" if values.multi_MNIST else "checkpoint_dir"
    for one, other in itertools.combinations((checkpoints, "val_checkpoint_dir", "logdir"), 2):
        if os.path.realpath(getattr(values, one)) == os.path.realpath(getattr(values, other)):
            raise UsageError(f"--{one} and --{other} must differ")
    if values.validation_check and 0 < values.train_size < 6:
        raise UsageError("--validation_check holds out a sixth and needs --train_size of 6 or more")


def check_weights(values):
    """Raise UsageError if the flags about weights contradict others."""
    if values.pretrained and (values.train or values.validation_check):
        hint = ""
        if values.train and values.dataset == "mnist":
            folder = "pretrained/multi_mnist" if values.multi_MNIST else "pretrained/mnist"
            hint = f"; to train them further: --initial_weights={folder}"
        raise UsageError(
            "--pretrained takes the weights that come with the program and cannot be combined "
            "with --train or --validation_check" + hint
        )
    if values.initial_weights and not values.train:
        raise UsageError("--initial_weights starts training from these weights and needs --train")
    if values.freeze and not values.train:
        raise UsageError("--freeze leaves parts out of training and needs --train")
    if values.initial_weights and values["initialization"].present:
        raise UsageError("--initial_weights takes the place of --initialization; give one of them")
