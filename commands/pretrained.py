"""Exported weights: those that come with the program, and those that a training run starts with."""

import contextlib
import json
from pathlib import Path

import utils
from capsnet.errors import NoPretrainedWeights, PretrainedMismatch, UserError
from training.checkpoints import METADATA, differences
from utils import find_in_cwd_or_repo

FILE = "weights.npz"


def pretrained_metadata(folder):
    """Return the metadata of the weights that `write_network` wrote to a folder.

    Raises:
        NoPretrainedWeights: there are none.
        UserError: they are damaged.
    """
    with _open_weights(folder) as file:
        return json.loads(str(file[METADATA]))


def load_pretrained(network, folder):
    """Give a network the weights that `write_network` wrote to a folder.

    Returns:
        Their metadata.

    Raises:
        NoPretrainedWeights: there are none.
        PretrainedMismatch: they belong to another network.
        UserError: they are damaged.
    """
    with _open_weights(folder) as file:
        metadata = json.loads(str(file[METADATA]))
        if different := differences(metadata["shape"], network.architecture):
            raise PretrainedMismatch(Path(folder) / FILE, different)
        values = [file[v.path] for v in network.variables]
        for variable, value in zip(network.variables, values, strict=True):
            if value.shape != tuple(variable.shape):
                raise ValueError(f"{variable.path} has the shape {value.shape}")
    for variable, value in zip(network.variables, values, strict=True):
        variable.assign(value)
    return metadata


def find_exported(folder):
    """Return a folder of exported weights, which may be named from the program's folder.

    Raises:
        UserError: there are no weights in it.
    """
    found = find_in_cwd_or_repo(folder, FILE)
    if found is None:
        raise UserError(f"no {FILE} in {folder}, expected a folder that --export wrote")
    return found


@contextlib.contextmanager
def _open_weights(folder):
    """Open the weights in a folder, and say so if they are missing or damaged."""
    path = Path(folder) / FILE
    if not path.exists():
        available = sorted(p.parent.name for p in path.parent.parent.glob(f"*/{FILE}"))
        raise NoPretrainedWeights(path.parent.name, ", ".join(available))
    try:
        with utils.open_npz(path) as file:
            yield file
    except (KeyError, *utils.NPZ_ERRORS) as error:
        raise UserError(
            f"{path} is damaged, or not an export ({error}); put back the original"
        ) from None
