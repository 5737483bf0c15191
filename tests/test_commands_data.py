import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from story import (
    FAST,
    ROOT,
    Command,
    assert_refused,
    load_all,
    run,
    small_network,
    weights_of,
)

from capsnet_core.errors import ImageTooSmall, UserError
from commands.data import run_folders
from commands.weights import check_data, check_unseen
from inputs import datasets
from inputs.pipeline import split_validation

pytest_plugins = ["story_fixtures"]


# ---------------------------------------------------------------- folders and images


def test_each_folder_is_that_of_its_flag():
    words = ["--checkpoint_dir=a", "--val_checkpoint_dir=b", "--multi_checkpoint_dir=c"]
    for more, expected in {
        (): ("a/mnist", "b/mnist", "d/mnist"),
        ("--multi_MNIST",): ("c/multi_mnist", "b/multi_mnist", "d/multi_mnist"),
        ("--pretrained",): ("a/mnist", "b/mnist", "d/mnist_pretrained"),
    }.items():
        folders = run_folders(Command(*words, *more, "--logdir=d").flags)
        assert folders == tuple(map(Path, expected))


def shifts(plan):
    return [np.unique(plan.shift[..., axis]).tolist() for axis in (0, 1)]


def test_training_digits_are_shifted_by_two_pixels_if_asked_for_and_test_digits_never(few):
    plain, deformed = Command().data, Command("--data_deformation").data
    assert shifts(plain.train.training_plan(0, 0)) == [[0], [0]]
    assert shifts(deformed.train.training_plan(0, 0)) == [[-2, -1, 0, 1, 2]] * 2
    for data in (plain, deformed):
        assert shifts(data.test.evaluation_plan()) == [[0], [0]]
        for part in (data.train, data.test):
            assert part.canvas_shape() == (28, 28, 1) and part.digits_per_example == 1


@pytest.mark.parametrize("words", [[], ["--data_deformation"]])
def test_overlapping_digits_are_shifted_by_four_pixels_on_a_canvas_of_36(few, words):
    data = Command("--multi_MNIST", *words).data
    plans = data.train.training_plan(0, 0), data.test.evaluation_plan()
    for part, plan in zip((data.train, data.test), plans, strict=True):
        assert shifts(plan) == [list(range(-4, 5))] * 2
        assert part.canvas_shape() == (36, 36, 1) and part.digits_per_example == 2
        assert part.padding == 4
        labels = part.labels[plan.index]
        assert (labels[:, 0] != labels[:, 1]).all()


def test_overlapping_digits_are_shifted_by_as_much_as_the_flag_says(few):
    for words, shift in ([], 4), (["--multi_shift=6"], 6), (["--recipe=authors"], 6):
        command = Command(*FAST, "--multi_MNIST", *words)
        for part in (command.data.train, command.data.test):
            assert (part.max_shift, part.padding, part.canvas_shape()) == (shift, 4, (36, 36, 1))
        drawn = command.data.test.evaluation_plan().shift
        assert (drawn.min(), drawn.max()) == (-shift, shift)
        assert command.trainer().metadata["training"]["multi_shift"] == shift


def test_training_and_test_images_are_those_of_the_data_set(few):
    data = Command("--train_size=300").data
    np.testing.assert_array_equal(data.train.images, few.x_train[:300])
    np.testing.assert_array_equal(data.train.labels, few.y_train[:300])
    np.testing.assert_array_equal(data.test.images, few.x_test)
    np.testing.assert_array_equal(data.test.labels, few.y_test)


