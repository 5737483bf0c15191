import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import model
import ops
import utils
from utils import Plan, UserError

ROOT = Path(__file__).parent.parent
SIZES = {"n_conv": 5, "n_primary": 2, "primary_dim": 3, "digit_dim": 4, "kernel_size": 3,
         "decoder_units": (6,), "routing_iterations": 2}
SCALARS = ["loss/total", "loss/margin", "loss/reconstruction", "accuracy"]


def blobs(n, overlap=False, seed=0):
    """Images 8×8 of three classes, each a bright corner in noise."""
    dice = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = dice.integers(0, 60, (n, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[4 * (label // 2):][:4, 4 * (label % 2):][:, :4] += 180
    return model.Data(images, labels, 2 if overlap else 0, 1, overlap, ("a", "b", "c"))


def network(data, seed=0, **changes):
    keras.utils.set_random_seed(seed)
    net = model.CapsNet(data.canvas_shape(), 3, **SIZES | {"conv": "dft"} | changes)
    # As if it had learned a little: the capsules of so small a network are short at first.
    net.primary.kernel.assign(4 * net.primary.kernel)
    net.digits.W.assign(10 * net.digits.W)
    return net


def trainer_in(folder, jit=False, n=45, validation=True, facts=None, report=None, sizes=None,
               strategy=None, **how):
    """A Trainer of 45 examples in batches of 8, the last one of 5, with 9 to validate."""
    data = blobs(n)
    held_out = blobs(9, seed=1) if validation else None
    folders = model.Folders(folder / "checkpoint", folder / "best", folder / "logs")
    with (strategy or tf.distribute.get_strategy()).scope():
        net = network(data, **sizes or {})
    return model.Trainer(net, data, held_out,
                         model.Training(**{"batch_size": 8, "decay_steps": 5} | how), folders,
                         facts or {}, jit, report or (lambda text: None), strategy)


def state(trainer):
    """All that a step changes: weights and the optimizer's variables."""
    return [v.numpy() for v in (*trainer.model.variables, *trainer.optimizer.variables)]


def same(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def events(folder):
    """What TensorBoard reads: {(run, tag): [(step, value)]}; nothing repeated is hidden."""
    found = {}
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        reader = EventAccumulator(str(run), size_guidance={"tensors": 0},
                                  purge_orphaned_data=False)
        reader.Reload()
        for tag in reader.Tags()["tensors"]:
            found[run.name, tag] = [
                (event.step, tensor_util.make_ndarray(event.tensor_proto).tolist())
                for event in reader.Tensors(tag)]
    return found


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(at):
        if at["step"] == step:
            raise Crash
    return on_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of 2 epochs (12 steps), checkpoints 10 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_in(folder)
    trainer.fit(2, save_steps=5)
    return folder, state(trainer)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that a test may damage."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("side, count", [(28, 8_215_568), (36, 11_361_808)])
def test_the_network_of_the_paper_has_exactly_as_many_parameters_as_the_paper_says(side, count):
    net = model.CapsNet((side, side, 1), 10)
    assert net.count_params() == count
    if side == 28:
        assert count - net.decoder.count_params() == 6_804_224


def test_lengths_are_those_of_the_capsules_whatever_the_batch_size():
    net = network(blobs(1))
    images = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    lengths, capsules = (part.numpy() for part in net(images))
    assert lengths.shape == (5, 3) and capsules.shape == (5, 3, 4)
    np.testing.assert_allclose(lengths, np.linalg.norm(capsules, axis=-1), atol=1e-4)
    alone = np.concatenate([net(image[None])[0].numpy() for image in images])
    np.testing.assert_allclose(lengths, alone, atol=1e-6)


def test_both_ways_to_convolve_give_the_same_outputs():
    images = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    direct, dft = (network(blobs(1), conv=conv)(images) for conv in ("direct", "dft"))
    for one, other in zip(direct, dft):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("conv", ["direct", "dft"])
def test_in_mixed_precision_norms_routing_losses_and_weights_stay_float32(conv, monkeypatch):
    data = blobs(4)
    exact, mixed = (network(data, conv=conv, dtype=dtype) for dtype in (None, "mixed_bfloat16"))
    routed = []
    monkeypatch.setattr(ops, "routing", lambda u_hat, n, routing=ops.routing: routed.append(
        routing(u_hat, n)) or routed[-1])
    batch = next(iter(model.batches(data, data.evaluation_plan(), 4)))
    with tf.GradientTape() as tape:
        found = mixed.examine(data, batch)
        loss = tf.reduce_mean(found["margin"] + found["reconstruction"])
    gradients = tape.gradient(loss, [v.value for v in mixed.trainable_variables])
    assert mixed.conv1(found["canvas"]).dtype == tf.bfloat16
    assert {g.dtype for g in gradients} == {v.value.dtype for v in mixed.variables} == {tf.float32}
    assert all(np.isfinite(g).all() for g in gradients)
    u = mixed.primary(mixed.conv1(found["canvas"]))
    for tensor in (u, *routed, *(v for n, v in found.items() if n not in (
            "predictions", "correct"))):
        assert tensor.dtype == tf.float32
    expected = exact.examine(data, batch)
    for name in ("lengths", "margin", "reconstruction"):  # bfloat16 has 8 binary digits
        np.testing.assert_allclose(found[name], expected[name], rtol=0.05, atol=1e-3)
    assert np.abs(found["lengths"] - expected["lengths"]).max() > 0


@pytest.mark.parametrize("shape, classes, sizes", [
    ((28, 28, 1), 10, {}), ((36, 36, 1), 10, {}), ((19, 24, 3), 7, {"n_conv": 5, "n_primary": 3,
     "primary_dim": 4, "digit_dim": 6, "kernel_size": 5, "decoder_units": (8, 9)})])
def test_the_sizes_said_beforehand_are_those_of_the_layers_made(shape, classes, sizes):
    net = model.CapsNet(shape, classes, **sizes)
    said = model.layer_sizes(shape, classes, **sizes)
    made, output = [net.conv1, net.primary, net.digits, net.decoder], (None, *shape)
    assert [count for *_, count in said] == [layer.count_params() for layer in made]
    for layer, (_, expected, _) in zip(made, said):
        output = layer.compute_output_shape(output)
        assert output[-len(expected):] == expected


@pytest.mark.parametrize("batch, side, measured", [  # MB, by benchmarks/scaling.py
    (16, 28, 1097), (64, 28, 1234), (256, 28, 1866), (64, 36, 1670), (64, 48, 2574), (64, 64, 4364)])
def test_the_memory_said_beforehand_is_within_a_tenth_of_what_was_measured(batch, side, measured):
    said = model.memory_needed(model.layer_sizes((side, side, 1), 10), batch) / 1e6
    assert abs(said / measured - 1) < 0.1
    sizes = model.layer_sizes((side, side, 1), 10)
    assert model.memory_needed(sizes, batch, 5e9) == pytest.approx(1e6 * said + 5e9)


def test_images_too_small_for_two_convolutions_are_refused_with_the_sizes():
    with pytest.raises(ValueError, match=r"at least 17×17 pixels. Received: .*\(16, 30, 1\)"):
        model.CapsNet((16, 30, 1), 10)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # inside Keras
def test_a_network_saved_by_keras_is_loaded_with_the_same_outputs(tmp_path):
    net, images = network(blobs(1)), blobs(4).images / np.float32(255)
    net.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    assert loaded.get_config() == net.get_config()
    assert same([v.numpy() for v in loaded.variables], [v.numpy() for v in net.variables])
    np.testing.assert_array_equal(loaded(images)[0], net(images)[0])


def test_the_label_reaches_only_the_reconstruction_that_is_made_with_it():
    data = blobs(6)
    net = network(data)
    digits, shift, labels, weight = next(iter(model.batches(data, data.evaluation_plan(), 6)))
    one = net.examine(data, (digits, shift, labels, weight))
    other = net.examine(data, (digits, shift, (labels + 1) % 3, weight))
    for name in ("capsules", "lengths", "predictions", "without_label"):
        np.testing.assert_array_equal(one[name], other[name])
    assert np.abs(one["with_label"] - other["with_label"]).max() > 1e-4
    # The prediction's mask is used: where it is the label, both reconstructions are one.
    np.testing.assert_array_equal(
        net.examine(data, (digits, shift, one["predictions"], weight))["with_label"],
        one["without_label"])


# ---------------------------------------------------------------- batches


def numbered(n, overlap):
    """Images whose every pixel is their number, labels that follow from it."""
    numbers = np.arange(n, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None, None], (n, 5, 4, 1)).copy()
    return model.Data(images, numbers % 3, 4, 2, overlap)


@pytest.mark.parametrize("n", [1, 7, 8, 21])
@pytest.mark.parametrize("overlap", [False, True])
def test_batches_hold_every_example_once_each_with_its_own_label_and_shift(n, overlap):
    n += overlap  # a pair needs two classes
    data = numbered(n, overlap)
    plan = data.training_plan(seed=3, epoch=1)
    seen = []
    for digits, shift, labels, weight in model.batches(data, plan, 8).as_numpy_iterator():
        assert digits.shape == (8, 1 + overlap, 5, 4, 1) and digits.dtype == np.uint8
        assert weight.sum() == pytest.approx(1, abs=1e-6)
        assert (weight[weight > 0] == weight.max()).all()
        np.testing.assert_array_equal(labels, digits[..., 0, 0, 0] % 3)
        seen += [(tuple(d[..., 0, 0, 0]), tuple(s.ravel()))
                 for d, s, w in zip(digits, shift, weight) if w]
    assert seen == [(tuple(i), tuple(s.ravel())) for i, s in zip(plan.index, plan.shift)]
    assert sorted(first for (first, *_), _ in seen) == list(range(n))


def test_the_last_batch_is_filled_to_full_size_with_weight_zero():
    data = numbered(21, False)
    *whole, last = model.batches(data, data.training_plan(0, 0), 8).as_numpy_iterator()
    assert [len(part) for part in last] == [8] * 4
    np.testing.assert_allclose(last[3], [0.2] * 5 + [0] * 3)
    for batch in whole:
        np.testing.assert_allclose(batch[3], 1 / 8)


def test_batches_from_a_number_on_are_exactly_the_tail_of_all():
    data = numbered(21, True)
    plan = data.training_plan(0, 0)
    everything = list(model.batches(data, plan, 8).as_numpy_iterator())
    for start in range(3):
        tail = list(model.batches(data, plan, 8, start).as_numpy_iterator())
        assert len(tail) == 3 - start
        for one, other in zip(tail, everything[start:]):
            assert same(one, other)


def test_only_the_plan_of_training_shifts_and_a_subset_keeps_images_and_labels_together():
    data = numbered(30, False)
    assert np.unique(data.training_plan(0, 0).shift).tolist() == [-2, -1, 0, 1, 2]
    part = data.subset(np.array([4, 8, 20]))
    assert not part.evaluation_plan().shift.any() and not data.evaluation_plan().shift.any()
    np.testing.assert_array_equal(part.images[:, 0, 0, 0], [4, 8, 20])
    np.testing.assert_array_equal(part.labels, [1, 2, 2])
    assert part.max_shift == 2


# ---------------------------------------------------------------- evaluation


def examined_alone(net, data, index, shift):
    """Lengths, predicted set, margin loss and reconstruction loss of one example, by loops."""
    _, height, width, _ = data.images.shape
    canvas = np.zeros((len(index), height + 2 * data.margin, width + 2 * data.margin, 1))
    for k, (number, (down, right)) in enumerate(zip(index, shift)):
        for y, x in np.ndindex(height, width):
            row, column = y + data.margin + down, x + data.margin + right
            if 0 <= row < canvas.shape[1] and 0 <= column < canvas.shape[2]:
                canvas[k, row, column] = data.images[number, y, x] / 255
    image = np.minimum(canvas.sum(axis=0), 1).astype(np.float32)
    lengths, capsules = (part.numpy()[0] for part in net(image[None]))
    labels = [int(data.labels[number]) for number in index]
    margin = sum(max(0, 0.9 - length) ** 2 if k in labels else 0.5 * max(0, length - 0.1) ** 2
                 for k, length in enumerate(lengths.astype(float)))
    reconstruction = 0.0
    for k, label in enumerate(labels):
        x = np.where(np.arange(3)[:, None] == label, capsules, 0).reshape(1, -1)
        for layer in (*net.decoder.hidden, net.decoder.pixels):
            x = layer(x)
        reconstruction += np.square(x.numpy().reshape(canvas[k].shape) - canvas[k]).sum()
    predicted = set(np.argsort(-lengths)[:len(labels)].tolist())
    return lengths, predicted == set(labels), margin, reconstruction


@pytest.mark.parametrize("overlap, jit", [(False, True), (True, False)])
def test_evaluation_counts_every_image_and_equals_a_loop_over_single_ones(
        overlap, jit, monkeypatch):
    monkeypatch.setattr(model, "EVALUATION_BATCH", 16)
    n = 45
    data = blobs(n, overlap)
    net, plan = network(data), data.evaluation_plan()
    found = model.evaluate(model.compile_forward(net, data, jit), data, plan)
    alone = [examined_alone(net, data, *row) for row in zip(*plan)]
    lengths, correct, margin, reconstruction = map(np.array, zip(*alone))
    assert len(found["lengths"]) == n and 0 < correct.sum() < n
    np.testing.assert_allclose(found["lengths"], lengths, atol=1e-5)
    np.testing.assert_array_equal(found["correct"], correct)
    assert found["accuracy"] == pytest.approx(correct.sum() / n)
    assert found["margin_loss"] == pytest.approx(margin.mean(), rel=1e-4)
    assert found["reconstruction_loss"] == pytest.approx(reconstruction.mean(), rel=1e-4)
    np.testing.assert_array_equal(found["labels"], data.labels[plan.index])
    if overlap:  # one digit right of two is wrong
        shared = [len({*p} & {*y}) for p, y in zip(found["predictions"], found["labels"])]
        assert 1 in shared and 2 in shared
        np.testing.assert_array_equal(found["correct"], np.array(shared) == 2)


def test_evaluation_of_fewer_images_than_a_batch_counts_just_those():
    data = blobs(3)
    found = model.evaluate(model.compile_forward(network(data), data, False), data,
                           data.evaluation_plan())
    assert len(found["correct"]) == 3


# ---------------------------------------------------------------- a step of training


def momentum(trainer):
    """Adam's first moments: a tenth of the gradient, after a single step."""
    return {v.path: v.numpy() for v in trainer.optimizer.variables if "momentum" in v.path}


def test_the_uneven_last_batch_has_the_loss_and_gradient_of_its_real_images_alone(tmp_path):
    filled, small = trainer_in(tmp_path), trainer_in(tmp_path, batch_size=5)
    plan = filled.data.training_plan(0, 0)
    rest = Plan(plan.index[40:], plan.shift[40:])
    (last,) = model.batches(filled.data, plan, 8, start=5)
    (alone,) = model.batches(filled.data, rest, 5)
    assert len(last[3]) == 8 and len(alone[3]) == 5
    looped = [examined_alone(filled.model, filled.data, *row) for row in zip(*rest)]
    correct, margin, reconstruction = np.transpose([row[1:] for row in looped]).mean(axis=1)
    for losses in filled.train_step(last).numpy(), small.train_step(alone).numpy():
        np.testing.assert_allclose(losses, [margin, reconstruction, correct], rtol=1e-4)
    one, other = momentum(filled), momentum(small)
    assert one.keys() == other.keys() and len(one) == 9
    for path in one:
        assert np.abs(one[path]).max() > 0
        np.testing.assert_allclose(one[path], other[path], rtol=1e-3, atol=1e-8)


def test_the_reconstruction_weight_scales_just_the_gradient_of_the_decoder(tmp_path):
    one, other = (trainer_in(tmp_path, reconstruction_weight=w) for w in (0.001, 0.003))
    (batch,) = model.batches(one.data, Plan(*(p[:8] for p in one.data.evaluation_plan())), 8)
    one.train_step(batch), other.train_step(batch)
    path = "adam/decoder_pixels_bias_momentum"
    np.testing.assert_allclose(3 * momentum(one)[path], momentum(other)[path], rtol=1e-4)


def test_the_first_step_moves_weights_by_the_learning_rate_and_the_last_by_its_decayed_value(
        tmp_path):
    trainer = trainer_in(tmp_path, learning_rate=0.004, decay_rate=0.5, decay_steps=3)
    net = trainer.model
    before, moved = net.digits.W.numpy(), []
    trainer.fit(2, on_step=lambda at: moved.append(np.abs(net.digits.W.numpy() - before).max()))
    assert moved[0] == pytest.approx(0.004, rel=1e-3)  # |m| / sqrt(v) is 1 in Adam's first step
    assert float(trainer.optimizer.learning_rate) == pytest.approx(0.004 * 0.5 ** (12 / 3))


@pytest.mark.parametrize("averaging", [0.4, 0.0])
def test_what_is_tested_and_validated_is_the_running_average_of_the_weights(
        tmp_path, averaging, monkeypatch):
    average, validated = [], []

    def note(at):
        weights, steps = trainer.model.get_weights(), len(average)
        momentum = min(averaging, (1 + steps) / (10 + steps))
        old = average[-1] if average else weights
        average.append([momentum * a + (1 - momentum) * w for a, w in zip(old, weights)])

    def evaluate(compiled, data, plan, evaluate=model.evaluate):
        validated.append(trainer.model.get_weights())
        return evaluate(compiled, data, plan)

    monkeypatch.setattr(model, "evaluate", evaluate)
    trainer = trainer_in(tmp_path, averaging=averaging, learning_rate=0.01)
    trainer.fit(2, on_step=note)
    net = network(blobs(1), seed=7)
    model.load_weights(net, tmp_path / "checkpoint", print)
    for found, expected in (*zip(validated, (average[5], average[11])),
                            (net.get_weights(), average[11])):
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())
    moved = max(np.abs(w - a).max() for w, a in zip(trainer.model.get_weights(), average[11]))
    assert (moved > 1e-4) == (averaging > 0)  # training itself went on with the weights


def test_the_initialization_of_the_authors_has_their_deviations_and_biases():
    data = model.Data(np.zeros((1, 28, 28, 1), np.uint8), np.zeros(1, np.int32))
    net = network(data, initialization="authors", n_conv=60, kernel_size=9, decoder_units=(90, 99))
    dense = [*net.decoder.hidden, net.decoder.pixels]
    # A normal cut at two standard deviations has 0.88 of it.
    for kernel, stddev in [(net.conv1.kernel, 0.05), (net.primary.kernel, 4 * 0.1),
                           *((layer.kernel, 0.1) for layer in dense)]:
        assert np.std(kernel) == pytest.approx(0.88 * stddev, rel=0.05)
        assert 1.9 * stddev < np.abs(kernel).max() <= 2.001 * stddev
    for layer in net.conv1, net.primary, *dense:
        np.testing.assert_array_equal(layer.bias, np.full(layer.bias.shape, np.float32(0.1)))
    again = model.CapsNet.from_config(net.get_config())
    assert again.settings == net.settings and np.all(again.primary.bias == np.float32(0.1))


# ---------------------------------------------------------------- what a run leaves


def test_events_have_every_step_once_with_the_losses_their_total_and_the_learning_rate(finished):
    found = events(finished[0] / "logs")
    pictures = {"reconstructions", "tweaks", "confusion matrix"}
    histograms = {f"where {there}, length of capsule/{name}"
                  for there in ("present", "absent") for name in "abc"}
    assert {tag for run, tag in found if run == "validation"} == {*SCALARS, *pictures, *histograms}
    assert {tag for run, tag in found if run == "train"} == {*SCALARS, "learning_rate"}
    for tag in (*SCALARS, "learning_rate"):
        assert [step for step, _ in found["train", tag]] == list(range(1, 13))
    for tag in SCALARS:
        assert [step for step, _ in found["validation", tag]] == [6, 12]
    for step, rate in found["train", "learning_rate"]:
        assert rate == pytest.approx(0.001 * 0.7 ** ((step - 1) / 5), rel=1e-6)
    for run in ("train", "validation"):
        for (_, total), (_, margin), (_, reconstruction) in zip(
                *(found[run, tag] for tag in SCALARS[:3])):
            assert total == pytest.approx(margin + 0.0005 * reconstruction, rel=1e-6)
    for tag in pictures | histograms:
        assert [step for step, _ in found["validation", tag]] == [6, 12]


def test_the_validation_in_the_events_is_that_of_the_unshifted_validation_images(finished):
    data = blobs(9, seed=1)
    net = network(data, seed=5)
    model.load_weights(net, finished[0] / "checkpoint", print)
    alone = [examined_alone(net, data, [i], [(0, 0)]) for i in range(9)]
    found = events(finished[0] / "logs")
    for tag, column in ("accuracy", 1), ("loss/margin", 2), ("loss/reconstruction", 3):
        step, value = found["validation", tag][-1]
        assert step == 12
        assert value == pytest.approx(np.mean([row[column] for row in alone]), rel=1e-4)


def test_a_histogram_counts_the_lengths_of_a_class_where_it_is_and_where_it_is_not(tmp_path):
    lengths = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    for labels in (np.arange(50)[:, None] % 3, np.array([[0, 2], [1, 0]] * 25)):
        data = blobs(50)._replace(overlap=labels.shape[1] == 2)
        found = {"lengths": lengths, "labels": labels, "predictions": labels, "margin_loss": 0.2,
                 "reconstruction_loss": 40.0, "accuracy": 0.75}
        folder = tmp_path / str(labels.shape[1])
        with model.replacing_events(folder / "test", "evaluation", 7):
            model.summarize(data, found, 0.5)
        shown = events(folder)
        assert [shown["test", tag] for tag in SCALARS] == [
            [(7, pytest.approx(value))] for value in (0.5, 0.2, 40.0, 0.75)]
        assert (("test", "confusion matrix") in shown) == (labels.shape[1] == 1)
        for there in ("present", "absent"):
            for number, name in enumerate("abc"):
                inside = [lengths[n, number] for n in range(50)
                          if (number in labels[n]) == (there == "present")]
                ((_, buckets),) = shown["test", f"where {there}, length of capsule/{name}"]
                assert len(buckets) == 30
                for left, right, count in buckets[:-1]:  # the last one includes its right end
                    near = sum(left + 1e-6 < value < right - 1e-6 for value in inside)
                    assert near <= count <= sum(left - 1e-6 < v < right + 1e-6 for v in inside)
                assert sum(count for *_, count in buckets) == len(inside)


def test_events_of_an_examination_replace_those_of_the_same_name_and_no_others(tmp_path):
    for name, value in ("tweaks", 1.0), ("evaluation", 2.0), ("tweaks", 3.0):
        with model.replacing_events(tmp_path / "test", name, 7):
            tf.summary.scalar(name, value)
    assert events(tmp_path) == {("test", "tweaks"): [(7, 3.0)], ("test", "evaluation"): [(7, 2.0)]}
    with pytest.raises(Crash), model.replacing_events(tmp_path / "test", "tweaks", 8):
        raise Crash
    assert ("test", "tweaks") in events(tmp_path)


def test_the_scalars_read_back_are_those_of_the_reader_of_tensorboard(finished):
    for run in ("train", "validation"):
        scalars, seconds = model.read_scalars(finished[0] / "logs" / run)
        found = {tag: value for (name, tag), value in events(finished[0] / "logs").items()
                 if name == run}
        for tag in scalars:
            assert list(zip(*scalars[tag])) == found[tag]
        assert set(scalars) == {*SCALARS, *["learning_rate"] * (run == "train")}
    assert model.read_scalars(finished[0] / "nowhere") == ({}, 0.0)


def test_training_time_is_that_of_every_start_without_the_pauses_between(tmp_path):
    for number, times in enumerate([(100, 101.5, 103), (500, 500.25)]):
        path = tmp_path / f"events.out.tfevents.{number}.v2"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for time in times:
                writer.write(tf.compat.v1.Event(wall_time=time).SerializeToString())
    assert model.read_scalars(tmp_path) == ({}, 3.25)


def test_a_tweak_changes_one_dimension_of_one_capsule_by_one_delta():
    data = blobs(4)
    net = network(data)
    capsules = net(data.images / np.float32(255))[1].numpy()
    chosen, deltas = np.array([2, 0, 1, 2]), np.array([-0.2, 0.0, 0.3])
    images = model.tweak(net, capsules, chosen, deltas)
    assert images.shape == (4, 4, 3, 8, 8, 1)  # dimensions, examples, deltas
    for dim, n, step in np.ndindex(4, 4, 3):
        moved = np.zeros((1, 3, 4), np.float32)
        moved[0, chosen[n]] = capsules[n, chosen[n]]
        moved[0, chosen[n], dim] += deltas[step]
        expected = net.decoder(moved, np.ones((1, 1, 3), np.float32))[0, 0]
        np.testing.assert_allclose(images[dim, n, step], expected, atol=1e-6)


def test_the_best_folder_holds_the_step_with_the_lowest_validation_loss(tmp_path, monkeypatch):
    losses = iter([0.5, 0.3, 0.3, 0.2, 0.4, 0.3])

    def evaluate(compiled, data, plan):
        assert not plan.shift.any() and len(plan.index) == 9
        return {"margin_loss": next(losses), "reconstruction_loss": 0.0, "accuracy": 0.5}

    monkeypatch.setattr(model, "evaluate", evaluate)
    monkeypatch.setattr(model, "summarize", lambda data, found, total: None)
    lines, steps = [], []
    trainer = trainer_in(tmp_path, report=lines.append)
    trainer.fit(5, on_step=lambda at: steps.append(model.saved_steps(tmp_path / "best")))
    assert [s[0] if s else None for s in steps[5::6]] == [None, 6, 12, 12, 24]
    assert model.saved_steps(tmp_path / "best") == [24]
    assert ["the best so far" in line for line in lines] == [True, True, False, True, False]
    assert model.read_facts(tmp_path / "best", 24)["step"] == 24
    trainer_in(tmp_path).fit(6)  # a resumed run knows how good the best was
    assert model.saved_steps(tmp_path / "best") == [24]


def test_progress_reports_running_means_of_the_epoch_by_images_also_when_resumed(tmp_path):
    seen = []

    def on_step(at):
        seen.append(at)
        if len(seen) == 4:
            raise Crash

    with pytest.raises(Crash):
        trainer_in(tmp_path, validation=False).fit(2, save_steps=3, on_step=on_step)
    seen.pop()  # the step that is lost, and done again
    trainer_in(tmp_path, validation=False).fit(2, save_steps=3, on_step=seen.append)
    assert [(at["epoch"], at["step"], at["last_step"]) for at in seen] == [
        (1 + step // 6, step + 1, 12) for step in range(12)]
    logged = [value for _, value in events(tmp_path / "logs")["train", "loss/margin"]]
    sizes = [8, 8, 8, 8, 8, 5]
    for number, at in enumerate(seen):
        first = number - number % 6
        expected = np.average(logged[first:number + 1], weights=sizes[:number % 6 + 1])
        assert at["margin_loss"] == pytest.approx(expected, rel=1e-5)
        assert at["seconds_left"] >= 0 and at["images_per_second"] > 0


# ---------------------------------------------------------------- interrupted and resumed


def test_another_seed_gives_other_weights_and_another_order(tmp_path):
    one, other = (trainer_in(tmp_path / str(seed), validation=False, seed=seed) for seed in (0, 1))
    for trainer in (one, other):
        trainer.fit(1)
    assert not same(state(one), state(other))


def test_a_run_broken_before_its_first_checkpoint_begins_anew_without_double_events(
        tmp_path, finished):
    with pytest.raises(Crash):
        trainer_in(tmp_path).fit(2, on_step=crash_at(4))
    assert not model.saved_steps(tmp_path / "checkpoint")
    trainer_in(tmp_path).fit(2)
    steps = [step for step, _ in events(tmp_path / "logs")["train", "accuracy"]]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_running_step_and_leaves_the_old_handlers(tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(model.Interrupted) as caught:
        trainer_in(tmp_path, validation=False).fit(
            2, on_step=lambda at: at["step"] == 3 and signal.raise_signal(number))
    assert caught.value.args == (number,)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert model.saved_steps(tmp_path / "checkpoint") == [3]
    later = trainer_in(tmp_path, validation=False)
    assert later.fit(1) and later.restored == 3 and later.step == 6


def test_a_second_ctrl_c_stops_at_once(tmp_path, request):
    # Started in the background by a shell, this process would ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def on_step(at):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, validation=False).fit(2, on_step=on_step)


def test_more_epochs_go_on_and_no_more_epochs_do_nothing(copy, finished):
    trainer = trainer_in(copy)
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*[!k]") if p.is_file()}  # no .lock
    assert not trainer.fit(2) and trainer.step == 12
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*[!k]") if p.is_file()} == before
    assert same(state(trainer), finished[1])
    longer, began = trainer_in(copy), []
    assert longer.fit(3, on_resume=began.append)
    assert began == [12] and longer.step == 18
    assert [step for step, _ in events(copy / "logs")["train", "accuracy"]] == list(range(1, 19))


def test_a_fraction_of_an_epoch_are_its_first_steps_and_parts_make_the_same_whole(tmp_path, finished):
    trainer, epochs = trainer_in(tmp_path), []
    for part, step in (0.5, 3), (1.1, 7), (2, 12):  # an epoch has 6 steps
        assert trainer.fit(part, on_step=lambda at: epochs.append((at["epoch"], at["epochs"])))
        assert trainer.step == step and model.saved_steps(tmp_path / "checkpoint")[0] == step
    assert same(state(trainer), finished[1])
    assert epochs == [(1, 1)] * 3 + [(1, 2)] * 3 + [(2, 2)] * 6
    assert [step for step, _ in events(tmp_path / "logs")["validation", "accuracy"]] == [6, 12]


# The child loads what this process saved, and then trains until it is killed with SIGKILL.
CHILD = """
import os, pathlib, sys
root, trained, folder = map(pathlib.Path, sys.argv[1:])
sys.path[:0] = [str(root), str(root / "tests")]
import numpy as np
import test_model
from test_model import model
data = test_model.blobs(5)
net = test_model.network(data, seed=9)
model.load_weights(net, trained / "checkpoint", print)
np.save(trained / "outputs.npy", net(data.images / np.float32(255))[1].numpy())
trainer = test_model.trainer_in(folder, jit=True, validation=False)
trainer.fit(2, save_steps=4, on_step=lambda at: at["step"] == 11 and os.kill(os.getpid(), 9))
"""


@pytest.fixture(scope="module")
def killed(finished, tmp_path_factory):
    """Where the child was killed in its second epoch, after the checkpoints of steps 6 and 8."""
    folder = tmp_path_factory.mktemp("killed")
    child = subprocess.run([sys.executable, "-c", CHILD, ROOT, finished[0], folder],
                           capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    return folder


def test_another_process_gets_the_same_outputs_from_what_was_saved(finished, killed):
    data = blobs(5)
    net = network(data, seed=3)
    model.load_weights(net, finished[0] / "checkpoint", print)
    outputs = net(data.images / np.float32(255))[1].numpy()
    np.testing.assert_array_equal(np.load(finished[0] / "outputs.npy"), outputs)


def test_runs_of_one_seed_are_bit_identical_also_if_one_is_killed_in_mid_epoch_and_resumed(
        tmp_path, killed):
    saves, logs = killed / "checkpoint", killed / "logs"
    # Leftovers of a kill in mid-save and of one while events were cut.
    (saves / "ckpt-7.data-00000-of-00001").write_bytes(b"half")
    (logs / "train" / ".events.out.tfevents.1.half").write_bytes(b"half")
    assert model.saved_steps(saves) == [8, 6]
    folders = tmp_path / "whole", tmp_path / "again", killed
    whole, again, resumed = (trainer_in(f, jit=True, validation=False) for f in folders)
    resumed.model.set_weights([0 * w for w in resumed.model.get_weights()])
    for trainer in whole, again, resumed:
        trainer.fit(2, save_steps=4)
    assert resumed.restored == 8
    assert same(state(whole), state(again)) and same(state(whole), state(resumed))
    expected = events(tmp_path / "whole" / "logs")
    assert events(tmp_path / "again" / "logs") == expected and events(logs) == expected
    assert {*os.listdir(saves)} == {*os.listdir(tmp_path / "whole" / "checkpoint")}
    assert not [path for path in logs.rglob(".*")]


def test_half_an_event_at_the_end_of_a_file_is_dropped_and_the_whole_ones_stay(copy):
    (file,) = (copy / "logs" / "train").iterdir()
    os.truncate(file, file.stat().st_size - 7)
    model.cut_events(file.parent, 10)
    steps = [step for step, _ in events(copy / "logs")["train", "loss/margin"]]
    assert steps == list(range(1, 11))
    (file,) = (copy / "logs" / "validation").iterdir()
    before = file.read_bytes()
    model.cut_events(file.parent, 12)  # nothing to drop
    assert file.read_bytes() == before
    model.cut_events(file.parent, -1)
    assert not file.exists()


# ---------------------------------------------------------------- damaged checkpoints


def saved_weights(folder, step, averaged=False):
    """W of the digit capsules in a checkpoint, or its running average."""
    reader = tf.train.load_checkpoint(str(folder / f"ckpt-{step}"))
    part = "optimizer/adam.Sdigit_capsules_W_average" if averaged else "weights/digit"
    (name,) = (n for n in reader.get_variable_to_shape_map() if n.startswith(part))
    return reader.get_tensor(name)


def truncate(data, index, place):
    os.truncate(data, place + 4)


def flip(data, index, place):
    content = bytearray(data.read_bytes())
    content[place + 2] ^= 1
    data.write_bytes(content)


def flip_in_index(data, index, place):
    flip(index, None, index.stat().st_size // 2)


def empty(data, index, place):
    data.write_bytes(b"")


def empty_index(data, index, place):
    index.write_bytes(b"")


def lose_data(data, index, place):
    data.unlink()


def lose_index(data, index, place):
    index.unlink()


DAMAGES = [truncate, flip, flip_in_index, empty, empty_index, lose_data, lose_index]


def damage_checkpoint(folder, step, damage):
    data = folder / f"ckpt-{step}.data-00000-of-00001"
    place = data.read_bytes().index(saved_weights(folder, step).tobytes())
    damage(data, folder / f"ckpt-{step}.index", place)


@pytest.mark.parametrize("damage", DAMAGES)
def test_instead_of_a_damaged_checkpoint_the_one_before_is_used_and_said_so(copy, damage):
    folder, net, lines = copy / "checkpoint", network(blobs(1), seed=4), []
    expected = saved_weights(folder, 10)
    assert not np.array_equal(expected, saved_weights(folder, 12))
    damage_checkpoint(folder, 12, damage)
    assert model.load_weights(net, folder, lines.append)["step"] == 10
    trainer = trainer_in(copy, report=lines.append)
    trainer.resume()
    assert trainer.step == trainer.restored == 10
    np.testing.assert_array_equal(trainer.model.digits.W.numpy(), expected)
    np.testing.assert_array_equal(net.digits.W.numpy(), saved_weights(folder, 10, averaged=True))
    # Without its index it is what a kill in mid-save leaves: never finished, and so no news.
    news = [f"Checkpoint {folder}/ckpt-12 is damaged; trying the one before."]
    assert lines == ([] if damage is lose_index else 2 * news)


@pytest.mark.parametrize("damage", [flip, lose_index])
def test_training_from_the_checkpoint_before_a_damaged_one_ends_as_if_nothing_had_happened(
        copy, damage, finished):
    expected = events(copy / "logs")
    damage_checkpoint(copy / "checkpoint", 12, damage)
    trainer = trainer_in(copy)
    trainer.fit(2, save_steps=5)
    assert trainer.restored == 10
    assert same(state(trainer), finished[1])
    assert events(copy / "logs") == expected
    lines = []
    model.load_weights(trainer.model, copy / "checkpoint", lines.append)
    assert not lines and model.saved_steps(copy / "checkpoint") == [12, 10]


def test_if_every_checkpoint_is_damaged_that_is_said_and_restart_moves_them_aside(copy):
    for step, damage in (10, flip), (12, truncate):
        damage_checkpoint(copy / "checkpoint", step, damage)
    with pytest.raises(UserError, match="every checkpoint is damaged.*--restart"):
        model.load_weights(network(blobs(1)), copy / "checkpoint", lambda line: None)
    with pytest.raises(UserError, match="every checkpoint is damaged.*--restart"):
        trainer_in(copy).fit(2)
    trainer = trainer_in(copy)
    assert trainer.fit(1, restart=True)
    assert model.saved_steps(copy / "checkpoint") == [6]
    assert model.saved_steps(copy / "checkpoint.1") == [12, 10]


@pytest.mark.parametrize("content, saved", [
    (b"", True), (b"garbage", True), (None, True), (b"\xff\xfe\x00\x80", False)])
def test_the_small_file_that_lists_the_checkpoints_may_be_lost_or_garbage(copy, content, saved):
    folder = copy / "checkpoint"
    (folder / "checkpoint").unlink()
    if content is not None:
        (folder / "checkpoint").write_bytes(content)
    if not saved:
        for step in 10, 12:
            damage_checkpoint(folder, step, lose_index)
    trainer = trainer_in(copy, validation=False)
    trainer.fit(3, save_steps=20)
    assert trainer.restored == (12 if saved else None)
    assert model.saved_steps(folder) == [18, 12]
    assert tf.train.latest_checkpoint(str(folder)) == str(folder / "ckpt-18")


def test_a_checkpoint_of_another_network_is_refused_naming_what_differs(copy):
    net = network(blobs(1), digit_dim=5, n_conv=6)
    with pytest.raises(UserError, match="n_conv is 5 there and 6 here") as caught:
        model.load_weights(net, copy / "checkpoint", print)
    assert "digit_dim is 4 there and 5 here" in str(caught.value)
    assert "primary" not in str(caught.value) and "\n" not in str(caught.value)
    model.load_weights(network(blobs(1), conv="direct"), copy / "checkpoint", print)


def test_a_folder_without_a_checkpoint_is_an_error_that_says_to_train(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}; train first"):
        model.load_weights(network(blobs(1)), tmp_path, print)


# ---------------------------------------------------------------- other settings, other runs


def test_an_unfinished_run_of_other_settings_is_refused_naming_them_until_it_is_restarted(
        tmp_path):
    with pytest.raises(Crash):
        trainer_in(tmp_path, facts={"dataset": "a"}).fit(2, on_step=crash_at(7))
    other = {"facts": {"dataset": "b"}, "learning_rate": 0.5}
    with pytest.raises(UserError) as caught:
        trainer_in(tmp_path, **other).fit(2)
    text = str(caught.value)
    assert "unfinished run (step 6 of 12)" in text and "--restart" in text and "\n" not in text
    assert "dataset is a there and b here, learning_rate is 0.001 there and 0.5 here" in text
    assert "seed" not in text and model.saved_steps(tmp_path / "checkpoint") == [6]
    lines = []
    trainer = trainer_in(tmp_path, report=lines.append, **other)
    trainer.fit(1, restart=True)
    assert trainer.restored is None and "Moved the earlier run aside" in lines[0]
    for name, saved in ("checkpoint", [6]), ("checkpoint.1", [6]), ("best.1", [6]):
        assert model.saved_steps(tmp_path / name) == saved
    facts = [model.read_facts(tmp_path / f"checkpoint{end}", 6) for end in ("", ".1")]
    assert [f["training"]["dataset"] for f in facts] == ["b", "a"]
    assert len(events(tmp_path / "logs")["train", "accuracy"]) == 6
    assert len(events(tmp_path / "logs.1")["train", "accuracy"]) == 7


def test_a_finished_run_of_other_settings_is_moved_aside_to_the_first_free_number(copy):
    (copy / "logs.1").mkdir()
    lines = []
    trainer = trainer_in(copy, validation=False, report=lines.append, seed=3)
    trainer.fit(1)
    assert trainer.restored is None
    assert lines == [f"Moved the earlier run aside: {copy}/checkpoint.2, {copy}/logs.2"]
    assert model.saved_steps(copy / "checkpoint.2") == [12, 10]
    assert model.saved_steps(copy / "checkpoint") == [6] and not (copy / "checkpoint.1").exists()
    assert len(events(copy / "logs.2")["train", "accuracy"]) == 12


def test_a_second_training_in_a_folder_is_refused_while_the_first_runs_and_not_after(tmp_path):
    second = trainer_in(tmp_path, validation=False)
    refused = []

    def on_step(at):
        if at["step"] == 2:
            with pytest.raises(UserError, match="another training runs in") as caught:
                second.fit(1)
            refused.append(str(caught.value))

    trainer_in(tmp_path, validation=False).fit(1, on_step=on_step)
    assert len(refused) == 1 and str(tmp_path / "checkpoint") in refused[0]
    assert second.step == 0 and second.fit(2) and second.restored == 6


def test_the_events_and_best_weights_of_another_run_are_not_touched(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    other = trainer_in(copy)
    other.folders = other.folders._replace(checkpoint=copy / "elsewhere")
    with pytest.raises(UserError, match="belongs to the run in .*checkpoint.*--logdir"):
        other.fit(2)
    assert before == {path: path.read_bytes() for path in before}


def test_a_note_of_the_owner_that_a_kill_left_empty_does_not_lock_the_run_out(copy):
    for name in "logs", "best":
        assert (copy / name / "run").read_text() == "../checkpoint\n"
        (copy / name / "run").write_text("")
    assert trainer_in(copy).fit(3)


def test_without_its_best_weights_a_run_takes_the_next_ones_as_best(copy):
    shutil.rmtree(copy / "best")
    trainer = trainer_in(copy)
    trainer.fit(3)
    assert model.saved_steps(copy / "best") == [18]
    assert np.isfinite(trainer.best)


def test_leftovers_of_a_killed_save_go_and_files_of_the_users_own_stay(copy):
    folder = copy / "checkpoint"
    (folder / "ckpt-99_temp").mkdir()
    (folder / "ckpt-99_temp" / "part-0").write_bytes(b"half")
    (folder / "ckpt-99.data-00000-of-00001").write_bytes(b"half")
    (folder / "checkpoint.tmp123").write_bytes(b"half")
    (folder / "ckpt-backup" / "deep").mkdir(parents=True)
    (folder / "ckpt-12-good.index").write_bytes(b"mine")
    trainer_in(copy).fit(3)
    names = {path.name for path in folder.iterdir()}
    assert {"ckpt-backup", "ckpt-12-good.index"} < names
    assert not any("99" in name or "tmp" in name for name in names)


def test_a_kill_in_the_very_first_save_is_no_damage(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "ckpt-5_temp").mkdir(parents=True)
    (folder / "ckpt-5.index").write_bytes(b"half")
    said = []
    trainer_in(tmp_path, report=said.append).fit(1)
    assert model.saved_steps(folder)[0] == 6 and not any("damaged" in line for line in said)


def test_a_kill_while_a_run_is_moved_aside_leaves_its_checkpoints_for_the_next_try(
        copy, monkeypatch):
    rename, done = Path.rename, []

    def killed(self, target):
        if self.name == "checkpoint":
            raise Crash
        done.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Crash):
        trainer_in(copy).fit(1, restart=True)
    assert done == ["logs", "best"] and model.saved_steps(copy / "checkpoint") == [12, 10]


# ---------------------------------------------------------------- numbers that are not finite


def spoil_at(trainer, step):
    def on_step(at):
        if at["step"] == step:
            trainer.model.digits.W.assign(trainer.model.digits.W * math.nan)
    return on_step


@pytest.mark.parametrize("spoiled, saved, named", [(4, 3, 5), (12, 9, 12)])
def test_numbers_that_are_not_finite_stop_the_training_and_are_never_saved(
        tmp_path, spoiled, saved, named):
    trainer = trainer_in(tmp_path, validation=False)
    with pytest.raises(UserError, match=f"not finite at step {named};.*--learning_rate"):
        trainer.fit(2, save_steps=3, on_step=spoil_at(trainer, spoiled))
    folder = tmp_path / "checkpoint"
    assert model.saved_steps(folder)[0] == saved
    assert np.isfinite(saved_weights(folder, saved)).all()
    again = trainer_in(tmp_path, validation=False)
    assert again.fit(2) and again.restored == saved and again.step == 12


# ---------------------------------------------------------------- it learns


def test_a_reduced_network_learns_4000_digits_and_gets_nine_of_ten_unseen_ones(tmp_path):
    mnist = utils.load_dataset("mnist", ROOT / "data")
    data = model.Data(mnist.x_train[:4000], mnist.y_train[:4000], 0, 2)
    unseen = model.Data(mnist.x_test[:1000], mnist.y_test[:1000])
    keras.utils.set_random_seed(0)
    net = model.CapsNet((28, 28, 1), 10, n_conv=24, n_primary=4, digit_dim=8,
                        decoder_units=(64, 128), conv="dft")
    folders = model.Folders(*(tmp_path / name for name in ("checkpoint", "best", "logs")))
    how = model.Training(batch_size=20, learning_rate=0.002)
    model.Trainer(net, data, None, how, folders, {}).fit(2)
    found = model.evaluate(model.compile_forward(net, unseen, True), unseen,
                           unseen.evaluation_plan())
    assert len(found["correct"]) == 1000 and found["accuracy"] >= 0.9
    # And it sees what it reads: better than the mean of all training images would do.
    pixels = unseen.images / 255
    blank = np.square(pixels - data.images.mean(axis=0) / 255).sum(axis=(1, 2, 3)).mean()
    assert found["reconstruction_loss"] < 0.9 * blank
