"""The equations of the paper as TensorFlow functions, and the layers built from them.

Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (NeurIPS 2017, arXiv:1710.09829).

Shapes: B images, H×W pixels, C channels, I lower capsules, J upper capsules of dimension D,
K digits in one image.
"""

import keras
import numpy as np
import tensorflow as tf

from capsnet_core.convolution import choose_algorithm
from capsnet_core.spectral import output_size

EPSILON = 1e-9  # inside every root: the gradient of a norm at 0 would be NaN without it
M_PLUS, M_MINUS, LAMBDA = 0.9, 0.1, 0.5  # eq. 4
CONV_METHODS = ("direct", "dft")
_INITIALIZERS = ("kernel_initializer", "bias_initializer")


def register(cls):
    """Register a class with Keras, which loads only classes it knows."""
    return keras.saving.register_keras_serializable(package="capsnet")(cls)


# --- Equations -----------------------------------------------------------------------------------


def length(capsules):
    """Compute ‖v‖ of each capsule: (..., D) -> (...), float32."""
    return tf.sqrt(tf.reduce_sum(tf.square(tf.cast(capsules, tf.float32)), axis=-1) + EPSILON)


def squash(s):
    """Shrink each vector to a length below 1 (eq. 1): v = ‖s‖²/(1+‖s‖²) · s/‖s‖.

    (..., D) of any type -> (..., D) float32.
    """
    s = tf.cast(s, tf.float32)
    squared = tf.reduce_sum(tf.square(s), axis=-1, keepdims=True)
    return s * (tf.sqrt(squared + EPSILON) / (1.0 + squared))


def votes(u, weights):
    """Compute the votes û_{j|i} = W_ij u_i (eq. 2): (B, I, C), (J, I, C, D) -> (B, J, I, D).

    One product, batched over i, computes them all, so W is not copied for each image.
    """
    j, i, c, d = weights.shape
    w = tf.reshape(tf.transpose(weights, (1, 2, 0, 3)), (i, c, j * d))
    u_hat = tf.matmul(tf.transpose(u, (1, 0, 2)), w)  # (I, B, C)·(I, C, JD) -> (I, B, JD)
    return tf.transpose(tf.reshape(u_hat, (i, -1, j, d)), (1, 2, 0, 3))


def agreement(v, u_hat):
    """Compute û_{j|i} · v_j (procedure 1, line 7): (B, J, 1, D), (B, J, I, D) -> (B, J, 1, I)."""
    return tf.matmul(v, u_hat, transpose_b=True)


def coupling(b, none_of_the_above=False):
    """Compute the coupling coefficients (eq. 3), a softmax over j: (B, J, 1, I) -> (B, J, 1, I).

    With a none-of-the-above category, the softmax is over J + 1 logits, the last of which is 0.
    """
    if not none_of_the_above:
        return tf.nn.softmax(b, axis=1)
    return tf.nn.softmax(tf.concat([b, tf.zeros_like(b[:, :1])], axis=1), axis=1)[:, :-1]


def routing(u_hat, iterations, on_iteration=None, bias=None, none_of_the_above=False):
    """Route votes by agreement (procedure 1).

    Each (image, upper capsule) is one tile of a batched product.

    Args:
        u_hat: (B, J, I, D), the votes.
        iterations: number of iterations, at least 1.
        on_iteration: called in each iteration with the coupling coefficients c (B, J, 1, I) and the
            upper capsules v (B, J, 1, D).
        bias: (J, D), added to s_j in each iteration, as in the authors' public code; None as in
            the paper.
        none_of_the_above: whether there is one more category, whose logit is always 0, that takes
            a share of each vote (section 7; "leaky" routing in the authors' public code).

    Returns:
        (B, J, D), the upper capsules v.
    """
    u_hat = tf.cast(u_hat, tf.float32)
    b = tf.zeros_like(u_hat[..., 0])[:, :, None]  # line 2: (B, J, 1, I)
    categories = u_hat.shape[1] + int(none_of_the_above)
    for r in range(iterations):
        # Line 4, eq. 3. For zero logits it is a constant, which XLA would fold slowly.
        c = coupling(b, none_of_the_above) if r > 0 else tf.fill(tf.shape(b), 1.0 / categories)
        s = tf.matmul(c, u_hat)  # line 5: (B, J, 1, I)·(B, J, I, D) -> (B, J, 1, D)
        v = squash(s if bias is None else s + bias[:, None])  # line 6
        if on_iteration:
            on_iteration(c, v)
        if r + 1 < iterations:  # line 7; nothing reads the logits after the last iteration
            b += agreement(v, u_hat)
    return v[:, :, 0]


