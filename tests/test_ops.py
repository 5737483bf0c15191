"""Every equation and layer against an oracle: loops in float64, values by hand, a second form."""

import inspect
import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import (
    assert_close,
    assert_glorot_uniform,
    assert_truncated_normal,
    composed,
    convolved,
    cut_to_capsules,
    decoded,
    margin_loss_of,
    normal,
    procedure_1,
    randomized,
    squash_of,
    values_and_gradients,
)

import ops


@pytest.fixture(autouse=True)
def rng():
    keras.utils.set_random_seed(20171026)  # of initial weights
    return np.random.default_rng(20171026)


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
    assert lengths[0, 0] < 4e-5
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


def tiled_votes(u, weights):
    """Compute eq. 2 literally, with W copied for each image: (B, J, I, 1, D)."""
    tiled = tf.tile(weights[None], (tf.shape(u)[0], 1, 1, 1, 1))  # (B, J, I, C, D)
    rows = tf.tile(u[:, None, :, None], (1, weights.shape[0], 1, 1, 1))  # (B, J, I, 1, C)
    return tf.matmul(rows, tiled)


def tiled_capsules(u, weights, iterations):
    """Compute procedure 1 literally, on tiled votes: (B, J, D)."""
    u_hat = tiled_votes(u, weights)
    b = tf.zeros_like(u_hat[..., :1])  # (B, J, I, 1, 1)
    for _ in range(iterations):
        c = tf.exp(b) / tf.reduce_sum(tf.exp(b), axis=1, keepdims=True)
        s = tf.reduce_sum(c * u_hat, axis=2, keepdims=True)  # (B, J, 1, 1, D)
        squared = tf.reduce_sum(s**2, axis=-1, keepdims=True)
        v = squared / (1 + squared) * s / tf.sqrt(squared)
        b += tf.reduce_sum(u_hat * v, axis=-1, keepdims=True)
    return v[:, :, 0, 0]


def lower_and_weights(rng, images=3, lower=7, dim=4, upper=5, upper_dim=6):
    return normal(rng, images, lower, dim), normal(rng, upper, lower, dim, upper_dim)


def routed(u, weights, iterations=3):
    return ops.routing(ops.votes(u, weights), iterations)


def test_votes_are_w_ij_times_u_i_with_the_gradients_of_the_tiled_form(rng):
    u, weights = lower_and_weights(rng)
    upstream = normal(rng, 3, 5, 7, 6)
    actual = values_and_gradients(ops.votes, [u, weights], upstream)
    np.testing.assert_allclose(
        actual[0], np.einsum("bic,jicd->bjid", np.float64(u), weights), atol=1e-5
    )
    expected = values_and_gradients(
        lambda *inputs: tiled_votes(*inputs)[..., 0, :],
        [np.float64(u), np.float64(weights)],
        upstream,
    )
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


def test_agreement_is_the_scalar_product_of_a_vote_and_the_upper_capsule_it_is_for(rng):
    v, u_hat = normal(rng, 3, 5, 1, 6), normal(rng, 3, 5, 7, 6)
    expected = np.zeros((3, 5, 1, 7))
    for n, j, i in np.ndindex(3, 5, 7):
        expected[n, j, 0, i] = np.float64(u_hat[n, j, i]) @ v[n, j, 0]
    assert_close(ops.agreement(v, u_hat), expected)


def routing_history(u_hat, iterations, **options):
    """Route, and return v and the (c, v) of each iteration."""
    history = []
    return ops.routing(u_hat, iterations, lambda c, v: history.append((c, v)), **options), history


@pytest.mark.parametrize("none_of_the_above", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_routing_is_procedure_1(rng, iterations, none_of_the_above):
    u, weights = lower_and_weights(rng)
    options = {"none_of_the_above": none_of_the_above}
    v, history = routing_history(ops.votes(u, weights), iterations, **options)
    expected, expected_history = procedure_1(u, weights, iterations, **options)
    assert_close(v, expected)
    assert len(history) == iterations
    for (c, v), (expected_c, expected_v) in zip(history, expected_history, strict=True):
        assert c.shape == (3, 5, 1, 7) and v.shape == (3, 5, 1, 6)
        assert_close(c[:, :, 0], expected_c.transpose(0, 2, 1))
        assert_close(v[:, :, 0], expected_v)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_fast_routing_has_the_values_and_gradients_of_the_tiled_form(rng, iterations):
    u, weights = lower_and_weights(rng)
    upstream = normal(rng, 3, 5, 6)
    actual = values_and_gradients(lambda *x: routed(*x, iterations), [u, weights], upstream)
    expected = values_and_gradients(
        lambda *x: tiled_capsules(*x, iterations), [np.float64(u), np.float64(weights)], upstream
    )
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 2e-5)


