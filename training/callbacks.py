"""What a training run tells others, and when: the methods of a callback have Keras's names."""

from typing import NamedTuple

from training.evaluation import Evaluation


class Validation(NamedTuple):
    """Result of the validation after an epoch."""

    step: int
    loss: float  # the total loss
    evaluation: Evaluation
    improved: bool  # whether the loss is the lowest so far


class Callback:
    """What `Trainer.fit` calls. The methods do nothing: a subclass overrides those it needs.

    `tf.summary` writes to the run's events, except in `on_train_batch_end` and `on_message`.
    """

    def on_train_begin(self, step):
        """Do something before the first step: 0, or that of the checkpoint to resume from."""

    def on_train_batch_end(self, progress):
        """Do something after a step, with its Progress."""

    def on_epoch_end(self, epoch):
        """Do something after an epoch, before its validation, with the averages of the weights.

        Epochs count from 1.
        """

    def on_test_end(self, validation):
        """Do something after the Validation, with the averages of the weights."""

    def on_message(self, text):
        """Do something with a line of text for the user."""


class Printing(Callback):
    """Shows the progress, validations and messages of a training run on a Display.

    If `checkpoints` is given, a line says that the run resumes from this folder.
    """

    def __init__(self, display, checkpoints=None):
        self.display, self.checkpoints = display, checkpoints

    def on_train_begin(self, step):
        """Say from which step the run resumes."""
        if step and self.checkpoints:
            self.display.report(f"Resuming from step {step} ({self.checkpoints}).")

    def on_train_batch_end(self, progress):
        """Show the Progress."""
        self.display.show_step(progress)

    def on_test_end(self, validation):
        """Show the loss and accuracy of a Validation."""
        best = ", the best so far" if validation.improved else ""
        self.display.report(
            f"Validation after step {validation.step}: loss {validation.loss:.5f}, accuracy "
            f"{100 * validation.evaluation.accuracy:.2f}%{best}"
        )

    def on_message(self, text):
        """Show the line."""
        self.display.report(text)
