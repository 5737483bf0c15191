"""Every equation and layer against an oracle: loops in float64, values by hand, a second form."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import ops
from model import CapsNet, Data

TINY = {
    "image_shape": (9, 11, 2),
    "n_classes": 4,
    "n_conv": 6,
    "n_primary": 2,
    "primary_dim": 4,
    "digit_dim": 5,
    "kernel_size": 3,
    "decoder_units": (7, 6),
}


@pytest.fixture
def rng():
    return np.random.default_rng(20171026)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def assert_close(actual, expected, tolerance=1e-5):
    """No element further from its oracle than `tolerance` times the largest one of the oracle."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def values_and_gradients(function, inputs, upstream):
    """function(*inputs), and the gradient of its product with `upstream` for each of the inputs."""
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
        total = tf.reduce_sum(y * tf.cast(upstream, y.dtype))
    return y, *tape.gradient(total, inputs)


def randomized(model, rng):
    """The model with all its weights random: biases start at zero, and zeros would hide them."""
    for variable in model.trainable_variables:
        variable.assign(rng.normal(scale=0.3, size=variable.shape))
    return model


# --- Oracles -------------------------------------------------------------------------------------


def squash_of(s):
    """Eq. 1 for one vector of float64."""
    n = np.sqrt(np.sum(s * s))
    return n**2 / (1 + n**2) * (s / n)


def procedure_1(u, weights, iterations):
    """Eq. 2 and procedure 1, index by index: v (B, J, D), and c (B, I, J) of each iteration."""
    u, weights = np.float64(u), np.float64(weights)
    n_images, n_lower, _ = u.shape
    n_upper, _, _, dim = weights.shape
    v, couplings = np.zeros((n_images, n_upper, dim)), []
    logits = np.zeros((n_images, n_lower, n_upper))
    u_hat = np.zeros((n_images, n_lower, n_upper, dim))
    for n, i, j in np.ndindex(n_images, n_lower, n_upper):
        u_hat[n, i, j] = weights[j, i].T @ u[n, i]
    for _ in range(iterations):
        c = np.zeros_like(logits)
        for n, i in np.ndindex(n_images, n_lower):
            exponentials = [np.exp(b) for b in logits[n, i]]
            c[n, i] = [e / sum(exponentials) for e in exponentials]
        for n, j in np.ndindex(n_images, n_upper):
            v[n, j] = squash_of(sum(c[n, i, j] * u_hat[n, i, j] for i in range(n_lower)))
        for n, i, j in np.ndindex(n_images, n_lower, n_upper):
            logits[n, i, j] += u_hat[n, i, j] @ v[n, j]
        couplings.append(c)
    return v, couplings


def tiled_votes(u, weights):
    """Eq. 2 to the letter, with W copied for each image: (B, J, I, 1, D)."""
    tiled = tf.tile(weights[None], (tf.shape(u)[0], 1, 1, 1, 1))  # (B, J, I, C, D)
    rows = tf.tile(u[:, None, :, None], (1, weights.shape[0], 1, 1, 1))  # (B, J, I, 1, C)
    return tf.matmul(rows, tiled)


def tiled_capsules(u, weights, iterations):
    """Procedure 1 to the letter, on tiled votes: (B, J, D)."""
    u_hat = tiled_votes(u, weights)
    b = tf.zeros_like(u_hat[..., :1])  # (B, J, I, 1, 1)
    for _ in range(iterations):
        c = tf.exp(b) / tf.reduce_sum(tf.exp(b), axis=1, keepdims=True)
        s = tf.reduce_sum(c * u_hat, axis=2, keepdims=True)  # (B, J, 1, 1, D)
        squared = tf.reduce_sum(s**2, axis=-1, keepdims=True)
        v = squared / (1 + squared) * s / tf.sqrt(squared)
        b += tf.reduce_sum(u_hat * v, axis=-1, keepdims=True)
    return v[:, :, 0, 0]


def convolved(images, kernel, stride):
    """A valid convolution, one output pixel after the other, in float64."""
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
    """Squashed capsules of one type at one position, by position and then by type."""
    capsules = []
    for image in channels:
        for row in image:
            for pixel in row:
                for t in range(n_types):
                    capsules.append(squash_of(np.float64(pixel[t * dim : (t + 1) * dim])))
    return np.reshape(capsules, (len(channels), -1, dim))


# --- Squash and length ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, expected", [(0.5, 0.2), (1, 0.5), (2, 0.8), (3, 0.9), (7, 0.98), (0.01, 1e-4 / 1.0001)]
)
def test_squash_gives_the_length_n_squared_over_one_plus_n_squared(n, expected):
    direction = np.array([2, -3, 6]) / 7
    v = ops.squash(tf.constant([n * direction], tf.float32))[0].numpy()
    np.testing.assert_allclose(v, expected * direction, rtol=1e-5)


