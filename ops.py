"""The equations of the paper as TensorFlow functions, and the layers made of them.

Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (NeurIPS 2017, arXiv:1710.09829).

Shapes: B images, H×W pixels, C channels, I lower capsules, J upper capsules of dimension D,
K digits shown in one image.
"""

import functools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

EPSILON = 1e-9  # inside every root: the gradient of a norm at 0 would be NaN without it
M_PLUS, M_MINUS, LAMBDA = 0.9, 0.1, 0.5  # eq. 4
CONV_METHODS = ("direct", "dft")
PATCH_CHANNELS = 4  # up to so many, products with patches are faster than spectra


def register(cls):
    return keras.saving.register_keras_serializable(package="capsnet")(cls)


# --- Equations -----------------------------------------------------------------------------------


def length(capsules):
    """‖v‖ of each capsule: (..., D) -> (...), float32."""
    return tf.sqrt(tf.reduce_sum(tf.square(tf.cast(capsules, tf.float32)), axis=-1) + EPSILON)


def squash(s):
    """Eq. 1, v = ‖s‖²/(1+‖s‖²) · s/‖s‖, along the last axis: (..., D) -> (..., D), lengths < 1."""
    s = tf.cast(s, tf.float32)
    squared = tf.reduce_sum(tf.square(s), axis=-1, keepdims=True)
    return s * (tf.sqrt(squared + EPSILON) / (1.0 + squared))


def votes(u, weights):
    """Eq. 2, û_{j|i} = W_ij u_i, as one product batched over i, so that W is never copied.

    Args:
        u: (B, I, C), the lower capsules.
        weights: (J, I, C, D), W.

    Returns:
        (B, J, I, D)
    """
    j, i, c, d = weights.shape
    w = tf.reshape(tf.transpose(weights, (1, 2, 0, 3)), (i, c, j * d))
    u_hat = tf.matmul(tf.transpose(u, (1, 0, 2)), w)  # (I, B, C)·(I, C, JD) -> (I, B, JD)
    return tf.transpose(tf.reshape(u_hat, (i, -1, j, d)), (1, 2, 0, 3))


def routing(u_hat, iterations, on_coupling=None):
    """Procedure 1 on given votes, each (image, upper capsule) a tile of a batched product.

    Args:
        u_hat: votes (B, J, I, D).
        iterations: how often to route, at least 1.
        on_coupling: called with the coupling coefficients (B, J, 1, I) of each iteration.

    Returns:
        (B, J, D), the upper capsules v.
    """
    u_hat = tf.cast(u_hat, tf.float32)
    b = tf.zeros_like(u_hat[..., 0])[:, :, None]  # line 2: (B, J, 1, I)
    for r in range(iterations):
        # Line 4, eq. 3: over the upper capsules. Of zeros it is 1/J; XLA would fold it slowly.
        c = tf.nn.softmax(b, axis=1) if r else tf.fill(tf.shape(b), 1.0 / u_hat.shape[1])
        if on_coupling:
            on_coupling(c)
        v = squash(tf.matmul(c, u_hat))  # lines 5, 6: (B, J, 1, I)·(B, J, I, D) -> (B, J, 1, D)
        if r + 1 < iterations:  # line 7; what it changes after the last iteration is never read
            b += tf.matmul(v, u_hat, transpose_b=True)
    return v[:, :, 0]


def margin_loss(lengths, present):
    """Eq. 4 for each image, summed over the classes.

    Args:
        lengths: (B, J), ‖v_k‖, as they are (no softmax).
        present: (B, J), T_k: 1 where a digit of the class is shown, else 0.

    Returns:
        (B,)
    """
    too_short = tf.square(tf.maximum(0.0, M_PLUS - lengths))
    too_long = tf.square(tf.maximum(0.0, lengths - M_MINUS))
    return tf.reduce_sum(present * too_short + LAMBDA * (1.0 - present) * too_long, axis=-1)


def reconstruction_loss(targets, reconstructions):
    """Sum of squared pixel errors over all digits of an image: (B, K, H, W, C) twice -> (B,)."""
    difference = tf.cast(reconstructions, tf.float32) - targets
    return tf.reduce_sum(tf.square(difference), axis=(1, 2, 3, 4))


