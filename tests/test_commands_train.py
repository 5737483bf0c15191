import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from story import (
    FAST,
    PICTURES,
    ROOT,
    SMALL,
    Command,
    assert_refused,
    last_values,
    run,
    small_network,
    varied_network,
)
from tensorboard import program

import commands.train
import main
from capsnet_core.networks import NETWORKS, CapsNetConfig
from commands.reports import summarize
from commands.train import (
    TensorBoard,
    announce,
    describe,
    draw_examples,
    draw_learning_curves,
    flag_table,
    next_command,
    run_metadata,
)
from figures import examples, tweaks
from figures.confusion import draw_confusion_matrix
from inputs.pipeline import Examples
from runtime import machine
from training.callbacks import Validation
from training.checkpoints import saved_steps
from training.evaluation import Evaluation
from training.trainer import Trainer

pytest_plugins = ["story_fixtures"]

NETWORK_SETTINGS = {field.name for kind in NETWORKS.values() for field in kind.settings()}
CAPSULE_MODES = ["--test", "--reconstruction_test", "--tweak_test"]


# ---------------------------------------------------------------- the README's commands in order


def test_training_describes_the_network_and_names_the_next_command(story):
    _, out, err = story.results["deformed"]
    assert err == "" and "Trained to step 15 in " in out and "checkpoint/mnist" in out
    head = [
        " ".join(machine.describe_device().split()),
        "CapsNet output 1,383,984 parameters",
        "conv1 20 × 20 × 8 656",
        "primary capsules 72 × 8 10,384",
        "digit capsules 10 × 4 23,040",
        "decoder 28 × 28 × 1 1,349,904",
        "300 training images of 28×28×1, 10 classes; batches of 20, 15 steps an epoch; "
        "training takes about 1.2 GB of memory",
    ]
    assert [" ".join(line.split()) for line in out.splitlines()[:7]] == head
    assert re.search(r"Epoch 1/1 step 15/15: \d+ images/s, 0:00:00 left, margin loss 0\.\d+", out)
    saved = {
        f"checkpoint/mnist/{name}"
        for name in ("checkpoint", "ckpt-15.index", "ckpt-15.data-00000-of-00001")
    }
    assert story.files["deformed"] - saved == {
        "logs/mnist/train/events.out.tfevents.v2",
        "logs/mnist/events.out.tfevents.hparams",
        "samples/learning_curve.png",
    }
    (following,) = re.findall("^Next: python main.py (.*)$", out, re.MULTILINE)
    values = main.parse(["main.py", *shlex.split(following)])
    assert values.test and values.tweak_test and values.reconstruction_test and not values.train
    assert not [name for name in values if values[name].present and name in NETWORK_SETTINGS]
    assert values.data_dir == str(ROOT / "data")


def test_the_same_command_again_says_the_run_is_finished_and_how_to_train_longer(story):
    _, out, err = story.results["same again"]
    assert out.count("\n") == 8 and err == ""
    assert "This run is finished: 1 epoch in" in out and "--epoch=11" in out and "--restart" in out
    assert story.files["same again"] == story.files["deformed"]


def test_more_epochs_resume_and_say_from_which_step(story):
    _, out, _ = story.results["longer"]
    assert "Resuming from step 15 (checkpoint/mnist)." in out and "Trained to step 30 in" in out
    assert "Epoch 2/2 step 30/30" in out and "Epoch 1/" not in out


def test_another_run_moves_the_finished_one_aside_and_says_where(story):
    out = story.results["validated"].out
    assert "Moved the earlier run aside: checkpoint/mnist.1, logs/mnist.1" in out
    assert "Validation after step 13: loss 0." in out and "the best so far" in out
    moved = {
        name.replace("mnist/", "mnist.1/")
        for name in story.files["examined"]
        if name.startswith(("checkpoint/mnist/", "logs/"))
    }
    assert moved < story.files["validated"]
    assert {"checkpoint/mnist/ckpt-13.index", "val_checkpoint/mnist/ckpt-13.index"} < (
        story.files["validated"]
    )
    assert any(name.startswith("logs/mnist/validation/") for name in story.files["validated"])


