"""Errors that a user can act on. Each message is one line: what is wrong and what was expected.

The library does not know about command-line flags. An error carries its details as attributes, and
the program that catches it (`main.py`, an experiment) adds which flag to give.
"""

import errno
import os

_DISK_FULL = "free some space, or choose a folder on another disk"
_NOT_WRITABLE = "choose another folder, or make this one writable"
_IN_THE_WAY = "choose another name, or move what has this one"
_OS_ADVICE = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EACCES: _NOT_WRITABLE,
    errno.EPERM: _NOT_WRITABLE,
    errno.EROFS: _NOT_WRITABLE,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


def os_advice(error):
    """Return what helps against an error of the system, or of TensorFlow with its text, or ""."""
    if isinstance(error, OSError):
        return _OS_ADVICE.get(error.errno, "")
    text = str(error)
    return next((_OS_ADVICE[n] for n in _OS_ADVICE if os.strerror(n) in text), "")


class UsageError(Exception):
    """The command line is wrong."""


class Interrupted(Exception):
    """A signal, of this number, asked a training run to stop, and its state is saved."""

    def __init__(self, number):
        super().__init__(f"stopped by signal {number}")
        self.number = number


class UserError(Exception):
    """A problem the user can solve. The message says what is wrong and what was expected."""


class DataFileError(UserError):
    """A file of a data set is missing, damaged, or does not fit the others.

    `place` is the path of the file or folder; `dataset` the name of the data set that it belongs to
    if `download.py` can fetch it, else None.
    """

    def __init__(self, place, problem, dataset=None):
        super().__init__(f"{place}: {problem}")
        self.place, self.problem, self.dataset = place, problem, dataset


class ImageSizesDiffer(UserError):
    """The images of a folder have several sizes."""

    def __init__(self, path, size, first_path, first_size):
        super().__init__(
            f"{path} has {size[1]}×{size[0]} pixels, expected {first_size[1]}×{first_size[0]} like "
            f"{first_path}"
        )
        self.path, self.size = path, size
        self.first_path, self.first_size = first_path, first_size


class ImageTooSmall(UserError):
    """Images are too small for the network's two convolutions."""

    def __init__(self, kernel_size, image_shape):
        self.smallest, self.image_shape = 2 * kernel_size - 1, tuple(image_shape)
        super().__init__(
            f"two {kernel_size}×{kernel_size} convolutions need images of at least "
            f"{self.smallest}×{self.smallest} pixels. Received: image_shape={self.image_shape}"
        )


class NoCheckpoint(UserError):
    """A folder holds no checkpoint."""

    def __init__(self, folder):
        super().__init__(f"no checkpoint in {folder}")
        self.folder = folder


class DamagedCheckpoints(UserError):
    """A folder holds checkpoints, but all of them are damaged."""

    def __init__(self, folder):
        super().__init__(f"{folder}: every checkpoint is damaged, expected an intact one")
        self.folder = folder


class NetworkMismatch(UserError):
    """Weights belong to a network of another architecture."""

    def __init__(self, place, differences):
        super().__init__(f"{place} holds another network: {differences}")
        self.place, self.differences = place, differences


class PretrainedMismatch(NetworkMismatch):
    """Exported weights belong to a network of another architecture."""


class NoPretrainedWeights(UserError):
    """There are no pretrained weights for a data set."""

    def __init__(self, name, available):
        super().__init__(f"no pretrained weights for {name}; available: {available or 'none'}")
        self.name, self.available = name, available


class RunMismatch(UserError):
    """A folder holds an unfinished run that was started with other settings."""

    def __init__(self, folder, step, last_step, differences):
        super().__init__(
            f"{folder} holds an unfinished run (step {step} of {last_step}) of other settings: "
            f"{differences}"
        )
        self.folder, self.step, self.last_step = folder, step, last_step
        self.differences = differences


class FolderInUse(UserError):
    """Another process is training in a folder."""

    def __init__(self, folder):
        super().__init__(f"another run is training in {folder}")
        self.folder = folder


class FolderTaken(UserError):
    """A folder of events or best weights belongs to a run whose checkpoints are elsewhere."""

    def __init__(self, folder, owner):
        super().__init__(f"{folder} belongs to the run in {owner}")
        self.folder, self.owner = folder, owner


class NotFinite(UserError):
    """The loss or a weight became infinite or NaN."""

    def __init__(self, what, step):
        super().__init__(f"{what} not finite at step {step}; the checkpoints before it are kept")
        self.what, self.step = what, step
