"""The folders of a run: lock them, claim them for the run, and move an earlier run aside."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import filelock

from errors import FolderInUse, FolderTaken


class Folders(NamedTuple):
    """Where a run writes; each folder is the run's own."""

    checkpoint: Path
    best: Path
    logs: Path


@contextlib.contextmanager
def folder_lock(folder):
    """Keep a second training out of a folder. The system frees the lock of a process that ends.

    Raises:
        FolderInUse: another process trains there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise FolderInUse(folder) from None
    try:
        yield
    finally:
        lock.release()


def claim(folder, checkpoints):
    """Note in a folder which run writes to it.

    Args:
        folder: of events or of the best weights.
        checkpoints: folder of the run's checkpoints.

    Raises:
        FolderTaken: another run writes to it, whose checkpoints are elsewhere.
    """
    note, own = folder / "run", os.path.relpath(checkpoints, folder)
    owner = note.read_text().strip() if note.exists() else ""
    # An empty note was left by a kill while it was written.
    if owner not in ("", own) and (folder / owner).exists():
        raise FolderTaken(folder, folder / owner)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(own + "\n")


def archive_run(folders):
    """Rename the folders that exist to the first free NAME.1, NAME.2, … and return that ending."""
    number = 1
    while any(folder.with_name(f"{folder.name}.{number}").exists() for folder in folders):
        number += 1
    # The checkpoints come first in `folders` and go last: until then a kill changes nothing.
    for folder in reversed(folders):
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.{number}"))
    return f".{number}"