def label_mask(labels, n_classes):
    """The mask that keeps the capsules of the labels: (B, K) -> (B, K, J)."""
    return tf.one_hot(labels, n_classes)


def longest(lengths, k):
    """The classes of the k longest capsules, the longest first: (B, J) -> (B, K)."""
    return tf.math.top_k(lengths, k).indices


def compose(digits, shift, margin):
    """Put digits on a canvas, each shifted by whole pixels, and lay them over each other.

    Shifting multiplies with one-hot matrices from both sides, which is exact, moves zeros in and
    needs no gather (paper, section 5: shifted by up to 2 pixels; section 6: up to 4, overlaid).

    Args:
        digits: (B, K, H, W, C) uint8.
        shift: (B, K, 2) whole pixels down and right.
        margin: pixels of canvas on each side of the unshifted digit.

    Returns:
        canvas (B, H', W', C), the sum clipped to [0, 1], and the shifted digits
        (B, K, H', W', C) in [0, 1]; H' = H + 2·margin.
    """
    height, width = digits.shape[2:4]
    shift = tf.cast(shift, tf.int32)

    def placing(size, moved):  # (B, K) -> (B, K, size', size), 1 where a row or column lands
        source = tf.range(size + 2 * margin) - margin - moved[..., None]
        return tf.one_hot(source, size)

    images = tf.cast(digits, tf.float32)
    rows, columns = placing(height, shift[..., 0]), placing(width, shift[..., 1])
    moved = tf.einsum("bkyh,bkhwc->bkywc", rows, images)
    moved = tf.einsum("bkxw,bkywc->bkyxc", columns, moved) / 255.0
    return tf.minimum(tf.reduce_sum(moved, axis=1), 1.0), moved


# --- Convolution by products of spectra -----------------------------------------------------------

# Real points to evaluate polynomials at, by number; conjugate pairs on the unit circle complete
# them. 1 and 2 make the DFT. The factors are those of the smallest error on 5 to 24 points.
REAL_POINTS = {
    1: (1.0,), 2: (1.0, -1.0), 3: (0.0, 1.0, -1.0), 4: (0.0, np.inf, 1.0, -1.0),
    5: (0.0, 1.26, -1.26, 1 / 1.26, -1 / 1.26), 6: (0.0, np.inf, 1.26, -1.26, 1 / 1.26, -1 / 1.26),
    7: (0.0, 1.0, -1.0, 1.67, -1.67, 1 / 1.67, -1 / 1.67),
    8: (0.0, np.inf, 1.0, -1.0, 1.67, -1.67, 1 / 1.67, -1 / 1.67),
}
ERROR_LIMIT = 7  # times the rounding errors of the DFT; see `AxisTransform.error`


class AxisTransform(NamedTuple):
    """Evaluation of image and kernel at N points along one axis, and the way back to outputs."""

    of_image: np.ndarray  # (N, N) complex
    of_kernel: np.ndarray  # (N, taps) complex
    to_output: np.ndarray  # (outputs, N) complex
    reals: int  # that many real points, then pairs of a complex point and its conjugate
    error: float  # standard deviation of rounding errors of the outputs, 1 for the DFT


class ConvPlan(NamedTuple):
    """How `dft_conv2d` cuts and transforms images of one size for kernels of one size."""

    stride: int
    taps: tuple  # of the kernel's stride phases, (rows, columns)
    outputs: tuple  # rows, columns
    tile: tuple  # outputs that one transform gives, (rows, columns)
    tiles: tuple  # how many of them, (down, across)
    of_image: np.ndarray  # (P, grid points): P real products stand for the whole spectrum
    of_kernel: np.ndarray  # (P, taps)
    to_output: np.ndarray  # (outputs of a tile, P)