def test_validation_images_are_drawn_from_the_training_images_by_the_seed(few):
    number = {image.tobytes(): i for i, image in enumerate(few.x_train[:300])}
    words = ["--train", "--train_size=300"]
    held_out = {}
    for seed in (0, 1):
        command = Command(*words, "--validation_check", "--data_deformation", f"--seed={seed}")
        train, validation = command.data.train, command.data.validation
        indices = [
            [number[image.tobytes()] for image in part.images] for part in (train, validation)
        ]
        for ours, expected in zip(indices, split_validation(300, seed), strict=True):
            assert ours == expected.tolist()
        for part, order in zip((train, validation), indices, strict=True):
            np.testing.assert_array_equal(part.labels, few.y_train[order])
        held_out[seed] = indices[1]
        assert (len(train.labels), len(validation.labels)) == (250, 50)
        assert shifts(train.training_plan(0, 0)) == [[-2, -1, 0, 1, 2]] * 2
        assert shifts(validation.evaluation_plan()) == [[0], [0]]
        assert command.data.held_out
    assert held_out[0] != held_out[1]
    data = Command(*words).data
    assert data.validation is None and len(data.train.labels) == 300 and not data.held_out


def test_more_training_images_than_there_are_is_the_same_run_as_all_of_them(few):
    for words in [], ["--train_size=400"], ["--train_size=500"]:
        data = Command(*words).data
        assert data.train_size == 0 and len(data.train.labels) == 400
    data = Command("--train_size=399").data
    assert data.train_size == 399 and len(data.train.labels) == 399


@pytest.mark.parametrize("words", [[], ["--train_size=300"], ["--train_size=300", "--seed=4"]])
def test_the_fingerprint_of_mnist_is_that_of_its_first_images_whatever_the_seed(few, words):
    """So that runs of earlier versions are resumed."""
    data = Command(*words).data
    size = data.train_size or None
    np.testing.assert_array_equal(data.train.images, few.x_train[:size])
    content = few.x_train[:size].tobytes() + few.y_train[:size].astype(np.int32).tobytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    seed = 4 if "--seed=4" in words else 0
    assert data.digest(data.train_size, seed) == digest
    assert data.trained({"data": digest, "train_size": data.train_size, "seed": seed})
    assert not data.trained({"data": digest, "train_size": 7, "seed": seed})


@pytest.fixture
def sorted_images(tmp_path, monkeypatch):
    """A .npz file of 60 images, sorted by their three classes."""
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (60, 20, 20), np.uint8)
    labels = np.repeat(np.arange(3, dtype=np.int32), 20)
    np.savez("own.npz", x_train=images, y_train=labels, x_test=images[::9], y_test=labels[::9])
    return images[..., None], labels


def test_of_a_sorted_file_some_images_of_each_class_are_trained_drawn_by_the_seed(sorted_images):
    words = ["--dataset=own.npz", "--train_size=12"]
    data, other = Command(*words).data, Command(*words, "--seed=1").data
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    assert (data.train.images != other.train.images).any()
    assert data.digest(12, 0) == other.digest(12, 0) != data.digest(12, 1)
    settings = {"train_size": 12, "seed": 0, "data": data.digest(12, 0)}
    assert data.trained(settings) and other.trained(settings)
    assert not data.trained(settings | {"seed": 1})


def test_runs_of_earlier_versions_trained_on_the_first_images_and_are_known(sorted_images):
    images, labels = sorted_images
    data = Command("--dataset=own.npz").data
    content = hashlib.sha256(images[:12].tobytes() + labels[:12].tobytes()).hexdigest()[:16]
    settings = {"seed": 0, "data": content}
    assert data.trained(settings | {"train_size": 12})
    assert not data.trained(settings | {"train_size": 11})
    assert not data.trained(settings | {"train_size": 0})


def test_the_data_of_the_program_are_used_from_anywhere_unless_another_folder_is_named(
    tmp_path, few, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, folder, *_: asked.append((name, str(folder))) or few
    )
    monkeypatch.chdir(tmp_path)
    assert Command().data.dataset is few
    assert Command("--data_dir=mine", "--dataset=kmnist").data.dataset is few
    (tmp_path / "data/mnist").mkdir(parents=True)
    for name in ("mnist", "kmnist"):  # which is not there
        assert Command(f"--dataset={name}").data.dataset is few
    assert asked == [
        *(("mnist", str(ROOT / "data")), ("kmnist", "mine")),
        *(("mnist", "data"), ("kmnist", str(ROOT / "data"))),
    ]


