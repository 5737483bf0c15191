"""The network of the paper: its outputs, inference, reconstructions and first weights."""

import functools
import json
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
from capsnet_core.cnn import CNN
from capsnet_core.convolution import Direct, Patches, Spectral
from capsnet_core.errors import ImageTooSmall
from capsnet_core.networks import CapsNetConfig, CNNConfig
from model import CapsNet

OLD_RUN = Path(__file__).parent / "fixtures" / "old_run"
# The sizes of a CapsNet, each with another value than the default.
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


def uncompiled(function):
    return function


@functools.cache
def built(**changes):
    """Build a network once: `random_network` draws all its weights for each test."""
    return CapsNet(**TINY | changes)


def random_network(rng, **changes):
    return randomized(built(**changes), rng)


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


@pytest.mark.parametrize("conv, iterations", [("direct", 3), ("dft", 1), ("dft", 3)])
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
    optimizer.build(variables)

    @functools.partial(tf.function, autograph=False)
    def step():
        with tf.GradientTape() as tape:
            terms = network.loss_terms(network.outputs(batch))
            loss = tf.reduce_mean(terms["margin"] + 0.005 * terms["reconstruction"])
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    before = network.outputs(batch)
    for _ in range(70):
        step()
    after = network.outputs(batch)
    assert np.mean(before.correct) < 0.6 and np.mean(after.correct) == 1
    for name in ("margin_loss", "reconstruction_loss"):
        assert np.mean(getattr(after, name)) < 0.8 * np.mean(getattr(before, name))


# --- Outputs of a batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv, k, padding", [("direct", 1, 4), ("direct", 2, 0), ("dft", 1, 0), ("dft", 2, 4)]
)
def test_the_outputs_of_a_batch_are_those_computed_by_hand(rng, conv, k, padding):
    network = random_network(rng, conv=conv, image_shape=(13, 15, 2))
    batch = random_batch(rng, 4, k, padding, (13, 15, 2))
    digits, shift, labels, _ = batch
    assert digits.shape == (4, k, 13 - 2 * padding, 15 - 2 * padding, 2)
    outputs = network.outputs(batch)
    canvas, shifted = composed(digits, shift, padding)
    assert canvas.shape == (4, 13, 15, 2)
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
    squared_errors = np.zeros(4)
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
    terms = built().loss_terms(outputs)
    assert list(terms) == ["margin", "reconstruction"]
    np.testing.assert_allclose(terms["margin"], [0.5 * (0.4**2 + 0.2**2), 0.9**2], rtol=1e-3)
    assert terms["reconstruction"].shape == (2,)
    assert terms["reconstruction"][1].numpy() == pytest.approx(198 * 0.25)
    assert terms["reconstruction"] is outputs.reconstruction_loss


def test_the_names_of_the_loss_terms_are_those_of_the_terms_in_their_order(rng):
    network = random_network(rng)
    terms = network.loss_terms(network.outputs(random_batch(rng, 2)))
    assert network.config.loss_terms == ("margin", "reconstruction") == tuple(terms)


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


def test_the_seed_of_training_changes_nothing(rng):
    network, batch = random_network(rng), random_batch(rng, 3)
    for one, other in zip(network.outputs(batch), network.outputs(batch, [0, 7]), strict=True):
        assert np.array_equal(one, other)


# --- Inference -----------------------------------------------------------------------------------


def test_inference_prepares_both_kernels_and_uses_what_it_prepared_in_place_of_them(rng):
    network = random_network(rng, image_shape=(9, 11, 5), conv="dft")
    batch = random_batch(rng, 3, image_shape=(9, 11, 5))
    expected, inference = network.outputs(batch), network.inference(uncompiled)
    prepared = inference.prepare()
    assert np.array_equal(prepared[0], network.conv1.spectrum())
    assert np.array_equal(prepared[1], network.primary.spectrum())
    for layer in (network.conv1, network.primary):
        layer.kernel.assign(0 * layer.kernel)
    for one, other in zip(inference.outputs(batch, prepared), expected, strict=True):
        assert np.array_equal(one, other)
    for outputs in (network.outputs(batch), inference.outputs(batch, inference.prepare())):
        assert not np.allclose(outputs.lengths, expected.lengths)


def test_a_network_that_convolves_directly_prepares_nothing():
    assert built().inference(uncompiled).prepare() == (None, None)


