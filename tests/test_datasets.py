import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils
from capsnet.errors import UserError
from inputs import datasets
from inputs.readers.dataset import Dataset

DATA = Path(__file__).parent.parent / "data"


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_a_set_of_images_is_dark_or_light_if_nearly_all_of_its_edges_are():
    dark = np.zeros((100, 5, 5, 1), np.uint8)
    dark[:, 2, 2] = 255
    assert datasets.common_background(dark) == "dark"
    assert datasets.common_background(255 - dark) == "light"
    for light, expected in (4, "dark"), (5, None), (50, None), (95, None), (96, "light"):
        mixed = np.concatenate([255 - dark[:light], dark[light:]])
        assert datasets.common_background(mixed) == expected, light
    many = np.concatenate([dark] * 30)
    many[:60] = 255  # 2% of 3,000 images
    assert datasets.common_background(many) == "dark"


# --- Background ---------------------------------------------------------------------------------


def dataset_of(images, **options):
    labels = np.arange(len(images), dtype=np.int32) % 2
    return Dataset("a", images, labels, images[:5], labels[:5], ("0", "1"), **options)


def inks(count=40, channels=1):
    """Light ink of random strength in the middle of black images of 8×8 pixels."""
    images = np.zeros((count, 8, 8, channels), np.uint8)
    images[:, 2:6, 3:5] = np.random.default_rng(0).integers(100, 256, (count, 4, 2, channels))
    return images


def test_grey_images_of_dark_ink_are_inverted_once_and_a_line_says_so():
    images = inks()
    data = datasets.invert_if_light(dataset_of(255 - images, x_validation=255 - images[:3]))
    for array, expected in (
        (data.x_train, images),
        (data.x_test, images[:5]),
        (data.x_validation, images[:3]),
    ):
        np.testing.assert_array_equal(array, expected)
    assert data.inverted
    assert data.notes == ("dark ink on a light background, so all images are inverted",)
    assert datasets.invert_if_light(data) is data


def test_light_ink_photographs_and_colours_are_not_inverted():
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    for images in inks(), noise, 255 - inks(channels=3):
        data = dataset_of(images)
        assert datasets.invert_if_light(data) is data


def test_files_of_dark_ink_are_inverted_when_they_are_loaded(tmp_path):
    images = inks()
    labels = np.arange(40) % 2
    np.savez(tmp_path / "a.npz", x_train=255 - images, y_train=labels, x_test=255 - images[:4],
             y_test=labels[:4])  # fmt: skip
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "a" / ("train" if number > 9 else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - image[..., 0]).save(place / f"{number}.png")
    for name in "a.npz", "a":
        data = datasets.load_dataset(str(tmp_path / name), "")
        assert data.inverted and not data.x_train[:, 0].any() and not data.x_test[:, 0].any()


def test_parts_with_other_backbackgrounds_are_refused():
    data = dataset_of(inks())
    for change in {"x_test": 255 - data.x_test}, {"x_validation": 255 - data.x_test}:
        part = next(iter(change)).removeprefix("x_")
        with pytest.raises(UserError, match=f"a dark background and the {part} images a light one"):
            datasets.invert_if_light(data._replace(**change))


def test_an_even_background_is_the_colour_of_nearly_all_edges():
    background = np.array([250, 240, 30], np.uint8)
    images = np.tile(background, (40, 8, 8, 1))
    images[:, 3:5, 3:5] = 0
    assert datasets.even_background(images).tolist() == [250, 240, 30]
    noisy = images + np.random.default_rng(0).integers(-5, 6, images.shape, np.int8).astype(
        np.uint8
    )
    assert np.abs(datasets.even_background(noisy[..., 2:]).astype(int) - 30).max() <= 2
    assert datasets.even_background(inks()).tolist() == [0]
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    assert datasets.even_background(noise) is None


