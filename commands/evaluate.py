"""`--test`: accuracy and losses over all test images."""

import shlex
import time
from pathlib import Path

import numpy as np

import figures
import utils
from capsnet.config import TrainingConfig
from commands.pictures import outputs_of
from commands.train import summarize
from runtime.machine import provenance
from runtime.terminal import Display, report_written
from training.evaluation import BATCH_SIZE, Evaluator
from training.events import read_scalars, replacing_events, write_scalars

RIGHT_PAIRS, WRONG_PAIRS = 14, 6  # on the sheet of overlapping digits


def test(session):
    """Measure and print accuracy and losses; write files to LOGDIR/RUN and pictures of errors."""
    plan = session.test_data.evaluation_plan(session.flags.multi_test_pairs)
    evaluation, images_per_second = measure(session, plan)
    if not session.chief:
        return
    result = make_result(session, evaluation, images_per_second)
    print_result(result, evaluation, session.test_data.overlap)
    folder, samples = session.folders.logs, Path(session.flags.sample_dir)
    test_files = session.dataset.test_files
    header, rows = predictions_table(session.test_data, plan, evaluation, test_files)
    utils.write_csv(folder / "predictions.csv", header, rows)
    utils.write_json(folder / "test.json", result)
    matrix = samples / "confusion_matrix.png"
    with replacing_events(folder / "test", "evaluation", session.metadata["step"]):
        write_scalars(result["total_loss"], evaluation.losses, evaluation.accuracy)
        summarize(evaluation, session.test_data, matrix)
    if session.test_data.overlap:
        pictures = [save_multi_sheet(session, plan, evaluation)]
    else:
        pictures = [matrix, save_misclassified(session, plan, evaluation)]
    pictures.append(save_lengths(session, evaluation))
    report_written([folder / "test.json", folder / "predictions.csv", *pictures])


def measure(session, plan):
    """Evaluate the test images of a plan.

    Returns:
        Evaluation, and images per second without the time to compile.
    """
    data = session.test_data
    evaluator = Evaluator(session.network, session.jit, session.strategy)
    evaluator.evaluate(data, plan.take(slice(BATCH_SIZE)))  # compiles
    began, total = time.perf_counter(), len(plan.index)
    with Display() as display:
        evaluation = evaluator.evaluate(
            data, plan, lambda done: display.show_count("Testing", done, total)
        )
    return evaluation, total / (time.perf_counter() - began)


def digits_right(evaluation):
    """Tell for each digit (N, K) whether its class is among the predicted ones, in any order."""
    return (evaluation.labels[:, :, None] == evaluation.predictions[:, None]).any(axis=2)


def scores_per_class(evaluation, class_names):
    """Return accuracy, precision, recall and F1 of each class; None where one is undefined.

    A class counts once in an example, wherever its digit is in a pair. The recall is undefined for
    a class that is not in the test, the precision for one that is never predicted, and F1, twice
    the hits over present and predicted together, where a class is neither. The accuracy of a class
    is its recall.

    Returns:
        Dict of `accuracy_per_class`, `precision_per_class`, `recall_per_class` and `f1_per_class`,
        each a dict by class name.
    """
    precision, recall, f1 = {}, {}, {}
    for number, name in enumerate(class_names):
        present = (evaluation.labels == number).any(axis=1)
        predicted = (evaluation.predictions == number).any(axis=1)
        hits = np.sum(present & predicted)
        precision[name] = _share(hits, predicted.sum())
        recall[name] = _share(hits, present.sum())
        f1[name] = _share(2 * hits, present.sum() + predicted.sum())
    return {
        "accuracy_per_class": recall,
        "precision_per_class": precision,
        "recall_per_class": recall,
        "f1_per_class": f1,
    }


def _share(part, whole):
    return float(part / whole) if whole else None


def confusion(evaluation, class_names):
    """Return how often each class (row) was predicted as each (column); {} for pairs."""
    if evaluation.labels.shape[1] > 1:
        return {}  # which label of a pair belongs to which prediction is undefined
    labels, predictions = evaluation.labels[:, 0], evaluation.predictions[:, 0]
    matrix = figures.confusion_matrix(labels, predictions, len(class_names))
    return {"confusion": matrix.tolist()}


