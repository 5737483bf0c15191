"""The folders of a run: lock them, claim them for the run, and move an earlier run aside."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from filelock import lock_descriptor

from capsnet_core.errors import FolderInUse, FolderTaken

_TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # for names of any bytes


class Folders(NamedTuple):
    """Where a run writes; each folder is the run's own."""

    checkpoint: Path
    best: Path
    logs: Path


@contextlib.contextmanager
def run_lock(folders, report):
    """Keep a second training run out of these folders; raise FolderInUse if there is one.

    The system frees the locks of a process that ends. Not every file system has locks, such as some
    Lustre and NFS: without them the run goes on, with a line that says so.
    """
    with contextlib.ExitStack() as stack:
        unlocked = [folder for folder in folders if not stack.enter_context(_folder_lock(folder))]
        if unlocked:
            report(
                f"The file system has no locks for {', '.join(map(str, unlocked))}: make sure that "
                "no other training run writes there."
            )
        yield


@contextlib.contextmanager
def _folder_lock(folder):
    """Lock a folder by a file next to it; yield whether the file system has locks."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            free, has_locks = lock_descriptor(file, blocking=False), True
        except OSError:
            free, has_locks = True, False
        if not free:
            raise FolderInUse(folder)
        yield has_locks
    finally:
        os.close(file)  # frees the lock


def claim(folder, checkpoints):
    """Note in a folder of events or of the best weights which run writes to it.

    Raise FolderTaken if it is another run, whose checkpoints are elsewhere than in `checkpoints`.
    """
    note, own = folder / "run", os.path.relpath(checkpoints, folder)
    owner = note.read_text(**_TEXT).strip() if note.exists() else ""
    # An empty note was left by a kill while it was written.
    if owner not in ("", own) and (folder / owner).exists():
        raise FolderTaken(folder, folder / owner)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(own + "\n", **_TEXT)


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
