"""Stop training on a signal, after the current step."""

import contextlib
import signal

from capsnet.errors import Interrupted


class StopSignal:
    """Context manager that notes the first SIGTERM and the first Ctrl-C; a second one acts at once.

    Leaving it without an exception raises Interrupted if a signal came when there was no step left
    that could have noticed it.

    Attributes:
        number: number of the signal, None until one comes.
    """

    def __init__(self):
        self.number = None
        self._previous = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None and self.number:
            raise Interrupted(self.number)

    def _handle(self, number, frame):
        self.number = number
        signal.signal(number, self._previous[number])
