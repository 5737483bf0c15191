"""Plans of convolution by products of spectra, against loops and NumPy's FFT and correlation."""

import math

import numpy as np
import pytest
from oracles import CONVOLUTIONS, assert_close, convolved

from capsnet_core import spectral


@pytest.fixture
def rng():
    return np.random.default_rng(20171026)


def test_the_plans_compared_have_one_tile_and_several_in_each_direction():
    plans = [spectral.conv_plan(*shape[:3]) for shape in CONVOLUTIONS.values()]
    for axis in (0, 1):
        assert {plan.tiles[axis] > 1 for plan in plans} == {True, False}
        assert any(plan.tiles[axis] * plan.tile[axis] > plan.outputs[axis] for plan in plans)


@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
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


def test_for_mnist_the_products_take_5_8_times_fewer_multiply_adds_4_1_times_with_transforms():
    """For each image: of 36 outputs, 81 taps, 256 channels and 256 filters; 4 stride phases."""
    plan = spectral.conv_plan((20, 20), (9, 9), 2)
    direct = 36 * 81 * 256 * 256
    products = len(plan.of_image) * 4 * 256 * 256
    transforms = plan.of_image.size * 4 * 256 + plan.to_output.size * 256
    counts = [round(n / 1e6) for n in (direct, products, transforms)]
    assert counts == [191, 33, 14]
    assert direct / products == pytest.approx(5.8, abs=0.05)
    assert direct / (products + transforms) == pytest.approx(4.1, abs=0.05)
    assert round(plan.of_kernel.size * 4 * 256 * 256 / 1e6) == 826  # once for a batch


def n_products(real_points, points):
    """Count 1 product for each real point of a grid and 3 for each pair of conjugate points."""
    real = real_points[0] * real_points[1]
    pairs = (points[0] * points[1] - real) // 2
    return real + 3 * pairs


@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
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


@pytest.mark.parametrize(
    "shape", (CONVOLUTIONS | CLOSE_CALLS).values(), ids=CONVOLUTIONS | CLOSE_CALLS
)
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
