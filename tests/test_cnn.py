"""The convolutional networks that the paper compares the CapsNet with."""

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import (
    assert_close,
    assert_glorot_uniform,
    assert_truncated_normal,
    convolved,
    randomized,
)

from capsnet_core import networks
from capsnet_core.cnn import CNN
from capsnet_core.networks import CNN_LAYERS


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small network under the name of one of the paper's."""
    layers = networks.Layers(((6, 5, True), (4, 4, False)), (9, 7), 0.5)
    monkeypatch.setitem(CNN_LAYERS, "affine", layers)


def logits_of(network, images):
    """Compute the logits with loops: the image is padded, and each 2×2 pixels are pooled."""
    x = np.float64(images)
    layers = network.config.layers.convolutions
    for layer, (_, side, pooled) in zip(network.convolutions, layers, strict=True):
        padded = np.pad(
            x, ((0, 0), ((side - 1) // 2, side // 2), ((side - 1) // 2, side // 2), (0, 0))
        )
        x = np.maximum(convolved(padded, layer.kernel.numpy(), 1) + layer.bias.numpy(), 0)
        if pooled:
            n, rows, columns, channels = x.shape
            pixels = np.zeros((n, rows // 2, columns // 2, channels))
            for i, y, z, c in np.ndindex(*pixels.shape):
                pixels[i, y, z, c] = x[i, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2, c].max()
            x = pixels
    x = x.reshape(len(x), -1)
    for layer in network.hidden:
        x = x @ np.float64(layer.kernel.numpy()) + layer.bias.numpy()
        x = x if layer is network.hidden[-1] else np.maximum(x, 0)
    return x


def spectra_of(network):
    return network.inference(lambda function: function).prepare()


@pytest.mark.parametrize("conv", ["direct", "dft"])
def test_the_network_is_convolutions_pooling_and_layers_written_with_loops(conv):
    rng = np.random.default_rng(0)
    net = randomized(CNN((12, 10, 1), 5, "affine", conv=conv), rng)
    images = rng.random((2, 12, 10, 1), np.float32)
    logits = logits_of(net, images)
    assert_close(net.logits(images), logits)
    assert_close(net.logits(images, spectra=spectra_of(net)), logits)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert_close(net(images), expected)
    assert_close(net.serve(images)["probabilities"], expected)
    assert set(net.serve(images, 2)) == {"probabilities"}


def test_the_convolutions_of_the_network_are_padded_and_pooled_as_those_of_the_library():
    net = randomized(CNN((12, 10, 3), 5, "affine"), np.random.default_rng(0))
    images = x = np.random.default_rng(1).random((3, 12, 10, 3), np.float32)
    for layer, pooled in zip(net.convolutions, (True, False), strict=True):
        x = tf.nn.relu(tf.nn.conv2d(x, layer.kernel.value, 1, "SAME") + layer.bias.value)
        x = tf.nn.max_pool2d(x, 2, 2, "VALID") if pooled else x
    x = tf.reshape(x, (3, -1))
    for layer in net.hidden:
        x = layer(x)
    assert_close(net.logits(images), x)


def test_dropout_drops_or_scales_each_unit_by_seed_and_step(monkeypatch):
    monkeypatch.setitem(CNN_LAYERS, "affine", CNN_LAYERS["affine"]._replace(dropout=0.25))
    net = CNN((12, 12, 1), 5, "affine")
    images = np.random.default_rng(0).random((400, 12, 12, 1), np.float32)
    net.hidden[-1].kernel.assign(np.eye(7, 5))  # so the logits show five units of the layer
    net.hidden[-2].bias.assign(np.ones(7))  # and most of them are active
    at_rest = net.logits(images).numpy()
    active = at_rest > 1e-3
    one, other, again, seeded = (
        net.logits(images, seed=tf.constant(seed)).numpy()
        for seed in ([3, 4], [3, 5], [3, 4], [4, 4])
    )
    np.testing.assert_array_equal(one, again)
    assert (seeded != one).any()
    kept = one[active] != 0
    np.testing.assert_allclose(one[active][kept], at_rest[active][kept] / 0.75, rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.06
    assert 0.25 < (kept != (other[active] != 0)).mean() < 0.5  # of 2 · 0.75 · 0.25


def test_a_network_without_dropout_drops_nothing(monkeypatch):
    monkeypatch.setitem(CNN_LAYERS, "affine", CNN_LAYERS["affine"]._replace(dropout=0.0))
    net, images = CNN((12, 12, 1), 5, "affine"), np.ones((4, 12, 12, 1), np.float32)
    assert np.array_equal(net.logits(images, seed=tf.constant([3, 4])), net.logits(images))


def batch_of(images, labels, digits=1, shift=0):
    """Return a batch of images (B, K, H, W, 1), all shifted down and right by some pixels."""
    shifts = np.full((len(images), digits, 2), shift, np.int32)
    return images, shifts, labels, np.ones(len(images), np.float32)


def test_units_are_dropped_in_training_and_never_in_an_evaluation():
    net = CNN((12, 12, 1), 5, "affine")
    images = np.random.default_rng(1).integers(0, 256, (40, 1, 12, 12, 1), np.uint8)
    batch = batch_of(images, np.zeros((40, 1), np.int32))
    probabilities = net(images[:, 0].astype(np.float32) / 255).numpy()
    training = net.outputs(batch, tf.constant([0, 2])).scores.numpy()
    assert np.abs(training - probabilities).max() > 1e-3
    np.testing.assert_allclose(net.outputs(batch).scores, probabilities, atol=1e-6)
    inference = net.inference(lambda function: function)
    evaluated = inference.outputs(batch, inference.prepare()).scores
    np.testing.assert_allclose(evaluated, probabilities, atol=1e-6)


@pytest.mark.parametrize("digits", [1, 2])
def test_losses_and_predictions_agree_with_their_formulas(digits):
    net = CNN((12, 12, 1), 5, "affine", digits)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6, digits, 12, 12, 1), np.uint8)
    labels = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2]], np.int32)[:, :digits]
    logits = net.logits(np.minimum(images.sum(axis=1) / 255, 1).astype(np.float32)).numpy()
    labels[0] = np.argsort(-logits[0])[:digits][::-1]  # one that is right, in another order
    outputs = net.outputs(batch_of(images, labels, digits))
    (cross_entropy,) = net.loss_terms(outputs).values()
    assert list(net.loss_terms(outputs)) == list(net.config.loss_terms)
    for n in range(6):
        if digits == 1:
            total = sum(math.exp(z) for z in logits[n])
            expected = math.log(total) - logits[n, labels[n, 0]]
            scores = [math.exp(z) / total for z in logits[n]]
        else:
            signs = [-1 if j in labels[n] else 1 for j in range(5)]
            expected = sum(
                math.log(1 + math.exp(s * z)) for s, z in zip(signs, logits[n], strict=True)
            )
            scores = [1 / (1 + math.exp(-z)) for z in logits[n]]
        assert float(cross_entropy[n]) == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(outputs.scores[n], scores, atol=1e-5)
        best = np.argsort(-logits[n])[:digits]
        assert outputs.predictions[n].numpy().tolist() == best.tolist()
        assert bool(outputs.correct[n]) == (set(best) == set(labels[n]))
    together = [sum(row) == pytest.approx(1, abs=1e-5) for row in outputs.scores.numpy()]
    assert together == [digits == 1] * 6  # a softmax, or a sigmoid for each class
    assert bool(outputs.correct[0])
    assert not outputs.correct.numpy().all()