def test_the_examining_modes_write_these_files_and_no_others(story):
    _, out, err = story.results["examined"]
    assert err == "" and "Weights of step 30 from checkpoint/mnist, averaged over" in out
    assert out.endswith("Next: tensorboard --logdir=logs\n")
    new = {
        *PICTURES,
        "samples/confusion_matrix.png",
        "samples/misclassified.png",
        "samples/capsule_lengths.png",
        "logs/mnist/test.json",
        "logs/mnist/predictions.csv",
    }
    events = {
        f"logs/mnist/test/events.out.tfevents.{name}"
        for name in ("evaluation", "reconstructions", "tweaks")
    }
    assert story.files["examined"] - story.files["longer"] == new | events
    assert {name for name in new if name in out} >= new - {n for n in new if "tweak_result" in n}
    assert "tweak/tweak_result_0.png to _3.png" in out


def test_the_pictures_are_png_files_of_a_size_to_look_at(story, pairs):
    paths = [*story.folder.rglob("*.png"), *pairs.folder.rglob("*.png")]
    assert len(paths) == 13 + 12
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and 200 < min(picture.size) <= max(picture.size) < 4000
            assert np.ptp(np.asarray(picture)) > 100


def test_the_test_counts_the_errors_of_the_averaged_weights(story, few):
    reader = tf.train.load_checkpoint(str(story.folder / "checkpoint/mnist.1"))
    network = small_network()
    for variable in network.variables:
        name = f"adam.S{variable.path.replace('/', '_')}_average"
        variable.assign(reader.get_tensor(f"optimizer/{name}/.ATTRIBUTES/VARIABLE_VALUE"))
    lengths = np.concatenate([network(image[None] / np.float32(255))[0] for image in few.x_test])
    wrong = int((lengths.argmax(axis=1) != few.y_test).sum())
    assert 0 < wrong < 200
    assert (story.json["wrong"], story.json["images"]) == (wrong, 200)
    assert story.json["checkpoint_step"] == 30
    assert story.json["training"]["data_deformation"] is True
    assert f"error {wrong / 2:.2f}%, {wrong} of 200 wrong" in story.results["examined"].out
    assert 0 < story.json["training_seconds"] < 300


def test_the_weights_kept_by_validation_are_tested_with_validation_check(story):
    out = story.results["best tested"].out
    assert "Weights of step 13 from val_checkpoint/mnist" in out and "Test accuracy " in out
    result = json.loads((story.folder / "logs/mnist/test.json").read_text())
    assert result["checkpoint_step"] == 13 and result["training"]["validation_check"] is True


def test_overlapping_digits_have_folders_and_pictures_of_their_own(pairs):
    out = pairs.results["trained"].out
    assert "--data_deformation adds nothing to --multi_MNIST" in out and "up to 4 pixels" in out
    assert "300 training images in pairs of 36×36×1" in out
    assert {"multi_checkpoint/multi_mnist/ckpt-15.index"} < pairs.files["trained"]
    assert not [name for name in pairs.files["trained"] if name.startswith("checkpoint")]
    new = {*PICTURES, "samples/multi_MNIST.png", "logs/multi_mnist/test.json"} | {
        f"logs/multi_mnist/test/events.out.tfevents.{name}"
        for name in ("evaluation", "reconstructions", "tweaks")
    }
    new |= {"logs/multi_mnist/predictions.csv", "samples/capsule_lengths.png"}
    assert pairs.files["examined"] - pairs.files["trained"] == new
    result = json.loads((pairs.folder / "logs/multi_mnist/test.json").read_text())
    assert (result["images"], result["dataset"]) == (200, "multi_mnist")


# ---------------------------------------------------------------- before the training


def description_of(*words):
    """What --train says before it trains."""
    command = Command(*FAST, *words, "--train")
    return describe(command.flags, command.config, command.devices, command.data)


def test_the_description_has_the_sizes_counted_by_hand(few):
    words = ["--n_conv=7", "--n_primary=3", "--primary_dim=5", "--digit_dim=6"]
    text = description_of(*words, "--batch_size=30", "--multi_MNIST")
    lines = [" ".join(line.split()) for line in text]
    conv1, primary = 9 * 9 * 7 + 7, 9 * 9 * 7 * 15 + 15
    lower = 10 * 10 * 3  # 36 -> 28 -> 10 rows and columns
    digits = lower * 5 * 10 * 6
    decoder = 60 * 512 + 512 + 512 * 1024 + 1024 + 1024 * 36 * 36 + 36 * 36
    assert lines[:5] == [
        f"CapsNet output {conv1 + primary + digits + decoder:,} parameters",
        f"conv1 28 × 28 × 7 {conv1:,}",
        f"primary capsules 300 × 5 {primary:,}",
        f"digit capsules 10 × 6 {digits:,}",
        f"decoder 36 × 36 × 1 {decoder:,}",
    ]
    assert lines[5].startswith(
        "400 training images in pairs of 36×36×1, 10 classes; batches of 30, 14 steps an epoch; "
    )