def margin_loss(lengths, present):
    """Compute the margin loss (eq. 4) of each image, summed over the classes: (B,).

    Args:
        lengths: (B, J), ‖v_k‖ as they are, without a softmax.
        present: (B, J), T_k: 1 where a digit of the class is present, else 0.
    """
    too_short = tf.square(tf.maximum(0.0, M_PLUS - lengths))
    too_long = tf.square(tf.maximum(0.0, lengths - M_MINUS))
    return tf.reduce_sum(present * too_short + LAMBDA * (1.0 - present) * too_long, axis=-1)


def reconstruction_loss(targets, reconstructions):
    """Sum the squared pixel errors of all digits of an image: two (B, K, H, W, C) -> (B,)."""
    difference = tf.cast(reconstructions, tf.float32) - targets
    return tf.reduce_sum(tf.square(difference), axis=(1, 2, 3, 4))


def label_mask(labels, n_classes):
    """Build the mask that keeps the capsules of the labels: (B, K) -> (B, K, J)."""
    return tf.one_hot(labels, n_classes)


def longest(lengths, k):
    """Find the classes of the k longest capsules, the longest first: (B, J) -> (B, k)."""
    return tf.math.top_k(lengths, k).indices


def compose(digits, shift, padding):
    """Shift digits by whole pixels and overlay them on a canvas (sections 5 and 6).

    Shifting multiplies by one-hot matrices from both sides. That is exact, shifts zeros in and
    needs no gather.

    Args:
        digits: (B, K, H, W, C) uint8.
        shift: (B, K, 2) whole pixels down and right.
        padding: pixels of canvas on each side of an unshifted digit; negative if the digits have
            a margin that the canvas does not show.

    Returns:
        The canvas (B, H', W', C), which is the sum of the shifted digits clipped to [0, 1], and the
        shifted digits (B, K, H', W', C) in [0, 1]; H' = H + 2·padding, W' = W + 2·padding.
    """
    height, width = digits.shape[2:4]
    shift = tf.cast(shift, tf.int32)

    def shift_matrices(size, offset):  # (B, K) -> (B, K, size + 2·padding, size)
        source = tf.range(size + 2 * padding) - padding - offset[..., None]
        return tf.one_hot(source, size)

    images = tf.cast(digits, tf.float32)
    rows, columns = shift_matrices(height, shift[..., 0]), shift_matrices(width, shift[..., 1])
    shifted = tf.einsum("bkyh,bkhwc->bkywc", rows, images)
    shifted = tf.einsum("bkxw,bkywc->bkyxc", columns, shifted) / 255.0
    return tf.minimum(tf.reduce_sum(shifted, axis=1), 1.0), shifted


# --- Layers --------------------------------------------------------------------------------------


