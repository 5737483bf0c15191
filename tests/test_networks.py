"""The configs of the networks: their settings, sizes, memory, and descriptions in files."""

import dataclasses
import json

import pytest

import main
from capsnet_core.cnn import CNN
from capsnet_core.config import TrainingConfig
from capsnet_core.errors import ImageTooSmall
from capsnet_core.networks import (
    CNN_LAYERS,
    NETWORKS,
    CapsNetConfig,
    CNNConfig,
    Layers,
    config_from,
)
from model import CLASSES, CapsNet

# Every field of every config, with another value than the default.
CHANGED = {
    "capsnet": {
        "image_shape": (19, 24, 3),
        "n_classes": 7,
        "n_conv": 5,
        "n_primary": 3,
        "primary_dim": 4,
        "digit_dim": 6,
        "routing_iterations": 2,
        "kernel_size": 5,
        "decoder_units": (8, 9),
        "variant": "authors",
        "none_of_the_above": True,
    },
    "cnn": {"image_shape": (8, 12, 3), "n_classes": 7, "architecture": "affine", "n_digits": 2},
}


def total(config):
    return sum(count for *_, count in config.sizes())


# --- Settings and descriptions -------------------------------------------------------------------


def test_each_network_has_a_config_and_a_class_under_its_name():
    assert list(NETWORKS.items()) == [("capsnet", CapsNetConfig), ("cnn", CNNConfig)]
    assert list(CLASSES.items()) == [("capsnet", CapsNet), ("cnn", CNN)]
    for name, kind in NETWORKS.items():
        assert kind.network == name and CLASSES[name].config_class is kind
    assert (CapsNetConfig.score, CNNConfig.score) == ("length", "probability")


def test_the_defaults_are_those_of_the_paper():
    assert CapsNetConfig((28, 28, 1), 10).describe() == {
        "network": "capsnet",
        "image_shape": (28, 28, 1),
        "n_classes": 10,
        "n_conv": 256,
        "n_primary": 32,
        "primary_dim": 8,
        "digit_dim": 16,
        "routing_iterations": 3,
        "kernel_size": 9,
        "decoder_units": (512, 1024),
        "variant": "paper",
        "none_of_the_above": False,
    }
    assert CNNConfig((28, 28, 1), 10).describe() == {
        "network": "cnn",
        "image_shape": (28, 28, 1),
        "n_classes": 10,
        "architecture": "mnist",
        "n_digits": 1,
    }


@pytest.mark.parametrize(
    "name, field", [(name, field) for name in CHANGED for field in CHANGED[name]]
)
def test_a_description_as_json_makes_the_same_config_with_each_setting_changed(name, field):
    plain = NETWORKS[name]((24, 24, 1), 10)
    config = dataclasses.replace(plain, **{field: CHANGED[name][field]})
    assert config != plain
    description = json.loads(json.dumps(config.describe()))
    made = config_from(description)
    assert made == config and type(made) is NETWORKS[name]
    assert hash(made) == hash(config)  # no list is left in it
    assert description == json.loads(json.dumps(made.describe()))  # and is not changed


@pytest.mark.parametrize("name", NETWORKS)
def test_all_settings_have_been_changed_and_cannot_be_changed_afterwards(name):
    assert set(CHANGED[name]) == {field.name for field in dataclasses.fields(NETWORKS[name])}
    config = NETWORKS[name](**CHANGED[name])
    for field, value in CHANGED[name].items():
        assert getattr(config, field) == value
        assert value not in [f.default for f in dataclasses.fields(config) if f.name == field]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, value)


