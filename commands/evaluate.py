"""`--test`: accuracy and losses over all test images."""

import shlex
import time
from pathlib import Path

import numpy as np

import ops
import utils
from capsnet_core.config import TrainingConfig
from commands.data import run_folders, run_name
from commands.reports import outputs_of, summarize, training_seconds
from figures import examples, files, plots
from figures.confusion import confusion_matrix
from figures.pages import drawable_names
from runtime.machine import provenance
from runtime.terminal import Display, report_written
from training.evaluation import BATCH_SIZE, Evaluator
from training.events import replacing_events, write_scalars

RIGHT_PAIRS, WRONG_PAIRS = 14, 6  # on the sheet of overlapping digits


def test(flags, argv, devices, data, weights):
    """Measure and print accuracy and losses; write files to LOGDIR/RUN and pictures of errors."""
    plan = data.test.evaluation_plan(flags.multi_test_pairs)
    evaluation, images_per_second = measure(weights.network, devices, data.test, plan)
    if not devices.chief:
        return
    folder, samples = run_folders(flags).logs, Path(flags.sample_dir)
    result = make_result(weights, evaluation, data.class_names)
    result |= {
        "images_per_second": images_per_second,
        "dataset": run_name(flags),
        "checkpoint_step": weights.metadata["step"],
        "seed": weights.training["seed"],
        "training": weights.training,
        "training_seconds": training_seconds(weights.metadata, folder),
        "flags": flags.flag_values_dict(),
        "command": shlex.join(argv),
        **provenance(),
    }
    print_result(result, evaluation, data.test.overlap)
    header, rows = predictions_table(
        data.test, plan, evaluation, weights.network.config.score, data.dataset.test_files
    )
    utils.write_csv(folder / "predictions.csv", header, rows)
    utils.write_json(folder / "test.json", result)
    names = drawable_names(data.class_names)
    with replacing_events(folder / "test", "evaluation", weights.metadata["step"]):
        write_scalars(result["total_loss"], evaluation.losses, evaluation.accuracy)
        matrix = summarize(evaluation, data.test, weights.network.config.score)
    has_capsules = weights.network.config.network == "capsnet"
    pictures = []
    if not data.test.overlap:
        pictures = [samples / "confusion_matrix.png", samples / "misclassified.png"]
        files.write_png(pictures[0], matrix)
        save_misclassified(pictures[1], data.test, plan, evaluation, names)
    elif has_capsules:
        pictures = [samples / "multi_MNIST.png"]
        save_multi_sheet(pictures[0], weights.network, data.test, plan, evaluation, names)
    if has_capsules:
        pictures.append(samples / "capsule_lengths.png")
        save_lengths(pictures[-1], evaluation)
    report_written([folder / "test.json", folder / "predictions.csv", *pictures])


def measure(network, devices, data, plan):
    """Return the Evaluation of a plan, and images per second without the time to compile."""
    evaluator = Evaluator(network, devices.jit, devices.strategy)
    evaluator.evaluate(data, plan.take(slice(BATCH_SIZE)))  # compiles
    began, total = time.perf_counter(), len(plan.index)
    with Display() as display:
        evaluation = evaluator.evaluate(
            data, plan, lambda done: display.show_count("Testing", done, total)
        )
    return evaluation, total / (time.perf_counter() - began)


def digits_right(evaluation):
    """Return for each digit (N, K) whether its class is among the predicted ones, in any order."""
    return (evaluation.labels[:, :, None] == evaluation.predictions[:, None]).any(axis=2)


def scores_per_class(evaluation, class_names):
    """Return accuracy, precision, recall and F1 of each class; None where one is undefined.

    A class counts once in an example, wherever its digit is in a pair. The recall is undefined for
    a class that is not in the test, the precision for one that is never predicted, and F1, twice
    the hits over present and predicted together, where a class is neither. The accuracy of a class
    is its recall.
    """
    classes = np.arange(len(class_names))
    present, predicted = (
        (part[:, :, None] == classes).any(axis=1)  # (N, K) -> (N, J)
        for part in (evaluation.labels, evaluation.predictions)
    )
    hits, present, predicted = (
        part.sum(axis=0) for part in (present & predicted, present, predicted)
    )

    def shares(parts, wholes):
        ratios = zip(class_names, parts, wholes, strict=True)
        return {name: float(part / whole) if whole else None for name, part, whole in ratios}

    recall = shares(hits, present)
    return {
        "accuracy_per_class": recall,
        "precision_per_class": shares(hits, predicted),
        "recall_per_class": recall,
        "f1_per_class": shares(2 * hits, present + predicted),
    }


