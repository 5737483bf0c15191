"""The flags that several experiments have."""

import utils
from runtime.command_line import MOST, Flag, number, path_name

DATA_DIR = Flag("data_dir", str(utils.ROOT / "data"), path_name, "folder of the data sets")
TRAIN_SIZE = Flag("train_size", None, number(int, 1, MOST), "use only the first N training images")


def output(folder):
    """Return the flag of the folder to write to, with this default."""
    return Flag("output", folder, path_name, "folder to write to")