def test_the_description_of_the_baseline_is_that_of_the_paper(few):
    command = Command("--train", "--network=cnn")
    text = describe(command.flags, command.config, command.devices, command.data)
    lines = [" ".join(line.split()) for line in text]
    conv = [25 * 256 + 256, 25 * 256 * 256 + 256, 25 * 256 * 128 + 128]
    dense = [28 * 28 * 128 * 328 + 328, 328 * 192 + 192, 192 * 10 + 10]
    assert lines[:7] == [
        f"CNN output {sum(conv + dense):,} parameters",
        f"conv1 28 × 28 × 256 {conv[0]:,}",
        f"conv2 28 × 28 × 256 {conv[1]:,}",
        f"conv3 28 × 28 × 128 {conv[2]:,}",
        f"dense1 328 {dense[0]:,}",
        f"dense2 192 {dense[1]:,}",
        f"dense3 10 {dense[2]:,}",
    ]


def test_the_memory_is_that_of_a_batch_on_one_device_and_all_copies_of_the_data(few, monkeypatch):
    asked = []
    monkeypatch.setattr(
        CapsNetConfig, "memory", lambda self, *rest: asked.append(rest) or 12_340_000_000
    )
    monkeypatch.setattr(machine, "memory_size", lambda: 12_350_000_000)
    for words in ["--train_size=300"], ["--train_size=300", "--validation_check"]:
        lines = description_of(*words, "--batch_size=40")
        assert lines[-1].endswith("training takes about 12.3 GB of memory")
    assert asked == [(40, 300 * 28 * 28), (40, 2 * 300 * 28 * 28)]
    assert lines[-1].startswith("250 training images of") and "7 steps an epoch" in lines[-1]


@pytest.mark.parametrize("gigabytes, words", [(2.5, "--batch_size="), (1.0, "a smaller network")])
def test_a_training_that_does_not_fit_is_announced_with_what_would(
    few, monkeypatch, gigabytes, words
):
    much = "--batch_size=100000"
    monkeypatch.setattr(machine, "memory_size", lambda: int(1e9 * gigabytes))
    line = description_of(much)[-1]
    assert f"more than the {gigabytes} GB of this machine" in line and words in line
    if match := re.search("--batch_size=([0-9]+) fits", line):
        smaller = description_of(match[0].split()[0])
        assert "takes about 2.5 GB" in smaller[-1]
        next_size = description_of(f"--batch_size={int(match[1]) + 1}")
        assert "more than" in next_size[-1]
    monkeypatch.setattr(machine, "has_gpu", lambda: True)  # which has memory of its own
    assert "more than" not in description_of(much)[-1]
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "memory_size", lambda: None)
    assert "more than" not in description_of(much)[-1]


def test_the_device_is_printed_before_the_network(few, capsys):
    command = Command(*FAST)
    announce(command.flags, command.config, command.devices, command.data)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == machine.describe_device() and lines[1].startswith("CapsNet")


# ---------------------------------------------------------------- the Trainer


def rate_after_500_steps(trainer):
    trainer.optimizer.iterations.assign(500)
    return float(trainer.optimizer.learning_rate)


@pytest.fixture(scope="module")
def plain(few):
    """The Trainer without further flags."""
    return Command(*FAST).trainer()


