"""Both networks through all commands: colour images of a folder, and flags only for training."""

import csv
import json
import re
import shlex

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from story import QUICK, Story, assert_refused, load_all, run, save_checkpoint

from capsnet_core.cnn import CNN
from inputs import datasets

NAMES = ("blue sky", "green", "red")
CHANNELS = {"red": 0, "green": 1, "blue sky": 2}
NETWORKS = {
    "capsnet": [
        *("--n_conv=8", "--n_primary=4", "--digit_dim=4", "--kernel_size=3"),
        *("--learning_rate=0.01", "--batch_size=2"),
    ],
    "cnn": ["--network=cnn", "--architecture=affine"],
}
DATASET = "--dataset=mine"
TRAINING = ["--batch_size=10", DATASET, *QUICK]


def colours(folder):
    """Write 60 training and 30 test images of 8×8, and a file to predict, of red."""
    stream = np.random.default_rng(0)
    for number in range(90):
        name = NAMES[number % 3]
        image = stream.integers(0, 90, (8, 8, 3), dtype=np.uint8)
        image[..., CHANNELS[name]] += 160
        split = "train" if number < 60 else "test"
        path = folder / "mine" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if name == "red":
            Image.fromarray(image).save(folder / "new.png")


@pytest.fixture(scope="module")
def own_data():
    """Make commands load data sets of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_all)
        yield


@pytest.fixture(scope="module", params=NETWORKS)
def story(request, own_data, tmp_path_factory):
    """A network is trained, resumed, tested, exported and used; the weights say which it is."""
    story = Story(tmp_path_factory.mktemp(request.param))
    story.network = request.param
    colours(story.folder)
    training = ["--train", "--validation_check", *TRAINING, *NETWORKS[request.param]]
    story.type("trained", *training, "--epoch=3")
    if request.param == "cnn":
        story.type("longer", *training, "--epoch=4")
    examine = ["--test", "--export=out", "--predict=new.png"]
    story.type("examined", *examine, DATASET, *QUICK)
    story.json = json.loads((story.folder / "logs/mine/test.json").read_text())
    return story


def read(path):
    """Read an image file: (1, 8, 8, 3) from 0 to 1."""
    return np.asarray(Image.open(path), np.float32)[None] / 255


def scores_of(story, images):
    """The scores that the SavedModel gives images."""
    network = tf.saved_model.load(str(story.folder / "out/saved_model"))
    outputs = network.serve(images)
    return outputs["lengths" if story.network == "capsnet" else "probabilities"].numpy()


def table_of(story):
    """The header and the rows of predictions.csv, the images, and the numbers of their classes."""
    with open(story.folder / "logs/mine/predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    images = np.concatenate([read(story.folder / row[0]) for row in rows])
    return header, rows, images, np.array([NAMES.index(row[0].split("/")[-2]) for row in rows])


def test_the_next_command_repeats_no_flag_of_the_network(story):
    (line,) = re.findall("^Next: python main.py (.*)$", story.results["trained"].out, re.MULTILINE)
    modes = {
        "capsnet": ["--test", "--reconstruction_test", "--tweak_test"],
        "cnn": ["--test"],
    }[story.network]
    typed = shlex.split(line)
    assert typed[: len(modes)] == modes
    assert {word.split("=")[0] for word in typed[len(modes) :]} == {
        *("--dataset", "--batch_size", "--validation_check", "--data_dir", "--jit"),
        *(["--learning_rate"] if story.network == "capsnet" else []),
    }


def test_a_network_is_trained_and_resumed(story):
    title = {"capsnet": "CapsNet", "cnn": "CNN"}[story.network]
    steps = {"capsnet": 75, "cnn": 15}[story.network]
    out = story.results["trained"].out
    assert f"\n{title} " in out and "50 training images of 8×8×3, 3 classes" in out
    assert f"Trained to step {steps} in" in out and f"Validation after step {steps}: loss" in out
    term = {"capsnet": "margin loss", "cnn": "cross entropy loss"}[story.network]
    assert re.search(rf"Epoch 3/3 step {steps}/{steps}: .* {term} \d\.\d+", out)
    if story.network == "cnn":
        out = story.results["longer"].out
        assert "Resuming from step 15 (checkpoint/mine)." in out and "Epoch 4/4 step 20/20" in out


def test_a_network_is_tested_by_its_weights_alone(story):
    header, rows, images, labels = table_of(story)
    scores = scores_of(story, images)
    wrong = int((scores.argmax(axis=1) != labels).sum())
    result = story.json
    assert (result["wrong"], result["images"]) == (wrong, 30) and result["accuracy"] > 0.9
    assert list(result["accuracy_per_class"]) == list(NAMES)
    if story.network == "cnn":
        expected = -np.log(scores[np.arange(30), labels]).mean()
        assert result["cross_entropy_loss"] == pytest.approx(expected, rel=1e-3)
        assert result["total_loss"] == result["cross_entropy_loss"]
        assert not {"margin_loss", "reconstruction_loss"} & result.keys()
    column = {"capsnet": "length", "cnn": "probability"}[story.network]
    assert header[:4] == ["file", "number", "label", "prediction"]
    assert header[4:] == [f"{column}_{name}" for name in NAMES]
    np.testing.assert_allclose(np.float64([row[4:] for row in rows]), scores, atol=1e-5)
    assert [row[2] for row in rows] == [NAMES[label] for label in labels]


def test_a_network_draws_what_it_has(story):
    drawn = {name for name in story.files["examined"] if name.startswith(("samples", "tweak"))}
    lengths = {"samples/capsule_lengths.png"} if story.network == "capsnet" else set()
    assert drawn == lengths | {
        *("samples/learning_curve.png", "samples/confusion_matrix.png"),
        *("samples/misclassified.png", "samples/predictions.png", "samples/predictions.csv"),
    }


def test_an_image_file_is_classified(story):
    column = {"capsnet": "length", "cnn": "probability"}[story.network]
    with open(story.folder / "samples/predictions.csv", newline="") as file:
        header, row = csv.reader(file)
    assert header == [
        *("file", "done", "class_1", f"{column}_1"),
        *("class_2", f"{column}_2", "class_3", f"{column}_3"),
    ]
    (scores,) = scores_of(story, read(story.folder / "new.png"))
    assert row[:3] == ["new.png", "unchanged", "red"]
    assert float(row[3]) == pytest.approx(scores.max(), abs=1e-4)
    shown = f"\nnew.png (unchanged): red: {float(row[3]):.3f}, "
    assert shown in story.results["examined"].out


def test_both_exported_files_compute_the_same(story):
    _, _, images, _ = table_of(story)
    network = keras.saving.load_model(story.folder / f"out/{story.network}.keras")
    outputs = network(images)
    outputs = outputs[0] if story.network == "capsnet" else outputs
    np.testing.assert_allclose(outputs, scores_of(story, images), atol=1e-5)
    card = (story.folder / "out/README.md").read_text()
    title = {"capsnet": "CapsNet", "cnn": "CNN"}[story.network]
    assert card.startswith(f"# {title} for mine\n") and f"{network.count_params():,}" in card
    assert f"{story.json['error_percent']:.2f}% error" in card
    assert f"{story.network}.keras" in card and "blue sky, green, red" in card


# ---------------------------------------------------------------- what a CNN has not


@pytest.fixture(scope="module")
def untrained(own_data, tmp_path_factory):
    """A folder with the images and a checkpoint of a CNN for them."""
    folder = tmp_path_factory.mktemp("untrained")
    colours(folder)
    names = list(NAMES)
    save_checkpoint(folder / "checkpoint/mine", CNN((8, 8, 3), 3, "affine"), class_names=names)
    return folder


@pytest.mark.parametrize("mode", ["reconstruction_test", "tweak_test"])
def test_modes_that_need_capsules_say_so(untrained, mode):
    refusal = run(untrained, f"--{mode}", DATASET, *QUICK)
    assert_refused(refusal, 1, f"--{mode} shows capsules", "checkpoint/mine", "leave the mode out")
    refusal = run(untrained, f"--{mode}", "--network=cnn", DATASET, *QUICK)
    assert_refused(refusal, 2, f"--{mode} needs capsules, and --network=cnn has none")
    assert not (untrained / "samples").exists() and not (untrained / "tweak").exists()


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--train", "--network=cnn", "--n_conv=8"], "--n_conv is a setting of --network=capsnet"),
        (["--test", "--network=cnn", "--variant=paper"], "--variant is a setting of --network=c"),
        (["--train", "--architecture=multi"], "--architecture is a setting of --network=cnn"),
        (["--train", "--network=cnn", "--reconstruction_weight=1"], "needs capsules"),
        (["--train", "--test", "--tweak_test", "--network=cnn"], "--tweak_test needs capsules"),
    ],
)
def test_settings_of_the_other_network_are_refused(untrained, words, problem):
    assert_refused(run(untrained, *words, DATASET), 2, problem)


def test_images_whose_sides_cannot_be_halved_are_refused(untrained):
    words = ["--train", *NETWORKS["cnn"], DATASET, "--image_size=10x8"]
    refusal = run(untrained, *words)
    assert_refused(refusal, 1, "halves the sides of an image 2 times and needs multiples of 4")


def test_a_cnn_finds_two_digits_in_an_image(own_data, tmp_path):
    colours(tmp_path)
    network = CNN((16, 16, 3), 3, "affine", n_digits=2)
    folder = tmp_path / "multi_checkpoint/multi_mine"
    save_checkpoint(folder, network, class_names=list(NAMES), multi_MNIST=True)
    pair = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pair).save(tmp_path / "new.png")
    words = ["--multi_MNIST", DATASET, "--predict=new.png", "--test", *QUICK]
    result = run(tmp_path, *words)
    assert (result.code, result.err) == (0, "") and "of 30 pairs wrong" in result.out
    (scores,) = network(pair[None] / np.float32(255)).numpy()
    first, second, third = np.argsort(-scores)
    shown = ", ".join(f"{NAMES[k]}: {scores[k]:.3f}" for k in (first, second, third))
    assert f": {NAMES[first]} and {NAMES[second]} ({shown})\n" in result.out
    assert not list((tmp_path / "samples").glob("multi_MNIST*"))
