"""What weights say about themselves, and what those of older versions leave out.

Metadata is a dict that JSON can hold: `shape`, what `NetworkConfig.describe` returns; `training`,
what a resumed run must share with its beginning; `step` and `last_step`; and `appearance`, how the
training images look.
"""

import dataclasses
import json

from capsnet_core.config import CLASS_NAMES, MULTI_SHIFT
from capsnet_core.networks import NETWORKS

# Settings of a training run that older versions named only where they mattered.
_TRAINING = {
    "initialization": None,  # with initial weights
    "initial_weights": None,
    "freeze": [],
    "image_size": None,
    "inverted": False,
    "held_out_seed": None,
    "ground": None,
    "validation_data": None,
    "multi_MNIST": False,
    "data_deformation": False,  # overlapping digits are shifted in any case
}
# Settings whose values tell a reader nothing.
_FINGERPRINTS = {
    "data": "the training images differ",
    "validation_data": "the validation images differ",
    "initial_weights": "the initial weights differ",
}
_APPEARANCE = {"inverted": False, "subtracted": None, "white": None}


def complete(metadata):
    """Return metadata with the entries that older versions left out.

    A setting of a network that is missing has its default, so the default of a new setting must be
    what networks were before it.
    """
    shape = {"network": "capsnet"} | metadata["shape"]
    config = NETWORKS.get(shape["network"])
    for field in dataclasses.fields(config) if config else ():
        if field.default is not dataclasses.MISSING:
            shape.setdefault(field.name, field.default)
    completed = metadata | {"shape": shape, "training": complete_training(metadata["training"])}
    if "appearance" in metadata:
        completed["appearance"] = _APPEARANCE | metadata["appearance"]
    return json.loads(json.dumps(completed))  # tuples as lists, as in a file


def complete_training(training):
    """Return the settings of a training run with those that older versions left out."""
    training = _TRAINING | training
    training.setdefault("multi_shift", MULTI_SHIFT if training["multi_MNIST"] else None)
    names = CLASS_NAMES.get(training.get("dataset"))
    training.setdefault("class_names", names and list(names))  # as in a file
    return training


def differences(old, new):
    """Name the entries in which two dicts differ, most with both values; "" if there are none.

    Of different kinds of network only the kind is named: all their settings are different ones.
    """
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    kinds_differ = old.get("network") != new.get("network")
    return ", ".join(
        _FINGERPRINTS.get(name) or f"{name} is {old.get(name)} there and {new.get(name)} here"
        for name in (["network"] if kinds_differ else sorted(old | new))
        if old.get(name) != new.get(name)
    )
