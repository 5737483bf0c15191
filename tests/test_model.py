"""The network of the paper: its outputs, sizes, first weights and what is saved of it."""

import functools
import inspect
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import (
    assert_close,
    assert_glorot_uniform,
    assert_truncated_normal,
    capsules_of,
    composed,
    convolved,
    decoded,
    margin_loss_of,
    randomized,
)

import model
import ops
from capsnet.config import NetworkConfig
from capsnet.convolution import Direct, Patches, Spectral
from capsnet.errors import ImageTooSmall
from model import CapsNet, uncompiled

OLD_RUN = Path(__file__).parent / "fixtures" / "old_run"
# Every argument of CapsNet, but `conv` and `initialization`, with another value than the default.
TINY = {
    "image_shape": (9, 11, 2),
    "n_classes": 4,
    "n_conv": 6,
    "n_primary": 2,
    "primary_dim": 4,
    "digit_dim": 5,
    "routing_iterations": 2,
    "kernel_size": 3,
    "decoder_units": (7, 6),
}


@pytest.fixture(autouse=True)
def rng():
    keras.utils.set_random_seed(20171026)  # of initial weights
    return np.random.default_rng(20171026)


def random_network(rng, **changes):
    return randomized(CapsNet(**TINY | changes), rng)


def random_images(rng, n, image_shape=TINY["image_shape"]):
    return rng.uniform(size=(n, *image_shape)).astype(np.float32)


def random_batch(rng, n, k=1, padding=0, image_shape=TINY["image_shape"]):
    """Make a batch of n images, each with k digits of different classes."""
    height, width, channels = image_shape
    size = (height - 2 * padding, width - 2 * padding, channels)
    digits = rng.integers(0, 256, (n, k, *size), dtype=np.uint8)
    shift = rng.integers(-2, 3, (n, k, 2))
    labels = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)[:, :k]
    return digits, shift, labels, np.full(n, 1 / n, np.float32)


def outputs_with_lengths(monkeypatch, lengths, labels):
    """Return the outputs of a network whose capsules have the given lengths."""
    lengths, labels = np.asarray(lengths, np.float32), np.asarray(labels)
    network = CapsNet(**TINY)
    capsules = np.zeros((*lengths.shape, 5), np.float32)
    capsules[..., 2] = lengths
    monkeypatch.setattr(network, "capsules", lambda *arguments: tf.constant(capsules))
    n, k = labels.shape
    digits = np.zeros((n, k, *TINY["image_shape"]), np.uint8)
    return network.outputs((digits, np.zeros((n, k, 2), int), labels, np.full(n, 1 / n)))


# --- The function that it computes ---------------------------------------------------------------


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_network_is_the_paper_written_with_loops(rng, conv, iterations):
    network = random_network(rng, routing_iterations=iterations, conv=conv)
    images = random_images(rng, 2)
    expected = capsules_of(network, images)
    lengths, capsules = network(images)
    assert_close(capsules, expected)
    assert_close(lengths, np.sqrt((expected**2).sum(-1)))

    labels = np.array([[0, 2], [3, 1]])
    reconstructions = network.decoder(capsules, ops.label_mask(labels, 4))
    assert reconstructions.shape == (2, 2, *TINY["image_shape"])
    for k in (0, 1):
        assert_close(reconstructions[:, k], decoded(network.decoder, expected, labels[:, k]))


def test_a_relu_follows_the_first_convolution_and_not_the_primary_capsules(rng):
    network, images = random_network(rng), random_images(rng, 3)
    kernel, bias = (np.float64(weight.numpy()) for weight in network.conv1.weights)
    before = convolved(images, kernel, 1) + bias
    assert before.min() < -0.1
    features = network.conv1(images)
    assert_close(features, np.maximum(before, 0))
    assert network.primary(features).numpy().min() < -0.1


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
def test_the_network_takes_an_unknown_batch_size(rng, conv):
    network = random_network(rng, conv=conv)
    shape = TINY["image_shape"]
    graph = tf.function(network, input_signature=[tf.TensorSpec((None, *shape), tf.float32)])
    for n in (1, 3):
        images = random_images(rng, n)
        for actual, expected in zip(graph(images), network(images), strict=True):
            assert_close(actual, expected)