@pytest.mark.parametrize(
    "flag, default, changed, read",
    [
        ("learning_rate=0.01", 0.001 * 0.7**0.5, 0.01 * 0.7**0.5, rate_after_500_steps),
        ("decay_rate=0.1", 0.001 * 0.7**0.5, 0.001 * 0.1**0.5, rate_after_500_steps),
        ("decay_steps=250", 0.001 * 0.7**0.5, 0.001 * 0.7**2, rate_after_500_steps),
        (
            "reconstruction_weight=0.25",
            3.001,
            3.5,
            lambda t: t.config.total_loss({"margin": 3, "reconstruction": 2}),
        ),
        ("averaging=0.5", 0.99, 0.5, lambda t: t.optimizer.largest_momentum),
        ("averaging=0", True, False, lambda t: t.optimizer.use_ema),
        ("batch_size=100", 7, 4, lambda t: t.steps_per_epoch),  # of 400 images
        ("train_size=64", 7, 1, lambda t: t.steps_per_epoch),
        ("seed=5", 0, 5, lambda t: t.config.seed),
    ],
)
def test_the_trainer_has_the_settings_that_the_flags_give(few, plain, flag, default, changed, read):
    assert read(plain) == pytest.approx(default)
    trainer = Command(*FAST, f"--{flag}").trainer()
    assert read(trainer) == pytest.approx(changed)
    name, value = flag.split("=")
    assert trainer.metadata["training"][name] == float(value)


def test_the_recipe_of_the_authors_reaches_trainer_and_network(few):
    trainer = Command(*FAST, "--recipe=authors").trainer()
    network = trainer.network
    assert trainer.steps_per_epoch == 4  # of 128 images
    assert rate_after_500_steps(trainer) == pytest.approx(0.001 * 0.96**0.25)
    assert trainer.config.total_loss({"margin": 1, "reconstruction": 1}) == pytest.approx(1.01)
    assert not trainer.optimizer.use_ema
    assert network.conv1.bias.numpy().tolist() == pytest.approx([0.1] * 8)
    assert network.primary.coupling == 1 / network.primary.n_types
    assert network.digits.bias.shape == network.digits.W.shape[::3]
    assert trainer.data.max_shift == 2


EXPECTED_METADATA = {
    "dataset": "mnist",
    "train_size": 300,
    "validation_check": False,
    "multi_MNIST": False,
    "data_deformation": False,
    "multi_shift": None,
    "initialization": "glorot",
    "initial_weights": None,
    "freeze": [],
    "precision": "float32",
    "class_names": list("0123456789"),
    "image_size": None,
    "inverted": False,
    "held_out_seed": None,
    "ground": None,
    "validation_data": None,
}


def test_a_run_is_told_from_others_by_exactly_these_settings(few):
    def metadata_of(*words):
        command = Command(*SMALL, "--train", *words)
        return run_metadata(command.flags, command.network(), command.data), command.data

    metadata, data = metadata_of()
    expected = EXPECTED_METADATA | {"data": data.digest(300, 0)}
    assert metadata == expected
    training = Command(*SMALL).trainer().metadata["training"]
    assert training.keys() == {
        *expected,
        *("seed", "batch_size", "learning_rate", "decay_rate", "decay_steps"),
        *("reconstruction_weight", "averaging"),
    }
    assert {name: training[name] for name in expected} == expected
    for flag, value in {
        "validation_check": True,
        "data_deformation": True,
        "initialization": "authors",
        "train_size": 299,
    }.items():
        metadata, data = metadata_of(f"--{flag}={value}")
        assert metadata == expected | {flag: value, "data": data.digest(data.train_size, 0)}
    metadata, _ = metadata_of("--freeze=primary,conv1,primary")  # in any order, the same run
    assert metadata == expected | {"freeze": ["conv1", "primary"]}
    metadata, _ = metadata_of("--multi_MNIST", "--data_deformation")  # which adds nothing to pairs
    assert metadata == expected | {"multi_MNIST": True, "multi_shift": 4}


@pytest.mark.parametrize("validation", [False, True])
def test_the_examples_of_an_epoch_are_validation_images_if_there_are_some(
    few, monkeypatch, validation
):
    drawn, summarized = [], []
    monkeypatch.setattr(commands.train, "draw_examples", lambda *args: drawn.append(args) or {})
    monkeypatch.setattr(commands.train, "summarize", lambda *args: summarized.append(args))
    command = Command(*SMALL, "--train", f"--validation_check={validation}")
    trainer, data = command.trainer(), command.data
    assert trainer.data is data.train and trainer.validation is data.validation
    board = TensorBoard(trainer.network, data, {})
    board.on_epoch_end(1)
    board.on_test_end(Validation(15, 0.5, "evaluation", True))
    assert drawn == [(trainer.network, data.validation if validation else data.train)]
    assert summarized == [("evaluation", data.train, "length")]