def test_the_known_data_sets_have_a_black_background_and_are_not_changed():
    mnist = datasets.load_dataset("mnist", DATA)
    assert datasets.even_background(mnist.x_train).tolist() == [0]
    assert datasets.remove_background(mnist) is mnist and mnist.notes == ()


def test_only_the_ink_is_left_where_digits_are_overlaid():
    ink = inks(channels=3)
    paper = np.array([230, 220, 200], np.uint8)
    page = np.minimum(255 - ink, paper)  # dark ink on yellow paper
    data = datasets.remove_background(dataset_of(page))
    expected = [[max(0, 255 - int(v) - (255 - int(p))) for v, p in zip(pixel, paper, strict=True)]
                for pixel in page.reshape(-1, 3)]  # fmt: skip
    assert data.x_train.reshape(-1, 3).tolist() == expected
    assert not data.x_train[:, 0].any() and data.x_train[:, 3, 3].min() > 0
    assert [note.split(", so")[0] for note in data.notes] == [
        "dark ink on a light background",
        "a background of (25, 35, 55) is subtracted from all images",
    ]
    assert data.inverted and data.subtracted == (25, 35, 55)


# --- Size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_a_file_are_made_to_fit_a_size_channel_by_channel(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, channels), np.uint8)
    images[:, :, :3] = 0
    labels = np.arange(8) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = datasets.load_dataset(str(tmp_path / "a.npz"), "", image_size=(9, 12))
    assert data.x_train.shape == data.x_test.shape == (8, 9, 12, channels)
    assert data.notes == ("images resized from 6x6 to 9x12 pixels",)
    for image, fitted in zip(images, data.x_train, strict=True):
        for c in range(channels):
            if channels == 3:  # padded with one colour of the edge, which is that of each channel
                expected, _ = utils.fit_image(image, (9, 12, 3), False)
                expected = expected[..., c]
            else:
                expected, _ = utils.fit_image(image[..., c : c + 1], (9, 12, 1), False)
                expected = expected[..., 0]
            np.testing.assert_array_equal(fitted[..., c], expected)


def test_images_of_the_size_asked_for_stay_as_they_are(tmp_path):
    mnist = datasets.load_dataset("mnist", DATA, image_size=(28, 28))
    assert mnist.notes == () and mnist.x_train.shape == (60000, 28, 28, 1)


def test_the_error_of_an_unknown_data_set_names_every_form(tmp_path):
    with pytest.raises(UserError) as error:
        datasets.load_dataset("nowhere", tmp_path)
    for form in ("kmnist", ".npz", "FOLDER/CLASS/*", "FOLDER/train/CLASS/*"):
        assert form in one_line(error)


def test_classes_and_data_sets_are_named_so_that_every_file_can_hold_the_names(tmp_path):
    folder = tmp_path / os.fsdecode(b"set\xff")
    for split, name in itertools.product(("train", "test"), (b"\xfe", "猫".encode())):
        (folder / split / os.fsdecode(name)).mkdir(parents=True)
        Image.new("L", (20, 20)).save(folder / split / os.fsdecode(name) / "1.png")
    dataset = datasets.load_dataset(str(folder), "")
    assert dataset.name == "set\\xff" and set(dataset.class_names) == {"\\xfe", "猫"}


def test_a_data_set_has_the_name_that_is_known_without_loading_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = np.zeros((4, 5, 5), np.uint8), np.arange(4) % 2
    np.savez("own.v1.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for split, name in itertools.product(("train", "test"), "ab"):
        path = Path("pics.npz", split, name, "1.png")
        path.parent.mkdir(parents=True)
        Image.fromarray(images[0]).save(path)
    monkeypatch.chdir("pics.npz/train")
    for path, name in ("../../own.v1.npz", "own.v1"), ("../../pics.npz", "pics.npz"):
        assert datasets.dataset_name(path) == datasets.load_dataset(path, None).name == name
    assert datasets.dataset_name("..") == datasets.load_dataset("..", None).name == "pics.npz"
    assert datasets.dataset_name("kmnist") == "kmnist"