@pytest.mark.parametrize("conv", ops.CONV_METHODS)
def test_inference_gives_the_outputs_of_training_in_two_compiled_parts_and_in_chunks_on_a_cpu(
    rng, monkeypatch, conv
):
    """The parts by their shapes: images, the largest product in between, and the capsules."""
    network, parts = random_network(rng, image_shape=(9, 11, 5), conv=conv), []
    routed, routing = [], ops.routing
    monkeypatch.setattr(
        ops, "routing", lambda *a, **k: routed.append(a[0].shape[0]) or routing(*a, **k)
    )

    def compile_part(function):
        compiled = tf.function(function, jit_compile=conv == "dft", autograph=False)

        def call(*arguments):
            parts.append(([argument.shape for argument in arguments], compiled(*arguments)))
            return parts[-1][1]

        return call

    batch, inference = random_batch(rng, 32, 2, 0, (9, 11, 5)), network.inference(compile_part)
    expected, outputs = network.outputs(batch), inference.outputs(batch, inference.prepare())
    (nothing, spectra), ([first], factors), ([products], last) = parts
    assert nothing == [] and first == expected.canvas.shape and last is outputs.capsules
    assert network.primary.multiply(factors, spectra[1]).shape == products
    for name, actual in outputs._asdict().items():
        assert_close(actual, getattr(expected, name))
    # Training routes all 32 at once; the loop over chunks is traced once.
    assert routed == [32, 16 if conv == "dft" else 32]


# --- Reconstructions -----------------------------------------------------------------------------


def test_images_are_reconstructed_from_their_longest_capsules_or_from_those_of_classes(rng):
    network, images = random_network(rng), random_images(rng, 3)
    lengths, capsules = (output.numpy() for output in network(images))
    longest, others = lengths.argmax(axis=1), (lengths.argmax(axis=1) + 1) % 4
    for classes in (longest, others):
        expected = decoded(network.decoder, capsules, classes)
        for given in (classes, list(map(int, classes)), tf.constant(classes)):
            assert_close(network.reconstruct(images, classes=given), expected)
            assert_close(network.reconstruct(capsules=capsules, classes=given), expected)
    expected = decoded(network.decoder, capsules, longest)
    assert_close(network.reconstruct(images), expected)
    assert_close(network.reconstruct(capsules=capsules), expected)
    whole = np.arange(60).reshape(3, 4, 5) % 3 - 1  # integers, as written by hand
    expected = decoded(network.decoder, whole, others)
    assert_close(network.reconstruct(capsules=whole, classes=others), expected)
    assert_close(network.reconstruct(capsules=whole.tolist(), classes=others), expected)


@pytest.mark.parametrize(
    "classes",
    [[0], [0, 1, 2], 1, [[0], [1]], np.eye(4)[:2], [0.0, 1.0], [0, 4], [-1, 0], ["0", "1"]],
    ids=str,
)
def test_classes_that_are_no_numbers_of_capsules_are_refused(classes):
    with pytest.raises(ValueError, match="classes must be 2 integers from 0 to 3. Received: cl"):
        built().reconstruct(capsules=np.zeros((2, 4, 5), np.float32), classes=classes)


def test_what_cannot_be_reconstructed_is_refused(rng):
    network, images = built(), random_images(rng, 2)
    capsules = network(images)[1]
    for given in ({}, {"images": images, "capsules": capsules}):
        with pytest.raises(ValueError, match="give either images or capsules"):
            network.reconstruct(**given)
    for wrong in (capsules[0], capsules[:, :3], capsules[..., :4], capsules[None]):
        with pytest.raises(ValueError, match=r"shape \(B, 4, 5\). Received: capsules.shape=\("):
            network.reconstruct(capsules=wrong)
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 9, 11, 2\)"):
        network.reconstruct(images[..., :1])


@pytest.mark.parametrize("k", [1, 2])
def test_an_exported_network_serves_lengths_capsules_and_the_k_longest_reconstructed(rng, k):
    network, images = random_network(rng), random_images(rng, 3)
    served, (lengths, capsules) = network.serve(images, k), network(images)
    assert set(served) == {"lengths", "capsules", "reconstructions"}
    assert np.array_equal(served["lengths"], lengths)
    assert np.array_equal(served["capsules"], capsules)
    assert served["reconstructions"].shape == (3, k, *TINY["image_shape"])
    for place, classes in enumerate(np.argsort(-lengths.numpy(), axis=1)[:, :k].T):
        expected = decoded(network.decoder, capsules, classes)
        assert_close(served["reconstructions"][:, place], expected)
    assert np.array_equal(
        network.serve(images)["reconstructions"][:, 0], network.reconstruct(images)
    )


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
    network, batch = CapsNet(**TINY, conv=conv, dtype="mixed_bfloat16"), random_batch(rng, 4)
    network.primary.kernel.assign(5 * network.primary.kernel)
    expected, inference = network.outputs(batch), network.inference(uncompiled)
    spectra = inference.prepare()
    features = network.conv1(composed(batch[0], batch[1], 0)[0])
    factors = network.primary.prepare(features, spectra[1])
    assert network.primary.multiply(factors, spectra[1]).dtype == tf.bfloat16
    outputs = inference.outputs(batch, spectra)
    assert outputs.lengths.dtype == outputs.capsules.dtype == tf.float32
    assert_close(outputs.lengths, expected.lengths, tolerance)
    assert conv == "direct" or np.abs(outputs.lengths - expected.lengths).max() > 0


