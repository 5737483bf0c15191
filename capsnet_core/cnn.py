"""The convolutional networks that the paper compares the CapsNet with."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import ops
from capsnet_core.base import Inference, Network
from capsnet_core.networks import CNNConfig


class Outputs(NamedTuple):
    """All that a CNN computes from a batch of B images with K digits each, J classes."""

    scores: tf.Tensor  # (B, J), probabilities
    predictions: tf.Tensor  # (B, K), the likeliest classes, the likeliest first
    correct: tf.Tensor  # (B,), whether exactly the labels' classes are the likeliest
    cross_entropy: tf.Tensor  # (B,), summed over the classes where each has a sigmoid


class CNNInference(Inference):
    """A CNN for inference, compiled as one part."""

    def compute(self, images, spectra):
        """Compute logits: (B, H, W, C) in [0, 1] -> (B, J)."""
        return self.compile_part(lambda images: self.network.logits(images, spectra=spectra))(
            images
        )


@ops.register
class CNN(Network):
    """Convolutions, hidden layers, and a softmax over the classes, or a sigmoid for each.

    The arguments are those of `Network`, with the settings of a `CNNConfig`.
    """

    config_class, inference_class = CNNConfig, CNNInference

    def make_layers(self, config, initializers):
        """Create and build all layers."""
        rows, columns, channels = config.image_shape
        self.convolutions = []
        for number, (filters, side, pooled) in enumerate(config.layers.convolutions, 1):
            layer = ops.Convolution(
                filters,
                side,
                activation="relu",
                method=self.conv,
                name=f"conv{number}",
                dtype=self.dtype_policy,
                **initializers["conv1" if number == 1 else "others"],
            )
            layer.build((None, rows + side - 1, columns + side - 1, channels))
            self.convolutions.append(layer)
            channels = filters
            if pooled:
                rows, columns = rows // 2, columns // 2
        width = rows * columns * channels
        self.hidden = []
        for number, units in enumerate((*config.layers.widths, config.n_classes), 1):
            last = number > len(config.layers.widths)
            layer = keras.layers.Dense(
                units,
                None if last else "relu",
                name=f"dense{number}",
                dtype="float32" if last else self.dtype_policy,
                **initializers["others"],
            )
            layer.build((None, width))
            self.hidden.append(layer)
            width = units

    def parts(self):
        """Return the layers by the names under which training can leave them as they are."""
        return {layer.name: layer for layer in (*self.convolutions, *self.hidden)}

    def feature_layers(self):
        """Return the convolutions."""
        return self.convolutions

    def logits(self, images, seed=None, spectra=None):
        """Compute logits: (B, H, W, C) in [0, 1] -> (B, J).

        Args:
            images: (B, H, W, C).
            seed: (2,), of the dropout in training; None drops nothing.
            spectra: those of the kernels, if no weight has changed since.
        """
        x = images
        spectra = spectra or (None,) * len(self.convolutions)
        pooling = [pooled for *_, pooled in self.config.layers.convolutions]
        for layer, spectrum, pooled in zip(self.convolutions, spectra, pooling, strict=True):
            before, after = (layer.kernel_size - 1) // 2, layer.kernel_size // 2
            x = layer(tf.pad(x, [[0, 0], [before, after], [before, after], [0, 0]]), spectrum)
            if pooled:  # by reshaping: XLA's gradient of max_pool is slow on a CPU
                _, rows, columns, channels = x.shape
                x = tf.reshape(x, (-1, rows // 2, 2, columns // 2, 2, channels))
                x = tf.reduce_max(x, axis=(2, 4))
        x = tf.reshape(x, (-1, int(np.prod(x.shape[1:]))))
        for layer in self.hidden[:-1]:
            x = layer(x)
        dropout = self.config.layers.dropout
        if seed is not None and dropout:
            random = tf.random.stateless_uniform(tf.shape(x), seed)
            x = tf.where(random >= dropout, x / (1 - dropout), 0.0)
        return self.hidden[-1](x)

    def call(self, images):
        """Compute probabilities (B, J) of images (B, H, W, C)."""
        self.check_images(images)
        return self.probabilities(self.logits(images))

    def serve(self, images, k=1):
        """Compute what an exported network returns: a dict of probabilities (B, J)."""
        return {"probabilities": self(images)}

    def probabilities(self, logits):
        """Turn logits into probabilities: a softmax, or a sigmoid for each of several digits."""
        return tf.nn.sigmoid(logits) if self.config.n_digits > 1 else tf.nn.softmax(logits)

    # --- What the engine needs (see `training.network`) -------------------------------------------

    def outputs(self, batch, seed=None):
        """Run the network on a batch and return Outputs; `seed` (2,) is that of the dropout."""
        return self.outputs_by(lambda canvas: self.logits(canvas, seed), batch)

    def outputs_by(self, compute_logits, batch):
        """Run the network on a batch, with a function that computes the logits of the canvas."""
        digits, shift, labels, _ = batch
        canvas, _ = ops.compose(digits, shift, self.padding(digits))
        logits = compute_logits(canvas)
        n_classes = logits.shape[1]
        predictions = ops.longest(logits, self.config.n_digits)
        present, guess = (
            tf.reduce_max(ops.label_mask(classes, n_classes), axis=1)  # (B, K, J) -> (B, J)
            for classes in (labels, predictions)
        )
        if self.config.n_digits > 1:
            losses = tf.nn.sigmoid_cross_entropy_with_logits(present, logits)
            cross_entropy = tf.reduce_sum(losses, axis=1)
        else:
            cross_entropy = tf.nn.softmax_cross_entropy_with_logits(present, logits)
        return Outputs(
            scores=self.probabilities(logits),
            predictions=predictions,
            correct=tf.reduce_all(guess == present, axis=1),
            cross_entropy=cross_entropy,
        )

    def loss_terms(self, outputs):
        """Return the terms of the loss of each image, by name: (B,) each."""
        return {"cross_entropy": outputs.cross_entropy}
