"""What the engine demands of a network that it trains and tests."""

from typing import Any, Protocol


class Outputs(Protocol):
    """What a network computes from a batch of B images with K digits each, J classes."""

    scores: Any  # (B, J), what classes are ranked by
    predictions: Any  # (B, K), the classes of the highest scores, the highest first
    correct: Any  # (B,), whether exactly the labels are predicted


class Inference(Protocol):
    """A network prepared for many batches with the same weights."""

    def prepare(self):
        """Return what depends on the weights alone, in tensors."""

    def outputs(self, batch, prepared) -> Outputs:
        """Run the network on a batch; `prepared` is what `prepare` returned."""


class Network(Protocol):
    """A network, which is a Keras model."""

    config: Any  # with `describe`, a dict of all that must match for weights to fit, and loss_terms
    variables: list
    trainable_variables: list

    def outputs(self, batch, seed=None) -> Outputs:
        """Run the network on a batch. In training `seed` (2,) is that of its random numbers."""

    def loss_terms(self, outputs) -> dict:
        """Return the terms of the loss of each image, (B,) each, by the names in `config`."""

    def inference(self, compile_part) -> Inference:
        """Return the network prepared for inference; `compile_part` compiles a function."""

    def get_weights(self):
        """Return the values of all variables."""

    def set_weights(self, weights):
        """Set the values of all variables."""