def test_gradients_of_the_network_are_the_same_for_both_convolutions(rng):
    images = random_images(rng, 3)
    direct, dft = (CapsNet(**TINY, conv=conv) for conv in ("direct", "dft"))
    algorithms = [type(n.algorithm) for net in (direct, dft) for n in (net.conv1, net.primary)]
    assert algorithms == [Direct, Direct, Patches, Spectral]
    randomized(direct, rng)
    dft.set_weights(direct.get_weights())
    gradients = []
    for network in (direct, dft):
        with tf.GradientTape() as tape:
            lengths, capsules = network(images)
            mask = ops.label_mask([[0], [1], [2]], 4)
            error = ops.reconstruction_loss(images[:, None], network.decoder(capsules, mask))
            loss = tf.reduce_mean(ops.margin_loss(lengths, mask[:, 0]) + error)
        gradients.append(tape.gradient(loss, network.trainable_variables))
    for one, other in zip(*gradients, strict=True):
        assert np.abs(other).max() > 0
        assert_close(one, other, 1e-4)


def test_a_reduced_network_learns_the_classes_of_its_images_and_to_draw_them(rng):
    network = CapsNet(**TINY | {"n_conv": 12, "n_primary": 4, "digit_dim": 8, "decoder_units": ()})
    digits, _, labels, weight = random_batch(rng, 12)
    batch = digits, np.zeros((12, 1, 2), int), labels, weight
    variables, optimizer = network.trainable_variables, keras.optimizers.Adam(0.01)

    @tf.function
    def gradients():
        with tf.GradientTape() as tape:
            terms = network.loss_terms(network.outputs(batch))
            loss = tf.reduce_mean(terms["margin"] + 0.005 * terms["reconstruction"])
        return tape.gradient(loss, [v.value for v in variables])

    before = network.outputs(batch)
    for _ in range(70):
        optimizer.apply(gradients(), variables)
    after = network.outputs(batch)
    assert np.mean(before.correct) < 0.6 and np.mean(after.correct) == 1
    for name in ("margin_loss", "reconstruction_loss"):
        assert np.mean(getattr(after, name)) < 0.8 * np.mean(getattr(before, name))


# --- Outputs of a batch --------------------------------------------------------------------------


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
@pytest.mark.parametrize("k, padding", [(1, 0), (2, 0), (1, 4), (2, 4)])
def test_the_outputs_of_a_batch_are_those_computed_by_hand(rng, conv, k, padding):
    network = random_network(rng, conv=conv, image_shape=(13, 15, 2))
    batch = random_batch(rng, 6, k, padding, (13, 15, 2))
    digits, shift, labels, _ = batch
    assert digits.shape == (6, k, 13 - 2 * padding, 15 - 2 * padding, 2)
    outputs = network.outputs(batch)
    canvas, shifted = composed(digits, shift, padding)
    assert canvas.shape == (6, 13, 15, 2)
    assert_close(outputs.canvas, canvas, 1e-6)
    assert_close(outputs.digits, shifted, 1e-6)

    capsules = capsules_of(network, canvas)
    lengths = np.linalg.norm(capsules, axis=-1)
    predictions = np.argsort(-lengths, axis=1)[:, :k]
    assert_close(outputs.capsules, capsules)
    assert_close(outputs.lengths, lengths)
    assert outputs.scores is outputs.lengths
    assert np.array_equal(outputs.predictions, predictions)
    correct = [set(p) == set(y) for p, y in zip(predictions, labels, strict=True)]
    assert np.asarray(outputs.correct).tolist() == correct

    margins = [margin_loss_of(n, set(y)) for n, y in zip(lengths, labels, strict=True)]
    assert_close(outputs.margin_loss, margins)
    squared_errors = np.zeros(6)
    for digit in range(k):
        with_label = decoded(network.decoder, capsules, labels[:, digit])
        without_label = decoded(network.decoder, capsules, predictions[:, digit])
        assert_close(outputs.with_label[:, digit], with_label)
        assert_close(outputs.without_label[:, digit], without_label)
        squared_errors += ((with_label - shifted[:, digit]) ** 2).sum(axis=(1, 2, 3))
    assert np.abs(outputs.with_label - outputs.without_label).max() > 0.01
    assert_close(outputs.reconstruction_loss, squared_errors)