def test_couplings_are_uniform_at_first_and_always_sum_to_one_over_the_upper_capsules(rng):
    u, weights = lower_and_weights(rng)
    couplings = [c for c, _ in routing_history(ops.votes(u, weights), 3)[1]]
    np.testing.assert_allclose(couplings[0], np.full((3, 5, 1, 7), 1 / 5), rtol=1e-6)
    for c in couplings:
        np.testing.assert_allclose(tf.reduce_sum(c, axis=1), np.ones((3, 1, 7)), rtol=1e-5)
    over_lower = tf.reduce_sum(couplings[-1], axis=-1).numpy()
    assert np.ptp(over_lower) > 0.1  # the sums over the lower capsules differ


def test_votes_that_agree_on_nothing_go_to_none_of_the_above():
    """By hand: v_0 = v_1 = 0, so all logits stay 0, and three categories have 1/3 each."""
    u_hat = tf.constant([[[[1.0, 0], [-1, 0]], [[0, 1], [0, -1]]]])
    v, history = routing_history(u_hat, 3, none_of_the_above=True)
    np.testing.assert_allclose(history[-1][0], np.full((1, 2, 1, 2), 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(v, np.zeros((1, 2, 2)), atol=1e-7)
    layer = ops.DigitCapsules(3, 2, none_of_the_above=True)
    assert ops.DigitCapsules.from_config(layer.get_config()).none_of_the_above


def test_routing_moves_the_coupling_to_the_upper_capsule_on_which_the_votes_agree():
    """Two lower capsules agree on upper capsule 0 and cancel each other on upper capsule 1.

    By hand: s_0 = (1, 0) gives v_0 = (0.5, 0), and v_1 = 0. So b_i0 = 0.5 and b_i1 = 0, and
    then c_i0 = 1 / (1 + exp(-0.5)).
    """
    u_hat = tf.constant([[[[1.0, 0], [1, 0]], [[0, 1], [0, -1]]]])
    v, history = routing_history(u_hat, 2)
    sigmoid = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(
        history[1][0][0, :, 0], [[sigmoid] * 2, [1 - sigmoid] * 2], rtol=1e-5
    )
    n = 2 * sigmoid
    np.testing.assert_allclose(v[0], [[n**2 / (1 + n**2), 0], [0, 0]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_routing_computes_no_agreement_after_its_last_iteration(rng, monkeypatch, iterations):
    calls, agreement = [], ops.agreement
    monkeypatch.setattr(ops, "agreement", lambda *a: calls.append(a) or agreement(*a))
    ops.routing(normal(rng, 2, 4, 3, 5), iterations)
    assert len(calls) == iterations - 1


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

    xla = tf.function(compute, jit_compile=True)
    for compiled, eager in zip(xla(*inputs), compute(*inputs), strict=True):
        assert_close(compiled, eager)


def digit_capsules(weights):
    layer = ops.DigitCapsules(*weights.shape[::3])
    layer.build((None, *weights.shape[1:3]))
    layer.W.assign(weights)
    return layer


@pytest.mark.parametrize("images", [3, 6, 7])
@pytest.mark.parametrize("jit", [False, True])
def test_digit_capsules_routed_in_chunks_equal_those_routed_at_once(rng, images, jit):
    u, weights = lower_and_weights(rng, images)
    layer = digit_capsules(weights)
    call = tf.function(lambda u: layer(u, chunk_size=3), jit_compile=jit)
    assert_close(call(tf.constant(u)), procedure_1(u, weights, 3)[0])


@pytest.mark.parametrize(
    "images, chunk_size, routed_at_a_time",
    [(6, 3, [3, 3]), (6, 2, [2, 2, 2]), (3, 3, [3]), (7, 3, [7]), (2, 3, [2]), (6, None, [6])],
)
def test_images_are_routed_in_chunks_if_they_are_a_multiple_of_the_chunk_size(
    rng, monkeypatch, images, chunk_size, routed_at_a_time
):
    sizes, routing = [], ops.routing
    monkeypatch.setattr(
        ops, "routing", lambda *a, **k: sizes.append(a[0].shape[0]) or routing(*a, **k)
    )
    u, weights = lower_and_weights(rng, images)
    digit_capsules(weights)(tf.constant(u), chunk_size=chunk_size)
    assert sizes == routed_at_a_time


def test_images_of_an_unknown_number_are_routed_at_once(rng):
    u, weights = lower_and_weights(rng, images=6)
    layer = digit_capsules(weights)
    signature = [tf.TensorSpec((None, *u.shape[1:]), tf.float32)]
    graph = tf.function(lambda u: layer(u, chunk_size=3), input_signature=signature)
    assert_close(graph(u), procedure_1(u, weights, 3)[0])


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
    expected = [margin_loss_of(n, np.flatnonzero(t)) for n, t in zip(lengths, present, strict=True)]
    np.testing.assert_allclose(ops.margin_loss(lengths, present), expected, rtol=1e-4)


def test_lengths_meet_the_margins_as_they_are_so_that_a_perfect_prediction_costs_nothing():
    """A softmax would turn 0.9 among nine times 0.1 into 0.2, and the loss would be 0.49."""
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
    classes = ops.longest(lengths, k).numpy()
    assert np.array_equal(classes, np.argsort(-lengths, axis=1)[:, :k])


# --- Composing images ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("padding, max_shift", [(0, 0), (0, 2), (4, 4), (1, 7)])
@pytest.mark.parametrize("size", [(6, 5, 1), (4, 7, 3)])
def test_compose_places_every_pixel_where_a_loop_does(rng, k, padding, max_shift, size):
    digits = rng.integers(0, 256, (6, k, *size), dtype=np.uint8)
    shift = rng.integers(-max_shift, max_shift + 1, (6, k, 2))
    canvas, shifted = ops.compose(digits, shift, padding)
    expected_canvas, expected_shifted = composed(digits, shift, padding)
    assert_close(shifted, expected_shifted, 1e-6)
    assert_close(canvas, expected_canvas, 1e-6)
    assert canvas.dtype == shifted.dtype == tf.float32


def test_compose_shifts_down_and_right_and_shifts_zeros_in():
    digit = np.full((1, 1, 3, 3, 1), 255, np.uint8)
    canvas, _ = ops.compose(digit, np.array([[[1, -2]]]), 0)
    assert canvas[0, :, :, 0].numpy().tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_compose_clips_the_sum_of_the_digits_but_not_the_digits():
    digits = np.array([[[[[200]]], [[[100]]]], [[[[100]]], [[[51]]]]], np.uint8)
    canvas, shifted = ops.compose(digits, np.zeros((2, 2, 2), int), 0)
    np.testing.assert_allclose(canvas[:, 0, 0, 0], [1, 151 / 255], rtol=1e-6)
    np.testing.assert_allclose(
        shifted[:, :, 0, 0, 0], [[200 / 255, 100 / 255], [100 / 255, 0.2]], rtol=1e-6
    )


def test_compose_gives_each_pixel_value_of_a_single_digit_exactly(rng):
    digits = rng.permutation(256).astype(np.uint8).reshape(1, 1, 16, 16, 1)
    canvas, shifted = ops.compose(digits, np.array([[[-2, 1]]]), 2)
    expected = np.zeros((20, 20), np.float32)
    expected[0:16, 3:19] = digits[0, 0, :, :, 0].astype(np.float32) / np.float32(255)
    assert np.array_equal(canvas[0, :, :, 0], expected)
    assert np.array_equal(shifted[0, 0, :, :, 0], expected)
    assert expected.min() == 0 and expected.max() == 1


# --- Layers --------------------------------------------------------------------------------------

SMALL_NORMAL = {"class_name": "TruncatedNormal", "config": {"stddev": 0.02}}
QUARTER = {"class_name": "Constant", "config": {"value": 0.25}}
INITIALIZERS = {"kernel_initializer": SMALL_NORMAL, "bias_initializer": QUARTER}
# Class, every argument of its constructor with another value than the default, shapes of inputs.
LAYERS = {
    "Convolution": (
        ops.Convolution,
        {
            "filters": 40,
            "kernel_size": 3,
            "strides": 2,
            "activation": "relu",
            "method": "dft",
            **INITIALIZERS,
        },
        [(2, 9, 12, 5)],
    ),
    "PrimaryCapsules": (
        ops.PrimaryCapsules,
        {
            "n_types": 8,
            "dim": 4,
            "kernel_size": 4,
            "strides": 3,
            "method": "dft",
            "coupling": 0.5,
            **INITIALIZERS,
        },
        [(2, 12, 9, 5)],
    ),
    "DigitCapsules": (
        ops.DigitCapsules,
        {
            "n_capsules": 4,
            "dim": 6,
            "iterations": 2,
            "use_bias": True,
            "none_of_the_above": True,
        },
        [(2, 7, 5)],
    ),
    "Decoder": (
        ops.Decoder,
        {"image_shape": (5, 4, 3), "units": (50, 40), **INITIALIZERS},
        [(2, 4, 5), (2, 3, 4)],
    ),
}


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@pytest.fixture
def layer_and_inputs(kind, rng):
    make, arguments, shapes = LAYERS[kind]
    return make(**arguments), [normal(rng, *shape) for shape in shapes]


def kernels_and_biases(layer):
    weights = layer.get_weights()
    return weights[::2], weights[1::2]


def test_the_configuration_of_a_layer_has_every_argument_of_its_constructor(kind):
    make, arguments, _ = LAYERS[kind]
    parameters = inspect.signature(make.__init__).parameters
    assert set(parameters) - {"self", "kwargs"} <= set(arguments)  # the table above is complete
    for name, value in arguments.items():
        assert name not in parameters or value != parameters[name].default
    config = make(**arguments, name="a_name", dtype="mixed_bfloat16").get_config()
    assert {name: config[name] for name in arguments} == arguments
    assert config["name"] == "a_name" and "mixed_bfloat16" in str(config["dtype"])


def from_json(layer):
    """Rebuild a layer as Keras does from a file."""
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    return keras.saving.deserialize_keras_object(json.loads(text))


def from_its_config(layer):
    return type(layer).from_config(layer.get_config())


@pytest.mark.parametrize("rebuild", [from_its_config, from_json])
def test_a_layer_rebuilt_from_its_configuration_gives_the_same_output(
    rng, layer_and_inputs, rebuild
):
    layer, inputs = layer_and_inputs
    layer(*inputs)
    randomized(layer, rng)
    rebuilt = rebuild(layer)
    assert type(rebuilt) is type(layer) and rebuilt.get_config() == layer.get_config()
    expected = layer(*inputs).numpy()
    assert not np.allclose(rebuilt(*inputs), expected)  # its weights are other ones
    rebuilt.set_weights(layer.get_weights())
    assert np.array_equal(rebuilt(*inputs), expected)


@pytest.mark.parametrize("kind", ["Convolution", "PrimaryCapsules", "Decoder"])
@pytest.mark.parametrize("rebuild", [from_its_config, from_json])
def test_a_layer_draws_its_weights_as_the_configurations_of_its_initializers_say(
    layer_and_inputs, rebuild
):
    layer, inputs = layer_and_inputs
    for one in (layer, rebuild(layer)):
        one(*inputs)
        kernels, biases = kernels_and_biases(one)
        assert len(kernels) == len(biases) == (3 if isinstance(one, ops.Decoder) else 1)
        for kernel in kernels:
            assert_truncated_normal(kernel, 0.02)
        for bias in biases:
            assert np.array_equal(bias, np.full(bias.shape, 0.25, np.float32))


@pytest.mark.parametrize(
    "make, input_shape",
    [
        (lambda: ops.Convolution(24, 5), (None, 9, 9, 3)),
        (lambda: ops.PrimaryCapsules(6, 8), (None, 20, 20, 3)),
        (lambda: ops.Decoder((28, 28, 1), units=(60, 50)), (None, 10, 16)),
    ],
)
def test_by_default_kernels_are_glorot_uniform_and_biases_zero(make, input_shape):
    layer = make()
    layer.build(input_shape)
    kernels, biases = kernels_and_biases(layer)
    assert len(kernels) == len(biases) > 0
    for kernel in kernels:
        assert_glorot_uniform(kernel)
    for bias in biases:
        assert bias.size and not bias.any()


def test_the_weights_of_digit_capsules_are_truncated_normal_of_standard_deviation_a_tenth():
    layer = ops.DigitCapsules(10, 16)
    layer.build((None, 30, 8))
    assert layer.W.shape == (10, 30, 8, 16)
    assert_truncated_normal(layer.W.numpy(), 0.1)


def test_the_defaults_of_the_layers_are_those_of_the_paper():
    primary, digits = ops.PrimaryCapsules(32, 8), ops.DigitCapsules(10, 16)
    assert primary.compute_output_shape((None, 20, 20, 256)) == (None, 6 * 6 * 32, 8)
    assert (primary.kernel_size, primary.strides, digits.iterations) == (9, 2, 3)
    assert ops.Decoder((28, 28, 1)).units == (512, 1024)
    conv1 = ops.Convolution(256, 9)
    assert conv1.compute_output_shape((None, 28, 28, 1)) == (None, 20, 20, 256)
    assert (primary.method, conv1.method) == ("direct", "direct")


def test_a_layer_computes_its_output_shape_and_creates_its_weights_once(layer_and_inputs):
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
@pytest.mark.parametrize(
    "activation, function",
    [(None, lambda x: x), ("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh)],
)
def test_convolution_adds_its_bias_and_then_applies_its_activation(
    rng, method, channels, activation, function
):
    images = normal(rng, 2, 8, 7, channels)
    layer = ops.Convolution(4, 3, strides=2, activation=activation, method=method)
    layer.build(images.shape)
    randomized(layer, rng)
    before = convolved(images, layer.kernel.numpy(), 2) + np.float64(layer.bias.numpy())
    assert before.min() < 0 < before.max()
    assert_close(layer(images), function(before))


@pytest.mark.parametrize("method", ops.CONV_METHODS)
def test_a_primary_capsule_is_the_channels_of_one_type_at_one_position(rng, method):
    images = normal(rng, 2, 11, 9, 5)
    layer = ops.PrimaryCapsules(3, 8, kernel_size=3, strides=2, method=method)
    layer.build(images.shape)
    randomized(layer, rng)
    channels = convolved(images, layer.kernel.numpy(), 2) + np.float64(layer.bias.numpy())
    assert channels.shape == (2, 5, 4, 24)
    assert_close(layer(images), cut_to_capsules(channels, n_types=3, dim=8))


@pytest.mark.parametrize("make", [ops.Convolution, ops.PrimaryCapsules])
@pytest.mark.parametrize("method, channels", [("direct", 6), ("dft", 4), ("dft", 5)])
def test_a_kernel_transformed_beforehand_gives_the_same_output(rng, make, method, channels):
    images = normal(rng, 2, 10, 9, channels)
    layer = make(*((8,) if make is ops.Convolution else (2, 4)), kernel_size=3, method=method)
    expected = layer(images).numpy()
    spectrum = layer.spectrum()
    assert (spectrum is not None) == ((method, channels) == ("dft", 5))
    assert np.array_equal(layer(images, spectrum), expected)
    if spectrum is not None:  # the output depends on it, and not on the kernel
        assert not np.allclose(layer(images, 2 * spectrum), expected)
        layer.kernel.assign(0 * layer.kernel)
        assert np.array_equal(layer(images, spectrum), expected)


@pytest.mark.parametrize("make", [ops.Convolution, ops.PrimaryCapsules])
@pytest.mark.parametrize("method", ops.CONV_METHODS)
@pytest.mark.parametrize("built, given", [((9, 8, 1), (9, 8, 3)), ((9, 9, 5), (12, 9, 5))])
def test_images_of_another_shape_than_the_layer_was_built_for_are_refused(
    make, method, built, given
):
    layer = make(*((8,) if make is ops.Convolution else (2, 4)), kernel_size=3, method=method)
    layer.build((None, *built))
    expected, received = str((None, *built)), str((2, *given))
    message = f"expected shape={re.escape(expected)}, found shape={re.escape(received)}"
    for call in (layer, tf.function(layer)):
        with pytest.raises(ValueError, match=message):
            call(tf.zeros((2, *given)))


def rounded(array):
    """Round to the 8 binary digits of bfloat16."""
    return tf.cast(tf.cast(array, tf.bfloat16), tf.float64).numpy()


@pytest.mark.parametrize(
    "method, channels, dtype, tolerance",
    [("direct", 5, tf.bfloat16, 0.02), ("dft", 1, tf.bfloat16, 0.02), ("dft", 5, tf.float32, 1e-5)],
)
def test_in_mixed_precision_all_products_but_those_of_spectra_are_bfloat16(
    rng, method, channels, dtype, tolerance
):
    images = normal(rng, 2, 9, 8, channels)
    layer = ops.Convolution(4, 3, method=method, dtype="mixed_bfloat16")
    layer.build(images.shape)
    randomized(layer, rng)
    assert layer.kernel.dtype == layer.bias.dtype == "float32"
    y = layer(images)
    expected = convolved(rounded(images), rounded(layer.kernel.numpy()), 1)
    expected += rounded(layer.bias.numpy())
    assert y.dtype == dtype
    assert_close(tf.cast(y, tf.float64), expected, tolerance)


def test_in_mixed_precision_the_hidden_layers_of_the_decoder_are_bfloat16_and_pixels_float32(rng):
    decoder = ops.Decoder((4, 3, 1), units=(8, 9), dtype="mixed_bfloat16")
    decoder.build((None, 5, 6))
    assert [layer.compute_dtype for layer in decoder.hidden] == ["bfloat16", "bfloat16"]
    capsules, mask = normal(rng, 2, 5, 6), ops.label_mask([[0], [3]], 5)
    images = decoder(capsules, mask)
    assert images.dtype == tf.float32
    assert_close(images, decoded(decoder, capsules, [0, 3])[:, None], 0.02)


def test_digit_capsules_are_procedure_1_on_their_weights(rng):
    layer, u = ops.DigitCapsules(4, 6, iterations=2), normal(rng, 3, 7, 5)
    v = layer(u)
    assert_close(v, procedure_1(u, layer.W.numpy(), 2)[0])


def test_layers_created_later_in_a_process_have_the_same_names_of_weights():
    paths = []
    for _ in range(2):
        decoder = ops.Decoder((4, 3, 1), units=(8, 9), name="decoder")
        decoder.build((None, 5, 6))
        paths.append([weight.path for weight in decoder.weights])
    layers = ("hidden_1", "hidden_2", "pixels")
    expected = [f"decoder/{layer}/{part}" for layer in layers for part in ("kernel", "bias")]
    assert paths == [expected, expected]


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
            lambda: ops.Convolution(2, 9).build((None, 8, 20, 1)),
            r"a \(9, 9\) kernel needs a larger image\. Received: \(8, 20\)",
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


def test_the_decoder_is_a_stack_of_dense_layers_with_a_sigmoid_at_the_end(rng, decoder):
    capsules, labels = normal(rng, 2, 5, 6), np.array([[1, 3], [4, 0]])
    images = decoder(capsules, ops.label_mask(labels, 5))
    for k in (0, 1):
        assert_close(images[:, k], decoded(decoder, capsules, labels[:, k]))


def test_masked_capsules_do_not_reach_the_decoder(rng, decoder):
    capsules = normal(rng, 2, 5, 6)
    mask = ops.label_mask(np.array([[1], [4]]), 5)
    expected = decoder(capsules, mask).numpy()
    selected = mask.numpy()[:, 0, :, None]  # (B, J, 1)
    changed = capsules + 100 * normal(rng, 2, 5, 6) * (1 - selected)
    assert np.abs(changed - capsules).max() > 10
    assert np.array_equal(decoder(changed, mask), expected)
    assert not np.allclose(decoder(capsules + selected, mask), expected, atol=1e-3)


def test_masked_capsules_get_no_gradient_from_the_reconstruction(rng, decoder):
    capsules = normal(rng, 2, 5, 6)
    mask = ops.label_mask(np.array([[1, 3], [4, 0]]), 5)
    for k, selected in enumerate([[1, 4], [3, 0]]):
        _, gradient = values_and_gradients(
            lambda x, k=k: decoder(x, mask)[:, k], [capsules], normal(rng, 2, 4, 3, 1)
        )
        reached = np.any(gradient.numpy() != 0, axis=-1)
        assert [np.flatnonzero(row).tolist() for row in reached] == [[j] for j in selected]


def test_two_masks_give_each_digit_its_own_reconstruction(rng, decoder):
    capsules, labels = normal(rng, 2, 5, 6), np.array([[1, 3], [4, 0]])
    both = decoder(capsules, ops.label_mask(labels, 5)).numpy()
    assert both.shape == (2, 2, 4, 3, 1)
    for k in (0, 1):
        alone = decoder(capsules, ops.label_mask(labels[:, k : k + 1], 5))[:, 0]
        np.testing.assert_allclose(both[:, k], alone, atol=1e-6)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 0.01


@pytest.mark.parametrize(
    "shape", [(2, 5), (2, 1, 4), (2, 1, 1), (3, 1, 5), (1, 1, 5), (2, 1, 5, 1)]
)
def test_a_mask_of_another_shape_than_one_row_for_each_digit_is_refused(decoder, shape):
    message = rf"\(B, K, J\) = \(2, K, 5\)\. Received: {re.escape(str(shape))}"
    for call in (decoder, tf.function(decoder)):
        with pytest.raises(ValueError, match=message):
            call(tf.zeros((2, 5, 6)), tf.ones(shape))
