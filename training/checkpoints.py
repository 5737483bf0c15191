"""Checkpoints: save, prune, and restore the newest intact one; lock, claim and archive folders."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import filelock
import numpy as np
import tensorflow as tf

from errors import (
    DamagedCheckpoints,
    FolderInUse,
    FolderTaken,
    NetworkMismatch,
    NoCheckpoint,
    UserError,
)
from runtime import reason

KEPT = 2  # checkpoints of a run
METADATA = "facts"  # its key in a checkpoint
DAMAGE = (tf.errors.OpError, ValueError)  # what reading a damaged checkpoint raises


@dataclasses.dataclass
class RunState:
    """How far a training is, besides the variables of the network and the optimizer."""

    step: int  # steps done
    sums: np.ndarray  # losses, correct examples and examples of this epoch so far
    best_loss: float = math.inf  # the lowest validation loss


class Checkpoints:
    """The checkpoints of a training in one folder. Nothing is on disk before `prepare`.

    Args:
        folder: of the checkpoints.
        network: see `training.trainer`.
        optimizer: Keras optimizer, built.
        n_sums: number of sums in a RunState.
        keep: how many checkpoints to keep.
    """

    def __init__(self, folder, network, optimizer, n_sums, keep=KEPT):
        self.folder, self.keep = Path(folder), keep
        self._groups = {
            "weights": by_path(network.variables),
            "optimizer": by_path(optimizer.variables),
        }
        self._state = {
            METADATA: tf.Variable(""),
            "sums": tf.Variable(np.zeros(n_sums)),
            "best": tf.Variable(np.float64(math.inf)),
            "step": tf.Variable(np.int64(0)),
        }
        self._checkpoint = tf.train.Checkpoint(**self._groups, **self._state)
        # Create it now: a lazily created counter would be restored from a damaged checkpoint.
        self._checkpoint.save_counter.assign(0)

    def prepare(self, intact_step):
        """Create the folder, and delete what a kill or damage left after an intact checkpoint.

        Args:
            intact_step: of the newest intact checkpoint, None if there is none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        older = [
            step
            for step in saved_steps(self.folder)
            if intact_step is not None and step <= intact_step
        ]
        for path in (*self.folder.glob("ckpt-*"), *self.folder.glob("checkpoint.tmp*")):
            part = re.fullmatch(r"ckpt-(\d+)(_temp|\.index|\.data-\d+-of-\d+)", path.name)
            if part and part[2] == "_temp":
                shutil.rmtree(path)
            elif path.name.startswith("checkpoint.tmp") or (part and int(part[1]) not in older):
                path.unlink()
        self._write_list(older)

    def save(self, state, metadata):
        """Write a checkpoint of the current variables, then delete the oldest ones.

        Args:
            state: RunState.
            metadata: dict that can be written as JSON.

        Raises:
            UserError: it cannot be written; the older ones are as they were.
        """
        values = {
            METADATA: json.dumps(metadata),
            "sums": state.sums,
            "best": state.best_loss,
            "step": state.step,
        }
        for name, value in values.items():
            self._state[name].assign(value)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._checkpoint.write(str(self.folder / f"ckpt-{state.step}"))
            steps = saved_steps(self.folder)
            self._write_list(steps[: self.keep])
            for step in steps[self.keep :]:
                for path in self.folder.glob(f"ckpt-{step}.*"):
                    path.unlink()
        except (tf.errors.OpError, OSError) as error:
            raise UserError(
                f"cannot save to {self.folder}: {reason(error)}; the checkpoints there are as "
                "they were: make room and run the same command again"
            ) from error

    def _write_list(self, steps):
        """Write TensorFlow's list of checkpoints, the newest first; its paths are relative."""
        if not steps:
            (self.folder / "checkpoint").unlink(missing_ok=True)
            return
        names = [f"ckpt-{step}" for step in reversed(steps)]
        tf.compat.v1.train.update_checkpoint_state(os.path.abspath(self.folder), names[-1], names)

    def restore(self, step):
        """Restore the variables of a checkpoint and return its RunState.

        Raises:
            NetworkMismatch: a variable is missing or has another shape.
            tf.errors.OpError, ValueError: the checkpoint is damaged.
        """
        restore(self._checkpoint, self._groups, self.folder, step)
        return RunState(
            step=int(self._state["step"].numpy()),
            sums=self._state["sums"].numpy(),
            best_loss=float(self._state["best"].numpy()),
        )

    def restore_newest(self, settings, report):
        """Restore the newest intact checkpoint if it belongs to a run of these settings.

        Args:
            settings: dict, what a resumed run must share with its beginning.
            report: takes a line of text for the user.

        Returns:
            (metadata, differences, RunState): the differences are "" and the RunState is None if it
            was not restored; (None, "", None) if there is no checkpoint.

        Raises:
            DamagedCheckpoints: there are checkpoints, and all are damaged.
            NetworkMismatch: a variable is missing or has another shape.
        """

        def read(step):
            metadata = read_metadata(self.folder, step)
            different = differences(metadata["shape"] | metadata["training"], settings)
            return metadata, different, None if different else self.restore(step)

        found, _ = newest_intact(self.folder, read, report)
        return found or (None, "", None)

    def newest_intact_step(self, report):
        """Return the step of the newest checkpoint whose weights can be read, or None."""

        def read(step):
            reader = tf.train.load_checkpoint(str(self.folder / f"ckpt-{step}"))
            for key in variable_shapes(self._groups["weights"], "weights"):
                reader.get_tensor(key)

        with contextlib.suppress(DamagedCheckpoints):
            return newest_intact(self.folder, read, report)[1]


