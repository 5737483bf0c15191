import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from story import (
    QUICK,
    ROOT,
    Command,
    assert_refused,
    decode,
    files,
    run,
    save_checkpoint,
    small_network,
    varied_network,
    weights_of,
    write_events,
)

import utils
from capsnet_core.errors import UserError
from commands.export import check_new, model_card
from commands.weights import load_network, read_exported
from inputs.appearance import appearance_from, measure_appearance

pytest_plugins = ["story_fixtures"]

EXPORTED = {
    "capsnet.keras",
    "weights.npz",
    "README.md",
    "saved_model/saved_model.pb",
    "saved_model/fingerprint.pb",
    "saved_model/variables/variables.index",
    "saved_model/variables/variables.data-00000-of-00001",
}


@pytest.fixture(scope="module")
def exported(few, tmp_path_factory):
    """A working folder with a checkpoint, its test, and its export in taken/along."""
    folder = tmp_path_factory.mktemp("export")
    save_checkpoint(folder / "checkpoint/mnist", varied_network())
    write_events(folder / "logs/mnist/train/events.out.tfevents.1.a", (1000, 1), (1320, 15))
    result = run(folder, "--test", "--export=taken/along", *QUICK)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-2] == (
        "Wrote taken/along/capsnet.keras, taken/along/saved_model, taken/along/weights.npz, "
        "taken/along/README.md"
    )
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- writing


def test_an_export_has_these_files_and_a_card_with_the_results_of_its_test(exported):
    assert files(exported / "taken/along") == EXPORTED
    assert not list(exported.glob("taken/.*"))
    card = (exported / "taken/along/README.md").read_text()
    result = json.loads((exported / "logs/mnist/test.json").read_text())
    assert f"{result['error_percent']:.2f}% error ({result['wrong']} of 200 wrong)" in card
    assert result["date"][:10] in card
    assert "(N, 28, 28, 1)" in card and "| n_conv | 8 |" in card and "| seed | 0 |" in card
    assert "trained for 15 steps in 5 minutes.\n" in card


SCRIPT = """
import sys
import numpy as np
import tensorflow as tf

folder, images, results = sys.argv[1], np.load(sys.argv[2]), {}
network = tf.saved_model.load(folder + "/saved_model")
results |= {"served_" + name: value for name, value in network.serve(images).items()}
assert not any("capsnet" in name or name in ("ops", "model") for name in sys.modules)

import keras, ops, model
network = keras.saving.load_model(folder + "/capsnet.keras")
results["lengths"], results["capsules"] = network.predict(images, verbose=0)
np.savez(sys.argv[3], **results)
"""