def test_a_description_of_no_network_of_this_program_is_refused():
    shape = {"image_shape": [28, 28, 1], "n_classes": 10}
    for wrong, error in (
        (shape, KeyError),
        (shape | {"network": "transformer"}, KeyError),
        (shape | {"network": "capsnet", "heads": 8}, TypeError),
        (shape | {"network": "cnn", "n_conv": 8}, TypeError),
        ({"network": "cnn", "n_classes": 10}, TypeError),
        (shape | {"network": "capsnet", "variant": "x"}, ValueError),
    ):
        with pytest.raises(error):
            config_from(wrong)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_settings_are_flags_with_the_same_default_bounds_and_help(name):
    rows = {row[0]: row[1:] for row in main.ROWS}
    settings = NETWORKS[name].settings()
    for field in settings:
        bounds, text = field.metadata["bounds"], field.metadata["help"]
        assert rows[field.name] == (field.default, bounds, text) and text
        if isinstance(field.default, str):
            assert field.default in bounds
        elif not isinstance(field.default, bool):
            assert bounds[0] <= field.default <= bounds[1]
    without = {"capsnet": {"decoder_units"}, "cnn": {"n_digits"}}[name]
    assert {f.name for f in settings} == set(CHANGED[name]) - {"image_shape", "n_classes"} - without


@pytest.mark.parametrize(
    "kind, wrong, message",
    [
        (CapsNetConfig, {"n_conv": 0}, "n_conv must be from 1 to 4096. Received: n_conv=0"),
        (CapsNetConfig, {"n_conv": 4097}, "n_conv must be from 1 to 4096. Received: n_conv=4097"),
        (CapsNetConfig, {"kernel_size": -1}, "kernel_size must be from 1 to 99"),
        (CapsNetConfig, {"variant": "x"}, "variant must be one of ('paper', 'authors'). Received"),
        (CNNConfig, {"architecture": "x"}, "architecture must be one of ('mnist', 'multi', 'affi"),
        (CNNConfig, {"image_shape": (28, 28)}, "image_shape must be (H, W, C). Received: image_"),
    ],
)
def test_a_setting_out_of_its_bounds_or_none_of_its_choices_is_refused(kind, wrong, message):
    with pytest.raises(ValueError) as caught:
        kind(**{"image_shape": (28, 28, 1), "n_classes": 10} | wrong)
    assert str(caught.value).startswith(message)


def test_the_lowest_and_the_highest_number_are_allowed():
    for field in CapsNetConfig.settings():
        if field.metadata["bounds"] and not isinstance(field.default, str):
            for value in field.metadata["bounds"]:
                config = CapsNetConfig((200, 200, 1), 10, **{field.name: value})
                assert getattr(config, field.name) == value


@pytest.mark.parametrize("shape", [(16, 30, 1), (30, 16, 3)])
def test_images_too_small_for_two_convolutions_are_refused_with_the_sizes(shape):
    with pytest.raises(ImageTooSmall, match=r"two 9×9 .* at least 17×17 pixels.") as caught:
        CapsNetConfig(shape, 10)
    assert caught.value.smallest == 17 and caught.value.image_shape == shape
    assert f"Received: image_shape={shape}" in str(caught.value)
    with pytest.raises(ImageTooSmall, match="at least 5×5"):
        CapsNetConfig((4, 5, 1), 10, kernel_size=3)