@register
class Convolution(keras.layers.Layer):
    """Valid 2-D convolution with bias.

    Args:
        filters: output channels.
        kernel_size: pixels, square.
        strides: pixels, the same in both directions.
        activation: None, or the name of an activation of Keras.
        method: "direct", TensorFlow's convolution, the fastest on accelerators; or "dft", products
            of spectra, or of patches for images of few channels, where spectra gain nothing.
        kernel_initializer, bias_initializer: names or configurations of Keras's initializers.

    Raises:
        ValueError: the method is unknown, an image is smaller than the kernel, or images have
            another shape than the layer was built for.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        activation=None,
        method="direct",
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if method not in CONV_METHODS:
            raise ValueError(f"method must be one of {CONV_METHODS}. Received: method={method!r}")
        self.filters, self.kernel_size, self.strides = filters, kernel_size, strides
        self.activation, self.method = activation, method
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer

    def build(self, input_shape):
        """Choose the algorithm for images of this shape and create the weights."""
        *size, channels = input_shape[1:]
        k = self.kernel_size
        self.input_spec = keras.layers.InputSpec(shape=(None, *size, channels))
        algorithm = choose_algorithm(self.method, channels)
        self.algorithm = algorithm(size, (k, k), self.strides, self.compute_dtype)
        self.kernel = self.add_weight(
            shape=(k, k, channels, self.filters), initializer=self.kernel_initializer, name="kernel"
        )
        self.bias = self.add_weight(
            shape=(self.filters,), initializer=self.bias_initializer, name="bias"
        )

    def spectrum(self):
        """Transform the kernel once for many calls, or return None if `multiply` needs no spectrum.

        It is rounded to the type of the layer's products. In training, where the kernel changes
        with each step, products of spectra are float32 under any policy.
        """
        return self.algorithm.spectrum(self.kernel)

    def call(self, images, spectrum=None):
        """Convolve: (B, H, W, C) -> (B, rows, columns, filters).

        `spectrum` is what the method returned, if the kernel has not changed since.
        """
        return self.finish(self.multiply(self.prepare(images, spectrum), spectrum))

    def prepare(self, images, spectrum=None):
        """Return what `multiply` takes: the images, or their spectrum for products of spectra."""
        return self.algorithm.prepare(images, spectrum)

    def multiply(self, factors, spectrum=None):
        """Multiply what `prepare` returned by the kernel. This is most of the arithmetic."""
        return self.algorithm.multiply(factors, self.kernel, spectrum)

    def restore(self, products):
        """Turn what `multiply` returned into the convolution, without bias and activation."""
        return self.algorithm.restore(products)

    def finish(self, products):
        """Turn what `multiply` returned into the output of the layer."""
        y = self.restore(products)
        y += tf.cast(tf.convert_to_tensor(self.bias), y.dtype)
        return keras.activations.get(self.activation)(y)

    def compute_output_shape(self, input_shape):
        """Return the shape of the output for images of a shape."""
        kernel_size = (self.kernel_size, self.kernel_size)
        outputs = output_size(input_shape[1:3], kernel_size, self.strides)
        return (input_shape[0], *outputs, self.filters)

    def get_config(self):
        """Return all arguments of the constructor."""
        names = ("filters", "kernel_size", "strides", "activation", "method", *_INITIALIZERS)
        return super().get_config() | {name: getattr(self, name) for name in names}


@register
class PrimaryCapsules(Convolution):
    """Convolution to n_types capsules of dim channels at each position, squashed (section 4).

    Channels are type-major: a capsule is the `dim` channels of one type at one position, and a
    plain reshape forms it. (B, H, W, C) -> (B, I, dim), I = rows · columns · n_types.

    Args:
        n_types: types of capsules (paper: 32).
        dim: their dimension (paper: 8).
        kernel_size, strides, method: as in `Convolution`.
        coupling: factor of the convolution, before the bias is added. In the authors' public code
            it is 1 / n_types: there the outputs pass through one iteration of routing, whose
            softmax over the types has logits of zero. None as in the paper.
        **kwargs: initializers as in `Convolution`, and arguments of a Keras layer.
    """

    def __init__(
        self, n_types, dim, kernel_size=9, strides=2, method="direct", coupling=None, **kwargs
    ):
        super().__init__(n_types * dim, kernel_size, strides, method=method, **kwargs)
        self.n_types, self.dim, self.coupling = n_types, dim, coupling

    def restore(self, products):
        """Restore as `Convolution` does, and multiply by the coupling."""
        y = super().restore(products)
        return y if self.coupling is None else y * self.coupling

    def finish(self, products):
        """Turn what `multiply` returned into capsules (B, I, dim)."""
        channels = super().finish(products)
        _, rows, columns, _ = channels.shape
        return squash(tf.reshape(channels, (-1, rows * columns * self.n_types, self.dim)))

    def compute_output_shape(self, input_shape):
        """Return the shape of the output for images of a shape."""
        _, rows, columns, _ = super().compute_output_shape(input_shape)
        return (input_shape[0], rows * columns * self.n_types, self.dim)

    def get_config(self):
        """Return all arguments of the constructor."""
        config = super().get_config()
        del config["filters"], config["activation"]
        names = ("n_types", "dim", "coupling")
        return config | {name: getattr(self, name) for name in names}


@register
class DigitCapsules(keras.layers.Layer):
    """Fully connected capsules with dynamic routing (section 2, procedure 1).

    Args:
        n_capsules: J (paper: 10).
        dim: D (paper: 16).
        iterations: routing iterations, at least 1 (paper: 3).
        use_bias: whether a bias (J, D), at first 0.1, is added to s_j in each iteration, as in the
            authors' public code.
        none_of_the_above: see `routing`.

    Raises:
        ValueError: fewer than one iteration.
    """

    def __init__(
        self, n_capsules, dim, iterations=3, use_bias=False, none_of_the_above=False, **kwargs
    ):
        super().__init__(**kwargs)
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1. Received: iterations={iterations}")
        self.n_capsules, self.dim, self.iterations = n_capsules, dim, iterations
        self.use_bias, self.none_of_the_above = use_bias, none_of_the_above

    def build(self, input_shape):
        """Create W for lower capsules of this shape."""
        _, i, c = input_shape
        self.W = self.add_weight(
            shape=(self.n_capsules, i, c, self.dim),
            initializer=keras.initializers.TruncatedNormal(stddev=0.1),
            name="W",
        )
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(self.n_capsules, self.dim),
                initializer=keras.initializers.Constant(0.1),
                name="bias",
            )

    def call(self, u, chunk_size=None):
        """Route the lower capsules: (B, I, C) -> (B, J, D).

        With `chunk_size` that many images are routed at a time, if B is a multiple of it. Their
        votes then stay in a CPU's cache. That is faster, unless gradients are needed.
        """
        weights, bias = tf.convert_to_tensor(self.W), None
        if self.use_bias:  # float32, as all of routing
            bias = tf.cast(tf.convert_to_tensor(self.bias), tf.float32)

        def route(u):
            options = {"bias": bias, "none_of_the_above": self.none_of_the_above}
            return routing(votes(u, weights), self.iterations, **options)

        if not chunk_size or not u.shape[0] or u.shape[0] % chunk_size:
            return route(u)
        chunks = tf.reshape(u, (-1, chunk_size, *u.shape[1:]))
        v = tf.map_fn(route, chunks, fn_output_signature=tf.float32)
        return tf.reshape(v, (-1, *v.shape[2:]))

    def compute_output_shape(self, input_shape):
        """Return the shape of the output for lower capsules of a shape."""
        return (input_shape[0], self.n_capsules, self.dim)

    def get_config(self):
        """Return all arguments of the constructor."""
        names = ("n_capsules", "dim", "iterations", "use_bias", "none_of_the_above")
        return super().get_config() | {name: getattr(self, name) for name in names}


@register
class Decoder(keras.layers.Layer):
    """Masked capsules to image: flatten, fully connected ReLU layers, sigmoid (figure 2).

    Args:
        image_shape: (H, W, C) of the reconstruction.
        units: widths of the hidden layers (paper: 512 and 1024).
        kernel_initializer, bias_initializer: as in `Convolution`, of all layers.

    Raises:
        ValueError: the shape of a mask is not (B, K, J).
    """

    def __init__(
        self,
        image_shape,
        units=(512, 1024),
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_shape, self.units = tuple(image_shape), tuple(units)
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer
        options = {name: getattr(self, name) for name in _INITIALIZERS}
        # Explicit names, because they are part of a checkpoint's keys: Keras would number layers
        # across all networks of the process.
        self.hidden = [
            keras.layers.Dense(n, "relu", name=f"hidden_{i}", dtype=self.dtype_policy, **options)
            for i, n in enumerate(self.units, 1)
        ]
        self.pixels = keras.layers.Dense(
            int(np.prod(self.image_shape)), "sigmoid", name="pixels", dtype="float32", **options
        )

    def build(self, input_shape):
        """Create the weights for capsules of this shape."""
        _, j, d = input_shape
        sizes = (j * d, *self.units)
        for layer, size in zip((*self.hidden, self.pixels), sizes, strict=True):
            layer.build((None, size))

    def call(self, capsules, mask):
        """Decode the capsules under each mask: (B, J, D), (B, K, J) -> (B, K, H, W, C)."""
        b, j, d = capsules.shape
        if not tf.TensorShape((b, None, j)).is_compatible_with(mask.shape):
            raise ValueError(
                f"mask must have the shape (B, K, J) = ({b}, K, {j}). Received: {tuple(mask.shape)}"
            )
        k = mask.shape[1]
        x = tf.reshape(mask[..., None] * capsules[:, None], (-1, j * d))  # (B, K, J, D) -> (BK, JD)
        for layer in (*self.hidden, self.pixels):
            x = layer(x)
        return tf.reshape(x, (-1, k, *self.image_shape))

    def compute_output_shape(self, input_shape, mask_shape=(None, 1, None)):
        """Return the shape of the output for capsules and masks of a shape."""
        return (input_shape[0], mask_shape[1], *self.image_shape)

    def get_config(self):
        """Return all arguments of the constructor."""
        names = ("image_shape", "units", *_INITIALIZERS)
        return super().get_config() | {name: getattr(self, name) for name in names}