def predictions_table(data, plan, evaluation, test_files=None):
    """Return the header and the rows of predictions.csv.

    A row has the numbers of the test images, counted from 0, the names of their classes and of the
    predicted ones, and the length of each class's capsule. Of several pairs for each image only the
    first is listed, as there may be millions.

    Args:
        data: Examples that was tested.
        plan: its Plan.
        evaluation: its Evaluation.
        test_files: paths of the test images, if each is a file; then a column has them.
    """
    names, digits = data.class_names, [""]
    if data.overlap:
        digits = [f"_{place + 1}" for place in range(data.digits_per_example)]
    header = [column + digit for column in ("number", "label", "prediction") for digit in digits]
    header += [f"length_{name}" for name in names]
    parts = plan.index, evaluation.labels, evaluation.predictions, evaluation.scores
    rows = [
        [
            *numbers.tolist(),
            *(names[k] for k in (*labels, *predictions)),
            *(round(float(length), 6) for length in lengths),
        ]
        for numbers, labels, predictions, lengths in zip(
            *(part[: len(data.labels)] for part in parts), strict=True
        )
    ]
    if test_files and not data.overlap:
        header = ["file", *header]
        rows = [[test_files[row[0]], *row] for row in rows]
    return header, rows


def make_result(session, evaluation, images_per_second):
    """Return the contents of test.json: accuracies, losses, settings, and how they were made."""
    training = session.metadata["training"]
    wrong, images = int(np.sum(~evaluation.correct)), len(evaluation.correct)
    weights = TrainingConfig(
        **{name: training[name] for name in TrainingConfig._fields if name in training}
    )
    return {
        "accuracy": evaluation.accuracy,
        "error_percent": 100 * wrong / images,
        "wrong": wrong,
        "images": images,
        "digit_accuracy": float(digits_right(evaluation).mean()),
        "margin_loss": evaluation.losses["margin"],
        "reconstruction_loss": evaluation.losses["reconstruction"],
        "total_loss": weights.total_loss(evaluation.losses),
        **scores_per_class(evaluation, session.dataset.class_names),
        **confusion(evaluation, session.dataset.class_names),
        "images_per_second": images_per_second,
        "dataset": session.name,
        "checkpoint_step": session.metadata["step"],
        "seed": training["seed"],
        "training": training,
        "training_seconds": training_seconds(session),
        "flags": session.flags.flag_values_dict(),
        "command": shlex.join(session.argv),
        **provenance(),
        "commit": session.commit,
    }


def training_seconds(session):
    """Return how long the weights were trained, by their events; None if these are gone."""
    if "seconds" in session.metadata:
        return session.metadata["seconds"]
    step = session.metadata["step"]
    scalars, seconds = read_scalars(session.folders.logs / "train", step)
    steps = scalars.get("loss/total", ([],))[0]
    complete = len(steps) > 0 and (steps[0], steps[-1]) == (1, step)
    return seconds if complete else None


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
    print(
        f"Margin loss {result['margin_loss']:.5f}, reconstruction loss "
        f"{result['reconstruction_loss']:.3f}, total {result['total_loss']:.5f}; "
        f"{result['images_per_second']:.0f} images/s"
    )
    shares = result["accuracy_per_class"].items()
    tested = [f"{name} {100 * share:.2f}%" for name, share in shares if share is not None]
    print("Accuracy per class: " + ", ".join(tested))


def save_misclassified(session, plan, evaluation):
    """Draw the misclassified images with their numbers in the test set; return the file."""
    path = Path(session.flags.sample_dir) / "misclassified.png"
    wrong = ~evaluation.correct
    numbers = plan.index[wrong, 0]
    figures.save_misclassified(
        path,
        session.test_data.images[numbers],
        numbers,
        evaluation.labels[wrong, 0],
        evaluation.predictions[wrong, 0],
        evaluation.scores[wrong],
        figures.drawable_names(session.dataset.class_names),
    )
    return path


def save_lengths(session, evaluation):
    """Draw how long the capsules of present and of absent classes are; return the file."""
    path = Path(session.flags.sample_dir) / "capsule_lengths.png"
    classes = np.arange(evaluation.scores.shape[1])
    present = (evaluation.labels[:, :, None] == classes).any(axis=1)  # (N, K) -> (N, J)
    figures.save_length_histogram(path, evaluation.scores[present], evaluation.scores[~present])
    return path


def save_multi_sheet(session, plan, evaluation):
    """Draw the first right pairs and the first wrong ones (figure 5); return the file."""
    right = np.flatnonzero(evaluation.correct)
    wrong = np.flatnonzero(~evaluation.correct)
    chosen = np.concatenate([right[:RIGHT_PAIRS], wrong[:WRONG_PAIRS]])
    title = (
        f"Overlapping digits: {len(wrong):,} of {len(evaluation.correct):,} pairs wrong; the first "
        f"{len(right[:RIGHT_PAIRS])} right ones, then the first {len(wrong[:WRONG_PAIRS])} wrong "
        "ones"
    )
    outputs, _ = outputs_of(session.network, session.test_data, plan.take(chosen))
    path = Path(session.flags.sample_dir) / "multi_MNIST.png"
    figures.save_multi(
        path,
        title,
        outputs.canvas,
        outputs.without_label,
        evaluation.labels[chosen],
        evaluation.predictions[chosen],
        figures.drawable_names(session.dataset.class_names),
    )
    return path