def test_an_exported_network_computes_the_same_in_a_new_process(tmp_path, few, exported):
    """The .keras file needs the modules that its card names, the SavedModel none."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    card = (exported / "taken/along/README.md").read_text()
    for name in re.findall(r"`(\w+\.py)`", card):
        shutil.copy(ROOT / name, folder)
    for name in re.findall(r"the folder `(\w+)`", card):
        shutil.copytree(ROOT / name, folder / name)
    images = few.x_test[:7] / np.float32(255)
    np.save(tmp_path / "images.npy", images)
    paths = (exported / "taken/along", tmp_path / "images.npy", tmp_path / "out.npz")
    arguments = [sys.executable, "-c", SCRIPT, *map(str, paths)]
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    network = varied_network()
    lengths, capsules = (part.numpy() for part in network(images))
    outputs = np.load(tmp_path / "out.npz")
    for kind in "", "served_":
        np.testing.assert_allclose(outputs[kind + "lengths"], lengths, atol=1e-5)
        np.testing.assert_allclose(outputs[kind + "capsules"], capsules, atol=1e-5)
    expected = decode(network, capsules, lengths.argmax(axis=1))
    assert outputs["served_reconstructions"].shape == (7, 1, 28, 28, 1)
    np.testing.assert_allclose(outputs["served_reconstructions"][:, 0], expected, atol=1e-5)


def test_the_export_of_overlapping_digits_reconstructs_both_digits(tmp_path, few, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = varied_network((36, 36, 1))
    save_checkpoint(tmp_path / "multi_checkpoint/multi_mnist", network, multi_MNIST=True)
    assert run(tmp_path, "--export=both", "--multi_MNIST", *QUICK).code == 0
    images = np.random.default_rng(0).random((3, 36, 36, 1), np.float32)
    loaded = tf.saved_model.load("both/saved_model")
    outputs = loaded.serve(images)
    lengths, capsules = (part.numpy() for part in network(images))
    longest = np.argsort(-lengths)
    shown = outputs["reconstructions"].numpy()
    assert shown.shape == (3, 2, 36, 36, 1)
    assert loaded.serve(images[:1])["reconstructions"].shape == (1, 2, 36, 36, 1)
    for place in (0, 1):
        expected = decode(network, capsules, longest[:, place])
        np.testing.assert_allclose(shown[:, place], expected, atol=1e-5)
    assert np.abs(shown[:, 0] - shown[:, 1]).max() > 0.01
    card = Path("both/README.md").read_text()
    assert "`reconstructions` (N, 2, 36, 36, 1)" in card and "Not measured" in card
    assert "A pair of digits is wrong if" in card and "| multi_shift | 4 |" in card


def test_an_exported_network_convolves_directly_whatever_the_trained_one_did(exported):
    """On a CPU the command that wrote it computed by products of spectra."""
    portable = keras.saving.load_model(exported / "taken/along/capsnet.keras")
    assert portable.conv == "direct"
    for value, expected in zip(portable.get_weights(), varied_network().get_weights(), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_only_a_new_or_empty_folder_is_written_to(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "full/below").mkdir(parents=True)
    check_new(tmp_path / "new")
    check_new(tmp_path / "empty")
    for name in ("file", "full"):
        with pytest.raises(UserError, match=f"{name} exists already, expected a new or empty"):
            check_new(tmp_path / name)


def test_an_export_never_touches_what_exists_and_leaves_nothing_half_written(
    exported, few, monkeypatch
):
    before = contents(exported)
    refusal = run(exported, "--export=taken/along", "--train", "--restart", *QUICK)
    assert_refused(refusal, 1, "taken/along", "another name")  # before it trains
    refusal = run(exported, "--export=taken/along/README.md", *QUICK)
    assert_refused(refusal, 1, "another name")

    def fail(*arguments, **metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    assert_refused(run(exported, "--export=new", *QUICK), 1, "No space left")
    assert contents(exported) == before and not list(exported.glob(".*/"))


# ---------------------------------------------------------------- the model card


def card_of(weights, result, name="mnist", **changes):
    return model_card(name, weights, weights.metadata | {"seconds": 90 * 60} | changes, result)


@pytest.fixture(scope="module")
def weights():
    """The Weights of a network that was never trained."""
    return weights_of(small_network(), averaging=0.5)


def test_a_card_quotes_only_a_test_of_these_weights(weights):
    result = {
        "checkpoint_step": 15,
        "training": weights.training,
        "error_percent": 1.234,
        "wrong": 1234,
        "images": 100_000,
        "date": "2026-11-24T12:00:00+00:00",
        "versions": {"tensorflow": "2.99"},
    }
    quoted = "1.23% error (1,234 of 100,000 wrong), 2026-11-24, TensorFlow 2.99."
    assert quoted in card_of(weights, result)
    earlier = {name: value for name, value in weights.training.items() if value is not None}
    assert quoted in card_of(weights, result | {"training": earlier})  # of an older version
    others = (
        None,
        result | {"checkpoint_step": 14},
        result | {"training": weights.training | {"seed": 1}},
    )
    for other in others:
        card = card_of(weights, other)
        assert "Not measured" in card and "% error" not in card


def test_a_card_says_how_long_the_training_took_if_that_is_known(weights):
    assert "15 steps in 90 minutes." in card_of(weights, None)
    assert "15 steps.\n" in card_of(weights, None, seconds=None)


def test_a_card_lists_the_settings_the_parameters_and_the_classes(weights):
    card = card_of(weights, None)
    assert card.startswith("# CapsNet for mnist\n")
    assert "1,383,984 parameters" in card and ": 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in card
    for setting in ("| n_primary | 2 |", "| image_shape | [28, 28, 1] |", "| averaging | 0.5 |"):
        assert setting in card
    assert "(N, 10, 4)" in card and "`reconstructions` (N, 1, 28, 28, 1)" in card
    assert "`python main.py --pretrained --export=DIR`" in card
    further = card_of(weights_of(weights.network, initial_weights="abc"), None)
    assert "steps in 90 minutes, starting with exported weights.\n" in further
    network = small_network((36, 36, 1))
    pairs = card_of(weights_of(network, multi_MNIST=True), None, "multi_mnist")
    assert "`reconstructions` (N, 2, 36, 36, 1)" in pairs
    assert "`python main.py --multi_MNIST --pretrained --export=DIR`" in pairs


# ---------------------------------------------------------------- pretrained weights


def test_pretrained_weights_are_those_that_were_exported_as_float16(exported):
    network = load_network(exported / "taken/along")
    metadata = read_exported(exported / "taken/along")[0]
    assert metadata["step"] == 15 and metadata["seconds"] == 320
    for half, value in zip(network.get_weights(), varied_network().get_weights(), strict=True):
        np.testing.assert_array_equal(half, value.astype(np.float16).astype(np.float32))


def test_pretrained_weights_are_tested_by_the_same_commands(tmp_path, exported, few, monkeypatch):
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    shutil.copytree(exported / "taken/along", tmp_path / "pretrained/mnist")
    result = run(tmp_path, "--test", "--pretrained", *QUICK)
    assert result.code == 0 and result.err == "" and "pretrained/mnist" in result.out
    measured = json.loads((tmp_path / "logs/mnist_pretrained/test.json").read_text())
    expected = json.loads((exported / "logs/mnist/test.json").read_text())
    assert abs(measured["wrong"] - expected["wrong"]) <= 1
    assert measured["training"] == expected["training"]
    assert measured["training_seconds"] == expected["training_seconds"] == 320


def test_an_export_says_how_the_training_images_look_even_if_its_checkpoint_does_not(exported, few):
    metadata = read_exported(exported / "taken/along")[0]
    expected = measure_appearance(Command().data.train)
    assert appearance_from(metadata) == expected and expected.ink_style is not None
