"""What every reader returns."""

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
    x_validation: np.ndarray | None = None  # images of its val/ folder, if it has one
    y_validation: np.ndarray | None = None
    test_files: tuple[str, ...] | None = None  # image files in a folder, in the order of x_test
    held_out_seed: int | None = None  # that drew the test images, if the folder had none
    inverted: bool = False  # whether light and dark were swapped
    subtracted: tuple[int, ...] | None = None  # colour of the background that was subtracted

    def map_images(self, function):
        """Return the same data set with a function applied to each array of images."""
        validation = None if self.x_validation is None else function(self.x_validation)
        return self._replace(
            x_train=function(self.x_train), x_test=function(self.x_test), x_validation=validation
        )

    def with_note(self, note):
        """Return the same data set with one more note."""
        return self._replace(notes=(*self.notes, note))
