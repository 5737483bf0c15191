"""Progress after a training step, and the speed of the steps."""

import time
from typing import NamedTuple


class Progress(NamedTuple):
    """Progress after a training step."""

    epoch: int  # from 1
    epochs: int
    step: int
    last_step: int
    images_per_second: float
    seconds_left: float
    losses: dict  # name of a term of the loss -> its mean in this epoch so far
    accuracy: float  # in this epoch so far


class Speedometer:
    """Measures steps a second, without the first one, which compiles or waits for its batch."""

    def __init__(self):
        self._began, self._steps, self._first = time.perf_counter(), 0, True

    def count_step(self):
        """Count a step and return the steps a second."""
        self._steps += 1
        now = time.perf_counter()
        speed = self._steps / (now - self._began)
        if self._first:
            self._began, self._steps, self._first = now, 0, False
        return speed
