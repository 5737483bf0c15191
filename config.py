"""Defaults, presets and constants of the paper. Each is written down here and nowhere else."""

from typing import NamedTuple

MAX_SHIFT = 2  # pixels, by which a training digit is shifted (section 5)
MULTI_SHIFT = 4  # pixels, by which each digit of an overlapping pair is shifted (section 6)
MULTI_PADDING = 4  # pixels around a digit of MultiMNIST: 28×28 on 36×36 (section 6)
DIGITS = tuple("0123456789")


class NetworkConfig(NamedTuple):
    """Sizes of a CapsNet (section 4)."""

    n_conv: int = 256  # filters of the first convolution
    n_primary: int = 32  # types of primary capsules
    primary_dim: int = 8
    digit_dim: int = 16
    routing_iterations: int = 3  # of procedure 1
    kernel_size: int = 9  # pixels, of both convolutions
    decoder_units: tuple = (512, 1024)  # widths of the hidden layers


class TrainingConfig(NamedTuple):
    """How to train: what a resumed run must share with its beginning."""

    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 0.001  # of Adam, at the first step
    decay_rate: float = 0.7  # factor of the learning rate over `decay_steps` steps
    decay_steps: int = 1000
    reconstruction_weight: float = 0.0005  # of the summed squared pixel errors (section 4.1)
    averaging: float = 0.99  # momentum of the running averages of the weights; 0: no averages

    def total_loss(self, terms):
        """Weigh and add the terms of a loss, given by name: numbers or tensors."""
        weights = {"reconstruction": self.reconstruction_weight}
        return sum(weights.get(name, 1.0) * term for name, term in terms.items())


EPOCHS = 10
SAVE_STEPS = 500  # between checkpoints


def _initializers(stddev):
    # Configurations of Keras: an object would draw its own seed when it is created.
    return {
        "kernel_initializer": {"class_name": "TruncatedNormal", "config": {"stddev": stddev}},
        "bias_initializer": {"class_name": "Constant", "config": {"value": 0.1}},
    }


# How weights are drawn at the start, by layer.
INITIALIZATIONS = {
    "glorot": {"conv1": {}, "others": {}},  # uniform, biases of 0
    "authors": {"conv1": _initializers(0.05), "others": _initializers(0.1)},
}
INITIALIZATION = "glorot"

# Values for flags that are not given.
RECIPES = {
    "default": {},
    # The authors' public code: 300,000 steps; its margin loss is halved and averaged over the ten
    # classes too, so its reconstruction weighs twenty times as much.
    "authors": {
        "epoch": 640,
        "batch_size": 128,
        "decay_rate": 0.96,
        "decay_steps": 2000,
        "reconstruction_weight": 0.01,
        "averaging": 0.0,
        "initialization": "authors",
    },
}
# The schedule of MultiMNIST, for an hour on two cores. Batch, rate, averages and weight have the
# lowest error on pairs of held-out training digits in shorter trainings.
MULTI_MNIST = {
    "epoch": 6,
    "batch_size": 32,
    "decay_steps": 1800,
    "reconstruction_weight": 0.005,
    "averaging": 0.998,
}
