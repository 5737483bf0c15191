"""Errors of TensorFlow and the system as one line: what is wrong, what to do."""

import errno
import os
import re
import sys

from capsnet_core.errors import UserError, os_advice

# What TensorFlow puts around the message of an error in a graph: nodes, Python's stack, a hint.
GRAPH_LINES = (
    r"^(?:Graph execution error:|Detected at node .*|\s*File \".*\", line \d+, in .*|\s*\[\[.*"
    r"|Hint: If you want to see a list of allocated tensors .*)$"
)


def reason(error):
    """Return the message of a TensorFlow error in one line, without graph nodes and code lines."""
    message = re.sub(GRAPH_LINES, "", str(error), flags=re.MULTILINE)
    return re.sub(r"{{.*?}}|\[Op:.*", "", " ".join(message.split())).strip()


def is_out_of_memory(error):
    """Return whether an error of Python or TensorFlow says that memory is short."""
    if isinstance(error, MemoryError):
        return True
    # TensorFlow raises the same type for a full disk.
    if type(error).__name__ != "ResourceExhaustedError" or os.strerror(errno.ENOSPC) in str(error):
        return False
    return re.search(r"\boom\b|out of memory|allocat", str(error), re.IGNORECASE) is not None


def is_expected(error):
    """Return whether an error is one of the user, of the system or of TensorFlow, no bug."""
    tf = sys.modules.get("tensorflow")
    of_tensorflow = tf is not None and isinstance(error, tf.errors.OpError)
    return of_tensorflow or isinstance(error, (UserError, OSError, MemoryError))


def describe_error(error, advice=""):
    """Describe an error that is no fault of the program in one line: what is wrong, what to do.

    `advice` is what the user can do, for a UserError or if memory is short.
    """
    import tensorflow as tf

    lost = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
    )
    if isinstance(error, UserError):
        return f"{error}; {advice}" if advice else str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        problem = error.strerror or error
        helps = os_advice(error)
        return f"{place}{problem}; {helps}" if helps else f"{place}{problem}"
    if is_out_of_memory(error):
        return f"out of memory; {advice or 'try a smaller batch or network'}"
    if "TF_CONFIG" in os.environ and isinstance(error, lost):  # several workers
        return (
            "another worker stopped or cannot be reached; start all workers again, they resume "
            "from the last checkpoint"
        )
    parts = reason(error), os_advice(error), "earlier checkpoints are unchanged"
    return "; ".join(part for part in parts if part)
