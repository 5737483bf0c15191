"""Checkpoints: save them, delete the oldest, and restore the newest intact one."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

from capsnet_core.errors import (
    DamagedCheckpoints,
    NetworkMismatch,
    NoCheckpoint,
    UserError,
    os_advice,
)
from capsnet_core.metadata import complete, differences
from runtime.messages import reason
from training.step import OPTIMIZER_NAME

KEPT = 2  # checkpoints of a run
METADATA = "facts"  # its key in a checkpoint
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"  # TensorFlow's ending of a variable's key
# What TensorFlow raises for a damaged checkpoint; IndexError if the data end too early.
DAMAGE = (tf.errors.OpError, IndexError)


@dataclasses.dataclass
class RunState:
    """Training progress outside the variables of the network and the optimizer."""

    step: int  # steps done
    sums: np.ndarray  # losses, correct examples and examples of this epoch so far
    best_loss: float = math.inf  # the lowest validation loss


class Checkpoints:
    """The checkpoints of a run in one folder. Nothing is on disk before `prepare` or `save`.

    Args:
        folder: folder of the checkpoints.
        network: `training.network.Network`.
        optimizer: Keras optimizer, built.
        n_sums: number of sums in a RunState.
        keep: how many checkpoints to keep.
    """

    def __init__(self, folder, network, optimizer, n_sums, keep=KEPT):
        self.folder, self.keep = Path(folder), keep
        self._state = {
            METADATA: tf.Variable(""),
            "sums": tf.Variable(np.zeros(n_sums)),
            "best": tf.Variable(np.float64(math.inf)),
            "step": tf.Variable(np.int64(0)),
        }
        self._variables = {
            "weights": by_path(network.variables),
            "optimizer": by_path(optimizer.variables),
            **self._state,
        }
        self._checkpoint = tf.train.Checkpoint(**self._variables)
        # Create it now: a lazily created counter would be restored from a damaged checkpoint.
        self._checkpoint.save_counter.assign(0)

    def prepare(self, intact_step):
        """Create the folder, and delete what a kill or damage left after an intact checkpoint.

        `intact_step` is that of the newest intact checkpoint, None if there is none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = saved_steps(self.folder)
        older = [step for step in steps if intact_step is not None and step <= intact_step]
        for path in self.folder.glob("checkpoint.tmp*"):
            path.unlink()
        for path in self.folder.glob("ckpt-*"):
            part = re.fullmatch(r"ckpt-(\d+)(_temp|\.index|\.data-\d+-of-\d+)", path.name)
            if part and part[2] == "_temp":
                shutil.rmtree(path)
            elif part and int(part[1]) not in older:
                path.unlink()
        self._write_list(older)

    def save(self, state, metadata):
        """Write a checkpoint of the current variables, then delete the oldest ones.

        TensorFlow writes to a temporary folder and renames the files at the end.

        Args:
            state: RunState.
            metadata: dict that can be written as JSON.

        Raises:
            UserError: it cannot be written; the older ones are intact.
        """
        self._state[METADATA].assign(json.dumps(metadata))
        self._state["sums"].assign(state.sums)
        self._state["best"].assign(state.best_loss)
        self._state["step"].assign(state.step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._checkpoint.write(str(self.folder / f"ckpt-{state.step}"))
            others = [step for step in saved_steps(self.folder) if step != state.step]
            steps = [state.step, *others]
            self._write_list(steps[: self.keep])
            for step in steps[self.keep :]:
                for path in self.folder.glob(f"ckpt-{step}.*"):
                    path.unlink()
        except (tf.errors.OpError, OSError) as error:
            intact = "the checkpoints there are intact: the same command resumes from them"
            parts = f"cannot save to {self.folder}: {reason(error)}", os_advice(error), intact
            raise UserError("; ".join(part for part in parts if part)) from error

    def _write_list(self, steps):
        """Write TensorFlow's list of checkpoints, for steps that begin with the newest."""
        if not steps:
            (self.folder / "checkpoint").unlink(missing_ok=True)
            return
        folder = os.path.relpath(self.folder)  # TensorFlow then writes names without the folder
        paths = [os.path.join(folder, f"ckpt-{step}") for step in reversed(steps)]
        tf.compat.v1.train.update_checkpoint_state(folder, paths[-1], paths)

    def restore(self, step):
        """Restore the variables of a checkpoint and return its RunState. Raise as `restore`."""
        restore(self._variables, self.folder, step, self._checkpoint)
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
            DamagedCheckpoints, NetworkMismatch: see `newest_intact` and `check_shapes`.
        """

        def read(step):
            metadata = read_metadata(self.folder, step)
            different = differences(metadata["shape"] | metadata["training"], settings)
            return metadata, different, None if different else self.restore(step)

        result, _ = newest_intact(self.folder, read, report)
        return result or (None, "", None)

    def newest_intact_step(self, report):
        """Return the step of the newest checkpoint whose weights can be read, or None.

        Raise NetworkMismatch if a weight is missing or has another shape.
        """

        def read(step):
            weights = {"weights": self._variables["weights"]}
            with open_checkpoint(self.folder, step) as (reader, _):
                for key in check_shapes(reader, weights, self.folder, step):
                    reader.get_tensor(key)

        with contextlib.suppress(DamagedCheckpoints):
            return newest_intact(self.folder, read, report)[1]


# --- Reading --------------------------------------------------------------------------------------


def by_path(variables):
    """Return variables of Keras by their paths, as TensorFlow's variables."""
    return {v.path: v.value for v in variables}


def saved_steps(folder):
    """Return the steps of the checkpoints in a folder, the newest first."""
    names = (re.fullmatch(r"ckpt-(\d+)\.index", path.name) for path in Path(folder).glob("ckpt-*"))
    return sorted((int(match[1]) for match in names if match), reverse=True)


@contextlib.contextmanager
def open_checkpoint(folder, step):
    """Open a checkpoint: yield TensorFlow's reader of it, and the path to read it by.

    Raise DAMAGE if its index is damaged.
    """
    with contextlib.ExitStack() as stack:
        if set("[*?\\") & set(str(folder)):  # TensorFlow takes the path for a pattern
            outer = stack.enter_context(tempfile.TemporaryDirectory())
            link = Path(outer, "folder")
            link.symlink_to(Path(folder).resolve(), target_is_directory=True)
            folder = link
        path = str(Path(folder) / f"ckpt-{step}")
        yield tf.train.load_checkpoint(path), path


def read_metadata(folder, step):
    """Return the metadata that a checkpoint was saved with.

    Raise NetworkMismatch if it was saved without any, DAMAGE if it is damaged.
    """
    with open_checkpoint(folder, step) as (reader, _):
        (key,) = check_shapes(reader, {METADATA: tf.TensorSpec(())}, folder, step)
        return complete(json.loads(reader.get_tensor(key)))


def check_shapes(reader, variables, folder, step):
    """Check that a checkpoint has these variables, in their shapes, and return their keys in it.

    Args:
        reader: reader of the checkpoint.
        variables: dict of name to variable, or of group to such a dict.
        folder: folder of the checkpoints.
        step: step of the checkpoint.

    Raises:
        NetworkMismatch: a variable is missing or has another shape.
    """
    saved, expected = reader.get_variable_to_shape_map(), dict(_shapes(variables))
    for key, shape in expected.items():
        if saved.get(key) != shape:
            there = f"of shape {saved[key]}" if key in saved else "missing"
            name = key.removesuffix(VALUE).replace(".S", "/").replace("..", ".")
            raise NetworkMismatch(
                Path(folder) / f"ckpt-{step}", f"{name} is {there} there and of shape {shape} here"
            )
    return list(expected)


def _shapes(variables, group=""):
    """Yield the keys of variables in a checkpoint, and their shapes."""
    for name, value in variables.items():
        key = group + name.replace(".", "..").replace("/", ".S")  # as TensorFlow escapes them
        if isinstance(value, dict):
            yield from _shapes(value, f"{key}/")
        else:
            yield key + VALUE, value.shape.as_list()


def restore(variables, folder, step, checkpoint=None):
    """Restore variables (as in `check_shapes`), those of a tf.train.Checkpoint if there is one.

    Raises:
        NetworkMismatch: a variable is missing or has another shape. Nothing was restored.
        DAMAGE: the checkpoint is damaged. Some variables may have been restored.
    """
    checkpoint = checkpoint or tf.train.Checkpoint(**variables)
    with open_checkpoint(folder, step) as (reader, path):
        check_shapes(reader, variables, folder, step)
        checkpoint.read(path).expect_partial()


def newest_intact(folder, read, report):
    """Read the newest intact checkpoint of a folder.

    Args:
        folder: folder of the checkpoints.
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


def newest_metadata(folder):
    """Return the metadata of the newest checkpoint of which they can be read.

    Raise NoCheckpoint or DamagedCheckpoints if there is none.
    """
    metadata, _ = newest_intact(
        folder, lambda step: read_metadata(folder, step), report=lambda line: None
    )
    if metadata is None:
        raise NoCheckpoint(folder)
    return metadata


def load_weights(network, folder, report):
    """Restore the weights of the newest intact checkpoint of a folder, and return its metadata.

    If the training run kept averages of the weights, the network gets these. Raise NoCheckpoint or
    DamagedCheckpoints if there is none, NetworkMismatch if it belongs to another network.
    """

    def read(step):
        metadata = read_metadata(folder, step)
        different = differences(metadata["shape"], network.config.describe())
        if different:
            raise NetworkMismatch(f"{folder}/ckpt-{step}", different)
        restore({"weights": by_path(network.variables)}, folder, step)
        if metadata["training"].get("averaging"):
            restore({"optimizer": _averages(network)}, folder, step)
        return metadata

    metadata, _ = newest_intact(folder, read, report)
    if metadata is None:
        raise NoCheckpoint(folder)
    return metadata


def _averages(network):
    """Return the trained variables of a network by the paths of their averages."""
    return {
        f"{OPTIMIZER_NAME}/{v.path.replace('/', '_')}_average": v.value
        for v in network.trainable_variables
    }
