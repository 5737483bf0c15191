"""The network of the paper: its outputs, its losses, its sizes, and moving one dimension."""

import itertools
import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import ops
from config import INITIALIZATION, INITIALIZATIONS, VARIANTS, NetworkConfig
from errors import ImageTooSmall

DEFAULTS = NetworkConfig()
# Images that are routed at a time on a CPU, for inference: their votes fit in its cache.
CHUNK_SIZE = 16
TWEAKS = np.linspace(-0.25, 0.25, 11)  # section 5.1


class Outputs(NamedTuple):
    """All that a CapsNet computes from a batch of B images with K digits each, J classes."""

    canvas: tf.Tensor  # (B, H, W, C), what the network sees
    digits: tf.Tensor  # (B, K, H, W, C), the shifted digits that the canvas is composed of
    capsules: tf.Tensor  # (B, J, D)
    lengths: tf.Tensor  # (B, J)
    predictions: tf.Tensor  # (B, K), classes of the longest capsules, the longest first
    with_label: tf.Tensor  # (B, K, H, W, C), reconstructions from the labels' capsules
    without_label: tf.Tensor  # (B, K, H, W, C), reconstructions from the longest capsules
    margin_loss: tf.Tensor  # (B,)
    reconstruction_loss: tf.Tensor  # (B,)
    correct: tf.Tensor  # (B,), whether exactly the labels' capsules are the longest

    @property
    def scores(self):
        """Return what classes are ranked by: the lengths."""
        return self.lengths


