"""Errors that a user can act on. Each is one line: what is wrong and what was expected.

The library does not know about command-line flags. An error carries its particulars as fields, and
the program that catches it (`main.py`, an experiment) adds which flag to give.
"""


class UsageError(Exception):
    """The command line is wrong."""


class UserError(Exception):
    """A problem the user can solve. The message says what is wrong and what was expected."""


class DataFileError(UserError):
    """A file of a data set is missing, damaged, or does not fit the others.

    Attributes:
        dataset: name of the data set that it belongs to, if `download.py` can fetch it, else None.
    """

    def __init__(self, place, problem, dataset=None):
        super().__init__(f"{place}: {problem}")
        self.place, self.problem, self.dataset = place, problem, dataset


class ImageTooSmall(UserError):
    """The network's two convolutions leave nothing of images this small."""

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
    """A folder holds checkpoints, and all of them are damaged."""

    def __init__(self, folder):
        super().__init__(f"{folder}: every checkpoint is damaged, expected an intact one")
        self.folder = folder


class NetworkMismatch(UserError):
    """Weights belong to a network of another architecture."""

    def __init__(self, place, differences):
        super().__init__(f"{place} holds another network: {differences}")
        self.place, self.differences = place, differences


class PretrainedMismatch(NetworkMismatch):
    """The weights that come with the program belong to a network of another architecture."""


class NoPretrainedWeights(UserError):
    """The program comes without weights for a data set."""

    def __init__(self, name, available):
        super().__init__(
            f"no pretrained weights for {name}, there are some for: {available or 'none'}"
        )
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
    """Another process trains in a folder at this moment."""

    def __init__(self, folder):
        super().__init__(f"another training runs in {folder}")
        self.folder = folder


class FolderTaken(UserError):
    """A folder belongs to a run whose checkpoints are elsewhere."""

    def __init__(self, folder, owner):
        super().__init__(f"{folder} belongs to the run in {owner}")
        self.folder, self.owner = folder, owner


class NotFinite(UserError):
    """The loss or a weight became infinite or not a number."""

    def __init__(self, what, step):
        super().__init__(f"{what} not finite at step {step}; the checkpoints before it are kept")
        self.step = step
