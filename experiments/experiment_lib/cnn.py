"""The convolutional networks that the paper compares the CapsNet with."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import ops


class Architecture(NamedTuple):
    """Layers of a CNN: convolutions with stride 1 and the same padding, then hidden layers."""

    convolutions: tuple  # (filters, kernel size, whether 2×2 max-pooling follows) of each
    widths: tuple  # those of the hidden layers
    dropout: float  # share of the last hidden layer that is dropped in training


ARCHITECTURES = {
    # Section 5: 35.4M parameters.
    "mnist": Architecture(((256, 5, False), (256, 5, False), (128, 5, False)), (328, 192), 0.5),
    # Section 6.1: 24.56M, no dropout.
    "multi": Architecture(((512, 9, True), (256, 5, True)), (1024,), 0.0),
    # Section 5.2 asks for max-pooling, dropout and about as many parameters as the CapsNet has.
    "affine": Architecture(((256, 5, True), (256, 5, True), (128, 5, False)), (720,), 0.5),
    # The baseline of the authors' public code.
    "authors": Architecture(((512, 9, True), (256, 5, True)), (1024,), 0.5),
}


class Outputs(NamedTuple):
    """All that a CNN computes from a batch of B images with K digits each, J classes."""

    scores: tf.Tensor  # (B, J), probabilities
    predictions: tf.Tensor  # (B, K), the likeliest classes, the likeliest first
    correct: tf.Tensor  # (B,), whether exactly the labels' classes are the likeliest
    cross_entropy: tf.Tensor  # (B,), summed over the classes where each has a sigmoid


@ops.register
class CNN(keras.Model):
    """Convolutions, hidden layers, and a softmax over the classes, or a sigmoid for each.

    Args:
        image_shape: (H, W, C) of the images; H and W are even where there is pooling.
        n_classes: J.
        architecture: a key of ARCHITECTURES.
        digits: K; for several digits the outputs are sigmoids (section 6).
        conv: "direct" or "dft", see `ops.Convolution`.
        seed: seed of the dropout.
        **kwargs: of a Keras model.
    """

    loss_names = ("cross_entropy",)

    def __init__(
        self, image_shape, n_classes, architecture, digits=1, conv="direct", seed=0, **kwargs
    ):
        super().__init__(**kwargs)
        layers = ARCHITECTURES[architecture]
        self.settings = {
            "image_shape": tuple(image_shape),
            "n_classes": n_classes,
            "architecture": architecture,
            "digits": digits,
            "conv": conv,
            "seed": seed,
        }
        self.dropout, self.seed, self.digits = layers.dropout, seed, digits
        self.pooled = [pooled for *_, pooled in layers.convolutions]
        rows, columns, channels = image_shape
        self.convolutions = []
        for number, (filters, size, pooled) in enumerate(layers.convolutions, 1):
            layer = ops.Convolution(
                filters, size, activation="relu", method=conv, name=f"conv{number}"
            )
            layer.build((None, rows + size - 1, columns + size - 1, channels))
            self.convolutions.append(layer)
            channels = filters
            if pooled:
                rows, columns = rows // 2, columns // 2
        width = rows * columns * channels
        self.hidden = []
        for number, units in enumerate((*layers.widths, n_classes), 1):
            activation = "relu" if number <= len(layers.widths) else None
            layer = keras.layers.Dense(units, activation, name=f"dense{number}")
            layer.build((None, width))
            self.hidden.append(layer)
            width = units
        self.built = True

    @property
    def architecture(self):
        """Return the settings that must match for weights to fit."""
        free = ("conv", "seed")
        settings = {name: value for name, value in self.settings.items() if name not in free}
        return settings | {"layers": ARCHITECTURES[self.settings["architecture"]]}

    def spectra(self):
        """Transform the kernels once, for many calls between which no weight changes."""
        return tuple(layer.spectrum() for layer in self.convolutions)

    def logits(self, images, spectra=None, step=None):
        """Compute logits: (B, H, W, C) in [0, 1] -> (B, J).

        Args:
            images: (B, H, W, C).
            spectra: what `spectra` returned, if no weight changed since.
            step: number of the training step, for the dropout; None drops nothing.
        """
        x = images
        spectra = spectra or (None,) * len(self.convolutions)
        for layer, spectrum, pooled in zip(self.convolutions, spectra, self.pooled, strict=True):
            before, after = (layer.kernel_size - 1) // 2, layer.kernel_size // 2
            x = layer(tf.pad(x, [[0, 0], [before, after], [before, after], [0, 0]]), spectrum)
            if pooled:  # by reshaping: XLA's gradient of max_pool is slow on a CPU
                _, rows, columns, channels = x.shape
                x = tf.reshape(x, (-1, rows // 2, 2, columns // 2, 2, channels))
                x = tf.reduce_max(x, axis=(2, 4))
        x = tf.reshape(x, (-1, int(np.prod(x.shape[1:]))))
        for layer in self.hidden[:-1]:
            x = layer(x)
        if step is not None and self.dropout:
            random = tf.random.stateless_uniform(tf.shape(x), tf.stack([self.seed, step]))
            x = tf.where(random >= self.dropout, x / (1 - self.dropout), 0.0)
        return self.hidden[-1](x)

    def call(self, images):
        """Compute probabilities (B, J) of images (B, H, W, C)."""
        return self.probabilities(self.logits(images))

    def probabilities(self, logits):
        """Turn logits into probabilities: a softmax, or a sigmoid for each of several digits."""
        return tf.nn.sigmoid(logits) if self.digits > 1 else tf.nn.softmax(logits)

    def outputs(self, batch, spectra=None, compile_part=None, step=None):
        """Run the network on a batch and return all outputs.

        Args:
            batch: a batch from `pipeline.batches`.
            spectra: from `spectra`, if no weight changed since.
            compile_part: compiles a function, if no gradient is wanted: nothing is dropped out.
            step: number of the training step, for the dropout.

        Returns:
            Outputs.
        """
        digits, shift, labels, _ = batch
        padding = (self.settings["image_shape"][0] - digits.shape[2]) // 2
        canvas, _ = ops.compose(digits, shift, padding)
        if compile_part:
            logits = compile_part(lambda images: self.logits(images, spectra))(canvas)
        else:
            logits = self.logits(canvas, spectra, step)
        n_classes = logits.shape[1]
        predictions = ops.longest(logits, self.digits)
        present, guess = (
            tf.reduce_max(ops.label_mask(classes, n_classes), axis=1)  # (B, K, J) -> (B, J)
            for classes in (labels, predictions)
        )
        if self.digits > 1:
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

    def get_config(self):
        """Return all arguments of the constructor."""
        return super().get_config() | self.settings