def test_in_mixed_precision_all_layers_have_the_policy_of_the_network():
    network = CapsNet(**TINY, dtype="mixed_bfloat16")
    layers = (network.conv1, network.primary, network.digits, network.decoder)
    assert {layer.dtype_policy.name for layer in layers} == {"mixed_bfloat16"}


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


def test_a_network_is_built_from_arguments_or_from_a_config_with_the_same_first_weights():
    config = CapsNetConfig((28, 28, 1), 10, n_conv=8, n_primary=2, decoder_units=(4,))
    settings = config.describe()
    assert settings.pop("network") == "capsnet"

    def made(build):
        keras.utils.set_random_seed(3)
        return build()

    networks = [
        made(lambda: CapsNet((28, 28, 1), 10, n_conv=8, n_primary=2, decoder_units=(4,))),
        made(lambda: CapsNet(**settings)),
        made(lambda: CapsNet(**json.loads(json.dumps(settings)))),
        made(lambda: model.build(config)),
    ]
    for network in networks:
        assert type(network) is CapsNet and network.config == config
        for one, other in zip(network.variables, networks[0].variables, strict=True):
            assert one.path == other.path and np.array_equal(one, other)


def test_a_config_is_built_into_the_network_that_it_is_of_with_the_options():
    options = {"conv": "dft", "initialization": "authors", "dtype": "mixed_bfloat16"}
    configs = CapsNetConfig(**TINY), CNNConfig((8, 8, 1), 3, "affine")
    for config, kind in zip(configs, (CapsNet, CNN), strict=True):
        network = model.build(config, **options)
        assert type(network) is kind and network.config == config
        assert (network.conv, network.initialization) == ("dft", "authors")
        assert network.dtype_policy.name == "mixed_bfloat16"


def test_unknown_settings_and_values_are_refused_with_the_known_ones():
    with pytest.raises(TypeError, match="n_kernels"):
        CapsNet(**TINY, n_kernels=8)
    for name, known in (
        ("variant", "paper.*authors"),
        ("conv", "direct.*dft"),
        ("initialization", "glorot.*authors"),
    ):
        with pytest.raises(ValueError, match=f"{known}.*Received: (method|{name})='x'"):
            CapsNet(**TINY, **{name: "x"})


@pytest.mark.parametrize("shape", [(16, 30, 1), (30, 16, 3)])
def test_images_too_small_for_two_convolutions_are_refused_with_the_sizes(shape):
    with pytest.raises(ImageTooSmall, match=r"two 9×9 .* at least 17×17 pixels.") as caught:
        CapsNet(shape, 10)
    assert caught.value.smallest == 17 and caught.value.image_shape == shape
    assert f"Received: image_shape={shape}" in str(caught.value)


def test_a_network_rebuilt_from_its_configuration_has_every_argument_of_its_constructor():
    changes = {"variant": "authors", "none_of_the_above": True}
    arguments = {**TINY, **changes, "conv": "dft", "initialization": "authors"}
    defaults = CapsNetConfig((28, 28, 1), 10).describe()
    assert set(defaults) - {"network"} == set(TINY) | set(changes)
    assert all(arguments[name] != value for name, value in defaults.items() if name != "network")
    network = CapsNet(**arguments, dtype="mixed_bfloat16")
    config = network.get_config()
    assert {name: config[name] for name in arguments} == arguments
    rebuilt = CapsNet.from_config(config)
    assert rebuilt.config == network.config and rebuilt.get_config() == config
    assert rebuilt.dtype_policy.name == "mixed_bfloat16"
    assert (rebuilt.primary.method, rebuilt.conv1.method) == ("dft", "dft")
    assert rebuilt.digits.none_of_the_above and rebuilt.digits.use_bias


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


# --- The authors' variant ------------------------------------------------------------------------


def test_the_authors_variant_has_a_bias_in_routing_and_weak_primary_capsules(rng):
    options = {"variant": "authors", "initialization": "authors", "decoder_units": ()}
    net = CapsNet((28, 28, 1), 2, **options)
    np.testing.assert_array_equal(net.digits.bias, np.full((2, 16), 0.1, np.float32))
    # The first capsules are short, and would be saturated without the division by the types.
    features = net.conv1(random_images(rng, 2, (28, 28, 1)))
    lengths = np.linalg.norm(net.primary(features), axis=-1)
    net.primary.coupling = None
    assert lengths.mean() < 0.3 < 0.9 < np.linalg.norm(net.primary(features), axis=-1).mean()


def test_the_authors_variant_is_their_routing_written_with_loops(rng):
    """Their code routes twice: conv outputs with zero logits over the types, then procedure 1."""
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
