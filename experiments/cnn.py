"""The convolutional baselines that the paper compares with, for the Trainer that trains the CapsNet."""

import keras
import numpy as np
import tensorflow as tf

import ops

# Convolutions (filters, kernel size, whether 2×2 max-pooling follows), all with stride 1 and the same
# padding, so that the numbers of parameters are the paper's; widths of the hidden layers; and the share
# of the last one that is dropped out in training.
ARCHITECTURES = {
    # section 5: 35.4M
    "mnist": (((256, 5, False), (256, 5, False), (128, 5, False)), (328, 192), 0.5),
    "multi": (((512, 9, True), (256, 5, True)), (1024,), 0.0),  # section 6.1: 24.56M, no dropout
    # Section 5.2 says max-pooling, dropout and about as many parameters as the CapsNet has.
    "affine": (((256, 5, True), (256, 5, True), (128, 5, False)), (720,), 0.5),
}


@ops.register
class CNN(keras.Model):
    """Convolutions, hidden layers, and a softmax over the classes, or a sigmoid for each.

    Args:
        image_shape: (H, W, C) of the images; where there is pooling, H and W are even.
        n_classes: J.
        architecture: of ARCHITECTURES.
        digits: in an image; for more than one the outputs are sigmoids (section 6).
        conv: "direct" or "dft", see `ops.Convolution`.
        seed: of the dropout of the last hidden layer.
    """

    def __init__(self, image_shape, n_classes, architecture, digits=1, conv="direct", seed=0,
                 **kwargs):
        super().__init__(**kwargs)
        convolutions, widths, self.dropout = ARCHITECTURES[architecture]
        self.settings = {"image_shape": tuple(image_shape), "n_classes": n_classes,
                         "architecture": architecture, "digits": digits, "conv": conv,
                         "layers": ARCHITECTURES[architecture]}
        self.digits, self.seed = digits, seed
        self.pooled = [pooled for *_, pooled in convolutions]
        rows, columns, channels = image_shape
        self.convolutions = []
        for number, (filters, size, pooled) in enumerate(convolutions, 1):
            layer = ops.Convolution(filters, size, relu=True, method=conv, name=f"conv{number}")
            layer.build((None, rows + size - 1, columns + size - 1, channels))
            self.convolutions.append(layer)
            channels = filters
            if pooled:
                rows, columns = rows // 2, columns // 2
        width = rows * columns * channels
        self.hidden = []
        for number, units in enumerate((*widths, n_classes), 1):
            activation = "relu" if number <= len(widths) else None
            layer = keras.layers.Dense(units, activation, name=f"dense{number}")
            layer.build((None, width))
            self.hidden.append(layer)
            width = units
        self.built = True

    def spectra(self):
        """The transformed kernels, for many calls with weights that rest."""
        return tuple(layer.spectrum() for layer in self.convolutions)

    def logits(self, images, spectra=None, step=None):
        """(B, H, W, C) in [0, 1] -> (B, J); with the number of a training step, with dropout."""
        x = images
        spectra = spectra or (None,) * len(self.convolutions)
        for layer, spectrum, pooled in zip(self.convolutions, spectra, self.pooled):
            before, after = (layer.kernel_size - 1) // 2, layer.kernel_size // 2
            padding = [[0, 0], [before, after], [before, after], [0, 0]]
            x = layer(tf.pad(x, padding), spectrum)
            if pooled:  # by reshaping: XLA's gradient of max_pool is slow on a CPU
                _, rows, columns, channels = x.shape
                x = tf.reshape(x, (-1, rows // 2, 2, columns // 2, 2, channels))
                x = tf.reduce_max(x, axis=(2, 4))
        x = tf.reshape(x, (-1, int(np.prod(x.shape[1:]))))
        for layer in self.hidden[:-1]:
            x = layer(x)
        if step is not None and self.dropout:
            dice = tf.random.stateless_uniform(tf.shape(x), tf.stack([self.seed, step]))
            x = tf.where(dice >= self.dropout, x / (1 - self.dropout), 0.0)
        return self.hidden[-1](x)

    def call(self, images):
        """(B, H, W, C) -> probabilities (B, J)."""
        activation = tf.nn.sigmoid if self.digits > 1 else tf.nn.softmax
        return activation(self.logits(images))

    def examine(self, data, batch, spectra=None, step=None):
        """What `CapsNet.examine` says, but for capsules and reconstructions, which it has not.

        `lengths` are probabilities and `margin` is the cross-entropy, summed over sigmoids.
        """
        digits, shift, labels, _ = batch
        canvas, shifted = ops.compose(digits, shift, data.margin)
        logits = self.logits(canvas, spectra, step)
        present = tf.reduce_max(ops.label_mask(labels, logits.shape[1]), axis=1)  # (B, J)
        if self.digits > 1:
            loss = tf.reduce_sum(
                tf.nn.sigmoid_cross_entropy_with_logits(present, logits), axis=1)
            probabilities = tf.nn.sigmoid(logits)
        else:
            loss = tf.nn.softmax_cross_entropy_with_logits(present, logits)
            probabilities = tf.nn.softmax(logits)
        predictions = ops.longest(logits, self.digits)
        guess = tf.reduce_max(ops.label_mask(predictions, logits.shape[1]), axis=1)
        return {
            "canvas": canvas, "digits": shifted, "lengths": probabilities,
            "predictions": predictions, "margin": loss, "reconstruction": tf.zeros_like(loss),
            "correct": tf.reduce_all(guess == present, axis=1),
        }

    def get_config(self):
        settings = {name: value for name, value in self.settings.items() if name != "layers"}
        return super().get_config() | settings | {"seed": self.seed}