def test_squash_keeps_the_direction_and_gives_lengths_below_one(rng):
    s = normal(rng, 4, 50, 8) * rng.uniform(0.1, 10, (4, 50, 1)).astype(np.float32)
    v = ops.squash(s).numpy().astype(np.float64)
    lengths = np.linalg.norm(v, axis=-1, keepdims=True)
    assert lengths.max() < 1
    np.testing.assert_allclose(
        v / lengths, s / np.linalg.norm(s, axis=-1, keepdims=True), atol=1e-6
    )
    np.testing.assert_allclose(v, np.apply_along_axis(squash_of, -1, np.float64(s)), atol=1e-6)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-10, 1e-4, 1e4, 1e9, 1e15])
def test_squash_has_finite_values_and_gradients_for_nothing_tiny_and_huge(scale):
    s = scale * np.array([[3, -4, 0]], np.float32) / 5
    v, gradient = values_and_gradients(ops.squash, [s], np.ones_like(s))
    assert np.isfinite(v).all() and np.isfinite(gradient).all()
    assert np.linalg.norm(v) == pytest.approx(scale**2 / (1 + scale**2), rel=0.06, abs=1e-8)
    if scale == 0:
        assert not np.any(v)


def test_squash_gradient_is_that_of_the_equation(rng):
    s, upstream = normal(rng, 6, 4), normal(rng, 6, 4)
    gradient = values_and_gradients(ops.squash, [s], upstream)[1]
    expected, step = np.zeros((6, 4)), 1e-6
    for row, k in np.ndindex(6, 4):
        h = step * np.eye(4)[k]
        there, back = squash_of(s[row] + h), squash_of(s[row] - h)
        expected[row, k] = upstream[row] @ (there - back) / (2 * step)
    assert_close(gradient, expected)


def test_length_is_the_euclidean_norm(rng):
    assert ops.length(tf.constant([[0.3, 0.4], [-0.6, 0.8]])).numpy() == pytest.approx([0.5, 1])
    capsules = normal(rng, 3, 5, 16)
    np.testing.assert_allclose(
        ops.length(capsules), np.sqrt((np.float64(capsules) ** 2).sum(-1)), rtol=1e-6
    )


def test_length_has_a_finite_gradient_at_zero_and_the_direction_elsewhere():
    capsules = np.array([[[0, 0, 0], [0.6, 0, -0.8]]], np.float32)
    lengths, gradient = values_and_gradients(ops.length, [capsules], np.ones((1, 2)))
    assert lengths[0, 0] < 1e-4
    np.testing.assert_allclose(gradient, capsules, atol=1e-6)


def test_squash_length_and_routing_compute_in_float32_whatever_they_are_given():
    """In float16 the square of 300 would be infinite."""
    s = tf.constant([[300.0, -400.0]], tf.float16)
    for function, expected in ((ops.squash, [[0.6, -0.8]]), (ops.length, [500])):
        assert function(s).dtype == tf.float32
        assert function(s).numpy() == pytest.approx(np.array(expected), rel=1e-4)
    v = ops.routing(tf.tile(s[None, None], (1, 2, 1, 1)), 2)
    assert v.dtype == tf.float32
    np.testing.assert_allclose(v, [[[0.6, -0.8]] * 2], rtol=1e-4)


# --- Votes and routing ---------------------------------------------------------------------------


def lower_and_weights(rng, images=3, lower=7, dim=4, upper=5, upper_dim=6):
    return normal(rng, images, lower, dim), normal(rng, upper, lower, dim, upper_dim)


def routed(u, weights, iterations=3):
    return ops.routing(ops.votes(u, weights), iterations)


def test_votes_are_w_ij_times_u_i_with_the_gradients_of_the_tiled_form(rng):
    u, weights = lower_and_weights(rng)
    upstream = normal(rng, 3, 5, 7, 6)
    found = values_and_gradients(ops.votes, [u, weights], upstream)
    np.testing.assert_allclose(
        found[0], np.einsum("bic,jicd->bjid", np.float64(u), weights), atol=1e-5
    )
    tiled = values_and_gradients(
        lambda *inputs: tiled_votes(*inputs)[..., 0, :],
        [np.float64(u), np.float64(weights)],
        upstream,
    )
    for actual, expected in zip(found, tiled):
        assert_close(actual, expected)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_routing_is_procedure_1(rng, iterations):
    u, weights = lower_and_weights(rng)
    couplings = []
    v = ops.routing(ops.votes(u, weights), iterations, couplings.append)
    expected, expected_couplings = procedure_1(u, weights, iterations)
    assert_close(v, expected)
    assert len(couplings) == iterations
    for c, expected in zip(couplings, expected_couplings):
        assert c.shape == (3, 5, 1, 7)
        assert_close(c[:, :, 0], expected.transpose(0, 2, 1))


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_fast_routing_has_the_values_and_gradients_of_the_tiled_form(rng, iterations):
    u, weights = lower_and_weights(rng)
    upstream = normal(rng, 3, 5, 6)
    found = values_and_gradients(lambda *x: routed(*x, iterations), [u, weights], upstream)
    tiled = values_and_gradients(
        lambda *x: tiled_capsules(*x, iterations), [np.float64(u), np.float64(weights)], upstream
    )
    for actual, expected in zip(found, tiled):
        assert_close(actual, expected, 2e-5)


