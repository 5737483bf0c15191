"""`--pretrained`: the weights that come with the program."""

import json
from pathlib import Path

import numpy as np

import utils
from errors import NoPretrainedWeights, PretrainedMismatch, UserError
from training.checkpoints import METADATA, differences


def load_pretrained(network, folder):
    """Give a network the weights that `write_network` wrote to a folder.

    Returns:
        Their metadata.

    Raises:
        NoPretrainedWeights: there are none.
        PretrainedMismatch: they belong to another network.
        UserError: they are damaged.
    """
    path = Path(folder) / "weights.npz"
    if not path.exists():
        available = sorted(p.parent.name for p in path.parent.parent.glob("*/weights.npz"))
        raise NoPretrainedWeights(path.parent.name, ", ".join(available))
    try:
        with np.load(path) as file:
            metadata = json.loads(str(file[METADATA]))
            if different := differences(metadata["shape"], network.architecture):
                raise PretrainedMismatch(path, different)
            values = [file[v.path] for v in network.variables]
    except (KeyError, *utils.NPZ_ERRORS) as error:
        raise UserError(f"{path} is damaged ({error}); put back the original") from None
    for variable, value in zip(network.variables, values, strict=True):
        variable.assign(value)
    return metadata