def predictions_table(data, plan, evaluation, score, test_files=None):
    """Return the header and the rows of predictions.csv.

    A row has the numbers of the test images, counted from 0, the names of their classes and of the
    predicted ones, and the score of each class; before them the file, if each image is one of
    `test_files`. Of several pairs for each image only the first is listed: there may be millions.
    """
    names, digits = data.class_names, [""]
    if data.overlap:
        digits = [f"_{place + 1}" for place in range(data.digits_per_example)]
    header = [column + digit for column in ("number", "label", "prediction") for digit in digits]
    header += [f"{score}_{name}" for name in names]
    parts = plan.index, evaluation.labels, evaluation.predictions, evaluation.scores
    rows = [
        [
            *numbers.tolist(),
            *(names[k] for k in (*labels, *predictions)),
            *(round(float(value), 6) for value in scores),
        ]
        for numbers, labels, predictions, scores in zip(
            *(part[: len(data.labels)] for part in parts), strict=True
        )
    ]
    if test_files and not data.overlap:
        header = ["file", *header]
        rows = [[test_files[row[0]], *row] for row in rows]
    return header, rows


def make_result(weights, evaluation, class_names):
    """Return the accuracies and losses of test.json."""
    wrong, images = int(np.sum(~evaluation.correct)), len(evaluation.correct)
    known = {name: weights.training.get(name) for name in TrainingConfig._fields}
    training = TrainingConfig(**{name: value for name, value in known.items() if value is not None})
    result = {
        "accuracy": evaluation.accuracy,
        "error_percent": 100 * wrong / images,
        "wrong": wrong,
        "images": images,
        "digit_accuracy": float(digits_right(evaluation).mean()),
        **{f"{name}_loss": loss for name, loss in evaluation.losses.items()},
        "total_loss": training.total_loss(evaluation.losses),
        **scores_per_class(evaluation, class_names),
    }
    labels, predictions = evaluation.labels, evaluation.predictions
    if labels.shape[1] == 1:  # which label of a pair belongs to which prediction is undefined
        matrix = confusion_matrix(labels[:, 0], predictions[:, 0], len(class_names))
        result["confusion"] = matrix.tolist()
    return result


def print_result(result, evaluation, overlap):
    """Print accuracy, losses and the accuracy of each class."""
    digits = pairs = ""
    if overlap:
        digits = f" (both digits right; of single digits {100 * result['digit_accuracy']:.2f}%)"
        pairs = "pairs "
    print(
        f"Test accuracy {100 * result['accuracy']:.2f}%{digits}, error "
        f"{result['error_percent']:.2f}%, {result['wrong']} of {result['images']} {pairs}wrong"
    )
    losses = [
        f"{name.replace('_', ' ')} loss {loss:.{3 if name == 'reconstruction' else 5}f}, "
        for name, loss in evaluation.losses.items()
    ]
    print(
        f"{''.join(losses).capitalize()}total {result['total_loss']:.5f}; "
        f"{result['images_per_second']:.0f} images/s"
    )
    shares = result["accuracy_per_class"].items()
    tested = [f"{name} {100 * share:.2f}%" for name, share in shares if share is not None]
    print("Accuracy per class: " + ", ".join(tested))


def save_misclassified(path, data, plan, evaluation, names):
    """Draw the misclassified images with their numbers in the test set."""
    wrong = ~evaluation.correct
    numbers = plan.index[wrong, 0]
    picture = examples.draw_misclassified(
        data.images[numbers],
        numbers,
        evaluation.labels[wrong, 0],
        evaluation.predictions[wrong, 0],
        evaluation.scores[wrong],
        names,
    )
    files.write_png(path, picture)


def save_lengths(path, evaluation):
    """Draw how long the capsules of present and of absent classes are."""
    classes = np.arange(evaluation.scores.shape[1])
    present = (evaluation.labels[:, :, None] == classes).any(axis=1)  # (N, K) -> (N, J)
    lengths, margins = evaluation.scores, (ops.M_MINUS, ops.M_PLUS)
    picture = plots.draw_length_histogram(lengths[present], lengths[~present], margins)
    files.write_png(path, picture)


def save_multi_sheet(path, network, data, plan, evaluation, names):
    """Draw the first right pairs and the first wrong ones (figure 5)."""
    right = np.flatnonzero(evaluation.correct)
    wrong = np.flatnonzero(~evaluation.correct)
    chosen = np.concatenate([right[:RIGHT_PAIRS], wrong[:WRONG_PAIRS]])
    title = (
        f"Overlapping digits: {len(wrong):,} of {len(evaluation.correct):,} pairs wrong; the first "
        f"{len(right[:RIGHT_PAIRS])} right ones, then the first {len(wrong[:WRONG_PAIRS])} wrong "
        "ones"
    )
    outputs, _ = outputs_of(network, data, plan.take(chosen))
    picture = examples.draw_multi(
        title,
        outputs.canvas,
        outputs.without_label,
        evaluation.labels[chosen],
        evaluation.predictions[chosen],
        names,
    )
    files.write_png(path, picture)