def test_couplings_are_uniform_at_first_and_always_sum_to_one_over_the_upper_capsules(rng):
    u, weights = lower_and_weights(rng)
    couplings = []
    ops.routing(ops.votes(u, weights), 3, couplings.append)
    np.testing.assert_allclose(couplings[0], np.full((3, 5, 1, 7), 1 / 5), rtol=1e-6)
    for c in couplings:
        np.testing.assert_allclose(tf.reduce_sum(c, axis=1), np.ones((3, 1, 7)), rtol=1e-5)
    over_lower = tf.reduce_sum(couplings[-1], axis=-1).numpy()
    assert np.ptp(over_lower) > 0.1  # over the lower capsules nothing makes them equal


def test_routing_moves_the_coupling_to_the_upper_capsule_on_which_the_votes_agree():
    """Two lower capsules: for upper capsule 0 they agree, for upper capsule 1 they cancel.

    By hand: v_0 = (0.5, 0) from s_0 = (1, 0) and v_1 = 0, so that b_i0 = 0.5, b_i1 = 0 and
    then c_i0 = 1 / (1 + exp(-0.5)).
    """
    u_hat = tf.constant([[[[1.0, 0], [1, 0]], [[0, 1], [0, -1]]]])
    couplings = []
    v = ops.routing(u_hat, 2, couplings.append).numpy()
    sigmoid = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(couplings[1][0, :, 0], [[sigmoid] * 2, [1 - sigmoid] * 2], rtol=1e-5)
    n = 2 * sigmoid
    np.testing.assert_allclose(v[0], [[n**2 / (1 + n**2), 0], [0, 0]], rtol=1e-5, atol=1e-7)


def test_votes_and_routing_take_an_unknown_batch_size(rng):
    _, weights = lower_and_weights(rng)
    graph = tf.function(
        lambda u: routed(u, tf.constant(weights)),
        input_signature=[tf.TensorSpec((None, 7, 4), tf.float32)],
    )
    for images in (1, 4):
        u = normal(rng, images, 7, 4)
        assert_close(graph(u), procedure_1(u, weights, 3)[0])


def test_votes_and_routing_are_the_same_compiled_by_xla(rng):
    inputs, upstream = lower_and_weights(rng), normal(rng, 3, 5, 6)

    def compute(u, weights):
        return values_and_gradients(routed, [u, weights], upstream)

    for compiled, eager in zip(tf.function(compute, jit_compile=True)(*inputs), compute(*inputs)):
        assert_close(compiled, eager)


@pytest.mark.parametrize("images", [3, 6, 7])
@pytest.mark.parametrize("jit", [False, True])
def test_digit_capsules_in_parts_are_those_of_all_at_once(rng, images, jit):
    u, weights = lower_and_weights(rng)
    u = np.resize(u, (images, *u.shape[1:])) * np.arange(1, images + 1)[:, None, None]
    layer = ops.DigitCapsules(5, 6)
    layer.build(u.shape)
    layer.W.assign(weights)
    call = tf.function(lambda u: layer(u, at_once=3), jit_compile=jit)
    assert_close(call(tf.constant(u, tf.float32)), procedure_1(u, weights, 3)[0])


# --- Losses and masks ----------------------------------------------------------------------------


