"""Three algorithms for a valid convolution, with one interface.

An algorithm is made for images and kernels of one size. It convolves in three steps, so that the
large product in the middle need not be compiled with what surrounds it:

    spectrum = algorithm.spectrum(kernel)  # once for many calls, or None
    factors = algorithm.prepare(images, spectrum)
    products = algorithm.multiply(factors, kernel, spectrum)
    outputs = algorithm.restore(products)

Shapes: B images (B, H, W, C), kernel (kh, kw, C, O), outputs (B, rows, columns, O).
"""

import tensorflow as tf

from capsnet_core.spectral import (
    conv_plan,
    image_spectrum,
    kernel_spectrum,
    output_size,
    outputs_of_products,
)

# Up to this many channels, products of patches are faster than products of spectra.
PATCH_CHANNELS = 4


def choose_algorithm(method, channels):
    """Return the class of the algorithm of a method for images of this many channels."""
    if method == "direct":
        return Direct
    return Patches if channels <= PATCH_CHANNELS else Spectral


def _as_tensor(kernel, dtype):
    return tf.cast(tf.convert_to_tensor(kernel), dtype)


class Direct:
    """TensorFlow's convolution, the fastest on accelerators.

    Args (of all three classes):
        image_size: (rows, columns) in pixels.
        kernel_size: (rows, columns) in pixels.
        stride: pixels, the same in both directions.
        dtype: type of the products, except those of spectra in training.

    Raises:
        ValueError: the image is smaller than the kernel.
    """

    def __init__(self, image_size, kernel_size, stride, dtype):
        self.outputs = output_size(image_size, kernel_size, stride)  # (rows, columns)
        self.stride, self.dtype = stride, dtype

    def spectrum(self, kernel):
        """Return None: `multiply` takes the kernel itself."""

    def prepare(self, images, spectrum=None):
        """Cast the images to the type of the products."""
        return tf.cast(images, self.dtype)

    def multiply(self, factors, kernel, spectrum=None):
        """Convolve."""
        return tf.nn.conv2d(factors, _as_tensor(kernel, self.dtype), self.stride, "VALID")

    def restore(self, products):
        """Return the products, which are the outputs."""
        return products


class Patches(Direct):
    """One product with all patches, the fastest on a CPU for images of few channels."""

    def multiply(self, factors, kernel, spectrum=None):
        """Gather the patches and multiply them: (B·rows·columns, kw·kh·C)·(kw·kh·C, O)."""
        kernel, s, (rows, columns) = _as_tensor(kernel, self.dtype), self.stride, self.outputs
        kh, kw, c, o = kernel.shape
        high, wide = s * (rows - 1) + 1, s * (columns - 1) + 1
        patches = tf.concat([factors[:, y : y + high : s] for y in range(kh)], axis=-1)
        patches = tf.concat([patches[:, :, x : x + wide : s] for x in range(kw)], axis=-1)
        by_column = tf.reshape(tf.transpose(kernel, (1, 0, 2, 3)), (kw * kh * c, o))
        return tf.reshape(
            tf.matmul(tf.reshape(patches, (-1, kw * kh * c)), by_column), (-1, rows, columns, o)
        )


class Spectral:
    """Products of spectra, the fastest on a CPU for images of many channels.

    In training, where the kernel changes with each step, `multiply` transforms the kernel itself,
    and the products are float32 whatever the type.
    """

    def __init__(self, image_size, kernel_size, stride, dtype):
        self.plan = conv_plan(tuple(image_size), tuple(kernel_size), stride)
        self.dtype = dtype

    def spectrum(self, kernel):
        """Transform the kernel, and round it to the type of the products: (P, s·s·C, O)."""
        return tf.cast(self._exact_spectrum(kernel), self.dtype)

    def _exact_spectrum(self, kernel):
        return kernel_spectrum(_as_tensor(kernel, tf.float32), self.plan)

    def prepare(self, images, spectrum=None):
        """Transform the images, and round them to the kernel's type: (P, B·tiles, s·s·C)."""
        factors = image_spectrum(tf.cast(images, tf.float32), self.plan)
        return factors if spectrum is None else tf.cast(factors, spectrum.dtype)

    def multiply(self, factors, kernel, spectrum=None):
        """Multiply the spectra: (P, B·tiles, s·s·C)·(P, s·s·C, O) -> (P, B·tiles, O)."""
        return tf.matmul(factors, self._exact_spectrum(kernel) if spectrum is None else spectrum)

    def restore(self, products):
        """Transform the products back."""
        return outputs_of_products(tf.cast(products, tf.float32), self.plan)
