"""Convolution by spectra and by patches against loops, TensorFlow's convolution and NumPy's FFT."""

import math

import numpy as np
import pytest
import tensorflow as tf
from oracles import assert_close, convolved, normal, values_and_gradients

from capsnet import spectral


@pytest.fixture
def rng():
    return np.random.default_rng(20171026)


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
    plan = spectral.conv_plan(tuple(images.shape[1:3]), tuple(kernel.shape[:2]), stride)
    factors = spectral.image_spectrum(images, plan), spectral.kernel_spectrum(kernel, plan)
    return spectral.outputs_of_products(tf.matmul(*factors), plan)


@pytest.mark.parametrize("convolve", [by_dft, spectral.patches_conv2d])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_convolutions_have_the_values_and_both_gradients_of_tensorflows(rng, shape, convolve):
    size, kernel_size, stride, channels, filters = shape
    images, kernel = normal(rng, 3, *size, channels), normal(rng, *kernel_size, channels, filters)
    direct = [np.float64(images), np.float64(kernel)]
    upstream = normal(rng, *tf.nn.conv2d(*direct, stride, "VALID").shape)
    expected = values_and_gradients(
        lambda x, k: tf.nn.conv2d(x, k, stride, "VALID"), direct, upstream
    )
    actual = values_and_gradients(lambda x, k: convolve(x, k, stride), [images, kernel], upstream)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("convolve", [by_dft, spectral.patches_conv2d])
def test_convolutions_equal_a_loop_over_the_output_pixels(rng, convolve):
    images, kernel = normal(rng, 2, 9, 12, 3), normal(rng, 4, 3, 3, 2)
    for stride in (1, 2, 3):
        expected = convolved(images, kernel, stride)
        assert_close(convolve(tf.constant(images), tf.constant(kernel), stride), expected)


def test_the_plans_tested_above_have_one_tile_and_several_in_each_direction():
    plans = [spectral.conv_plan(*shape[:3]) for shape in SHAPES.values()]
    for axis in (0, 1):
        assert {plan.tiles[axis] > 1 for plan in plans} == {True, False}
        assert any(plan.tiles[axis] * plan.tile[axis] > plan.outputs[axis] for plan in plans)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_tiles_of_a_plan_cover_the_outputs_with_none_to_spare(shape):
    size, kernel_size, stride, *_ = shape
    plan = spectral.conv_plan(size, kernel_size, stride)
    for axis in (0, 1):
        outputs = len(range(0, size[axis] - kernel_size[axis] + 1, stride))
        assert plan.outputs[axis] == outputs
        covered = plan.tiles[axis] * plan.tile[axis]
        assert covered - plan.tile[axis] < outputs <= covered


def test_the_plan_for_mnist_makes_126_products():
    """Of a 10×10 grid 8·6 points are real; of the other 52, half have three products each."""
    plan = spectral.conv_plan((20, 20), (9, 9), 2)
    assert plan.taps == (5, 5) and plan.outputs == plan.tile == (6, 6) and plan.tiles == (1, 1)
    assert len(plan.of_image) == len(plan.of_kernel) == plan.to_output.shape[1] == 48 + 3 * 26


def n_products(real_points, points):
    """Count 1 product for each real point of a grid and 3 for each pair of conjugate points."""
    real = real_points[0] * real_points[1]
    pairs = (points[0] * points[1] - real) // 2
    return real + 3 * pairs


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_plan_has_the_fewest_products_among_points_that_are_exact_enough(shape):
    plan = spectral.conv_plan(*shape[:3])
    points = [n + t - 1 for n, t in zip(plan.tile, plan.taps, strict=True)]
    assert plan.of_image.shape[1] == points[0] * points[1]
    admissible = [
        n_products((y.reals, x.reals), points)
        for y in spectral._axis_transforms(plan.tile[0], plan.taps[0])
        for x in spectral._axis_transforms(plan.tile[1], plan.taps[1])
        if y.error * x.error <= 7
    ]
    assert len(plan.of_image) == min(admissible)


CLOSE_CALLS = {  # two tiles cost nearly the same, or a larger one than is allowed would be best
    "9×9 outputs, 3×3": ((11, 11), (3, 3), 1),
    "17×17 outputs, 5×5": ((21, 21), (5, 5), 1),
    "one row": ((1, 90), (1, 9), 1),
}


@pytest.mark.parametrize("shape", (SHAPES | CLOSE_CALLS).values(), ids=SHAPES | CLOSE_CALLS)
def test_no_other_tile_is_cheaper(shape):
    """The cost at batch 64: of products with both gradients, of transforms, of the kernel."""
    plan = spectral.conv_plan(*shape[:3])

    def cost(tile):
        tiles = np.prod([math.ceil(n / t) for n, t in zip(plan.outputs, tile, strict=True)])
        points = np.prod(np.add(tile, plan.taps) - 1)
        products = len(spectral._grid_matrices(tile, plan.taps)[0])
        return products * (tiles * (6 * 64 + points) + 270)

    rows, columns = (range(1, min(n, 24) + 1) for n in plan.outputs)
    # Only some tiles of large images: building the matrices of all of them takes too long.
    tiles = [(y, x) for y in rows for x in columns][:: 1 if len(rows) * len(columns) < 300 else 5]
    assert max(plan.tile) <= 24
    assert cost(plan.tile) <= min(cost(tile) for tile in tiles)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_one_or_two_real_points_make_the_dft(rng, n):
    """The kernel's polynomial has the values of NumPy's transform there, conjugates included."""
    axis = next(a for a in spectral._axis_transforms(1, n) if a.reals <= 2)
    taps = rng.normal(size=n)
    values, expected = (
        np.sort_complex(z.round(9)) for z in (axis.of_kernel @ taps, np.fft.fft(taps))
    )
    assert_close(values.view(float), expected.view(float))
    assert axis.error == pytest.approx(1)