# ---------------------------------------------------------------- data sets of other forms


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """The working folder, in which commands load data sets of their own."""
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_arrays(path, images):
    """Write a .npz file of images of the labels 1 and 2."""
    labels = np.arange(len(images)) % 2 + 1
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


def test_images_of_two_channels_are_trained_tested_and_drawn_but_not_predicted(own_data):
    save_arrays("a.npz", np.random.default_rng(0).integers(0, 2, (24, 17, 17, 2)))
    Image.new("L", (17, 17)).save("a.png")
    words = [*FAST, "--dataset=a.npz", "--epoch=1", "--batch_size=12"]
    result = run(own_data, *words, "--train", "--test", "--reconstruction_test", "--tweak_test")
    assert result.code == 0 and result.err == "", result.err
    notes = ["a: images are int64 from 0 to 1, scaled", "a: 2 different labels from 1 to 2"]
    for note in notes:  # what was changed is printed once, before training
        assert result.out.count(note) == 1
        assert result.out.index(note) < result.out.index("training images of")
    assert re.search(r"^Accuracy per class: 1 \S+%, 2 \S+%$", result.out, re.MULTILINE)
    refusal = run(own_data, *words, "--predict=a.png")
    assert_refused(refusal, 1, "images of 2 channels", "expected one of 1 or 3")