def test_margin_loss_by_hand_for_one_digit_for_two_and_for_none():
    lengths = tf.constant([[0.95, 0.5, 0.1, 0.3], [0.7, 0.2, 0.05, 0.4], [0.0, 0.1, 0.3, 0.0]])
    present = tf.constant([[1.0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    expected = [
        0 + 0.5 * 0.4**2 + 0 + 0.5 * 0.2**2,  # 0.1
        0.2**2 + 0.5 * 0.1**2 + 0 + 0.5**2,  # 0.295
        0.5 * 0.2**2,  # 0.02
    ]
    np.testing.assert_allclose(ops.margin_loss(lengths, present), expected, rtol=1e-5)


def test_margin_loss_is_equation_4_on_random_lengths(rng):
    lengths = rng.uniform(size=(20, 10)).astype(np.float32)
    present = (rng.uniform(size=(20, 10)) < 0.3).astype(np.float32)
    expected = np.zeros(20)
    for n, k in np.ndindex(20, 10):
        if present[n, k]:
            expected[n] += max(0, 0.9 - lengths[n, k]) ** 2
        else:
            expected[n] += 0.5 * max(0, lengths[n, k] - 0.1) ** 2
    np.testing.assert_allclose(ops.margin_loss(lengths, present), expected, rtol=1e-4)


def test_lengths_meet_the_margins_as_they_are_so_that_a_perfect_prediction_costs_nothing():
    """After a softmax, 0.9 against nine times 0.1 would be 0.2, and the loss 0.49."""
    present = tf.one_hot([3], 10)
    loss, gradient = values_and_gradients(
        lambda lengths: ops.margin_loss(lengths, present), [0.8 * present + 0.1], np.ones(1)
    )
    assert loss.numpy().tolist() == [0] and not np.any(gradient)


def test_reconstruction_loss_is_summed_over_the_pixels_of_all_digits():
    target = np.zeros((2, 2, 2, 2, 1), np.float32)
    reconstruction = target.copy()
    reconstruction[0, 0] = 0.5  # 4 pixels · 0.25
    reconstruction[0, 1, 0, 1] = 1  # 1 pixel · 1
    reconstruction[1, 0, 1, 0] = 0.1
    loss = ops.reconstruction_loss(target, reconstruction)
    np.testing.assert_allclose(loss, [1 + 1, 0.01], rtol=1e-6)
    ones = tf.ones((1, 1, 28, 28, 1))
    assert ops.reconstruction_loss(ones, 0 * ones).numpy().tolist() == [784]


def test_label_mask_keeps_the_capsule_of_each_label():
    mask = ops.label_mask(tf.constant([[2, 0], [1, 2]]), 3).numpy()
    assert mask.tolist() == [[[0, 0, 1], [1, 0, 0]], [[0, 1, 0], [0, 0, 1]]]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_longest_are_the_first_of_a_descending_sort(rng, k):
    lengths = rng.permuted(np.tile(np.arange(10) / 10, (30, 1)), axis=1).astype(np.float32)
    found = ops.longest(lengths, k).numpy()
    assert np.array_equal(found, np.argsort(-lengths, axis=1)[:, :k])


# --- Composing images ----------------------------------------------------------------------------


def composed(digits, shift, margin):
    """Pixel by pixel: the canvas and the shifted digits, in float64."""
    n_images, k, height, width, channels = digits.shape
    size = (height + 2 * margin, width + 2 * margin)
    moved = np.zeros((n_images, k, *size, channels))
    for n, digit, y, x in np.ndindex(n_images, k, *size):
        row, column = np.array([y, x]) - margin - shift[n, digit]
        if 0 <= row < height and 0 <= column < width:
            moved[n, digit, y, x] = digits[n, digit, row, column] / 255
    canvas = np.zeros((n_images, *size, channels))
    for digit in range(k):
        canvas += moved[:, digit]
    return np.clip(canvas, 0, 1), moved


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("margin, max_shift", [(0, 0), (0, 2), (4, 4), (1, 7)])
@pytest.mark.parametrize("size", [(6, 5, 1), (4, 7, 3)])
def test_compose_places_every_pixel_where_a_loop_does(rng, k, margin, max_shift, size):
    digits = rng.integers(0, 256, (6, k, *size), dtype=np.uint8)
    shift = rng.integers(-max_shift, max_shift + 1, (6, k, 2))
    canvas, moved = ops.compose(digits, shift, margin)
    expected_canvas, expected_moved = composed(digits, shift, margin)
    assert_close(moved, expected_moved, 1e-6)
    assert_close(canvas, expected_canvas, 1e-6)
    assert canvas.dtype == moved.dtype == tf.float32


def test_compose_moves_down_and_right_and_shifts_zeros_in():
    digit = np.full((1, 1, 3, 3, 1), 255, np.uint8)
    canvas, _ = ops.compose(digit, np.array([[[1, -2]]]), 0)
    assert canvas[0, :, :, 0].numpy().tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_compose_clips_the_sum_of_the_digits_but_not_the_digits():
    digits = np.array([[[[[200]]], [[[100]]]], [[[[100]]], [[[51]]]]], np.uint8)
    canvas, moved = ops.compose(digits, np.zeros((2, 2, 2), int), 0)
    np.testing.assert_allclose(canvas[:, 0, 0, 0], [1, 151 / 255], rtol=1e-6)
    np.testing.assert_allclose(
        moved[:, :, 0, 0, 0], [[200 / 255, 100 / 255], [100 / 255, 0.2]], rtol=1e-6
    )


def test_compose_gives_each_pixel_value_of_a_single_digit_exactly(rng):
    digits = rng.permutation(256).astype(np.uint8).reshape(1, 1, 16, 16, 1)
    canvas, moved = ops.compose(digits, np.array([[[-2, 1]]]), 2)
    expected = np.zeros((20, 20), np.float32)
    expected[0:16, 3:19] = digits[0, 0, :, :, 0].astype(np.float32) / np.float32(255)
    assert np.array_equal(canvas[0, :, :, 0], expected)
    assert np.array_equal(moved[0, 0, :, :, 0], expected)
    assert expected.min() == 0 and expected.max() == 1


# --- Convolution in the frequency domain ---------------------------------------------------------

SHAPES = {  # image, kernel, stride, channels, filters
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


def by_dft(images, kernel, stride):
    plan = ops.conv_plan(tuple(images.shape[1:3]), tuple(kernel.shape[:2]), stride)
    return ops.dft_conv2d(images, ops.kernel_spectrum(kernel, plan), plan)


@pytest.mark.parametrize("convolve", [by_dft, ops.patches_conv2d])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_convolutions_have_the_values_and_both_gradients_of_the_library(rng, shape, convolve):
    size, kernel_size, stride, channels, filters = shape
    images, kernel = normal(rng, 3, *size, channels), normal(rng, *kernel_size, channels, filters)
    direct = [np.float64(images), np.float64(kernel)]
    upstream = normal(rng, *tf.nn.conv2d(*direct, stride, "VALID").shape)
    expected = values_and_gradients(
        lambda x, k: tf.nn.conv2d(x, k, stride, "VALID"), direct, upstream
    )
    actual = values_and_gradients(lambda x, k: convolve(x, k, stride), [images, kernel], upstream)
    for found, right in zip(actual, expected):
        assert_close(found, right, 1e-5)


@pytest.mark.parametrize("convolve", [by_dft, ops.patches_conv2d])
def test_convolutions_are_the_loop_over_pixels(rng, convolve):
    images, kernel = normal(rng, 2, 9, 12, 3), normal(rng, 4, 3, 3, 2)
    for stride in (1, 2, 3):
        expected = convolved(images, kernel, stride)
        assert_close(convolve(tf.constant(images), tf.constant(kernel), stride), expected)


def test_the_plans_tested_above_have_one_tile_and_several_in_each_direction():
    plans = [ops.conv_plan(size, kernel, stride) for size, kernel, stride, *_ in SHAPES.values()]
    for axis in (0, 1):
        assert {plan.tiles[axis] > 1 for plan in plans} == {True, False}
        assert any(plan.tiles[axis] * plan.tile[axis] > plan.outputs[axis] for plan in plans)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_tiles_of_a_plan_cover_the_outputs_with_none_to_spare(shape):
    size, kernel_size, stride, *_ = shape
    plan = ops.conv_plan(size, kernel_size, stride)
    for axis in (0, 1):
        outputs = len(range(0, size[axis] - kernel_size[axis] + 1, stride))
        assert plan.outputs[axis] == outputs
        covered = plan.tiles[axis] * plan.tile[axis]
        assert covered - plan.tile[axis] < outputs <= covered


def test_the_plan_for_mnist_makes_126_products():
    """Of a 10×10 grid 8·6 points are real; of the other 52, half have three products each."""
    plan = ops.conv_plan((20, 20), (9, 9), 2)
    assert plan.taps == (5, 5) and plan.outputs == plan.tile == (6, 6) and plan.tiles == (1, 1)
    assert len(plan.of_image) == len(plan.of_kernel) == plan.to_output.shape[1] == 48 + 3 * 26


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_one_or_two_real_points_make_the_dft(rng, n):
    """The values of the kernel's polynomial there are numpy's transform, conjugates included."""
    axis = next(a for a in ops._axis_transforms(1, n) if a.reals <= 2)
    taps = rng.normal(size=n)
    found, expected = axis.of_kernel @ taps, np.fft.fft(taps)
    found, expected = np.sort_complex(found.round(9)), np.sort_complex(expected.round(9))
    assert_close(found.view(float), expected.view(float))
    assert axis.error == pytest.approx(1)


@pytest.mark.parametrize("outputs, taps", [(1, 1), (6, 5), (5, 3), (3, 5), (10, 9), (24, 2)])
def test_every_set_of_points_gives_the_correlation(rng, outputs, taps):
    x, k = rng.normal(size=outputs + taps - 1), rng.normal(size=taps)
    ways = ops._axis_transforms(outputs, taps)
    assert len(ways) > 0
    for axis in ways:
        found = axis.to_output @ ((axis.of_image @ x) * (axis.of_kernel @ k))
        assert_close(found.real, np.correlate(x, k, "valid"))


def test_the_error_of_a_set_of_points_is_that_of_float32(rng):
    """Rounding the factors to float32 makes errors in the proportion that the plan counts with."""
    found = {}
    x, k = rng.normal(size=(10, 20000)), rng.normal(size=(5, 20000))
    for axis in ops._axis_transforms(6, 5):
        factors = [np.complex64(m @ a) for m, a in ((axis.of_image, x), (axis.of_kernel, k))]
        exact = axis.to_output @ ((axis.of_image @ x) * (axis.of_kernel @ k))
        errors = axis.to_output @ (factors[0].astype(complex) * factors[1]) - exact
        found[axis.reals] = axis.error, errors.real.std(axis=1).max()
    dft = found[2]
    for error, measured in found.values():
        assert measured / dft[1] == pytest.approx(error / dft[0], rel=0.35)


@pytest.mark.parametrize(
    "shape", [((20, 20), (9, 9), 2), ((28, 28), (9, 9), 2), ((45, 53), (3, 3), 1)]
)
def test_the_matrices_of_a_plan_keep_what_no_wrapping_around_has_touched(rng, shape):
    plan = ops.conv_plan(*shape)
    grid = np.add(plan.tile, plan.taps) - 1
    x, taps = rng.normal(size=grid), rng.normal(size=plan.taps)
    found = plan.to_output @ ((plan.of_image @ x.ravel()) * (plan.of_kernel @ taps.ravel()))
    expected = convolved(x[None, :, :, None], taps[:, :, None, None], 1)[0, :, :, 0]
    assert_close(found.reshape(plan.tile), expected)


@pytest.mark.parametrize("size", [(8, 20), (20, 8)])
def test_an_image_smaller_than_the_kernel_is_refused(size):
    with pytest.raises(ValueError, match=rf"\(9, 9\) kernel.*Received: \({size[0]}, {size[1]}\)"):
        ops.conv_plan(size, (9, 9), 1)
    with pytest.raises(ValueError, match="needs a larger image"):
        ops.Convolution(2, 9).build((None, *size, 1))


def test_the_dft_convolution_is_the_same_compiled_by_xla(rng):
    inputs = normal(rng, 2, 13, 10, 5), normal(rng, 4, 4, 5, 3)
    upstream = normal(rng, 2, 5, 4, 3)

    def compute(images, kernel):
        return values_and_gradients(lambda x, k: by_dft(x, k, 2), [images, kernel], upstream)

    for compiled, eager in zip(tf.function(compute, jit_compile=True)(*inputs), compute(*inputs)):
        assert_close(compiled, eager)


@pytest.mark.parametrize("kind", [ops.Convolution, ops.PrimaryCapsules])
@pytest.mark.parametrize("method, channels", [("direct", 6), ("dft", 1), ("dft", 4), ("dft", 6)])
def test_a_kernel_transformed_beforehand_gives_the_same(rng, kind, method, channels):
    images = normal(rng, 2, 10, 9, channels)
    layer = kind(*((8,) if kind is ops.Convolution else (2, 4)), kernel_size=3, method=method)
    expected = layer(images).numpy()
    spectrum = layer.spectrum()
    assert (spectrum is None) == (method == "direct" or channels <= 4)
    assert np.array_equal(layer(images, spectrum), expected)
    if spectrum is not None:
        assert not np.allclose(layer(images, 2 * spectrum), expected)  # it is what is used


# --- Layers --------------------------------------------------------------------------------------

LAYERS = {
    "Convolution": (
        lambda: ops.Convolution(6, 3, stride=2, relu=True, method="dft"),
        [(2, 9, 12, 5)],
    ),
    "PrimaryCapsules": (
        lambda: ops.PrimaryCapsules(3, 4, kernel_size=4, stride=3, method="dft"),
        [(2, 12, 9, 5)],
    ),
    "DigitCapsules": (lambda: ops.DigitCapsules(4, 6, iterations=2), [(2, 7, 5)]),
    "Decoder": (lambda: ops.Decoder((5, 4, 3), units=(7, 6)), [(2, 4, 5), (2, 3, 4)]),
}


@pytest.fixture(params=LAYERS)
def layer_and_inputs(request, rng):
    make, shapes = LAYERS[request.param]
    return make(), [normal(rng, *shape) for shape in shapes]


def test_a_layer_made_from_its_configuration_gives_the_same_output(layer_and_inputs):
    layer, inputs = layer_and_inputs
    expected = layer(*inputs).numpy()
    config = layer.get_config()
    arguments = set(inspect.signature(type(layer).__init__).parameters) - {"self", "kwargs"}
    assert arguments <= set(config)
    twin = type(layer).from_config(config)
    assert twin.get_config() == config
    for name in arguments:
        assert getattr(twin, name) == getattr(layer, name)
    assert not np.allclose(twin(*inputs), expected)  # its weights are its own
    twin.set_weights(layer.get_weights())
    assert np.array_equal(twin(*inputs), expected)


def test_a_layer_knows_its_output_shape_and_makes_its_weights_once(layer_and_inputs):
    layer, inputs = layer_and_inputs
    shapes = [x.shape for x in inputs]
    assert layer.compute_output_shape(*shapes) == layer(*inputs).shape
    unknown = [(None, *shape[1:]) for shape in shapes]
    assert layer.compute_output_shape(*unknown) == (None, *layer(*inputs).shape[1:])
    weights = len(layer.weights)
    layer(*inputs)
    assert len(layer.weights) == weights > 0


def test_layers_take_an_unknown_batch_size(layer_and_inputs):
    layer, inputs = layer_and_inputs
    expected = layer(*inputs).numpy()
    signature = [tf.TensorSpec((None, *x.shape[1:]), tf.float32) for x in inputs]
    graph = tf.function(layer, input_signature=signature)
    assert_close(graph(*inputs), expected)
    assert_close(graph(*(x[:1] for x in inputs)), expected[:1])


@pytest.mark.parametrize("method", ops.CONV_METHODS)
@pytest.mark.parametrize("channels", [1, 5])
def test_convolution_adds_its_bias_and_has_a_relu_only_where_asked(rng, method, channels):
    images = normal(rng, 2, 8, 7, channels)
    for relu in (True, False):
        layer = ops.Convolution(4, 3, stride=2, relu=relu, method=method)
        layer.build(images.shape)
        randomized(layer, rng)
        expected = convolved(images, layer.kernel.numpy(), 2) + np.float64(layer.bias.numpy())
        assert expected.min() < 0 < expected.max()
        assert_close(layer(images), np.maximum(expected, 0) if relu else expected)


@pytest.mark.parametrize("method", ops.CONV_METHODS)
def test_a_primary_capsule_is_the_channels_of_one_type_at_one_position(rng, method):
    images = normal(rng, 2, 11, 9, 5)
    layer = ops.PrimaryCapsules(3, 8, kernel_size=3, stride=2, method=method)
    layer.build(images.shape)
    randomized(layer, rng)
    channels = tf.nn.conv2d(images, layer.kernel.value, 2, "VALID") + layer.bias.value
    assert channels.shape == (2, 5, 4, 24)
    assert_close(layer(images), cut_to_capsules(channels.numpy(), n_types=3, dim=8))


def test_a_relu_follows_the_first_convolution_and_not_the_primary_capsules(rng):
    model = randomized(CapsNet(**TINY), rng)
    images = rng.uniform(size=(3, *TINY["image_shape"])).astype(np.float32)
    before = convolved(images, model.conv1.kernel.numpy(), 1) + np.float64(model.conv1.bias.numpy())
    assert before.min() < -0.1
    features = model.conv1(images)
    assert_close(features, np.maximum(before, 0))
    assert model.primary(features).numpy().min() < -0.1


def test_digit_capsules_are_procedure_1_on_their_weights(rng):
    layer, u = ops.DigitCapsules(4, 6, iterations=2), normal(rng, 3, 7, 5)
    v = layer(u)
    assert_close(v, procedure_1(u, layer.W.numpy(), 2)[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ops.Convolution(4, 3, method="fft"),
            r"method must be one of \('direct', 'dft'\)\. Received: method='fft'",
        ),
        (
            lambda: ops.PrimaryCapsules(4, 3, method="fft"),
            r"method must be one of .* Received: method='fft'",
        ),
        (
            lambda: ops.DigitCapsules(4, 3, iterations=0),
            r"iterations must be at least 1\. Received: iterations=0",
        ),
        (
            lambda: CapsNet((28, 16, 1), 10),
            r"images of at least 17×17 pixels\. Received: image_shape=\(28, 16, 1\)",
        ),
    ],
)
def test_bad_arguments_are_named_with_what_was_expected_and_received(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- The decoder and its mask --------------------------------------------------------------------


@pytest.fixture
def decoder(rng):
    decoder = ops.Decoder((4, 3, 1), units=(8, 9))
    decoder.build((None, 5, 6))
    return randomized(decoder, rng)


def test_masked_capsules_do_not_reach_the_decoder(rng, decoder):
    capsules = normal(rng, 2, 5, 6)
    mask = ops.label_mask(np.array([[1], [4]]), 5)
    expected = decoder(capsules, mask).numpy()
    others = capsules + 100 * normal(rng, 2, 5, 6) * (1 - mask.numpy()[:, 0, :, None])
    assert np.abs(others - capsules).max() > 10
    assert np.array_equal(decoder(others, mask), expected)
    kept = capsules + mask.numpy()[:, 0, :, None]
    assert not np.allclose(decoder(kept, mask), expected, atol=1e-3)


def test_masked_capsules_get_no_gradient_from_the_reconstruction(rng, decoder):
    capsules = normal(rng, 2, 5, 6)
    mask = ops.label_mask(np.array([[1, 3], [4, 0]]), 5)
    for k, kept in enumerate([[1, 4], [3, 0]]):
        _, gradient = values_and_gradients(
            lambda x, k=k: decoder(x, mask)[:, k], [capsules], normal(rng, 2, 4, 3, 1)
        )
        reached = np.any(gradient.numpy() != 0, axis=-1)
        assert [np.flatnonzero(row).tolist() for row in reached] == [[kept[0]], [kept[1]]]


def test_two_masks_give_each_digit_its_own_reconstruction(rng, decoder):
    capsules, labels = normal(rng, 2, 5, 6), np.array([[1, 3], [4, 0]])
    both = decoder(capsules, ops.label_mask(labels, 5)).numpy()
    assert both.shape == (2, 2, 4, 3, 1)
    for k in (0, 1):
        alone = decoder(capsules, ops.label_mask(labels[:, k : k + 1], 5))[:, 0]
        np.testing.assert_allclose(both[:, k], alone, atol=1e-6)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 0.01


@pytest.mark.parametrize("k", [1, 2])
def test_the_reconstruction_without_the_label_can_not_see_the_label(rng, k):
    model = randomized(CapsNet(**TINY), rng)
    digits = rng.integers(0, 256, (6, k, *TINY["image_shape"]), dtype=np.uint8)
    data = Data(digits[:, 0], np.zeros(6, int))
    labels = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])[:, :k]
    shift, weight = np.zeros((6, k, 2), int), np.ones(6, np.float32)
    one = model.examine(data, (digits, shift, labels, weight))
    other = model.examine(data, (digits, shift, (labels + 1) % 4, weight))
    for name in ("without_label", "predictions", "lengths"):
        assert np.array_equal(one[name], other[name])
    assert not np.allclose(one["with_label"], other["with_label"])
    # Where the labels are the longest capsules, in their order, both reconstructions are one.
    right = model.examine(data, (digits, shift, one["predictions"], weight))
    assert np.array_equal(right["with_label"], right["without_label"])


# --- The whole network ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, lower, total", [(28, 6 * 6 * 32, 8_215_568), (36, 10 * 10 * 32, 11_361_808)]
)
def test_the_network_has_the_parameters_of_the_paper(size, lower, total):
    model = CapsNet((size, size, 1), 10)
    conv1 = 9 * 9 * 1 * 256 + 256
    primary = 9 * 9 * 256 * (32 * 8) + 32 * 8
    digits = lower * 10 * 8 * 16
    decoder = (160 * 512 + 512) + (512 * 1024 + 1024) + (1024 * size**2 + size**2)
    assert model.count_params() == conv1 + primary + digits + decoder == total
    assert model.count_params() - model.decoder.count_params() == conv1 + primary + digits
    if size == 28:
        assert conv1 + primary + digits == 6_804_224
    assert len(model.trainable_variables) == 2 + 2 + 1 + 6


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_network_is_the_paper_written_with_loops(rng, conv, iterations):
    model = randomized(CapsNet(**TINY, routing_iterations=iterations, conv=conv), rng)
    images = rng.uniform(size=(2, *TINY["image_shape"])).astype(np.float32)
    mask = ops.label_mask(np.array([[0, 2], [3, 1]]), 4).numpy()

    features = np.maximum(
        0, convolved(images, model.conv1.kernel.numpy(), 1) + np.float64(model.conv1.bias.numpy())
    )
    channels = convolved(features, model.primary.kernel.numpy(), 2) + np.float64(
        model.primary.bias.numpy()
    )
    expected, _ = procedure_1(cut_to_capsules(channels, 2, 4), model.digits.W.numpy(), iterations)
    lengths, capsules = model(images)
    assert_close(capsules, expected)
    assert_close(lengths, np.sqrt((expected**2).sum(-1)))

    reconstructions = model.decoder(capsules, mask)
    dense = [np.float64(weight) for weight in model.decoder.get_weights()]
    assert reconstructions.shape == (2, 2, *TINY["image_shape"])
    for n, k in np.ndindex(2, 2):
        x = np.concatenate([expected[n, j] * mask[n, k, j] for j in range(4)])
        x = np.maximum(0, x @ dense[0] + dense[1])
        x = np.maximum(0, x @ dense[2] + dense[3])
        x = 1 / (1 + np.exp(-(x @ dense[4] + dense[5])))
        assert_close(reconstructions[n, k], x.reshape(TINY["image_shape"]))


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
def test_the_network_takes_an_unknown_batch_size(rng, conv):
    model = randomized(CapsNet(**TINY, conv=conv), rng)
    shape = TINY["image_shape"]
    graph = tf.function(model, input_signature=[tf.TensorSpec((None, *shape), tf.float32)])
    for n in (1, 3):
        images = rng.uniform(size=(n, *shape)).astype(np.float32)
        for found, expected in zip(graph(images), model(images)):
            assert_close(found, expected)


def test_gradients_of_the_network_are_the_same_for_both_convolutions(rng):
    images = rng.uniform(size=(3, *TINY["image_shape"])).astype(np.float32)
    direct, dft = (CapsNet(**TINY, conv=conv) for conv in ops.CONV_METHODS)
    randomized(direct, rng)
    dft.set_weights(direct.get_weights())
    gradients = []
    for model in (direct, dft):
        with tf.GradientTape() as tape:
            lengths, capsules = model(images)
            mask = ops.label_mask([[0], [1], [2]], 4)
            error = ops.reconstruction_loss(images[:, None], model.decoder(capsules, mask))
            loss = tf.reduce_mean(ops.margin_loss(lengths, mask[:, 0]) + error)
        gradients.append(tape.gradient(loss, model.trainable_variables))
    for found, expected in zip(gradients[1], gradients[0]):
        assert np.abs(expected).max() > 0
        assert_close(found, expected, 1e-4)


def test_a_saved_network_is_loaded_with_the_same_outputs(rng, tmp_path):
    model = randomized(CapsNet(**TINY, routing_iterations=2, conv="dft"), rng)
    images = rng.uniform(size=(2, *TINY["image_shape"])).astype(np.float32)
    model.save(tmp_path / "capsnet.keras")
    loaded = keras.saving.load_model(tmp_path / "capsnet.keras")
    assert type(loaded) is CapsNet and loaded.settings == model.settings
    for found, expected in zip(loaded(images), model(images)):
        assert np.array_equal(found, expected)
    capsules, mask = model(images)[1], ops.label_mask([[0], [3]], 4)
    assert np.array_equal(loaded.decoder(capsules, mask), model.decoder(capsules, mask))