class NoCheckpoints(Checkpoints):
    """The checkpoints of a worker that is not the chief: they are read, never written."""

    def prepare(self, intact_step):
        """Leave the folder to the chief."""

    def save(self, state, metadata):
        """Leave saving to the chief."""


# --- Reading --------------------------------------------------------------------------------------


def by_path(variables):
    """Return variables of Keras by their paths, as TensorFlow's variables."""
    return {v.path: v.value for v in variables}


def saved_steps(folder):
    """Return the steps of the checkpoints in a folder, the newest first."""
    names = (re.fullmatch(r"ckpt-(\d+)\.index", path.name) for path in Path(folder).glob("ckpt-*"))
    return sorted((int(match[1]) for match in names if match), reverse=True)


def read_metadata(folder, step):
    """Return the metadata that a checkpoint was saved with. Raise DAMAGE if it is damaged."""
    reader = tf.train.load_checkpoint(str(Path(folder) / f"ckpt-{step}"))
    return json.loads(reader.get_tensor(f"{METADATA}/.ATTRIBUTES/VARIABLE_VALUE"))


def variable_shapes(variables, group):
    """Return the shapes of a group of variables by their keys in a checkpoint."""
    names = {path: path.replace(".", "..").replace("/", ".S") for path in variables}
    return {
        f"{group}/{names[path]}/.ATTRIBUTES/VARIABLE_VALUE": variable.shape.as_list()
        for path, variable in variables.items()
    }


def restore(checkpoint, groups, folder, step):
    """Restore groups of variables from a checkpoint.

    Args:
        checkpoint: tf.train.Checkpoint of the groups.
        groups: dict of group to dict of path to variable.
        folder: of the checkpoints.
        step: of the checkpoint.

    Raises:
        NetworkMismatch: a variable is missing or has another shape. Nothing was restored.
        tf.errors.OpError, ValueError: the checkpoint is damaged.
    """
    place = Path(folder) / f"ckpt-{step}"
    saved = tf.train.load_checkpoint(str(place)).get_variable_to_shape_map()
    for group, variables in groups.items():
        for key, shape in variable_shapes(variables, group).items():
            if saved.get(key) != shape:
                there = "missing" if key not in saved else f"of shape {saved[key]}"
                name = key.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE").replace(".S", "/")
                raise NetworkMismatch(place, f"{name} is {there} there and of shape {shape} here")
    checkpoint.read(str(place)).expect_partial()


def newest_intact(folder, read, report):
    """Read the newest intact checkpoint of a folder.

    Args:
        folder: of the checkpoints.
        read: function of a step; raises DAMAGE if that checkpoint is damaged.
        report: takes a line of text for the user.

    Returns:
        What `read` returned, and the step; (None, None) if there is no checkpoint.

    Raises:
        DamagedCheckpoints: there are checkpoints, and all are damaged.
    """
    damaged = False
    for step in saved_steps(folder):
        for path in Path(folder).glob(f"ckpt-{step}.*"):
            path.open("rb").close()  # a file without permission is not damaged: OSError
        try:
            return read(step), step
        except DAMAGE:
            if (Path(folder) / f"ckpt-{step}_temp").is_dir():
                continue  # a kill cut this save short
            damaged = True
            report(f"Checkpoint {folder}/ckpt-{step} is damaged; trying the one before.")
    if damaged:
        raise DamagedCheckpoints(folder)
    return None, None


def differences(old, new):
    """Name the entries in which two dicts differ, with both values; "" if there are none."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    return ", ".join(
        f"{name} is {old.get(name)} there and {new.get(name)} here"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    )


def load_weights(network, folder, report):
    """Restore the weights of the newest intact checkpoint of a folder.

    If the training kept averages of the weights, the network gets these.

    Args:
        network: see `training.trainer`.
        folder: of the checkpoints.
        report: takes a line of text for the user.

    Returns:
        The checkpoint's metadata.

    Raises:
        NoCheckpoint: there is none.
        DamagedCheckpoints: all are damaged.
        NetworkMismatch: it belongs to another network.
    """

    def read(step):
        metadata = read_metadata(folder, step)
        different = differences(metadata["shape"], network.architecture)
        if different:
            raise NetworkMismatch(f"{folder}/ckpt-{step}", different)
        groups = {"weights": by_path(network.variables)}
        restore(tf.train.Checkpoint(**groups), groups, folder, step)
        if metadata["training"].get("averaging"):
            groups = {"optimizer": _averages(network)}
            restore(tf.train.Checkpoint(**groups), groups, folder, step)
        return metadata

    metadata, _ = newest_intact(folder, read, report)
    if metadata is None:
        raise NoCheckpoint(folder)
    return metadata


def _averages(network):
    """Return the network's variables by the paths of their averages in the optimizer."""
    return {f"adam/{v.path.replace('/', '_')}_average": v.value for v in network.variables}


# --- Folders --------------------------------------------------------------------------------------


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
