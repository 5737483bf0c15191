"""Slow, literal forms of the paper's equations in float64, and how to compare with them."""

import numpy as np
import tensorflow as tf

# Shapes for which convolutions are compared: image, kernel, stride, channels, filters.
CONVOLUTIONS = {
    "one pixel": ((1, 1), (1, 1), 1, 2, 3),
    "1×1": ((5, 4), (1, 1), 1, 3, 2),
    "1×1 stride 2": ((5, 6), (1, 1), 2, 2, 2),
    "2×2 even": ((6, 8), (2, 2), 1, 1, 2),
    "2×2 stride 3, larger than the kernel": ((8, 9), (2, 2), 3, 2, 1),
    "3×3 odd": ((7, 5), (3, 3), 1, 5, 7),
    "3×3 stride 2, odd": ((9, 11), (3, 3), 2, 1, 4),
    "3×3 stride 2, even": ((10, 8), (3, 3), 2, 6, 2),
    "3×3 stride 3, wide": ((7, 20), (3, 3), 3, 3, 3),
    "4×4 stride 2": ((11, 10), (4, 4), 2, 2, 5),
    "5×5 stride 3": ((13, 16), (5, 5), 3, 4, 1),
    "3×5 stride 2": ((9, 12), (3, 5), 2, 2, 3),
    "7×2": ((8, 9), (7, 2), 1, 3, 2),
    "9×9, one output": ((9, 9), (9, 9), 1, 2, 2),
    "9×9 stride 3": ((17, 23), (9, 9), 3, 2, 2),
    "conv1 of MNIST": ((28, 28), (9, 9), 1, 1, 4),
    "primary capsules of MNIST": ((20, 20), (9, 9), 2, 16, 8),
    "primary capsules of MultiMNIST": ((28, 28), (9, 9), 2, 16, 8),
    "many tiles": ((45, 53), (3, 3), 1, 2, 2),
    "many tiles stride 2": ((70, 94), (5, 5), 2, 1, 2),
}


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def assert_close(actual, expected, tolerance=1e-5):
    """Require every error to be at most `tolerance` times the largest magnitude of the oracle."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    error, largest = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= tolerance * largest, f"off by {error}, the largest is {largest}"


def values_and_gradients(function, inputs, upstream):
    """Compute function(*inputs), and the gradient of its product with `upstream` by each input."""
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
        total = tf.reduce_sum(y * tf.cast(upstream, y.dtype))
    return y, *tape.gradient(total, inputs)


def randomized(layer, rng):
    """Draw all weights of a layer or a network: zero biases would hide faults."""
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(scale=0.3, size=variable.shape))
    return layer


def squash_of(s):
    """Compute eq. 1 for one vector."""
    n = np.sqrt(np.sum(s * s))
    return n**2 / (1 + n**2) * (s / n)


def procedure_1(u, weights, iterations, none_of_the_above=False):
    """Compute eq. 2 and procedure 1, index by index; also with a category whose logit is 0.

    Returns v (B, J, D), and for each iteration c (B, I, J) and v.
    """
    u, weights = np.float64(u), np.float64(weights)
    n_images, n_lower, _ = u.shape
    n_upper, _, _, dim = weights.shape
    history = []
    logits = np.zeros((n_images, n_lower, n_upper))
    u_hat = np.zeros((n_images, n_lower, n_upper, dim))
    for n, i, j in np.ndindex(n_images, n_lower, n_upper):
        u_hat[n, i, j] = weights[j, i].T @ u[n, i]
    for _ in range(iterations):
        c, v = np.zeros_like(logits), np.zeros((n_images, n_upper, dim))
        for n, i in np.ndindex(n_images, n_lower):
            exponentials = [np.exp(b) for b in logits[n, i]]
            total = sum(exponentials) + (np.exp(0) if none_of_the_above else 0)
            c[n, i] = [e / total for e in exponentials]
        for n, j in np.ndindex(n_images, n_upper):
            v[n, j] = squash_of(sum(c[n, i, j] * u_hat[n, i, j] for i in range(n_lower)))
        for n, i, j in np.ndindex(n_images, n_lower, n_upper):
            logits[n, i, j] += u_hat[n, i, j] @ v[n, j]
        history.append((c, v))
    return v, history


def convolved(images, kernel, stride):
    """Compute a valid convolution one output pixel after the other."""
    images, kernel = np.float64(images), np.float64(kernel)
    kh, kw, _, filters = kernel.shape
    rows = len(range(0, images.shape[1] - kh + 1, stride))
    columns = len(range(0, images.shape[2] - kw + 1, stride))
    y = np.zeros((len(images), rows, columns, filters))
    for n, row, column, f in np.ndindex(*y.shape):
        top, left = row * stride, column * stride
        y[n, row, column, f] = np.sum(
            images[n, top : top + kh, left : left + kw] * kernel[:, :, :, f]
        )
    return y


def cut_to_capsules(channels, n_types, dim):
    """Squash the channels of one type at one position, by position and then by type."""
    capsules = []
    for image in channels:
        for row in image:
            for pixel in row:
                for t in range(n_types):
                    capsules.append(squash_of(np.float64(pixel[t * dim : (t + 1) * dim])))
    return np.reshape(capsules, (len(channels), -1, dim))


def composed(digits, shift, padding):
    """Compose the canvas pixel by pixel; return it and the shifted digits."""
    n_images, k, height, width, channels = digits.shape
    size = (height + 2 * padding, width + 2 * padding)
    shifted = np.zeros((n_images, k, *size, channels))
    for n, digit, y, x in np.ndindex(n_images, k, *size):
        row, column = np.array([y, x]) - padding - shift[n, digit]
        if 0 <= row < height and 0 <= column < width:
            shifted[n, digit, y, x] = digits[n, digit, row, column] / 255
    canvas = np.zeros((n_images, *size, channels))
    for digit in range(k):
        canvas += shifted[:, digit]
    return np.clip(canvas, 0, 1), shifted


def capsules_of(network, images):
    """Compute the digit capsules of a CapsNet with loops: (B, J, D)."""
    config, (conv1, primary) = network.config, (network.conv1, network.primary)
    features = convolved(images, conv1.kernel.numpy(), 1) + np.float64(conv1.bias.numpy())
    channels = convolved(np.maximum(features, 0), primary.kernel.numpy(), 2)
    channels += np.float64(primary.bias.numpy())
    u = cut_to_capsules(channels, config.n_primary, config.primary_dim)
    return procedure_1(u, network.digits.W.numpy(), config.routing_iterations)[0]


def decoded(decoder, capsules, chosen):
    """Decode one capsule of each example by matrix products: (N, J, D), (N,) -> (N, H, W, C)."""
    weights = [np.float64(array) for array in decoder.get_weights()]
    *hidden, pixels = zip(weights[::2], weights[1::2], strict=True)  # kernel, bias
    images = []
    for example, j in zip(np.float64(capsules), chosen, strict=True):
        masked = np.zeros_like(example)
        masked[j] = example[j]
        x = masked.ravel()
        for kernel, bias in hidden:
            x = np.maximum(0, x @ kernel + bias)
        x = 1 / (1 + np.exp(-(x @ pixels[0] + pixels[1])))
        images.append(x.reshape(decoder.image_shape))
    return np.array(images)


def margin_loss_of(lengths, labels):
    """Compute eq. 4 for the lengths (J,) of one image and the set of its labels."""
    loss = 0.0
    for k, n in enumerate(np.float64(lengths)):
        loss += max(0, 0.9 - n) ** 2 if k in labels else 0.5 * max(0, n - 0.1) ** 2
    return loss


def assert_glorot_uniform(kernel):
    """Require a spread of ±√(6 / (fan_in + fan_out)), with the fans of a kernel (..., C, O)."""
    receptive_field = np.prod(kernel.shape[:-2])
    limit = np.sqrt(6 / (receptive_field * (kernel.shape[-2] + kernel.shape[-1])))
    assert 0.97 * limit < np.abs(kernel).max() <= limit
    np.testing.assert_allclose(np.std(kernel), limit / np.sqrt(3), rtol=0.06)
    assert abs(kernel.mean()) < 0.1 * limit


def assert_truncated_normal(kernel, stddev):
    """Require a normal distribution cut off at two standard deviations, which leaves 0.88 of it."""
    assert 1.8 * stddev < np.abs(kernel).max() <= 2 * stddev
    np.testing.assert_allclose(np.std(kernel), 0.8796 * stddev, rtol=0.06)
    assert abs(kernel.mean()) < 0.1 * stddev
