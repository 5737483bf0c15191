"""The convolutional networks that the paper compares the CapsNet with."""

import math

import numpy as np
import pytest
import tensorflow as tf

from capsnet import networks
from capsnet.cnn import CNN
from capsnet.networks import CNN_LAYERS, CNNConfig


@pytest.fixture(autouse=True)
def seeded():
    tf.keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small network under the name of one of the paper's."""
    layers = networks.Layers(((6, 5, True), (4, 4, False)), (9, 7), 0.5)
    monkeypatch.setitem(CNN_LAYERS, "affine", layers)


def spectra_of(network):
    return network.inference(lambda function: function).prepare()


PAPER = dict(CNN_LAYERS)


@pytest.mark.parametrize(
    "architecture, side, layers, parameters, dropout",
    [
        # Section 5: 35.4M parameters. Inputs, with the bias, times outputs of each layer.
        (
            "mnist",
            28,
            ((25, 256), (6400, 256), (6400, 128), (100352, 328), (328, 192), (192, 10)),
            (35.35e6, 35.45e6),
            0.5,
        ),
        # Section 6.1: 24.56M; 36×36 pixels are pooled to 18×18 and 9×9.
        (
            "multi",
            36,
            ((81, 512), (12800, 256), (81 * 256, 1024), (1024, 10)),
            (24.555e6, 24.565e6),
            0.0,
        ),
        # Section 5.2: about as many as the CapsNet without its decoder.
        (
            "affine",
            40,
            ((25, 256), (6400, 256), (6400, 128), (100 * 128, 720), (720, 10)),
            (0.95 * 11_227_904, 1.05 * 11_227_904),
            0.5,
        ),
    ],
)
def test_the_baselines_have_the_papers_parameters_and_dropout(
    architecture, side, layers, parameters, dropout, monkeypatch
):
    monkeypatch.setitem(CNN_LAYERS, architecture, PAPER[architecture])
    config = CNNConfig((side, side, 1), 10, architecture)
    counts = [count for *_, count in config.sizes()]
    assert counts == [(inputs + 1) * outputs for inputs, outputs in layers]
    assert parameters[0] <= sum(counts) <= parameters[1]
    assert config.layers.dropout == dropout


def test_the_sizes_are_those_of_the_network():
    net = CNN((12, 10, 1), 5, "affine")
    sizes = net.config.sizes()
    assert [name for name, *_ in sizes] == list(net.parts())
    for (_, _, count), layer in zip(sizes, net.parts().values(), strict=True):
        assert count == layer.count_params()


def test_the_authors_cnn_is_their_baseline_of_overlapping_digits_with_dropout():
    assert CNN_LAYERS["authors"] == CNN_LAYERS["multi"]._replace(dropout=0.5)


def test_the_capsnet_on_the_affine_canvas_has_the_parameters_compared_with():
    sizes = networks.CapsNetConfig((40, 40, 1), 10).sizes()
    assert sum(count for _, _, count in sizes[:3]) == 11_227_904


@pytest.mark.parametrize("conv", ["direct", "dft"])
def test_the_network_is_the_librarys_convolutions_pooling_and_layers(conv):
    net = CNN((12, 10, 1), 5, "affine", conv=conv)
    for variable in net.variables:  # biases of zero would hide a missing bias
        variable.assign(variable + 0.01)
    images = np.random.default_rng(0).random((3, 12, 10, 1), np.float32)
    x = images
    for layer, pooled in zip(net.convolutions, (True, False), strict=True):
        x = tf.nn.relu(tf.nn.conv2d(x, layer.kernel.value, 1, "SAME") + layer.bias.value)
        x = tf.nn.max_pool2d(x, 2, 2, "VALID") if pooled else x
    x = tf.reshape(x, (3, -1)).numpy()
    for layer in net.hidden[:-1]:
        x = np.maximum(x @ layer.kernel.numpy() + layer.bias.numpy(), 0)
    logits = x @ net.hidden[-1].kernel.numpy() + net.hidden[-1].bias.numpy()
    np.testing.assert_allclose(net.logits(images), logits, atol=1e-5)
    np.testing.assert_allclose(net.logits(images, spectra=spectra_of(net)), logits, atol=1e-5)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(net(images), expected, atol=1e-5)


def test_dropout_keeps_or_doubles_each_unit_by_seed_and_step():
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
    np.testing.assert_allclose(one[active][kept], 2 * at_rest[active][kept], rtol=1e-5)
    assert abs(kept.mean() - 0.5) < 0.06
    assert 0.3 < (kept != (other[active] != 0)).mean() < 0.7


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
    inference = net.inference(tf.function)
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
    assert bool(outputs.correct[0])
    assert not outputs.correct.numpy().all()


def test_digits_are_placed_in_the_middle_of_a_larger_canvas_before_they_are_shifted():
    net = CNN((16, 16, 1), 5, "affine")
    images = np.random.default_rng(1).integers(0, 256, (3, 1, 12, 12, 1), np.uint8)
    outputs = net.outputs(batch_of(images, np.zeros((3, 1), np.int32), shift=1))
    canvas = np.zeros((3, 16, 16, 1), np.float32)
    canvas[:, 3:15, 3:15] = images[:, 0] / 255
    np.testing.assert_allclose(outputs.scores, net(canvas), atol=1e-6)
