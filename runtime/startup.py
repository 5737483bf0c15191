"""Start TensorFlow: signals, the allocator, silence, and the wait for other workers."""

import contextlib
import ctypes
import faulthandler
import functools
import os
import platform
import signal
import sys

WORKERS_SECONDS = 600


def start_tensorflow(quiet="2"):
    """Set up signals and the allocator, then import TensorFlow without its startup messages.

    Keras computes with TensorFlow, whatever the environment and the user's keras.json say, and GPUs
    take memory as they need it.

    Args:
        quiet: the least severe C++ messages to show, "2" for errors and "3" for fatal ones. A
            TF_CPP_MIN_LOG_LEVEL in the environment takes precedence.

    Returns:
        The module tensorflow.
    """
    receive_signals_on_their_own_stack()
    tune_malloc()
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    with silent_stderr():
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
def tune_malloc():
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
