"""Evaluations, against a loop over single examples."""

import keras
import numpy as np
import pytest
from engine import CLASSES, blobs, network

import training.evaluation
from model import CapsNet
from training.evaluation import Evaluator


def evaluate_alone(net, data, index, shift):
    """Return lengths, whether the labels are right, and both losses of one example, by loops."""
    _, height, width, _ = data.images.shape
    canvas = np.zeros((len(index), height + 2 * data.padding, width + 2 * data.padding, 1))
    for k, (number, (down, right)) in enumerate(zip(index, shift, strict=True)):
        for y, x in np.ndindex(height, width):
            row, column = y + data.padding + down, x + data.padding + right
            if 0 <= row < canvas.shape[1] and 0 <= column < canvas.shape[2]:
                canvas[k, row, column] = data.images[number, y, x] / 255
    image = np.minimum(canvas.sum(axis=0), 1).astype(np.float32)
    lengths, capsules = (part.numpy()[0] for part in net(image[None]))
    labels = [int(data.labels[number]) for number in index]
    margin = sum(
        max(0, 0.9 - length) ** 2 if j in labels else 0.5 * max(0, length - 0.1) ** 2
        for j, length in enumerate(lengths.astype(float))
    )
    reconstruction = 0.0
    for k, label in enumerate(labels):
        x = np.where(np.arange(3)[:, None] == label, capsules, 0).reshape(1, -1)
        for layer in (*net.decoder.hidden, net.decoder.pixels):
            x = layer(x)
        reconstruction += np.square(x.numpy().reshape(canvas[k].shape) - canvas[k]).sum()
    predicted = set(np.argsort(-lengths)[: len(labels)].tolist())
    return lengths, predicted == set(labels), margin, reconstruction


@pytest.mark.parametrize("overlap, jit", [(False, True), (True, False)])
def test_an_evaluation_of_a_capsule_network_equals_a_loop_over_single_examples(
    overlap, jit, monkeypatch
):
    monkeypatch.setattr(training.evaluation, "BATCH_SIZE", 16)
    n, data = 45, blobs(45, overlap)
    keras.utils.set_random_seed(0)
    net = CapsNet(data.canvas_shape(), 3, 5, 2, 3, 4, 2, 3, (6,), conv="dft")
    # As if it had learned a little: the capsules of so small a network are short at first.
    net.primary.kernel.assign(4 * net.primary.kernel)
    net.digits.W.assign(10 * net.digits.W)
    plan = data.evaluation_plan()
    evaluation = Evaluator(net, jit).evaluate(data, plan)
    alone = [evaluate_alone(net, data, *row) for row in zip(*plan, strict=True)]
    lengths, correct, margin, reconstruction = map(np.array, zip(*alone, strict=True))
    assert len(evaluation.scores) == n and 0 < correct.sum() < n
    np.testing.assert_allclose(evaluation.scores, lengths, atol=1e-5)
    np.testing.assert_array_equal(evaluation.correct, correct)
    assert evaluation.accuracy == pytest.approx(correct.sum() / n)
    assert evaluation.losses == {
        "margin": pytest.approx(margin.mean(), rel=1e-4),
        "reconstruction": pytest.approx(reconstruction.mean(), rel=1e-4),
    }
    np.testing.assert_array_equal(evaluation.labels, data.labels[plan.index])
    if overlap:  # an example with one of two digits right is wrong
        pairs = zip(evaluation.predictions, evaluation.labels, strict=True)
        shared = [len({*p} & {*y}) for p, y in pairs]
        assert 1 in shared and 2 in shared
        np.testing.assert_array_equal(evaluation.correct, np.array(shared) == 2)


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(network(seed=3), jit=False)


@pytest.mark.parametrize("n", [1, 16, 17, 48])
def test_every_example_is_counted_once_in_the_order_of_the_plan(n, evaluator, monkeypatch):
    monkeypatch.setattr(training.evaluation, "BATCH_SIZE", 16)
    data, done = blobs(60), []
    order = np.random.default_rng(n).permutation(60)[:n]
    plan = data.evaluation_plan().take(order)
    evaluation = evaluator.evaluate(data, plan, on_batch=done.append)
    hidden, logits, pixels = network(seed=3).layers
    scores, entropies, errors = [], [], []
    for number in order:
        x = data.images[number].reshape(1, 64).astype(np.float32) / 255
        features = hidden(x)
        scores.append(logits(features).numpy()[0])
        odds = np.exp(scores[-1].astype(float))
        entropies.append(-np.log(odds[data.labels[number]] / odds.sum()))
        errors.append(np.square(pixels(features) - x).sum())
    predictions = np.argmax(scores, axis=1)
    np.testing.assert_allclose(evaluation.scores, scores, atol=1e-6)
    np.testing.assert_array_equal(evaluation.predictions, predictions[:, None])
    np.testing.assert_array_equal(evaluation.labels, data.labels[order][:, None])
    np.testing.assert_array_equal(evaluation.correct, predictions == data.labels[order])
    assert evaluation.correct.dtype == bool
    assert evaluation.accuracy == np.mean(predictions == data.labels[order])
    assert evaluation.losses["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert evaluation.losses["reconstruction"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert done == [min(n, 16 * (number + 1)) for number in range(-(-n // 16))]


def test_the_spectra_are_those_of_the_weights_at_each_evaluation():
    net, data = network(), blobs(12)
    evaluator = Evaluator(net, jit=False)
    before = evaluator.evaluate(data, data.evaluation_plan())
    net.set_weights(network(seed=1).get_weights())
    after = evaluator.evaluate(data, data.evaluation_plan())
    fresh = Evaluator(network(seed=1), jit=False).evaluate(data, data.evaluation_plan())
    np.testing.assert_array_equal(after.scores, fresh.scores)
    assert np.abs(after.scores - before.scores).max() > 0.01
    assert after.scores.shape == (12, len(CLASSES))
