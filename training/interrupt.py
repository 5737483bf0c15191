"""Stop training on a signal, after the current step."""

import contextlib
import signal

from capsnet_core.errors import Interrupted

# What a user, a closing terminal and a batch system such as Slurm send.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# A closing terminal may send SIGHUP twice, and a batch system repeats a warning.
IMPATIENT = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Context manager that notes a signal to stop; a second Ctrl-C or SIGTERM acts at once.

    A signal that is ignored, as under nohup, stays ignored. Leaving it without an exception raises
    Interrupted if a signal came when there was no step left that could have noticed it. `number` is
    that of the signal, None until one comes.
    """

    def __init__(self):
        self.number = None
        self._previous = {}

    def __enter__(self):
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
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
        if number in IMPATIENT:
            signal.signal(number, self._previous[number])
