"""What every reader returns, and how images are drawn from it."""

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Images uint8 (N, H, W, C) and labels int32 (N,) from 0 to len(class_names) - 1."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()  # lines for the user: what was changed in reading
    x_validation: np.ndarray | None = None  # images of its own for validation, if it has some
    y_validation: np.ndarray | None = None
    test_files: tuple[str, ...] | None = None  # image files in a folder, in the order of x_test
    held_out_seed: int | None = None  # that drew the test images, if the folder had none
    inverted: bool = False  # whether light and dark were swapped
    subtracted: tuple[int, ...] | None = None  # colour of the background that was subtracted
    white: int | None = None  # what stands for white in image files of more than 8 bits
    shuffled: bool = False  # whether the first training images are a fair sample of all

    def map_images(self, function):
        """Return the same data set with a function applied to each array of images."""
        validation = None if self.x_validation is None else function(self.x_validation)
        return self._replace(
            x_train=function(self.x_train), x_test=function(self.x_test), x_validation=validation
        )

    def with_note(self, note):
        """Return the same data set with one more note."""
        return self._replace(notes=(*self.notes, note))


def draw_by_class(labels, count, stream, skipped=0):
    """Draw `count` indices of labels, sorted: about the same share of each class.

    With `skipped` 0 each class is drawn from before any is drawn from twice; with 1 the larger
    classes come first, so that small ones are not emptied.
    """
    order = stream.permutation(len(labels))
    position = np.empty(len(labels))  # how far through its class each one comes in this order
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        position[of_class] = np.arange(skipped, skipped + len(of_class)) / len(of_class)
    rank = np.empty(len(labels), int)
    rank[order] = np.arange(len(labels))
    return np.sort(np.lexsort((rank, position))[:count])