@pytest.mark.parametrize("architecture, factor", [("mnist", 1), ("multi", 4), ("authors", 4)])
def test_images_that_cannot_be_halved_are_refused(architecture, factor):
    CNNConfig((4 * factor, 5 * factor, 1), 10, architecture)
    for shape in ((4 * factor, 5 * factor + factor // 2, 1), (5 * factor + factor // 2, 4, 1)):
        if factor > 1:
            message = f"'{architecture}' halves .* 2 times and needs multiples of 4. Received: im"
            with pytest.raises(ValueError, match=message):
                CNNConfig(shape, 10, architecture)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_of_a_loss_term_in_the_training_config_is_of_a_term_of_some_network(name):
    weights = {field for field in TrainingConfig._fields if field.endswith("_weight")}
    terms = {f"{term}_weight" for kind in NETWORKS.values() for term in kind.loss_terms}
    assert weights <= terms and NETWORKS[name].loss_terms


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, lower, expected", [(28, 6 * 6 * 32, 8_215_568), (36, 10 * 10 * 32, 11_361_808)]
)
def test_the_capsnet_has_the_parameters_of_the_paper(side, lower, expected):
    conv1 = 9 * 9 * 1 * 256 + 256
    primary = 9 * 9 * 256 * (32 * 8) + 32 * 8
    digits = lower * 10 * 8 * 16
    decoder = (160 * 512 + 512) + (512 * 1024 + 1024) + (1024 * side**2 + side**2)
    config = CapsNetConfig((side, side, 1), 10)
    assert [count for *_, count in config.sizes()] == [conv1, primary, digits, decoder]
    assert total(config) == expected
    if side == 28:
        assert conv1 + primary + digits == 6_804_224
        assert CapsNet((28, 28, 1), 10).count_params() == expected
    authors = CapsNetConfig((side, side, 1), 10, variant="authors")
    assert total(authors) == expected + 160  # a bias for each component of a digit capsule
    assert total(dataclasses.replace(config, none_of_the_above=True)) == expected


def test_the_capsnet_on_the_affine_canvas_has_the_parameters_compared_with():
    sizes = CapsNetConfig((40, 40, 1), 10).sizes()
    assert sum(count for _, _, count in sizes[:3]) == 11_227_904


@pytest.mark.parametrize(
    "architecture, side, layers, parameters, dropout",
    [
        # Section 5: 35.4M parameters. Inputs, with the bias, times outputs of each layer.
        (
            "mnist",
            28,
            ((25, 256), (6400, 256), (6400, 128), (100352, 328), (328, 192), (192, 10)),
            (35.35e6, 35.45e6),
            0.5,
        ),
        # Section 6.1: 24.56M; 36×36 pixels are pooled to 18×18 and 9×9.
        (
            "multi",
            36,
            ((81, 512), (12800, 256), (81 * 256, 1024), (1024, 10)),
            (24.555e6, 24.565e6),
            0.0,
        ),
        # Section 5.2: about as many as the CapsNet without its decoder.
        (
            "affine",
            40,
            ((25, 256), (6400, 256), (6400, 128), (100 * 128, 720), (720, 10)),
            (0.95 * 11_227_904, 1.05 * 11_227_904),
            0.5,
        ),
    ],
)
def test_the_cnns_have_the_parameters_and_dropout_of_the_paper(
    architecture, side, layers, parameters, dropout
):
    config = CNNConfig((side, side, 1), 10, architecture)
    assert [count for *_, count in config.sizes()] == [(i + 1) * o for i, o in layers]
    assert parameters[0] <= total(config) <= parameters[1]
    assert config.layers.dropout == dropout


def test_the_authors_cnn_is_their_baseline_of_overlapping_digits_with_dropout():
    assert CNN_LAYERS["authors"] == CNN_LAYERS["multi"]._replace(dropout=0.5)


@pytest.mark.parametrize(
    "config",
    [
        CapsNetConfig(**CHANGED["capsnet"]),
        CapsNetConfig((9, 9, 2), 3, 5, 3, 4, 6, 2, 5, ()),
    ],
)
def test_the_sizes_of_a_capsnet_are_those_of_its_layers(config):
    network = CapsNet(**{k: v for k, v in config.describe().items() if k != "network"})
    layers, output = [network.conv1, network.primary, network.digits], (None, *config.image_shape)
    names, shapes, counts = zip(*config.sizes(), strict=True)
    assert names == ("conv1", "primary capsules", "digit capsules", "decoder")
    assert counts == tuple(layer.count_params() for layer in (*layers, network.decoder))
    for layer, expected in zip(layers, shapes[:3], strict=True):
        output = layer.compute_output_shape(output)
        assert output == (None, *expected)
    assert shapes[3] == config.image_shape


def test_the_sizes_of_a_cnn_are_those_of_its_layers(monkeypatch):
    layers = Layers(((6, 5, True), (4, 4, False), (3, 2, True)), (9, 7), 0.5)
    monkeypatch.setitem(CNN_LAYERS, "affine", layers)
    network = CNN((12, 8, 3), 5, "affine")
    names, shapes, counts = zip(*network.config.sizes(), strict=True)
    assert names == ("conv1", "conv2", "conv3", "dense1", "dense2", "dense3")
    assert names == tuple(network.parts())
    assert counts == tuple(layer.count_params() for layer in network.parts().values())
    # By hand: the convolutions keep rows and columns, which are halved after two of them.
    assert shapes == ((12, 8, 6), (6, 4, 4), (6, 4, 3), (9,), (7,), (5,))


def test_the_smallest_image_leaves_one_position_of_primary_capsules():
    sizes = CapsNetConfig((17, 17, 1), 10).sizes()
    assert sizes[0][1] == (9, 9, 256) and sizes[1][1] == (32, 8)


# --- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size, side, channels, classes, megabytes",  # peaks of main.py --train, one epoch
    [
        (16, 28, 1, 10, 1438),
        (64, 28, 1, 10, 1568),
        (128, 28, 1, 10, 1769),
        (256, 28, 1, 10, 2163),
        (64, 28, 1, 100, 2985),
        (64, 28, 3, 10, 1676),
        (64, 40, 1, 30, 3663),
        (32, 48, 3, 40, 4531),
        (64, 64, 1, 10, 5482),
        (16, 64, 1, 100, 12713),
        (16, 64, 3, 2, 2324),
        (64, 64, 3, 2, 3810),
        (128, 64, 3, 2, 5653),
        (16, 96, 3, 2, 3592),
        (32, 96, 3, 2, 5066),
        (64, 96, 3, 2, 7764),
        (16, 96, 3, 10, 6579),
        (64, 104, 3, 2, 8666),
    ],
)
def test_the_memory_estimated_for_a_capsnet_is_within_a_tenth_of_what_was_measured(
    batch_size, side, channels, classes, megabytes
):
    data_bytes = 3 * batch_size * side * side * channels
    estimate = CapsNetConfig((side, side, channels), classes).memory(batch_size, data_bytes)
    assert estimate / 1e6 == pytest.approx(megabytes, rel=0.1)


