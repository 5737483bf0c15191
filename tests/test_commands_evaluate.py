import csv
import json
import re
import shlex

import numpy as np
import pytest
import tensorflow as tf
from story import (
    DATA,
    QUICK,
    RUN,
    Command,
    compose_slowly,
    decode,
    run,
    save_checkpoint,
    small_network,
    varied_network,
    weights_of,
    write_events,
)

import main
from capsnet_core.metadata import complete_training
from commands.evaluate import (
    digits_right,
    make_result,
    predictions_table,
    print_result,
    save_misclassified,
    save_multi_sheet,
    scores_per_class,
)
from commands.evaluate import (
    test as run_test,
)
from commands.reports import training_seconds
from inputs.pipeline import Examples, Plan
from runtime import machine, terminal
from training.evaluation import Evaluation

pytest_plugins = ["story_fixtures"]


# Four pairs of the classes a, b and c; none of class d. Two pairs are right, one of them in the
# other order. By their places only three of the eight digits would be right.
CLASSES = ("a", "b", "c", "d")
PAIRS = Evaluation(
    scores=np.zeros((4, 4), np.float32),
    predictions=np.array([[1, 0], [2, 1], [0, 2], [1, 2]]),
    labels=np.array([[0, 1], [2, 0], [1, 0], [1, 2]]),
    correct=np.array([True, False, False, True]),
    losses={"margin": 0.5, "reconstruction": 3.0},
)
SINGLE = Evaluation(
    scores=np.zeros((3, 4), np.float32),
    predictions=np.array([[1], [2], [1]]),
    labels=np.array([[1], [0], [1]]),
    correct=np.array([True, False, True]),
    losses={"margin": 0.25, "reconstruction": 40.0},
)


# ---------------------------------------------------------------- the numbers


def test_a_digit_is_right_if_its_class_is_among_the_predicted_ones_in_any_order():
    right = [[True, True], [True, False], [False, True], [True, True]]
    assert digits_right(PAIRS).tolist() == right
    assert digits_right(SINGLE).tolist() == [[True], [False], [True]]


def test_the_accuracy_of_a_class_counts_its_digits_wherever_they_are_in_a_pair():
    expected = {"a": 2 / 3, "b": 2 / 3, "c": 1.0, "d": None}
    assert scores_per_class(PAIRS, CLASSES)["accuracy_per_class"] == pytest.approx(expected)
    single = scores_per_class(SINGLE, CLASSES)["accuracy_per_class"]
    assert single == {"a": 0.0, "b": 1.0, "c": None, "d": None}


def test_precision_recall_and_f1_of_a_class_are_counted_wherever_it_is_in_a_pair():
    # Present: a 3, b 3, c 2. Predicted: a 2, b 3, c 3. Right: a 2, b 2, c 2.
    scores = scores_per_class(PAIRS, CLASSES)
    assert list(scores) == [
        *("accuracy_per_class", "precision_per_class", "recall_per_class", "f1_per_class"),
    ]
    accuracy, precision, recall, f1 = scores.values()
    assert accuracy == recall
    assert precision == pytest.approx({"a": 1.0, "b": 2 / 3, "c": 2 / 3, "d": None})
    assert recall == pytest.approx({"a": 2 / 3, "b": 2 / 3, "c": 1.0, "d": None})
    assert f1 == pytest.approx({"a": 4 / 5, "b": 2 / 3, "c": 4 / 5, "d": None})
    # a: never predicted; c: predicted, and not in the test.
    _, precision, recall, f1 = scores_per_class(SINGLE, CLASSES).values()
    assert precision == {"a": None, "b": 1.0, "c": 0.0, "d": None}
    assert recall == {"a": 0.0, "b": 1.0, "c": None, "d": None}
    assert f1 == {"a": 0.0, "b": 1.0, "c": 0.0, "d": None}


