import math

import keras
import numpy as np
import pytest

from capsnet_core import config
from capsnet_core.networks import CapsNetConfig


def test_shifts_and_sizes_are_those_of_the_paper():
    assert config.MAX_SHIFT == 2 and config.MULTI_SHIFT == 4
    assert 28 + 2 * config.MULTI_PADDING == 36
    assert config.DIGITS == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_the_defaults_of_training_are_the_documented_ones():
    # A change here changes what a command without flags trains.
    assert config.TrainingConfig()._asdict() == {
        "seed": 0,
        "batch_size": 64,
        "learning_rate": 0.001,
        "decay_rate": 0.7,
        "decay_steps": 1000,
        "reconstruction_weight": 0.0005,
        "averaging": 0.99,
    }
    assert (config.EPOCHS, config.SAVE_STEPS, config.INITIALIZATION) == (10, 500, "glorot")


def test_the_total_loss_weighs_the_reconstruction_and_adds_everything_else():
    training = config.TrainingConfig(reconstruction_weight=0.25)
    assert training.total_loss({"margin": 2.0, "reconstruction": 8.0}) == 4.0
    assert training.total_loss({"margin": 2.0}) == 2.0
    assert training.total_loss({"reconstruction": 8.0, "other": 3.0}) == 5.0
    assert training.total_loss({"cross_entropy": 2.0}) == 2.0
    arrays = {"margin": np.array([1.0, 2.0]), "reconstruction": np.array([4.0, 0.0])}
    np.testing.assert_array_equal(training.total_loss(arrays), [2.0, 2.0])


@pytest.mark.parametrize(
    "preset", [*config.RECIPES.values(), config.MULTI_MNIST, config.AUTHORS_MULTI_MNIST]
)
def test_a_preset_sets_only_what_can_be_set(preset):
    known = {*config.TrainingConfig._fields, "epoch", "initialization", "variant"}
    known |= {"data_deformation", "multi_shift"}
    assert set(preset) <= known
    assert preset.get("initialization", "glorot") in config.INITIALIZATIONS
    CapsNetConfig((28, 28, 1), 10, variant=preset.get("variant", "paper"))


def test_the_recipe_of_the_authors_trains_for_their_300000_steps():
    recipe = config.RECIPES["authors"]
    steps = recipe["epoch"] * math.ceil(60000 / recipe["batch_size"])
    assert 300_000 <= steps < 301_000
    assert (recipe["batch_size"], recipe["decay_rate"], recipe["decay_steps"]) == (128, 0.96, 2000)
    assert recipe["reconstruction_weight"] == pytest.approx(0.0005 * 2 * 10)
    assert recipe["averaging"] == 0 and recipe["initialization"] == "authors"
    assert recipe["variant"] == "authors" and recipe["data_deformation"]


def test_the_default_recipe_changes_nothing():
    assert config.RECIPES["default"] == {}


def test_the_initialization_of_the_authors_draws_truncated_normals_and_biases_of_a_tenth():
    for layer, stddev in (("conv1", 0.05), ("others", 0.1)):
        kernel, bias = (
            keras.initializers.get(config.INITIALIZATIONS["authors"][layer][f"{name}_initializer"])
            for name in ("kernel", "bias")
        )
        values = np.asarray(kernel((300, 300)))
        # Cut off at two standard deviations, a normal has 0.8796 of its deviation left.
        assert np.abs(values).max() <= 2 * stddev
        assert values.std() == pytest.approx(0.8796 * stddev, rel=0.02)
        assert np.asarray(bias((5,))) == pytest.approx(0.1)
