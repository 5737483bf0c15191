"""The network of the paper: its outputs, its losses, and moving one dimension."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

import ops
from capsnet_core.base import Inference, Network
from capsnet_core.cnn import CNN
from capsnet_core.networks import CapsNetConfig

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


class CapsNetInference(Inference):
    """A CapsNet for inference, whose largest product is apart.

    That product is computed between two compiled parts: on a CPU, oneDNN is faster at it than XLA.
    Routing is then faster too.
    """

    def compute(self, images, spectra):
        """Compute the digit capsules: (B, H, W, C) in [0, 1] -> (B, J, D)."""
        network = self.network
        chunk_size = CHUNK_SIZE if network.conv == "dft" else None  # the convolution for a CPU

        def before(images):
            return network.primary.prepare(network.conv1(images, spectra[0]), spectra[1])

        def after(products):
            return network.digits(network.primary.finish(products), chunk_size=chunk_size)

        before, after = self.compile_part(before), self.compile_part(after)
        return after(network.primary.multiply(before(images), spectra[1]))


@ops.register
class CapsNet(Network):
    """Conv → primary capsules → routed digit capsules → masked decoder (section 4, figures 1, 2).

    The arguments are those of `Network`, with the settings of a `CapsNetConfig`. Under the policy
    "mixed_bfloat16" the products are bfloat16, except those of routing; squash, routing, lengths
    and losses stay float32. With conv="dft", only the products of spectra in inference are
    bfloat16.

    Raises:
        ImageTooSmall: two convolutions leave nothing of an image.
    """

    config_class, inference_class = CapsNetConfig, CapsNetInference

    def make_layers(self, config, initializers):
        """Create and build all layers."""
        conv = self.conv
        authors = config.variant == "authors"
        # XLA multiplies bfloat16 on a CPU as float32, only slower.
        policy = "float32" if conv == "dft" else self.dtype_policy
        self.conv1 = ops.Convolution(
            config.n_conv,
            config.kernel_size,
            activation="relu",
            method=conv,
            name="conv1",
            dtype=policy,
            **initializers["conv1"],
        )
        self.primary = ops.PrimaryCapsules(
            config.n_primary,
            config.primary_dim,
            config.kernel_size,
            method=conv,
            coupling=1 / config.n_primary if authors else None,
            name="primary_capsules",
            dtype=self.dtype_policy,
            **initializers["others"],
        )
        self.digits = ops.DigitCapsules(
            config.n_classes,
            config.digit_dim,
            config.routing_iterations,
            use_bias=authors,
            none_of_the_above=config.none_of_the_above,
            name="digit_capsules",
            dtype=policy,
        )
        self.decoder = ops.Decoder(
            config.image_shape,
            config.decoder_units,
            name="decoder",
            dtype=policy,
            **initializers["others"],
        )
        shape = (None, *config.image_shape)
        for layer in (self.conv1, self.primary, self.digits, self.decoder):
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def parts(self):
        """Return the layers by the names under which training can leave them as they are."""
        names = "conv1", "primary", "digits", "decoder"
        return {name: getattr(self, name) for name in names}

    def feature_layers(self):
        """Return both convolutions."""
        return [self.conv1, self.primary]

    def class_variables(self):
        """Return W, and the bias of the authors' variant."""
        return self.digits.variables

    # --- Capsules and reconstructions ------------------------------------------------------------

    def capsules(self, images):
        """Compute the digit capsules: (B, H, W, C) in [0, 1] -> (B, J, D)."""
        primary = self.primary  # in steps: as a call, Keras would round its input to bfloat16
        products = primary.multiply(primary.prepare(self.conv1(images)))
        return self.digits(primary.finish(products))

    def call(self, images):
        """Compute lengths (B, J) and capsules (B, J, D) of images (B, H, W, C) from 0 to 1."""
        self.check_images(images)
        capsules = self.capsules(images)
        return ops.length(capsules), capsules

    def serve(self, images, k=1):
        """Compute what an exported network returns, with reconstructions of the K longest capsules.

        Returns:
            Dict of lengths (B, J), capsules (B, J, D) and reconstructions (B, K, H, W, C).
        """
        lengths, capsules = self(images)
        mask = ops.label_mask(ops.longest(lengths, k), lengths.shape[1])
        decoded = self.decoder(capsules, mask)
        return {"lengths": lengths, "capsules": capsules, "reconstructions": decoded}

    def reconstruct(self, images=None, *, capsules=None, classes=None):
        """Reconstruct images from one capsule each, or from capsules that are given.

        Args:
            images: (B, H, W, C), floats from 0 to 1; or None if `capsules` are given.
            capsules: (B, J, D), what `call` returned, or a changed copy of it.
            classes: B integers, which capsule to decode; by default the longest.

        Returns:
            (B, H, W, C).

        Raises:
            ValueError: both or none of `images` and `capsules` are given, or one of them is wrong.
        """
        if (images is None) == (capsules is None):
            raise ValueError("give either images or capsules")
        if capsules is None:
            _, capsules = self(images)
        capsules = tf.cast(capsules, tf.float32)
        n_classes, dim = self.config.n_classes, self.config.digit_dim
        if tuple(capsules.shape[1:]) != (n_classes, dim):
            raise ValueError(
                f"capsules must have the shape (B, {n_classes}, {dim}). Received: capsules.shape="
                f"{tuple(capsules.shape)}"
            )
        if classes is None:
            classes = ops.longest(ops.length(capsules), 1)[:, 0]
        classes = np.asarray(classes)
        wrong = classes.dtype.kind not in "iu" or classes.shape != (len(capsules),)
        if wrong or (classes.size and not 0 <= classes.min() <= classes.max() < n_classes):
            raise ValueError(
                f"classes must be {len(capsules)} integers from 0 to {n_classes - 1}. Received: "
                f"classes={classes.tolist()}"
            )
        return self.decoder(capsules, ops.label_mask(classes[:, None], n_classes))[:, 0]

    def tweak(self, capsules, classes):
        """Reconstruct capsules with one dimension changed by each of TWEAKS (section 5.1).

        (N, J, D), and which of the J to change and decode, (N,) -> array (D, N, S, H, W, C), with
        S = len(TWEAKS).
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

    # --- What the engine needs (see `training.network`) -------------------------------------------

    def outputs(self, batch, seed=None):
        """Run the network on a batch and return Outputs; it needs no random numbers."""
        return self.outputs_by(self.capsules, batch)

    def outputs_by(self, compute_capsules, batch):
        """Run the network on a batch, with a function that computes the capsules of the canvas."""
        digits, shift, labels, _ = batch
        canvas, shifted = ops.compose(digits, shift, self.padding(digits))
        capsules = compute_capsules(canvas)
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


CLASSES = {"capsnet": CapsNet, "cnn": CNN}  # by the names of `capsnet_core.networks.NETWORKS`


def build(config, **options):
    """Return the network of a config, with first weights; see the classes for the options."""
    settings = config.describe()
    return CLASSES[settings.pop("network")](**settings, **options)
