"""Start TensorFlow, describe the machine, show progress, and turn errors into one line."""

import codecs
import contextlib
import ctypes
import datetime
import errno
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

import xla_cache
from errors import UserError, os_advice

ROOT = Path(__file__).resolve().parent
WORKERS_SECONDS = 600
# Memory limits of a container, in both versions of Linux's control groups.
CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
# What TensorFlow puts around the message of an error in a graph: nodes, Python's stack, a hint.
GRAPH_LINES = (
    r"^(?:Graph execution error:|Detected at node .*|\s*File \".*\", line \d+, in .*|\s*\[\[.*"
    r"|Hint: If you want to see a list of allocated tensors .*)$"
)
# What a processor multiplies bfloat16 with, by its flag in Linux's /proc/cpuinfo.
BFLOAT16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}


# --- TensorFlow -----------------------------------------------------------------------------------


def start_tensorflow(quiet="2", keep_compiled=False):
    """Set up signals and the allocator, then import TensorFlow without its startup messages.

    Keras computes with TensorFlow, whatever the environment and the user's keras.json say, and GPUs
    take memory as they need it.

    Args:
        quiet: the least severe C++ messages to show, "2" for errors and "3" for fatal ones. A
            TF_CPP_MIN_LOG_LEVEL in the environment takes precedence.
        keep_compiled: whether to keep what XLA compiles for later runs, if that is possible. Then
            only fatal messages are shown.

    Returns:
        The module tensorflow.
    """
    receive_signals_on_their_own_stack()
    keep_big_buffers()
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    cache = xla_cache.switched_on() if keep_compiled else contextlib.nullcontext()
    with silent_stderr(), cache:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", quiet)
        import keras  # Keras writes startup messages too
        import tensorflow as tf

        keras.config.set_floatx("float32")
        keras.config.set_image_data_format("channels_last")
        for gpu in tf.config.list_physical_devices("GPU"):
            with contextlib.suppress(RuntimeError):  # TensorFlow was started before
                tf.config.experimental.set_memory_growth(gpu, True)
        tf.get_logger().setLevel("ERROR")
    return tf