@pytest.mark.parametrize("outputs, taps", [(1, 1), (6, 5), (5, 3), (3, 5), (10, 9), (24, 2)])
def test_every_set_of_points_gives_the_correlation(rng, outputs, taps):
    x, k = rng.normal(size=outputs + taps - 1), rng.normal(size=taps)
    transforms = spectral._axis_transforms(outputs, taps)
    n = outputs + taps - 1  # the points that are not real come in pairs
    assert [t.reals for t in transforms] == [r for r in range(1, 9) if r <= n and (n - r) % 2 == 0]
    for axis in transforms:
        y = axis.to_output @ ((axis.of_image @ x) * (axis.of_kernel @ k))
        assert_close(y.real, np.correlate(x, k, "valid"))
        assert_close(np.abs(axis.of_image).max(axis=1), np.ones(n))


def test_rounding_to_float32_makes_the_errors_that_plans_are_compared_by(rng):
    x, k = rng.normal(size=(10, 20000)), rng.normal(size=(5, 20000))
    expected, measured = {}, {}
    for axis in spectral._axis_transforms(6, 5):
        exact = axis.of_image @ x, axis.of_kernel @ k
        rounded = [np.complex64(factor).astype(complex) for factor in exact]
        errors = axis.to_output @ (rounded[0] * rounded[1] - exact[0] * exact[1])
        expected[axis.reals] = axis.error
        measured[axis.reals] = errors.real.std(axis=1).max()
    dft = 2  # real points
    assert len(expected) == 4 and max(expected.values()) > 2 * expected[dft]
    for reals in expected:
        ratio = measured[reals] / measured[dft]
        assert ratio == pytest.approx(expected[reals] / expected[dft], rel=0.35)


def mean_error(factors, reals):
    """Average the error over grids of up to 24 points with factors ±f and ±1/f among the reals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectral, "REAL_POINTS", {reals: factors})
        grids = range(reals, 25, 2)
        errors = [spectral._axis_transforms.__wrapped__(n - 4, 5)[0].error for n in grids]
    return np.exp(np.mean(np.log(errors)))


@pytest.mark.parametrize("reals", [5, 6, 7, 8])
def test_other_factors_make_no_smaller_errors_among_the_real_points(reals):
    points = spectral.REAL_POINTS[reals]
    *others, f, _, _, _ = points
    assert points[-4:] == (f, -f, 1 / f, -1 / f)
    error = mean_error(points, reals)
    for other in np.arange(1.1, 2.2, 0.05):
        factors = (*others, other, -other, 1 / other, -1 / other)
        assert mean_error(factors, reals) > 0.98 * error


@pytest.mark.parametrize(
    "shape", [((20, 20), (9, 9), 2), ((28, 28), (9, 9), 2), ((45, 53), (3, 3), 1)]
)
def test_the_matrices_of_a_plan_compute_a_valid_correlation_of_one_tile(rng, shape):
    plan = spectral.conv_plan(*shape)
    grid = np.add(plan.tile, plan.taps) - 1
    x, taps = rng.normal(size=grid), rng.normal(size=plan.taps)
    y = plan.to_output @ ((plan.of_image @ x.ravel()) * (plan.of_kernel @ taps.ravel()))
    expected = convolved(x[None, :, :, None], taps[:, :, None, None], 1)[0, :, :, 0]
    assert_close(y.reshape(plan.tile), expected)
    matrices = plan.of_image, plan.of_kernel, plan.to_output
    assert {matrix.dtype for matrix in matrices} == {np.dtype(np.float32)}


@pytest.mark.parametrize("size", [(8, 20), (20, 8)])
def test_an_image_smaller_than_the_kernel_is_refused(size):
    with pytest.raises(ValueError, match=rf"\(9, 9\) kernel.*Received: \({size[0]}, {size[1]}\)"):
        spectral.conv_plan(size, (9, 9), 1)


@pytest.mark.parametrize("convolve", [by_dft, spectral.patches_conv2d])
def test_convolutions_are_the_same_compiled_by_xla(rng, convolve):
    inputs = normal(rng, 2, 13, 10, 5), normal(rng, 4, 4, 5, 3)
    upstream = normal(rng, 2, 5, 4, 3)

    def compute(images, kernel):
        return values_and_gradients(lambda x, k: convolve(x, k, 2), [images, kernel], upstream)

    xla = tf.function(compute, jit_compile=True)
    for compiled, eager in zip(xla(*inputs), compute(*inputs), strict=True):
        assert_close(compiled, eager)


@pytest.mark.parametrize("convolve", [by_dft, spectral.patches_conv2d])
def test_convolutions_take_an_unknown_batch_size(rng, convolve):
    kernel = normal(rng, 3, 3, 5, 2)
    signature = [tf.TensorSpec((None, 9, 8, 5), tf.float32)]
    graph = tf.function(lambda x: convolve(x, tf.constant(kernel), 2), input_signature=signature)
    for n in (1, 3):
        images = normal(rng, n, 9, 8, 5)
        assert_close(graph(images), convolved(images, kernel, 2))