def test_digits_are_placed_in_the_middle_of_a_larger_canvas_before_they_are_shifted():
    net = CNN((16, 16, 1), 5, "affine")
    images = np.random.default_rng(1).integers(0, 256, (3, 1, 12, 12, 1), np.uint8)
    outputs = net.outputs(batch_of(images, np.zeros((3, 1), np.int32), shift=1))
    canvas = np.zeros((3, 16, 16, 1), np.float32)
    canvas[:, 3:15, 3:15] = images[:, 0] / 255
    np.testing.assert_allclose(outputs.scores, net(canvas), atol=1e-6)


# --- Inference -----------------------------------------------------------------------------------


def test_inference_prepares_all_kernels_and_uses_what_it_prepared_in_place_of_them():
    net = CNN((12, 12, 5), 5, "affine", conv="dft")
    images = np.random.default_rng(1).integers(0, 256, (3, 1, 12, 12, 5), np.uint8)
    batch = batch_of(images, np.zeros((3, 1), np.int32))
    expected, compiled = net.outputs(batch), []
    inference = net.inference(lambda function: compiled.append(function) or function)
    prepared = inference.prepare()
    for spectrum, layer in zip(prepared, net.convolutions, strict=True):
        assert np.array_equal(spectrum, layer.spectrum())
        layer.kernel.assign(0 * layer.kernel)
    for one, other in zip(inference.outputs(batch, prepared), expected, strict=True):
        assert np.array_equal(one, other)
    assert len(compiled) == 2  # the transforms and the network
    assert not np.allclose(net.outputs(batch).scores, expected.scores)


