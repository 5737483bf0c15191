import contextlib
import csv
import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import main
import model
import utils

ROOT = Path(__file__).parent.parent
DATA = f"--data_dir={ROOT / 'data'}"
NETWORK = ["--n_conv=8", "--n_primary=2", "--digit_dim=4"]
SMALL = [DATA, *NETWORK, "--train_size=300", "--batch_size=20", "--learning_rate=0.01", "--epoch=1",
         "--jit=off"]  # 15 steps
BOOLEANS = ["train", "test", "reconstruction_test", "tweak_test", "multi_MNIST", "data_deformation",
            "validation_check", "restart", "deterministic"]
PICTURES = {f"samples/{name}.png" for name in (
    "samples_arrange", "recon_samples_with_label_arrange", "recon_samples_without_label_arrange",
    "reconstruction")} | {f"tweak/{name}.png" for name in (
        "tweak_result_0", "tweak_result_1", "tweak_result_2", "tweak_result_3", "overview")} | {
            "tweak/sweep.gif"}
load_dataset = utils.load_dataset


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(folder, *words):
    """What the command line does in a folder."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(["main.py", *map(str, words)])
    return Result(code, out.getvalue(), err.getvalue())


def refused(result, code, *words):
    """The single line on standard error with which a command was refused."""
    assert result.code == code
    assert re.fullmatch(r"main\.py: [^\n]+\n", result.err)
    for word in words:
        assert word in result.err


def files(folder):
    """All files but locks and the notes of whose folder it is; events without time and process."""
    return {re.sub(r"(tfevents)\..*\.", r"\1.", str(path.relative_to(folder)))
            for path in folder.rglob("*") if path.is_file()
            and path.suffix != ".lock" and path.name != "run"}


@pytest.fixture(scope="module")
def mnist():
    return utils.load_dataset("mnist", ROOT / "data")


@pytest.fixture(scope="module")
def few(mnist):
    """Makes commands load the first 400 training and 200 test images only, and in no time."""
    part = mnist._replace(**{name: getattr(mnist, name)[:400 if "train" in name else 200]
                             for name in ("x_train", "y_train", "x_test", "y_test")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load_dataset", lambda name, folder: part)
        yield part


@pytest.fixture
def all_images(monkeypatch):
    monkeypatch.setattr(utils, "load_dataset", load_dataset)


class Story:
    """Commands typed one after another in one folder: their results, and the files after each."""

    def __init__(self, folder):
        self.folder, self.results, self.files = folder, {}, {}

    def type(self, name, *words):
        self.results[name] = run(self.folder, *words)
        self.files[name] = files(self.folder)
        assert self.results[name].code == 0, self.results[name]


@pytest.fixture(scope="module")
def story(few, tmp_path_factory):
    """The commands of the README, one after another; with few images and a small network."""
    story = Story(tmp_path_factory.mktemp("story"))
    story.type("deformed", "--train", "--data_deformation", *SMALL)
    story.type("same again", "--train", "--data_deformation", *SMALL)
    story.type("longer", "--train", "--data_deformation", *SMALL, "--epoch=2")
    story.type("examined", "--test", "--tweak_test", "--reconstruction_test", *SMALL)
    story.json = json.loads((story.folder / "logs/mnist/test.json").read_text())
    story.type("validated", "--train", "--validation_check=True", *SMALL)
    story.type("best tested", "--train=False", "--validation_check=True", "--test", *SMALL)
    return story


@pytest.fixture(scope="module")
def pairs(few, tmp_path_factory):
    """The commands for overlapping digits."""
    story = Story(tmp_path_factory.mktemp("pairs"))
    story.type("trained", "--train", "--multi_MNIST", "--data_deformation", *SMALL)
    story.type("examined", "--test", "--multi_MNIST", "--tweak_test", "--reconstruction_test",
               *SMALL)
    return story


# ---------------------------------------------------------------- flags


def test_help_lists_every_flag_and_answers_without_importing_tensorflow():
    script = ("import runpy, sys\nsys.argv = ['main.py', '--help']\ntry:\n"
              "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
              "except SystemExit as stop:\n    print(stop.code, 'tensorflow' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, text=True,
                           capture_output=True)
    assert shown.stdout.endswith("\n0 False\n") and shown.stderr == ""
    names = set(main.parse(["main.py"]))
    assert names >= {*BOOLEANS, "epoch", "logdir", "seed"} and len(names) > 30
    for name in names:
        assert re.search(rf"^  --(\[no\])?{name}[ =\n]", shown.stdout, re.MULTILINE), name


@pytest.mark.parametrize("words", [["--help"], ["--predict=assets/digits/1.png", "--pretrained"]])
def test_a_reader_of_the_output_may_go_away(tmp_path, words):
    reading, writing = os.pipe()
    os.close(reading)
    there = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run([sys.executable, "main.py", *words, f"--sample_dir={tmp_path}"],
                            check=False, cwd=ROOT, env=there, stdout=writing,
                            stderr=subprocess.PIPE)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_flag_is_switched_by_all_four_spellings(name):
    on = [f"--{name}", f"--{name}=True", f"--{name}=true"]
    off = [f"--no{name}", f"--{name}=False", f"--{name}=false"]
    for words, value in [([], False)] + [([w], True) for w in on] + [([w], False) for w in off]:
        needed = ["--train"] if name != "train" else []
        assert getattr(main.parse(["main.py", *needed, *words]), name) is value


def test_the_recipe_of_the_authors_fills_in_only_the_flags_that_are_not_given():
    given = ["main.py", "--train", "--batch_size=32", "--epoch=10"]
    plain, theirs = main.parse(given), main.parse([*given, "--recipe=authors"])
    assert (theirs.batch_size, theirs.epoch, theirs.learning_rate) == (32, 10, 0.001)
    assert (theirs.decay_rate, theirs.decay_steps, theirs.initialization, theirs.averaging) == (
        0.96, 2000, "authors", 0)
    # Halved and averaged over ten classes, the margin loss weighs 20 times less.
    assert theirs.reconstruction_weight == pytest.approx(20 * 0.0005)
    assert main.parse(["main.py", "--train", "--recipe=authors"]).batch_size == 128
    changed = {name for name in plain if plain[name].value != theirs[name].value}
    assert changed == {"recipe", *main.AUTHORS} - {"batch_size", "epoch"}


def test_overlapping_digits_have_a_schedule_of_their_own_for_the_flags_that_are_not_given():
    plain, multi = (main.parse(["main.py", "--train", *more]) for more in ([], ["--multi_MNIST"]))
    changed = {name: multi[name].value for name in plain if plain[name].value != multi[name].value}
    assert changed == {"multi_MNIST": True} | main.MULTI_MNIST
    assert f"--epoch={main.MULTI_MNIST['epoch']}" in main.help_text()
    given = ["main.py", "--train", "--multi_MNIST", "--epoch=10"]
    assert main.parse(given).epoch == 10
    theirs = main.parse([*given, "--recipe=authors"])
    assert (theirs.epoch, theirs.batch_size) == (10, main.AUTHORS["batch_size"])


def test_without_a_mode_there_is_a_short_usage_and_exit_code_2(tmp_path):
    for words in [], ["--epoch=3"], ["--notrain", "--test=False"]:
        result = run(tmp_path, *words)
        assert result.code == 2 and result.out == "" and 5 < result.err.count("\n") < 15
        for mode in ("--train", "--test", "--reconstruction_test", "--tweak_test", "--help"):
            assert mode in result.err
    assert files(tmp_path) == set()


@pytest.mark.parametrize("words, named", [
    (["--train", "--epochs=3"], "epochs"),
    (["--train", "--learning_rat", "0.1"], "learning_rat"),
    (["--train", "False"], "'False'"),
    (["train"], "'train'"),
    (["--train", "--", "x"], "'x'"),
    (["--train=maybe"], "maybe"),
    (["--train", "--epoch=0"], "--epoch=0"),
    (["--train", "--epoch=-1"], "--epoch=-1"),
    (["--train", "--epoch=1.5"], "1.5"),
    (["--train", "--epoch="], "epoch"),
    (["--train", "--epoch"], "epoch"),
    (["--train", "--batch_size=0"], "1 to"),
    (["--train", "--learning_rate=nan"], "--learning_rate=nan"),
    (["--train", "--learning_rate=inf"], "--learning_rate=inf"),
    (["--train", "--learning_rate=0"], "--learning_rate=0"),
    (["--train", "--decay_rate=1.1"], "1.1"),
    (["--train", "--decay_rate=-inf"], "-inf"),
    (["--train", "--reconstruction_weight=nan"], "nan"),
    (["--train", "--seed=-1"], "--seed=-1"),
    (["--train", "--seed=2147483648"], "--seed=2147483648"),
    (["--train", "--routing_iterations=0"], "1 to 100"),
    (["--train", "--train_size=-5"], "--train_size=-5"),
    (["--train", "--dataset=cifar10"], "fashion_mnist"),
    (["--train", "--dataset="], "--dataset is empty"),
    (["--train", "--conv=fft"], "dft"),
    (["--train", "--logdir="], "--logdir is empty"),
    (["--train", "--logdir=./checkpoint"], "the same"),
    (["--test", "--restart"], "needs --train"),
    (["--restart"], "needs --train"),
    (["--test", "--multi_test_pairs=2"], "needs --multi_MNIST"),
    (["--predict=a.png", "--multi_MNIST"], "single digits"),
    (["--train", "--pretrained"], "cannot be combined with --train"),
    (["--test", "--pretrained", "--validation_check"], "cannot be combined"),
    (["--train", "--validation_check", "--train_size=5"], "--train_size"),
    (["--train", "--é=\N{SNOWMAN}"], "é"),
    (["--flagfile=/nowhere/at/all"], "/nowhere/at/all"),
    (["--train", "--strategy=tpu"], "multi_worker"),
    (["--train", "--precision=float16"], "mixed_bfloat16"),
    pytest.param(["--train", "--precision=mixed_bfloat16"], "expected --precision=float32",
                 marks=pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")),
                                          reason="an accelerator can do it")),
])
def test_a_wrong_command_line_is_refused_in_one_line_with_exit_code_2(tmp_path, words, named):
    result = run(tmp_path, *words)
    refused(result, 2, named)
    assert result.out == "" and files(tmp_path) == set()


def test_the_requirements_list_tensorboard_which_tensorflow_does_not_install():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split("[<>=~]", line)[0] for line in lines} >= {
        "tensorflow", "tensorboard", "numpy", "pillow", "matplotlib", "absl-py", "pytest"}


# ---------------------------------------------------------------- what the commands do and write


def test_training_writes_checkpoints_and_events_and_names_the_next_command(story):
    _, out, err = story.results["deformed"]
    assert err == "" and "Trained to step 15 in " in out and "checkpoint/mnist" in out
    head = ["CapsNet output 1,383,984 parameters", "conv1 20 × 20 × 8 656",
            "primary capsules 72 × 8 10,384", "digit capsules 10 × 4 23,040",
            "decoder 28 × 28 × 1 1,349,904",
            ("300 training images of 28×28×1, 10 classes; batches of 20, 15 steps an epoch; "
             "training takes about 0.9 GB of memory")]
    assert [" ".join(line.split()) for line in out.splitlines()[:6]] == head
    assert re.search(r"Epoch 1/1 step 15/15: \d+ images/s, 0:00:00 left, margin loss 0\.\d+", out)
    saved = {f"checkpoint/mnist/{name}" for name in (
        "checkpoint", "ckpt-15.index", "ckpt-15.data-00000-of-00001")}
    assert story.files["deformed"] - saved == {
        "logs/mnist/train/events.out.tfevents.v2", "logs/mnist/events.out.tfevents.hparams",
        "samples/learning_curve.png"}
    (following,) = re.findall("^Next: python main.py (.*)$", out, re.MULTILINE)
    values = main.parse(["main.py", *shlex.split(following)])
    assert values.test and values.tweak_test and values.reconstruction_test and not values.train
    assert values.n_conv == 8 and values.data_dir == str(ROOT / "data")


@pytest.mark.parametrize("words", [
    ["--train", "--epoch", "3", "--n_conv", "9"], ["--train=True", "--test=False", "--n_conv=9"],
    ["-train", "-epoch=3", "-norestart", "--notest", "--n_conv=9"],
    ["--train", "--restart", "--n_conv=9", "--multi_MNIST", "--validation_check=True"]])
def test_the_next_command_that_training_names_can_be_typed_however_the_first_was(
        tmp_path, few, monkeypatch, words):
    monkeypatch.setattr(model.Trainer, "fit", lambda self, *args, **kwargs: True)
    out = run(tmp_path, *words, "--n_primary=2").out
    (following,) = re.findall("^Next: python main.py (.*)$", out, re.MULTILINE)
    values = main.parse(["main.py", *shlex.split(following)])
    assert values.test and values.tweak_test and values.reconstruction_test
    assert not values.train and not values.restart
    epochs = main.MULTI_MNIST["epoch"] if values.multi_MNIST else 10
    assert (values.n_conv, values.n_primary, values.epoch) == (9, 2, epochs)
    assert values.multi_MNIST is values.validation_check is ("--multi_MNIST" in words)


def test_the_same_command_again_says_the_run_is_finished_and_how_to_train_longer(story):
    _, out, err = story.results["same again"]
    assert out.count("\n") == 7 and err == ""
    assert "This run is finished: 1 epoch in" in out and "--epoch=11" in out and "--restart" in out
    assert story.files["same again"] == story.files["deformed"]


def test_more_epochs_go_on_and_say_from_which_step(story):
    _, out, err = story.results["longer"]
    assert "Going on from step 15 (checkpoint/mnist)." in out and "Trained to step 30 in" in out
    assert "Epoch 2/2 step 30/30" in out and "Epoch 1/" not in out


def test_another_run_moves_the_finished_one_aside_and_says_where(story):
    _, out, err = story.results["validated"]
    assert "Moved the earlier run aside: checkpoint/mnist.1, logs/mnist.1" in out
    assert "Validation after step 13: loss 0." in out and "the best so far" in out
    moved = {name.replace("mnist/", "mnist.1/") for name in story.files["examined"]
             if name.startswith(("checkpoint/mnist/", "logs/"))}
    assert moved < story.files["validated"]
    assert {"checkpoint/mnist/ckpt-13.index", "val_checkpoint/mnist/ckpt-13.index"} < (
        story.files["validated"])
    assert any(name.startswith("logs/mnist/validation/") for name in story.files["validated"])


def test_the_examining_modes_write_these_files_and_no_others(story):
    _, out, err = story.results["examined"]
    assert err == "" and "Weights of step 30 from checkpoint/mnist" in out
    assert out.endswith("Next: tensorboard --logdir=logs\n")
    new = {*PICTURES, "samples/confusion_matrix.png", "samples/misclassified.png",
           "logs/mnist/test.json"}
    events = {f"logs/mnist/test/events.out.tfevents.{name}"
              for name in ("evaluation", "reconstructions", "tweaks")}
    assert story.files["examined"] - story.files["longer"] == new | events
    assert {name for name in new if name in out} >= new - {n for n in new if "tweak_result" in n}
    assert "tweak/tweak_result_0.png to _3.png" in out


def test_the_pictures_are_png_files_of_a_size_to_look_at_with_something_in_them(story, pairs):
    paths = [*story.folder.rglob("*.png"), *pairs.folder.rglob("*.png")]
    assert len(paths) == 12 + 11
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and 200 < min(picture.size) <= max(picture.size) < 4000
            assert np.ptp(np.asarray(picture)) > 100


def test_the_grid_of_samples_shows_the_first_64_test_images_in_order(story, few):
    pixels = np.asarray(Image.open(story.folder / "samples/samples_arrange.png"))
    assert pixels.shape == (3 * (8 * 29 - 1), 3 * (8 * 29 - 1))
    for number in (0, 1, 8, 63):
        y, x = 87 * (number // 8), 87 * (number % 8)
        shown = pixels[y:y + 84:3, x:x + 84:3]
        np.testing.assert_array_equal(shown, few.x_test[number, :, :, 0])


def test_the_json_file_has_the_accuracy_that_counting_image_by_image_gives(story, few):
    keep = tf.train.load_checkpoint(str(story.folder / "checkpoint/mnist.1"))
    net = model.CapsNet((28, 28, 1), 10, 8, 2, 8, 4)
    for variable in net.variables:
        name = f"adam.S{variable.path.replace('/', '_')}_average"
        variable.assign(keep.get_tensor(f"optimizer/{name}/.ATTRIBUTES/VARIABLE_VALUE"))
    lengths = np.concatenate([net(image[None] / np.float32(255))[0] for image in few.x_test])
    wrong = int((lengths.argmax(axis=1) != few.y_test).sum())
    found = story.json
    assert 0 < wrong < 200
    assert (found["wrong"], found["images"]) == (wrong, 200)
    assert found["accuracy"] == pytest.approx(1 - wrong / 200)
    assert found["error_percent"] == pytest.approx(wrong / 2)
    assert f"error {wrong / 2:.2f}%, {wrong} of 200 wrong" in story.results["examined"][1]
    for number, name in enumerate(few.class_names):
        of_class = few.y_test == number
        share = (lengths.argmax(axis=1) == number)[of_class].mean()
        assert found["accuracy_per_class"][name] == pytest.approx(share)
    assert found["total_loss"] == pytest.approx(
        found["margin_loss"] + 0.0005 * found["reconstruction_loss"])


def test_the_json_file_says_with_what_it_was_made(story):
    found = story.json
    assert found["checkpoint_step"] == 30 and found["seed"] == 0 and found["dataset"] == "mnist"
    assert found["flags"].keys() == {name for rows in main.FLAGS.values() for name, *_ in rows}
    assert found["flags"]["n_conv"] == 8 and found["training"]["data_deformation"] is True
    assert found["versions"]["tensorflow"] == tf.__version__ and "numpy" in found["versions"]
    assert found["images_per_second"] > 0 and "--tweak_test" in found["command"]


def test_the_weights_kept_by_validation_are_tested_with_validation_check(story):
    _, out, err = story.results["best tested"]
    assert "Weights of step 13 from val_checkpoint/mnist" in out and "Test accuracy " in out
    found = json.loads((story.folder / "logs/mnist/test.json").read_text())
    assert found["checkpoint_step"] == 13 and found["training"]["validation_check"] is True


def test_validation_images_come_from_the_training_images_and_only_training_ones_are_shifted(
        tmp_path, few, monkeypatch):
    seen = []

    class Spy(model.Trainer):
        def __init__(self, net, data, validation, *args, **kwargs):
            seen.extend([data, validation])
            raise utils.UserError("enough")

    monkeypatch.setattr(model, "Trainer", Spy)
    refused(run(tmp_path, "--train", "--validation_check", "--data_deformation", *SMALL), 1)
    refused(run(tmp_path, "--train", *SMALL), 1)
    data, validation, plain, nothing = seen
    assert nothing is None and not plain.training_plan(0, 0).shift.any()
    assert (len(data.labels), len(validation.labels)) == (250, 50)
    number = {image.tobytes(): i for i, image in enumerate(few.x_train[:300])}
    kept, held_out = ([number[image.tobytes()] for image in part.images] for part in seen[:2])
    assert sorted(kept + held_out) == list(range(300))
    for part, numbers in (data, kept), (validation, held_out):
        np.testing.assert_array_equal(part.labels, few.y_train[numbers])
    assert np.unique(data.training_plan(0, 0).shift).tolist() == [-2, -1, 0, 1, 2]
    assert not validation.evaluation_plan().shift.any()


def test_a_tweak_adds_to_one_dimension_of_the_predicted_capsule_and_shows_what_that_decodes_to(
        tmp_path, story, few, monkeypatch):
    drawn, overview = {}, []
    monkeypatch.setattr(utils, "save_tweak", lambda path, images, deltas, dim, names: drawn.update(
        {dim: (path.name, images, names)}))
    sweep = []
    monkeypatch.setattr(utils, "save_tweak_overview", lambda path, images, deltas, name:
                        overview.extend([images, deltas, name]) or np.zeros((9, 9, 3), np.uint8))
    monkeypatch.setattr(utils, "save_sweep", lambda path, *rest: sweep.extend(rest))
    assert run(story.folder, "--tweak_test", "--tweak_num=3", *SMALL).code == 0
    assert list(drawn) == [0, 1, 2, 3]
    images, deltas, name = overview
    np.testing.assert_allclose(deltas, [-.25, -.2, -.15, -.1, -.05, 0, .05, .1, .15, .2, .25],
                               atol=1e-12)
    net = model.CapsNet((28, 28, 1), 10, 8, 2, 8, 4)
    model.load_weights(net, story.folder / "checkpoint/mnist", print)
    for digit in range(3):
        lengths, capsules = net(few.x_test[digit][None] / np.float32(255))
        chosen = int(np.argmax(lengths))
        for dim, step in [(0, 0), (1, 5), (2, 10), (3, 3)]:
            moved = np.zeros((1, 10, 4), np.float32)
            moved[0, chosen] = capsules[0, chosen]
            moved[0, chosen, dim] += deltas[step]
            expected = net.decoder(moved, np.ones((1, 1, 10), np.float32))[0, 0]
            file, shown, names = drawn[dim]
            assert file == f"tweak_result_{dim}.png" and names[digit] == str(chosen)
            np.testing.assert_allclose(shown[digit, step], expected, atol=1e-6)
    np.testing.assert_array_equal(images, np.stack([drawn[dim][1][0] for dim in range(4)]))
    assert name == drawn[0][2][0]
    np.testing.assert_array_equal(sweep[0], np.stack([drawn[dim][1] for dim in range(4)]))
    assert sweep[2] == drawn[0][2]


def test_all_10000_test_images_are_counted_with_the_default_way_to_compute(
        tmp_path, story, all_images):
    result = run(tmp_path, "--test", f"--checkpoint_dir={story.folder / 'checkpoint'}", DATA,
                 *NETWORK)
    assert result.code == 0 and " of 10000 wrong" in result.out
    found = json.loads((tmp_path / "logs/mnist/test.json").read_text())
    assert found["images"] == 10000 and found["wrong"] == round(10000 * (1 - found["accuracy"]))


# ---------------------------------------------------------------- export and pretrained weights


@pytest.fixture(scope="module")
def exported(story):
    """The folder that --export wrote for the network of the story."""
    story.type("exported", "--test", "--export=taken/along", *SMALL)
    return story.folder / "taken/along"


def test_an_export_has_these_files_and_a_card_with_the_figures_of_its_test(story, exported):
    new = {name for name in story.files["exported"] if name.startswith("taken/")}
    assert new == {f"taken/along/{name}" for name in (
        "capsnet.keras", "weights.npz", "README.md", "saved_model/saved_model.pb",
        "saved_model/fingerprint.pb", "saved_model/variables/variables.index",
        "saved_model/variables/variables.data-00000-of-00001")}
    card = (exported / "README.md").read_text()
    found = json.loads((story.folder / "logs/mnist/test.json").read_text())
    assert f"{found['error_percent']:.2f}% error ({found['wrong']} of 200 wrong)" in card
    assert "(N, 28, 28, 1)" in card and "| n_conv | 8 |" in card and "| train_size | 300 |" in card


@pytest.mark.parametrize("kind, code, folder", [
    ("SavedModel", """