def photos(root, splits=("",), count=12):
    """Coloured images of two classes and of several sizes."""
    stream = np.random.default_rng(0)
    for split in splits:
        for channel, name in (0, "red"), (2, "blue"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((*stream.integers(20, 60, 2), 3), 30, np.uint8)
                pixels[..., channel] = stream.integers(150, 256)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")


def test_images_of_several_sizes_need_a_size_that_they_are_made_to_fit(own_data):
    photos(own_data / "photos")
    result = run(own_data, "--dataset=photos", "--train", *FAST)
    assert_refused(result, 1, "pixels, expected", "give an --image_size=HxW")
    command = Command(*FAST, "--dataset=photos", "--image_size=20x24")
    assert command.data.train.canvas_shape() == (20, 24, 3)
    assert len(command.data.train.labels) == 20 and len(command.data.test.labels) == 4
    assert command.trainer().metadata["training"]["image_size"] == "20x24"


@pytest.mark.parametrize("size", ["20", "0x20", "20x", "20x1025", "20x20x3", "-1x5", "axb"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    assert_refused(run(tmp_path, "--train", f"--image_size={size}"), 2, "expected height and width")


def test_the_validation_images_of_a_data_set_are_those_of_validation_check(own_data, capsys):
    photos(own_data / "photos", ("train", "val", "test"))
    words = [*FAST, "--dataset=photos", "--image_size=20x20"]
    data = Command(*words).data
    assert data.validation is None and len(data.train.labels) == 24
    assert "24 validation images are only used with --validation_check" in capsys.readouterr().out
    command = Command(*words, "--validation_check", "--train")
    trainer, dataset = command.trainer(), command.data.dataset
    assert "24 validation images choose the best weights" in capsys.readouterr().out
    assert len(trainer.data.labels) == 24 and not command.data.held_out
    np.testing.assert_array_equal(trainer.validation.images, dataset.x_validation)
    np.testing.assert_array_equal(trainer.validation.labels, dataset.y_validation)
    first = trainer.metadata["training"]["validation_data"]
    (own_data / "photos/val/red/0.jpg").unlink()
    again = Command(*words, "--validation_check", "--train").trainer()
    assert first and again.metadata["training"]["validation_data"] != first


def test_arrays_for_validation_are_used_as_a_folder_is(sorted_images):
    images, labels = sorted_images
    arrays = dict(np.load("own.npz"))
    np.savez("own.npz", **arrays, x_val=images[:7, ..., 0], y_val=labels[:7])
    assert Command("--dataset=own.npz", "--train").data.validation is None
    data = Command("--dataset=own.npz", "--train", "--validation_check").data
    np.testing.assert_array_equal(data.validation.images, images[:7])
    assert len(data.train.labels) == 60 and not data.held_out


def ink_files(invert=False, channels=1, background=0):
    """Write a .npz file of light ink on a dark background, or inverted."""
    images = np.full((24, 20, 20, channels), background, np.uint8)
    images[:, 5:15, 9:11] = 255
    images = 255 - images if invert else images
    save_arrays("a.npz", images)
    return images


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_overlapping_digits_of_dark_ink_are_overlaid_by_their_ink(own_data, invert, channels):
    ink_files(invert, channels)
    data = Command("--dataset=a.npz", "--multi_MNIST").data.train
    assert not data.images[:, 0].any() and (data.images[:, 5:15, 9:11] == 255).all()


def test_coloured_images_shift_on_the_background_of_their_set(own_data):
    images = ink_files(invert=True, channels=3, background=20)
    command = Command(*FAST, "--dataset=a.npz", "--data_deformation")
    np.testing.assert_array_equal(command.data.train.images, images)
    assert command.data.train.background.tolist() == [235, 235, 235]
    assert command.trainer().metadata["training"]["ground"] == [235, 235, 235]
    assert command.data.test.background is None  # which is not shifted


def test_grey_images_of_dark_ink_are_inverted_and_the_run_says_so(own_data):
    images = ink_files(invert=True)
    command = Command(*FAST, "--dataset=a.npz", "--data_deformation")
    np.testing.assert_array_equal(command.data.train.images, 255 - images)
    assert command.trainer().metadata["training"]["inverted"] is True
    names, network = ["1", "2"], small_network((20, 20, 1), 2)
    check_data(weights_of(network, class_names=names, inverted=True), command.data)
    with pytest.raises(UserError, match="trained on dark ink on a light ground.*train again"):
        # An earlier version did not invert them.
        check_data(weights_of(network, class_names=names), command.data)


def test_weights_are_not_tested_on_images_that_they_were_trained_on(own_data):
    photos(own_data / "photos")
    words = [*FAST, "--dataset=photos", "--image_size=20x20"]
    command = Command(*words, "--seed=3")
    trainer = command.trainer()
    training = trainer.metadata["training"]
    assert training["held_out_seed"] == 3
    weights = weights_of(trainer.network, **training)
    check_data(weights, command.data)
    other = Command(*words, "--seed=4").data
    with pytest.raises(UserError, match="trained on; give --seed=3"):
        check_data(weights, other)
    check_unseen("exported", training | {"dataset": "other photos"}, other)
    # One file more, and the same seed draws other test images.
    shutil.copy("photos/blue/0.jpg", "photos/blue/00.jpg")
    with pytest.raises(UserError, match="images of photos have changed since the training"):
        check_data(weights, Command(*words, "--seed=3").data)


def test_images_below_17_pixels_need_a_smaller_kernel(own_data):
    save_arrays("a.npz", np.random.default_rng(0).integers(0, 256, (24, 16, 30)).astype(np.uint8))
    refusal = run(own_data, "--dataset=a.npz", "--train", *FAST)
    assert_refused(refusal, 1, "at least 17×17", "16, 30", "give a --dataset of larger images")
    assert [path.name for path in own_data.iterdir()] == ["a.npz"]
    command = Command(*FAST, "--dataset=a.npz", "--kernel_size=8")
    assert command.config.sizes()[0] == ("conv1", (9, 23, 8), (64 + 1) * 8)
    with pytest.raises(ImageTooSmall):
        print(Command(*FAST, "--dataset=a.npz", "--kernel_size=9").config)
