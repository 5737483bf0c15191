"""The machine that the program runs on, and what a result was made with."""

import contextlib
import datetime
import functools
import os
import platform
import re
import subprocess
from pathlib import Path

from utils import ROOT

# Memory limits of a container, in both versions of Linux's control groups.
CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
# What a processor multiplies bfloat16 with, by its flag in Linux's /proc/cpuinfo.
BFLOAT16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}


def has_gpu():
    """Return whether TensorFlow sees a GPU."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def fastest_conv():
    """Return the fastest method of `ops.Convolution` on this machine's devices."""
    return "direct" if has_gpu() else "dft"


def multiplies_bfloat16():
    """Return whether products of bfloat16 are faster here than those of float32."""
    return has_gpu() or bool(bfloat16_units())


def _cpuinfo(entry):
    """Return an entry of the first processor in Linux's /proc/cpuinfo, or ""."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if found := re.search(rf"^{entry}\s*:(.*)$", text, re.MULTILINE):
            return found[1].strip()
    return ""


def processor():
    """Return the name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def bfloat16_units():
    """Return the names of the processor's units that multiply bfloat16; none outside Linux."""
    words = _cpuinfo("flags").split()
    return [name for flag, name in BFLOAT16_UNITS.items() if flag in words]


def describe_machine():
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
    """Return what computes, and whether TensorFlow does not see a GPU of this machine."""
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


def provenance():
    """Return what a result was made with: machine, commit, date (UTC) and versions."""
    import keras
    import numpy as np
    import tensorflow as tf

    return {
        "machine": describe_machine(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
    }
