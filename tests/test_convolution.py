"""The three algorithms of a convolution, by their one interface, against a loop and TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf
from oracles import CONVOLUTIONS, assert_close, convolved, normal, values_and_gradients

from capsnet_core.convolution import Direct, Patches, Spectral, choose_algorithm


@pytest.fixture
def rng():
    return np.random.default_rng(20171026)


def convolve(algorithm, images, kernel):
    return algorithm.restore(algorithm.multiply(algorithm.prepare(images), kernel))


@pytest.fixture(params=[Direct, Patches, Spectral])
def cls(request):
    return request.param


@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("cls", [Patches, Spectral])
def test_all_have_the_values_and_both_gradients_of_tensorflows(rng, cls, shape):
    size, kernel_size, stride, channels, filters = shape
    images, kernel = normal(rng, 3, *size, channels), normal(rng, *kernel_size, channels, filters)
    direct = [np.float64(images), np.float64(kernel)]
    upstream = normal(rng, *tf.nn.conv2d(*direct, stride, "VALID").shape)
    expected = values_and_gradients(
        lambda x, k: tf.nn.conv2d(x, k, stride, "VALID"), direct, upstream
    )
    algorithm = cls(size, kernel_size, stride, "float32")
    actual = values_and_gradients(
        lambda x, k: convolve(algorithm, x, k), [images, kernel], upstream
    )
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_all_equal_a_loop_over_the_output_pixels(rng, cls, stride):
    images, kernel = normal(rng, 2, 9, 12, 3), normal(rng, 4, 3, 3, 2)
    algorithm = cls((9, 12), (4, 3), stride, "float32")
    assert_close(convolve(algorithm, images, kernel), convolved(images, kernel, stride))


@pytest.mark.parametrize("cls", [Patches, Spectral])  # XLA convolves directly by itself
def test_they_are_the_same_compiled_by_xla(rng, cls):
    inputs = normal(rng, 2, 13, 10, 5), normal(rng, 4, 4, 5, 3)
    upstream, algorithm = normal(rng, 2, 5, 4, 3), cls((13, 10), (4, 4), 2, "float32")

    def compute(*inputs):
        return values_and_gradients(lambda *x: convolve(algorithm, *x), inputs, upstream)

    xla = tf.function(compute, jit_compile=True)
    for compiled, eager in zip(xla(*inputs), compute(*inputs), strict=True):
        assert_close(compiled, eager)


def test_all_take_an_unknown_batch_size_and_know_the_other_sizes(rng, cls):
    kernel, algorithm = normal(rng, 3, 3, 5, 2), cls((9, 8), (3, 3), 2, "float32")
    signature = [tf.TensorSpec((None, 9, 8, 5), tf.float32)]
    graph = tf.function(lambda x: convolve(algorithm, x, kernel), input_signature=signature)
    assert graph.get_concrete_function().output_shapes == tf.TensorShape((None, 4, 3, 2))
    for n in (1, 3):
        images = normal(rng, n, 9, 8, 5)
        assert_close(graph(images), convolved(images, kernel, 2))


@pytest.mark.parametrize(
    "method, channels, cls",
    [
        ("direct", 1, Direct),
        ("direct", 6, Direct),
        ("dft", 1, Patches),
        ("dft", 4, Patches),
        ("dft", 5, Spectral),
    ],
)
def test_an_algorithm_is_chosen_by_the_method_and_the_channels(method, channels, cls):
    assert choose_algorithm(method, channels) is cls


@pytest.mark.parametrize("size", [(8, 20), (20, 8)])
def test_an_image_smaller_than_the_kernel_is_refused(cls, size):
    with pytest.raises(ValueError, match=rf"\(9, 9\) kernel.*Received: \({size[0]}, {size[1]}\)"):
        cls(size, (9, 9), 1, "float32")
