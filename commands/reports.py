"""What several modes report: outputs of chosen examples, and summaries for TensorBoard."""

import tensorflow as tf

from figures import confusion
from figures.pages import drawable_names
from inputs.pipeline import batches
from model import Outputs
from training.events import read_scalars, replacing_events

# How TensorBoard names what classes are ranked by.
SCORES = {"length": "length of capsule", "probability": "probability of class"}


def outputs_of(network, data, plan):
    """Run a CapsNet on all of a plan as one batch; return Outputs as arrays, and labels (B, K)."""
    batch = next(iter(batches(data, plan, len(plan.index))))
    inference = network.inference(lambda function: function)  # uncompiled: it runs only once
    outputs = inference.outputs(batch, inference.prepare())
    return Outputs(*(value.numpy() for value in outputs)), batch[2].numpy()


def summarize(evaluation, data, score):
    """Write summaries of an Evaluation: the confusion matrix, the scores of each class.

    `data` are Examples of the same classes, `score` is what these are ranked by.

    Returns:
        The picture of the confusion matrix, uint8 (H, W, 3); None for overlapping digits.
    """
    names, labels, picture = data.class_names, evaluation.labels, None
    if not data.overlap:
        matrix = confusion.confusion_matrix(labels[:, 0], evaluation.predictions[:, 0], len(names))
        picture = confusion.draw_confusion_matrix(matrix, drawable_names(names))
        tf.summary.image("confusion matrix", picture[None])
    for number, name in enumerate(names):
        present = (labels == number).any(axis=1)
        scores = evaluation.scores[:, number]
        tf.summary.histogram(f"where present, {SCORES[score]}/{name}", scores[present])
        tf.summary.histogram(f"where absent, {SCORES[score]}/{name}", scores[~present])
    return picture


def show_picture(logs, step, name, picture):
    """Show a picture (H, W, 3) in TensorBoard; it replaces that of an earlier command."""
    with replacing_events(logs / "test", name, step):
        tf.summary.image(name, picture[None])


def training_seconds(metadata, logs):
    """Return how long weights were trained, by the events of their run; None if these are gone."""
    if "seconds" in metadata:
        return metadata["seconds"]
    scalars, seconds = read_scalars(logs / "train", metadata["step"])
    steps = scalars.get("loss/total", ([],))[0]
    complete = len(steps) > 0 and (steps[0], steps[-1]) == (1, metadata["step"])
    return seconds if complete else None
