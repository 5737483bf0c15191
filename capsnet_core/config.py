"""Defaults of training, presets, constants of the paper, and names of classes."""

from typing import NamedTuple

MAX_SHIFT = 2  # pixels, the largest shift of a training digit (section 5)
MULTI_SHIFT = 4  # pixels, the largest shift of each digit of an overlapping pair (section 6)
MULTI_PADDING = 4  # pixels around a digit of MultiMNIST: 28×28 becomes 36×36 (section 6)
DIGITS = tuple("0123456789")
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_KMNIST = "o,ki,su,tsu,na,ha,ma,ya,re,wo"
# Names of the classes of each data set that `download.py` fetches.
CLASS_NAMES = {
    "mnist": DIGITS,
    "fashion_mnist": tuple(_FASHION.split(",")),
    "kmnist": tuple(_KMNIST.split(",")),
}

# Modes that need the images of the data set. For the others the weights say all that is needed.
MODES_WITH_DATA = ("train", "test", "reconstruction_test", "tweak_test")


class TrainingConfig(NamedTuple):
    """How to train. A resumed run must have the values that it was started with."""

    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 0.001  # initial (Adam)
    decay_rate: float = 0.7  # factor of the learning rate in each `decay_steps` steps
    decay_steps: int = 1000
    reconstruction_weight: float = 0.0005  # weight of the summed squared pixel errors (section 4.1)
    averaging: float = 0.99  # momentum of the running averages of the weights; 0: no averages

    def total_loss(self, terms):
        """Return the weighted sum of a loss's terms, a dict of name to number or tensor.

        The weight of a term is the field that is named NAME_weight, 1 without one.
        """
        return sum(getattr(self, f"{name}_weight", 1.0) * term for name, term in terms.items())


EPOCHS = 10
SAVE_STEPS = 500  # between checkpoints


def _initializers(stddev):
    # As Keras configurations: an object would draw its own seed when it is created.
    return {
        "kernel_initializer": {"class_name": "TruncatedNormal", "config": {"stddev": stddev}},
        "bias_initializer": {"class_name": "Constant", "config": {"value": 0.1}},
    }


# Initial weights, by layer.
INITIALIZATIONS = {
    "glorot": {"conv1": {}, "others": {}},  # uniform, biases of 0
    "authors": {"conv1": _initializers(0.05), "others": _initializers(0.1)},
}
INITIALIZATION = "glorot"

# Defaults that a recipe replaces.
RECIPES = {
    "default": {},
    # The authors' public code: 300,000 steps; its margin loss is halved and averaged over the ten
    # classes too, so its reconstruction term weighs twenty times as much.
    "authors": {
        "epoch": 640,
        "batch_size": 128,
        "decay_rate": 0.96,
        "decay_steps": 2000,
        "reconstruction_weight": 0.01,
        "averaging": 0.0,
        "initialization": "authors",
        "variant": "authors",
        "data_deformation": True,
    },
    # 50 epochs of MNIST: small batches, a slow decay, averages over half an epoch.
    "long": {
        "epoch": 50,
        "batch_size": 32,
        "decay_rate": 0.9,
        "decay_steps": 1875,
        "averaging": 0.999,
        "data_deformation": True,
    },
}
# What differs in the authors' public code for overlapping digits. It shifts them by up to 6
# pixels on 36×36, where parts of them are cut off. The paper says 4.
AUTHORS_MULTI_MNIST = {"decay_steps": 20000, "multi_shift": 6}
# The schedule of MultiMNIST, for an hour on two cores. Of the values tried in shorter runs,
# these gave the lowest error on pairs of held-out training digits.
MULTI_MNIST = {
    "epoch": 6,
    "batch_size": 32,
    "decay_steps": 1800,
    "reconstruction_weight": 0.005,
    "averaging": 0.998,
}
