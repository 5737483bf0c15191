"""What describes a network: one frozen config for each kind of network.

The config is all that is needed to rebuild a network. `describe` is what a checkpoint, weights.npz
and a .keras file hold of it, and `describe` → `config_from` is a round trip. A field made by
`setting` is a flag of the command line too. Nothing here needs TensorFlow.
"""

import dataclasses
import itertools
import math
from typing import ClassVar, NamedTuple

from capsnet_core.errors import ImageTooSmall


def setting(default, bounds, text):
    """Define a field that is also a flag.

    Args:
        default: its default; the type of the flag is that of the default.
        bounds: (lowest, highest) number, or the choices of a text, or None for a boolean.
        text: what `--help` says about it.
    """
    return dataclasses.field(default=default, metadata={"bounds": bounds, "help": text})


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """What all networks have: the images and classes that they are for.

    Raises:
        ValueError: a setting is out of its bounds, or none of its choices.
    """

    network: ClassVar[str]  # its name on the command line and in files
    score: ClassVar[str]  # what classes are ranked by
    loss_terms: ClassVar[tuple]  # names; TrainingConfig has the weights, as NAME_weight, else 1

    image_shape: tuple  # (H, W, C)
    n_classes: int  # J

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float, str)):  # a list from JSON, a shape of an array
                object.__setattr__(self, field.name, tuple(value))
            bounds, text = field.metadata.get("bounds"), isinstance(field.default, str)
            if bounds and not (value in bounds if text else bounds[0] <= value <= bounds[1]):
                expected = f"one of {bounds}" if text else f"from {bounds[0]} to {bounds[1]}"
                raise ValueError(
                    f"{field.name} must be {expected}. Received: {field.name}={value!r}"
                )
        if len(self.image_shape) != 3:
            raise ValueError(
                f"image_shape must be (H, W, C). Received: image_shape={self.image_shape}"
            )

    def describe(self):
        """Return a dict from which `config_from` makes this config again."""
        return {"network": self.network, **dataclasses.asdict(self)}

    @classmethod
    def settings(cls):
        """Return the fields that are flags."""
        return [field for field in dataclasses.fields(cls) if "help" in field.metadata]

    def sizes(self):
        """Return a list of (layer, shape of its output for one image, number of parameters)."""
        raise NotImplementedError

    def memory(self, batch_size, data_bytes=0):
        """Estimate the peak memory of a training run on a CPU in bytes.

        Args:
            batch_size: images in a step on one device.
            data_bytes: bytes of all images; the fits were made with few.
        """
        raise NotImplementedError

    def batch_that_fits(self, memory, data_bytes=0):
        """Return the largest batch on one device whose training fits into bytes of memory, or 0."""
        fixed = self.memory(0, data_bytes)
        per_image = self.memory(1, data_bytes) - fixed
        return max(0, int((memory - fixed) / per_image))


