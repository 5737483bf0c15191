"""Progress after a training step, and the speed of the steps."""

import time
from typing import NamedTuple


class Progress(NamedTuple):
    """Progress after a training step."""

    epoch: int  # from 1
    epochs: int
    step: int
    last_step: int
    images_per_second: float | None  # None until a step was measured
    seconds_left: float | None
    losses: dict  # name of a term of the loss -> its mean in this epoch so far
    accuracy: float  # in this epoch so far


class Speedometer:
    """Measures steps a second, without the first one, which compiles or waits for its batch."""

    def __init__(self):
        self._began, self._steps = None, 0

    def count_step(self):
        """Count a step; return the steps a second, None after the first one."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
            return None
        self._steps += 1
        return self._steps / (now - self._began)