def test_fit_gets_the_epochs_and_steps_that_the_flags_give(tmp_path, few, monkeypatch):
    calls = []

    def spy(self, epochs, save_steps, restart):
        calls.append((epochs, save_steps, restart))
        return True

    monkeypatch.setattr(Trainer, "fit", spy)
    for words in (
        ["--train", *SMALL, "--epoch=7", "--save_steps=33"],
        ["--train", *SMALL, "--restart", "--logdir=a folder"],
    ):
        assert run(tmp_path, *words).code == 0
    assert calls == [(7, 33, False), (1, 500, True)]


def test_the_command_and_its_flags_are_written_as_texts_for_tensorboard(story):
    events = events_of(story.folder / "logs/mnist/train")
    command, table = (events[name].string_val[0].decode() for name in ("command", "flags"))
    words = last_values(["--train", "--validation_check=True", *SMALL])
    assert shlex.split(command) == ["main.py", *words]
    values = dict(re.findall(r"^\| (\S+) \| (.*) \|$", table, re.MULTILINE))
    assert (values["epoch"], values["n_conv"], values["data_dir"]) == ("1", "8", str(ROOT / "data"))


def test_the_table_of_flags_for_tensorboard_has_every_flag_with_its_value():
    flags = main.parse(["main.py", "--train", "--epoch=3"])
    lines = flag_table(flags).splitlines()
    assert lines[:2] == ["| flag | value |", "| --- | --- |"]
    assert {"| epoch | 3 |", "| train | True |", "| batch_size | 64 |"} < set(lines)
    assert len(lines) == 2 + len(main.ROWS)


# ---------------------------------------------------------------- after an epoch


def test_the_examples_of_an_epoch_show_the_first_images_and_a_tweaked_capsule(few, monkeypatch):
    drawn = {}
    page = np.zeros((2, 2, 3), np.uint8)
    monkeypatch.setattr(
        examples, "draw_reconstructions", lambda *args: drawn.update(rows=args) or page
    )
    monkeypatch.setattr(
        tweaks, "draw_tweak_overview", lambda *args: drawn.update(tweaks=args) or page + 1
    )
    network, data = varied_network(), Examples(few.x_test, few.y_test)
    pictures = draw_examples(network, data)
    assert pictures["reconstructions"] is page and pictures["tweaks"].max() == 1
    canvas = few.x_test[:20] / np.float32(255)
    lengths, capsules = (part.numpy() for part in network(canvas))
    longest = lengths.argmax(axis=1)
    eye = np.eye(10, dtype=np.float32)
    outputs, labels, names = drawn["rows"]
    assert names == data.class_names
    np.testing.assert_allclose(outputs.canvas, canvas, atol=1e-6)
    np.testing.assert_array_equal(labels[:, 0], few.y_test[:20])
    np.testing.assert_array_equal(outputs.predictions[:, 0], longest)
    decoded = (outputs.with_label, few.y_test[:20]), (outputs.without_label, longest)
    for shown, classes in decoded:
        expected = network.decoder(capsules, eye[classes][:, None])
        np.testing.assert_allclose(shown, expected, atol=1e-5)
    images, deltas, name = drawn["tweaks"]
    assert name == data.class_names[longest[0]]
    moved = capsules[:1].copy()
    moved[0, longest[0], 2] += deltas[9]
    expected = network.decoder(moved, eye[longest[:1]][:, None])[0, 0]
    np.testing.assert_allclose(images[2, 9], expected, atol=1e-5)


def events_of(folder):
    (path,) = folder.glob("events*")
    records = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    events = [tf.compat.v1.Event.FromString(record) for record in records]
    return {value.tag: value.tensor for event in events for value in event.summary.value}


THREE = Examples(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, int), class_names=("a", "b", "c"))