@dataclasses.dataclass(frozen=True)
class CapsNetConfig(NetworkConfig):
    """A CapsNet (section 4).

    Raises:
        ImageTooSmall: two convolutions leave nothing of an image.
    """

    network = "capsnet"
    score = "length"
    loss_terms = ("margin", "reconstruction")

    n_conv: int = setting(256, (1, 4096), "filters of the first convolution")
    n_primary: int = setting(32, (1, 1024), "types of primary capsules")
    primary_dim: int = setting(8, (1, 1024), "dimension of a primary capsule")
    digit_dim: int = setting(16, (1, 1024), "dimension of a digit capsule")
    routing_iterations: int = setting(3, (1, 100), "iterations of dynamic routing")
    kernel_size: int = setting(
        9,
        (1, 99),
        "side of the kernels of both convolutions, in pixels; images need at least twice as many "
        "minus 1",
    )
    decoder_units: tuple = (512, 1024)  # widths of the decoder's hidden layers
    variant: str = setting(
        "paper",
        ("paper", "authors"),
        "the paper's network, or that of the authors' public code, which has biases in routing and "
        "weaker primary capsules",
    )
    none_of_the_above: bool = setting(
        False,
        None,
        "routing may send a vote to none of the classes, a category of its own (section 7)",
    )

    def __post_init__(self):
        super().__post_init__()
        if min(self.image_shape[:2]) < 2 * self.kernel_size - 1:
            raise ImageTooSmall(self.kernel_size, self.image_shape)

    def sizes(self):
        """Return what `NetworkConfig.sizes` does."""
        k, dim = self.kernel_size, self.digit_dim
        channels = self.n_primary * self.primary_dim
        conv1 = [n - k + 1 for n in self.image_shape[:2]]  # rows, columns
        lower = math.prod((n - k) // 2 + 1 for n in conv1) * self.n_primary
        bias = 1 if self.variant == "authors" else 0
        pixels = math.prod(self.image_shape)
        widths = [self.n_classes * dim, *self.decoder_units, pixels]
        weights = {
            "conv1": (k**2 * self.image_shape[2] + 1) * self.n_conv,
            "primary capsules": (k**2 * self.n_conv + 1) * channels,
            "digit capsules": (lower * self.primary_dim + bias) * self.n_classes * dim,
            "decoder": sum((a + 1) * b for a, b in itertools.pairwise(widths)),
        }
        outputs = (*conv1, self.n_conv), (lower, self.primary_dim), (self.n_classes, dim)
        shapes = (*outputs, tuple(self.image_shape))
        return list(zip(weights, shapes, weights.values(), strict=True))

    def memory(self, batch_size, data_bytes=0):
        """Estimate as `NetworkConfig.memory` does.

        Fitted to whole runs of the paper's network, with products of spectra: images of 28×28 to
        104×104, grey and in colour, 2 to 100 classes, batches of 16 to 256. Images of 112×112 and
        128×128 took a fifth to a third more.
        """
        sizes = self.sizes()
        parameters = sum(count for *_, count in sizes)
        (lower, primary_dim), (upper, dim) = sizes[1][1], sizes[2][1]
        # Spectra of both sides of the second convolution, and the votes.
        per_image = 165 * lower * primary_dim + 9.6 * lower * upper * dim
        return 1150e6 + 27.6 * parameters + batch_size * per_image + data_bytes


class Layers(NamedTuple):
    """Layers of a CNN: convolutions with stride 1 and the same padding, then hidden layers."""

    convolutions: tuple  # (filters, kernel size, whether 2×2 max-pooling follows) of each
    widths: tuple  # those of the hidden layers
    dropout: float  # share of the last hidden layer that is dropped in training


CNN_LAYERS = {
    # Section 5: 35.4M parameters.
    "mnist": Layers(((256, 5, False), (256, 5, False), (128, 5, False)), (328, 192), 0.5),
    # Section 6.1: 24.56M, no dropout.
    "multi": Layers(((512, 9, True), (256, 5, True)), (1024,), 0.0),
    # Section 5.2 asks for max-pooling, dropout and about as many parameters as the CapsNet has.
    "affine": Layers(((256, 5, True), (256, 5, True), (128, 5, False)), (720,), 0.5),
    # The baseline of the authors' public code.
    "authors": Layers(((512, 9, True), (256, 5, True)), (1024,), 0.5),
}


@dataclasses.dataclass(frozen=True)
class CNNConfig(NetworkConfig):
    """A convolutional network that the paper compares the CapsNet with.

    Raises:
        ValueError: pooling halves an odd number of rows or columns.
    """

    network = "cnn"
    score = "probability"
    loss_terms = ("cross_entropy",)

    architecture: str = setting(
        "mnist",
        tuple(CNN_LAYERS),
        "layers of the convolutional baseline: of sections 5 (mnist), 6.1 (multi) and 5.2 "
        "(affine), or of the authors' public code",
    )
    n_digits: int = 1  # K, digits in an image; for several the outputs are sigmoids (section 6)

    def __post_init__(self):
        super().__post_init__()
        poolings = sum(pooled for *_, pooled in self.layers.convolutions)
        if any(side % 2**poolings for side in self.image_shape[:2]):
            raise ValueError(
                f"architecture={self.architecture!r} halves the sides of an image {poolings} times "
                f"and needs multiples of {2**poolings}. Received: image_shape={self.image_shape}"
            )

    @property
    def layers(self):
        """Return the Layers."""
        return CNN_LAYERS[self.architecture]

    def sizes(self):
        """Return what `NetworkConfig.sizes` does."""
        rows, columns, channels = self.image_shape
        sizes = []
        for number, (filters, side, pooled) in enumerate(self.layers.convolutions, 1):
            parameters = (side**2 * channels + 1) * filters
            sizes.append((f"conv{number}", (rows, columns, filters), parameters))
            channels = filters
            if pooled:
                rows, columns = rows // 2, columns // 2
        width = rows * columns * channels
        for number, units in enumerate((*self.layers.widths, self.n_classes), 1):
            sizes.append((f"dense{number}", (units,), (width + 1) * units))
            width = units
        return sizes

    def memory(self, batch_size, data_bytes=0):
        """Estimate as `NetworkConfig.memory` does.

        Fitted to whole runs of the four architectures, with products of spectra: grey images of
        28×28 to 48×48, batches of 16 to 256.
        """
        sizes = self.sizes()
        parameters = sum(count for *_, count in sizes)
        # Outputs of the convolutions, which are largest before they are pooled.
        activations = sum(math.prod(shape) for name, shape, _ in sizes if "conv" in name)
        return 825e6 + 33 * parameters + batch_size * 19.5 * activations + data_bytes


NETWORKS = {config.network: config for config in (CapsNetConfig, CNNConfig)}


def config_from(description):
    """Return the config that a dict of `NetworkConfig.describe` is about.

    Raises:
        KeyError, TypeError, ValueError: it is about no network of this program.
    """
    settings = dict(description)
    return NETWORKS[settings.pop("network")](**settings)
