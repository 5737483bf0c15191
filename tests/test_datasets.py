import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils
from capsnet_core.errors import UserError
from inputs import datasets
from inputs.readers.dataset import Dataset

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def mnist():
    return datasets.load_dataset("mnist", DATA)


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


def test_the_known_data_sets_have_a_black_background_and_are_not_changed(mnist):
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


# --- Fewer training images ------------------------------------------------------------------------


def sorted_set(counts, **options):
    """A Dataset sorted by class, whose images are their own numbers."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    names = tuple(map(str, range(len(counts))))
    return Dataset("a", images, labels, images[:5], labels[:5], names, **options)


def numbers_of(dataset, size, seed=0):
    images, labels = datasets.training_images(dataset, size, seed)
    numbers = images.ravel().tolist()
    assert labels.tolist() == dataset.y_train[numbers].tolist()
    return numbers


@pytest.mark.parametrize("size", [1, 100, 399])
def test_of_mnist_the_first_images_are_used_whatever_the_seed(mnist, size):
    """Its own order is random, and runs of earlier versions took the first."""
    assert mnist.shuffled
    for seed in 0, 1:
        images, labels = datasets.training_images(mnist, size, seed)
        np.testing.assert_array_equal(images, mnist.x_train[:size])
        np.testing.assert_array_equal(labels, mnist.y_train[:size])


def test_of_files_of_ones_own_images_of_each_class_are_drawn_by_the_seed():
    dataset = sorted_set([100, 50, 10])
    assert not dataset.shuffled
    drawn = numbers_of(dataset, 32)
    assert len(set(drawn)) == 32 and drawn == sorted(drawn)
    counts = np.bincount(dataset.y_train[drawn])
    assert np.abs(counts - [20, 10, 2]).max() <= 1
    assert numbers_of(dataset, 32) == drawn != numbers_of(dataset, 32, seed=1)
    assert set(dataset.y_train[numbers_of(dataset, 3)]) == {0, 1, 2}  # one of each before two


def test_without_a_size_all_training_images_are_used_as_they_are():
    dataset = sorted_set([4, 3])
    images, labels = datasets.training_images(dataset, 0, 5)
    assert images is dataset.x_train and labels is dataset.y_train


def test_a_file_sorted_by_class_keeps_its_classes_and_a_folder_too(tmp_path):
    images, labels = np.full((60, 5, 5), 200, np.uint8), np.repeat(np.arange(3), 20)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for number, label in enumerate(labels):
        for split in "train", "test":
            path = tmp_path / "a" / split / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[0]).save(path)
    for name in "a.npz", "a":
        dataset = datasets.load_dataset(str(tmp_path / name), "")
        _, kept = datasets.training_images(dataset, 12, 0)
        assert np.bincount(kept).tolist() == [4, 4, 4]


# --- Orientation ----------------------------------------------------------------------------------


def is_noted(images, labels, names=tuple("0123456789")):
    dataset = Dataset("a", images, labels, images[:5], labels[:5], names)
    noted = datasets.note_if_transposed(dataset)
    assert noted._replace(notes=()) == dataset._replace(notes=())
    return any("look transposed, as EMNIST's are stored" in note for note in noted.notes)


@pytest.fixture(scope="module")
def digits(mnist):
    return mnist.x_train[:2000], mnist.y_train[:2000]


def test_transposed_digits_are_noticed_by_the_means_of_their_classes(digits):
    images, labels = digits
    turned = images.swapaxes(1, 2)
    for count in 100, 2000:
        assert is_noted(turned[:count], labels[:count])
        assert not is_noted(images[:count], labels[:count])
    # Among letters too, as in EMNIST's other parts, and whatever the place of their names.
    names = (*"ab", *reversed("0123456789"))
    assert is_noted(turned, 11 - labels, names) and not is_noted(images, 11 - labels, names)
    # Digits larger than MNIST's and blurred, as EMNIST's are.
    larger = np.stack([
        np.asarray(Image.fromarray(i[4:24, 4:24, 0]).resize((24, 24), Image.Resampling.BICUBIC))
        for i in images
    ])  # fmt: skip
    larger = np.pad(larger, ((0, 0), (2, 2), (2, 2)))[..., None]
    assert is_noted(larger.swapaxes(1, 2), labels) and not is_noted(larger, labels)


def test_other_images_are_not_taken_for_transposed_digits(digits):
    images, labels = digits
    turned, stream = images.swapaxes(1, 2), np.random.default_rng(0)
    for _ in range(20):  # other classes than the digits that they are named by
        assert not is_noted(turned, stream.permutation(labels))
        numbers = stream.permutation(10)
        if (numbers == np.arange(10)).sum() < 4:
            assert not is_noted(turned, numbers[labels])
    noise = stream.integers(0, 256, images.shape, np.uint8)
    assert not is_noted(noise, labels) and not is_noted(0 * noise, labels)
    assert not is_noted(turned[:, :20], labels)  # of another size
    assert not is_noted(turned, labels, tuple("abcdefghij"))
    assert not is_noted(turned[:, :, ::-1], labels)


def clothes(labels, stream):
    """Solid shapes: tops, trousers, shoes and bags, as wide and high as the image allows."""
    rows, columns = np.mgrid[:28, :28]
    images = []
    for label in labels:
        width, height = stream.integers(4, 13), stream.integers(9, 14)
        if label in (5, 7, 9):  # shoes
            shape = (rows > 13) & (rows < 22) | (columns < 9) & (rows > 14 - label) & (rows < 22)
        elif label == 1:  # trousers
            shape = (abs(abs(columns - 13.5) - 4) < 2.5) | (rows < 7) & (abs(columns - 13.5) < 6)
        elif label == 8:  # a bag
            shape = (rows > 8) & (columns > 2) & (columns < 25)
        else:  # a body with sleeves
            shape = (abs(columns - 13.5) < width) | (rows < 2 + 2 * label) & (rows > 2)
        images.append((shape & (abs(rows - 13.5) < height)) * stream.integers(90, 256))
    return np.stack(images).astype(np.uint8)[..., None]


def test_clothes_upright_or_not_are_not_taken_for_transposed_digits():
    stream = np.random.default_rng(1)
    labels = np.arange(1000, dtype=np.int32) % 10
    images = clothes(labels, stream)
    for turned in images, images.swapaxes(1, 2), np.rot90(images, 1, (1, 2)):
        assert not is_noted(turned, labels)


@pytest.mark.filterwarnings("error")
def test_nothing_is_noted_if_digits_cannot_be_compared(digits, tmp_path, monkeypatch):
    turned, labels = digits[0].swapaxes(1, 2), digits[1]
    assert not is_noted(turned[labels < 9], labels[labels < 9])  # no image of a 9
    assert is_noted(turned, labels)
    monkeypatch.setattr(datasets, "ROOT", tmp_path)
    assert not is_noted(turned, labels)  # MNIST is not there
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    assert not is_noted(turned, labels)  # nor its files
    (tmp_path / "data" / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    assert not is_noted(turned, labels)


def test_transposed_digits_are_noticed_when_a_file_is_loaded(tmp_path, digits):
    images, labels = digits
    for turned, transposed in (images, False), (images.swapaxes(1, 2), True):
        arrays = {"x_train": 255 - turned[:500], "y_train": labels[:500]}  # and dark on light
        np.savez(tmp_path / "a.npz", **arrays, x_test=255 - turned[:5], y_test=labels[:5])
        notes = datasets.load_dataset(str(tmp_path / "a.npz"), "").notes
        assert any("transposed" in note for note in notes) is transposed