@ops.register
class CapsNet(keras.Model):
    """Conv → primary capsules → routed digit capsules → masked decoder (section 4, figures 1, 2).

    Args:
        image_shape: (H, W, C) of the images.
        n_classes: J, one digit capsule for each.
        n_conv: filters of the first convolution.
        n_primary: types of primary capsules.
        primary_dim: dimension of the primary capsules.
        digit_dim: D, dimension of the digit capsules.
        routing_iterations: iterations of procedure 1.
        kernel_size: pixels, of both convolutions.
        decoder_units: widths of the decoder's hidden layers.
        conv: "direct" or "dft", how both convolutions are computed (see `ops.Convolution`).
        initialization: a key of `config.INITIALIZATIONS`: "glorot", uniform with biases of 0, or
            "authors", truncated normals with biases of 0.1 as in the authors' public code.
        variant: "paper", or "authors", the network of the authors' public code: its primary
            capsules are the convolution divided by the number of types, plus a bias, and its digit
            capsules have a bias in each iteration of routing.
        dtype: policy of Keras. Under "mixed_bfloat16" the products are bfloat16, except those of
            routing; squash, routing, lengths and losses stay float32. With conv="dft", only the
            products of spectra in inference are bfloat16.

    Raises:
        ImageTooSmall: two convolutions leave nothing of an image.
    """

    def __init__(
        self,
        image_shape,
        n_classes,
        n_conv=DEFAULTS.n_conv,
        n_primary=DEFAULTS.n_primary,
        primary_dim=DEFAULTS.primary_dim,
        digit_dim=DEFAULTS.digit_dim,
        routing_iterations=DEFAULTS.routing_iterations,
        kernel_size=DEFAULTS.kernel_size,
        decoder_units=DEFAULTS.decoder_units,
        conv="direct",
        initialization=INITIALIZATION,
        variant=DEFAULTS.variant,
        w_stddev=0.1,
        gradient="all",
        target="shifted",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_image_size(image_shape, kernel_size)
        self.settings = {
            "image_shape": tuple(image_shape),
            "n_classes": n_classes,
            "n_conv": n_conv,
            "n_primary": n_primary,
            "primary_dim": primary_dim,
            "digit_dim": digit_dim,
            "routing_iterations": routing_iterations,
            "kernel_size": kernel_size,
            "decoder_units": tuple(decoder_units),
            "conv": conv,
            "initialization": initialization,
            "variant": variant,
        }
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}. Received: variant={variant!r}")
        self.target = target
        authors = variant == "authors"
        initializers = INITIALIZATIONS[initialization]
        # XLA multiplies bfloat16 on a CPU as float32, only slower.
        policy = "float32" if conv == "dft" else self.dtype_policy
        self.conv1 = ops.Convolution(
            n_conv,
            kernel_size,
            activation="relu",
            method=conv,
            name="conv1",
            dtype=policy,
            **initializers["conv1"],
        )
        self.primary = ops.PrimaryCapsules(
            n_primary,
            primary_dim,
            kernel_size,
            method=conv,
            coupling=1 / n_primary if authors else None,
            name="primary_capsules",
            dtype=self.dtype_policy,
            **initializers["others"],
        )
        self.digits = ops.DigitCapsules(
            n_classes,
            digit_dim,
            routing_iterations,
            use_bias=authors,
            w_stddev=w_stddev,
            gradient=gradient,
            name="digit_capsules",
            dtype=policy,
        )
        self.decoder = ops.Decoder(
            image_shape, decoder_units, name="decoder", dtype=policy, **initializers["others"]
        )
        shape = (None, *image_shape)
        for layer in (self.conv1, self.primary, self.digits, self.decoder):
            layer.build(shape)
            shape = layer.compute_output_shape(shape)
        self.built = True

    @property
    def architecture(self):
        """Return the settings that must match for weights to fit."""
        excluded = ["conv", "initialization"]
        if self.settings["variant"] == DEFAULTS.variant:  # older checkpoints do not name it
            excluded.append("variant")
        return {name: value for name, value in self.settings.items() if name not in excluded}

    @property
    def loss_names(self):
        """Return the names of the terms of the loss."""
        return ("margin", "reconstruction")

    def spectra(self):
        """Transform the kernels of both convolutions once, for calls with the same weights."""
        return self.conv1.spectrum(), self.primary.spectrum()

    def capsules(self, images, spectra=(None, None), compile_part=None):
        """Compute the digit capsules: (B, H, W, C) in [0, 1] -> (B, J, D).

        Args:
            images: (B, H, W, C).
            spectra: what `spectra` returned, if no weight has changed since.
            compile_part: compiles a function, if no gradient is needed. The largest product is
                computed between two such parts: on a CPU, oneDNN is faster at it than XLA. Routing
                is then faster too. None to compute all as it is, in training.
        """
        in_chunks = compile_part and self.settings["conv"] == "dft"  # the convolution for a CPU

        def before(images):
            return self.primary.prepare(self.conv1(images, spectra[0]), spectra[1])

        def after(products):
            u = self.primary.finish(products)
            return self.digits(u, chunk_size=CHUNK_SIZE if in_chunks else None)

        if compile_part:
            before, after = compile_part(before), compile_part(after)
        return after(self.primary.multiply(before(images), spectra[1]))

    def call(self, images):
        """Compute lengths (B, J) and capsules (B, J, D) of images (B, H, W, C)."""
        capsules = self.capsules(images)
        return ops.length(capsules), capsules

    def outputs(self, batch, spectra=(None, None), compile_part=None, step=None):
        """Run the network on a batch and return all outputs.

        Args:
            batch: a batch from `input_pipeline.batches`.
            spectra: what `spectra` returned, if no weight has changed since.
            compile_part: as in `capsules`.
            step: number of the training step. Networks that draw random numbers need it; this one
                draws none.

        Returns:
            Outputs.
        """
        digits, shift, labels, _ = batch
        padding = (self.settings["image_shape"][0] - digits.shape[2]) // 2
        canvas, shifted = ops.compose(digits, shift, padding)
        if self.target == "unshifted":
            _, shifted = ops.compose(digits, tf.zeros_like(shift), padding)
        capsules = self.capsules(canvas, spectra, compile_part)
        lengths = ops.length(capsules)
        predictions = ops.longest(lengths, labels.shape[1])
        mask = ops.label_mask(labels, lengths.shape[1])
        guess = ops.label_mask(predictions, lengths.shape[1])
        present = tf.reduce_max(mask, axis=1)
        with_label = self.decoder(capsules, mask)
        return Outputs(
            canvas=canvas,
            digits=shifted,
            capsules=capsules,
            lengths=lengths,
            predictions=predictions,
            with_label=with_label,
            without_label=self.decoder(capsules, guess),
            margin_loss=ops.margin_loss(lengths, present),
            reconstruction_loss=ops.reconstruction_loss(shifted, with_label),
            correct=tf.reduce_all(tf.reduce_max(guess, axis=1) == present, axis=1),
        )

    def loss_terms(self, outputs):
        """Return the terms of the loss of each image, by name: (B,) each (section 4.1)."""
        return {"margin": outputs.margin_loss, "reconstruction": outputs.reconstruction_loss}

    def tweak(self, capsules, classes):
        """Reconstruct capsules with one dimension changed by each of TWEAKS (section 5.1).

        Args:
            capsules: (N, J, D) array.
            classes: (N,), which of the J capsules to change and decode.

        Returns:
            Array (D, N, S, H, W, C), S = len(TWEAKS).
        """
        n, n_classes, dims = capsules.shape
        steps = len(TWEAKS)
        mask = np.eye(n_classes, dtype=np.float32)[classes].repeat(steps, axis=0)  # (N * S, J)
        images = []
        for dim in range(dims):
            moved = capsules[:, None].repeat(steps, axis=1)  # (N, S, J, D)
            moved[np.arange(n), :, classes, dim] += TWEAKS
            decoded = self.decoder(moved.reshape(-1, n_classes, dims), mask[:, None]).numpy()
            images.append(decoded.reshape(n, steps, *decoded.shape[2:]))
        return np.stack(images)

    def get_config(self):
        """Return all arguments of the constructor."""
        return super().get_config() | self.settings