@pytest.mark.parametrize("digits", [1, 2])
def test_scores_of_classes_are_those_counted_example_by_example(digits):
    stream, names = np.random.default_rng(digits), tuple("abcdefg")
    labels, predictions = (
        np.array([stream.permutation(7)[:digits] for _ in range(200)]) for _ in range(2)
    )
    evaluation = SINGLE._replace(labels=labels, predictions=predictions)
    _, precision, recall, f1 = scores_per_class(evaluation, names).values()
    for number, name in enumerate(names):
        hits = missed = false = 0
        for present, predicted in zip(labels.tolist(), predictions.tolist(), strict=True):
            hits += number in present and number in predicted
            missed += number in present and number not in predicted
            false += number in predicted and number not in present
        assert precision[name] == pytest.approx(hits / (hits + false))
        assert recall[name] == pytest.approx(hits / (hits + missed))
        mean = 2 / (1 / precision[name] + 1 / recall[name])
        assert f1[name] == pytest.approx(mean)


def test_the_confusion_counts_are_for_single_digits_with_the_true_classes_down(weights):
    rows = make_result(weights, SINGLE, CLASSES)["confusion"]
    assert rows == [[0, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert "confusion" not in make_result(weights, PAIRS, CLASSES)


def test_the_table_of_predictions_has_a_row_for_each_image_or_for_its_first_pair():
    scores = np.float32([[0.25, 0.5, 0.125, 0]] * 3)
    data = Examples(np.zeros((3, 2, 2, 1), np.uint8), np.array([1, 0, 1]), class_names=CLASSES)
    plan = Plan(np.array([[0], [1], [2]]), np.zeros((3, 1, 2)))
    header, rows = predictions_table(data, plan, SINGLE._replace(scores=scores), "length")
    lengths = ["length_a", "length_b", "length_c", "length_d"]
    assert header == ["number", "label", "prediction", *lengths]
    assert rows == [
        [0, "b", "b", 0.25, 0.5, 0.125, 0],
        [1, "a", "c", 0.25, 0.5, 0.125, 0],
        [2, "b", "b", 0.25, 0.5, 0.125, 0],
    ]
    two = data._replace(images=data.images[:2], labels=data.labels[:2], overlap=True)
    plan = Plan(np.array([[0, 1], [1, 0], [0, 1], [1, 0]]), np.zeros((4, 2, 2)))
    header, rows = predictions_table(two, plan, PAIRS, "probability")
    columns = ("number", "label", "prediction")
    assert header[:6] == [f"{column}_{n}" for column in columns for n in (1, 2)]
    assert header[6:] == [f"probability_{name}" for name in CLASSES]
    assert [row[:6] for row in rows] == [[0, 1, "a", "b", "b", "a"], [1, 0, "c", "a", "c", "b"]]


@pytest.fixture(scope="module")
def weights(few):
    """The Weights of a network that was never trained."""
    return weights_of(small_network())


@pytest.mark.parametrize("overlap", [False, True])
def test_the_result_has_the_numbers_counted_by_hand(weights, overlap):
    training = {"seed": 4, "reconstruction_weight": 0.25, "multi_MNIST": overlap}
    ours = weights_of(weights.network, **training)
    result = make_result(ours, PAIRS if overlap else SINGLE, CLASSES)
    numbers = {
        "accuracy": 0.5 if overlap else 2 / 3,
        "error_percent": 50.0 if overlap else 100 / 3,
        "wrong": 2 if overlap else 1,
        "images": 4 if overlap else 3,
        "digit_accuracy": 0.75 if overlap else 2 / 3,
        "margin_loss": 0.5 if overlap else 0.25,
        "reconstruction_loss": 3.0 if overlap else 40,
        "total_loss": 0.5 + 0.25 * 3.0 if overlap else 0.25 + 0.25 * 40,
    }
    for name, value in numbers.items():
        assert result[name] == pytest.approx(value), name
    assert list(result) == [
        *("accuracy", "error_percent", "wrong", "images", "digit_accuracy"),
        *("margin_loss", "reconstruction_loss", "total_loss", "accuracy_per_class"),
        *("precision_per_class", "recall_per_class", "f1_per_class"),
        *([] if overlap else ["confusion"]),
    ]


def test_the_result_is_printed_without_classes_that_are_not_in_the_test(weights, capsys):
    speed = {"images_per_second": 123.0}
    print_result(make_result(weights, PAIRS, CLASSES) | speed, PAIRS, True)
    assert capsys.readouterr().out == (
        "Test accuracy 50.00% (both digits right; of single digits 75.00%), error 50.00%, "
        "2 of 4 pairs wrong\n"
        "Margin loss 0.50000, reconstruction loss 3.000, total 0.50150; 123 images/s\n"
        "Accuracy per class: a 66.67%, b 66.67%, c 100.00%\n"
    )
    print_result(make_result(weights, SINGLE, CLASSES) | speed, SINGLE, False)
    assert capsys.readouterr().out == (
        "Test accuracy 66.67%, error 33.33%, 1 of 3 wrong\n"
        "Margin loss 0.25000, reconstruction loss 40.000, total 0.27000; 123 images/s\n"
        "Accuracy per class: a 0.00%, b 100.00%\n"
    )
    of_cnn = SINGLE._replace(losses={"cross_entropy": 0.5})
    print_result(make_result(weights, of_cnn, CLASSES) | speed, of_cnn, False)
    shown = "\nCross entropy loss 0.50000, total 0.50000; 123 images/s\n"
    assert shown in capsys.readouterr().out


def test_the_seconds_of_training_are_those_of_all_its_starts_up_to_the_weights(tmp_path):
    metadata, logs = {"step": 15}, tmp_path / "logs"
    assert training_seconds(metadata, logs) is None  # no events
    write_events(logs / "train/events.out.tfevents.2.b", (5000, 10), (5020, 15), (5900, 16))
    assert training_seconds(metadata, logs) is None  # not from the first step
    write_events(logs / "train/events.out.tfevents.1.a", (1000, 1), (1300, 9))
    assert training_seconds(metadata, logs) == 300 + 20
    assert training_seconds({"step": 17}, logs) is None  # not to the last step
    assert training_seconds({"step": 17, "seconds": 77.5}, logs) == 77.5  # of exported weights


# ---------------------------------------------------------------- the whole command


def scalars_of(folder):
    scalars = {}
    for path in folder.glob("events*.evaluation"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                if value.tensor.dtype == tf.float32.as_datatype_enum and not (
                    value.tensor.tensor_shape.dim
                ):
                    scalars[value.tag] = (event.step, float(tf.make_ndarray(value.tensor)))
    return scalars


def test_single_digits_are_counted_and_drawn_as_the_network_sees_them(
    tmp_path, few, drawn, monkeypatch
):
    network = varied_network()
    settings = {"seed": 4, "reconstruction_weight": 0.125}
    save_checkpoint(tmp_path / "checkpoint/mnist", network, **settings)
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    words = ["--test", "--reconstruction_weight=9", *QUICK]
    result = run(tmp_path, *words)
    assert result.code == 0 and result.err == ""
    lengths = network(few.x_test / np.float32(255))[0].numpy()
    predictions = lengths.argmax(axis=1)
    wrong = np.flatnonzero(predictions != few.y_test)
    assert 100 < len(wrong) < 190

    images, numbers, labels, guesses, scores, names = drawn["samples/misclassified.png"]
    assert names == few.class_names
    np.testing.assert_array_equal(numbers, wrong)
    np.testing.assert_array_equal(images, few.x_test[wrong])
    np.testing.assert_array_equal(labels, few.y_test[wrong])
    np.testing.assert_array_equal(guesses, predictions[wrong])
    np.testing.assert_allclose(scores, lengths[wrong], atol=1e-5)

    matrix, _ = drawn["samples/confusion_matrix.png"]
    expected = np.zeros((10, 10), int)
    for label, guess in zip(few.y_test, predictions, strict=True):
        expected[label, guess] += 1
    np.testing.assert_array_equal(matrix, expected)

    present_lengths, absent_lengths, margins = drawn["samples/capsule_lengths.png"]
    assert len(absent_lengths) == 1800 and margins == (0.1, 0.9)
    own = [row[label] for row, label in zip(lengths, few.y_test, strict=True)]
    np.testing.assert_allclose(present_lengths, own, atol=1e-5)
    assert absent_lengths.sum() == pytest.approx(lengths.sum() - np.sum(own), rel=1e-4)

    written = json.loads((tmp_path / "logs/mnist/test.json").read_text())
    assert (written["wrong"], written["images"]) == (len(wrong), 200)
    assert written["accuracy"] == pytest.approx(1 - len(wrong) / 200)
    assert written["images_per_second"] > 0
    # The weight is that of the training run, not of this command.
    assert written["total_loss"] == pytest.approx(
        written["margin_loss"] + 0.125 * written["reconstruction_loss"]
    )
    # With what it was made.
    assert list(written)[-12:] == [
        *("images_per_second", "dataset", "checkpoint_step", "seed", "training"),
        *("training_seconds", "flags", "command", "machine", "commit", "date", "versions"),
    ]
    assert (written["dataset"], written["checkpoint_step"], written["seed"]) == ("mnist", 15, 4)
    assert written["training"] == complete_training(RUN | settings)
    assert written["training_seconds"] is None and written["commit"] == "abc"
    assert shlex.split(written["command"]) == ["main.py", *words]
    values = main.parse(["main.py", *words])
    assert written["flags"] == {name: getattr(values, name) for name, *_ in main.ROWS}
    assert written["versions"]["tensorflow"] == tf.__version__ and "numpy" in written["versions"]
    assert written["machine"] == machine.describe_machine()
    for number, name in enumerate(few.class_names):
        share = expected[number, number] / expected[number].sum()
        assert written["accuracy_per_class"][name] == pytest.approx(share)
    assert written["confusion"] == expected.tolist()
    for number, name in enumerate(few.class_names):
        guessed = expected[:, number].sum()
        share = expected[number, number] / guessed if guessed else None
        assert written["precision_per_class"][name] == pytest.approx(share)
    with open(tmp_path / "logs/mnist/predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["number", "label", "prediction", *(f"length_{k}" for k in range(10))]
    columns = list(zip(*rows, strict=True))
    assert columns[0] == tuple(map(str, range(200)))
    assert columns[1] == tuple(map(str, few.y_test)) and columns[2] == tuple(map(str, predictions))
    np.testing.assert_allclose(np.float64(columns[3:]).T, lengths, atol=1e-5)
    present = np.eye(10)[few.y_test]
    margin = present * np.maximum(0, 0.9 - lengths) ** 2
    margin += 0.5 * (1 - present) * np.maximum(0, lengths - 0.1) ** 2
    assert written["margin_loss"] == pytest.approx(margin.sum(axis=1).mean(), rel=1e-4)
    scalars = scalars_of(tmp_path / "logs/mnist/test")
    assert scalars == {
        "loss/total": (15, pytest.approx(written["total_loss"], rel=1e-6)),
        "loss/margin": (15, pytest.approx(written["margin_loss"], rel=1e-6)),
        "loss/reconstruction": (15, pytest.approx(written["reconstruction_loss"], rel=1e-6)),
        "accuracy": (15, pytest.approx(written["accuracy"], rel=1e-6)),
    }
    assert (
        "Wrote logs/mnist/test.json, logs/mnist/predictions.csv, "
        "samples/confusion_matrix.png, samples/misclassified.png, samples/capsule_lengths.png\n"
    ) in result.out


def test_every_pair_is_counted_and_the_sheet_shows_what_was_predicted(tmp_path, few, drawn):
    network = varied_network((36, 36, 1))
    save_checkpoint(tmp_path / "multi_checkpoint/multi_mnist", network, multi_MNIST=True)
    result = run(tmp_path, "--test", "--multi_MNIST", "--multi_test_pairs=3", *QUICK)
    assert result.code == 0 and "of 600 pairs wrong" in result.out
    plan = Examples(None, few.y_test, max_shift=4, overlap=True).evaluation_plan(3)
    assert np.bincount(plan.index[:, 0]).tolist() == [3] * 200
    canvas = compose_slowly(few.x_test, plan, 4)
    lengths, capsules = (part.numpy() for part in network(canvas))
    longest, labels = np.argsort(-lengths)[:, :2], few.y_test[plan.index]
    right = (np.sort(longest) == np.sort(labels)).all(axis=1)
    assert 6 < right.sum() < 14
    written = json.loads((tmp_path / "logs/multi_mnist/test.json").read_text())
    assert (written["wrong"], written["images"]) == (600 - right.sum(), 600)
    digits = [label in row for row, pair in zip(longest, labels, strict=True) for label in pair]
    assert written["digit_accuracy"] == pytest.approx(np.mean(digits))
    assert written["flags"]["multi_test_pairs"] == 3

    title, inputs, reconstructions, shown, guesses, names = drawn["samples/multi_MNIST.png"]
    chosen = np.concatenate([np.flatnonzero(right)[:14], np.flatnonzero(~right)[:6]])
    assert names == few.class_names
    assert title == (
        f"Overlapping digits: {600 - right.sum()} of 600 pairs wrong; the first {right.sum()} "
        "right ones, then the first 6 wrong ones"
    )
    np.testing.assert_allclose(inputs, canvas[chosen], atol=1e-6)
    np.testing.assert_array_equal(shown, labels[chosen])
    np.testing.assert_array_equal(guesses, longest[chosen])
    for place in (0, 1):  # drawn from the predicted capsules, in the order of the predictions
        expected = decode(network, capsules[chosen], longest[chosen, place])
        np.testing.assert_allclose(reconstructions[:, place], expected, atol=1e-4)
        other = decode(network, capsules[chosen], labels[chosen, place])
        assert np.abs(expected - other).max() > 0.01
    present_lengths, absent_lengths, _ = drawn["samples/capsule_lengths.png"]
    assert (len(present_lengths), len(absent_lengths)) == (1200, 4800)
    own = sum(lengths[np.arange(600), labels[:, place]] for place in (0, 1)).sum()
    assert present_lengths.sum() == pytest.approx(own, rel=1e-4)
    assert len(drawn) == 2


def test_the_evaluation_reports_its_progress_and_other_workers_than_the_chief_write_nothing(
    tmp_path, few, monkeypatch
):
    shown = []
    monkeypatch.setattr(
        terminal.Display, "show_count", lambda self, *args: shown.append(args), raising=True
    )
    monkeypatch.chdir(tmp_path)
    command = Command(*QUICK, "--test")
    devices = command.devices._replace(chief=False)
    weights = weights_of(varied_network())
    run_test(command.flags, command.argv, devices, command.data, weights)
    assert shown == [("Testing", 128, 200), ("Testing", 200, 200)]
    assert list(tmp_path.iterdir()) == []


def test_a_test_without_errors_draws_a_page_without_images(tmp_path, few, drawn):
    data, path = Command("--test").data.test, tmp_path / "a.png"
    right = SINGLE._replace(correct=np.ones(3, bool), predictions=SINGLE.labels)
    plan = data.evaluation_plan().take(slice(3))
    save_misclassified(path, data, plan, right, data.class_names)
    assert path.exists() and len(drawn[str(path)][0]) == 0


def test_the_sheet_of_pairs_has_fourteen_right_ones_and_six_wrong_ones(tmp_path, few, drawn):
    data, path = Command("--test", "--multi_MNIST").data.test, tmp_path / "a.png"
    plan = data.evaluation_plan()
    correct = np.arange(200) % 3 > 0
    labels = few.y_test[plan.index]
    evaluation = Evaluation(np.zeros((200, 10)), labels[:, ::-1], labels, correct, {})
    network = varied_network((36, 36, 1))
    save_multi_sheet(path, network, data, plan, evaluation, few.class_names)
    title, _, _, shown, guesses, _ = drawn[str(path)]
    chosen = [n for n in range(200) if n % 3][:14] + [0, 3, 6, 9, 12, 15]
    np.testing.assert_array_equal(shown, labels[chosen])
    np.testing.assert_array_equal(guesses, labels[chosen, ::-1])
    assert title == (
        "Overlapping digits: 67 of 200 pairs wrong; the first 14 right ones, then the first 6 "
        "wrong ones"
    )


def test_the_default_convolution_and_compiler_count_the_same_errors(tmp_path, few):
    network = varied_network()
    save_checkpoint(tmp_path / "checkpoint/mnist", network)
    result = run(tmp_path, "--test", DATA)
    predictions = network(few.x_test / np.float32(255))[0].numpy().argmax(axis=1)
    wrong = int((predictions != few.y_test).sum())
    (shown,) = re.findall(r", (\d+) of 200 wrong", result.out)
    # Another convolution decides near-ties differently.
    assert result.code == 0 and abs(int(shown) - wrong) <= 1 and wrong < 190
