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
from commands.pretrained import find_exported, load_pretrained, pretrained_metadata
from commands.session import fingerprint
from story import (
    FAST,
    ROOT,
    SMALL,
    assert_refused,
    decode,
    files,
    load_all,
    make_session,
    run,
    save_checkpoint,
    small_network,
    varied_network,
)

import commands.train
import utils
from capsnet import config
from capsnet.errors import NoPretrainedWeights, PretrainedMismatch, UserError
from commands.export import check_new, model_card, write_network
from commands.train import make_trainer
from inputs.appearance import appearance_from, measure_appearance
from inputs.pipeline import Examples
from model import CapsNet
from training.checkpoints import load_weights
from training.evaluation import Evaluator

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
    save_checkpoint(folder / "checkpoint/mnist", varied_network(), n_conv=8, train_size=0)
    result = run(folder, "--test", "--export=taken/along", *FAST)
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
    assert "trained for 15 steps.\n" in card  # without events nobody knows for how long


@pytest.mark.parametrize(
    "kind, code",
    [
        (
            "SavedModel",
            """
network = tf.saved_model.load(sys.argv[1] + "/saved_model")
outputs = network.serve(images)
assert not any("capsnet" in name or name in ("ops", "model") for name in sys.modules)
lengths, capsules, shown = (outputs[k] for k in ("lengths", "capsules", "reconstructions"))
""",
        ),
        (
            "keras",
            """
import keras, ops, model
network = keras.saving.load_model(sys.argv[1] + "/capsnet.keras")
lengths, capsules = network.predict(images, verbose=0)
shown = network.decoder(capsules, np.ones((len(images), 1, 10), np.float32))
""",
        ),
    ],
)
def test_an_exported_network_computes_the_same_in_a_new_process(
    tmp_path, few, exported, kind, code
):
    """The .keras file needs the modules that its card names, the SavedModel none."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if kind == "keras":
        card = (exported / "taken/along/README.md").read_text()
        for name in re.findall(r"`(\w+\.py)`", card):
            shutil.copy(ROOT / name, folder)
        for name in re.findall(r"the folder `(\w+)`", card):
            shutil.copytree(ROOT / name, folder / name)
    images = few.x_test[:7] / np.float32(255)
    np.save(tmp_path / "images.npy", images)
    script = (
        "import sys\nimport numpy as np\nimport tensorflow as tf\n"
        f"images = np.load(sys.argv[2])\n{code}\n"
        "np.savez(sys.argv[3], lengths=lengths, capsules=capsules, shown=shown)"
    )
    paths = (exported / "taken/along", tmp_path / "images.npy", tmp_path / "out.npz")
    arguments = [sys.executable, "-c", script, *map(str, paths)]
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    network = varied_network()
    lengths, capsules = (part.numpy() for part in network(images))
    outputs = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(outputs["lengths"], lengths, atol=1e-5)
    np.testing.assert_allclose(outputs["capsules"], capsules, atol=1e-5)
    if kind == "SavedModel":
        expected = decode(network, capsules, lengths.argmax(axis=1))
        assert outputs["shown"].shape == (7, 1, 28, 28, 1)
        np.testing.assert_allclose(outputs["shown"][:, 0], expected, atol=1e-5)


def test_the_export_of_overlapping_digits_reconstructs_both_digits(tmp_path, few, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = varied_network((36, 36, 1))
    save_checkpoint(tmp_path / "multi_checkpoint/multi_mnist", network)
    assert run(tmp_path, "--export=both", "--multi_MNIST", *FAST).code == 0
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


def test_an_exported_network_convolves_directly_whatever_the_trained_one_did(tmp_path):
    network = small_network(conv="dft")
    write_network(network, tmp_path / "new", {"shape": {}}, "card")
    portable = keras.saving.load_model(tmp_path / "new/capsnet.keras")
    assert portable.settings["conv"] == "direct"
    for value, expected in zip(portable.get_weights(), network.get_weights(), strict=True):
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
    refusal = run(exported, "--export=taken/along", "--train", "--restart", *FAST)
    assert_refused(refusal, 1, "taken/along", "another name")  # before it trains
    refusal = run(exported, "--export=taken/along/README.md", *FAST)
    assert_refused(refusal, 1, "another name")

    def fail(*arguments, **metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    assert_refused(run(exported, "--export=new", *FAST), 1, "No space left")
    assert contents(exported) == before and not list(exported.glob(".*/"))


# ---------------------------------------------------------------- the model card


def card_of(session, result, **changes):
    metadata = session.metadata | {"seconds": 90 * 60} | changes
    return model_card(session, metadata, result)


def test_a_card_quotes_only_a_test_of_these_weights(few):
    session = make_session(*FAST)
    result = {
        "checkpoint_step": 15,
        "training": session.metadata["training"],
        "error_percent": 1.234,
        "wrong": 1234,
        "images": 100_000,
        "date": "2026-11-24T12:00:00+00:00",
        "versions": {"tensorflow": "2.99"},
    }
    quoted = "1.23% error (1,234 of 100,000 wrong), 2026-11-24, TensorFlow 2.99."
    assert quoted in card_of(session, result)
    others = (
        None,
        result | {"checkpoint_step": 14},
        result | {"training": session.metadata["training"] | {"seed": 1}},
    )
    for other in others:
        card = card_of(session, other)
        assert "Not measured" in card and "% error" not in card


def test_a_card_says_how_long_the_training_took_if_that_is_known(few):
    session = make_session(*FAST)
    assert "15 steps in 90 minutes." in card_of(session, None)
    assert "15 steps.\n" in card_of(session, None, seconds=None)


def test_a_card_lists_the_settings_the_parameters_and_the_classes(few):
    session = make_session(*FAST, averaging=0.5)
    card = card_of(session, None)
    assert card.startswith("# CapsNet for mnist\n")
    assert "1,383,984 parameters" in card and ": 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in card
    for setting in ("| n_primary | 2 |", "| image_shape | (28, 28, 1) |", "| averaging | 0.5 |"):
        assert setting in card
    assert "(N, 10, 4)" in card and "`reconstructions` (N, 1, 28, 28, 1)" in card
    assert "`python main.py --pretrained --export=DIR`" in card
    further = card_of(make_session(*FAST, initial_weights="abc"), None)
    assert "steps in 90 minutes, starting with exported weights.\n" in further
    pairs = card_of(make_session(*FAST, "--multi_MNIST"), None)
    assert "`reconstructions` (N, 2, 36, 36, 1)" in pairs
    assert "`python main.py --multi_MNIST --pretrained --export=DIR`" in pairs


# ---------------------------------------------------------------- pretrained weights


def test_pretrained_weights_are_those_that_were_exported_as_float16(exported):
    network = small_network()
    metadata = load_pretrained(network, exported / "taken/along")
    assert metadata["step"] == 15 and metadata["seconds"] is None
    for half, value in zip(network.get_weights(), varied_network().get_weights(), strict=True):
        np.testing.assert_array_equal(half, value.astype(np.float16).astype(np.float32))


def test_pretrained_weights_are_tested_by_the_same_commands(tmp_path, exported, few, monkeypatch):
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    (tmp_path / "pretrained").mkdir()
    refusal = run(tmp_path, "--test", "--pretrained", *FAST)
    assert_refused(refusal, 1, "for mnist; available: none", "train first")
    shutil.copytree(exported / "taken/along", tmp_path / "pretrained/mnist")
    result = run(tmp_path, "--test", "--pretrained", *FAST)
    assert result.code == 0 and result.err == "" and "pretrained/mnist" in result.out
    measured = json.loads((tmp_path / "logs/mnist_pretrained/test.json").read_text())
    expected = json.loads((exported / "logs/mnist/test.json").read_text())
    assert abs(measured["wrong"] - expected["wrong"]) <= 1
    assert measured["training"] == expected["training"]
    refusal = run(tmp_path, "--test", "--pretrained", *FAST, "--n_conv=9")
    assert_refused(refusal, 1, "n_conv is 8 there and 9 here", "leave these flags out")
    refusal = run(tmp_path, "--test", "--pretrained", *FAST, "--multi_MNIST")
    assert_refused(refusal, 1, "for multi_mnist; available: mnist")


def test_the_seconds_of_the_training_are_kept_in_an_export(tmp_path, exported):
    network = small_network()
    metadata = {"shape": network.architecture, "seconds": 77.5}
    write_network(network, tmp_path / "a", metadata, "card")
    assert load_pretrained(network, tmp_path / "a")["seconds"] == 77.5


def test_an_export_says_how_the_training_images_look_even_if_its_checkpoint_does_not(exported):
    metadata = pretrained_metadata(exported / "taken/along")
    expected = measure_appearance(make_session(*FAST).train_data)
    assert appearance_from(metadata) == expected and expected.ink_style is not None


def test_missing_other_and_damaged_weights_are_told_apart(tmp_path, exported):
    with pytest.raises(NoPretrainedWeights, match="for nothing; available: mnist"):
        shutil.copytree(exported / "taken/along", tmp_path / "mnist")
        load_pretrained(small_network(), tmp_path / "nothing")
    other = CapsNet((28, 28, 1), 10, n_conv=9, n_primary=2, digit_dim=4)
    before = other.get_weights()
    with pytest.raises(PretrainedMismatch, match="n_conv is 8 there and 9 here"):
        load_pretrained(other, tmp_path / "mnist")
    for value, expected in zip(other.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    path = tmp_path / "mnist/weights.npz"
    content = path.read_bytes()
    changed = content[:5000] + b"xxxx" + content[5004:]
    for damaged in (b"", content[:1000], content[:-50], changed):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="weights.npz is damaged"):
            load_pretrained(small_network(), tmp_path / "mnist")
    facts = json.dumps({"shape": small_network().architecture})
    values = {v.path: v.numpy() for v in small_network().variables}
    values["conv1/kernel"] = values["conv1/kernel"][:4]  # of another shape
    for content in ({"facts": facts}, values, {"facts": facts, **values}):
        np.savez(path, **content)
        network = small_network()
        before = network.get_weights()
        with pytest.raises(UserError, match="weights.npz is damaged, or not an export"):
            load_pretrained(network, tmp_path / "mnist")
        for value, expected in zip(network.get_weights(), before, strict=True):
            np.testing.assert_array_equal(value, expected)


# ---------------------------------------------------------------- initial weights


def test_a_training_starts_with_exported_weights(exported, tmp_path):
    weights = exported / "taken/along"
    words = ["--train", f"--initial_weights={weights}", *SMALL, "--learning_rate=1e-9"]
    result = run(tmp_path, *words)
    assert (result.code, result.err) == (0, "")
    assert f"The initial weights are those in {weights}.\n" in result.out
    assert "--initial_weights" not in result.out.splitlines()[-1]  # the command to type next
    network = small_network()
    metadata = load_weights(network, tmp_path / "checkpoint/mnist", print)
    halves = [value.astype(np.float16) for value in varied_network().get_weights()]
    for value, expected in zip(network.get_weights(), halves, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)
    expected = fingerprint(*(half.astype(np.float32) for half in halves))
    assert metadata["training"]["initial_weights"] == expected
    assert "initialization" not in metadata["training"]  # nothing of it was used
    assert "This run is finished" in run(tmp_path, *words).out


def test_a_run_that_began_with_exported_weights_resumes_with_them_only(exported, tmp_path):
    words = [*SMALL, "--averaging=0"]
    weights = f"--initial_weights={exported / 'taken/along'}"
    trainer = make_trainer(make_session("--train", weights, *words), print)
    for folder in ("checkpoint", "other"):
        path, settings = tmp_path / folder / "mnist", trainer.metadata["training"]
        save_checkpoint(path, small_network(), step=5, last_step=15, **settings)
    result = run(tmp_path, "--train", weights, *words)
    assert result.code == 0 and "Resuming from step 5 " in result.out
    refusal = run(tmp_path, "--train", *words, "--checkpoint_dir=other", "--logdir=other_logs")
    assert_refused(refusal, 1, "initialization is None there", "initial_weights is ")


def test_initial_weights_that_do_not_fit_are_refused_before_anything_is_written(exported, tmp_path):
    refusal = run(tmp_path, "--train", "--initial_weights=nowhere", *SMALL)
    assert_refused(refusal, 1, "no weights.npz in nowhere, expected a folder that --export wrote")
    weights = f"--initial_weights={exported / 'taken/along'}"
    refusal = run(tmp_path, "--train", weights, *SMALL, "--n_conv=9")
    assert_refused(refusal, 1, "n_conv is 8 there and 9 here; leave these flags out, or train")
    assert files(tmp_path) == set()


def test_initial_weights_may_be_named_from_the_folder_of_the_program(
    exported, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert find_exported("pretrained/mnist") == ROOT / "pretrained/mnist"
    assert find_exported(exported / "taken/along") == exported / "taken/along"


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ({}, ["repeat"]),
        ({"validation_check": False}, ["held out now"]),
        ({"seed": 1}, ["held out now"]),
        ({"initial_weights": "abc"}, ["held out now", "repeat"]),  # which may have seen all
        ({"data": "others"}, []),
    ],
)
def test_what_the_initial_weights_saw_is_reported(exported, monkeypatch, earlier, expected):
    weights = f"--initial_weights={exported / 'taken/along'}"
    session = make_session("--train", weights, *SMALL, "--validation_check")
    size = session.train_size
    training = {"data": session.digest(size), "train_size": size, "seed": 0}
    training |= {"validation_check": True} | earlier
    monkeypatch.setattr(commands.train, "load_pretrained", lambda *_: {"training": training})
    reports = []
    make_trainer(session, reports.append)
    assert reports.pop(0).startswith("The initial weights are those in ")
    assert len(reports) == len(expected)
    assert all(text in report for text, report in zip(expected, reports, strict=True))


def test_initial_weights_that_saw_test_images_are_refused(exported, few, monkeypatch):
    weights = f"--initial_weights={exported / 'taken/along'}"
    session = make_session("--train", weights, *SMALL)
    session.dataset = few._replace(held_out_seed=1)
    training = {"data": session.digest(0), "train_size": 0, "seed": 0, "held_out_seed": 0}
    training["dataset"] = session.dataset.name
    monkeypatch.setattr(commands.train, "load_pretrained", lambda *_: {"training": training})
    with pytest.raises(UserError, match="seed 1 draws were trained on; give --seed=0"):
        make_trainer(session, print)


def test_another_share_of_the_images_holds_out_others(exported, monkeypatch):
    weights = f"--initial_weights={exported / 'taken/along'}"
    session = make_session("--train", weights, *SMALL, "--train_size=60", "--validation_check")
    training = {"data": session.digest(0), "train_size": 0, "seed": 0, "validation_check": True}
    monkeypatch.setattr(commands.train, "load_pretrained", lambda *_: {"training": training})
    reports = []
    make_trainer(session, reports.append)
    assert session.train_size == 60 and len(reports) == 2 and "held out now" in reports[1]


@pytest.mark.parametrize(
    ("name", "size", "most_bytes", "least_accuracy"),
    [("mnist", 28, 16e6, 0.99), ("multi_mnist", 36, 25e6, 0.8)],
)
def test_the_weights_that_come_with_the_program_are_those_of_the_default_network(
    name, size, most_bytes, least_accuracy
):
    folder, overlap = ROOT / "pretrained" / name, name == "multi_mnist"
    assert (folder / "weights.npz").stat().st_size < most_bytes
    network = CapsNet((size, size, 1), 10, conv="dft")
    metadata = load_pretrained(network, folder)
    training = metadata["training"]
    assert training["multi_MNIST"] == overlap
    assert training.get("data_deformation", False) == (not overlap)
    assert training["train_size"] == 0
    mnist = load_all("mnist", ROOT / "data")
    unseen = Examples(mnist.x_test[:1000], mnist.y_test[:1000])
    if overlap:
        unseen = unseen._replace(
            padding=config.MULTI_PADDING, max_shift=config.MULTI_SHIFT, overlap=True
        )
    evaluation = Evaluator(network, True).evaluate(unseen, unseen.evaluation_plan())
    assert evaluation.accuracy > least_accuracy
    assert f"trained for {metadata['step']:,} steps" in (folder / "README.md").read_text()