@pytest.mark.parametrize(
    "architecture, batch_size, side, megabytes",  # peaks of main.py --train --network=cnn
    [
        ("mnist", 16, 28, 2311),
        ("mnist", 64, 28, 2742),
        ("mnist", 128, 28, 3445),
        ("mnist", 256, 28, 4957),
        ("mnist", 32, 40, 3660),
        ("affine", 16, 28, 1244),
        ("affine", 64, 28, 1394),
        ("affine", 128, 28, 1691),
        ("affine", 256, 28, 2175),
        ("affine", 64, 48, 2206),
        ("authors", 16, 28, 1564),
        ("authors", 64, 28, 1841),
        ("multi", 16, 28, 1525),
        ("multi", 64, 28, 1827),
        ("multi", 128, 28, 2323),
        ("multi", 64, 36, 2351),
    ],
)
def test_the_memory_estimated_for_a_cnn_is_within_a_tenth_of_what_was_measured(
    architecture, batch_size, side, megabytes
):
    estimate = CNNConfig((side, side, 1), 10, architecture).memory(
        batch_size, 3 * batch_size * side * side
    )
    assert estimate / 1e6 == pytest.approx(megabytes, rel=0.1)


@pytest.mark.parametrize("classes, data_bytes", [(10, 0), (3, 10**9)])
@pytest.mark.parametrize("kind", NETWORKS.values())
def test_the_batch_that_fits_is_the_largest_whose_estimate_is_below_the_memory(
    kind, classes, data_bytes
):
    config = kind((64, 64, 3), classes)
    memory = config.memory(100.5, data_bytes)
    assert config.batch_that_fits(memory, data_bytes) == 100
    assert config.memory(100, data_bytes) <= memory < config.memory(101, data_bytes)
    assert config.batch_that_fits(1e9, data_bytes) == 0


def test_the_memory_estimated_grows_with_parameters_images_in_a_batch_and_data():
    """27.6 bytes a parameter, 165 a component of a primary capsule, 9.6 a component of a vote."""
    config = CapsNetConfig((28, 28, 1), 10)
    image = 165 * 1152 * 8 + 9.6 * 1152 * 10 * 16
    expected = 1150e6 + 27.6 * 8_215_568 + 64 * image
    assert config.memory(64) == pytest.approx(expected)
    assert config.memory(100) == pytest.approx(expected + 36 * image)
    assert config.memory(64, data_bytes=5e9) == pytest.approx(expected + 5e9)
