"""Keep what XLA compiles for the processor from one training to the next, which starts sooner.

TensorFlow can do that, but trusts what it finds: a damaged file or a full disk ends the program,
and code for another processor may be loaded. So each kind of machine has its own folder, and each
run works on a copy in memory of the files that are undamaged. When it ends, it adds its new files:

    ~/.cache/capsnet/MACHINE/SHA256.NAME

CAPSNET_CACHE names a folder in place of ~/.cache/capsnet; if it is empty, nothing is kept.
"""

import atexit
import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from errors import UserError
from utils import atomic_path

# A disk in memory, where TensorFlow's writes do not fail in the middle of a training run.
RAM_DISK = Path("/dev/shm")
FREE_BYTES = 48 * 2**20  # which it must have
COPY_PREFIX = "capsnet-xla-"
HOUR = 3600  # seconds; a younger copy may not be marked as in use yet
MOST_FILES = 16  # a megabyte each
SECONDS_KEPT = 90 * 24 * HOUR
# What /proc/cpuinfo says about the kind of a processor, on x86 and on ARM.
PROCESSOR = r"^(?:vendor_id|cpu family|model|stepping|flags|CPU \w+|Features)\s*:.*$"
# Environment variables that may change compiled code: threads, options of XLA and of oneDNN.
COMPILER_SETTINGS = r"XLA_|OMP_|DNNL_|ONEDNN_|TF_(?!CPP_|CONFIG$)"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@contextlib.contextmanager
def switched_on():
    """Switch the cache on for a TensorFlow that is imported inside.

    Nothing happens if TensorFlow was imported before, if the user sets TensorFlow's own flags or
    wants to see its messages, with a GPU, outside Linux, and without a disk in memory.
    """
    copy = None
    if _is_wanted():
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
            folder = cache_folder() / machine_key()
            copy = _open(folder)
            atexit.register(_close, folder, copy)
    if copy is None:
        yield
        return
    # TensorFlow reports each program that it loads with alarming errors.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["TF_XLA_FLAGS"] = (
        f"--tf_xla_persistent_cache_directory='{copy}' --tf_xla_persistent_cache_device_types=CPU"
    )
    try:
        yield
    finally:
        del os.environ["TF_XLA_FLAGS"]  # read by now, and not meant for other processes


def _is_wanted():
    """Tell whether TensorFlow can be given the cache, and nobody said otherwise."""
    imported = "tensorflow" in sys.modules
    user_decides = "TF_XLA_FLAGS" in os.environ or os.environ.get("CAPSNET_CACHE") == ""
    messages_wanted = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3") < "3"
    return not (imported or user_decides or messages_wanted or NVIDIA_DRIVER.exists())


def cache_folder():
    """Return the folder for all kinds of machines.

    Raises:
        RuntimeError: the user has no home.
    """
    if named := os.environ.get("CAPSNET_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capsnet"


def machine_key():
    """Return a name for all that compiled code depends on, except the program that is compiled.

    Raises:
        OSError: the processor is not known, or TensorFlow is not where it is expected.
    """
    processor = sorted(set(re.findall(PROCESSOR, Path("/proc/cpuinfo").read_text(), re.MULTILINE)))
    if not processor:
        raise OSError(errno.ENODATA, "does not describe the processor", "/proc/cpuinfo")
    tensorflow = importlib.util.find_spec("tensorflow")
    if tensorflow is None:
        raise FileNotFoundError(errno.ENOENT, "is not installed", "tensorflow")
    package = Path(tensorflow.origin).parent
    library = next(package.glob("libtensorflow_framework.so*"), package / "no library")
    built = library.stat()
    parts = (
        processor,
        len(os.sched_getaffinity(0)),
        sorted(item for item in os.environ.items() if re.match(COMPILER_SETTINGS, item[0])),
        (str(library), built.st_size, built.st_mtime_ns),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _open(folder):
    """Return a new folder in memory with copies of the files of `folder` that are whole.

    Raises:
        OSError: there is no disk in memory, or it is nearly full.
    """
    _remove_copies_of_killed_runs()
    if shutil.disk_usage(RAM_DISK).free < FREE_BYTES:
        raise OSError(errno.ENOSPC, "nearly full", str(RAM_DISK))
    copy = Path(tempfile.mkdtemp(prefix=COPY_PREFIX, dir=RAM_DISK))
    _lock(copy)
    for path in _files(folder):
        with contextlib.suppress(OSError):  # another process may have removed it
            checksum, name = path.name.split(".", 1)
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == checksum:
                (copy / name).write_bytes(content)
            else:
                path.unlink()
    return copy


def _lock(copy):
    """Mark a copy as in use until this process ends.

    Raises:
        OSError: another process uses it, or it cannot be opened.
    """
    import fcntl  # not on Windows

    file = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise


def _remove_copies_of_killed_runs():
    """Remove copies that no process uses any more."""
    for copy in RAM_DISK.glob(COPY_PREFIX + "*"):
        with contextlib.suppress(OSError):  # in use, gone, or another user's
            if time.time() - copy.stat().st_mtime > HOUR:
                _lock(copy)
                shutil.rmtree(copy)


def _close(folder, copy):
    """Add the new files of a run to the folder; remove old ones, and the run's copy."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program is ending
    try:
        with contextlib.suppress(OSError, UserError):
            _keep(folder, copy)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _keep(folder, copy):
    """Add the files of a copy that are new to the folder, and remove old ones of all machines.

    Raises:
        OSError, UserError: a file cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = {path.name.split(".", 1)[1] for path in _files(folder)}
    for path in copy.glob("*.pb"):
        if path.name not in known:
            content = path.read_bytes()
            with atomic_path(folder / f"{hashlib.sha256(content).hexdigest()}.{path.name}") as new:
                new.write_bytes(content)
    newest = sorted(_files(folder), key=_modified, reverse=True)
    all_machines = [path for machine in folder.parent.iterdir() for path in _files(machine)]
    old = [path for path in all_machines if time.time() - _modified(path) > SECONDS_KEPT]
    for path in [*newest[MOST_FILES:], *old]:
        path.unlink(missing_ok=True)


def _files(folder):
    """Return the paths of the kept files in a folder, which may be missing."""
    return [path for path in folder.glob("*.pb") if re.match(r"[0-9a-f]{64}\.", path.name)]


def _modified(path):
    """Return when a file was written, in seconds; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
