"""Metadata of weights: what older versions left out, and how differences are named."""

import json
from pathlib import Path

import numpy as np
import pytest

from capsnet_core import config, metadata
from capsnet_core.networks import CapsNetConfig, CNNConfig, config_from
from training.checkpoints import read_metadata

OLD_RUN = Path(__file__).parent / "fixtures" / "old_run"
OLD_SHAPE = {
    "image_shape": [28, 28, 1],
    "n_classes": 10,
    "n_conv": 4,
    "n_primary": 3,
    "primary_dim": 2,
    "digit_dim": 3,
    "routing_iterations": 3,
    "kernel_size": 9,
    "decoder_units": [2],
}
OLD = {"shape": OLD_SHAPE, "training": {}}


def exported(folder):
    with np.load(folder / "weights.npz") as file:
        return json.loads(str(file["facts"]))


def test_the_weights_of_an_earlier_version_have_entries_missing_and_are_completed():
    kept = exported(OLD_RUN / "exported")
    missing = {"freeze", "ground", "held_out_seed", "image_size", "initial_weights", "inverted"}
    missing |= {"multi_shift", "validation_data"}
    completed = metadata.complete(kept)
    assert kept["shape"] == OLD_SHAPE
    assert set(completed["training"]) - set(kept["training"]) == missing
    assert completed["training"] == completed["training"] | kept["training"]
    assert (completed["step"], completed["last_step"]) == (75, 75)
    assert "appearance" not in completed
    (place,) = (OLD_RUN / "checkpoint").iterdir()
    assert read_metadata(place, 75)["shape"] == completed["shape"]
    assert config_from(completed["shape"]) == CapsNetConfig(
        (28, 28, 1), 10, n_conv=4, n_primary=3, primary_dim=2, digit_dim=3, decoder_units=(2,)
    )


def test_weights_without_a_name_of_their_network_are_a_capsnet_with_the_defaults_of_new_settings():
    shape = metadata.complete(OLD)["shape"]
    assert shape == {
        **OLD_SHAPE,
        "network": "capsnet",
        "variant": "paper",
        "none_of_the_above": False,
    }
    kept = OLD_SHAPE | {"variant": "authors"}
    assert metadata.complete({**OLD, "shape": kept})["shape"]["variant"] == "authors"
    cnn = {"network": "cnn", "image_shape": [28, 28, 1], "n_classes": 10}
    completed = metadata.complete({**OLD, "shape": cnn})["shape"]
    assert completed == cnn | {"architecture": "mnist", "n_digits": 1}
    assert config_from(completed) == CNNConfig((28, 28, 1), 10)


def test_a_network_that_this_version_does_not_know_keeps_its_entries():
    other = {"network": "transformer", "heads": 8}
    assert metadata.complete({**OLD, "shape": other})["shape"] == other


@pytest.mark.parametrize(
    "name, value",
    [
        ("initialization", None),
        ("initial_weights", None),
        ("freeze", []),
        ("image_size", None),
        ("inverted", False),
        ("held_out_seed", None),
        ("ground", None),
        ("validation_data", None),
        ("multi_MNIST", False),
        ("data_deformation", False),
        ("multi_shift", None),
        ("class_names", None),
    ],
)
def test_a_setting_that_older_versions_left_out_is_completed_and_one_that_is_there_is_kept(
    name, value
):
    assert metadata.complete_training({})[name] == value
    assert metadata.complete_training({name: "kept"})[name] == "kept"
    assert metadata.complete(OLD)["training"][name] == value


def test_no_other_setting_of_a_training_run_is_completed():
    completed = metadata.complete_training({"seed": 3, "other": 5})
    assert len(completed) == 12 + 2
    assert (completed["seed"], completed["other"]) == (3, 5)


def test_overlapping_digits_of_older_versions_were_shifted_by_four_pixels():
    completed = metadata.complete_training({"multi_MNIST": True})
    assert completed["multi_shift"] == config.MULTI_SHIFT == 4
    assert metadata.complete_training({"multi_MNIST": True, "multi_shift": 6})["multi_shift"] == 6


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "kmnist"])
def test_older_versions_had_the_class_names_of_the_data_sets_that_are_fetched(dataset):
    names = metadata.complete({**OLD, "training": {"dataset": dataset}})["training"]["class_names"]
    assert names == list(config.CLASS_NAMES[dataset]) and len(names) == 10
    assert metadata.complete_training({"dataset": "photos"})["class_names"] is None
    own = {"dataset": dataset, "class_names": ["a"]}
    assert metadata.complete_training(own)["class_names"] == ["a"]


def test_the_appearance_of_older_versions_is_that_of_images_that_nothing_was_done_to():
    style = {"ink_style": None, "ground": "dark"}
    completed = metadata.complete({**OLD, "appearance": style})["appearance"]
    assert completed == style | {"inverted": False, "subtracted": None, "white": None}
    whole = style | {"inverted": True, "subtracted": [1, 2, 3], "white": 255}
    assert metadata.complete({**OLD, "appearance": whole})["appearance"] == whole


def test_complete_metadata_stays_as_it_is_and_its_argument_is_not_changed():
    given = {
        "shape": CapsNetConfig((9, 9, 1), 2, kernel_size=3).describe(),
        "training": {"dataset": "mnist", "seed": 1},
        "appearance": {"ink_style": {"offset": (1, 2)}, "ground": None},
        "step": 5,
        "seconds": 7.5,
    }
    before = json.dumps(given)
    once = metadata.complete(given)
    assert json.dumps(given) == before
    assert metadata.complete(once) == once == json.loads(json.dumps(once))
    assert once["shape"]["image_shape"] == [9, 9, 1]  # as JSON has it
    assert (once["step"], once["seconds"]) == (5, 7.5)


def test_differences_name_each_entry_with_both_values_in_alphabetical_order():
    old = {"b": 1, "a": (1, 2), "same": [3], "gone": "x"}
    new = {"b": 2, "a": [1, 3], "same": (3,), "new": None, "more": 0}
    assert metadata.differences(old, new) == (
        "a is [1, 2] there and [1, 3] here, b is 1 there and 2 here, gone is x there and None "
        "here, more is None there and 0 here"
    )
    assert metadata.differences(old, dict(old)) == ""


def test_of_different_kinds_of_network_only_the_kind_is_named():
    old, new = CapsNetConfig((28, 28, 1), 10).describe(), CNNConfig((28, 28, 1), 2).describe()
    different = metadata.differences(old | {"seed": 0}, new | {"seed": 1})
    assert different == "network is capsnet there and cnn here"
