"""Keep what XLA compiles for the processor from one run to the next: starting takes seconds less.

TensorFlow can do that, but trusts what it finds: a damaged file or a full disk ends the program,
and code for another processor may be loaded. So each kind of machine has its own folder, and each
run works on a copy of the files that are undamaged. When it ends, it adds its new files:

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
import sys
import tempfile
import time
from pathlib import Path

from errors import UserError
from utils import atomic_path

MOST_FILES = 32  # a megabyte each
ROOM = 2**23  # bytes that a run must be able to write before it uses the folder
STALE_SECONDS = 24 * 3600  # after which the copy of a run that was killed is removed
# What /proc/cpuinfo says about the kind of a processor, on x86 and on ARM.
PROCESSOR = r"^(?:vendor_id|cpu family|model|stepping|flags|CPU \w+|Features)\s*:.*$"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@contextlib.contextmanager
def switched_on():
    """Switch the cache on for a TensorFlow that is imported inside.

    Nothing happens if TensorFlow was imported before, if the user sets TensorFlow's own flags, with
    a GPU, outside Linux, and where the folder cannot be used.
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
    # TensorFlow reports each program that it loads as two errors.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
    return not (imported or user_decides or NVIDIA_DRIVER.exists())


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
    cpuinfo = Path("/proc/cpuinfo").read_text()
    tensorflow = importlib.util.find_spec("tensorflow")
    if tensorflow is None:
        raise FileNotFoundError(errno.ENOENT, "is not installed", "tensorflow")
    package = Path(tensorflow.origin).parent
    library = next(package.glob("libtensorflow_framework.so*"), package / "no library")
    built = library.stat()
    parts = (
        sorted(set(re.findall(PROCESSOR, cpuinfo, re.MULTILINE))),
        len(os.sched_getaffinity(0)),
        os.environ.get("XLA_FLAGS"),
        (str(library), built.st_size, built.st_mtime_ns),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _open(folder):
    """Return a new folder inside `folder` with copies of the files that are whole.

    Raises:
        OSError: the folder cannot be used, or its disk or the user's quota is nearly full.
    """
    if "'" in str(folder):
        raise OSError(errno.EINVAL, "cannot be quoted in TensorFlow's flags", str(folder))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in folder.glob("run-*"):
        if time.time() - old.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    copy = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    try:
        for path in _files(folder):
            checksum, name = path.name.split(".", 1)
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == checksum:
                (copy / name).write_bytes(content)
            else:
                path.unlink()
        # Only writing tells that a quota is used up.
        (copy / "trial").write_bytes(os.urandom(ROOM))
        (copy / "trial").unlink()
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _close(folder, copy):
    """Add the new files of a run to the folder; remove the oldest ones, and the run's copy."""
    with contextlib.suppress(OSError, UserError):
        for path in copy.glob("*.pb"):
            content = path.read_bytes()
            target = folder / f"{hashlib.sha256(content).hexdigest()}.{path.name}"
            if not target.exists():
                with atomic_path(target) as temporary:
                    temporary.write_bytes(content)
        newest = sorted(_files(folder), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest[MOST_FILES:]:
            path.unlink()
    shutil.rmtree(copy, ignore_errors=True)


def _files(folder):
    """Return the paths of the files, without those that are just being written."""
    return list(folder.glob("[0-9a-f]*.pb"))