def test_one_digit_is_correct_if_its_capsule_is_the_longest(monkeypatch):
    lengths = [[0.1, 0.9, 0.2, 0.3], [0.9, 0.8, 0.7, 0.6], [0.3, 0.2, 0.1, 0.4]]
    outputs = outputs_with_lengths(monkeypatch, lengths, [[1], [1], [3]])
    assert outputs.predictions.numpy().tolist() == [[1], [0], [3]]
    assert outputs.correct.numpy().tolist() == [True, False, True]


def test_two_digits_are_correct_if_both_are_the_longest_in_any_order(monkeypatch):
    lengths = [[0.1, 0.9, 0.2, 0.8]] * 6
    labels = [[1, 3], [3, 1], [1, 0], [0, 3], [0, 2], [2, 1]]
    outputs = outputs_with_lengths(monkeypatch, lengths, labels)
    assert outputs.predictions.numpy().tolist() == [[1, 3]] * 6
    assert outputs.correct.numpy().tolist() == [True, True, False, False, False, False]


def test_the_terms_of_the_loss_by_hand(monkeypatch):
    """Nothing is drawn, so the reconstruction's error is that of 198 pixels of the sigmoid of 0."""
    outputs = outputs_with_lengths(monkeypatch, [[0.95, 0.5, 0.1, 0.3], [0, 0, 0, 0]], [[0], [2]])
    terms = CapsNet(**TINY).loss_terms(outputs)
    assert list(terms) == ["margin", "reconstruction"]
    np.testing.assert_allclose(terms["margin"], [0.5 * (0.4**2 + 0.2**2), 0.9**2], rtol=1e-3)
    assert terms["reconstruction"].shape == (2,)
    assert terms["reconstruction"][1].numpy() == pytest.approx(198 * 0.25)
    assert terms["reconstruction"] is outputs.reconstruction_loss


def test_the_names_of_the_loss_terms_are_those_of_the_terms_in_their_order(rng):
    network = random_network(rng)
    terms = network.loss_terms(network.outputs(random_batch(rng, 2)))
    assert network.loss_names == ("margin", "reconstruction") == tuple(terms)