def receive_signals_on_their_own_stack():
    """Keep Ctrl-C from damaging the heap: give the main thread an alternate signal stack.

    oneDNN's matrix product for AVX-512 uses the stack pointer for a buffer on the heap. When a
    signal arrives meanwhile, the kernel stores the registers, 3 kB, below that buffer. Python
    handles signals on the alternate stack if there is one; faulthandler makes one, of the size the
    processor asks for, and shows where the program was if native code crashes.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # sys.stderr of a notebook has no file descriptor


@functools.cache
def keep_big_buffers():
    """Make glibc keep freed memory, in huge pages: returning it costs a third of a step.

    All threads share one arena, which only grows and is not trimmed. The heap is grown once, marked
    for huge pages and freed untouched, so no memory is used before it is needed. Without glibc
    nothing happens.
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
    size, page, madv_hugepage = 1900 * 2**20, 2**21, 14  # size below the threshold; mman.h
    if heap := libc.malloc(size):
        first_page = -(-heap // page) * page
        libc.madvise(first_page, size - 2 * page, madv_hugepage)
        libc.free(heap)


@contextlib.contextmanager
def silent_stderr():
    """Discard what is written to file descriptor 2: C++ code does not go through sys.stderr."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@contextlib.contextmanager
def waiting_for_workers():
    """Exit if the wait inside takes longer than WORKERS_SECONDS, and at Ctrl-C.

    TensorFlow would wait for an hour. No Python code runs meanwhile, so the exit must come from C:
    from faulthandler's timer and from the default action of SIGINT.
    """
    print(
        "Waiting for the other workers of TF_CONFIG. This one exits if they have not all connected "
        f"after {WORKERS_SECONDS / 60:g} minutes.",
        flush=True,
    )
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open(os.devnull, "w") as null:
        faulthandler.dump_traceback_later(WORKERS_SECONDS, exit=True, file=null)
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
    """Return the fastest method of `ops.Convolution` on this machine's devices."""
    return "direct" if has_gpu() else "dft"


def multiplies_bfloat16():
    """Tell whether products of bfloat16 are faster here than those of float32."""
    return has_gpu() or bool(bfloat16_units())


# --- Provenance of a result -----------------------------------------------------------------------


def processor():
    """Return the name of the processor."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
    return name


def bfloat16_units():
    """Return the names of the processor's units that multiply bfloat16; none outside Linux."""
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        words = flags[1].split() if flags else ()
        return [name for flag, name in BFLOAT16_UNITS.items() if flag in words]
    return []


def machine():
    """Return the processor, its number of cores and the GPUs, in one line."""
    return ", ".join([f"{processor()} ({os.cpu_count()} cores)", *(gpu_names() or ["no GPU"])])


def gpu_names():
    """Return the names of the GPUs that TensorFlow sees."""
    import tensorflow as tf

    return [
        tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
        for gpu in tf.config.list_physical_devices("GPU")
    ]


def describe_device():
    """Tell what a training runs on, and if there is a GPU that TensorFlow does not see."""
    if gpus := gpu_names():
        return f"Runs on {', '.join(gpus)}"
    unused = ""
    if Path("/proc/driver/nvidia/version").exists():
        unused = "; for the GPU of this machine: pip install 'tensorflow[and-cuda]'"
    return f"Runs on {processor()} ({os.cpu_count()} cores){unused}"


def memory_size():
    """Return the bytes of memory that this process may use, None if the system does not say."""
    sizes = []
    with contextlib.suppress(OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", without a limit
            sizes.append(int(Path(limit).read_text()))
    return min(sizes, default=None)


@functools.cache
def commit():
    """Return the program's commit, with "-dirty" if tracked files differ from it; None without git.

    The first answer is kept. Call it at the start: files may change during an hour of training.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def here_or_in_program(folder, needed):
    """Return a folder of the working folder or else of the program that has a file, or None.

    Args:
        folder: path, relative to the working folder or to the program's.
        needed: name of the file or folder that must be in it.
    """
    candidates = Path(folder), ROOT / folder
    return next((path for path in candidates if (path / needed).exists()), None)


def provenance():
    """Return what a result was made with: machine, commit, date (UTC) and versions."""
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


def escape_what_streams_lack():
    """Make both standard streams print any text, also where the terminal lacks a character."""
    codecs.register_error("escape_unprintable", _escape_unprintable)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="escape_unprintable")


def _escape_unprintable(error):
    """Encode the bytes of odd file names as they are; escape characters that the encoding lacks.

    An error may be about several characters, of both kinds. Only the first is dealt with.
    """
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte, see os.fsdecode
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace").decode(), error.start + 1


class Display:
    """Progress of long work: a bar on a terminal, elsewhere a plain line every PLAIN_SECONDS."""

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
        self.task, self.started, self.last_printed = None, time.monotonic(), -math.inf

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
        """Show the Progress of a training run; the end of an epoch always gets a plain line."""
        speed = ""
        if progress.images_per_second is not None:
            left = datetime.timedelta(seconds=round(progress.seconds_left))
            speed = f"{progress.images_per_second:.0f} images/s, {left} left, "
        head = f"Epoch {progress.epoch}/{progress.epochs} step {progress.step}/{progress.last_step}"
        losses = "".join(
            f"{name.replace('_', ' ')} loss {format_loss(value)}, "
            for name, value in progress.losses.items()
        )
        text = f"{speed}{losses}accuracy {100 * progress.accuracy:.2f}%"
        end_of_epoch = progress.step * progress.epochs % progress.last_step == 0
        self._show(head, text, progress.step, progress.last_step, end_of_epoch)

    def show_count(self, what, done, total):
        """Show how many of `total` are done; without a terminal, short work prints nothing."""
        self.last_printed = max(self.last_printed, self.started)
        self._show(what, f"{done:,} of {total:,}", done, total)

    def _show(self, head, text, done, total, due=False):
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task(head, text=text, total=total)
            self.bar.update(self.task, description=head, text=text, completed=done, total=total)
        elif due or time.monotonic() - self.last_printed > self.PLAIN_SECONDS:
            self.last_printed = time.monotonic()
            print(f"{head}: {text}", flush=True)


def format_loss(value):
    """Return a loss with four decimals, or two from 1 on."""
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def say_written(paths):
    """Print which files were written."""
    print("Wrote " + ", ".join(str(path) for path in paths))


def plural(count, word):
    """Return a count with its noun, such as "1 epoch" or "2 epochs"."""
    shown = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{shown} {word}" if count == 1 else f"{shown} {word}s"


def reason(error):
    """Return the message of a TensorFlow error in one line, without graph nodes and code lines."""
    message = re.sub(GRAPH_LINES, "", str(error), flags=re.MULTILINE)
    return re.sub(r"{{.*?}}|\[Op:.*", "", " ".join(message.split())).strip()


def is_out_of_memory(error):
    """Tell whether an error of Python or TensorFlow says that memory is short."""
    if isinstance(error, MemoryError):
        return True
    # TensorFlow raises the same type for a full disk.
    if type(error).__name__ != "ResourceExhaustedError" or os.strerror(errno.ENOSPC) in str(error):
        return False
    return re.search(r"\boom\b|out of memory|allocat", str(error), re.IGNORECASE) is not None


def describe_error(error, advice="", several_workers=False):
    """Describe an error that is no fault of the program in one line: what is wrong, what to do.

    Args:
        error: UserError, OSError, MemoryError or an error of TensorFlow.
        advice: what the user can do, for a UserError or if memory is short.
        several_workers: whether several workers train together.
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
    if several_workers and isinstance(error, lost):
        return (
            "another worker stopped or cannot be reached; start all workers again, they resume "
            "from the last checkpoint"
        )
    parts = reason(error), os_advice(error), "earlier checkpoints are unchanged"
    return "; ".join(part for part in parts if part)
