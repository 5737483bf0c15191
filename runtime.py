"""The surroundings of a run: TensorFlow's start, the allocator, the machine, progress, errors."""

import contextlib
import ctypes
import datetime
import faulthandler
import functools
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from errors import UserError

ROOT = Path(__file__).resolve().parent
WORKERS_SECONDS = 600


# --- TensorFlow -----------------------------------------------------------------------------------


def start_tensorflow(quiet="2"):
    """Import TensorFlow with the allocator set and its remarks kept off the terminal.

    Args:
        quiet: least level of TensorFlow's C++ messages that are shown, if the environment does not
            say it: "2" errors, "3" fatal ones.

    Returns:
        The module tensorflow.
    """
    keep_big_buffers()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", quiet)
    with silent_stderr():
        import keras  # noqa: F401 - Keras has remarks of its own
        import tensorflow as tf

        tf.config.list_physical_devices()
        tf.get_logger().setLevel("ERROR")
    return tf


@functools.cache
def keep_big_buffers():
    """Make glibc keep freed memory, in huge pages: handing it back costs a third of a step.

    All threads share one arena, which only grows and is not trimmed. The heap is grown once,
    marked, and freed untouched, so no memory is taken before it is used. Do nothing elsewhere than
    on Linux with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
    libc.mallopt(m_arena_max, 1)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 2**20)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size, page, madv_hugepage = 1900 * 2**20, 2**21, 14  # below the threshold; mman.h
    if heap := libc.malloc(size):
        libc.madvise(-(-heap // page) * page, size - 2 * page, madv_hugepage)
        libc.free(heap)


@contextlib.contextmanager
def silent_stderr():
    """Drop what is written to file descriptor 2, where TensorFlow writes before it is set up."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


@contextlib.contextmanager
def waiting_for_workers():
    """End the program if the wait inside is long, or at Ctrl-C.

    TensorFlow would wait for an hour. It does not let Python run meanwhile, so only what is written
    in C can end it.
    """
    print(
        "Waiting for the other workers of TF_CONFIG; if they do not all come, this one ends after "
        f"{WORKERS_SECONDS / 60:g} minutes.",
        flush=True,
    )
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(WORKERS_SECONDS, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGINT, handler)


def has_gpu():
    """Tell whether TensorFlow sees a GPU."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def fastest_conv():
    """Return the method of `ops.Convolution` that is the fastest on this machine's devices."""
    return "direct" if has_gpu() else "dft"


# --- Where a result comes from --------------------------------------------------------------------


def processor():
    """Return the name of the processor."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
    return name


def machine():
    """Return the processor, its number of cores, and the accelerators, in a line."""
    import tensorflow as tf

    gpus = [
        tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return ", ".join([f"{processor()} ({os.cpu_count()} cores)", *(gpus or ["no GPU"])])


@functools.cache
def commit():
    """Return the program's commit, with "-dirty" if files were changed since; None without git.

    Call it once at the start: the answer may be another one after an hour of training.
    """
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            words, cwd=ROOT, check=True, text=True, capture_output=True
        ).stdout.strip()


def provenance():
    """Return what a result was made with: machine, commit, date and versions."""
    import keras
    import numpy as np
    import tensorflow as tf

    return {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
    }


# --- Messages -------------------------------------------------------------------------------------


class Display:
    """Progress of long work: a bar on a terminal, elsewhere a plain line now and then."""

    PLAIN_SECONDS = 30

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self.console = Console(highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", table_column=Column()),  # may wrap
            console=self.console,
        )
        self.task, self.printed, self.began = None, -math.inf, time.monotonic()

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.console.is_terminal:
            self.bar.stop()

    def report(self, text):
        """Print a line above the bar."""
        self.console.print(text, markup=False)

    def show_step(self, progress):
        """Show the Progress of a training."""
        left = datetime.timedelta(seconds=round(progress.seconds_left))
        head = f"Epoch {progress.epoch}/{progress.epochs} step {progress.step}/{progress.last_step}"
        losses = "".join(
            f"{name.replace('_', ' ')} loss {value:.4g}, "
            for name, value in progress.losses.items()
        )
        text = (
            f"{progress.images_per_second:.0f} images/s, {left} left, {losses}"
            f"accuracy {100 * progress.accuracy:.2f}%"
        )
        end_of_epoch = progress.step * progress.epochs % progress.last_step == 0
        self._show(head, text, progress.step, progress.last_step, end_of_epoch)

    def show_count(self, what, done, total):
        """Show how many of anything are done; short work leaves no line."""
        self.printed = max(self.printed, self.began)
        self._show(what, f"{done:,} of {total:,}", done, total)

    def _show(self, head, text, done, total, due=False):
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task(head, text=text, total=total)
            self.bar.update(self.task, description=head, text=text, completed=done, total=total)
        elif due or time.monotonic() - self.printed > self.PLAIN_SECONDS:
            self.printed = time.monotonic()
            print(f"{head}: {text}", flush=True)


def say_written(paths):
    """Print which files were written."""
    print("Wrote " + ", ".join(str(path) for path in paths))


def plural(count, word):
    """Return a count with its noun, such as "1 epoch" or "2 epochs"."""
    return f"{count:g} {word}" if count == 1 else f"{count:g} {word}s"


def reason(error):
    """Return what an error of TensorFlow says, in one line, without the name of a graph's node."""
    return re.sub(r"{{.*?}}|\[Op:.*", "", " ".join(str(error).split())).strip()


def describe_error(error, advice="", several_workers=False):
    """Describe an error from outside the program in one line: what is wrong, and what to do.

    Args:
        error: UserError, OSError, MemoryError or an error of TensorFlow.
        advice: what the user can do, for a UserError or MemoryError.
        several_workers: whether other workers take part.
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
        return f"{place}{problem}; choose another folder, or make this one writable"
    if isinstance(error, MemoryError):
        return f"out of memory; {advice or 'try a smaller batch or network'}"
    if several_workers and isinstance(error, lost):
        return (
            "another worker stopped or cannot be reached; start all workers again, they resume "
            "from the last checkpoint"
        )
    return f"{reason(error)}; what was saved before is as it was"