def test_the_confusion_matrix_has_true_classes_down_and_predicted_ones_across(tmp_path):
    evaluation = Evaluation(
        scores=np.zeros((6, 3), np.float32),
        predictions=np.array([[1], [1], [1], [0], [2], [2]]),
        labels=np.array([[0], [0], [1], [0], [1], [2]]),
        correct=np.array([False, False, True, True, False, True]),
        losses={},
    )
    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default(step=1):
        picture = summarize(evaluation, THREE, "length")
    writer.close()
    matrix = np.array([[1, 2, 0], [0, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(picture, draw_confusion_matrix(matrix, THREE.class_names))
    written = tf.io.decode_png(events_of(tmp_path)["confusion matrix"].string_val[2]).numpy()
    np.testing.assert_array_equal(written, picture)


@pytest.mark.parametrize(
    "score, words", [("length", "length of capsule"), ("probability", "probability of class")]
)
@pytest.mark.parametrize("overlap", [False, True])
def test_histograms_have_the_lengths_where_a_class_is_present_and_where_it_is_absent(
    monkeypatch, overlap, score, words
):
    labels = np.array([[0, 1], [2, 0], [1, 2], [1, 0]])
    labels = labels if overlap else labels[:, :1]
    lengths = np.arange(12, dtype=np.float32).reshape(4, 3) / 16
    written = {}
    monkeypatch.setattr(tf.summary, "histogram", lambda tag, data: written.update({tag: data}))
    monkeypatch.setattr(
        tf.summary, "image", lambda tag, data: written.update({tag: data}), raising=True
    )
    right = np.ones(4, bool)
    evaluation = Evaluation(lengths, labels, labels, right, {})
    picture = summarize(evaluation, THREE._replace(overlap=overlap), score)
    assert ("confusion matrix" not in written) is (picture is None) is overlap
    expected = {}
    for number, name in enumerate("abc"):
        for key, wanted in ("present", True), ("absent", False):
            expected[f"where {key}, {words}/{name}"] = [
                float(lengths[row, number])
                for row in range(4)
                if (number in labels[row].tolist()) is wanted
            ]
    written.pop("confusion matrix", None)
    assert {tag: values.tolist() for tag, values in written.items()} == expected


def write_curve(folder, losses, accuracies):
    writer = tf.summary.create_file_writer(str(folder))
    for step, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), 1):
        with writer.as_default(step=step):
            tf.summary.scalar("loss/total", loss)
            tf.summary.scalar("accuracy", accuracy)
    writer.close()


def test_the_learning_curves_are_those_of_the_events(tmp_path, drawn, capsys):
    path = tmp_path / "curve.png"
    logs = tmp_path / "logs"
    draw_learning_curves(logs, path, 5, "kmnist")
    assert drawn == {} and capsys.readouterr().out == ""
    write_curve(tmp_path / "logs/train", [3.0, 2.0, 1.0], [0.25, 0.5, 0.75])
    draw_learning_curves(logs, path, 5, "kmnist")
    without_validation = drawn[str(path)]
    write_curve(tmp_path / "logs/validation", [2.5], [0.125])
    draw_learning_curves(logs, path, 5, "kmnist")
    train = {"loss/total": ((1, 2, 3), (3, 2, 1)), "accuracy": ((1, 2, 3), (0.25, 0.5, 0.75))}
    validation = {"loss/total": ((1,), (2.5,)), "accuracy": ((1,), (0.125,))}
    assert without_validation == ({"train": train}, 5, "kmnist")
    both = {"train": train, "validation": validation}
    assert drawn == {str(path): (both, 5, "kmnist")}
    assert capsys.readouterr().out == 2 * f"Wrote {path}\n"


# ---------------------------------------------------------------- the next command


@pytest.mark.parametrize(
    "words, same",
    [
        (["--epoch", "3", "--seed", "3"], ["--seed=3"]),
        (["--test=False", "-norestart", "--notweak_test", "-epoch=3"], []),
        (["--strategy=one", "--initialization=authors", "--freeze=conv1"], []),
        (["--logdir=a b", "--seed=3"], ["--logdir=a b", "--seed=3"]),
        (
            ["--restart", "--multi_MNIST", "--validation_check=True"],
            ["--multi_MNIST", "--validation_check"],
        ),
        (["--n_conv=9", "--variant=authors", "--routing_iterations=2", "--network=capsnet"], []),
        (["--network=cnn", "--architecture=affine", "--seed=3"], ["--seed=3"]),
    ],
)
def test_the_next_command_has_the_flags_that_say_which_run(words, same):
    flags = main.parse(["main.py", "--train", *words])
    (following,) = re.findall("^Next: python main.py (.*)$", next_command(flags, main.MODES))
    typed = shlex.split(following)
    modes = ["--test"] if "--network=cnn" in words else CAPSULE_MODES
    assert typed[: len(modes)] == modes
    assert sorted(typed[len(modes) :]) == sorted(same)
    main.parse(["main.py", *typed])


def test_there_is_no_next_command_where_another_mode_follows_or_nothing_was_trained(
    tmp_path, few, monkeypatch
):
    monkeypatch.setattr(Trainer, "fit", lambda self, *args: True)
    assert "Next:" in run(tmp_path, "--train", *SMALL).out
    assert "Next: python" not in run(tmp_path, "--train", "--tweak_test", *SMALL).out
    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **options: False)
    out = run(tmp_path, "--train", *SMALL).out
    assert "This run is finished: 0 epochs" in out and "Next:" not in out