@functools.lru_cache
def conv_plan(image_size, kernel_size, stride):
    """Choose the tile that takes the least time, and the constant matrices of its transforms.

    A valid convolution with stride s is a stride-1 one of the s×s phases of image and kernel, with
    taps = ⌈kernel/s⌉. Outputs of a tile and taps are related as the factors of a product of two
    polynomials with N = outputs + taps − 1 coefficients, so values at N points are enough to
    compute it by as many multiplications: the roots of unity make it the DFT (Mathieu, Henaff,
    LeCun, arXiv:1312.5851), small real points Winograd's minimal filtering (Lavin, Gray,
    arXiv:1509.09308), which needs fewer real products but is less exact. Here both are mixed.

    Args:
        image_size, kernel_size: (rows, columns) in pixels.
        stride: pixels, the same in both directions.

    Raises:
        ValueError: the image is smaller than the kernel.
    """
    if min(np.subtract(image_size, kernel_size)) < 0:
        raise ValueError(f"a {kernel_size} kernel needs a larger image. Received: {image_size}")
    outputs = tuple((i - k) // stride + 1 for i, k in zip(image_size, kernel_size))
    taps = tuple(-(-k // stride) for k in kernel_size)

    def cost(tile):
        # Operations per pair of channels at batch 64, weighed by measurement: products forward and
        # backward, transforms of the images, and passes over the kernel's spectrum.
        points = (tile[0] + taps[0] - 1) * (tile[1] + taps[1] - 1)
        count = -(-outputs[0] // tile[0]) * -(-outputs[1] // tile[1])
        products = _n_products(*_grid_transforms(tile, taps))
        return products * (count * (384 + points) + 270)

    sizes = [range(1, min(n, 24) + 1) for n in outputs]
    tile = min(((y, x) for y in sizes[0] for x in sizes[1]), key=cost)
    tiles = tuple(-(-n // t) for n, t in zip(outputs, tile))
    return ConvPlan(stride, taps, outputs, tile, tiles, *_grid_matrices(tile, taps))


@functools.lru_cache
def _axis_transforms(outputs, taps):
    """An AxisTransform for each set of real points that is possible."""
    n, found = outputs + taps - 1, []
    for reals, values in REAL_POINTS.items():
        pairs, odd = divmod(n - reals, 2)
        if odd or pairs < 0:
            continue
        upper = np.exp(1j * np.pi * np.arange(1, pairs + 1) / (pairs + (0.5 if reals == 1 else 1)))
        points = np.concatenate([values, np.stack([upper, upper.conj()], axis=1).ravel()])

        def evaluation(size, points=points):  # (points, coefficients); at ∞ the last coefficient
            powers = np.where(np.isinf(points), 0, points)[:, None] ** np.arange(size)
            return np.where(np.isinf(points)[:, None], np.arange(size) == size - 1, powers)

        of_image, of_kernel = np.linalg.inv(evaluation(n)).T, evaluation(taps)
        scale = np.abs(of_image).max(axis=1)  # so that the factors are of one magnitude
        of_image, to_output = of_image / scale[:, None], evaluation(outputs).T * scale
        power = (np.abs(of_image) ** 2).sum(axis=1) * (np.abs(of_kernel) ** 2).sum(axis=1)
        error = np.sqrt((np.abs(to_output) ** 2 @ power).max() / taps)
        found.append(AxisTransform(of_image, of_kernel, to_output, reals, error))
    return found


def _n_products(rows, columns):
    """Real products for one value of each pair of conjugates: 1 of reals, 3 of complex ones."""
    both = rows.reals * columns.reals
    return both + 3 * (len(rows.of_image) * len(columns.of_image) - both) // 2


@functools.lru_cache
def _grid_transforms(tile, taps):
    """The two AxisTransforms with the fewest products whose errors stay below the limit."""
    pairs = ((y, x) for y in _axis_transforms(tile[0], taps[0])
             for x in _axis_transforms(tile[1], taps[1]) if y.error * x.error <= ERROR_LIMIT)
    return min(pairs, key=lambda pair: _n_products(*pair))


def _grid_matrices(tile, taps):
    """Rows that take images and kernels to the factors of the products, products to outputs.

    With X = a + ib the image's value at a complex point and K = c + id the kernel's, X·K takes
    three real products (Gauss): p₁ = (a+b)c, p₂ = a(d−c), p₃ = b(c+d), with Re = p₁ − p₃ and
    Im = p₁ + p₂. The conjugate point adds the conjugate, so twice the real part counts.
    """
    rows, columns = _grid_transforms(tile, taps)
    of_image, of_kernel, to_output = [], [], []
    for u, v in np.ndindex(len(rows.of_image), len(columns.of_image)):
        first_complex = u - rows.reals if u >= rows.reals else v - columns.reals
        if first_complex >= 0 and first_complex % 2:
            continue  # a conjugate
        x = np.outer(rows.of_image[u], columns.of_image[v]).ravel()
        k = np.outer(rows.of_kernel[u], columns.of_kernel[v]).ravel()
        y = np.outer(rows.to_output[:, u], columns.to_output[:, v]).ravel()
        if first_complex < 0:
            of_image, of_kernel, to_output = of_image + [x], of_kernel + [k], to_output + [y]
            continue
        a, b, c, d = x.real, x.imag, k.real, k.imag
        re, im = 2 * y.real, -2 * y.imag
        of_image += [a + b, a, b]
        of_kernel += [c, d - c, c + d]
        to_output += [re + im, im, -re]
    matrices = of_image, of_kernel, np.transpose(to_output)
    return tuple(np.asarray(np.real(m), np.float32) for m in matrices)


def kernel_spectrum(kernel, plan):
    """The kernel's factors of the products: (kh, kw, C, O) -> (P, s·s·C, O)."""
    s, (th, tw) = plan.stride, plan.taps
    kh, kw, c, o = kernel.shape
    kernel = tf.pad(kernel, ((0, th * s - kh), (0, tw * s - kw), (0, 0), (0, 0)))
    phases = tf.transpose(tf.reshape(kernel, (th, s, tw, s, c, o)), (0, 2, 1, 3, 4, 5))
    spectrum = tf.matmul(plan.of_kernel, tf.reshape(phases, (th * tw, s * s * c * o)))
    return tf.reshape(spectrum, (-1, s * s * c, o))


def dft_conv2d(images, spectrum, plan):
    """Valid convolution (correlation, as in `tf.nn.conv2d`) by products of spectra.

    Args:
        images: (B, H, W, C)
        spectrum: (P, s·s·C, O) from `kernel_spectrum`.
        plan: of `conv_plan`, for these sizes.

    Returns:
        (B, rows, columns, O)
    """
    s, (rows, columns), (down, across) = plan.stride, plan.tile, plan.tiles
    grid = [n + t - 1 for n, t in zip(plan.tile, plan.taps)]
    c, o = images.shape[-1], spectrum.shape[-1]
    # Cut to what the outputs see, or fill up the last tile with zeros.
    height, width = (s * (n * t + k - 1) for n, t, k in zip(plan.tiles, plan.tile, plan.taps))
    images = images[:, :height, :width]
    missing = height - images.shape[1], width - images.shape[2]
    images = tf.pad(images, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
    phases = tf.reshape(images, (-1, height // s, s, width // s, s, c))
    phases = tf.stack([phases[:, i * rows :][:, : grid[0]] for i in range(down)], axis=1)
    phases = tf.stack(
        [phases[:, :, :, :, i * columns :][:, :, :, :, : grid[1]] for i in range(across)], axis=2
    )  # (B, down, across, N, s, N, s, C)
    phases = tf.transpose(phases, (3, 5, 0, 1, 2, 4, 6, 7))
    factors = tf.matmul(plan.of_image, tf.reshape(phases, (grid[0] * grid[1], -1)))
    factors = tf.reshape(factors, (len(plan.of_image), -1, s * s * c))  # (P, B·tiles, ssC)
    products = tf.matmul(factors, spectrum)  # (P, B·tiles, O)
    outputs = tf.matmul(plan.to_output, tf.reshape(products, (len(plan.of_image), -1)))
    outputs = tf.reshape(outputs, (rows, columns, -1, down, across, o))
    outputs = tf.reshape(
        tf.transpose(outputs, (2, 3, 0, 4, 1, 5)), (-1, down * rows, across * columns, o)
    )
    return outputs[:, : plan.outputs[0], : plan.outputs[1]]


def patches_conv2d(images, kernel, stride):
    """Valid convolution as one matrix product with all patches, for images of few channels."""
    kh, kw, c, o = kernel.shape
    rows, columns = ((n - k) // stride + 1 for n, k in zip(images.shape[1:3], (kh, kw)))
    high, wide = stride * (rows - 1) + 1, stride * (columns - 1) + 1
    patches = tf.concat([images[:, y : y + high : stride] for y in range(kh)], axis=-1)
    patches = tf.concat([patches[:, :, x : x + wide : stride] for x in range(kw)], axis=-1)
    by_column = tf.reshape(tf.transpose(kernel, (1, 0, 2, 3)), (kw * kh * c, o))
    return tf.reshape(tf.matmul(tf.reshape(patches, (-1, kw * kh * c)), by_column),
                      (-1, rows, columns, o))


# --- Layers --------------------------------------------------------------------------------------


def initializers(stddev, first_bias):
    """Of a kernel and its biases: a truncated normal, or Glorot's uniform (None); a constant."""
    kernel = "glorot_uniform" if stddev is None else keras.initializers.TruncatedNormal(0.0, stddev)
    return kernel, keras.initializers.Constant(first_bias)


@register
class Convolution(keras.layers.Layer):
    """Valid 2-D convolution with bias.

    Args:
        filters: output channels.
        kernel_size: pixels, square.
        stride: pixels.
        relu: whether a ReLU follows.
        method: "direct" (the library's, fastest on accelerators), or "dft" (products of spectra;
            for images of up to 4 channels, where they gain nothing, products with patches).
        stddev, first_bias: see `initializers`.

    Raises:
        ValueError: a method that does not exist, or an image smaller than the kernel.
    """

    def __init__(self, filters, kernel_size, stride=1, relu=False, method="direct", stddev=None,
                 first_bias=0.0, **kwargs):
        super().__init__(**kwargs)
        if method not in CONV_METHODS:
            raise ValueError(f"method must be one of {CONV_METHODS}. Received: method={method!r}")
        self.filters, self.kernel_size, self.stride = filters, kernel_size, stride
        self.relu, self.method, self.stddev, self.first_bias = relu, method, stddev, first_bias

    def build(self, input_shape):
        *size, channels = input_shape[1:]
        k = self.kernel_size
        self.plan = conv_plan(tuple(size), (k, k), self.stride)
        self.way = "patches" if self.method == "dft" and channels <= PATCH_CHANNELS else self.method
        kernel, bias = initializers(self.stddev, self.first_bias)
        self.kernel = self.add_weight(
            shape=(k, k, channels, self.filters), initializer=kernel, name="kernel")
        self.bias = self.add_weight(shape=(self.filters,), initializer=bias, name="bias")

    def spectrum(self):
        """What of the kernel can be computed once for many calls, or None."""
        if self.way != "dft":
            return None
        return kernel_spectrum(tf.convert_to_tensor(self.kernel), self.plan)

    def call(self, images, spectrum=None):
        """(B, H, W, C) -> (B, rows, columns, filters); `spectrum` from the method of that name."""
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)
        if self.way == "dft":  # spectra lose digits by themselves, so all are float32
            images, kernel, bias = (tf.cast(x, tf.float32) for x in (images, kernel, bias))
        if self.way == "direct":
            y = tf.nn.conv2d(images, kernel, self.stride, "VALID")
        elif self.way == "patches":
            y = patches_conv2d(images, kernel, self.stride)
        else:
            spectrum = kernel_spectrum(kernel, self.plan) if spectrum is None else spectrum
            y = dft_conv2d(images, spectrum, self.plan)
        y += bias
        return tf.nn.relu(y) if self.relu else y

    def compute_output_shape(self, input_shape):
        rows, columns = ((n - self.kernel_size) // self.stride + 1 for n in input_shape[1:3])
        return (input_shape[0], rows, columns, self.filters)

    def get_config(self):
        names = ("filters", "kernel_size", "stride", "relu", "method", "stddev", "first_bias")
        return super().get_config() | {name: getattr(self, name) for name in names}


@register
class PrimaryCapsules(Convolution):
    """Convolution to n_types capsules of dim channels at each position, squashed (section 4).

    Channels are type-major, so a capsule is `dim` channels of one type at one position, and a
    plain reshape gives them: (B, H, W, C) -> (B, I, dim), I = rows · columns · n_types.

    Args:
        n_types, dim: capsule types and their dimension (paper: 32 and 8).
        kernel_size, stride, method, stddev, first_bias: as in `Convolution`.
    """

    def __init__(self, n_types, dim, kernel_size=9, stride=2, method="direct", **kwargs):
        super().__init__(n_types * dim, kernel_size, stride, method=method, **kwargs)
        self.n_types, self.dim = n_types, dim

    def call(self, images, spectrum=None):
        rows, columns = self.plan.outputs
        channels = super().call(images, spectrum)
        return squash(tf.reshape(channels, (-1, rows * columns * self.n_types, self.dim)))

    def compute_output_shape(self, input_shape):
        _, rows, columns, _ = super().compute_output_shape(input_shape)
        return (input_shape[0], rows * columns * self.n_types, self.dim)

    def get_config(self):
        config = super().get_config() | {"n_types": self.n_types, "dim": self.dim}
        return {k: v for k, v in config.items() if k not in ("filters", "relu")}


@register
class DigitCapsules(keras.layers.Layer):
    """Fully connected capsules with dynamic routing (section 2, procedure 1).

    Args:
        n_capsules, dim: J and D (paper: 10 and 16).
        iterations: of routing, at least 1 (paper: 3).

    Raises:
        ValueError: fewer than one iteration.
    """

    def __init__(self, n_capsules, dim, iterations=3, **kwargs):
        super().__init__(**kwargs)
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1. Received: iterations={iterations}")
        self.n_capsules, self.dim, self.iterations = n_capsules, dim, iterations

    def build(self, input_shape):
        _, i, c = input_shape
        self.W = self.add_weight(
            shape=(self.n_capsules, i, c, self.dim),
            initializer=keras.initializers.TruncatedNormal(stddev=0.1),
            name="W",
        )

    def call(self, u, at_once=None):
        """(B, I, C) -> (B, J, D); B, if it is a multiple of `at_once`, in parts of so many images,
        whose votes stay in the cache (faster on a CPU, but not where gradients follow)."""
        weights = tf.convert_to_tensor(self.W)

        def upper(u):
            return routing(votes(u, weights), self.iterations)

        if not at_once or not u.shape[0] or u.shape[0] % at_once:
            return upper(u)
        v = tf.map_fn(upper, tf.reshape(u, (-1, at_once, *u.shape[1:])))
        return tf.reshape(v, (-1, *v.shape[2:]))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.n_capsules, self.dim)

    def get_config(self):
        names = ("n_capsules", "dim", "iterations")
        return super().get_config() | {name: getattr(self, name) for name in names}


@register
class Decoder(keras.layers.Layer):
    """Masked capsules -> image: flatten, fully connected ReLU layers, sigmoid (figure 2).

    Args:
        image_shape: (H, W, C) of the reconstruction.
        units: widths of the hidden layers (paper: 512 and 1024).
        stddev, first_bias: see `initializers`.
    """

    def __init__(self, image_shape, units=(512, 1024), stddev=None, first_bias=0.0, **kwargs):
        super().__init__(**kwargs)
        self.image_shape, self.units = tuple(image_shape), tuple(units)
        self.stddev, self.first_bias = stddev, first_bias

        def dense(size, activation, **options):
            kernel, biases = initializers(stddev, first_bias)
            return keras.layers.Dense(size, activation, kernel_initializer=kernel,
                                      bias_initializer=biases, **options)

        # Named, because Keras would number on from the networks made before in the process, and the
        # names are those of a checkpoint.
        self.hidden = [
            dense(n, "relu", name=f"hidden_{i}", dtype=self.dtype_policy)
            for i, n in enumerate(self.units, 1)
        ]
        size = int(np.prod(self.image_shape))
        self.pixels = dense(size, "sigmoid", name="pixels", dtype="float32")

    def build(self, input_shape):
        _, j, d = input_shape
        sizes = (j * d, *self.units)
        for layer, size in zip((*self.hidden, self.pixels), sizes):
            layer.build((None, size))

    def call(self, capsules, mask):
        """One reconstruction for each mask: (B, J, D) and (B, K, J) -> (B, K, H, W, C)."""
        k, (j, d) = mask.shape[1], capsules.shape[1:]
        x = tf.reshape(mask[..., None] * capsules[:, None], (-1, j * d))  # (B, K, J, D) -> (BK, JD)
        for layer in (*self.hidden, self.pixels):
            x = layer(x)
        return tf.reshape(x, (-1, k, *self.image_shape))

    def compute_output_shape(self, input_shape, mask_shape=(None, 1, None)):
        return (input_shape[0], mask_shape[1], *self.image_shape)

    def get_config(self):
        names = ("image_shape", "units", "stddev", "first_bias")
        return super().get_config() | {name: getattr(self, name) for name in names}