network = tf.saved_model.load(sys.argv[1] + "/saved_model")
found = network.serve(images)
assert not any("capsnet" in name or name in ("ops", "model") for name in sys.modules)
lengths, capsules, shown = (found[k] for k in ("lengths", "capsules", "reconstructions"))
""", "/"), ("keras", """
import keras, ops, model
network = keras.saving.load_model(sys.argv[1] + "/capsnet.keras")
lengths, capsules = network.predict(images, verbose=0)
shown = network.decoder(capsules, np.ones((len(images), 1, 10), np.float32))
""", ROOT)])
def test_an_exported_network_says_in_a_new_process_what_it_said_before(
        tmp_path, few, exported, kind, code, folder):
    images = few.x_test[:7] / np.float32(255)
    np.save(tmp_path / "images.npy", images)
    script = ("import sys\nimport numpy as np\nimport tensorflow as tf\n"
              f"images = np.load(sys.argv[2])\n{code}\n"
              "np.savez(sys.argv[3], lengths=lengths, capsules=capsules, shown=shown)")
    arguments = [sys.executable, "-c", script, str(exported), str(tmp_path / "images.npy"),
                 str(tmp_path / "out.npz")]
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    net = model.CapsNet((28, 28, 1), 10, 8, 2, 8, 4)
    model.load_weights(net, exported.parent.parent / "checkpoint/mnist", print)
    lengths, capsules = (part.numpy() for part in net(images))
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(found["lengths"], lengths, atol=1e-5)
    np.testing.assert_allclose(found["capsules"], capsules, atol=1e-5)
    if kind == "SavedModel":
        only = capsules * np.eye(10)[lengths.argmax(1)][:, :, None]
        expected = net.decoder(only.astype(np.float32), np.ones((7, 1, 10), np.float32))
        np.testing.assert_allclose(found["shown"], expected, atol=1e-5)


def test_an_export_never_touches_what_is_there_and_leaves_nothing_half_written(
        story, exported, few, monkeypatch):
    before = {name: name for name in files(story.folder)} | {
        str(path): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    refused(run(story.folder, "--export=taken/along", "--train", "--restart", *SMALL), 1,
            "taken/along", "another name")  # before it trains
    refused(run(story.folder, "--export=samples/reconstruction.png", *SMALL), 1, "another name")

    def fail(*arguments, **facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    refused(run(story.folder, "--export=new", *SMALL), 1, "No space left")
    assert before == {name: name for name in files(story.folder)} | {
        str(path): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert not list(story.folder.glob(".*/"))


def test_pretrained_weights_are_those_that_were_exported_as_float16(
        tmp_path, story, exported, few, monkeypatch):
    net, original = (model.CapsNet((28, 28, 1), 10, 8, 2, 8, 4) for _ in range(2))
    facts = model.load_pretrained(net, exported)
    assert facts["step"] == model.load_weights(
        original, story.folder / "checkpoint/mnist", print)["step"]
    for half, whole in zip(net.get_weights(), original.get_weights()):
        np.testing.assert_array_equal(half, whole.astype(np.float16).astype(np.float32))
    monkeypatch.setattr(main, "__file__", str(tmp_path / "main.py"))
    (tmp_path / "pretrained").mkdir()
    refused(run(tmp_path, "--test", "--pretrained", *SMALL), 1, "for: none", "train first")
    shutil.copytree(exported, tmp_path / "pretrained/mnist")
    result = run(tmp_path, "--test", "--tweak_test", "--reconstruction_test", "--pretrained",
                 *SMALL)
    assert result.code == 0 and result.err == "" and "pretrained/mnist" in result.out
    found = json.loads((tmp_path / "logs/mnist_pretrained/test.json").read_text())
    expected = json.loads((story.folder / "logs/mnist/test.json").read_text())
    assert abs(found["wrong"] - expected["wrong"]) <= 1
    assert found["training_seconds"] == expected["training_seconds"] > 0
    refused(run(tmp_path, "--test", "--pretrained", *SMALL, "--n_conv=9"), 1,
            "n_conv is 8 there and 9 here")
    refused(run(tmp_path, "--test", "--pretrained", *SMALL, "--multi_MNIST"), 1,
            "for multi_mnist, there are some for: mnist")
    path = tmp_path / "pretrained/mnist/weights.npz"
    whole = path.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-50], whole[:5000] + b"xxxx" + whole[5004:]):
        path.write_bytes(damaged)
        refused(run(tmp_path, "--test", "--pretrained", *SMALL), 1, "weights.npz is damaged")


def test_the_weights_that_come_with_the_program_fit_the_default_network():
    folder = ROOT / "pretrained/mnist"
    assert (folder / "weights.npz").stat().st_size < 20e6
    net = model.CapsNet((28, 28, 1), 10, conv="dft")
    facts = model.load_pretrained(net, folder)
    assert facts["training"]["data_deformation"] and facts["training"]["train_size"] == 0
    mnist = utils.load_dataset("mnist", ROOT / "data")
    unseen = model.Data(mnist.x_test[:1000], mnist.y_test[:1000])
    found = model.evaluate(model.compile_forward(net, unseen, True), unseen,
                           unseen.evaluation_plan())
    assert found["accuracy"] > 0.99
    assert f"trained for {facts['step']:,} steps" in (folder / "README.md").read_text()


# ---------------------------------------------------------------- images of one's own


def test_predictions_of_files_are_those_of_the_network_for_the_images_in_them(
        tmp_path, story, few):
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.fromarray(few.x_test[number, ..., 0]).save(tmp_path / f"in/{number}.png")
    dark_on_light = 255 - np.pad(few.x_test[4, ..., 0], ((0, 0), (28, 28))).repeat(3, 0).repeat(3, 1)
    Image.fromarray(np.stack([dark_on_light, dark_on_light, dark_on_light // 2 + 127], -1)).save(
        tmp_path / "in/4.png")
    result = run(tmp_path, "--predict=in/*.png", f"--checkpoint_dir={story.folder / 'checkpoint'}",
                 *SMALL)
    assert result.code == 0 and result.err == ""
    with open(tmp_path / "samples/predictions.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "done", "class_1", "length_1", "class_2", "length_2", "class_3",
                    "length_3"]
    net = model.CapsNet((28, 28, 1), 10, 8, 2, 8, 4)
    model.load_weights(net, story.folder / "checkpoint/mnist", print)
    lengths = net(few.x_test[:4] / np.float32(255))[0].numpy()
    for number, (row, found) in enumerate(zip(rows, lengths)):
        best = np.argsort(-found)[:3]
        assert row[:2] == [f"in/{number}.png", "as it was"]
        assert row[2::2] == [str(k) for k in best]
        np.testing.assert_allclose(np.float64(row[3::2]), found[best], atol=1e-5)
        said = ", ".join(f"{k}: {found[k]:.3f}" for k in best)
        assert f"in/{number}.png (as it was): {said}\n" in result.out
    assert rows[4][1] == "made grey, inverted, filled up at its edges, resized from 252×84" and len(rows) == 5
    with Image.open(tmp_path / "samples/predictions.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_a_file_whose_name_is_no_text_is_predicted_too(tmp_path, story, few):
    name = b"in\xff.png"
    Image.fromarray(few.x_test[0, ..., 0]).save(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as most terminals are
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(out):
        assert main.main(["main.py", "--predict=*.png", *SMALL,
                          f"--checkpoint_dir={story.folder / 'checkpoint'}"]) == 0
    out.flush()
    assert b"\n" + name + b" (as it was): " in out.buffer.getvalue()
    assert name in (tmp_path / "samples/predictions.csv").read_bytes()


def test_a_pattern_without_images_or_expanded_by_the_shell_is_pointed_out(tmp_path, story, few):
    there = f"--checkpoint_dir={story.folder / 'checkpoint'}"
    refused(run(tmp_path, "--predict=*.png", there, *SMALL), 1, "matches no file", "quote")
    for name in ("a.png", "b.png"):
        Image.fromarray(few.x_test[0, ..., 0]).save(tmp_path / name)
    refused(run(tmp_path, "--predict", "a.png", "b.png", *SMALL), 2, "the shell", "quoted")
    (tmp_path / "odd").mkdir()
    refused(run(tmp_path, "--predict=odd", there, *SMALL), 1, "is a folder", "'odd/*'")
    (tmp_path / "c.png").write_text("no image")
    result = run(tmp_path, "--predict=*.png", there, *SMALL)
    refused(result, 1, "1 of 3 files could not be read: c.png")
    assert "a.png (as it was): " in result.out and "b.png (as it was): " in result.out
    assert (tmp_path / "samples/predictions.csv").read_text().count("\n") == 3


def test_colour_images_of_ones_own_are_trained_tested_and_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "load_dataset", load_dataset)
    dice = np.random.default_rng(0)
    labels, names = np.arange(60) % 3, ("red", "green", "blue sky")
    images = dice.integers(0, 90, (60, 20, 24, 3), dtype=np.uint8)
    images[np.arange(60), :, :, labels] += 160
    for number, (image, label) in enumerate(zip(images, labels)):
        place = tmp_path / "mine" / ("train" if number < 48 else "test") / names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    Image.fromarray(images[48].repeat(2, 0).repeat(2, 1)).save(tmp_path / "new.png")
    result = run(tmp_path, "--dataset=mine", "--train", "--data_deformation", "--test",
                 "--reconstruction_test", "--tweak_test", "--predict=new.png", *NETWORK,
                 "--batch_size=8", "--epoch=8", "--learning_rate=0.01", "--jit=off")
    assert result.code == 0 and result.err == ""
    assert "48 training images of 20×24×3, 3 classes" in result.out
    found = json.loads((tmp_path / "logs/mine/test.json").read_text())
    assert found["accuracy"] > 0.9 and list(found["accuracy_per_class"]) == sorted(names)
    assert "\nnew.png (resized from 48×40): red: " in result.out


def test_more_training_images_than_there_are_is_no_other_run(tmp_path, few):
    values = main.parse(["main.py", "--train", "--train_size=500"])
    assert main.Run(values, []).flags.train_size == 0
    values = main.parse(["main.py", "--train", "--train_size=399"])
    assert len(main.Run(values, []).train_data.labels) == 399


def test_the_data_of_the_program_are_found_from_anywhere_but_for_a_folder_that_is_named(
        tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(utils, "load_dataset", lambda name, folder: asked.append(str(folder)) or load_dataset(
        "mnist", Path(main.__file__).parent / "data"))
    monkeypatch.chdir(tmp_path)
    main.Run(main.parse(["main.py", "--test"]), [])
    main.Run(main.parse(["main.py", "--test", "--data_dir=mine"]), [])
    (tmp_path / "data").mkdir()
    main.Run(main.parse(["main.py", "--test"]), [])
    assert asked == [str(Path(main.__file__).parent / "data"), "mine", "data"]


def test_too_small_images_say_how_small_they_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "load_dataset", load_dataset)
    images = np.zeros((4, 16, 30), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(4), x_test=images,
             y_test=np.arange(4))
    refused(run(tmp_path, "--dataset=a.npz", "--train"), 1, "at least 17×17 pixels", "16, 30")
    assert files(tmp_path) == {"a.npz"}


# ---------------------------------------------------------------- what TensorBoard shows


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get(url, **fields):
    """What an address answers, as soon as it does."""
    body = json.dumps(fields).encode() if fields else None
    for _ in range(240):
        with contextlib.suppress(OSError):
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        time.sleep(0.25)
    raise TimeoutError(url)


def test_tensorboard_serves_curves_pictures_histograms_and_hyper_parameters(story):
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir=./logs", f"--port={port}",
         "--load_fast=false"], cwd=story.folder, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}/data"
        for _ in range(100):  # until it has read them all
            tags = json.loads(get(f"{base}/plugin/scalars/tags"))
            if {"mnist/train", "mnist/validation", "mnist/test"} <= tags.keys():
                break
            time.sleep(0.3)
        for name in ("train", "validation", "test"):  # one tag, so one chart
            assert {"loss/total", "accuracy"} <= tags[f"mnist/{name}"].keys()
        pictures = json.loads(get(f"{base}/plugin/images/tags"))
        assert {"confusion matrix"} <= pictures["mnist/test"].keys()
        assert {"confusion matrix", "reconstructions", "tweaks"} == (
            pictures["mnist/validation"].keys())
        query = "run=mnist/validation&tag=tweaks&sample=0"
        (listed,) = json.loads(get(f"{base}/plugin/images/images?{query}"))
        picture = Image.open(io.BytesIO(get(f"{base}/plugin/images/individualImage?"
                                            + listed["query"])))
        assert picture.format == "PNG" and min(picture.size) > 300
        histograms = json.loads(get(f"{base}/plugin/histograms/tags"))["mnist/test"]
        assert "where present, length of capsule/7" in histograms and len(histograms) == 20
        found = json.loads(get(f"{base}/plugin/hparams/session_groups", experimentName="",
                               allowedStatuses=["STATUS_UNKNOWN"], colParams=[], startIndex=0,
                               sliceSize=10))["sessionGroups"]
        trial = {group["sessions"][0]["name"]: group for group in found}["mnist"]
        assert trial["hparams"]["n_conv"] == 8 and trial["hparams"]["learning_rate"] == 0.01
        assert trial["hparams"]["validation_check"] is True
        (accuracy,) = (metric["value"] for metric in trial["metricValues"]
                       if metric["name"] == {"group": "test", "tag": "accuracy"})
        written = json.loads((story.folder / "logs/mnist/test.json").read_text())
        assert accuracy == pytest.approx(written["accuracy"], abs=1e-6)
    finally:
        server.kill()
        server.wait()


def test_weights_are_not_tested_with_classes_of_other_names_nor_silently_with_other_images(
        tmp_path, story, few, monkeypatch):
    there = f"--checkpoint_dir={story.folder / 'checkpoint'}"
    monkeypatch.setattr(utils, "load_dataset", lambda name, folder: few._replace(
        class_names=tuple("abcdefghij")))
    refused(run(tmp_path, "--test", there, *SMALL), 1, "other classes", "'a'", "--dataset")
    monkeypatch.setattr(utils, "load_dataset", lambda name, folder: few._replace(
        x_train=few.x_train[::-1]))
    assert "trained on other images" in run(tmp_path, "--test", there, *SMALL).out
    monkeypatch.setattr(utils, "load_dataset", lambda name, folder: few)
    assert "trained on other images" not in run(tmp_path, "--test", there, *SMALL).out
    other = tmp_path / "elsewhere"
    shutil.copytree(story.folder / "checkpoint", other)
    refused(run(tmp_path, "--test", f"--checkpoint_dir={other}", *SMALL), 1, "belongs to the run")


def test_overlapping_digits_have_folders_and_pictures_of_their_own(pairs):
    _, out, err = pairs.results["trained"]
    assert "--data_deformation adds nothing to --multi_MNIST" in out and "--multi_MNIST" in out
    assert {"multi_checkpoint/multi_mnist/ckpt-15.index"} < pairs.files["trained"]
    assert not [name for name in pairs.files["trained"] if name.startswith("checkpoint")]
    new = {*PICTURES, "samples/multi_MNIST.png", "logs/multi_mnist/test.json"} | {
        f"logs/multi_mnist/test/events.out.tfevents.{name}"
        for name in ("evaluation", "reconstructions", "tweaks")}
    assert pairs.files["examined"] - pairs.files["trained"] == new
    with Image.open(pairs.folder / "samples/samples_arrange.png") as picture:
        assert picture.size == (3 * (8 * 37 - 1), 3 * (8 * 37 - 1))


def test_every_test_digit_is_in_as_many_pairs_as_asked_for_and_these_are_counted(
        tmp_path, pairs, few):
    result = run(tmp_path, "--test", "--multi_MNIST", "--multi_test_pairs=3", *SMALL,
                 f"--multi_checkpoint_dir={pairs.folder / 'multi_checkpoint'}")
    assert result.code == 0 and "of 600 pairs wrong" in result.out
    found = json.loads((tmp_path / "logs/multi_mnist/test.json").read_text())
    assert found["images"] == 600 and found["flags"]["multi_test_pairs"] == 3
    net = model.CapsNet((36, 36, 1), 10, 8, 2, 8, 4)
    model.load_weights(net, pairs.folder / "multi_checkpoint/multi_mnist", print)
    plan = utils.evaluation_plan(few.y_test, 4, True, 3)
    canvas = np.zeros((600, 36, 36, 1))
    for number, (index, shift) in enumerate(zip(plan.index, plan.shift)):
        for k in (0, 1):
            y, x = 4 + shift[k]
            canvas[number, y:y + 28, x:x + 28] += few.x_test[index[k]] / 255
    lengths = net(np.minimum(canvas, 1).astype(np.float32))[0].numpy()
    best = np.sort(np.argsort(-lengths)[:, :2])
    wrong = (best != np.sort(few.y_test[plan.index])).any(axis=1).sum()
    assert abs(int(wrong) - found["wrong"]) <= 1  # but for a tie within rounding


def test_a_pair_counts_only_if_both_digits_are_right(pairs):
    found = json.loads((pairs.folder / "logs/multi_mnist/test.json").read_text())
    assert found["images"] == 200 and found["dataset"] == "multi_mnist"
    assert found["wrong"] == round(200 * (1 - found["accuracy"]))
    # Guessing finds one digit of a pair more often than both.
    assert found["accuracy"] < found["digit_accuracy"] < 1
    assert "both digits right; of single digits" in pairs.results["examined"][1]


# ---------------------------------------------------------------- what goes wrong


def test_examining_without_a_checkpoint_says_to_train_first(tmp_path, few):
    for mode in ("--test", "--reconstruction_test", "--tweak_test"):
        refused(run(tmp_path, mode, *SMALL), 1, "no checkpoint in checkpoint/mnist", "--train")
    assert files(tmp_path) == set()


def test_a_checkpoint_of_another_shape_is_refused_naming_the_flag(story, few):
    refused(run(story.folder, "--test", *SMALL, "--digit_dim=5"), 1,
            "digit_dim is 4 there and 5 here")


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, story, few):
    shutil.copytree(story.folder / "checkpoint", tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint/mnist").glob("*.data*"):
        path.write_bytes(path.read_bytes()[:1000])
    for words in ["--test"], ["--train", "--validation_check"]:
        refused(run(tmp_path, *words, *SMALL), 1, "every checkpoint is damaged", "--restart")


def test_missing_and_damaged_data_are_refused_naming_the_file_and_the_download(
        tmp_path, all_images):
    here = "--data_dir=data"
    refused(run(tmp_path, "--train", here), 1, "train-images-idx3-ubyte.gz",
            "python download.py mnist")
    refused(run(tmp_path, "--test", "--dataset=kmnist", here), 1, "python download.py kmnist")
    folder, name = tmp_path / "data" / "mnist", "train-labels-idx1-ubyte.gz"
    shutil.copytree(ROOT / "data" / "mnist", folder)
    (folder / name).write_bytes(gzip.compress(gzip.decompress((folder / name).read_bytes())[:-1]))
    refused(run(tmp_path, "--train"), 1, name, "python download.py mnist")


def test_images_too_small_for_the_network_are_refused(tmp_path, few, monkeypatch):
    small = few._replace(x_train=few.x_train[:, :16], x_test=few.x_test[:, :16])
    monkeypatch.setattr(utils, "load_dataset", lambda name, folder: small)
    refused(run(tmp_path, "--train", *SMALL), 1, "mnist: ", "17×17")


@pytest.mark.parametrize("flag, words", [
    ("checkpoint_dir", ["--train"]), ("logdir", ["--train"]),
    ("val_checkpoint_dir", ["--train", "--validation_check"]),
    ("multi_checkpoint_dir", ["--train", "--multi_MNIST"]),
    ("logdir", ["--test"]), ("sample_dir", ["--test"]), ("sample_dir", ["--reconstruction_test"]),
    ("tweak_dir", ["--tweak_test"])])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_in_the_way_of_a_folder_is_refused_and_kept(tmp_path, story, few, flag, words, below):
    (tmp_path / "file").write_text("mine")
    checkpoint = [f"--checkpoint_dir={story.folder / 'checkpoint'}"] * ("--train" not in words)
    result = run(tmp_path, *words, *SMALL, *checkpoint, f"--{flag}=file{below}")
    refused(result, 1, "file")
    assert (tmp_path / "file").read_text() == "mine"


def stop_at(number, step):
    def progress(self, at):
        if at["step"] == step:
            signal.raise_signal(number)
    return progress


def test_ctrl_c_saves_and_exits_with_130_and_the_unfinished_run_wants_the_same_flags(
        tmp_path, few, monkeypatch):
    command = ["--train", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(main.Display, "step", stop_at(signal.SIGINT, 3))
        result = run(tmp_path, *command)
    assert result.code == 130
    assert result.err == "Stopped, and saved. To go on: the same command again.\n"
    other = ["--seed=1", "--data_deformation", "--learning_rate=0.02"]
    refused(run(tmp_path, *command, *other), 1, "unfinished run (step 3 of 15)", "--restart",
            "data_deformation is False there and True here", "seed is 0 there and 1 here",
            "learning_rate is 0.01 there and 0.02 here")
    shutil.copytree(tmp_path, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(main.Display, "step", stop_at(signal.SIGINT, 2))
        result = run(tmp_path / "copy", *command, *other, "--restart")
    assert result.code == 130 and result.err.endswith(" same command again, without --restart.\n")
    assert "Moved the earlier run aside: checkpoint/mnist.1" in result.out
    result = run(tmp_path, *command)
    assert "Going on from step 3" in result.out and "Trained to step 15" in result.out


def test_sigterm_saves_and_exits_with_143_and_the_same_command_goes_on(tmp_path, few):
    command = ["--train", *SMALL, "--epoch=4"]
    child = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *command, "--deterministic"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in child.stdout:
        if line.startswith("Epoch 1/4 step 1/60"):
            break
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 143
    assert err == "Stopped, and saved. To go on: the same command again.\n"
    step, *_ = model.saved_steps(tmp_path / "checkpoint/mnist")
    assert 1 <= step < 60
    result = run(tmp_path, *command)
    assert result.code == 0 and f"Going on from step {step} (" in result.out
    assert "Trained to step 60" in result.out


def test_on_a_terminal_a_bar_shows_the_progress(tmp_path, few, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run(tmp_path, "--train", *SMALL)
    assert result.code == 0 and result.err == ""
    shown = " ".join(re.sub("\x1b[^A-Za-z]*[A-Za-z]", "", result.out).split())
    assert "Epoch 1/1 step 15/15 ━" in shown and "Trained to step 15 in" in shown


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_honoured(capsys, monkeypatch, no_color):
    monkeypatch.setenv("FORCE_COLOR", "1")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with main.Display() as display:
        display.step({"seconds_left": 5, "epoch": 1, "epochs": 1, "step": 1, "last_step": 2,
                      "images_per_second": 9, "margin_loss": 0.1, "reconstruction_loss": 3,
                      "accuracy": 0.9})
    shown = capsys.readouterr().out
    assert "Epoch 1/1 step 1/2" in shown
    assert bool(re.search(r"\x1b\[[0-9;]*m", shown)) is not no_color


# ---------------------------------------------------------------- the README


def test_every_link_of_the_readme_into_the_code_points_to_what_it_names():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    for name, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", line), (name, file, number, line)


def test_the_readme_lists_every_flag_with_its_default():
    table = (ROOT / "README.md").read_text()
    for rows in main.FLAGS.values():
        for name, default, _, text in rows:
            shown = "off" if default is False else f"`{default}`" if default != "" else "none"
            assert f"| `--{name}` | {shown} | {text}" in table, name


def test_the_table_of_results_in_the_readme_is_the_one_made_from_the_results():
    shown = subprocess.run([sys.executable, "benchmarks/results.py"], cwd=ROOT, check=True,
                           text=True, capture_output=True).stdout.strip()
    assert shown.count("\n") > 3 and shown in (ROOT / "README.md").read_text()


def test_the_table_of_results_has_mean_and_deviation_of_runs_that_differ_in_their_seed(tmp_path):
    for seed, wrong in (1, 40), (0, 50), (2, 45):
        (tmp_path / f"{seed}.json").write_text(json.dumps({
            "command": f"main.py --train --test --seed={seed}", "seed": seed, "wrong": wrong,
            "images": 10000, "error_percent": wrong / 100, "training_seconds": 3000.0,
            "date": "2026-11-24T00:00:00+00:00", "machine": "a machine",
            "versions": {"python": "3.11", "tensorflow": "2.21"}}))
    code = ("import sys, pathlib; sys.path.insert(0, 'benchmarks'); import results\n"
            "results.FOLDER = pathlib.Path(sys.argv[1])\nsys.exit(results.main())")
    shown = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, text=True,
                           capture_output=True).stdout.splitlines()
    assert shown[2] == ("| `python main.py --train --test` | 0, 1, 2 | 50, 40, 45 of 10,000 "
                        "| 0.450 ± 0.050 | 50, 50, 50 | 2026-11-24 |")
    assert "a machine" in shown[-1]