@pytest.mark.parametrize("k", [1, 2])
def test_the_label_reaches_only_the_reconstruction_that_is_made_with_it(rng, k):
    network = random_network(rng)
    digits, shift, labels, weight = random_batch(rng, 6, k)
    one = network.outputs((digits, shift, labels, weight))
    other = network.outputs((digits, shift, (labels + 1) % 4, weight))
    for name in ("capsules", "lengths", "predictions", "without_label"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert np.abs(one.with_label - other.with_label).max() > 0.01
    # If the labels are the longest capsules, both reconstructions are the same.
    right = network.outputs((digits, shift, one.predictions, weight))
    assert np.array_equal(right.with_label, right.without_label)


def test_the_step_of_training_changes_nothing(rng):
    network, batch = random_network(rng), random_batch(rng, 3)
    for one, other in zip(network.outputs(batch), network.outputs(batch, step=7), strict=True):
        assert np.array_equal(one, other)


# --- Inference -----------------------------------------------------------------------------------


def test_spectra_are_those_of_both_kernels_and_are_used_in_place_of_them(rng):
    network = random_network(rng, image_shape=(9, 11, 5), conv="dft")
    batch = random_batch(rng, 3, image_shape=(9, 11, 5))
    expected = network.outputs(batch)
    spectra = network.spectra()
    assert np.array_equal(spectra[0], network.conv1.spectrum())
    assert np.array_equal(spectra[1], network.primary.spectrum())
    for layer in (network.conv1, network.primary):
        layer.kernel.assign(0 * layer.kernel)
    for one, other in zip(network.outputs(batch, spectra), expected, strict=True):
        assert np.array_equal(one, other)
    assert not np.allclose(network.outputs(batch).lengths, expected.lengths)


def test_a_network_that_convolves_directly_has_no_spectra():
    assert CapsNet(**TINY).spectra() == (None, None)


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
@pytest.mark.parametrize("compile_part", [None, uncompiled])
def test_images_are_routed_in_chunks_only_for_inference_with_the_convolution_for_a_cpu(
    rng, monkeypatch, conv, compile_part
):
    network, batch = random_network(rng, conv=conv), random_batch(rng, 32)
    expected = capsules_of(network, composed(batch[0], batch[1], 0)[0])
    sizes, routing = [], ops.routing
    monkeypatch.setattr(
        ops, "routing", lambda *a, **k: sizes.append(a[0].shape[0]) or routing(*a, **k)
    )
    assert_close(network.outputs(batch, compile_part=compile_part).capsules, expected)
    assert sizes == ([16, 16] if compile_part and conv == "dft" else [32])


def compiler(conv):
    return functools.partial(tf.function, jit_compile=conv == "dft", autograph=False)


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
def test_inference_with_spectra_gives_the_outputs_of_training(rng, conv):
    network, batch = random_network(rng, conv=conv), random_batch(rng, 32, k=2)
    infer = tf.function(lambda spectra: network.outputs(batch, spectra, compiler(conv)))
    training, inference = network.outputs(batch), infer(network.spectra())
    for name, expected in training._asdict().items():
        assert_close(getattr(inference, name), expected)


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
def test_the_largest_product_of_inference_is_between_two_compiled_parts(rng, conv):
    """By their shapes: images, products in between, and the capsules at the end."""
    network, parts = random_network(rng, image_shape=(9, 11, 5), conv=conv), []

    def compile_part(function):
        compiled = compiler(conv)(function)

        def call(argument):
            parts.append((argument.shape, compiled(argument)))
            return parts[-1][1]

        return call

    images = random_images(rng, 3, (9, 11, 5))
    capsules = network.capsules(images, network.spectra(), compile_part)
    (first, factors), (products, last) = parts
    assert first == images.shape and last is capsules
    spectra = network.spectra()
    assert network.primary.multiply(factors, spectra[1]).shape == products
    assert_close(capsules, capsules_of(network, images))


# --- Moving one dimension of a capsule -----------------------------------------------------------


def test_tweaks_move_one_dimension_of_the_chosen_capsule_by_a_quarter_in_steps_of_a_twentieth(rng):
    network = random_network(rng)
    capsules = rng.normal(size=(3, 4, 5)).astype(np.float32)
    before, classes = capsules.copy(), np.array([2, 0, 3])
    images = network.tweak(capsules, classes)
    assert images.shape == (5, 3, 11, *TINY["image_shape"])
    assert np.array_equal(capsules, before)
    for dim, step in np.ndindex(5, 11):
        moved = np.float64(before)
        for n, j in enumerate(classes):
            moved[n, j, dim] += -0.25 + 0.05 * step
        assert_close(images[dim, :, step], decoded(network.decoder, moved, classes))
    # The middle step moves nothing, and every other step draws another image.
    assert np.ptp(images[:, :, 5], axis=0).max() < 1e-6
    assert np.abs(np.diff(images, axis=2)).max(axis=(3, 4, 5)).min() > 1e-4


# --- Mixed precision -----------------------------------------------------------------------------


def test_in_mixed_precision_norms_routing_losses_and_weights_stay_float32(rng, monkeypatch):
    exact, mixed = random_network(rng), CapsNet(**TINY, dtype="mixed_bfloat16")
    mixed.set_weights(exact.get_weights())
    routed, routing = [], ops.routing
    monkeypatch.setattr(
        ops, "routing", lambda *a, **k: routed.append(routing(*a, **k)) or routed[-1]
    )
    batch = random_batch(rng, 4)
    with tf.GradientTape() as tape:
        outputs = mixed.outputs(batch)
        loss = tf.reduce_mean(sum(mixed.loss_terms(outputs).values()))
    gradients = tape.gradient(loss, [v.value for v in mixed.trainable_variables])
    assert mixed.conv1(outputs.canvas).dtype == tf.bfloat16
    assert {g.dtype for g in gradients} == {v.value.dtype for v in mixed.variables} == {tf.float32}
    assert all(np.isfinite(g).all() for g in gradients)
    u = mixed.primary(mixed.conv1(outputs.canvas))
    floats = [v for name, v in outputs._asdict().items() if name not in ("predictions", "correct")]
    assert len(routed) == 1
    assert {tensor.dtype for tensor in (u, *routed, *floats)} == {tf.float32}
    expected = exact.outputs(batch)
    for name in ("lengths", "margin_loss", "reconstruction_loss"):  # bfloat16 has 8 binary digits
        assert_close(getattr(outputs, name), getattr(expected, name), 0.05)
    assert np.abs(outputs.lengths - expected.lengths).max() > 0


def test_in_mixed_precision_training_with_products_of_spectra_is_float32(rng):
    exact = random_network(rng, conv="dft")
    mixed, batch = CapsNet(**TINY, conv="dft", dtype="mixed_bfloat16"), random_batch(rng, 4)
    mixed.set_weights(exact.get_weights())
    for one, other in zip(mixed.outputs(batch), exact.outputs(batch), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("conv, tolerance", [("direct", 1e-5), ("dft", 0.02)])
def test_in_mixed_precision_inference_has_bfloat16_products_of_spectra(rng, conv, tolerance):
    """It also routes 32 images in chunks, which changes nothing."""
    network, batch = CapsNet(**TINY, conv=conv, dtype="mixed_bfloat16"), random_batch(rng, 32)
    network.primary.kernel.assign(5 * network.primary.kernel)
    expected, spectra = network.outputs(batch), network.spectra()
    features = network.conv1(composed(batch[0], batch[1], 0)[0])
    factors = network.primary.prepare(features, spectra[1])
    assert network.primary.multiply(factors, spectra[1]).dtype == tf.bfloat16
    outputs = network.outputs(batch, spectra, uncompiled)
    assert outputs.lengths.dtype == outputs.capsules.dtype == tf.float32
    assert_close(outputs.lengths, expected.lengths, tolerance)
    assert conv == "direct" or np.abs(outputs.lengths - expected.lengths).max() > 0


def test_in_mixed_precision_all_layers_have_the_policy_of_the_network():
    network = CapsNet(**TINY, dtype="mixed_bfloat16")
    layers = (network.conv1, network.primary, network.digits, network.decoder)
    assert {layer.dtype_policy.name for layer in layers} == {"mixed_bfloat16"}


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, lower, total", [(28, 6 * 6 * 32, 8_215_568), (36, 10 * 10 * 32, 11_361_808)]
)
def test_the_network_has_the_parameters_of_the_paper(side, lower, total):
    network = CapsNet((side, side, 1), 10)
    conv1 = 9 * 9 * 1 * 256 + 256
    primary = 9 * 9 * 256 * (32 * 8) + 32 * 8
    digits = lower * 10 * 8 * 16
    decoder = (160 * 512 + 512) + (512 * 1024 + 1024) + (1024 * side**2 + side**2)
    assert network.count_params() == conv1 + primary + digits + decoder == total
    assert network.count_params() - network.decoder.count_params() == conv1 + primary + digits
    if side == 28:
        assert conv1 + primary + digits == 6_804_224
    assert network.digits.iterations == 3
    assert [variable.path for variable in network.variables] == [
        "conv1/kernel",
        "conv1/bias",
        "primary_capsules/kernel",
        "primary_capsules/bias",
        "digit_capsules/W",
        *(
            f"decoder/{layer}/{part}"
            for layer in ("hidden_1", "hidden_2", "pixels")
            for part in ("kernel", "bias")
        ),
    ]


@pytest.mark.parametrize(
    "shape, classes, config",
    [
        ((28, 28, 1), 10, NetworkConfig()),
        ((36, 36, 1), 10, NetworkConfig()),
        ((19, 24, 3), 7, NetworkConfig(5, 3, 4, 6, 2, 5, (8, 9))),
        ((9, 9, 2), 3, NetworkConfig(5, 3, 4, 6, 2, 5, ())),
    ],
)
def test_layer_sizes_are_those_of_the_layers_of_a_network(shape, classes, config):
    network = CapsNet(shape, classes, **config._asdict())
    layers, output = [network.conv1, network.primary, network.digits], (None, *shape)
    names, shapes, counts = zip(*model.layer_sizes(shape, classes, config), strict=True)
    assert names == ("conv1", "primary capsules", "digit capsules", "decoder")
    assert counts == tuple(layer.count_params() for layer in (*layers, network.decoder))
    for layer, expected in zip(layers, shapes[:3], strict=True):
        output = layer.compute_output_shape(output)
        assert output == (None, *expected)
    assert shapes[3] == shape
    if config == NetworkConfig():
        assert model.layer_sizes(shape, classes) == model.layer_sizes(shape, classes, config)


@pytest.mark.parametrize(
    "batch_size, side, channels, classes, megabytes",  # peaks of main.py --train, one epoch
    [
        (16, 28, 1, 10, 1438),
        (64, 28, 1, 10, 1568),
        (128, 28, 1, 10, 1769),
        (256, 28, 1, 10, 2163),
        (64, 28, 1, 100, 2985),
        (64, 28, 3, 10, 1676),
        (64, 40, 1, 30, 3663),
        (32, 48, 3, 40, 4531),
        (64, 64, 1, 10, 5482),
        (16, 64, 1, 100, 12713),
        (16, 64, 3, 2, 2324),
        (64, 64, 3, 2, 3810),
        (128, 64, 3, 2, 5653),
        (16, 96, 3, 2, 3592),
        (32, 96, 3, 2, 5066),
        (64, 96, 3, 2, 7764),
        (16, 96, 3, 10, 6579),
        (64, 104, 3, 2, 8666),
    ],
)
def test_the_memory_estimated_is_within_a_tenth_of_what_was_measured(
    batch_size, side, channels, classes, megabytes
):
    sizes = model.layer_sizes((side, side, channels), classes)
    data_bytes = 3 * batch_size * side * side * channels
    estimate = model.memory_needed(sizes, batch_size, data_bytes)
    assert estimate / 1e6 == pytest.approx(megabytes, rel=0.1)


@pytest.mark.parametrize("classes, data_bytes", [(10, 0), (3, 10**9)])
def test_the_batch_that_fits_is_the_largest_whose_estimate_is_below_the_memory(classes, data_bytes):
    sizes = model.layer_sizes((64, 64, 3), classes)
    batch = model.batch_that_fits(sizes, 8e9, data_bytes)
    assert batch > 1
    assert model.memory_needed(sizes, batch, data_bytes) <= 8e9
    assert model.memory_needed(sizes, batch + 1, data_bytes) > 8e9
    assert model.batch_that_fits(sizes, 1e9, data_bytes) == 0


def test_the_memory_estimated_grows_with_parameters_images_in_a_batch_and_data():
    """27.6 bytes a parameter, 165 a component of a primary capsule, 9.6 a component of a vote."""
    sizes = model.layer_sizes((28, 28, 1), 10)
    image = 165 * 1152 * 8 + 9.6 * 1152 * 10 * 16
    expected = 1150e6 + 27.6 * 8_215_568 + 64 * image
    assert model.memory_needed(sizes, 64) == pytest.approx(expected)
    more = expected + 36 * image
    assert model.memory_needed(sizes, 100) == pytest.approx(more)
    assert model.memory_needed(sizes, 64, data_bytes=5e9) == pytest.approx(expected + 5e9)


@pytest.mark.parametrize("shape", [(16, 30, 1), (30, 16, 3)])
def test_images_too_small_for_two_convolutions_are_refused_with_the_sizes(shape):
    for build in (CapsNet, model.layer_sizes):
        with pytest.raises(ImageTooSmall, match=r"two 9×9 .* at least 17×17 pixels.") as caught:
            build(shape, 10)
        assert caught.value.smallest == 17 and caught.value.image_shape == shape
        assert f"Received: image_shape={shape}" in str(caught.value)


def test_the_smallest_image_leaves_one_position_of_primary_capsules():
    sizes = model.layer_sizes((17, 17, 1), 10)
    assert sizes[0][1] == (9, 9, 256) and sizes[1][1] == (32, 8)
    with pytest.raises(ImageTooSmall, match="at least 5×5"):
        CapsNet((4, 5, 1), 10, kernel_size=3)


# --- First weights -------------------------------------------------------------------------------

WIDE = {**TINY, "n_conv": 32, "n_primary": 4, "primary_dim": 8, "decoder_units": (40, 40)}


def test_glorot_draws_all_kernels_uniformly_within_glorots_limits_and_has_no_biases():
    network = CapsNet(**WIDE)
    kernels = [v.numpy() for v in network.variables if v.name == "kernel"]
    biases = [v.numpy() for v in network.variables if v.name == "bias"]
    assert len(kernels) == len(biases) == 5
    for kernel in kernels:
        assert_glorot_uniform(kernel)
    assert not any(bias.any() for bias in biases)
    assert_truncated_normal(network.digits.W.numpy(), 0.1)


def test_authors_draws_all_kernels_from_truncated_normals_and_has_biases_of_a_tenth():
    network = CapsNet(**WIDE, initialization="authors")
    kernels = [v.numpy() for v in network.variables if v.name == "kernel"]
    biases = [v.numpy() for v in network.variables if v.name == "bias"]
    assert len(kernels) == len(biases) == 5
    for kernel, stddev in zip(kernels, [0.05, 0.1, 0.1, 0.1, 0.1], strict=True):
        assert_truncated_normal(kernel, stddev)
    for bias in biases:
        assert np.array_equal(bias, np.full(bias.shape, 0.1, np.float32))
    assert_truncated_normal(network.digits.W.numpy(), 0.1)


@pytest.mark.parametrize("initialization", ["glorot", "authors"])
def test_every_kernel_is_drawn_by_itself_and_depends_on_the_seed(initialization):
    def drawn(seed):
        keras.utils.set_random_seed(seed)
        network = CapsNet(**WIDE | {"digit_dim": 10}, initialization=initialization)
        return [v.numpy() for v in network.variables if v.name in ("kernel", "W")]

    first, again, other = drawn(1), drawn(1), drawn(2)
    for one, same, different in zip(first, again, other, strict=True):
        assert np.array_equal(one, same)
        assert not np.isclose(one, different).mean() > 0.1
    hidden_1, hidden_2 = first[3:5]
    assert hidden_1.shape == hidden_2.shape == (40, 40)
    assert not np.isclose(hidden_1, hidden_2).mean() > 0.1


# --- Configuration, saving and loading -----------------------------------------------------------


def test_the_defaults_are_those_of_the_paper():
    parameters = inspect.signature(CapsNet.__init__).parameters
    paper = {
        "n_conv": 256,
        "n_primary": 32,
        "primary_dim": 8,
        "digit_dim": 16,
        "routing_iterations": 3,
        "kernel_size": 9,
        "decoder_units": (512, 1024),
        "variant": "paper",
    }
    assert {name: parameters[name].default for name in paper} == paper
    assert NetworkConfig()._asdict() == paper


def test_the_architecture_is_every_setting_but_the_convolution_and_the_first_weights():
    network = CapsNet(**TINY, conv="dft", initialization="authors")
    assert network.architecture == TINY
    others = {"conv": "dft", "initialization": "authors", "variant": "paper"}
    assert network.settings == TINY | others


def test_a_network_rebuilt_from_its_configuration_has_every_argument_of_its_constructor():
    arguments = {**TINY, "conv": "dft", "initialization": "authors", "variant": "authors"}
    parameters = inspect.signature(CapsNet.__init__).parameters
    assert set(parameters) - {"self", "kwargs"} == set(arguments)
    for name, value in arguments.items():
        assert value != parameters[name].default
    network = CapsNet(**arguments, dtype="mixed_bfloat16")
    config = network.get_config()
    assert {name: config[name] for name in arguments} == arguments
    rebuilt = CapsNet.from_config(config)
    assert rebuilt.settings == arguments and rebuilt.get_config() == config
    assert rebuilt.dtype_policy.name == "mixed_bfloat16"
    assert (rebuilt.primary.method, rebuilt.conv1.method) == ("dft", "dft")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # inside Keras
@pytest.mark.parametrize("initialization", ["glorot", "authors"])
def test_a_network_saved_by_keras_is_loaded_with_the_same_outputs(rng, tmp_path, initialization):
    network = random_network(rng, conv="dft", initialization=initialization)
    images = random_images(rng, 2)
    network.save(tmp_path / "capsnet.keras")
    loaded = keras.saving.load_model(tmp_path / "capsnet.keras")
    assert type(loaded) is CapsNet and loaded.get_config() == network.get_config()
    for one, other in zip(loaded.variables, network.variables, strict=True):
        assert one.path == other.path and np.array_equal(one, other)
    for one, other in zip(loaded(images), network(images), strict=True):
        assert np.array_equal(one, other)
    capsules, mask = network(images)[1], ops.label_mask([[0], [3]], 4)
    assert np.array_equal(loaded.decoder(capsules, mask), network.decoder(capsules, mask))


@pytest.fixture(scope="module")
def expected():
    """What an earlier version computed with the network that it exported."""
    with np.load(OLD_RUN / "expected.npz") as file:
        return dict(file)


def test_a_network_exported_by_an_earlier_version_is_loaded_with_its_outputs(expected):
    network = keras.saving.load_model(OLD_RUN / "exported" / "capsnet.keras")
    assert type(network) is CapsNet and network.count_params() == 11_172
    lengths, capsules = network(expected["images"] / np.float32(255))
    assert_close(lengths, expected["lengths"])
    assert_close(capsules, expected["capsules"])
    mask = ops.label_mask(ops.longest(lengths[:2], 1), 10)
    reconstructions = network.decoder(capsules[:2], mask)[:, 0]
    assert_close(reconstructions, expected["reconstructions"])


def test_weights_exported_by_an_earlier_version_fit_the_variables_of_the_same_paths(expected):
    network = CapsNet((28, 28, 1), 10, 4, 3, 2, 3, decoder_units=(2,), conv="dft")
    with np.load(OLD_RUN / "exported" / "weights.npz") as file:
        for variable in network.variables:
            variable.assign(file[variable.path])
    lengths, capsules = network(expected["images"] / np.float32(255))
    assert_close(lengths, expected["lengths_float16"])
    assert_close(capsules, expected["capsules_float16"])


# ---------------------------------------------------------------- the authors' variant


def test_the_authors_variant_has_a_bias_in_routing_and_weak_primary_capsules():
    net = model.CapsNet((28, 28, 1), 10, variant="authors", initialization="authors")
    assert net.count_params() == 8_215_568 + 160
    assert net.architecture["variant"] == "authors"
    assert "variant" not in model.CapsNet((28, 28, 1), 10).architecture
    sizes = model.layer_sizes((28, 28, 1), 10, NetworkConfig(variant="authors"))
    assert sum(count for *_, count in sizes) == net.count_params()
    np.testing.assert_array_equal(net.digits.bias, np.full((10, 16), 0.1, np.float32))
    # The first capsules are short, and would be saturated without the division by the types.
    images = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    features = net.conv1(images)
    lengths = np.linalg.norm(net.primary(features), axis=-1)
    net.primary.coupling = None
    assert lengths.mean() < 0.3 < 0.9 < np.linalg.norm(net.primary(features), axis=-1).mean()


def test_the_authors_variant_is_their_routing_written_with_loops():
    """Their code routes twice: conv outputs with zero logits over the types, then procedure 1."""
    rng = np.random.default_rng(0)
    net = model.CapsNet(
        (8, 8, 1), 3, 5, 4, 3, 6, kernel_size=3, decoder_units=(6,), variant="authors"
    )
    for v in net.trainable_variables:
        v.assign(rng.normal(0, 0.5, v.shape))
    images = rng.random((2, 8, 8, 1), np.float32)
    channels = tf.nn.conv2d(net.conv1(images), net.primary.kernel.value, 2, "VALID").numpy()
    rows, columns = channels.shape[1:3]

    def squashed(s):
        squared = (s**2).sum(-1, keepdims=True)
        return s * np.sqrt(squared) / (1 + squared)

    bias = net.primary.bias.numpy().reshape(4, 3)
    for n in range(2):
        u = np.empty((rows, columns, 4, 3))
        for y, x in np.ndindex(rows, columns):
            logits = np.zeros(4)
            coupling = np.exp(logits) / np.exp(logits).sum()  # a softmax over the types
            for t in range(4):
                u[y, x, t] = squashed(coupling[t] * channels[n, y, x].reshape(4, 3)[t] + bias[t])
        u = u.reshape(-1, 3)
        w, b = net.digits.W.numpy(), np.zeros((len(u), 3))
        votes = np.einsum("jicd,ic->ijd", w, u)
        for _ in range(3):
            c = np.exp(b) / np.exp(b).sum(1, keepdims=True)
            v = squashed(np.einsum("ij,ijd->jd", c, votes) + net.digits.bias.numpy())
            b += np.einsum("ijd,jd->ij", votes, v)
        np.testing.assert_allclose(net(images)[1][n], v, atol=1e-5)


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="paper.*authors.*Received: variant='x'"):
        model.CapsNet((28, 28, 1), 10, variant="x")