def uncompiled(function):
    """Return a function as it is: as `compile_part`, for what runs only once."""
    return function


def check_image_size(image_shape, kernel_size):
    """Raise ImageTooSmall if two convolutions leave nothing of images (H, W, C)."""
    if min(image_shape[:2]) < 2 * kernel_size - 1:
        raise ImageTooSmall(kernel_size, image_shape)


def layer_sizes(image_shape, n_classes, network=DEFAULTS):
    """Compute the sizes of a CapsNet before any of it is built.

    Args:
        image_shape: (H, W, C).
        n_classes: J.
        network: NetworkConfig.

    Returns:
        List of (layer, shape of its output for one image, number of parameters).

    Raises:
        ImageTooSmall: two convolutions leave nothing of an image.
    """
    kernel_size = network.kernel_size
    check_image_size(image_shape, kernel_size)
    area, channels = kernel_size**2, network.n_primary * network.primary_dim
    conv1 = [n - kernel_size + 1 for n in image_shape[:2]]  # rows, columns
    primary = [(n - kernel_size) // 2 + 1 for n in conv1]
    lower, dim = math.prod(primary) * network.n_primary, network.digit_dim
    bias = 1 if network.variant == "authors" else 0
    widths = [n_classes * dim, *network.decoder_units, math.prod(image_shape)]
    return [
        ("conv1", (*conv1, network.n_conv), (area * image_shape[2] + 1) * network.n_conv),
        ("primary capsules", (lower, network.primary_dim), (area * network.n_conv + 1) * channels),
        (
            "digit capsules",
            (n_classes, dim),
            (lower * network.primary_dim + bias) * n_classes * dim,
        ),
        ("decoder", tuple(image_shape), sum((a + 1) * b for a, b in itertools.pairwise(widths))),
    ]


def memory_needed(sizes, batch_size, data_bytes=0):
    """Estimate the peak memory of a training run on a CPU in bytes.

    Fitted to whole runs of the paper's network, with products of spectra: images of 28×28 to
    104×104, grey and in colour, 2 to 100 classes, batches of 16 to 256. Images of 112×112 and
    128×128 took a fifth to a third more.

    Args:
        sizes: what `layer_sizes` returned.
        batch_size: images in a step on one device.
        data_bytes: bytes of all images; the fit was made with few.
    """
    parameters = sum(count for *_, count in sizes)
    (lower, primary_dim), (upper, dim) = sizes[1][1], sizes[2][1]
    # Spectra of both sides of the second convolution, and the votes.
    per_image = 165 * lower * primary_dim + 9.6 * lower * upper * dim
    return 1150e6 + 27.6 * parameters + batch_size * per_image + data_bytes


def batch_that_fits(sizes, memory, data_bytes=0):
    """Return the largest batch on one device whose training fits into bytes of memory, or 0."""
    fixed = memory_needed(sizes, 0, data_bytes)
    per_image = memory_needed(sizes, 1, data_bytes) - fixed
    return max(0, int((memory - fixed) / per_image))