def test_a_network_that_convolves_directly_prepares_nothing():
    assert spectra_of(CNN((12, 12, 5), 5, "affine")) == (None, None)


@pytest.mark.parametrize("conv", ["direct", "dft"])
def test_in_mixed_precision_logits_losses_and_weights_stay_float32(conv):
    rng = np.random.default_rng(1)
    exact = CNN((12, 12, 5), 5, "affine", conv=conv)
    mixed = CNN((12, 12, 5), 5, "affine", conv=conv, dtype="mixed_bfloat16")
    mixed.set_weights(exact.get_weights())
    images = rng.integers(0, 256, (6, 1, 12, 12, 5), np.uint8)
    batch = batch_of(images, rng.integers(0, 5, (6, 1), np.int32))
    inference = mixed.inference(lambda function: function)
    for outputs in (mixed.outputs(batch), inference.outputs(batch, inference.prepare())):
        assert outputs.scores.dtype == outputs.cross_entropy.dtype == tf.float32
        assert_close(outputs.scores, exact.outputs(batch).scores, 0.05)
        assert np.abs(outputs.scores - exact.outputs(batch).scores).max() > 0
    assert {v.dtype for v in mixed.variables} == {"float32"}
    assert mixed.logits(images[:, 0] / np.float32(255)).dtype == tf.float32


# --- First weights and saving --------------------------------------------------------------------


def test_the_variables_have_the_paths_that_checkpoints_know():
    names = ("conv1", "conv2", "dense1", "dense2", "dense3")
    expected = [f"{name}/{part}" for name, part in itertools.product(names, ("kernel", "bias"))]
    assert [v.path for v in CNN((12, 12, 1), 5, "affine").variables] == expected


@pytest.mark.parametrize("initialization", ["glorot", "authors"])
def test_first_weights_are_glorots_or_those_of_the_authors(initialization, monkeypatch):
    layers = networks.Layers(((40, 5, True), (40, 4, False)), (40, 40), 0.5)
    monkeypatch.setitem(CNN_LAYERS, "affine", layers)
    net = CNN((12, 12, 1), 20, "affine", initialization=initialization)
    for layer in (*net.convolutions, *net.hidden):
        kernel, bias = layer.kernel.numpy(), layer.bias.numpy()
        if initialization == "glorot":
            assert_glorot_uniform(kernel)
        else:
            assert_truncated_normal(kernel, 0.05 if layer.name == "conv1" else 0.1)
        assert np.array_equal(bias, np.full_like(bias, 0 if initialization == "glorot" else 0.1))


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # inside Keras
def test_a_network_saved_by_keras_is_loaded_with_the_same_outputs(tmp_path):
    options = {"conv": "dft", "initialization": "authors"}
    net = randomized(CNN((12, 12, 1), 5, "affine", 2, **options), np.random.default_rng(0))
    net.save(tmp_path / "cnn.keras")
    loaded = keras.saving.load_model(tmp_path / "cnn.keras")
    assert type(loaded) is CNN and loaded.get_config() == net.get_config()
    assert loaded.config == net.config and (loaded.conv, loaded.initialization) == (
        "dft",
        "authors",
    )
    images = np.random.default_rng(1).random((2, 12, 12, 1), np.float32)
    assert np.array_equal(loaded(images), net(images))
