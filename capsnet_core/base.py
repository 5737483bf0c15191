"""What the Keras models of all networks share: a config, first weights, checks of images."""

import keras
import numpy as np
import tensorflow as tf

from capsnet_core.config import INITIALIZATION, INITIALIZATIONS


class Network(keras.Model):
    """A Keras model that its config describes.

    Args:
        *settings, **named_settings: those of the config: `image_shape` (H, W, C), `n_classes` (J),
            and settings that differ from the defaults.
        conv: "direct" or "dft", how convolutions are computed (see `ops.Convolution`).
        initialization: a key of `config.INITIALIZATIONS`: "glorot", uniform with biases of 0, or
            "authors", truncated normals with biases of 0.1 as in the authors' public code. W_ij of
            a CapsNet is a truncated normal in both.
        name, trainable, dtype: of a Keras model.

    Raises:
        TypeError: a setting is unknown.
        ValueError: the value of a setting is none that it may have.

    Attributes:
        config: see `capsnet_core.networks`.
    """

    config_class = None  # one of `capsnet_core.networks`
    inference_class = None  # its Inference

    def __init__(
        self,
        *settings,
        conv="direct",
        initialization=INITIALIZATION,
        name=None,
        trainable=True,
        dtype=None,
        **named_settings,
    ):
        super().__init__(name=name, trainable=trainable, dtype=dtype)
        if initialization not in INITIALIZATIONS:
            raise ValueError(
                f"initialization must be one of {tuple(INITIALIZATIONS)}. Received: "
                f"initialization={initialization!r}"
            )
        self.config = self.config_class(*settings, **named_settings)
        self.conv, self.initialization = conv, initialization
        self.make_layers(self.config, INITIALIZATIONS[initialization])
        self.built = True

    def make_layers(self, config, initializers):
        """Create and build all layers; `initializers` are one of `config.INITIALIZATIONS`."""
        raise NotImplementedError

    def parts(self):
        """Return the layers by the names under which training can leave them as they are."""
        raise NotImplementedError

    def feature_layers(self):
        """Return the layers that do not depend on the classes and the size of images."""
        raise NotImplementedError

    def class_variables(self):
        """Return the variables whose first axis is the classes."""
        return []

    def inference(self, compile_part):
        """Return the network prepared for inference; `compile_part` compiles a function."""
        return self.inference_class(self, compile_part)

    def check_images(self, images):
        """Raise ValueError unless images are floats (B, H, W, C) and, if known, at most 1."""
        expected = tuple(self.config.image_shape)
        shape = tf.TensorShape(images.shape)
        if shape.rank != 4 or tuple(shape[1:]) != expected:
            raise ValueError(
                f"images must have the shape (B, {', '.join(map(str, expected))}). Received: "
                f"images.shape={shape}"
            )
        dtype = tf.as_dtype(images.dtype)
        if not dtype.is_floating:
            raise ValueError(
                f"images must be floats from 0 to 1: divide bytes by 255. Received: {dtype.name}"
            )
        if tf.executing_eagerly() and len(images) and (largest := float(np.max(images))) > 1:
            raise ValueError(
                "images must be from 0 to 1: divide bytes by 255. Received: a largest value of "
                f"{largest:g}"
            )

    def predict(self, x, *arguments, **named):
        """Predict as Keras does, but check an array first: compiled code sees no values."""
        if isinstance(x, np.ndarray) or tf.is_tensor(x):
            self.check_images(x)
        return super().predict(x, *arguments, **named)

    def padding(self, digits):
        """Return the pixels of canvas on each side of digits (B, K, h, w, C)."""
        return (self.config.image_shape[0] - digits.shape[2]) // 2

    def get_config(self):
        """Return all arguments of the constructor."""
        description = self.config.describe()
        del description["network"]  # the registered name of the class says it
        others = {"conv": self.conv, "initialization": self.initialization}
        return super().get_config() | description | others


class Inference:
    """A network for inference: its kernels are transformed once for many batches.

    Args:
        network: Network.
        compile_part: compiles a function.
    """

    def __init__(self, network, compile_part):
        self.network, self.compile_part = network, compile_part
        self.prepare = compile_part(self._spectra)

    def _spectra(self):
        return tuple(layer.spectrum() for layer in self.network.feature_layers())

    def outputs(self, batch, spectra):
        """Run the network on a batch; `prepare` returned the spectra of its present weights."""
        return self.network.outputs_by(lambda canvas: self.compute(canvas, spectra), batch)

    def compute(self, images, spectra):
        """Compute from images what `outputs_by` of the network needs."""
        raise NotImplementedError