# ---------------------------------------------------------------- signals and the terminal


def test_sigterm_saves_and_exits_with_143_and_the_same_command_resumes(tmp_path, few, monkeypatch):
    command = last_values(["--train", *SMALL, "--epoch=3"])
    child = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *command, "--deterministic"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in child.stdout:
        if line.startswith("Epoch 1/3 step 1/45"):
            break
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 143
    assert err == "Stopped, and saved. To resume: the same command again.\n"
    step, *_ = saved_steps(tmp_path / "checkpoint/mnist")
    assert 1 <= step < 30
    refusal = run(tmp_path, *command, "--seed=1", "--data_deformation", "--learning_rate=0.02")
    assert_refused(  # an unfinished run needs the same flags
        refusal,
        1,
        f"unfinished run (step {step} of 45)",
        "--restart",
        "data_deformation is False there and True here",
        "seed is 0 there and 1 here",
        "learning_rate is 0.01 there and 0.02 here",
    )
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    result = run(tmp_path, *command, "--epoch=2")
    assert (result.code, result.err) == (0, "")
    shown = " ".join(re.sub("\x1b[^A-Za-z]*[A-Za-z]", "", result.out).split())
    assert f"Resuming from step {step} (" in shown and "Trained to step 30" in shown
    assert "Epoch 2/2 step 30/30 ━" in shown


# ---------------------------------------------------------------- what TensorBoard shows


def get(url, **fields):
    """Return what an address answers."""
    body = json.dumps(fields).encode() if fields else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def test_tensorboard_serves_curves_pictures_histograms_and_hyper_parameters(story):
    server = program.TensorBoard()
    logs = story.folder / "logs"
    server.configure(argv=[None, f"--logdir={logs}", "--port=0", "--load_fast=false"])
    base = f"{server.launch()}data"
    for _ in range(100):  # until it has read them all
        tags = json.loads(get(f"{base}/plugin/scalars/tags"))
        if {"mnist/train", "mnist/validation", "mnist/test"} <= tags.keys():
            break
        time.sleep(0.3)
    for name in ("train", "validation", "test"):  # one tag, so one chart
        assert {"loss/total", "accuracy"} <= tags[f"mnist/{name}"].keys()
    pictures = json.loads(get(f"{base}/plugin/images/tags"))
    assert {"confusion matrix"} <= pictures["mnist/test"].keys()
    expected = {"confusion matrix", "reconstructions", "tweaks"}
    assert pictures["mnist/validation"].keys() == expected
    query = "run=mnist/validation&tag=tweaks&sample=0"
    (listed,) = json.loads(get(f"{base}/plugin/images/images?{query}"))
    content = get(f"{base}/plugin/images/individualImage?" + listed["query"])
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "PNG" and min(picture.size) > 300
    histograms = json.loads(get(f"{base}/plugin/histograms/tags"))["mnist/test"]
    assert "where present, length of capsule/7" in histograms and len(histograms) == 20
    groups = json.loads(
        get(
            f"{base}/plugin/hparams/session_groups",
            experimentName="",
            allowedStatuses=["STATUS_UNKNOWN"],
            colParams=[],
            startIndex=0,
            sliceSize=10,
        )
    )["sessionGroups"]
    trial = {group["sessions"][0]["name"]: group for group in groups}["mnist"]
    assert trial["hparams"]["n_conv"] == 8 and trial["hparams"]["learning_rate"] == 0.01
    assert trial["hparams"]["validation_check"] is True
    (accuracy,) = (
        metric["value"]
        for metric in trial["metricValues"]
        if metric["name"] == {"group": "test", "tag": "accuracy"}
    )
    written = json.loads((story.folder / "logs/mnist/test.json").read_text())
    assert accuracy == pytest.approx(written["accuracy"], abs=1e-6)
